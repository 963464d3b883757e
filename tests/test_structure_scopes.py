"""Scopes: normalization of every kind, names by components and patterns, and what they say where nothing matches."""

import pytest
import torch
from structure_worlds import Net, assert_same, by_hand, clients, played
from torch import nn

from idiolect import UsageError, methods, scope
from idiolect.core.normalization import normalizes, register_normalization
from idiolect.core.structure import structure_of


class LlamaRMSNorm(nn.Module):
    """As in many transformers: one vector, and no class of torch."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class LayerNorm(nn.Module):
    """As in small language models: without a bias."""

    def __init__(self, size):
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(size)), None

    def forward(self, x):
        return nn.functional.layer_norm(x, self.scale.shape, self.scale, self.bias)


class BatchNormAct2d(nn.BatchNorm2d):
    """With an activation, as in collections of image models."""


class Qwen3NextRMSNormGated(LlamaRMSNorm):
    """With a gate."""


class LayerNorm2d(nn.LayerNorm):
    """Over channels."""


class ChannelNorm(nn.Module):
    """With its vector along the channels of an image."""

    def __init__(self):
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.ones(1, 5, 1, 1)) for _ in "ab")


class Scale(nn.Module):
    """A vector that normalizes nothing."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(5))


class NormEmbeddings(nn.Embedding):
    """An embedding with the word in its name."""


class PreNorm(nn.Module):
    """A block around a normalization layer, whose name ends as that of one."""

    def __init__(self):
        super().__init__()
        self.norm, self.shift = nn.LayerNorm(5), nn.Parameter(torch.zeros(5))


class ProjectionNorm(nn.Linear):
    """A linear layer with such a name."""


