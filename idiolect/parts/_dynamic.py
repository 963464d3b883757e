"""A dynamic regularizer with a dual variable per client."""

from __future__ import annotations

from typing import Literal

from idiolect.core.part import Part, part, require
from idiolect.core.tree import EMPTY, Tree, axpy, pick, wide, zeros_like
from idiolect.core.types import Arrival, Central, Local, Setup, Update


@part
def dynamic(strength: float, dual_mean: Literal["all", "participants"] = "all") -> Part:
    r"""Pull each step toward the received weights minus the client's accumulated updates.

    .. math::  d = g + \lambda\, (w - w^t + h_i), \qquad  h_i \leftarrow h_i + w_i^{t+} - w^t, \qquad
               w^{t+1} = \sum_{i \in S_t} p_i\, w_i^{t+} + \frac{1}{N} \sum_{i} h_i

    on trainable tensors that are exchanged. At a fixed point each client's gradient is :math:`-\lambda h_i` and the
    :math:`h_i` sum to zero, hence so do the gradients: there is no client drift, whatever the number of local steps.
    :math:`h_i` is :math:`-\lambda_i / \alpha` in FedDyn, :math:`-\hat g_i / \lambda` in FedSpeed. Its mean over the
    population is uniform, whatever the method's weighting.

    Args:
        strength: :math:`\lambda`, above 0: :math:`\alpha` of FedDyn, :math:`1 / \lambda` of FedSpeed's paper,
            :math:`1 / \beta` of FedGloSS. Its product with the learning rate should be below 1. A strength near 0 is
            not FedAvg: the first round, with all clients, still has an update twice as long.
        dual_mean: the term that the server adds to the mean of the weights: the mean of the duals of ``"all"``
            clients, in which those that never took part are 0, or :math:`\sum_{i \in S_t} p_i h_i` of the round's
            ``"participants"``.

    Memory:    h_i, one tensor per exchanged weight.
    Sends:     nothing: the server knows how h_i changes; with ``"participants"`` h_i.      Receives: nothing.
    Cost:      no extra gradient; with ``"participants"`` bytes up double.
    Raises:    UsageError: if `strength` is not above 0, or `dual_mean` is neither.

    Example:
        >>> dynamic(0.1)
        dynamic(strength=0.1, dual_mean='all')

    Reference: Acar et al., FedDyn, ICLR 2021 (``"all"``); Sun et al., FedSpeed, ICLR 2023, whose paper has
        ``"participants"`` and whose code ``"all"``.
    Differs:   the pull is a term of the direction, so it is clipped with the gradient; public code puts a part of it
        in the optimizer's weight decay, which is not clipped. FedDyn's code makes :math:`\lambda` smaller for larger
        clients. With ``"participants"`` a client could send only the sum of its weights and h_i; here both are sent,
        since other parts read the weights.
    """
    require(strength > 0, f"dynamic: strength must be above 0, got {strength}")
    everybody = dual_mean == "all"
    require(everybody or dual_mean == "participants", f"dynamic: no dual_mean {dual_mean!r}: all or participants")

    def zeros(setup: Setup) -> Tree:
        return zeros_like(wide(pick(setup.shared, setup.structure.names("weight"))))

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
