"""Methods on a model with two inputs by name and a dict of outputs, against textbook loops that share no code."""

from functools import partial

import pytest
import torch
from test_oracles import SETTINGS, close
from torch import nn
from torch.nn import functional as F

import idiolect
from idiolect import ClientData, UsageError, methods
from idiolect.compute.autograd import Model
from idiolect.core.scope import named
from idiolect.engines.federation import Federation
from idiolect.testing.oracles import averaging, personal, split

SIZES = {"ada": 21, "ben": 5, "cleo": 10}
NAMES = list(SIZES)
ROUNDS = 4
HEAD = ["head.weight", "head.bias"]


class Plain(nn.Module):
    """An image and a measurement to scores."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.look = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Softplus(), nn.Flatten())
        self.body = nn.Linear(12 + 2, 6)
        self.head = nn.Linear(6, 3)
        self.double()

    def features(self, image, age):
        return torch.tanh(self.body(torch.cat([self.look(image), age], dim=1)))

    def forward(self, given):
        return self.head(self.features(given["image"], given["age"]))


class ByName(Plain):
    """The same, called with named inputs; returns the features too, which no loss uses."""

    def forward(self, image, age):
        features = self.features(image, age)
        return {"features": features, "logits": self.head(features)}


def drawn(name, count):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    level = torch.randn((), generator=generator, dtype=torch.float64)
    image = torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64) + level
    age = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    y = (image.mean(dim=(1, 2, 3)) - level + age[:, 0] + 1.5).clamp(0, 2.999).long()
    return {"image": image, "age": age}, y


def clients():
    return {name: ClientData(train=drawn(name, n)) for name, n in SIZES.items()}


def loss(output, target):
    return F.cross_entropy(output["logits"], target)


def passes(made, purpose, epochs):
    found = {}
    for t in range(ROUNDS):
        made.round = t + (purpose == "deploy")
        for i, name in enumerate(NAMES):
            found[t, i] = [(b.x, b.y) for b in made.assignment(name, purpose).stream.epochs(epochs)]
    made.round = 0
    return lambda t, i: found[t, i]


def world(made):
    cohorts = []
    for made.round in range(ROUNDS):
        cohorts.append([NAMES.index(client) for client in made.cohort()])
    made.round = 0
    return {
        "model": Plain(),
        "batches": passes(made, "train", made.training.local_epochs),
        "clients": len(NAMES),
        "rounds": ROUNDS,
        "lr": [made.training.schedule(made.training.lr, t, ROUNDS) for t in range(ROUNDS)],
        "weights": list(SIZES.values()),
        "cohorts": cohorts,
        "momentum": made.training.optimizer.momentum,
        "weight_decay": made.training.optimizer.weight_decay,
        "clip": made.training.clip,
    }


def fedrep(made):
    return partial(
        split.fedrep,
        head=HEAD,
        head_batches=passes(made, "train", 3),
        deploy_batches=passes(made, "deploy", 3),
    )


@pytest.mark.parametrize(
    ("method", "oracle_of"),
    [
        (methods.fedavg(), lambda made: averaging.fedavg),
        (methods.fedbn(), lambda made: averaging.fedbn),
        (methods.fedrep(named("head"), head_epochs=3), fedrep),
        (methods.ditto(0.7), lambda made: partial(personal.ditto, 0.7)),
    ],
    ids=["fedavg", "fedbn", "fedrep", "ditto"],
)
def test_inputs_by_name_and_a_dict_of_outputs(method, oracle_of):
    made = Federation(Model(ByName(), loss), method, SETTINGS, ROUNDS, 0.6, seed=1, clients=clients())
    assert any(len(cohort) < len(NAMES) for cohort in world(made)["cohorts"])
    expected = oracle_of(made)(**world(made))
    for t in range(ROUNDS):
        made.play()
        close(made.server["share"], expected.shared[t], f"shared, round {t}")
        for i, name in enumerate(NAMES):
            close(made.model.tensors(made.personal(name)), expected.deployed[t][i], f"{name}, round {t}")


def test_the_head_is_what_makes_the_predictions():
    """The output also has the features, which another layer makes."""
    run = idiolect.fit(ByName(), clients(), methods.fedper(), rounds=1, loss=loss)
    assert set(run.weights) == set(Plain().state_dict()) - set(HEAD) - {"look.1.num_batches_tracked"}


def test_a_model_that_returns_a_dict_needs_a_loss_of_it():
    with pytest.raises(UsageError, match=r"client 'ada'.*\(the model returns a dict: loss=idiolect.own_loss takes"):
        idiolect.fit(ByName(), clients(), methods.fedavg(), rounds=1)
