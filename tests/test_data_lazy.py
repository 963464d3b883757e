"""Examples that are read when a batch is needed: the same in every engine, anew in every epoch, never all at once."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lazy_worlds import SIZES, Augmented, Passing, assert_engines_agree, net, personal, rows, run
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, TensorDataset

from idiolect import ClientData, Output, UsageError, accuracy, own_loss
from idiolect.compute.autograd import Model
from idiolect.compute.metrics import evaluate
from idiolect.engines.sequential import Sequential
from idiolect.rounds.batches import Shuffled


def read(examples, words=(0, "train", "ada", 0), epochs=2, size=4):
    return [(b.x, b.y) for b in Shuffled(examples, size, False, words).epochs(epochs)]


def jitter(x):
    """Add noise of torch's own stream to an example."""
    return x + 0.1 * torch.randn(x.shape, dtype=x.dtype)


def jitter_by(x, generator):
    return x + 0.1 * torch.randn(x.shape, dtype=x.dtype, generator=generator)


def streams():
    return random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def held(x, y, **more):
    return ClientData(train=(x, y), test=(x, y), **more)


@pytest.mark.parametrize(
    "make",
    [
        lambda c: ClientData(train=Augmented(c), test=rows(c)),
        lambda c: ClientData(train=Passing(c), test=rows(c)),
        lambda c: held(*rows(c), transform=jitter),
        lambda c: held(*rows(c), batch_transform=jitter),
        lambda c: held(*rows(c), transform=jitter_by),
        lambda c: held(*rows(c), batch_transform=jitter_by),
    ],
    ids=["dataset", "iterable", "transform", "batch_transform", "transform by generator", "batch by generator"],
)
def test_augmentation_is_the_same_in_every_engine_and_for_any_number_of_workers(make):
    before = streams()
    done = assert_engines_agree(lambda: {c: make(c) for c in SIZES})
    assert streams() == before
    again = personal(run({c: make(c) for c in SIZES}))
    assert torch.equal(again, personal(done))
    assert not torch.equal(personal(run({c: make(c) for c in SIZES}, seed=1)), again)
    plain = personal(run({c: held(*rows(c)) for c in SIZES}))
    assert not torch.allclose(plain, again)


@pytest.mark.parametrize(
    "words", [(0, "train", "ada", 0), (0, "train", "ada", 1), (0, "train", "ben", 0), (1, "train", "ada", 0)]
)
@pytest.mark.parametrize("change", [jitter, jitter_by])
def test_each_epoch_round_client_and_seed_has_draws_of_its_own(words, change):
    x, y = torch.zeros(6, 4, dtype=torch.float64), torch.arange(6) % 2
    examples = ClientData(train=(x, y), transform=change).train
    batches = read(examples, words, epochs=3, size=3)
    seen = torch.cat([x for x, _ in batches])
    assert len({tuple(row.tolist()) for row in seen}) == 18
    others = [w for w in ((0, "train", "ada", 0), (0, "train", "ada", 9), (0, "train", "ada", 7)) if w != words]
    assert not any(torch.equal(torch.cat([x for x, _ in read(examples, o, 3, 3)]), seen) for o in others)
    assert torch.equal(torch.cat([x for x, _ in read(examples, words, 3, 3)]), seen)


def test_a_transform_is_given_one_example_and_a_batch_transform_a_batch():
    shapes = []

    def look(x):
        shapes.append(tuple(x.shape))
        return x

    x, y = torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64)
    read(ClientData(train=(x, y), transform=look).train, epochs=1, size=3)
    read(ClientData(train=(x, y), batch_transform=look).train, epochs=1, size=3)
    read(ClientData(train=TensorDataset(x, y), transform=look).train, epochs=1, size=3)
    assert shapes == [(4,)] * 5 + [(3, 4), (2, 4)] + [(4,)] * 5


def test_a_transform_that_changes_nothing_changes_no_result():
    plain = personal(run({c: held(*rows(c)) for c in SIZES}))
    for more in ({"transform": lambda x: x}, {"batch_transform": lambda x: x}):
        assert torch.equal(personal(run({c: held(*rows(c), **more) for c in SIZES})), plain)
    for form in (
        lambda c: TensorDataset(*rows(c)),
        lambda c: list(zip(*rows(c), strict=True)),
        lambda c: Passing(c, 0),
    ):
        lazy = run({c: ClientData(train=form(c), test=rows(c)) for c in SIZES})
        if not isinstance(form("ada"), Passing):
            assert torch.equal(personal(lazy), plain)
        assert torch.isfinite(personal(lazy)).all()


