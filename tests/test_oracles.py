"""Each method against a textbook loop that shares no code with it: unequal clients, rounds, the same batches."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from idiolect import SGD, Exponential, Method, Training, methods, parts, scope
from idiolect.compute.autograd import Model
from idiolect.data import ClientData
from idiolect.engines.federation import Federation
from idiolect.testing.oracles import averaging, personal, sharpness
from idiolect.testing.worlds import examples, fitted, network, sensitive_layers

SIZES = {"ada": 21, "ben": 5, "cleo": 9, "dan": 30, "eve": 14}  # ragged last batches, one of them of one example
NAMES = list(SIZES)
ROUNDS = 4
SETTINGS = Training(
    lr=0.2,
    local_epochs=2,
    batch_size=4,
    optimizer=SGD(momentum=0.5, weight_decay=0.01),
    schedule=Exponential(0.9),
    clip=0.7,
)


def federation(method, loss=F.cross_entropy, sizes=SIZES, participation=0.6, training=SETTINGS):
    clients = {name: ClientData(train=examples(name, n)) for name, n in sizes.items()}
    return Federation(
        Model(fitted(network(), method), loss), method, training, ROUNDS, participation, seed=1, clients=clients
    )


def given(made):
    """What an oracle is given so that it sees the same cohorts, batches and learning rates as a federation."""
    cohorts, batches = [], {}
    for t in range(ROUNDS):
        made.round = t
        cohorts.append([NAMES.index(c) for c in made.cohort()])
        for i in cohorts[-1]:
            stream = made.assignment(NAMES[i], "train").stream
            batches[t, i] = [(b.x, b.y) for b in stream.epochs(made.training.local_epochs)]
    made.round = 0
    return {
        "model": fitted(network(), made.method),
        "batches": lambda t, i: batches[t, i],
        "clients": len(NAMES),
        "rounds": ROUNDS,
        "lr": [made.training.schedule(made.training.lr, t, ROUNDS) for t in range(ROUNDS)],
        "weights": [SIZES[n] if made.method.weighting == "samples" else 1 for n in NAMES],
        "cohorts": cohorts,
        "momentum": made.training.optimizer.momentum,
        "weight_decay": made.training.optimizer.weight_decay,
        "clip": made.training.clip,
    }


def close(ours, theirs, what):
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape, (what, name)
        assert torch.allclose(ours[name].double(), tensor.double(), rtol=0, atol=1e-11), (what, name)


def assert_follows(method, oracle, **arguments):
    made = federation(method)
    expected = oracle(**arguments, **given(made))
    for t in range(ROUNDS):
        made.play()
        close(made.server["share"], expected.shared[t], f"shared, round {t}")
        assert set(made.server["share"]) == set(expected.shared[t]) - made.model.structure.names("counter")
        for i, name in enumerate(NAMES):
            close(made.model.tensors(made.personal(name)), expected.deployed[t][i], f"{name}, round {t}")
    return made, expected


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
@pytest.mark.parametrize(
    ("make", "oracle", "arguments"),
    [
        (methods.fedavg, averaging.fedavg, {}),
        (methods.local, averaging.local, {}),
        (methods.fedbn, averaging.fedbn, {}),
        (methods.silobn, averaging.silobn, {}),
        (methods.fedprox, averaging.fedprox, {"mu": 0.3}),
        (methods.fedsam, sharpness.fedsam, {"rho": 0.2}),
        (methods.fedasam, sharpness.fedasam, {"rho": 0.4, "eta": 0.1}),
        (methods.mofedsam, sharpness.mofedsam, {"rho": 0.2, "alpha": 0.3}),
        (methods.scaffold, personal.scaffold, {}),
        (methods.fedgamma, personal.fedgamma, {"rho": 0.3}),
    ],
)
def test_method(make, oracle, arguments, weighting):
    assert_follows(replace(make(**arguments), weighting=weighting), oracle, **arguments)


@pytest.mark.parametrize("kind", ["all", "affine", "statistics"])
def test_bn_only_with_plain_means(kind):
    names = {"all": scope.batch_norm, "affine": scope.batch_norm & scope.weights, "statistics": scope.statistics}[kind]
    assert_follows(Method((parts.share(names),), "BN-only"), averaging.bn_only, kind=kind)
    assert methods.bn_only(kind).parts == (parts.share(names, variance="pooled"),)


@pytest.mark.parametrize("sensitivity", ["code", "paper"])
@pytest.mark.parametrize("selection", ["most", "least"])
@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_fedfsa(selection, sensitivity, weighting):
    settings = {"rho": 0.05, "rho_larger": 0.6, "top": 2, "alpha": 0.3, "selection": selection}
    method = methods.fedfsa(**settings, sensitivity=sensitivity, weighting=weighting)
    untuned = Method(method.parts[:-1], "FedFSA", weighting)
    their_word = {"code": "code", "paper": "raw"}[sensitivity]
    made, expected = assert_follows(untuned, sharpness.fedfsa, **settings, sensitivity=their_word)
    for i, name in enumerate(NAMES):
        chosen = expected.top[-1][i]
        assert sorted(made_layers(made, name)) == sorted(chosen)
    close(made.server["server_momentum"], expected.pseudo_gradient[-1], "pseudo-gradient")


def made_layers(made, name):
    return sensitive_layers(made.memory.get(name)["flexible_sam"])


def test_ditto():
    assert_follows(methods.ditto(0.7), partial(personal.ditto, 0.7))


def test_fedala():
    """Also what each client would start from, and so predicts with, after every round."""
    method = methods.fedala(scope.head, share_of_batches=0.6, lr=3.0)
    made = federation(method)

    def epoch(purpose, t, i):
        made.round = t
        return [(b.x, b.y) for b in made.assignment(NAMES[i], purpose).stream.epochs(1)]

    first = {(t, i): epoch("train", t, i) for t in range(ROUNDS) for i in range(len(NAMES))}
    last = {(t, i): epoch("deploy", t + 1, i) for t in range(ROUNDS) for i in range(len(NAMES))}
    oracle = partial(
        personal.fedala,
        lr_mix=3.0,
        rounds_first=10,
        share=0.6,
        names=["6.weight", "6.bias"],
        first_epoch=lambda t, i: first[t, i],
        deploy_epoch=lambda t, i: last[t, i],
    )
    assert_follows(method, oracle)


def test_fedfsa_random_layers():
    """The oracle is told which layers were drawn; over clients and rounds the draws must differ."""
    method = methods.fedfsa(rho=0.05, rho_larger=0.6, top=1, alpha=0.3, selection="random")
    made = federation(Method(method.parts[:-1]))
    world = given(made)
    drawn = {}
    for t in range(ROUNDS):
        for name in made.play().cohort:
            drawn[t, NAMES.index(name)] = made_layers(made, name)
    settings = {"rho": 0.05, "rho_larger": 0.6, "top": 1, "alpha": 0.3}
    expected = sharpness.fedfsa(**settings, selection=lambda t, i, _: drawn[t, i], **world)
    close(made.server["share"], expected.shared[-1], "shared")
    assert len({tuple(v) for v in drawn.values()}) > 1


def test_fedbn_with_momentum_from_the_server():
    """Personal weights under shared momentum follow their own gradient: the composition has an oracle too."""
    method = methods.fedbn() + parts.sam(0.2) + parts.server_momentum(0.3)
    shared = sorted((~scope.batch_norm)(Model(network()).structure))
    assert_follows(method, sharpness.mofedsam, rho=0.2, alpha=0.3, shared=shared)


@pytest.mark.parametrize("names", ["everything", "head"])
def test_fine_tuning(names):
    plain, made = federation(methods.fedavg()), federation(methods.fedavg_ft(getattr(scope, names), epochs=3, lr=0.1))
    how = {k: given(made)[k] for k in ("momentum", "weight_decay", "clip")}
    plain.play()
    made.play()
    batches = [[(b.x, b.y) for b in made.assignment(n, "deploy").stream.epochs(3)] for n in NAMES]
    start = [plain.model.tensors(plain.personal(n)) for n in NAMES]
    tuned = {"everything": None, "head": ["6.weight", "6.bias"]}[names]
    expected = averaging.fine_tune(network(), start, lambda i: batches[i], 0.1, tuned, **how)
    for name, state in zip(NAMES, expected, strict=True):
        close(made.model.tensors(made.personal(name)), state, name)


def test_pooled_variance():
    """Sharing statistics with pooled variance gives the statistics of the pooled clients."""
    made = federation(methods.bn_only("statistics"), participation=1.0)
    sent = [out.uploads["share"] for out in made.engine.train(made, NAMES)]
    made.play()
    expected = averaging.pooled_statistics([dict(tree) for tree in sent], [SIZES[n] for n in NAMES])
    close(made.server["share"], expected, "pooled")


def test_regression_with_any_loss():
    """The loss is the user's: least absolute deviation on a linear network."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(2, 12, 3).double(), torch.randn(2, 12, 1).double()
    clients = {n: ClientData(train=(x[i], y[i])) for i, n in enumerate("ab")}
    made = Federation(Model(net, F.l1_loss), methods.fedavg(), Training(lr=0.1, batch_size=None), 3, 1.0, 0, clients)
    expected = averaging.fedavg(
        model=net,
        batches=lambda t, i: [(x[i], y[i])],
        clients=2,
        rounds=3,
        lr=0.1,
        weights=[1, 1],
        loss=nn.L1Loss(),
    )
    for t in range(3):
        made.play()
        close(made.server["share"], expected.shared[t], t)
