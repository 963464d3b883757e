"""Synthetic records of runs, in the shape the run engine writes."""

from __future__ import annotations

import random
from dataclasses import dataclass

from idiolect.report import RunSummary, summarize


@dataclass(frozen=True)
class World:
    """A run whose clients approach `final` over the rounds 1..rounds, each at its own distance from it."""

    final: float = 0.9
    clients: int = 5
    rounds: int = 4
    seed: int = 0
    generalized: bool = True
    val: bool = True
    every: int = 1
    participation: float = 1.0
    sensitivity: tuple[str, ...] = ()
    metric: str = "accuracy"
    higher_is_better: bool = True
    bytes_up: int = 5_000_000
    prefix: str = "c"

    def records(self):
        rng = random.Random(f"{self.seed} {self.final}")
        names = [f"{self.prefix}{i}" for i in range(self.clients)]
        sizes = {c: rng.randint(20, 200) for c in names}
        spread = min(0.06, 0.5 * (1 - self.final))
        level = {c: spread * rng.gauss(0, 1) for c in names}
        return [self._record(t, rng, sizes, level) for t in range(1, self.rounds + 1)]

    def _record(self, t, rng, sizes, level):
        cohort = sorted(rng.sample(list(sizes), max(1, round(self.participation * len(sizes)))))
        record = {
            "round": t,
            "cohort": cohort,
            "lr": 0.1,
            "seconds": 0.5 + rng.random(),
            "train_loss": 2.3 * 0.8**t,
            "bytes_up": self.bytes_up * len(cohort),
            "bytes_down": 2 * self.bytes_up * len(cohort),
            "gradients": 9 * len(cohort),
        }
        if t % self.every == 0 or t == self.rounds:
            record |= self._evaluation(t, rng, sizes, level)
        if self.sensitivity:
            record["inspect"] = {c: self._inspection(rng) for c in cohort}
        return record

    def _evaluation(self, t, rng, sizes, level):
        away = 0.8 * 0.5 ** (8 * t / self.rounds)
        reached = self.final * (1 - away) if self.higher_is_better else self.final + away
        own = {c: max(0.0, min(1.0, reached + v + rng.gauss(0, 0.01))) for c, v in level.items()}
        val = {c: v + rng.gauss(0, 0.005) for c, v in own.items()}
        shared = {c: max(0.0, v - 0.1 + rng.gauss(0, 0.02)) for c, v in own.items()}
        metric = self.metric

        def over_clients(values):
            return {metric: summarize(values, sizes, self.higher_is_better)}

        return {
            "personalized": {"test": over_clients(own), "val": over_clients(val) if self.val else None},
            "generalized": {"test": over_clients(shared)} if self.generalized else None,
            "clients": {
                c: {
                    "personalized": {metric: own[c]},
                    "generalized": {metric: shared[c]} if self.generalized else None,
                }
                for c in own
            },
        }

    def _inspection(self, rng):
        layers = self.sensitivity
        values = {layer: 10 ** (rng.gauss(-3, 0.4) + k / len(layers)) for k, layer in enumerate(layers)}
        return {"sensitivity": values, "chosen": {n: float(n in sorted(values, key=values.get)[-2:]) for n in values}}


def make_run(label="FedAvg", seed=0, **world):
    """Return the RunSummary of a World."""
    world = World(seed=seed, **world)
    return RunSummary(label, seed, world.records(), world.metric, world.higher_is_better)


def plain_record(round=1, test=0.9, val=None, generalized=None, clients=None, cohort=("a", "b"), **more):
    """Return a record with a hand-typed mean, whose other statistics follow from it by fixed offsets."""

    def view(mean):
        summary = {"mean": mean, "by_samples": mean, "std": 0.1, "worst_decile": mean and mean - 0.2}
        return {"accuracy": summary | {"min": mean and mean - 0.3, "max": mean}}

    return {
        "round": round,
        "cohort": list(cohort),
        "lr": 0.1,
        "seconds": 2.0,
        "train_loss": 1.5,
        "bytes_up": 600,
        "bytes_down": 800,
        "gradients": 30,
        "personalized": {"test": view(test), "val": None if val is None else view(val)},
        "generalized": None if generalized is None else {"test": view(generalized)},
        "clients": {c: {"personalized": {"accuracy": v}, "generalized": None} for c, v in (clients or {}).items()},
    } | more
