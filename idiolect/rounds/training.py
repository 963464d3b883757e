"""Settings of local training, which all methods of a comparison have in common."""

from __future__ import annotations

from dataclasses import dataclass

from idiolect.core.errors import UsageError
from idiolect.core.scope import Scope
from idiolect.core.structure import ModelStructure
from idiolect.core.tree import Tree, spread
from idiolect.rounds.optim import SGD, Constant, Optimizer, Schedule


@dataclass(frozen=True)
class Group:
    """A learning rate and weight decay for some tensors.

    Args:
        names: the tensors.
        lr: factor on the learning rate.
        weight_decay: their weight decay; None for that of the optimizer.
    """

    names: Scope
    lr: float = 1.0
    weight_decay: float | None = None


@dataclass(frozen=True)
class Training:
    """Local training.

    Args:
        lr: learning rate, > 0.
        local_epochs: passes over the client's training examples per round, at least 1.
        batch_size: examples per step; None for all of a client's examples at once. The last batch may be smaller;
            under batch normalization a last batch of one example joins the batch before it.
        optimizer: `SGD` or `Adam`.
        schedule: learning rate over rounds.
        clip: largest Euclidean norm of the final direction, all tensors together; None for no clipping.
        groups: other learning rates or weight decay for some tensors; of several groups the last applies.

    Raises:
        UsageError: if a value is out of range.
    """

    lr: float = 0.05
    local_epochs: int = 1
    batch_size: int | None = 32
    optimizer: Optimizer = SGD()
    schedule: Schedule = Constant()
    clip: float | None = None
    groups: tuple[Group, ...] = ()

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise UsageError(f"lr must be above 0, got {self.lr} (methods divide by it; to freeze use share)")
        if not isinstance(self.local_epochs, int) or self.local_epochs < 1:
            raise UsageError(f"local_epochs must be a whole number, at least 1, got {self.local_epochs}")
        if self.batch_size is not None and (not isinstance(self.batch_size, int) or self.batch_size < 1):
            raise UsageError(f"batch_size must be at least 1 (or None for a whole set), got {self.batch_size}")
        if self.clip is not None and not self.clip > 0:
            raise UsageError(f"clip must be above 0, got {self.clip}")

    @property
    def plain(self) -> bool:
        """Whether a step is only the gradient times the learning rate."""
        return self.bare and self.clip is None

    @property
    def bare(self) -> bool:
        """Whether a step is only the direction, clipped or not, times the learning rate."""
        return self.optimizer == SGD() and not self.groups

    def decay(self, structure: ModelStructure, like: Tree) -> Tree | float:
        """Return the weight decay of each value, or one number if it is the same for all."""
        own = [(g.names, g.weight_decay) for g in self.groups]
        return _per_tensor(self.optimizer.weight_decay, own, structure, like)

    def rate(self, structure: ModelStructure, like: Tree) -> Tree | float:
        """Return the factor on the learning rate of each value, or one number if it is the same for all."""
        return _per_tensor(1.0, [(g.names, g.lr) for g in self.groups], structure, like)


def _per_tensor(
    usual: float, groups: list[tuple[Scope, float | None]], structure: ModelStructure, like: Tree
) -> Tree | float:
    if not groups:
        return usual
    value = dict.fromkeys(like, usual)
    for scope, other in groups:
        if other is not None:
            value.update({n: other for n in scope(structure) if n in value})
    if len(set(value.values())) <= 1:
        return next(iter(value.values()), usual)
    return spread(like.flat.new_tensor(list(value.values())), like.layout)
