"""The states of a site: two files that survive kills and full disks, and in which any damage is detected."""

import errno
import os
import random
import signal
import stat
import time
from unittest import mock

import pytest
import torch

pytest.importorskip("flwr")

from flower_grid import Killed, LineTracer, after, replies_late
from flower_worlds import World, assert_same

from idiolect import methods
from idiolect.core.errors import UsageError
from idiolect.core.tree import EMPTY, Tree
from idiolect.flower.site.state import SiteState
from idiolect.flower.system.files import lock_file
from idiolect.storage.run_directory import write_tensors
from idiolect.testing.checks import same

INITIAL = {"share": Tree.of({"bn.mean": torch.zeros(3), "bn.var": torch.ones(2, 2)}), "sam": EMPTY}
GENERATOR = random.Random(7)


def memory(value):
    return {"share": Tree(INITIAL["share"].layout, torch.arange(7.0) + value), "sam": EMPTY}


def opened(folder, initial=INITIAL, run="run-1"):
    return SiteState(folder / "ward-a", run, initial)


@pytest.fixture
def state(tmp_path):
    return opened(tmp_path)


@pytest.fixture
def saved(state):
    """States after rounds 2 and 5."""
    state.save(2, 0, memory(2))
    state.save(5, 2, memory(5))
    return state


def path_of(state, after=5):
    return state.folder / f"state-{after:06}.safetensors"


def test_the_state_that_counted_and_the_newest_are_kept(saved):
    assert saved.rounds() == [2, 5]
    same(saved.load(2), memory(2))
    same(saved.load(5), memory(5))
    same(saved.load(0), INITIAL)
    saved.save(6, 2, memory(6))  # the result of round 5 did not count
    assert saved.rounds() == [2, 6]
    saved.save(9, 6, memory(9))
    assert saved.rounds() == [6, 9]
    saved.save(9, 6, memory(9.5))  # round 9 is repeated
    assert saved.rounds() == [6, 9]
    same(saved.load(9), memory(9.5))
    saved.save(1, 0, memory(1))
    assert saved.rounds() == [1]


def test_a_state_survives_its_process_and_is_loaded_as_a_copy(tmp_path, saved):
    saved.load(5)["share"].flat.zero_()
    saved.close()
    again = opened(tmp_path)
    same(again.load(5), memory(5))


def test_runs_are_separate(tmp_path, saved):
    saved.close()
    other = opened(tmp_path, run="run-2")
    assert other.rounds() == []
    other.save(1, 0, memory(1))
    other.close()
    again = opened(tmp_path)
    assert again.rounds() == [2, 5]


def test_a_missing_state_is_one_line_that_names_the_saved_rounds(state):
    with pytest.raises(UsageError, match=r"no state after round 3 in .* \(saved rounds: none\): mount the right"):
        state.load(3)
    state.save(2, 0, memory(2))
    with pytest.raises(
        UsageError, match=r"no state after round 3 in .*run-1 \(saved rounds: 2\): mount .*--restored"
    ) as caught:
        state.load(3)
    assert "\n" not in str(caught.value)


def test_the_newest_state_is_not_later_than_asked(saved):
    assert [saved.newest(no_later=n) for n in (0, 1, 2, 4, 5, 99)] == [0, 0, 2, 2, 5, 5]


@pytest.mark.parametrize("run", ["", "..", "a/b", "a b", "run\n", "a" * 101])
def test_an_invalid_run_name_is_refused(tmp_path, run):
    with pytest.raises(UsageError, match="invalid run name"):
        opened(tmp_path, run=run)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_created_is_one_line(tmp_path):
    (tmp_path / "ward-a").write_text("a file")
    with pytest.raises(UsageError, match=r"cannot create .*ward-a/run-1 \((File exists|Not a directory)\)"):
        opened(tmp_path)
    (tmp_path / "lock").mkdir()
    with pytest.raises(UsageError, match=r"cannot open .*lock \(Is a directory\)"):
        lock_file(tmp_path / "lock")


def another(tensors):
    return {"share": Tree.of(tensors), "sam": EMPTY}


