"""Methods whose clients choose models or values, against textbook loops."""

from functools import partial

import pytest
import torch
from test_oracles import NAMES, ROUNDS, SETTINGS, SIZES, assert_follows, close, federation, given

from idiolect import Method, methods, scope
from idiolect.compute.autograd import Model
from idiolect.data import ClientData
from idiolect.engines.federation import Federation
from idiolect.parts import grown_mask, share
from idiolect.testing.oracles import choices
from idiolect.testing.worlds import examples, network

JUDGED = {"ada": 6, "ben": 0, "cleo": 5, "dan": 9, "eve": 0}
"""Validation examples, of which two clients have none."""


def judged(method):
    clients = {
        name: ClientData(train=examples(name, n), val=examples(name + "?", JUDGED[name]) if JUDGED[name] else None)
        for name, n in SIZES.items()
    }
    return Federation(Model(network()), method, SETTINGS, ROUNDS, 0.6, seed=1, clients=clients)


def chosen(made, client):
    """Return whose models a client is sent now, by a look at them."""
    message = made.assignment(client, "train").messages["first_order_mix"]
    models, told = message.flat[: -len(message["others/told"])], message["others/told"]
    pool = {i: made.rows.get(name)["first_order_mix"].flat[: -len(NAMES)] for i, name in enumerate(NAMES)}
    sent = models.view(len(told), -1)[: int(told.sum())]
    return [next(i for i, model in pool.items() if torch.equal(model, row)) for row in sent]


@pytest.mark.parametrize(("others", "explore"), [(4, 0.3), (2, 0.0), (1, 1.0)])
def test_fedfomo(others, explore):
    """With four places everybody is sent all; else the oracle is told who was, and affinities say if that is right."""
    method = methods.fedfomo(others=others, explore=explore)
    made, world = judged(method), given(federation(method))
    told, ours, affinities = {}, [], []
    for t in range(ROUNDS + 1):
        told |= {(t, i): chosen(made, name) for i, name in enumerate(NAMES)}
        if t < ROUNDS:
            made.play()
            ours.append([made.model.tensors(made.personal(name)) for name in NAMES])
            affinities.append([made.rows.get(name)["first_order_mix"]["others/affinity"].tolist() for name in NAMES])
    judges = [examples(n + "?", JUDGED[n]) if JUDGED[n] else examples(n, SIZES[n]) for n in NAMES]
    choice = None if others == 4 else lambda t, i: told[t, i]
    expected, history = choices.fedfomo(judges, choice, **world, shared=[])
    known = set()
    for t in range(ROUNDS):
        known |= set(world["cohorts"][t])
        for i, name in enumerate(NAMES):
            close(ours[t][i], expected.deployed[t][i], f"{name}, round {t}")
            assert affinities[t][i] == pytest.approx(history[t][i], abs=1e-9)
            likes = [history[t][i][j] for j in told[t + 1, i]]
            rest = [history[t][i][j] for j in known - {i} - set(told[t + 1, i])]
            assert len(likes) == min(others, len(known - {i}))
            assert explore or max(rest, default=-9) <= min(likes, default=9)


@pytest.mark.parametrize(
    ("weighting", "settings", "names"),
    [
        ("uniform", {"growth": 0.25, "limit": 0.8, "every": 1}, scope.everything),
        ("samples", {"growth": 0.6, "limit": 0.5, "every": 1}, scope.everything),
        ("uniform", {"growth": 0.9, "limit": 0.8, "every": 2}, ~scope.batch_norm),
    ],
)
def test_fedselect(weighting, settings, names):
    """Also what each client predicts with: its personal values, trained anew on the newest shared ones."""
    method = Method((share(names), grown_mask(**settings)), "FedSelect", weighting)
    if names is scope.everything:
        assert methods.fedselect(**settings, weighting=weighting) == method
    made, last = federation(method), {}
    for t in range(ROUNDS):
        made.round = t + 1
        for i, name in enumerate(NAMES):
            stream = made.assignment(name, "deploy").stream
            last[t, i] = [(b.x, b.y) for b in stream.epochs(SETTINGS.local_epochs)]
    masks = []

    def oracle(**world):
        found, grown = choices.fedselect(**world, **settings, deploy_batches=lambda t, i: last[t, i])
        masks.extend(grown)
        return found

    played, _ = assert_follows(method, partial(oracle, shared=sorted(names(made.model.structure))))
    for name, mask in zip(NAMES, masks, strict=True):
        memory = played.memory.get(name)["grown_mask"]
        assert all(torch.equal(memory[f"mask/{n}"], grown) for n, grown in mask.items())
    assert any(grown.any() for mask in masks for grown in mask.values())
