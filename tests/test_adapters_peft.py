"""Models as `peft` makes them, of a small BERT: what is trained, sent and kept, and the way back into `peft`."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import transformers

from idiolect import ClientData, Training, UsageError, fit, methods, scope
from idiolect.core.structure import structure_of

TRAINING = Training(lr=0.2, local_epochs=2, batch_size=8)
LAYERS = [f"net.base_model.model.bert.encoder.layer.{k}.attention.self.{n}" for k in (0, 1) for n in ("query", "value")]
HEAD = "net.base_model.model.classifier.modules_to_save.default"
RANK, WIDTH, CLASSES = 4, 16, 3


class Words(nn.Module):
    """A model that takes the ids of words alone."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, ids):
        return self.net(input_ids=ids).logits


def base():
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": WIDTH, "intermediate_size": 24, "max_position_embeddings": 12}
    sizes |= {"initializer_range": 0.3}  # so that attention is not even
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, num_labels=CLASSES)
    )


def bert(net=None, targets=("query", "value"), **settings):
    """Return the small BERT with adapters."""
    config = peft.LoraConfig("SEQ_CLS", r=RANK, lora_alpha=8, target_modules=list(targets), **settings)
    return Words(peft.get_peft_model(net or base(), config))


def clients(sizes=(12, 9, 20)):
    found = {}
    for name, n in zip("abc", sizes, strict=True):
        generator = torch.Generator().manual_seed(n)
        x, y = torch.randint(1, 30, (n + 6, 8), generator=generator), torch.arange(n + 6) % CLASSES
        found[name] = ClientData(train=(x[:n], y[:n]), test=(x[n:], y[n:]))
    return found


def moved(before, after):
    """Return the names of the tensors that are not as they were."""
    return {n for n, t in before.state_dict().items() if not torch.equal(t, after.state_dict()[n])}


FACTORS = {letter: {f"{layer}.lora_{letter}.default.weight" for layer in LAYERS} for letter in "AB"}
OF_HEAD = {f"{HEAD}.weight", f"{HEAD}.bias"}


@pytest.mark.parametrize(
    ("method", "sent", "kept"),
    [
        (methods.fedit(), FACTORS["A"] | FACTORS["B"] | OF_HEAD, set()),
        (methods.ffa_lora(), FACTORS["B"] | OF_HEAD, set()),
        (methods.fedsa_lora(), FACTORS["A"], FACTORS["B"] | OF_HEAD),
        (methods.fedsa_lora(scope.lora_a | scope.head), FACTORS["A"] | OF_HEAD, FACTORS["B"]),
    ],
    ids=lambda m: getattr(m, "name", ""),
)
def test_what_is_sent_and_what_is_trained(method, sent, kept):
    """To the byte; nothing else of the model moves."""
    net = bert()
    run = fit(net, clients(), method, rounds=2, training=TRAINING)
    assert set(run.weights) == sent
    values = sum(net.state_dict()[name].numel() for name in sent)
    assert [record["bytes_up"] for record in run.records] == [3 * 4 * values] * 2
    one, other = run.personal("a"), run.personal("b")
    assert moved(net, one) == sent | kept
    assert moved(one, other) == kept


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.1}, {"use_rslora": True}, {"lora_bias": True}])
def test_a_personal_model_merges_into_its_base(settings):
    """The layer's weight plus scaling times B A, which `peft` adds in place, gives the same predictions."""
    net = bert(**settings)
    run = fit(net, clients(), methods.fedsa_lora(), rounds=2, training=TRAINING)
    x = clients()["a"].test.x
    personal = run.personal("a")
    expected, state = personal(x), personal.state_dict()
    merged = copy.deepcopy(personal.net).merge_and_unload()
    assert torch.allclose(merged(input_ids=x).logits, expected, atol=1e-6)
    scaling = 8 / RANK**0.5 if settings.get("use_rslora") else 8 / RANK
    for layer in LAYERS:
        a, b = (state[f"{layer}.lora_{letter}.default.weight"] for letter in "AB")
        path = layer.removeprefix("net.base_model.model.")
        weight = state[f"{layer}.base_layer.weight"] + scaling * b @ a
        assert torch.allclose(merged.get_submodule(path).weight, weight, atol=1e-6)
        assert (scaling * b @ a).abs().max() > 1e-5


def test_a_personal_adapter_goes_back_into_peft(tmp_path):
    run = fit(bert(), clients(), methods.fedsa_lora(), rounds=2, training=TRAINING)
    x = clients()["b"].test.x
    personal = run.personal("b").net
    personal.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(again(input_ids=x).logits, personal(input_ids=x).logits)
    fresh = bert().net.eval()
    assert not torch.equal(fresh(input_ids=x).logits, personal(input_ids=x).logits)
    peft.set_peft_model_state_dict(fresh, peft.get_peft_model_state_dict(personal))
    assert torch.equal(fresh(input_ids=x).logits, personal(input_ids=x).logits)
    other = bert()
    other.load_state_dict(run.personal("b").state_dict())
    assert torch.equal(other.eval()(x), personal(input_ids=x).logits)


