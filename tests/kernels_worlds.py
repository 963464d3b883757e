"""What the tests of explicit kernels share: networks by hand, and the comparison with autograd."""

import torch
from torch import nn
from torch.nn import functional as F

from idiolect.compute.autograd import Model
from idiolect.compute.kernels import Kernels
from idiolect.core.tree import Tree, step
from idiolect.core.types import Batch

TINY = 1e-12


def close(found, expected):
    assert found.dtype == expected.dtype
    assert torch.allclose(found, expected, rtol=TINY, atol=TINY * (1 + expected.abs().max().item()))


def same_tree(found, expected):
    assert found.layout is expected.layout
    if expected.layout.total:
        close(found.flat, expected.flat)


def prepared(net, loss=F.cross_entropy, seed=0):
    """Return a model in float64 with statistics and affine weights away from their defaults, and its kernels."""
    net = net.double()
    model = Model(net, loss)
    kernels = Kernels(model)
    row = model.initial.flat + 0.1 * torch.randn(
        model.initial.flat.shape, generator=torch.Generator().manual_seed(seed)
    )
    weights = Tree(model.structure.layout, row.double())
    for item in model.structure.items:
        if item.name.endswith("running_var"):
            weights[item.name].abs_().add_(0.5)
        if item.kind == "counter":
            weights[item.name].fill_(3)
    return model, kernels, weights


def check(net, x, y, loss=F.cross_entropy):
    """Compare gradient, step and prediction over two steps, in both ways of normalizing."""
    model, kernels, weights = prepared(net, loss)
    given = x.clone()
    for frozen in (False, True, False):
        batch = Batch(x, y, frozen=frozen)
        before = weights.clone()
        expected, found = model.grad(weights, batch), kernels.grad(weights, batch)
        same_tree(found.gradient, expected.gradient)
        same_tree(found.buffers, expected.buffers)
        close(found.loss, expected.loss)
        assert found.loss.shape == ()
        assert torch.equal(weights.flat, before.flat), "a gradient changed the weights"
        loss_there = kernels.descend(weights, batch, 0.05)
        close(loss_there, expected.loss)
        same_tree(weights, step(before, -0.05, expected.gradient, expected.buffers))
    close(kernels.predict(weights, x), model.predict(weights, x).detach())
    assert torch.equal(x, given), "the client's data changed"


def images(n, channels=2, height=8, width=8):
    return torch.randn(n, channels, height, width, dtype=torch.float64)


class ByHand(nn.Module):
    """A network written with functions and methods."""

    def __init__(self, forward):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(27, 4)
        self.tail = forward

    def forward(self, x):
        return self.tail(self, x)
