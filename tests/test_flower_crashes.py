"""Killed anywhere and started again, coordinator and sites end as if nothing had happened."""

import itertools
import random

import pytest

pytest.importorskip("flwr")

from flower_net import Lines, answers, breaks, dies, ends, late
from flower_worlds import World, absent, equal, flat, same
from flwr.app import RecordDict

from idiolect import methods, parts

METHOD = methods.fedpac(strength=0.7) + parts.control_variates()  # memory, mail and a slot of the server
TINY = {"ada": 4, "ben": 3}
COORDINATOR = (
    "flower/coordinator/coordinator.py:__post_init__",
    "flower/coordinator/coordinator.py:play_all",
    "flower/coordinator/coordinator.py:_play",
    "flower/coordinator/coordinator.py:_record",
    "flower/coordinator/coordinator.py:_checked",
    "flower/coordinator/requests.py:ask",
    "flower/coordinator/requests.py:gather",
    "flower/coordinator/requests.py:_meet",
    "flower/coordinator/connections.py:look",
    "flower/coordinator/connections.py:listen",
    "flower/coordinator/connections.py:_hear",
    "flower/coordinator/connections.py:_post",
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
    *(f"flower/site/state.py:{name}" for name in STATE),
    "storage/run_directory.py:write_whole",
)


def world_in(folder):
    return World(folder, METHOD, rounds=3, sizes=TINY, quorum=2)


def left_by(world, made):
    """What a run leaves: the server's slots, each client's state and own model, and what was measured."""
    kept = {f"server/{name}": t for name, t in flat(made.server).items()}
    for client in world.clients:
        kept |= {f"{client}/{name}": t for name, t in world.state(client, made.memory[client].base).items()}
        kept |= {f"{client}/mail/{name}": t for name, t in flat(made.memory[client].mail).items()}
        kept |= {f"{client}/own/{name}": t for name, t in world.personal(client).items()}
    timed = ("seconds", "bytes_up", "bytes_down")
    return kept, [{k: v for k, v in record.items() if k not in timed} for record in made.records]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What is left of a run in peace, and the lines that its coordinator and its sites have run."""
    world = world_in(tmp_path_factory.mktemp("peace"))
    world.net.lines = Lines(*SITE)
    with Lines(*COORDINATOR) as lines:
        made = world.play()
    return left_by(world, made), lines.places(), world.net.lines.places()


def same_ends(found, wanted):
    equal(found[0], wanted[0], "the end")
    assert found[1] == wanted[1]


def nobody_trained_twice(world):
    """Each client's messages for one round name one state to start from, and that of the round before."""
    assert {(client, played, base) for client, played, base in world.trained() if base != played} == set()


def coordinator_is_killed(folder, undisturbed, at, functions=COORDINATOR):
    world = world_in(folder)
    with Lines(*functions, kill=at) as lines:
        world.play()
    assert len(lines.seen) == at, "it was not killed"
    made = world.play()
    same_ends(left_by(world, made), undisturbed[0])
    nobody_trained_twice(world)


def site_is_killed(folder, undisturbed, at):
    world = world_in(folder)
    world.net.lines = Lines(*SITE, kill=at)
    made = world.play()
    assert len(world.net.lines.seen) >= at
    same_ends(left_by(world, made), undisturbed[0])
    nobody_trained_twice(world)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that a kill leaves open
@pytest.mark.parametrize("crash", [coordinator_is_killed, site_is_killed])
def test_a_kill_changes_nothing(tmp_path, undisturbed, crash):
    places = undisturbed[1 if crash is coordinator_is_killed else 2]
    for at in random.Random(1).sample(places, 6):
        crash(tmp_path / str(at), undisturbed, at)


def test_a_kill_while_what_was_measured_is_written_changes_nothing(tmp_path, undisturbed):
    functions = ("flower/coordinator/coordinator.py:_record",)
    with Lines(*functions) as lines:
        world_in(tmp_path).play()
    for at in lines.places():
        coordinator_is_killed(tmp_path / str(at), undisturbed, at, functions)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("crash", [coordinator_is_killed, site_is_killed])
def test_a_kill_at_any_line_changes_nothing(tmp_path, undisturbed, crash):
    for at in undisturbed[1 if crash is coordinator_is_killed else 2]:
        crash(tmp_path / str(at), undisturbed, at)


ANY = [methods.fedpac(strength=0.7), methods.fedbn() + parts.control_variates(), methods.fedamp(strength=0.5)]


def any_fault(dice):
    """Nothing, or one of the things that befall a site when a message comes."""
    return dice.choice(
        [
            late(dice.uniform(1, 90)),
            late(dice.uniform(1, 250)),
            dies(dice.uniform(0.1, 150), trained=dice.random() < 0.5, anew=dice.random() < 0.5),
            breaks,
            ends,
            answers(lambda content: RecordDict()),
            *[lambda visit: visit.answer()] * 3,
        ]
    )


def a_troubled_run(folder, seed):
    """Play a run in which all goes wrong, again and again until it is done; it equals that without the results lost."""
    dice = random.Random(seed)
    sizes = {"ada": 9, "ben": 3, "cleo": 12, "dan": 5, "eve": 1}
    share, quorum = dice.choice([0.5, 0.75, 1.0]), dice.choice([None, 1, 2, 4])
    world = World(folder, ANY[seed % 3], 5, share, sizes, deadline=100, give_up=5000, quorum=quorum)
    for client, kind, played in itertools.product(sizes, ("query", "train", "evaluate"), range(6)):
        world.net.plan[client, kind, played] = [any_fault(dice) for _ in range(dice.randint(0, 3))]
    for _ in range(60):
        made = world.play()
        if made and world.status()["phase"] == "done":
            break
    same(world, made, world.rehearsed(absent(made)), made.records[-1].get("clients", {}))


@pytest.mark.parametrize("seed", range(4))
def test_a_troubled_run_is_that_without_the_results_that_were_lost(tmp_path, seed):
    a_troubled_run(tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 30))
def test_many_troubled_runs(tmp_path, seed):
    a_troubled_run(tmp_path, seed)
