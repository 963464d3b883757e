from __future__ import annotations

import numpy as np
import pytest
import torch

import idiolect.data
from idiolect.core.errors import UsageError
from idiolect.data import (
    Blur,
    Brightness,
    ClientData,
    Color,
    Contrast,
    Noise,
    PermuteLabels,
    Rotation,
    SensorGain,
    SensorOffset,
)
from idiolect.data.shift import rotate

FEATURE_SHIFTS = (
    *(Rotation(40), Brightness(0.5), Contrast(0.5), Blur(2), Noise(0.3), Color(0.5)),
    *(SensorGain(0.5), SensorOffset(0.5)),
)


def photos(n=6, channels=3, seed=0):
    x = torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return ClientData(train=(x, [0] * n), val=(x.flip(0), [1] * n), test=(x, [2] * n))


def table(n=6, seed=0):
    x = torch.rand(n, 5, generator=torch.Generator().manual_seed(seed))
    return ClientData(train=(x, [0] * n), test=(x, [1] * n))


def shifted(shift, data, client="ward", seed=0):
    return shift.apply(data, client, seed).train.x


@pytest.mark.parametrize("shift", FEATURE_SHIFTS, ids=repr)
def test_a_client_has_one_shift_and_others_have_another(shift):
    data = photos()
    result = shift.apply(data, "ward", seed=1)
    assert result.train.x.dtype == torch.float32
    assert result.train.x.shape == data.train.x.shape
    assert not torch.allclose(result.train.x, data.train.x)
    assert torch.equal(shifted(shift, data, "ward", 1), result.train.x)
    assert not torch.allclose(shifted(shift, data, "other", 1), result.train.x)
    assert not torch.allclose(shifted(shift, data, "ward", 2), result.train.x)
    assert [examples.y.tolist() for examples in result.splits().values()] == [[0] * 6, [1] * 6, [2] * 6]
    if not isinstance(shift, Noise):
        assert torch.equal(result.test.x, result.train.x)
        assert torch.equal(result.val.x, result.train.x.flip(0))


@pytest.mark.parametrize("shift", FEATURE_SHIFTS, ids=repr)
def test_no_amount_changes_nothing(shift):
    data = photos()
    assert torch.allclose(shifted(type(shift)(0), data), data.train.x, atol=1e-6)


@pytest.mark.parametrize("shift", FEATURE_SHIFTS, ids=repr)
def test_float64_stays_float64_and_the_input_stays_as_it_was(shift):
    x = photos().train.x.double()
    before = x.clone()
    assert shifted(shift, ClientData((x, [0] * 6))).dtype == torch.float64
    assert torch.equal(x, before)


def test_a_quarter_turn_is_exact_and_counter_clockwise():
    x = photos().train.x
    for quarters in (1, 2, 3):
        turned = torch.from_numpy(np.rot90(x.numpy(), quarters, axes=(2, 3)).copy())
        assert torch.allclose(rotate(x, 90 * quarters), turned, atol=1e-5)


def test_angles_fill_the_range_on_both_sides():
    ramp = torch.linspace(-1, 1, 9).expand(1, 1, 9, 9)
    angles = []
    for name in map(str, range(200)):
        x = shifted(Rotation(30), ClientData((ramp, [0])), name)[0, 0].numpy()
        angles.append(np.degrees(np.arctan2(x[5, 4] - x[3, 4], x[4, 5] - x[4, 3])))
    angles = np.array(angles)
    assert abs(angles).max() == pytest.approx(30, abs=1)
    assert abs(angles.mean()) < 4
    assert angles.std() == pytest.approx(30 / np.sqrt(3), rel=0.15)


def test_brightness_adds_one_number():
    data = photos()
    change = shifted(Brightness(0.5), data) - data.train.x
    assert change.std() < 1e-6
    assert 0 < abs(change.mean()) <= 0.5


def test_contrast_keeps_the_mean_and_scales_what_is_around_it():
    data = photos()
    x, before = shifted(Contrast(0.5), data), data.train.x
    assert torch.allclose(x.mean((1, 2, 3)), before.mean((1, 2, 3)), atol=1e-6)
    factor = x.std((1, 2, 3)) / before.std((1, 2, 3))
    assert factor.std() < 1e-6
    assert 0.5 <= factor[0] <= 1.5


def test_blur_smooths_within_an_image_and_channel_only():
    x = torch.zeros(2, 2, 9, 9)
    x[0, 1, 4, 4] = 1
    y = shifted(Blur(2), ClientData((x, [0, 0])))
    assert y[0, 1].sum() == pytest.approx(1, abs=1e-4)
    assert 0 < y[0, 1, 3, 4] < y[0, 1, 4, 4] < 1
    assert y[0, 0].abs().max() == 0
    assert y[1].abs().max() == 0
    assert torch.allclose(y[0, 1], y[0, 1].T, atol=1e-6)


def test_noise_is_white_with_one_level_per_client_and_new_for_each_example():
    data = ClientData((torch.zeros(400, 50), [0] * 400), test=(torch.zeros(400, 50), [0] * 400))
    result = Noise(0.4).apply(data, "ward")
    train, test = result.train.x, result.test.x
    assert 0 < train.std() < 0.4
    assert float(train.std()) == pytest.approx(float(test.std()), rel=0.03)
    assert abs(train.mean()) < 0.01
    assert abs(torch.corrcoef(torch.stack([train.flatten(), test.flatten()]))[0, 1]) < 0.03
    levels = [float(shifted(Noise(0.4), data, name).std()) for name in map(str, range(60))]
    assert max(levels) < 0.405
    assert np.mean(levels) == pytest.approx(0.2, abs=0.05)


