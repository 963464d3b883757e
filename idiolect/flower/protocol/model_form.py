"""The form of a model: what coordinator and site must have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from idiolect.core.tree import pick
from idiolect.rounds.server_state import ServerState

INITIAL = "initial"
"""Key of the hash of the initial values; models may differ in them."""


def model_form(state: ServerState) -> dict[str, str]:
    """Return dtype and shape of each tensor that may be sent, and a hash of the initial values under `INITIAL`.

    Buffers that training changes are left out: a site finds them by a pass over its examples.
    """
    common, dtype = pick(state.model.initial, state.model.structure.exchangeable), str(state.model.dtype)
    values = common.flat.cpu().view(torch.uint8).numpy().data
    shapes = {name: f"{dtype.removeprefix('torch.')} {tuple(t.shape)}" for name, t in common.items()}
    return {**shapes, INITIAL: hashlib.sha256(values).hexdigest()}


def form_differences(coordinator: Mapping[str, object], site: Mapping[str, object]) -> list[str]:
    """Return a description of each tensor that differs between two forms.

    Example:
        >>> form_differences({"bias": "float32 (6,)"}, {"bias": "float32 (7,)"})
        ['bias is float32 (6,) at the coordinator, float32 (7,) at this site']
    """
    return [
        f"{name} is {coordinator.get(name, 'missing')!s} at the coordinator, {site.get(name, 'missing')!s} at this site"
        for name in {**coordinator, **site}
        if name != INITIAL and site.get(name) != coordinator.get(name)
    ]
