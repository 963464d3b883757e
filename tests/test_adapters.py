"""Low-rank adapters: which tensors are their factors, and models for which the methods are not meant."""

import pytest
import torch
from torch import nn

from idiolect import ClientData, UsageError, fit, methods, scope
from idiolect.core.structure import structure_of
from idiolect.testing.worlds import LowRank, adapted, network


class Embedded(nn.Module):
    """An embedding with an adapter, as `peft` writes it: A starts at zero."""

    def __init__(self, kinds=7, width=4, rank=2):
        super().__init__()
        self.base_layer = nn.Embedding(kinds, width).requires_grad_(False)
        self.lora_A, self.lora_B = nn.ModuleDict({}), nn.ModuleDict({})
        self.lora_embedding_A = nn.ParameterDict({"default": nn.Parameter(torch.zeros(rank, kinds))})
        self.lora_embedding_B = nn.ParameterDict({"default": nn.Parameter(torch.randn(width, rank))})
        self.scaling = {"default": 2.0}

    def forward(self, x):
        added = self.lora_embedding_A["default"].T[x] @ self.lora_embedding_B["default"].T
        return self.base_layer(x) + added * self.scaling["default"]


class Bare(nn.Linear):
    """A linear layer whose factors are parameters, of a subclass of the layer."""

    def __init__(self, inputs, outputs, rank=2):
        super().__init__(inputs, outputs)
        self.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, inputs))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank))
        self.scaling = 1.0

    def forward(self, x):
        return super().forward(x) + self.scaling * x @ self.lora_A.T @ self.lora_B.T


class BareEmbedding(nn.Embedding):
    """The same of an embedding, whose A starts at zero."""

    def __init__(self, kinds, width, rank=2):
        super().__init__(kinds, width)
        self.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.zeros(rank, kinds))
        self.lora_B = nn.Parameter(torch.randn(width, rank))
        self.scaling = 1.0

    def forward(self, x):
        return super().forward(x) + self.scaling * self.lora_A.T[x] @ self.lora_B.T


def text(embedding, layer):
    return nn.Sequential(embedding, nn.Flatten(), layer, nn.Tanh(), nn.Linear(5, 2))


@pytest.mark.parametrize(
    ("net", "first", "second"),
    [
        (
            adapted(network()),
            ["0.lora_A.default.weight", "4.lora_A.default.weight"],
            ["0.lora_B.default.weight", "4.lora_B.default.weight"],
        ),
        (
            text(Embedded(), LowRank(nn.Linear(12, 5))),
            ["0.lora_embedding_B.default", "2.lora_A.default.weight"],
            ["0.lora_embedding_A.default", "2.lora_B.default.weight"],
        ),
        (text(BareEmbedding(7, 4), Bare(12, 5)), ["0.lora_B", "2.lora_A"], ["0.lora_A", "2.lora_B"]),
    ],
)
def test_factors_are_told_by_what_starts_at_zero(net, first, second):
    structure = structure_of(net)
    assert sorted(scope.lora_a(structure)) == first
    assert sorted(scope.lora_b(structure)) == second
    initial = net.state_dict()
    assert all(initial[n].abs().max() > 0 for n in scope.lora_a(structure))
    assert all(initial[n].abs().max() == 0 for n in scope.lora_b(structure))


def test_a_bias_belongs_to_its_factor_and_a_frozen_factor_to_none():
    net = adapted(network())
    net[4].lora_B["default"] = nn.Linear(2, 6).double()
    assert "4.lora_B.default.bias" in scope.lora_b(structure_of(net))
    net[4].lora_A.requires_grad_(False)
    assert scope.lora_a(structure_of(net)) == {"0.lora_A.default.weight"}


def test_a_name_alone_makes_no_factor():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A = nn.Linear(3, 2)

        def forward(self, x):
            return self.lora_A(x)

    with pytest.raises(UsageError, match="no LoRA layer with a trainable factor A: add adapters"):
        scope.lora_a(structure_of(Named()))


def two(kinds=None, n=12):
    """Return two clients whose inputs are images, or words."""
    torch.manual_seed(0)
    draw = (lambda: torch.randint(0, kinds, (n, 3))) if kinds else (lambda: torch.randn(n, 1, 6, 6).double())
    return {c: ClientData(train=(draw(), torch.randint(0, 2, (n,))), test=(draw(), torch.arange(n) % 2)) for c in "ab"}


@pytest.mark.parametrize("make", [methods.fedit, methods.ffa_lora, methods.fedsa_lora, methods.feddpa])
def test_a_model_without_adapters_is_refused_before_training(make):
    with pytest.raises(UsageError, match=r"no LoRA layer .* add adapters \(peft.get_peft_model\)"):
        fit(network(), two(), make(), rounds=1)


@pytest.mark.parametrize("make", [methods.fedit, methods.ffa_lora, methods.fedsa_lora, methods.fedavg])
def test_a_merged_adapter_is_refused(make):
    net = adapted(network())
    net[4].merged = True
    with pytest.raises(UsageError, match="the adapter of '4' is merged into its weight: unmerge it"):
        fit(net, two(), make(), rounds=1)


