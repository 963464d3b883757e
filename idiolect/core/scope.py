"""Scopes: rules that select tensors of a model by what its layers are.

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

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from idiolect.core.adapters import Factor
from idiolect.core.errors import UsageError, did_you_mean, kind_of, names_of
from idiolect.core.structure import ModelStructure, structure_of

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

    def show(self, module: nn.Module) -> str:
        """Return the tensors of a module that this scope names, one a line with its shape.

        Args:
            module: the module. What makes its output is found without examples, by a symbolic trace.

        Example:
            >>> print(head.show(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))))
            2.weight  (2, 4)
            2.bias    (2,)
        """
        structure = structure_of(module)
        names = self(structure)
        shapes = {n: tuple(shape) for n, shape in structure.layout.shape_of.items() if n in names}
        width = max(map(len, shapes), default=0)
        return "\n".join(f"{name:{width}}  {shape}" for name, shape in shapes.items())

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
        if not isinstance(other, Scope):
            raise UsageError(f"{self} {sign} ...: {kind_of(other)} is no scope; names of layers are named('fc1')")
        source = f"{self._inside()} {sign} {other._inside()}"
        return Scope(source, lambda a: operate(self(a), other(a)), _atom=False)


everything = Scope("everything", lambda a: a.exchangeable)
"""All weights and statistics."""

nothing = Scope("nothing", lambda a: frozenset())
"""No tensor at all."""

weights = Scope("weights", lambda a: a.names("weight") & a.exchangeable)
"""Trainable tensors."""

batch_norm = Scope(
    "batch_norm", lambda a: _found(a.owned_by(_BatchNorm), a, "the model has no batch normalization layer")
)
"""Scale, shift and running statistics of every batch normalization layer (SyncBatchNorm and subclasses too)."""

normalization = Scope("normalization", lambda a: _found(a.normalization, a, "the model has no normalization layer"))
"""Tensors of normalization layers of every kind: PyTorch's, classes that look like them, and those declared with
`idiolect.core.normalization.register_normalization`."""

statistics = Scope(
    "statistics",
    lambda a: _found(a.names("statistic") & a.exchangeable, a, "the model keeps no running statistics"),
)
"""Running means and variances of normalization layers."""


def _found(names: Names, structure: ModelStructure, missing: str) -> Names:
    """Return the names; where there are none, say what normalization the model has."""
    if names:
        return names
    there = {i.module: i.owner.__name__ for i in structure.items if i.name in structure.normalization}
    if not there:
        raise UsageError(f"{missing}: add one (nn.BatchNorm1d/2d/3d), or share everything (fedavg)")
    some = ", ".join(f"{name} ({kind})" for name, kind in list(there.items())[:4]) + ", ..." * (len(there) > 4)
    raise UsageError(f"{missing}; it normalizes in {some}: keep that personal with fedbn(names=normalization)")


def _head(structure: ModelStructure) -> Names:
    layer = structure.head
    if found := structure.tensors_of(layer) & structure.exchangeable:
        return found
    raise UsageError(
        f"the layer that makes the output, {layer!r}, has no weights of its own to train: "
        "name the head, names=named(...)"
    )


head = Scope("head", _head)
"""Weights of the layer that makes the output, as a pass shows it; activations and normalization after it do not count.