class Shrink(nn.Module):
    """A normalization layer of a class whose name does not say so."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.full((5,), 2.0))
        self.register_buffer("spread", torch.ones(5))

    def forward(self, x):
        if self.training:
            self.spread = 0.5 * self.spread + 0.5 * x.detach().std(0)
        return self.gain * x / self.spread


YES = [
    nn.BatchNorm1d(5), nn.SyncBatchNorm(5), nn.LayerNorm(5), nn.LayerNorm((5, 5)), nn.GroupNorm(1, 5), nn.RMSNorm(5),
    nn.InstanceNorm1d(5, affine=True), nn.BatchNorm3d(5), LlamaRMSNorm(5), LayerNorm(5), BatchNormAct2d(5),
    Qwen3NextRMSNormGated(5), LayerNorm2d(5), ChannelNorm(), nn.LayerNorm(5, elementwise_affine=False),
]  # fmt: skip
NO = [
    nn.Linear(5, 5), Scale(), NormEmbeddings(5, 5), PreNorm(), ProjectionNorm(5, 5), nn.PReLU(5), nn.Conv1d(5, 5, 1),
    nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5)), nn.utils.parametrizations.weight_norm(nn.Linear(5, 5)),
    nn.LocalResponseNorm(2),
]  # fmt: skip


@pytest.mark.parametrize("layer", YES, ids=lambda m: type(m).__name__)
def test_it_normalizes(layer):
    assert normalizes(layer)


@pytest.mark.parametrize("layer", NO, ids=lambda m: type(m).__name__)
def test_it_does_not(layer):
    assert not normalizes(layer)


def normal(*layers):
    torch.manual_seed(9)
    return nn.Sequential(nn.Linear(4, 5), *layers, nn.Tanh(), nn.Linear(5, 3)).double()


KINDS = {
    "LayerNorm": lambda: nn.LayerNorm(5),
    "GroupNorm": lambda: nn.GroupNorm(1, 5),
    "RMSNorm": lambda: nn.RMSNorm(5),
    "LlamaRMSNorm": lambda: LlamaRMSNorm(5),
    "LayerNorm of its own": lambda: LayerNorm(5),
    "BatchNorm1d": lambda: nn.BatchNorm1d(5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_fedbn_keeps_the_normalization_that_is_there(kind):
    net, held = normal(KINDS[kind]()), clients()
    run = played(net, methods.fedbn(names=scope.normalization), participation=0.67)
    assert set(run.weights) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    cohorts = [r["cohort"] for r in run.records]
    assert_same(run, by_hand(net, held, cohorts, lambda n: n.startswith(("0.", "3."))))


@pytest.mark.parametrize("kind", ["LayerNorm", "GroupNorm", "LlamaRMSNorm"])
@pytest.mark.parametrize("method", [methods.fedbn(), methods.silobn(), methods.bn_only(), methods.adabn()])
def test_methods_of_batch_normalization_say_what_normalization_there_is(method, kind):
    with pytest.raises(UsageError, match=rf"it normalizes in 1 \({kind}\): .*fedbn\(names=normalization\)"):
        played(normal(KINDS[kind]()), method)


def test_bn_only_takes_the_layers():
    run = played(normal(nn.LayerNorm(5)), methods.bn_only(names=scope.normalization))
    assert set(run.weights) == {"1.weight", "1.bias"}


def test_a_model_without_normalization_has_none_to_keep():
    with pytest.raises(UsageError, match="no normalization layer: add one"):
        played(normal(), methods.fedbn(names=scope.normalization))


def test_a_declared_class_normalizes_and_its_buffers_are_statistics():
    net = normal(Shrink())
    assert not normalizes(net[1])
    assert "1.spread" not in played(net, methods.fedavg()).weights
    register_normalization(Shrink)
    try:
        run = played(net, methods.fedavg())
        assert_same(run, by_hand(net, clients(), [sorted(clients())] * 3, lambda n: True))
        kept = played(net, methods.fedbn(names=scope.normalization))
        assert set(run.weights) - set(kept.weights) == {"1.gain", "1.spread"}
    finally:
        from idiolect.core import normalization

        normalization._REGISTERED.discard(Shrink)
    with pytest.raises(UsageError, match="takes a class of modules"):
        register_normalization(Shrink())


def wrapped():
    """Return a network whose layers are inside of others, as adapters leave them."""
    inner = nn.ModuleDict({"default": nn.Linear(5, 3)})
    classifier = nn.ModuleDict({"original_module": nn.Linear(5, 3).requires_grad_(False), "modules_to_save": inner})
    blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(5, 5), "norm1": nn.LayerNorm(5)}) for _ in range(2)])
    return nn.ModuleDict({"base": nn.ModuleDict({"classifier": classifier, "blocks": blocks})})


CLASSIFIER = {f"base.classifier.modules_to_save.default.{leaf}" for leaf in ("weight", "bias")}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("base.classifier", CLASSIFIER),
        ("classifier", CLASSIFIER),
        ("modules_to_save.default", CLASSIFIER),
        ("default", CLASSIFIER),
        ("default.bias", {"base.classifier.modules_to_save.default.bias"}),
        ("blocks.0.fc", {"base.blocks.0.fc.weight", "base.blocks.0.fc.bias"}),
        ("1.norm1.weight", {"base.blocks.1.norm1.weight"}),
        ("*.norm1", {f"base.blocks.{k}.norm1.{leaf}" for k in (0, 1) for leaf in ("weight", "bias")}),
        ("*.fc.bias", {f"base.blocks.{k}.fc.bias" for k in (0, 1)}),
        ("base.blocks.1*", {f"base.blocks.1.{m}.{leaf}" for m in ("fc", "norm1") for leaf in ("weight", "bias")}),
    ],
)
def test_names_are_full_or_whole_components_or_patterns(name, found):
    assert scope.named(name)(structure_of(wrapped())) == found


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "fc",
            r"'fc' is in several places \(base.blocks.0.fc, base.blocks.1.fc\): name one of them, or write '\*fc\*'",
        ),
        ("norm1.weight", "in several places"),
        ("classif", r"no layer or tensor 'classif' \(did you mean (base.)?classifier\?\)"),
        ("lassifier", "no layer or tensor 'lassifier'"),
        ("zzz", "no layer or tensor 'zzz'; there are base.blocks.0.fc, base.blocks.0.norm1, "),
        ("*.lora_A.*", "no layer or tensor .*; there are base.blocks.0.fc"),
        ("original_module", "no layer or tensor 'original_module'"),
    ],
)
def test_what_is_unclear_or_missing_is_one_line(name, line):
    with pytest.raises(UsageError, match=line) as caught:
        scope.named(name)(structure_of(wrapped()))
    assert "\n" not in str(caught.value)


def test_a_full_name_comes_before_a_component():
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleDict({"a": nn.Linear(2, 2)})})
    assert scope.named("a")(structure_of(net)) == {"a.weight", "a.bias"}


def test_a_tied_tensor_is_found_by_each_of_its_names():
    net = nn.ModuleDict({"table": nn.Linear(3, 2, bias=False), "decoder": nn.Linear(3, 2)})
    net["decoder"].weight = net["table"].weight
    structure = structure_of(net)
    assert scope.named("decoder")(structure) == {"table.weight", "decoder.bias"}
    assert scope.named("decoder.weight")(structure) == scope.named("table")(structure) == {"table.weight"}
    assert scope.everything(structure) == {"table.weight", "decoder.bias"}


def test_a_scope_shows_what_it_names():
    lines = (scope.normalization - scope.named("blocks.0")).show(wrapped()).splitlines()
    assert lines == ["base.blocks.1.norm1.weight  (5,)", "base.blocks.1.norm1.bias    (5,)"]
    assert scope.head.show(Net(lambda m, x: m.fc(m.body(x)), fc=nn.Linear(3, 2), body=nn.Linear(4, 3))) == (
        "fc.weight  (2, 3)\nfc.bias    (2,)"
    )
    assert scope.nothing.show(wrapped()) == ""
