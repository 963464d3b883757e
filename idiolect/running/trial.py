"""What is tried once before training: each metric, and images whose channels come last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from idiolect.compute.autograd import Model
from idiolect.compute.metrics import CHUNK, CHUNK_READ, Metric, readable, with_rows
from idiolect.core.errors import UsageError
from idiolect.core.nest import Nest, cloned, mapped, named_tensors, rows_in, tensors
from idiolect.core.values import fits, plain
from idiolect.data import ClientData, Examples, LazyExamples, first_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def check_metrics(model: Model, clients: Mapping[str, ClientData], metrics: Sequence[Metric]) -> None:
    """Compute each metric once, under the initial weights, on examples of the client with the most of them.

    They are its first test examples, or training examples where no client has any others, at most `CHUNK`.

    Raises:
        UsageError: one line that names the metric, if it fails, gives no single number, or changes what it is given.
    """
    names = [metric.name for metric in metrics]
    twice = next((name for i, name in enumerate(["loss", *names]) if name in names[i:]), None)
    if twice is not None:
        raise UsageError(f"two metrics are called {twice!r} (the loss is always measured): give them different names")
    if not metrics:
        return
    tested = [data.test for data in clients.values() if data.test is not None]
    most: Examples | LazyExamples = max(tested or [data.train for data in clients.values()], key=len)
    x, y = first_of(most, CHUNK if isinstance(most, Examples) else CHUNK_READ)
    with torch.inference_mode():
        outputs = mapped(partial(with_rows, rows_in(y)), model.predict(model.initial, x))
        for metric in metrics:
            _try(metric, readable(outputs), readable(y))


def _try(metric: Metric, outputs: Nest, y: Nest) -> None:
    given = cloned(outputs), cloned(y)
    try:
        found = plain(metric.compute(*given))
    except Exception as error:  # whatever a function of the user's may raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        shapes = f"outputs {_shapes(outputs)} and targets {_shapes(y)}"
        raise UsageError(f"metric {metric.name!r} fails on {shapes}: {reason}") from None
    if not fits(found, float):
        kind = f"a {type(found).__name__}"
        kind += f" of shape {tuple(found.shape)}" if hasattr(found, "shape") else f", {found!r}"
        raise UsageError(
            f"metric {metric.name!r} must return one number, not {kind[:80]}: take its mean, or float(...)"
        )
    for what, before, after in zip(("outputs", "targets"), (outputs, y), given, strict=True):
        pairs = zip(tensors(before), tensors(after), strict=True)
        if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs):
            raise UsageError(f"metric {metric.name!r} changes the {what} it is given: work on a copy, {what}.clone()")


def _shapes(nest: Nest) -> str:
    return " ".join(f"{place} {tuple(t.shape)}".strip() for place, t in named_tensors(nest, ""))


def image_hint(module: nn.Module, x: Tensor) -> str:
    """Return how to put the channels of images first, if a network needs that, else an empty string.

    Args:
        module: the network.
        x: (n, ...) features.

    Example:
        >>> image_hint(nn.Conv2d(3, 8, 3), torch.zeros(2, 28, 28, 3))
        '; put the channels first: x = x.permute(0, 3, 1, 2)'
        >>> image_hint(nn.Conv2d(3, 8, 3), torch.zeros(2, 3, 28, 28))
        ''
    """
    first = next((layer for layer in module.modules() if isinstance(layer, CONVOLUTIONS)), None)
    if first is None:
        return ""
    axes, code = CONVOLUTIONS.index(type(first)) + 3 if type(first) in CONVOLUTIONS else x.dim(), "x"
    if x.dim() == axes - 1 and first.in_channels == 1:
        code = "x[:, None]"
    elif x.dim() == axes and x.shape[-1] == first.in_channels != x.shape[1]:
        code = f"x.permute({', '.join(map(str, (0, axes - 1, *range(1, axes - 1))))})"
    moved = code != "x"
    if not x.is_floating_point():
        code += " / 127.5 - 1"
    if code == "x":
        return ""
    why = "put the channels first" if moved else "give floating values"
    return f"; {why}: x = {code}"
