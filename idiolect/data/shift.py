"""Shifts: what makes one client's data differ from another's, on top of the split.

A shift is a frozen dataclass. Its parameters are drawn once per client, from the seed and the client's name,
and hold for all of the client's splits. ``Rotation(30) + Noise(0.1)`` applies both, in that order.

Images have shape (n, channels, height, width), black at −1 and white at 1, as the sources give them. Nothing
is clipped, so shifted values may leave that range.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from idiolect.core.errors import UsageError, kind_of
from idiolect.core.values import settings, whole
from idiolect.data.clients import ClientData
from idiolect.data.examples import Examples


class Shift(ABC):
    """A change of one client's examples, the same in training, validation and test."""

    @abstractmethod
    def apply(
        self, data: ClientData, client: str, seed: int = 0, classes: int | None = None, place: int = 0
    ) -> ClientData:
        """Return the shifted client.

        Args:
            data: the client's examples.
            client: its name; with the seed it decides the parameters of the shift.
            seed: of the experiment, 0 or above.
            classes: number of classes; None for a regression.
            place: position among the shifts that follow one another; two at different places draw
                independently.

        Raises:
            UsageError: if the shift does not fit the data.
        """

    def __add__(self, other: Shift) -> Shifts:
        if not isinstance(other, Shift):
            raise UsageError(
                f"{self} + ...: {kind_of(other)} is no shift; shifts are added, as Rotation(30) + Noise(0.1)"
            )
        return Shifts(_steps(self) + _steps(other))


@dataclass(frozen=True, repr=False)
class Shifts(Shift):
    """Several shifts, one after the other; written with ``+``.

    Example:
        >>> Rotation(30) + Noise(0.1)
        Rotation(degrees=30.0) + Noise(sigma=0.1)
    """

    steps: tuple[Shift, ...]

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.steps))

    def apply(
        self, data: ClientData, client: str, seed: int = 0, classes: int | None = None, place: int = 0
    ) -> ClientData:
        """Apply the steps in order; see :meth:`Shift.apply`."""
        for later, step in enumerate(self.steps):
            data = step.apply(data, client, seed, classes, place + later)
        return data


class FeatureShift(Shift):
    """A shift of the features; its one field is an amount, 0 or above, and 0 changes nothing."""

    needs = "floating-point features"

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if not 0 <= value < float("inf"):
                raise UsageError(f"{type(self).__name__}: {field.name} is {value}; give a number, 0 or above")

    @abstractmethod
    def draw(self, rng: np.random.Generator, channels: int) -> Callable[[Tensor], Tensor]:
        """Draw one client's parameters and return what they do to its features, shape (n, channels, …)."""

    def fits(self, x: Tensor) -> bool:
        """Tell whether features are what this shift needs."""
        return x.is_floating_point() and x.dim() > 1

    def apply(
        self, data: ClientData, client: str, seed: int = 0, classes: int | None = None, place: int = 0
    ) -> ClientData:
        """Draw the client's parameters and change the features of each split; see :meth:`Shift.apply`."""
        x = data.held()["train"].x
        if isinstance(x, Tensor) and not len(x):
            return data
        if not isinstance(x, Tensor) or not self.fits(x):
            have = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else f"in a {type(x).__name__}"
            raise UsageError(f"{type(self).__name__} needs {self.needs}; client {client!r} has features {have}")
        rng = stream(seed, "shift", str(place), type(self).__name__, client)
        change = self.draw(rng, x.shape[1])
        return data.changed(lambda split: Examples(change(split.x), split.y))  # type: ignore[union-attr]


class ImageShift(FeatureShift):
    """A shift that only makes sense on images."""

    needs = "images of shape (n, channels, height, width)"

    def fits(self, x: Tensor) -> bool:
        """Tell whether features are images."""
        return x.is_floating_point() and x.dim() == 4


@settings
class Rotation(ImageShift):
    """Turn all images of a client counter-clockwise by one angle, uniform in ±degrees.

    Interpolation is bilinear; outside the image its nearest pixel is repeated.

    Reference: Ghosh et al., IFCA, NeurIPS 2020 (groups of clients turned by 0, 90, 180 or 270 degrees there).

    Example:
        >>> image = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).expand(1, 1, 2, 2)
        >>> rotate(image, 90)[0, 0].round()
        tensor([[1., 0.],
                [0., 0.]])
    """

    degrees: float

    def draw(self, rng: np.random.Generator, channels: int) -> Callable[[Tensor], Tensor]:
        """Draw the client's angle; see :meth:`FeatureShift.draw`."""
        angle = rng.uniform(-self.degrees, self.degrees)
        return lambda x: rotate(x, angle)


