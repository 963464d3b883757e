"""Layers as explicit forward and backward passes, for networks that are a chain of them.

Each class says for one type of `torch.nn` layer what its output is, what is kept for the way back, and how the
gradient goes on. A `Sink` takes the gradients of the weights: it writes them into a row, or takes them off the
weights at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ops = torch.ops.aten


class State(NamedTuple):
    """The tensors of one layer, as views of rows."""

    weights: list[Tensor]
    buffers: list[Tensor]
    """Running mean, running variance, counter."""


class Sink(Protocol):
    """Where the gradients of a layer's weights go; `at` counts its own weights."""

    def wants(self, at: int) -> bool:
        """Return whether this gradient is asked for."""
        ...

    def product(self, at: int, left: Tensor, right: Tensor) -> None:
        """Take a gradient that is a matrix product."""
        ...

    def total(self, at: int, values: Tensor) -> None:
        """Take a gradient that is a sum over rows."""
        ...

    def take(self, at: int, gradient: Tensor) -> None:
        """Take a gradient as it is."""
        ...


class Layer:
    """One layer of a chain; the base passes everything on."""

    fresh = False
    """Whether the output is a new tensor that the layer itself does not need again."""

    def __init__(self, module: nn.Module) -> None:
        pass

    def forward(self, x: Tensor, state: State, frozen: bool) -> tuple[Tensor, Any]:
        """Return the output and what the way back needs."""
        return x, None

    def backward(self, d: Tensor, kept: Any, state: State, sink: Sink, further: bool) -> Tensor:  # noqa: ANN401
        """Hand the gradients of the weights to the sink; return that of the input if it goes further."""
        return d


class Linear(Layer):
    """``x @ w.T + b``."""

    fresh = True

    def forward(self, x: Tensor, state: State, frozen: bool) -> tuple[Tensor, Any]:
        """See `Layer`."""
        return F.linear(x, *state.weights), x

    def backward(self, d: Tensor, kept: Any, state: State, sink: Sink, further: bool) -> Tensor:  # noqa: ANN401
        """See `Layer`."""
        before = d @ state.weights[0] if further else d
        d, kept = d.flatten(0, -2), kept.flatten(0, -2)
        if sink.wants(0):
            sink.product(0, d.t(), kept)
        if len(state.weights) > 1 and sink.wants(1):
            sink.total(1, d)
        return before


class Convolution(Layer):
    """One or two dimensions, padded with zeros."""

    fresh = True

    def __init__(self, module: nn.Conv1d | nn.Conv2d) -> None:
        self._forward: Callable[..., Tensor] = torch.conv2d if isinstance(module, nn.Conv2d) else torch.conv1d
        self._settings: list[list[Any]] = [list(module.stride), list(module.padding), list(module.dilation)]
        self._groups = module.groups

    def forward(self, x: Tensor, state: State, frozen: bool) -> tuple[Tensor, Any]:
        """See `Layer`."""
        w, *b = state.weights
        return self._forward(x, w, b[0] if b else None, *self._settings, self._groups), x

    def backward(self, d: Tensor, kept: Any, state: State, sink: Sink, further: bool) -> Tensor:  # noqa: ANN401
        """See `Layer`."""
        w, *b = state.weights
        mask = [further, sink.wants(0), bool(b) and sink.wants(1)]
        zeros = [0] * len(self._settings[0])
        found = ops.convolution_backward(
            d, kept, w, [len(w)] if b else None, *self._settings, False, zeros, self._groups, mask
        )
        for at in (0, 1):
            if mask[at + 1]:
                sink.take(at, found[at + 1])
        return found[0] if further else d


