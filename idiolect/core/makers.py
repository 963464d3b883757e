"""What makes the output of a model: the layers between which and the output there is no other layer.

A layer is a module with a weight of two or more axes that does not normalize. Everything else (activations, views,
pooling, normalization, scales) is passed through on the way back from the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import tree_leaves

from idiolect.core.copied import copied
from idiolect.core.normalization import normalizes

ADDED = "added_by_a_part"
"""An attribute of modules that parts add to a model."""


class Makers(NamedTuple):
    """What makes the output.

    Attributes:
        layers: names of the layers.
        tensors: names of weights that the forward pass uses outside of their layer.
    """

    layers: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()


def makers_in_pass(module: nn.Module, run: Callable[[nn.Module], Any]) -> Makers:
    """Return what makes the output in a real pass, by the graph that autograd records.

    Args:
        module: the module; hooks are added to it, and all its parameters require gradients afterwards.
        run: runs the module on examples, and returns its output.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.last, self.first = nn.Linear(4, 2), nn.Linear(3, 4)
        ...     def forward(self, x):
        ...         return self.last(self.first(x).relu()).squeeze(-1)
        >>> makers_in_pass(Net(), lambda net: net(torch.ones(5, 3)))
        Makers(layers=('last',), tensors=())
    """
    owners: dict[Any, str] = {}
    inner: list[bool] = []

    def enter(*_: object) -> None:
        inner.append(False)

    def leave(name: str) -> Callable[..., None]:
        def note(layer: nn.Module, given: object, outputs: object) -> None:
            if inner.pop():  # layers inside of this one have made its output
                return
            owners.update({node: name for t in _tensors(outputs) if (node := t.grad_fn) is not None})
            inner[:] = [True] * len(inner)

        return note

    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for name, layer in module.named_modules():
        if _is_layer(layer):
            layer.register_forward_pre_hook(enter)
            layer.register_forward_hook(leave(name))
    names = {id(p): n for n, p in module.named_parameters()}
    with torch.enable_grad():
        roots = [node for t in _tensors(run(module)) if (node := t.grad_fn) is not None]

    def before(node: Any) -> Iterable[Any]:  # noqa: ANN401 - autograd's nodes have no type
        return (n for n, _ in node.next_functions if n is not None)

    def weight(node: Any) -> str | None:  # noqa: ANN401
        variable = getattr(node, "variable", None)
        return names.get(id(variable)) if variable is not None and variable.dim() > 1 else None

    return _walk(roots, before, owners.get, weight)


def makers_in_graph(module: nn.Module) -> Makers:
    """Return what makes the output by a symbolic trace, for a model without examples.

    Where the forward pass cannot be traced and the model has one linear layer, it is that one. Tracing replaces parts
    of PyTorch while it runs: call this before threads run modules.

    Example:
        >>> makers_in_graph(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
        Makers(layers=('2',), tensors=())
    """
    module = copied(module).eval()
    if _is_layer(module) and not _has_parts(module):
        return Makers(("",))
    try:
        with torch.random.fork_rng(devices=[]):
            graph = _Tracer().trace(module)
    except Exception:  # a user's forward may raise anything when its input is not a tensor
        linear = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
        return Makers(tuple(linear)) if len(linear) == 1 else Makers()
    first = {id(m): n for n, m in module.named_modules()}
    names = {id(p): n for n, p in module.named_parameters()}

    def layer(node: fx.Node) -> str | None:
        called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        return first[id(called)] if called is not None and (_is_layer(called) or _has_parts(called)) else None

    def weight(node: fx.Node) -> str | None:
        found: Any = module
        for part in str(node.target).split(".") if node.op == "get_attr" else ():
            found = getattr(found, part)
        return names.get(id(found)) if isinstance(found, nn.Parameter) and found.dim() > 1 else None

    (output,) = (node for node in graph.nodes if node.op == "output")
    return _walk(output.all_input_nodes, lambda node: node.all_input_nodes, layer, weight)


class _Tracer(fx.Tracer):
    """A tracer that does not look inside modules without inner layers, of whatever class."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not _has_parts(m) or super().is_leaf_module(m, module_qualified_name)


def _has_parts(module: nn.Module) -> bool:
    """Return whether modules inside of a module have parameters, other than parametrizations and what parts added."""
    inner = (child for name, child in module.named_children() if name != "parametrizations")
    return any(True for child in inner if not hasattr(child, ADDED) for _ in child.parameters())


def _walk(
    roots: Iterable[Any],
    before: Callable[[Any], Iterable[Any]],
    layer: Callable[[Any], str | None],
    weight: Callable[[Any], str | None],
) -> Makers:
    """Go back from the output to the nearest layers."""
    left, seen, layers, tensors = list(roots), set(), dict[str, None](), dict[str, None]()
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        if (name := layer(node)) is not None:
            layers[name] = None
        elif (name := weight(node)) is not None:
            tensors[name] = None
        else:
            left += before(node)
    return Makers(tuple(sorted(layers)), tuple(sorted(tensors)))


def _is_layer(module: nn.Module) -> bool:
    own = [] if isinstance(module, ParametrizationList) else [*module.parameters(recurse=False)]
    if isinstance(changed := getattr(module, "parametrizations", None), nn.Module):
        own += changed.parameters()
    return any(p.dim() > 1 for p in own) and not normalizes(module)


def _tensors(outputs: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
