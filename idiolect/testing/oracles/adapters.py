"""Textbook loops of methods for low-rank adapters; see :mod:`idiolect.testing.oracles.averaging`."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Unpack

from torch import nn

from idiolect.testing.oracles.averaging import fedavg
from idiolect.testing.oracles.common import OracleResult, State, World, everything


def fedit(**world: Unpack[World]) -> OracleResult:
    """FedIT: FedAvg on all that is trained, both factors among it, and on running statistics.

    Reference: Zhang et al., ICASSP 2024.
    """
    world["shared"] = _moving(world["model"])
    return _without_frozen(fedavg(**world), world["model"])


def ffa_lora(constant: Sequence[str], **world: Unpack[World]) -> OracleResult:
    """FFA-LoRA: FedIT of a model in which one factor has no gradient.

    Args:
        constant: names of that factor in all layers.
        world: see :class:`World`.

    Reference: Sun et al., ICLR 2024.
    """
    model = world["model"] = deepcopy(world["model"])
    for name in constant:
        model.get_parameter(name).requires_grad_(False)
    return fedit(**world)


def fedsa_lora(common: Sequence[str], **world: Unpack[World]) -> OracleResult:
    """FedSA-LoRA: one factor is averaged; each client keeps its own of everything else.

    Args:
        common: names of that factor in all layers.
        world: see :class:`World`.

    Reference: Guo et al., ICLR 2025.
    """
    world["shared"] = common
    return _without_frozen(fedavg(**world), world["model"])


def _moving(model: nn.Module) -> list[str]:
    frozen = {name for name, tensor in model.named_parameters() if not tensor.requires_grad}
    return [name for name in everything(model) if name not in frozen]


def _without_frozen(result: OracleResult, model: nn.Module) -> OracleResult:
    def moving(state: State) -> State:
        return {name: tensor for name, tensor in state.items() if name not in frozen}

    frozen = set(everything(model)) - set(_moving(model))
    result.deployed = [[moving(state) for state in states] for states in result.deployed]
    return result
