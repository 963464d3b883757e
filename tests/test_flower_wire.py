"""What arrives is what was sent, bit for bit, and nothing is taken, evaluated or allocated that was not expected."""

import io
import os
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("flwr")

from flower_net import wired
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from idiolect.core.tree import EMPTY, Tree
from idiolect.flower.protocol.arrays import WireError, holds, nbytes, put, take
from idiolect.flower.protocol.messages import PROTOCOL, Brief, Introduction, Report, hear, say

SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
TYPES = [torch.float32, torch.float64, torch.float16]
LIKE = {"share": Tree.of({"w": torch.zeros(2, 3), "b": torch.zeros(4)})}
BRIEF = Brief("run-1", "fedavg()", "Training()", 3, 2, 0.1, 1, True, ["accuracy"])
INTRODUCTION = Introduction("ward-a", 12, ["torch 2"], "")
REPORT = Report("ward-a", 12, 3.0, 0.5, 6, 0.1, ["test"], [5], [0.5, 1.0], [0.25, 0.5])


@st.composite
def trees(draw, dtype):
    """A tree of any names, shapes and bits."""
    shapes = draw(st.dictionaries(st.text(max_size=8), SHAPES, max_size=4))
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    size = torch.finfo(dtype).bits // 8
    bits = np.frombuffer(draw(st.binary(min_size=total * size, max_size=total * size)), dtype=f"f{size}")
    rows = torch.split(torch.from_numpy(bits.copy()), [int(np.prod(shape)) for shape in shapes.values()])
    return Tree.of({name: row.reshape(shape) for (name, shape), row in zip(shapes.items(), rows, strict=True)})


@given(st.data(), st.sampled_from(TYPES))
@settings(max_examples=150, deadline=None)
def test_any_trees_come_back_bit_for_bit(data, dtype):
    sent = data.draw(st.dictionaries(st.sampled_from(["share", "sam", "a/b", "", "é\n"]), trees(dtype), max_size=3))
    content = RecordDict()
    put(content, "upload", sent)
    put(content, "mail", {"share": Tree.of({"other": torch.ones(1)})})
    found = take(wired(content), "upload", sent)
    assert list(found) == list(sent)
    for part, tree in sent.items():
        assert found[part].layout is tree.layout
        assert found[part].flat.dtype == tree.flat.dtype
        assert found[part].flat.numpy().tobytes() == tree.flat.numpy().tobytes()
        assert holds(content, "upload", part) == (len(tree) > 0)


def test_what_arrives_can_be_written_to_and_is_nobody_elses():
    content = RecordDict()
    put(content, "upload", LIKE)
    one, other = take(content, "upload", LIKE), take(content, "upload", LIKE)
    one["share"].flat.fill_(7.0)
    assert not other["share"].flat.any()
    assert not LIKE["share"].flat.any()


def test_rows_of_a_larger_row_are_sent_alone():
    wide = Tree(LIKE["share"].layout, torch.arange(20.0)[5:15])
    content = RecordDict()
    put(content, "upload", {"share": wide})
    assert torch.equal(take(content, "upload", LIKE)["share"].flat, wide.flat)
    assert nbytes(content) == 10 * 4 + 2 * 128


def npy(array, pickled=False):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=pickled)
    return stream.getvalue()


def message(**changed):
    """Return an upload of LIKE's form in which the array `w` is another."""
    whole = {"dtype": "float32", "shape": (2, 3), "stype": "numpy.ndarray", "data": npy(np.ones((2, 3), "float32"))}
    tensors = {"w": Array(**(whole | changed)), "b": Array(np.zeros(4, "float32"))}
    return RecordDict({"upload/share": ArrayRecord(tensors)})


def header(text, version=1):
    """Return the bytes of an array with this text for a header, and the values of `w`."""
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2, "little") + text + bytes(24)