def test_the_shared_adapter_goes_back_into_peft():
    run = fit(bert(), clients(), methods.fedit(), rounds=2, training=TRAINING)
    fresh, x = bert(), clients()["a"].test.x
    fresh.load_state_dict(run.weights, strict=False)
    assert torch.equal(fresh.eval()(x), run.personal("a")(x))


def test_every_kind_of_layer_that_peft_adapts():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.conv, self.last = nn.Embedding(9, 8), nn.Conv1d(8, 6, 3), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(self.conv(self.words(x).transpose(1, 2)).mean(-1))

    def factors(**settings):
        config = peft.LoraConfig(r=2, target_modules=["words", "conv"], modules_to_save=["last"], **settings)
        structure = structure_of(peft.get_peft_model(Net(), config))
        found = [{n.removeprefix("base_model.model.") for n in s(structure)} for s in (scope.lora_a, scope.lora_b)]
        return *found, {n.removeprefix("base_model.model.") for n in structure.exchangeable} - set.union(*found)

    first, second, rest = factors()
    assert first == {"words.lora_embedding_B.default", "conv.lora_A.default.weight"}
    assert second == {"words.lora_embedding_A.default", "conv.lora_B.default.weight"}
    assert rest == {"last.modules_to_save.default.weight", "last.modules_to_save.default.bias"}
    assert factors(use_dora=True)[2] - rest == {f"{n}.lora_magnitude_vector.default.weight" for n in ("words", "conv")}


def test_of_several_adapters_the_one_that_trains_counts():
    net = bert()
    net.net.add_adapter("other", peft.LoraConfig("SEQ_CLS", r=2, target_modules=["query"]))
    assert scope.lora_a(structure_of(net)) == FACTORS["A"]
    net.net.set_adapter("other")
    queries = [layer for layer in LAYERS if "query" in layer]
    assert scope.lora_b(structure_of(net)) == {f"{layer}.lora_B.other.weight" for layer in queries}


def test_a_base_in_half_precision_is_never_sent_and_stays_as_it_is():
    net = bert(base().bfloat16())
    dtypes = {n: t.dtype for n, t in net.state_dict().items()}
    assert dtypes[next(iter(FACTORS["A"]))] == torch.float32
    assert dtypes[f"{LAYERS[0]}.base_layer.weight"] == torch.bfloat16
    for module in net.modules():
        if hasattr(module, "modules_to_save"):
            module.to(torch.float32)
    run = fit(net, clients(), methods.fedsa_lora(), rounds=1, training=TRAINING)
    assert moved(net, run.personal("a")) <= FACTORS["A"] | FACTORS["B"] | OF_HEAD
    assert {n: t.dtype for n, t in run.personal("a").state_dict().items()} == {
        n: t.dtype for n, t in net.state_dict().items()
    }


@pytest.mark.parametrize("targets", [("query", "value"), ("query", "word_embeddings")])
def test_feddpa_of_a_model_of_peft(targets):
    """The shared adapter is FedIT's; a client has its own beside it, and a module that mixes the two."""
    net = bert(targets=targets, lora_dropout=0.1)
    run, shared = (
        fit(net, clients(), m, rounds=2, training=TRAINING) for m in (methods.feddpa(), methods.fedit("uniform"))
    )
    assert set(run.weights) == set(shared.weights)
    assert all(torch.equal(run.weights[n], shared.weights[n]) for n in run.weights)
    x = clients()["a"].test.x
    one, other = run.personal("a"), run.personal("b")
    assert not torch.equal(one(x), shared.personal("a")(x))
    assert not torch.equal(one(x), other(x))
    assert torch.allclose(one(x), torch.cat([one(word[None]) for word in x]), atol=1e-5)


def test_feddpa_refuses_adapters_with_a_magnitude():
    with pytest.raises(UsageError, match="is no plain LoRA in the layout of peft"):
        fit(bert(use_dora=True), clients(), methods.feddpa(), rounds=1)


def test_feddpa_takes_rows_of_the_batch_alone_with_a_frozen_language_head():
    """The head is tied to the embedding and frozen: nothing but the adapter trains."""

    class Next(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            sizes = {"vocab_size": 30, "n_positions": 12, "n_embd": WIDTH, "n_layer": 1, "n_head": 2}
            lm = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, initializer_range=0.3))
            config = peft.LoraConfig("CAUSAL_LM", r=RANK, target_modules=["c_attn"], fan_in_fan_out=True)
            self.net = peft.get_peft_model(lm, config)

        def forward(self, ids):
            return self.net(input_ids=ids).logits[:, -1, :CLASSES]

    net, names = Next(), {f"net.base_model.model.transformer.h.0.attn.c_attn.lora_{x}.default.weight" for x in "AB"}
    run = fit(net, clients(), methods.feddpa(), rounds=2, training=TRAINING)
    assert set(run.weights) == names
    x = clients()["a"].test.x
    assert torch.isfinite(run.personal("a")(x)).all()
    assert not torch.equal(run.personal("a")(x), run.personal("b")(x))
