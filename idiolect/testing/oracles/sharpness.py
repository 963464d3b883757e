"""Textbook loops of the sharpness-aware methods; see :mod:`idiolect.testing.oracles.averaging`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Unpack

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from idiolect.testing.oracles.averaging import averaging
from idiolect.testing.oracles.common import (
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
    norm,
    receive,
    start,
    trainable,
)

Selection = Literal["most", "least"] | Callable[[int, int, list[str]], list[str]]
TINY = 1e-7
"""Added to the norm a perturbation is divided by."""


def gradient_uphill(
    model: nn.Module, x: Tensor, y: Tensor, loss: Loss, perturbation: Callable[[State], State]
) -> State:
    """Gradient at w + ε on the batch whose gradient g at w gives ε = ``perturbation(g)``.

    Weights come back from a copy; running statistics and counters are those of the pass at w.
    """
    epsilon = perturbation(gradient(model, x, y, loss))
    before = copy_of(model, model.state_dict())
    receive(model, {name: before[name] + epsilon[name] for name in epsilon})
    uphill = gradient(model, x, y, loss)
    receive(model, before)
    return uphill


def sam_gradient(model: nn.Module, x: Tensor, y: Tensor, loss: Loss, radius: dict[str, float]) -> State:
    """Gradient at w + ε with ε_k = r_k g_k / (‖g‖ + 1e-7), the norm over all trainable tensors."""

    def perturbation(g: State) -> State:
        length = norm(g.values()) + TINY
        return {name: radius[name] * g[name] / length for name in g}

    return gradient_uphill(model, x, y, loss, perturbation)


def fedsam(rho: float, **world: Unpack[World]) -> OracleResult:
    """FedSAM: FedAvg along the gradient at w + ρ g/‖g‖.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(1.0)
        >>> data = [(torch.ones(1, 1), torch.zeros(1, 1))]
        >>> result = fedsam(0.5, model=model, batches=lambda t, i: data, clients=1, rounds=1, lr=0.1,
        ...                 weights=[1], loss=lambda z, y: (z - y).square().mean() / 2)  # 1 − 0.1 (1 + ρ)
        >>> round(result.shared[-1]["weight"].item(), 6)
        0.85

    Reference: Qu et al., ICML 2022; Caldarola et al., ECCV 2022.
    """
    radius = dict.fromkeys(trainable(world["model"]), rho)
    return averaging(lambda model, x, y, _: sam_gradient(model, x, y, loss_of(world), radius), world)


def normalizing(model: nn.Module) -> list[str]:
    """Trainable tensors of normalization layers, by type of layer."""
    kinds = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    layers = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    return [name for name in trainable(model) if name.rpartition(".")[0] in layers]


def sam_on(rho: float, **world: Unpack[World]) -> OracleResult:
    """SAM-ON: FedSAM with ε on the tensors of normalization layers alone, and the norm over these.

    Reference: Müller et al., NeurIPS 2023.
    """

    def perturbation(g: State) -> State:
        some = {name: g[name] for name in normalizing(world["model"])}
        return {name: rho * some[name] / (norm(some.values()) + TINY) for name in some}

    return averaging(lambda model, x, y, _: gradient_uphill(model, x, y, loss_of(world), perturbation), world)


def fedasam(rho: float, eta: float, names: Sequence[str] = (), **world: Unpack[World]) -> OracleResult:
    """FedASAM: ε = ρ T² g / (‖T g‖ + 1e-7), T = |w| + η on tensors called …weight, 1 elsewhere.

    On the named tensors alone, the norm too, if any are named.

    Reference: Caldarola et al., ECCV 2022; Kwon et al., ICML 2021.
    """

    def direction(model: nn.Module, x: Tensor, y: Tensor, _: State) -> State:
        def perturbation(g: State) -> State:
            g = {name: g[name] for name in names or g}
            scale = {name: torch.ones_like(g[name]) for name in g}
            for name, tensor in trainable(model).items():
                if name in g and name.endswith("weight"):
                    scale[name] = tensor.detach().abs() + eta
            length = norm(scale[name] * g[name] for name in g) + TINY
            return {name: rho * scale[name] ** 2 * g[name] / length for name in g}

        return gradient_uphill(model, x, y, loss_of(world), perturbation)

    return averaging(direction, world)


def candidates(model: nn.Module) -> list[str]:
    """Trainable tensors of two or more dimensions outside normalization layers."""
    inside = normalizing(model)
    return [name for name, tensor in trainable(model).items() if tensor.ndim >= 2 and name not in inside]


def movement(before: Tensor, after: Tensor, sensitivity: Literal["code", "raw"]) -> float:
    """How far a tensor moved: mean of (after − before)², "code" scales each to [0, 1] first.

    NaN for a constant tensor under "code", which has no range to scale by.
    """
    if sensitivity == "code":
        before = (before - before.min()) / (before.max() - before.min())
        after = (after - after.min()) / (after.max() - after.min())
    return float(((after - before) ** 2).mean())


def choose(scores: dict[str, float], top: int, selection: Literal["most", "least"]) -> list[str]:
    """The ``top`` names of highest score, or of lowest score other than zero; ties in given order, NaN last.

    Example:
        >>> scores = {"a": 1.0, "b": float("nan"), "c": 0.0, "d": 3.0, "e": 1.0}
        >>> choose(scores, 3, "most"), choose(scores, 2, "least"), choose(scores, 5, "most")
        (['d', 'a', 'e'], ['a', 'e'], ['d', 'a', 'e', 'c', 'b'])
    """
    undefined = [name for name in scores if scores[name] != scores[name]]
    names = [name for name in scores if name not in undefined]
    if selection == "most":
        ordered = sorted(names, key=lambda name: -scores[name])
    else:
        ordered = sorted((name for name in names if scores[name] != 0), key=lambda name: scores[name])
    return (ordered + undefined)[:top]


def blend(radius: dict[str, float], alpha: float, delta: State, loss: Loss) -> Direction:
    """The direction α g(w + ε) + (1 − α) Δ, on tensors without a Δ g(w + ε) itself."""

    def direction(model: nn.Module, x: Tensor, y: Tensor, _: State) -> State:
        g = sam_gradient(model, x, y, loss, radius)
        return {k: alpha * g[k] + (1 - alpha) * delta[k] if k in delta else g[k] for k in g}

    return direction


def mofedsam(rho: float, alpha: float, **world: Unpack[World]) -> OracleResult:
    """MoFedSAM: :func:`fedfsa` with one radius.

    Reference: Qu et al., ICML 2022.
    """
    return fedfsa(rho, rho, 0, alpha, **world)


def fedfsa(
    rho: float,
    rho_larger: float,
    top: int,
    alpha: float,
    selection: Selection = "most",
    sensitivity: Literal["code", "raw"] = "code",
    **world: Unpack[World],
) -> OracleResult:
    """FedFSA: MoFedSAM with a larger radius on the tensors that moved most in the client's last round.

    Local steps go along d = α g(w + ε) + (1 − α) Δ_t (tensors that are not exchanged: g(w + ε)), and
    Δ_{t+1} = Σ p_i (w_t − w_i) / (lr_t K_i), Δ_0 = 0.

    Args:
        rho: radius ρ; all tensors have it in a client's first round.
        rho_larger: radius of the chosen tensors.
        top: how many are chosen.
        alpha: share α of the client's own gradient.
        selection: "most" or "least" sensitive, or ``f(round, client, candidates)`` naming the tensors.
        sensitivity: see :func:`movement`.
        world: see :class:`World`.

    Reference: Xing et al., AAAI 2025.
    """
    model, weights = world["model"], world["weights"]
    models, shared = start(world)
    delta = {name: torch.zeros_like(t) for name, t in trainable(model).items() if name in shared}
    chosen: list[list[str]] = [[] for _ in models]
    result = OracleResult()
    for t in range(world["rounds"]):
        cohort, lr = cohort_of(world, t), lr_of(world, t)
        total = sum(weights[i] for i in cohort)
        new_delta = {name: torch.zeros_like(tensor) for name, tensor in delta.items()}
        for i in cohort:
            radius = {name: rho_larger if name in chosen[i] else rho for name in trainable(model)}
            receive(models[i], shared)
            before = copy_of(models[i], trainable(model))
            batches = world["batches"](t, i)
            direction = blend(radius, alpha, delta, loss_of(world))
            local_training(models[i], batches, lr, direction, shared, world)
            after = copy_of(models[i], trainable(model))
            for name in delta:
                new_delta[name] += weights[i] / total * (before[name] - after[name]) / (lr * len(batches))
            if callable(selection):
                chosen[i] = selection(t, i, candidates(model))
            else:
                moved = {k: movement(before[k], after[k], sensitivity) for k in candidates(model)}
                chosen[i] = choose(moved, top, selection)
        shared = average([models[i] for i in cohort], [weights[i] for i in cohort], shared)
        delta = new_delta
        result.shared.append(shared)
        result.deployed.append(deployed(models, shared))
        result.pseudo_gradient.append(delta)
        result.top.append(list(chosen))
    return result