@pytest.mark.parametrize(
    ("initial", "names"),
    [
        (another({"bn.mean": torch.zeros(3), "bn.var": torch.ones(4)}), "share/bn.var differ"),
        (another({"bn.mean": torch.zeros(3)}), "share/bn.var differ"),
        (another({"bn.mean": torch.zeros(3), "bn.sd": torch.ones(2, 2)}), "share/bn.sd, share/bn.var differ"),
        (INITIAL | {"sam": Tree.of({"bn.mean": torch.zeros(3)})}, "sam/bn.mean differ"),
        ({p: Tree(t.layout, t.flat.double()) for p, t in INITIAL.items()}, "share/bn.mean, share/bn.var differ"),
    ],
)
def test_a_state_of_another_model_or_method_is_refused_by_name(tmp_path, saved, initial, names):
    saved.close()
    other = opened(tmp_path, initial)
    with pytest.raises(UsageError, match=rf"state-000005.* belongs to another model or method: {names}$"):
        other.load(5)


def test_a_renamed_state_or_another_file_is_refused(saved):
    path_of(saved, 2).rename(path_of(saved, 3))
    with pytest.raises(UsageError, match=r"state-000003.* holds the state after round 2: the file was renamed"):
        saved.load(3)
    write_tensors(path_of(saved), {f"share/{n}": t for n, t in memory(5)["share"].items()}, {"round": "5"})
    with pytest.raises(UsageError, match=r"has the format 'unknown', expected 'idiolect site state 1'"):
        saved.load(5)


def test_every_truncation_is_detected(saved):
    whole = path_of(saved).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) - 1):
        path_of(saved).write_bytes(whole[:length])
        with pytest.raises(UsageError, match=r"state-000005.* (truncated or damaged|was altered)"):
            saved.load(5)
    path_of(saved).write_bytes(whole + b"\0")
    with pytest.raises(UsageError, match="state-000005"):
        saved.load(5)
    same(saved.load(2), memory(2))


def test_every_flipped_bit_is_detected(saved):
    whole = path_of(saved).read_bytes()
    for at in GENERATOR.sample(range(8 * len(whole)), 150):
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << at % 8
        path_of(saved).write_bytes(flipped)
        with pytest.raises(UsageError, match="state-000005"):
            saved.load(5)


def assert_intact(folder):
    """Assert that all states are complete after the third save has been killed, and that a new process can save."""
    state = opened(folder)
    try:
        assert {2, 5} <= set(state.rounds()) or {5, 6} <= set(state.rounds())
        for round_ in state.rounds():
            same(state.load(round_), memory(round_))
        state.save(6, 5, memory(6))
        assert state.rounds() == [5, 6]
        assert sorted(p.name for p in state.folder.iterdir()) == [
            "state-000005.safetensors",
            "state-000006.safetensors",
        ]
    finally:
        state.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that the kill leaves open
def test_a_kill_at_any_line_of_a_save_keeps_the_previous_states(tmp_path):
    files = ("flower/site/state.py", "storage/run_directory.py")
    at = 0
    while True:
        at += 1
        state = opened(tmp_path / str(at))
        state.save(2, 0, memory(2))
        state.save(5, 2, memory(5))
        try:
            with LineTracer(*files, kill=at):
                state.save(6, 5, memory(6))
            break
        except Killed:
            pass
        finally:
            state.close()
        assert_intact(tmp_path / str(at))
    assert at > 40, "the lines of the save were not traced"


@pytest.mark.parametrize("call", ["open", "fsync", "rename", "write"])
def test_a_full_disk_keeps_the_previous_states(tmp_path, saved, call):
    full = OSError(errno.ENOSPC, "No space left on device")
    targets = {
        "open": mock.patch("idiolect.storage.run_directory.open", side_effect=full, create=True),
        "fsync": mock.patch("os.fsync", side_effect=full),
        "rename": mock.patch("pathlib.Path.replace", side_effect=full),
        "write": mock.patch("os.open", side_effect=full),
    }
    with targets[call], pytest.raises(UsageError, match=r"cannot write .*No space left on device.* is intact"):
        saved.save(6, 5, memory(6))
    saved.close()
    assert_intact(tmp_path)


