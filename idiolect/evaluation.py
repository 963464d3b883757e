"""All clients measured at once: personalised and generalised, per client and over clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from idiolect.data import ClientData, Examples
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
    names, shared = ["loss", *(m.name for m in metrics)], federation.general() is not None
    personalised: dict[str, Scores] = {}
    generalised: dict[str, Scores] = {}
    found = federation.engine.measure(federation, list(federation.clients), _Numbers(tuple(metrics)))
    for (client, data), numbers in zip(federation.clients.items(), found, strict=True):
        rows = [dict(zip(names, row, strict=True)) for row in _batched(numbers, len(names))]
        splits = _held(data)
        personalised[client] = dict(zip(splits, rows, strict=False))
        if shared:
            generalised[client] = dict(zip(splits, rows[len(splits) :], strict=True))
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


@dataclass(frozen=True)
class _Numbers:
    """Loss and metrics of each split under a client's own weights, then under the shared model's."""

    metrics: tuple[Metric, ...]

    def __call__(self, federation: Federation, client: str, own: Tree) -> list[float]:
        held, general = _held(federation.clients[client]), federation.general()
        personalised = _row(federation, held, own, self.metrics)
        if general is None:
            return personalised
        same = _predict_alike(federation, own, general)
        return personalised + (personalised if same else _row(federation, held, general, self.metrics))


def _row(federation: Federation, held: dict[str, Examples], weights: Tree, metrics: Sequence[Metric]) -> list[float]:
    learner, loss = federation.learner, federation.model.loss
    scores = [evaluate(learner, loss, weights, x, y, metrics) for x, y in held.values()]
    return [number for score in scores for number in score.values()]


def _batched(numbers: list[float], size: int) -> list[list[float]]:
    return [numbers[i : i + size] for i in range(0, len(numbers), size)]


def _held(data: ClientData) -> dict[str, Examples]:
    return {split: examples for split, examples in data.splits().items() if split != "train"}


def _predict_alike(federation: Federation, one: Tree, other: Tree) -> bool:
    anatomy = federation.model.anatomy  # private weights and buffers may count, counters never do
    names = anatomy.names("weight") | anatomy.names("statistic")
    return torch.equal(pick(one, names).flat, pick(other, names).flat)


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
