"""The structure of a model: every tensor with its kind and the type of its layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from idiolect.core.errors import UsageError
from idiolect.core.tree import Layout, Tree, layout

T = TypeVar("T")

Kind = Literal["weight", "statistic", "counter"]


class Private(nn.Module):
    """A module that a part adds to a client's model: trained with it, and never sent.

    Parameters train like other weights; buffers are state that lasts from step to step. Register buffers with
    ``persistent=False`` to keep them out of the ``state_dict`` of the modules that users get. `nn.Sequential`
    calls all its modules, so a `Private` module returns its input. A buffer that only predictions need is registered
    without values, so that training does not carry it; `deploy` returns it at its full size.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2))
        >>> net.own = Private()
        >>> net.own.shift = nn.Parameter(torch.zeros(3))
        >>> sorted(structure_of(net).exchangeable), "own.shift" in structure_of(net).names("weight")
        (['0.bias', '0.weight'], True)
        >>> net(torch.ones(5, 3)).shape
        torch.Size([5, 2])
    """

    def forward(self, x: T) -> T:
        """Return the input."""
        return x


@dataclass(frozen=True)
class Item:
    """One tensor of a model.

    Attributes:
        name: its name in ``state_dict``.
        shape: its shape.
        kind: ``"weight"`` (trainable), ``"statistic"`` (a floating buffer, such as a running mean), or
            ``"counter"`` (the number of batches that batch normalization has seen).
        module: name of its layer.
        owner: type of its layer.
        private: whether it belongs to a `Private` module.
    """

    name: str
    shape: torch.Size
    kind: Kind
    module: str
    owner: type[nn.Module]
    private: bool = False


@dataclass(frozen=True, eq=False)
class ModelStructure:
    """The tensors of a model that change in federated learning: trainable weights, then statistics, then counters.

    Frozen parameters and integer buffers are constants of the architecture: the same for every client, neither
    trained nor sent. Counters of batches are stored in the row with the others, and are never sent.
    """

    items: tuple[Item, ...]
    has_batch_norm: bool

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
        """Layout of statistics and counters, which a training pass updates."""
        return self.layout.only(self.names("statistic") | self.names("counter"))

    @cached_property
    def exchangeable(self) -> frozenset[str]:
        """Names that may be sent: weights and statistics, without counters and private tensors."""
        return frozenset(i.name for i in self.items if i.kind != "counter" and not i.private)

    def names(self, kind: Kind) -> frozenset[str]:
        """Names of one kind."""
        return frozenset(i.name for i in self.items if i.kind == kind)

    def owned_by(self, *types: type[nn.Module]) -> frozenset[str]:
        """Names whose layer is of one of the types, without counters and private tensors."""
        return frozenset(i.name for i in self.items if issubclass(i.owner, types)) & self.exchangeable


def structure_of(module: nn.Module) -> ModelStructure:
    """Return the structure of a module.

    Raises:
        UsageError: if nothing is trainable, or the model mixes floating dtypes.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> [(i.name, i.kind) for i in structure_of(net).items][-3:]
        [('1.running_mean', 'statistic'), ('1.running_var', 'statistic'), ('1.num_batches_tracked', 'counter')]
    """
    owners = dict(module.named_modules())
    found: list[Item] = []
    hidden = {inner for module in owners.values() if isinstance(module, Private) for inner in module.modules()}
    if any(
        isinstance(t, UninitializedParameter | UninitializedBuffer) for t in [*module.parameters(), *module.buffers()]
    ):
        raise UsageError("the model has lazy layers without shapes yet: call it once on an example first")
    for name, tensor, kind in _tensors(module, owners):
        path = name.rpartition(".")[0].partition(".parametrizations")[0]  # the layer that is parametrized
        shape = tensor.shape if kind != "counter" else packed(tensor, _dtype(module)).shape
        found.append(Item(name, shape, kind, path, type(owners[path]), owners[path] in hidden))
    if not any(i.kind == "weight" for i in found):
        raise UsageError("the model has no trainable parameter: set requires_grad on those to train")
    moving = {i.name for i in found if i.kind != "counter"}
    dtypes = {t.dtype for n, t in [*module.named_parameters(), *module.named_buffers()] if n in moving}
    if len(dtypes) > 1:
        raise UsageError(f"the model mixes {sorted(map(str, dtypes))}: make it one dtype, e.g. model.float()")
    order: tuple[Kind, ...] = ("weight", "statistic", "counter")
    in_order = tuple(sorted(found, key=lambda i: order.index(i.kind)))
    return ModelStructure(in_order, any(isinstance(m, _BatchNorm) for m in owners.values()))


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


def _tensors(module: nn.Module, owners: dict[str, nn.Module]) -> list[tuple[str, torch.Tensor, Kind]]:
    found: list[tuple[str, torch.Tensor, Kind]] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            found.append((name, parameter, "weight"))
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            found.append((name, buffer, "statistic"))
        elif isinstance(owners[name.rpartition(".")[0]], _BatchNorm):
            found.append((name, buffer, "counter"))
    return found


def initial_tree(module: nn.Module, structure: ModelStructure) -> Tree:
    """Return a copy of a module's current tensors as one row, in the dtype of its weights."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    found, dtype = [(i.kind, tensors[i.name].detach()) for i in structure.items], _dtype(module)
    rows = [packed(t, dtype) if kind == "counter" else t.to(dtype).reshape(-1) for kind, t in found]
    return Tree(structure.layout, torch.cat(rows))
