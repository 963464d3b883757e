"""Textbook loops of methods with a server's step, normalized averages, other starts or a second model in step.

See :mod:`idiolect.testing.oracles.averaging`.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Literal, Unpack

import torch
from torch import Tensor, nn

from idiolect.testing.oracles.common import (
    Direction,
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


def plain(world: World) -> Direction:
    """The direction g."""
    return lambda model, x, y, _: gradient(model, x, y, loss_of(world))


Step = Callable[[str, Tensor, Tensor], Tensor]
"""``step(name, tensor, move)``: a tensor of the server after a round whose mean is ``tensor + move``."""


def with_server(step: Step, world: World) -> OracleResult:
    """FedAvg whose server has a step of its own for the exchanged trainable tensors."""
    models, shared = start(world)
    moving = set(trainable(world["model"])) & set(shared)
    result = OracleResult()
    for t in range(world["rounds"]):
        cohort = cohort_of(world, t)
        for i in cohort:
            receive(models[i], shared)
            local_training(models[i], world["batches"](t, i), lr_of(world, t), plain(world), shared, world)
        mean = average([models[i] for i in cohort], [world["weights"][i] for i in cohort], shared)
        mean |= {name: step(name, shared[name], mean[name] - shared[name]) for name in moving}
        shared = mean
        result.shared.append(shared)
        result.deployed.append(deployed(models, shared))
    return result


def fedavgm(mu: float, lr_server: float, **world: Unpack[World]) -> OracleResult:
    """FedAvgM: v ← mu · v + Δ, then w ← w + lr_server · v.

    Reference: Hsu et al. 2019.
    """
    v: State = {}

    def step(name: str, tensor: Tensor, move: Tensor) -> Tensor:
        v[name] = mu * v[name] + move if name in v else move
        return tensor + lr_server * v[name]

    return with_server(step, world)


def fedopt(
    rule: Literal["adagrad", "adam", "yogi"],
    lr_server: float,
    beta1: float,
    beta2: float,
    tau: float,
    **world: Unpack[World],
) -> OracleResult:
    """FedAdagrad, FedAdam, FedYogi: m and V from 0 and tau², then w ← w + lr_server · m / (√V + tau).

    Reference: Reddi et al., ICLR 2021, algorithm 2.
    """
    m: State = {}
    v: State = {}

    def step(name: str, tensor: Tensor, move: Tensor) -> Tensor:
        before = v.get(name, torch.full_like(move, tau * tau))
        m[name] = beta1 * m.get(name, torch.zeros_like(move)) + (1 - beta1) * move
        if rule == "adagrad":
            v[name] = before + move * move
        elif rule == "adam":
            v[name] = beta2 * before + (1 - beta2) * move * move
        else:
            shrinks = before > move * move
            v[name] = torch.where(shrinks, before - (1 - beta2) * move * move, before + (1 - beta2) * move * move)
        return tensor + lr_server * m[name] / (torch.sqrt(v[name]) + tau)

    return with_server(step, world)


def effective(steps: int, momentum: float) -> float:
    """How often all gradients of a descent with momentum are counted together.

    Example:
        >>> effective(3, 0.5)  # the first gradient 1 + 1/2 + 1/4 times, the second 1 + 1/2 times, the third once
        4.25
    """
    return sum(sum(momentum**later for later in range(steps - k)) for k in range(steps))


def fednova(**world: Unpack[World]) -> OracleResult:
    """FedNova: w ← w + τ Σ p_i (w_i − w) / a_i with τ = Σ p_i a_i; statistics are averaged plainly.

    Reference: Wang et al., NeurIPS 2020.
    """
    models, shared = start(world)
    result = OracleResult()
    for t in range(world["rounds"]):
        cohort = cohort_of(world, t)
        counts = {}
        for i in cohort:
            receive(models[i], shared)
            batches = world["batches"](t, i)
            local_training(models[i], batches, lr_of(world, t), plain(world), shared, world)
            counts[i] = effective(len(batches), world.get("momentum", 0.0))
        weights = [world["weights"][i] for i in cohort]
        mean = average([models[i] for i in cohort], weights, shared)
        tau = sum(w * counts[i] for w, i in zip(weights, cohort, strict=True)) / sum(weights)
        for name in trainable(world["model"]):
            if name in shared:
                moves = [(models[i].state_dict()[name] - shared[name]) / counts[i] for i in cohort]
                mixed = sum((w * move for w, move in zip(weights, moves, strict=True)), torch.zeros_like(shared[name]))
                mean[name] = shared[name] + tau * mixed / sum(weights)
        shared = mean
        result.shared.append(shared)
        result.deployed.append(deployed(models, shared))
    return result


def fedlesam(rho: float, epsilon: float = 1e-7, **world: Unpack[World]) -> OracleResult:
    """FedLESAM: the gradient at w + δ, δ = rho (w_old − w_t) / (‖w_old − w_t‖ + epsilon), w_old received before.

    δ is fixed over a round, over the exchanged trainable tensors together, and absent the first time.

    Reference: Fan et al., ICML 2024.
    """
    models, shared = start(world)
    moving = [name for name in trainable(world["model"]) if name in shared]
    old: dict[int, State] = {}
    result = OracleResult()
    for t in range(world["rounds"]):
        cohort = cohort_of(world, t)
        for i in cohort:
            back = {name: old[i][name] - shared[name] if i in old else 0 * shared[name] for name in moving}
            length = float(torch.cat([tensor.flatten() for tensor in back.values()]).norm())
            delta = {name: rho * tensor / (length + epsilon) for name, tensor in back.items()}

            def uphill(model: nn.Module, x: Tensor, y: Tensor, _: State, delta: State = delta) -> State:
                here = copy_of(model, delta)
                receive(model, {name: here[name] + delta[name] for name in delta})
                g = gradient(model, x, y, loss_of(world))
                receive(model, here)
                return g

            receive(models[i], shared)
            local_training(models[i], world["batches"](t, i), lr_of(world, t), uphill, shared, world)
            old[i] = {name: shared[name] for name in moving}
        shared = average([models[i] for i in cohort], [world["weights"][i] for i in cohort], shared)
        result.shared.append(shared)
        result.deployed.append(deployed(models, shared))
    return result


def fedinit(beta: float, **world: Unpack[World]) -> OracleResult:
    """FedInit: a client starts from s_i = w_t + beta (w_t − w_old), w_old where it ended last, at first w_0.

    The server adds the mean of w_i − s_i to w_t. Clients predict with w_t.

    Reference: Sun et al., NeurIPS 2023.
    """
    models, shared = start(world)
    moving = [name for name in trainable(world["model"]) if name in shared]
    ended: dict[int, State] = {i: {k: shared[k].clone() for k in moving} for i in range(len(models))}
    result = OracleResult()
    for t in range(world["rounds"]):
        cohort = cohort_of(world, t)
        starts: dict[int, State] = {}
        for i in cohort:
            receive(models[i], shared)
            starts[i] = {k: (1 + beta) * shared[k] - beta * ended[i][k] for k in moving}
            receive(models[i], starts[i])
            local_training(models[i], world["batches"](t, i), lr_of(world, t), plain(world), shared, world)
            ended[i] = copy_of(models[i], moving)
        total, weights = sum(world["weights"][i] for i in cohort), world["weights"]
        moved = {k: sum(weights[i] * (ended[i][k] - starts[i][k]) for i in cohort) / total for k in moving}
        mean = average([models[i] for i in cohort], [weights[i] for i in cohort], shared)
        shared = {k: shared[k] + moved[k] if k in moved else mean[k] for k in shared}
        result.shared.append(shared)
        result.deployed.append(deployed(models, shared))
    return result


def pfedme(strength: float, steps: int, lr_own: float, **world: Unpack[World]) -> OracleResult:
    """pFedMe: per batch some steps of θ along g(θ) + strength (θ − w), then w along strength (w − θ).

    θ goes on from batch to batch and round to round, and predicts. It is the received model the first time. Its
    statistics move with its first pass over each batch; those of w are the same.

    Reference: Dinh et al., NeurIPS 2020.
    """
    models, shared = start(world)
    own = [deepcopy(model) for model in models]
    seen: set[int] = set()
    result = OracleResult()
    for t in range(world["rounds"]):
        cohort = cohort_of(world, t)
        for i in cohort:
            receive(models[i], shared)
            if i not in seen:
                receive(own[i], shared)
            seen.add(i)

            def pull(model: nn.Module, x: Tensor, y: Tensor, _: State, theta: nn.Module = own[i]) -> State:
                w = {name: tensor.detach().clone() for name, tensor in trainable(model).items()}
                statistics: State = {}
                theta.train()
                for _k in range(steps):
                    g = gradient(theta, x, y, loss_of(world))
                    statistics = statistics or {n: b.clone() for n, b in theta.named_buffers()}
                    here = copy_of(theta, w)
                    receive(theta, {n: here[n] - lr_own * (g[n] + strength * (here[n] - w[n])) for n in w})
                receive(theta, statistics)
                receive(model, statistics)
                end = copy_of(theta, w)
                return {name: strength * (w[name] - end[name]) for name in w}

            local_training(models[i], world["batches"](t, i), lr_of(world, t), pull, shared, world)
        shared = average([models[i] for i in cohort], [world["weights"][i] for i in cohort], shared)
        result.shared.append(shared)
        personal = [copy_of(model, model.state_dict()) for model in own]
        result.deployed.append([state if i in seen else {**state, **shared} for i, state in enumerate(personal)])
    return result


class Pair(nn.Module):
    """A client's shared model and its own, the share of its own in the mixture, and whether that is to be learned."""

    due = False

    def __init__(self, model: nn.Module, share: float) -> None:
        super().__init__()
        self.shared, self.own, self.share = deepcopy(model), deepcopy(model), share

    def mixture(self) -> nn.Module:
        """The own model with weights share · v + (1 − share) · w."""
        mixed = deepcopy(self.own)
        w, v = trainable(self.shared), trainable(self.own)
        receive(mixed, {k: self.share * v[k].detach() + (1 - self.share) * w[k].detach() for k in w})
        return mixed


