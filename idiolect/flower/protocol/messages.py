"""The fields of messages between coordinator and site, beside tensors."""

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
"""Version of the protocol; it increases whenever the meaning of a field changes."""

REGISTER, TRAIN, EVALUATE = "query", "train", "evaluate"
"""Kinds of messages, under Flower's names."""

FIELDS, REFUSED = "fields", "refused"
"""Records of a message: its fields; or, in place of them, the reason why a site refuses, and its client name."""

T = TypeVar("T", "Instruction", "Registration", "Report")


def client_name(text: str) -> str:
    """Return a client name, which is also the name of a folder at the site.

    Raises:
        UsageError: if the name is not valid.
    """
    if not re.fullmatch(r"\w[\w.-]{,99}", text):
        raise UsageError(f"invalid client name {text!r:.80}: use letters, digits, '_', '-' and '.'")
    return text


ClientName = Annotated[str, AfterValidator(client_name)]
RoundCount = Annotated[int, Field(ge=0)]
ExampleCount = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Instruction:
    """The fields of every message from the coordinator."""

    run: str
    """Name of the run; it stays the same after a restart."""
    method: str
    """The method as an expression, see `idiolect.registry.expression`."""
    training: str
    """The local training as an expression."""
    seed: int
    round: RoundCount
    """Completed rounds."""
    lr: float
    base_round: RoundCount
    """The last round in which this client's result counted; the site starts from its state after it. 0: none."""
    evaluate: bool
    metrics: list[str]
    protocol: int = PROTOCOL


@dataclass(frozen=True)
class Registration:
    """The reply of a site that is asked which client it is."""

    client: ClientName
    examples: ExampleCount
    versions: list[str]
    warning: str = ""
    """A harmless difference from the coordinator, in words."""


@dataclass(frozen=True)
class Report:
    """The reply of a site that has trained or evaluated."""

    client: ClientName
    examples: ExampleCount
    steps: float = 0.0
    loss: float = 0.0
    gradients: int = 0
    seconds: float = 0.0
    splits: list[str] = field(default_factory=list)
    """Evaluated splits, without the training split."""
    sizes: list[ExampleCount] = field(default_factory=list)
    """Number of examples of each split."""
    personalized: list[float] = field(default_factory=list)
    """Loss and metrics of each split in turn, with the client's personal model."""
    generalized: list[float] = field(default_factory=list)
    """The same with the shared model, where there is one."""


def write_message(content: RecordDict, message: Instruction | Registration | Report) -> None:
    """Add the fields of a message."""
    content[FIELDS] = ConfigRecord(asdict(message))


def read_message(content: RecordDict, kind: type[T]) -> T:
    """Return the fields of a message.

    Raises:
        WireError: if fields are missing or invalid, or the protocol version differs.

    Example:
        >>> content = RecordDict()
        >>> write_message(content, Report("ward-a", examples=120))
        >>> read_message(content, Report).examples
        120
        >>> read_message(content, Registration)
        Traceback (most recent call last):
        idiolect.flower.protocol.arrays.WireError: invalid Registration: versions is missing
    """
    found: dict[str, Any] = dict(content.config_records.get(FIELDS, {}))
    names = {f.name for f in fields(kind)}
    if found.get("protocol", PROTOCOL) != PROTOCOL:
        raise WireError(
            f"protocol version {found['protocol']!r:.40} received, {PROTOCOL} expected: "
            "install the same version of idiolect everywhere"
        )
    try:
        text = json.dumps({name: value for name, value in found.items() if name in names}, default=repr)
        message: T = _READERS[kind.__name__].validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        problem = "is missing" if first["type"] == "missing" else f"is {first['input']!r:.80}"
        raise WireError(f"invalid {kind.__name__}: {'.'.join(map(str, first['loc']))} {problem}") from None
    return message


_READERS: dict[str, TypeAdapter[Any]] = {
    kind.__name__: TypeAdapter(kind) for kind in (Instruction, Registration, Report)
}
