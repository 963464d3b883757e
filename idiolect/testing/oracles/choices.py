"""Textbook loops of methods whose clients choose: whose models help them, and which values they keep to themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Unpack

import torch
from torch import Tensor, nn

from idiolect.testing.oracles.common import (
    Batches,
    Direction,
    OracleResult,
    State,
    World,
    average,
    cohort_of,
    copy_of,
    deployed,
    everything,
    gradient,
    local_training,
    loss_of,
    lr_of,
    norm,
    receive,
    start,
    trainable,
)


def fedfomo(
    judges: Sequence[tuple[Tensor, Tensor]],
    choice: Callable[[int, int], Sequence[int]] | None = None,
    **world: Unpack[World],
) -> tuple[OracleResult, list[list[list[float]]]]:
    """FedFomo: the start is Σ ω_j θ_j, with ω in proportion to max(0, (L(b) − L(θ_j)) / ‖θ_j − b‖).

    θ_j are the client's own model and those that others uploaded last; b is where the client trained from last, and
    where it goes back to if no model is better. A running variance is that of the mixture, Σ ω (v + μ²) − (Σ ω μ)².
    The affinity to others grows by the scores.

    Args:
        judges: for each client the examples (x, y) whose mean loss is L, in evaluation mode.
        choice: ``choice(round, client)`` lists the others whose models the client is sent; all that have uploaded if
            not given.
        world: see :class:`World`.

    Returns:
        What is left, and the matrix of affinities after each round.

    Reference: Zhang et al., ICLR 2021.
    """
    models, _ = start(world)
    names, weights = everything(models[0]), list(trainable(models[0]))
    came_from = [copy_of(model, names) for model in models]
    pool: dict[int, State] = {}
    affinity = [[0.0] * len(models) for _ in models]
    history, result = [], OracleResult()

    def loss_at(i: int, state: State) -> float:
        net, (x, y) = deepcopy(models[i]), judges[i]
        receive(net, state)
        with torch.no_grad():
            return float(loss_of(world)(net.eval()(x), y))

    def starting(t: int, i: int) -> tuple[State, dict[int, float]]:
        sent = choice(t, i) if choice else [j for j in pool if j != i]
        candidates = {j: pool[j] for j in sent} | {i: copy_of(models[i], names)}
        score, b = {}, came_from[i]
        for j, theta in candidates.items():
            far = float(norm(theta[name] - b[name] for name in weights))
            score[j] = (loss_at(i, b) - loss_at(i, theta)) / far if far else 0.0
        total = sum(s for s in score.values() if s > 0)
        if total == 0:
            return b, score
        mixed = {name: torch.zeros_like(tensor) for name, tensor in b.items()}
        for j, theta in candidates.items():
            for name in names if score[j] > 0 else ():
                mean = theta[name.replace("running_var", "running_mean")]
                more = mean**2 if name.endswith("running_var") else 0.0
                mixed[name] += score[j] / total * (theta[name] + more)
        for name in names:
            if name.endswith("running_var"):
                mixed[name] -= mixed[name.replace("running_var", "running_mean")] ** 2
        return mixed, score

    for t in range(world["rounds"]):
        cohort = cohort_of(world, t)
        found = {i: starting(t, i) for i in cohort}
        for i, (begin, score) in found.items():
            came_from[i] = begin
            receive(models[i], begin)
            local_training(models[i], world["batches"](t, i), lr_of(world, t), plain(world), {}, world)
            for j in set(score) - {i}:
                affinity[i][j] += score[j]
        pool |= {i: copy_of(models[i], names) for i in cohort}
        history.append(deepcopy(affinity))
        result.shared.append({})
        result.deployed.append(deployed(models, {}))
        for i, state in enumerate(result.deployed[-1]):
            state |= starting(t + 1, i)[0]
    return result, history


def plain(world: World) -> Direction:
    """The direction g."""
    return lambda model, x, y, _: gradient(model, x, y, loss_of(world))


def masked(mask: State, world: World) -> Direction:
    """The direction m ⊙ g, and g itself where there is no mask."""

    def direction(model: nn.Module, x: Tensor, y: Tensor, _: State) -> State:
        g = gradient(model, x, y, loss_of(world))
        return {name: g[name] * mask[name] if name in mask else g[name] for name in g}

    return direction


def grow(mask: Tensor, moved: Tensor, growth: float, limit: float) -> Tensor:
    """Turn all but round((1 − p) G) of the G zeros of a mask to ones, where the change is largest."""
    flags, change = mask.flatten().tolist(), moved.flatten().tolist()
    shared = [k for k, flag in enumerate(flags) if flag == 0]
    if len(flags) - len(shared) > limit * len(flags):
        return mask
    for k in sorted(shared, key=lambda k: -change[k])[: len(shared) - round((1 - growth) * len(shared))]:
        flags[k] = 1.0
    return mask.new_tensor(flags).reshape(mask.shape)


def fedselect(
    growth: float,
    limit: float,
    every: int,
    deploy_batches: Callable[[int, int], Batches],
    **world: Unpack[World],
) -> tuple[OracleResult, list[State]]:
    """FedSelect, with personal passes before shared ones, on tensors with two axes or more.

    A client starts from its own values where its mask is one, trains those, holds them and trains the rest. Each
    value of the mean is over those who share it; where nobody does it stays. After every few of its rounds the values
    that have moved most since the last time turn personal. To predict, it trains its personal values once more.

    Args:
        growth: p.
        limit: the largest personal share of a tensor that still grows.
        every: the client's rounds from one growth to the next.
        deploy_batches: ``deploy_batches(round, client)`` lists the batches for predicting once that round is over.
        world: see :class:`World`.

    Returns:
        What is left, and each client's mask.

    Reference: Tamirisa et al., CVPR 2024.
    """
    models, shared = start(world)
    names = [name for name, tensor in trainable(models[0]).items() if name in shared and tensor.dim() > 1]
    masks = [{name: torch.zeros_like(shared[name]) for name in names} for _ in models]
    own = [{name: shared[name].clone() for name in names} for _ in models]
    marks, played, result = deepcopy(own), [0] * len(models), OracleResult()

    def personal_pass(net: nn.Module, i: int, batches: Batches, lr: float) -> None:
        receive(net, shared | {name: torch.where(masks[i][name] > 0, own[i][name], shared[name]) for name in names})
        if not any(mask.any() for mask in masks[i].values()):
            return
        begin = copy_of(net, names)
        still = [tensor for name, tensor in trainable(net).items() if name not in names]
        for tensor in still:
            tensor.requires_grad_(False)
        local_training(net, batches, lr, masked(masks[i], world), {}, world)
        for tensor in still:
            tensor.requires_grad_(True)
        end = copy_of(net, names)
        receive(net, {name: torch.where(masks[i][name] > 0, end[name], begin[name]) for name in names})

    for t in range(world["rounds"]):
        cohort, lr = cohort_of(world, t), lr_of(world, t)
        sums = {name: torch.zeros_like(shared[name]) for name in names}
        counts = {name: torch.zeros_like(shared[name]) for name in names}
        for i in cohort:
            net, batches, played[i] = models[i], world["batches"](t, i), played[i] + 1
            personal_pass(net, i, batches, lr)
            fitted = copy_of(net, names)
            holding = {name: 1 - mask for name, mask in masks[i].items()}
            local_training(net, batches, lr, masked(holding, world), {}, world)
            receive(
                net, {name: torch.where(masks[i][name] > 0, fitted[name], net.state_dict()[name]) for name in names}
            )
            own[i] = copy_of(net, names)
            for name in names:
                sums[name] += world["weights"][i] * holding[name] * own[i][name]
                counts[name] += world["weights"][i] * holding[name]
            if played[i] % every == 0:
                for name in names:
                    moved = (own[i][name] - marks[i][name]).abs()
                    masks[i][name] = grow(masks[i][name], moved, growth, limit)
                marks[i] = own[i]
        mean = average([models[i] for i in cohort], [world["weights"][i] for i in cohort], shared)
        kept = {name: torch.where(counts[name] > 0, sums[name] / counts[name], shared[name]) for name in names}
        shared = mean | kept
        result.shared.append(shared)
        copies = [deepcopy(model) for model in models]
        for i, net in enumerate(copies):
            personal_pass(net, i, deploy_batches(t, i), lr_of(world, min(t + 1, world["rounds"] - 1)))
        result.deployed.append([copy_of(net, net.state_dict()) for net in copies])
    return result, masks
