"""The `Method`: a list of parts, and how clients are weighted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from torch import nn

from idiolect.core.calls import called
from idiolect.core.errors import UsageError, kind_of
from idiolect.core.part import Part, run_hook

Weighting = Literal["samples", "uniform"]


@called
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
        listed = isinstance(self.parts, tuple | list)
        odd = next(
            (p for p in (self.parts if listed else (self.parts,)) if not isinstance(p, Part) or not listed), None
        )
        if odd is not None:
            raise UsageError(f"Method: parts is {kind_of(odd)}: write Method((share(everything), sam(0.05)), 'name')")
        if not isinstance(self.name, str):
            raise UsageError(f"Method: name is text, not {kind_of(self.name)}")
        object.__setattr__(self, "parts", tuple(self.parts))
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
        """The `attach` functions of the parts, in their order; one that fails or returns something is refused."""

        def attach(part: Part, module: nn.Module) -> None:
            found = run_hook(part, "attach", module)
            if found is not None:
                raise UsageError(
                    f"{part.name}: attach changes the module that it is given and returns None, not {kind_of(found)}"
                )

        return [partial(attach, p) for p in self.parts if p.attach]

    @property
    def transductive(self) -> tuple[str, ...]:
        """Names of the parts that read the unlabeled inputs to predict."""
        return tuple(p.name for p in self.parts if p.transductive)

    def __add__(self, part: Part) -> Method:
        if not isinstance(part, Part):
            raise UsageError(f"{self.name} + {_added(part)}")
        return replace(self, parts=(*self.parts, part), name=f"{self.name} + {part.name}")

    def __repr__(self) -> str:
        parts = ", ".join(map(repr, self.parts)) + ("," if len(self.parts) == 1 else "")
        return f"Method(({parts}), {self.name!r}, {self.weighting!r})"


def _added(given: object) -> str:
    """Return why something cannot be added to a method."""
    if isinstance(given, Method):
        return f"{given.name}: a method has one share(...) and takes parts, not a method: add a part such as sam(0.05)"
    name = getattr(given, "__name__", None)
    return f"{name}: write {name}(...) with brackets" if name else f"...: what is added is a part, not {kind_of(given)}"
