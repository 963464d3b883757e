"""Experiments: plain settings become clients, a model, a method, and a run."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from idiolect import models
from idiolect.cli.settings import Experiment, command
from idiolect.compute.losses import Loss
from idiolect.core.errors import UsageError
from idiolect.core.method import Method
from idiolect.data import (
    ByClient,
    ByDomain,
    ByGroup,
    ClientData,
    Deal,
    Dirichlet,
    Pool,
    Shift,
    Shuffled,
    Split,
    federate,
    load,
)
from idiolect.engines.base import Engine
from idiolect.registry import names
from idiolect.rounds.training import Training
from idiolect.running.fit import fit
from idiolect.running.options import Machine, Output
from idiolect.running.run import Run


class Setup(NamedTuple):
    """The objects that an experiment's settings stand for."""

    clients: dict[str, ClientData]
    model: nn.Module
    method: Method
    training: Training
    loss: Loss


def load_pool(experiment: Experiment) -> Pool:
    """Load the data of an experiment."""
    return load(experiment.data, experiment.data_dir, experiment.label, experiment.client, experiment.unit)


def split_of(experiment: Experiment, pool: Pool) -> Split:
    """Return the split: that of the settings, else by the pool's own clients, else Dirichlet(0.5)."""
    by_client = ByClient() if pool.group is not None else Dirichlet(0.5)
    split: Split = by_client if experiment.split is None else names.split_of(experiment.split)
    if "clients" in experiment.model_fields_set and isinstance(split, ByClient | ByDomain):
        raise UsageError(f"clients = {experiment.clients}: {split} takes them from the data; leave one of the two out")
    return split


def deal_of(experiment: Experiment, pool: Pool) -> Deal:
    """Return the rule for training, validation and test."""
    deal = names.deal_of(experiment.deal)
    if pool.unit is not None and deal != ByGroup():
        raise UsageError(f"unit = {experiment.unit!r} is for deal = by_group(), not for {experiment.deal}")
    return deal


def shift_of(experiment: Experiment) -> Shift | None:
    """Return the shift of the settings, if there is one."""
    return None if experiment.shift is None else names.shift_of(experiment.shift)


def model_of(experiment: Experiment, pool: Pool) -> nn.Module:
    """Return the network, with initial weights that depend on the seed alone."""
    shape, classes = tuple(pool.x.shape[1:]), None if pool.classes is None else len(pool.classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        if experiment.model is None:
            return models.default_model(shape, classes, not pool.x.is_floating_point())
        return names.model_of(experiment.model, shape, classes)


def training_of(experiment: Experiment) -> Training:
    """Return the settings of local training."""
    optimizer, schedule = names.optimizer_of(experiment.optimizer), names.schedule_of(experiment.schedule)
    batch_size = None if experiment.batch_size == "all" else experiment.batch_size
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, or all: the whole training set of a client; got {batch_size}")
    return Training(experiment.lr, experiment.local_epochs, batch_size, optimizer, schedule, experiment.clip)


def build(experiment: Experiment, pool: Pool | None = None) -> Setup:
    """Return the clients, model, method, training and loss of an experiment.

    Args:
        experiment: the settings.
        pool: its data, if loaded already.

    Raises:
        UsageError: one line, if a setting cannot be.

    Example:
        >>> setup = build(Experiment(clients=4, split="iid", lr=0.1))
        >>> list(setup.clients)[0], setup.method.name, setup.training.lr, len(setup.model)
        ('client-0', 'FedBN', 0.1, 13)
    """
    method, training, shift = names.method_of(experiment.method), training_of(experiment), shift_of(experiment)
    pool = load_pool(experiment) if pool is None else pool
    test, deal = experiment.test, deal_of(experiment, pool)
    if test is None:
        test = 0.25 if pool.part is None or deal != Shuffled() else "official"
    clients = federate(
        pool,
        split_of(experiment, pool),
        experiment.clients,
        test,
        experiment.val,
        shift,
        experiment.size,
        experiment.seed,
        deal,
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
        engine: takes the place of `experiment.engine`; for engines such as Flower's.
    """
    machine = Machine(engine or experiment.engine, experiment.device, experiment.precision)
    about = {"command": command(experiment, "run")}
    output = Output(experiment.directory, experiment.resume, report=False, progress=progress, about=about)
    pool = load_pool(experiment) if pool is None else pool
    setup = build(experiment, pool)
    done = fit(
        setup.model,
        setup.clients,
        setup.method,
        rounds=experiment.rounds,
        participation=experiment.participation,
        seed=experiment.seed,
        training=setup.training,
        loss=setup.loss,
        evaluate_every=experiment.evaluate_every,
        machine=machine,
        output=output,
    )
    if report and experiment.directory:
        title = f"{pool.name}: {setup.method.name}, {len(setup.clients)} clients"
        done.report(experiment.directory / "report.html", title)
    return done
