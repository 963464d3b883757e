"""Forward and backward of a chain of known layers without autograd.

Nothing is taped, weights are views of one row, and a plain step of gradient descent goes into the product that
computes the gradient: ``W -= rate * d' x`` in one pass over ``W``. Small and flat networks run up to twice as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idiolect.anatomy import Anatomy
from idiolect.chain import NoChainError, read
from idiolect.layers import Layer, Sink, aten
from idiolect.tree import Tree, combine
from idiolect.words import Batch, Gradient

Loss = Callable[[Tensor, Tensor], Tensor]
"""(output, target) -> () mean over the batch."""


class Kernels:
    """A chain of layers as explicit kernels; it holds no tensor and may be used by several threads at once.

    Make one with `Kernels.of`.

    Example:
        >>> from idiolect.model import Model
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> model, batch = Model(net), Batch(torch.ones(5, 3), torch.zeros(5, dtype=torch.int64))
        >>> kernels = Kernels.of(net, F.cross_entropy, model.anatomy)
        >>> expected = model.grad(model.initial, batch).gradient
        >>> torch.allclose(kernels.grad(model.initial, batch).gradient.flat, expected.flat)
        True
    """

    def __init__(self, layers: Sequence[Layer], loss: Loss, anatomy: Anatomy) -> None:
        self._layers, self._loss, self._anatomy = layers, loss, anatomy
        self._cross_entropy = _is_plain_cross_entropy(loss)
        place = {name: i for i, name in enumerate(anatomy.layout.names)}
        self._places = [[place[name] for name in layer.names] for layer in layers]

    @staticmethod
    def of(module: nn.Module, loss: Loss, anatomy: Anatomy) -> Kernels | str:
        """Return the kernels of a module, or one line that says why it has none.

        Args:
            module: read, not changed. Call this before threads run modules: tracing replaces parts of PyTorch.
            loss: (output, target) -> scalar mean over the batch.
            anatomy: of the module.

        Example:
            >>> from idiolect.anatomy import anatomy_of
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
            >>> Kernels.of(net, F.cross_entropy, anatomy_of(net))
            "layer '1' (Dropout) has no explicit kernel"
        """
        try:
            return Kernels(read(module), loss, anatomy)
        except NoChainError as why:
            return str(why)

    @torch.no_grad()
    def grad(self, weights: Tree, batch: Batch, only: Container[str] | None = None) -> Gradient:
        """Differentiate the mean loss of a batch in training mode; pure, like `Model.grad`.

        Args:
            weights: the whole row, (P,).
            batch: the examples.
            only: differentiate in these weights alone: the pass back ends at the first of them.

        Returns:
            The gradient in a row of its own, statistics and counters after the pass, the loss.
        """
        where = self._anatomy.trainable if only is None else self._anatomy.trainable.only(only)
        gradient = Tree(where, weights.flat.new_empty(where.total))
        buffers = Tree(self._anatomy.buffers, combine(self._anatomy.buffers, weights).flat.clone())
        tensors = _views(weights)
        first = len(self._anatomy.trainable.names)
        tensors[first:] = _views(buffers)
        views = dict(zip(where.names, _views(gradient), strict=True))
        targets = [views.get(name) for name in self._anatomy.trainable.names]
        loss = self._pass(tensors, targets, batch, 0.0, 1.0)
        return Gradient(gradient, buffers, loss)

    @torch.no_grad()
    def descend(self, weights: Tree, batch: Batch, rate: float) -> Tensor:
        """Take a step of plain gradient descent in place, statistics and counters included.

        Args:
            weights: the whole row, (P,); it is changed.
            batch: the examples.
            rate: learning rate.

        Returns:
            () the loss before the step.
        """
        tensors = _views(weights)
        return self._pass(tensors, tensors, batch, 1.0, -rate)

    @torch.no_grad()
    def predict(self, weights: Tree, x: Tensor) -> Tensor:
        """Return the outputs in evaluation mode, without a graph.

        Args:
            weights: the whole row, (P,).
            x: (b, ...) inputs.
        """
        tensors = _views(weights)
        for layer, places in zip(self._layers, self._places, strict=True):
            x = layer.predict(x, [tensors[i] for i in places])
        return x

    def _pass(
        self, tensors: list[Tensor], targets: Sequence[Tensor | None], batch: Batch, beta: float, alpha: float
    ) -> Tensor:
        """Go forward and back; each target becomes ``beta * target + alpha * gradient``. Return the loss."""
        x, train = batch.x, not batch.frozen
        done: list[tuple[Layer, Any, list[Tensor], Sink]] = []
        lowest = -1
        for layer, places in zip(self._layers, self._places, strict=True):
            own = [tensors[i] for i in places]
            x, kept = layer.forward(x, own, train)
            sink = Sink([targets[i] for i in places[: layer.weights]], beta, alpha)
            if lowest < 0 and any(t is not None for t in sink.targets):
                lowest = len(done)
            done.append((layer, kept, own, sink))
        loss, d = self._differentiate(x, batch.y)
        if lowest >= 0:
            for i in range(len(done) - 1, lowest - 1, -1):
                layer, kept, own, sink = done.pop()
                d = layer.backward(d, kept, own, sink, i > lowest)
        return loss

    def _differentiate(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and its gradient in the outputs."""
        if self._cross_entropy and outputs.dim() == 2 and y.dim() == 1 and not y.is_floating_point():
            logs = torch.log_softmax(outputs, 1)
            loss, total = aten.nll_loss_forward(logs, y, None, 1, -100)
            d = aten.nll_loss_backward(loss.new_ones(()), logs, y, None, 1, -100, total)
            return loss, aten._log_softmax_backward_data(d, logs, 1, logs.dtype)
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            loss = self._loss(leaf.clone(), y)  # a loss may work in place on what it is given
            (d,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), d


def _views(tree: Tree) -> list[Tensor]:
    """Return a row's tensors, in order, as views."""
    pieces: tuple[Tensor, ...] = tree.flat.split_with_sizes(tree.layout.sizes)
    return [p if len(s) == 1 else p.view(s) for p, s in zip(pieces, tree.layout.shapes, strict=True)]


def _is_plain_cross_entropy(loss: Loss) -> bool:
    """Whether a loss is cross-entropy with every option at its default."""
    if type(loss) is nn.CrossEntropyLoss:
        options = (loss.weight, loss.ignore_index, loss.reduction, loss.label_smoothing)
        return options == (None, -100, "mean", 0.0) and "forward" not in vars(loss)
    return loss is F.cross_entropy
