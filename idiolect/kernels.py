"""Gradients without autograd, for networks that are a chain of known layers.

Nothing is recorded, weights are read and gradients written where they live, and a plain step of gradient descent is
part of the product that makes the gradient: no row of gradients exists. Anything but such a chain is refused, and goes
through autograd.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from idiolect.anatomy import Anatomy
from idiolect.layers import LAYERS, Layer, Relu, Sink, State, Stem
from idiolect.model import Loss, Model
from idiolect.tree import Layout, Tree, combine
from idiolect.words import Batch, Gradient, Lockstep, Step


class Kernels:
    """A chain of layers that is differentiated by hand: what `Model` does, faster.

    Args:
        model: the model, a chain of known layers.

    Raises:
        NotAChainError: if it is none; the message names the layer.

    Example:
        >>> model = Model(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), F.mse_loss)
        >>> batch = Batch(torch.ones(4, 2), torch.zeros(4, 1))
        >>> found, known = Kernels(model).grad(model.initial, batch), model.grad(model.initial, batch)
        >>> torch.allclose(found.gradient.flat, known.gradient.flat)
        True
        >>> Kernels(Model(nn.Sequential(nn.Linear(2, 3), nn.ELU()))) # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        NotAChainError: layer '1' (ELU) has no explicit kernel
    """

    def __init__(self, model: Model) -> None:
        self.anatomy: Anatomy = model.anatomy
        self._loss = model.loss
        self._explicit_loss = _is_plain_cross_entropy(model.loss)
        named = _chain(model.module(model.initial).train())
        self._layers: list[Layer] = []
        self._places: list[tuple[list[int], list[int]]] = []  # of weights in the row, of statistics among buffers
        before = Layer(nn.Identity())
        for name, module in named:
            make = Stem if not self._layers and Stem.fits(module) else LAYERS[type(module)]
            layer = make(module)  # type: ignore[arg-type]
            if isinstance(layer, Relu):
                layer.in_place = before.fresh
            self._layers.append(layer)
            self._places.append((self._of(self.anatomy.trainable, name), self._of(self.anatomy.buffers, name)))
            before = layer
        used = sum(len(weights) + len(buffers) for weights, buffers in self._places)
        if used != len(self.anatomy.items):
            raise NotAChainError("some of its weights or buffers belong to none of its layers, or to two")

    def grad(self, weights: Tree, step: Step, only: Container[str] | None = None) -> Gradient:
        """See `Model.grad`; for one client's batch."""
        batch = _one(step)
        where = self.anatomy.trainable if only is None else self.anatomy.trainable.only(only)
        with torch.no_grad():
            buffers = Tree(self.anatomy.buffers, combine(self.anatomy.buffers, weights).flat.clone())
            gradient = Tree(where, torch.empty_like(weights.flat[: where.total]))
            names = self.anatomy.trainable.names
            views = {i: gradient[n] for i, n in enumerate(names) if n in gradient}
            loss = self._pass(weights, buffers.flat, batch, partial(_Written, views))
        return Gradient(gradient, buffers, loss)

    def descend(self, weights: Tree, step: Step, rate: float) -> Tensor:
        """Take one step of gradient descent, and keep the new statistics, in the row itself; return the loss."""
        with torch.inference_mode():
            buffers = weights.flat.narrow(0, self.anatomy.trainable.total, self.anatomy.buffers.total)
            return self._pass(weights, buffers, _one(step), partial(_Descended, rate))

    def predict(self, weights: Tree, x: Tensor) -> Tensor:
        """See `Model.predict`."""
        with torch.no_grad():
            buffers = combine(self.anatomy.buffers, weights).flat
            for layer, state in zip(self._layers, self._states(weights, buffers), strict=True):
                x, _ = layer.forward(x, state, True)
            return x

    def _of(self, where: Layout, name: str) -> list[int]:
        return [i for i, n in enumerate(where.names) if n.rpartition(".")[0] == name]

    def _states(self, weights: Tree, buffers: Tensor) -> Iterator[State]:
        of_weights, of_buffers = self.anatomy.trainable, self.anatomy.buffers
        pieces = weights.flat.narrow(0, 0, of_weights.total).split_with_sizes(of_weights.sizes)
        views = [piece.view(shape) for piece, shape in zip(pieces, of_weights.shapes, strict=True)]
        statistics = buffers.split_with_sizes(of_buffers.sizes) if of_buffers.sizes else ()
        for own, kept in self._places:
            yield State([views[i] for i in own], [statistics[i] for i in kept])

    def _pass(self, weights: Tree, buffers: Tensor, batch: Batch, sink: Any) -> Tensor:  # noqa: ANN401
        """Go forth and back; every layer's gradients go to its own sink. Return the loss."""
        x, tape = batch.x, []
        states = list(self._states(weights, buffers))
        for layer, state in zip(self._layers, states, strict=True):
            x, kept = layer.forward(x, state, batch.frozen)
            tape.append(kept)
        loss, d = self._slope(x, batch.y)
        sinks: list[Sink] = [sink(own, state.weights) for (own, _), state in zip(self._places, states, strict=True)]
        first = next((i for i, s in enumerate(sinks) if any(map(s.wants, range(len(states[i].weights))))), len(sinks))
        for i in reversed(range(first, len(sinks))):
            d = self._layers[i].backward(d, tape[i], states[i], sinks[i], i > first)
        return loss

    def _slope(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and its gradient in the outputs."""
        if self._explicit_loss and outputs.dim() == 2 and y.dim() == 1 and not y.is_floating_point():
            log = torch.log_softmax(outputs, 1)
            loss = F.nll_loss(log, y)
            share = 1 / len(y)
            d = log.exp_().mul_(share)
            return loss, d.scatter_add_(1, y[:, None], d.new_full((len(y), 1), -share))
        with torch.inference_mode(False), torch.enable_grad():
            leaf = outputs.clone().requires_grad_()
            loss = self._loss(leaf, y)
            return loss.detach(), torch.autograd.grad(loss, leaf)[0]


class NotAChainError(ValueError):
    """Why a network has no explicit kernels."""


class _Written:
    """Write gradients into the row that is returned."""

    def __init__(self, views: dict[int, Tensor], places: list[int], weights: list[Tensor]) -> None:
        self._views = [views.get(place) for place in places]

    def wants(self, at: int) -> bool:
        return self._views[at] is not None

    def product(self, at: int, left: Tensor, right: Tensor) -> None:
        torch.mm(left, right, out=self._views[at])

    def total(self, at: int, values: Tensor) -> None:
        torch.sum(values, 0, out=self._views[at])

    def take(self, at: int, gradient: Tensor) -> None:
        view = self._views[at]
        if view is not None:
            view.copy_(gradient)


class _Descended:
    """Take gradients off the weights at once."""

    def __init__(self, rate: float, places: list[int], weights: list[Tensor]) -> None:
        self._rate = rate
        self._weights = weights

    def wants(self, at: int) -> bool:
        return True

    def product(self, at: int, left: Tensor, right: Tensor) -> None:
        self._weights[at].addmm_(left, right, alpha=-self._rate)

    def total(self, at: int, values: Tensor) -> None:
        self._weights[at].sub_(values.sum(0), alpha=self._rate)

    def take(self, at: int, gradient: Tensor) -> None:
        self._weights[at].sub_(gradient, alpha=self._rate)


def _one(step: Step) -> Batch:
    if isinstance(step, Lockstep):
        raise TypeError("explicit kernels differentiate one client at a time")
    return step


def _is_plain_cross_entropy(loss: Loss) -> bool:
    if isinstance(loss, nn.CrossEntropyLoss):
        like = nn.CrossEntropyLoss()
        return type(loss) is nn.CrossEntropyLoss and loss.weight is None and _settings(loss) == _settings(like)
    return loss is F.cross_entropy


def _settings(loss: nn.CrossEntropyLoss) -> tuple[object, ...]:
    return loss.reduction, loss.label_smoothing, loss.ignore_index


FUNCTIONS: dict[Any, Callable[..., nn.Module]] = {
    **dict.fromkeys((torch.relu, F.relu, "relu"), nn.ReLU),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh"), nn.Tanh),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid"), nn.Sigmoid),
    **dict.fromkeys((torch.flatten, "flatten"), nn.Flatten),
    F.max_pool2d: nn.MaxPool2d,
}
"""Functions, and methods of tensors by name, that do what a layer does."""


def _chain(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return a network's layers in order, by name, or say why it is no chain of known ones."""
    for name, layer in module.named_modules():
        hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
        if any(hooks) or hasattr(layer, "parametrizations"):
            raise NotAChainError(f"layer {name!r} has hooks or parametrisations")
    if any(not p.requires_grad for p in module.parameters()):
        raise NotAChainError("some of its weights are frozen")
    if type(module) in LAYERS:
        return [("", _known("", module))]
    try:
        graph = fx.symbolic_trace(copy.deepcopy(module)).graph
    except Exception as error:  # tracing runs the user's forward, which may raise anything
        raise NotAChainError(f"its forward pass cannot be traced ({str(error).partition(chr(10))[0]})") from None
    found: list[tuple[str, nn.Module]] = []
    before: fx.Node | None = None
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            ends = node.op == "placeholder" and before is not None
            if ends or (node.op == "output" and node.args != (before,)):
                raise NotAChainError("it has several inputs or outputs")
        else:
            if not node.args or node.args[0] is not before or node.all_input_nodes != [before]:
                raise NotAChainError(f"{node.name!r} is not fed by what comes before it alone")
            found.append(_layer(node, module))
        before = node
    return found


def _layer(node: fx.Node, module: nn.Module) -> tuple[str, nn.Module]:
    if node.op == "call_module":
        if len(node.args) > 1 or node.kwargs:
            raise NotAChainError(f"layer {node.target!r} takes more than one input")
        name = str(node.target)
        return name, _known(name, module.get_submodule(name))
    make = FUNCTIONS.get(node.target)
    settings = {name: value for name, value in node.kwargs.items() if name != "inplace"}
    begins = node.args[1:2] == (1,) or settings.get("start_dim") == 1
    if make is None or (make is nn.Flatten and not begins):  # unlike the layer, the function begins with the batch
        raise NotAChainError(f"{node.name!r} has no explicit kernel")
    try:
        return f"({node.name})", _known(node.name, make(*node.args[1:], **settings))
    except TypeError:
        raise NotAChainError(f"{node.name!r} has settings without an explicit kernel") from None


def _known(name: str, layer: nn.Module) -> nn.Module:
    """Return a layer if its type and all its settings are covered."""
    shown = f"layer {name!r} ({type(layer).__name__})"
    if type(layer) not in LAYERS:
        raise NotAChainError(f"{shown} has no explicit kernel")
    odd = (
        getattr(layer, "p", 0) != 0  # dropout
        or (isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) != (1, -1))
        or getattr(layer, "return_indices", False)
        or getattr(layer, "padding_mode", "zeros") != "zeros"
        or isinstance(getattr(layer, "padding", 0), str)
        or (isinstance(layer, _BatchNorm) and (layer.momentum is None or not layer.track_running_stats))
    )
    if odd:
        raise NotAChainError(f"{shown} has settings without an explicit kernel")
    return layer
