"""Scopes: rules that select tensors of a model by the type of layer, not by a part of a name.

A scope is a rule; called with the structure of a model it returns a set of names. Scopes combine with ``&``, ``|``,
``-`` and ``~``, print as they are written, and never name a counter.

Example:
    >>> from torch import nn
    >>> from idiolect.core.structure import structure_of
    >>> net = structure_of(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3)))
    >>> sorted((batch_norm & weights)(net))
    ['1.bias', '1.weight']
    >>> ~batch_norm - head
    ~batch_norm - head
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from idiolect.core.errors import UsageError, did_you_mean
from idiolect.core.structure import ModelStructure

Names = frozenset[str]


@dataclass(frozen=True)
class Scope:
    """A rule that names tensors of a model; two scopes are equal if they are written alike."""

    source: str
    rule: Callable[[ModelStructure], Names] = field(compare=False)
    _atom: bool = field(default=True, compare=False)

    def __call__(self, structure: ModelStructure) -> Names:
        """Return the names of this scope in a model."""
        return self.rule(structure)

    def __and__(self, other: Scope) -> Scope:
        return self._join(other, "&", Names.__and__)

    def __or__(self, other: Scope) -> Scope:
        return self._join(other, "|", Names.__or__)

    def __sub__(self, other: Scope) -> Scope:
        return self._join(other, "-", Names.__sub__)

    def __invert__(self) -> Scope:
        return Scope(f"~{self._inside()}", lambda a: a.exchangeable - self(a))

    def __repr__(self) -> str:
        return self.source

    def _inside(self) -> str:
        return self.source if self._atom else f"({self.source})"

    def _join(self, other: Scope, sign: str, operate: Callable[[Any, Any], Any]) -> Scope:
        source = f"{self._inside()} {sign} {other._inside()}"
        return Scope(source, lambda a: operate(self(a), other(a)), _atom=False)


def _found(names: Names, missing: str) -> Names:
    if not names:
        raise UsageError(missing)
    return names


_NORMALIZATION = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)

everything = Scope("everything", lambda a: a.exchangeable)
"""All weights and statistics."""

nothing = Scope("nothing", lambda a: frozenset())
"""No tensor at all."""

weights = Scope("weights", lambda a: a.names("weight") & a.exchangeable)
"""Trainable tensors."""

batch_norm = Scope(
    "batch_norm",
    lambda a: _found(
        a.owned_by(_BatchNorm),
        "the model has no batch normalization layer: add one (nn.BatchNorm1d/2d/3d), or share everything (fedavg)",
    ),
)
"""Scale, shift and running statistics of every batch normalization layer (SyncBatchNorm and subclasses too)."""

normalization = Scope(
    "normalization",
    lambda a: _found(
        a.owned_by(*_NORMALIZATION),
        "the model has no normalization layer (batch, group, layer or instance): add one, or share everything",
    ),
)
"""Tensors of normalization layers of every kind."""

statistics = Scope(
    "statistics",
    lambda a: _found(
        a.owned_by(_BatchNorm, _InstanceNorm) & a.names("statistic"),
        "the model keeps no running statistics: add batch normalization, or share everything (fedavg)",
    ),
)
"""Running means and variances."""


def _head(structure: ModelStructure) -> Names:
    known = [i for i in structure.items if i.name in structure.exchangeable]
    linear = [i.module for i in known if issubclass(i.owner, nn.Linear) and i.kind == "weight"]
    _found(frozenset(linear), "the model has no linear layer to call its head: name it, e.g. named('classifier')")
    return frozenset(i.name for i in structure.items if i.module == linear[-1] and i.kind == "weight")


head = Scope("head", _head)
"""Weights of the last linear layer."""


def layer_of(names: Scope, structure: ModelStructure) -> str:
    """Return the name of the one layer that all these tensors belong to.

    Raises:
        UsageError: if they belong to none or to several.

    Example:
        >>> from idiolect.core.structure import structure_of
        >>> layer_of(head, structure_of(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))))
        '2'
    """
    found = names(structure)
    layers = sorted({i.module for i in structure.items if i.name in found})
    if len(layers) != 1:
        raise UsageError(f"{names} must be the tensors of one layer, they are of {layers or 'none'}: name one")
    return layers[0]


def named(*prefixes: str) -> Scope:
    """Return a scope of the layers, or single tensors, with exactly these names.

    Raises:
        UsageError: when the scope is used on a model that has no layer or tensor of that name.
    """

    def rule(structure: ModelStructure) -> Names:
        found: set[str] = set()
        for prefix in prefixes:
            own = {n for n in structure.exchangeable if n == prefix or n.startswith(prefix + ".")}
            if not own:
                layers = {i.module for i in structure.items} | structure.exchangeable
                raise UsageError(f"the model has no layer or tensor {prefix!r}{did_you_mean(prefix, layers)}")
            found |= own
        return frozenset(found)

    return Scope(f"named({', '.join(map(repr, prefixes))})", rule)
