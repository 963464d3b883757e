"""The harness of the side-by-side timing: what is compared, refused and reported. No test looks at a clock."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import harness, report
from benchmarks.__main__ import main
from benchmarks.harness import Entrant, Entry, play
from benchmarks.workloads import WORKLOADS


def entry(runner: str, setting: str, steps: int = 24, moved: float = 1.0, seconds: float = 2.0) -> Entry:
    rounds = [{"seconds": s, "steps": steps, "cpu_seconds": 1.0, "moved": moved} for s in (99.0, seconds, seconds)]
    return Entry(runner, setting, rounds=rounds)


def test_tiny_takes_a_ragged_last_batch():
    assert WORKLOADS["tiny"].steps_per_round == 4 * 2 * 3


def test_w1_takes_nine_batches_in_each_of_ten_epochs():
    assert (WORKLOADS["w1"].steps_per_round, WORKLOADS["w2"].steps_per_round) == (900, 600)


ENTRANTS = [Entrant("bare", "2 processes"), Entrant("naive", "default threads"), Entrant("ours", "2 threads")]


@pytest.fixture(scope="module")
def contest(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    out = tmp_path_factory.mktemp("out") / "table.md"
    report.write(out, {("tiny", m): play(ENTRANTS, "tiny", m, rounds=1, timeout=60) for m in ("fedavg", "fedfsa")}, {})
    return out.read_text(), json.loads(out.with_suffix(".json").read_text())


@pytest.mark.slow
def test_every_runner_of_this_house_takes_the_same_steps_and_gets_a_ratio(contest):
    text, samples = contest
    assert [s["error"] for s in samples["samples"]] == [""] * 6
    assert {r["steps"] for s in samples["samples"] for r in s["rounds"]} == {24}
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(("| bare", "| naive", "| ours"))]
    assert len(rows) == 6
    assert all(re.fullmatch(r"\d+\.\d\d", row[4]) for row in rows)


@pytest.mark.slow
def test_runners_of_one_method_move_the_server_about_as_far(contest):
    for method in ("fedavg", "fedfsa"):
        moved = [s["rounds"][0]["moved"] for s in contest[1]["samples"] if s["method"] == method]
        assert max(moved) < 1.1 * min(moved)


@pytest.mark.slow
def test_no_path_or_host_is_written(contest):
    assert str(Path.home()) not in contest[0]
    assert str(harness.ROOT) not in json.dumps(contest[1])


def test_a_runner_that_does_not_know_its_setting_is_reported_and_the_rest_goes_on():
    entrants = [Entrant("bare", "no number"), Entrant("bare", "1 thread")]
    wrong, right = play(entrants, "tiny", "fedavg", rounds=1, timeout=60)
    assert "invalid literal for int() with base 10: 'no'" in wrong.error
    assert (len(wrong.rounds), len(right.rounds)) == (0, 2)


def test_last_words_name_no_folder(tmp_path):
    (lost,) = play([Entrant("fedfsa", "1 thread", checkout=tmp_path / "gone")], "tiny", "fedavg", rounds=1, timeout=60)
    assert lost.error == "ModuleNotFoundError: No module named 'training'"
    (lost,) = play([Entrant("bare", f"{tmp_path}/x thread")], "tiny", "fedavg", rounds=1, timeout=60)
    assert lost.error.endswith("'x'")


def test_a_runner_that_is_too_slow_is_reported():
    (slow,) = play([Entrant("bare", "1 thread")], "w2", "fedavg", rounds=1, timeout=0.01)
    assert slow.error == "no answer after 0.01 s"


def test_the_ratio_is_to_the_bare_loop_in_processes_and_leaves_the_warm_up_out():
    text = report.table("tiny", "fedavg", [entry("bare", "2 processes"), entry("ours", "2 threads", seconds=1.0)])
    assert "| bare | 2 processes | 12.0 | 12.0 to 12.0 | 1.00 |" in text
    assert "| ours | 2 threads | 24.0 | 24.0 to 24.0 | 2.00 |" in text


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (entry("pfllib", "1 thread", steps=20), "takes 20 steps a round, not 24: no ratio"),
        (entry("pfllib", "1 thread", moved=0.0), "the server's weights did not move: no ratio"),
        (entry("pfllib", "1 thread", moved=float("nan")), "the server's weights did not move: no ratio"),
    ],
)
def test_work_that_is_not_the_same_gets_no_ratio(other, why):
    row = report.table("tiny", "fedavg", [entry("bare", "2 processes"), other]).splitlines()[-1]
    assert row.split(" | ")[4] == ""
    assert why in row


def test_a_peer_needs_a_path_that_exists(capsys):
    with pytest.raises(SystemExit):
        main(["--peer", "pfllib=/there/is/no/such"])
    assert "a path that exists" in capsys.readouterr().err
