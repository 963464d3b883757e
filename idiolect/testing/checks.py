"""What must hold for every method, whatever it computes: run them on your own with `parametrize_with_checks`.

They guard the plumbing; the formula of a part needs an oracle, a law and planted bugs of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from idiolect import parts
from idiolect.core import scope
from idiolect.core.method import Method
from idiolect.core.tree import Tree
from idiolect.core.types import Trees
from idiolect.data import ClientData
from idiolect.engines.federation import Federation
from idiolect.engines.processes import Processes
from idiolect.engines.stacked import Stacked
from idiolect.engines.threads import Threads
from idiolect.rounds.client import Deployed, Worker, client_round
from idiolect.rounds.server import Upload
from idiolect.rounds.training import Training
from idiolect.storage import checkpoint
from idiolect.storage.disk import store_for
from idiolect.storage.run_directory import RunDirectory
from idiolect.testing.worlds import RAGGED, SIZES, examples, federation, population

Check = Callable[[Method], None]


def same(one: Trees, other: Trees, tolerance: float = 0.0) -> None:
    """Assert that two sets of trees have the same names, shapes, dtypes and, within the tolerance, values."""
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    for part, tree in one.items():
        assert tree.layout is other[part].layout, (part, tree, other[part])
        assert tree.flat.dtype == other[part].flat.dtype
        for name in tree:
            gap = (tree[name] - other[part][name]).abs().max() if tree[name].numel() else torch.tensor(0.0)
            assert gap <= tolerance, f"{part}/{name} differs by {float(gap)}"


def same_state(one: Federation, other: Federation, tolerance: float = 0.0) -> None:
    """Assert that two federations hold the same server state and client memories."""
    same(one.server, other.server, tolerance)
    assert set(one.memory) == set(other.memory)
    for client in one.memory:
        same(one.memory.get(client), other.memory.get(client), tolerance)
        if one.rows and other.rows:
            same(one.rows.get(client), other.rows.get(client), tolerance)


def played(method: Method, rounds: int = 3, **world: Any) -> Federation:  # noqa: ANN401
    """Return a federation after some rounds."""
    made = federation(method, **world)
    for _ in range(rounds):
        made.play()
    return made


def check_engines_agree(method: Method) -> None:
    """Stacks of any width and any number of workers give the results of the sequential engine, for any client sizes.

    Also the weights that predict for a client's test inputs, where these change anything.
    """
    clients = population(RAGGED, val=True)
    alone = played(method, clients=clients)
    for engine in (Stacked(1), Stacked(4), Stacked(6), Threads(1), Threads(3), Processes(2)):
        other = played(method, clients=clients, engine=engine)
        same_state(alone, other, 1e-12)
        for client, values in zip(clients, engine.measure(other, list(clients), _values), strict=True):
            found = torch.tensor(values, dtype=torch.float64)
            expected = _values(alone.worker, clients[client], alone.deployed(client), alone.server["share"])
            assert (found - torch.tensor(expected, dtype=torch.float64)).abs().max() <= 1e-12, (engine, client)
        engine.close()


def _values(worker: Worker, data: ClientData, own: Deployed, shared: Tree) -> list[float]:
    x = data.held()["test"].x
    found: list[float] = torch.cat([own.weights.flat, own.at(x).flat]).tolist()
    return found


def check_client_order(method: Method) -> None:
    """The order in which clients are listed changes nothing; memory follows its client."""
    same_state(played(method), played(method, clients=dict(reversed(population().items()))))


def check_nothing_is_changed(method: Method) -> None:
    """A round and its predictions change neither what was broadcast, nor memories, nor the model, nor the inputs."""
    made = played(method, rounds=1)
    work = made.assignment("ada", "train")
    server = made.server
    given = (server, work.received, work.memory, work.messages)
    before = [{p: t.flat.clone() for p, t in trees.items()} for trees in given]
    initial = made.model.initial.clone()
    out = client_round(method, made.model, made.training, work)
    made.end_round([Upload(0, out.uploads, 3, out.steps)])
    inputs, own = examples("unseen", 7)[0], made.deployed("ada")
    weights, x = own.weights.clone(), inputs.clone()
    adapted = own.at(inputs).clone()
    assert torch.equal(own.at(inputs).flat, adapted.flat)
    assert torch.equal(own.weights.flat, weights.flat)
    assert torch.equal(inputs, x)
    for trees, flats in zip(given, before, strict=True):
        assert all(torch.equal(trees[p].flat, flat) for p, flat in flats.items())
    assert torch.equal(made.model.initial.flat, initial.flat)


def check_memory_keeps_its_shape(method: Method) -> None:
    """A client's memory has the names, shapes and dtypes it started with."""
    fresh, after = federation(method).memory.get("ada"), played(method).memory.get("ada")
    for part, tree in fresh.items():
        assert tree.layout is after[part].layout
        assert tree.flat.dtype == after[part].flat.dtype


def check_nothing_personal_is_sent(method: Method) -> None:
    """Uploads and broadcasts hold none of the tensors that are personal, and all that are shared."""
    made = played(method, rounds=1)
    work = made.assignment("dan", "train")
    uploads = client_round(method, made.model, made.training, work).uploads
    personal = set(work.memory["share"])
    assert set(uploads["share"]) == set(made.server["share"])
    for trees in (uploads, made.server):
        assert not personal & {name for tree in trees.values() for name in tree}


