"""Copies of modules, whatever tensors they keep."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TypeVar

from torch import Tensor, nn

from idiolect.core.errors import UsageError

M = TypeVar("M", bound=nn.Module)


def copied(module: M) -> M:
    """Return a deep copy of a module, without the graphs of tensors that it keeps from a pass.

    PyTorch copies no tensor that belongs to a graph, such as an activation that a module keeps, or the weight that
    `torch.nn.utils.weight_norm` has computed.

    Raises:
        UsageError: if the module holds something that cannot be copied.

    Example:
        >>> import torch
        >>> net = nn.Linear(2, 2)
        >>> net.last = net(torch.ones(1, 2))
        >>> copied(net).last.requires_grad
        False
    """
    memo = {id(t): t.detach().clone() for layer in module.modules() for t in _kept(list(vars(layer).values()))}
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"the model cannot be copied ({reason}): remove what copy.deepcopy refuses") from None


def _kept(values: list[object]) -> Iterator[Tensor]:
    """Yield the tensors with a graph among values, in containers too."""
    for value in values:
        if isinstance(value, Tensor) and value.grad_fn is not None:
            yield value
        elif isinstance(value, list | tuple):
            yield from _kept(list(value))
        elif isinstance(value, Mapping):
            yield from _kept(list(value.values()))
