from __future__ import annotations

import gzip
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from idiolect.core.errors import UsageError
from idiolect.data import ByDomain, Labels, Pool, check_clients, federate, load
from idiolect.data.archives import read_sheet

needs_data = pytest.mark.skipif(
    not os.environ.get("IDIOLECT_DATA"), reason="set IDIOLECT_DATA to the folder of real data sets"
)
TEN = [str(digit) for digit in range(10)]


def write_sheet(path, values, columns=2):
    """Write 32 x 32 images of one gray value each as a lossless sheet; the last cells stay white."""
    rows = -(-len(values) // columns)
    sheet = np.full((rows * 32, columns * 32, 3), 255, np.uint8)
    for i, value in enumerate(values):
        top, left = i // columns * 32, i % columns * 32
        sheet[top : top + 32, left : left + 32] = value
    Image.fromarray(sheet).save(path, lossless=True)


def write_cifar100(folder):
    (folder / "cifar100").mkdir()
    np.savez(folder / "cifar100/labels.npz", y_train=np.uint8([9, 99, 0, 3, 5]), y_test=np.uint8([7]))
    write_sheet(folder / "cifar100/train_00.webp", [0, 51, 102, 153])
    write_sheet(folder / "cifar100/train_01.webp", [204])
    write_sheet(folder / "cifar100/test_00.webp", [255])


def write_idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(head + array.tobytes()))


def test_digits_come_with_the_library():
    pool = load("digits")
    assert tuple(pool.x.shape) == (1797, 1, 8, 8)
    assert torch.bincount(pool.y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert pool.x[0, 0, 0].tolist() == [-1, -1, -0.375, 0.625, 0.125, -0.875, -1, -1]


def test_sheets_are_cut_row_by_row_and_follow_one_another(tmp_path):
    write_cifar100(tmp_path)
    pool = load("cifar100", tmp_path)
    assert tuple(pool.x.shape) == (6, 3, 32, 32)
    assert pool.x.std((1, 2, 3)).max() == 0
    assert pool.x[:, 0, 0, 0].tolist() == pytest.approx([-1, -0.6, -0.2, 0.2, 0.6, 1])
    assert pool.y.tolist() == [9, 99, 0, 3, 5, 7]
    assert pool.part.tolist() == ["train"] * 5 + ["test"]
    assert len(pool.classes) == 100


def test_sheets_keep_rows_columns_and_colors(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "s.webp", lossless=True)
    images = read_sheet(tmp_path / "s.webp")
    assert np.array_equal(images[4], picture[32:, 32:64])


def test_idx_files_are_read_in_their_order(tmp_path):
    (tmp_path / "mnist").mkdir()
    for part, images, labels in (("train", [[[0, 255, 51]]] * 2, [4, 2]), ("t10k", [[[255, 255, 0]]], [9])):
        write_idx(tmp_path / f"mnist/{part}-images-idx3-ubyte.gz", np.uint8(images))
        write_idx(tmp_path / f"mnist/{part}-labels-idx1-ubyte.gz", np.uint8(labels))
    pool = load("mnist", tmp_path)
    assert pool.x.flatten(1).numpy() == pytest.approx(np.array([[-1, 1, -0.6], [-1, 1, -0.6], [1, 1, -1]]))
    assert pool.y.tolist() == [4, 2, 9]
    assert pool.part.tolist() == ["train", "train", "test"]


def test_the_data_folder_is_an_argument_or_a_variable(tmp_path, monkeypatch):
    write_cifar100(tmp_path)
    monkeypatch.setenv("IDIOLECT_DATA", str(tmp_path))
    assert len(load("cifar100")) == 6
    with pytest.raises(UsageError, match=r"no file .*other.cifar100.labels.npz; set --data-dir"):
        load("cifar100", tmp_path / "other")
    monkeypatch.delenv("IDIOLECT_DATA")
    with pytest.raises(UsageError, match=r"needs the file cifar100.labels.npz; .*IDIOLECT_DATA"):
        load("cifar100")


def test_unknown_names_get_a_guess_and_the_list():
    with pytest.raises(UsageError, match=r"'fashion_mnist' \(did you mean fashion-mnist\?\); known: digits, .*hf:"):
        load("fashion_mnist")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("labels.npz", b"PK\x03\x04 torn"),
        ("labels.npz", b""),
        ("train_01.webp", b"RIFF"),
        ("train_01.webp", None),
    ],
)
def test_broken_files_are_named(tmp_path, file, content):
    write_cifar100(tmp_path)
    path = tmp_path / "cifar100" / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UsageError, match=f"{'no file' if content is None else 'cannot read'} .*{file}") as refused:
        load("cifar100", tmp_path)
    assert "\n" not in str(refused.value)


def test_torn_and_foreign_idx_files_are_named(tmp_path):
    (tmp_path / "mnist").mkdir()
    path = tmp_path / "mnist/train-images-idx3-ubyte.gz"
    whole = gzip.compress(bytes([0, 0, 8, 3]) + np.array([9, 9, 9], ">u4").tobytes() + bytes(729))
    for content in (whole[:-12], gzip.compress(b"GIF89a"), gzip.compress(gzip.decompress(whole)[:-1]), b"x"):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"cannot read .*train-images-idx3-ubyte.gz"):
            load("mnist", tmp_path)


def test_a_sheet_of_another_size_is_refused(tmp_path):
    write_cifar100(tmp_path)
    Image.new("RGB", (33, 32)).save(tmp_path / "cifar100/train_00.webp", lossless=True)
    with pytest.raises(UsageError, match=r"no sheet of 32 x 32 images"):
        load("cifar100", tmp_path)


