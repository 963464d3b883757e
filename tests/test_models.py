"""The networks: sizes as their docstrings say, shapes, and what they refuse."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from torch import nn

from idiolect.core.errors import UsageError
from idiolect.models import default_model, digit_model, fedfsa_cnn, mlp, next_character, small_cnn
from idiolect.registry import plugins

COUNTS = [
    (small_cnn, ((1, 8, 8), 10), 13_930),
    (small_cnn, ((1, 28, 28), 10), 106_090),
    (small_cnn, ((3, 32, 32), 10), 137_098),
    (digit_model, (10,), 14_219_210),
    (fedfsa_cnn, ((1, 28, 28), 10), 1_258_798),
    (fedfsa_cnn, ((3, 32, 32), 10), 2_806_602),
    (fedfsa_cnn, ((3, 64, 64), 200), 3_527_784),
    (mlp, ((800,), 10), 111_818),
    (next_character, ((80,), 65), 133_665),
]


@pytest.mark.parametrize(("make", "arguments", "count"), COUNTS)
def test_sizes_are_those_of_the_docstring(make, arguments, count):
    assert sum(p.numel() for p in make(*arguments).parameters()) == count
    assert f"{count:,}".replace(",", " ") in " ".join(make.__doc__.split())


def test_every_number_of_a_docstring_is_tested():
    counted = {f"{count:,}".replace(",", " ") for _, _, count in COUNTS}
    for make in {make for make, _, _ in COUNTS}:
        assert set(re.findall(r"\d{1,3}(?: \d{3})+", make.__doc__)) <= counted


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 5), (1, 16, 16), (3, 32, 32)])
def test_small_cnn_takes_any_image(shape):
    assert small_cnn(shape, 7)(torch.zeros(3, *shape)).shape == (3, 7)


def test_published_names_and_order():
    layers = [name for name, layer in digit_model().named_children() if list(layer.parameters())]
    assert layers == ["conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "fc1", "bn4", "fc2", "bn5", "fc3"]
    shapes = [(n, tuple(p.shape)) for n, p in fedfsa_cnn((1, 28, 28), 10).named_parameters()]
    assert shapes[2] == ("conv2.weight", (12, 4, 5, 5))
    assert shapes[8] == ("fc3.weight", (10, 1024))
    assert len(shapes) == 10


def test_digit_model_is_relu_after_each_normalization_and_two_poolings():
    torch.manual_seed(0)
    net = digit_model().eval()
    x = torch.randn(2, 3, 28, 28)
    h = x
    for i in (1, 2, 3):
        h = torch.relu(getattr(net, f"bn{i}")(getattr(net, f"conv{i}")(h)))
        h = nn.functional.max_pool2d(h, 2) if i < 3 else h
    h = h.flatten(1)
    for i in (1, 2):
        h = torch.relu(getattr(net, f"bn{i + 3}")(getattr(net, f"fc{i}")(h)))
    torch.testing.assert_close(net(x), net.fc3(h), rtol=0, atol=0)


def test_fedfsa_cnn_is_relu_after_each_layer_but_the_last_and_two_poolings():
    torch.manual_seed(0)
    net = fedfsa_cnn((1, 28, 28), 10)
    h = x = torch.randn(2, 1, 28, 28)
    for layer in (net.conv1, net.conv2):
        h = nn.functional.max_pool2d(torch.relu(layer(h)), 2)
    h = torch.relu(net.fc2(torch.relu(net.fc1(h.flatten(1)))))
    torch.testing.assert_close(net(x), net.fc3(h), rtol=0, atol=0)


def test_small_cnn_is_normalized_after_each_layer_but_the_last():
    torch.manual_seed(0)
    net = small_cnn((1, 8, 8), 10)
    h = x = torch.randn(4, 1, 8, 8)
    for layer, norm in ((net.conv1, net.bn1), (net.conv2, net.bn2)):
        h = nn.functional.max_pool2d(torch.relu(norm(layer(h))), 2)
    h = torch.relu(net.bn3(net.fc1(h.flatten(1))))
    torch.testing.assert_close(net(x), net.fc2(h), rtol=0, atol=0)


def test_next_character_reads_the_whole_window():
    torch.manual_seed(0)
    net = next_character((80,), 65)
    x = torch.randint(65, (1, 80))
    before = net(x)
    for place in (0, 40, 79):
        other = x.clone()
        other[0, place] = (x[0, place] + 1) % 65
        assert not torch.equal(net(other), before)


def test_mlp_predicts_one_number_for_a_regression():
    assert mlp((5,), None)(torch.zeros(4, 5)).shape == (4,)
    assert mlp((2, 3), 4, hidden=())(torch.zeros(4, 2, 3)).shape == (4, 4)


def test_default_model_follows_the_data():
    assert isinstance(default_model((3, 32, 32), 10, False)[0], nn.Conv2d)
    assert isinstance(default_model((80,), 65, True)[0], nn.Embedding)
    assert isinstance(default_model((80,), 65, False)[1], nn.Linear)
    assert default_model((5,), None, False)(torch.zeros(4, 5)).shape == (4,)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: small_cnn((64,), 10), "small_cnn needs images"),
        (lambda: small_cnn((1, 3, 8), 10), "at least 4 x 4"),
        (lambda: fedfsa_cnn((1, 8, 8), 10), "at least 16 x 16"),
        (lambda: next_character((8,), 65), "at least 16 characters"),
        (lambda: mlp((8,), 2, hidden=(0,)), "widths are at least 1"),
        (lambda: plugins.model_from("no_such_module:make", (1,), 2), "no module 'no_such_module'"),
        (lambda: plugins.model_from("torch.nn:Linea", (1,), 2), "has no function 'Linea' (did you mean Linear?)"),
        (lambda: plugins.model_from("math:e", (1,), 2), "math:e is a float: give a function"),
        (lambda: plugins.model_from("collections:Counter", (1,), 2), "returns a Counter, not a torch.nn.Module"),
    ],
)
def test_what_does_not_fit_is_one_line(make, line):
    with pytest.raises(UsageError) as caught:
        make()
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_your_own_network_is_called_with_what_it_takes(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "def sized(shape, classes): return nn.Linear(shape[0], classes)\n"
        "def fixed(): return nn.Linear(3, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert plugins.model_from("my_nets:sized", (5,), 4).weight.shape == (4, 5)
    assert plugins.model_from("my_nets:fixed", (5,), 4).weight.shape == (2, 3)


def test_a_fault_inside_your_own_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "broken_net.py").write_text("import surely_not_installed\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(UsageError, match=r"surely_not_installed' \(broken_net.py, line 1\)") as caught:
        plugins.model_from("broken_net:make", (5,), 4)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
