"""What a pass keeps outside of tensors is refused before training, unless no later pass depends on it."""

import random
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from structure_worlds import Net, assert_same, by_hand, clients, played
from torch import nn
from torch.nn import functional as F

from idiolect import ClientData, UsageError, methods


def two(forward, **held):
    torch.manual_seed(7)
    net = Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 3), **held).double()
    return net


def plain(m, x):
    return m.b(m.a(x).tanh())


def warms_up(m, x):
    m.passes += 1
    return plain(m, x) * min(1.0, m.passes / 100)


def late(m, x):
    m.passes += 1
    return plain(m, x) * (2.0 if m.passes > 900 else 1.0)


def inside(m, x):
    m.log.passes += 1
    return plain(m, x) / m.log.passes


def remembers(m, x):
    hidden = m.a(x)
    out = m.b(hidden + (0 if m.last is None else m.last.mean()))
    m.last = hidden.detach()
    return out


def lists(m, x):
    m.seen.append(float(x.mean()))
    return plain(m, x) * len(m.seen)


def drifts(m, x):
    m.level = 0.9 * m.level + 0.1 * float(x.mean())
    return plain(m, x - m.level)


def grows(m, x):
    m.scale = m.scale * 1.01
    return plain(m, x) * m.scale


def counts(m, x):
    m.passes_seen += 1
    return plain(m, x) * m.passes_seen


def counts_in_training(m, x):
    if m.training:
        m.passes_seen += 1
    return plain(m, x) * (1 + m.passes_seen)


def counting(forward):
    net = two(forward)
    net.register_buffer("passes_seen", torch.zeros(1, dtype=torch.float64))
    return net


class Log:
    passes = 0


class Drawing(nn.Module):
    """Drops units by a generator of its own."""

    def __init__(self):
        super().__init__()
        self.own = torch.Generator().manual_seed(0)

    def forward(self, x):
        return x * (torch.rand(x.shape, generator=self.own, dtype=x.dtype) > 0.5)


REFUSED = {
    "counter": (lambda: two(warms_up, passes=0), "the model's attribute 'passes' changes its next passes"),
    "counter that shows late": (lambda: two(late, passes=0), "the model's attribute 'passes'"),
    "counter in an object": (lambda: two(inside, log=Log()), "the model's attribute 'log.passes'"),
    "last activations": (lambda: two(remembers, last=None), "the model's attribute 'last'"),
    "list": (lambda: two(lists, seen=[]), "the model's attribute 'seen'"),
    "running number": (lambda: two(drifts, level=0.0), "the model's attribute 'level'"),
    "tensor that is no buffer": (lambda: grown(), "the model's attribute 'scale'"),
    "in a block": (lambda: nn.Sequential(two(warms_up, passes=0), nn.Tanh()), "the model's attribute '0.passes'"),
    "buffer in evaluation": (
        lambda: counting(counts),
        "the model's buffer 'passes_seen' changes in evaluation too.*if se",
    ),
    "generator": (lambda: nn.Sequential(nn.Linear(4, 3).double(), Drawing()), "draw random numbers from torch's own"),
    "NumPy": (lambda: two(lambda m, x: plain(m, x) * np.random.rand()), "draw random numbers from torch's own"),  # noqa: NPY002
    "random": (lambda: two(lambda m, x: plain(m, x) * random.random()), "draw random numbers from torch's own"),
}


def grown():
    net = two(grows)
    net.scale = 1.0 + torch.zeros(1, dtype=torch.float64)
    net.register_forward_hook(lambda m, given, out: None)
    return net


