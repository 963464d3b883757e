"""The reference engine: a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from idiolect.client import Assignment, Outcome, client_round
from idiolect.method import Method
from idiolect.model import Model
from idiolect.training import Training

Engine = Callable[[Method, Model, Training, Sequence[Assignment]], Iterator[Outcome]]
"""Trains a cohort: one outcome per assignment, in the same order."""


def one_by_one(method: Method, model: Model, training: Training, cohort: Sequence[Assignment]) -> Iterator[Outcome]:
    """Train one client after the other; every other engine must agree with this one."""
    for work in cohort:
        yield client_round(method, model, training, work)