def rotate(x: Tensor, degrees: float) -> Tensor:
    """Turn images (n, channels, height, width) counter-clockwise about their center."""
    from scipy import ndimage

    turned = ndimage.rotate(x.numpy(), degrees, axes=(2, 3), reshape=False, order=1, mode="nearest")
    return torch.from_numpy(turned)


@settings
class Blur(ImageShift):
    """Blur all images of a client with one Gaussian, its width uniform in 0 … sigma pixels.

    Example:
        >>> point = torch.zeros(1, 1, 5, 5).index_put_([torch.tensor(i) for i in (0, 0, 2, 2)], torch.tensor(1.0))
        >>> float(Blur(2).apply(ClientData((point, [0])), "ward").train.x.max()) < 1
        True
    """

    sigma: float

    def draw(self, rng: np.random.Generator, channels: int) -> Callable[[Tensor], Tensor]:
        """Draw the client's width; see :meth:`FeatureShift.draw`."""
        from scipy import ndimage

        width = rng.uniform(0, self.sigma)
        return lambda x: torch.from_numpy(ndimage.gaussian_filter(x.numpy(), (0, 0, width, width)))


@settings
class Brightness(ImageShift):
    """Add one number to all pixels of a client, uniform in ±amount (white minus black is 2).

    Example:
        >>> data = ClientData((torch.zeros(1, 1, 1, 2), [0]))
        >>> [Brightness(0.5).apply(data, name).train.x.flatten() for name in ("north", "south")]
        [tensor([0.1110, 0.1110]), tensor([-0.0923, -0.0923])]
    """

    amount: float

    def draw(self, rng: np.random.Generator, channels: int) -> Callable[[Tensor], Tensor]:
        """Draw the client's brightness; see :meth:`FeatureShift.draw`."""
        level = rng.uniform(-self.amount, self.amount)
        return lambda x: x + level


@settings
class Contrast(ImageShift):
    """Stretch each image about its own mean by one factor per client, uniform in 1 ± amount.

    Example:
        >>> data = ClientData((torch.tensor([[[[-0.5, 0.5]]]]), [0]))
        >>> [Contrast(0.5).apply(data, name).train.x.flatten() for name in ("north", "south")]
        [tensor([-0.3388,  0.3388]), tensor([-0.4137,  0.4137])]
    """

    amount: float

    def draw(self, rng: np.random.Generator, channels: int) -> Callable[[Tensor], Tensor]:
        """Draw the client's factor; see :meth:`FeatureShift.draw`."""
        factor = rng.uniform(1 - self.amount, 1 + self.amount)

        def stretch(x: Tensor) -> Tensor:
            mean = x.mean(dim=(1, 2, 3), keepdim=True)
            return mean + factor * (x - mean)

        return stretch


@settings
class Color(ImageShift):
    """Scale the intensity of each color channel by its own factor per client, uniform in 1 ± amount.

    Intensity is counted from black (−1): x ← (x + 1) · factor − 1.

    Example:
        >>> gray = ClientData((torch.zeros(1, 3, 1, 1), [0]))
        >>> Color(0.5).apply(gray, "north").train.x.flatten()
        tensor([ 0.1603,  0.3558, -0.2515])
    """

    amount: float
    needs = "color images, at least 2 channels"

    def fits(self, x: Tensor) -> bool:
        """Tell whether features are images in color."""
        return super().fits(x) and x.shape[1] > 1

    def draw(self, rng: np.random.Generator, channels: int) -> Callable[[Tensor], Tensor]:
        """Draw the client's factors; see :meth:`FeatureShift.draw`."""
        factor = rng.uniform(1 - self.amount, 1 + self.amount, channels)
        return lambda x: (x + 1) * _along(factor, x) - 1