def test_a_missing_array_is_named(tmp_path):
    (tmp_path / "usps").mkdir()
    np.savez(tmp_path / "usps/usps.npz", x_train=np.zeros((1, 16, 16), np.uint8))
    with pytest.raises(UsageError, match=r"cannot read .*usps.npz: .*y_train"):
        load("usps", tmp_path)


MNIST_TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
USPS_TRAIN = [1194, 1005, 731, 658, 652, 556, 664, 645, 542, 644]
MNIST_M_TRAIN = [1013, 1132, 1009, 1041, 982, 922, 939, 996, 944, 1022]


@needs_data
@pytest.mark.parametrize(
    ("name", "shape", "train_counts", "tests", "mean", "std"),
    [
        ("mnist", (70000, 1, 28, 28), MNIST_TRAIN, 10000, [0.1307], [0.3081]),
        ("fashion-mnist", (70000, 1, 28, 28), [6000] * 10, 10000, [0.2860], [0.3529]),
        ("usps", (9298, 1, 16, 16), USPS_TRAIN, 2007, [0.2493], [0.3005]),
        ("mnist-m", (12000, 3, 32, 32), MNIST_M_TRAIN, 2000, [0.46, 0.46, 0.41], [0.25, 0.24, 0.26]),
        ("cifar10", (60000, 3, 32, 32), [5000] * 10, 10000, [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    ],
)
def test_real_images_have_their_counts_and_moments(name, shape, train_counts, tests, mean, std):
    pool = load(name)
    assert pool.name == name
    assert tuple(pool.x.shape) == shape
    assert (float(pool.x.min()), float(pool.x.max())) == (-1.0, 1.0)
    first_test = len(pool) - tests
    assert pool.part.tolist() == ["train"] * first_test + ["test"] * tests
    assert torch.bincount(pool.y[:first_test]).tolist() == train_counts
    spread, center = torch.std_mean(pool.x[:first_test], (0, 2, 3))
    tolerance = 0.01 if name == "mnist-m" else 0.0006
    assert ((center + 1) / 2).tolist() == pytest.approx(mean, abs=tolerance)
    assert (spread / 2).tolist() == pytest.approx(std, abs=tolerance)


@needs_data
def test_digit_domains_are_prepared_as_in_fedbn():
    pool = load("digits-domains")
    assert tuple(pool.x.shape) == (91298, 3, 28, 28)
    usps, mnist_m = (torch.from_numpy(pool.group == domain) for domain in ("usps", "mnist-m"))
    x = pool.x[usps][7]
    assert torch.equal(x[0], x[2])
    assert torch.equal(x[1, 6:22, 6:22], load("usps").x[7, 0])
    assert float(x[:, :6].max()) == float(x[:, :, 22:].max()) == -1
    assert torch.equal(pool.x[mnist_m][11], load("mnist-m").x[11, :, 2:30, 2:30])
    people = federate(pool, ByDomain(), test="official", size=743)
    sizes = {name: (len(data.train.y), len(data.test.y)) for name, data in people.items()}
    assert sizes == {"mnist": (743, 10000), "mnist-m": (743, 2000), "usps": (743, 2007)}
    assert check_clients(people, Labels(10))[1] == []


@needs_data
def test_office_caltech_is_standardized_over_its_four_domains():
    pool = load("office-caltech10")
    sizes = dict(zip(*np.unique(pool.group, return_counts=True), strict=True))
    assert sizes == {"amazon": 958, "caltech10": 1123, "dslr": 157, "webcam": 295}
    assert torch.bincount(pool.y[torch.from_numpy(pool.group == "dslr")]).tolist() == [
        *(12, 21, 12, 13, 10),
        *(24, 22, 12, 8, 23),
    ]
    file = os.path.join(os.environ["IDIOLECT_DATA"], "office_caltech10_surf/office_caltech10_surf.npz")
    with np.load(file) as arrays:
        counts = np.concatenate([arrays[f"x_{domain}"] for domain in sizes]).astype(float)
    word = counts[:, 5] / counts.sum(1)
    assert pool.x[:, 5].numpy() == pytest.approx((word - word.mean()) / word.std(), abs=1e-4)
    used = pool.x.std(0) > 0
    assert int(used.sum()) >= 790
    assert abs(pool.x.mean(0)).max() < 1e-5
    assert pool.x[:, used].std(0, correction=0).numpy() == pytest.approx(1, abs=1e-4)
    assert pool.part is None


@needs_data
def test_tiny_shakespeare_windows_predict_the_next_character_of_one_speaker():
    pool = load("tiny-shakespeare")
    with gzip.open(os.path.join(os.environ["IDIOLECT_DATA"], "tinyshakespeare/input.txt.gz"), "rt") as file:
        text = file.read()
    assert "".join(pool.classes) == "".join(sorted(set(text)))
    assert len(pool.classes) == 65
    said = "\n".join(re.findall(r"(?:^|\n\n)JULIET:\n([^\n].*?)(?=\n\n|\s*\Z)", text, re.DOTALL))
    mine = np.flatnonzero(pool.group == "JULIET")
    windows = ["".join(pool.classes[code] for code in [*pool.x[i].tolist(), int(pool.y[i])]) for i in mine]
    cut = len(said) - int(0.2 * len(said))
    train = [said[i : i + 81] for i in range(0, cut - 80, 10)]
    test = [said[i : i + 81] for i in range(cut, len(said) - 80, 10)]
    assert windows == train + test
    assert pool.part[mine].tolist() == ["train"] * len(train) + ["test"] * len(test)
    assert len(pool) > 90000


def test_a_pool_is_named_for_what_was_asked():
    pool = load("digits")
    assert isinstance(pool, Pool)
    assert list(pool.classes) == TEN
