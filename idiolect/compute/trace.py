"""The chain of known layers that a module consists of, found by tracing.

A module is accepted only if nothing else can happen in its forward pass: every layer is of an exactly known type,
without hooks, every tensor belongs to a layer of the chain, the trace is the same in training and evaluation mode, all
layers are in the mode of the model before and after it, and it changes no setting.
"""

from __future__ import annotations

import operator
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional as F

from idiolect.compute.hidden import changes, held
from idiolect.compute.layers import Layer, View, arrange, layer_of
from idiolect.core.copied import copied
from idiolect.core.structure import Private


class NotAChainError(ValueError):
    """The error for a module that is no chain of known layers; the message gives the reason."""


def read(module: nn.Module) -> list[Layer]:
    """Return the layers of a module in order; the module is not changed.

    Tracing replaces parts of PyTorch while it runs: call this before threads run modules.

    Raises:
        NotAChainError: if it is no chain of known layers.

    Example:
        >>> [layer.names for layer in read(nn.Sequential(nn.Linear(4, 2), nn.ReLU()))]
        [('0.weight', '0.bias'), ()]
    """
    _plain(module)
    training, predicting = (_in_mode(module, mode) for mode in (True, False))
    if [(name, repr(step)) for name, step in training] != [(name, repr(step)) for name, step in predicting]:
        raise NotAChainError("the model does something else in training than in evaluation mode")
    found = [layer_of(name, step) for name, step in training]
    if why := next((layer for layer in found if isinstance(layer, str)), None):
        raise NotAChainError(why)
    layers = [layer for layer in found if isinstance(layer, Layer)]
    held = [name for layer in layers for name in layer.names]
    state = {f"{n}.{b}" for n, m in module.named_modules() if isinstance(m, Private) for b, _ in m.named_buffers()}
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if odd := next((name for name, _ in tensors if name not in held and name not in state), None):
        raise NotAChainError(f"tensor {odd!r} belongs to no layer of the chain")
    if len(held) != len(set(held)):
        raise NotAChainError("a layer is used more than once")
    return arrange(layers)


def _in_mode(module: nn.Module, training: bool) -> list[tuple[str, nn.Module]]:
    """Return the steps of a module in one mode; raise if a layer has another mode, or the pass changes a setting."""
    module = copied(module).train(training)
    before = held(module)
    if odd := next((n for n, layer in module.named_modules() if layer.training != training), None):
        raise NotAChainError(f"layer {odd!r} keeps a mode of its own")
    steps = list(_steps(module))
    if changed := changes(before, held(module)):
        raise NotAChainError(f"its forward changes the attribute {changed[0]!r}")
    return steps


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _plain(module: nn.Module) -> None:
    """Raise if the module has something that a trace does not show."""
    names = [n for n, _ in module.named_parameters(remove_duplicate=False)]
    if odd := next((n for n in names if n not in dict(module.named_parameters())), None):
        raise NotAChainError(f"parameter {odd!r} is shared by two layers")
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            raise NotAChainError(f"parameter {name!r} is frozen")
        if parameter.dtype not in (torch.float32, torch.float64):
            raise NotAChainError(f"parameter {name!r} is {parameter.dtype}, not float32 or float64")
    if any(vars(torch.nn.modules.module)[f"_global{hooks}"] for hooks in _HOOKS):
        raise NotAChainError("hooks of all modules are set")
    for name, layer in module.named_modules():
        if type(layer).__call__ is not nn.Module.__call__:
            raise NotAChainError(f"layer {name!r} ({type(layer).__name__}) has a __call__ of its own")
        if any(getattr(layer, hooks) for hooks in _HOOKS):
            raise NotAChainError(f"layer {name!r} ({type(layer).__name__}) has hooks")
        if "forward" in vars(layer):
            raise NotAChainError(f"layer {name!r} ({type(layer).__name__}) has a forward of its own")


class _Tracer(fx.Tracer):
    """A tracer that raises if the forward pass disables gradients, which a graph does not show."""

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:  # noqa: ANN401
        mixed = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        if mixed or not torch.is_grad_enabled():
            raise NotAChainError("its forward switches gradients or precision")
        return super().create_node(kind, *args, **kwargs)


def _traced(module: nn.Module) -> fx.Graph:
    """Return the graph of a module's forward pass; raise if the pass does something that a graph does not show."""
    hidden: list[str] = []

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code is torch.autograd.Function.apply.__code__:
            hidden.append("calls an autograd function of its own")

    def drawn() -> tuple[object, ...]:
        state: Any = np.random.get_state()  # noqa: NPY002 - detects draws from NumPy's global stream
        return random.getstate(), state[1].tobytes(), state[2], torch.get_rng_state().numpy().tobytes()

    before, profile = drawn(), sys.getprofile()
    sys.setprofile(watch)
    try:
        with torch.enable_grad():
            graph: fx.Graph = _Tracer().trace(module)
    except NotAChainError:
        raise
    except Exception as error:  # a user's forward may raise anything when its input is not a tensor
        raise NotAChainError(
            f"its forward is no fixed sequence of layers ({str(error).partition(chr(10))[0]})"
        ) from None
    finally:
        sys.setprofile(profile)
    if drawn() != before:
        hidden.append("draws random numbers")
    if hidden:
        raise NotAChainError(f"its forward {hidden[0]}")
    return graph


