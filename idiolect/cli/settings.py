"""An experiment as plain settings, the same in a file, on the command line and in Python.

PyTorch is not loaded here: help and refusals come at once.
"""

from __future__ import annotations

import argparse
import json
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from idiolect.core.errors import UsageError, did_you_mean
from idiolect.core.values import wanted

GROUPS = {
    "data": ("data", "data_dir", "label", "client", "unit"),
    "clients": ("split", "clients", "shift", "deal", "test", "val", "size"),
    "method and model": ("method", "model"),
    "training": (
        *("rounds", "participation", "seed", "lr", "local_epochs", "batch_size"),
        *("optimizer", "schedule", "clip", "evaluate_every"),
    ),
    "machine": ("engine", "device", "precision"),
    "results": ("directory", "resume"),
}
"""Settings, grouped as in the help."""

METHODS = ("local", "fedavg", "fedavg_ft", "fedbn", "fedfsa")
"""Methods that `compare` trains by default."""


class Experiment(BaseModel):
    """The settings of one run; the defaults work as they are.

    Example:
        >>> Experiment(method="fedfsa(rho_larger=0.9)", rounds=5).data
        'digits'
        >>> check({"local_epoch": 5})
        Traceback (most recent call last):
        idiolect.UsageError: unknown key local_epoch (did you mean local_epochs?)
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    data: str = Field("digits", description="a named set (see `idiolect data`), hf:NAME, or a .csv, .parquet or .npz")
    data_dir: Path | None = Field(None, description="folder of the named sets, else $IDIOLECT_DATA")
    label: str | None = Field(None, description="label column of your own table, else 'label', in an .npz 'y'")
    client: str | None = Field(None, description="client column of your own table, else 'client' if there is one")
    unit: str | None = Field(
        None,
        description="column of your own table of what is not divided between training and test, such as a patient, "
        "for deal = by_group()",
    )
    split: str | None = Field(
        None,
        description="how examples are divided among clients, such as dirichlet(0.5); else by the data's own clients, "
        "else dirichlet(0.5)",
    )
    clients: int = Field(20, description="number of clients, where the split does not decide it")
    shift: str | None = Field(None, description="how clients' data differ, such as rotation(45) + contrast(0.5)")
    deal: str = Field(
        "shuffled()",
        description="which of a client's examples are for the test: shuffled(), time_blocks(gap=10) in the order of "
        "rows, or by_group()",
    )
    test: float | Literal["official"] | None = Field(
        None,
        description="share of each client's examples for testing, or official; else official where the data has a "
        "test set and the deal is shuffled(), else 0.25",
    )
    val: float = Field(0.0, description="share of each client's examples for validation")
    size: int | None = Field(None, description="largest number of training examples per client")
    method: str = Field("fedbn", description="see `idiolect methods`; parts are added with +")
    model: str | None = Field(
        None, description="small_cnn, mlp, ... or your own module:function; else what suits the data"
    )
    rounds: int = Field(30, description="number of rounds")
    participation: float = Field(1.0, description="share of the clients that train in a round")
    seed: int = Field(0, description="decides split, shift, initial weights, cohorts and the order of examples")
    lr: float = Field(0.05, description="learning rate")
    local_epochs: int = Field(1, description="passes over a client's examples in a round")
    batch_size: int | Literal["all"] = Field(
        32, description="examples per step, or all: the whole training set of a client"
    )
    optimizer: str = Field("sgd()", description="such as sgd(momentum=0.9) or adam()")
    schedule: str = Field("constant()", description="learning rate over rounds, such as cosine()")
    clip: float | None = Field(None, description="largest norm of a step's direction")
    evaluate_every: int = Field(1, description="rounds between evaluations of all clients")
    engine: str = Field(
        "auto",
        description="how clients are trained: auto, sequential, threads, processes, stacked; or, on a cluster of Ray, "
        "flower, such as flower(cpus=2)",
    )
    device: str = Field("auto", description="cpu, cuda, or auto: a GPU if there is one")
    precision: Literal["full", "bfloat16"] = Field("full", description="of forward passes; bfloat16 is mixed")
    directory: Path | None = Field(None, description="folder for the results")
    resume: bool = Field(False, description="continue the run in the directory")


def check(values: Mapping[str, Any], flags: bool = False) -> Experiment:
    """Return the settings, or say in one line which is unknown or of the wrong type.

    Args:
        values: by name; from JSON or TOML if not `flags`.
        flags: all values are text, as on the command line.

    Raises:
        UsageError: one line.

    Example:
        >>> check({"rounds": "7", "batch_size": "all"}, flags=True).rounds
        7
        >>> check({"rounds": "7"})
        Traceback (most recent call last):
        idiolect.UsageError: rounds = '7' is not a whole number
    """
    try:
        if flags:
            return Experiment.model_validate_strings(values)
        return Experiment.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        if name not in Experiment.model_fields:
            raise UsageError(f"unknown key {name}{did_you_mean(name, Experiment.model_fields)}") from None
        kind = wanted(Experiment.model_fields[name].annotation).replace(" or None", "")
        raise UsageError(f"{name} = {values[name]!r} is not {kind}") from None


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return the keys and values of a TOML file.

    Raises:
        UsageError: if it is not there, or is no TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is no TOML: {error}") from None


_PLACES = {"data_dir", "directory", "resume"}


def command(experiment: Experiment, verb: str, *more: str, places: bool = False) -> str:
    """Return the command line that runs an experiment.

    Args:
        experiment: the settings; those at their defaults are left out.
        verb: ``run`` or ``compare``.
        more: arguments after the flags.
        places: also say which folders are read and written.

    Example:
        >>> command(Experiment(shift="rotation(45)", rounds=5), "run")
        "idiolect run --shift 'rotation(45)' --rounds 5"
    """
    words = ["idiolect", verb]
    for name, value in experiment:
        if value != Experiment.model_fields[name].default and (places or name not in _PLACES):
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join([*words, *more])


def add_settings(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Add settings to a parser as options, grouped as in `GROUPS`."""
    for title, members in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in (member for member in members if member in names):
            field = Experiment.model_fields[name]
            default = "" if field.default is None or field.default is False else f" (default: {field.default})"
            flag, text = f"--{name.replace('_', '-')}", f"{field.description}{default}"
            if field.annotation is bool:
                group.add_argument(flag, action="store_const", const="true", default=argparse.SUPPRESS, help=text)
            else:
                group.add_argument(flag, metavar=_metavar(field.annotation), default=argparse.SUPPRESS, help=text)


