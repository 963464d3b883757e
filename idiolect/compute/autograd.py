"""A module as pure functions of a tree: gradient, predictions and queries, by autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from idiolect.compute.forward import Features, about, axis_of, call, inside, loss_with, rows_of
from idiolect.compute.losses import Loss, is_plain_cross_entropy, stacked_cross_entropy
from idiolect.core.copied import copied
from idiolect.core.nest import Nest, arguments, cloned, logits, mapped
from idiolect.core.normalization import normalizes_by_batch
from idiolect.core.structure import TRIAL, ModelStructure, Trial, initial_tree, packed, structure_of, unpacked
from idiolect.core.tree import Tree, combine, counting, layout
from idiolect.core.types import Batch, Gradient, Lockstep, Objective, Pass, Query, Seen, Step
from idiolect.data.seeding import seed_pass

T = TypeVar("T")

Forward = Callable[[dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]
"""Weights -> the loss, and the buffers after the pass."""


class Model:
    """A user's module and its loss, as pure functions. The module is not changed.

    Args:
        module: any `torch.nn.Module`; its current weights are the initial weights.
        loss: (output, target) -> scalar mean over the batch.
        device: device of all computation; None for that of the module.
        mixed: run forward passes in bfloat16 where PyTorch's autocast considers it safe; weights keep their dtype.

    Attributes:
        home: device of the user's module.
        training, predicting: copies of the module, in training and in evaluation mode.

    Example:
        >>> model = Model(nn.Linear(2, 1), F.mse_loss)
        >>> out = model.grad(model.initial, Batch(torch.ones(4, 2), torch.zeros(4, 1)))
        >>> list(out.gradient), out.loss.shape
        (['weight', 'bias'], torch.Size([]))
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Loss = F.cross_entropy,
        device: torch.device | None = None,
        mixed: bool = False,
    ) -> None:
        self.home, self.mixed = next((p.device for p in module.parameters()), torch.device("cpu")), mixed
        module = copied(module).to(device or self.home)
        self.structure: ModelStructure = structure_of(module)
        self.initial: Tree = initial_tree(module, self.structure)
        self.loss = loss
        self.training, self._frozen = copied(module).train(), copied(module).train()
        self.predicting = module.eval()
        for layer in self._frozen.modules():
            if normalizes_by_batch(layer):
                layer.eval()

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of all weights and inputs."""
        return self.initial.flat.dtype

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.initial.flat.device

    @property
    def way(self) -> str:
        """How gradients are computed, for the record of a run."""
        return "autograd in bfloat16" if self.mixed else "autograd"

    @property
    def descend(self) -> None:
        """None: the reference has no faster plain step than its gradient."""
        return None

    def extended(self, attach: Sequence[Callable[[nn.Module], None]]) -> Model:
        """Return the model after the parts of a method have attached their modules.

        What is attached already is not attached again.
        """
        if not attach:
            return self
        module, before = self.module(self.initial).train(), len(self.structure.items)
        known = self.structure.source if isinstance(self.structure.source, Trial) else None
        setattr(module, TRIAL, known)  # for the functions of parts, which are given the module alone
        for add in attach:
            add(module)
        delattr(module, TRIAL)
        if len(structure_of(module, known).items) == before:
            return self
        twin = Model(module, self.loss, self.device, self.mixed)
        twin.home = self.home
        return twin.after(known) if known else twin

    def with_loss(self, loss: Loss) -> Model:
        """Return the same model with another loss."""
        twin = copy.copy(self)
        twin.loss = loss
        return twin

    def after(self, trial: Trial) -> Model:
        """Return the same model, whose structure is what a trial has shown."""
        twin = copy.copy(self)
        twin.structure = structure_of(self.predicting, trial)
        twin.initial = initial_tree(self.predicting, twin.structure)
        return twin

    @torch.inference_mode(False)
    def grad(
        self,
        weights: Tree,
        step: Step,
        only: Container[str] | None = None,
        objectives: Sequence[Objective] = (),
    ) -> Gradient:
        """Return the gradient of the mean loss of a batch in training mode, and statistics as a new tree.

        Args:
            weights: the whole row; a stack of rows for a step of a stack.
            step: the examples.
            only: differentiate in these weights only, which costs less when they are the last layers.
            objectives: losses of parts, the first outermost.

        A batch of one client uses ordinary autograd, which takes any module; a stack uses `torch.func`, which does
        not take some modules.
        """
        if isinstance(step, Lockstep):
            return self._in_step(weights, step, only, objectives)
        self._seed(step.key)
        row = weights.clone()  # a forward pass may change its inputs in place
        trainable, forward = self._forward(row, cloned(step.x), cloned(step.y), step.frozen, only, objectives)
        leaves = {n: t.detach().requires_grad_() for n, t in trainable.items()}
        loss, after = forward(leaves)
        unused = only is not None and not loss.requires_grad  # the forward pass does not use these weights
        found = (
            tuple(map(torch.zeros_like, leaves.values()))
            if unused
            else torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        )
        return Gradient(Tree.of(dict(zip(leaves, found, strict=True))), self._row(row, after), loss.detach())

    def _in_step(
        self, weights: Tree, step: Lockstep, only: Container[str] | None, objectives: Sequence[Objective]
    ) -> Gradient:
        """Return the gradient of a stack, group by group; rows that do not take the step have gradient zero."""
        where = self.structure.trainable if only is None else self.structure.trainable.only(only)
        stack = len(weights.flat)
        parts = [
            self._group(
                weights.flat[g.rows],
                g.batch,
                step.frozen or g.batch.frozen,
                only,
                [rows_of(o, g.rows) for o in objectives],
            )
            for g in step.groups
        ]
        if step.live < stack:
            idle = weights.flat[step.live :]
            buffers = combine(self.structure.buffers, Tree(weights.layout, idle)).flat
            parts.append((idle.new_zeros(len(idle), where.total), buffers, idle.new_zeros(len(idle))))
        gradient, buffers, loss = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        return Gradient(Tree(where, gradient), Tree(self.structure.buffers, buffers), loss)

    def _group(
        self,
        rows: Tensor,
        batch: Batch,
        frozen: bool,
        only: Container[str] | None,
        objectives: Sequence[Objective],
    ) -> tuple[Tensor, Tensor, Tensor]:
        def one(flat: Tensor, x: Nest, y: Nest, *facts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            row = Tree(self.structure.layout, flat.clone())
            own = [o._replace(facts=Tree(o.facts.layout, f)) for o, f in zip(objectives, facts, strict=True)]
            trainable, forward = self._forward(row, cloned(x), y, frozen, only, own, stacked=True)
            gradient, (loss, after) = grad_and_value(forward, has_aux=True)(trainable)
            return Tree.of(gradient).flat, self._row(row, after).flat, loss

        facts = [o.facts.flat for o in objectives]
        return vmap(one, in_dims=(0, 0, 0, *map(axis_of, facts)))(rows, batch.x, batch.y, *facts)

    def _forward(
        self,
        row: Tree,
        x: Nest,
        y: Nest,
        frozen: bool,
        only: Container[str] | None,
        objectives: Sequence[Objective],
        stacked: bool = False,
    ) -> tuple[dict[str, Tensor], Forward]:
        """Return the weights to differentiate in, and a function from them to loss and buffers."""
        module = self._frozen if frozen else self.training
        trainable = {n: row[n] for n in self.structure.trainable.names if only is None or n in only}
        fixed = {n: row[n] for n in self.structure.trainable.names if n not in trainable}
        by_class = stacked and is_plain_cross_entropy(self.loss) and not y.is_floating_point() and y.dim() == 1
        loss_of = stacked_cross_entropy if by_class else self.loss
        alone, named = arguments(x)

        def plain(weights: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            buffers = self._buffers(row)
            state = {**fixed, **weights, **buffers}
            with self._precision():
                output = functional_call(module, state, alone, named)  # then `state` has the buffers that it replaced
            return loss_of(self._full(output), y), {n: state[n] for n in buffers}

        def with_objectives(weights: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            buffers = self._buffers(row)
            state = {**fixed, **weights, **buffers}

            def loss(seen: Callable[[str], Pass], outputs: Nest) -> Tensor:
                return loss_with(objectives, loss_of, seen, outputs, y)

            before = {**state, **{n: row[n] for n in buffers}}  # a forward pass may change its inputs in place
            found, after = self._inside(module, state, before, x, [o.layer for o in objectives], loss)
            return found, {n: after[n] for n in buffers}

        return trainable, with_objectives if objectives else plain

    def _inside(
        self,
        module: nn.Module,
        state: dict[str, Tensor],
        before: Mapping[str, Tensor],
        x: Nest,
        layers: Sequence[str],
        then: Callable[..., T],
    ) -> tuple[T, dict[str, Tensor]]:
        """Run a module with these tensors, then a function of the pass; `before` are the tensors that parts see."""

        def under(layer: str, other: Mapping[str, Tensor]) -> Seen:
            def own(outputs: Nest, features: Features) -> Seen:
                return Seen(self._full(logits(outputs)), self._full(features[layer]))

            whole = {n: other.get(n, t).clone() for n, t in before.items()}
            with self._precision():
                return inside(self.predicting, whole, x, [layer], own)[0]

        def seen(outputs: Nest, features: Features) -> T:
            outputs, full = self._full(outputs), {n: self._full(f) for n, f in features.items()}
            with torch.autocast(self.device.type, enabled=False):  # parts compute in full precision
                return then(about(module, before, logits(outputs), full, under), outputs)

        with self._precision():
            return inside(module, state, x, layers, seen)

    def observe(self, weights: Tree, step: Step, query: Query) -> Tree:
        """Return the sums of a query over a batch, in evaluation mode, without autograd; for a stack one row each.

        Args:
            weights: the whole row; a stack of rows for a step of a stack.
            step: the examples.
            query: the query.
        """

        def one(flat: Tensor, x: Nest, y: Nest, facts: Tensor) -> Tensor:
            state = self.tensors(Tree(self.structure.layout, flat.clone()))
            own = Tree(query.facts.layout, facts)

            def sums(seen: Callable[[str], Pass], _: Nest) -> Mapping[str, Tensor]:
                return query.sums(seen(query.layer), y, own)

            return Tree.of(self._inside(self.predicting, state, state, cloned(x), [query.layer], sums)[0]).flat

        where = layout(tuple(query.shapes), tuple(map(torch.Size, query.shapes.values())))
        with torch.no_grad():
            if not isinstance(step, Lockstep):
                return Tree(where, one(weights.flat, step.x, step.y, query.facts.flat))
            total = weights.flat.new_zeros(len(weights.flat), where.total, dtype=counting(self.dtype))
            for rows, batch in step.groups:
                facts = rows_of(query, rows).facts.flat
                total[rows] = vmap(one, in_dims=(0, 0, 0, axis_of(facts)))(weights.flat[rows], batch.x, batch.y, facts)
            return Tree(where, total)

    def copy(self) -> Model:
        """Return the same model with its own modules, for another thread: a module serves one thread at a time."""
        twin = copy.copy(self)
        twin.training, twin.predicting, twin._frozen = (
            copied(m) for m in (self.training, self.predicting, self._frozen)
        )
        return twin

    def predict(self, weights: Tree, x: Nest) -> Nest:
        """Return the outputs in evaluation mode."""
        with self._precision():
            outputs = functional_call(self.predicting, self.tensors(weights.clone()), *arguments(cloned(x)))
        return self._full(outputs)

    def tensors(self, weights: Tree) -> dict[str, Tensor]:
        """Return a row as the named tensors of the module's ``state_dict``; counters become integers."""
        trainable = {n: weights[n] for n in self.structure.trainable.names}
        return {**trainable, **self._buffers(weights)}

    def module(self, weights: Tree) -> nn.Module:
        """Return a copy of the user's module with these weights, in evaluation mode."""
        module = copied(self.predicting)
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        with torch.no_grad():
            for name, tensor in self.tensors(weights).items():
                if own[name].shape != tensor.shape:  # a buffer that only predictions need: it enters the state_dict
                    owner, _, leaf = name.rpartition(".")
                    module.get_submodule(owner)._non_persistent_buffers_set.discard(leaf)
                    own[name].resize_(tensor.shape)
                own[name].copy_(tensor)
        return module

    def statistics(self, weights: Tree, x: Nest, correction: int = 0) -> Tree:
        """Return mean and variance of the inputs of each layer of batch normalization, with x as one batch.

        Batch normalization uses the statistics of this batch; all other layers are in evaluation mode. For a layer
        that is called several times the result is the mean over its calls; a layer that is not called is left out.

        Args:
            weights: the whole row, (P,).
            x: (b, ...) inputs, at least two.
            correction: 0 divides the variance by the number n of values, as in the normalization of a batch; 1 divides
                it by n - 1, as in PyTorch's running variances.

        Returns:
            A tree with the names of running means and variances.
        """
        module, seen = self.module(weights), dict[str, list[Tensor]]()

        def note(name: str, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            over = [axis for axis in range(given[0].dim()) if axis != 1]
            moments = torch.var_mean(given[0], over, correction=correction)
            for leaf, moment in zip(("running_var", "running_mean"), moments, strict=True):
                seen.setdefault(f"{name}.{leaf}" if name else leaf, []).append(moment)

        for name, layer in module.named_modules():
            if isinstance(layer, _BatchNorm) and layer.track_running_stats:
                layer.training = True  # not what a part has attached to it
                layer.register_forward_pre_hook(partial(note, name))
        with torch.no_grad():
            call(module, cloned(x))
        return Tree.of({name: torch.stack(calls).mean(dim=0) for name, calls in seen.items()})

    def run(self, module: nn.Module, x: Nest, key: int = 0) -> Nest:
        """Return what a module, such as a copy of one of this model's, makes of inputs."""
        self._seed(key)
        with self._precision():
            return call(module, cloned(x))

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed)

    def _full(self, output: T) -> T:
        """Return outputs in the dtype of the weights."""
        if not self.mixed:
            return output
        full: T = mapped(lambda t: t.to(self.dtype) if t.is_floating_point() else t, output)
        return full

    def _seed(self, key: int) -> None:
        """Seed the random numbers of a pass (dropout), which costs much less than seeding every device."""
        seed_pass(key)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(key)

    def _buffers(self, row: Tree) -> dict[str, Tensor]:
        """Return copies of the buffers in a row, which a forward pass may overwrite."""
        counters, integers = self.structure.names("counter"), self.structure.integers

        def buffer(name: str) -> Tensor:
            if name in counters:
                return unpacked(row[name])
            return row[name].to(integers[name]) if name in integers else row[name].clone()

        return {name: buffer(name) for name in self.structure.buffers.names}

    def _row(self, row: Tree, after: dict[str, Tensor]) -> Tree:
        """Return the buffers after a pass as a tree."""
        if not after:
            return combine(self.structure.buffers, row)
        counters = self.structure.names("counter")
        return Tree.of(
            {n: packed(t, self.dtype) if n in counters else t.detach().to(self.dtype) for n, t in after.items()}
        )


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return a module whose random weights depend only on the seed; torch's random stream is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
