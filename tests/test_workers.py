"""Engines beside the loop: what is chosen, what happens when a worker fails, what a step costs in counts."""

import gc
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import idiolect
from idiolect import Machine, Output, methods
from idiolect.compute.autograd import Model
from idiolect.core.errors import UsageError
from idiolect.core.types import Batch
from idiolect.data import ClientData
from idiolect.engines.choose import choose, cores, not_stackable
from idiolect.engines.federation import Federation
from idiolect.engines.processes import Processes
from idiolect.engines.sequential import Sequential
from idiolect.engines.stacked import Stacked
from idiolect.engines.threads import Threads
from idiolect.rounds.training import Training
from idiolect.testing.checks import same_state
from idiolect.testing.worlds import RAGGED, federation, population

WORKERS = [Threads, Processes]


def clients(count=4, size=12):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, size, 3, generator=generator)
    return {f"{i}": ClientData(train=(x[i], (x[i].sum(dim=1) > 0).long())) for i in range(count)}


def made(net, engine, held=None, method=None, **training):
    settings = Training(lr=0.1, batch_size=4, local_epochs=2, **training)
    return Federation(Model(net), method or methods.fedavg(), settings, 5, 1.0, 0, held or clients(), engine)


def net(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), *more, nn.Linear(4, 2))


class Fussy(nn.Module):
    """Passes on what it is given, until a value is above a bound; then it does what it was told."""

    def __init__(self, bound, what):
        super().__init__()
        self.bound, self.what = bound, what

    def forward(self, x):
        if (x.detach() > self.bound).any():
            self.what()
        return x


def burst():
    raise ArithmeticError("too hot to handle")


@pytest.mark.parametrize("kind", WORKERS)
def test_a_failing_client_is_an_error_with_its_traceback(kind):
    held = clients() | {"ill": ClientData(train=(torch.full((12, 3), 9.0), torch.zeros(12, dtype=torch.int64)))}
    torch.manual_seed(0)
    module = nn.Sequential(Fussy(8.0, burst), nn.Linear(3, 2))
    run = made(module, kind(2), held)
    before = run.server["share"].flat.clone()
    with pytest.raises((RuntimeError, ArithmeticError), match="too hot to handle"):
        run.play()
    assert run.round == 0
    assert torch.equal(run.server["share"].flat, before)
    well = made(module, run.engine)
    well.play()  # the engine works again
    assert well.round == 1
    run.engine.close()


def test_a_worker_that_is_killed_is_named_and_never_waited_for():
    module = nn.Sequential(Fussy(8.0, lambda: os.kill(os.getpid(), signal.SIGKILL)), nn.Linear(3, 2))
    held = clients() | {"ill": ClientData(train=(torch.full((12, 3), 9.0), torch.zeros(12, dtype=torch.int64)))}
    run = made(module, Processes(2), held)
    with pytest.raises(RuntimeError, match=r"killed by signal SIGKILL at client 'ill'.*memory"):
        run.play()


def test_no_process_outlives_its_engine():
    engine = Processes(2)
    run = made(net(), engine)
    run.play()
    children = [w.process for w in engine._pool._workers]
    assert all(child.is_alive() for child in children)
    run.play()
    assert [w.process for w in engine._pool._workers] == children  # forked once
    engine.close()
    assert not any(child.is_alive() for child in children)


@pytest.mark.parametrize("kind", WORKERS)
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_number_of_workers_changes_no_bit(kind, workers):
    alone = federation(methods.fedfsa(rho=0.1, rho_larger=0.3, top=1), population(RAGGED), engine=Threads(1))
    many = federation(methods.fedfsa(rho=0.1, rho_larger=0.3, top=1), population(RAGGED), engine=kind(workers))
    for _ in range(3):
        assert alone.play() == many.play()
    same_state(alone, many)
    many.engine.close()


def test_dropout_draws_the_same_in_processes_as_sequential():
    one, other = (made(net(nn.Dropout(0.5)), engine) for engine in (Sequential(), Processes(2)))
    for _ in range(2):
        one.play(), other.play()
    same_state(one, other)
    other.engine.close()


def test_threads_give_back_the_number_of_threads():
    torch.set_num_threads(2)
    try:
        made(net(), Threads(2)).play()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def chosen(asked, module, cohort=4):
    return choose(asked, Model(module), clients(), Training(batch_size=4), cohort)


def test_what_is_chosen():
    engine, note = chosen("auto", net())
    assert isinstance(engine, Processes)
    assert note == f"in {min(cores(), 4)} processes, by explicit kernels"
    assert isinstance(chosen("threads", net())[0], Threads)
    assert isinstance(chosen("sequential", net())[0], Sequential)
    engine, note = chosen("stacked", net())
    assert isinstance(engine, Stacked)
    assert note == "in stacks of 4"
    engine, note = chosen("threads", net(nn.Dropout(0.5)))  # threads share one random stream
    assert isinstance(engine, Processes)
    engine, note = chosen("stacked", net(nn.Dropout(0.5)))
    assert isinstance(engine, Processes)
    assert "layer '2' (Dropout) draws random numbers" in note
    assert "by autograd (layer '2' (ELU) has no explicit kernel)" in chosen("auto", net(nn.ELU()))[1]
    with pytest.raises(UsageError, match=r"no engine 'thread'.*threads"):
        chosen("thread", net())


