"""The world an oracle is given, what it leaves behind, and the few steps all oracles have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Literal, NotRequired, Required, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

State = dict[str, Tensor]
Batches = Sequence[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]
Direction = Callable[[nn.Module, Tensor, Tensor, State], State]
"""``direction(model, x, y, received)``: what a local step subtracts, times lr, from each trainable tensor."""
Kind = Literal["all", "affine", "statistics"]


class Local(TypedDict, total=False):
    """How a client trains.

    Attributes:
        momentum: of ``torch.optim.SGD``, which is created afresh each round; 0 if not given.
        weight_decay: of ``torch.optim.SGD``: added to the clipped direction; 0 if not given.
        clip: bound on the norm of the final direction over all tensors trained; none if not given.
        loss: ``loss(model(x), y)`` of one batch; mean cross-entropy if not given.
    """

    momentum: float
    weight_decay: float
    clip: float
    loss: Loss


class World(Local):
    """What every method is given, by keyword.

    Attributes:
        model: initial weights and statistics of the server and of every client; it is copied.
        batches: ``batches(round, client)`` lists that client's batches (x, y), all local epochs in order.
        clients: number of clients N.
        rounds: number of rounds.
        lr: one learning rate, or one per round.
        weights: weight of each client in the averages; made to sum to 1 over each cohort.
        cohorts: the clients of each round; all of them if not given.
        shared: names of the exchanged tensors; :func:`everything` if not given.
    """

    model: Required[nn.Module]
    batches: Required[Callable[[int, int], Batches]]
    clients: Required[int]
    rounds: Required[int]
    lr: Required[float | Sequence[float]]
    weights: Required[Sequence[float]]
    cohorts: NotRequired[Sequence[Sequence[int]]]
    shared: NotRequired[Iterable[str]]


@dataclass
class OracleResult:
    """What a method left behind, each list with one entry per round.

    Attributes:
        shared: the exchanged tensors after the merge.
        deployed: per client, the state dict that predicts for it: its own tensors and the newest shared ones.
        pseudo_gradient: Δ of MoFedSAM and FedFSA as sent in the next round.
        top: per client, the tensors FedFSA perturbs with the larger radius when it next takes part.
    """

    shared: list[State] = field(default_factory=list)
    deployed: list[list[State]] = field(default_factory=list)
    pseudo_gradient: list[State] = field(default_factory=list)
    top: list[list[list[str]]] = field(default_factory=list)

    @property
    def personal(self) -> list[State]:
        """The state dict that predicts for each client after the last round."""
        return self.deployed[-1]


def everything(model: nn.Module) -> list[str]:
    """Names of all weights and statistics except ``num_batches_tracked``, which is never exchanged."""
    return [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]


def batch_norm_names(model: nn.Module, kind: Kind = "all") -> list[str]:
    """Names of the exchangeable tensors of the BatchNorm layers, found by module type.

    Example:
        >>> batch_norm_names(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), "statistics")
        ['1.running_mean', '1.running_var']
    """
    affine, statistics = ("weight", "bias"), ("running_mean", "running_var")
    leaves = {"all": affine + statistics, "affine": affine, "statistics": statistics}[kind]
    layers = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    wanted = {f"{layer}.{leaf}" if layer else leaf for layer in layers for leaf in leaves}
    return [name for name in everything(model) if name in wanted]


def outside_batch_norm(model: nn.Module, kind: Kind = "all") -> list[str]:
    """Names of everything exchangeable but :func:`batch_norm_names` of that kind."""
    inside = batch_norm_names(model, kind)
    return [name for name in everything(model) if name not in inside]


def trainable(model: nn.Module) -> State:
    """The tensors that require a gradient, by name (the model's own, not copies)."""
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}


def gradient(model: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> State:
    """Gradient of the loss of one batch; a model in train mode also moves its running statistics."""
    tensors = trainable(model)
    return dict(zip(tensors, torch.autograd.grad(loss(model(x), y), list(tensors.values())), strict=True))


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all tensors taken as one vector."""
    return torch.stack([(tensor**2).sum() for tensor in tensors]).sum().sqrt()


def copy_of(model: nn.Module, names: Iterable[str]) -> State:
    """Copies of the named tensors of a model."""
    state = model.state_dict()
    return {name: state[name].clone() for name in names}


def receive(model: nn.Module, received: State) -> None:
    """Overwrite a model's tensors of these names."""
    state = model.state_dict()
    for name, tensor in received.items():
        state[name].copy_(tensor)


def local_training(
    model: nn.Module, batches: Batches, lr: float, direction: Direction, received: State, how: Local
) -> None:
    """Train a model in place: one step of SGD along ``direction`` for every batch."""
    if not batches:
        raise ValueError("a client has no batches: leave it out of the cohort")
    tensors, clip = trainable(model), how.get("clip")
    momentum, weight_decay = how.get("momentum", 0.0), how.get("weight_decay", 0.0)
    optimizer = torch.optim.SGD(tensors.values(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    model.train()
    for x, y in batches:
        step = direction(model, x, y, received)
        scale = 1.0 if clip is None else min(1.0, clip / (float(norm(step.values())) + 1e-6))
        for name, tensor in tensors.items():
            tensor.grad = scale * step[name]
        optimizer.step()


def average(models: Sequence[nn.Module], weights: Sequence[float], names: Iterable[str]) -> State:
    """Weighted mean of the named tensors over models; the weights are made to sum to 1."""
    states, total = [model.state_dict() for model in models], sum(weights)
    mean = {}
    for name in names:
        mean[name] = torch.zeros_like(states[0][name])
        for state, weight in zip(states, weights, strict=True):
            mean[name] += weight / total * state[name]
    return mean


def deployed(models: Sequence[nn.Module], shared: State) -> list[State]:
    """For each client, copies of its own tensors and the newest shared ones."""
    return [{**copy_of(m, [name for name in m.state_dict() if name not in shared]), **shared} for m in models]


def start(world: World) -> tuple[list[nn.Module], State]:
    """One copy of the model per client, and the shared tensors."""
    lengths = {"weights": world["clients"], "cohorts": world["rounds"], "lr": world["rounds"]}
    for what, length in lengths.items():
        given = world.get(what)
        if isinstance(given, Sequence) and len(given) != length:
            raise ValueError(f"{what} has {len(given)} entries: give {length}")
    models = [deepcopy(world["model"]) for _ in range(world["clients"])]
    return models, copy_of(world["model"], world.get("shared", everything(world["model"])))


def cohort_of(world: World, t: int) -> Sequence[int]:
    """The clients of round ``t``."""
    return world["cohorts"][t] if "cohorts" in world else range(world["clients"])


def lr_of(world: World, t: int) -> float:
    """The learning rate of round ``t``."""
    lr = world["lr"]
    return lr[t] if isinstance(lr, Sequence) else lr


def loss_of(world: Local) -> Loss:
    """The loss of one batch."""
    return world.get("loss", F.cross_entropy)