class Canary:
    """Code in a pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def test_a_message_of_the_right_form_is_taken():
    assert take(wired(message()), "upload", LIKE)["share"]["w"].tolist() == [[1.0] * 3] * 2


W, FORM = r"upload/share: w: ", "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"dtype": "float64"}, W + "expected float32, got 'float64'"),
        ({"dtype": "x" * 10**4}, W + "expected float32, got 'xxx"),
        ({"shape": (3, 2)}, W + r"expected shape \(2, 3\), got \(3, 2\)"),
        ({"shape": (1,), "data": npy(np.ones(1, "float32"))}, W + r"expected shape \(2, 3\), got \(1,\)"),
        ({"shape": (6,), "data": npy(np.ones(6, "float32"))}, W + r"expected shape \(2, 3\), got \(6,\)"),
        ({"shape": (1,) * 10**3}, W + r"expected shape \(2, 3\), got \(1, 1"),
        ({"data": npy(np.ones(1, "float32"))}, W + "its bytes are not what NumPy writes of float32"),
        ({"data": npy(np.ones((3, 2), "float32"))}, W + "its bytes are not what NumPy writes of float32"),
        ({"data": npy(np.ones((2, 3), "float64"))}, W + "its bytes are not what NumPy writes of float32"),
        ({"data": npy(np.ones((2, 3), ">f4"))}, W + "its bytes are not what NumPy writes of float32"),
        ({"data": npy(np.asfortranarray(np.ones((2, 3), "float32")))}, W + "its bytes are not what NumPy writes"),
        ({"data": npy(np.ones((2, 3), "float32"))[:-1]}, W + "its bytes hold 23 bytes of values, not 24"),
        ({"data": npy(np.ones((2, 3), "float32")) + b"\0"}, W + "its bytes hold 25 bytes of values, not 24"),
        ({"data": npy(np.ones((2, 3), "float32"))[:60]}, W + "its bytes are not what NumPy writes"),
        ({"data": b""}, W + "its bytes are not what NumPy writes"),
        ({"data": header(FORM.replace("2, 3", "10**12, 1").encode())}, W + "its bytes are not"),
        ({"data": header(FORM.replace("2, 3", "1000000, 1000000").encode())}, W + "its bytes are not"),
        ({"data": header(FORM.encode(), version=2)}, W + "its bytes are not"),
        ({"data": header(b"{[]: 1}")}, W + "its bytes are not"),
        ({"data": header(b"((((")}, W + "its bytes are not"),
        ({"data": header(b"'''")}, W + "its bytes are not"),
        ({"data": header(b"-" * 60000 + b"1")}, W + "its bytes are not"),
    ],
)
def test_a_tensor_of_another_form_is_refused_by_name_before_anything_is_made(changed, said):
    content = message(**changed)
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=said) as error:
            take(content, "upload", LIKE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


def test_the_header_may_be_padded_as_any_numpy_pads_it():
    for padding in (b"", b"\n", b" " * 200 + b"\n"):
        assert take(message(data=header(FORM.encode() + padding)), "upload", LIKE)["share"]["w"].shape == (2, 3)


def test_a_pickle_is_never_opened(tmp_path):
    canary = tmp_path / "canary"
    objects = np.empty((2, 3), dtype=object)
    objects[:] = Canary(canary)
    data = npy(objects, pickled=True)
    for changed in ({"data": data}, {"data": data, "dtype": "object"}, {"data": pickle.dumps(Canary(canary))}):
        with pytest.raises(WireError, match=W):
            take(message(**changed), "upload", LIKE)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["upload/share"].pop("w"), "upload/share: the tensors differ: without 'w'$"),
        (lambda c: c["upload/share"].update(x=Array(np.ones(1))), "upload/share: the tensors differ: with 'x'$"),
        (
            lambda c: c["upload/share"].update(W=c["upload/share"].pop("w")),
            "upload/share: the tensors differ: without 'w' and with 'W'$",
        ),
        (lambda c: c.pop("upload/share"), "upload: the parts differ: without 'upload/share'$"),
        (lambda c: c.update({"upload/sam": ArrayRecord()}), "upload: the parts differ: with 'upload/sam'$"),
        (lambda c: c.update({"upload/share": ConfigRecord()}), "upload: the parts differ: without 'upload/share'$"),
        (lambda c: c["upload/share"].update({"y" * 10**6: Array(np.ones(1))}), "tensors differ: with 'yyy"),
    ],
)
def test_other_names_are_refused(change, said):
    content = message()
    change(content)
    with pytest.raises(WireError, match=said) as error:
        take(content, "upload", LIKE)
    assert len(str(error.value)) < 500


def test_a_million_names_are_refused_in_a_short_line():
    content = message()
    one = Array(np.ones(1, "float32"))
    content["upload/share"].__dict__["_data"] = dict.fromkeys(map(str, range(10**6)), one)  # past Flower's slow checks
    with pytest.raises(WireError, match="upload/share: the tensors differ: without 'b', 'w' and with '0', '1', '10'"):
        take(content, "upload", LIKE)
    many = RecordDict({"words": ConfigRecord()})
    many["words"].__dict__["_data"] = dict.fromkeys(map(str, range(10**6)), 1)
    with pytest.raises(WireError, match="client is missing"):
        hear(many, Report)


def test_a_part_without_tensors_is_not_sent_and_comes_back_as_it_is():
    content = RecordDict()
    put(content, "slot", {"share": LIKE["share"], "sam": EMPTY})
    assert list(content.array_records) == ["slot/share"]
    assert take(content, "slot", {"share": LIKE["share"], "sam": EMPTY})["sam"] is EMPTY


@pytest.mark.parametrize("words", [BRIEF, INTRODUCTION, REPORT, Report("ward-a", 1, loss=float("nan"))])
def test_types_come_back(words):
    content = RecordDict()
    say(content, words)
    assert repr(hear(wired(content), type(words))) == repr(words)


@pytest.mark.parametrize(
    ("words", "changed", "said"),
    [
        (BRIEF, {"protocol": PROTOCOL + 1}, f"protocol {PROTOCOL + 1} there, {PROTOCOL} here: install the same"),
        (BRIEF, {"protocol": "1"}, "protocol '1' there"),
        (BRIEF, {"round": -1}, "no Brief: round is -1"),
        (BRIEF, {"base": -1}, "no Brief: base is -1"),
        (BRIEF, {"round": 1.0}, "no Brief: round is 1.0"),
        (BRIEF, {"lr": "0.1"}, "no Brief: lr is '0.1'"),
        (BRIEF, {"evaluate": 1}, "no Brief: evaluate is 1"),
        (BRIEF, {"method": b"fedavg()"}, None),
        (BRIEF, {"metrics": "accuracy"}, "no Brief: metrics is 'accuracy'"),
        (BRIEF, {"metrics": [1]}, r"no Brief: metrics\.0 is 1"),
        (INTRODUCTION, {"client": ""}, "no Introduction: client is ''"),
        (INTRODUCTION, {"client": "../ward-b"}, "no Introduction: client is '../ward-b'"),
        (INTRODUCTION, {"client": "a\nb"}, "no Introduction: client is"),
        (INTRODUCTION, {"client": "a" * 101}, "no Introduction: client is"),
        (INTRODUCTION, {"examples": 0}, "no Introduction: examples is 0"),
        (INTRODUCTION, {"examples": -9}, "no Introduction: examples is -9"),
        (INTRODUCTION, {"examples": True}, "no Introduction: examples is True"),
        (INTRODUCTION, {"versions": [1.5]}, r"no Introduction: versions\.0 is 1.5"),
        (REPORT, {"loss": "low"}, "no Report: loss is 'low'"),
        (REPORT, {"examples": "x" * 10**6}, "no Report: examples is 'xxx"),
        (REPORT, {"sizes": [1.5]}, r"no Report: sizes\.0 is 1.5"),
        (REPORT, {"personalized": ["a"] * 10**5}, r"no Report: personalized\.0 is 'a'"),
    ],
)
def test_types_of_other_types_are_refused_by_name(words, changed, said):
    content = RecordDict()
    say(content, words)
    content["words"].update(changed)
    if said is None:  # bytes are not text, and become what a person would read
        assert hear(content, type(words)).method == "b'fedavg()'"
        return
    with pytest.raises(WireError, match=said) as error:
        hear(content, type(words))
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("name", ["client", "examples"])
def test_missing_words_are_named_and_unknown_ones_are_nothing(name):
    content = RecordDict()
    say(content, INTRODUCTION)
    content["words"]["more"] = "from a later version"
    assert hear(content, Introduction) == INTRODUCTION
    del content["words"][name]
    with pytest.raises(WireError, match=f"no Introduction: {name} is missing"):
        hear(content, Introduction)


@pytest.mark.parametrize("record", [None, ArrayRecord(), MetricRecord()])
def test_a_message_without_words_is_refused(record):
    content = RecordDict({} if record is None else {"words": record})
    with pytest.raises(WireError, match="no Report: client is missing"):
        hear(content, Report)