def _metavar(kind: Any) -> str:  # noqa: ANN401 - any annotation
    kind = (get_args(kind) or (kind,))[0]
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def experiment_of(given: argparse.Namespace) -> Experiment:
    """Return the settings of a command: those of its file, overridden by its options.

    Raises:
        UsageError: one line.
    """
    return _merged(given, _file(given))


def comparison_of(given: argparse.Namespace) -> tuple[Experiment, list[str], list[int]]:
    """Return the settings, methods and seeds of ``compare``, from its file and its options.

    Raises:
        UsageError: one line.
    """
    file = _file(given)
    for one, several in (("method", "methods"), ("seed", "seeds")):
        if one in file and several not in file and not getattr(given, several):
            raise UsageError(f"{given.file}: compare reads {several} = [...], not {one}")
    methods, seeds = file.pop("methods", METHODS), file.pop("seeds", (0,))
    return _merged(given, file), _texts("methods", given.methods or methods), _numbers("seeds", given.seeds or seeds)


def _file(given: argparse.Namespace) -> dict[str, Any]:
    return read_toml(given.file) if getattr(given, "file", None) else {}


def _merged(given: argparse.Namespace, file: dict[str, Any]) -> Experiment:
    flags = {name: value for name, value in vars(given).items() if name in Experiment.model_fields}
    on_top = check(flags, flags=True)
    try:
        base = check(file)
    except UsageError as error:
        raise UsageError(f"{given.file}: {error}") from None
    return base.model_copy(update={name: getattr(on_top, name) for name in flags})


def _texts(name: str, values: Any) -> list[str]:  # noqa: ANN401 - whatever the file holds
    if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
        raise UsageError(f"{name} = {values!r} is not a list of text")
    return list(values)


def _numbers(name: str, values: Any) -> list[int]:  # noqa: ANN401
    try:
        return [int(str(value)) for value in values]
    except (TypeError, ValueError):
        raise UsageError(f"{name} = {values!r} is not a list of whole numbers") from None