def test_fifty_kills_at_random_moments(tmp_path):
    """A child saves round after round until SIGKILL; the last state that it reported is there, and the lock is free."""
    for kill in range(50):
        folder, (reading, writing) = tmp_path / str(kill % 5), os.pipe()
        child = os.fork()
        if child == 0:
            try:
                state = opened(folder)
                played = state.newest(no_later=10**6)
                while True:
                    state.save(played + 1, played, memory(played + 1))
                    played += 1
                    os.write(writing, played.to_bytes(4, "little"))
            finally:
                os._exit(1)
        os.close(writing)
        os.read(reading, 4)  # it has saved a state
        time.sleep(GENERATOR.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        reported = b""
        while more := os.read(reading, 65536):
            reported += more
        os.close(reading)
        state = opened(folder)
        last = int.from_bytes(reported[-4:], "little") if reported else state.newest(no_later=10**6)
        assert last in state.rounds()
        for played in state.rounds():
            same(state.load(played), memory(played))
        state.close()


def test_a_folder_is_used_by_one_process_at_a_time(tmp_path, saved):
    child = os.fork()
    if child == 0:
        try:
            opened(tmp_path)
        except UsageError as error:
            os._exit(0 if f"is in use by process {os.getppid()}" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with pytest.raises(UsageError, match=rf"ward-a is in use by process {os.getpid()}: only one process"):
        opened(tmp_path, run="run-2")
    saved.close()
    opened(tmp_path)


def test_only_the_owner_can_read_the_files_of_a_site(tmp_path):
    """The mode of the files does not depend on the umask."""
    before = os.umask(0)
    try:
        world = World(tmp_path, methods.fedbn(), rounds=2)
        world.play()
    finally:
        os.umask(before)
    kept = [p for p in (tmp_path / "sites").rglob("*")]
    assert {p.name for p in kept} >= {"ada", world.run, "lock", "personal.safetensors", "state-000002.safetensors"}
    for path in kept:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_site_without_its_state_is_named_and_the_run_continues_without_it(tmp_path):
    world = World(tmp_path, methods.fedbn())
    world.grid.faults["ben", "train", 2] = [after(lambda: delete_states(world, "ben"))]
    coordinator = world.play()
    event = "no result: no state after round 2 in"
    assert [text[: len(event)] for client, text in world.events() if client == "ben"][1:] == [event] * 3
    assert [sorted(r.get("dropped", {})) for r in coordinator.records] == [[], [], ["ben"], ["ben"]]
    assert coordinator.clients["ben"].base_round == 2


def test_a_restored_site_continues_from_the_newest_state_that_is_not_later(tmp_path):
    """The state after round 1 replaces that after round 3; it is kept until a result counts."""
    world = World(tmp_path, methods.fedbn(), rounds=6, quorum=2, deadline=10)
    world.config["ben"] = {"restored": True}

    def backup():
        world.backup = state_path(world, 1).read_bytes()

    def restore():
        delete_states(world, "ben")
        state_path(world, 1).write_bytes(world.backup)

    world.grid.faults["ben", "train", 1] = [after(backup)]
    world.grid.faults["ben", "train", 3] = [after(restore, replies_late(60))]
    coordinator = world.play()
    assert [sorted(r.get("dropped", {})) for r in coordinator.records] == [[], [], [], ["ben"], [], []]
    federation = world.federation(absent={(3, "ben")})
    federation.play()
    backed_up = federation.memory.get("ben")
    for _ in range(3):
        federation.play()
    federation.memory.put("ben", backed_up)
    for _ in range(2):
        federation.play()
    assert_same(world, coordinator, federation)


def delete_states(world, client):
    for path in (world.folder / "sites" / client / world.run).glob("state-*"):
        path.unlink()


def state_path(world, after):
    return world.folder / "sites" / "ben" / world.run / f"state-{after:06}.safetensors"
