"""Textbook loops of the averaging methods: what the library's compositions are checked against.

One module per client, one loop over clients, one loop over batches, tensors by name. Nothing of the
library is imported, so an error has to be made twice, in two different ways, to go unnoticed. Models must
not draw random numbers (no dropout). See :mod:`idiolect.testing.oracles.common` for what a method is given
and leaves behind, :mod:`idiolect.testing.oracles.sharpness` for the sharpness-aware methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Unpack

import torch
from torch import Tensor, nn

from idiolect.testing.oracles.common import (
    Batches,
    Direction,
    Kind,
    Local,
    OracleResult,
    State,
    World,
    average,
    batch_norm_names,
    cohort_of,
    copy_of,
    deployed,
    gradient,
    local_training,
    loss_of,
    lr_of,
    outside_batch_norm,
    receive,
    start,
    trainable,
)


def averaging(direction: Direction, world: World) -> OracleResult:
    """The rounds of federated averaging, each local step along ``direction``."""
    models, shared = start(world)
    result = OracleResult()
    for t in range(world["rounds"]):
        cohort = cohort_of(world, t)
        for i in cohort:
            receive(models[i], shared)
            local_training(models[i], world["batches"](t, i), lr_of(world, t), direction, shared, world)
        shared = average([models[i] for i in cohort], [world["weights"][i] for i in cohort], shared)
        result.shared.append(shared)
        result.deployed.append(deployed(models, shared))
    return result


def fedavg(**world: Unpack[World]) -> OracleResult:
    """FedAvg: local SGD from the shared tensors, then their weighted mean, statistics included.

    Example:
        >>> def batches(t, client):
        ...     return [(torch.ones(1, 1), torch.full((1, 1), [1.0, 3.0][client]))]
        >>> model = nn.Linear(1, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.zero_()
        >>> result = fedavg(model=model, batches=batches, clients=2, rounds=1, lr=0.5, weights=[1, 3],
        ...                 loss=nn.MSELoss())  # one step lands on the target: (1·1 + 3·3) / 4
        >>> result.shared[-1]["weight"].item()
        2.5

    Reference: McMahan et al., AISTATS 2017.
    """
    return averaging(lambda model, x, y, _: gradient(model, x, y, loss_of(world)), world)


def local(**world: Unpack[World]) -> OracleResult:
    """Every client trains alone: nothing is exchanged."""
    world["shared"] = []
    return fedavg(**world)


def fedbn(**world: Unpack[World]) -> OracleResult:
    """FedBN: all five tensors of each BatchNorm layer stay with the client.

    Reference: Li et al., ICLR 2021.
    """
    world["shared"] = outside_batch_norm(world["model"])
    return fedavg(**world)


def silobn(**world: Unpack[World]) -> OracleResult:
    """SiloBN: the running statistics stay with the client, weights of normalization layers are exchanged.

    Reference: Andreux et al., DART 2020.
    """
    world["shared"] = outside_batch_norm(world["model"], "statistics")
    return fedavg(**world)


def bn_only(kind: Kind = "all", **world: Unpack[World]) -> OracleResult:
    """Only BatchNorm layers are exchanged, or of them only the weights or only the statistics."""
    world["shared"] = batch_norm_names(world["model"], kind)
    return fedavg(**world)


def fedprox(mu: float, **world: Unpack[World]) -> OracleResult:
    """FedProx: local steps along g + μ (w − w_t), the second term on exchanged tensors only.

    Reference: Li et al., MLSys 2020.
    """

    def direction(model: nn.Module, x: Tensor, y: Tensor, received: State) -> State:
        step = gradient(model, x, y, loss_of(world))
        for name, tensor in trainable(model).items():
            if name in received:
                step[name] += mu * (tensor.detach() - received[name])
        return step

    return averaging(direction, world)


def fine_tune(
    model: nn.Module,
    states: Sequence[State],
    batches: Callable[[int], Batches],
    lr: float,
    names: Iterable[str] | None = None,
    **how: Unpack[Local],
) -> list[State]:
    """Continue from each client's state dict by local SGD, on the named tensors or on all trainable ones.

    The model is in train mode: running statistics move even when only the head is tuned.

    Args:
        model: what the states belong to; it is copied.
        states: one state dict per client.
        batches: ``batches(client)`` lists that client's batches (x, y), all epochs in order.
        lr: learning rate.
        names: the tensors tuned, for example weight and bias of the last layer.
        how: see :class:`Local`.
    """
    tuned = list(trainable(model) if names is None else names)
    results = []
    for i, state in enumerate(states):
        client = deepcopy(model)
        client.load_state_dict(state)
        for name, tensor in client.named_parameters():
            tensor.requires_grad_(name in tuned)
        local_training(client, batches(i), lr, lambda m, x, y, _: gradient(m, x, y, loss_of(how)), {}, how)
        results.append(copy_of(client, client.state_dict()))
    return results


def pooled_statistics(states: Sequence[State], weights: Sequence[float]) -> State:
    r"""Running statistics of the union of clients, for a client that has none.

    .. math:: \bar\mu = \sum_i p_i \mu_i, \qquad \bar v = \sum_i p_i (v_i + \mu_i^2) - \bar\mu^2

    Example:
        >>> states = [{"running_mean": torch.tensor([mean]), "running_var": torch.tensor([1.0])}
        ...           for mean in (-2.0, 2.0)]
        >>> pooled_statistics(states, [1, 1])
        {'running_mean': tensor([0.]), 'running_var': tensor([5.])}
    """
    result, total = {}, sum(weights)
    for name in states[0]:
        if name.endswith("running_mean"):
            name_of_var = name.removesuffix("mean") + "var"
            mean = torch.zeros_like(states[0][name])
            square = torch.zeros_like(mean)
            for state, weight in zip(states, weights, strict=True):
                mean += weight / total * state[name]
                square += weight / total * (state[name_of_var] + state[name] ** 2)
            result[name], result[name_of_var] = mean, square - mean**2
    return result
