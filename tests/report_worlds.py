"""Synthetic records of runs, in the shape the run engine writes."""

from __future__ import annotations

import random

from idiolect.report import RunSummary, summarise


def make_records(
    final=0.9,
    clients=5,
    rounds=4,
    seed=0,
    generalised=True,
    val=True,
    every=1,
    participation=1.0,
    sensitivity=(),
    metric="accuracy",
    bytes_per_client=5_000_000,
    prefix="c",
    higher_is_better=True,
):
    """Return rounds 1..rounds of a run whose clients approach `final`, each from its own level."""
    rng = random.Random(f"{seed} {final}")
    names = [f"{prefix}{i}" for i in range(clients)]
    sizes = {c: rng.randint(20, 200) for c in names}
    level = {c: min(0.06, 0.5 * (1 - final)) * rng.gauss(0, 1) for c in names}
    return [
        _record(
            t, rng, names, sizes, level, final, rounds, generalised, val, t % every == 0 or t == rounds,
            participation, sensitivity, metric, bytes_per_client, higher_is_better,
        )
        for t in range(1, rounds + 1)
    ]  # fmt: skip


def _record(
    t, rng, names, sizes, level, final, rounds, generalised, val, evaluate,
    participation, sensitivity, metric, size, up,
):  # fmt: skip
    cohort = sorted(rng.sample(names, max(1, round(participation * len(names)))))
    away = 0.8 * 0.5 ** (8 * t / rounds)
    reached = final * (1 - away) if up else final + away
    own = {c: max(0.0, min(1.0, reached + level[c] + rng.gauss(0, 0.01))) for c in names}
    shared = {c: max(0.0, v - 0.1 + rng.gauss(0, 0.02)) for c, v in own.items()}
    record = {
        "round": t, "cohort": cohort, "lr": 0.1, "seconds": 0.5 + rng.random(), "train_loss": 2.3 * 0.8**t,
        "bytes_up": size * len(cohort), "bytes_down": 2 * size * len(cohort),
    }  # fmt: skip
    if evaluate:
        noisy = {c: v + rng.gauss(0, 0.005) for c, v in own.items()}
        record["personalised"] = {
            "test": {metric: summarise(own, sizes, up)},
            "val": {metric: summarise(noisy, sizes, up)} if val else None,
        }
        record["generalised"] = {"test": {metric: summarise(shared, sizes, up)}} if generalised else None
        record["clients"] = {
            c: {"personalised": {metric: own[c]}, "generalised": {metric: shared[c]} if generalised else None}
            for c in names
        }
    if sensitivity:
        record["inspect"] = {}
        for c in cohort:
            values = {
                layer: 10 ** (rng.gauss(-3, 0.4) + k / len(sensitivity))
                for k, layer in enumerate(sensitivity)
            }
            record["inspect"][c] = {
                "sensitivity": values,
                "sensitive_layers": sorted(values, key=values.get, reverse=True)[:2],
            }
    return record


def make_run(label="FedAvg", seed=0, **options):
    """Return a RunSummary over `make_records`."""
    metric, up = options.get("metric", "accuracy"), options.get("higher_is_better", True)
    return RunSummary(label, seed, make_records(seed=seed, **options), metric, up)
