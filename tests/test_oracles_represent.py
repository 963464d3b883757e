"""FedDBE, kNN-Per and FedAS against textbook loops that share no code with them."""

from functools import partial

import pytest
import torch
from test_oracles import NAMES, assert_follows, close, federation

from idiolect import Method, methods, parts, scope
from idiolect.compute.autograd import Model
from idiolect.testing.oracles import averaging, represent
from idiolect.testing.worlds import examples, network

NOT_NORMAL = sorted((~scope.batch_norm)(Model(network()).structure))


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
@pytest.mark.parametrize("momentum", [0.3, 1.0])
def test_feddbe(momentum, weighting):
    method = methods.feddbe(strength=5.0, momentum=momentum, weighting=weighting)
    made, expected = assert_follows(method, partial(represent.feddbe, 5.0, momentum))
    vectors = torch.stack([made.personal(n)["6.domain_bias.vector"] for n in NAMES])
    assert torch.allclose(vectors, torch.stack(expected.vectors[-1]), rtol=0, atol=1e-11)
    assert torch.allclose(made.server["domain_bias"]["mean"], expected.consensus, rtol=0, atol=1e-11)
    assert vectors.abs().amax(dim=1).min() > 1e-3


def test_feddbe_with_personal_normalization():
    method = methods.fedbn() + parts.domain_bias(5.0, 0.3)
    assert_follows(method, partial(represent.feddbe, 5.0, 0.3), shared=NOT_NORMAL)


def passes(made, epochs):
    """Return the batches of the first passes of a client's round, to train or to deploy."""

    def of(purpose, t, i):
        before, made.round = made.round, t
        batches = [(b.x, b.y) for b in made.assignment(NAMES[i], purpose).stream.epochs(epochs)]
        made.round = before
        return batches

    return of


@pytest.mark.parametrize("epochs", [1, 2])
def test_fedas(epochs):
    method = methods.fedas(epochs=epochs, lr=0.3)
    oracle = partial(represent.fedas, 0.3, epochs, passes(federation(method), epochs))
    made, _ = assert_follows(method, oracle)
    received = made.server["share"]
    aligned = made.personal("dan")
    assert (aligned["0.weight"] - received["0.weight"]).abs().max() > 1e-3


def test_fedas_with_personal_normalization():
    parted = (parts.share(~(scope.batch_norm | scope.head)), parts.feature_alignment(1, 0.3), parts.fisher_weights())
    method = Method(parted, "FedAS", "uniform")
    assert_follows(method, partial(represent.fedas, 0.3, 1, passes(federation(method), 1)), shared=NOT_NORMAL)


@pytest.mark.parametrize("capacity", [9, 64])
@pytest.mark.parametrize(("neighbors", "share", "scale"), [(3, 0.6, 0.05), (50, 0.25, 0.01)])
def test_knnper(neighbors, share, scale, capacity):
    """Training is FedAvg's, and each client's predictions are those of the loop over the examples it keeps."""
    method = methods.knnper(neighbors, share, capacity, scale)
    made, _ = assert_follows(method, averaging.fedavg)
    x = examples("unseen", 6)[0]
    for name in NAMES:
        own = made.personal(name)
        kept = own["6.nearest_neighbors.features"], own["6.nearest_neighbors.labels"]
        train = made.clients[name].train
        plain = made.model.module(made.general())
        count = min(capacity, len(train.y))
        store = found(plain, train, *(t[:count] for t in kept))
        assert (kept[1][count:] == -1).all()
        expected = represent.knn_probabilities(plain, store, x, neighbors, share, scale)
        close({"": made.model.predict(own, x).exp()}, {"": expected}, name)
        assert (expected - plain(x).softmax(1)).abs().max() > 1e-2


def found(model, train, features, labels):
    """Return the examples whose features and labels these are; each is another one."""
    gaps = torch.cdist(features, model[:-1](train.x).detach(), compute_mode="donot_use_mm_for_euclid_dist")
    near, which = gaps.min(dim=1)
    assert near.max() < 1e-11
    assert len(set(which.tolist())) == len(labels)
    assert train.y[which].tolist() == labels.tolist()
    return train.x[which], train.y[which]
