"""Networks that explicit kernels refuse, and why."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from idiolect.compute.autograd import Model
from idiolect.compute.kernels import Kernels, NotAChainError
from idiolect.models import small_cnn


class Hidden(torch.autograd.Function):
    """The identity forwards, the opposite backwards."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, d):
        return -d


class Net(nn.Module):
    """Two linear layers and whatever is done with them."""

    def __init__(self, forward, **more):
        super().__init__()
        self.a, self.b, self.do = nn.Linear(4, 4), nn.Linear(4, 3), forward
        for name, what in more.items():
            self.register_buffer(name, what) if isinstance(what, torch.Tensor) else setattr(self, name, what)

    def forward(self, x):
        return self.do(self, x)


def without_gradient(m, x):
    with torch.no_grad():
        x = m.a(x)
    return m.b(x)


def in_half(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        return m.b(m.a(x))


def counting(m, x):
    m.seen += 1
    return m.b(m.a(x))


def hooked(where):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    (net if where is None else net[where]).register_forward_hook(lambda *_: None)
    return net


def pre_hooked():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    net[0].register_forward_pre_hook(lambda *_: None)
    return net


def back_hooked():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    net[0].register_full_backward_hook(lambda *_: None)
    return net


def tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    return net


def half_frozen():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    net[0].bias.requires_grad_(False)
    return net


def patched():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    net[0].forward = lambda x: x
    return net


class Own(nn.Linear):
    """A linear layer with a twist."""

    def forward(self, x):
        return super().forward(x) * 2


def twice(*layers):
    shared = nn.Linear(4, 4)
    return nn.Sequential(shared, nn.ReLU(), shared, *layers)


REFUSED = {
    "attention": (lambda: nn.MultiheadAttention(4, 1), "layer '' (MultiheadAttention) has no explicit kernel"),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
        "layer '1' (LayerNorm) has no explicit kernel",
    ),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)), "layer '1' (Dropout) has no explicit kernel"),
    "subclass": (
        lambda: nn.Sequential(nn.Linear(4, 4), Own(4, 3)),
        "its forward handles tensor '1.weight' outside its layer",
    ),
    "residual": (lambda: Net(lambda m, x: m.b(x + m.a(x))), "the output of 'x' is used 2 times"),
    "unused": (lambda: Net(lambda m, x: m.a(x)), "tensor 'b.weight' belongs to no layer of the chain"),
    "result thrown away": (lambda: Net(lambda m, x: (m.a(x), m.b(x))[1]), "is used"),
    "two outputs": (lambda: Net(lambda m, x: (x, m.b(m.a(x)))), "is used 2 times"),
    "tuple": (lambda: Net(lambda m, x: (m.b(m.a(x)),)), "'output' does not work on the output before it"),
    "operator": (lambda: Net(lambda m, x: m.b(m.a(x) * 2)), "'mul' (mul) has no explicit kernel"),
    "method": (lambda: Net(lambda m, x: m.b(m.a(x).detach())), "'detach' (detach) has no explicit kernel"),
    "division by the rows": (lambda: Net(lambda m, x: (lambda z: m.b(z / z.size(0)))(m.a(x))), "'truediv' (truediv)"),
    "view by another's rows": (lambda: Net(lambda m, x: m.b(m.a(x).view(x.size(0), -1))), "'view' (view)"),
    "view by columns": (lambda: Net(lambda m, x: (lambda z: m.b(z.view(z.size(1), -1)))(m.a(x))), "is used"),
    "view of a dtype": (lambda: Net(lambda m, x: m.b(m.a(x).view(torch.float32))), "'view' (view)"),
    "weight by hand": (
        lambda: Net(lambda m, x: m.b(F.linear(x, m.a.weight))),
        "its forward handles tensor 'a.weight' outside",
    ),
    "no gradient": (lambda: Net(without_gradient), "its forward switches gradients or precision"),
    "autocast": (lambda: Net(in_half), "its forward switches gradients or precision"),
    "own function": (
        lambda: Net(lambda m, x: m.b(Hidden.apply(m.a(x)))),
        "its forward calls an autograd function of its own",
    ),
    "chance": (lambda: Net(lambda m, x: m.b(m.a(x) if random.random() < 2 else x)), "its forward draws random numbers"),
    "torch's chance": (
        lambda: Net(lambda m, x: m.b(m.a(x) if torch.rand(1) < 2 else x)),
        "its forward draws random numbers",
    ),
    "mode": (
        lambda: Net(lambda m, x: m.b(m.a(x).relu() if m.training else m.a(x))),
        "the model does something else in training than in evaluation mode",
    ),
    "branch": (
        lambda: Net(lambda m, x: m.b(m.a(x)) if x.sum() > 0 else m.b(x)),
        "its forward is no fixed sequence of layers",
    ),
    "own buffer": (lambda: Net(counting, seen=torch.zeros(1)), "its forward changes the attribute 'seen'"),
    "hook": (lambda: hooked(0), "layer '0' (Linear) has hooks"),
    "hook of the whole": (lambda: hooked(None), "layer '' (Sequential) has hooks"),
    "hook before": (pre_hooked, "layer '0' (Linear) has hooks"),
    "hook backwards": (back_hooked, "layer '0' (Linear) has hooks"),
    "tied": (tied, "parameter '2.weight' is shared by two layers"),
    "one layer twice": (twice, "shared by two layers"),
    "called twice": (lambda: Net(lambda m, x: m.b(m.a(m.a(x)))), "a layer is used more than once"),
    "frozen": (half_frozen, "parameter '0.bias' is frozen"),
    "patched": (patched, "layer '0' (Linear) has a forward of its own"),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 3)),
        "has no explicit kernel",
    ),
    "half precision": (
        lambda: nn.Linear(4, 3).bfloat16(),
        "parameter 'weight' is torch.bfloat16, not float32 or float64",
    ),
    "no statistics": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)),
        "layer '1' (BatchNorm1d) has no explicit kernel without running statistics",
    ),
    "all batches alike": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None)),
        "layer '1' (BatchNorm1d) has no explicit kernel with momentum=None",
    ),
    "mirror": (
        lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"),
        "has no explicit kernel with padding_mode='reflect'",
    ),
    "uneven": (
        lambda: nn.Conv2d(1, 2, 2, padding="same"),
        "has no explicit kernel that pads one side more than the other",
    ),
    "indices": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2, return_indices=True)),
        "layer '1' (MaxPool2d) has no explicit kernel that returns indices",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, line = REFUSED[name]
    net = make()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(NotAChainError) as found:
        Kernels(Model(net))
    assert line in str(found.value)
    assert "\n" not in str(found.value)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items()), "the user's module changed"


def test_reading_leaves_the_module_alone():
    net = small_cnn((1, 8, 8), 10).eval()
    Kernels(Model(net))
    assert not any(layer.training for layer in net.modules())
    assert net(torch.zeros(2, 1, 8, 8)).requires_grad
