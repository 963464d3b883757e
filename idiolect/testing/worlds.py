"""Small federations on which every method is checked: unequal clients, batch normalization, float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from idiolect.compute.autograd import Model
from idiolect.core.method import Method
from idiolect.core.tree import Tree
from idiolect.core.types import Trees
from idiolect.data import ClientData
from idiolect.engines.base import Engine
from idiolect.engines.federation import Federation
from idiolect.engines.sequential import Sequential
from idiolect.rounds.optim import SGD
from idiolect.rounds.training import Training
from idiolect.storage.memory import Store, keep_in_ram

SIZES = {"ada": 24, "ben": 8, "cleo": 16, "dan": 32}
"""Training examples of each client: whole batches of eight, unequal."""

RAGGED = {"eve": 1, "fay": 21, "gus": 9, "hal": 5, "ida": 21, "jon": 16}
"""Clients with a last batch that is smaller, one that a single example joins, and one with a single example."""


def network(seed: int = 0) -> nn.Module:
    """Return a convolution, batch normalization and two linear layers, smooth (no kink), in float64."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Softplus(), nn.Flatten(), nn.Linear(48, 6), nn.Tanh(), nn.Linear(6, 3)
    )
    return net.double()


class LowRank(nn.Module):
    """A frozen layer with a low-rank adapter, whose tensors have the names that `peft` gives them.

    Args:
        layer: the layer, linear or a convolution.
        rank: rank r of the factors.
        scaling: factor s on the product of the factors.
        dropout: dropout of the input of the adapter.

    Example:
        >>> sorted(LowRank(nn.Linear(3, 4)).state_dict())[:2]
        ['base_layer.bias', 'base_layer.weight']
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int = 2, scaling: float = 1.5, dropout: float = 0.0) -> None:
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        if isinstance(layer, nn.Conv2d):
            shape = layer.kernel_size, layer.stride, layer.padding
            first: nn.Module = nn.Conv2d(layer.in_channels, rank, *shape, bias=False)  # type: ignore[arg-type]
            second: nn.Module = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            first, second = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, False)
        nn.init.zeros_(second.get_parameter("weight"))
        self.lora_A, self.lora_B = nn.ModuleDict({"default": first}), nn.ModuleDict({"default": second})
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(dropout) if dropout else nn.Identity()})
        self.scaling = {"default": scaling}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the frozen layer plus that of the adapter."""
        inner = self.lora_A["default"](self.lora_dropout["default"](x))
        added: torch.Tensor = self.lora_B["default"](inner) * self.scaling["default"]
        out: torch.Tensor = self.base_layer(x) + added
        return out


def adapted(net: nn.Module) -> nn.Module:
    """Return a network with an adapter on its linear layers and convolutions; the last layer and the rest train on."""
    *inner, _ = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    dtype = next(net.parameters()).dtype
    for name, layer in inner:
        net.set_submodule(name, LowRank(layer).to(dtype))
    return net


def fitted(net: nn.Module, method: Method) -> nn.Module:
    """Return a network, with adapters if the method is one for adapters."""
    return adapted(net) if "lora_a" in repr(method) else net


def examples(name: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images that differ between clients in level and scale, with labels that depend on them."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    level, scale = torch.randn(2, generator=generator, dtype=torch.float64)
    x = torch.randn(count, 1, 6, 6, generator=generator, dtype=torch.float64)
    y = (x[:, 0, :2].mean(dim=(1, 2)) * 4 + 1.5).clamp(0, 2.999).long()
    return x * (1 + scale.abs()) + level, y


def population(sizes: dict[str, int] = SIZES, val: bool = False) -> dict[str, ClientData]:
    """Return clients with these many training examples, five test examples and, if asked, validation examples."""
    found = {}
    for k, (name, count) in enumerate(sizes.items()):
        own = examples(name + "?", 3 + 2 * k) if val else None
        found[name] = ClientData(train=examples(name, count), test=examples(name + "!", 5), val=own)
    return found


def sensitive_layers(memory: Tree) -> list[str]:
    """Return the layers that the memory of `flexible_sam` has chosen, the most sensitive first."""
    chosen = [name.partition("/")[2] for name in memory if name.startswith("chosen/") and memory[name] > 0]
    return sorted(chosen, key=lambda name: -float(memory[f"sensitivity/{name}"]))


def federation(
    method: Method,
    clients: dict[str, ClientData] | None = None,
    participation: float = 1.0,
    seed: int = 0,
    engine: Engine | None = None,
    training: Training | None = None,
    keep: Callable[[str, Trees], Store] = keep_in_ram,
) -> Federation:
    """Return a federation of these clients at round 0; torch's random stream is left as it was."""
    settings = training or Training(lr=0.1, local_epochs=2, batch_size=8, optimizer=SGD(momentum=0.5), clip=5.0)
    with torch.random.fork_rng(devices=[]):
        model = Model(fitted(network(), method))
    held = clients or population()
    return Federation(model, method, settings, 4, participation, seed, held, engine or Sequential(), keep)
