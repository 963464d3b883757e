"""What coordinator and site tell each other beside tensors."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, TypeVar

from flwr.app import ConfigRecord, RecordDict
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from idiolect.core.errors import UsageError
from idiolect.flower.protocol.arrays import WireError

PROTOCOL = 1
"""Grows whenever these words change their meaning."""

T = TypeVar("T", "Brief", "Introduction", "Report")

HELLO, TRAIN, EVALUATE = "query", "train", "evaluate"
"""Kinds of messages, by Flower's names."""


def named(client: str) -> str:
    """Return a client's name, if it can name a folder.

    Raises:
        UsageError: if it cannot.
    """
    if not re.fullmatch(r"\w[\w.-]{,99}", client):
        raise UsageError(f"client {client!r:.80} cannot name a folder: use letters, digits, '_', '-' and '.'")
    return client


Name = Annotated[str, AfterValidator(named)]
Played = Annotated[int, Field(ge=0)]
Examples = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Brief:
    """What the coordinator says with every message."""

    run: str
    """Name of the run, which outlives restarts."""
    method: str
    """An expression, see `idiolect.registry.expression`."""
    training: str
    """Another."""
    seed: int
    round: Played
    """Rounds played."""
    lr: float
    base: Played
    """The round after which the site's result counted last: it starts from its state of then; 0 for none."""
    evaluate: bool
    metrics: list[str]
    protocol: int = PROTOCOL


@dataclass(frozen=True)
class Introduction:
    """What a site says when it is asked who it is."""

    client: Name
    examples: Examples
    versions: list[str]
    differs: str = ""
    """What is different here but harmless, for a person to read."""


@dataclass(frozen=True)
class Report:
    """What a site says of its round."""

    client: Name
    examples: Examples
    steps: float = 0.0
    loss: float = 0.0
    gradients: int = 0
    seconds: float = 0.0
    splits: list[str] = field(default_factory=list)
    """What it has measured on, beside training examples."""
    sizes: list[Examples] = field(default_factory=list)
    """Examples in each."""
    personalized: list[float] = field(default_factory=list)
    """Loss and metrics of each split in turn, under the weights that predict for this client."""
    generalized: list[float] = field(default_factory=list)
    """The same under the shared model, where there is one."""


def say(content: RecordDict, words: Brief | Introduction | Report) -> None:
    """Add words to a message."""
    content["words"] = ConfigRecord(asdict(words))


def hear(content: RecordDict, kind: type[T]) -> T:
    """Return the words of a message.

    Raises:
        WireError: if they are not of this kind, or of another version.

    Example:
        >>> message = RecordDict()
        >>> say(message, Report("ward-a", examples=120))
        >>> hear(message, Report).examples
        120
        >>> hear(message, Introduction)
        Traceback (most recent call last):
        idiolect.flower.protocol.arrays.WireError: no Introduction: versions is missing
    """
    told: dict[str, Any] = dict(content.config_records.get("words", {}))
    names = {f.name for f in fields(kind)}
    if told.get("protocol", PROTOCOL) != PROTOCOL:
        raise WireError(
            f"protocol {told['protocol']!r:.40} there, {PROTOCOL} here: install the same version of idiolect"
        )
    try:
        text = json.dumps({name: value for name, value in told.items() if name in names}, default=repr)
        found: T = _READERS[kind.__name__].validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        problem = "is missing" if first["type"] == "missing" else f"is {first['input']!r:.80}"
        raise WireError(f"no {kind.__name__}: {'.'.join(map(str, first['loc']))} {problem}") from None
    return found


_READERS: dict[str, TypeAdapter[Any]] = {kind.__name__: TypeAdapter(kind) for kind in (Brief, Introduction, Report)}
