"""The head is the layer that makes the output, wherever it is registered; else the model says how to name it."""

import warnings

import pytest
import torch
from structure_worlds import Net, clients, examples, played
from torch import nn
from torch.nn import functional as F

from idiolect import ClientData, UsageError, fit, methods, parts, scope
from idiolect.compute.autograd import Model
from idiolect.compute.trial import tried
from idiolect.core.method import Method
from idiolect.core.structure import structure_of

VECTOR, SERIES, IMAGE = (4,), (5, 4), (3, 8, 8)


def linear(a=6, b=3):
    return nn.Linear(a, b)


def gated(m, x):
    hidden = m.body(x).relu()
    return m.fc(hidden * m.gate(hidden).sigmoid())


def tied(bias=True):
    net = Net(lambda m, x: m.decoder(m.body(m.embedding[None, :, 0] * x)), embedding=nn.Parameter(torch.ones(4, 1)))
    net.body, net.table, net.decoder = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3, bias=bias)
    net.do = lambda m, x: m.decoder(m.body(x).tanh() + m.table.weight.mean(0))
    del net.embedding
    net.decoder.weight = net.table.weight
    return net


class Block(nn.Module):
    """A residual block."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.short = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return (self.norm(self.conv(x)) + self.short(x)).relu()


FOUND = {
    "before the body": (lambda: Net(lambda m, x: m.head(m.body(x).relu()), head=linear(), body=linear(4, 6)), "head"),
    "unused layer last": (
        lambda: Net(lambda m, x: m.head(m.body(x).relu()), head=linear(), body=linear(4, 6), aux=linear()),
        "head",
    ),
    "gate": (lambda: Net(gated, fc=linear(), body=linear(4, 6), gate=linear(6, 6)), "fc"),
    "tied": (tied, "decoder"),
    "layers after it": (
        lambda: nn.Sequential(linear(4, 6), nn.ReLU(), linear(), nn.BatchNorm1d(3), nn.PReLU(3), nn.Softplus()),
        "2",
    ),
    "several layers": (
        lambda: nn.Sequential(linear(4, 6), nn.ReLU(), nn.Sequential(linear(6, 6), nn.Dropout(0.2), linear())),
        "2.2",
    ),
    "scaled": (lambda: Net(lambda m, x: m.fc(x) * m.scale, fc=linear(4), scale=nn.Parameter(torch.ones(()))), "fc"),
    "with a matrix around it": (
        lambda: Net(lambda m, x: m.fc(x + m.shift).relu(), fc=linear(4), shift=nn.Parameter(torch.ones(1, 4))),
        "fc",
    ),
    "in place": (lambda: nn.Sequential(linear(4, 6), nn.ReLU(inplace=True), linear(), nn.ReLU(inplace=True)), "2"),
    "a class of its own": (
        lambda: nn.Sequential(linear(4, 6), Net(lambda m, x: x @ m.weight, weight=nn.Parameter(torch.randn(6, 3)))),
        "1",
    ),
    "parametrized": (lambda: nn.Sequential(linear(4, 6), nn.utils.parametrizations.weight_norm(linear())), "1"),
    "one layer": (lambda: nn.Linear(4, 3), ""),
}

SHAPED = {
    "convolution": (
        lambda: Net(lambda m, x: m.out(m.a(x).relu()).mean((2, 3)), out=nn.Conv2d(5, 3, 1), a=nn.Conv2d(3, 5, 3)),
        "out",
        IMAGE,
    ),
    "residual network": (
        lambda: Net(lambda m, x: m.fc(m.two(m.one(x)).mean((2, 3))), fc=nn.Linear(3, 3), one=Block(), two=Block()),
        "fc",
        IMAGE,
    ),
    "recurrent": (
        lambda: Net(lambda m, x: m.fc(m.rnn(x)[0][:, -1]), fc=linear(), rnn=nn.LSTM(4, 6, batch_first=True)),
        "fc",
        SERIES,
    ),
    "attention": (
        lambda: Net(
            lambda m, x: m.fc(m.encoder(x).mean(1)),
            fc=linear(4),
            encoder=nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1),
        ),
        "fc",
        SERIES,
    ),
}

UNCLEAR = {
    "two layers added": (lambda: Net(lambda m, x: m.a(x) + m.b(x), a=linear(4), b=linear(4)), "a and b make it"),
    "two outputs": (lambda: Net(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=linear(4), b=linear(4)), "a and b make"),
    "a gate at the end": (
        lambda: Net(lambda m, x: m.a(x) * m.gate(x).sigmoid(), a=linear(4), gate=linear(4)),
        "a and gate make it",
    ),
    "a weight outside of its layer": (
        lambda: Net(lambda m, x: F.linear(m.body(x), m.table.weight), body=linear(4, 6), table=linear()),
        r"body and table.weight make it together\): name the head, names=named\('table.weight'\)",
    ),
    "no gradient": (
        lambda: Net(lambda m, x: m.a(x).detach() + m.shift, a=linear(4), shift=nn.Parameter(torch.ones(3))),
        None,
    ),
}


def shown(net, shape):
    net = net.double()
    return tried(Model(net), examples("x", 4, shape)[0]).structure


@pytest.mark.parametrize("name", [*FOUND, *SHAPED])
def test_the_layer_that_makes_the_output_by_a_pass_and_by_a_trace(name):
    make, expected, *shape = {**FOUND, **SHAPED}[name]
    by_pass = shown(make(), shape[0] if shape else VECTOR)
    assert by_pass.head == expected
    assert structure_of(make()).head == expected
    assert scope.layer_of(scope.head, by_pass) == expected


@pytest.mark.parametrize("name", UNCLEAR)
def test_where_no_single_layer_makes_it_the_line_says_how_to_name_it(name):
    make, line = UNCLEAR[name]
    if line is None:  # a pass shows nothing; a trace shows the layer all the same
        line = "does not show it"
        structure = shown(make(), VECTOR)
    else:
        with pytest.raises(UsageError, match=line):
            _ = structure_of(make()).head
        structure = shown(make(), VECTOR)
    with pytest.raises(UsageError, match=line) as caught:
        scope.head(structure)
    assert "names=named(" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_trace_the_only_linear_layer_is_the_head_and_two_are_unclear():
    def branching(m, x):
        return m.fc(m.body(x) if x.sum() > 0 else -m.body(x))

    one = Net(branching, fc=nn.Linear(6, 3), body=nn.Conv1d(1, 2, 1))
    assert structure_of(one).head == "fc"
    ends = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8))
    with pytest.raises(UsageError, match="'1', has no weights of its own to train: name the head"):
        scope.head(structure_of(ends))
    two = Net(branching, fc=nn.Linear(6, 3), body=linear(4, 6))
    with pytest.raises(UsageError, match="a trace without examples does not show it"):
        _ = structure_of(two).head
    assert shown(two, VECTOR).head == "fc"


def unused_last(order=("head", "body", "aux")):
    torch.manual_seed(3)
    held = {"head": linear(), "body": linear(4, 6), "aux": linear()}
    return Net(lambda m, x: m.head(m.body(x).tanh()), **{n: held[n] for n in order}).double()


HEADED = {
    "fedala": lambda **k: methods.fedala(**k),
    "fedas": lambda **k: methods.fedas(**k),
    "fedbabu": lambda **k: methods.fedbabu(**k),
    "fedcp": lambda **k: methods.fedcp(**k),
    "fedcr": lambda **k: methods.fedcr(strength=0.01, samples=2, **k),
    "feddbe": lambda **k: methods.feddbe(**k),
    "fedfsa": lambda **k: methods.fedfsa(top=1, **k),
    "fedlc": lambda **k: methods.fedlc(**k),
    "fedntd": lambda **k: methods.fedntd(**k),
    "fedpac": lambda **k: methods.fedpac(**k),
    "fedper": lambda **k: methods.fedper(**k),
    "fedproto": lambda **k: methods.fedproto(**k),
    "fedrep": lambda **k: methods.fedrep(**k),
    "fedrod": lambda **k: methods.fedrod(**k),
    "fedthe": lambda **k: methods.fedthe(steps=2, **k),
    "gpfl": lambda **k: methods.gpfl(**k),
    "knnper": lambda **k: methods.knnper(neighbors=2, capacity=4, **k),
    "lg_fedavg": lambda **k: methods.lg_fedavg(**k),
    "moon": lambda **k: methods.moon(**k),
    "pfedfda": lambda **k: methods.pfedfda(ridge=0.1, **k),
    "pfedsim": lambda **k: methods.pfedsim(warmup=1, **k),
}


def test_every_method_that_needs_a_head_takes_its_name():
    import inspect

    for name in methods.__all__:
        make = getattr(methods, name)
        if callable(make) and "head" in repr(make().parts):
            assert "names" in inspect.signature(make).parameters or "tuned" in inspect.signature(make).parameters, name
            assert name in HEADED, name


@pytest.mark.parametrize("name", HEADED)
def test_registration_decides_nothing(name):
    """The same network, registered in another order or with its head named, gives the same numbers."""
    orders = [("head", "body", "aux"), ("body", "aux", "head"), ("aux", "head", "body")]
    runs = [played(unused_last(order), HEADED[name](), rounds=2) for order in orders]
    runs.append(played(unused_last(), HEADED[name](names=scope.named("head")), rounds=2))
    for run in runs[1:]:
        assert set(run.weights) == set(runs[0].weights)
        for client in clients():
            own, first = (dict(r.personal(client).named_parameters()) for r in (run, runs[0]))
            assert all(torch.allclose(t, first[n], rtol=1e-9, atol=1e-11) for n, t in own.items())
            aux = next(t for n, t in own.items() if n.endswith("aux.weight"))
            assert torch.allclose(aux, unused_last().aux.weight, rtol=1e-12)  # no gradient moves it


def test_the_head_stays_with_the_client_and_the_unused_layer_is_shared():
    run = played(unused_last(), methods.fedper())
    assert set(run.weights) == {"body.weight", "body.bias", "aux.weight", "aux.bias"}
    heads = [run.personal(c).head.weight for c in clients()]
    assert not torch.allclose(heads[0], heads[1])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", sorted(HEADED.keys() - {"pfedfda"}))
def test_a_tied_head_is_one_tensor_under_one_name(name, bias):
    torch.manual_seed(0)
    run = played(tied(bias).double(), HEADED[name](), rounds=2)
    module = run.personal("ada")
    module = getattr(module, "module", module)  # inside of one that adapts
    assert module.decoder.weight is module.table.weight
    assert "decoder.weight" not in run.federation.model.structure.layout.names
    if name == "fedper":
        assert set(run.weights) == {"body.weight", "body.bias", "table.bias"}


def test_a_layer_that_no_pass_calls_is_refused_where_features_are_needed():
    for method in (methods.fedproto, methods.moon, methods.fedrod):
        with pytest.raises(UsageError, match="layer 'aux' is not called in a pass"):
            played(unused_last(), method(names=scope.named("aux")), rounds=1)


def test_an_embedding_is_no_classifier():
    net = Net(lambda m, x: F.linear(m.body(x), m.table.weight), body=linear(4, 6), table=nn.Embedding(3, 6)).double()
    with pytest.raises(UsageError, match="must be a linear layer from features to classes; 'table' is none"):
        played(net, methods.fedproto(names=scope.named("table")))
    run = played(net, methods.fedper(names=scope.named("table")))
    assert set(run.weights) == {"body.weight", "body.bias"}


def test_a_frozen_head_has_nothing_to_keep():
    net = unused_last()
    net.head.requires_grad_(False)
    with pytest.raises(UsageError, match="'head', has no weights of its own to train: name"):
        played(net, methods.fedper())


def test_a_part_finds_the_head_of_a_model_that_other_parts_have_extended():
    method = Method((parts.share(), parts.private_head(), parts.domain_bias(), parts.nearest_neighbors(2, 0.5, 4)))
    run = played(unused_last(), method, rounds=2)
    assert run.federation.model.structure.head == "head"


def test_a_small_transformer():
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        config = transformers.BertConfig(vocab_size=30, num_labels=3, **sizes)
        bert = transformers.BertForSequenceClassification(config)
        net = Net(lambda m, x: m.bert(x).logits, bert=bert)
        tokens = torch.arange(24).reshape(4, 6)
        held = {c: ClientData(train=(tokens + k, [0, 1, 2, 0])) for k, c in enumerate("ab")}
        run = played(net, methods.fedper(), held=held, rounds=2)
        normal = played(net, methods.fedbn(names=scope.normalization), held=held, rounds=1)
    every = set(dict(net.named_parameters()))
    assert every - set(run.weights) == {"bert.classifier.weight", "bert.classifier.bias"}
    assert {n for n in every - set(normal.weights)} == {n for n in every if "LayerNorm" in n}
    assert len(every - set(normal.weights)) == 6


class Placed(nn.Module):
    """A network that calls its head with the input by place."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(torch.tanh(self.body(x)))


class Named(Placed):
    """The same, by name."""

    def forward(self, x):
        return self.fc(input=torch.tanh(self.body(x)))


@pytest.mark.parametrize(
    "method",
    [
        methods.fedavg() + parts.nearest_neighbors(neighbors=2),
        methods.fedrod(),
        methods.feddbe(),
        methods.fedthe(epochs=1, steps=2),
        methods.fedcp(),
        methods.gpfl(),
        methods.fedrep(),
    ],
    ids=repr,
)
def test_a_head_may_be_called_by_name(method):
    torch.manual_seed(0)
    called, plain = Named(), Placed()
    plain.load_state_dict(called.state_dict())
    x, y = torch.randn(12, 3), torch.arange(12) % 2
    clients = {name: ClientData((x[k::2], y[k::2]), test=(x, y)) for k, name in enumerate("ab")}
    found, expected = (fit(net, clients, method, rounds=2).personal("a")(x) for net in (called, plain))
    assert torch.equal(found, expected)
