"""What parts attach to a model, and what they see of a client's examples."""

import pytest
import torch
from torch import nn

from idiolect import Method, UsageError, methods, parts
from idiolect.compute.metrics import accuracy
from idiolect.core.part import Part, part
from idiolect.core.structure import Private
from idiolect.core.tree import Tree, combine, layout, overlay, pick
from idiolect.core.types import Query
from idiolect.engines.stacked import Stacked
from idiolect.rounds.training import Training
from idiolect.running.evaluation import evaluate_all
from idiolect.running.new_client import new_client
from idiolect.testing.worlds import RAGGED, examples, federation, network, population


def _lifted(net, given, outputs):
    return outputs + net.own.shift + (net.own.table.sum(dim=0) if not net.training else 0)


@part
def lift() -> Part:
    """Add a trained vector to the outputs and, to predict, the rows of a table that is filled then."""

    def attach(net):
        if not hasattr(net, "own"):
            net.own = Private()
            net.own.shift = nn.Parameter(torch.zeros(3).double())
            net.own.register_buffer("table", torch.zeros(0, 3).double(), persistent=False)
            net.register_forward_hook(_lifted)

    def deploy(local, weights):
        filled = layout(("own.table",), (torch.Size((2, 3)),))
        rows = Tree(filled, torch.arange(6.0).double())
        shapes = {**weights.layout.shape_of, **filled.shape_of}
        return combine(layout(tuple(shapes), tuple(shapes.values())), weights, rows)

    return Part(attach=attach, deploy=deploy)


LIFTED = Method((parts.share(), lift()))


def test_a_buffer_without_values_is_filled_to_predict_alone():
    made = federation(LIFTED)
    made.play()
    plain = made.model.structure.layout
    assert plain.shape_of["own.table"] == (0, 3)
    assert made.memory.get("ada")["share"].layout.total == 3 + 1  # the vector and the counter of batches
    own, x = made.personal("ada"), examples("ada", 4)[0]
    outputs = made.model.predict(own, x)
    bare = made.model.predict(overlay(made.model.initial, pick(own, set(own) - {"own.table"})), x)
    assert torch.allclose(outputs, bare + torch.tensor([3.0, 5.0, 7.0]).double(), atol=1e-12)
    handed_out = made.model.module(own)
    assert torch.allclose(handed_out(x), outputs, atol=1e-12)
    assert "own.table" in handed_out.state_dict()


def test_no_part_works_on_weights_after_one_that_filled_buffers():
    made = federation(LIFTED + parts.finetune(epochs=1))
    with pytest.raises(UsageError, match="list finetune before the part that fills buffers"):
        made.personal("ada")
    federation(Method((parts.share(), parts.finetune(epochs=1), lift()))).personal("ada")


def test_the_shared_model_is_not_measured_as_a_personal_one_that_differs_in_private_tensors_alone():
    found = evaluate_all(federation(LIFTED, clients=population({"ada": 24, "ben": 8})), [accuracy])
    assert found["generalized"]["test"]["loss"] != found["personalized"]["test"]["loss"]


def test_a_new_client_begins_with_private_tensors_as_they_were():
    made = federation(methods.fedbn() + lift())
    made.play()
    assert all(made.memory.get(c)["share"]["own.shift"].abs().min() > 0 for c in made.memory)
    assert torch.equal(new_client(made, "average").own.shift, torch.zeros(3).double())


@part
def onlooker() -> Part:
    """Look at each example to deploy; what was seen is put in `SEEN`."""

    def own(seen, y, facts):
        return {"features": seen.features, "first": seen.outputs[:, 0] + facts["more"][0], "label": y.double()}

    def deploy(local, weights):
        facts = Tree(layout(("more",), (torch.Size((3,)),)), local.counts(3))
        SEEN.append(local.each(weights, Query("6", own, {"features": (6,), "first": (), "label": ()}, facts)))
        return weights

    return Part(deploy=deploy)


SEEN = []


@pytest.mark.parametrize("batch_size", [4, 8, None])
def test_what_is_seen_of_each_example(batch_size):
    """In a stack as for one client, in the order of the batches, with zeros after a client's last example."""
    clients, engine = population(RAGGED), Stacked(6)
    made = federation(
        Method((parts.share(), onlooker())), clients=clients, engine=engine, training=Training(batch_size=batch_size)
    )
    made.round = 1
    SEEN.clear()
    list(engine.measure(made, list(clients), lambda *_: [0.0]))
    stack = SEEN.pop()
    by_size = sorted(clients, key=lambda c: -RAGGED[c])
    for row, client in enumerate(by_size):
        work = made.assignment(client, "deploy")
        made.worker.deploy(work)
        alone, count = SEEN.pop(), RAGGED[client]
        x, y = (torch.cat(t) for t in zip(*((b.x, b.y) for b in work.stream.epochs(1)), strict=True))
        net = made.model.module(made.model.initial)
        assert alone["label"].tolist() == y.tolist()
        assert torch.allclose(alone["features"], net[:-1](x), atol=1e-12)
        assert torch.allclose(alone["first"], net(x)[:, 0] + (y == 0).sum(), atol=1e-12)
        for name, tensor in alone.items():
            assert torch.allclose(stack[name][row, :count], tensor, atol=1e-12), (client, name)
            assert not stack[name][row, count:].any(), (client, name)
    assert stack["features"].shape == (6, 21, 6)


def test_no_example_is_nothing_to_see():
    class Nobody:
        batches = 0

        def epochs(self, count):
            return []

    made = federation(Method((parts.share(), onlooker())))
    SEEN.clear()
    made.worker.deploy(made.assignment("ada", "deploy")._replace(stream=Nobody()))
    assert SEEN.pop()["features"].shape == (0, 6)


@pytest.mark.parametrize("method", [methods.knnper(neighbors=2), methods.fedcp(), methods.fedrod()], ids=repr)
def test_a_state_dict_without_what_a_part_added_is_not_taken_for_whole(method):
    """A personal model that needs more than the user's tensors does not load into the user's module by accident."""
    made = federation(method)
    made.play()
    found, again = (made.model.module(made.personal(client)) for client in ("ada", "ada"))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        network().load_state_dict(found.state_dict())
    again.load_state_dict(found.state_dict())
    x = population()["ada"].test.x
    assert torch.equal(again(x), found(x))


def test_a_state_dict_of_tensors_that_the_module_has_loads_into_it():
    made = federation(methods.fedfsa())
    made.play()
    found, net = made.model.module(made.personal("ada")), network()
    net.load_state_dict(found.state_dict())
    x = population()["ada"].test.x
    assert torch.equal(net.eval()(x), found(x))
