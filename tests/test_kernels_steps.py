"""Steps by explicit kernels: allocations, clipping, threads, random networks."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_worlds import check, close, images, prepared, same_tree
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from idiolect.compute.autograd import Model
from idiolect.compute.kernels import Kernels
from idiolect.core.errors import UsageError
from idiolect.core.tree import clip, step
from idiolect.core.types import Batch, Lockstep
from idiolect.data import Examples
from idiolect.models import fedfsa_cnn, mlp, small_cnn
from idiolect.rounds.batches import Shuffled
from idiolect.rounds.descent import descend
from idiolect.rounds.training import Training


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
    batches = Shuffled(Examples(x, y), 5, True, (0,)).epochs(1)
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
