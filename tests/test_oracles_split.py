"""Methods that cut a model in two, look a step ahead or cluster, against textbook loops of their own."""

from functools import partial

import pytest
from test_oracles import NAMES, ROUNDS, SIZES, assert_follows, close, federation

from idiolect import Method, methods, parts, scope
from idiolect.compute.autograd import Model
from idiolect.testing.oracles import clusters, meta, sharpness, split
from idiolect.testing.worlds import examples, network, sensitive_layers

HEAD = ["6.weight", "6.bias"]


def passes(method, purpose, epochs):
    """Return (round, client) -> the batches of so many passes: to train in that round, or to deploy after it."""
    made, found = federation(method), {}
    for t in range(ROUNDS):
        made.round = t + (purpose == "deploy")
        for i, name in enumerate(NAMES):
            found[t, i] = [(b.x, b.y) for b in made.assignment(name, purpose).stream.epochs(epochs)]
    return lambda t, i: found[t, i]


def of_client(i):
    return examples(NAMES[i], SIZES[NAMES[i]])


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_fedper_and_its_opposite(weighting):
    assert_follows(methods.fedper(weighting=weighting), split.fedper, head=HEAD)
    assert_follows(methods.lg_fedavg(weighting=weighting), split.lg_fedavg, head=HEAD)


def test_fedper_keeps_what_it_is_told():
    last = ["4.weight", "4.bias", *HEAD]
    assert_follows(methods.fedper(scope.named("4", "6")), split.fedper, head=last)


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_fedrep(weighting):
    method = methods.fedrep(head_epochs=3, weighting=weighting)
    oracle = partial(
        split.fedrep,
        head=HEAD,
        head_batches=passes(method, "train", 3),
        deploy_batches=passes(method, "deploy", 3),
    )
    assert_follows(method, oracle)


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_fedbabu(weighting):
    method = methods.fedbabu(epochs=3, lr=0.1, weighting=weighting)
    oracle = partial(split.fedbabu, head=HEAD, tuning=passes(method, "deploy", 3), lr_tuned=0.1)
    made, _ = assert_follows(method, oracle)
    for name in NAMES:
        close(made.memory.get(name)["share"], {n: network().state_dict()[n] for n in HEAD}, "the head moved")


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
@pytest.mark.parametrize(("variant", "delta", "steps"), [("first_order", None, 1), ("hessian_free", 0.02, 2)])
def test_per_fedavg(variant, delta, steps, weighting):
    method = methods.per_fedavg(0.3, variant, delta or 0.01, steps, weighting)
    oracle = partial(meta.per_fedavg, rate=0.3, delta=delta, steps=steps, examples=of_client)
    assert_follows(method, oracle)


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
@pytest.mark.parametrize(("names", "seed"), [("everything", 3), ("head", 2)])
def test_ifca(names, seed, weighting):
    """In the last rounds several clusters are chosen and one is not, and a client goes over to another."""
    method = methods.ifca(3, getattr(scope, names), noise=0.2, seed=seed, weighting=weighting)
    begun = federation(method).server["clusters"]
    oracle = partial(clusters.ifca, clusters=[of_cluster(begun, j) for j in range(3)], examples=of_client)
    made, expected = assert_follows(method, oracle)
    for j, tensors in enumerate(expected.clusters[-1]):
        close(of_cluster(made.server["clusters"], j), tensors, f"cluster {j}")
    assert all(len(set(chosen.values())) == 2 for chosen in expected.chosen[2:])
    assert any(len({chosen[i] for chosen in expected.chosen if i in chosen}) > 1 for i in range(len(NAMES)))


def of_cluster(state, j):
    return {n.removeprefix(f"{j}/"): t for n, t in state.items() if n.startswith(f"{j}/")}


@pytest.mark.parametrize("personal", [scope.head, scope.batch_norm])
def test_flexible_sam_goes_with_personal_tensors(personal):
    """FedPer and FedBN with FedFSA's perturbation: candidates of the body and of the head compete alike."""
    settings = {"rho": 0.05, "rho_larger": 0.6, "top": 2}
    flexible, keep = parts.flexible_sam(**settings), ~personal
    shared = sorted(keep(Model(network()).structure))
    oracle = partial(sharpness.fedfsa, **settings, alpha=1.0, shared=shared)
    made, expected = assert_follows(Method((parts.share(keep), flexible)), oracle)
    chosen = [sensitive_layers(made.memory.get(name)["flexible_sam"]) for name in NAMES]
    assert [sorted(c) for c in chosen] == [sorted(c) for c in expected.top[-1]]
