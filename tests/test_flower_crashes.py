"""Killed anywhere and started again, coordinator and sites end as if nothing had happened."""

import random

import pytest

pytest.importorskip("flwr")

from flower_net import Lines
from flower_worlds import World, equal, flat

from idiolect import methods, parts

METHOD = methods.fedpac(strength=0.7) + parts.control_variates()  # memory, mail and a slot of the server
TINY = {"ada": 4, "ben": 3}
COORDINATOR = (
    "flower/coordinator.py:__post_init__",
    "flower/coordinator.py:play_all",
    "flower/coordinator.py:_play",
    "flower/coordinator.py:_record",
    "flower/coordinator.py:_checked",
    "flower/desk.py:ask",
    "flower/desk.py:gather",
    "flower/desk.py:_meet",
    "flower/board.py:look",
    "flower/board.py:listen",
    "flower/board.py:_hear",
    "flower/board.py:_post",
    "flower/known.py:save",
    "checkpoint.py:save",
    "report/record.py:put",
    "report/record.py:write_config",
    "report/record.py:write_whole",
)
STATE = ("__init__", "rounds", "load", "newest", "save")
SITE = (
    "flower/seat.py",
    "flower/site.py",
    *(f"flower/state.py:{name}" for name in STATE),
    "report/record.py:write_whole",
)


def world_in(folder):
    return World(folder, METHOD, rounds=3, sizes=TINY, quorum=2)


def ends(world, made):
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
    return ends(world, made), lines.places(), world.net.lines.places()


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
    same_ends(ends(world, made), undisturbed[0])
    nobody_trained_twice(world)


def site_is_killed(folder, undisturbed, at):
    world = world_in(folder)
    world.net.lines = Lines(*SITE, kill=at)
    made = world.play()
    assert len(world.net.lines.seen) >= at
    same_ends(ends(world, made), undisturbed[0])
    nobody_trained_twice(world)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that a kill leaves open
@pytest.mark.parametrize("crash", [coordinator_is_killed, site_is_killed])
def test_a_kill_changes_nothing(tmp_path, undisturbed, crash):
    places = undisturbed[1 if crash is coordinator_is_killed else 2]
    for at in random.Random(1).sample(places, 6):
        crash(tmp_path / str(at), undisturbed, at)


def test_a_kill_while_what_was_measured_is_written_changes_nothing(tmp_path, undisturbed):
    functions = ("flower/coordinator.py:_record",)
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