class Weighted(nn.Module):
    """A loss that counts classes in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("counts", torch.ones(3, dtype=torch.float64))

    def forward(self, output, y):
        self.counts += torch.bincount(y, minlength=3)
        return F.cross_entropy(output, y, weight=self.counts / self.counts.sum())


class Annealed:
    """A loss whose temperature falls with every call."""

    calls = 0

    def __call__(self, output, y):
        self.calls += 1
        return F.cross_entropy(output / (1 + 1 / self.calls), y)


def closed():
    calls = 0

    def loss(output, y):
        nonlocal calls
        calls += 1
        return F.cross_entropy(output, y) * calls

    return loss


def marked(output, y):
    marked.calls = getattr(marked, "calls", 0) + 1
    return F.cross_entropy(output, y) * marked.calls


LOSSES = {
    "buffer": (Weighted, "the loss's attribute 'counts'"),
    "object": (Annealed, "the loss's attribute 'calls'"),
    "closure": (closed, "the loss's attribute 'calls'"),
    "function's attribute": (lambda: marked, "the loss's attribute 'calls'"),
    "partial": (lambda: partial(Annealed()), "the loss's attribute 'calls'"),
    "bound method": (lambda: Annealed().__call__, "the loss's attribute 'calls'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hidden_state_of_a_model_is_refused(name):
    make, line = REFUSED[name]
    with pytest.raises(UsageError, match=line.replace("(", r"\(")) as caught:
        played(make(), methods.local())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", LOSSES)
def test_hidden_state_of_a_loss_is_refused(name):
    make, line = LOSSES[name]
    with pytest.raises(UsageError, match=line) as caught:
        played(two(plain), methods.fedavg(), loss=make())
    assert "\n" not in str(caught.value)


def keeps_activations(m, x):
    m.kept = m.a(x).tanh()
    m.every = [m.kept, {"mean": m.kept.mean()}]
    return m.b(m.kept)


def builds_once(m, x):
    if m.table is None or len(m.table) < x.shape[1]:
        m.table = torch.linspace(0, 1, x.shape[1], dtype=x.dtype)
    return plain(m, x * m.table)


def logs(m, x):
    m.passes += 1
    m.sums.append(float(x.sum()))
    return plain(m, x)


def hooked():
    net, kept = two(plain), {}
    net.a.register_forward_hook(lambda m, given, out: kept.update(out=out, given=given))
    return net


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3)).double()


ACCEPTED = {
    "activations": lambda: two(keeps_activations),
    "hook": hooked,
    "table built once": lambda: two(builds_once, table=None),
    "buffer in training": lambda: counting(counts_in_training),
    "log": lambda: two(logs, passes=0, sums=[]),
    "dropout": lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double(),
    "weight norm by a hook": old_weight_norm,
    "noise from torch": lambda: two(lambda m, x: plain(m, x) + torch.rand(3, dtype=x.dtype)),
}

SERIES = {
    "RNN": lambda: Net(lambda m, x: m.fc(m.rnn(x)[0][:, -1]), rnn=nn.RNN(4, 6, batch_first=True), fc=nn.Linear(6, 3)),
    "LSTM": lambda: Net(
        lambda m, x: m.fc(m.rnn(x)[0][:, -1]), rnn=nn.LSTM(4, 6, 2, batch_first=True), fc=nn.Linear(6, 3)
    ),
    "attention": lambda: Net(
        lambda m, x: m.fc(m.att(x, x, x)[0].mean(1)),
        att=nn.MultiheadAttention(4, 2, batch_first=True),
        fc=nn.Linear(4, 3),
    ),
    "encoder": lambda: Net(
        lambda m, x: m.fc(m.enc(x).mean(1)),
        enc=nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), 1),
        fc=nn.Linear(4, 3),
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_no_later_pass_depends_on_is_accepted_in_every_engine(name):
    torch.manual_seed(0)
    net = ACCEPTED[name]()
    runs = [played(net, methods.fedavg(), engine, rounds=2) for engine in ("sequential", "processes")]
    one, other = (run.weights for run in runs)
    assert all(torch.allclose(t, other[n], rtol=1e-12, atol=1e-13) for n, t in one.items())
    if name in ("activations", "hook", "table built once", "log"):
        assert_same(runs[0], by_hand(two(plain if name != "table built once" else _times_table), *world()))


def _times_table(m, x):
    return plain(m, x * torch.linspace(0, 1, x.shape[1], dtype=x.dtype))


def world(held=None):
    held = held or clients()
    return held, [sorted(held)] * 2, lambda name: True


@pytest.mark.parametrize("name", SERIES)
def test_layers_with_caches_of_their_own_train_as_in_any_program(name):
    torch.manual_seed(8)
    net, held = SERIES[name]().double(), clients((5, 4))
    assert_same(played(net, methods.fedavg(), rounds=2, held=held), by_hand(net, *world(held)))


def test_transformers_are_accepted():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = {
            "Bert": transformers.BertConfig(vocab_size=30, num_labels=3, **sizes),
            "Roberta": transformers.RobertaConfig(vocab_size=30, num_labels=3, **sizes),
            "Llama": transformers.LlamaConfig(vocab_size=30, num_labels=3, pad_token_id=0, **sizes),
        }
        held = {c: ClientData(train=(torch.arange(24).reshape(4, 6) + k, [0, 1, 2, 0])) for k, c in enumerate("ab")}
        for name, config in made.items():
            inner = getattr(transformers, f"{name}ForSequenceClassification")(config)
            run = played(Net(lambda m, x: m.inner(x).logits, inner=inner), methods.fedper(), held=held, rounds=1)
            assert len(run.personal("a").state_dict()) > len(run.weights)


def test_the_users_model_and_loss_are_not_moved_by_the_check():
    loss, net = Annealed(), two(warms_up, passes=0)
    with pytest.raises(UsageError):
        played(two(plain), methods.fedavg(), loss=loss)
    with pytest.raises(UsageError):
        played(net, methods.fedavg())
    assert net.passes == 0
