"""Personal state: both stores against a dict; kills, full disks and damaged files; what it costs in RAM and files."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import idiolect
from idiolect import Machine, Output, methods
from idiolect.core.errors import UsageError
from idiolect.core.tree import EMPTY, Tree
from idiolect.storage import checkpoint
from idiolect.storage.disk import DiskStore, store_for
from idiolect.storage.memory import RamStore
from idiolect.storage.run_directory import RunDirectory
from idiolect.testing.checks import same, same_state
from idiolect.testing.worlds import federation, network, population

FRESH = {"share": Tree.of({"w": torch.zeros(2, 3), "b": torch.zeros(1)}), "none": EMPTY}
CLIENTS = ["ada", "ben", "ward/7", "", "é\n", "\ud800"]


def memory(value):
    tree = Tree.of({"w": torch.arange(6.0).reshape(2, 3) + value, "b": torch.tensor([value])})
    return {"share": tree, "none": EMPTY}


class Stores(RuleBasedStateMachine):
    """Puts, checkpoints and crashes in any order: a store has what a dict has."""

    make = staticmethod(lambda folder: RamStore(FRESH, block_bytes=60))  # two clients

    @initialize()
    def start(self):
        self.folder = DiskStore(FRESH)  # only for a folder that goes with the test
        self.store = self.make(self.folder._folder)
        self.state, self.kept, self.checkpointed = {}, {}, {}

    @rule(client=st.sampled_from(CLIENTS), value=st.floats(min_value=-1e6, max_value=1e6, width=32))
    def put(self, client, value):
        self.store.put(client, memory(value))
        self.kept[client] = value

    @rule()
    def save(self):
        self.state, self.checkpointed = self.store.save(), dict(self.kept)
        self.store.saved()

    @rule()
    def save_is_cut_short(self):
        self.store.save()

    @rule()
    def crash(self):
        self.store = self.make(self.folder._folder)
        self.store.load(self.state)
        self.kept = dict(self.checkpointed)

    @invariant()
    def all_is_there(self):
        assert set(self.store) == set(self.kept)
        for client in CLIENTS:
            assert (client in self.store) == (client in self.kept)
            same(self.store.get(client), memory(self.kept[client]) if client in self.kept else FRESH)


class DiskStores(Stores):
    make = staticmethod(lambda folder: DiskStore(FRESH, folder, segment_bytes=60))  # three clients


Stores.TestCase.settings = DiskStores.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestRam, TestDisk = Stores.TestCase, DiskStores.TestCase


@pytest.mark.parametrize("make", [RamStore, DiskStore])
def test_what_is_put_or_got_is_a_copy(make):
    store, mine = make(FRESH), memory(1.0)
    store.put("ada", mine)
    mine["share"].flat.zero_()
    got = store.get("ada")
    same(got, memory(1.0))
    store.put("ada", memory(2.0))
    same(got, memory(1.0))


def test_a_memory_of_another_form_is_refused():
    store = RamStore(FRESH)
    other = Tree.of({"b": torch.zeros(1), "w": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"share: the memory of a client changed from Tree\(w .*, b .*to Tree\(b"):
        store.put("ada", {"share": other, "none": EMPTY})
    assert "ada" not in store


def test_a_fork_cannot_change_the_memories_of_its_parent():
    store = RamStore(FRESH)
    store.put("ada", memory(1.0))
    child = os.fork()
    if child == 0:
        try:
            same(store.get("ada"), memory(1.0))
            store.put("ada", memory(2.0))
        except RuntimeError:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    same(store.get("ada"), memory(1.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_keep_their_bits(tmp_path, dtype):
    values = Tree.of({"w": torch.tensor([1 / 3, -0.0, float("inf")], dtype=dtype)})
    store = DiskStore({"share": Tree.of({"w": torch.zeros(3, dtype=dtype)})}, tmp_path)
    store.put("ada", {"share": values})
    store.save()
    assert "ada" not in store._waiting
    assert torch.equal(store.get("ada")["share"].flat.view(torch.uint8), values.flat.view(torch.uint8))


def test_files_of_the_checkpoint_on_disk_stay_until_there_is_another(tmp_path):
    store = DiskStore(FRESH, tmp_path / "memory")
    store.put("ada", memory(1.0))
    on_disk = store.save()
    store.saved()
    store.put("ada", memory(2.0))
    store.save()  # and killed before it is on disk
    again = DiskStore(FRESH, tmp_path / "memory")
    again.load(on_disk)
    same(again.get("ada"), memory(1.0))


def test_files_are_bounded_by_what_is_live(tmp_path):
    """Thousands of puts, each of which makes a row stale."""
    store, generator = DiskStore(FRESH, tmp_path, segment_bytes=28 * 50), random.Random(0)
    latest = {}
    for turn in range(6000):
        client = f"c{generator.randrange(300)}"
        store.put(client, memory(float(turn)))
        latest[client] = float(turn)
        if turn % 40 == 0:
            store.save()
            store.saved()
    segments = list(tmp_path.iterdir())
    rows = sum(segment.rows for segment in store._segments.values())
    assert rows <= 2 * len(latest)
    assert {int(path.stem) for path in segments} == set(store._segments)
    assert len(segments) < 30
    for client, value in latest.items():
        same(store.get(client), memory(value))


def test_a_checkpoint_does_not_grow_with_the_population():
    store = DiskStore(FRESH)
    for i in range(20_000):
        store.put(f"c{i}", memory(float(i)))
    assert sum(t.numel() * t.element_size() for t in store.save().values()) < 200


DAMAGE = {
    "truncated": lambda data: data[: len(data) - 10],
    "cut in the header": lambda data: data[:20],
    "empty": lambda data: b"",
    "a length that lies": lambda data: b"\xff" * 8 + data[8:],
}


def kept_on_disk(folder):
    store = DiskStore(FRESH, folder)
    for client in ("ada", "ben"):
        store.put(client, memory(1.0))
    return store, store.save(), folder / "00000001.safetensors"


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_segment_is_named(tmp_path, how):
    store, state, file = kept_on_disk(tmp_path)
    file.write_bytes(DAMAGE[how](file.read_bytes()))
    with pytest.raises(UsageError, match=r"00000001.safetensors is missing or damaged: go back"):
        DiskStore(FRESH, tmp_path).load(state)
    if how != "truncated":  # what is cut off there are names alone
        with pytest.raises(UsageError, match=r"the memory of client 'ben' in .*00000001.safetensors is missing or dam"):
            store.get("ben")
    file.unlink()
    with pytest.raises(UsageError, match=r"client 'ada' in .* is missing or damaged"):
        store.get("ada")


def test_no_flipped_bit_is_ever_loaded(tmp_path):
    _, state, file = kept_on_disk(tmp_path)
    whole = file.read_bytes()
    refused = 0
    for place in range(0, len(whole) * 8, 7):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        file.write_bytes(data)
        try:
            again = DiskStore(FRESH, tmp_path)
            again.load(state)
            for client in ("ada", "ben"):
                same(again.get(client), memory(1.0))
        except UsageError:
            refused += 1
    assert refused > 0.5 * len(range(0, len(whole) * 8, 7))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch, step):
    store = RunDirectory(tmp_path / "run")
    store.write_config({})
    keep = partial(store_for, "disk", store.path, 4)
    made = federation(methods.fedbn(), keep=keep)
    made.play()
    checkpoint.save(store, made)
    made.play()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync" if step == "fsync" else "pathlib.Path.replace", full)
        with pytest.raises(UsageError, match=r"cannot write .*00000002.* \(No space left on device\): make room") as e:
            checkpoint.save(store, made)
    assert "\n" not in str(e.value)
    resumed = federation(methods.fedbn(), keep=keep)
    checkpoint.restore(store, resumed, {})
    once = federation(methods.fedbn())
    once.play()
    same_state(resumed, once)
    once.play()
    same_state(made, once)  # nor has the run itself lost anything
    checkpoint.save(store, made)
    checkpoint.restore(store, resumed, {})
    same_state(resumed, once)


def run(folder, memory="disk", resume=False):
    machine, output = Machine(memory=memory), Output(folder, resume, report=False)
    return idiolect.fit(
        network(), population(), methods.fedbn(), rounds=12, participation=0.5, machine=machine, output=output
    )


def test_killed_at_any_moment_and_resumed_it_ends_as_undisturbed(tmp_path):
    whole, generator, kills = run(tmp_path / "whole"), random.Random(1), 0
    code = "import sys, torch; torch.set_num_threads(1); sys.path.insert(0, 'tests'); import test_memory as t\n"
    code += "print('ready', flush=True); t.run(sys.argv[1], resume=sys.argv[2] == 'True')"
    for _ in range(5):
        begun = (tmp_path / "cut" / "config.json").exists()
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "cut"), str(begun)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout.readline() == "ready\n"
        time.sleep(generator.uniform(0.05, 0.4))
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
        child.stdout.close()
    assert kills >= 2
    resumed = run(tmp_path / "cut", resume=(tmp_path / "cut" / "config.json").exists())
    same_state(whole.federation, resumed.federation)
    left = {path.name for path in (tmp_path / "cut" / "memory").iterdir()}
    assert left == {path.name for path in (tmp_path / "whole" / "memory").iterdir()}


EVENTS = {"open", "os.rename", "os.remove", "os.mkdir"}


def killed_at(moment, folder):
    """Run in a fork that dies at its n-th event on a file of the run, or goes through; return whether it died."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    seen = 0

    def count(event, arguments):
        nonlocal seen
        if event in EVENTS and str(folder) in str(arguments[0]):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    try:
        run(folder, resume=(folder / "config.json").exists())
    finally:
        os._exit(0)


