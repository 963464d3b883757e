"""Flower's simulation engine equals the sequential engine bit for bit; errors are named and leave nothing behind."""

import copy
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("flwr")

import idiolect.flower
from idiolect import UsageError, methods
from idiolect.cli import main as cli
from idiolect.cli import train
from idiolect.compute.autograd import Model
from idiolect.core.tree import Tree
from idiolect.data import ClientData
from idiolect.engines.federation import Federation
from idiolect.engines.sequential import Sequential
from idiolect.flower.ray.actor import Actor, setup_of, to_arrays
from idiolect.flower.ray.engine import RayEngine
from idiolect.rounds.optim import SGD
from idiolect.rounds.training import Training
from idiolect.running.evaluation import evaluate_all
from idiolect.testing.checks import same_state
from idiolect.testing.worlds import RAGGED, network, population

METHODS = [
    methods.fedavg(),
    methods.fedbn(),
    methods.fedfsa(rho=0.1, rho_larger=0.3, top=1),
    methods.scaffold(),
    methods.ditto(),
    methods.fedgloss(),  # different broadcasts for training and for prediction
    methods.fedamp(),  # with messages to single clients
    methods.fedrod(),  # with personal tensors in the model
    methods.knnper(),  # with buffers that are filled for prediction
]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


def single(data):
    """Return a client's examples in float32."""
    return ClientData(**{split: (x.float(), y) for split, (x, y) in data.splits().items()})


def world(method, engine, *before, clients=None):
    """Return a federation of clients of different sizes in float32; half of them take part in a round."""
    held = {name: single(data) for name, data in population(RAGGED).items()} if clients is None else clients
    training = Training(lr=0.1, local_epochs=2, batch_size=8, optimizer=SGD(momentum=0.5), clip=5.0)
    model = Model(nn.Sequential(*before, *network().float()))
    return Federation(model, method, training, 4, 0.5, 0, held, engine)


def weights_of(worker, data, own, shared):
    return own.weights.flat.tolist()


def assert_same_bits(method, engine, *before):
    local, remote = world(method, Sequential(), *before), world(method, engine, *before)
    for _ in range(3):
        assert local.play() == remote.play()
        assert evaluate_all(local, ()) == evaluate_all(remote, ())
    same_state(local, remote)
    names = list(remote.clients)
    for client, weights in zip(names, engine.measure(remote, names, weights_of), strict=True):
        assert torch.equal(torch.tensor(weights), local.personal(client).flat), client


class LocalPool:
    """A pool with one actor in this process; the actor and its messages are copies, as they are with Ray."""

    size, closed = 1, 0

    def __init__(self, source, cpus, gpus):
        self.source, self.score, self.actor = source, None, None

    def set_score(self, score):
        if score != self.score:
            self.score, self.actor = score, None

    def send(self, kind, content):
        if self.actor is None:
            data = {client: to_arrays(data) for client, data in self.source.clients.items()}
            self.actor = Actor(*copy.deepcopy((setup_of(self.source), data)), self.score)
        done = Future()
        done.set_result(copy.deepcopy(self.actor.answer(kind, copy.deepcopy(content))))
        return done

    def close(self):
        LocalPool.closed += 1


@pytest.fixture
def local_pool(monkeypatch):
    """Have engines use the pool that needs no Ray."""
    monkeypatch.setattr(LocalPool, "closed", 0)
    monkeypatch.setitem(sys.modules, "idiolect.flower.ray.pool", SimpleNamespace(Pool=LocalPool))


@every_method
def test_messages_hold_all_that_a_client_needs(local_pool, method):
    assert_same_bits(method, RayEngine())


def test_an_actor_gets_neither_clients_nor_engine():
    federation = world(methods.fedbn(), RayEngine())
    sent = setup_of(federation)
    assert sent._fields == ("worker", "seed", "received", "memory", "messages")
    assert set(vars(sent.worker)) == {"method", "model", "learner", "training"}


