"""Numbers over clients and over rounds: summaries, which round to quote, rounds to a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from idiolect.core.errors import UsageError, did_you_mean

Record = Mapping[str, Any]
"""What one round left behind, as `RunDirectory.append` writes it."""

STATISTICS = ("mean", "by_samples", "std", "worst_decile", "min", "max")


def summarize(
    values: Mapping[str, float | None], sizes: Mapping[str, int], higher_is_better: bool = True
) -> dict[str, float]:
    r"""Summarize one metric over clients, counting clients (uniform) and counting test examples.

    .. math::  \text{mean} = \frac1N \sum_i a_i, \qquad \text{by\_samples} = \frac{\sum_i n_i a_i}{\sum_i n_i}

    Args:
        values: client -> its metric; None or NaN (no test examples) leaves the client out.
        sizes: client -> number of its test examples, for every client of `values` that is not left out.
        higher_is_better: False for losses and errors, whose worst decile is the largest values.

    Returns:
        mean, by_samples, std (population: divided by N), worst_decile (mean of the worst ceil(N / 10)
        clients), min and max; all NaN when no client is left.

    Raises:
        UsageError: if a counted client has no size.

    Example:
        >>> s = summarize({"a": 1.0, "b": 0.5, "c": None}, {"a": 30, "b": 10})
        >>> s["mean"], s["by_samples"], s["std"], s["worst_decile"]
        (0.75, 0.875, 0.25, 0.5)

    Reference: Li et al., Fair Resource Allocation in Federated Learning, ICLR 2020 (worst 10 % of clients).
    """
    kept = {c: float(v) for c, v in values.items() if v is not None and not math.isnan(v)}
    if not kept:
        return dict.fromkeys(STATISTICS, math.nan)
    missing = [c for c in kept if c not in sizes]
    if missing:
        raise UsageError(f"client {missing[0]!r} has a value but no number of test examples: add it to sizes")
    ranked = np.sort(np.array(list(kept.values())))
    worst = ranked if higher_is_better else ranked[::-1]
    examples = np.array([sizes[c] for c in kept], dtype=np.float64)
    with np.errstate(all="ignore"):  # a diverged client's loss may be infinite
        summary = {
            "mean": ranked.mean(),
            "by_samples": examples @ np.array(list(kept.values())) / examples.sum(),
            "std": ranked.std(),
            "worst_decile": worst[: -(-len(ranked) // 10)].mean(),
            "min": ranked[0],
            "max": ranked[-1],
        }
    return {name: float(summary[name]) for name in STATISTICS}


@dataclass(frozen=True)
class Choice:
    """One evaluated round: summaries over clients of one metric, as `summarize` returns them.

    Attributes:
        round: its number.
        personalized: test summary under the weights each client deploys.
        generalized: test summary under the shared weights; None where there is no complete shared model.
        val: validation summary of the personalized weights; None without validation data.
    """

    round: int
    personalized: dict[str, float]
    generalized: dict[str, float] | None
    val: dict[str, float] | None


@dataclass(frozen=True)
class Selection:
    """Three ways to quote a run; all report test values, they differ in how the round was chosen.

    Attributes:
        last: the last evaluated round; None when no round was evaluated.
        best_by_val: the round with the best mean validation metric; None without validation data.
        best_on_test: the round with the best mean test metric. Optimistic: chosen by what it reports.
    """

    last: Choice | None
    best_by_val: Choice | None
    best_on_test: Choice | None


def select(records: Sequence[Record], metric: str, higher_is_better: bool = True) -> Selection:
    """Choose the rounds to quote: last, best by validation, best on test. The earliest wins a tie.

    Args:
        records: the rounds of one run, in order.
        metric: "accuracy", "loss", ...
        higher_is_better: False for losses and errors.

    Raises:
        UsageError: if rounds were evaluated, but never with this metric.

    Example:
        >>> def record(round, test, val):
        ...     view = {"test": {"accuracy": {"mean": test}}, "val": {"accuracy": {"mean": val}}}
        ...     return {"round": round, "personalized": view, "generalized": None}
        >>> s = select([record(1, 0.5, 0.4), record(2, 0.9, 0.5), record(3, 0.8, 0.6)], "accuracy")
        >>> s.last.round, s.best_by_val.round, s.best_on_test.round
        (3, 3, 2)
    """
    rounds = evaluated(records, metric)
    return Selection(
        last=rounds[-1] if rounds else None,
        best_by_val=_best(rounds, lambda choice: choice.val, higher_is_better),
        best_on_test=_best(rounds, lambda choice: choice.personalized, higher_is_better),
    )


def _best(
    rounds: Sequence[Choice], by: Callable[[Choice], dict[str, float] | None], higher_is_better: bool
) -> Choice | None:
    scored = [(s["mean"], choice) for choice in rounds if (s := by(choice)) and not math.isnan(s["mean"])]
    best = max if higher_is_better else min
    return best(scored, key=lambda pair: pair[0])[1] if scored else None


def rounds_to(records: Sequence[Record], metric: str, target: float, higher_is_better: bool = True) -> int | None:
    """Return the first evaluated round whose mean personalized test metric reaches the target, else None.

    Example:
        >>> def record(round, test):
        ...     return {"round": round, "personalized": {"test": {"accuracy": {"mean": test}}}}
        >>> rounds_to([record(1, 0.5), record(2, 0.9)], "accuracy", target=0.8)
        2
        >>> rounds_to([record(1, 0.5)], "accuracy", target=0.8) is None
        True
    """
    sign = 1.0 if higher_is_better else -1.0
    reached = (c.round for c in evaluated(records, metric) if sign * c.personalized["mean"] >= sign * target)
    return next(reached, None)


def evaluated(records: Sequence[Record], metric: str) -> list[Choice]:
    """Return the evaluated rounds of a run, in order; a null in the file becomes NaN here.

    Raises:
        UsageError: if rounds were evaluated, but never with this metric.

    Example:
        >>> evaluated([{"round": 1}], "accuracy")   # this round was not evaluated
        []
    """
    tested = [r for r in records if (r.get("personalized") or {}).get("test")]
    known = sorted({m for r in tested for m in r["personalized"]["test"]})
    if tested and metric not in known:
        hint = did_you_mean(metric, known)
        raise UsageError(f"no round was evaluated with {metric!r}{hint}: this run has {', '.join(known)}")
    return [
        Choice(
            round=int(record["round"]),
            personalized=personalized,
            generalized=_summary(record, "generalized", "test", metric),
            val=_summary(record, "personalized", "val", metric),
        )
        for record in tested
        if (personalized := _summary(record, "personalized", "test", metric)) is not None
    ]


def _summary(record: Record, view: str, split: str, metric: str) -> dict[str, float] | None:
    """Return one summary of a record with NaN for null, or None where it is absent."""
    summary = ((record.get(view) or {}).get(split) or {}).get(metric)
    return summary and {s: math.nan if v is None else float(v) for s, v in summary.items()}
