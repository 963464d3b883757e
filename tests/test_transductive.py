"""Methods that read the inputs to predict, in a run: what personal models do, and what the run says of it."""

import copy
import json
from collections import Counter

import pytest
import torch
from rich.console import Console
from torch import nn

import idiolect
from idiolect import methods, parts
from idiolect.compute.autograd import Model
from idiolect.compute.metrics import accuracy
from idiolect.core.types import Query
from idiolect.data import ClientData
from idiolect.report import comparison, comparison_markdown
from idiolect.rounds.queries import Queries
from idiolect.running import new_client
from idiolect.running.adapting import Adapting
from idiolect.running.evaluation import evaluate_all
from idiolect.testing.checks import played, same_state
from idiolect.testing.worlds import examples, federation, network, population

BOTH = methods.fedbn() + parts.adapted_statistics() + parts.head_ensemble()
X = examples("to predict", 9)[0]


def fitted(method, **how):
    training = idiolect.Training(lr=0.3, local_epochs=3)
    machine = idiolect.Machine(engine="sequential")
    return idiolect.fit(network(), population(), method, rounds=2, training=training, machine=machine, **how)


@pytest.fixture(scope="module", params=[methods.adabn(), methods.fedthe(), BOTH], ids=lambda m: m.name)
def run(request):
    return fitted(request.param)


def test_personal_models_adapt_to_each_batch(run):
    own, net = run.federation.deployed("ada"), run.personal("ada")
    assert isinstance(net, Adapting)
    assert not any(module.training for module in net.modules())
    for x in (X, X[:4], X[:1]):
        assert torch.allclose(net(x), run.federation.model.predict(own.at(x), x), rtol=0, atol=1e-12)
    assert (net(X)[4:] - net(X[4:])).abs().max() > 1e-6
    assert net(X[:0]).shape == (0, 3)


def test_nothing_of_a_batch_lasts(run):
    net, generator = run.personal("ada"), torch.get_rng_state()
    before, first = copy.deepcopy(net.state_dict()), net(X)
    net(100 * X + 7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(net(X), first)
    assert torch.equal(copy.deepcopy(net)(X), first)
    assert torch.equal(torch.get_rng_state(), generator)
    with torch.inference_mode():
        assert torch.equal(net(X), first)


def test_what_adapts_are_the_weights_that_the_model_holds(run):
    """They may have been trained on, or loaded; in training mode it is the plain model."""
    ada, dan = run.personal("ada"), run.personal("dan")
    bias = ada.module[-1].bias
    ada.train()(X).sum().backward()
    assert bias.grad.abs().min() > 0
    assert torch.equal(ada(X), ada.module(X))
    ada.eval()
    before = ada(X)
    with torch.no_grad():
        ada.module[4].weight.mul_(1.5)
    assert (ada(X) - before).abs().max() > 1e-3
    if "head_ensemble" not in run.federation.method.transductive:
        ada.load_state_dict(dan.state_dict())
        assert torch.equal(ada(X), dan(X))


def test_results_are_those_of_the_test_inputs_together(run, monkeypatch):
    """However few examples other evaluations take at once."""
    monkeypatch.setattr("idiolect.compute.metrics.CHUNK", 2)
    clients = evaluate_all(run.federation, [accuracy])["clients"]
    assert clients == run.records[-1]["clients"]
    for client, data in run.federation.clients.items():
        outputs = run.personal(client)(data.test.x)
        found = clients[client]
        assert found["personalized"]["loss"] == pytest.approx(nn.functional.cross_entropy(outputs, data.test.y).item())
        if found["generalized"]:
            plain = run.federation.model.predict(run.federation.general(), data.test.x)
            assert found["generalized"]["loss"] == pytest.approx(nn.functional.cross_entropy(plain, data.test.y).item())


def test_each_split_is_adapted_to_apart():
    clients = {n: ClientData(train=d.train, test=d.test, val=(X + 3, d.train.y[:1].repeat(9))) for n, d in _FEW.items()}
    made = federation(methods.adabn(), clients=clients)
    found, shown = evaluate_all(made, [accuracy]), dict[str, list[float]]()
    for client, data in clients.items():
        own = made.deployed(client)
        for split, (x, y) in {"val": data.val, "test": data.test}.items():
            loss = nn.functional.cross_entropy(made.model.predict(own.at(x), x), y)
            shown.setdefault(split, []).append(loss.item())
    for split, losses in shown.items():
        assert found["personalized"][split]["loss"]["mean"] == pytest.approx(sum(losses) / 2)


_FEW = population({"ada": 24, "ben": 8})


def test_the_run_says_so(run, tmp_path):
    read = list(run.federation.method.transductive)
    said = f"predictions use the unlabeled test inputs (transductive): {', '.join(read)}"
    assert said in run.notes
    assert run.config()["transductive"] == read
    assert all(record["transductive"] == read for record in run.records)
    name = run.federation.method.name
    assert run.summary().label == f"{name} (transductive)"
    assert run.summary("mine").label == "mine (transductive)"
    wide = Console(width=200)
    with wide.capture() as shown:
        wide.print(comparison([run.summary()]))
    assert f"{name} (transductive)" in shown.get()
    assert f"| {name} (transductive) |" in comparison_markdown([run.summary()])
    run.report(tmp_path / "report.html")
    assert f"{name} (transductive)" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_it_is_written_and_can_be_resumed(tmp_path):
    method = methods.adabn()
    fitted(method, output=idiolect.Output(tmp_path / "run", report=False))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["transductive"] for line in lines] == [["adapted_statistics"]] * 2
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["transductive"] == [
        "adapted_statistics"
    ]
    resumed = fitted(method, output=idiolect.Output(tmp_path / "run", report=False, resume=True))
    assert len(resumed.records) == 2


