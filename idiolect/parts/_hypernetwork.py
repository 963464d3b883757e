"""A hypernetwork on the server that generates each client's weights."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from idiolect.core.part import Part, part, require
from idiolect.core.rng import derive, normal_hash
from idiolect.core.scope import Scope, everything
from idiolect.core.structure import ModelStructure
from idiolect.core.tree import Layout, Tree, clipping, overlay, pick, vectors, wide
from idiolect.core.types import Central, Local, Setup, Update
from idiolect.parts.common.initial import linear_start

HIDDEN = 3
"""Hidden layers after the first."""


@part
def hypernetwork(
    names: Scope = everything,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-3,
    clip: float | None = 50.0,
    width: int = 100,
    seed: int = 0,
) -> Part:
    r"""Generate each client's weights on the server with a hypernetwork, from an embedding vector of the client.

    .. math::  \theta_i = h(v_i; \varphi), \qquad  \Delta_i = \theta_i^{t+} - \theta_i, \qquad
               G = -\nabla_{\varphi, v}\, \frac{1}{|S_t|} \sum_{i \in S_t} \langle h(v_i; \varphi), \Delta_i \rangle

    The client trains from :math:`\theta_i`, and the server takes one step of SGD with momentum along G, at the
    :math:`\varphi` and :math:`v` that generated the weights: the update :math:`\Delta_i` replaces the gradient of the
    client's loss. Clients have equal weights. A client predicts with :math:`h(v_i; \varphi)`, even if it never
    trained.

    :math:`h` is a linear layer, three times ReLU and a linear layer, and a linear layer to all generated values.
    :math:`v_i` has :math:`\lfloor 1 + N / 4 \rfloor` values for N clients. Both have PyTorch's initialization of
    linear layers and embeddings. An absent client keeps its vector and the vector's momentum.

    Args:
        names: tensors to generate: the trainable ones among them; `share` must not exchange these. Other tensors can
            be exchanged by `share`; with ``~head`` heads are personal. Statistics are never generated.
        lr: learning rate of the server's step, above 0.
        momentum: momentum of the server's step, in [0, 1).
        weight_decay: weight decay of :math:`\varphi`, at least 0.
        clip: bound on the norm of G over all tensors together, above 0; None sets no bound.
        width: width of the layers of h, at least 1. h has about `width` times as many values as it generates.
        seed: seed of the initial :math:`\varphi` and :math:`v`.

    Memory:    none; only the server has h, the vectors and their momentum.
    Sends:     :math:`\Delta_i`.      Receives: :math:`\theta_i`, specific to this client.
    Cost:      the bytes of the generated tensors, both ways; on the server a forward pass through h for each client,
        and one backward pass; it holds all updates of a round. No extra gradient.
    Raises:    UsageError: if an argument is out of range, nothing is to be generated, or it is exchanged as well.

    Example:
        >>> hypernetwork(lr=0.05).arguments[1]
        ('lr', 0.05)

    Reference: Shamsian et al., pFedHN, ICML 2021.
    Differs:   the paper trains one client per step, which equals a cohort of one; with more clients, G is the mean, and
        does not depend on their order. The paper prints the update with the opposite sign; here, as in the authors'
        code, the step is descent. In the code momentum and weight decay also change the vectors of absent clients;
        here a vector has no decay, and changes only when its client takes part. The code trains on fifty mini-batches
        per round, each the first of a new pass; here on those of the local epochs.
    """
    _check(lr, momentum, weight_decay, clip, width)

    def server(setup: Setup) -> Tree:
        made = _generated(names, setup.structure)
        require(made.total > 0, f"hypernetwork: no trainable tensor among {names}")
        twice = next((name for name in made.names if name in setup.shared), None)
        require(twice is None, f"hypernetwork: {twice} is generated and exchanged as well: leave it out of share")
        network = first_network(_vector_size(setup), width, made.total, seed, wide(setup.weights).flat)
        still = {f"momentum/{name}": torch.zeros_like(tensor) for name, tensor in network.items()}
        return Tree.of({**network, **still})

    def rows(setup: Setup) -> Tree:
        zeros = wide(setup.weights).flat.new_zeros(_vector_size(setup))
        return vectors(learned=zeros, momentum=zeros)

    def client_vectors(central: Central) -> Tensor:
        learned = central.rows["learned"]
        seeds = [derive(seed, "client vector", place) for place in central.clients]
        drawn = normal_hash(torch.tensor(seeds, device=learned.device), learned.shape[-1], learned.dtype)
        return drawn.view_as(learned) + learned

    def message(central: Central) -> Tree:
        with torch.no_grad():
            weights = generate(_network(central.state), client_vectors(central))
        return Tree(_generated(names, central.structure), weights)

    def begin(local: Local, weights: Tree) -> tuple[Tree, Tree]:
        return overlay(weights, local.message), local.memory

    def finish(local: Local) -> tuple[Tree, Tree]:
        return local.memory, pick(local.end, local.message) - local.message

    def aggregate(central: Central, moves: Tree) -> Update:
        phi, moving = _network(central.state), central.state.flat.chunk(2)[1]
        slope, pull = _gradient(phi, client_vectors(central), moves, clip)
        moving = momentum * moving + slope + weight_decay * phi.flat
        own_moving = momentum * central.rows["momentum"] + pull
        return Update(
            state=Tree(central.state.layout, torch.cat([phi.flat - lr * moving, moving])),
            rows=vectors(learned=central.rows["learned"] - lr * own_moving, momentum=own_moving),
        )

    return Part(
        server=server,
        rows=rows,
        message=message,
        begin=begin,
        finish=finish,
        aggregate=aggregate,
        individual=True,
        server_only=True,
    )


def _check(lr: float, momentum: float, weight_decay: float, clip: float | None, width: int) -> None:
    """Refuse arguments that are out of range."""
    require(lr > 0, f"hypernetwork: lr must be above 0, got {lr}")
    require(0 <= momentum < 1, f"hypernetwork: momentum must be in [0, 1), got {momentum}")
    require(weight_decay >= 0, f"hypernetwork: weight_decay must be at least 0, got {weight_decay}")
    require(clip is None or clip > 0, f"hypernetwork: clip must be above 0, or None, got {clip}")
    require(width >= 1, f"hypernetwork: width must be at least 1, got {width}")


def _generated(names: Scope, structure: ModelStructure) -> Layout:
    """Return the layout of the tensors that are generated."""
    return structure.trainable.only(names(structure) & structure.exchangeable)


def generate(network: Tree, vector: Tensor) -> Tensor:
    """Return a network's outputs for vectors ``(..., inputs)``; it holds weights and biases in the order of layers."""
    layers = list(zip(network.tensors[::2], network.tensors[1::2], strict=True))
    (weight, bias), *hidden, last = layers
    found = F.linear(vector, weight, bias)
    for weight, bias in hidden:
        found = F.linear(torch.relu(found), weight, bias)
    return F.linear(found, *last)


