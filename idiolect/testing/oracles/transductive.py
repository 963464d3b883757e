"""Textbook loops of methods that read the inputs to predict; see :mod:`idiolect.testing.oracles.averaging`.

The model is an `nn.Sequential` whose last layer, linear, is the head; the features are what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from idiolect.testing.oracles.averaging import averaging
from idiolect.testing.oracles.common import (
    Batches,
    Direction,
    OracleResult,
    State,
    World,
    average,
    cohort_of,
    local_training,
    loss_of,
    lr_of,
    receive,
    start,
)
from idiolect.testing.oracles.losses import class_counts, last_linear, slope
from idiolect.testing.oracles.personal import plain


@dataclass
class Predicted(OracleResult):
    """What a method left behind, with one entry per round.

    Attributes:
        outputs: of each client on its inputs.
        means: mean features of the cohort.
    """

    outputs: list[list[Tensor]] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)


def normalized_by_batch(model: nn.Module, x: Tensor) -> Tensor:
    """Outputs of a model in evaluation mode whose batch normalization takes the moments of its own input.

    Layer by layer and channel by channel; the variance is divided by the number of values.
    """
    with torch.no_grad():
        for layer in model.eval().children():
            if not isinstance(layer, _BatchNorm):
                x = layer(x)
                continue
            scaled = torch.empty_like(x)
            for c in range(x.shape[1]):
                values = x[:, c]
                mean = values.sum() / values.numel()
                variance = ((values - mean) ** 2).sum() / values.numel()
                scaled[:, c] = layer.weight[c] * (values - mean) / (variance + layer.eps).sqrt() + layer.bias[c]
            x = scaled
    return x


def adabn(inputs: Sequence[Tensor], **world: Unpack[World]) -> Predicted:
    """AdaBN: federated averaging; each client predicts its inputs normalized by themselves.

    Args:
        inputs: of each client, at least two.
        world: see :class:`World`.

    Reference: Li et al., Pattern Recognition 2018.
    """
    trained = averaging(plain(loss_of(world)), world)
    result = Predicted(trained.shared, trained.deployed)
    for states in trained.deployed:
        model = deepcopy(world["model"])
        outputs = []
        for state, x in zip(states, inputs, strict=True):
            model.load_state_dict(state)
            outputs.append(normalized_by_batch(model, x))
        result.outputs.append(outputs)
    return result


def body_of(model: nn.Module) -> nn.Module:
    """All layers but the last."""
    return nn.Sequential(*list(model.children())[:-1])


def features(model: nn.Module, x: Tensor) -> Tensor:
    """Features in evaluation mode; the model is as before."""
    with torch.no_grad():
        found: Tensor = body_of(deepcopy(model).eval())(x)
    return found


def mixed(
    z: Tensor,
    heads: tuple[nn.Module, nn.Module],
    means: tuple[Tensor | None, Tensor],
    steps: int,
    lr: float,
    alpha: float,
    beta: float,
) -> Tensor:
    """FedTHE's outputs: for each input in turn the sum of two heads' outputs, weighed without its label.

    The weights are the softmax of two numbers, ones at first, which take steps of Adam on
    c H(softmax(q)) + (1 − c)(λ_g ‖r − ḡ‖ + λ_p ‖r − l‖), with c the cosine of the two heads' probabilities,
    r = β z + (1 − β) h, and h ← α z + (1 − α) h, the first z at first.

    Args:
        z: features of the inputs.
        heads: the shared one and the client's own.
        means: of features, the cohort's and the client's; without the cohort's the second term is left out.
        steps: of Adam.
        lr: of Adam.
        alpha: weight of an input in the history.
        beta: weight of an input's own features.
    """
    history, rows = z[0], []
    for b in range(len(z)):
        history = z[0] if b == 0 else alpha * z[b] + (1 - alpha) * history
        r = beta * z[b] + (1 - beta) * history
        g, p = (head(z[b]).detach() for head in heads)
        c = torch.dot(g.softmax(0), p.softmax(0)) / (g.softmax(0).norm() * p.softmax(0).norm())
        e = torch.ones(2, dtype=z.dtype, requires_grad=True)
        adam = torch.optim.Adam([e], lr=lr)
        for _ in range(steps):
            adam.zero_grad()
            weights = torch.softmax(e, 0)
            q = (weights[0] * g + weights[1] * p).softmax(0)
            loss = -c * (q * q.log()).sum()
            if means[0] is not None:
                loss = loss + (1 - c) * (weights[0] * (r - means[0]).norm() + weights[1] * (r - means[1]).norm())
            loss.backward()
            adam.step()
        weights = torch.softmax(e.detach(), 0)
        rows.append(weights[0] * g + weights[1] * p)
    return torch.stack(rows)


def fedthe(
    inputs: Sequence[Tensor],
    examples: Sequence[Tensor],
    head_batches: Callable[[str, int, int], Batches],
    epochs: int,
    mixing: tuple[int, float, float, float],
    **world: Unpack[World],
) -> Predicted:
    """FedTHE: balanced federated averaging, own heads on the received features, and :func:`mixed` outputs.

    A client's own head is at first that of the model it receives first. It trains before local training and, on a
    copy, before it predicts; the client's mean is of the same features. Class counts are one more than they are.

    Args:
        inputs: of each client, to predict.
        examples: of each client, all that it trains on.
        head_batches: ``head_batches(purpose, t, i)`` lists the batches that the own head trains on in round ``t``, to
            ``"train"`` or to ``"deploy"``.
        epochs: how many epochs a client's batches of local training cover.
        mixing: steps and lr of Adam, alpha and beta of :func:`mixed`.
        world: see :class:`World`.

    Reference: Jiang and Lin, ICLR 2023.
    """
    models, shared = start(world)
    heads: dict[int, nn.Linear] = {}
    result, loss = Predicted(), loss_of(world)

    def own_head(model: nn.Module, purpose: str, t: int, i: int) -> tuple[nn.Linear, Tensor]:
        head = deepcopy(heads.get(i, last_linear(model)))
        batches, lr = head_batches(purpose, t, i), lr_of(world, min(t, world["rounds"] - 1))
        if batches:
            local_training(head, [(features(model, x), y) for x, y in batches], lr, plain(loss), {}, world)
        return head, features(model, examples[i]).mean(0)

    def balanced(batches: Batches) -> Direction:
        counts = torch.tensor(class_counts(batches, epochs, last_linear(models[0]).out_features))
        shift = (counts + 1).double().log()
        return lambda model, x, y, _: slope(model, loss(model(x) + shift, y))

    for t in range(world["rounds"]):
        cohort, means = cohort_of(world, t), []
        for i in cohort:
            receive(models[i], shared)
            heads[i], mean = own_head(models[i], "train", t, i)
            means.append(mean)
            batches = world["batches"](t, i)
            local_training(models[i], batches, lr_of(world, t), balanced(batches), shared, world)
        shared = average([models[i] for i in cohort], [world["weights"][i] for i in cohort], shared)
        result.shared.append(shared)
        result.means.append(torch.stack(means).mean(0))
        states: list[State] = []
        outputs: list[Tensor] = []
        for i, model in enumerate(map(deepcopy, models)):
            receive(model, shared)
            head, mean = own_head(model, "deploy", t + 1, i)
            z = features(model, inputs[i])
            outputs.append(mixed(z, (last_linear(model), head), (result.means[-1], mean), *mixing))
            states.append(
                {**model.state_dict(), **{f"own.{name}": tensor for name, tensor in head.state_dict().items()}}
            )
        result.deployed.append(states)
        result.outputs.append(outputs)
    return result
