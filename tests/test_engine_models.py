"""Models of users in the reference engine: forwards that work in place, buffers, heads, and what does not fit."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import idiolect
from idiolect import ClientData, Training, UsageError, methods, scope
from idiolect.compute.autograd import Model
from idiolect.compute.metrics import accuracy
from idiolect.running.evaluation import evaluate_all
from idiolect.testing.worlds import federation


class InPlace(nn.Module):
    """Works in place on its input and on a weight, as Embedding(max_norm=...) does."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2).double()

    def forward(self, x):
        with torch.no_grad():
            self.head.weight.mul_(0.5)
        x -= 1.0
        return self.head(x)


class Rebinding(nn.Module):
    """Keeps a running mean in a buffer that it replaces instead of writing into."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        if self.training:
            self.seen = 0.9 * self.seen + 0.1 * x.detach().mean(0)
        return self.head(x - self.seen)


def pair(seed=0, count=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=generator), torch.arange(count) % 2


def test_a_forward_that_works_in_place_changes_neither_data_nor_broadcast():
    x, y = pair()
    x = x.double()
    before = x.clone()
    clients = {"a": ClientData(train=(x, y), test=(x, y)), "b": ClientData(train=(x, y))}
    made = federation(methods.fedsam(), clients=clients)
    made.model = Model(InPlace())
    made.__post_init__()
    shared = made.server["share"].flat.clone()
    list(made.engine.train(made, ["a", "b"]))
    evaluate_all(made, [accuracy])
    assert torch.equal(x, before)
    assert torch.equal(made.server["share"].flat, shared)


def test_a_buffer_that_the_forward_replaces_is_followed():
    x, y = pair()
    clients = {name: ClientData(train=(x + level, y), test=(x, y)) for name, level in (("a", 5.0), ("b", -3.0))}
    run = idiolect.fit(Rebinding(), clients, methods.fedavg(), rounds=2, training=Training(batch_size=None))
    assert "seen" not in run.weights
    for name, level in (("a", 5.0), ("b", -3.0)):
        assert torch.allclose(run.personal(name).seen, (1 - 0.9**2) * (x + level).mean(0), atol=1e-5)


def test_the_mean_of_variates_holds_when_a_result_is_dropped():
    x, y = pair()
    clients = {"a": ClientData(train=(x, y)), "b": ClientData(train=(x + 1, y)), "c": ClientData(train=pair(count=7))}
    run = idiolect.fit(
        nn.Linear(3, 2),
        clients,
        methods.scaffold(),
        rounds=1,
        loss=lambda output, target: F.cross_entropy(output, target) * (torch.nan if len(target) == 7 else 1.0),
    )
    assert list(run.records[0]["dropped"]) == ["c"]
    own = sum(run.memory(c)["control_variates"]["weight"] for c in "abc") / 3
    assert torch.allclose(run.federation.server["control_variates"]["weight"], own, atol=1e-7)


def test_pooled_variance_does_not_cancel_far_from_zero():
    clients = {n: ClientData(train=(pair(k, 40)[0] + 3e4, pair(k, 40)[1])) for k, n in enumerate("ab")}
    net = nn.Sequential(nn.BatchNorm1d(3, momentum=0.5), nn.Linear(3, 2))
    run = idiolect.fit(net, clients, methods.bn_only(), rounds=20)
    assert ((run.weights["0.running_var"] > 0.3) & (run.weights["0.running_var"] < 3)).all()


def test_a_head_that_the_forward_does_not_use_is_left_alone():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    run = idiolect.fit(Spare(), {"a": ClientData(train=pair(), test=pair())}, methods.fedavg_ft(scope.head), rounds=1)
    assert torch.isfinite(run.federation.personal("a").flat).all()


@pytest.mark.parametrize(
    ("model", "change", "line"),
    [
        (nn.LSTM(3, 2), {}, "a tuple of 3 floating tensors: call the one with the predictions 'logits'"),
        (nn.LazyLinear(2), {}, "lazy layers"),
        (nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2)), {}, "no running statistics"),
        (nn.Linear(3, 1), {"loss": F.mse_loss, "y": torch.zeros(8)}, r"outputs \(2, 1\) and targets \(2,\) differ"),
        (nn.Linear(3, 2), {"loss": nn.CrossEntropyLoss(), "y": torch.full((8,), 7)}, "label 7 is out of range"),
        (nn.Linear(3, 2), {"name": 1}, "client names are text"),
        (nn.Linear(3, 2), {"loss": lambda out, y: out.detach().mean()}, "the loss does not depend on the outputs"),
    ],
)
def test_models_and_losses_that_do_not_fit_are_one_line(model, change, line):
    x, y = pair()
    clients = {change.get("name", "a"): ClientData(train=(x, change.get("y", y)))}
    with pytest.raises(UsageError, match=line) as caught:
        idiolect.fit(model, clients, methods.fedavg(), rounds=1, loss=change.get("loss", F.cross_entropy))
    assert "\n" not in str(caught.value)
