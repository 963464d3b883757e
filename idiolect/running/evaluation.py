"""All clients measured at once: personalized and generalized, per client and over clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from idiolect.compute.learner import Learner
from idiolect.compute.losses import Loss
from idiolect.compute.metrics import Metric, accuracy, evaluate
from idiolect.core.tree import Tree, overlay, pick
from idiolect.data import ClientData, Examples, LazyExamples
from idiolect.engines.federation import Federation
from idiolect.report import summarize
from idiolect.rounds.client import Deployed, Worker
from idiolect.rounds.server_state import general
from idiolect.running.validate import is_cross_entropy

Scores = dict[str, dict[str, float]]
"""Split to metric to number, of one client."""


def default_metrics(loss: Loss) -> tuple[Metric, ...]:
    """Return the metrics if the user chose none: accuracy for cross-entropy, and none for other losses.

    Example:
        >>> [metric.name for metric in default_metrics(torch.nn.functional.cross_entropy)]
        ['accuracy']
        >>> default_metrics(torch.nn.functional.mse_loss)
        ()
    """
    return (accuracy,) if is_cross_entropy(loss) else ()


def evaluate_all(federation: Federation, metrics: Sequence[Metric]) -> dict[str, Any]:
    """Measure every client under the weights it would use now and, where there is one, the shared model.

    Returns:
        The keys ``personalized``, ``generalized`` (None where no complete shared model exists) and ``clients`` of
        a round's record; also ``transductive``, the parts that read the unlabeled inputs, where there are any.
    """
    names, shared = ["loss", *(m.name for m in metrics)], federation.general() is not None
    found = federation.engine.measure(federation, list(federation.clients), _Numbers(tuple(metrics)))
    measured: dict[str, Measured] = {}
    for (client, data), numbers in zip(federation.clients.items(), found, strict=True):
        sizes = {split: len(examples) for split, examples in held(data).items()}
        own_count = len(sizes) * len(names)
        measured[client] = Measured(sizes, numbers[:own_count], numbers[own_count:] if shared else [])
    read = list(federation.method.transductive)
    return over_clients(measured, metrics) | ({"transductive": read} if read else {})


class Measured(NamedTuple):
    """Measurements of one client."""

    sizes: Mapping[str, int]
    """Split to its number of examples."""
    personalized: Sequence[float]
    """Loss and metrics of each split in turn, under the weights that predict for the client."""
    generalized: Sequence[float]
    """The same under the shared model; empty where there is none."""


def measure(
    worker: Worker, data: ClientData, own: Deployed, shared: Tree, metrics: Sequence[Metric]
) -> tuple[list[float], list[float]]:
    """Return loss and metrics of each split of one client, under its own weights and under the shared model's."""
    learner, loss = worker.learner, worker.model.loss

    def row(weights: Deployed) -> list[float]:
        found: list[float] = []
        for examples in held(data).values():
            chunk, here = None, weights.weights
            if weights.adapt:  # the weights depend on all inputs of the split
                chunk, here = len(examples), weights.at(next(examples.chunks(len(examples)))[0])
            found += evaluate(learner, loss, here, examples, metrics, chunk).values()
        return found

    personalized, shared_model = row(own), general(worker.model, shared)
    if shared_model is None:
        return personalized, []
    shared_model = overlay(shared_model, pick(own.weights, learner.structure.own_state))
    if not own.adapt and _equal(learner, own.weights, shared_model):  # then the numbers are the same
        return personalized, personalized
    return personalized, row(Deployed(shared_model))


def held(data: ClientData) -> dict[str, Examples | LazyExamples]:
    """Return the splits that are measured."""
    return {split: examples for split, examples in data.splits().items() if split != "train"}


def over_clients(measured: Mapping[str, Measured], metrics: Sequence[Metric]) -> dict[str, Any]:
    """Return the evaluation in a round's record: a summary over clients, and the scores of each client."""
    names = ["loss", *(m.name for m in metrics)]
    personalized = {c: _scores(m.sizes, m.personalized, names) for c, m in measured.items()}
    shared = any(m.generalized for m in measured.values())
    generalized = {c: _scores(m.sizes, m.generalized, names) for c, m in measured.items() if shared}
    sizes = {client: m.sizes for client, m in measured.items()}
    return {
        "personalized": _summaries(personalized, sizes, metrics),
        "generalized": _summaries(generalized, sizes, metrics) if generalized else None,
        "clients": {
            client: {
                "personalized": scores.get("test"),
                "generalized": generalized[client].get("test") if generalized else None,
            }
            for client, scores in personalized.items()
        },
    }


@dataclass(frozen=True)
class _Numbers:
    """Loss and metrics of each split under a client's own weights, then under the shared model's."""

    metrics: tuple[Metric, ...]

    def __call__(self, worker: Worker, data: ClientData, own: Deployed, shared: Tree) -> list[float]:
        personalized, generalized = measure(worker, data, own, shared, self.metrics)
        return personalized + generalized


def _scores(sizes: Mapping[str, int], numbers: Sequence[float], names: Sequence[str]) -> Scores:
    """Return the numbers of a client, which are in the order of splits and then of metrics, by their names."""
    rows = zip(*[iter(numbers)] * len(names), strict=True)
    return {split: dict(zip(names, row, strict=True)) for split, row in zip(sizes, rows, strict=True)}


def _equal(learner: Learner, one: Tree, other: Tree) -> bool:
    """Return whether all weights and buffers except counters are equal."""
    names = frozenset(one) - learner.structure.names("counter")
    return torch.equal(pick(one, names).flat, pick(other, names).flat)


def _summaries(
    scores: Mapping[str, Scores], sizes: Mapping[str, Mapping[str, int]], metrics: Sequence[Metric]
) -> dict[str, dict[str, dict[str, float]]]:
    better = {m.name: m.higher_is_better for m in metrics} | {"loss": False}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for split in ("val", "test"):
        here = {c: s[split] for c, s in scores.items() if split in s}
        if here or split == "test":
            counts = {c: sizes[c][split] for c in here}
            found[split] = {n: summarize({c: s[n] for c, s in here.items()}, counts, up) for n, up in better.items()}
    return found
