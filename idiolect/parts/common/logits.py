"""A loss on logits that are shifted by class."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from idiolect.core.scope import Scope
from idiolect.core.tree import Tree, vectors
from idiolect.core.types import Local, Objective, Pass, Term
from idiolect.parts.common.classes import classifier

ABSENT = 1e-8
"""Count of a class without examples, so that all shifts are finite."""


def shifted(names: Scope, shift: Callable[[Tensor], Tensor], added: int = 0) -> Callable[[Local], Objective]:
    """Return an objective that adds a function of the client's class counts to the outputs."""

    def objective(local: Local) -> Objective:
        found = classifier(names, local.structure)
        counts = (local.counts(found.classes) + added).clamp(min=ABSENT)

        def loss(inner: Term, seen: Pass, y: Tensor, facts: Tree) -> Tensor:
            return inner(seen._replace(outputs=seen.outputs + facts["shift"]), y)

        return Objective(found.layer, loss, vectors(shift=shift(counts)))

    return objective