def check_memory_is_not_shared(method: Method) -> None:
    """No two clients' memories, nor the server's trees, are views of one storage; none keeps a larger row alive."""
    made = played(method, rounds=2)
    owners: dict[int, str] = {}
    held = {"the server": made.server} | {client: made.memory.get(client) for client in made.memory}
    if made.rows:
        held |= {f"the row of {client}": made.rows.get(client) for client in made.rows}
    for owner, trees in held.items():
        for tree in trees.values():
            if tree.flat.numel():
                place = tree.flat.untyped_storage().data_ptr()
                assert owners.setdefault(place, owner) == owner, (owner, owners[place])
                assert owner == "the server" or tree.flat.untyped_storage().nbytes() == tree.nbytes, (owner, tree)


def check_resume(method: Method) -> None:
    """A federation that is stopped after two rounds and goes on from disk ends as one that was not."""
    whole = played(method, rounds=3, participation=0.5)
    for kind in ("ram", "disk"):
        with tempfile.TemporaryDirectory() as folder:
            keep = partial(store_for, kind, f"{folder}/run", len(SIZES))
            store = RunDirectory(f"{folder}/run")
            store.write_config({})
            stopped = played(method, rounds=2, participation=0.5, keep=keep)
            checkpoint.save(store, stopped)
            stopped.play()  # the kill comes in the round after
            resumed = federation(method, participation=0.5, keep=keep)
            checkpoint.restore(store, resumed, {})
            assert resumed.round == 2
            resumed.play()
            same_state(resumed, whole)


def check_absent_clients_are_untouched(method: Method) -> None:
    """A round leaves the memory of clients that did not take part as it was."""
    made = played(method, rounds=2, participation=0.5)
    before = {client: made.memory.get(client) for client in SIZES}
    cohort = made.play().cohort
    absent = sorted(set(SIZES) - set(cohort))
    assert absent
    for client in absent:
        same(made.memory.get(client), before[client])


def check_wire(method: Method) -> None:
    """Uploads and memory survive the trip through bytes, bit for bit."""
    made = played(method, rounds=1)
    out = client_round(method, made.model, made.training, made.assignment("ben", "train"))
    for trees in (out.uploads, out.memory):
        arrived = {p: Tree.of(load(save({n: t.clone() for n, t in tree.items()}))) for p, tree in trees.items()}
        ordered = {p: Tree.of({n: arrived[p][n] for n in tree}) for p, tree in trees.items() if len(tree)}
        same(ordered, {p: tree for p, tree in trees.items() if len(tree)})


def check_repr(method: Method) -> None:
    """What a method prints evaluates to an equal method that does the same."""
    words = {"Method": Method} | vars(scope) | vars(parts)
    again = eval(repr(method), words | {p.name: p.make for p in method.parts})
    assert again == method
    same_state(played(again, rounds=1), played(method, rounds=1))


def check_seeds(method: Method) -> None:
    """The same seed gives the same bits; another seed gives others, where anything is drawn."""
    same_state(played(method, seed=3), played(method, seed=3))
    one, other = played(method, seed=3).personal("dan"), played(method, seed=4).personal("dan")
    assert not torch.equal(one.flat, other.flat)


def check_identical_clients(method: Method) -> None:
    """The mean over clients that hold the same examples is what any one of them sent."""
    twins = {name: ClientData(train=examples("ada", 8)) for name in "abc"}
    made = federation(method, clients=twins, training=Training(lr=0.1, batch_size=None))
    for _ in range(2):
        out = client_round(method, made.model, made.training, made.assignment("b", "train"))
        made.play()
        same({"share": made.server["share"]}, {"share": out.uploads["share"]}, 1e-12)


def check_one_example(method: Method) -> None:
    """A client with one example, and a cohort of one client, train and stay finite; so does one input to predict."""
    made = federation(method, clients=population({"one": 1, "nine": 9}), participation=0.5)
    seen = {client for _ in range(6) for client in made.play().cohort}
    assert seen == {"one", "nine"}
    own = made.deployed("one")
    assert torch.isfinite(own.weights.flat).all()
    assert torch.isfinite(made.learner.predict(own.at(examples("one", 1)[0]), examples("one", 1)[0])).all()


def check_neutral(method: Method) -> None:
    """With the arguments that make each part do nothing, a method does what its exchange alone does."""
    quiet = [p.make(**{**dict(p.arguments), **p.neutral}) for p in method.parts if p.make and p.neutral is not None]
    others = tuple(p for p in method.parts[1:] if p.neutral is None)
    plain = played(Method((method.parts[0], *others), weighting=method.weighting))
    neutral = played(Method((method.parts[0], *others, *quiet), weighting=method.weighting))
    same({"share": neutral.server["share"]}, {"share": plain.server["share"]}, 1e-12)
    for client in SIZES:
        same({"own": neutral.personal(client)}, {"own": plain.personal(client)}, 1e-12)


CHECKS: tuple[Check, ...] = tuple(value for name, value in list(globals().items()) if name.startswith("check_"))


def parametrize_with_checks(
    methods: Iterable[Method], exceptions: Mapping[Method, Mapping[Check, str]] | None = None
) -> pytest.MarkDecorator:
    """Turn methods into one test per method and check; the test takes `method` and `check`.

    Args:
        methods: what to check.
        exceptions: for a method, the checks it must fail and why; passing one of them is an error.

    Example:
        >>> from idiolect.methods import fedbn
        >>> @parametrize_with_checks([fedbn()])
        ... def test_my_method(method, check):
        ...     check(method)
    """
    cases = []
    for method in methods:
        reasons = (exceptions or {}).get(method, {})
        for check in CHECKS:
            marks = [pytest.mark.xfail(reason=reasons[check], strict=True)] if check in reasons else []
            name = f"{method.name}-{check.__name__.removeprefix('check_')}"
            cases.append(pytest.param(method, check, marks=marks, id=name))
    return pytest.mark.parametrize(("method", "check"), cases)
