"""What a module or a loss keeps besides its tensors: numbers, tensors and generators in attributes.

A run treats the model as a function of named tensors, so that clients can be trained in any order, in any process and
in stacks. What a pass leaves behind elsewhere would leak from one client to the next.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from idiolect.compute.autograd import Model
from idiolect.core.errors import UsageError
from idiolect.core.nest import tensors
from idiolect.core.types import Batch, Gradient

Place = tuple[dict[str, Any], str]
"""A dictionary and a key in it."""

_TORCH = frozenset(vars(nn.Module())) - {"training"}
_DEPTH = 4
_LATER = (1, 997, 10**6)
"""How far a count is moved to see whether a later pass depends on it."""


def refuse_hidden_state(model: Model, batch: Batch, other: Batch) -> None:
    """Refuse a model or a loss whose passes depend on the passes before, other than by tensors that are followed.

    Args:
        model: the model.
        batch: examples of one client.
        other: other examples.

    Raises:
        UsageError: one line that names the attribute.

    Example:
        >>> class Warm(nn.Linear):
        ...     passes = 0
        ...     def forward(self, x):
        ...         self.passes += 1
        ...         return super().forward(x) * min(1.0, self.passes / 100)
        >>> batch = Batch(torch.ones(4, 2), torch.zeros(4, dtype=torch.int64))
        >>> refuse_hidden_state(Model(Warm(2, 2)), batch, batch)
        Traceback (most recent call last):
        idiolect.UsageError: the model's attribute 'passes' changes its next passes: it would leak from client to \
client; make it a buffer (register_buffer), which stays with each client
    """
    twin = model.copy()
    twin.loss = _copied(model.loss)
    roots: dict[str, object] = {"the model": twin.training, "the loss": twin.loss}
    _refuse(roots, lambda b: _values(twin.grad(twin.initial, b)), batch, other)
    _refuse({"the model": twin.predicting}, lambda b: (_predicted(twin, b),), batch, other)


def held(root: object) -> dict[str, tuple[Place, object]]:
    """Return what an object holds besides tensors that are followed, by name, each with its place."""
    return {name: (place, _frozen(place[0][place[1]])) for name, place in _places(root, "", _DEPTH)}


def changes(before: Mapping[str, tuple[Place, object]], after: Mapping[str, tuple[Place, object]]) -> list[str]:
    """Return the names of what differs."""
    return [n for n in after if n not in before or not _same(before[n][1], after[n][1])]


def _refuse(roots: dict[str, object], run: Callable[[Batch], tuple[Tensor, ...]], batch: Batch, other: Batch) -> None:
    def seen() -> dict[str, tuple[Place, object]]:
        return {f"{root}'s attribute {n!r}": at for root, of in roots.items() for n, at in held(of).items()}

    start = seen()
    first = run(batch)
    one = seen()
    run(other)
    if _apart(first, run(batch)):
        moved = changes(one, seen()) or changes(start, one)
        place = seen()[moved[0]][0] if moved else None
        if place is None or _draws(place[0][place[1]]):
            raise UsageError(
                f"passes from the same tensors differ ({moved[0] if moved else 'by nothing in the attributes'}): "
                "draw random numbers from torch's own stream (torch.rand), which is seeded for each client and step, "
                "and keep no variable outside of tensors"
            )
        if _is_buffer(roots["the model"], place[0]):
            buffer = moved[0].replace("attribute", "buffer")
            raise UsageError(
                f"{buffer} changes in evaluation too, and with it the next predictions: change it in training only, "
                "under `if self.training:`"
            )
        raise UsageError(_line(moved[0]))
    for name in changes(one, seen()):
        holder, key = seen()[name][0]
        count = holder[key]
        for step in _LATER if isinstance(count, int | float) and not isinstance(count, bool) else ():
            holder[key] = count + step
            try:
                depends = _apart(first, run(batch))
            except Exception:  # whatever a user's forward raises, it read the count
                depends = True
            holder[key] = count
            if depends:
                raise UsageError(_line(name))


def _line(what: str) -> str:
    cure = "make it a function of outputs and targets"
    if not what.startswith("the loss"):
        cure = "make it a buffer (register_buffer), which stays with each client"
    return f"{what} changes its next passes: it would leak from client to client; {cure}"


def _is_buffer(model: object, inside: dict[str, Any]) -> bool:
    return isinstance(model, nn.Module) and any(inside is vars(layer)["_buffers"] for layer in model.modules())


def _draws(value: object) -> bool:
    return isinstance(value, torch.Generator | random.Random | np.random.Generator)


def _values(found: Gradient) -> tuple[Tensor, ...]:
    return found.loss, found.gradient.flat, found.buffers.flat


def _predicted(model: Model, batch: Batch) -> Tensor:
    with torch.no_grad():
        outputs = model.run(model.predicting, batch.x)
    return torch.cat([torch.zeros(1), *(t.flatten().double() for t in tensors(outputs))])


def _apart(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    """Return whether results differ by more than a device's rounding."""
    return any(
        a.shape != b.shape or not torch.allclose(a.double(), b.double(), 1e-5, 1e-7, equal_nan=True)
        for a, b in zip(one, other, strict=True)
    )


