"""Forward hooks of parts that change what a layer gets or returns."""

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


def change_input(layer: nn.Module, change: Callable[[Any, Tensor], Tensor]) -> None:
    """Replace the one input of a layer by ``change(layer, input)``; parts that read features get the input as it was.

    The same holds as for `change_outputs`.
    """
    layer.register_forward_pre_hook(_ChangedInput(change), with_kwargs=True)


@dataclass(frozen=True)
class _Changed:
    change: Callable[[Any, Tensor, Tensor], Tensor]

    def __call__(self, layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], outputs: Tensor) -> Tensor:
        return self.change(layer, (*given, *named.values())[0], outputs)


@dataclass(frozen=True)
class _ChangedInput:
    change: Callable[[Any, Tensor], Tensor]

    def __call__(
        self, layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Tensor], dict[str, Any]]:
        return (self.change(layer, (*given, *named.values())[0]),), {}
