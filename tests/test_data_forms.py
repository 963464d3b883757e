"""Users' data and models as they are: sequences, pixels, events, and the data sets and models of Hugging Face."""

import pytest
import torch
from lazy_worlds import Processes, Sequential, Stacked, Threads, assert_engines_agree, personal, run
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import idiolect
from idiolect import ClientData, Metric, UsageError, methods

SIZES = {"ada": 9, "ben": 5, "cleo": 6}
ENGINES = [Sequential(), Threads(2), Processes(2), Stacked(2)]
CHOSEN = [Sequential(), Threads(2), Processes(2), "stacked"]  # which is another engine if the model cannot be stacked


def drawn(client, *shape):
    generator = torch.Generator().manual_seed(sum(map(ord, client)))
    return torch.randn(SIZES[client], *shape, generator=generator, dtype=torch.float64)


def tokens(client, length=7, words=11):
    return (drawn(client, length).abs() * 5).long() % words


def measured(done, client):
    return done.records[-1]["clients"][client]["personalized"]


class Reader(nn.Module):
    """Mean of embedded words without padding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.out = nn.Embedding(11, 4), nn.Linear(4, 2)
        self.double()

    def forward(self, ids, mask):
        return self.out((self.words(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def sentences(client):
    """Return sequences of 1 to 7 words, each with a label."""
    ids = tokens(client)
    return [(ids[k, : 1 + k % 7], int(ids[k, 0] > 5)) for k in range(SIZES[client])]


def padded(examples):
    ids = pad_sequence([ids for ids, _ in examples], batch_first=True)
    mask = pad_sequence([torch.ones(len(ids), dtype=torch.float64) for ids, _ in examples], batch_first=True)
    return {"ids": ids, "mask": mask}, torch.tensor([y for _, y in examples])


def test_ragged_sequences_are_those_that_are_padded_once():
    def ragged():
        return {c: ClientData(sentences(c), test=sentences(c), collate=padded) for c in SIZES}

    def once(client):
        x, y = padded([*sentences(client), (torch.zeros(7, dtype=torch.int64), 0)])  # all clients have one length
        return {name: tensor[:-1] for name, tensor in x.items()}, y[:-1]

    whole = {c: ClientData(once(c), test=once(c)) for c in SIZES}
    expected = run(whole, module=Reader())
    found = assert_engines_agree(ragged, [e for e in ENGINES if not isinstance(e, Stacked)], module=Reader())
    assert torch.allclose(personal(found), personal(expected), rtol=0, atol=1e-12)
    for client in SIZES:
        assert measured(found, client) == pytest.approx(measured(expected, client), abs=1e-12)
    with pytest.raises(UsageError, match=r"examples cannot be stacked to a batch.*collate=\.\.\."):
        run({c: ClientData(sentences(c)) for c in SIZES}, module=Reader())


class Writer(nn.Module):
    """A causal transformer: scores of the next word at each place, ``(b, words, length)``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(11, 8), nn.Parameter(torch.randn(7, 8))
        self.layers = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.out = nn.Linear(8, 11)
        self.double()

    def forward(self, ids, mask):
        later = torch.ones(7, 7, dtype=torch.bool, device=ids.device).triu(1)
        seen = self.layers(self.words(ids) + self.places, src_mask=later, src_key_padding_mask=mask)
        return self.out(seen).transpose(1, 2)


def text(client):
    """Return words with padding at the end, and the next words, of which padding is ignored."""
    ids = tokens(client)
    mask = torch.arange(7) >= 3 + torch.arange(len(ids))[:, None] % 5
    following = torch.cat([ids[:, 1:], ids[:, :1]], dim=1).masked_fill(mask, -100)
    return {"ids": ids, "mask": mask}, following


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_causal_transformer_with_labels_that_are_ignored():
    done = assert_engines_agree(
        lambda: {c: ClientData(text(c), test=text(c)) for c in SIZES}, CHOSEN, 1e-10, module=Writer(), rounds=2
    )
    x, y = text("ada")
    scores = done.personal("ada")(**x)
    counted = y != -100
    right = (scores.argmax(1) == y)[counted].double().mean()
    assert measured(done, "ada")["accuracy"] == pytest.approx(float(right))
    assert measured(done, "ada")["loss"] == pytest.approx(float(F.cross_entropy(scores, y).detach()))
    changed = {**x, "ids": x["ids"].masked_fill(x["mask"], 3)}
    others = done.personal("ada")(**changed)
    assert torch.allclose(others.transpose(1, 2)[counted], scores.transpose(1, 2)[counted])


