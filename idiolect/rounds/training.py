"""Settings of local training, which all methods of a comparison have in common."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from idiolect.core.calls import called
from idiolect.core.errors import UsageError
from idiolect.core.scope import Scope
from idiolect.core.structure import ModelStructure
from idiolect.core.tree import Tree, spread
from idiolect.core.values import real, settings, whole
from idiolect.rounds.optim import SGD, Optimizer
from idiolect.rounds.schedule import Constant, Schedule, schedule_of


@settings
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

    def __post_init__(self) -> None:
        if self.lr < 0 or (self.weight_decay or 0) < 0:
            raise UsageError(f"Group: lr and weight_decay must be at least 0, got {self.lr} and {self.weight_decay}")


@called
@dataclass(frozen=True)
class Training:
    """Local training.

    Args:
        lr: learning rate, > 0.
        local_epochs: passes over the client's training examples per round, at least 1.
        batch_size: examples per step; None for all of a client's examples at once. The last batch may be smaller;
            under batch normalization a last batch of one example joins the batch before it.
        optimizer: `SGD`, `Adam`, `AdamW` or `RMSprop`.
        schedule: learning rate over rounds: `Constant`, `Exponential`, `StepDecay`, `Cosine`, `Warmup`, or a function
            of the round, counted from 0, that returns a factor on `lr`.
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
        keep = partial(object.__setattr__, self)
        keep("lr", real("lr", self.lr, lambda lr: lr > 0, "above 0 (methods divide by it; to freeze use share)"))
        keep("local_epochs", whole("local_epochs", self.local_epochs, 1))
        if self.batch_size is not None:
            keep("batch_size", whole("batch_size (or None for a whole set)", self.batch_size, 1))
        if self.clip is not None:
            keep("clip", real("clip", self.clip, lambda clip: clip > 0, "above 0"))
        if isinstance(self.optimizer, type) or not isinstance(self.optimizer, Optimizer):
            raise UsageError(f"optimizer={_shown(self.optimizer)} is no optimizer of idiolect; there are {_OPTIMIZERS}")
        keep("schedule", schedule_of(self.schedule))
        if not isinstance(self.groups, tuple) or not all(isinstance(group, Group) for group in self.groups):
            raise UsageError(f"groups={self.groups!r}: write groups=(Group(names, lr=...),)")

    @property
    def plain(self) -> bool:
        """Whether a step is only the gradient times the learning rate."""
        return self.bare and self.clip is None

    @property
    def bare(self) -> bool:
        """Whether a step is only the direction, clipped or not, times the learning rate."""
        return self.optimizer == _BARE and not self.groups

    def decay(self, structure: ModelStructure, like: Tree) -> Tree | float:
        """Return the weight decay of each value, or one number if it is the same for all."""
        own = [(g.names, g.weight_decay) for g in self.groups]
        return _per_tensor(self.optimizer.weight_decay, own, structure, like)

    def rate(self, structure: ModelStructure, like: Tree) -> Tree | float:
        """Return the factor on the learning rate of each value, or one number if it is the same for all."""
        return _per_tensor(1.0, [(g.names, g.lr) for g in self.groups], structure, like)


_BARE = SGD()
"""The optimizer whose step is the gradient alone; made once, since every step compares with it."""

_OPTIMIZERS = "SGD(momentum), Adam(), AdamW(weight_decay), RMSprop()"


def _shown(given: object) -> str:
    """Return a class by its full name, and all else as it prints, in one line."""
    return f"{given.__module__}.{given.__qualname__}" if isinstance(given, type) else " ".join(repr(given).split())[:60]


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
