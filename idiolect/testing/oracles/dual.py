"""Textbook loops of methods whose clients keep a dual; see :mod:`idiolect.testing.oracles.averaging`.

Each is written in the symbols of its own paper, not in the one form that the library has for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Unpack

import torch
from torch import Tensor, nn

from idiolect.testing.oracles.common import (
    Batches,
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
    norm,
    receive,
    start,
    trainable,
)
from idiolect.testing.oracles.sharpness import TINY, gradient_uphill, sam_gradient

Slope = Callable[[nn.Module, Tensor, Tensor], State]
"""The gradient that a local step follows, before the terms of the dual."""


@dataclass
class DualResult(OracleResult):
    """What a method with duals left behind, with one entry per round.

    Attributes:
        dual: each client's dual.
        perturbation: s of FedSMOO as sent in the next round; empty for the others.
    """

    dual: list[list[State]] = field(default_factory=list)
    perturbation: list[State] = field(default_factory=list)


def zeros(shared: State, model: nn.Module) -> State:
    """Zeros for each trainable tensor that is exchanged."""
    return {name: torch.zeros_like(shared[name]) for name in trainable(model) if name in shared}


def pulled_training(
    model: nn.Module,
    batches: Batches,
    lr: float,
    slope: Slope,
    dual: State,
    pull: float,
    received: State,
    world: World,
    split: bool = False,
) -> None:
    """Local steps along slope − dual + pull (w − received), the last two where there is a dual.

    A pull that is ``split`` leaves pull · w to the optimizer's weight decay, which comes after clipping.
    """
    how = {**world, "weight_decay": world.get("weight_decay", 0.0) + pull} if split else world

    def direction(client: nn.Module, x: Tensor, y: Tensor, _: State) -> State:
        step, weights = slope(client, x, y), trainable(client)
        for name in dual:
            toward = -received[name] if split else weights[name].detach() - received[name]
            step[name] = step[name] - dual[name] + pull * toward
        return step

    local_training(model, batches, lr, direction, received, how)


def feddyn(alpha: float, **world: Unpack[World]) -> DualResult:
    """FedDyn: local steps along g − λ_i + α (w − w_t); then λ_i −= α (w_i − w_t).

    The server keeps h −= (α/N) Σ (w_i − w_t), N all clients, and sets w = mean of the w_i − h/α.

    Reference: Acar et al., ICLR 2021.
    """
    models, shared = start(world)
    own, h = [zeros(shared, model) for model in models], zeros(shared, world["model"])
    result = DualResult()
    for t in range(world["rounds"]):
        cohort, new_h = cohort_of(world, t), dict(h)
        for i in cohort:
            receive(models[i], shared)
            batches, lr = world["batches"](t, i), lr_of(world, t)
            pulled_training(models[i], batches, lr, plain(world), own[i], alpha, shared, world)
            moved = {name: tensor - shared[name] for name, tensor in copy_of(models[i], h).items()}
            own[i] = {name: own[i][name] - alpha * moved[name] for name in h}
            new_h = {name: new_h[name] - alpha / len(models) * moved[name] for name in h}
        h = new_h
        mean = average([models[i] for i in cohort], [world["weights"][i] for i in cohort], shared)
        shared = {name: mean[name] - h[name] / alpha if name in h else mean[name] for name in mean}
        result.shared.append(shared)
        result.deployed.append(deployed(models, shared))
        result.dual.append(list(own))
    return result


def plain(world: World) -> Slope:
    """The gradient itself."""
    return lambda model, x, y: gradient(model, x, y, loss_of(world))


def fedspeed(
    rho: float,
    lam: float,
    dual_mean: Literal["all", "participants"] = "all",
    split: bool = False,
    **world: Unpack[World],
) -> DualResult:
    """FedSpeed: local steps along g(w + ρ g/‖g‖) − ĝ_i + λ (w − w_t); then ĝ_i −= λ (w_i − w_t).

    Participants report w_i − ĝ_i/λ, and their mean is the new w; so in the paper. In the authors' code, "all", it is
    the mean of the participants' w_i less that of all clients' ĝ_i/λ.

    Args:
        rho: radius ρ.
        lam: λ, the strength of the pull; 1/λ in the paper.
        dual_mean: whose ĝ_i enter the mean.
        split: the authors' code, where λ w is weight decay and so escapes the clipping; all tensors are exchanged.
        world: see :class:`World`.

    Reference: Sun et al., ICLR 2023.
    """
    models, shared = start(world)
    own, radius = [zeros(shared, model) for model in models], dict.fromkeys(trainable(world["model"]), rho)
    result = DualResult()

    def slope(model: nn.Module, x: Tensor, y: Tensor) -> State:
        return sam_gradient(model, x, y, loss_of(world), radius)

    for t in range(world["rounds"]):
        cohort, weights = cohort_of(world, t), world["weights"]
        for i in cohort:
            receive(models[i], shared)
            batches, lr = world["batches"](t, i), lr_of(world, t)
            pulled_training(models[i], batches, lr, slope, own[i], lam, shared, world, split)
            end = copy_of(models[i], own[i])
            own[i] = {name: own[i][name] - lam * (end[name] - shared[name]) for name in own[i]}
        shared = average([models[i] for i in cohort], [weights[i] for i in cohort], shared)
        whose = {i: 1.0 for i in range(len(models))} if dual_mean == "all" else {i: weights[i] for i in cohort}
        for name in own[0]:
            for i, weight in whose.items():
                shared[name] = shared[name] - weight / sum(whose.values()) * own[i][name] / lam
        result.shared.append(shared)
        result.deployed.append(deployed(models, shared))
        result.dual.append(list(own))
    return result


def consistent(rho: float, mu: State, s: State, last: State, loss: Loss) -> Slope:
    """The gradient at w + ŝ of FedSMOO; μ moves, and ``last`` becomes ŝ, each time it is taken."""

    def perturbation(g: State) -> State:
        q = {name: g[name] - mu[name] - s[name] if name in s else g[name] for name in g}
        length = norm(q.values()) + TINY
        for name in q:
            last[name] = rho * q[name] / length
        for name in s:
            mu[name] = mu[name] + last[name] - s[name]
        return last

    return lambda model, x, y: gradient_uphill(model, x, y, loss, perturbation)


def fedsmoo(rho: float, lam: float, report: Literal["code", "paper"] = "code", **world: Unpack[World]) -> DualResult:
    """FedSMOO: local steps along g(w + ŝ) + λ (w − w_t + h_i), with ŝ = ρ q/‖q‖ and q = g − μ_i − s.

    Each step adds ŝ − s to μ_i; after the last h_i += w_i − w_t. Then s = ρ a/‖a‖, a the mean of the μ_i, in the paper
    of μ_i less the last ŝ, and w = mean of the w_i + mean of all h_i.

    Reference: Sun et al., ICML 2023.
    """
    models, shared = start(world)
    h, mu = ([zeros(shared, model) for model in models] for _ in range(2))
    s = zeros(shared, world["model"])
    result = DualResult()
    for t in range(world["rounds"]):
        cohort = cohort_of(world, t)
        weights = [world["weights"][i] for i in cohort]
        a = {name: torch.zeros_like(s[name]) for name in s}
        for i, weight in zip(cohort, weights, strict=True):
            last: State = {}
            slope = consistent(rho, mu[i], s, last, loss_of(world))
            receive(models[i], shared)
            dual = {name: -lam * h[i][name] for name in s}
            pulled_training(models[i], world["batches"](t, i), lr_of(world, t), slope, dual, lam, shared, world)
            end = copy_of(models[i], s)
            for name in s:
                h[i][name] = h[i][name] + end[name] - shared[name]
                told = mu[i][name] - last[name] if report == "paper" else mu[i][name]
                a[name] = a[name] + weight / sum(weights) * told
        s = {name: rho * a[name] / (norm(a.values()) + TINY) for name in s}
        shared = average([models[i] for i in cohort], weights, shared)
        for name in s:
            for dual in h:
                shared[name] = shared[name] + dual[name] / len(models)
        result.shared.append(shared)
        result.deployed.append(deployed(models, shared))
        result.dual.append([dict(one) for one in mu])
        result.perturbation.append(s)
    return result


def fedgloss(rho: float, beta: float, rho_local: float, **world: Unpack[World]) -> DualResult:
    """FedGloSS: clients start from w̃ = w + ρ Δ/‖Δ‖, Δ the weighted mean of w̃ − w_i of the round before.

    Local steps go along g̃ − σ_i + (w − w̃)/β, g̃ the gradient or SAM's; then σ_i −= (w_i − w̃)/β. The server keeps
    σ −= Σ (w_i − w̃)/(β N) and sets w −= Δ + β σ.

    Reference: Caldarola et al., CVPR 2025, algorithm.
    """
    models, shared = start(world)
    own, sigma = [zeros(shared, model) for model in models], zeros(shared, world["model"])
    delta, radius = dict(sigma), dict.fromkeys(trainable(world["model"]), rho_local)
    result = DualResult()

    def slope(model: nn.Module, x: Tensor, y: Tensor) -> State:
        return sam_gradient(model, x, y, loss_of(world), radius) if rho_local else gradient(model, x, y, loss_of(world))

    for t in range(world["rounds"]):
        cohort = cohort_of(world, t)
        weights = [world["weights"][i] for i in cohort]
        length = norm(delta.values()) + TINY
        ahead = {k: v + rho * delta[k] / length if k in delta else v for k, v in shared.items()}
        delta = {name: torch.zeros_like(tensor) for name, tensor in delta.items()}
        for i, weight in zip(cohort, weights, strict=True):
            receive(models[i], ahead)
            pulled_training(models[i], world["batches"](t, i), lr_of(world, t), slope, own[i], 1 / beta, ahead, world)
            end = copy_of(models[i], sigma)
            own[i] = {name: own[i][name] - (end[name] - ahead[name]) / beta for name in sigma}
            for name in sigma:
                sigma[name] = sigma[name] - (end[name] - ahead[name]) / beta / len(models)
                delta[name] = delta[name] + weight / sum(weights) * (ahead[name] - end[name])
        mean = average([models[i] for i in cohort], weights, shared)
        shared = {k: shared[k] - delta[k] - beta * sigma[k] if k in sigma else mean[k] for k in mean}
        result.shared.append(shared)
        result.deployed.append(deployed(models, shared))
        result.dual.append(list(own))
    return result
