"""Buffers: statistics are averaged, constants never sent, and what training changes otherwise stays with the client."""

import copy
import warnings

import pytest
import torch
from structure_worlds import Net, assert_same, by_hand, clients, examples, played, tensors
from torch import nn

from idiolect import Output, UsageError, methods
from idiolect.compute.autograd import Model
from idiolect.compute.trial import tried

CAUSAL = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)


class Ema(nn.Module):
    """Subtracts a running mean that it keeps in a buffer."""

    def __init__(self, size, rebinds=False):
        super().__init__()
        self.register_buffer("level", torch.zeros(size, dtype=torch.float64))
        self.rebinds = rebinds

    def forward(self, x):
        if self.training:
            moved = torch.lerp(self.level, x.detach().mean(0), 0.1)
            self.level = moved if self.rebinds else self.level.copy_(moved)
        return x - self.level


class Counted(nn.Module):
    """Scales by a count of its training passes, in an integer buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.passes += 1
        return x * (1 + 0.1 * self.passes)


class Started(nn.Module):
    """Takes its shift from the first batch that it sees; a flag says that it has."""

    def __init__(self):
        super().__init__()
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.register_buffer("shift", torch.zeros(5, dtype=torch.float64))

    def forward(self, x):
        if self.training and not self.started:
            self.shift.copy_(x.detach().mean(0))
            self.started.fill_(True)
        return x - self.shift


class Queue(nn.Module):
    """Keeps the means of its last batches, and where the next one goes, as contrastive methods do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(3, 5, dtype=torch.float64))
        self.register_buffer("place", torch.zeros(1, dtype=torch.int32))

    def forward(self, x):
        out = x + self.queue.mean(0)
        if self.training:
            self.queue[int(self.place)] = x.detach().mean(0)
            self.place[0] = (int(self.place) + 1) % 3
        return out


def old_spectral():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.spectral_norm(nn.Linear(4, 5))


def around(*inner):
    return nn.Sequential(*inner, nn.Tanh(), nn.Linear(5, 3)).double()


OWN = {
    "spectral norm": (
        lambda: around(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5))),
        {"0.parametrizations.weight.0._u", "0.parametrizations.weight.0._v"},
    ),
    "spectral norm by a hook": (lambda: around(old_spectral()), {"0.weight_u", "0.weight_v"}),
    "running mean in place": (lambda: around(nn.Linear(4, 5), Ema(5)), {"1.level"}),
    "running mean by rebinding": (lambda: around(nn.Linear(4, 5), Ema(5, rebinds=True)), {"1.level"}),
    "integer count": (lambda: around(nn.Linear(4, 5), Counted()), {"1.passes"}),
    "flag": (lambda: around(nn.Linear(4, 5), Started()), {"1.started", "1.shift"}),
    "queue": (lambda: around(nn.Linear(4, 5), Queue()), {"1.queue", "1.place"}),
}


def made(name):
    torch.manual_seed(2)
    return OWN[name][0]()


def parameter(net):
    return lambda name: name in dict(net.named_parameters())


@pytest.mark.parametrize("engine", ["sequential", "processes", "stacked"])
@pytest.mark.parametrize("name", OWN)
def test_what_training_changes_otherwise_stays_with_the_client(name, engine):
    net, held = made(name), clients()
    run = played(net, methods.fedavg(), engine, rounds=4, participation=0.67)
    assert set(run.weights) == set(dict(net.named_parameters()))
    assert run.federation.model.structure.own_state == OWN[name][1]
    note = next(n for n in run.notes if "stay with each client and are not averaged" in n)
    assert all(n in note for n in OWN[name][1])
    assert_same(run, by_hand(net, held, [r["cohort"] for r in run.records], parameter(net)))


def test_a_spectral_layer_keeps_norm_one_and_unit_vectors():
    net = made("spectral norm")
    run = played(net, methods.fedavg(), rounds=30)
    for name in clients():
        layer = run.personal(name)[0].requires_grad_(False)
        assert float(torch.linalg.matrix_norm(layer.weight, 2)) == pytest.approx(1, abs=0.02)
        for vector in tensors(layer)["parametrizations.weight.0._u"], tensors(layer)["parametrizations.weight.0._v"]:
            assert float(vector.norm()) == pytest.approx(1, abs=1e-9)


def test_the_shared_model_is_measured_with_the_clients_own_buffers():
    """Under FedAvg each client predicts with the shared weights: both measurements are of the same model."""
    for name in OWN:
        record = played(made(name), methods.fedavg()).records[-1]
        assert record["personalized"]["test"]["loss"] == record["generalized"]["test"]["loss"], name


@pytest.mark.parametrize("name", ["integer count", "queue", "spectral norm"])
def test_resumed_runs_go_on_with_the_clients_own_buffers(name, tmp_path):
    whole = played(made(name), methods.fedbabu(), rounds=4)
    with pytest.raises(KeyboardInterrupt):
        played(made(name), methods.fedbabu(), rounds=4, output=Output(tmp_path, report=False), on_round=_stop)
    run = played(made(name), methods.fedbabu(), rounds=4, output=Output(tmp_path, resume=True, report=False))
    for client in clients():
        found, expected = (tensors(r.personal(client)) for r in (run, whole))
        assert all(torch.equal(t, expected[n]) for n, t in found.items())