def test_a_copy_of_a_tree_has_the_same_layout_and_only_its_row():
    tree = Tree.of({"w": torch.ones(2, 2), "b": torch.zeros(2)})
    assert [t.shape for t in tree.tensors] == [(2, 2), (2,)]  # views, which are not copied
    twin = copy.deepcopy(tree)
    assert twin.layout is tree.layout
    assert twin._tensors is None
    assert torch.equal((twin + tree).flat, 2 * tree.flat)


class ActsOnLargeInput(nn.Module):
    """The identity; if an input is above eight, it calls a function first."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, x):
        if (x.detach() > 8).any():
            self.act()
        return x


def fail():
    raise ArithmeticError("too large\nto handle")


def raise_usage_error():
    raise UsageError("too large: scale it")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def with_one_large(act, engine):
    """Return a federation in which the examples of one client make the model call a function."""
    generator = torch.Generator().manual_seed(0)
    inputs = {str(i): torch.randn(12, 3, generator=generator) for i in range(4)} | {"large": torch.full((12, 3), 9.0)}
    clients = {name: ClientData(train=(x, (x[:, 0] > 0).long())) for name, x in inputs.items()}
    model = Model(nn.Sequential(ActsOnLargeInput(act), nn.Linear(3, 2)))
    return Federation(model, methods.fedavg(), Training(lr=0.1, batch_size=4), 3, 1.0, 0, clients, engine)


def assert_fails_with_a_note(engine):
    run = with_one_large(fail, engine)
    with pytest.raises(RuntimeError) as caught:
        run.play()
    assert str(caught.value) == "client 'large' failed in an actor: ArithmeticError: too large to handle"
    assert "in fail" in caught.value.__notes__[0]
    assert run.round == 0


def test_a_failing_client_is_one_line_with_the_traceback_as_a_note(local_pool):
    engine = RayEngine()
    assert_fails_with_a_note(engine)
    assert LocalPool.closed == 1
    with pytest.raises(UsageError, match=r"^too large: scale it$"):
        with_one_large(raise_usage_error, engine).play()
    federation = world(methods.fedavg(), engine)
    federation.play()  # the engine works again
    assert federation.round == 1


@pytest.mark.parametrize(("cpus", "gpus"), [(0, 0), (-1, 0), (1, -0.5)])
def test_invalid_resources_are_refused(cpus, gpus):
    with pytest.raises(UsageError, match=r"[cg]pus must be a number"):
        RayEngine(cpus, gpus)


def test_gpus_need_a_run_on_a_gpu(local_pool):
    with pytest.raises(UsageError, match=r"gpus=0\.25 on cpu"):
        world(methods.fedavg(), RayEngine(gpus=0.25)).play()


def test_a_model_in_bfloat16_is_refused(local_pool):
    federation = Federation(Model(nn.Linear(3, 2).bfloat16()), methods.fedavg(), Training(), 1, 1.0, 0, {}, RayEngine())
    with pytest.raises(UsageError, match="messages cannot hold bfloat16"):
        list(federation.engine.train(federation, ["a"]))


def test_without_ray_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(idiolect.flower, "find_spec", lambda name: None if name == "ray" else object())
    with pytest.raises(UsageError, match=r"pip install 'idiolect\[ray\]'"):
        idiolect.flower.simulation()


def test_telemetry_is_off_unless_the_user_sets_it(monkeypatch):
    monkeypatch.setattr(idiolect.flower, "find_spec", lambda name: object())
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "")  # so that monkeypatch restores it
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED")
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    idiolect.flower.simulation()
    assert (os.environ["RAY_USAGE_STATS_ENABLED"], os.environ["FLWR_TELEMETRY_ENABLED"]) == ("0", "1")


@pytest.mark.parametrize("verb", ["run", "compare"])
@pytest.mark.parametrize(("text", "cpus"), [("flower", 1.0), ("flower(cpus=2)", 2), ("sequential", None)])
def test_the_command_line_makes_the_engine(monkeypatch, tmp_path, verb, text, cpus):
    given = []

    def stop(*arguments, engine, **settings):
        given.append(engine)
        raise UsageError("enough")

    monkeypatch.setattr(idiolect.flower, "find_spec", lambda name: object())
    monkeypatch.setattr(train, verb, stop)
    assert cli.main([verb, "--engine", text, "--directory", str(tmp_path / "run")]) == 2
    assert [engine and engine.cpus for engine in given] == [cpus]


def test_a_wrong_engine_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(idiolect.flower, "find_spec", lambda name: object())
    for text, error in [
        ("flowr", "no engine 'flowr' (did you mean flower?); there are auto, "),
        ("flower(gpu=1)", "flower has no argument 'gpu' (did you mean gpus?)"),
        ("flower(cpus=0)", "cpus must be a number above 0"),
    ]:
        assert cli.main(["run", "--clients", "4", "--engine", text]) == 2
        assert error in capsys.readouterr().err


def on_ray(test):
    """Mark a test that starts actors; Ray leaves files open and prints tips."""
    ignored = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:Tip:FutureWarning")
    return pytest.mark.slow(ignored(test))


@pytest.fixture(scope="module")
def ray():
    """Start Ray with two cores and return it; engines must not stop it."""
    ray = pytest.importorskip("ray")
    paths = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env=paths)
    yield ray
    assert ray.is_initialized()
    ray.shutdown()


@on_ray
@every_method
def test_actors_give_the_bits_of_sequential(ray, method):
    engine = RayEngine()
    assert_same_bits(method, engine)
    engine.close()


@on_ray
def test_dropout_is_the_same_in_actors(ray):
    engine = RayEngine()
    assert_same_bits(methods.fedavg(), engine, nn.Dropout(0.5))
    engine.close()


@on_ray
def test_failing_and_dying_actors_are_errors_and_the_engine_works_again(ray):
    engine = RayEngine()
    assert_fails_with_a_note(engine)
    with pytest.raises(RuntimeError, match="the actor of client 'large' died, often from too little memory"):
        with_one_large(die, engine).play()
    federation = world(methods.fedavg(), engine)
    federation.play()
    assert federation.round == 1
    engine.close()
    deadline = time.monotonic() + 20  # Ray notices dead actors a little later
    while ray.available_resources().get("CPU") != 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@on_ray
def test_limits_of_ray_are_one_line(ray):
    with pytest.raises(UsageError, match=r"no room for an actor of cpus=3, gpus=0: Ray has .*'CPU': 2.0"):
        world(methods.fedavg(), RayEngine(cpus=3)).play()
    federation = world(methods.fedavg(), RayEngine())
    lock, loss = threading.Lock(), federation.model.loss
    federation.model.loss = lambda outputs, y: loss(outputs, y) if lock else None
    with pytest.raises(
        UsageError, match=r"^the model or the method cannot be sent to an actor: cannot pickle '_thread"
    ):
        federation.play()


@on_ray
def test_a_module_that_a_machine_lacks_is_named(ray, tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("def score(federation, client, weights):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    engine = RayEngine()
    federation = world(methods.fedavg(), engine)
    with pytest.raises(RuntimeError, match=r"^an actor cannot train client 'eve': .*No module named 'only_here'$"):
        list(engine.measure(federation, ["eve"], importlib.import_module("only_here").score))


def results(folder):
    """Return the lines of a run without its times."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if "seconds" not in key} for line in lines]


@on_ray
def test_the_command_line_starts_and_stops_ray(tmp_path):
    """The results are those of the sequential engine, Flower and Ray print nothing, and no process is left."""
    pytest.importorskip("ray")
    mark = f"IDIOLECT_TEST={tmp_path.name}-{os.getpid()}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    for engine in ("flower", "sequential"):
        command = [sys.executable, "-m", "idiolect", "run", "--engine", engine, "--directory", str(tmp_path / engine)]
        done = subprocess.run(
            [*command, "--clients", "5", "--rounds", "2", "--method", "fedbn"],
            env=environment | dict([mark.split("=")]),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert all(line.startswith("idiolect: ") for line in done.stderr.splitlines()), done.stderr
    assert results(tmp_path / "flower") == results(tmp_path / "sequential")
    time.sleep(1)
    assert [pid for pid in Path("/proc").glob("[0-9]*") if mark.encode() in environment_of(pid)] == []


def environment_of(process):
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""
