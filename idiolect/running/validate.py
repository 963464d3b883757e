"""Checks of a run before any training: clients, model, loss, device and numbers must fit together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from operator import methodcaller
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from idiolect.compute.autograd import Model
from idiolect.compute.hidden import refuse_hidden_state
from idiolect.compute.losses import Loss, is_plain_cross_entropy
from idiolect.compute.trial import tried
from idiolect.core.errors import UsageError, raised
from idiolect.core.nest import Nest, logits, named_tensors, rows_in, taken, tensors
from idiolect.core.types import Batch
from idiolect.core.values import real, whole
from idiolect.data import ClientData, Examples, Labels, Placement, check_clients, first_of
from idiolect.engines.federation import Federation
from idiolect.engines.stacked import stack_of
from idiolect.rounds.check import check_method, check_stack
from idiolect.rounds.training import Training
from idiolect.running.trial import image_hint, loose_layers, refuse_loss


def prepare(
    model: Model, clients: Mapping[str, ClientData], training: Training
) -> tuple[Model, dict[str, ClientData], list[str]]:
    """Return the model as trial passes show it, the clients in its dtype and on its device, and notes about both.

    Raises:
        UsageError: if data, model, loss and batch size do not fit together; one line that names the client.
    """
    layers = model.module(model.initial).named_modules()
    blind = [n for n, m in layers if isinstance(m, _BatchNorm) and not m.track_running_stats]
    if blind:
        raise UsageError(f"layer {blind[0]!r} keeps no running statistics to predict by: set track_running_stats=True")
    if model.structure.has_batch_norm and training.batch_size == 1:
        raise UsageError("batch_size=1 with batch normalization: one example has no variance; use at least 2")
    if not clients:
        raise UsageError("no clients: give a dict of name to ClientData")
    odd = next((client for client in clients if not isinstance(client, str) or not client), None)
    if odd is not None:
        raise UsageError(f"client names are text, got {odd!r}: write {str(odd) or 'a'!r}")
    kept, notes = check_clients(clients)
    where = Placement(model.device, model.dtype, float_targets=is_binary_cross_entropy(model.loss))
    moved = {n: data.changed(methodcaller("placed", where._replace(client=n))) for n, data in kept.items()}
    name, first = next(iter(moved.items()))
    x, y = first_of(first.train)
    untried = model.copy()  # passes may change what a structure without a trial does not follow
    outputs = _outputs(untried, name, x)
    if is_cross_entropy(model.loss):
        check_clients(kept, _labels(model.loss, outputs))
        if is_plain_cross_entropy(model.loss) and not all(map(_all_labeled, moved.values())):
            model = model.with_loss(partial(F.cross_entropy, ignore_index=-100))  # the fast ways need a class each
    numbers = isinstance(y, torch.Tensor) and isinstance(outputs, torch.Tensor) and y.is_floating_point()
    if numbers and outputs.shape != y.shape and outputs.numel() == y.numel():
        raise UsageError(
            f"outputs {tuple(outputs.shape)} and targets {tuple(y.shape)} differ in shape: make them alike (y[:, None])"
        )
    refuse_loss(untried, name, Batch(x, y, frozen=rows_in(y) == 1), outputs)
    _try_more(untried, moved)
    _try_forms(untried, moved)
    model = _tried(model, max(moved.values(), key=lambda data: min(len(data.train), 4)))
    _refuse_not_finite(model)
    if any(data.train.ordered for data in moved.values()):
        notes.append("iterable data sets are read in their own order in every epoch")
    if own := sorted(model.structure.own_state):
        some = ", ".join(own[:4]) + ", ..." * (len(own) > 4)
        notes.append(f"{len(own)} buffers that training changes stay with each client and are not averaged: {some}")
    return model, moved, notes + loose_layers(model.training) + untested(moved)


def untested(clients: Mapping[str, ClientData]) -> list[str]:
    """Return a note about the clients that have no test examples, if there are any.

    Example:
        >>> untested({"a": ClientData(train=([[0.5]], [1]))})
        ['no client has test examples, so tables show n/a: give ClientData(train=..., test=(x, y))']
    """
    names = [repr(name) for name, data in clients.items() if data.test is None]
    if len(names) == len(clients):
        return ["no client has test examples, so tables show n/a: give ClientData(train=..., test=(x, y))"]
    some = ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)
    return (
        [f"{len(names)} of {len(clients)} clients have no test examples and do not count in tables: {some}"]
        if names
        else []
    )


def check_parts(federation: Federation) -> None:
    """Play a trial step of the method on one client, and on two in a stack where the engine stacks clients.

    Raises:
        UsageError: one line that names the part and the hook that does not do what it should.
    """
    by_size = sorted(federation.clients, key=lambda client: len(federation.clients[client].train))
    several = [c for c in by_size if len(federation.clients[c].train) > 1] or by_size
    work = federation.assignment(several[0], "train")
    check_method(federation, federation.worker, work)
    if federation.engine.width > 1 and len(by_size) > 1:
        pair = [federation.assignment(client, "train") for client in reversed(by_size[-2:])]
        check_stack(federation.worker, stack_of(pair), pair)


def is_cross_entropy(loss: Loss) -> bool:
    """Return whether a loss is cross-entropy, so that labels are classes."""
    return _is(loss, F.cross_entropy, nn.CrossEntropyLoss)


def is_binary_cross_entropy(loss: Loss) -> bool:
    """Return whether a loss is binary cross-entropy, which takes targets as floating numbers."""
    plain, scored = F.binary_cross_entropy, F.binary_cross_entropy_with_logits
    return _is(loss, plain, nn.BCELoss) or _is(loss, scored, nn.BCEWithLogitsLoss)


def _is(loss: Loss, function: Callable[..., object], kind: type[nn.Module]) -> bool:
    named = loss.func if isinstance(loss, partial) else loss
    return named is function or isinstance(named, kind)


class Numbers(NamedTuple):
    """The numbers of a run, as Python's own."""

    rounds: int
    participation: float
    evaluate_every: int
    seed: int


