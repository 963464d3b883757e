"""The server's running mean: its values, and what it holds beside its sum."""

from pathlib import Path

import pytest
import torch

from idiolect.core.tree import EMPTY, Tree
from idiolect.rounds.server import Mean


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2**15, 2**15 + 1, 100_003])
def test_a_mean_is_that_of_float64(dtype, size):
    generator, weights = torch.Generator().manual_seed(0), [1.0, 60.0, 7.5]
    rows = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for _ in weights]
    mean = Mean()
    for row, weight in zip(rows, weights, strict=True):
        mean.add(Tree.of({"w": row}), weight)
    expected = sum(w * row.double() for row, w in zip(rows, weights, strict=True)) / sum(weights)
    assert mean.result().flat.dtype == dtype
    assert (mean.result().flat.double() - expected.to(dtype).double()).abs().max() <= 1e-12


def test_a_mean_of_nothing_sent_is_nothing():
    mean = Mean()
    mean.add(EMPTY, 3.0)
    assert mean.result().layout is EMPTY.layout


def memory(what):
    """Return bytes of this process: resident now (VmRSS), or at most since they were last forgotten (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(what)))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the system's account of pages")
def test_adding_makes_no_copy():
    """64 MB are added to 128 MB of sums, which are there; nothing of that size is needed meanwhile."""
    tree, mean = Tree.of({"w": torch.ones(2**24)}), Mean()
    mean.add(tree, 1.0)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    mean.add(tree, 2.0)
    assert memory("VmHWM") - before < 8 * 2**20
