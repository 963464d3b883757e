"""Real data sets by name, as pools.

::

    name              examples                               files in the data folder
    digits            1797 of (1, 8, 8), 10 classes          none: comes with scikit-learn
    fashion-mnist     70000 of (1, 28, 28), 10 classes       fashion_mnist/fashion_mnist.npz
    mnist             70000 of (1, 28, 28), 10 classes       mnist/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz
    usps              9298 of (1, 16, 16), 10 classes        usps/usps.npz
    mnist-m           n of (3, 32, 32), 10 classes           mnist_m/labels.npz, {train,test}_NN.webp
    cifar10           60000 of (3, 32, 32), 10 classes       cifar10/labels.npz, {train,test}_NN.webp
    cifar100          60000 of (3, 32, 32), 100 classes      cifar100/labels.npz, {train,test}_NN.webp
    digits-domains    n of (3, 28, 28), 10 classes, domains  those of mnist, usps and mnist-m
    office-caltech10  2533 of 800, 10 classes, 4 domains     office_caltech10_surf/office_caltech10_surf.npz
    tiny-shakespeare  n of 80 characters, next of 65         tinyshakespeare/input.txt.gz
    hf:NAME           images or numeric columns              none: the Hugging Face hub, or a local folder
    PATH              your own .npz, .csv or .parquet        see idiolect.data.read_table

An ``.npz`` of images holds ``x_train``, ``y_train``, ``x_test``, ``y_test`` (bytes). A sheet ``NN.webp`` is a
grid of 32 x 32 images. Images are scaled to −1 … 1.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from idiolect.core.calls import called
from idiolect.core.errors import UsageError, did_you_mean
from idiolect.data.archives import find, read_idx, read_npz, read_sheet, reading, to_images
from idiolect.data.hub import from_hub
from idiolect.data.pool import Pool
from idiolect.data.tables import SUFFIXES, read_table

DataDir = str | Path | None

WINDOW, STRIDE, TEST_SHARE = 80, 10, 0.2
"""Tiny Shakespeare: characters in a window, characters from one window to the next, last share for the test."""

_DIGITS = tuple("0123456789")
_CLOTHES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_OFFICE = (
    *("backpack", "bike", "calculator", "headphones", "keyboard"),
    *("laptop", "monitor", "mouse", "mug", "projector"),
)


@called
def load(
    name: str | Path,
    data_dir: DataDir = None,
    label: str | None = None,
    client: str | None = None,
    unit: str | None = None,
) -> Pool:
    """Load a data set by name (see :mod:`idiolect.data.sources`), or your own from a file.

    Args:
        name: a name of the table above, ``hf:`` and the name of a set on the Hugging Face hub (or the path of
            a local folder), or the path of an ``.npz``, ``.csv`` or ``.parquet`` file.
        data_dir: the folder with the files of the named sets; None: the environment variable IDIOLECT_DATA.
        label: name of the label column of your own file or of a set on the hub; see :func:`read_table`.
        client: name of the client column.
        unit: name of the column of what is not divided between training and test; see :class:`ByGroup`.

    Raises:
        UsageError: if the name is unknown, a file is missing or cannot be read, or an argument has no meaning for
            this data.

    Example:
        >>> pool = load("digits")
        >>> tuple(pool.x.shape), pool.classes[:3], float(pool.x.min()), float(pool.x.max())
        ((1797, 1, 8, 8), ('0', '1', '2'), -1.0, 1.0)
    """
    word, columns = str(name), {"label": label, "client": client, "unit": unit}
    read = from_hub if word.startswith("hf:") else read_table if Path(word).suffix in SUFFIXES else None
    if read:
        if data_dir is not None:
            raise UsageError(f"data_dir={str(data_dir)!r} is for the named sets, not for {word}; leave it out")
        return read(word, **columns)
    if word not in SOURCES:
        known = ", ".join([*SOURCES, "hf:NAME", "or a path ending in " + ", ".join(SUFFIXES)])
        raise UsageError(f"unknown data set {word!r}{did_you_mean(word, SOURCES)}; known: {known}")
    for column, given in columns.items():
        if given is not None:
            raise UsageError(f"{column}={given!r} names a column of a table; {word} has none: leave it out")
    if data_dir is not None and not SOURCES[word].file:
        raise UsageError(f"data_dir={str(data_dir)!r}: {word} comes with scikit-learn; leave it out")
    return SOURCES[word].read(data_dir)


def _digits(_: DataDir) -> Pool:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.tensor(bunch.images[:, None], dtype=torch.float32).div_(16).sub_(0.5).div_(0.5)
    return Pool("digits", x, torch.tensor(bunch.target, dtype=torch.int64), _DIGITS)


def _images(
    name: str, classes: tuple[str, ...], train: tuple[NDArray[Any], ...], test: tuple[NDArray[Any], ...]
) -> Pool:
    """Make a pool of the official parts of an image set, training images first."""
    x = to_images(np.concatenate([train[0], test[0]]))
    y = torch.from_numpy(np.concatenate([train[1], test[1]]).astype(np.int64))
    return Pool(name, x, y, classes, part=np.repeat(["train", "test"], [len(train[1]), len(test[1])]))


def _packed(name: str, relative: str, classes: tuple[str, ...]) -> Callable[[DataDir], Pool]:
    def read(data_dir: DataDir) -> Pool:
        path = find(data_dir, relative)
        arrays = read_npz(path)
        with reading(path):
            train, test = ((arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test"))
        return _images(name, classes, train, test)

    return read


def _mnist(data_dir: DataDir) -> Pool:
    train, test = (
        tuple(read_idx(find(data_dir, f"mnist/{part}-{kind}-ubyte.gz")) for kind in ("images-idx3", "labels-idx1"))
        for part in ("train", "t10k")
    )
    return _images("mnist", _DIGITS, train, test)


def _sheets(name: str, folder: str, classes: tuple[str, ...]) -> Callable[[DataDir], Pool]:
    def read(data_dir: DataDir) -> Pool:
        labels = find(data_dir, f"{folder}/labels.npz")
        arrays = read_npz(labels)
        parts = []
        for part in ("train", "test"):
            with reading(labels):
                y = arrays[f"y_{part}"]
            images: list[NDArray[np.uint8]] = []
            while sum(map(len, images)) < len(y):
                images.append(read_sheet(find(data_dir, f"{folder}/{part}_{len(images):02d}.webp")))
            parts.append((np.concatenate(images)[: len(y)], y))
        return _images(name, classes, *parts)

    return read


def _digits_domains(data_dir: DataDir) -> Pool:
    """Bring the digits to (3, 28, 28) as FedBN does: repeat gray, zero-pad USPS by 6, crop MNIST-M by 2."""
    pools = [SOURCES[name].read(data_dir) for name in ("mnist", "usps", "mnist-m")]
    mnist, usps, mnist_m = (pool.x for pool in pools)
    usps = torch.nn.functional.pad(usps, (6, 6, 6, 6), value=-1)
    x = torch.cat([mnist.expand(-1, 3, -1, -1), usps.expand(-1, 3, -1, -1), mnist_m[:, :, 2:30, 2:30]])
    return Pool(
        "digits-domains",
        x,
        torch.cat([pool.y for pool in pools]),
        _DIGITS,
        group=np.repeat([pool.name for pool in pools], [len(pool) for pool in pools]),
        part=np.concatenate([pool.part for pool in pools if pool.part is not None]),
    )


def _office_caltech(data_dir: DataDir) -> Pool:
    """Counts of 800 visual words, divided by their sum per image and standardized per word over the pool."""
    path = find(data_dir, "office_caltech10_surf/office_caltech10_surf.npz")
    arrays, domains = read_npz(path), ("amazon", "caltech10", "dslr", "webcam")
    with reading(path):
        counts = np.concatenate([arrays[f"x_{domain}"] for domain in domains]).astype(np.float64)
        labels = [arrays[f"y_{domain}"] for domain in domains]
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    x = (share - share.mean(0)) / np.maximum(share.std(0), 1e-12)
    y = torch.from_numpy(np.concatenate(labels).astype(np.int64))
    group = np.repeat(domains, [len(part) for part in labels])
    return Pool("office-caltech10", torch.from_numpy(x.astype(np.float32)), y, _OFFICE, group)


def _tiny_shakespeare(data_dir: DataDir) -> Pool:
    """Windows of 80 characters of one speaker, 10 apart, and the character that follows each.

    The last fifth of a speaker's text is the test part; no window reaches from one part into the other.
    """
    path = find(data_dir, "tinyshakespeare/input.txt.gz")
    with reading(path):
        text = gzip.decompress(path.read_bytes()).decode()
    alphabet, codes = np.unique(np.array(list(text)), return_inverse=True)
    spoken: dict[str, list[str]] = {}
    for block in text.split("\n\n"):
        speaker, _, speech = block.strip().partition(":\n")
        if speech:
            spoken.setdefault(speaker, []).append(speech)
    number = {character: code for code, character in enumerate(alphabet.tolist())}
    windows, group, part = [], [], []
    for speaker, speeches in spoken.items():
        codes = np.array([number[character] for character in "\n".join(speeches)])
        cut = len(codes) - int(TEST_SHARE * len(codes))
        for name, piece in (("train", codes[:cut]), ("test", codes[cut:])):
            if len(piece) > WINDOW:
                windows.append(np.lib.stride_tricks.sliding_window_view(piece, WINDOW + 1)[::STRIDE])
                group += [speaker] * len(windows[-1])
                part += [name] * len(windows[-1])
    rows = torch.from_numpy(np.concatenate(windows).astype(np.int64))
    x, y = rows[:, :-1].contiguous(), rows[:, -1].contiguous()
    return Pool("tiny-shakespeare", x, y, tuple(alphabet.tolist()), np.array(group), np.array(part))


class Source(NamedTuple):
    """A named set: how it is read, and one file that must be in the data folder for it (none: empty)."""

    read: Callable[[DataDir], Pool]
    file: str


_CIFAR100 = tuple(map(str, range(100)))
_CLOTHES_FILE, _USPS_FILE = "fashion_mnist/fashion_mnist.npz", "usps/usps.npz"
SOURCES: dict[str, Source] = {
    "digits": Source(_digits, ""),
    "fashion-mnist": Source(_packed("fashion-mnist", _CLOTHES_FILE, _CLOTHES), _CLOTHES_FILE),
    "mnist": Source(_mnist, "mnist/train-images-idx3-ubyte.gz"),
    "usps": Source(_packed("usps", _USPS_FILE, _DIGITS), _USPS_FILE),
    "mnist-m": Source(_sheets("mnist-m", "mnist_m", _DIGITS), "mnist_m/labels.npz"),
    "cifar10": Source(_sheets("cifar10", "cifar10", _CIFAR10), "cifar10/labels.npz"),
    "cifar100": Source(_sheets("cifar100", "cifar100", _CIFAR100), "cifar100/labels.npz"),
    "digits-domains": Source(_digits_domains, "mnist_m/labels.npz"),
    "office-caltech10": Source(_office_caltech, "office_caltech10_surf/office_caltech10_surf.npz"),
    "tiny-shakespeare": Source(_tiny_shakespeare, "tinyshakespeare/input.txt.gz"),
}
