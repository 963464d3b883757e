"""Run directories: what is refused, what survives a kill, and that no damaged tensor is ever loaded."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from report_worlds import World

from idiolect.core.errors import UsageError
from idiolect.storage.run_directory import RunDirectory, read_run

TENSORS = {
    "weights": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "mask": torch.tensor([True, False]),
    "none": torch.zeros(0, 3),
}


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.write_config({"method": "FedBN", "seed": 3, "lr": 0.1})
    return run


def test_config_names_versions_platform_and_seed(run):
    card, records = read_run(run.path)
    assert card["config"] == {"method": "FedBN", "seed": 3, "lr": 0.1}
    assert card["seed"] == 3
    assert card["versions"]["torch"] == torch.__version__
    assert card["versions"]["numpy"] == np.__version__
    assert set(card["versions"]) == {"idiolect", "python", "torch", "numpy"}
    assert card["platform"]
    assert records == []


def test_records_come_back_as_written(run):
    written = World(clients=3, rounds=3, sensitivity=("a", "b")).records()
    for record in written:
        run.append(record)
        assert read_run(run.path)[1][-1] == record  # flushed: there before the next round begins
    assert read_run(run.path)[1] == written


def test_every_line_is_plain_json(run):
    run.append({"round": 1, "a": math.nan, "b": [math.inf, np.float32(0.5)], "c": torch.tensor(2), "d": "\u2028"})
    run.append({"round": 2, "cohort": ("x",)})

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse) for line in lines] == [
        {"round": 1, "a": None, "b": [None, 0.5], "c": 2, "d": "\u2028"},
        {"round": 2, "cohort": ["x"]},
    ]


def test_a_value_that_is_no_json_is_refused_and_leaves_no_line(run):
    with pytest.raises(UsageError, match="cannot write a set as JSON"):
        run.append({"round": 1, "cohort": {"a"}})
    assert read_run(run.path)[1] == []


def test_directories_that_are_not_free(tmp_path, run):
    with pytest.raises(UsageError, match="already holds a run: resume it, or choose another"):
        RunDirectory(run.path)
    (tmp_path / "thesis").mkdir()
    RunDirectory(tmp_path / "thesis")  # empty: free
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(UsageError, match="not empty and holds no run"):
        RunDirectory(tmp_path / "thesis")
    with pytest.raises(UsageError, match="is a file"):
        RunDirectory(tmp_path / "thesis" / "chapter.tex")


def test_only_a_run_of_ours_is_resumed(tmp_path, run):
    assert RunDirectory(run.path, resume=True).path == run.path
    with pytest.raises(UsageError, match="no run to resume"):
        RunDirectory(tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()
    (run.path / "config.json").write_text('{"name": "somebody\'s npm package"}')
    with pytest.raises(UsageError, match="not written by this version of idiolect"):
        RunDirectory(run.path, resume=True)
    (run.path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        read_run(run.path)


def test_a_line_torn_anywhere_is_left_out_and_said(run):
    run.append({"round": 1, "cohort": ["a"]})
    run.append({"round": 2, "cohort": ["a"]})
    file = run.path / "metrics.jsonl"
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first + 1, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.warns(UserWarning, match="left out the torn last line 2"):
            assert [r["round"] for r in read_run(run.path)[1]] == [1]
    for cut in (len(whole) - 1, len(whole)):  # only the newline is missing, or nothing
        file.write_bytes(whole[:cut])
        assert [r["round"] for r in read_run(run.path)[1]] == [1, 2]


def test_resume_after_a_torn_line_goes_on_with_a_clean_one(run):
    run.append({"round": 1})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2, "coh')
    with pytest.warns(UserWarning, match="torn last line"):
        resumed = RunDirectory(run.path, resume=True)
    resumed.append({"round": 2, "again": True})
    assert read_run(run.path)[1] == [{"round": 1}, {"round": 2, "again": True}]


def test_damage_before_the_last_line_is_refused(run):
    run.append({"round": 1})
    run.append({"round": 2})
    file = run.path / "metrics.jsonl"
    file.write_bytes(file.read_bytes().replace(b'{"round": 1}', b'{"round": 1'))
    with pytest.raises(UsageError, match=r"line 1 of .*metrics\.jsonl is damaged"):
        read_run(run.path)


def test_rewind_forgets_later_rounds(run):
    for t in (1, 2, 3, 4):
        run.append({"round": t})
    run.rewind(2)
    run.append({"round": 3, "again": True})
    assert read_run(run.path)[1] == [{"round": 1}, {"round": 2}, {"round": 3, "again": True}]


def test_tensors_come_back_bit_for_bit(run):
    run.save_tensors("server", TENSORS)
    loaded = run.load_tensors("server")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    run.save_tensors("empty", {})
    assert run.load_tensors("empty") == {}


def test_views_of_one_buffer_are_saved_and_do_not_share_after_loading(run):
    flat = torch.arange(10.0, requires_grad=True)
    run.save_tensors("flat", {"a": flat[:6].view(2, 3), "b": flat[6:], "all": flat})
    loaded = run.load_tensors("flat")
    loaded["all"].zero_()
    assert loaded["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert loaded["b"].tolist() == [6, 7, 8, 9]


def test_every_flipped_bit_and_every_truncation_is_refused(run):
    run.save_tensors("server", {"weights": torch.tensor([1.0, -2.0]), "steps": torch.tensor(3)})
    file = run.path / "server.safetensors"
    good = file.read_bytes()
    damaged = [good[:length] for length in range(len(good))] + [good + b"\0"]
    for bit in range(8 * len(good)):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(UsageError, match=re.escape(str(file))) as refusal:
            run.load_tensors("server")
        assert "\n" not in str(refusal.value)
    file.write_bytes(good)
    assert run.load_tensors("server")["weights"].tolist() == [1.0, -2.0]


def test_a_file_written_by_someone_else_is_refused(run):
    from safetensors.torch import save_file

    save_file({"weights": torch.ones(2)}, run.path / "server.safetensors")
    with pytest.raises(UsageError, match="SHA-256"):
        run.load_tensors("server")


def test_a_run_killed_before_its_config_is_begun_again(tmp_path):
    (tmp_path / ".config.json.tmp").write_bytes(b"{")
    RunDirectory(tmp_path).write_config({"seed": 0})
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_a_line_that_does_not_fit_is_one_line(run):
    (run.path / "metrics.jsonl").unlink(missing_ok=True)
    (run.path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        UsageError, match=r"cannot add a line to .*metrics.jsonl \(No space left on device\): make room"
    ):
        run.append({"round": 1})


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_write_that_fails_leaves_the_old_file(run, monkeypatch, step):
    run.save_tensors("server", {"weights": torch.ones(2)})

    def fail(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        with pytest.raises(UsageError, match=r"cannot write .*no space.*make room, then resume"):
            run.save_tensors("server", {"weights": torch.zeros(2)})
    assert run.load_tensors("server")["weights"].tolist() == [1.0, 1.0]
    run.save_tensors("server", {"weights": torch.zeros(2)})
    assert run.load_tensors("server")["weights"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x\n"])
def test_names_that_are_no_file_names(run, name):
    with pytest.raises(UsageError, match="cannot name a file of tensors"):
        run.save_tensors(name, {})


def test_a_missing_file_is_named(run):
    with pytest.raises(UsageError, match=r"server\.safetensors does not exist"):
        run.load_tensors("server")
