"""A regularizer that learns, round by round, where each client pulls to."""

from __future__ import annotations

from typing import Literal

from idiolect.core.part import Part, part, require
from idiolect.core.tree import EMPTY, Tree, axpy, pick, zeros_like
from idiolect.core.types import Arrival, Central, Local, Setup, Update


@part
def dynamic(strength: float, dual_mean: Literal["all", "participants"] = "all") -> Part:
    r"""Pull each step towards what was received less how far this client has moved in all its rounds.

    .. math::  d = g + \lambda\, (w - w^t + h_i), \qquad  h_i \leftarrow h_i + w_i^{t+} - w^t, \qquad
               w^{t+1} = \sum_{i \in S_t} p_i\, w_i^{t+} + \frac{1}{N} \sum_{i} h_i

    on trainable tensors that are exchanged. Where nothing moves any more, each client's gradient is
    :math:`-\lambda h_i` and the :math:`h_i` sum to zero, hence so do the gradients: clients do not drift, whatever
    their number of local steps. :math:`h_i` is :math:`-\lambda_i / \alpha` in FedDyn, :math:`-\hat g_i / \lambda`
    in FedSpeed. Over the population it is averaged equally, whatever the method's weighting.

    Args:
        strength: :math:`\lambda`, above 0: :math:`\alpha` of FedDyn, :math:`1 / \lambda` of FedSpeed's paper,
            :math:`1 / \beta` of FedGloSS. The learning rate times it should stay below 1. A strength near 0 is not
            FedAvg: the first round, with all clients, still goes twice as far.
        dual_mean: what the server adds to the mean of the weights: the mean of the duals of ``"all"`` clients, of
            which those that never took part are 0, or :math:`\sum_{i \in S_t} p_i h_i` of the round's
            ``"participants"``.

    Memory:    h_i, one tensor per exchanged weight.
    Sends:     nothing: the server knows how h_i moves; with ``"participants"`` h_i.      Receives: nothing.
    Cost:      no extra gradient; with ``"participants"`` bytes up double.
    Raises:    UsageError: if `strength` is not above 0, or `dual_mean` is neither.

    Example:
        >>> dynamic(0.1)
        dynamic(strength=0.1, dual_mean='all')

    Reference: Acar et al., FedDyn, ICLR 2021 (``"all"``); Sun et al., FedSpeed, ICLR 2023, whose paper has
        ``"participants"`` and whose code ``"all"``.
    Differs:   the pull is a term of the direction, so it is clipped with the rest; public codes hide a part of it in
        the optimizer's weight decay, which is not. FedDyn's code makes :math:`\lambda` smaller for larger clients.
        With ``"participants"`` a client might send the sum of its weights and h_i alone; here weights stay what
        other parts read.
    """
    require(strength > 0, f"dynamic: strength must be above 0, got {strength}")
    everybody = dual_mean == "all"
    require(everybody or dual_mean == "participants", f"dynamic: no dual_mean {dual_mean!r}: all or participants")

    def zeros(setup: Setup) -> Tree:
        return zeros_like(pick(setup.shared, setup.structure.names("weight")))

    def direction(direction: Tree, weights: Tree, local: Local) -> Tree:
        pull = pick(weights, local.memory) - pick(local.shared, local.memory) + local.memory
        return axpy(strength, pick(pull, direction), direction)

    def finish(local: Local) -> tuple[Tree, Tree]:
        own = local.memory + pick(local.end, local.memory) - pick(local.shared, local.memory)
        return own, EMPTY if everybody else own

    def contribute(central: Central, arrival: Arrival) -> Tree:
        return pick(arrival.weights - central.old, central.structure.names("weight"))

    def aggregate(central: Central, mean: Tree) -> Update:
        duals = central.state + central.participation * mean if everybody else mean
        return Update(duals, shared=axpy(1.0, duals, central.new))

    return Part(
        memory=zeros,
        server=zeros,
        direction=direction,
        finish=finish,
        contribute=contribute if everybody else None,
        aggregate=aggregate,
        server_only=True,
        uniform=everybody,
    )
