"""Messages arrive bit for bit; nothing unexpected is accepted, evaluated or allocated."""

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

from flower_grid import serialized
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from idiolect.core.tree import EMPTY, Tree
from idiolect.flower.protocol.arrays import WireError, array_bytes, has_tree, read_trees, write_trees
from idiolect.flower.protocol.messages import PROTOCOL, Instruction, Registration, Report, read_message, write_message

SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LIKE = {"share": Tree.of({"w": torch.zeros(2, 3), "b": torch.zeros(4)})}
INSTRUCTION = Instruction("run-1", "fedavg()", "Training()", 3, 2, 0.1, 1, True, ["accuracy"])
REGISTRATION = Registration("ward-a", 12, ["torch 2"], "")
REPORT = Report("ward-a", 12, 3.0, 0.5, 6, 0.1, ["test"], [5], [0.5, 1.0], [0.25, 0.5])


@st.composite
def trees(draw, dtype):
    """A tree of arbitrary names, shapes and bits."""
    shapes = draw(st.dictionaries(st.text(max_size=8), SHAPES, max_size=4))
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    size = torch.finfo(dtype).bits // 8
    bits = np.frombuffer(draw(st.binary(min_size=total * size, max_size=total * size)), dtype=f"i{size}")
    rows = torch.split(torch.from_numpy(bits.copy()).view(dtype), [int(np.prod(shape)) for shape in shapes.values()])
    return Tree.of({name: row.reshape(shape) for (name, shape), row in zip(shapes.items(), rows, strict=True)})


@given(st.data(), st.sampled_from(TYPES))
@settings(max_examples=150, deadline=None)
def test_any_trees_are_read_bit_for_bit(data, dtype):
    sent = data.draw(st.dictionaries(st.sampled_from(["share", "sam", "a/b", "", "é\n"]), trees(dtype), max_size=3))
    content = RecordDict()
    write_trees(content, "upload", sent)
    write_trees(content, "message", {"share": Tree.of({"other": torch.ones(1)})})
    found = read_trees(serialized(content), "upload", sent)
    assert list(found) == list(sent)
    for part, tree in sent.items():
        assert found[part].layout is tree.layout
        assert found[part].flat.dtype == tree.flat.dtype
        bits = getattr(torch, f"int{torch.finfo(dtype).bits}")
        assert torch.equal(found[part].flat.view(bits), tree.flat.view(bits))
        assert has_tree(content, "upload", part) == (len(tree) > 0)


def test_read_trees_are_writable_copies():
    content = RecordDict()
    write_trees(content, "upload", LIKE)
    one, other = read_trees(content, "upload", LIKE), read_trees(content, "upload", LIKE)
    one["share"].flat.fill_(7.0)
    assert not other["share"].flat.any()
    assert not LIKE["share"].flat.any()


def test_a_slice_of_a_larger_row_is_sent_without_the_rest():
    wide = Tree(LIKE["share"].layout, torch.arange(20.0)[5:15])
    content = RecordDict()
    write_trees(content, "upload", {"share": wide})
    assert torch.equal(read_trees(content, "upload", LIKE)["share"].flat, wide.flat)
    assert array_bytes(content) == 10 * 4 + 2 * 128


def npy(array, pickled=False):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=pickled)
    return stream.getvalue()


def message(**changed):
    """Return an upload with the layout of LIKE, in which the array `w` is changed."""
    whole = {"dtype": "float32", "shape": (2, 3), "stype": "numpy.ndarray", "data": npy(np.ones((2, 3), "float32"))}
    tensors = {"w": Array(**(whole | changed)), "b": Array(np.zeros(4, "float32"))}
    return RecordDict({"upload/share": ArrayRecord(tensors)})


def header(text, version=1):
    """Return the bytes of an array with this text as its header, and the values of `w`."""
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2, "little") + text + bytes(24)