def test_color_scales_intensity_per_channel_and_leaves_black_black():
    data = photos()
    ratio = (shifted(Color(0.5), data) + 1) / (data.train.x + 1)
    assert ratio.std((0, 2, 3)).max() < 1e-4
    assert len({round(float(value), 3) for value in ratio.mean((0, 2, 3))}) == 3
    black = ClientData((-torch.ones(1, 3, 4, 4), [0]))
    assert torch.equal(shifted(Color(0.5), black), black.train.x)


@pytest.mark.parametrize("data", [table(), photos()], ids=["table", "photos"])
def test_sensors_differ_in_gain_and_offset_per_feature(data):
    before = data.train.x
    others = [axis for axis in range(before.dim()) if axis != 1]
    gain = shifted(SensorGain(0.5), data) / before
    offset = shifted(SensorOffset(0.5), data) - before
    for change, low, high in ((gain, 0.5, 1.5), (offset, -0.5, 0.5)):
        assert change.std(others).max() < 1e-3
        values = change.mean(others)
        assert low <= values.min() < values.max() <= high
        assert len(values.round(decimals=4).unique()) == before.shape[1]


def test_shifts_add_up_in_order_and_draw_independently():
    data = photos()
    turned = Rotation(30).apply(data, "ward")
    both = (Rotation(30) + Brightness(0.5)).apply(data, "ward")
    assert (both.train.x - turned.train.x).std() < 1e-6
    blurred_last = shifted(Noise(1) + Blur(2), data).std()
    blurred_first = shifted(Blur(2) + Noise(1), data).std()
    assert blurred_last < blurred_first
    twice = (Brightness(0.5) + Brightness(0.5)).apply(data, "ward").train.x - data.train.x
    once = Brightness(0.5).apply(data, "ward").train.x - data.train.x
    assert abs(twice.mean() - 2 * once.mean()) > 1e-3


def test_sums_are_flat_and_repr_evaluates_to_an_equal_shift():
    three = Rotation(30) + (Noise(0.1) + PermuteLabels(2))
    assert repr(three) == "Rotation(degrees=30.0) + Noise(sigma=0.1) + PermuteLabels(groups=2)"
    assert three == Rotation(30) + Noise(0.1) + PermuteLabels(2)
    assert three != Noise(0.1) + Rotation(30) + PermuteLabels(2)
    for shift in (*FEATURE_SHIFTS, PermuteLabels(3), three):
        assert eval(repr(shift), vars(idiolect.data)) == shift


def test_groups_permute_labels_alike_and_disagree_on_every_class():
    classes, shift = 7, PermuteLabels(4)
    data = ClientData((torch.zeros(7, 1), list(range(7))), test=(torch.zeros(3, 1), [6, 0, 6]))
    seen: dict[int, list[int]] = {}
    for name in map(str, range(60)):
        result = shift.apply(data, name, seed=2, classes=classes)
        new = result.train.y.tolist()
        assert sorted(new) == list(range(7))
        assert result.test.y.tolist() == [new[6], new[0], new[6]]
        assert seen.setdefault(shift.group(name, seed=2), new) == new
    assert sorted(seen) == [0, 1, 2, 3]
    assert seen[0] == list(range(7))
    for label in range(7):
        assert len({new[label] for new in seen.values()}) == 4
    assert shift.apply(data, "0", seed=3, classes=7).train.x.equal(data.train.x)
    assert [shift.group(str(i), 2) for i in range(60)] != [shift.group(str(i), 3) for i in range(60)]


def test_the_order_of_classes_depends_on_the_seed():
    data = ClientData((torch.zeros(9, 1), list(range(9))))
    moved = {tuple(PermuteLabels(9).apply(data, "a", seed, 9).train.y.tolist()) for seed in range(12)}
    assert len(moved) > 8


@pytest.mark.parametrize("shift", FEATURE_SHIFTS[:4] + FEATURE_SHIFTS[5:6], ids=repr)
def test_image_shifts_are_refused_on_tables(shift):
    with pytest.raises(
        UsageError, match=f"{type(shift).__name__} needs .*images.*; client 'ward' has features"
    ) as refused:
        shift.apply(table(), "ward")
    assert "\n" not in str(refused.value)


def test_other_misfits_are_refused():
    with pytest.raises(UsageError, match="Color needs color images, at least 2 channels; client 'w'"):
        Color(0.1).apply(photos(channels=1), "w")
    with pytest.raises(UsageError, match=r"Noise needs floating-point features; .* torch.int64"):
        Noise(0.1).apply(ClientData(([[1, 2]], [0])), "w")
    with pytest.raises(UsageError, match="Rotation: degrees is -1"):
        Rotation(-1)
    with pytest.raises(UsageError, match="Noise: sigma=nan is not a finite number"):
        Noise(float("nan"))
    with pytest.raises(UsageError, match="groups is 0"):
        PermuteLabels(0)
    with pytest.raises(UsageError, match="3 groups are more than the 2 classes"):
        PermuteLabels(3).apply(table(), "w", classes=2)


def test_a_client_without_examples_passes():
    assert len(Rotation(3).apply(ClientData(([], [])), "w").train.y) == 0
