"""What parts see of a pass, and what they attach: losses of their own, sums over examples, private tensors."""

import pytest
import torch
from torch import nn

from idiolect import ClientData, Method, Training, UsageError, methods, parts, scope
from idiolect.compute.autograd import Model
from idiolect.core.part import Part, part
from idiolect.core.structure import Private
from idiolect.core.tree import Tree, overlay, pick
from idiolect.core.types import Batch, ClientRows, Lockstep, Objective, Query
from idiolect.engines.federation import Federation
from idiolect.running.evaluation import evaluate_all
from idiolect.testing import checks
from idiolect.testing.worlds import examples, federation, network

HEAD, BODY = "6", "4"
CLIENTS = ["ada", "ben", "cleo"]


def close(found, expected, tolerance=1e-13):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance


def same_gradient(found, expected, tolerance=1e-13):
    for mine, theirs in zip(found, expected, strict=True):
        close(*(t.flat if isinstance(t, Tree) else t for t in (mine, theirs)), tolerance)


@pytest.fixture
def model():
    return Model(network())


@pytest.fixture
def batch():
    return Batch(*examples("ada", 8))


@pytest.fixture
def stack(model):
    """Three clients with weights of their own; the last has a smaller batch."""
    generator = torch.Generator().manual_seed(0)
    shift = 0.1 * torch.rand(3, model.initial.layout.total, generator=generator, dtype=torch.float64)
    rows = Tree(model.initial.layout, model.initial.flat + shift)
    batches = [examples(name, size) for name, size in zip(CLIENTS, (8, 8, 5), strict=True)]
    pair = Batch(*(torch.stack(t) for t in zip(*batches[:2], strict=True)))
    alone = Batch(*(t[None] for t in batches[2]))
    groups = (ClientRows(slice(0, 2), pair), ClientRows(slice(2, 3), alone))
    apart = [(Tree(rows.layout, row), Batch(*b)) for row, b in zip(rows.flat, batches, strict=True)]
    return rows, Lockstep(groups, 3), apart


def nothing_added(inner, seen, y, facts):
    return inner(seen, y)


def test_an_objective_that_adds_nothing_is_the_plain_gradient(model, batch, stack):
    for step in (batch, batch._replace(frozen=True)):
        expected = model.grad(model.initial, step)
        for layers in ([HEAD], [BODY, HEAD]):
            found = model.grad(model.initial, step, objectives=[Objective(n, nothing_added) for n in layers])
            same_gradient(found, expected)
    rows, step, _ = stack
    same_gradient(model.grad(rows, step, objectives=[Objective(HEAD, nothing_added)]), model.grad(rows, step))


def test_an_objective_that_scales(model, batch):
    twice = Objective(HEAD, lambda inner, seen, y, facts: 2 * inner(seen, y))
    found, plain = model.grad(model.initial, batch, objectives=[twice]), model.grad(model.initial, batch)
    close(found.gradient.flat, 2 * plain.gradient.flat)
    close(found.loss, 2 * plain.loss)
    close(found.buffers.flat, plain.buffers.flat)
    only = model.grad(model.initial, batch, only={"6.weight"}, objectives=[twice])
    assert list(only.gradient) == ["6.weight"]
    close(only.gradient["6.weight"], 2 * plain.gradient["6.weight"])


def test_the_first_listed_is_outermost_and_each_sees_its_own_layer(model, batch):
    order, seen_by = [], {}

    def named(name, layer, change):
        def loss(inner, seen, y, facts):
            order.append(name)
            seen_by[name] = seen
            return change(inner(seen._replace(outputs=seen.outputs + 1.0), y))

        return Objective(layer, loss)

    outer, inner = named("outer", BODY, lambda v: 2 * v), named("inner", HEAD, lambda v: v + 3)
    found = model.grad(model.initial, batch, objectives=[outer, inner]).loss
    assert order == ["outer", "inner"]
    assert seen_by["outer"].features.shape == (8, 48)
    assert seen_by["inner"].features.shape == (8, 6)
    close(found, 2 * (model.grad(model.initial, batch).loss + 3), 1e-12)  # cross-entropy does not mind a shift
    close(seen_by["inner"].outputs, seen_by["outer"].outputs + 1)


def test_what_a_pass_shows(model, batch):
    """Features of its layer, the layer itself, the tensors of the pass, and the loss may differentiate in them."""

    def loss(inner, seen, y, facts):
        close(seen.layer(seen.features), seen.outputs)
        close(seen.features @ seen.weights["6.weight"].T + seen.weights["6.bias"], seen.outputs)
        for name in model.structure.names("statistic"):
            close(seen.weights[name], model.initial[name])
        return seen.weights["0.weight"].square().sum() + seen.features.sum()

    found = model.grad(model.initial, batch, objectives=[Objective(HEAD, loss)]).gradient
    by_features = model.grad(
        model.initial, batch, objectives=[Objective(HEAD, lambda i, seen, y, f: seen.features.sum())]
    )
    close(found["0.weight"], 2 * model.initial["0.weight"] + by_features.gradient["0.weight"])
    assert by_features.gradient["0.weight"].any()
    assert not found["6.weight"].any()


