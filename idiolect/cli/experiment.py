"""An experiment as plain settings, the same in a file, on the command line and in Python."""

from __future__ import annotations

import json
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn
from torch.nn import functional as F

from idiolect import models
from idiolect.compute.autograd import Loss
from idiolect.core.errors import UsageError, did_you_mean
from idiolect.core.method import Method
from idiolect.data import ByClient, ClientData, Dirichlet, Pool, Shift, Split, federate, load, read_table
from idiolect.data.tables import SUFFIXES
from idiolect.engines.base import Engine
from idiolect.registry import plugins
from idiolect.registry.expression import wanted
from idiolect.registry.names import MODELS, OPTIMIZERS, SCHEDULES, SHIFTS, SPLITS, given, method_of, read
from idiolect.rounds.optim import Optimizer, Schedule
from idiolect.rounds.training import Training
from idiolect.running.fit import fit
from idiolect.running.run import Run


class Experiment(BaseModel):
    """All settings of one run; the defaults run as they are.

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
    label: str = Field("label", description="label column of your own table")
    client: str | None = Field(None, description="client column of your own table, else 'client' if there is one")
    split: str | None = Field(
        None, description="who holds what, such as dirichlet(0.5); else the data's own clients, else dirichlet(0.5)"
    )
    clients: int = Field(20, description="how many, where the split does not say")
    shift: str | None = Field(None, description="what differs between clients, such as rotation(45) + contrast(0.5)")
    test: float | Literal["official"] | None = Field(
        None, description="share of each client's examples, or official; else official where there is one, else 0.25"
    )
    val: float = Field(0.0, description="share of each client's examples for validation")
    size: int | None = Field(None, description="most training examples of a client")
    method: str = Field("fedbn", description="see `idiolect methods`; parts are added with +")
    model: str | None = Field(
        None, description="small_cnn, mlp, ... or your own module:function; else what suits the data"
    )
    rounds: int = Field(30, description="how many rounds")
    participation: float = Field(1.0, description="share of the clients in a round")
    seed: int = Field(0, description="decides split, shift, initial weights, cohorts and order")
    lr: float = Field(0.05, description="learning rate")
    local_epochs: int = Field(1, description="passes over a client's examples in a round")
    batch_size: int | Literal["all"] = Field(32, description="examples a step, or all: a client's whole set")
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
    directory: Path | None = Field(None, description="where to write what comes of it")
    resume: bool = Field(False, description="go on with what is in the directory")


class Setup(NamedTuple):
    """What `fit` needs: an experiment made of objects."""

    clients: dict[str, ClientData]
    model: nn.Module
    method: Method
    training: Training
    loss: Loss


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


def load_pool(experiment: Experiment) -> Pool:
    """Load the data of an experiment."""
    if Path(experiment.data).suffix in SUFFIXES:
        return read_table(experiment.data, experiment.label, experiment.client)
    return load(experiment.data, experiment.data_dir)


def split_of(experiment: Experiment, pool: Pool) -> Split:
    """Return who holds what: what the experiment says, else the pool's own clients, else Dirichlet(0.5)."""
    if experiment.split is None:
        return ByClient() if pool.group is not None else Dirichlet(0.5)
    split: Split = read(experiment.split, SPLITS, "split")
    return split


def shift_of(experiment: Experiment) -> Shift | None:
    """Return what differs between clients."""
    if experiment.shift is None:
        return None
    shift: Shift = read(experiment.shift, SHIFTS, "shift", Shift)
    return shift


def model_of(experiment: Experiment, pool: Pool) -> nn.Module:
    """Return the network with initial weights that depend on the seed alone."""
    shape, classes = tuple(pool.x.shape[1:]), None if pool.classes is None else len(pool.classes)
    known = {"shape": shape, "classes": classes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        if experiment.model is None:
            return models.default_model(shape, classes, not pool.x.is_floating_point())
        if ":" in experiment.model:
            return plugins.model_from(experiment.model, shape, classes)
        suited = MODELS if classes is not None else ("mlp",)
        names = {name: given(getattr(models, name), known) for name in suited}
        model: nn.Module = read(experiment.model, names, "model", nn.Module)
        return model


def training_of(experiment: Experiment) -> Training:
    """Return how clients train."""
    optimizer: Optimizer = read(experiment.optimizer, OPTIMIZERS, "optimizer")
    schedule: Schedule = read(experiment.schedule, SCHEDULES, "schedule")
    batch_size = None if experiment.batch_size == "all" else experiment.batch_size
    return Training(experiment.lr, experiment.local_epochs, batch_size, optimizer, schedule, experiment.clip)


def build(experiment: Experiment, pool: Pool | None = None) -> Setup:
    """Return an experiment's clients, model, method, training and loss.

    Args:
        experiment: the settings.
        pool: its data, if they are loaded already.

    Raises:
        UsageError: one line, if a setting cannot be.

    Example:
        >>> setup = build(Experiment(clients=4, split="iid", lr=0.1))
        >>> list(setup.clients)[0], setup.method.name, setup.training.lr, len(setup.model)
        ('client-0', 'FedBN', 0.1, 13)
    """
    method, training, shift = method_of(experiment.method), training_of(experiment), shift_of(experiment)
    pool = load_pool(experiment) if pool is None else pool
    test = experiment.test
    if test is None:
        test = 0.25 if pool.part is None else "official"
    clients = federate(
        pool,
        split_of(experiment, pool),
        experiment.clients,
        test,
        experiment.val,
        shift,
        experiment.size,
        experiment.seed,
    )
    loss = F.mse_loss if pool.classes is None else F.cross_entropy
    return Setup(clients, model_of(experiment, pool), method, training, loss)


def run(
    experiment: Experiment,
    pool: Pool | None = None,
    progress: bool = False,
    report: bool = True,
    engine: Engine | None = None,
) -> Run:
    """Run an experiment; see `fit`.

    Args:
        experiment: the settings.
        pool: its data, if they are loaded already.
        progress: show a progress bar.
        report: draw report.html into the directory.
        engine: what the experiment's engine stands for, where that is none of `idiolect.engines.choose`.
    """
    setup = build(experiment, pool)
    return fit(
        setup.model,
        setup.clients,
        setup.method,
        rounds=experiment.rounds,
        participation=experiment.participation,
        seed=experiment.seed,
        training=setup.training,
        loss=setup.loss,
        evaluate_every=experiment.evaluate_every,
        directory=experiment.directory,
        resume=experiment.resume,
        report=report,
        progress=progress,
        about={"command": command(experiment, "run")},
        engine=engine or experiment.engine,
        device=experiment.device,
        precision=experiment.precision,
    )


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