def numbers_of(rounds: object, participation: object, evaluate_every: object, seed: object) -> Numbers:
    """Return the numbers of a run, whatever they are made of.

    Raises:
        UsageError: one line, if one is out of range.

    Example:
        >>> numbers_of(torch.tensor(3), 1, 1, 0)
        Numbers(rounds=3, participation=1.0, evaluate_every=1, seed=0)
    """
    return Numbers(
        whole("rounds", rounds, 1),
        real(
            "participation", participation, lambda share: 0 < share <= 1, "in (0, 1], the share of clients in a round"
        ),
        whole("evaluate_every", evaluate_every, 1),
        whole("seed", seed, 0),
    )


def device_of(asked: str | torch.device, model: nn.Module) -> torch.device:
    """Return where a run takes place: what is asked for, or a GPU if there is one, or where the model is.

    Raises:
        UsageError: if there is no such device.
    """
    if asked == "auto":
        here = next((p.device for p in model.parameters()), torch.device("cpu"))
        return torch.device("cuda") if here.type == "cpu" and torch.cuda.is_available() else here
    try:
        return torch.zeros(0, device=asked).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {asked!r} cannot be used: {str(error).partition(chr(10))[0]}") from None


def _all_labeled(data: ClientData) -> bool:
    """Return whether every training target is known to be a class or probabilities."""
    examples = data.train
    return isinstance(examples, Examples) and (examples.y.is_floating_point() or bool((examples.y >= 0).all()))


def _labels(loss: Loss, outputs: Nest) -> Labels:
    """Return the labels that a cross-entropy of these outputs takes."""
    scores = logits(outputs)
    if scores.dim() < 2:
        raise UsageError(f"cross-entropy needs outputs (examples, classes), the model gives {tuple(scores.shape)}")
    given = loss.keywords if isinstance(loss, partial) else {}
    return Labels(
        scores.shape[1], tuple(scores.shape[2:]), given.get("ignore_index", getattr(loss, "ignore_index", -100))
    )


def _outputs(model: Model, name: str, x: Nest, what: str = "features") -> Nest:
    try:
        with torch.no_grad():
            outputs = model.predict(model.initial, x)
    except Exception as error:  # whatever a user's forward may raise
        shapes = [(place, tuple(t.shape[1:])) for place, t in named_tensors(x, "x")]
        shape = shapes[0][1] if len(shapes) == 1 else ", ".join(f"{place} {of}" for place, of in shapes)
        hint = (image_hint(model.training, x) if isinstance(x, torch.Tensor) else "") or _number_hint(model, x)
        layer = type(model.training).__name__
        reason = raised(error, getattr(type(model.training), "forward", None))
        raise UsageError(
            f"the model ({layer}) cannot take client {name!r}'s {what} of shape {shape}: {reason}{hint}"
        ) from error
    if not tensors(outputs):
        raise UsageError(f"the model must return a tensor, or several, it returns a {type(outputs).__name__}")
    return outputs


def _try_more(model: Model, clients: Mapping[str, ClientData]) -> None:
    """Predict for three examples and compute their loss, where two of them have passed: shapes may fit by chance."""
    name, data = max(clients.items(), key=lambda item: min(len(item[1].train), 3))
    x, y = first_of(data.train, 3)
    if rows_in(y) < 3:
        return
    try:
        outputs = _outputs(model, name, x)
    except UsageError as error:
        raise UsageError(f"with 3 examples in place of 2, {error}") from error.__cause__
    refuse_loss(model, name, Batch(x, y), outputs)


def _number_hint(model: Model, x: Nest) -> str:
    """Return what to do about features of another kind of number than the model's weights, or an empty string."""
    if any(t.is_complex() for t in tensors(x)):
        return "; complex features: give real numbers, such as torch.view_as_real(x).flatten(1)"
    if any(t.is_floating_point() for t in tensors(x)):
        return ""
    return f"; convert x to {str(model.dtype).removeprefix('torch.')}, unless the model embeds it: x.float()"


def _try_forms(model: Model, clients: Mapping[str, ClientData]) -> None:
    """Predict for the first examples of every form among those that are read, which may differ in shape."""
    seen = set()
    for name, data in clients.items():
        for split, examples in data.splits().items():
            if not isinstance(examples, Examples):
                x, _ = first_of(examples)
                form = tuple((place, *t.shape[1:]) for place, t in named_tensors(x, "x"))
                if form not in seen:
                    seen.add(form)
                    _outputs(model, name, x, f"{split} features")


def _refuse_not_finite(model: Model) -> None:
    """Raise if an initial weight or running statistic is NaN or infinite."""
    for name in model.structure.names("weight") | model.structure.names("statistic"):
        values = model.initial[name]
        if not bool(torch.isfinite(values).all()):
            found = "NaN" if bool(values.isnan().any()) else "infinite"
            raise UsageError(
                f"the initial weights are not finite: {name} is {found}; initialize or load the model anew"
            )


def _tried(model: Model, data: ClientData) -> Model:
    """Return the model as passes over a client's first examples show it; refuse one that keeps hidden state."""
    x, y = first_of(data.train, 4)
    device, count = tensors(y)[0].device, rows_in(y)
    pairs = [torch.tensor(rows, device=device) % count for rows in ([0, 1], [2, 3])]
    batch, other = (Batch(taken(x, rows), taken(y, rows)) for rows in pairs)
    model = tried(model, batch.x)
    refuse_hidden_state(model, batch, other)
    return model
