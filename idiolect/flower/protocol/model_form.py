"""The form of a model: what coordinator and site must have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from idiolect.core.tree import pick
from idiolect.rounds.server_state import ServerState

INITIAL = "initial"
"""Key of the hash of the initial values; models may differ in them."""

FROZEN = "frozen"
"""Key of the hash of the frozen parameters and of the scaling of adapters, which are never sent and must be equal."""


def model_form(state: ServerState) -> dict[str, str]:
    """Return dtype and shape of each tensor that may be sent, and hashes under `INITIAL` and `FROZEN`.

    Buffers that training changes are left out: a site finds them by a pass over its examples.
    """
    common, dtype = pick(state.model.initial, state.model.structure.exchangeable), str(state.model.dtype)
    shapes = {name: f"{dtype.removeprefix('torch.')} {tuple(t.shape)}" for name, t in common.items()}
    initial, module = hashlib.sha256(_bytes(common.flat)), state.model.training
    scaling = [getattr(layer, "scaling", None) for layer in module.modules()]
    frozen = hashlib.sha256(repr([s for s in scaling if isinstance(s, float | int | dict)]).encode())
    for name, tensor in module.named_parameters():
        if not tensor.requires_grad:
            frozen.update(name.encode())
            frozen.update(_bytes(tensor))
    return {**shapes, INITIAL: initial.hexdigest(), FROZEN: frozen.hexdigest()}


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def form_differences(coordinator: Mapping[str, object], site: Mapping[str, object]) -> list[str]:
    """Return a description of each tensor that differs between two forms.

    Example:
        >>> form_differences({"bias": "float32 (6,)"}, {"bias": "float32 (7,)"})
        ['bias is float32 (6,) at the coordinator, float32 (7,) at this site']
    """
    found = [
        f"{name} is {coordinator.get(name, 'missing')!s} at the coordinator, {site.get(name, 'missing')!s} at this site"
        for name in {**coordinator, **site}
        if name not in (INITIAL, FROZEN) and site.get(name) != coordinator.get(name)
    ]
    if not found and site.get(FROZEN) != coordinator.get(FROZEN):
        return ["their frozen parameters, or the scaling of their adapters, are not equal: load the same base model"]
    return found