def test_under_other_weights_is_evaluation_and_leaves_no_trace(model, batch):
    other = Tree(model.initial.layout, model.initial.flat + 0.1)
    shown = {}

    def loss(inner, seen, y, facts):
        shown["seen"] = seen.under(facts)
        return inner(seen, y) + (seen.features - shown["seen"].features).square().sum()

    found = model.grad(model.initial, batch, objectives=[Objective(HEAD, loss, other)])
    close(shown["seen"].outputs, model.predict(other, batch.x))
    close(shown["seen"].features @ other["6.weight"].T + other["6.bias"], shown["seen"].outputs)
    close(found.buffers.flat, model.grad(model.initial, batch).buffers.flat)
    assert torch.equal(other.flat, model.initial.flat + 0.1)


def test_under_some_other_weights_takes_the_rest_from_the_pass(model, batch):
    moved = Tree(model.initial.layout, model.initial.flat + 0.1)
    head = pick(model.initial, {"6.weight", "6.bias"})
    shown = {}

    def loss(inner, seen, y, facts):
        shown["outputs"] = seen.under(facts).outputs
        return inner(seen, y)

    model.grad(moved, batch, objectives=[Objective(HEAD, loss, head)])
    close(shown["outputs"], model.predict(overlay(moved, head), batch.x))


def test_facts_per_client_and_facts_for_all(model, stack):
    rows, step, apart = stack
    scales = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)

    def loss(inner, seen, y, facts):
        return facts["scale"].sum() * inner(seen, y) + seen.under(seen.weights).features.square().mean()

    of_one = Tree.of({"scale": scales[0]})
    for facts in (Tree(of_one.layout, scales), Tree.of({"scale": scales[1]})):
        found = model.grad(rows, step, objectives=[Objective(HEAD, loss, facts)])
        for k, (row, batch) in enumerate(apart):
            own = Tree(of_one.layout, facts.flat[k] if facts.flat.dim() == 2 else facts.flat)
            expected = model.grad(row, batch, objectives=[Objective(HEAD, loss, own)])
            close(found.gradient.flat[k], expected.gradient.flat, 1e-12)
            close(found.buffers.flat[k], expected.buffers.flat, 1e-12)


def test_in_mixed_precision_the_pass_is_rounded_and_the_loss_is_not():
    mixed, x = Model(network().float(), mixed=True), examples("ada", 8)[0].float()
    shown = {}

    def loss(inner, seen, y, facts):
        exact = seen.features @ seen.weights["6.weight"].T + seen.weights["6.bias"]
        close(seen.layer(seen.features), exact, 1e-6)
        shown["gap"] = (seen.outputs - exact).abs().max()
        close(seen.under(seen.weights).outputs, mixed.predict(mixed.initial, x), 1e-6)
        return inner(seen, y)

    mixed.grad(mixed.initial, Batch(x, examples("ada", 8)[1]), objectives=[Objective(HEAD, loss)])
    assert shown["gap"] > 1e-4


def moments(seen, y, facts):
    return {"count": seen.features.new_ones(1) * len(y), "sum": facts["by"] * seen.features.sum(0)}


def test_a_look_is_a_sum_in_evaluation_mode(model, batch, stack):
    shapes = {"count": (1,), "sum": (6,)}
    look = Query(HEAD, moments, shapes, Tree.of({"by": torch.full((1,), 2.0).double()}))
    before = model.initial.clone()
    found = model.observe(model.initial, batch, look)
    body = model.module(model.initial)[:-1]
    expected = 2 * sum(body(x[None])[0] for x in batch.x)
    close(found["sum"], expected.detach(), 1e-12)
    assert found["count"].item() == 8
    assert torch.equal(model.initial.flat, before.flat)
    assert not found.flat.requires_grad
    rows, step, apart = stack
    each = look._replace(facts=Tree(look.facts.layout, torch.tensor([[1.0], [2.0], [3.0]]).double()))
    together = model.observe(rows, step, each)
    for k, (row, own) in enumerate(apart):
        alone = model.observe(row, own, look._replace(facts=Tree(look.facts.layout, each.facts.flat[k])))
        close(together.flat[k], alone.flat, 1e-12)