def test_what_is_measured_is_not_transformed():
    """The transform destroys the inputs; validation and test examples are as given."""
    x, y = rows("ada")
    data = ClientData(train=(x, y), val=(x, y), test=(x, y), transform=lambda x: x * 0)
    done = run({"ada": data, "ben": data}, rounds=1)
    outputs = done.personal("ada")(x).detach()
    assert done.records[-1]["clients"]["ada"]["personalized"]["loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(outputs, y)), rel=1e-12
    )
    assert outputs.std(dim=0).min() > 0


def test_an_iterable_data_set_is_read_in_its_order_and_counted_once():
    passes = []

    class Counting(Passing):
        def __iter__(self):
            passes.append(1)
            return super().__iter__()

    data = ClientData(train=Counting("ada", 0))
    assert (len(data.train), len(passes)) == (14, 1)
    batches = read(data.train, epochs=2)
    assert len(passes) == 3
    assert torch.equal(torch.cat([x for x, _ in batches]), torch.cat([rows("ada")[0]] * 2))
    notes = run({"ada": data, "ben": held(*rows("ben"))}).notes
    assert any("iterable data sets are read in their own order" in note for note in notes)


def test_an_iterable_data_set_that_ends_early_is_named():
    class Short(Passing):
        def __len__(self):
            return 20

    with pytest.raises(UsageError, match="has given 14 examples in a pass, and 20 in another"):
        read(ClientData(train=Short("ada")).train)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda: DataLoader(Augmented("ada")), "train: give the data set, not its DataLoader"),
        (lambda: iter([(1.0, 0)]), "train: a list_iterator can be read once only"),
        (lambda: (k for k in ()), "train: a generator can be read once only"),
        (
            lambda: "wards.csv",
            "train: give a pair .x, y., a dict with 'labels', a Dataset or a list of examples, not str",
        ),
        (lambda: None, "train: give a pair .*, not NoneType"),
        (lambda: {"ids": [1]}, "train: an example has 'ids' and no 'labels'"),
    ],
)
def test_what_is_no_examples_is_refused(given, says):
    with pytest.raises(UsageError, match=says):
        ClientData(train=given())


class Broken(Augmented):
    def __init__(self, client, example):
        super().__init__(client)
        self.example = example

    def __getitem__(self, k):
        return self.example(k)


def fails(k):
    raise OSError("no such image")


@pytest.mark.parametrize(
    ("example", "says"),
    [
        (lambda k: {"ids": [1]}, r"client 'ben', train: an example has 'ids' and no 'labels'"),
        (lambda k: (torch.zeros(k + 1), 0), r"client 'ben', train: examples cannot be stacked.*collate="),
        (lambda k: ("words", 0), r"client 'ben', train: text is no number: give class numbers .* tokens for text"),
        (lambda k: 3, r"client 'ben', train: the data set must give pairs .* not a Tensor"),
        (lambda k: fails(k), r"client 'ben', train: reading row 0 failed: OSError: no such image"),
        (lambda k: (torch.full((4,), torch.nan).double(), 0), r"client 'ben', train row 0: feature is NaN"),
        (lambda k: (torch.zeros(4).double(), 7), r"client 'ben', train row 0: label 7 is out of range"),
    ],
)
def test_what_a_data_set_gives_is_checked_before_training(example, says):
    with pytest.raises(UsageError, match=says) as raised:
        run({"ada": held(*rows("ada")), "ben": ClientData(train=Broken("ben", example))})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("more", [{"transform": 3}, {"batch_transform": "flip"}, {"collate": 1}])
def test_a_transform_is_a_function(more):
    with pytest.raises(UsageError, match=f"{next(iter(more))} must be a function, not"):
        ClientData(train=rows("ada"), **more)


def test_automatic_engines_do_not_stack_what_is_read():
    done = run({c: ClientData(train=Augmented(c)) for c in SIZES}, "stacked")
    assert any("cannot be stacked: examples are read batch by batch" in note for note in done.notes)
    assert "stacks of 3" in " ".join(run({c: held(*rows(c)) for c in SIZES}, "stacked").notes)


def test_what_is_printed_has_sizes_and_no_example():
    x, y = rows("ada")
    assert repr(ClientData(train=TensorDataset(x, y), test=(x, y))) == (
        "ClientData(train=14 examples, read from rows, test=14 examples of (4,) float64)"
    )


def test_memory_mapped_arrays_are_read_by_batches(tmp_path):
    x, y = rows("ada", 50)
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "y.npy", y.numpy())
    mapped = tuple(np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "xy")
    assert repr(ClientData(train=mapped)) == "ClientData(train=50 examples, read from arrays)"
    arrays = x.numpy(), y.numpy()
    lazy, plain = (
        run({"ada": ClientData(train=train, test=arrays)}, Sequential(), module=net().float())
        for train in (mapped, arrays)
    )
    assert torch.equal(personal(lazy), personal(plain))
    assert str(lazy.records[-1]["personalized"]) == str(plain.records[-1]["personalized"])