def first_network(inputs: int, width: int, outputs: int, seed: int, like: Tensor) -> Tree:
    """Return a network with PyTorch's initialization: uniform within one over the root of a layer's inputs."""
    sizes = [inputs, *[width] * (HIDDEN + 1), outputs]
    tensors = {}
    for k, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        for leaf, shape in (("weight", (fan_out, fan_in)), ("bias", (fan_out,))):
            tensors[f"layer {k}/{leaf}"] = linear_start(shape, fan_in, like, seed, "hypernetwork", k, leaf)
    return Tree.of(tensors)


def _gradient(network: Tree, own: Tensor, moves: Tree, clip: float | None) -> tuple[Tensor, Tensor]:
    """Return G, clipped, for the network's row and for the clients' vectors, ``(n, inputs)``."""
    with torch.enable_grad():
        phi, own = Tree(network.layout, network.flat.detach().requires_grad_()), own.detach().requires_grad_()
        along = (generate(phi, own) * moves.flat).sum(dim=-1).mean()
        slope, pull = torch.autograd.grad(-along, (phi.flat, own))
    factor = 1.0 if clip is None else clipping(vectors(slope=slope, pull=pull.flatten()), clip)
    return slope * factor, pull * factor


def _network(state: Tree) -> Tree:
    """Return the network in the server's state, without its momentum; a view."""
    return pick(state, frozenset(name for name in state if not name.startswith("momentum/")))


def _vector_size(setup: Setup) -> int:
    return 1 + setup.population // 4