def add_a_shift(module):
    """A private shift of the head's outputs, learned, and a private count of steps."""
    head = module[6]
    if hasattr(head, "own"):
        return
    head.own = Private()
    head.own.shift = nn.Parameter(torch.zeros_like(head.bias))
    head.own.register_buffer("steps", torch.zeros_like(head.bias[:1]), persistent=False)


@part
def shifted() -> Part:
    """Use every hook there is for losses."""

    def gradient(grad, local):
        def counted(at, step):
            out = grad(at, step)
            steps = Tree(out.buffers.layout.only({"6.own.steps"}), at["6.own.steps"] + 1)
            return out._replace(buffers=overlay(out.buffers, steps))

        return counted

    def objective(local):
        def sums(seen, y, facts):
            return {"mean": seen.features.sum(0), "n": seen.features.new_ones(1) * len(y)}

        found = local.total(local.start, Query(HEAD, sums, {"mean": (6,), "n": (1,)}))
        counts = local.counts(3)
        where = Tree.of({"mean": torch.zeros(6), "counts": torch.zeros(3)}).layout
        facts = Tree(where, torch.cat([found["mean"] / counts.sum(-1, keepdim=True), counts], -1))

        def loss(inner, seen, y, facts):
            shift = seen.weights["6.own.shift"] * (1 + seen.weights["6.own.steps"])
            outputs = seen.outputs + shift + (facts["counts"] + 1).log()
            return inner(seen._replace(outputs=outputs), y) + (seen.features - facts["mean"]).square().mean()

        return Objective(HEAD, loss, facts)

    return Part(attach=add_a_shift, gradient=gradient, objective=objective)


def test_every_engine_gives_the_same():
    checks.check_engines_agree(Method((parts.share(scope.everything), shifted())))
    checks.check_engines_agree(Method((parts.share(~scope.batch_norm), parts.sam(0.1), shifted())))


def test_private_tensors_train_stay_and_are_never_sent():
    made = checks.played(Method((parts.share(scope.everything), shifted())), rounds=2)
    assert not any("own" in name for name in made.server["share"])
    rows = {name: made.personal(name) for name in made.clients}
    assert len({tuple(row["6.own.shift"].tolist()) for row in rows.values()}) == len(rows)
    steps = {name: 2 * 2 * len(data.train.y) / 8 for name, data in made.clients.items()}
    assert {name: row["6.own.steps"].item() for name, row in rows.items()} == steps
    assert not made.general()["6.own.shift"].any()


def test_attaching_is_to_a_copy_and_once():
    net = network()
    model = Model(net)
    once = model.extended([add_a_shift])
    assert "6.own.shift" in once.structure.layout.starts
    assert not hasattr(net[6], "own")
    assert "6.own.shift" not in model.structure.layout.starts
    assert once.extended([add_a_shift]) is once
    assert "6.own.steps" not in once.module(once.initial).state_dict()


def test_private_weights_that_predict_are_measured_as_personal():
    """Equal in all that is exchanged, two rows may predict differently."""

    class Added(Private):
        def __init__(self, like):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros_like(like))

        def beside(self, module, given, outputs):
            return outputs + self.shift

    def attach(module):
        module[6].own = Added(module[6].bias)
        module[6].register_forward_hook(module[6].own.beside)

    method = Method((parts.share(scope.everything), Part("added", attach=attach)))
    made = federation(method)
    made.play()
    found = evaluate_all(made, [])
    for scores in found["clients"].values():
        assert scores["personalized"] != scores["generalized"]


def test_classes_are_counted():
    seen = {}

    def finish(local):
        seen[len(seen)] = local.counts(3)
        return local.memory, Tree.of({})

    made = federation(Method((*methods.fedavg().parts, Part("counting", finish=finish))))
    made.play()
    sizes = sorted(made.clients, key=lambda name: -len(made.clients[name].train.y))
    for name, found in zip(sizes, seen.values(), strict=True):
        assert found.tolist() == torch.bincount(made.clients[name].train.y, minlength=3).tolist()
        assert found.dtype == made.model.dtype


@pytest.mark.parametrize("y", [torch.rand(8, 1), torch.zeros(8, 1, dtype=torch.int64)])
def test_classes_of_what_has_none(y):
    counting = Part("counting", finish=lambda local: (local.memory, Tree.of({"n": local.counts(3)})))
    method = Method((*methods.fedavg().parts, counting))
    clients = {"a": ClientData(train=(torch.rand(8, 3), y))}
    model = Model(nn.Linear(3, 1), lambda outputs, y: (outputs - y).square().mean())
    made = Federation(model, method, Training(lr=0.1), 1, 1.0, 0, clients)
    with pytest.raises(UsageError, match="it needs one class label per example"):
        made.play()