@settings
class Noise(FeatureShift):
    """Add white noise; its standard deviation is one number per client, uniform in 0 … sigma.

    Reference: Li et al., Federated Learning on Non-IID Data Silos, ICDE 2022 (noise grows with the client there).

    Example:
        >>> data = ClientData((torch.zeros(1000, 4), [0] * 1000))
        >>> [round(float(Noise(0.5).apply(data, name).train.x.std()), 2) for name in ("north", "south")]
        [0.43, 0.13]
    """

    sigma: float

    def draw(self, rng: np.random.Generator, channels: int) -> Callable[[Tensor], Tensor]:
        """Draw the client's noise level; see :meth:`FeatureShift.draw`."""
        level = rng.uniform(0, self.sigma)
        return lambda x: x + level * torch.from_numpy(rng.standard_normal(x.shape, np.float32)).to(x.dtype)


@settings
class SensorGain(FeatureShift):
    """Scale each feature (or channel) by its own factor per client, uniform in 1 ± amount.

    Example:
        >>> data = ClientData((torch.ones(1, 3), [0]))
        >>> SensorGain(0.1).apply(data, "north").train.x.flatten()
        tensor([1.0078, 1.0675, 1.0188])
    """

    amount: float

    def draw(self, rng: np.random.Generator, channels: int) -> Callable[[Tensor], Tensor]:
        """Draw the client's gains; see :meth:`FeatureShift.draw`."""
        gain = rng.uniform(1 - self.amount, 1 + self.amount, channels)
        return lambda x: x * _along(gain, x)


@settings
class SensorOffset(FeatureShift):
    """Add to each feature (or channel) its own number per client, uniform in ±amount.

    Example:
        >>> data = ClientData((torch.zeros(1, 3), [0]))
        >>> SensorOffset(0.1).apply(data, "north").train.x.flatten()
        tensor([ 0.0731,  0.0367, -0.0917])
    """

    amount: float

    def draw(self, rng: np.random.Generator, channels: int) -> Callable[[Tensor], Tensor]:
        """Draw the client's offsets; see :meth:`FeatureShift.draw`."""
        offset = rng.uniform(-self.amount, self.amount, channels)
        return lambda x: x + _along(offset, x)


@settings
class PermuteLabels(Shift):
    """Concept shift: clients fall into groups at random, and each group gives the classes other numbers.

    With the classes in a random order that all groups share, group g moves each class g places on: group 0
    keeps its labels, and no two groups agree on any class.

    Args:
        groups: how many groups, from 1 to the number of classes.

    Reference: Sattler, Müller, Samek, Clustered Federated Learning, 2019 (arXiv 1910.01991), swap labels likewise.

    Example:
        >>> data = ClientData(([[0.0], [0.0], [0.0]], [0, 1, 2]))
        >>> shift = PermuteLabels(groups=3)
        >>> [(shift.group(name), shift.apply(data, name, classes=3).train.y.tolist()) for name in "abc"]
        [(2, [1, 2, 0]), (0, [0, 1, 2]), (1, [2, 0, 1])]
    """

    groups: int

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise UsageError(f"PermuteLabels: groups is {self.groups}; give at least 1")

    def group(self, client: str, seed: int = 0) -> int:
        """Return the group that a client falls into."""
        return int(stream(seed, "label group", client).integers(self.groups))

    def apply(
        self, data: ClientData, client: str, seed: int = 0, classes: int | None = None, place: int = 0
    ) -> ClientData:
        """Give the labels of the client's group; see :meth:`Shift.apply`."""
        if classes is None:
            raise UsageError("PermuteLabels needs classes; this is a regression")
        if self.groups > classes:
            raise UsageError(f"PermuteLabels: {self.groups} groups are more than the {classes} classes")
        circle = stream(seed, "label order").permutation(classes)
        new = torch.empty(classes, dtype=torch.int64)
        new[torch.from_numpy(circle)] = torch.from_numpy(np.roll(circle, -self.group(client, seed)))
        data.held()
        return data.changed(lambda split: Examples(split.x, new[split.y]))  # type: ignore[union-attr]


def stream(seed: int, *words: str) -> np.random.Generator:
    """Return the random generator of a purpose: the same for the same seed and words, on every machine."""
    return np.random.default_rng([whole("seed", seed, 0), *"\0".join(words).encode()])


def _steps(shift: Shift) -> tuple[Shift, ...]:
    return shift.steps if isinstance(shift, Shifts) else (shift,)


def _along(values: np.ndarray, x: Tensor) -> Tensor:
    """Shape one value per channel so that it multiplies or adds along axis 1 of x."""
    return torch.from_numpy(values).to(x.dtype).reshape(1, -1, *[1] * (x.dim() - 2))
