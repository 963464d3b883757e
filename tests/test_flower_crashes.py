"""Coordinator and sites are killed at any line and restarted: the result is that of a run without kills."""

import itertools
import random

import pytest

pytest.importorskip("flwr")

from flower_grid import LineTracer, app_fails, coordinator_dies, replies_late, replies_with, site_dies
from flower_worlds import World, absent, assert_equal, assert_same, named_tensors
from flwr.app import RecordDict

from idiolect import methods, parts

METHOD = methods.fedpac(strength=0.7) + parts.control_variates()  # with memory, messages, and state of the server
TINY = {"ada": 4, "ben": 3}
COORDINATOR = (
    "flower/coordinator/coordinator.py:open",
    "flower/coordinator/coordinator.py:play_all",
    "flower/coordinator/coordinator.py:_play_round",
    "flower/coordinator/coordinator.py:_aggregate",
    "flower/coordinator/coordinator.py:_add_evaluation",
    "flower/coordinator/results.py:read_result",
    "flower/coordinator/requests.py:collect",
    "flower/coordinator/requests.py:wait_for_sites",
    "flower/coordinator/requests.py:_send",
    "flower/coordinator/requests.py:_receive",
    "flower/coordinator/requests.py:_register",
    "flower/coordinator/connections.py:refresh",
    "flower/coordinator/connections.py:receive",
    "flower/coordinator/connections.py:_reply",
    "flower/coordinator/connections.py:_push",
    "flower/coordinator/clients.py:save",
    "storage/checkpoint.py:save",
    "storage/run_directory.py:put",
    "storage/run_directory.py:write_config",
    "storage/run_directory.py:write_whole",
)
STATE = ("__init__", "rounds", "load", "newest", "save")
SITE = (
    "flower/site/session.py",
    "flower/site/app.py",
    "flower/protocol/model_form.py",
    *(f"flower/site/state.py:{name}" for name in STATE),
    "storage/run_directory.py:write_whole",
)


def world_in(folder):
    return World(folder, METHOD, rounds=3, sizes=TINY, quorum=2)


def result_of(world, coordinator):
    """Return the result of a run: server state, each client's state, messages and personal model; and the records."""
    kept = {f"server/{name}": t for name, t in named_tensors(coordinator.server).items()}
    for name, client in ((name, coordinator.clients[name]) for name in world.clients):
        kept |= {f"{name}/state/{key}": t for key, t in world.state(name, client.base_round).items()}
        kept |= {f"{name}/row/{key}": t for key, t in named_tensors(coordinator.rows.get(name)).items()}
        kept |= {f"{name}/personal/{key}": t for key, t in world.personal(name).items()}
    excluded = ("seconds", "bytes_up", "bytes_down")
    return kept, [{k: v for k, v in record.items() if k not in excluded} for record in coordinator.records]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The result of a run without kills, and the lines that its coordinator and its sites have run."""
    world = world_in(tmp_path_factory.mktemp("undisturbed"))
    world.grid.tracer = LineTracer(*SITE)
    with LineTracer(*COORDINATOR) as lines:
        coordinator = world.play()
    return result_of(world, coordinator), lines.sample(), world.grid.tracer.sample()


def assert_same_results(found, expected):
    assert_equal(found[0], expected[0], "the result")
    assert found[1] == expected[1]


def assert_nobody_trained_twice(world):
    """Assert that every message to train names the state after the round before."""
    assert {(client, played, base) for client, played, base in world.trained() if base != played} == set()


def coordinator_is_killed(folder, undisturbed, at, functions=COORDINATOR):
    world = world_in(folder)
    with LineTracer(*functions, kill=at) as lines:
        world.play()
    assert len(lines.seen) == at, "the coordinator was not killed"
    coordinator = world.play()
    assert_same_results(result_of(world, coordinator), undisturbed[0])
    assert_nobody_trained_twice(world)


def site_is_killed(folder, undisturbed, at):
    world = world_in(folder)
    world.grid.tracer = LineTracer(*SITE, kill=at)
    coordinator = world.play()
    assert len(world.grid.tracer.seen) >= at
    assert_same_results(result_of(world, coordinator), undisturbed[0])
    assert_nobody_trained_twice(world)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that a kill leaves open
@pytest.mark.parametrize("crash", [coordinator_is_killed, site_is_killed])
def test_a_kill_changes_nothing(tmp_path, undisturbed, crash):
    lines = undisturbed[1 if crash is coordinator_is_killed else 2]
    for at in random.Random(1).sample(lines, 6):
        crash(tmp_path / str(at), undisturbed, at)


def test_a_kill_while_an_evaluation_is_written_changes_nothing(tmp_path, undisturbed):
    functions = ("flower/coordinator/coordinator.py:_add_evaluation",)
    with LineTracer(*functions) as lines:
        world_in(tmp_path).play()
    for at in lines.sample():
        coordinator_is_killed(tmp_path / str(at), undisturbed, at, functions)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("crash", [coordinator_is_killed, site_is_killed])
def test_a_kill_at_any_line_changes_nothing(tmp_path, undisturbed, crash):
    for at in undisturbed[1 if crash is coordinator_is_killed else 2]:
        crash(tmp_path / str(at), undisturbed, at)


METHODS = [methods.fedpac(strength=0.7), methods.fedbn() + parts.control_variates(), methods.fedamp(strength=0.5)]


def random_fault(generator):
    """Return a random fault, or none."""
    return generator.choice(
        [
            replies_late(generator.uniform(1, 90)),
            replies_late(generator.uniform(1, 250)),
            site_dies(generator.uniform(0.1, 150), trained=generator.random() < 0.5, new_node=generator.random() < 0.5),
            app_fails,
            coordinator_dies,
            replies_with(lambda content: RecordDict()),
            *[lambda delivery: delivery.answer()] * 3,
        ]
    )


def run_with_random_faults(folder, seed):
    """Play a run with random faults until it is done; it must equal the simulation without the lost results."""
    generator = random.Random(seed)
    sizes = {"ada": 9, "ben": 3, "cleo": 12, "dan": 5, "eve": 1}
    share, quorum = generator.choice([0.5, 0.75, 1.0]), generator.choice([None, 1, 2, 4])
    world = World(folder, METHODS[seed % 3], 5, share, sizes, deadline=100, give_up=5000, quorum=quorum)
    for client, kind, played in itertools.product(sizes, ("query", "train", "evaluate"), range(6)):
        world.grid.faults[client, kind, played] = [random_fault(generator) for _ in range(generator.randint(0, 3))]
    for _ in range(60):
        coordinator = world.play()
        if world.status()["phase"] == "done":
            break
    evaluated = coordinator.records[-1].get("clients", {})
    assert_same(world, coordinator, world.trained_federation(absent(coordinator)), evaluated)


@pytest.mark.parametrize("seed", range(4))
def test_random_faults_change_nothing_but_lost_results(tmp_path, seed):
    run_with_random_faults(tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 30))
def test_more_random_faults_change_nothing_but_lost_results(tmp_path, seed):
    run_with_random_faults(tmp_path, seed)