It is an error if several layers make the output together: then the head is named, ``names=named("classifier")``.
"""


def _factor(structure: ModelStructure, factor: Factor) -> Names:
    if found := frozenset(i.name for i in structure.items if i.factor == factor) & structure.exchangeable:
        return found
    raise UsageError(
        f"the model has no LoRA layer with a trainable factor {factor.upper()}: add adapters "
        "(peft.get_peft_model), or share everything (fedavg)"
    )


lora_a = Scope("lora_a", lambda a: _factor(a, "a"))
"""The factor of every LoRA layer that is initialized at random: A, and of an embedding B."""

lora_b = Scope("lora_b", lambda a: _factor(a, "b"))
"""The factor of every LoRA layer that is initialized at zero, with its bias: B, and of an embedding A."""


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
    owners = sorted({i.module for i in structure.items if i.name in found})
    tied = {alias.rpartition(".")[0] for alias, name in structure.aliases.items() if name in found}
    layers = [layer for layer in {*owners, *tied} if structure.tensors_of(layer) == found] if tied else owners
    if tied and len(layers) > 1:  # the same tensors in two layers: the one that makes the output
        layers = [layer for layer in layers if layer in structure.makers.layers]
    if len(layers) != 1:
        raise UsageError(f"{names} must be the tensors of one layer, they are of {layers or 'none'}: name one")
    return layers[0]


def named(*names: str) -> Scope:
    """Return a scope of layers or single tensors by name.

    Args:
        names: full names (``"base.classifier"``), whole components of one (``"classifier"``, also in
            ``base.classifier.modules_to_save.default.weight``), or patterns of full names with ``*``
            (``"*.lora_B.*"``), which may match several layers. Full names come first.

    Raises:
        UsageError: when the scope is used on a model where a name matches nothing, or without ``*`` several layers.

    Example:
        >>> net = nn.ModuleDict({"body": nn.Linear(2, 3), "wrapped": nn.ModuleDict({"classifier": nn.Linear(3, 2)})})
        >>> print(named("classifier").show(net))
        wrapped.classifier.weight  (2, 3)
        wrapped.classifier.bias    (2,)
        >>> print(named("*.weight").show(net))
        body.weight                (3, 2)
        wrapped.classifier.weight  (2, 3)
    """
    odd = next((name for name in names if not isinstance(name, str)), None)
    if odd is not None or not names:
        raise UsageError(f"named takes names of layers or tensors as text, such as named('fc1'), not {kind_of(odd)}")

    def rule(structure: ModelStructure) -> Names:
        known = {i.name: i.name for i in structure.items if i.name in structure.exchangeable and not i.attached}
        known |= {alias: n for alias, n in structure.aliases.items() if n in structure.exchangeable}
        return frozenset(known[n] for name in names for n in _matching(name, known))

    return Scope(f"named({', '.join(map(repr, names))})", rule)


def _matching(name: str, known: Collection[str]) -> list[str]:
    """Return the known names that a name or pattern stands for."""
    if "*" in name:
        found = [n for n in known if any(fnmatchcase(start, name) for start in _starts(n))]
    else:
        found = [n for n in known if name in _starts(n)]
        places = {} if found else {n: place for n in known if (place := _place(name, n))}
        if len(set(places.values())) > 1:
            several = ", ".join(sorted(set(places.values()))[:4])
            raise UsageError(
                f"{name!r} is in several places ({several}): name one of them, or write '*{name}*' for all"
            )
        found = found or list(places)
    if not found:
        layers = {start for n in known for start in _starts(n)}
        close = did_you_mean(name, layers | {start.rpartition(".")[2] for start in layers})
        raise UsageError(f"the model has no layer or tensor {name!r}{close or '; there are ' + _some(known)}")
    return found


def _starts(name: str) -> list[str]:
    """Return the names of all layers around a tensor, and its own."""
    parts = name.split(".")
    return [".".join(parts[: k + 1]) for k in range(len(parts))]


def _place(name: str, tensor: str) -> str | None:
    """Return the first layer around a tensor, or the tensor, whose name ends in these whole components."""
    return next((start for start in _starts(tensor) if f".{start}".endswith(f".{name}")), None)


def _some(known: Collection[str]) -> str:
    layers = sorted({n.rpartition(".")[0] or n for n in known})
    return ", ".join(layers[:6]) + ", ..." * (len(layers) > 6)


if not TYPE_CHECKING:  # a type checker knows the names above, and no others
    __getattr__ = names_of(__name__, ["named", *(name for name, found in vars().items() if isinstance(found, Scope))])
