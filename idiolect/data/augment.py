"""Augmentation: random changes of training images, drawn anew for each example of a batch.

Each function makes an augmentation, which takes images of shape (b, channels, height, width) and a `torch.Generator`
and returns images of the same shape and dtype. All numbers are drawn by the generator, on its own device, a fixed
number of them per example: so the same generator gives the same images on every engine and device. Images are black at
−1 and white at 1, as idiolect's sources give them. The recipe of FedFSA for CIFAR is
``compose(random_crop(4), random_flip())``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from idiolect.core.errors import UsageError, names_of
from idiolect.core.values import real, whole

__all__ = ["Augmentation", "compose", "gaussian_noise", "random_crop", "random_erasing", "random_flip"]

TRIES = 10
"""Rectangles that `random_erasing` draws for an image, of which it takes the first that fits."""


@dataclass(frozen=True)
class Augmentation:
    """A random change of a batch of images; it prints as the call that made it.

    Attributes:
        name: of the function that made it.
        arguments: of that call.
        change: (images, generator) -> images.
    """

    name: str
    arguments: tuple[tuple[str, Any], ...]
    change: Callable[[Tensor, Generator], Tensor] = field(compare=False)

    def __call__(self, x: Tensor, generator: Generator) -> Tensor:
        """Return the changed images.

        Args:
            x: ``(b, channels, height, width)`` floating images; they are not changed.
            generator: draws all numbers.

        Raises:
            UsageError: if x is no batch of floating images.
        """
        if x.dim() != 4 or not x.is_floating_point():
            have = f"{x.dtype} of shape {tuple(x.shape)}"
            raise UsageError(f"{self.name} needs floating images (b, channels, height, width), not {have}")
        return self.change(x, generator)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' if k else repr(v) for k, v in self.arguments)})"


def random_crop(padding: int, fill: float = -1.0) -> Augmentation:
    """Pad each image on all sides, and cut out a window of the old size at a random place.

    Args:
        padding: pixels on each side, at least 0; the window moves by up to as many in each direction.
        fill: value of the padding; −1 is black.

    Draws: two whole numbers per image, all tops and then all lefts, uniform in 0 … 2 · padding.

    Example:
        >>> image = torch.arange(9.0).view(1, 1, 3, 3)
        >>> random_crop(1, fill=0)(image, torch.Generator().manual_seed(2))
        tensor([[[[0., 0., 0.],
                  [0., 0., 1.],
                  [0., 3., 4.]]]])

    Reference: He et al., Deep Residual Learning, CVPR 2016 (padding 4 on CIFAR).
    """
    padding = whole("random_crop: padding", padding, 0)
    fill = _finite("random_crop: fill", fill)

    def change(x: Tensor, generator: Generator) -> Tensor:
        count, _, height, width = x.shape
        places = torch.randint(2 * padding + 1, (2, count), generator=generator, device=generator.device).to(x.device)
        padded = F.pad(x, [padding] * 4, value=fill)
        rows = places[0, :, None] + torch.arange(height, device=x.device)
        columns = places[1, :, None] + torch.arange(width, device=x.device)
        image = torch.arange(count, device=x.device)[:, None, None]
        return padded.movedim(1, -1)[image, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)

    return Augmentation("random_crop", (("padding", padding), ("fill", fill)), change)


def random_flip(share: float = 0.5) -> Augmentation:
    """Mirror each image left to right with a probability.

    Args:
        share: the probability, in [0, 1].

    Draws: one uniform number per image; it is mirrored if the number is below the share.

    Example:
        >>> random_flip(1.0)(torch.tensor([[[[1.0, 2.0, 3.0]]]]), torch.Generator())
        tensor([[[[3., 2., 1.]]]])
    """
    share = real("random_flip: share", share, lambda p: 0 <= p <= 1, "in [0, 1]")

    def change(x: Tensor, generator: Generator) -> Tensor:
        mirrored = _uniform((len(x),), generator, x) < share
        return torch.where(mirrored[:, None, None, None], x.flip(-1), x)

    return Augmentation("random_flip", (("share", share),), change)


def random_erasing(
    share: float = 0.5,
    least: float = 0.02,
    most: float = 0.33,
    ratio: float = 0.3,
    fill: float = 0.0,
) -> Augmentation:
    r"""Fill a random rectangle of each image with one value, with a probability.

    Its area is uniform in :math:`[s_l, s_h]` of the image, its ratio of height to width is uniform on a logarithmic
    scale in :math:`[r, 1 / r]`, and its place is uniform. Ten rectangles are drawn; the first one that is lower and
    narrower than the image is taken, and where none is the image stays as it is.

    Args:
        share: the probability, in [0, 1].
        least: :math:`s_l`, in (0, 1].
        most: :math:`s_h`, in (0, 1], at least `least`.
        ratio: :math:`r`, in (0, 1].
        fill: the value; 0 is gray.

    Draws: five uniform numbers per image and try: for the probability (that of the first try counts), the area, the
        ratio, top and left.

    Example:
        >>> erased = random_erasing(1.0, least=0.25, most=0.25, ratio=1.0)(torch.ones(3, 1, 8, 8), torch.Generator())
        >>> (erased == 0).flatten(1).sum(dim=1)
        tensor([16, 16, 16])

    Reference: Zhong et al., Random Erasing Data Augmentation, AAAI 2020.
    Differs:   the paper draws the ratio uniformly and tries without limit.
    """
    within, words = (lambda v: 0 < v <= 1), "in (0, 1]"
    share = real("random_erasing: share", share, lambda p: 0 <= p <= 1, "in [0, 1]")
    least, most, ratio = (
        real(f"random_erasing: {name}", value, within, words)
        for name, value in (("least", least), ("most", most), ("ratio", ratio))
    )
    if least > most:
        raise UsageError(f"random_erasing: least={least} is above most={most}")
    fill = _finite("random_erasing: fill", fill)

    def change(x: Tensor, generator: Generator) -> Tensor:
        height, width = x.shape[-2:]
        chance, area, turn, top, left = _uniform((5, TRIES, len(x)), generator, x)
        pixels = (least + area * (most - least)) * (height * width)
        shape = torch.exp((2 * turn - 1) * math.log(ratio))
        tall, wide = (pixels * shape).sqrt().round(), (pixels / shape).sqrt().round()
        fits = (tall < height) & (wide < width)
        first = fits.int().argmax(dim=0, keepdim=True)
        tall, wide, top, left = (drawn.gather(0, first)[0] for drawn in (tall, wide, top, left))
        top, left = (top * (height - tall + 1)).floor(), (left * (width - wide + 1)).floor()
        rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
        down = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
        across = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
        erased = (chance[0] < share) & fits.any(dim=0)
        return x.masked_fill((down[:, :, None] & across[:, None, :] & erased[:, None, None])[:, None], fill)

    told = (("share", share), ("least", least), ("most", most), ("ratio", ratio), ("fill", fill))
    return Augmentation("random_erasing", told, change)


def gaussian_noise(std: float) -> Augmentation:
    """Add independent Gaussian noise to every value.

    Args:
        std: standard deviation, at least 0.

    Draws: one standard normal number per value, in float32.

    Example:
        >>> noisy = gaussian_noise(0.1)(torch.zeros(4, 3, 8, 8), torch.Generator().manual_seed(0))
        >>> round(float(noisy.std()), 2)
        0.1
    """
    std = real("gaussian_noise: std", std, lambda v: v >= 0, "at least 0")

    def change(x: Tensor, generator: Generator) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, device=generator.device, dtype=torch.float32)
        return x + std * noise.to(x)

    return Augmentation("gaussian_noise", (("std", std),), change)


def compose(*steps: Augmentation) -> Augmentation:
    """Return an augmentation that applies several, one after the other.

    Args:
        steps: augmentations, or functions of images and generator.

    Example:
        >>> compose(random_crop(4), random_flip())
        compose(random_crop(padding=4, fill=-1.0), random_flip(share=0.5))
    """
    for step in steps:
        maker = isinstance(step, type) or getattr(step, "__name__", "") in __all__
        if maker or not callable(step):
            raise UsageError(f"compose: {step!r} is no augmentation; write compose(random_crop(4), random_flip())")

    def change(x: Tensor, generator: Generator) -> Tensor:
        for step in steps:
            x = step(x, generator)
        return x

    return Augmentation("compose", tuple(("", step) for step in steps), change)


def _uniform(shape: tuple[int, ...], generator: Generator, like: Tensor) -> Tensor:
    """Return uniform numbers in [0, 1) in float32, on the device of a tensor."""
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32).to(like.device)


def _finite(name: str, value: object) -> float:
    return real(name, value, lambda v: True, "that is finite")


if not TYPE_CHECKING:  # a type checker knows the names above, and no others
    __getattr__ = names_of(__name__, __all__)
