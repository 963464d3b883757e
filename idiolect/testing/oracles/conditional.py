"""Textbook loops of methods that condition features on the client; see :mod:`idiolect.testing.oracles.averaging`.

The model is an `nn.Sequential` whose last layer, linear, is the head; the features are what it is given. What a method
adds is listed in the head, which does not use it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
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
    deployed,
    everything,
    local_training,
    loss_of,
    lr_of,
    receive,
    start,
    trainable,
)
from idiolect.testing.oracles.losses import cosine, features_and_outputs, federated, last_linear, looking_on, slope


@dataclass
class HeadsResult(OracleResult):
    """What FedCP left behind, with one entry per round.

    Attributes:
        heads: weight and bias of the shared head.
    """

    heads: list[State] = field(default_factory=list)


def listed(model: nn.Module, name: str, tensors: State) -> nn.Module:
    """Return a copy of a model that lists these tensors as parameters of a module in its head."""
    model, module = deepcopy(model), nn.Module()
    for leaf, tensor in tensors.items():
        module.register_parameter(leaf, nn.Parameter(tensor.clone()))
    last_linear(model).add_module(name, module)
    return model


def outside_head(model: nn.Module) -> list[str]:
    """Names of everything but weight and bias of the head."""
    own = {id(tensor) for tensor in last_linear(model).parameters(recurse=False)}
    head = {name for name, tensor in model.named_parameters() if id(tensor) in own}
    return [name for name in everything(model) if name not in head]


def standardized(row: Tensor) -> Tensor:
    """Values less their mean, over the root of their variance plus 1e-5, as LayerNorm without its map."""
    centered = row - row.mean()
    return centered / ((centered**2).mean() + 1e-5).sqrt()


def gated(model: nn.Module, z: Tensor, v: Tensor, shared: State, noise: Tensor) -> Tensor:
    """FedCP's outputs: for each example and feature, a softmax over a pair of numbers divides it between two heads.

    Args:
        model: with the personal head, and ``gate`` in it.
        z: (b, d) features.
        v: (d,) the client's vector, of any length.
        shared: weight and bias of the shared head.
        noise: (b, d) what is added to the number of the personal head.
    """
    head, rows = last_linear(model), []
    gate = dict(head.get_submodule("gate").named_parameters())
    for example, own_noise in zip(z, noise, strict=True):
        inner = gate["weight"] @ (example * v / (v**2).sum().sqrt()) + gate["bias"]
        numbers = (gate["scale"] * standardized(inner) + gate["shift"]).clamp(min=0)
        personal, common = numbers[: len(v)] + own_noise, numbers[len(v) :]
        r, q = torch.softmax(torch.stack([personal, common]), dim=0)
        first = head.weight @ (r * example) + head.bias
        rows.append(first + shared["weight"] @ (q * example) + shared["bias"])
    return torch.stack(rows)


def mmd(one: Tensor, other: Tensor) -> Tensor:
    """Mean over pairs of examples of k(z_j, z_k) + k(z'_j, z'_k) - 2 k(z_j, z'_k), a sum of four Gaussian kernels."""

    def k(a: Tensor, b: Tensor) -> Tensor:
        gap = ((a - b) ** 2).sum()
        return sum((math.e ** (-gap / (2 * width)) for width in (10, 15, 20, 50)), torch.zeros(()))

    b = range(len(one))
    terms = [k(one[j], one[n]) + k(other[j], other[n]) - 2 * k(one[j], other[n]) for j in b for n in b]
    return torch.stack(terms).mean()


def gated_direction(
    lam: float, received: nn.Module, shared: State, draw: Callable[[int], Tensor], loss: Loss
) -> Direction:
    """Gradient of the loss of FedCP's outputs and of λ times :func:`mmd` from the received body.

    Args:
        lam: strength λ.
        received: the model when training starts.
        shared: weight and bias of the shared head.
        draw: step -> noise, (b, d).
        loss: of one batch.
    """
    v, step = last_linear(received).weight.detach().sum(0), iter(range(10**6))

    def direction(model: nn.Module, x: Tensor, y: Tensor, _: State) -> State:
        z = features_and_outputs(model, x)[0]
        total = loss(gated(model, z, v, shared, draw(next(step))), y)
        return slope(model, total + lam * mmd(z, looking_on(received, x)[0]) if lam else total)

    return direction


def fedcp(lam: float, gate: State, noise: Callable[[int, int, int], Tensor], **world: Unpack[World]) -> HeadsResult:
    """FedCP: body and gate are averaged; each client has a head, and the server the mean of (own + shared) / 2.

    A client that has not trained starts with the shared head. The client's vector is the sum of the rows of its head
    when training starts. The loss adds λ times :func:`mmd` of the features and those of the received body.

    Args:
        lam: strength λ.
        gate: the first ``weight``, ``bias``, ``scale`` and ``shift`` of the gate.
        noise: ``noise(round, client, step)`` is ``(b, d)`` of logistic numbers.
        world: see :class:`World`; what is shared is decided here.

    Reference: Zhang et al., KDD 2023.
    """
    net = listed(world["model"], "gate", gate)
    models, shared = start({**world, "model": net, "shared": outside_head(net)})
    heads = {leaf: t.detach().clone() for leaf, t in last_linear(net).named_parameters(recurse=False)}
    result, known = HeadsResult(), set[int]()
    for t in range(world["rounds"]):
        cohort = cohort_of(world, t)
        for i in cohort:
            receive(models[i], shared)
            if i not in known:
                receive(last_linear(models[i]), heads)
            draw = partial(noise, t, i)
            direction = gated_direction(lam, deepcopy(models[i]), heads, draw, loss_of(world))
            local_training(models[i], world["batches"](t, i), lr_of(world, t), direction, shared, world)
        known |= set(cohort)
        p = [world["weights"][i] for i in cohort]
        shared = average([models[i] for i in cohort], p, shared)
        means = average([last_linear(models[i]) for i in cohort], p, heads)
        heads = {leaf: ((means[leaf] + heads[leaf]) / 2).detach() for leaf in heads}
        for i in set(range(world["clients"])) - known:
            receive(last_linear(models[i]), heads)
        result.shared.append(shared)
        result.deployed.append(deployed(models, shared))
        result.heads.append(heads)
    return result


def fedcp_predictions(model: nn.Module, own: State, heads: State, x: Tensor) -> Tensor:
    """FedCP's outputs for a client, in evaluation mode and without noise.

    Args:
        model: with ``gate`` in its head; it is copied.
        own: the state dict of the client's model.
        heads: weight and bias of the shared head.
        x: inputs.
    """
    model = deepcopy(model)
    receive(model, own)
    z = looking_on(model, x)[0]
    return gated(model, z, last_linear(model).weight.sum(0), heads, torch.zeros_like(z)).detach()


def conditioned(model: nn.Module, z: Tensor, context: Tensor) -> Tensor:
    """GPFL's features under a context: scaled by 1 + γ and shifted by β, then without negative values.

    Args:
        model: with ``valve`` in its head; the first rows of its weight are those of γ, the others those of β.
        z: (b, d) features.
        context: (d,) a mean of class embeddings.
    """
    valve, d = dict(last_linear(model).get_submodule("valve").named_parameters()), len(context)
    maps = []
    for k, rows in enumerate((slice(0, d), slice(d, 2 * d))):
        raw = (valve["weight"][rows] @ context + valve["bias"][rows]).clamp(min=0)
        maps.append(valve["scale"][k] * standardized(raw) + valve["shift"][k])
    return torch.stack([((1 + maps[0]) * example + maps[1]).clamp(min=0) for example in z])


def own_context(counts: Sequence[int], embeddings: Tensor) -> Tensor:
    """The mean embedding of a client's examples, from how many it has of each class."""
    total = torch.zeros_like(embeddings[0])
    for count, embedding in zip(counts, embeddings, strict=True):
        total = total + count / sum(counts) * embedding
    return total


def gpfl(lam: float, mu: float, counts: Sequence[Sequence[int]], valve: State, **world: Unpack[World]) -> OracleResult:
    """GPFL: body, class embeddings and valve are averaged; each client has a head, which gets features under a context.

    The loss is that of the head, plus cross-entropy of cosines of globally conditioned features and embeddings, plus
    λ times the norm of the batch's gaps from the received embeddings. Embeddings and valve decay by μ.

    Args:
        lam: strength λ.
        mu: weight decay μ.
        counts: how many examples of each class each client has.
        valve: the first ``embeddings``, ``weight``, ``bias``, ``scale`` and ``shift``.
        world: see :class:`World`; what is shared is decided here.

    Reference: Zhang et al., ICCV 2023.
    """
    net = listed(world["model"], "valve", valve)

    def direction_of(i: int, received: nn.Module, _: Batches) -> Direction:
        old = last_linear(received).get_submodule("valve").get_parameter("embeddings").detach()
        everyone, own = own_context([1] * len(old), old), own_context(counts[i], old)

        def direction(model: nn.Module, x: Tensor, y: Tensor, _: State) -> State:
            z, head = features_and_outputs(model, x)[0], last_linear(model)
            loss = loss_of(world)(head(conditioned(model, z, own)), y)
            embeddings, squares = head.get_submodule("valve").get_parameter("embeddings"), torch.zeros(())
            for example, label in zip(conditioned(model, z, everyone), y.tolist(), strict=True):
                there = bool(example.any())  # features that are all zero have no direction: all cosines are zero
                cosines = torch.stack([cosine(example, e) if there else e.sum() * 0 for e in embeddings])
                loss = loss + (cosines.exp().sum().log() - cosines[label]) / len(y)
                squares = squares + ((example - old[label]) ** 2).sum()
            found = slope(model, loss + lam * squares**0.5)
            return {n: g + mu * trainable(model)[n].detach() if ".valve." in n else g for n, g in found.items()}

        return direction

    return federated({**world, "model": net, "shared": outside_head(net)}, direction_of)


def gpfl_predictions(model: nn.Module, own: State, counts: Sequence[int], x: Tensor) -> Tensor:
    """GPFL's outputs for a client, in evaluation mode.

    Args:
        model: with ``valve`` in its head; it is copied.
        own: the state dict of the client's model.
        counts: how many examples of each class the client has.
        x: inputs.
    """
    model = deepcopy(model)
    receive(model, own)
    head, z = last_linear(model), looking_on(model, x)[0]
    context = own_context(counts, head.get_submodule("valve").get_parameter("embeddings"))
    outputs: Tensor = head(conditioned(model, z, context)).detach()
    return outputs
