"""Textbook loops of methods whose clients receive weights that a network of the server generates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from idiolect.testing.oracles.common import (
    OracleResult,
    State,
    World,
    average,
    cohort_of,
    copy_of,
    deployed,
    gradient,
    local_training,
    loss_of,
    lr_of,
    receive,
    start,
)


class Hypernetwork(nn.Module):
    """A vector of a client to named tensors: four linear layers with ReLU between, then one linear layer for each.

    Args:
        size: length of a vector.
        width: of the layers.
        shapes: shapes of the tensors by name.
    """

    def __init__(self, size: int, width: int, shapes: dict[str, torch.Size]) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(size, width)]
        for _ in range(3):
            layers += [nn.ReLU(), nn.Linear(width, width)]
        self.mlp = nn.Sequential(*layers)
        self.outputs = nn.ModuleList(nn.Linear(width, shape.numel()) for shape in shapes.values())
        self.shapes = shapes

    def forward(self, vector: Tensor) -> State:
        """Return the tensors."""
        features = self.mlp(vector)
        pairs = zip(self.outputs, self.shapes.items(), strict=True)
        return {name: output(features).view(shape) for output, (name, shape) in pairs}


def pfedhn(
    hypernetwork: Hypernetwork,
    vectors: Sequence[Tensor],
    lr_server: float,
    momentum_server: float,
    decay_server: float,
    clip_server: float | None,
    **world: Unpack[World],
) -> OracleResult:
    """pFedHN: one step of SGD on the mean over the cohort of (∂θ_i / ∂(φ, v))ᵀ (θ_i − θ_i after training).

    The vector of a client moves, with a momentum of its own and without decay, when the client takes part. What is not
    generated is the client's own, or shared.

    Args:
        hypernetwork: φ at first; it is trained in place.
        vectors: v of each client at first.
        lr_server: learning rate of the server.
        momentum_server: its momentum.
        decay_server: its weight decay, of φ alone.
        clip_server: bound on the norm of the gradient in φ and all v together.
        world: see :class:`World`.

    Reference: Shamsian et al., ICML 2021, algorithm 1, with the sign of the authors' code.
    """
    models, shared = start(world)
    own = [nn.Parameter(vector.clone()) for vector in vectors]
    phi = list(hypernetwork.parameters())
    optimizer = torch.optim.SGD(phi, lr=lr_server, momentum=momentum_server, weight_decay=decay_server)
    optimizers = [torch.optim.SGD([v], lr=lr_server, momentum=momentum_server) for v in own]
    result = OracleResult()
    for t in range(world["rounds"]):
        cohort = cohort_of(world, t)
        optimizer.zero_grad()
        for i in cohort:
            optimizers[i].zero_grad()
            generated = hypernetwork(own[i])
            sent = {name: tensor.detach().clone() for name, tensor in generated.items()}
            receive(models[i], shared | sent)
            local_training(
                models[i],
                world["batches"](t, i),
                lr_of(world, t),
                lambda model, x, y, _: gradient(model, x, y, loss_of(world)),
                shared,
                world,
            )
            after = copy_of(models[i], sent)
            back = [(sent[name] - after[name]) / len(cohort) for name in sent]
            torch.autograd.backward(list(generated.values()), back)
        if clip_server is not None:
            nn.utils.clip_grad_norm_([*phi, *(own[i] for i in cohort)], clip_server)
        optimizer.step()
        for i in cohort:
            optimizers[i].step()
        shared = average([models[i] for i in cohort], [world["weights"][i] for i in cohort], shared)
        result.shared.append(shared)
        result.deployed.append(deployed(models, shared))
        with torch.no_grad():
            for i, state in enumerate(result.deployed[-1]):
                state |= hypernetwork(own[i])
    return result