class Stem(Convolution):
    """A convolution of the data, whose own gradient nobody asks for, as one matrix product.

    With one to three channels there is too little for the usual convolution to work on, above all in the gradient of
    its weights: 48 images of 28 x 28, kernel 5, 4 outputs take a third of the time this way. The output lies in memory
    with channels first.
    """

    def __init__(self, module: nn.Conv2d) -> None:
        super().__init__(module)
        self._stride, (high, wide), _ = self._settings
        self._padding, self._size = (wide, wide, high, high), module.kernel_size

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Return whether a first layer is better done so."""
        if not isinstance(module, nn.Conv2d) or module.in_channels > 3:
            return False
        return module.groups == 1 and module.dilation == (1, 1)

    def forward(self, x: Tensor, state: State, frozen: bool) -> tuple[Tensor, Any]:
        """See `Layer`."""
        w, *b = state.weights
        x = F.pad(x, self._padding) if any(self._padding) else x
        for axis in (0, 1):
            x = x.unfold(2 + axis, self._size[axis], self._stride[axis])
        count, _, high, wide = x.shape[:4]
        patches = x.permute(1, 4, 5, 0, 2, 3).reshape(-1, count * high * wide)
        w = w.flatten(1)
        y = torch.addmm(b[0][:, None], w, patches) if b else w @ patches
        return y.view(len(w), count, high, wide).transpose(0, 1), patches

    def backward(self, d: Tensor, kept: Any, state: State, sink: Sink, further: bool) -> Tensor:  # noqa: ANN401
        """See `Layer`."""
        d = d.transpose(0, 1).flatten(1)
        if sink.wants(0):
            sink.take(0, (d @ kept.t()).view_as(state.weights[0]))
        if len(state.weights) > 1 and sink.wants(1):
            sink.take(1, d.sum(1))
        return d


class BatchNorm(Layer):
    """By the batch's own statistics, or by the running ones where these are frozen."""

    fresh = True

    def __init__(self, module: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        self._momentum, self._eps, self._affine = module.momentum, module.eps, module.affine

    def forward(self, x: Tensor, state: State, frozen: bool) -> tuple[Tensor, Any]:
        """See `Layer`."""
        if not frozen and x.numel() == x.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
        w, b = state.weights if self._affine else (None, None)
        mean, variance, counter = state.buffers
        y, *kept = torch.native_batch_norm(x, w, b, mean, variance, not frozen, self._momentum or 0.0, self._eps)
        if not frozen:
            counter.add_(1)
        return y, (x, frozen, *kept)

    def backward(self, d: Tensor, kept: Any, state: State, sink: Sink, further: bool) -> Tensor:  # noqa: ANN401
        """See `Layer`."""
        x, frozen, mean, deviation = kept
        w = state.weights[0] if self._affine else None
        mask = [further, *(self._affine and sink.wants(at) for at in (0, 1))]
        found = ops.native_batch_norm_backward(
            d, x, w, *state.buffers[:2], mean, deviation, not frozen, self._eps, mask
        )
        for at in (0, 1):
            if mask[at + 1]:
                sink.take(at, found[at + 1])
        return found[0] if further else d


class Relu(Layer):
    """In place, where the layer before it gave a tensor that nobody else needs."""

    in_place = False

    def forward(self, x: Tensor, state: State, frozen: bool) -> tuple[Tensor, Any]:
        """See `Layer`."""
        y = torch.relu_(x) if self.in_place else torch.relu(x)
        return y, y

    def backward(self, d: Tensor, kept: Any, state: State, sink: Sink, further: bool) -> Tensor:  # noqa: ANN401
        """See `Layer`."""
        return ops.threshold_backward(d, kept, 0)  # type: ignore[no-any-return]


class Curve(Layer):
    """Another activation, value by value; its slope follows from its output or from its input."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._of_output, self._slope = CURVES[type(module)]

    def forward(self, x: Tensor, state: State, frozen: bool) -> tuple[Tensor, Any]:
        """See `Layer`."""
        y: Tensor = self._module(x)
        return y, y if self._of_output else x

    def backward(self, d: Tensor, kept: Any, state: State, sink: Sink, further: bool) -> Tensor:  # noqa: ANN401
        """See `Layer`."""
        return self._slope(self._module, d, kept)


CURVES: dict[type[nn.Module], tuple[bool, Callable[[Any, Tensor, Tensor], Tensor]]] = {
    nn.Tanh: (True, lambda _, d, y: ops.tanh_backward(d, y)),
    nn.Sigmoid: (True, lambda _, d, y: ops.sigmoid_backward(d, y)),
    nn.Softplus: (False, lambda m, d, x: ops.softplus_backward(d, x, m.beta, m.threshold)),
    nn.GELU: (False, lambda m, d, x: ops.gelu_backward(d, x, approximate=m.approximate)),
}


class MaxPool(Layer):
    """The largest of each window; of several alike, the first."""

    def __init__(self, module: nn.MaxPool2d) -> None:
        size = [_pair(v) for v in (module.kernel_size, module.stride, module.padding, module.dilation)]
        self._settings = [*size, module.ceil_mode]

    def forward(self, x: Tensor, state: State, frozen: bool) -> tuple[Tensor, Any]:
        """See `Layer`."""
        flip = x.stride(0) < x.stride(1)  # after a stem channels come first in memory; pooling does not mind
        x = x.transpose(0, 1) if flip else x
        y, where = ops.max_pool2d_with_indices(x, *self._settings)
        return (y.transpose(0, 1) if flip else y), (x, where, flip)

    def backward(self, d: Tensor, kept: Any, state: State, sink: Sink, further: bool) -> Tensor:  # noqa: ANN401
        """See `Layer`."""
        x, where, flip = kept
        d = d.transpose(0, 1) if flip else d
        d = ops.max_pool2d_with_indices_backward(d, x, *self._settings, where)
        return d.transpose(0, 1) if flip else d


class Flatten(Layer):
    """All axes but the first into one."""

    def forward(self, x: Tensor, state: State, frozen: bool) -> tuple[Tensor, Any]:
        """See `Layer`."""
        return x.flatten(1), x.shape

    def backward(self, d: Tensor, kept: Any, state: State, sink: Sink, further: bool) -> Tensor:  # noqa: ANN401
        """See `Layer`."""
        return d.reshape(kept)


def _pair(value: int | tuple[int, ...]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


LAYERS: dict[type[nn.Module], Callable[..., Layer]] = {
    nn.Linear: Linear,
    nn.Conv1d: Convolution,
    nn.Conv2d: Convolution,
    nn.BatchNorm1d: BatchNorm,
    nn.BatchNorm2d: BatchNorm,
    nn.ReLU: Relu,
    **dict.fromkeys(CURVES, Curve),
    nn.MaxPool2d: MaxPool,
    nn.Flatten: Flatten,
    nn.Identity: Layer,
    nn.Dropout: Layer,
}
"""What can stand in a chain; the settings that are not covered are refused by name in `kernels`."""
