"""Layers as explicit kernels: a forward and a backward pass each.

A layer reads its tensors from `own`, which is parallel to its `names`, and keeps nothing between calls. `forward`
returns the output and what `backward` needs of the pass. `backward` puts the gradients of the layer's weights into a
`Sink` and returns that of its input. Neither changes an input that the chain has not made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idiolect.core.errors import UsageError

aten: Any = torch.ops.aten

Own = Sequence[Tensor]
"""A layer's tensors: weights, then statistics and counter."""


class Sink(NamedTuple):
    """The targets of gradients: each becomes ``beta * target + alpha * gradient``."""

    targets: Sequence[Tensor | None]
    """Parallel to a layer's weights; None for a gradient that is not needed."""
    beta: float
    """0 or 1: to write a gradient, or to take a step."""
    alpha: float

    def put(self, target: Tensor, gradient: Tensor) -> None:
        """Put a finished gradient into its target."""
        target.add_(gradient, alpha=self.alpha) if self.beta else target.copy_(gradient)

    @property
    def wanted(self) -> list[bool]:
        """Whether the gradients of weight and bias are needed."""
        found = [t is not None for t in self.targets]
        return found + [False] * (2 - len(found))


NOWHERE = Sink((), 0.0, 1.0)
"""For a layer without weights."""


class Layer:
    """One layer of a chain; the base class has no weights.

    Attributes:
        names: names of its tensors in the module.
        weights: number of trainable ones among them; these come first.
        fresh: its output is a new tensor, not a view of its input.
        owned: its input may be changed in place; the chain sets this.
    """

    names: tuple[str, ...] = ()
    weights = 0
    fresh = True
    owned = False

    def forward(self, x: Tensor, own: Own, train: bool) -> tuple[Tensor, Any]:
        """Return the output and what `backward` needs; with `train`, use and update the statistics of the batch."""
        raise NotImplementedError

    def backward(self, d: Tensor, kept: Any, own: Own, sink: Sink, inward: bool) -> Tensor:  # noqa: ANN401
        """Put the gradients of the weights into the sink, and return that of the input (anything if not `inward`).

        `d` is the gradient of the output.
        """
        raise NotImplementedError

    def predict(self, x: Tensor, own: Own) -> Tensor:
        """Return the output in evaluation mode."""
        return self.forward(x, own, False)[0]


class _Linear(Layer):
    """``x W' + b`` on the last axis.

    Small batches times weights larger than the cache are multiplied as ``(W x')'``, up to twice as fast.
    """

    def __init__(self, module: nn.Linear) -> None:
        self.names = _present(module, "weight", "bias")
        self.weights = len(self.names)
        self.width = module.out_features
        self.large = module.weight.numel() >= 2**19

    def forward(self, x: Tensor, own: Own, train: bool) -> tuple[Tensor, Any]:
        if self.large and x.dim() == 2 and 8 <= len(x) <= 64:
            y = own[0].mm(x.t()) if self.weights == 1 else torch.addmm(own[1][:, None], own[0], x.t())
            return y.t().contiguous(), x
        return F.linear(x, *own), x

    def backward(self, d: Tensor, kept: Tensor, own: Own, sink: Sink, inward: bool) -> Tensor:
        if d.dim() != 2:
            inner = self.backward(d.reshape(-1, self.width), kept.reshape(-1, kept.shape[-1]), own, sink, inward)
            return inner.view(kept.shape) if inward else d
        below = d.mm(own[0]) if inward else d  # before the step changes the weights
        if (weight := sink.targets[0]) is not None:
            weight.addmm_(d.t(), kept, beta=sink.beta, alpha=sink.alpha)
        if self.weights == 2 and (bias := sink.targets[1]) is not None:
            sink.put(bias, d.sum(0))
        return below