def _stop(run, record):
    if run.round == 2:
        raise KeyboardInterrupt


def constant(buffer, persistent=True):
    """A network with a buffer that it uses, if it is floating, and leaves as it is."""
    torch.manual_seed(4)
    net = Net(lambda m, x: m.fc((m.body(x) + m.use()).tanh()), body=nn.Linear(4, 5), fc=nn.Linear(5, 3)).double()
    net.register_buffer("held", buffer, persistent=persistent)
    net.use = lambda: 0.0
    return net


CONSTANTS = {
    "causal mask": (CAUSAL, True),
    "NaN": (torch.full((3,), torch.nan, dtype=torch.float64), True),
    "not persistent": (torch.linspace(0, 1, 5, dtype=torch.float64), False),
    "single precision": (torch.linspace(0, 1, 5), True),
    "half precision": (torch.ones(2).half(), True),
    "integers": (torch.arange(7), True),
    "complex": (torch.ones(2, dtype=torch.complex64), True),
    "flags": (torch.ones(2, dtype=torch.bool), False),
}


class Masked(nn.Module):
    """Attends with a mask of infinities."""

    def __init__(self):
        super().__init__()
        self.query, self.fc = nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("mask", CAUSAL.clone(), persistent=False)

    def forward(self, x):
        scores = self.query(x) @ x.transpose(1, 2) + self.mask
        return self.fc((scores.softmax(-1) @ x).mean(1))


@pytest.mark.parametrize("method", [methods.fedavg(), methods.local(), methods.ditto(), methods.scaffold()])
@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_is_neither_sent_nor_kept_and_costs_nothing(name, method):
    net = constant(*CONSTANTS[name])
    bare = copy.deepcopy(net)
    del bare.held
    run, other = (played(n, method, rounds=2) for n in (net, bare))
    assert [r["bytes_up"] for r in run.records] == [r["bytes_up"] for r in other.records]
    assert [r["bytes_down"] for r in run.records] == [r["bytes_down"] for r in other.records]
    assert "held" not in run.federation.model.structure.layout.names
    own, expected = (r.personal("ben") for r in (run, other))
    assert own.held.dtype == net.held.dtype
    assert torch.equal(own.held.nan_to_num(7), net.held.nan_to_num(7)) if own.held.is_floating_point() else True
    assert all(torch.equal(t, dict(expected.named_parameters())[n]) for n, t in own.named_parameters())
    assert not any("stay with each client" in note for note in run.notes)


@pytest.mark.parametrize("engine", ["sequential", "threads", "processes", "stacked"])
def test_every_engine_uses_a_constant_mask(engine):
    torch.manual_seed(5)
    net, held = Masked().double(), clients((5, 4))
    run = played(net, methods.fedavg(), engine, held=held)
    assert not run.records[-1].get("dropped")
    assert_same(run, by_hand(net, held, [sorted(held)] * 3, parameter(net)))


def test_statistics_of_normalization_are_averaged_as_before():
    torch.manual_seed(6)
    net = Net(
        lambda m, x: m.fc(m.instance(m.norm(m.body(x))[:, None])[:, 0] + m.mask),
        body=nn.Linear(4, 5),
        norm=nn.BatchNorm1d(5),
        instance=nn.InstanceNorm1d(1, track_running_stats=True, affine=True),
        fc=nn.Linear(5, 3),
        mask=torch.zeros(5),
    ).double()
    run = played(net, methods.fedavg())
    assert {n for n in run.weights if "running" in n} == {
        f"{layer}.running_{what}" for layer in ("norm", "instance") for what in ("mean", "var")
    }
    assert_same(run, by_hand(net, clients(), [sorted(clients())] * 3, lambda n: "tracked" not in n))


def test_a_trial_leaves_the_model_and_its_random_stream_alone():
    net = made("queue")
    before = {n: t.clone() for n, t in tensors(net).items()}
    model = Model(net)
    found = tried(model, examples("x", 4)[0])
    assert all(torch.equal(t, before[n]) for n, t in tensors(net).items())
    assert all(torch.equal(t, before[n]) for n, t in tensors(model.training).items())
    assert float(found.initial["1.queue"].abs().max()) == 0


def test_a_forward_that_changes_a_parameter_is_refused():
    class Initializing(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.bias.add_(1)
            return super().forward(x)

    for net in (Initializing(4, 3), nn.Sequential(nn.Linear(4, 4), Initializing(4, 3))):
        with pytest.raises(UsageError, match=r"the forward pass changes parameter '.*bias': do that once before"):
            played(net.double(), methods.fedavg())


def test_an_embedding_with_a_largest_norm_is_no_change():
    torch.manual_seed(0)
    table = nn.Embedding(9, 5, max_norm=0.5)
    net = Net(lambda m, x: m.fc(m.table(x.abs().long().clamp(max=8)).mean(1)), table=table, fc=nn.Linear(5, 3))
    assert played(net.double(), methods.fedavg()).round == 3
