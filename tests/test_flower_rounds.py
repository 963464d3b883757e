"""A federation of sites is the simulation of the same clients, bit for bit: models, memories, slots and records."""

import itertools
import random

import pytest

pytest.importorskip("flwr")

from flower_net import late
from flower_worlds import World, same
from test_methods import CATALOGUE

from idiolect import ClientData, methods, parts, scope
from idiolect.storage.run_directory import read_run
from idiolect.testing.worlds import RAGGED

HEADER = 128
"""Bytes that NumPy's format puts before the values of a tensor."""

SEVERAL = [
    methods.fedavg(),
    methods.fedbn(),
    methods.mofedsam(rho=0.1, alpha=0.4),
    methods.fedfsa(rho=0.05, rho_larger=0.4, alpha=0.5, top=1),
    methods.scaffold(),
    methods.ditto(strength=0.5),
    methods.fedamp(strength=0.5),  # mail
    methods.fedpac(strength=0.7),
    methods.pfedsim(warmup=1),
    methods.fedbn() + parts.critical_mix(top=0.3, rounds=4),
    methods.fedadam(),  # a step of the server
    methods.fedgloss(rho=0.1, strength=0.3, rho_local=0.1),  # what is broadcast is not what is shared
    methods.fedbn() + parts.relaxed_start() + parts.control_variates(),
    methods.fedsmoo(rho=0.1, strength=0.3),  # private tensors
    methods.fedrod(),  # a personal head beside
    methods.fedper(),
    methods.knnper(neighbors=3, capacity=12),  # buffers that only predictions have
    methods.fedavg_ft(scope.head, epochs=1),
]


@pytest.mark.parametrize("method", SEVERAL, ids=lambda m: m.name)
def test_rounds_are_those_of_the_simulation(tmp_path, method):
    world = World(tmp_path, method, sizes=RAGGED, participation=0.6, rounds=3)
    made, run = world.play(), world.simulated()
    same(world, made, run.federation)
    same_records(made, run)


@pytest.mark.parametrize("method", CATALOGUE, ids=lambda m: m.name)
def test_every_method_of_the_catalogue(tmp_path, method):
    world = World(tmp_path, method, rounds=2, sizes={"ada": 9, "ben": 3})
    made, run = world.play(), world.simulated()
    same(world, made, run.federation)
    same_records(made, run)


@pytest.mark.parametrize("method", [methods.fedavg(), methods.fedpac(strength=0.7)], ids=lambda m: m.name)
def test_the_order_in_which_results_come_changes_nothing(tmp_path, method):
    world, dice = World(tmp_path, method, sizes=RAGGED), random.Random(3)
    for played, client in itertools.product(range(world.rounds), world.clients):
        world.net.plan[client, "train", played] = [late(dice.uniform(1, 20))]
    made, run = world.play(), world.simulated()
    same(world, made, run.federation)
    same_records(made, run)


def test_bytes_are_those_of_the_simulation_and_the_headers_of_the_tensors(tmp_path):
    world = World(tmp_path, methods.fedbn() + parts.sam(0.1) + parts.control_variates(), rounds=2)
    made, run = world.play(), world.simulated()
    headers = HEADER * len(world.clients)
    up, down = (sum(map(len, slots.values())) for slots in (made._uploads, made.sent("train")))
    for found, wanted in zip(made.records, run.records, strict=True):
        assert found["bytes_up"] == wanted["bytes_up"] + headers * up
        assert found["bytes_down"] == wanted["bytes_down"] + headers * down


def test_what_is_broadcast_to_predict_is_sent_only_where_it_differs(tmp_path):
    for method, twice in ((methods.fedavg(), False), (methods.fedgloss(rho=0.1, strength=0.3), True)):
        world = World(tmp_path / method.name, method, rounds=2, evaluate_every=2)
        made = world.play()
        with world.timed():
            keys = set(made._content(evaluate=True)("ada").array_records)
            plain = set(made._content(evaluate=False)("ada").array_records)
        assert keys - plain == ({"deploy/share"} if twice else set())


def test_evaluation_follows_its_interval_and_the_last_round_is_measured_by_all(tmp_path):
    world = World(tmp_path, methods.fedavg(), rounds=5, participation=0.5, evaluate_every=2)
    made, run = world.play(), world.simulated()
    same(world, made, run.federation)
    measured = {r["round"]: sorted(r["clients"]) for r in made.records if "personalized" in r}
    cohorts = {r["round"]: r["cohort"] for r in made.records}
    assert measured == {2: cohorts[3], 4: cohorts[5], 5: sorted(world.clients)}


def test_a_site_without_test_examples_trains_and_one_with_validation_measures_on_both(tmp_path):
    world = World(tmp_path, methods.fedbn(), rounds=2)
    for client, splits in (("ben", ("train",)), ("cleo", ("train", "val", "test"))):
        data = {"val": world.clients[client].test} | world.clients[client].splits()
        world.clients[client] = ClientData(**{split: data[split] for split in splits})
    made, run = world.play(), world.simulated()
    same(world, made, run.federation)
    same_records(made, run)
    assert set(made.records[-1]["personalized"]) == {"val", "test"}


def test_a_directory_tells_it_all(tmp_path):
    """config.json, one line a round, a report; the status of a run that is done."""
    world = World(tmp_path, methods.fedbn(), rounds=2, report=True)
    made = world.play()
    config, records = read_run(world.folder / "run")
    assert config["config"] == made.config()
    assert [r["round"] for r in records] == [1, 2]
    assert "FedBN, 4 sites" in (made.directory / "report.html").read_text()
    status = world.status()
    assert (status["phase"], status["round"], status["rounds"]) == ("done", 2, 2)
    assert {c: s["examples"] for c, s in status["sites"].items()} == dict(world.sizes)
    assert {s["state"] for s in status["sites"].values()} == {"ready"}
    lines = [what for client, what in world.events() if not client]
    assert lines[-1].startswith("done: 4 of 4 sites hold their final models; the report is ")


def same_records(made, run):
    """Every number of every round that both know; sites measure when they take part, and all at the end."""
    assert len(made.records) == len(run.records)
    for found, wanted in zip(made.records, run.records, strict=True):
        for key in ("round", "cohort", "lr", "train_loss", "gradients"):
            assert found[key] == wanted[key], (found["round"], key)
        assert "dropped" not in found
        for client, scores in found["clients"].items():
            assert scores == wanted["clients"][client], (found["round"], client)
        if found["clients"].keys() == wanted["clients"].keys():
            assert found["personalized"] == wanted["personalized"]
            assert found["generalized"] == wanted["generalized"]
    assert made.records[-1]["clients"].keys() == made.memory._clients.keys()
    assert read_run(made.directory)[1] == made.records