def test_other_methods_say_nothing_and_hand_out_the_module_itself():
    run = fitted(methods.fedbn())
    assert type(run.personal("ada")) is nn.Sequential
    assert "transductive" not in run.config() | run.records[-1]
    assert not any("transductive" in note for note in run.notes)
    assert run.summary().label == "FedBN"


def passes(method, monkeypatch):
    """Return how many passes over examples an evaluation of the population takes, by kind."""
    made, taken = played(method, rounds=1), Counter()
    for kind in ("predict", "observe", "statistics", "grad"):
        plain = getattr(Model, kind)

        def counted(*args, kind=kind, plain=plain, **kwargs):
            taken[kind] += 1
            return plain(*args, **kwargs)

        monkeypatch.setattr(Model, kind, counted)
    evaluate_all(made, [accuracy])
    monkeypatch.undo()
    return dict(taken)


def test_other_methods_take_no_more_passes(monkeypatch):
    """Each of four clients predicts under its own model and the shared one, where they differ."""
    assert passes(methods.fedavg(), monkeypatch) == {"predict": 4}
    assert passes(methods.fedbn(), monkeypatch) == {"predict": 4}
    assert passes(methods.adabn(), monkeypatch) == {"predict": 8, "statistics": 4}
    assert passes(methods.fedavg_ft(epochs=0), monkeypatch) == {"predict": 4}
    assert played(methods.fedavg(), rounds=1).deployed("ada").adapt is None


def test_evaluations_change_nothing(run):
    made = run.federation
    before = copy.deepcopy((made.server, {c: made.memory.get(c) for c in made.clients}))
    evaluate_all(made, [accuracy])
    for part, tree in before[0].items():
        assert torch.equal(tree.flat, made.server[part].flat)
    for client, memory in before[1].items():
        assert all(torch.equal(tree.flat, made.memory.get(client)[part].flat) for part, tree in memory.items())
    watched, blind = played(made.method), played(made.method, rounds=0)
    for _ in range(3):
        evaluate_all(blind, [accuracy])
        blind.play()
    same_state(watched, blind)


def test_unlabeled_inputs_are_seen_alone(monkeypatch):
    """In their order, in as many passes as it takes, without a target."""
    monkeypatch.setattr("idiolect.rounds.queries.CHUNK", 4)
    made, asked = federation(methods.fedavg()), []

    def seen(look, y, facts):
        asked.append(tuple(y.shape))
        return {"features": look.features, "first": look.outputs[:, 0]}

    queries = Queries(made.model, {}, torch.zeros(1).double())
    found = queries.each(made.model.initial, Query("6", seen, {"features": (6,), "first": ()}), X)
    net = made.model.module(made.model.initial)
    assert torch.allclose(found["features"], net[:-1](X), rtol=0, atol=1e-12)
    assert torch.allclose(found["first"], net(X)[:, 0], rtol=0, atol=1e-12)
    assert asked == [(4, 0), (4, 0), (1, 0)]


def test_a_new_client_gets_statistics_of_its_own_as_before():
    """Of its unbiased variance, as PyTorch has it, where predictions take the biased one."""
    made = played(methods.adabn())
    made_for_it = new_client.new_client(made, "reestimate", X)
    values = nn.functional.conv2d(X, *(made.server["share"][f"0.{leaf}"] for leaf in ("weight", "bias")))
    assert torch.allclose(made_for_it[1].running_var, values.var((0, 2, 3)), rtol=0, atol=1e-12)
    adapted = made.deployed("ada").at(X)["1.running_var"]
    assert torch.allclose(adapted, values.var((0, 2, 3), correction=0), rtol=0, atol=1e-12)