class Canary:
    """Code in a pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def test_a_valid_message_is_read():
    assert read_trees(serialized(message()), "upload", LIKE)["share"]["w"].tolist() == [[1.0] * 3] * 2


W, HEADER = r"upload/share: w: ", "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"dtype": "float64"}, W + "expected float32, got 'float64'"),
        ({"dtype": "x" * 10**4}, W + "expected float32, got 'xxx"),
        ({"shape": (3, 2)}, W + r"expected shape \(2, 3\), got \(3, 2\)"),
        ({"shape": (1,), "data": npy(np.ones(1, "float32"))}, W + r"expected shape \(2, 3\), got \(1,\)"),
        ({"shape": (6,), "data": npy(np.ones(6, "float32"))}, W + r"expected shape \(2, 3\), got \(6,\)"),
        ({"shape": (1,) * 10**3}, W + r"expected shape \(2, 3\), got \(1, 1"),
        ({"data": npy(np.ones(1, "float32"))}, W + "invalid NumPy header for float32"),
        ({"data": npy(np.ones((3, 2), "float32"))}, W + "invalid NumPy header for float32"),
        ({"data": npy(np.ones((2, 3), "float64"))}, W + "invalid NumPy header for float32"),
        ({"data": npy(np.ones((2, 3), ">f4"))}, W + "invalid NumPy header for float32"),
        ({"data": npy(np.asfortranarray(np.ones((2, 3), "float32")))}, W + "invalid NumPy header"),
        ({"data": npy(np.ones((2, 3), "float32"))[:-1]}, W + "expected 24 bytes of values, got 23"),
        ({"data": npy(np.ones((2, 3), "float32")) + b"\0"}, W + "expected 24 bytes of values, got 25"),
        ({"data": npy(np.ones((2, 3), "float32"))[:60]}, W + "invalid NumPy header"),
        ({"data": b""}, W + "invalid NumPy header"),
        ({"data": header(HEADER.replace("2, 3", "10**12, 1").encode())}, W + "invalid NumPy header"),
        ({"data": header(HEADER.replace("2, 3", "1000000, 1000000").encode())}, W + "invalid NumPy header"),
        ({"data": header(HEADER.encode(), version=2)}, W + "invalid NumPy header"),
        ({"data": header(b"{[]: 1}")}, W + "invalid NumPy header"),
        ({"data": header(b"((((")}, W + "invalid NumPy header"),
        ({"data": header(b"'''")}, W + "invalid NumPy header"),
        ({"data": header(b"-" * 60000 + b"1")}, W + "invalid NumPy header"),
    ],
)
def test_a_tensor_of_another_form_is_refused_by_name_before_it_is_allocated(changed, error):
    content = message(**changed)
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=error) as caught:
            read_trees(content, "upload", LIKE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_the_header_may_have_any_padding():
    for padding in (b"", b"\n", b" " * 200 + b"\n"):
        assert read_trees(message(data=header(HEADER.encode() + padding)), "upload", LIKE)["share"]["w"].shape == (2, 3)


def test_a_pickle_is_never_loaded(tmp_path):
    canary = tmp_path / "canary"
    objects = np.empty((2, 3), dtype=object)
    objects[:] = Canary(canary)
    data = npy(objects, pickled=True)
    for changed in ({"data": data}, {"data": data, "dtype": "object"}, {"data": pickle.dumps(Canary(canary))}):
        with pytest.raises(WireError, match=W):
            read_trees(message(**changed), "upload", LIKE)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda c: c["upload/share"].pop("w"), "upload/share: the tensors differ: missing 'w'$"),
        (lambda c: c["upload/share"].update(x=Array(np.ones(1))), "upload/share: the tensors differ: unexpected 'x'$"),
        (
            lambda c: c["upload/share"].update(W=c["upload/share"].pop("w")),
            "upload/share: the tensors differ: missing 'w'; unexpected 'W'$",
        ),
        (lambda c: c.pop("upload/share"), "upload: the parts differ: missing 'upload/share'$"),
        (lambda c: c.update({"upload/sam": ArrayRecord()}), "upload: the parts differ: unexpected 'upload/sam'$"),
        (lambda c: c.update({"upload/share": ConfigRecord()}), "upload: the parts differ: missing 'upload/share'$"),
        (lambda c: c["upload/share"].update({"y" * 10**6: Array(np.ones(1))}), "tensors differ: unexpected 'yyy"),
    ],
)
def test_other_names_are_refused(change, error):
    content = message()
    change(content)
    with pytest.raises(WireError, match=error) as caught:
        read_trees(content, "upload", LIKE)
    assert len(str(caught.value)) < 500


def test_a_million_names_are_refused_in_a_short_line():
    content = message()
    one = Array(np.ones(1, "float32"))
    content["upload/share"].__dict__["_data"] = dict.fromkeys(map(str, range(10**6)), one)  # past slow checks
    with pytest.raises(WireError, match="the tensors differ: missing 'b', 'w'; unexpected '0', '1', '10'"):
        read_trees(content, "upload", LIKE)
    many = RecordDict({"fields": ConfigRecord()})
    many["fields"].__dict__["_data"] = dict.fromkeys(map(str, range(10**6)), 1)
    with pytest.raises(WireError, match="client is missing"):
        read_message(many, Report)


def test_a_part_without_tensors_is_not_sent_and_read_unchanged():
    content = RecordDict()
    write_trees(content, "broadcast", {"share": LIKE["share"], "sam": EMPTY})
    assert list(content.array_records) == ["broadcast/share"]
    assert read_trees(content, "broadcast", {"share": LIKE["share"], "sam": EMPTY})["sam"] is EMPTY


@pytest.mark.parametrize("message", [INSTRUCTION, REGISTRATION, REPORT, Report("ward-a", 1, loss=float("nan"))])
def test_fields_are_read_as_written(message):
    content = RecordDict()
    write_message(content, message)
    assert repr(read_message(serialized(content), type(message))) == repr(message)


@pytest.mark.parametrize(
    ("message", "changed", "error"),
    [
        (
            INSTRUCTION,
            {"protocol": PROTOCOL + 1},
            "protocol version 2 received, 1 expected: install the same",
        ),
        (INSTRUCTION, {"protocol": "1"}, "protocol version '1' received"),
        (INSTRUCTION, {"round": -1}, "invalid Instruction: round is -1"),
        (INSTRUCTION, {"base_round": -1}, "invalid Instruction: base_round is -1"),
        (INSTRUCTION, {"round": 1.0}, "invalid Instruction: round is 1.0"),
        (INSTRUCTION, {"lr": "0.1"}, "invalid Instruction: lr is '0.1'"),
        (INSTRUCTION, {"evaluate": 1}, "invalid Instruction: evaluate is 1"),
        (INSTRUCTION, {"method": b"fedavg()"}, None),
        (INSTRUCTION, {"metrics": "accuracy"}, "invalid Instruction: metrics is 'accuracy'"),
        (INSTRUCTION, {"metrics": [1]}, r"invalid Instruction: metrics\.0 is 1"),
        (REGISTRATION, {"client": ""}, "invalid Registration: client is ''"),
        (REGISTRATION, {"client": "../ward-b"}, "invalid Registration: client is '../ward-b'"),
        (REGISTRATION, {"client": "a\nb"}, "invalid Registration: client is"),
        (REGISTRATION, {"client": "a" * 101}, "invalid Registration: client is"),
        (REGISTRATION, {"examples": 0}, "invalid Registration: examples is 0"),
        (REGISTRATION, {"examples": -9}, "invalid Registration: examples is -9"),
        (REGISTRATION, {"examples": True}, "invalid Registration: examples is True"),
        (REGISTRATION, {"versions": [1.5]}, r"invalid Registration: versions\.0 is 1.5"),
        (REPORT, {"loss": "low"}, "invalid Report: loss is 'low'"),
        (REPORT, {"examples": "x" * 10**6}, "invalid Report: examples is 'xxx"),
        (REPORT, {"sizes": [1.5]}, r"invalid Report: sizes\.0 is 1.5"),
        (REPORT, {"personalized": ["a"] * 10**5}, r"invalid Report: personalized\.0 is 'a'"),
    ],
)
def test_fields_of_other_types_are_refused_by_name(message, changed, error):
    content = RecordDict()
    write_message(content, message)
    content["fields"].update(changed)
    if error is None:  # bytes are not text; they are read as their representation
        assert read_message(content, type(message)).method == "b'fedavg()'"
        return
    with pytest.raises(WireError, match=error) as caught:
        read_message(content, type(message))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", ["client", "examples"])
def test_missing_fields_are_named_and_unknown_ones_are_ignored(name):
    content = RecordDict()
    write_message(content, REGISTRATION)
    content["fields"]["more"] = "from a later version"
    assert read_message(content, Registration) == REGISTRATION
    del content["fields"][name]
    with pytest.raises(WireError, match=f"invalid Registration: {name} is missing"):
        read_message(content, Registration)


@pytest.mark.parametrize("record", [None, ArrayRecord(), MetricRecord()])
def test_a_message_without_fields_is_refused(record):
    content = RecordDict({} if record is None else {"fields": record})
    with pytest.raises(WireError, match="invalid Report: client is missing"):
        read_message(content, Report)
