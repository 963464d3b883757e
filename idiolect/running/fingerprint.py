"""Fingerprints: short texts that differ if a loss, a model or the clients' data do, to compare when a run is resumed.

They hold no addresses and no order of dictionaries, so another process finds the same. Of code they see what the
compiler made of it: another version of Python may compile a function of your own otherwise.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from idiolect.core.nest import named_tensors
from idiolect.core.rng import stream
from idiolect.core.values import plain
from idiolect.data import ClientData, Examples, LazyExamples, first_of

MOST_BYTES = 2**24
"""Of a larger tensor a sample of rows with about as many bytes is read."""

FIRST = 16
"""Of examples that are read batch by batch, so many are read."""

MOST_LETTERS = 200
"""A longer text ends in the hash of the whole."""

DEEPEST = 6
"""Objects that are held by objects are followed so far."""


def described(value: object) -> str:
    """Return a text that differs if a value does: names and settings of functions and objects, hashes of tensors.

    A function is its name and a hash of its code, with defaults, the values that it closes over, and the numbers, texts
    and tensors among the globals that it reads; a library's function is its name alone. A module is its type, its
    settings and its tensors.

    Example:
        >>> described(nn.CrossEntropyLoss(label_smoothing=0.1))
        "CrossEntropyLoss(ignore_index=-100, label_smoothing=0.1, reduction='mean')"
        >>> described(partial(nn.functional.cross_entropy, label_smoothing=0.1))
        'partial(cross_entropy, label_smoothing=0.1)'
        >>> described(torch.ones(2, 3))
        'float32 (2, 3) 6401cb6b2b37'
    """
    text = _text(value, 0)
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 14]}… {_hash(text.encode())}"


def data_of(data: ClientData) -> dict[str, str]:
    """Return the fingerprint of each split of a client.

    Example:
        >>> data_of(ClientData(train=([[0.5]], [1])))
        {'train': 'float32 (1, 1) 394b06ea7887, int64 (1,) dfdf296fd6d4'}
    """
    return {split: _examples(examples) for split, examples in data.splits().items()}


def _examples(examples: Examples | LazyExamples) -> str:
    """Return the fingerprint of a split; of examples that are read, that of their number, the first, and transforms."""
    held = isinstance(examples, Examples)
    x, y = examples if isinstance(examples, Examples) else first_of(examples, FIRST)
    changes = [] if isinstance(examples, Examples) else [examples.transform, examples.batch_transform]
    found = [(place, tensor) for nest, name in ((x, "x"), (y, "y")) for place, tensor in named_tensors(nest, name)]
    texts = [_tensor(t) if place in ("x", "y") else f"{place} {_tensor(t)}" for place, t in found]
    texts += [_text(change, 0) for change in changes if change is not None]
    return ", ".join(texts) if held else f"{len(examples)} read, the first {', '.join(texts)}"


def model_of(module: nn.Module) -> str:
    """Return the fingerprint of a network without its weights: its layers and their settings, and its own code.

    Example:
        >>> one, other = (model_of(nn.Sequential(nn.Linear(2, 2), act)) for act in (nn.ReLU(), nn.Tanh()))
        >>> one == other
        False
    """
    kinds = {type(part) for part in module.modules() if not _library(type(part))}
    code = sorted(f"{kind.__qualname__}{_text(kind.forward, 0)}" for kind in kinds)
    layers = re.sub(r" at 0x[0-9a-f]+", "", repr(module))
    return f"{type(module).__qualname__} {_hash(' '.join([layers, *code]).encode())}"


def _text(value: object, depth: int) -> str:
    value = value if isinstance(value, list | tuple) else plain(value)
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype | torch.device):
        return repr(value)
    if isinstance(value, Tensor | np.ndarray):
        return _tensor(torch.as_tensor(value))
    if isinstance(value, ModuleType | type | BuiltinFunctionType):
        return value.__name__
    if depth == DEEPEST:
        return type(value).__qualname__
    return "".join(_composed(value, depth + 1))


def _composed(value: object, depth: int) -> Iterator[str]:
    """Yield the text of a value that holds others."""
    match value:
        case Mapping():
            yield f"{{{', '.join(sorted(f'{k!r}: {_text(v, depth)}' for k, v in value.items()))}}}"
        case list() | tuple():
            yield f"({', '.join(_text(item, depth) for item in value)})"
        case set() | frozenset():
            yield f"{{{', '.join(sorted(_text(item, depth) for item in value))}}}"
        case partial():
            named = {f"{i}": arg for i, arg in enumerate(value.args)} | dict(value.keywords)
            yield f"partial({', '.join([_text(value.func, depth), *_named(named, depth)])})"
        case MethodType():
            yield f"{_text(value.__self__, depth)}.{_text(value.__func__, depth)}"
        case FunctionType():
            yield value.__qualname__ if _library(value) else _function(value, depth)
        case nn.Module():
            held = {**dict(value.named_parameters()), **dict(value.named_buffers())}
            named = {n: v for n, v in vars(value).items() if not n.startswith("_") and n != "training"} | held
            own = [] if _library(type(value)) else [_text(type(value).forward, depth)]
            children = [f"{name}={_text(child, depth)}" for name, child in value.named_children()]
            yield f"{type(value).__qualname__}({', '.join([*_named(named, depth), *own, *children])})"
        case _:
            call = [] if _library(type(value)) or not callable(value) else [_text(type(value).__call__, depth)]
            held = vars(value) if hasattr(value, "__dict__") else {}
            yield f"{type(value).__qualname__}({', '.join([*_named(held, depth), *call])})"


def _named(values: Mapping[str, object], depth: int) -> list[str]:
    return sorted(f"{name}={_text(value, depth)}" for name, value in values.items() if value is not None)


def _function(function: FunctionType, depth: int) -> str:
    """Return name, code, defaults, closed-over values and constant globals of a function."""
    code = function.__code__
    held: dict[str, object] = dict(function.__kwdefaults__ or {})
    held |= {f"default{i}": value for i, value in enumerate(function.__defaults__ or ())}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            held[name] = cell.cell_contents
        except ValueError:  # a name that is not bound yet
            continue
    known = {name: function.__globals__[name] for name in _names(code) if name in function.__globals__}
    held |= {name: value for name, value in known.items() if isinstance(value, _READ) and value is not function}
    return f"{function.__qualname__}({', '.join([_hash(_code(code)), *_named(held, depth)])})"


def _names(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _code(code: CodeType) -> bytes:
    """Return what a function does: instructions, names and constants, without lines and files."""
    constants = [_code(c) if isinstance(c, CodeType) else _text(c, 0).encode() for c in code.co_consts]
    return b"\0".join([code.co_code, repr((code.co_names, code.co_varnames)).encode(), *constants])


def _library(made: Any) -> bool:  # noqa: ANN401 - a function or a class
    return str(getattr(made, "__module__", "")).partition(".")[0] in ("torch", "numpy", "builtins", "idiolect")


def _tensor(tensor: Tensor) -> str:
    """Return dtype, shape and a hash of the values, or of those of a sample of rows."""
    shape, size = tuple(tensor.shape), tensor.numel() * tensor.element_size()
    if size > MOST_BYTES and tensor.dim():
        count = max(1, len(tensor) * MOST_BYTES // size)
        rows = np.sort(stream("fingerprint", len(tensor)).choice(len(tensor), count, replace=False))
        tensor = tensor[torch.from_numpy(rows).to(tensor.device)]
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape} {_hash(values.data)}"


_READ = (bool, int, float, str, tuple, list, dict, Tensor, np.ndarray, np.generic, partial, FunctionType)
"""Types of globals that belong to a function that reads them."""


def _hash(content: bytes | memoryview) -> str:
    return hashlib.blake2b(content, digest_size=6).hexdigest()
