r"""Local optimizers and learning-rate schedules, as pure functions of trees.

An optimizer turns a direction :math:`d` into a move :math:`m`; the step is :math:`w \leftarrow w - \eta m`.
Its state lasts for one client's round, and is new in the next one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from idiolect.core.errors import UsageError
from idiolect.core.tree import Tree, layout, zeros_like

OptimizerState = dict[str, Tree]

_STEP = layout(("step",), (torch.Size([1]),))


@runtime_checkable
class Optimizer(Protocol):
    """A local optimizer: pure functions of direction and state."""

    @property
    def weight_decay(self) -> float:
        """Coupled L2 decay, added to the direction."""
        ...

    def init(self, direction: Tree) -> OptimizerState:
        """Return the state before the first step."""
        ...

    def move(self, direction: Tree, state: OptimizerState) -> tuple[Tree, OptimizerState]:
        """Return the move (before the learning rate) and the next state."""
        ...

    def effective_steps(self, steps: Tensor) -> Tensor:
        """Return the number of plain steps that go as far as these, if the direction is constant."""
        ...


@dataclass(frozen=True)
class SGD:
    r"""Stochastic gradient descent: :math:`b \leftarrow \mu b + d,\; m = b` (PyTorch's form, no dampening).

    Args:
        momentum: :math:`\mu` in [0, 1).
        weight_decay: :math:`\lambda`; :math:`\lambda w` is added to the direction before momentum.
        nesterov: descend along :math:`d + \mu b`.
    """

    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise UsageError(f"SGD: momentum must be in [0, 1), got {self.momentum}")

    def init(self, direction: Tree) -> OptimizerState:
        """See `Optimizer`."""
        return {"momentum": zeros_like(direction)} if self.momentum else {}

    def move(self, direction: Tree, state: OptimizerState) -> tuple[Tree, OptimizerState]:
        """See `Optimizer`."""
        if not self.momentum:
            return direction, state
        moving = self.momentum * state["momentum"] + direction
        return (direction + self.momentum * moving if self.nesterov else moving), {"momentum": moving}

    def effective_steps(self, steps: Tensor) -> Tensor:
        r"""See `Optimizer`; with momentum :math:`\tfrac{1}{1-\mu}\big(K - \mu \tfrac{1-\mu^K}{1-\mu}\big)`.

        Example:
            >>> SGD(momentum=0.5).effective_steps(torch.tensor([3.0]))  # 1, then 1.5, then 1.75
            tensor([4.2500])
        """
        lag = self.momentum * (1 - self.momentum**steps) / (1 - self.momentum)
        worth = (steps - lag) / (1 - self.momentum)
        return steps + self.momentum * worth if self.nesterov else worth


@dataclass(frozen=True)
class Adam:
    r"""Adam (Kingma and Ba, ICLR 2015) with bias correction, as in PyTorch.

    Args:
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to the root of the second moment.
        weight_decay: :math:`\lambda w` is added to the direction (coupled, as `torch.optim.Adam`).
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    def init(self, direction: Tree) -> OptimizerState:
        """See `Optimizer`."""
        zeros = zeros_like(direction)
        return {"first": zeros, "second": zeros, "step": Tree(_STEP, torch.zeros_like(direction.flat[..., :1]))}

    def move(self, direction: Tree, state: OptimizerState) -> tuple[Tree, OptimizerState]:
        """See `Optimizer`."""
        step = state["step"] + 1.0
        first = self.beta1 * state["first"] + (1 - self.beta1) * direction
        second = self.beta2 * state["second"] + (1 - self.beta2) * (direction * direction)
        unbiased = first / (1 - self.beta1**step.flat)
        scale = Tree(second.layout, torch.sqrt(second.flat / (1 - self.beta2**step.flat)) + self.epsilon)
        return unbiased / scale, {"first": first, "second": second, "step": step}

    def effective_steps(self, steps: Tensor) -> Tensor:
        """See `Optimizer`; with a constant direction all steps have the same length."""
        return steps


@runtime_checkable
class Schedule(Protocol):
    """Learning rate over rounds."""

    def __call__(self, lr: float, round: int, rounds: int) -> float:
        """Return the learning rate of a round, counted from 0, of a run of `rounds`."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same learning rate in every round."""

    def __call__(self, lr: float, round: int, rounds: int) -> float:
        """Return `lr`."""
        return lr


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Cosine:
    r"""The learning rate falls to `floor` times itself over the run along half a cosine."""

    floor: float = 0.0

    def __call__(self, lr: float, round: int, rounds: int) -> float:
        """Return the learning rate of a round; that of the last round is still above the floor."""
        return lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * round / rounds)))
