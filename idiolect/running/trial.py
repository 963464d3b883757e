"""What is tried once before training: the loss, each metric, images whose channels come last, layers in lists."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from idiolect.compute.autograd import Model
from idiolect.compute.metrics import CHUNK, CHUNK_READ, Metric, readable, with_rows
from idiolect.core.errors import UsageError, kind_of, raised
from idiolect.core.nest import Nest, cloned, mapped, named_tensors, rows_in, tensors
from idiolect.core.types import Batch
from idiolect.core.values import fits, plain
from idiolect.data import ClientData, Examples, LazyExamples, first_of

BROADCASTS = "Using a target size"
"""How PyTorch's warning begins, where a loss broadcasts targets of another shape."""

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


def refuse_loss(model: Model, client: str, batch: Batch, outputs: Nest) -> None:
    """Compute the loss of a batch and differentiate it.

    Args:
        model: the model and the loss.
        client: whose examples these are.
        batch: the examples.
        outputs: what the model predicts for them.

    Raises:
        UsageError: one line with the shapes, if the loss raises, broadcasts targets, is not one number, or does not
            depend on the weights.
    """
    passed = False
    at = f"for client {client!r}, outputs {_shapes(outputs)} and targets {_shapes(batch.y)}"

    def loss(outputs: Nest, y: Nest) -> Tensor:
        nonlocal passed
        passed = True
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=BROADCASTS)
            found = model.loss(outputs, y)
        if not isinstance(found, Tensor):
            raise UsageError(f"the loss must return a tensor, the mean over the batch, not {kind_of(found)}")
        if found.dim():
            cure = "reduction='mean', or .mean()"
            raise UsageError(f"the loss must be one number, the mean over the batch, not {kind_of(found)}: {cure}")
        if not found.requires_grad:
            if any(t.requires_grad for t in tensors(outputs)):
                raise UsageError("the loss does not depend on the outputs: detach, item or argmax in it?")
            raise UsageError("the outputs do not depend on the weights: no_grad or detach in forward?")
        return found

    try:
        model.with_loss(loss).grad(model.initial, batch)
    except UsageError:
        raise
    except Exception as error:  # whatever a function of the user's may raise
        if not passed:
            reason = raised(error, getattr(type(model.training), "forward", None))
            raise UsageError(f"the model cannot be trained on client {client!r}'s features: {reason}") from error
        if str(error).startswith(BROADCASTS):
            cure = "give targets of the outputs' shape; class numbers need cross_entropy"
            raise UsageError(f"the loss broadcasts its targets {at}: {cure}") from error
        reason = raised(error, model.loss)
        if not isinstance(outputs, Tensor):
            reason += f" (the model returns a {type(outputs).__name__}: loss=idiolect.own_loss takes the loss in it)"
        raise UsageError(f"the loss cannot be computed and differentiated {at}: {reason}") from error


def loose_layers(module: nn.Module) -> list[str]:
    """Return a note about layers in Python lists or dicts, which are no part of the module and do not train.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2))
        >>> net.blocks = [nn.Linear(3, 3)]
        >>> loose_layers(net)
        ["the layers in 'blocks' are not part of the model, and are not trained: use nn.ModuleList or nn.ModuleDict"]
    """
    own = set(module.modules())
    loose = [
        f"{name}.{key}".removeprefix(".")
        for name, layer in module.named_modules()
        for key, held in vars(layer).items()
        if not key.startswith("_") and isinstance(held, list | tuple | dict)
        for inner in (held.values() if isinstance(held, dict) else held)
        if isinstance(inner, nn.Module) and inner not in own and any(True for _ in inner.parameters())
    ]
    some = ", ".join(map(repr, dict.fromkeys(loose)))
    cure = "are not part of the model, and are not trained: use nn.ModuleList or nn.ModuleDict"
    return [f"the layers in {some} {cure}"] if loose else []


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