class Pixels(nn.Module):
    """A network with a path down and up, and one across: a class for each pixel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.down, self.across = nn.Conv2d(1, 4, 2, stride=2), nn.Conv2d(1, 4, 1)
        self.up, self.out = nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Conv2d(8, 3, 1)
        self.double()

    def forward(self, x):
        return self.out(torch.cat([self.up(F.elu(self.down(x))), self.across(x)], dim=1))


def test_a_class_for_each_pixel_with_borders_that_are_ignored():
    def clients():
        found = {}
        for client in SIZES:
            x = drawn(client, 1, 6, 6)
            y = (x[:, 0] + 1.5).clamp(0, 2.999).long()
            y[:, 0] = 255
            found[client] = ClientData((x, y), test=(x, y))
        return found

    loss = nn.CrossEntropyLoss(ignore_index=255)
    done = assert_engines_agree(clients, ENGINES, 1e-10, module=Pixels(), method=methods.fedper(), loss=loss, rounds=3)
    x, y = clients()["ada"].test
    scores = done.personal("ada")(x).detach()
    assert measured(done, "ada")["loss"] == pytest.approx(float(F.cross_entropy(scores[:, :, 1:], y[:, 1:])))
    assert measured(done, "ada")["accuracy"] == pytest.approx(float((scores.argmax(1) == y)[:, 1:].double().mean()))
    assert done.holdings() == {}
    with pytest.raises(UsageError, match=r"client 'ada', train row 0: label 255 is out of range"):
        run(clients(), module=Pixels())


def cox(risk, target):
    """Return the negative partial log-likelihood of events."""
    at_risk = target["time"][None, :] >= target["time"][:, None]
    log_sum = torch.where(at_risk, risk.flatten()[None, :], -torch.inf).logsumexp(dim=1)
    event = target["event"]
    return ((log_sum - risk.flatten()) * event).sum() / event.sum().clamp(min=1)


def test_targets_may_be_a_nest():
    def clients():
        found = {}
        for client in SIZES:
            x = drawn(client, 3)
            target = {"time": torch.exp(-x[:, 0]), "event": x[:, 1] > -1}
            found[client] = ClientData((x, target), test=(x, target))
        return found

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 1)).double()
    metric = Metric("events", lambda risk, target: target["event"].double().mean())
    done = assert_engines_agree(
        clients, ENGINES, module=net, loss=cox, metrics=[metric], rounds=30, method=methods.fedavg()
    )
    x, target = clients()["ada"].test
    assert measured(done, "ada")["loss"] == pytest.approx(float(cox(done.personal("ada")(x), target).detach()))
    assert measured(done, "ada")["events"] == pytest.approx(float(target["event"].double().mean()))
    assert measured(done, "ada")["loss"] < float(cox(net(x), target).detach()) - 0.05
    with pytest.raises(UsageError, match="cross-entropy takes one tensor of labels, not a dict"):
        run(clients(), module=nn.Linear(3, 2).double())


transformers = pytest.importorskip("transformers", reason="models that return their own loss")


def bert(dropout=0.0):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8, num_labels=3, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).double()


def columns(client):
    ids = tokens(client)
    mask = (torch.arange(7) < 3 + torch.arange(len(ids))[:, None] % 5).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 3}


def as_dataset(client):
    datasets = pytest.importorskip("datasets", reason="data sets of Hugging Face")
    return datasets.Dataset.from_dict({name: c.tolist() for name, c in columns(client).items()})


@pytest.mark.parametrize("form", [columns, as_dataset, lambda c: as_dataset(c).with_format("torch")])
def test_a_model_and_a_data_set_of_hugging_face_as_they_are(form):
    done = assert_engines_agree(
        lambda: {c: ClientData(form(c), test=form(c)) for c in SIZES},
        CHOSEN, 1e-10, module=bert(), loss=idiolect.own_loss, metrics=[idiolect.accuracy],
    )  # fmt: skip
    assert not any(name.startswith("classifier") for name in done.weights)  # FedPer: the head is personal
    x = columns("ada")
    output = done.personal("ada")(**x)
    assert measured(done, "ada")["loss"] == pytest.approx(float(output.loss.detach()))
    assert measured(done, "ada")["accuracy"] == pytest.approx(
        float((output.logits.argmax(1) == x["labels"]).double().mean())
    )
    held = {c: ClientData(columns(c), test=columns(c)) for c in SIZES}
    assert torch.allclose(
        personal(done), personal(run(held, module=bert(), loss=idiolect.own_loss)), rtol=0, atol=1e-12
    )


def test_dropout_of_a_transformer_is_the_same_in_processes():
    def clients():
        return {c: ClientData(as_dataset(c)) for c in SIZES}

    one, *others = (
        run(clients(), e, module=bert(0.3), loss=idiolect.own_loss) for e in (Sequential(), Processes(1), Processes(2))
    )
    assert all(torch.equal(personal(one), personal(other)) for other in others)
    assert not torch.allclose(personal(one), personal(run(clients(), module=bert(), loss=idiolect.own_loss)))


def test_a_model_that_returns_its_loss_needs_to_be_told_so():
    with pytest.raises(UsageError, match=r"returns a SequenceClassifierOutput: loss=idiolect\.own_loss"):
        run({"ada": ClientData(columns("ada"))}, module=bert())
