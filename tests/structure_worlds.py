"""What the tests of model structure share: clients, modules made of a function, and federated averaging by hand."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from idiolect import ClientData, Machine, Training, fit

SIZES = {"ada": 12, "ben": 5, "cleo": 8}
LR = 0.2


class Net(nn.Module):
    """Modules, parameters and buffers by name, in this order, and a function of them and the input."""

    def __init__(self, forward, **held):
        super().__init__()
        self.do = forward
        for name, what in held.items():
            if isinstance(what, torch.Tensor) and not isinstance(what, nn.Parameter):
                self.register_buffer(name, what)
            else:
                setattr(self, name, what)

    def forward(self, x):
        return self.do(self, x)


def examples(name, count, shape=(4,)):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    level = torch.randn(1, generator=generator, dtype=torch.float64)
    x = torch.randn(count, *shape, generator=generator, dtype=torch.float64) + level
    return x, torch.arange(count) % 3


def clients(shape=(4,), sizes=SIZES):
    return {
        name: ClientData(train=examples(name, count, shape), test=examples(name + "!", 4, shape))
        for name, count in sizes.items()
    }


def played(net, method, engine="sequential", rounds=3, held=None, **more):
    """Return a run on whole batches."""
    settings = Training(lr=LR, batch_size=None)
    return fit(net, held or clients(), method, rounds=rounds, training=settings, machine=Machine(engine=engine), **more)


def by_hand(net, held, cohorts, shared, loss=F.cross_entropy):
    """Return each client's model after rounds of averaging with these cohorts; what is not shared stays with clients.

    Everything is in a client's own copy of the module, which trains as in any PyTorch program.
    """
    own = {name: copy.deepcopy(net) for name in held}
    server = {n: t.clone() for n, t in tensors(net).items() if shared(n)}
    for cohort in cohorts:
        total, mean = sum(len(held[name].train.y) for name in cohort), {}
        for name in cohort:
            receive(own[name], server)
            module, (x, y) = own[name].train(), held[name].train
            optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], LR)
            optimizer.zero_grad()
            loss(module(x), y).backward()
            optimizer.step()
            for n, t in tensors(module).items():
                if shared(n):
                    mean[n] = mean.get(n, 0) + t.detach() * (len(y) / total)
        server = mean
    for module in own.values():
        receive(module, server)
    return {name: module.eval() for name, module in own.items()}


def tensors(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def receive(module, server):
    with torch.no_grad():
        for n, t in tensors(module).items():
            if n in server:
                t.copy_(server[n])


def assert_same(run, expected):
    for name, module in expected.items():
        found = tensors(run.personal(name))
        for n, t in tensors(module).items():
            assert found[n].dtype == t.dtype
            assert torch.allclose(found[n].double(), t.double(), rtol=1e-11, atol=1e-12, equal_nan=True), (name, n)
