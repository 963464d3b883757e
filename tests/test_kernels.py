"""Explicit kernels against autograd: the same loss, gradient, statistics and step, to rounding."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from idiolect.compute.autograd import Model
from idiolect.compute.kernels import Kernels, NotAChainError
from idiolect.core.errors import UsageError
from idiolect.core.tree import Tree, clip, step
from idiolect.core.types import Batch, Lockstep
from idiolect.models import fedfsa_cnn, mlp, small_cnn
from idiolect.rounds.batches import Shuffled
from idiolect.rounds.client import descend
from idiolect.rounds.training import Training

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


class Counted(TorchDispatchMode):
    """Note every operation and the largest new tensor it returns."""

    def __init__(self):
        super().__init__()
        self.ran, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.ran.append(function.overloadpacket.__name__)
        held = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in held:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_the_pass_back_ends_at_the_first_weight_asked_for():
    _model, kernels, weights = prepared(fedfsa_cnn((1, 16, 16), 10))
    batch = Batch(images(2, 1, 16, 16), torch.tensor([1, 2]))
    with Counted() as head:
        kernels.grad(weights, batch, {"fc3.weight"})
    with Counted() as everything:
        kernels.grad(weights, batch)
    assert everything.ran.count("convolution_backward") == 2
    assert "convolution_backward" not in head.ran
    assert head.ran.count("mm") == 0 < everything.ran.count("mm")


def test_a_step_allocates_nothing_of_the_size_of_the_weights():
    model, kernels, weights = prepared(fedfsa_cnn((1, 16, 16), 10))
    batch = Batch(images(2, 1, 16, 16), torch.tensor([1, 2]))
    with Counted() as step_:
        kernels.descend(weights, batch, 0.1)
    with Counted() as gradient:
        kernels.grad(weights, batch)
    assert gradient.largest == model.structure.trainable.total > 1e6
    assert step_.largest <= 2 * 1024  # the widest layer's activations


@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_that_diverged_ends_as_nan(frozen):
    torch.manual_seed(8)
    model, kernels, weights = prepared(small_cnn((1, 8, 8), 10))
    batch = Batch(images(4, 1), torch.randint(10, (4,)), frozen=frozen)
    weights["conv1.weight"][0, 0, 0, 0] = torch.nan
    expected = model.grad(weights, batch)
    found = kernels.grad(weights, batch)
    assert found.loss.isnan()
    assert torch.equal(found.gradient.flat.isnan(), expected.gradient.flat.isnan())
    assert torch.equal(found.buffers.flat.isnan(), expected.buffers.flat.isnan())
    kernels.descend(weights, batch, 0.1)
    assert weights["fc2.weight"].isnan().all()
    assert kernels.predict(weights, batch.x).isnan().all()


def test_ties_of_a_pool_go_to_the_first():
    """Images of few different values: every pool has ties, of zeros and of others."""
    torch.manual_seed(9)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 1), nn.ReLU(), nn.MaxPool2d(2), nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(27, 4)
    )
    check(net, torch.randint(-1, 2, (6, 1, 8, 8)).double(), torch.randint(4, (6,)))


def test_a_single_example_cannot_be_normalized():
    model, kernels, weights = prepared(mlp((6,), 4))
    alone = Batch(torch.randn(1, 6, dtype=torch.float64), torch.tensor([1]))
    for grad in (model.grad, kernels.grad):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            grad(weights, alone)
    same_tree(
        kernels.grad(weights, alone._replace(frozen=True)).gradient,
        model.grad(weights, alone._replace(frozen=True)).gradient,
    )


def test_results_may_be_used_under_autograd():
    _model, kernels, weights = prepared(mlp((6,), 4))
    batch = Batch(torch.randn(5, 6, dtype=torch.float64), torch.randint(4, (5,)))
    out = kernels.grad(weights, batch)
    leaf = torch.ones((), dtype=torch.float64, requires_grad=True)
    (leaf * out.gradient.flat.sum() + leaf * kernels.predict(weights, batch.x).sum()).backward()
    out.gradient.flat.add_(1)
    out.loss.mul_(2)
    assert leaf.grad.isfinite()
    assert not out.loss.requires_grad


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_a_descent_gives_ordinary_tensors(loss, clip):
    """Kernels descend in inference mode; what comes out may still be moved in place, or be part of a graph."""
    torch.manual_seed(10)
    model, kernels, weights = prepared(mlp((6,), 4), loss)
    x, y = torch.randn(13, 6, dtype=torch.float64), torch.randint(4, (13,))
    batches = Shuffled(x, y, 5, True, (0,)).epochs(1)
    expected, found = (descend(learner, Training(clip=clip), weights, batches, 0.1) for learner in (model, kernels))
    same_tree(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    close(found[2], expected[2])
    assert not any(tensor.is_inference() for tensor in (found[0].flat, *found[1:]))


def test_clipping_within_the_step_is_clipping_before_it():
    torch.manual_seed(10)
    _model, kernels, weights = prepared(mlp((6,), 4))
    batch = Batch(torch.randn(5, 6, dtype=torch.float64), torch.randint(4, (5,)))
    out = kernels.grad(weights, batch)
    for largest in (0.1, 100.0):
        end, _, _ = descend(kernels, Training(clip=largest), weights, [batch], 0.1)
        same_tree(end, step(weights, -0.1, clip(out.gradient, largest), out.buffers))


def test_autograd_works_in_the_midst_of_a_descent():
    """A part may ask for the gradient of another loss, which kernels do not know, at weights of its own making."""
    model, _kernels, weights = prepared(mlp((6,), 4))
    batch = Batch(torch.randn(5, 6, dtype=torch.float64), torch.randint(4, (5,)))
    expected = model.grad(weights, batch)
    with torch.inference_mode():
        there, drawn = weights.clone(), Batch(batch.x.clone(), batch.y.clone())
        assert there.flat.is_inference()
        found = model.grad(there, drawn)
    same_tree(found.gradient, expected.gradient)


def test_single_precision():
    torch.manual_seed(10)
    net = small_cnn((1, 8, 8), 10)
    model = Model(net)
    kernels = Kernels(model)
    batch = Batch(images(16, 1).float(), torch.randint(10, (16,)))
    expected, found = model.grad(model.initial, batch), kernels.grad(model.initial, batch)
    assert found.gradient.flat.dtype == torch.float32
    assert torch.allclose(found.gradient.flat, expected.gradient.flat, atol=1e-6)


def test_a_gradient_is_written_whatever_was_in_memory():
    model, kernels, weights = prepared(small_cnn((1, 8, 8), 10))
    batch = Batch(images(4, 1), torch.randint(10, (4,)))
    expected = model.grad(weights, batch)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        found = kernels.grad(weights, batch)
    finally:
        torch.use_deterministic_algorithms(False)
    same_tree(found.gradient, expected.gradient)


def test_threads_do_not_meet():
    """Four clients at once, each with steps of its own, end where they would have ended one after the other."""
    torch.manual_seed(11)
    _, kernels, weights = prepared(small_cnn((1, 8, 8), 10))
    data = [Batch(images(4, 1), torch.randint(10, (4,))) for _ in range(4)]

    def train(batch):
        row = weights.clone()
        for _ in range(10):
            kernels.descend(row, batch, 0.05)
        return row.flat

    alone = [train(batch) for batch in data]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(train, data))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_loss_that_draws_is_seeded():
    def noisy(outputs, y):
        return F.mse_loss(outputs + torch.randn(outputs.shape, dtype=outputs.dtype), y)

    model, kernels, weights = prepared(nn.Linear(3, 2), noisy)
    batch = Batch(torch.ones(4, 3, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64), key=7)
    same_tree(kernels.grad(weights, batch).gradient, model.grad(weights, batch).gradient)


def test_images_of_a_wrong_shape_are_refused():
    _, kernels, weights = prepared(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(8, 3)))
    with pytest.raises(UsageError, match="got an input of shape"):
        kernels.grad(weights, Batch(torch.zeros(2, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1])))


def test_a_stack_of_clients_is_refused():
    _, kernels, weights = prepared(nn.Linear(4, 3))
    with pytest.raises(TypeError, match="one client at a time"):
        kernels.grad(weights, Lockstep((), 0))


@st.composite
def chains(draw):
    """Return a random chain on images, and the shape of its batch."""
    channels, size, n = draw(st.integers(1, 3)), draw(st.integers(5, 9)), draw(st.integers(1, 4))
    shape, layers = (max(n, 2), channels, size, size), []
    for _ in range(draw(st.integers(1, 3))):
        if size >= 3:
            out, kernel = draw(st.integers(1, 4)), draw(st.integers(1, 3))
            padding = draw(st.integers(0, kernel // 2))
            layers.append(nn.Conv2d(channels, out, kernel, padding=padding, bias=draw(st.booleans())))
            channels, size = out, size + 2 * padding - kernel + 1
        more = [lambda c=channels: nn.BatchNorm2d(c), nn.ReLU, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.Identity]
        layers += [make() for make in draw(st.lists(st.sampled_from(more), max_size=3))]
        if size >= 2:
            pool, made = (
                draw(st.sampled_from([(nn.MaxPool2d, 2), (nn.MaxPool2d, 1), (nn.AvgPool2d, 2), (None, 0)])),
                None,
            )
            if pool[0]:
                made = pool[0](2, stride=pool[1])
                layers.append(made)
                size = (size - 2) // pool[1] + 1
        layers += [nn.ReLU()] if draw(st.booleans()) else []
    return [*layers, nn.Flatten(), nn.Linear(channels * size * size, 3)], shape


@settings(max_examples=60, deadline=None, derandomize=True)
@given(chains(), st.integers(0, 1000), st.booleans())
def test_random_chains(chain, seed, coarse):
    layers, shape = chain
    torch.manual_seed(seed)
    x = torch.randint(-2, 3, shape).double() if coarse else torch.randn(shape, dtype=torch.float64)
    check(nn.Sequential(*layers), x, torch.randint(3, shape[:1]))


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
    "own buffer": (lambda: Net(counting, seen=torch.zeros(1)), "tensor 'seen' belongs to no layer of the chain"),
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
