"""The structure of a model: every tensor with its kind and the type of its layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from idiolect.core.adapters import Factor, factor_of
from idiolect.core.errors import UsageError
from idiolect.core.makers import Makers, makers_in_graph
from idiolect.core.normalization import normalizes, normalizes_by_batch, running_statistics
from idiolect.core.tree import Layout, Tree, layout

T = TypeVar("T")

Kind = Literal["weight", "statistic", "state", "counter"]

TRIAL = "_idiolect_trial"
"""The attribute of a module under which the trial is while parts attach their modules."""


class Private(nn.Module):
    """A module that a part adds to a client's model: trained with it, and never sent.

    Parameters train like other weights; buffers are state that lasts from step to step. Register buffers with
    ``persistent=False`` to keep them out of the ``state_dict`` of the modules that users get. `nn.Sequential`
    calls all its modules, so a `Private` module returns its input. A buffer that only predictions need is registered
    without values, so that training does not carry it; `deploy` returns it at its full size, and it is then in the
    ``state_dict``.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2))
        >>> net.own = Private()
        >>> net.own.shift = nn.Parameter(torch.zeros(3))
        >>> sorted(structure_of(net).exchangeable), "own.shift" in structure_of(net).names("weight")
        (['0.bias', '0.weight'], True)
        >>> net(torch.ones(5, 3)).shape
        torch.Size([5, 2])
    """

    added_by_a_part = True

    def forward(self, x: T) -> T:
        """Return the input."""
        return x


class Attached(nn.Module):
    """A module that a part adds to a layer of a client's model, and that is exchanged.

    The name of the layer does not stand for it: `named` selects the user's own tensors.
    """

    added_by_a_part = True


@dataclass(frozen=True)
class Item:
    """One tensor of a model.

    Attributes:
        name: its name in ``state_dict``.
        shape: its shape.
        kind: ``"weight"`` (trainable), ``"statistic"`` (a running mean or variance of a normalization layer),
            ``"state"`` (another buffer that a training pass changes, such as the vectors of spectral normalization:
            the client's own), or ``"counter"`` (the number of batches that batch normalization has seen).
        module: name of its layer.
        owner: type of its layer.
        private: whether it belongs to a `Private` module.
        dtype: its dtype, if it is no floating tensor; all others have that of the model.
        normalization: whether its layer normalizes.
        attached: whether it belongs to an `Attached` module.
        factor: which factor of a LoRA layer it belongs to.
    """

    name: str
    shape: torch.Size
    kind: Kind
    module: str
    owner: type[nn.Module]
    private: bool = False
    dtype: torch.dtype | None = None
    normalization: bool = False
    attached: bool = False
    factor: Factor = ""


@dataclass(frozen=True)
class Trial:
    """What passes over examples have shown of a model.

    Attributes:
        makers: what makes its output.
        changed: names of the buffers that a training pass changes.
    """

    makers: Makers
    changed: frozenset[str]


@dataclass(frozen=True, eq=False)
class ModelStructure:
    """The tensors of a model that change in federated learning: weights, then statistics, state and counters.

    Frozen parameters, and buffers that training does not change, are constants of the architecture: the same for
    every client, neither trained nor sent, of any dtype and with any values. State and counters of batches are stored
    in the row with the others, and are never sent.

    Attributes:
        items: the tensors.
        has_batch_norm: whether a layer normalizes by the statistics of a batch.
        aliases: other names of tensors that have several names (tied weights), and the first name of each.
        source: what shows what makes the output: a trial, or the module, which is traced when it is asked for.
    """

    items: tuple[Item, ...]
    has_batch_norm: bool
    aliases: Mapping[str, str]
    source: Trial | nn.Module

    @cached_property
    def makers(self) -> Makers:
        """What makes the output of the model."""
        return self.source.makers if isinstance(self.source, Trial) else makers_in_graph(self.source)

    @property
    def head(self) -> str:
        """Name of the one layer that makes the output.

        Raises:
            UsageError: if it is not clear which layer that is.
        """
        found = [*self.makers.layers, *self.makers.tensors]
        if len(self.makers.layers) == 1 == len(found):
            return found[0]
        why = f"{' and '.join(found[:4])} make it together" if found else "a trace without examples does not show it"
        linear = [i.module for i in self.items if issubclass(i.owner, nn.Linear)]
        name = (found or linear or ["classifier"])[-1]
        raise UsageError(f"no single layer makes the model's output ({why}): name the head, names=named({name!r})")

    def tensors_of(self, layer: str) -> frozenset[str]:
        """Return the names of a layer's own trainable tensors."""
        own = {i.name for i in self.items if i.module == layer and i.kind == "weight"}
        tied = {name for alias, name in self.aliases.items() if alias.rpartition(".")[0] == layer}
        return frozenset(own | tied & self.names("weight"))

    def first_name(self, name: str) -> str:
        """Return the name under which a tensor is in the row, which differs for tied weights."""
        return self.aliases.get(name, name)

    @cached_property
    def layout(self) -> Layout:
        """Layout of all tensors."""
        return layout(tuple(i.name for i in self.items), tuple(i.shape for i in self.items))

    @cached_property
    def trainable(self) -> Layout:
        """Layout of the trainable weights."""
        return self.layout.only(self.names("weight"))

    @cached_property
    def buffers(self) -> Layout:
        """Layout of statistics, state and counters, which a training pass updates."""
        return self.layout.only(frozenset(self.layout.names) - self.names("weight"))

    @cached_property
    def integers(self) -> Mapping[str, torch.dtype]:
        """Buffers that are no floating tensors in the module, and their dtypes there."""
        return {i.name: i.dtype for i in self.items if i.dtype is not None}

    @cached_property
    def exchangeable(self) -> frozenset[str]:
        """Names that may be sent: weights and statistics, without private tensors."""
        return frozenset(i.name for i in self.items if i.kind in ("weight", "statistic") and not i.private)

    @cached_property
    def own_state(self) -> frozenset[str]:
        """Names of the buffers of the user's module that training changes, and that stay with each client."""
        return frozenset(i.name for i in self.items if i.kind == "state" and not i.private)

    @cached_property
    def normalization(self) -> frozenset[str]:
        """Names of exchangeable tensors of normalization layers."""
        return frozenset(i.name for i in self.items if i.normalization) & self.exchangeable

    def names(self, kind: Kind) -> frozenset[str]:
        """Names of one kind."""
        return frozenset(i.name for i in self.items if i.kind == kind)

    def owned_by(self, *types: type[nn.Module]) -> frozenset[str]:
        """Names whose layer is of one of the types, without counters and private tensors."""
        return frozenset(i.name for i in self.items if issubclass(i.owner, types)) & self.exchangeable


def structure_of(module: nn.Module, trial: Trial | None = None) -> ModelStructure:
    """Return the structure of a module.

    Args:
        module: the module.
        trial: what passes over examples have shown. Without it, floating buffers outside of normalization layers are
            the client's state if they have the dtype of the weights, and the head is found by a symbolic trace when
            it is asked for.

    Raises:
        UsageError: if nothing is trainable, or the model mixes floating dtypes.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> [(i.name, i.kind) for i in structure_of(net).items][-3:]
        [('1.running_mean', 'statistic'), ('1.running_var', 'statistic'), ('1.num_batches_tracked', 'counter')]
    """
    trial = trial or getattr(module, TRIAL, None)
    if any(
        isinstance(t, UninitializedParameter | UninitializedBuffer) for t in [*module.parameters(), *module.buffers()]
    ):
        raise UsageError("the model has lazy layers without shapes yet: call it once on an example first")
    found = _items(module, trial)
    if not any(i.kind == "weight" for i in found):
        raise UsageError("the model has no trainable parameter: set requires_grad on those to train")
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    dtypes = {tensors[i.name].dtype for i in found if i.dtype is None}
    if len(dtypes) > 1:
        raise UsageError(f"the model mixes {sorted(map(str, dtypes))}: make it one dtype, e.g. model.float()")
    order: tuple[Kind, ...] = ("weight", "statistic", "state", "counter")
    in_order = tuple(sorted(found, key=lambda i: order.index(i.kind)))
    by_batch = any(normalizes_by_batch(m) for m in module.modules())
    return ModelStructure(in_order, by_batch, _aliases(module), trial or module)


_DIGITS, _BITS = 4, 8


def packed(count: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a count of batches as numbers in a row: itself, or in bfloat16 and float16 its four digits in base 256.

    The largest whole number that bfloat16 counts to is 256.

    Example:
        >>> packed(torch.tensor(1000), torch.float32), packed(torch.tensor(1000), torch.bfloat16).tolist()
        (tensor([1000.]), [232.0, 3.0, 0.0, 0.0])
    """
    if dtype.itemsize > 2:
        return count.to(dtype).reshape(1)
    return torch.stack([(count >> _BITS * k) % (1 << _BITS) for k in range(_DIGITS)]).to(dtype)


def unpacked(row: torch.Tensor) -> torch.Tensor:
    """Return the count, () int64, that `packed` put into a row."""
    digits = row.to(torch.int64)
    if len(row) == 1:
        return digits.reshape(())
    return sum((digits[k] << _BITS * k for k in range(1, _DIGITS)), digits[0])


def _dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of the trainable weights."""
    return next((p.dtype for p in module.parameters() if p.requires_grad), torch.float32)


def _items(module: nn.Module, trial: Trial | None) -> list[Item]:
    owners = dict(module.named_modules())
    hidden = {inner for layer in owners.values() if isinstance(layer, Private) for inner in layer.modules()}
    found: list[Item] = []
    trained = [p.dtype for p in module.parameters() if p.requires_grad]

    def add(name: str, tensor: torch.Tensor, kind: Kind) -> None:
        path = name.rpartition(".")[0].partition(".parametrizations")[0]  # the layer that is parametrized
        owner, shape = owners[path], tensor.shape if kind != "counter" else packed(tensor, _dtype(module)).shape
        dtype = None if tensor.is_floating_point() else tensor.dtype
        about = (dtype, normalizes(owner), isinstance(owner, Attached), factor_of(name, owners))
        found.append(Item(name, shape, kind, path, type(owner), owner in hidden, *about))

    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            add(name, parameter, "weight")
    for name, buffer in module.named_buffers():
        path, _, leaf = name.rpartition(".")
        kind = _kind_of(owners[path], leaf, buffer)
        if kind is None:
            private = owners[path] in hidden
            changes = name in trial.changed if trial and not private else buffer.dtype in trained
            kind = "state" if changes else None
        if kind:
            add(name, buffer, kind)
    return found


def _kind_of(owner: nn.Module, leaf: str, buffer: torch.Tensor) -> Kind | None:
    """Return the kind of a buffer of a normalization layer, or None: then a trial shows it."""
    if leaf in running_statistics(owner):
        return "statistic"
    return "counter" if isinstance(owner, _NormBase) and not buffer.is_floating_point() else None


def _aliases(module: nn.Module) -> dict[str, str]:
    first = {id(p): n for n, p in module.named_parameters()}
    every = module.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in every if first[id(p)] != name}


def initial_tree(module: nn.Module, structure: ModelStructure) -> Tree:
    """Return a copy of a module's current tensors as one row, in the dtype of its weights."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    found, dtype = [(i.kind, tensors[i.name].detach()) for i in structure.items], _dtype(module)
    rows = [packed(t, dtype) if kind == "counter" else t.to(dtype).reshape(-1) for kind, t in found]
    return Tree(structure.layout, torch.cat(rows))
