"""Sites and simulation give the same models, memories, server state and records, bit for bit."""

import itertools
import random

import pytest

pytest.importorskip("flwr")

from flower_grid import replies_late
from flower_worlds import World, assert_same
from test_methods import CATALOG

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
    methods.fedamp(strength=0.5),  # messages to single clients
    methods.fedpac(strength=0.7),
    methods.pfedsim(warmup=1),
    methods.fedbn() + parts.critical_mix(top=0.3, rounds=4),
    methods.fedadam(),  # an optimizer on the server
    methods.fedgloss(rho=0.1, strength=0.3, rho_local=0.1),  # the broadcast differs from the shared weights
    methods.fedbn() + parts.relaxed_start() + parts.control_variates(),
    methods.fedsmoo(rho=0.1, strength=0.3),  # private tensors
    methods.fedrod(),  # a second, personal head
    methods.fedper(),
    methods.knnper(neighbors=3, capacity=12),  # buffers that are filled for prediction only
    methods.fedavg_ft(scope.head, epochs=1),
]


@pytest.mark.parametrize("method", SEVERAL, ids=lambda m: m.name)
def test_rounds_equal_those_of_the_simulation(tmp_path, method):
    world = World(tmp_path, method, sizes=RAGGED, participation=0.6, rounds=3)
    coordinator, run = world.play(), world.simulated()
    assert_same(world, coordinator, run.federation)
    assert_same_records(coordinator, run)


@pytest.mark.parametrize("method", CATALOG, ids=lambda m: m.name)
def test_every_method_of_the_catalog(tmp_path, method):
    world = World(tmp_path, method, rounds=2, sizes={"ada": 9, "ben": 3})
    coordinator, run = world.play(), world.simulated()
    assert_same(world, coordinator, run.federation)
    assert_same_records(coordinator, run)


@pytest.mark.parametrize("method", [methods.fedavg(), methods.fedpac(strength=0.7)], ids=lambda m: m.name)
def test_the_order_of_arrival_changes_nothing(tmp_path, method):
    world, generator = World(tmp_path, method, sizes=RAGGED), random.Random(3)
    for played, client in itertools.product(range(world.rounds), world.clients):
        world.grid.faults[client, "train", played] = [replies_late(generator.uniform(1, 20))]
    coordinator, run = world.play(), world.simulated()
    assert_same(world, coordinator, run.federation)
    assert_same_records(coordinator, run)


def test_bytes_are_those_of_the_simulation_plus_the_headers_of_tensors(tmp_path):
    world = World(tmp_path, methods.fedbn() + parts.sam(0.1) + parts.control_variates(), rounds=2)
    coordinator, run = world.play(), world.simulated()
    headers = HEADER * len(world.clients)
    up, down = (sum(map(len, trees.values())) for trees in (coordinator._upload_layouts, coordinator.sent("train")))
    for found, expected in zip(coordinator.records, run.records, strict=True):
        assert found["bytes_up"] == expected["bytes_up"] + headers * up
        assert found["bytes_down"] == expected["bytes_down"] + headers * down


def test_shared_weights_for_prediction_are_sent_only_if_they_differ_from_the_broadcast(tmp_path):
    for method, twice in ((methods.fedavg(), False), (methods.fedgloss(rho=0.1, strength=0.3), True)):
        world = World(tmp_path / method.name, method, rounds=2, evaluate_every=2)
        coordinator = world.play()
        with world.timed():
            evaluating = set(coordinator._instructions(evaluate=True)("ada").array_records)
            training = set(coordinator._instructions(evaluate=False)("ada").array_records)
        assert evaluating - training == ({"deploy/share"} if twice else set())


def test_evaluation_follows_its_interval_and_all_sites_evaluate_the_last_round(tmp_path):
    world = World(tmp_path, methods.fedavg(), rounds=5, participation=0.5, evaluate_every=2)
    coordinator, run = world.play(), world.simulated()
    assert_same(world, coordinator, run.federation)
    evaluated = {r["round"]: sorted(r["clients"]) for r in coordinator.records if "personalized" in r}
    cohorts = {r["round"]: r["cohort"] for r in coordinator.records}
    assert evaluated == {2: cohorts[3], 4: cohorts[5], 5: sorted(world.clients)}


def test_sites_evaluate_on_the_splits_that_they_have(tmp_path):
    world = World(tmp_path, methods.fedbn(), rounds=2)
    for client, splits in (("ben", ("train",)), ("cleo", ("train", "val", "test"))):
        data = {"val": world.clients[client].test} | world.clients[client].splits()
        world.clients[client] = ClientData(**{split: data[split] for split in splits})
    coordinator, run = world.play(), world.simulated()
    assert_same(world, coordinator, run.federation)
    assert_same_records(coordinator, run)
    assert set(coordinator.records[-1]["personalized"]) == {"val", "test"}


def test_the_directory_holds_config_metrics_report_and_status(tmp_path):
    world = World(tmp_path, methods.fedbn(), rounds=2, report=True)
    coordinator = world.play()
    config, records = read_run(world.folder / "run")
    assert config["config"] == coordinator.config()
    assert [r["round"] for r in records] == [1, 2]
    assert "FedBN, 4 sites" in (coordinator.directory / "report.html").read_text()
    status = world.status()
    assert (status["phase"], status["round"], status["rounds"]) == ("done", 2, 2)
    assert {c: s["examples"] for c, s in status["sites"].items()} == dict(world.sizes)
    assert {s["state"] for s in status["sites"].values()} == {"ready"}
    lines = [text for client, text in world.events() if not client]
    assert lines[-1].startswith("done: 4 of 4 sites have their final models; the report is ")


def assert_same_records(coordinator, run):
    """Assert that all numbers agree that both records have: a site evaluates when it takes part, and at the end."""
    assert len(coordinator.records) == len(run.records)
    for found, expected in zip(coordinator.records, run.records, strict=True):
        for key in ("round", "cohort", "lr", "train_loss", "gradients"):
            assert found[key] == expected[key], (found["round"], key)
        assert "dropped" not in found
        for client, scores in found["clients"].items():
            assert scores == expected["clients"][client], (found["round"], client)
        if found["clients"].keys() == expected["clients"].keys():
            assert found["personalized"] == expected["personalized"]
            assert found["generalized"] == expected["generalized"]
    assert coordinator.records[-1]["clients"].keys() == coordinator.clients._clients.keys()
    assert read_run(coordinator.directory)[1] == coordinator.records
