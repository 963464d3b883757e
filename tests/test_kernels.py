"""Explicit kernels against autograd: the same loss, gradient, statistics and step, to rounding."""

import pytest
import torch
from kernels_worlds import ByHand, check, close, images, prepared, same_tree
from torch import nn
from torch.nn import functional as F

from idiolect.core.types import Batch
from idiolect.models import fedfsa_cnn, mlp, small_cnn

FUNCTIONS = {
    "relu, pool, flatten": lambda m, x: m.fc(torch.flatten(F.max_pool2d(F.relu(m.norm(m.conv(x))), 2), 1)),
    "torch.relu, method flatten": lambda m, x: m.fc(F.max_pool2d(torch.relu(m.norm(m.conv(x))), 2).flatten(1)),
    "in place": lambda m, x: m.fc(F.max_pool2d(m.norm(m.conv(x)).relu_(), 2, 2).flatten(start_dim=1)),
    "F in place": lambda m, x: m.fc(F.max_pool2d(F.relu(m.norm(m.conv(x)), inplace=True), (2, 2)).reshape(-1, 27)),
    "view by size": lambda m, x: (lambda z: m.fc(z.view(z.size(0), -1)))(F.avg_pool2d(m.norm(m.conv(x)), 2)),
    "view by shape": lambda m, x: (lambda z: m.fc(z.view(z.shape[0], -1)))(F.avg_pool2d(m.norm(m.conv(x)), 2)),
    "view by size()": lambda m, x: (lambda z: m.fc(z.reshape(z.size()[0], -1)))(
        F.adaptive_avg_pool2d(m.norm(m.conv(x)), 3)
    ),
    "view": lambda m, x: m.fc(F.leaky_relu(F.avg_pool2d(m.norm(m.conv(x)), 2), 0.3).view(-1, 27)),
    "smooth": lambda m, x: m.fc(
        F.gelu(F.softplus(torch.tanh(F.avg_pool2d(m.norm(m.conv(x)), 2)).sigmoid(), 2), approximate="tanh").flatten(1)
    ),
    "options by name": lambda m, x: m.fc(F.max_pool2d(m.norm(m.conv(x)), 3, stride=2, padding=1).flatten(1)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_methods_are_the_modules_they_equal(name):
    torch.manual_seed(1)
    check(ByHand(FUNCTIONS[name]), images(5), torch.randint(4, (5,)))


NETWORKS = {
    "published": (lambda: fedfsa_cnn((1, 16, 16), 10), (6, 1, 16, 16)),
    "batch normalization": (lambda: small_cnn((3, 9, 11), 10), (7, 3, 9, 11)),
    "tabular": (lambda: mlp((20,), 10), (4, 20)),
    "one layer": (lambda: nn.Linear(5, 10), (3, 5)),
    "no biases": (lambda: nn.Sequential(nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 10, bias=False)), (3, 5)),
    "batch of one": (lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 10)), (1, 5)),
    "a large layer": (lambda: nn.Sequential(nn.Linear(800, 700), nn.ReLU(), nn.Linear(700, 10)), (9, 800)),
    "a large layer, no bias": (
        lambda: nn.Sequential(nn.Linear(5, 800), nn.ReLU(), nn.Linear(800, 700, bias=False), nn.Linear(700, 10)),
        (9, 5),
    ),
    "nested": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Linear(5, 7), nn.Sequential(nn.ReLU())), nn.Dropout(0.0), nn.Linear(7, 10),
        ),
        (3, 5),
    ),
    "dilated pool of padding": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 1), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1, dilation=2),
            nn.Flatten(), nn.Linear(27, 10),
        ),
        (3, 1, 8, 8),
    ),
    "first in place": (lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 10)), (3, 2, 2, 3)),
    "a view, then in place": (lambda: nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(12, 10)), (3, 2, 6)),
    "in place after what is kept": (
        lambda: nn.Sequential(
            nn.Linear(5, 7), nn.Tanh(), nn.Flatten(), nn.Identity(), nn.ReLU(), nn.ReLU(), nn.Linear(7, 10),
        ),
        (3, 5),
    ),
    "smooth": (
        lambda: nn.Sequential(
            nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Sigmoid(), nn.Linear(7, 7), nn.Softplus(2, 1),
            nn.Linear(7, 7), nn.GELU(), nn.Linear(7, 7), nn.GELU("tanh"), nn.Linear(7, 7),
            nn.LeakyReLU(0.2, inplace=True), nn.Linear(7, 10),
        ),
        (4, 5),
    ),
    "strides, groups, dilation": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2), nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding="same", dilation=2, groups=6, bias=False), nn.BatchNorm2d(6, affine=False),
            nn.Conv2d(6, 2, 2, padding="valid"), nn.Flatten(), nn.Linear(32, 10),
        ),
        (3, 4, 9, 7),
    ),
    "series": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 3, padding=1), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(21, 10),
        ),
        (3, 2, 7),
    ),
    "pools": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(3, stride=1, padding=1, dilation=1),
            nn.MaxPool2d(2, ceil_mode=True), nn.ReLU(),
            nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
            nn.AvgPool2d(2, divisor_override=3),
            nn.AdaptiveAvgPool2d((1, None)), nn.Flatten(), nn.Linear(6, 10),
        ),
        (3, 1, 13, 13),
    ),
    "odd images under a 2x2 pool": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 10)),
        (3, 1, 8, 8),
    ),
    "pool of the data": (lambda: nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 10)), (3, 2, 4, 4)),
    "global pool": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10)),
        (3, 1, 6, 6),
    ),
    "momentum 0 and 1": (
        lambda: nn.Sequential(
            nn.Linear(5, 7), nn.BatchNorm1d(7, momentum=0.0, eps=1e-2), nn.ReLU(), nn.Linear(7, 6),
            nn.BatchNorm1d(6, momentum=1.0), nn.Linear(6, 10),
        ),
        (4, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_agree_with_autograd(name):
    torch.manual_seed(2)
    make, shape = NETWORKS[name]
    check(make(), torch.randn(shape, dtype=torch.float64), torch.randint(10, shape[:1]))


def test_a_linear_layer_works_along_the_last_axis():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Flatten(), nn.Linear(10, 3))
    check(net, torch.randn(4, 2, 3, dtype=torch.float64), torch.randint(3, (4,)))


def soft(outputs, targets):
    """Mean squared distance, worked out in place."""
    return outputs.sub_(targets).square_().mean()


@pytest.mark.parametrize("loss", [F.mse_loss, soft, F.smooth_l1_loss, nn.MSELoss(reduction="sum")])
@pytest.mark.parametrize("last", [nn.Identity, nn.Sigmoid, nn.ReLU])
def test_any_loss(loss, last):
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), last())
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    if last is not nn.Identity and loss is soft:
        net.append(nn.LeakyReLU(0.5))  # autograd refuses to overwrite an output that it needs
    check(net, x, y, loss)