def _steps(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name and module of each node of the chain; functions and methods become equivalent modules."""
    if _Tracer().is_leaf_module(module, ""):  # one layer is a chain
        yield "", module
        return
    graph = _traced(module)
    sizes = {n: of for n in graph.nodes if (of := _batch_size(n)) is not None}
    shapes = {n for n in graph.nodes if _is_shape(n)}
    nodes = [n for n in graph.nodes if n not in sizes and n not in shapes]
    before: fx.Node | None = None
    for node in nodes:
        if node.op == "get_attr":
            raise NotAChainError(f"its forward handles tensor {str(node.target)!r} outside its layer")
        if (node.op == "placeholder") != (before is None):
            raise NotAChainError("the model takes more than one input")
        used = [n for n in node.users if n not in sizes and n not in shapes]
        if before is not None and (not node.args or node.args[0] is not before):
            raise NotAChainError(f"{node.name!r} does not work on the output before it")
        if len(used) != (node.op != "output"):
            raise NotAChainError(f"the output of {node.name!r} is used {len(used)} times")
        if node.op not in ("placeholder", "output"):
            yield _step(module, node, {n for n, of in sizes.items() if of is before})
        before = node


def _is_shape(node: fx.Node) -> bool:
    """Return whether a node is the whole shape of a tensor."""
    if node.op == "call_method":
        return bool(node.target == "size" and len(node.args) == 1 and not node.kwargs)
    return bool(node.op == "call_function" and node.target is getattr and node.args[1] == "shape")


def _batch_size(node: fx.Node) -> fx.Node | None:
    """Return the tensor whose batch size a node is, or None if it is something else."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or node.kwargs or node.args[1:] != (0,):
        return None
    if node.op == "call_method" and node.target == "size":
        return source
    if node.op == "call_function" and node.target is operator.getitem and _is_shape(source):
        return source.args[0] if isinstance(source.args[0], fx.Node) else None
    return None


_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_MEAN = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")

_FUNCTIONS: dict[object, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    F.relu: (nn.ReLU, ("inplace",)),
    torch.relu: (nn.ReLU, ()),
    torch.relu_: (nn.ReLU, ()),
    torch.tanh: (nn.Tanh, ()),
    torch.sigmoid: (nn.Sigmoid, ()),
    F.softplus: (nn.Softplus, ("beta", "threshold")),
    F.gelu: (nn.GELU, ("approximate",)),
    F.leaky_relu: (nn.LeakyReLU, ("negative_slope", "inplace")),
    F.max_pool2d: (nn.MaxPool2d, _POOL),
    torch.max_pool2d: (nn.MaxPool2d, _POOL[:-1]),
    F.avg_pool2d: (nn.AvgPool2d, _MEAN),
    F.adaptive_avg_pool2d: (nn.AdaptiveAvgPool2d, ("output_size",)),
    torch.flatten: (partial(nn.Flatten, start_dim=0), ("start_dim", "end_dim")),
}
"""Functions with the equivalent module, and the names of their arguments after the input."""

_METHODS: dict[object, object] = {
    "relu": torch.relu,
    "relu_": torch.relu_,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "flatten": torch.flatten,
}


def _step(module: nn.Module, node: fx.Node, rows: set[fx.Node]) -> tuple[str, nn.Module]:
    """Return a node's name and module; `rows` are the nodes that are the batch size of its input."""
    arguments, options = node.args[1:], dict(node.kwargs)
    if node.op == "call_module" and not arguments and not options:
        return str(node.target), module.get_submodule(str(node.target))
    if node.op == "call_method" and node.target in ("view", "reshape") and arguments and not options:
        shape: Any = arguments[0] if isinstance(arguments[0], tuple | list) else arguments
        if len(shape) == 2 and shape[0] in rows and shape[1] == -1:
            return node.name, View(None)
        if all(isinstance(s, int) for s in shape):
            return node.name, View(tuple(shape))
    known = _FUNCTIONS.get(_METHODS.get(node.target) if node.op == "call_method" else node.target)
    if known is not None and node.op in ("call_method", "call_function"):
        make, names = known
        given = dict(zip(names, arguments, strict=False)) | options
        if len(arguments) <= len(names) and set(given) <= set(names) and not node.all_input_nodes[1:]:
            return node.name, make(**given)
    raise NotAChainError(f"{node.name!r} ({getattr(node.target, '__name__', node.target)}) has no explicit kernel")
