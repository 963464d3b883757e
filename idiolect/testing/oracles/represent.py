"""Textbook loops of methods that look at features; see :mod:`idiolect.testing.oracles.averaging`.

The model is an `nn.Sequential` whose last layer, linear, is the head; the features are what it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    norm,
    receive,
    start,
    trainable,
)
from idiolect.testing.oracles.personal import plain


@dataclass
class DbeResult(OracleResult):
    """What FedDBE left behind.

    Attributes:
        vectors: of each client, one entry per round.
        consensus: the mean features that all are held at.
    """

    vectors: list[list[Tensor]] = field(default_factory=list)
    consensus: Tensor = field(default_factory=lambda: torch.zeros(0))


def split(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """Return the body and the head; their layers are the model's own."""
    *body, head = model.children()
    assert isinstance(head, nn.Linear)
    return nn.Sequential(*body), head


def shifted(kappa: float, mu: float, m: list[Tensor], consensus: Tensor | None, loss: Loss) -> Direction:
    """Gradient of the loss of h(u + z), and of κ · mean_d ½ (m − m̄)²; without m̄ that of the loss of h(u).

    Args:
        kappa: strength κ.
        mu: m ← (1 − mu) m + mu · mean of u over the batch, before each gradient.
        m: the running mean, the one item of a list in which it is replaced.
        consensus: m̄, if there is one yet.
        loss: of one batch.
    """

    def direction(model: nn.Module, x: Tensor, y: Tensor, _: State) -> State:
        (body, head), tensors = split(model), trainable(model)
        u = body(x)
        mean = (1 - mu) * m[0] + mu * u.mean(0)
        m[0] = mean.detach()
        total = loss(head(u), y) + 0 * tensors["z"].sum()
        if consensus is not None:
            total = loss(head(u + tensors["z"]), y) + kappa * (0.5 * (mean - consensus) ** 2).mean()
        return dict(zip(tensors, torch.autograd.grad(total, list(tensors.values())), strict=True))

    return direction


def feddbe(kappa: float, mu: float, **world: Unpack[World]) -> DbeResult:
    """FedDBE: from the second round on, logits are h(u(x) + z_i), and mean features m_i are held at m̄.

    m_i begins at 0 in each round. In the first one clients train as in FedAvg, and m̄ = Σ p_i m_i of their last
    m_i. z_i is one more tensor of a client's model, 0 at first. See :func:`shifted`.

    Args:
        kappa: strength κ.
        mu: weight of a batch in the running mean.
        world: see :class:`World`.

    Reference: Zhang et al., NeurIPS 2023.
    """
    models, shared = start(world)
    zeros = torch.zeros(split(world["model"])[1].in_features, dtype=torch.float64)
    for model in models:
        model.register_parameter("z", nn.Parameter(zeros.clone()))
    result, consensus = DbeResult(), None
    for t in range(world["rounds"]):
        cohort, lr = cohort_of(world, t), lr_of(world, t)
        p, means = [world["weights"][i] for i in cohort], []
        for i in cohort:
            m = [zeros]
            receive(models[i], shared)
            direction = shifted(kappa, mu, m, consensus, loss_of(world))
            local_training(models[i], world["batches"](t, i), lr, direction, shared, world)
            means.append(m[0])
        if consensus is None:
            consensus = (torch.tensor(p, dtype=torch.float64)[:, None] * torch.stack(means)).sum(0) / sum(p)
            result.consensus = consensus
        shared = average([models[i] for i in cohort], p, shared)
        result.shared.append(shared)
        states = deployed(models, shared)
        result.vectors.append([state.pop("z") for state in states])
        result.deployed.append(states)
    return result


