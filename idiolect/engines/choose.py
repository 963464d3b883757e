"""The choice of the engine of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from idiolect.compute.autograd import Model
from idiolect.compute.forward import call
from idiolect.compute.kernels import Kernels, NotAChainError
from idiolect.core.errors import UsageError, did_you_mean
from idiolect.core.nest import cloned, joined, rows_in
from idiolect.core.tree import Tree
from idiolect.core.types import Batch, ClientRows, Lockstep
from idiolect.data import ClientData, Examples, first_of
from idiolect.engines.base import Engine
from idiolect.engines.processes import Processes
from idiolect.engines.sequential import Sequential
from idiolect.engines.stacked import Stacked
from idiolect.engines.threads import Threads
from idiolect.rounds.training import Training

NAMES = ("auto", "sequential", "threads", "processes", "stacked")
FORK = hasattr(os, "fork") and os.uname().sysname == "Linux"


def choose(
    asked: str, model: Model, clients: Mapping[str, ClientData], training: Training, cohort: int
) -> tuple[Engine, str]:
    """Return an engine, and one line about it with the reason.

    On a GPU clients are stacked. On a CPU there is one worker per core: forked processes, or threads where there is no
    fork. Processes were nowhere slower than threads, and twice as fast on small networks. A model that draws random
    numbers in its forward pass never runs in threads, since these share one random stream.

    Args:
        asked: one of `NAMES`.
        model: the model.
        clients: the population.
        training: local training.
        cohort: clients in a round.

    Raises:
        UsageError: if there is no engine of this name.
    """
    if asked not in NAMES:
        hint, known = did_you_mean(asked, [*NAMES, "flower"]), ", ".join(NAMES)
        raise UsageError(
            f"no engine {asked!r}{hint}; there are {known}, and idiolect.flower.simulation() for a cluster"
        )
    if asked == "sequential":
        return Sequential(), "sequentially, by autograd"
    batch = _largest_batch(clients, training)
    gpu, why_not = model.device.type != "cpu", ""
    if asked == "stacked" or (asked == "auto" and gpu):
        held = all(isinstance(data.train, Examples) for data in clients.values())
        why_not = not_stackable(model, batch) if held else "examples are read batch by batch"
        if not why_not:
            width = min(cohort, _width(model, batch))
            return Stacked(width), f"in stacks of {width}"
        why_not = f" (cannot be stacked: {why_not})"
    if gpu:
        return Sequential(), f"sequentially, by autograd{why_not}"
    draws = drawing(model, batch)
    workers = max(1, min(cores(), cohort))
    how = _how(model)
    if draws and not FORK:
        return (
            Sequential(),
            f"sequentially, by autograd ({draws} draws random numbers, and this system has no fork){why_not}",
        )
    if asked == "processes" and not FORK:
        raise UsageError("engine 'processes' needs fork, which this system has not: take 'threads'")
    if FORK and (draws or asked != "threads"):
        return Processes(workers), f"in {workers} processes, {how}{why_not}"
    return Threads(workers), f"in {workers} threads, {how}{why_not}"


def check_engine(engine: Engine, model: Model, clients: Mapping[str, ClientData], training: Training) -> None:
    """Check an engine that the user made.

    Raises:
        UsageError: if it stacks clients, and the model cannot be stacked.
    """
    if isinstance(engine, Stacked):
        why_not = not_stackable(model, _largest_batch(clients, training))
        if why_not:
            raise UsageError(f"engine Stacked: clients cannot be stacked: {why_not}: take engine='auto'")


def cores() -> int:
    """Return the number of cores that this process may use, from its affinity and the quota of its control group."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return usable if quota == "max" else max(1, min(usable, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return usable


def drawing(model: Model, batch: Batch) -> str:
    """Return the name of a layer that draws random numbers in training, or an empty string."""
    module = model.copy().training
    state = partial(torch.cuda.get_rng_state, model.device) if model.device.type == "cuda" else torch.get_rng_state
    found: list[str] = []

    def compare(name: str, before: Tensor) -> None:
        if not torch.equal(before, state()):
            found.append(name)

    for name, layer in module.named_modules():
        if not list(layer.children()):
            layer.register_forward_pre_hook(lambda m, _: setattr(m, "_state_before", state()))
            layer.register_forward_hook(
                lambda m, _, out, name=name: compare(f"layer {name!r} ({type(m).__name__})", m._state_before)
            )
    before = state()
    with torch.no_grad(), torch.random.fork_rng():
        call(module.train(rows_in(batch.y) > 1), cloned(batch.x))
        compare("its forward pass", before)
    return found[0] if found else ""


def not_stackable(model: Model, batch: Batch) -> str:
    """Return the layer and the reason why a model cannot be differentiated in a stack, or an empty string."""
    draws = drawing(model, batch)
    if draws:
        return f"{draws} draws random numbers, which would not be those of a client alone"
    twin, inside = model.copy(), ["the model"]
    for name, layer in twin.training.named_modules():
        layer.register_forward_pre_hook(lambda m, _, name=name: inside.append(f"layer {name!r} ({type(m).__name__})"))
    rows = Tree(model.structure.layout, torch.stack([model.initial.flat] * 2))
    twice = Batch(joined([batch.x] * 2), joined([batch.y] * 2), frozen=batch.frozen)
    try:
        twin.grad(rows, Lockstep((ClientRows(slice(0, 2), twice),), 2))
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return f"{inside[-1]}: {str(error).partition(chr(10))[0][:120]}"
    return ""


def _width(model: Model, batch: Batch) -> int:
    """Return the width of a stack: half of a GPU's free memory, or about 8 MB of weights, which fit in caches."""
    row = model.initial.nbytes
    if model.device.type != "cuda":
        return max(2, (8 << 20) // (3 * row))
    free, _ = torch.cuda.mem_get_info(model.device)
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    model.grad(model.initial, batch)
    one = torch.cuda.max_memory_allocated(model.device) - before
    return max(2, int(free / 2) // (one + 8 * row))


def _largest_batch(clients: Mapping[str, ClientData], training: Training) -> Batch:
    data = max(clients.values(), key=lambda data: len(data.train))
    count = min(len(data.train), training.batch_size or len(data.train))
    return Batch(*first_of(data.train, count), frozen=count == 1)


def _how(model: Model) -> str:
    try:
        Kernels(model)
    except NotAChainError as reason:
        return f"by autograd ({reason})"
    return "by explicit kernels"
