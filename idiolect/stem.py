"""A convolution of the data themselves, with few channels, as one matrix product."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from idiolect.layers import Layer, Own, Sink, layer_of


class Stem(Layer):
    """The first convolution of a network, whose input needs no gradient.

    With one to three channels the usual convolution has too little to work on, above all in the gradient of its
    weights: for 48 images of 28 x 28, kernel 5 and 4 outputs, forward and back take a third of its time this way. The
    output lies in memory with channels first.

    Args:
        name: its name in the network.
        module: the convolution; see `fits`.
    """

    def __init__(self, name: str, module: nn.Conv2d) -> None:
        usual = layer_of(name, module)
        assert isinstance(usual, Layer)  # the chain has asked before
        self.names, self.weights = usual.names, usual.weights
        self.kernel, self.stride = module.kernel_size, module.stride
        high, wide = (0, 0) if isinstance(module.padding, str) else module.padding
        self.padding = [wide, wide, high, high]

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Return whether a first layer is better done so."""
        if not isinstance(module, nn.Conv2d) or module.in_channels > 3 or module.padding == "same":
            return False
        return module.groups == 1 and module.dilation == (1, 1)

    def forward(self, x: Tensor, own: Own, train: bool) -> tuple[Tensor, Any]:
        """See `Layer`."""
        weight = own[0].flatten(1)
        x = F.pad(x, self.padding) if any(self.padding) else x
        for axis in (0, 1):
            x = x.unfold(2 + axis, self.kernel[axis], self.stride[axis])
        count, _, high, wide = x.shape[:4]
        patches = x.permute(1, 4, 5, 0, 2, 3).reshape(-1, count * high * wide)
        y = own[1][:, None].addmm(weight, patches) if self.weights == 2 else weight.mm(patches)
        return y.view(len(weight), count, high, wide).transpose(0, 1), patches

    def backward(self, d: Tensor, kept: Tensor, own: Own, sink: Sink, inward: bool) -> Tensor:
        """See `Layer`."""
        d = d.transpose(0, 1).flatten(1)
        if (weight := sink.targets[0]) is not None:
            sink.put(weight, d.mm(kept.t()).view_as(weight))
        if self.weights == 2 and (bias := sink.targets[1]) is not None:
            sink.put(bias, d.sum(1))
        return d
