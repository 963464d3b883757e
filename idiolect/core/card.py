"""The card of a method: title, year, problem and reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Literal, ParamSpec

from idiolect.core.method import Method
from idiolect.core.part import bind

P = ParamSpec("P")
Problem = Literal[
    "baseline", "label skew", "feature shift", "concept shift", "communication", "convergence", "fairness"
]


@dataclass(frozen=True)
class Card:
    """The entry of a method in the catalog.

    Attributes:
        title: name of the method in the literature.
        year: year of the paper.
        problem: the problem that it addresses.
        reference: the paper.
    """

    title: str
    year: int
    problem: Problem
    reference: str


def carded(
    title: str, year: int, problem: Problem, reference: str
) -> Callable[[Callable[P, Method]], Callable[P, Method]]:
    """Mark a function that makes a method of the catalog; a wrong argument raises a `UsageError` of one line."""

    def mark(make: Callable[P, Method]) -> Callable[P, Method]:
        @wraps(make)
        def build(*args: P.args, **kwargs: P.kwargs) -> Method:
            bound = bind(make, *args, **kwargs)
            return make(*bound.args, **bound.kwargs)

        build.card = Card(title, year, problem, reference)  # type: ignore[attr-defined]
        return build

    return mark


def card_of(make: Callable[..., Method]) -> Card:
    """Return the card of a method of the catalog.

    Example:
        >>> from idiolect.methods import fedbn
        >>> card_of(fedbn).year
        2021
    """
    found: Card = make.card  # type: ignore[attr-defined]
    return found
