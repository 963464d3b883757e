"""A mistake in a part is one line that names the part, the hook and what was expected, before training."""

import inspect
import re
from dataclasses import replace

import pytest
import torch
from test_methods import CATALOG
from torch import nn

import idiolect
from idiolect import Method, Part, UsageError, methods, part, parts
from idiolect.core.scope import everything
from idiolect.core.tree import EMPTY, Tree, norm, vectors
from idiolect.core.types import Objective, Query, Update
from idiolect.engines.stacked import Stacked
from idiolect.parts import share
from idiolect.rounds.check import check_method
from idiolect.running.describe import describe
from idiolect.running.validate import check_parts
from idiolect.testing.worlds import federation


def method(**hooks):
    @part
    def mine() -> Part:
        """Do something of an author's own."""
        return Part(**hooks)

    return Method((share(everything), mine()), "Mine")


def zeros(setup):
    return vectors(count=setup.weights.flat.new_zeros(2))


def integers(local):
    return local.memory, Tree.of({"n": torch.ones(2, dtype=torch.int64)})


def another_name(local):
    return vectors(other=local.memory["count"]), EMPTY


def unreduced(local):
    return Objective("6", lambda inner, seen, y, facts: seen.outputs.sum(1))


MISTAKES = [
    ({"finish": lambda local: EMPTY}, r"mine: finish must return \(memory, upload\), two Trees, not a Tree"),
    ({"finish": lambda local: None}, r"mine: finish must return \(memory, upload\), two Trees, not None"),
    ({"finish": lambda local: ({}, EMPTY)}, "mine: finish must return its memory as a Tree, not a dict"),
    ({"finish": lambda local: (EMPTY, {})}, "mine: finish must return its upload as a Tree, not a dict"),
    ({"finish": integers}, r"mine: finish returned torch.int64 tensors: use floating ones"),
    (
        {"memory": zeros, "finish": another_name},
        "mine: finish changed the form of its memory .*count.* to .*other",
    ),
    ({"memory": lambda setup: {"n": 1.0}}, "mine: memory must return a Tree, not a dict"),
    ({"server": lambda setup: None}, "mine: server must return a Tree, not None"),
    ({"rows": lambda setup: torch.zeros(3)}, r"mine: rows must return a Tree, not a tensor of shape \(3,\)"),
    ({"direction": lambda d, w, local: None}, "mine: direction must return a direction as a Tree, not None"),
    ({"direction": lambda d, w, local: w}, "mine: direction returned .* no trainable tensor"),
    ({"gradient": lambda grad, local: None}, r"mine: gradient must return a function .*not None"),
    (
        {"gradient": lambda grad, local: lambda at, b: grad(at, b).gradient},
        "mine: gradient must give a Gradient",
    ),
    (
        {"begin": lambda local, w: w},
        r"mine: begin must return \(weights to start from, memory\), two Trees",
    ),
    ({"begin": lambda local, w: (EMPTY, local.memory)}, "mine: begin returned weights with other tensors"),
    ({"objective": lambda local: None}, "mine: objective must return an Objective, not None"),
    ({"objective": unreduced}, r"mine: objective has a loss that must be the mean .* not a tensor of shape \(8,\)"),
    ({"aggregate": lambda central, mean: mean}, "mine: aggregate must return an Update, not a Tree"),
    ({"aggregate": lambda central, mean: None}, "mine: aggregate must return an Update, not None"),
    (
        {"aggregate": lambda central, mean: Update(shared=EMPTY)},
        "mine: aggregate changed the form of the shared",
    ),
    (
        {"server": zeros, "aggregate": lambda central, mean: Update(EMPTY)},
        "mine: aggregate changed the form of its state from .*count",
    ),
    (
        {"contribute": lambda central, arrival: None, "aggregate": lambda central, mean: Update()},
        "mine: contribute must return a Tree, not None",
    ),
    (
        {"contribute": lambda c, arrival: (arrival.weights, -1.0), "aggregate": lambda central, mean: Update()},
        "mine: contribute: a weight in a mean must be finite and at least 0, got -1.0",
    ),
    ({"broadcast": lambda central: None}, "mine: broadcast must return a Tree, not None"),
    ({"rows": zeros, "message": lambda central: None}, "mine: message must return a Tree, not None"),
    ({"deploy": lambda local, weights: None}, "mine: deploy must return the weights that predict as a Tree, not None"),
    ({"deploy": lambda local, weights: EMPTY}, r"mine: deploy left out \['0.weight'\]"),
]


@pytest.mark.parametrize(("hooks", "line"), MISTAKES)
def test_a_hook_that_returns_the_wrong_thing(hooks, line):
    with pytest.raises(UsageError, match=line) as caught:
        check_parts(federation(method(**hooks)))
    assert "\n" not in str(caught.value)


