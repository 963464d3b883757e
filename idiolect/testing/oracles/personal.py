"""Textbook loops of methods that keep more on a client than tensors; see :mod:`idiolect.testing.oracles.averaging`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Unpack

import torch
from torch import Tensor, nn

from idiolect.testing.oracles.common import (
    Batches,
    Direction,
    Loss,
    OracleResult,
    State,
    World,
    average,
    cohort_of,
    copy_of,
    deployed,
    gradient,
    local_training,
    loss_of,
    lr_of,
    receive,
    start,
    trainable,
)
from idiolect.testing.oracles.sharpness import sam_gradient


@dataclass
class ScaffoldResult(OracleResult):
    """What SCAFFOLD left behind, with one entry per round.

    Attributes:
        variate: the server's c.
        variates: c_i of each client.
    """

    variate: list[State] = field(default_factory=list)
    variates: list[list[State]] = field(default_factory=list)


Gradient = Callable[[nn.Module, Tensor, Tensor, Loss], State]
"""``gradient(model, x, y, loss)`` of one batch."""


def plain(loss: Loss) -> Direction:
    """The direction g."""
    return lambda model, x, y, _: gradient(model, x, y, loss)


def corrected(own: State, c: State, loss: Loss, gradient_of: Gradient) -> Direction:
    """The direction g − c_i + c, on tensors without variates g itself."""

    def direction(model: nn.Module, x: Tensor, y: Tensor, _: State) -> State:
        g = gradient_of(model, x, y, loss)
        return {k: g[k] - own[k] + c[k] if k in c else g[k] for k in g}

    return direction


def scaffold(gradient_of: Gradient = gradient, **world: Unpack[World]) -> ScaffoldResult:
    """SCAFFOLD, option II: local steps along g − c_i + c on the exchanged trainable tensors.

    After K_i steps c_i⁺ = c_i − c + (w_t − w_i) / (lr K_i); the server adds Σ (c_i⁺ − c_i) / N to c, over the
    cohort but with N all clients, whatever ``weights`` says. All variates start at 0.

    Args:
        gradient_of: g; FedGAMMA has that of SAM in its place.
        world: see :class:`World`.

    Reference: Karimireddy et al., ICML 2020.
    """
    models, shared = start(world)
    names = [name for name in trainable(world["model"]) if name in shared]
    c = {name: torch.zeros_like(shared[name]) for name in names}
    own = [dict(c) for _ in models]
    result = ScaffoldResult()
    for t in range(world["rounds"]):
        cohort, lr = cohort_of(world, t), lr_of(world, t)
        new_c = dict(c)
        for i in cohort:
            receive(models[i], shared)
            batches = world["batches"](t, i)
            direction = corrected(own[i], c, loss_of(world), gradient_of)
            local_training(models[i], batches, lr, direction, shared, world)
            end = copy_of(models[i], names)
            slope = {name: (shared[name] - end[name]) / (lr * len(batches)) for name in names}
            new_own = {name: own[i][name] - c[name] + slope[name] for name in names}
            new_c = {name: new_c[name] + (new_own[name] - own[i][name]) / len(models) for name in names}
            own[i] = new_own
        shared = average([models[i] for i in cohort], [world["weights"][i] for i in cohort], shared)
        c = new_c
        result.shared.append(shared)
        result.deployed.append(deployed(models, shared))
        result.variate.append(c)
        result.variates.append(list(own))
    return result


def fedgamma(rho: float, **world: Unpack[World]) -> ScaffoldResult:
    """FedGAMMA: SCAFFOLD along the gradient at w + ρ g/‖g‖ − c_i + c.

    Reference: Dai et al., IEEE TNNLS 2023.
    """

    def uphill(model: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> State:
        return sam_gradient(model, x, y, loss, dict.fromkeys(trainable(model), rho))

    return scaffold(uphill, **world)


def ditto(lam: float, **world: Unpack[World]) -> OracleResult:
    """Ditto: FedAvg, and beside it a whole model v_i per client, which is what predicts for it.

    In a round in which the client takes part, v_i goes over the same batches along g(v) + λ (v − w_t), the
    second term on exchanged tensors only. v_i starts as the initial model.

    Args:
        lam: strength λ of the pull toward the received tensors.
        world: see :class:`World`.

    Reference: Li et al., ICML 2021.
    """
    models, shared = start(world)
    own = [deepcopy(model) for model in models]
    result = OracleResult()

    def pulled(model: nn.Module, x: Tensor, y: Tensor, received: State) -> State:
        step = gradient(model, x, y, loss_of(world))
        for name, tensor in trainable(model).items():
            if name in received:
                step[name] += lam * (tensor.detach() - received[name])
        return step

    for t in range(world["rounds"]):
        cohort, lr = cohort_of(world, t), lr_of(world, t)
        for i in cohort:
            batches = world["batches"](t, i)
            receive(models[i], shared)
            local_training(models[i], batches, lr, plain(loss_of(world)), shared, world)
            local_training(own[i], batches, lr, pulled, shared, world)
        shared = average([models[i] for i in cohort], [world["weights"][i] for i in cohort], shared)
        result.shared.append(shared)
        result.deployed.append([copy_of(model, model.state_dict()) for model in own])
    return result


def mix(model: nn.Module, old: State, mask: State, batches: Batches, lr: float, loss: Loss) -> State:
    """Set tensors of a model to the mix old + (received − old) ⊙ M while M is learned; return M.

    After each batch M ← clamp(M − lr G ⊙ (received − old), 0, 1), where G is the gradient at the mix so far.
    Normalization goes by its running statistics, which stay as they are.

    Args:
        model: as received; its tensors named by ``old`` are replaced.
        old: the client's own tensors, as its last training left them.
        mask: M to begin with.
        batches: what M is learned on, in order, as often as they are listed.
        lr: step of M.
        loss: of one batch.
    """
    gap = {name: tensor - old[name] for name, tensor in copy_of(model, old).items()}
    model.eval()
    receive(model, {name: old[name] + gap[name] * mask[name] for name in old})
    for x, y in batches:
        g = gradient(model, x, y, loss)
        mask = {name: (mask[name] - lr * g[name] * gap[name]).clamp(0, 1) for name in old}
        receive(model, {name: old[name] + gap[name] * mask[name] for name in old})
    return mask


def fedala(
    lr_mix: float,
    rounds_first: int,
    share: float,
    names: Sequence[str],
    first_epoch: Callable[[int, int], Batches],
    deploy_epoch: Callable[[int, int], Batches],
    **world: Unpack[World],
) -> OracleResult:
    """FedALA: local training starts from a learned :func:`mix` of the client's last model and the received one.

    A client that has not trained before starts from what it received. Afterwards its mask, ones at first, is
    refined whenever it takes part, and also to predict, then on copies and without a trace.

    Args:
        lr_mix: step of the mask.
        rounds_first: how often the first mixing goes over its batches; every later one does once.
        share: share of an epoch that a mask is learned on: its first ``ceil(share · batches)`` batches.
        names: the mixed tensors, for example weight and bias of the last layer; trainable ones.
        first_epoch: ``first_epoch(round, client)`` lists the batches of one epoch, before local training.
        deploy_epoch: the same for predicting once that round is over.
        world: see :class:`World`.

    Reference: Zhang et al., AAAI 2023.
    """
    models, shared = start(world)
    masks = [{name: torch.ones_like(tensor) for name, tensor in copy_of(m, names).items()} for m in models]
    old: dict[int, State] = {}
    mixed: set[int] = set()
    result = OracleResult()

    def mixing(model: nn.Module, i: int, epoch: Batches) -> State:
        window = list(epoch)[: math.ceil(share * len(epoch))]
        passes = 1 if i in mixed else rounds_first
        return mix(model, old[i], masks[i], window * passes, lr_mix, loss_of(world))

    for t in range(world["rounds"]):
        cohort, lr = cohort_of(world, t), lr_of(world, t)
        for i in cohort:
            receive(models[i], shared)
            if i in old:
                masks[i] = mixing(models[i], i, first_epoch(t, i))
                mixed.add(i)
            local_training(models[i], world["batches"](t, i), lr, plain(loss_of(world)), shared, world)
            old[i] = copy_of(models[i], names)
        shared = average([models[i] for i in cohort], [world["weights"][i] for i in cohort], shared)
        result.shared.append(shared)
        copies = [deepcopy(model) for model in models]
        for i, model in enumerate(copies):
            receive(model, shared)
            if i in old:
                mixing(model, i, deploy_epoch(t, i))
        result.deployed.append([copy_of(model, model.state_dict()) for model in copies])
    return result