def apfl(share: float, adaptive: bool, **world: Unpack[World]) -> OracleResult:
    """APFL: w along g(w); v along a · g(a v + (1 − a) w); a by its own slope, clipped to [0, 1], once a round.

    One optimizer trains w and v together. The mixture predicts, with statistics of its own passes.

    Reference: Deng et al. 2020.
    """
    models, shared = start(world)
    pairs = [Pair(model, share) for model in models]
    seen: set[int] = set()
    result = OracleResult()
    for t in range(world["rounds"]):
        cohort, lr = cohort_of(world, t), lr_of(world, t)

        def both(pair: nn.Module, x: Tensor, y: Tensor, _: State, lr: float = lr) -> State:
            assert isinstance(pair, Pair)
            g, mixed = gradient(pair.shared, x, y, loss_of(world)), pair.mixture().train()
            slope = gradient(mixed, x, y, loss_of(world))
            receive(pair.own, dict(mixed.named_buffers()))
            w, v = copy_of(pair.shared, g), copy_of(pair.own, g)
            direction = {f"shared.{k}": g[k] for k in g} | {f"own.{k}": pair.share * slope[k] for k in g}
            if pair.due:
                along = sum(float(((v[k] - w[k]) * slope[k]).sum()) for k in g)
                pair.share = min(1.0, max(0.0, pair.share - lr * along))
            pair.due = False
            return direction

        for i in cohort:
            receive(pairs[i].shared, shared)
            if i not in seen:
                receive(pairs[i].own, shared)
            seen.add(i)
            pairs[i].due = adaptive
            local_training(pairs[i], world["batches"](t, i), lr, both, shared, world)
        shared = average([pairs[i].shared for i in cohort], [world["weights"][i] for i in cohort], shared)
        result.shared.append(shared)
        result.deployed.append([])
        for i, pair in enumerate(pairs):
            receive(pair.shared, shared)
            model = pair.mixture() if i in seen else pair.shared
            result.deployed[-1].append(copy_of(model, model.state_dict()))
    return result
