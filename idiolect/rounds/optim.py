r"""Local optimizers, as pure functions of trees.

An optimizer turns a direction :math:`d` into a move :math:`m`; the step is :math:`w \leftarrow w - \eta m`. Its state
lasts for one client's round, and is new in the next one. State and move of a model in bfloat16 or float16 are in
float32, since there :math:`1 - \beta_2^t` would be 0 and a count would end at 256: only the weights are rounded.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from idiolect.core.errors import UsageError
from idiolect.core.tree import Tree, layout, wide, zeros_like
from idiolect.core.values import settings

OptimizerState = dict[str, Tree]

_STEP = layout(("step",), (torch.Size([1]),))


@runtime_checkable
class Optimizer(Protocol):
    """A local optimizer: pure functions of direction and state."""

    @property
    def weight_decay(self) -> float:
        """Factor on the weights that is added to the direction, or to the move if it is decoupled."""
        ...

    @property
    def decoupled(self) -> bool:
        """Whether weight decay is added to the move, not to the direction."""
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


@settings
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
    decoupled = False

    def __post_init__(self) -> None:
        _check(self, shares=("momentum",), amounts=("weight_decay",))

    def init(self, direction: Tree) -> OptimizerState:
        """See `Optimizer`."""
        return {"momentum": zeros_like(wide(direction))} if self.momentum else {}

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


@settings
class Adam:
    r"""Adam (Kingma and Ba, ICLR 2015) with bias correction, as in PyTorch.

    .. math::  u \leftarrow \beta_1 u + (1 - \beta_1) d, \quad v \leftarrow \beta_2 v + (1 - \beta_2) d^2, \quad
               m = \frac{u / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Args:
        beta1: decay of the first moment u, in [0, 1).
        beta2: decay of the second moment v, in [0, 1).
        epsilon: added to the root of the second moment, at least 0.
        weight_decay: :math:`\lambda w` is added to the direction (coupled, as `torch.optim.Adam`).
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    decoupled = False

    def __post_init__(self) -> None:
        _check(self, shares=("beta1", "beta2"), amounts=("epsilon", "weight_decay"))

    def init(self, direction: Tree) -> OptimizerState:
        """See `Optimizer`."""
        zeros = zeros_like(wide(direction))
        return {"first": zeros, "second": zeros, "step": Tree(_STEP, torch.zeros_like(zeros.flat[..., :1]))}

    def move(self, direction: Tree, state: OptimizerState) -> tuple[Tree, OptimizerState]:
        """See `Optimizer`."""
        step, direction = state["step"] + 1.0, wide(direction)
        first = self.beta1 * state["first"] + (1 - self.beta1) * direction
        second = self.beta2 * state["second"] + (1 - self.beta2) * (direction * direction)
        unbiased = first / (1 - self.beta1**step.flat)
        scale = Tree(second.layout, torch.sqrt(second.flat / (1 - self.beta2**step.flat)) + self.epsilon)
        return unbiased / scale, {"first": first, "second": second, "step": step}

    def effective_steps(self, steps: Tensor) -> Tensor:
        """See `Optimizer`; with a constant direction all steps have the same length."""
        return steps


@settings
class AdamW(Adam):
    r"""`Adam` with decoupled weight decay (Loshchilov and Hutter, ICLR 2019), as in PyTorch.

    The decay :math:`\lambda w` is added to the move, so it is not divided by the root of the second moment:
    :math:`w \leftarrow w - \eta (m + \lambda w)`.

    Args:
        beta1: as in `Adam`.
        beta2: as in `Adam`.
        epsilon: as in `Adam`.
        weight_decay: :math:`\lambda`, at least 0.

    Example:
        >>> AdamW(weight_decay=0.1)
        AdamW(beta1=0.9, beta2=0.999, epsilon=1e-08, weight_decay=0.1)
    """

    weight_decay: float = 0.01
    decoupled = True


@settings
class RMSprop:
    r"""RMSprop (Tieleman and Hinton, 2012), as in PyTorch, without centering.

    .. math::  v \leftarrow \alpha v + (1 - \alpha) d^2, \quad
               m \leftarrow \mu m + \frac{d}{\sqrt v + \epsilon}

    Args:
        alpha: decay of the mean square v, in [0, 1).
        epsilon: added to its root, at least 0.
        momentum: :math:`\mu` in [0, 1).
        weight_decay: :math:`\lambda w` is added to the direction.
    """

    alpha: float = 0.99
    epsilon: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0
    decoupled = False

    def __post_init__(self) -> None:
        _check(self, shares=("alpha", "momentum"), amounts=("epsilon", "weight_decay"))

    def init(self, direction: Tree) -> OptimizerState:
        """See `Optimizer`."""
        zeros = zeros_like(wide(direction))
        return {"square": zeros, "momentum": zeros} if self.momentum else {"square": zeros}

    def move(self, direction: Tree, state: OptimizerState) -> tuple[Tree, OptimizerState]:
        """See `Optimizer`."""
        direction = wide(direction)
        square = self.alpha * state["square"] + (1 - self.alpha) * (direction * direction)
        scaled = direction / Tree(square.layout, torch.sqrt(square.flat) + self.epsilon)
        if not self.momentum:
            return scaled, {"square": square}
        moving = self.momentum * state["momentum"] + scaled
        return moving, {"square": square, "momentum": moving}

    def effective_steps(self, steps: Tensor) -> Tensor:
        r"""See `Optimizer`; step k of a constant direction has length :math:`(1 - \alpha^k)^{-1/2}`: v starts at 0.

        Example:
            >>> RMSprop(alpha=0.75).effective_steps(torch.tensor([1.0, 2.0]))  # 2, then 1.51 more
            tensor([2.0000, 3.5119])
        """
        moving, ways = 0.0, [0.0]
        for k in range(1, int(steps.max()) + 1):
            moving = self.momentum * moving + (1 - self.alpha**k) ** -0.5
            ways.append(ways[-1] + moving)
        return torch.tensor(ways, dtype=steps.dtype, device=steps.device)[steps.long()]


def _check(made: object, shares: tuple[str, ...], amounts: tuple[str, ...]) -> None:
    """Raise if a share is not in [0, 1), or an amount is below 0."""
    for name in (*shares, *amounts):
        value, share = getattr(made, name), name in shares
        if value < 0 or (share and value >= 1):
            what = "in [0, 1)" if share else "at least 0"
            raise UsageError(f"{type(made).__name__}: {name} must be {what}, got {value}")
