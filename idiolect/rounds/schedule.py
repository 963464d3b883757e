"""Learning rates over the rounds of a run."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from idiolect.core.calls import called
from idiolect.core.errors import UsageError
from idiolect.core.values import real, settings, whole


@runtime_checkable
class Schedule(Protocol):
    """Learning rate over rounds."""

    def __call__(self, lr: float, round: int, rounds: int) -> float:
        """Return the learning rate of a round, counted from 0, of a run of `rounds`."""
        ...


@settings
class Constant:
    """The same learning rate in every round."""

    def __call__(self, lr: float, round: int, rounds: int) -> float:
        """Return `lr`."""
        return lr


@settings
class Exponential:
    r"""The learning rate of round :math:`t` is :math:`\eta \gamma^t`, whichever clients take part.

    Args:
        gamma: decay per round, in (0, 1].
    """

    gamma: float

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise UsageError(f"Exponential: gamma must be in (0, 1], got {self.gamma}")

    def __call__(self, lr: float, round: int, rounds: int) -> float:
        """Return `lr` times gamma to the power of the round."""
        return float(lr * self.gamma**round)


@settings
class StepDecay:
    r"""The learning rate falls by a factor :math:`\gamma` every `every` rounds.

    Args:
        every: rounds between falls, at least 1.
        gamma: factor, in (0, 1].
    """

    every: int
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 < self.gamma <= 1:
            raise UsageError(f"StepDecay: needs every >= 1 and gamma in (0, 1], got {self}")

    def __call__(self, lr: float, round: int, rounds: int) -> float:
        """Return `lr` after the falls so far."""
        return float(lr * self.gamma ** (round // self.every))


@settings
class Cosine:
    r"""The learning rate falls to `floor` times itself over the run along half a cosine.

    Args:
        floor: share that is left at the end, in [0, 1].
    """

    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise UsageError(f"Cosine: floor must be in [0, 1], got {self.floor}")

    def __call__(self, lr: float, round: int, rounds: int) -> float:
        """Return the learning rate of a round; that of the last round is still above the floor."""
        return lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * round / rounds)))


@called
@dataclass(frozen=True)
class Warmup:
    r"""The learning rate rises linearly over the first rounds, then follows another schedule over those that are left.

    Round :math:`t` of the first :math:`W` has :math:`\eta (t + 1) / W` times the first rate of the other schedule.

    Args:
        rounds: W, at least 1.
        then: the schedule of the other rounds, counted from 0 again.

    Example:
        >>> warm = Warmup(2, Cosine())
        >>> [round(warm(1.0, t, 6), 3) for t in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """

    rounds: int
    then: Schedule = Constant()

    def __post_init__(self) -> None:
        object.__setattr__(self, "then", schedule_of(self.then))
        object.__setattr__(self, "rounds", whole("Warmup: rounds", self.rounds, 1))

    def __call__(self, lr: float, round: int, rounds: int) -> float:
        """Return the learning rate of a round."""
        left = max(1, rounds - self.rounds)
        if round < self.rounds:
            return self.then(lr, 0, left) * (round + 1) / self.rounds
        return self.then(lr, round - self.rounds, left)


@dataclass(frozen=True)
class Factor:
    """The learning rate times a function of the round, as `torch.optim.lr_scheduler.LambdaLR`.

    `Training` makes it of a function of one argument.

    Args:
        function: round, counted from 0 -> factor.

    Example:
        >>> Factor(lambda t: 1 / (1 + t))(0.1, 1, 10)
        0.05
    """

    function: Callable[[int], float]

    def __call__(self, lr: float, round: int, rounds: int) -> float:
        """Return the learning rate of a round."""
        return lr * real("schedule", self.function(round), lambda factor: factor > 0, "above 0, a factor on lr")

    def __repr__(self) -> str:
        return f"Factor({getattr(self.function, '__name__', type(self.function).__name__)})"


def schedule_of(given: object) -> Schedule:
    """Return a schedule: one of this module, or a function of the round, or of (lr, round, rounds).

    Raises:
        UsageError: if it is none; one line that lists what there is.

    Example:
        >>> schedule_of(lambda t: 0.9**t)
        Factor(<lambda>)
    """
    needed = 0
    if not isinstance(given, type) and callable(given):
        try:
            found = inspect.signature(given).parameters.values()
            needed = sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in found)
        except ValueError:  # a function of C has no signature
            needed = 1
    if needed not in (1, 3):
        hint = f"; write {given.__name__}(...)" if isinstance(given, type) and given.__module__ == __name__ else ""
        raise UsageError(f"schedule={given!r} is no schedule{hint}; there are {_THERE_ARE}")
    return given if needed == 3 else Factor(given)  # type: ignore[return-value,arg-type]


def rates(schedule: Schedule, lr: float, rounds: int) -> list[float]:
    """Return the learning rate of every round.

    Raises:
        UsageError: one line, if the schedule fails in a round, or the rate there is not above 0.

    Example:
        >>> rates(StepDecay(2), 1.0, 3)
        [1.0, 1.0, 0.1]
    """
    found = []
    for round in range(rounds):
        try:
            value = schedule(lr, round, rounds)
        except UsageError as error:
            raise UsageError(f"round {round}: {error}") from None
        except Exception as error:
            raise UsageError(f"schedule {schedule!r} fails in round {round}: {type(error).__name__}: {error}") from None
        found.append(real(f"schedule {schedule!r}: the rate of round {round}", value, lambda v: v > 0, "above 0"))
    return found


def written(rates: list[float]) -> str:
    """Return the rates of a run in a few words that differ where any rate differs.

    Example:
        >>> written([0.1, 0.05, 0.1])
        '0.1 to 0.1 (308e2db4)'
    """
    digest = hashlib.sha256(repr(rates).encode()).hexdigest()[:8]
    return f"{rates[0]:g} to {rates[-1]:g} ({digest})"


_THERE_ARE = (
    "Constant(), Exponential(gamma), StepDecay(every, gamma), Cosine(floor), Warmup(rounds, then), or a function of "
    "the round that returns a factor on lr"
)
