"""A module as pure functions of a tree: its gradient, its predictions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from idiolect.anatomy import Anatomy, anatomy_of, initial_tree
from idiolect.tree import Tree, combine, overlay
from idiolect.words import Batch, Gradient

Loss = Callable[[Tensor, Tensor], Tensor]
"""(output, target) -> () mean over the batch."""


class Model:
    """A user's module, read but never changed.

    Args:
        module: any `torch.nn.Module`; its current weights are the initial weights.
        loss: (output, target) -> scalar mean over the batch.

    Example:
        >>> model = Model(nn.Linear(2, 1), F.mse_loss)
        >>> out = model.grad(model.initial, Batch(torch.ones(4, 2), torch.zeros(4, 1)))
        >>> list(out.gradient), out.loss.shape
        (['weight', 'bias'], torch.Size([]))
    """

    def __init__(self, module: nn.Module, loss: Loss = F.cross_entropy) -> None:
        self.anatomy: Anatomy = anatomy_of(module)
        self.initial: Tree = initial_tree(module, self.anatomy)
        self.loss = loss
        self._training = copy.deepcopy(module).train()
        self._predicting = copy.deepcopy(module).eval()
        self._frozen = copy.deepcopy(module).train()
        for layer in self._frozen.modules():
            if isinstance(layer, _BatchNorm):
                layer.eval()

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype everything runs in."""
        return self.initial.flat.dtype

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.initial.flat.device

    def grad(self, weights: Tree, batch: Batch, only: Container[str] | None = None) -> Gradient:
        """Differentiate the mean loss of a batch in training mode; statistics come out as a new tree.

        Args:
            weights: the whole row.
            batch: the examples.
            only: differentiate in these weights alone, which costs less when they are the last layers.

        A batch that carries a validity is one of a stack under `vmap`, which needs `torch.func`; a batch of one
        client goes through ordinary autograd, which takes any module.
        """
        module = self._frozen if batch.frozen else self._training
        weights, x = weights.clone(), batch.x.clone()  # a forward may work in place on what it is given
        before = combine(self.anatomy.buffers, weights)

        def loss_of(parameters: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            buffers = self._buffers(before)
            state = {**fixed, **parameters, **buffers}
            output = functional_call(module, state, (x,))  # leaves in `state` also what the forward replaced
            return self.loss(output, batch.y), {n: state[n] for n in buffers}

        trainable = {n: weights[n] for n in self.anatomy.trainable.names if only is None or n in only}
        fixed = {n: weights[n] for n in self.anatomy.trainable.names if n not in trainable}
        if batch.valid is None:
            self._seed(batch.key)
            leaves = {n: t.detach().requires_grad_() for n, t in trainable.items()}
            loss, after = loss_of(leaves)
            unused = only is not None and not loss.requires_grad  # the forward does not use these weights
            found = (
                tuple(map(torch.zeros_like, leaves.values()))
                if unused
                else torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
            )
            gradients = dict(zip(leaves, found, strict=True))
        else:
            gradients, (loss, after) = grad_and_value(loss_of, has_aux=True)(trainable)
        return Gradient(Tree.of(gradients), self._row(before, after), loss.detach())

    def predict(self, weights: Tree, x: Tensor) -> Tensor:
        """Return the outputs in evaluation mode."""
        outputs: Tensor = functional_call(self._predicting, self.tensors(weights.clone()), (x.clone(),))
        return outputs

    def tensors(self, weights: Tree) -> dict[str, Tensor]:
        """Return a row as the named tensors of the module's ``state_dict``; counters become integers."""
        trainable = {n: weights[n] for n in self.anatomy.trainable.names}
        return {**trainable, **self._buffers(combine(self.anatomy.buffers, weights))}

    def module(self, weights: Tree) -> nn.Module:
        """Return a copy of the user's module that holds these weights, in evaluation mode."""
        module = copy.deepcopy(self._predicting)
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        with torch.no_grad():
            for name, tensor in self.tensors(weights).items():
                own[name].copy_(tensor)
        return module

    def lost_buffers(self, x: Tensor) -> list[str]:
        """Return the buffers that a training pass changes and `grad` does not follow: those that are not floating."""
        module = copy.deepcopy(self._training)
        start = {n: t.clone() for n, t in module.named_buffers() if n not in self.anatomy.buffers.starts}
        with torch.no_grad():
            self._seed(0)
            module(x.clone())
        return [n for n, t in module.named_buffers() if n in start and not torch.equal(t, start[n])]

    def _seed(self, key: int) -> None:
        """Fix what a pass draws (dropout), at a fraction of the cost of seeding every device."""
        torch.default_generator.manual_seed(key)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(key)

    def _buffers(self, row: Tree) -> dict[str, Tensor]:
        """Unpack statistics and counters into tensors of their own, which a forward pass may overwrite."""
        counters = self.anatomy.names("counter")
        return {n: row[n].to(torch.int64).reshape(()) if n in counters else row[n].clone() for n in row.layout.names}

    def _row(self, before: Tree, after: dict[str, Tensor]) -> Tree:
        if not after:
            return before
        found = {n: t.detach().to(self.dtype).reshape(before[n].shape) for n, t in after.items()}
        return overlay(before, Tree.of(found))
