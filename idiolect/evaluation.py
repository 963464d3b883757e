"""All clients measured at once: personalised and generalised, per client and over clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from idiolect.data import ClientData
from idiolect.engine.evaluate import Metric, evaluate
from idiolect.engine.federation import Federation
from idiolect.report import summarise
from idiolect.tree import Tree, pick

Scores = dict[str, dict[str, float]]
"""Split to metric to number, of one client."""


def evaluate_all(federation: Federation, metrics: Sequence[Metric]) -> dict[str, Any]:
    """Measure every client under the weights it would use now and, where there is one, the shared model.

    Returns:
        The keys ``personalised``, ``generalised`` (None where no complete shared model exists) and ``clients`` of
        a round's record.
    """
    general = federation.general()
    personalised: dict[str, Scores] = {}
    generalised: dict[str, Scores] = {}
    for client, data in federation.clients.items():
        own = federation.personal(client)
        personalised[client] = _scores(federation, data, own, metrics)
        if general is not None:
            same = _predict_alike(federation, own, general)
            generalised[client] = personalised[client] if same else _scores(federation, data, general, metrics)
    return {
        "personalised": _over_clients(federation, personalised, metrics),
        "generalised": _over_clients(federation, generalised, metrics) if generalised else None,
        "clients": {
            client: {
                "personalised": scores.get("test"),
                "generalised": generalised[client].get("test") if generalised else None,
            }
            for client, scores in personalised.items()
        },
    }


def _predict_alike(federation: Federation, one: Tree, other: Tree) -> bool:
    names = federation.model.anatomy.exchangeable
    return torch.equal(pick(one, names).flat, pick(other, names).flat)


def _scores(federation: Federation, data: ClientData, weights: Tree, metrics: Sequence[Metric]) -> Scores:
    held = {split: examples for split, examples in data.splits().items() if split != "train"}
    return {s: evaluate(federation.model, weights, x, y, metrics) for s, (x, y) in held.items()}


def _over_clients(
    federation: Federation, scores: dict[str, Scores], metrics: Sequence[Metric]
) -> dict[str, dict[str, dict[str, float]]]:
    better = {m.name: m.higher_is_better for m in metrics} | {"loss": False}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for split in ("val", "test"):
        held = {c: s[split] for c, s in scores.items() if split in s}
        if held or split == "test":
            sizes = {c: len(federation.clients[c].splits()[split].y) for c in held}
            found[split] = {
                name: summarise({c: s[name] for c, s in held.items()}, sizes, up) for name, up in better.items()
            }
    return found