def test_the_user_is_told_before_any_training():
    made = federation(methods.fedavg())
    rounds = []
    with pytest.raises(UsageError, match="mine: finish"):
        idiolect.fit(
            made.model.module(made.model.initial),
            made.clients,
            method(finish=lambda local: EMPTY),
            rounds=2,
            on_round=lambda run, record: rounds.append(record),
        )
    assert not rounds


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: method(objectiv=unreduced), r"mine: a Part has no 'objectiv' \(did you mean objective\?\)"),
        (lambda: method(confer=unreduced), "mine: a Part has no 'confer'"),
        (
            lambda: method(direction=lambda direction, weights, local, slot: direction),
            r"mine: direction is called with \(direction, weights, local\), but takes \(.*, slot\)",
        ),
        (lambda: method(finish=lambda: None), r"mine: finish is called with \(local\), but takes \(\)"),
        (lambda: method(finish=EMPTY), r"mine: finish must be a function \(local\), not a Tree"),
        (
            lambda: method(contribute=lambda central, arrival: EMPTY),
            "mine: contribute is without effect: .* aggregate",
        ),
        (lambda: method(individual=True), "mine: individual is without effect: the part has no aggregate"),
        (lambda: method(message=lambda central: EMPTY), "mine: message is without effect: the part has no rows"),
        (lambda: method(transductive=True), "mine: transductive is without effect: the part has no deploy"),
        (lambda: part(lambda: EMPTY)(), r"<lambda>: a function marked @part must return a Part, not a Tree"),
    ],
)
def test_a_part_that_cannot_be(make, line):
    with pytest.raises(UsageError, match=line):
        make()


def test_an_exception_in_a_hook_names_part_and_hook():
    with pytest.raises(UsageError) as caught:
        check_parts(federation(method(finish=lambda local: (local.memory["nothing"], EMPTY))))
    assert re.fullmatch(
        r"mine: finish raises KeyError: 'nothing' \(test_author_errors.py, line \d+\)", str(caught.value)
    )
    assert isinstance(caught.value.__cause__, KeyError)


def fails(*given):
    return {}["n"]


RAISING = [
    *({hook: lambda *given: fails()} for hook in ("memory", "server", "begin", "objective", "gradient", "direction")),
    *({hook: lambda *given: fails()} for hook in ("finish", "broadcast", "deploy", "attach", "aggregate")),
    {"rows": lambda setup: fails()},
    {"message": lambda central: fails(), "rows": zeros},
    {"contribute": lambda central, arrival: fails(), "aggregate": lambda central, mean: Update()},
    {"gradient": lambda grad, local: fails},
]


@pytest.mark.parametrize("hooks", RAISING, ids=lambda hooks: "-".join(hooks))
def test_every_hook_that_raises_is_one_line_with_its_cause(hooks):
    with pytest.raises(UsageError) as caught:
        check_parts(federation(method(**hooks)))
    said = rf"mine: {next(iter(hooks))} raises KeyError: 'n' \(test_author_errors.py, line \d+\)"
    assert re.fullmatch(said, str(caught.value))
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("hooks", RAISING[:3] + RAISING[6:8] + RAISING[11:13], ids=lambda hooks: "-".join(hooks))
def test_a_hook_that_raises_in_a_description_is_the_same_line(hooks):
    world = federation(methods.fedavg())
    with pytest.raises(UsageError) as caught:
        describe(method(**hooks), world.model)
    said = rf"mine: {next(iter(hooks))} raises KeyError: 'n' \(test_author_errors.py, line \d+\)"
    assert re.fullmatch(said, str(caught.value))


def asking(layer, sums):
    return lambda local, w: (local.total(w, Query(layer, sums, {"n": ()})) and w, local.memory)


