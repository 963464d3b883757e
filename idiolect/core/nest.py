"""Nests: inputs, targets and outputs that may consist of several tensors.

A nest is a tensor, or a tuple, list or mapping of nests. The functions here work on all tensors of a nest. Other
values, such as None or a number, are kept as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from idiolect.core.errors import UsageError

Nest: TypeAlias = Any
"""A tensor, or a tuple, list or mapping of nests."""


def mapped(change: Callable[[Tensor], Any], nest: Nest) -> Nest:
    """Return a nest of the same form with each tensor changed.

    Example:
        >>> mapped(lambda t: t + 1, {"a": torch.zeros(2), "b": None})
        {'a': tensor([1., 1.]), 'b': None}
    """
    if isinstance(nest, Tensor):
        return change(nest)
    return pytree.tree_map_only(Tensor, change, nest)


def cloned(nest: Nest) -> Nest:
    """Return a copy of a nest, such as of inputs that a forward pass may change in place.

    Example:
        >>> cloned((torch.zeros(2), None))
        (tensor([0., 0.]), None)
    """
    return nest.clone() if isinstance(nest, Tensor) else mapped(torch.clone, nest)


def tensors(nest: Nest) -> list[Tensor]:
    """Return the tensors of a nest.

    Example:
        >>> [t.shape for t in tensors((torch.zeros(3), [torch.zeros(3, 2)]))]
        [torch.Size([3]), torch.Size([3, 2])]
    """
    if isinstance(nest, Tensor):
        return [nest]
    return [leaf for leaf in pytree.tree_leaves(nest) if isinstance(leaf, Tensor)]


def named_tensors(nest: Nest, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of a nest with its place, written as in Python.

    Example:
        >>> [place for place, _ in named_tensors({"ids": torch.zeros(1), "pair": (torch.zeros(1),)}, "x")]
        ["x['ids']", "x['pair'][0]"]
    """
    if isinstance(nest, Tensor):
        yield name, nest
    elif isinstance(nest, Mapping):
        for key, inner in nest.items():
            yield from named_tensors(inner, f"{name}[{key!r}]")
    elif isinstance(nest, tuple | list):
        for k, inner in enumerate(nest):
            yield from named_tensors(inner, f"{name}[{k}]")


def only_tensor(nest: Nest) -> Tensor:
    """Return the one tensor of a nest.

    Example:
        >>> only_tensor({"x": torch.zeros(2)})
        tensor([0., 0.])
    """
    if isinstance(nest, Tensor):
        return nest
    (tensor,) = tensors(nest)
    return tensor


def rows_in(nest: Nest, axis: int = 0) -> int:
    """Return the number of examples: the length of the first tensor along an axis.

    Example:
        >>> rows_in({"a": torch.zeros(5, 2)})
        5
    """
    return tensors(nest)[0].shape[axis]


def taken(nest: Nest, rows: Tensor, axis: int = 0) -> Nest:
    """Return the examples at these positions along an axis.

    Example:
        >>> taken((torch.arange(4), torch.arange(4) * 2), torch.tensor([1, 3]))
        (tensor([1, 3]), tensor([2, 6]))
    """
    return mapped(lambda tensor: tensor.index_select(axis, rows) if tensor.dim() > axis else tensor, nest)


def joined(nests: Sequence[Nest], how: Callable[[list[Tensor]], Tensor] = torch.stack) -> Nest:
    """Return one nest from several of the same form, each tensor joined with those in the same place.

    Example:
        >>> joined([{"a": torch.zeros(2)}, {"a": torch.ones(2)}])
        {'a': tensor([[0., 0.],
                [1., 1.]])}
    """
    if isinstance(nests[0], Tensor):
        return how(list(nests))
    return pytree.tree_map(lambda *same: how(list(same)) if isinstance(same[0], Tensor) else same[0], *nests)


def plain(nest: Nest) -> Nest:
    """Return a nest in which every mapping is a dict, also one that PyTorch does not know, such as a tokenizer's batch.

    Example:
        >>> from collections import UserDict
        >>> plain(UserDict(a=[1]))
        {'a': [1]}
    """
    if isinstance(nest, Mapping):
        return {key: plain(inner) for key, inner in nest.items()}
    if isinstance(nest, tuple | list) and not hasattr(nest, "_fields"):
        return type(nest)(map(plain, nest))
    return nest


def arguments(inputs: Nest) -> tuple[tuple[Nest, ...], dict[str, Nest]]:
    """Return how a module is called: with a tensor alone, with the items of a tuple, or with a mapping by name.

    Example:
        >>> arguments({"ids": 1, "mask": 2}), arguments((1, 2))
        (((), {'ids': 1, 'mask': 2}), ((1, 2), {}))
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def logits(outputs: Nest) -> Tensor:
    """Return the tensor that parts and accuracy read of a model's outputs.

    It is the output itself, its entry ``logits``, or the only floating tensor that has an axis.

    Raises:
        UsageError: if it is none of these.

    Example:
        >>> logits({"loss": torch.tensor(0.5), "logits": torch.zeros(2, 3)}).shape
        torch.Size([2, 3])
    """
    if isinstance(outputs, Tensor):
        return outputs
    named = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if isinstance(named, Tensor):
        return named
    found = [t for t in tensors(outputs) if t.is_floating_point() and t.dim()]
    if len(found) == 1:
        return found[0]
    raise UsageError(
        f"the model returns a {type(outputs).__name__} of {len(found)} floating tensors: call the one with the "
        "predictions 'logits', as in {'logits': ...}"
    )


def with_logits(outputs: Nest, new: Tensor) -> Nest:
    """Return outputs whose `logits` are replaced.

    Example:
        >>> with_logits((torch.zeros(2), None), torch.ones(2))
        (tensor([1., 1.]), None)
    """
    old = logits(outputs)
    return new if outputs is old else mapped(lambda tensor: new if tensor is old else tensor, outputs)
