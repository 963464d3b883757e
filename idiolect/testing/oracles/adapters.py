"""Textbook loops of methods for low-rank adapters; see :mod:`idiolect.testing.oracles.averaging`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.func import functional_call

from idiolect.testing.oracles.averaging import fedavg
from idiolect.testing.oracles.common import (
    OracleResult,
    State,
    World,
    average,
    cohort_of,
    deployed,
    everything,
    gradient,
    loss_of,
    lr_of,
    norm,
    receive,
    start,
    trainable,
)


@dataclass
class Mixed(OracleResult):
    """What a method left behind that predicts each input with weights of its own.

    Attributes:
        outputs: per client, the predictions for its inputs.
    """

    outputs: list[list[Tensor]] = field(default_factory=list)


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


def feddpa(
    share: float,
    largest: float,
    last: str,
    references: Callable[[int, int], Tensor],
    inputs: Sequence[Tensor],
    **world: Unpack[World],
) -> Mixed:
    """FedDPA: FedIT, and for each client an adapter of its own, trained beside the received one, mixed by input.

    Adapters are added to the weights of their layers. An input is predicted alone.

    Args:
        share: share of the own adapter while it trains.
        largest: largest share of the own adapter in predictions.
        last: the layer whose inputs are compared.
        references: ``references(round, client)`` are the examples that inputs are compared with.
        inputs: what each client predicts after each round.
        world: see :class:`World`.

    Reference: Yang et al., NeurIPS 2024.
    """
    world["shared"] = _moving(world["model"])
    models, shared = start(world)
    own = [_own_adapter(model) for model in models]
    like: list[Tensor] = [torch.empty(0)] * len(models)
    result = Mixed()
    for t in range(world["rounds"]):
        cohort = cohort_of(world, t)
        for i in cohort:
            receive(models[i], shared)
            _train_both(models[i], own[i], share, t, i, world)
            like[i] = torch.cat([_features(models[i], own[i], last, x[None]) for x in references(t, i)])
        shared = average([models[i] for i in cohort], [world["weights"][i] for i in cohort], shared)
        result.shared.append(shared)
        for state, factors in zip(states := deployed(models, shared), own, strict=True):
            state.update({name: tensor.detach().clone() for name, tensor in factors.items()})
        result.deployed.append(states)
        outputs = []
        for i, model in enumerate(deepcopy(models)):
            receive(model, shared)
            outputs.append(torch.cat([_mixed(model, own[i], last, largest, like[i], x[None]) for x in inputs[i]]))
        result.outputs.append(outputs)
    _without_frozen(result, world["model"])
    return result


def _own_adapter(model: nn.Module) -> State:
    """The shared A and a B of zeros, for each layer with an adapter."""
    factors: State = {}
    for path in _layers(model):
        down, up = (model.get_parameter(f"{path}.lora_{x}.default.weight").detach().clone() for x in "AB")
        factors |= {f"{path}.down": down.requires_grad_(), f"{path}.up": torch.zeros_like(up).requires_grad_()}
    return factors


def _layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A")]


def _with_both(model: nn.Module, own: State, share: float) -> State:
    """The tensors of a model whose layers have both adapters, in these shares, in their weights."""
    state: State = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for path in _layers(model):
        layer: Any = model.get_submodule(path)
        down, up = state[f"{path}.lora_A.default.weight"].detach(), state[f"{path}.lora_B.default.weight"].detach()
        pairs = ((1 - share, down, up), (share, own[f"{path}.down"], own[f"{path}.up"]))
        weight = state[f"{path}.base_layer.weight"]
        for part, first, second in pairs:
            product = second.flatten(1) @ first.flatten(1)
            weight = weight + part * layer.scaling["default"] * product.view(weight.shape)
        state |= {f"{path}.base_layer.weight": weight, f"{path}.lora_B.default.weight": torch.zeros_like(up)}
    return state


def _train_both(model: nn.Module, own: State, share: float, t: int, i: int, world: World) -> None:
    """Train the model, and in the same steps the own adapter beside the model as it was received."""
    loss, received = loss_of(world), deepcopy(model).train()
    tensors = {**trainable(model), **own}
    momentum, decay = world.get("momentum", 0.0), world.get("weight_decay", 0.0)
    optimizer = torch.optim.SGD(tensors.values(), lr=lr_of(world, t), momentum=momentum, weight_decay=decay)
    model.train()
    for x, y in world["batches"](t, i):
        step = gradient(model, x, y, loss)
        value = loss(functional_call(received, _with_both(received, own, share), (x,)), y)
        step |= dict(zip(own, torch.autograd.grad(value, list(own.values())), strict=True))
        scale = min(1.0, world["clip"] / (float(norm(step.values())) + 1e-6)) if "clip" in world else 1.0
        for name, tensor in tensors.items():
            tensor.grad = scale * step[name]
        optimizer.step()


def _features(model: nn.Module, own: State, last: str, x: Tensor) -> Tensor:
    """What the last layer is given under the own adapter alone."""
    seen: list[Tensor] = []
    twin = deepcopy(model).eval()
    twin.get_submodule(last).register_forward_pre_hook(lambda layer, given: seen.append(given[0].detach()))
    with torch.no_grad():
        functional_call(twin, _with_both(twin, own, 1.0), (x,))
    return seen[0]


def _mixed(model: nn.Module, own: State, last: str, largest: float, like: Tensor, x: Tensor) -> Tensor:
    """The prediction for one input."""
    share = 0.0
    if len(like):
        here = _features(model, own, last, x)
        share = largest * max(0.0, float(torch.cosine_similarity(here, like, dim=1).mean()))
    with torch.no_grad():
        outputs: Tensor = functional_call(model.eval(), _with_both(model, own, share), (x,))
    return outputs


def _moving(model: nn.Module) -> list[str]:
    frozen = {name for name, tensor in model.named_parameters() if not tensor.requires_grad}
    return [name for name in everything(model) if name not in frozen]


def _without_frozen(result: OracleResult, model: nn.Module) -> OracleResult:
    def moving(state: State) -> State:
        return {name: tensor for name, tensor in state.items() if name not in frozen}

    frozen = set(everything(model)) - set(_moving(model))
    result.deployed = [[moving(state) for state in states] for states in result.deployed]
    return result
