"""Forward hooks of parts that change what a layer returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


def change_outputs(layer: nn.Module, change: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    """Replace the outputs of a layer by ``change(layer, input, outputs)``.

    The model may call the layer with its input by place or by name. A bound method of a submodule is copied with the
    module, so that each copy has its own.
    """
    layer.register_forward_hook(_Changed(change), with_kwargs=True)


@dataclass(frozen=True)
class _Changed:
    change: Callable[[Any, Tensor, Tensor], Tensor]

    def __call__(self, layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], outputs: Tensor) -> Tensor:
        return self.change(layer, (*given, *named.values())[0], outputs)
