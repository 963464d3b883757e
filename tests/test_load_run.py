"""A run lasts: another process loads it and predicts the same bits; more rounds give the same bits as one run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_methods import CATALOG
from torch.nn import functional as F

from idiolect import Cosine, Exponential, Machine, Output, Training, UsageError, fit, load_run, methods, part
from idiolect.cli.main import main
from idiolect.core.part import Part
from idiolect.running.evaluation import evaluate_all
from idiolect.storage.run_directory import read_run
from idiolect.testing.checks import same_state
from idiolect.testing.worlds import fitted, network, population

ROOT = Path(__file__).parents[1]
QUICK = [methods.fedbn(), methods.fedfsa(), methods.fedrep(), methods.pfedhn(), methods.fedthe(), methods.fedsa_lora()]
ELSEWHERE = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
import idiolect
from idiolect.testing.worlds import fitted, network, population
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    run = idiolect.load_run(folder, fitted(network(), folder.joinpath("config.json").read_text()), population())
    for client, data in population().items():
        found[f"{folder.name}/{client}"] = run.personal(client)(data.test.x).contiguous()
save_file(found, sys.argv[2])
"""


def trained(method, rounds=2, model=None, **settings):
    return fit(model or fitted(network(), method), population(), method, rounds=rounds, **settings)


def assert_same_runs(one, other):
    same_state(one.federation, other.federation)
    assert [r["round"] for r in one.records] == [r["round"] for r in other.records]
    assert [r["train_loss"] for r in one.records] == [r["train_loss"] for r in other.records]


@pytest.mark.parametrize("every", [QUICK, pytest.param(CATALOG, marks=pytest.mark.slow)], ids=["some", "all"])
def test_another_process_predicts_the_same_bits(every, tmp_path):
    expected = {}
    for k, method in enumerate(every):
        folder = tmp_path / "runs" / f"{k:03}"
        run = trained(method, participation=0.6, output=Output(folder, report=False))
        for client, data in population().items():
            expected[f"{folder.name}/{client}"] = run.personal(client)(data.test.x)
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "runs"), str(tmp_path / "found")]
    subprocess.run(command, check=True, cwd=ROOT, timeout=900)
    found = load_file(tmp_path / "found")
    assert set(found) == set(expected)
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("memory", ["ram", "disk"])
def test_a_loaded_run_is_the_run_and_nothing_is_written(memory, tmp_path):
    machine = Machine(memory=memory)
    run = trained(methods.fedbn(), output=Output(tmp_path / "run", about={"ward": "north"}), machine=machine)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:  # as if the process had died before the checkpoint
        file.write(json.dumps(run.records[-1] | {"round": 3}) + "\n")
    if memory == "disk":  # or goes on
        (tmp_path / "run" / "memory" / "99999999.safetensors").write_bytes(b"later")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    again = load_run(tmp_path / "run", network(), population(), machine=machine)
    assert_same_runs(again, run)
    assert again.table().equals(run.table())
    assert again.config() == run.config()
    assert torch.equal(*(r.new_client()(population()["ada"].test.x) for r in (again, run)))
    again.report(tmp_path / "again.html")
    (tmp_path / "again.html").unlink()
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("method", [methods.fedbn(), methods.fedfsa(), methods.scaffold(), methods.pfedhn()], ids=repr)
@pytest.mark.parametrize("how", ["loaded", "in memory", "resumed"])
def test_more_rounds_are_those_of_one_run(method, how, tmp_path):
    settings = {"participation": 0.6, "training": Training(lr=0.1, schedule=Exponential(0.9))}
    whole = trained(method, rounds=5, **settings)
    output = Output(tmp_path / "run", report=False)
    run = trained(method, rounds=2, output=Output() if how == "in memory" else output, **settings)
    if how == "resumed":
        run = trained(method, rounds=5, output=Output(tmp_path / "run", resume=True), **settings)
    else:
        run = run if how == "in memory" else load_run(tmp_path / "run", network(), population())
        run.play(3)
    assert_same_runs(run, whole)
    if how != "in memory":
        assert (tmp_path / "run" / "report.html").exists()
        assert read_run(tmp_path / "run")[0]["config"]["rounds"] == 5
        assert_same_runs(load_run(tmp_path / "run", network(), population()), whole)


