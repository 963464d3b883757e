"""Check the results of sites before they are used."""

from __future__ import annotations

from math import isfinite
from typing import NamedTuple

from flwr.app import RecordDict

from idiolect.core.types import Trees
from idiolect.flower.protocol.arrays import WireError, read_trees
from idiolect.flower.protocol.messages import Report, read_message
from idiolect.rounds.client import not_finite


class Result(NamedTuple):
    """The result of a client, checked."""

    report: Report
    uploads: Trees


class Expected(NamedTuple):
    """The content that the result of a client must have."""

    uploads: Trees
    """Trees with the layouts of the uploads; empty if the client was not asked to train."""
    evaluate: bool
    """True if the client was asked to evaluate."""
    metrics: int
    """Number of metrics beside the loss."""
    shared_model: bool
    """True if the method has a complete shared model, which is evaluated too."""


def read_result(content: RecordDict, client: str, examples: int, expected: Expected) -> Result:
    """Return the result in a reply.

    Args:
        content: the reply.
        client: name of the client that was asked.
        examples: number of training examples with which it registered.
        expected: the required content.

    Raises:
        WireError: if the result cannot be used.
    """
    report = read_message(content, Report)
    uploads = read_trees(content, "upload", expected.uploads)
    if report.client != client:
        raise WireError(f"the result is from client {report.client!r:.80}: join again")
    if report.examples != examples:
        raise WireError(f"the site has {report.examples} examples but registered with {examples}: join again")
    if expected.uploads and not (report.steps >= 1 and all(map(isfinite, (report.steps, report.loss)))):
        raise WireError(f"invalid result: loss {report.loss} after {report.steps} steps")
    splits = [split for split in ("val", "test") if expected.evaluate and split in report.splits]
    values = len(splits) * (1 + expected.metrics)
    lengths = len(report.sizes), len(report.personalized), len(report.generalized)
    if report.splits != splits or lengths != (len(splits), values, values if expected.shared_model else 0):
        raise WireError("the evaluation does not match the request")
    if flaw := not_finite("upload", uploads):
        raise WireError(flaw)
    return Result(report, uploads)