@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3], dtype=torch.float64)),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(ignore_index=1),
    ],
)
def test_every_cross_entropy(loss):
    torch.manual_seed(5)
    x = torch.randn(6, 4, dtype=torch.float64)
    check(nn.Linear(4, 3), x, torch.tensor([0, 1, 2, 2, 1, 0]), loss)


@pytest.mark.parametrize("y", [torch.tensor([0, -100, 2, 1]), torch.rand(4, 3, dtype=torch.float64)])
def test_ignored_labels_and_probabilities(y):
    check(nn.Linear(4, 3), torch.randn(4, 4, dtype=torch.float64), y)


def test_labels_of_many_places():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1))
    check(net, images(2, 1, 5, 5), torch.randint(3, (2, 3, 3)))


def test_numbers_as_outputs():
    torch.manual_seed(6)
    check(mlp((6,), None), torch.randn(5, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64), F.mse_loss)


def test_a_label_beyond_the_classes_is_an_error():
    _model, kernels, weights = prepared(nn.Linear(4, 3))
    with pytest.raises(IndexError, match="out of bounds"):
        kernels.grad(weights, Batch(torch.zeros(2, 4, dtype=torch.float64), torch.tensor([0, 3])))


def test_some_weights_only():
    """Each weight alone, all but each, none: the same gradient as autograd's, in the structure's order."""
    torch.manual_seed(7)
    model, kernels, weights = prepared(small_cnn((1, 8, 8), 10))
    names = set(model.structure.trainable.names)
    for only in [*({n} for n in names), *(names - {n} for n in names), set(), names | {"elsewhere"}]:
        for frozen in (False, True):
            batch = Batch(images(4, 1), torch.randint(10, (4,)), frozen=frozen)
            expected, found = model.grad(weights, batch, only), kernels.grad(weights, batch, only)
            same_tree(found.gradient, expected.gradient)
            same_tree(found.buffers, expected.buffers)
            close(found.loss, expected.loss)