def _places(of: object, prefix: str, depth: int) -> Iterator[tuple[str, Place]]:
    """Yield the name and the place of everything that an object holds and that can be compared."""
    for name, inside in _dictionaries(of):
        for key, value in list(inside.items()):
            path = ".".join(filter(None, (prefix, name, str(key))))
            if isinstance(of, nn.Module) and (key in _TORCH or isinstance(value, nn.Parameter)):
                continue
            if _frozen(value) is not None:
                yield path, (inside, key)
            elif depth and not callable(value) and hasattr(value, "__dict__"):
                yield from _places(value, path, depth - 1)


def _dictionaries(of: object) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(of, nn.Module):
        for name, module in of.named_modules():
            yield from ((name, inside) for inside in (vars(module), vars(module)["_buffers"]))
    elif isinstance(of, partial):
        yield from _dictionaries(of.func)
        yield "", {str(k): v for k, v in enumerate(of.args)} | of.keywords
    elif hasattr(of, "__dict__"):
        yield "", vars(of)
    if hasattr(of, "__self__"):
        yield from _dictionaries(of.__self__)
    cells = getattr(of, "__closure__", None) or ()
    names = getattr(getattr(of, "__code__", None), "co_freevars", ())
    yield from (("", _Cell(cell, name)) for cell, name in zip(cells, names, strict=False) if _filled(cell))


class _Cell(dict[str, Any]):
    """A variable of a closure as a dictionary with one entry."""

    def __init__(self, cell: Any, name: str) -> None:  # noqa: ANN401 - the type of cells has no name
        super().__init__({name: cell.cell_contents})
        self._cell = cell

    def __setitem__(self, key: str, value: object) -> None:
        super().__setitem__(key, value)
        self._cell.cell_contents = value


def _filled(cell: Any) -> bool:  # noqa: ANN401
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _frozen(value: object) -> object | None:
    """Return a copy of a value for a later comparison, or None for one that cannot be compared."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, bool | int | float | complex | str | bytes | np.number):
        return (type(value).__name__, value)
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, list | tuple | deque | set | frozenset):
        return [_frozen(v) for v in value]
    if isinstance(value, Mapping):
        return [(str(k), _frozen(v)) for k, v in value.items()]
    return None


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bool(alike(one, other).all())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)


def alike(one: Tensor, other: Tensor) -> Tensor:
    """Return where two tensors are equal, NaN to NaN too."""
    return (one == other) | ((one != one) & (other != other))


def _copied(loss: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return copy.deepcopy(loss)
    except Exception:  # a user's object may refuse to be copied
        return loss
