"""The card of a method: what a person wants to know before choosing it."""

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
    """What the catalogue says of a method.

    Attributes:
        title: the name the field knows it by.
        year: of the paper.
        problem: what it is for.
        reference: the paper.
    """

    title: str
    year: int
    problem: Problem
    reference: str


def carded(
    title: str, year: int, problem: Problem, reference: str
) -> Callable[[Callable[P, Method]], Callable[P, Method]]:
    """Mark a function that makes a cataloged method; a wrong argument to it is one clear line."""

    def mark(make: Callable[P, Method]) -> Callable[P, Method]:
        @wraps(make)
        def build(*args: P.args, **kwargs: P.kwargs) -> Method:
            bound = bind(make, *args, **kwargs)
            return make(*bound.args, **bound.kwargs)

        build.card = Card(title, year, problem, reference)  # type: ignore[attr-defined]
        return build

    return mark


def card_of(make: Callable[..., Method]) -> Card:
    """Return the card of a cataloged method.

    Example:
        >>> from idiolect.methods import fedbn
        >>> card_of(fedbn).year
        2021
    """
    found: Card = make.card  # type: ignore[attr-defined]
    return found
