"""Models that are common today, each with data of three unequal clients, a loss and metrics."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idiolect import ClientData, Metric, own_loss
from idiolect.core.nest import arguments, logits, mapped
from idiolect.core.structure import structure_of
from idiolect.data import first_of

SIZES = {"north": 12, "south": 20, "west": 9}
"""Training examples of each client; it has half as many for its test."""


class Case(NamedTuple):
    """A model, its clients, and how they are trained."""

    model: Callable[[], nn.Module]
    clients: Callable[[], dict[str, ClientData]]
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    metrics: tuple[Metric, ...] | None = None


def drawn(client: str) -> torch.Generator:
    """Return the random stream of a client."""
    return torch.Generator().manual_seed(list(SIZES).index(client) + 1)


def clients_of(examples: Callable[[int, torch.Generator], Any]) -> dict[str, ClientData]:
    """Return three clients of unequal size."""
    found = {}
    for client, size in SIZES.items():
        stream = drawn(client)
        found[client] = ClientData(train=examples(size, stream), test=examples(size // 2, stream))
    return found


WORDS, LENGTH = 40, 10


def bert(peft: bool = False) -> nn.Module:
    """Return a tiny BERT for classification, from its configuration; with adapters and a head of its own."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=LENGTH, num_labels=3,
    )  # fmt: skip
    model: nn.Module = BertForSequenceClassification(config)
    if not peft:
        return model
    from peft import LoraConfig, TaskType, get_peft_model

    return get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query", "value"]))


def sentences(size: int, stream: torch.Generator) -> list[dict[str, Tensor]]:
    """Return rows as a tokenizer makes them; the class is decided by the first words."""
    ids = torch.randint(1, WORDS, (size, LENGTH), generator=stream)
    labels = ids[:, :3].sum(dim=1) % 3
    mask = (torch.arange(LENGTH) < torch.randint(4, LENGTH + 1, (size, 1), generator=stream)).long()
    return [
        {"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in zip(ids * mask, mask, labels, strict=True)
    ]


class Causal(nn.Module):
    """A language model with a causal mask as a buffer, whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.register_buffer("mask", torch.full((LENGTH, LENGTH), float("-inf")).triu(1))
        self.decoder = nn.Linear(16, WORDS, bias=False)
        self.decoder.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        outputs: Tensor = self.decoder(self.block(self.embed(ids), src_mask=self.mask))
        return outputs.transpose(1, 2)


def continued(size: int, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return windows of words, and the same one word later."""
    ids = torch.randint(0, WORDS, (size, LENGTH + 1), generator=stream)
    return ids[:, :-1], ids[:, 1:]


class Recurrent(nn.Module):
    """An LSTM that predicts the next letter."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(letters, 8), nn.LSTM(8, 24, batch_first=True)
        self.out = nn.Linear(24, letters)

    def forward(self, ids: Tensor) -> Tensor:
        outputs: Tensor = self.out(self.lstm(self.embed(ids))[0][:, -1])
        return outputs


class Residual(nn.Module):
    """Two convolutions around which the input passes."""

    def __init__(self, inside: int, out: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False), norm(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), norm(out)
        same = stride == 1 and inside == out
        self.short = nn.Identity() if same else nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), norm(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.short(x))


class ResNet18(nn.Module):
    """The residual network with 18 layers, 16 channels wide at its start."""

    def __init__(self, norm: Callable[[int], nn.Module], classes: int = 3, width: int = 16) -> None:
        super().__init__()
        self.fc = nn.Linear(8 * width, classes)  # registered first: the order of registration says nothing
        self.stem, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), norm(width)
        blocks: list[nn.Module] = []
        inside = width
        for stage, out in enumerate((width, 2 * width, 4 * width, 8 * width)):
            blocks += [Residual(inside, out, 1 + (stage > 0), norm), Residual(out, out, 1, norm)]
            inside = out
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.norm(self.stem(x))))
        outputs: Tensor = self.fc(x.mean(dim=(2, 3)))
        return outputs


def images(size: int, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images whose class is their brightest color."""
    x, y = torch.randn(size, 3, 16, 16, generator=stream), torch.randint(0, 3, (size,), generator=stream)
    x[torch.arange(size), y] += 1.0
    return x, y


class UNet(nn.Module):
    """A U-Net of two levels: a class for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.low = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down(x)
        outputs: Tensor = self.out(torch.cat([first, self.up(self.low(first))], dim=1))
        return outputs


def pixels(size: int, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images and the class of each pixel; the frame of the image does not count (255)."""
    x = torch.randn(size, 3, 8, 8, generator=stream)
    y = (x.sum(dim=1) > 0).long()
    y[:, 0], y[:, -1] = 255, 255
    return x, y


def table(outputs: int) -> nn.Module:
    """Return a network for tables of eight columns."""
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, outputs))


