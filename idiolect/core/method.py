"""The `Method`: a list of parts, and how clients are weighted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from idiolect.core.errors import UsageError
from idiolect.core.part import Part

Weighting = Literal["samples", "uniform"]


@dataclass(frozen=True)
class Method:
    """A personalized federated learning method: a list of parts and a weighting.

    Args:
        parts: the parts, in order; exactly one of them is a `share`, and it comes first.
        name: its name in tables.
        weighting: how the mean over a cohort is formed: by the clients' numbers of training examples
            (``"samples"``) or equally (``"uniform"``).

    Example:
        >>> from idiolect.parts import share, sam
        >>> from idiolect.core.scope import everything
        >>> Method((share(everything),), "FedAvg") + sam(rho=0.05)
        Method((share(names=everything, variance='mean'), sam(rho=0.05, names=None)), 'FedAvg + sam', 'samples')

    Raises:
        UsageError: if there is no `share` or several, `share` is not first, or two parts have one name.
    """

    parts: tuple[Part, ...]
    name: str = "method"
    weighting: Weighting = "samples"

    def __post_init__(self) -> None:
        names = [p.name for p in self.parts]
        if "" in names:
            raise UsageError(f"{self.name}: a part has no name: mark the function that makes it with @part")
        twice = sorted({n for n in names if names.count(n) > 1})
        if names[:1] != ["share"]:
            raise UsageError(f"{self.name}: the first part must be share(...), got {names or 'no parts'}")
        if twice:
            raise UsageError(f"{self.name}: part {twice[0]!r} occurs twice; a method has each part once")
        if self.weighting not in ("samples", "uniform"):
            raise UsageError(f"weighting is 'samples' or 'uniform', not {self.weighting!r}")

    @property
    def attach(self) -> list[Callable[[nn.Module], None]]:
        """The `attach` functions of the parts, in their order."""
        return [p.attach for p in self.parts if p.attach]

    @property
    def transductive(self) -> tuple[str, ...]:
        """Names of the parts that read the unlabeled inputs to predict."""
        return tuple(p.name for p in self.parts if p.transductive)

    def __add__(self, part: Part) -> Method:
        if not isinstance(part, Part):
            return NotImplemented
        return replace(self, parts=(*self.parts, part), name=f"{self.name} + {part.name}")

    def __repr__(self) -> str:
        parts = ", ".join(map(repr, self.parts)) + ("," if len(self.parts) == 1 else "")
        return f"Method(({parts}), {self.name!r}, {self.weighting!r})"