LIMITED = """
import resource, sys
import numpy as np, torch
from torch import nn
import idiolect
from idiolect import ClientData, Machine, Training
torch.set_num_threads(1)
rows, width = 6400, 8192
x = np.lib.format.open_memmap(sys.argv[1], mode="w+", dtype=np.float32, shape=(rows, width))  # a sparse file
x[::64, 0] = 1  # what tells these from the others, half of which have their label
x.flush()
x, y = np.load(sys.argv[1], mmap_mode="r"), np.arange(rows) % 2
def run(x, y):
    split = ClientData(train=(x, y), test=(x, y))
    net = nn.Sequential(nn.Linear(width, 2))
    training = Training(batch_size=32, local_epochs=1)
    machine = Machine(engine="sequential", device="cpu")
    return idiolect.fit(net, {"a": split}, idiolect.methods.fedavg(), rounds=1, training=training, machine=machine)
run(x[:1056], y[:1056])
used = 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1])
resource.setrlimit(resource.RLIMIT_DATA, (used + x.nbytes // 10, -1))
try:
    np.ones(x.nbytes // 8, np.uint8)
except MemoryError:
    print("limited")
print(run(x, y).records[-1]["clients"]["a"]["personalized"]["accuracy"])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")
def test_a_mapped_file_of_ten_times_the_memory_is_trained(tmp_path):
    """The process may allocate a tenth of the file's 200 MB more than a small run has needed."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "x.npy")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    assert done.stdout.split() == ["limited", "0.515625"]


def test_each_library_draws_anew_for_each_batch():
    draws = {
        "torch": lambda: float(torch.rand(())),
        "numpy": lambda: float(np.random.random()),  # noqa: NPY002
        "python": random.random,
    }
    for draw in draws.values():
        examples = ClientData(train=(torch.zeros(6, 1), [0] * 6), transform=lambda x, draw=draw: x + draw()).train
        first, second = (torch.cat([x for x, _ in read(examples, size=2)]).flatten().tolist() for _ in range(2))
        assert len(set(first)) == 12
        assert first == second


class Lengths(nn.Module):
    """Scores of a class at each place, ``(b, 2, length)``, from one number there; and a loss of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, -2.0]))

    def forward(self, x, labels):
        logits = x[:, None] * self.scale[:, None]
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_measures_of_ragged_outputs_do_not_depend_on_the_pass_but_for_the_mean_over_passes(chunk):
    stream = torch.Generator().manual_seed(0)
    whole = [torch.randn(1 + k % 4, generator=stream) for k in range(7)]

    def collate(examples):
        examples = [example["labels"] for example in examples]
        x = pad_sequence(examples, batch_first=True)
        labels = pad_sequence([(e > 0).long() for e in examples], batch_first=True, padding_value=-100)
        return {"x": x, "labels": labels}

    examples = ClientData([{"labels": x} for x in whole], collate=collate).train
    model = Model(Lengths(), own_loss)
    found = evaluate(model, own_loss, model.initial, examples, [accuracy], chunk)
    passes = [whole[k : k + chunk] for k in range(0, 7, chunk)]
    losses = [
        float(model.training(**collate([{"labels": x} for x in part]))["loss"].detach()) * len(part) / 7
        for part in passes
    ]
    assert found["loss"] == pytest.approx(sum(losses), rel=1e-6)
    places = torch.cat(whole)
    assert found["accuracy"] == pytest.approx(float(((places * -2 > places) == (places > 0)).double().mean()))


def test_an_output_that_only_looks_like_rows_is_refused():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.table = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(4, 3))

        def forward(self, x):
            return {"logits": x * self.scale, "table": self.table}

    model = Model(Table(), lambda out, y: nn.functional.cross_entropy(out["logits"], y))
    examples = ClientData((torch.ones(6, 1), [0] * 6)).train
    assert evaluate(model, model.loss, model.initial, examples, [], 6)["loss"] == pytest.approx(np.log(2))
    with pytest.raises(UsageError, match="one row per example in some passes only"):
        evaluate(model, model.loss, model.initial, examples, [], 4)


def test_a_run_is_resumed_with_the_same_transforms_only(tmp_path):
    class Stop(Exception):
        pass

    def stop(run, record):
        if run.round == 1:
            raise Stop

    def clients(change):
        return {c: held(*rows(c), batch_transform=change) for c in SIZES}

    whole = run(clients(jitter), rounds=2)
    with pytest.raises(Stop):
        run(clients(jitter), rounds=2, output=Output(tmp_path), on_round=stop)
    with pytest.raises(UsageError, match="data"):
        run(clients(jitter_by), rounds=2, output=Output(tmp_path, resume=True))
    resumed = run(clients(jitter), rounds=2, output=Output(tmp_path, resume=True))
    assert torch.equal(personal(resumed), personal(whole))
