"""Augmentation against slow loops that draw the same numbers, and what each change leaves as it is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from idiolect.core.errors import UsageError
from idiolect.data.augment import compose, gaussian_noise, random_crop, random_erasing, random_flip


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def images(count=7, channels=3, height=9, width=6, dtype=torch.float64):
    return torch.randn(count, channels, height, width, generator=seeded(1), dtype=dtype)


def slow_crop(x, generator, padding, fill):
    tops, lefts = torch.randint(2 * padding + 1, (2, len(x)), generator=generator).tolist()
    count, channels, height, width = x.shape
    out = torch.full_like(x, fill)
    for k in range(count):
        for i in range(height):
            for j in range(width):
                row, column = i + tops[k] - padding, j + lefts[k] - padding
                if 0 <= row < height and 0 <= column < width:
                    for c in range(channels):
                        out[k, c, i, j] = x[k, c, row, column]
    return out


def slow_flip(x, generator, share):
    drawn, out = torch.rand(len(x), generator=generator).tolist(), x.clone()
    for k, number in enumerate(drawn):
        if number < share:
            for j in range(x.shape[3]):
                out[k, :, :, j] = x[k, :, :, x.shape[3] - 1 - j]
    return out


def slow_erasing(x, generator, share, least, most, ratio, fill):
    drawn, out = torch.rand((5, 10, len(x)), generator=generator).double().numpy(), x.clone()
    height, width = x.shape[2:]
    for k in range(len(x)):
        if drawn[0, 0, k] >= share:
            continue
        for t in range(10):
            area = (least + drawn[1, t, k] * (most - least)) * height * width
            turn = math.exp((2 * drawn[2, t, k] - 1) * math.log(ratio))
            tall, wide = round(math.sqrt(area * turn)), round(math.sqrt(area / turn))
            if tall < height and wide < width:
                top, left = int(drawn[3, t, k] * (height - tall + 1)), int(drawn[4, t, k] * (width - wide + 1))
                for i in range(top, top + tall):
                    for j in range(left, left + wide):
                        out[k, :, i, j] = fill
                break
    return out


CASES = [
    (random_crop(4), lambda x, g: slow_crop(x, g, 4, -1.0)),
    (random_crop(1, fill=0.5), lambda x, g: slow_crop(x, g, 1, 0.5)),
    (random_crop(0), lambda x, g: slow_crop(x, g, 0, 0.0)),
    (random_flip(), lambda x, g: slow_flip(x, g, 0.5)),
    (random_flip(0.2), lambda x, g: slow_flip(x, g, 0.2)),
    (random_erasing(), lambda x, g: slow_erasing(x, g, 0.5, 0.02, 0.33, 0.3, 0.0)),
    (random_erasing(0.9, 0.2, 0.9, 0.5, 7.0), lambda x, g: slow_erasing(x, g, 0.9, 0.2, 0.9, 0.5, 7.0)),
    (gaussian_noise(0.3), lambda x, g: x + 0.3 * torch.randn(x.shape, generator=g).double()),
    (
        compose(random_crop(2), random_flip(), gaussian_noise(0.1)),
        lambda x, g: slow_flip(slow_crop(x, g, 2, -1.0), g, 0.5) + 0.1 * torch.randn(x.shape, generator=g).double(),
    ),
]


@pytest.mark.parametrize(("fast", "slow"), CASES, ids=lambda v: repr(v) if hasattr(v, "arguments") else "")
def test_each_is_the_slow_loop(fast, slow):
    for seed in range(6):
        for x in (images(), images(40, 1, 8, 8), images(1), images(0)):
            before, one, other = x.clone(), seeded(seed), seeded(seed)
            found = fast(x, one)
            assert torch.allclose(found, slow(x, other), atol=1e-12, rtol=0)
            assert torch.equal(x, before)
            assert torch.equal(one.get_state(), other.get_state())  # the same numbers were drawn


@pytest.mark.parametrize("fast", [case[0] for case in CASES], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_shape_and_dtype_stay_and_draws_do_not_depend_on_the_dtype(fast, dtype):
    x = images(dtype=torch.float32).to(dtype)
    found = fast(x, seeded())
    assert (found.shape, found.dtype) == (x.shape, dtype)
    assert torch.allclose(found.double(), fast(x.double(), seeded()), atol=0.05)
    assert not torch.equal(found, x) or fast == random_crop(0)


def test_examples_are_drawn_one_by_one_not_per_batch():
    x = images(1, 3, 9, 9).expand(200, -1, -1, -1)
    for fast, kinds in ((random_crop(1), 9), (random_flip(), 2)):
        assert len(torch.unique(fast(x, seeded()), dim=0)) == kinds
    assert len(torch.unique(random_erasing()(x, seeded()), dim=0)) > 50


def test_shares_are_met():
    x = images(4000, 1, 12, 12)
    flipped = (random_flip(0.3)(x, seeded()) != x).flatten(1).any(dim=1).double().mean()
    assert abs(flipped - 0.3) < 0.03
    erased = (random_erasing(0.7)(x, seeded()) == 0).flatten(1).double().mean(dim=1)
    assert abs((erased > 0).double().mean() - 0.7) < 0.03
    assert abs(erased[erased > 0].mean() - (0.02 + 0.33) / 2) < 0.02
    assert torch.equal(random_flip(0)(x, seeded()), x)
    assert torch.equal(random_erasing(0)(x, seeded()), x)
    assert torch.equal(gaussian_noise(0)(x, seeded()), x)


def test_a_function_of_images_and_generator_is_a_step_too():
    x = images()
    darker = compose(lambda x, generator: x - 1, random_flip(1.0))
    assert torch.equal(darker(x, seeded()), (x - 1).flip(-1))


def test_equal_calls_are_equal_and_print_as_calls():
    assert random_crop(np.int64(4)) == random_crop(torch.tensor(4)) == random_crop(4)
    assert random_crop(4) != random_crop(5)
    assert random_crop(4) != random_crop(4, fill=0)
    assert eval(repr(random_erasing(0.2)), {"random_erasing": random_erasing}) == random_erasing(0.2)


@pytest.mark.parametrize(
    ("act", "line"),
    [
        (lambda: random_crop(-1), "random_crop: padding must be a whole number, at least 0, got -1"),
        (lambda: random_crop(2.5), "random_crop: padding must be a whole number, at least 0, got 2.5"),
        (lambda: random_crop(True), "random_crop: padding must be a whole number, at least 0, got True"),
        (lambda: random_crop(2, math.nan), "random_crop: fill must be a number that is finite, got nan"),
        (lambda: random_flip(1.5), "random_flip: share must be a number in [0, 1], got 1.5"),
        (lambda: random_erasing(least=0), "random_erasing: least must be a number in (0, 1], got 0"),
        (lambda: random_erasing(least=0.5), "random_erasing: least=0.5 is above most=0.33"),
        (lambda: gaussian_noise(-1), "gaussian_noise: std must be a number at least 0, got -1"),
        (lambda: gaussian_noise("loud"), "gaussian_noise: std must be a number at least 0, got 'loud'"),
        (lambda: compose(random_flip), "is no augmentation; write compose(random_crop(4), random_flip())"),
        (lambda: compose(4), "compose: 4 is no augmentation"),
        (
            lambda: random_flip()(torch.zeros(4, 8, 8), seeded()),
            "random_flip needs floating images (b, channels, heigh",
        ),
        (lambda: random_flip()(torch.zeros(2, 3, 4, 4).byte(), seeded()), "not torch.uint8 of shape (2, 3, 4, 4)"),
    ],
)
def test_what_cannot_be_is_one_line(act, line):
    with pytest.raises(UsageError) as caught:
        act()
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
