"""Forward and backward pass of a chain of known layers, without autograd.

No graph is recorded, weights are views of one row, and a plain step of gradient descent is part of the product that
computes the gradient: ``W -= rate * d' x`` in one pass over ``W``. Small and flat networks run up to twice as fast.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor

from idiolect.compute.autograd import Model
from idiolect.compute.layers import NOWHERE, Layer, Sink, aten
from idiolect.compute.losses import is_plain_cross_entropy
from idiolect.compute.trace import NotAChainError, read
from idiolect.core.nest import Nest, cloned, only_tensor
from idiolect.core.structure import ModelStructure
from idiolect.core.tree import Tree, combine
from idiolect.core.types import Batch, Gradient, Lockstep, Step
from idiolect.data.seeding import seed_pass

__all__ = ["Kernels", "NotAChainError"]


class Kernels:
    """A chain of layers as explicit kernels; several threads may use it at once.

    No graph is recorded unless rows or examples require a gradient.

    Args:
        model: the model; it is not changed. Make kernels before threads run modules: tracing replaces parts of PyTorch
            while it runs.

    Raises:
        NotAChainError: if the model is no chain of known layers; the message gives the reason.

    Example:
        >>> from torch import nn
        >>> model = Model(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
        >>> batch = Batch(torch.ones(5, 3), torch.zeros(5, dtype=torch.int64))
        >>> expected, found = model.grad(model.initial, batch), Kernels(model).grad(model.initial, batch)
        >>> torch.allclose(found.gradient.flat, expected.gradient.flat)
        True
        >>> Kernels(Model(nn.Sequential(nn.Linear(3, 4), nn.ELU())))
        Traceback (most recent call last):
        idiolect.compute.trace.NotAChainError: layer '1' (ELU) has no explicit kernel
    """

    way = "explicit kernels"

    def __init__(self, model: Model) -> None:
        if model.mixed or model.device.type != "cpu":
            raise NotAChainError("in mixed precision" if model.mixed else "on a GPU")
        self.structure: ModelStructure = model.structure
        self._loss, self._cross_entropy = model.loss, is_plain_cross_entropy(model.loss)
        place = {name: i for i, name in enumerate(self.structure.layout.names)}
        self._one = torch.ones((), dtype=model.dtype)
        layers = read(model.module(model.initial))
        self._chain = [(layer, [place[name] for name in layer.names]) for layer in layers]
        self._lowest = next(i for i, layer in enumerate(layers) if layer.weights)

    def grad(self, weights: Tree, step: Step, only: Container[str] | None = None) -> Gradient:
        """Return the gradient of the mean loss of a batch in training mode; pure, like `Model.grad`.

        Args:
            weights: the whole row, (P,).
            step: the examples of one client.
            only: differentiate in these weights only; the backward pass ends at the first of them.

        Returns:
            The gradient as a new row, statistics and counters after the pass, and the loss.
        """
        where = self.structure.trainable if only is None else self.structure.trainable.only(only)
        gradient = Tree(where, weights.flat.new_empty(where.total))
        buffers = Tree(self.structure.buffers, combine(self.structure.buffers, weights).flat.clone())
        tensors = (*weights.tensors[: len(self.structure.trainable.names)], *buffers.tensors)
        targets: Sequence[Tensor | None] = gradient.tensors
        if only is not None:
            views = dict(zip(where.names, targets, strict=True))
            targets = [views.get(name) for name in self.structure.trainable.names]
        loss = self._pass(tensors, targets, _batch(step), 0.0, 1.0)
        return Gradient(gradient, buffers, loss)

    def descend(self, weights: Tree, step: Step, rate: float) -> Tensor:
        """Take a step of plain gradient descent in place, statistics and counters included.

        Args:
            weights: the whole row, (P,); it is changed.
            step: the examples of one client.
            rate: learning rate.

        Returns:
            () the loss before the step.
        """
        return self._pass(weights.tensors, weights.tensors, _batch(step), 1.0, -rate)

    def predict(self, weights: Tree, x: Nest) -> Tensor:
        """Return the outputs in evaluation mode, without autograd.

        Args:
            weights: the whole row, (P,).
            x: (b, ...) inputs.
        """
        outputs = only_tensor(x)
        for layer, places in self._chain:
            outputs = layer.predict(outputs, [weights.tensors[i] for i in places])
        return outputs

    def _pass(
        self, tensors: Sequence[Tensor], targets: Sequence[Tensor | None], batch: Batch, beta: float, alpha: float
    ) -> Tensor:
        """Run a forward and a backward pass; each target becomes ``beta * target + alpha * gradient``.

        Returns:
            () the loss.
        """
        x, train = only_tensor(batch.x), not batch.frozen
        done: list[tuple[Layer, Any, list[Tensor], list[int]]] = []
        for layer, places in self._chain:
            own = [tensors[i] for i in places]
            x, kept = layer.forward(x, own, train)
            done.append((layer, kept, own, places))
        loss, d = self._differentiate(x, batch)
        lowest = self._lowest
        while lowest < len(done) and all(targets[i] is None for i in done[lowest][3][: done[lowest][0].weights]):
            lowest += 1
        for i in range(len(done) - 1, lowest - 1, -1):
            layer, kept, own, places = done.pop()
            sink = Sink([targets[i] for i in places[: layer.weights]], beta, alpha) if layer.weights else NOWHERE
            d = layer.backward(d, kept, own, sink, i > lowest)
        return loss

    def _differentiate(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss and its gradient with respect to the outputs."""
        y = batch.y
        if self._cross_entropy and outputs.dim() == 2 and y.dim() == 1 and not y.is_floating_point():
            logs = torch.log_softmax(outputs, 1)
            loss, total = aten.nll_loss_forward(logs, y, None, 1, -100)
            d = aten.nll_loss_backward(self._one, logs, y, None, 1, -100, total)
            return loss, torch._log_softmax_backward_data(d, logs, 1, logs.dtype)
        seed_pass(batch.key)  # for a loss that draws random numbers, as in `Model`
        with torch.inference_mode(False), torch.enable_grad():
            leaf = outputs.clone().requires_grad_()
            loss = self._loss(leaf.clone(), cloned(y))  # a loss may change its inputs in place
            (d,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), d


def _batch(step: Step) -> Batch:
    if isinstance(step, Lockstep):
        raise TypeError("explicit kernels differentiate one client at a time")
    return step