def labeled(size: int, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return rows and three yes-or-no labels for each."""
    x = torch.randn(size, 8, generator=stream)
    return x, x[:, :3] > 0


def measured(size: int, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return rows and a number for each."""
    x = torch.randn(size, 8, generator=stream)
    return x, x[:, :1] - 2 * x[:, 1:2]


def survived(size: int, stream: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Return rows, and for each the time of its last observation and whether it ended with the event."""
    x = torch.randn(size, 8, generator=stream)
    time = torch.exp(-x[:, 0] + 0.3 * torch.randn(size, generator=stream))
    return x, {"time": time, "event": torch.rand(size, generator=stream) < 0.7}


def cox(risk: Tensor, target: dict[str, Tensor]) -> Tensor:
    """Return the mean negative partial log-likelihood of Cox's model, over the events of the batch."""
    order = target["time"].argsort(descending=True)
    risk, event = risk[order, 0], target["event"][order].to(risk.dtype)
    return -((risk - torch.logcumsumexp(risk, dim=0)) * event).sum() / event.sum().clamp(min=1)


def concordance(risk: Tensor, target: dict[str, Tensor]) -> Tensor:
    """Return the share of comparable pairs in which the shorter time has the greater risk."""
    time, event, risk = target["time"], target["event"], risk[:, 0]
    pair = (time[:, None] < time) & event[:, None]
    right = (risk[:, None] > risk).double() + 0.5 * (risk[:, None] == risk).double()
    return (right * pair).sum() / pair.sum()


class TwoInputs(nn.Module):
    """A network for an image and a table row."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(8))
        self.row, self.out = nn.Linear(8, 8), nn.Linear(16, 2)
        self(torch.zeros(2, 3, 8, 8), torch.zeros(2, 8))

    def forward(self, image: Tensor, row: Tensor) -> Tensor:
        outputs: Tensor = self.out(torch.relu(torch.cat([self.image(image), self.row(row)], dim=1)))
        return outputs


def both(size: int, stream: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return images and rows, and the class of each pair."""
    x = torch.randn(size, 3, 8, 8, generator=stream), torch.randn(size, 8, generator=stream)
    return x, (x[0].mean(dim=(1, 2, 3)) + x[1].mean(dim=1) > 0).long()


def letters(size: int, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return windows of letters, and the letter after each."""
    ids, later = continued(size, stream)
    return ids, later[:, -1]


CASES = {
    "BERT, from its configuration": Case(bert, partial(clients_of, sentences), own_loss),
    "BERT with LoRA (peft), its head trained": Case(partial(bert, True), partial(clients_of, sentences), own_loss),
    "causal transformer, tied embedding": Case(Causal, partial(clients_of, continued)),
    "LSTM on letters": Case(partial(Recurrent, WORDS), partial(clients_of, letters)),
    "ResNet-18, batch normalization": Case(partial(ResNet18, nn.BatchNorm2d), partial(clients_of, images)),
    "ResNet-18, group normalization": Case(partial(ResNet18, partial(nn.GroupNorm, 4)), partial(clients_of, images)),
    "U-Net, a class for each pixel": Case(UNet, partial(clients_of, pixels), nn.CrossEntropyLoss(ignore_index=255)),
    "several labels": Case(partial(table, 3), partial(clients_of, labeled), F.binary_cross_entropy_with_logits),
    "regression": Case(partial(table, 1), partial(clients_of, measured), F.mse_loss),
    "Cox survival": Case(partial(table, 1), partial(clients_of, survived), cox, (Metric("C-index", concordance),)),
    "image and table row": Case(TwoInputs, partial(clients_of, both)),
}


def prediction(net: nn.Module, case: Case) -> Tensor:
    """Return the predictions of a network for the test inputs of one client."""
    x, _ = first_of(case.clients()["north"].test, 4)
    dtype = next(net.parameters()).dtype
    alone, named = arguments(mapped(lambda t: t.to(dtype) if t.is_floating_point() else t, x))
    with torch.no_grad():
        return logits(net(*alone, **named))


def frozen_normalization(case: Case) -> bool:
    """Return whether a model has no normalization layer that is trained."""
    return not structure_of(case.model()).normalization