def test_a_schedule_of_the_whole_run_refuses_more_rounds(tmp_path):
    training, output = Training(lr=0.1, schedule=Cosine()), Output(tmp_path / "run", report=False)
    run = trained(methods.fedavg(), training=training, output=output)
    with pytest.raises(UsageError, match=r"schedule Cosine\(.*\) depends on the number of rounds: with 3"):
        run.play(1)
    assert (run.round, run.federation.rounds) == (2, 2)
    with pytest.raises(UsageError, match="other settings: rates was"):
        trained(methods.fedavg(), 3, training=training, output=Output(tmp_path / "run", resume=True))
    with pytest.raises(UsageError, match="other settings: rounds was 2, is 1"):
        trained(methods.fedavg(), 1, training=training, output=Output(tmp_path / "run", resume=True))


def test_one_program_starts_and_restarts(tmp_path):
    output = Output(tmp_path / "run", resume="auto", report=False)
    for rounds in (2, 2, 4):
        run = trained(methods.fedbn(), rounds, output=output)
    assert_same_runs(run, trained(methods.fedbn(), 4))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and holds no run"):
        trained(methods.fedbn(), output=Output(tmp_path / "other", resume="auto"))
    with pytest.raises(UsageError, match="resume='always' is not"):
        Output(tmp_path, resume="always")


@part
def shorter(share: float = 0.5) -> Part:
    """Shorten every step."""
    return Part(direction=lambda direction, weights, local: share * direction)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model": network(5)}, "initial was"),
        ({"clients": population({"ada": 24, "ben": 9})}, "clients was 4, is 2"),
        ({"loss": lambda output, y: F.cross_entropy(output, y)}, "loss was 'cross_entropy', is"),
        ({"method": methods.fedbn()}, "method was"),
        ({"training": Training(lr=0.3)}, "training was"),
        ({"metrics": []}, r"metrics was \['accuracy'\], is \[\]"),
        ({"method": None}, "method of the run has something of your own: give method="),
    ],
)
def test_what_differs_is_named(change, line, tmp_path):
    trained(methods.fedavg() + shorter(), output=Output(tmp_path, report=False))
    given = {"model": network(), "clients": population(), "method": methods.fedavg() + shorter()}
    load_run(tmp_path, **given)
    with pytest.raises(UsageError, match=line) as caught:
        load_run(tmp_path, **(given | change))
    assert "\n" not in str(caught.value)


def test_a_run_of_the_command_line_needs_its_directory_alone(tmp_path):
    folder, flags = tmp_path / "run", "--method fedbn --clients 3 --size 90 --rounds 2 --seed 3 --lr 0.1"
    assert main(["run", *flags.split(), "--directory", str(folder)]) == 0
    run = load_run(folder)
    expected = read_run(folder)[1][-1]["personalized"]["test"]["accuracy"]["mean"]
    assert evaluate_all(run.federation, run.metrics)["personalized"]["test"]["accuracy"]["mean"] == expected
    assert run.about["command"].startswith("idiolect run --clients 3")
    run.play(1)
    assert [record["round"] for record in read_run(folder)[1]] == [1, 2, 3]
    with pytest.raises(UsageError, match="needs both the model and the clients: clients is missing"):
        load_run(folder, network())


def test_a_folder_without_a_run_is_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"is no run directory: it has no config\.json"):
        load_run(tmp_path / "nothing", network(), population())
    trained(methods.fedavg(), output=Output(tmp_path / "run", report=False))
    with pytest.raises(UsageError, match=r"was written from Python: give the module and the clients, load_run\("):
        load_run(tmp_path / "run")
