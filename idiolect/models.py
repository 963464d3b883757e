"""Small networks for federated learning, each a function of what goes in and what comes out.

Every function takes `shape`, the shape of one example's features, and `classes`; with `classes` None the
network predicts one number (a regression). Weights are PyTorch's default initial ones: seed them with
`torch.manual_seed`. Names such as ``conv1`` and ``bn1`` are those of the published networks.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from idiolect.core.errors import UsageError

__all__ = ["digit_model", "fedfsa_cnn", "mlp", "next_character", "small_cnn"]

Shape = tuple[int, ...]


def small_cnn(shape: Shape, classes: int) -> nn.Sequential:
    """Return two 3x3 convolutions and two linear layers, all with batch normalization but the last.

    13 930 parameters on 8x8 gray digits, 106 090 on 28x28 gray, 137 098 on 32x32 color images, 10 classes.

    Args:
        shape: (channels, height, width); height and width at least 4.
        classes: number of outputs.

    Raises:
        UsageError: if the features are no images, or too small.

    Example:
        >>> import torch
        >>> small_cnn((1, 8, 8), 10)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    channels, height, width = _image(shape, "small_cnn", 4)
    flat = 32 * (height // 4) * (width // 4)
    return _named(
        conv1=nn.Conv2d(channels, 16, 3, padding=1), bn1=nn.BatchNorm2d(16), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(16, 32, 3, padding=1), bn2=nn.BatchNorm2d(32), relu2=nn.ReLU(), pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(flat, 64), bn3=nn.BatchNorm1d(64), relu3=nn.ReLU(),
        fc2=nn.Linear(64, classes),
    )  # fmt: skip


def digit_model(classes: int = 10) -> nn.Sequential:
    """Return FedBN's network for digits of shape (3, 28, 28): 14 219 210 parameters with 10 classes.

    Args:
        classes: number of outputs.

    Reference: Li et al., FedBN, ICLR 2021.

    Example:
        >>> import torch
        >>> digit_model()(torch.zeros(2, 3, 28, 28)).shape
        torch.Size([2, 10])
    """
    return _named(
        conv1=nn.Conv2d(3, 64, 5, padding=2), bn1=nn.BatchNorm2d(64), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(64, 64, 5, padding=2), bn2=nn.BatchNorm2d(64), relu2=nn.ReLU(), pool2=nn.MaxPool2d(2),
        conv3=nn.Conv2d(64, 128, 5, padding=2), bn3=nn.BatchNorm2d(128), relu3=nn.ReLU(),
        flatten=nn.Flatten(),
        fc1=nn.Linear(6272, 2048), bn4=nn.BatchNorm1d(2048), relu4=nn.ReLU(),
        fc2=nn.Linear(2048, 512), bn5=nn.BatchNorm1d(512), relu5=nn.ReLU(),
        fc3=nn.Linear(512, classes),
    )  # fmt: skip


def fedfsa_cnn(shape: Shape, classes: int) -> nn.Sequential:
    """Return FedFSA's network, without normalization; its widths follow from the shape, as in the paper.

    Grey images get the network for Fashion-MNIST (1 258 798 parameters on 28x28, 10 classes), color images
    below 48 pixels that for CIFAR (2 806 602 on 32x32, 10 classes), larger ones that for Tiny ImageNet
    (3 527 784 on 64x64, 200 classes).

    Args:
        shape: (channels, height, width); height and width at least 16.
        classes: number of outputs.

    Raises:
        UsageError: if the features are no images, or too small.

    Reference: Xing et al., AAAI 2025, appendix and code.

    Example:
        >>> sum(p.numel() for p in fedfsa_cnn((1, 28, 28), 10).parameters())
        1258798
    """
    channels, height, width = _image(shape, "fedfsa_cnn", 16)
    if channels == 1:
        first, second, hidden = 4, 12, 1024
    elif max(height, width) < 48:
        first, second, hidden = 64, 64, 1024
    else:
        first, second, hidden = 32, 32, 512
    flat = second * _after(_after(height)) * _after(_after(width))
    return _named(
        conv1=nn.Conv2d(channels, first, 5), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(first, second, 5), relu2=nn.ReLU(), pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(flat, hidden), relu3=nn.ReLU(),
        fc2=nn.Linear(hidden, 1024), relu4=nn.ReLU(),
        fc3=nn.Linear(1024, classes),
    )  # fmt: skip


def mlp(shape: Shape, classes: int | None, hidden: Sequence[int] = (128, 64)) -> nn.Sequential:
    """Return linear layers, each but the last with batch normalization; for tables.

    111 818 parameters with 800 features and 10 classes.

    Args:
        shape: of one example's features; flattened.
        classes: number of outputs; None for one number per example, output shape (n,).
        hidden: widths of the hidden layers.

    Raises:
        UsageError: if a width is below 1.

    Example:
        >>> import torch
        >>> mlp((800,), None, hidden=(32,))(torch.zeros(5, 800)).shape
        torch.Size([5])
    """
    if any(width < 1 for width in hidden):
        raise UsageError(f"mlp: hidden={tuple(hidden)}; widths are at least 1")
    widths = [math.prod(shape), *hidden]
    layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    for i, (before, after) in enumerate(zip(widths[:-1], hidden, strict=True), start=1):
        layers |= {f"fc{i}": nn.Linear(before, after), f"bn{i}": nn.BatchNorm1d(after), f"relu{i}": nn.ReLU()}
    layers[f"fc{len(widths)}"] = nn.Linear(widths[-1], 1 if classes is None else classes)
    if classes is None:
        layers["number"] = nn.Flatten(0)
    return _named(**layers)


class _Channels(nn.Module):
    """(n, length, channels) to (n, channels, length)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def next_character(shape: Shape, classes: int) -> nn.Sequential:
    """Return a network that reads a window of characters and predicts the next; no normalization.

    Characters are embedded, and three convolutions sum the window up in steps: 4 characters, 16, all.
    133 665 parameters with windows of 80 and 65 characters.

    Args:
        shape: (length,) of a window; at least 16.
        classes: number of different characters.

    Raises:
        UsageError: if the features are no windows, or too short.

    Example:
        >>> import torch
        >>> next_character((80,), 65)(torch.zeros(5, 80, dtype=torch.int64)).shape
        torch.Size([5, 65])
    """
    if len(shape) != 1 or shape[0] < 16:
        raise UsageError(f"next_character needs windows of at least 16 characters, not features of shape {shape}")
    return _named(
        embedding=nn.Embedding(classes, 32), channels=_Channels(),
        conv1=nn.Conv1d(32, 64, 4, stride=4), relu1=nn.ReLU(),
        conv2=nn.Conv1d(64, 128, 4, stride=4), relu2=nn.ReLU(),
        conv3=nn.Conv1d(128, 128, shape[0] // 4 // 4), relu3=nn.ReLU(), flatten=nn.Flatten(),
        fc1=nn.Linear(128, classes),
    )  # fmt: skip


def default_model(shape: Shape, classes: int | None, whole_numbers: bool) -> nn.Module:
    """Return `small_cnn` for images, `next_character` for windows of whole numbers, `mlp` for all else.

    Example:
        >>> len(default_model((3, 32, 32), 10, False)), len(default_model((800,), 10, False))
        (13, 8)
    """
    if classes is not None and len(shape) == 3:
        return small_cnn(shape, classes)
    if classes is not None and whole_numbers:
        return next_character(shape, classes)
    return mlp(shape, classes)


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _image(shape: Shape, what: str, smallest: int) -> Shape:
    hint = ""
    if len(shape) == 2:
        hint = "; add the axis of channels: x[:, None]"
    elif len(shape) == 3 and shape[2] in (1, 3) and shape[0] not in (1, 3):
        hint = "; put the channels first: x.transpose(0, 3, 1, 2) of an array, x.permute(0, 3, 1, 2) of a tensor"
    if hint or len(shape) != 3 or min(shape[1:]) < smallest:
        wanted = f"images (channels, height, width) of at least {smallest} x {smallest}"
        raise UsageError(f"{what} needs {wanted}, not {shape}{hint}")
    return shape


def _after(side: int) -> int:
    """Return the side of an image after a 5x5 convolution and pooling by 2."""
    return (side - 4) // 2
