"""Textbook loops of methods that cut a model in two; see :mod:`idiolect.testing.oracles.averaging`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Unpack

from torch import nn

from idiolect.testing.oracles.averaging import fedavg, fine_tune
from idiolect.testing.oracles.common import (
    Batches,
    Local,
    OracleResult,
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
    receive,
    start,
    trainable,
)


def fedper(head: Sequence[str], **world: Unpack[World]) -> OracleResult:
    """FedPer: FedAvg on everything but the named tensors, which stay with the client.

    Reference: Arivazhagan et al., 2019.
    """
    world["shared"] = _body(world["model"], head)
    return fedavg(**world)


def lg_fedavg(head: Sequence[str], **world: Unpack[World]) -> OracleResult:
    """LG-FedAvg: FedAvg on the named tensors alone; all others, statistics too, stay with the client.

    Reference: Liang et al., 2020.
    """
    world["shared"] = list(head)
    return fedavg(**world)


def fedrep(
    head: Sequence[str],
    head_batches: Callable[[int, int], Batches],
    deploy_batches: Callable[[int, int], Batches],
    **world: Unpack[World],
) -> OracleResult:
    """FedRep: FedPer whose clients train their head under the received body, then the body under that head.

    To predict, a client trains a copy of its head under the newest body, at the learning rate of the next round.

    Args:
        head: the tensors that stay with the client.
        head_batches: ``head_batches(round, client)`` lists what the head is trained on, all its epochs in order.
        deploy_batches: the same for predicting once that round is over.
        world: see :class:`World`; its batches are those of the body.

    Reference: Collins et al., ICML 2021.
    """
    body = _body(world["model"], head)
    world["shared"] = body
    models, shared = start(world)
    result = OracleResult()
    for t in range(world["rounds"]):
        cohort, lr = cohort_of(world, t), lr_of(world, t)
        for i in cohort:
            receive(models[i], shared)
            _train_only(models[i], head, head_batches(t, i), lr, world)
            _train_only(models[i], body, world["batches"](t, i), lr, world)
        shared = average([models[i] for i in cohort], [world["weights"][i] for i in cohort], shared)
        result.shared.append(shared)
        copies = [deepcopy(model) for model in models]
        for i, model in enumerate(copies):
            receive(model, shared)
            _train_only(model, head, deploy_batches(t, i), lr_of(world, min(t + 1, world["rounds"] - 1)), world)
        result.deployed.append([copy_of(model, model.state_dict()) for model in copies])
    return result


def fedbabu(
    head: Sequence[str], tuning: Callable[[int, int], Batches], lr_tuned: float, **world: Unpack[World]
) -> OracleResult:
    """FedBABU: FedAvg of the body, whose head stays as it is; a client fine-tunes all of a copy to predict.

    Args:
        head: the tensors that nobody trains before that.
        tuning: ``tuning(round, client)`` lists the batches of fine-tuning once that round is over.
        lr_tuned: its learning rate.
        world: see :class:`World`.

    Reference: Oh et al., ICLR 2022.
    """
    body = _body(world["model"], head)
    world["shared"] = body
    models, shared = start(world)
    result = OracleResult()
    how = Local(momentum=world.get("momentum", 0.0), weight_decay=world.get("weight_decay", 0.0), loss=loss_of(world))
    if "clip" in world:
        how["clip"] = world["clip"]
    for t in range(world["rounds"]):
        cohort = cohort_of(world, t)
        for i in cohort:
            receive(models[i], shared)
            _train_only(models[i], body, world["batches"](t, i), lr_of(world, t), world)
        shared = average([models[i] for i in cohort], [world["weights"][i] for i in cohort], shared)
        result.shared.append(shared)
        states = deployed(models, shared)
        result.deployed.append(fine_tune(world["model"], states, partial(tuning, t), lr_tuned, **how))
    return result


def _body(model: nn.Module, head: Sequence[str]) -> list[str]:
    return [name for name in everything(model) if name not in head]


def _train_only(model: nn.Module, names: Sequence[str], batches: Batches, lr: float, how: Local) -> None:
    """Train the named tensors of a model in place; the others have no gradient and no step."""
    asked = {name: tensor.requires_grad for name, tensor in model.named_parameters()}
    for name, tensor in trainable(model).items():
        tensor.requires_grad_(name in names)
    local_training(model, batches, lr, lambda m, x, y, _: gradient(m, x, y, loss_of(how)), {}, how)
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(asked[name])