@pytest.mark.parametrize(
    ("hooks", "line"),
    [
        ({"objective": lambda local: Objective("6", fails)}, "mine: the loss of its objective raises KeyError: 'n' "),
        ({"objective": lambda local: Objective("6")}, "mine: objective raises TypeError: .* 'loss' "),
        (
            {"objective": lambda local: Objective("nope", lambda inner, seen, y, facts: inner(seen, y))},
            "a part asks for layer 'nope', which the model does not have; there are 0, 1",
        ),
        ({"begin": asking("6", fails)}, "mine: begin raises KeyError: 'n' "),
        ({"begin": asking("nope", fails)}, "a part asks for layer 'nope', which the model does not have"),
        (
            {"deploy": lambda local, w: (len(local.inputs), w)[1]},
            "mine: deploy raises TypeError: .*; local.inputs is None unless the part says transductive=True",
        ),
        ({"attach": lambda module: nn.Linear(2, 2)}, "mine: attach changes the module .* returns None, not a Linear"),
        ({"neutral": {"zz": 1}}, "mine: neutral names 'zz', which is no argument of mine"),
        ({"neutral": 3}, "mine: neutral=3 is not a mapping or None"),
        ({"uniform": "yes"}, "mine: uniform='yes' is not true or false"),
        ({"gradients": 0.5}, "mine: gradients=0.5 is not a whole number"),
        (
            {"gradient": lambda grad, local: lambda at, b: (g := grad(at, b))._replace(gradient=g.gradient / 0.0)},
            r"mine: gradient of mine\(\) gives a gradient that is not finite: check its arguments",
        ),
        (
            {"direction": lambda d, w, local: d * float("inf")},
            r"mine: direction of mine\(\) gives a direction that is not finite: check its arguments",
        ),
    ],
)
def test_what_a_part_cannot_do(hooks, line):
    with pytest.raises(UsageError, match=line) as caught:
        check_parts(federation(method(**hooks)))
    assert "\n" not in str(caught.value)


def test_the_part_whose_argument_is_infinite_is_named_and_no_other():
    with pytest.raises(
        UsageError, match=r"^sam: gradient of sam\(rho=inf, names=None\) gives a gradient that is not fin"
    ):
        check_parts(federation(methods.fedavg() + parts.estimated_sam(0.1) + parts.sam(1e999)))


def test_no_part_is_blamed_for_a_gradient_that_is_infinite_without_it():
    fed = federation(methods.fedsam(0.1) + parts.server_momentum(0.5))
    model = fed.model.with_loss(lambda output, target: output.sum() * float("inf"))
    work = fed.assignment("ada", "train")
    assert not torch.isfinite(model.grad(fed.model.initial, work.stream.epochs(1)[0]).gradient.flat).any()
    check_method(fed, replace(fed.worker, model=model, learner=model), work)


IN_PLACE = {
    "begin": [lambda local, w: (w, local.memory), lambda local, w: local.shared, lambda local, w: local.start],
    "gradient": [lambda grad, local: grad, lambda grad, local: local.start, lambda grad, local: local.shared],
    "direction": [lambda d, w, local: d, lambda d, w, local: w, lambda d, w, local: local.start],
    "finish": [lambda local: (local.memory, EMPTY), lambda local: local.end, lambda local: local.start],
    "aggregate": [lambda central, mean: Update(), lambda central, mean: central.old],
    "broadcast": [lambda central: central.old, lambda central: central.old],
    "deploy": [lambda local, w: w, lambda local, w: w, lambda local, w: local.shared],
}


@pytest.mark.parametrize(("hook", "which"), [(h, k) for h, them in IN_PLACE.items() for k in range(1, len(them))])
def test_a_hook_that_changes_what_it_is_given(hook, which):
    right, given = IN_PLACE[hook][0], IN_PLACE[hook][which]

    def wrong(*arguments):
        given(*arguments).flat.mul_(2)
        return right(*arguments)

    wrong.__signature__ = inspect.signature(right)
    check_parts(federation(method(**{hook: right})))
    with pytest.raises(UsageError, match=f"mine: {hook} changes .* in place: return a new tree, such as a . b"):
        check_parts(federation(method(**{hook: wrong})))


def test_a_reduction_that_mixes_the_clients_of_a_stack_names_the_part():
    """The norm is over all clients together, where it should be one number for each."""

    def direction(direction, weights, local):
        return direction / direction.flat.norm()

    mixing = method(direction=direction)
    check_parts(federation(mixing))
    with pytest.raises(UsageError, match=r"mine: mixes clients that .* in a stack .* reduce along the last axis"):
        check_parts(federation(mixing, engine=Stacked(4)))
    check_parts(federation(method(direction=lambda d, weights, local: d / norm(d)), engine=Stacked(4)))
    others = replace(mixing, parts=(*mixing.parts, idiolect.parts.sam(0.1)))
    with pytest.raises(UsageError, match="mine: mixes clients"):
        check_parts(federation(others, engine=Stacked(4)))


@pytest.mark.parametrize("made", CATALOG, ids=lambda m: m.name)
def test_the_trial_step_accepts_every_method_and_changes_nothing(made):
    for engine in (None, Stacked(4)):
        fed = federation(made, engine=engine)
        before = {p: t.flat.clone() for p, t in fed.server.items()}
        check_parts(fed)
        assert all(torch.equal(fed.server[p].flat, flat) for p, flat in before.items())
        assert not list(fed.memory)
        assert fed.round == 0