def knn_probabilities(
    model: nn.Module, store: tuple[Tensor, Tensor], x: Tensor, neighbors: int, share: float, scale: float
) -> Tensor:
    """p(y|x) = λ p_kNN + (1 − λ) p_model of kNN-Per, example by example.

    p_kNN ∝ Σ e^(−‖u(x) − u_k‖² / (d · scale)) [y_k = y] over the k nearest of a client's training examples.

    Args:
        model: in evaluation mode.
        store: examples and labels that are searched.
        x: examples to predict.
        neighbors: k.
        share: λ.
        scale: of distances.

    Reference: Marfoq et al., ICML 2022.
    """
    with torch.no_grad():
        body, labels = split(model)[0], store[1].tolist()
        known = body(store[0])
        rows = []
        for u, p in zip(body(x), model(x).softmax(1), strict=True):
            distances = [float(((u - v) ** 2).sum()) for v in known]
            nearest = sorted(range(len(labels)), key=distances.__getitem__)[:neighbors]
            votes = torch.zeros_like(p)
            for k in nearest:
                votes[labels[k]] += math.exp(-distances[k] / (len(u) * scale))
            rows.append(share * votes / votes.sum() + (1 - share) * p)
        return torch.stack(rows)


def class_means(model: nn.Module, batches: Batches) -> dict[int, Tensor]:
    """Mean features of each class over batches, in evaluation mode."""
    body = split(model.eval())[0]
    with torch.no_grad():
        pairs = [(int(label), u) for x, y in batches for label, u in zip(y, body(x), strict=True)]
    return {c: torch.stack([u for label, u in pairs if label == c]).mean(0) for c in {label for label, _ in pairs}}


def aligning(means: dict[int, Tensor], names: Sequence[str]) -> Direction:
    """Gradient in the named tensors of Σ MSE(features of a class, its mean) over the classes of a batch."""

    def direction(model: nn.Module, x: Tensor, y: Tensor, _: State) -> State:
        u, tensors = split(model)[0](x), trainable(model)
        of_class = [(u[y == c], mean) for c, mean in means.items() if (y == c).any()]
        loss = torch.stack([F.mse_loss(own, mean.expand_as(own)) for own, mean in of_class]).sum()
        return dict(zip(names, torch.autograd.grad(loss, [tensors[name] for name in names]), strict=True))

    return direction


def fedas(
    lr_align: float,
    epochs: int,
    passes: Callable[[str, int, int], Batches],
    **world: Unpack[World],
) -> OracleResult:
    """FedAS: a private head, an aligned body, and clients weighed by the trace of their Fisher information.

    A client that has trained before first trains the body it received toward the class means of its last
    features, then everything. The trace is Σ over the batches of a pass of ‖∇F(w_i; B)‖², in evaluation mode
    after training; ``weights`` of the world count for nothing.

    Args:
        lr_align: learning rate of aligning.
        epochs: passes that align.
        passes: ``passes(purpose, t, i)`` lists the batches of those passes in round ``t``: ``"train"``, or
            ``"deploy"``; the first epoch of training, of which the trace is taken, is the first of them.
        world: see :class:`World`; ``of ``shared`` everything but the head is exchanged.

    Reference: Yang et al., CVPR 2024.
    """
    models, shared = start(world)
    last = [id(p) for p in split(models[0])[1].parameters()]
    head = {name for name, p in trainable(models[0]).items() if id(p) in last}
    body = [name for name in trainable(models[0]) if name not in head]
    shared = {name: tensor for name, tensor in shared.items() if name not in head}
    means: dict[int, dict[int, Tensor]] = {}
    result = OracleResult()

    def align(model: nn.Module, purpose: str, t: int, i: int) -> None:
        if i not in means:
            return
        split(model)[1].requires_grad_(False)
        local_training(model, passes(purpose, t, i), lr_align, aligning(means[i], body), {}, world)
        split(model)[1].requires_grad_(True)

    for t in range(world["rounds"]):
        cohort, lr, traces = cohort_of(world, t), lr_of(world, t), []
        for i in cohort:
            receive(models[i], shared)
            align(models[i], "train", t, i)
            local_training(models[i], world["batches"](t, i), lr, plain(loss_of(world)), {}, world)
            once = passes("train", t, i)[: len(passes("train", t, i)) // epochs]
            means[i] = class_means(models[i], once)
            gradients = [gradient(models[i], x, y, loss_of(world)) for x, y in once]
            traces.append(sum(float(norm(g.values())) ** 2 for g in gradients))
        shared = average([models[i] for i in cohort], traces, shared)
        result.shared.append(shared)
        copies = [deepcopy(model) for model in models]
        for i, model in enumerate(copies):
            receive(model, shared)
            align(model, "deploy", t + 1, i)
        result.deployed.append([copy_of(model, model.state_dict()) for model in copies])
    return result
