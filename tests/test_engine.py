"""The reference engine and `fit`: who trains on what, what is kept, measured and written."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import idiolect
from idiolect import ClientData, Machine, Metric, Output, Training, UsageError, methods, scope
from idiolect.compute.autograd import Model
from idiolect.compute.metrics import accuracy, evaluate
from idiolect.data import Examples
from idiolect.engines.stacked import Stacked
from idiolect.rounds.batches import Shuffled
from idiolect.running.evaluation import evaluate_all
from idiolect.storage.run_directory import read_run
from idiolect.testing.checks import same_state
from idiolect.testing.worlds import SIZES, examples, federation, network, population

WEIGHTS = 3 * 9 + 3 + 6 + 48 * 6 + 6 + 6 * 3 + 3  # trainable values of the test network
NORMALIZATION = 12  # scale, shift, mean and variance of three channels


def quick(method, rounds=3, **more):
    settings = {"training": Training(lr=0.1, batch_size=8), "rounds": rounds, **more}
    return idiolect.fit(network(), population(), method, **settings)


def test_every_epoch_has_every_example_once_in_an_order_of_its_own():
    x = torch.arange(10.0)
    batches = Shuffled(Examples(x, x.long()), 4, False, (0, "train", "ada", 3)).epochs(3)
    assert [len(b.y) for b in batches] == [4, 4, 2] * 3
    orders = [torch.cat([b.y for b in batches[i : i + 3]]).tolist() for i in (0, 3, 6)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert len({b.key for b in batches}) == 9
    again = Shuffled(Examples(x, x.long()), 4, False, (0, "train", "ada", 3)).epochs(3)
    assert [b.y.tolist() for b in again] == [b.y.tolist() for b in batches]


@pytest.mark.parametrize(
    ("count", "size", "batch_norm", "expected"),
    [
        (9, 4, True, [4, 5]),
        (9, 4, False, [4, 4, 1]),
        (9, None, True, [9]),
        (9, 20, True, [9]),
        (1, 4, True, [1]),
        (5, 4, True, [5]),
        (2, 1, False, [1, 1]),
    ],
)
def test_sizes_of_batches(count, size, batch_norm, expected):
    batches = Shuffled(Examples(torch.zeros(count, 2), torch.zeros(count)), size, batch_norm, (0,)).epochs(1)
    assert [len(b.y) for b in batches] == expected
    assert [b.frozen for b in batches] == [batch_norm and n == 1 for n in expected]


def test_cohorts():
    made, reordered = (
        federation(methods.fedavg(), participation=0.5),
        federation(methods.fedavg(), participation=0.5, clients=dict(reversed(population().items()))),
    )
    seen = []
    for made.round in range(12):
        reordered.round = made.round
        assert len(set(made.cohort())) == 2
        assert made.cohort() == reordered.cohort()
        seen.append(tuple(made.cohort()))
    assert len(set(seen)) > 3
    assert {c for cohort in seen for c in cohort} == set(SIZES)
    assert len(federation(methods.fedavg(), participation=0.01).cohort()) == 1


def test_a_result_that_is_not_finite_is_dropped_and_named():
    """One client's features overflow: its upload and memory do not count, the others' round does."""
    x, y = examples("ben", 8)
    clients = {**population(), "ben": ClientData(train=(x * 1e200, y))}
    made = federation(methods.fedbn(), clients=clients)
    played = made.play()
    assert list(played.dropped) == ["ben"]
    assert "not finite" in played.dropped["ben"]
    assert "ben" not in made.memory
    assert all(torch.isfinite(tree.flat).all() for tree in made.server.values())
    without = federation(methods.fedbn(), clients={n: d for n, d in clients.items() if n != "ben"})
    without.play()
    assert torch.equal(made.server["share"].flat, without.server["share"].flat)
    alone = federation(methods.fedbn(), clients={"ben": clients["ben"]})
    with pytest.raises(UsageError, match=r"round 1: no client's result is finite \(client 'ben'.*lower lr"):
        alone.play()


def test_bytes_are_those_of_what_is_sent():
    wide = 8  # float64
    played = {m.name: federation(m, participation=0.5).play() for m in (methods.fedavg(), methods.fedbn())}
    played |= {m.name: federation(m, participation=0.5).play() for m in (methods.mofedsam(), methods.local())}
    everything, without = (WEIGHTS + 6) * wide, (WEIGHTS + 6 - NORMALIZATION) * wide
    assert (played["FedAvg"].bytes_down, played["FedAvg"].bytes_up) == (2 * everything, 2 * everything)
    assert (played["FedBN"].bytes_down, played["FedBN"].bytes_up) == (2 * without, 2 * without)
    momentum = WEIGHTS * wide
    assert (played["MoFedSAM"].bytes_down, played["MoFedSAM"].bytes_up) == (2 * (everything + momentum), 2 * everything)
    assert (played["Local"].bytes_down, played["Local"].bytes_up) == (0, 0)


def test_evaluation_counts_example_by_example_in_evaluation_mode():
    model = Model(network())
    x, y = examples("ada", 1100)  # more than one pass
    found = evaluate(model, model.loss, model.initial, Examples(x, y), [accuracy])
    reference = network().eval()
    with torch.no_grad():
        outputs = reference(x)
    assert found["loss"] == pytest.approx(F.cross_entropy(outputs, y).item(), abs=1e-12)
    assert found["accuracy"] == pytest.approx((outputs.argmax(1) == y).double().mean().item(), abs=1e-12)


def test_summaries_over_clients():
    clients = {n: ClientData(train=examples(n, 8), test=examples(n + "!", k)) for n, k in (("ada", 5), ("ben", 20))}
    made = federation(methods.fedavg(), clients=clients)
    made.play()
    found = evaluate_all(made, [accuracy])
    own = {
        c: evaluate(made.model, made.model.loss, made.personal(c), d.test, [accuracy])["accuracy"]
        for c, d in clients.items()
    }
    summary = found["personalized"]["test"]["accuracy"]
    assert summary["mean"] == pytest.approx((own["ada"] + own["ben"]) / 2)
    assert summary["by_samples"] == pytest.approx((5 * own["ada"] + 20 * own["ben"]) / 25)
    assert own["ada"] != own["ben"]
    assert found["generalized"] == found["personalized"]
    assert found["clients"]["ada"]["personalized"]["accuracy"] == own["ada"]
    assert evaluate_all(federation(methods.fedbn(), clients=clients), [accuracy])["generalized"] is None


def test_fit_leaves_model_and_random_stream_alone():
    net = network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run = idiolect.fit(net, population(), methods.fedfsa(), rounds=1, training=Training(batch_size=8))
    run.personal("ada")
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training


def test_run_gives_models_tables_and_what_clients_keep():
    calls = []
    run = quick(methods.fedfsa(top=1), on_round=lambda run, record: calls.append((run.round, record["round"])))
    assert calls == [(1, 1), (2, 2), (3, 3)]
    table = run.table()
    assert table["round"].to_list() == [1, 2, 3]
    assert set(table.columns) >= {"personalized accuracy", "generalized accuracy", "worst decile", "bytes up"}
    assert {n for n, chosen in run.inspect("ada")["chosen"].items() if chosen} < {"0.weight", "4.weight", "6.weight"}
    assert set(run.weights) == scope.everything(run.federation.model.structure)
    assert set(run.memory("ada")) == {"share", "flexible_sam", "server_momentum", "finetune"}
    module = run.personal("ada")
    x, y = population()["ada"].test
    right = (module(x).argmax(1) == y).double().mean().item()
    assert right == run.records[-1]["clients"]["ada"]["personalized"]["accuracy"]
    assert not module.training
    with pytest.raises(UsageError, match=r"no client 'adda' \(did you mean ada\?\)"):
        run.personal("adda")


def test_metrics_and_losses_of_the_user():
    clients = {n: ClientData(train=(x := torch.randn(12, 2), x @ torch.ones(2, 1)), test=(x, x[:, :1])) for n in "ab"}
    error = Metric("rmse", lambda out, y: F.mse_loss(out, y).sqrt(), higher_is_better=False)
    run = idiolect.fit(nn.Linear(2, 1), clients, methods.fedavg(), rounds=2, loss=F.mse_loss, metrics=[error])
    assert run.table().columns[1] == "personalized rmse"
    summary = run.records[-1]["personalized"]["test"]["rmse"]
    assert summary["worst_decile"] == summary["max"]
    unmeasured = idiolect.fit(nn.Linear(2, 1), clients, methods.fedavg(), rounds=1, loss=F.mse_loss)
    assert unmeasured.lead == "loss"


def test_run_directory_and_exact_resume(tmp_path):
    whole = quick(methods.fedfsa(), rounds=4, output=Output(tmp_path / "whole"), participation=0.5)

    class Stopped(Exception):
        pass

    def stop(run, record):
        if record["round"] == 3:
            raise Stopped

    settings, again = {"rounds": 4, "participation": 0.5, "evaluate_every": 2}, Output(tmp_path / "cut", resume=True)
    with pytest.raises(Stopped):
        quick(methods.fedfsa(), on_round=stop, output=Output(tmp_path / "cut"), **settings)
    resumed = quick(methods.fedfsa(), output=again, **settings)
    same_state(whole.federation, resumed.federation)
    config, records = read_run(tmp_path / "cut")
    assert [r["round"] for r in records] == [1, 2, 3, 4]
    assert records[-1]["personalized"] == json.loads(json.dumps(whole.records[-1]["personalized"]))
    assert config["config"]["method"] == repr(methods.fedfsa())
    files = {f.name for f in (tmp_path / "cut").iterdir()}
    assert files >= {"config.json", "metrics.jsonl", "shared.safetensors", "personal.safetensors", "report.html"}
    with pytest.raises(UsageError, match="started with other settings: seed was 0, is 1"):
        quick(methods.fedfsa(), seed=1, output=again, **settings)
    with pytest.raises(UsageError, match="already holds a run"):
        quick(methods.fedfsa(), output=Output(tmp_path / "cut"), **settings)


BAD = {
    "rounds must be a whole number, at least 1, got 0": {"rounds": 0},
    "rounds must be a whole number, at least 1, got '3'": {"rounds": "3"},
    "participation must be a number in": {"participation": 1.5},
    "evaluate_every must be a whole number, at least 1, got 0": {"evaluate_every": 0},
}


@pytest.mark.parametrize("line", BAD)
def test_bad_settings_are_one_line(line):
    with pytest.raises(UsageError, match=line) as caught:
        quick(methods.fedavg(), **BAD[line])
    assert "\n" not in str(caught.value)


def with_train(x, y):
    return {**population(), "ben": ClientData(train=(x, y))}


X, Y = examples("ben", 8)
HOLE = X.clone()
HOLE[5, 0, 2, 2] = torch.nan


@pytest.mark.parametrize(
    ("clients", "line"),
    [
        ({}, "no clients"),
        (with_train(HOLE, Y), "'ben'.*row 5.*NaN"),
        (with_train(X, Y + 3), "'ben'.*label"),
        (with_train(X, Y.double()), "'ben'.*float64"),
        ({"ben": ClientData(train=(X, Y.double()))}, "'ben'.*float64"),
        (with_train(X[:, :, :4], Y), "'ben'.*shape"),
        ({"ben": ClientData(train=(torch.zeros(0, 1, 6, 6), []))}, "no client has training examples"),
        ({"ben": ClientData(train=(X.flatten(1), Y))}, "cannot take client 'ben'"),
    ],
)
def test_bad_data_is_one_line(clients, line):
    with pytest.raises(UsageError, match=line) as caught:
        idiolect.fit(network(), clients, methods.fedavg(), rounds=1)
    assert "\n" not in str(caught.value)


def test_empty_clients_are_left_out_and_said():
    clients = {**population(), "eve": ClientData(train=(torch.zeros(0, 1, 6, 6).double(), []))}
    run = idiolect.fit(network(), clients, methods.fedavg(), rounds=1, training=Training(batch_size=8))
    assert "eve" not in run.federation.clients
    assert any("'eve'" in note for note in run.notes)


@pytest.mark.parametrize(
    ("act", "line"),
    [
        (lambda: Training(lr=0.0), "lr must be a number above 0"),
        (lambda: Training(batch_size=0), "must be a whole number, at least 1, got 0"),
        (lambda: methods.mofedsam(alpha=0.0), "alpha must be in"),
        (lambda: methods.fedfsa(rho_lager=0.9), r"no argument 'rho_lager' \(did you mean rho_larger\?\)"),
        (lambda: methods.fedavg("samples", 3), "fedavg: too many positional arguments; it is fedavg"),
        (lambda: quick(methods.fedfsa(top=9)), "top=9, but the model has 3 candidate tensors"),
        (lambda: quick(methods.fedavg(), training=Training(batch_size=1)), "batch_size=1 with batch normalization"),
        (lambda: idiolect.Method((idiolect.parts.sam(0.1),)), "first part must be share"),
        (lambda: methods.fedsam() + idiolect.parts.sam(0.2), "occurs twice"),
        (lambda: quick(idiolect.Method((idiolect.parts.share(scope.named("fc9")),))), "no layer or tensor 'fc9'"),
    ],
)
def test_bad_methods_are_one_line(act, line):
    with pytest.raises(UsageError, match=line) as caught:
        act()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [methods.fedbn, methods.silobn, methods.bn_only])
def test_a_model_without_batch_norm_is_refused_with_a_way_out(make):
    with pytest.raises(UsageError, match=r"add .*batch norm|add one \(nn.BatchNorm") as caught:
        idiolect.fit(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double(), population(), make(), rounds=1)
    assert "fedavg" in str(caught.value)


def test_normalization_is_found_by_type_wherever_it_is():
    """In a nested, unnamed block, a subclass, and a layer whose name says something else."""

    class Own(nn.BatchNorm1d):
        pass

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bnb = nn.Linear(2, 2)
            self.downsample = nn.Sequential(nn.Linear(2, 2), Own(2))
            self.scale = nn.SyncBatchNorm(2)
            self.head = nn.Linear(2, 2)

        def forward(self, x):
            return self.head(self.scale(self.downsample(self.bnb(x))))

    found = scope.batch_norm(Model(Net()).structure)
    assert {n.rpartition(".")[0] for n in found} == {"downsample.1", "scale"}
    assert scope.head(Model(Net()).structure) == {"head.weight", "head.bias"}


def test_frozen_parameters_and_integer_buffers_are_constants():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net.register_buffer("positions", torch.arange(4))
    net[0].requires_grad_(False)
    clients = {"a": ClientData(train=(torch.randn(6, 3), [0, 1] * 3))}
    run = idiolect.fit(net, clients, methods.fedavg(), rounds=2)
    assert set(run.weights) == {"1.weight", "1.bias"}
    assert torch.equal(run.personal("a")[0].weight, net[0].weight)
    with pytest.raises(UsageError, match="no trainable parameter"):
        idiolect.fit(net.requires_grad_(False), clients, methods.fedavg(), rounds=1)


def test_resume_notices_other_initial_weights(tmp_path):
    quick(methods.fedavg(), rounds=2, output=Output(tmp_path / "run"))
    with pytest.raises(UsageError, match="other settings: initial was"):
        idiolect.fit(
            network(seed=5),
            population(),
            methods.fedavg(),
            rounds=2,
            training=Training(lr=0.1, batch_size=8),
            output=Output(tmp_path / "run", resume=True),
        )


def test_a_stack_of_what_cannot_be_stacked_is_one_line():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    clients = {name: ClientData(train=(torch.randn(6, 3), [0, 1] * 3)) for name in "ab"}
    line = r"engine Stacked: clients cannot be stacked: layer '1' \(Dropout\) draws random numbers"
    with pytest.raises(UsageError, match=line) as caught:
        idiolect.fit(net, clients, methods.fedavg(), rounds=1, machine=Machine(engine=Stacked(2)))
    assert "\n" not in str(caught.value)
