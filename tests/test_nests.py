"""Inputs, targets and outputs that consist of several tensors: the same numbers as by hand, in every engine."""

import copy
from types import SimpleNamespace

import nest_worlds as worlds
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import idiolect
from idiolect import ClientData, Metric, UsageError, methods, parts
from idiolect.core.nest import logits, with_logits
from idiolect.engines.processes import Processes
from idiolect.engines.sequential import Sequential
from idiolect.engines.stacked import Stacked
from idiolect.engines.threads import Threads
from idiolect.rounds.batches import Shuffled


def train_by_hand(net, data, key, epochs=2, lr=0.1, names=None):
    """Train in place on a client's batches, in the order of a run; only these parameters if names are given."""
    net.train()
    (row, number), y = data.train.x.values(), data.train.y
    for batch in Shuffled(data.train, 4, True, key).epochs(epochs):
        places = [int((row == r).all(1).nonzero()[0]) for r in batch.x["row"]]
        out = net(row[places], number[places])
        loss = worlds.loss_of(out, y[places])
        moving = [p for n, p in net.named_parameters() if names is None or n in names]
        with torch.no_grad():
            for p, g in zip(moving, torch.autograd.grad(loss, moving), strict=True):
                p -= lr * g


def fedavg_by_hand(kept, rounds=3):
    """Federated averaging with tensors that stay with the client, written from the textbook."""
    clients, shared = worlds.clients(), worlds.TwoBranches()
    own = {c: copy.deepcopy(shared) for c in clients}
    for t in range(rounds):
        for client, net in own.items():
            state = net.state_dict()
            net.load_state_dict({n: state[n] if kept(n) else s.clone() for n, s in shared.state_dict().items()})
            train_by_hand(net, clients[client], (0, "train", client, t))
        total = sum(worlds.SIZES.values())
        mean = {
            n: sum(worlds.SIZES[c] / total * net.state_dict()[n] for c, net in own.items())
            for n, s in shared.state_dict().items()
            if s.is_floating_point()
        }
        shared.load_state_dict(shared.state_dict() | mean)
    return shared, own


@pytest.mark.parametrize(
    ("method", "kept"), [(methods.fedavg(), ()), (methods.fedbn(), ("norm",)), (methods.fedper(), ("out",))]
)
@pytest.mark.parametrize("engine", worlds.ENGINES)
def test_a_model_with_two_inputs_and_a_loss_of_two_outputs_is_trained_as_by_hand(method, kept, engine):
    shared, own = fedavg_by_hand(lambda name: name.startswith(kept) if kept else False)
    done = worlds.run(worlds.TwoBranches(), worlds.clients(), method, engine, loss=worlds.loss_of)
    for client, net in own.items():
        expected = {n: t for n, t in shared.state_dict().items()}
        expected |= {n: t for n, t in net.state_dict().items() if kept and n.startswith(kept)}
        found = done.personal(client).state_dict()
        for name, tensor in expected.items():
            if tensor.is_floating_point():
                assert torch.allclose(found[name], tensor, 1e-11, 1e-12), (engine, client, name)


@pytest.mark.parametrize(
    "method",
    [methods.fedrep(), methods.ditto(), methods.fedfsa(), methods.fedproto(), methods.moon(), methods.fedthe()],
    ids=lambda m: m.name,
)
def test_parts_read_the_logits_and_engines_agree(method):
    def trained(form, engine):
        net = worlds.TwoBranches()
        return worlds.personal(worlds.run(net, worlds.clients(form), method, engine, loss=worlds.loss_of))

    expected = trained(dict, "sequential")
    assert not torch.equal(
        expected[:30], torch.cat([p.detach().flatten() for p in worlds.TwoBranches().parameters()])[:30]
    )
    for engine in worlds.ENGINES:
        assert torch.allclose(trained(dict, engine), expected, 1e-9, 1e-10), engine
    assert torch.equal(trained(tuple, "sequential"), expected)