@pytest.mark.parametrize("moment", [1, 2, 3, 4, 5, 7, 9, 12, 14, 17, 20, 26, 33, 41, 50])
def test_killed_at_a_file_and_resumed_it_ends_as_undisturbed(tmp_path, whole, moment):
    """The process dies before it opens, renames or removes its n-th file, twice; the run still ends the same."""
    assert killed_at(moment, tmp_path / "cut")
    killed_at(moment, tmp_path / "cut")
    resumed = run(tmp_path / "cut", resume=(tmp_path / "cut" / "config.json").exists())
    same_state(whole.federation, resumed.federation)
    assert not list((tmp_path / "cut").rglob(".*.tmp"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole") / "run")


def test_which_store_and_resume_with_the_other(tmp_path, monkeypatch):
    fresh = {"share": Tree.of({"w": torch.zeros(250)})}
    monkeypatch.setattr("idiolect.storage.disk.ram", lambda: 800_000)
    assert isinstance(store_for("auto", None, 100, "memory", fresh), RamStore)
    assert isinstance(store_for("auto", None, 101, "memory", fresh), DiskStore)
    assert isinstance(store_for("ram", None, 101, "memory", fresh), RamStore)
    with pytest.raises(UsageError, match="memory is 'auto', 'ram' or 'disk', got 'tape'"):
        store_for("tape", None, 1, "memory", fresh)
    monkeypatch.undo()
    whole = run(tmp_path / "ram", memory="ram")
    on_disk = run(tmp_path / "disk")
    same_state(whole.federation, on_disk.federation)
    assert (tmp_path / "ram" / "personal.safetensors").exists()
    assert not (tmp_path / "disk" / "personal.safetensors").exists()
    same_state(whole.federation, run(tmp_path / "ram", memory="disk", resume=True).federation)
    assert isinstance(run(tmp_path / "disk", memory="auto", resume=True).federation.memory, DiskStore)
    with pytest.raises(UsageError, match="resume it with memory='disk'"):
        run(tmp_path / "disk", memory="ram", resume=True)


def test_a_temporary_folder_goes_with_its_store_and_not_with_a_fork(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = DiskStore(FRESH)
    store.put("ada", memory(1.0))
    store.save()
    child = os.fork()
    if child == 0:
        del store
        os._exit(0)
    os.waitpid(child, 0)
    same(store.get("ada"), memory(1.0))
    del store
    assert not list(tmp_path.iterdir())


GROWTH = """
import resource, sys, torch
from idiolect.storage.disk import DiskStore
from idiolect.core.tree import Tree
torch.set_num_threads(1)
store = DiskStore({"share": Tree.of({"w": torch.zeros(2000)})}, segment_bytes=2**21)
row = torch.ones(2000)
for i in range(int(sys.argv[1])):
    store.put(f"client-{i}", {"share": Tree.of({"w": row * i})})
for i in range(0, int(sys.argv[1]), 7):
    assert store.get(f"client-{i}")["share"]["w"][5].item() == i
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_ram_does_not_grow_with_the_population():
    """20 000 clients of 8 kB, 160 MB together, cost the index alone more than 1 000 do."""

    def peak(clients):
        done = subprocess.run([sys.executable, "-c", GROWTH, str(clients)], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert peak(20_000) - peak(1_000) < 25