class _Convolution(Layer):
    """A convolution of one or two dimensions with zero padding.

    Images are stored with channels last from the first convolution on. On a CPU this makes convolutions somewhat and
    pooling several times faster. The gradient of the bias is a sum, which is cheaper by itself.
    """

    def __init__(self, module: nn.Conv1d | nn.Conv2d) -> None:
        self.names = _present(module, "weight", "bias")
        self.weights = len(self.names)
        stride, dilation, zeros = list(module.stride), list(module.dilation), [0] * len(module.stride)
        if module.padding == "same":
            padding = [d * (k - 1) // 2 for d, k in zip(dilation, module.kernel_size, strict=True)]
        else:
            padding = zeros if module.padding == "valid" else [int(p) for p in module.padding]
        self.window = (stride, padding, dilation, False, zeros, module.groups)
        self.images = isinstance(module, nn.Conv2d)
        self.summed = [0, 2, 3] if self.images else [0, 2]

    def forward(self, x: Tensor, own: Own, train: bool) -> tuple[Tensor, Any]:
        if self.images:  # with one channel, `contiguous` keeps any memory format
            last = torch.channels_last
            x = x.clone(memory_format=last) if x.shape[1] == 1 else x.contiguous(memory_format=last)
        bias = own[1] if self.weights == 2 else None
        return torch.convolution(x, own[0], bias, *self.window), x

    def backward(self, d: Tensor, kept: Tensor, own: Own, sink: Sink, inward: bool) -> Tensor:
        weight, below = sink.targets[0], d
        if inward or weight is not None:
            mask = [inward, weight is not None, False]
            below, gradient, _ = aten.convolution_backward(d, kept, own[0], None, *self.window, mask)
        if weight is not None:
            sink.put(weight, gradient)
        if self.weights == 2 and (bias := sink.targets[1]) is not None:
            sink.put(bias, d.sum(self.summed))
        return below


class _BatchNorm(Layer):
    """Batch normalization with running statistics, with or without scale and shift."""

    def __init__(self, module: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        self.affine = module.affine
        self.weights = 2 if self.affine else 0
        self.names = (*_present(module, "weight", "bias"), "running_mean", "running_var", "num_batches_tracked")
        self.momentum, self.eps, self.channels = float(module.momentum or 0), module.eps, module.num_features
        self.dims = (4,) if isinstance(module, nn.BatchNorm2d) else (2, 3)

    def forward(self, x: Tensor, own: Own, train: bool) -> tuple[Tensor, Any]:
        if x.dim() not in self.dims:
            raise UsageError(f"batch normalization of {self.dims} axes got an input of shape {tuple(x.shape)}")
        if train:
            if x.numel() == self.channels:
                raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
            own[-1].add_(1)
        scale, shift = own[:2] if self.affine else (None, None)
        y, mean, spread = torch.native_batch_norm(x, scale, shift, own[-3], own[-2], train, self.momentum, self.eps)
        return y, (x, mean, spread, train)

    def backward(self, d: Tensor, kept: Any, own: Own, sink: Sink, inward: bool) -> Tensor:  # noqa: ANN401
        x, mean, spread, train = kept
        mask = [inward, *sink.wanted]
        scale = own[0] if self.affine else None
        below, *found = aten.native_batch_norm_backward(
            d, x, scale, own[-3], own[-2], mean, spread, train, self.eps, mask
        )
        for target, gradient in zip(sink.targets, found, strict=False):
            if target is not None:
                sink.put(target, gradient)
        return below if inward else d


class _Relu(Layer):
    """The rectifier, in place where the chain owns the input.

    It may change an output that the layer before keeps for its backward pass; the gradient there is zero.
    """

    def forward(self, x: Tensor, own: Own, train: bool) -> tuple[Tensor, Any]:
        y = x.relu_() if self.owned else x.relu()
        return y, y

    def backward(self, d: Tensor, kept: Tensor, own: Own, sink: Sink, inward: bool) -> Tensor:
        below: Tensor = aten.threshold_backward(d, kept, 0)
        return below


class _Elementwise(Layer):
    """A smooth function of each value; its gradient uses the output if `keeps`, else the input."""

    def __init__(
        self, function: Callable[[Tensor], Tensor], slope: Callable[[Tensor, Tensor], Tensor], keeps: bool
    ) -> None:
        self.function, self.slope, self.keeps = function, slope, keeps

    def forward(self, x: Tensor, own: Own, train: bool) -> tuple[Tensor, Any]:
        y = self.function(x)
        return y, y if self.keeps else x

    def backward(self, d: Tensor, kept: Tensor, own: Own, sink: Sink, inward: bool) -> Tensor:
        return self.slope(d, kept)


class _MaxPool(Layer):
    """The maximum of each window; of equal values the first gets the gradient."""

    def __init__(self, module: nn.MaxPool2d) -> None:
        stride = module.kernel_size if module.stride is None else module.stride
        self.window = (_pair(module.kernel_size), _pair(stride), _pair(module.padding), _pair(module.dilation))
        self.ceil, self.padded = module.ceil_mode, any(_pair(module.padding))

    def forward(self, x: Tensor, own: Own, train: bool) -> tuple[Tensor, Any]:
        y, where = aten.max_pool2d_with_indices(x, *self.window, self.ceil)
        return y, (x, where)

    def backward(self, d: Tensor, kept: Any, own: Own, sink: Sink, inward: bool) -> Tensor:  # noqa: ANN401
        x, where = kept
        below: Tensor = aten.max_pool2d_with_indices_backward(d, x, *self.window, self.ceil, where)
        return below


class _AveragePool(Layer):
    """The mean of each window."""

    def __init__(self, module: nn.AvgPool2d) -> None:
        stride = module.kernel_size if module.stride is None else module.stride
        self.window = (_pair(module.kernel_size), _pair(stride), _pair(module.padding))
        self.rest = (module.ceil_mode, module.count_include_pad, module.divisor_override)

    def forward(self, x: Tensor, own: Own, train: bool) -> tuple[Tensor, Any]:
        return F.avg_pool2d(x, *self.window, *self.rest), x

    def backward(self, d: Tensor, kept: Tensor, own: Own, sink: Sink, inward: bool) -> Tensor:
        below: Tensor = aten.avg_pool2d_backward(d, kept, *self.window, *self.rest)
        return below


class _AdaptivePool(Layer):
    """The mean of windows that are chosen for an output of a fixed size."""

    def __init__(self, module: nn.AdaptiveAvgPool2d) -> None:
        self.size = module.output_size

    def forward(self, x: Tensor, own: Own, train: bool) -> tuple[Tensor, Any]:
        return F.adaptive_avg_pool2d(x, self.size), x

    def backward(self, d: Tensor, kept: Tensor, own: Own, sink: Sink, inward: bool) -> Tensor:
        below: Tensor = aten._adaptive_avg_pool2d_backward(d, kept)
        return below


class View(nn.Module):
    """``x.reshape(shape)`` as a module; without a shape ``x.reshape(len(x), -1)``."""

    def __init__(self, shape: tuple[int, ...] | None) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """Return the same values in the shape."""
        return x.reshape((len(x), -1) if self.shape is None else self.shape)

    def extra_repr(self) -> str:
        """Return the shape as text."""
        return str(self.shape)


class _Shape(Layer):
    """The same values in another shape."""

    fresh = False

    def __init__(self, reshape: Callable[[Tensor], Tensor]) -> None:
        self.reshape = reshape

    def forward(self, x: Tensor, own: Own, train: bool) -> tuple[Tensor, Any]:
        return self.reshape(x), x.shape

    def backward(self, d: Tensor, kept: torch.Size, own: Own, sink: Sink, inward: bool) -> Tensor:
        return d.reshape(kept)


def _present(module: nn.Module, *names: str) -> tuple[str, ...]:
    return tuple(n for n in names if getattr(module, n) is not None)


def _pair(size: int | Sequence[int]) -> list[int]:
    return [size, size] if isinstance(size, int) else [int(s) for s in size]


_LAYERS: dict[type[nn.Module], Callable[[Any], Layer]] = {
    nn.Linear: _Linear,
    nn.Conv1d: _Convolution,
    nn.Conv2d: _Convolution,
    nn.BatchNorm1d: _BatchNorm,
    nn.BatchNorm2d: _BatchNorm,
    nn.MaxPool2d: _MaxPool,
    nn.AvgPool2d: _AveragePool,
    nn.AdaptiveAvgPool2d: _AdaptivePool,
    nn.Flatten: lambda m: _Shape(m.forward),
    View: lambda m: _Shape(m.forward),
    nn.ReLU: lambda m: _Relu(),
    nn.Tanh: lambda m: _Elementwise(torch.tanh, aten.tanh_backward, True),
    nn.Sigmoid: lambda m: _Elementwise(torch.sigmoid, aten.sigmoid_backward, True),
    nn.Softplus: lambda m: _Elementwise(
        m.forward, lambda d, x: aten.softplus_backward(d, x, m.beta, m.threshold), False
    ),
    nn.GELU: lambda m: _Elementwise(m.forward, lambda d, x: aten.gelu_backward(d, x, approximate=m.approximate), False),
    nn.LeakyReLU: lambda m: _Elementwise(
        lambda x: F.leaky_relu(x, m.negative_slope),
        lambda d, x: aten.leaky_relu_backward(d, x, m.negative_slope, False),
        False,
    ),
}
"""The kernel of each type of module."""


def layer_of(name: str, module: nn.Module) -> Layer | str | None:
    """Return the kernel of one module, None if it does nothing, or the reason why it has no kernel.

    Example:
        >>> layer_of("fc", nn.Linear(3, 2)).names
        ('fc.weight', 'fc.bias')
        >>> layer_of("norm", nn.BatchNorm1d(3, momentum=None))
        "layer 'norm' (BatchNorm1d) has no explicit kernel with momentum=None"
    """
    if type(module) is nn.Identity or (type(module) is nn.Dropout and module.p == 0):
        return None
    make, why = _LAYERS.get(type(module)), _unfit(module)
    if make is None or why:
        return f"layer {name!r} ({type(module).__name__}) has no explicit kernel{why}"
    layer = make(module)
    layer.names = tuple(f"{name}.{own}" if name else own for own in layer.names)
    return layer


def _unfit(module: nn.Module) -> str:
    """Return the setting of a known module that its kernel does not support, or an empty string."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        if module.padding_mode != "zeros":
            return f" with padding_mode={module.padding_mode!r}"
        spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if module.padding == "same" and any(span % 2 for span in spans):
            return " that pads one side more than the other"
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        if module.running_mean is None:
            return " without running statistics"
        if module.momentum is None:
            return " with momentum=None"
    if isinstance(module, nn.MaxPool2d) and module.return_indices:
        return " that returns indices"
    return ""


def arrange(layers: list[Layer]) -> list[Layer]:
    """Order the layers of a chain for speed, and set which of them may change their input in place.

    Maximum pooling moves before the rectifier: results and gradients are the same, and fewer values are rectified. With
    padding it does not move, since a window may consist of padding alone.
    """
    layers = list(layers)
    for i in range(len(layers) - 1):
        after = layers[i + 1]
        if isinstance(layers[i], _Relu) and isinstance(after, _MaxPool) and not after.padded:
            layers[i], layers[i + 1] = layers[i + 1], layers[i]
    owned = False
    for layer in layers:
        layer.owned = owned
        owned = owned or layer.fresh
    return layers