class OwnLoss(nn.Module):
    """A model that is given its labels and returns its loss, as those of transformers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, row, labels=None):
        scores = self.head(torch.tanh(self.body(row)))
        return {"loss": F.cross_entropy(scores, labels), "logits": scores} if labels is not None else {"logits": scores}


def labeled():
    found = {}
    for client in worlds.SIZES:
        row, _, y = worlds.rows(client)
        found[client] = ClientData(train={"row": row, "labels": y}, test={"row": row, "labels": y})
    return found


@pytest.mark.parametrize("engine", worlds.ENGINES)
def test_a_model_that_returns_its_own_loss_equals_the_plain_one(engine):
    accurate = (idiolect.accuracy,)
    own = worlds.run(OwnLoss(), labeled(), methods.fedrep(), engine, loss=idiolect.own_loss, metrics=accurate)

    def outside(outputs, y):
        return F.cross_entropy(outputs["logits"], y)

    plain = {
        c: ClientData(train=({"row": r}, y), test=({"row": r}, y)) for c in worlds.SIZES for r, _, y in [worlds.rows(c)]
    }
    expected = worlds.run(OwnLoss(), plain, methods.fedrep(), engine, loss=outside, metrics=accurate)
    assert torch.allclose(worlds.personal(own), worlds.personal(expected), 1e-12, 1e-13)
    one, other = (r.records[-1]["personalized"]["test"] for r in (own, expected))
    assert one["accuracy"]["mean"] == other["accuracy"]["mean"]
    assert one["loss"]["mean"] == pytest.approx(other["loss"]["mean"], rel=1e-12)


def test_a_part_that_changes_predictions_needs_a_loss_of_predictions():
    with pytest.raises(UsageError, match=r"own loss from them: give fit\(loss=\.\.\.\)"):
        worlds.run(OwnLoss(), labeled(), methods.fedlc(), loss=idiolect.own_loss)

    def outside(outputs, y):
        return F.cross_entropy(outputs["logits"], y)

    worlds.run(OwnLoss(), labeled(), methods.fedlc(), loss=outside)


def test_the_metric_is_given_what_the_loss_is_given():
    seen = []

    def features(outputs, y):
        seen.append((sorted(outputs), len(outputs["features"]), len(y)))
        return outputs["features"].mean()

    worlds.run(
        worlds.TwoBranches(), worlds.clients(), methods.fedavg(), loss=worlds.loss_of, metrics=[Metric("f", features)]
    )
    assert (["features", "logits"], 11, 11) in seen


def test_logits_are_the_output_an_entry_or_the_only_floating_tensor():
    a, b = torch.zeros(2, 3), torch.ones(2, 3)
    assert logits(a) is a
    assert logits({"features": b, "logits": a}) is a
    assert logits(SimpleNamespace(logits=a)) is a
    assert logits((a, torch.tensor(1.0), torch.tensor([1, 2]), None)) is a
    assert with_logits({"features": b, "logits": a}, b)["logits"] is b
    with pytest.raises(UsageError, match="2 floating tensors: call the one with the predictions 'logits'"):
        logits((a, b))


@pytest.mark.parametrize(
    ("x", "line"),
    [
        (
            {"row": torch.zeros(3, 4), "number": torch.zeros(3, 2)},
            r"features of shape x\['row'\] \(4,\), x\['number'\] \(2,\)",
        ),
        ({"row": torch.zeros(3, 4)}, "missing 1 required positional argument: 'number'"),
        (
            {"row": torch.zeros(3, 4), "number": torch.zeros(3, 1), "age": torch.zeros(3)},
            "unexpected keyword argument 'age'",
        ),
        ((torch.zeros(3, 4), torch.full((3, 1), torch.nan)), "row 0: feature is NaN"),
    ],
)
def test_inputs_that_do_not_fit_are_named(x, line):
    with pytest.raises(UsageError, match=line) as refused:
        worlds.run(worlds.TwoBranches(), {"a": ClientData(train=(x, [0, 1, 2]))}, methods.fedavg(), loss=worlds.loss_of)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("x", "line"),
    [
        ({"row": torch.zeros(3, 4), "number": torch.zeros(2, 1)}, r"x has shape \[\(3, 4\), \(2, 1\)\] and y \(3,\)"),
        (({"row": [["a"]]},), r"train: x\[0\]\['row'\] cannot be read"),
    ],
)
def test_nests_that_are_no_rows_are_refused(x, line):
    with pytest.raises(UsageError, match=line):
        ClientData(train=(x, [0, 1, 2]))


def test_clients_have_the_same_entries():
    data = worlds.clients()
    row, _, y = worlds.rows("ada")
    data["ada"] = ClientData(train=({"row": row}, y))
    with pytest.raises(UsageError, match=r"every client needs x\['number'\]"):
        worlds.run(worlds.TwoBranches(), data, methods.fedavg(), loss=worlds.loss_of)


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (nn.CrossEntropyLoss(ignore_index=255), lambda y: torch.where(y == 1, 255, y)),
        (nn.CrossEntropyLoss(), lambda y: torch.where(y == 1, -100, y)),
        (nn.CrossEntropyLoss(), lambda y: F.one_hot(y, 3).double() * 0.8 + 0.2 / 3),
        (F.binary_cross_entropy_with_logits, lambda y: F.one_hot(y, 3) > 0),
        (nn.BCEWithLogitsLoss(), lambda y: F.one_hot(y, 3)),
        (nn.KLDivLoss(reduction="batchmean"), lambda y: F.one_hot(y, 3).double() * 0.8 + 0.2 / 3),
    ],
)
def test_labels_are_what_the_loss_takes(loss, target):
    net = nn.Sequential(nn.Linear(4, 3)).double()
    data = {
        c: ClientData(train=(r, target(y)), test=(r, target(y))) for c in worlds.SIZES for r, _, y in [worlds.rows(c)]
    }
    finals = [worlds.personal(worlds.run(net, data, methods.fedavg(), engine, loss=loss)) for engine in worlds.ENGINES]
    for final in finals:
        assert torch.isfinite(final).all()
        assert torch.allclose(final, finals[0], 1e-9, 1e-10)


def test_ignored_labels_count_neither_in_the_loss_nor_in_accuracy():
    net = nn.Sequential(nn.Linear(4, 3)).double()
    row, _, y = worlds.rows("ada")
    marked = torch.where(y == 1, 255, y)
    loss = nn.CrossEntropyLoss(ignore_index=255)
    done = worlds.run(net, {"a": ClientData(train=(row, marked), test=(row, marked))}, methods.fedavg(), loss=loss)
    right = (done.personal("a")(row).argmax(1) == y)[marked != 255].double().mean()
    assert done.records[-1]["personalized"]["test"]["accuracy"]["mean"] == pytest.approx(float(right))
    with pytest.raises(UsageError, match="label 255 is out of range"):
        worlds.run(net, {"a": ClientData(train=(row, marked))}, methods.fedavg())


def test_a_class_for_each_place():
    net = nn.Sequential(nn.Conv1d(2, 3, 1)).double()
    x = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = (x[:, 0] > 0).long()
    done = worlds.run(net, {"a": ClientData(train=(x, y), test=(x, y))}, methods.fedavg(), rounds=30)
    assert done.records[-1]["personalized"]["test"]["accuracy"]["mean"] > 0.9
    with pytest.raises(
        UsageError, match=r"labels have shape \(6,\); give one class number 0 … 2 per place, shape \(n, 5\)"
    ):
        worlds.run(net, {"a": ClientData(train=(x, y[:, 0]))}, methods.fedavg())
    with pytest.raises(UsageError, match="head must be a linear layer from features to classes"):
        worlds.run(net, {"a": ClientData(train=(x, y))}, methods.fedavg() + parts.calibrated_logits(1.0))


def test_adaptation_to_several_inputs():
    done = worlds.run(worlds.TwoBranches(), worlds.clients(), methods.adabn(), loss=worlds.loss_of)
    row, number, _ = worlds.rows("ben")
    net = done.personal("ben")
    assert torch.equal(net(row, number)["logits"], net(row=row, number=number)["logits"])
    assert not torch.allclose(net(row, number)["logits"], net.module(row, number)["logits"])
    again = done.new_client("reestimate", {"row": row, "number": number})
    assert torch.allclose(again.norm.running_mean, again.wide(row).mean(dim=0))
    with pytest.raises(UsageError, match=r"needs x\['row'\], x\['number'\] of the new client, not x"):
        done.new_client("reestimate", row)


@pytest.mark.parametrize("data", [worlds.clients(), labeled()], ids=["nest", "labels"])
def test_what_is_printed_of_a_client_has_no_example(data):
    shown = repr(data["ada"])
    assert len(shown) < 160
    assert "row (4,) float64" in shown
    assert "tensor" not in shown


def test_all_engines_run_nests_when_they_are_given_as_objects():
    reference = None
    for engine in (Sequential(), Threads(2), Processes(2), Stacked(3)):
        done = idiolect.fit(
            worlds.TwoBranches(), worlds.clients(), methods.fedbn(), rounds=2, loss=worlds.loss_of,
            training=idiolect.Training(lr=0.1, batch_size=4), machine=idiolect.Machine(engine=engine),
        )  # fmt: skip
        row = worlds.personal(done)
        reference = row if reference is None else reference
        assert torch.allclose(row, reference, 1e-11, 1e-12), engine