def plain():
    return nn.Sequential(nn.Flatten(), LowRank(nn.Linear(36, 5)), nn.Tanh(), nn.Linear(5, 2)).double()


def magnitude(net):
    net[1].lora_magnitude_vector = nn.ModuleDict({"default": nn.Linear(1, 5, bias=False).double()})


def twice(net):
    for name in ("lora_A", "lora_B"):
        getattr(net[1], name)["other"] = getattr(net[1], name)["default"].requires_grad_(True)
    net[1].lora_A["other"] = nn.Linear(36, 2, bias=False).double()


def bare(net):
    net[1] = Bare(36, 5).double()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (magnitude, "the adapter of '1' is no plain LoRA in the layout of peft: train it with fedit"),
        (bare, "the adapter of '1' is no plain LoRA in the layout of peft: train it with fedit"),
        (twice, "two adapters of '1' train at once: freeze all but one"),
    ],
)
def test_an_adapter_that_has_no_twin_is_refused(change, line):
    net = plain()
    change(net)
    with pytest.raises(UsageError, match=line):
        fit(net, two(), methods.feddpa(), rounds=1)


@pytest.mark.parametrize("wrong", [{"share_of_own": 1.5}, {"largest": -0.1}, {"references": 0}])
def test_wrong_arguments_of_feddpa(wrong):
    with pytest.raises(UsageError, match=r"local_adapter: .* must be"):
        methods.feddpa(**wrong)


@pytest.mark.parametrize("layer", ["4", "2"])
def test_what_is_no_linear_layer_is_not_compared(layer):
    with pytest.raises(UsageError, match=rf"'{layer}' is no linear layer whose inputs can be compared: name one"):
        fit(plain(), two(), methods.feddpa(layer=layer), rounds=1)


def test_two_layers_that_make_the_output_are_not_compared_by_themselves():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = plain(), plain()

        def forward(self, x):
            return self.one(x) + self.other(x)

    with pytest.raises(UsageError, match=r"local_adapter: no single layer makes .* \(.*\): name the layer .*, layer="):
        fit(Sum(), two(), methods.feddpa(), rounds=1)
    assert fit(Sum(), two(), methods.feddpa(layer="one.3"), rounds=1).round == 1


def test_a_layer_without_examples_on_its_first_axis_is_refused():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = LowRank(nn.Linear(6, 5)).double(), nn.Linear(5, 2).double()

        def forward(self, x):
            return self.last(self.layer(x.flatten(0, 2)).unflatten(0, (len(x), 6)).mean(1))

    with pytest.raises(UsageError, match=r"gets .* rows for .* examples: it needs examples on its first axis"):
        fit(Folded(), two(), methods.feddpa(), rounds=1)


def test_a_frozen_last_layer_is_compared_by_name_and_by_itself():
    net = plain()
    net[3].requires_grad_(False)
    runs = [fit(net, two(), methods.feddpa(layer=layer), rounds=2) for layer in (None, "3", "1")]
    inputs = two()["a"].test.x
    outputs = [run.personal("a")(inputs) for run in runs]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert set(runs[0].weights) == {"1.lora_A.default.weight", "1.lora_B.default.weight"}


@pytest.mark.parametrize("embedding", [Embedded(), BareEmbedding(7, 4)])
def test_an_embedding_learns_under_ffa_lora_and_its_random_factor_stays(embedding):
    net = text(embedding, Bare(12, 5))
    run = fit(net, two(7), methods.ffa_lora(), rounds=2)
    before, after = net.state_dict(), run.personal("a").state_dict()
    for name in scope.lora_a(structure_of(net)):
        assert torch.equal(after[name], before[name]), name
    for name in scope.lora_b(structure_of(net)):
        assert after[name].abs().max() > 0, name
        assert name in run.weights


def test_an_embedding_has_a_twin_under_feddpa():
    """With the whole share, the own factors do what they would do in the place of the shared ones."""
    net, x = text(Embedded(), LowRank(nn.Linear(12, 5))), two(7)["a"].test.x
    made = fit(net, two(7), methods.feddpa(), rounds=3).federation
    module = made.model.module(made.personal("a"))
    for layer in (module[0], module[2]):
        layer.local_adapter.share.fill_(1.0)
    plain = {n: t for n, t in module.state_dict().items() if "local_adapter" not in n}
    for shared, own in {
        "0.lora_embedding_A.default": "0.local_adapter.down",
        "0.lora_embedding_B.default": "0.local_adapter.up",
        "2.lora_A.default.weight": "2.local_adapter.down.weight",
        "2.lora_B.default.weight": "2.local_adapter.up.weight",
    }.items():
        own = module.state_dict()[own]
        assert not torch.equal(own, plain[shared])
        plain[shared] = own
    net.load_state_dict(plain)
    assert torch.allclose(net.eval()(x), module(x), atol=1e-5)
