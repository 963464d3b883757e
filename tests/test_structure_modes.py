"""The user's module decides: all engines follow a module that keeps a layer's mode or sets it during a pass."""

import pytest
import torch
from structure_worlds import Net, assert_same, by_hand, clients, played
from torch import nn

from idiolect import methods
from idiolect.compute.autograd import Model
from idiolect.compute.kernels import Kernels, NotAChainError
from idiolect.core.types import Batch


class KeepsEvaluating(nn.Sequential):
    """Keeps its batch normalization in evaluation mode."""

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


class KeepsBlock(nn.Sequential):
    """A block in a model, which keeps its own mode."""

    def train(self, mode=True):
        return super().train(False)


class SetsMomentum(nn.Sequential):
    """Sets the momentum of its batch normalization by the mode."""

    def train(self, mode=True):
        self[1].momentum = 0.5 if mode else 0.1
        return super().train(mode)


class IgnoresStatistics(nn.Sequential):
    """Normalizes by the batch alone while it trains."""

    def train(self, mode=True):
        self[1].track_running_stats = not mode
        return super().train(mode)


class Calls(nn.Sequential):
    """Doubles what its forward returns, in a call of its own."""

    def __call__(self, x):
        return 2 * super().__call__(x)


def layers():
    return nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)


def chain(m, x):
    return m.fc(m.norm(m.body(x)).tanh())


def parts():
    body, norm, _, fc = layers()
    return {"body": body, "norm": norm, "fc": fc}


def frozen_inside(m, x):
    if m.freeze:
        m.norm.eval()
    return chain(m, x)


def flag_inside(m, x):
    m.norm.training = False
    return chain(m, x)


def momentum_inside(m, x):
    m.norm.momentum = 0.3
    return chain(m, x)


MODULES = {
    "train() keeps a layer": (lambda: KeepsEvaluating(*layers()), "layer '1' keeps a mode of its own"),
    "train() of a block": (
        lambda: nn.Sequential(KeepsBlock(*layers()[:2]), *layers()[2:]),
        "layer '0' keeps a mode of its own",
    ),
    "train() sets momentum": (lambda: SetsMomentum(*layers()), "something else in training than in evaluation mode"),
    "train() sets statistics": (lambda: IgnoresStatistics(*layers()), "something else in training"),
    "eval() in forward": (lambda: Net(frozen_inside, **parts(), freeze=True), "changes the attribute 'norm.training'"),
    "flag in forward": (lambda: Net(flag_inside, **parts()), "changes the attribute 'norm.training'"),
    "momentum in forward": (lambda: Net(momentum_inside, **parts()), "changes the attribute 'norm.momentum'"),
    "a call of its own": (lambda: Calls(*layers()), "has a __call__ of its own"),
}


def made(name):
    torch.manual_seed(1)
    return MODULES[name][0]().double()


@pytest.mark.parametrize("name", MODULES)
def test_kernels_leave_it_to_the_module(name):
    with pytest.raises(NotAChainError, match=MODULES[name][1].replace("(", r"\(")):
        Kernels(Model(made(name)))


@pytest.mark.parametrize("engine", ["sequential", "threads", "processes", "stacked"])
@pytest.mark.parametrize("name", MODULES)
def test_every_engine_follows_the_module(name, engine):
    net, held = made(name), clients()
    run = played(net, methods.fedavg(), engine, participation=0.67)
    cohorts = [record["cohort"] for record in run.records]
    assert any(len(cohort) == 2 for cohort in cohorts)
    assert_same(run, by_hand(net, held, cohorts, lambda n: "tracked" not in n))


@pytest.mark.parametrize("engine", ["sequential", "processes", "stacked"])
def test_kept_statistics_do_not_move_and_normalize(engine):
    net = made("train() keeps a layer")
    net[1].running_mean.fill_(0.7)
    run = played(net, methods.fedavg(), engine)
    assert torch.allclose(run.weights["1.running_mean"], net[1].running_mean, rtol=0, atol=1e-15)


def test_a_flag_that_is_off_leaves_the_chain_to_kernels():
    net = Net(frozen_inside, **parts(), freeze=False).double()
    Kernels(Model(net))
    run = played(net, methods.fedavg(), "processes")
    assert "by explicit kernels" in run.notes[-1]
    assert_same(run, by_hand(net, clients(), [sorted(clients())] * 3, lambda n: "tracked" not in n))


def test_hooks_of_all_modules_are_seen():
    hook = nn.modules.module.register_module_forward_hook(lambda m, given, out: out * 2)
    try:
        with pytest.raises(NotAChainError, match="hooks of all modules"):
            Kernels(Model(nn.Sequential(*layers())))
    finally:
        hook.remove()
    Kernels(Model(nn.Sequential(*layers())))


def test_one_example_is_normalized_by_running_statistics_in_a_class_that_looks_like_batch_normalization():
    class OwnBatchNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(5)), nn.Parameter(torch.zeros(5))
            self.register_buffer("running_mean", torch.full((5,), 0.5))

        def forward(self, x):
            mean = x.mean(0) if self.training else self.running_mean
            if self.training:
                self.running_mean = 0.9 * self.running_mean + 0.1 * mean.detach()
            return (x - mean) * self.weight + self.bias

    net = nn.Sequential(nn.Linear(4, 5), OwnBatchNorm(), nn.Linear(5, 3)).double()
    model = Model(net)
    assert model.structure.has_batch_norm
    assert "1.running_mean" in model.structure.exchangeable
    x, y = torch.randn(1, 4, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    found = model.grad(model.initial, Batch(x, y, frozen=True))
    assert torch.equal(found.buffers["1.running_mean"], net[1].running_mean)
    expected = nn.functional.cross_entropy(net.eval()(x), y)
    assert torch.allclose(found.loss, expected, rtol=1e-12)