def test_a_model_that_cannot_be_stacked_is_named_by_its_layer():
    batch = Batch(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))
    assert not_stackable(Model(net()), batch) == ""
    assert "layer '2' (Fussy)" in not_stackable(Model(net(Fussy(99.0, burst))), batch)


def test_fit_says_which_engine_it_took(tmp_path):
    given, stacked = (net(), clients(), methods.fedavg()), Machine("stacked")
    run = idiolect.fit(*given, rounds=1, machine=stacked, output=Output(tmp_path / "a"))
    assert "clients are trained in stacks of 4" in run.notes
    again = Output(tmp_path / "a", resume=True)
    with pytest.raises(UsageError, match="gradients was 'autograd, width 4', is 'autograd, width 1'"):
        idiolect.fit(*given, rounds=1, machine=Machine("sequential"), output=again)


class Launches(TorchDispatchMode):
    """Counts operations that would launch a kernel: all but views and bookkeeping."""

    VIEWS = (
        "view",
        "as_strided",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "detach",
        "alias",
        "t.",
        "split",
    )
    VIEWS += (
        "transpose",
        "permute",
        "narrow",
        "unbind",
        "empty",
        "_unsafe_view",
        "_reshape_alias",
        "lift",
        "new_empty",
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        self.count += not name.startswith(self.VIEWS)
        return func(*args, **(kwargs or {}))


def launches(engine, count, method):
    """Return launches per step of all clients: those of two passes less those of one."""
    found = []
    for epochs in (1, 2):
        settings = Training(lr=0.1, batch_size=4, local_epochs=epochs)
        held = clients(count, 12)
        run = Federation(Model(net(nn.BatchNorm1d(4))), method, settings, 5, 1.0, 0, held, engine)
        with Launches() as counted:
            run.play()
        found.append(counted.count)
    return (found[1] - found[0]) / 3


@pytest.mark.parametrize("method", [methods.fedavg(), methods.fedfsa(rho=0.1, rho_larger=0.3, top=1)])
def test_a_stack_of_hundred_launches_a_fiftieth_of_what_hundred_clients_do(method):
    stacked, alone = launches(Stacked(100), 100, method), launches(Sequential(), 100, method)
    assert stacked > 5
    assert stacked <= alone / 50


def test_launches_of_a_stack_do_not_grow_with_the_stack():
    assert launches(Stacked(50), 50, methods.fedavg()) == launches(Stacked(5), 5, methods.fedavg())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_step_of_a_worker_fetches_no_memory_from_the_kernel():
    """Rows that a SAM step makes and drops stay with the process: page faults do not grow with the steps."""
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(3, 1000), nn.Tanh(), nn.Linear(1000, 1000), nn.Tanh(), nn.Linear(1000, 2))

    def faults(epochs):
        run = made(wide, Processes(1), clients(2), methods.fedfsa(rho=0.1, rho_larger=0.3, top=1))
        run.training = Training(lr=0.1, batch_size=4, local_epochs=epochs)
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
        run.play()
        run.engine.close()
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt - before

    few, many = faults(2), faults(22)
    rows = wide[2].weight.numel() * 4 / resource.getpagesize()
    assert (many - few) / (20 * 3 * 2) < rows / 10  # a step makes about ten rows


def taken(engine):
    """Return the bytes this process and its workers take; what they share counts once."""
    pids = [os.getpid(), *(w.process.pid for w in engine._pool._workers)]
    texts = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids)
    return sum(1024 * int(next(line.split()[1] for line in t.splitlines() if line.startswith("Pss:"))) for t in texts)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs the system's account of pages")
def test_workers_do_not_hold_on_to_what_clients_remembered():
    """Memories that change, and a collection of garbage, leave no old pages behind in processes forked before."""
    wide = nn.Sequential(nn.Linear(3, 10_000), nn.ReLU(), nn.Linear(10_000, 2))
    run = made(wide, Processes(2), method=methods.ditto(0.1))
    store, names = run.memory, [f"absent {i}" for i in range(150)]
    fresh = store.get("0")
    for name in names:
        store.put(name, fresh)
    run.play()  # forks
    before = taken(run.engine)
    for name in names:
        store.put(name, {part: tree + 1.0 for part, tree in fresh.items()})
    gc.collect()
    grown = taken(run.engine) - before
    run.engine.close()
    assert store.nbytes > 35e6
    assert grown < store.nbytes / 2  # either bug takes all of it; the heap of a long test run moves by some MB


def test_garbage_is_collected_again_once_the_workers_are_gone():
    engine = Processes(2)
    made(net(), engine).play()
    assert gc.get_freeze_count() > 0
    engine.close()
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("optimizer", [idiolect.SGD(momentum=0.9, nesterov=True), idiolect.Adam(weight_decay=0.01)])
def test_optimizers_keep_their_state_in_a_stack_of_unequal_clients(optimizer):
    settings = Training(lr=0.01, batch_size=8, local_epochs=2, optimizer=optimizer)
    one, other = (
        federation(methods.ditto(0.5), population(RAGGED), engine=engine, training=settings)
        for engine in (Sequential(), Stacked(6))
    )
    for _ in range(3):
        one.play(), other.play()
    same_state(one, other, 1e-12)
