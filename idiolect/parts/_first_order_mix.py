"""A mix of other clients' models, weighted by how much each lowers the client's validation loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from idiolect.core.part import Part, part, require
from idiolect.core.rng import stream
from idiolect.core.scope import nothing
from idiolect.core.structure import ModelStructure
from idiolect.core.tree import Tree, combine, layout, norm, overlay, pick, vectors, where
from idiolect.core.types import Central, Local, Setup, Update
from idiolect.parts.common.copies import copies

AFFINITY, SCORE, TOLD, UPLOADED = "others/affinity", "others/score", "others/told", "others/uploaded"


@part
def first_order_mix(others: int = 5, explore: float = 0.3, decay: float = 0.05) -> Part:
    r"""Start from a mean of models, each weighted by its decrease of the validation loss per unit of distance.

    .. math::  \sigma_{ij} = \frac{L_i(b_i) - L_i(\theta_j)}{\lVert \theta_j - b_i \rVert}, \qquad
               \omega_{ij} = \frac{\max(\sigma_{ij}, 0)}{\sum_k \max(\sigma_{ik}, 0)}, \qquad
               s_i = \sum_j \omega_{ij}\, \theta_j, \qquad  P_{ij} \leftarrow P_{ij} + \sigma_{ij}

    over the client's own model and some models :math:`\theta_j` of other clients as they were last uploaded.
    :math:`b_i` is the start of the client's last training: the client returns to it if no model is better.
    :math:`L_i` is the mean loss on its validation examples, or on its training examples if it has none, normalized
    with each model's own running statistics. Norms are over trainable weights. A model equal to :math:`b_i`, or
    with a loss that is not finite, scores 0. The client predicts with :math:`s_i`.

    The server chooses among clients that have uploaded; clients beyond the population for which the run was set up
    are never chosen. Each place is filled at random with probability
    :math:`\max(0, \epsilon - \delta t)` in round t (from 0), else by the largest :math:`P_{ij}`, with random ties.

    Args:
        others: number of other clients' models that a client receives, at least 1. If fewer exist, places stay empty.
        explore: :math:`\epsilon`, in [0, 1].
        decay: :math:`\delta`, at least 0.

    Memory:    :math:`b_i`, and the last scores. On the server a model and a row of P for each client.
    Sends:     the model, and a score for each place.
    Receives:  `others` models, specific to this client, without the names of their clients; empty places count.
    Cost:      ``others + 2`` forward passes over the validation examples, per round and for each personal model;
        `others` times the bytes of the model down; no extra gradient.
    Raises:    UsageError: if an argument is out of range.

    Example:
        >>> first_order_mix(others=2)
        first_order_mix(others=2, explore=0.3, decay=0.05)

    Reference: Zhang et al., FedFomo, ICLR 2021.
    Differs:   the authors' code takes the L1 norm or the square of the norm, adds scores to P after dividing by
        their sum, which may be near 0, and offers only the models of the last round; here the norm, the scores
        and the whole pool are used. Running means are mixed with the same weights; running variances are those of the
        mixture, :math:`\sum_j \omega_{ij} (v_j + (\mu_j - \bar\mu)^2)`. Dropout is on, and the same for all models.
    """
    require(others >= 1, f"first_order_mix: others must be at least 1, got {others}")
    require(0 <= explore <= 1, f"first_order_mix: explore must be in [0, 1], got {explore}")
    require(decay >= 0, f"first_order_mix: decay must be at least 0, got {decay}")

    def memory(setup: Setup) -> Tree:
        return _initial(setup, SCORE, others)

    def server(setup: Setup) -> Tree:
        return vectors(**{UPLOADED: setup.weights.flat.new_zeros(setup.population)})

    def rows(setup: Setup) -> Tree:
        return _initial(setup, AFFINITY, setup.population)

    def chosen(central: Central, client: int, affinity: Tensor) -> list[int]:
        return _chosen(central, client, affinity.tolist(), others, explore - decay * central.round)

    def message(central: Central) -> Tree:
        own = _model(central.structure, central.rows)
        places = chosen(central, central.clients[0], central.rows[AFFINITY])
        models = own.flat.new_zeros(others, len(own.flat))
        if places:
            models[: len(places)] = _model(central.structure, central.rows_of(places)).flat
        told = (torch.arange(others, device=models.device) < len(places)).to(models)
        return _beside(Tree(copies(own.layout, others), models.flatten()), TOLD, told)

    def begin(local: Local, weights: Tree) -> tuple[Tree, Tree]:
        base, own = _model(local.structure, local.memory), _model(local.structure, weights)
        sent, told = local.message.flat[..., :-others].chunk(others, dim=-1), local.message[TOLD]
        models = [*(Tree(base.layout, model) for model in sent), own]
        scores = _scores(local, weights, base, models, torch.cat([told, torch.ones_like(told[..., :1])], dim=-1))
        gains = scores.clamp(min=0)
        total = gains.sum(dim=-1, keepdim=True)
        mixed = _mixed(local.structure, models, gains / torch.where(total > 0, total, 1.0))
        start = overlay(weights, where(total > 0, mixed, base))
        return start, _beside(base, SCORE, scores[..., :others])

    def finish(local: Local) -> tuple[Tree, Tree]:
        scores = pick(local.memory, {SCORE})
        start, end = (_model(local.structure, tree) for tree in (local.start, local.end))
        return combine(local.memory.layout, start, scores), combine(local.memory.layout, end, scores)

    def aggregate(central: Central, uploads: Tree) -> Update:
        affinity, state = central.rows[AFFINITY].clone(), central.state.clone()
        for k, client in enumerate(central.clients):
            places = chosen(central, client, affinity[k])
            affinity[k, places] += uploads[SCORE][k, : len(places)]
        state.flat[[client for client in central.clients if client < len(state.flat)]] = 1.0
        return Update(state, rows=_beside(_model(central.structure, uploads), AFFINITY, affinity))

    return Part(
        memory=memory,
        server=server,
        rows=rows,
        message=message,
        begin=begin,
        finish=finish,
        aggregate=aggregate,
        individual=True,
        server_only=True,
    )


def _chosen(central: Central, client: int, affinity: Sequence[float], others: int, chance: float) -> list[int]:
    """Return the clients whose models a client receives; the result is the same when its scores arrive."""
    generator = stream(central.seed, "first_order_mix", client)
    known = [j for j, up in enumerate(central.state[UPLOADED].tolist()) if up and j != client]
    best, picked = sorted(generator.permutation(known).tolist(), key=lambda j: -affinity[j]), list[int]()
    while best and len(picked) < others:
        picked.append(best.pop(int(generator.integers(len(best))) if generator.random() < chance else 0))
    return picked


def _model(structure: ModelStructure, tree: Tree) -> Tree:
    """Return the tensors that may be sent to the server."""
    return pick(tree, structure.exchangeable)


def _initial(setup: Setup, name: str, size: int) -> Tree:
    """Return the initial model with a vector of zeros after its tensors."""
    model = _model(setup.structure, setup.weights)
    return _beside(model, name, model.flat.new_zeros(size))


def _beside(tree: Tree, name: str, values: Tensor) -> Tree:
    """Return a tree with a vector after its tensors."""
    where = layout((*tree.layout.names, name), (*tree.layout.shapes, values.shape[-1:]))
    return combine(where, tree, vectors(**{name: values}))


def _scores(local: Local, weights: Tree, base: Tree, models: Sequence[Tree], told: Tensor) -> Tensor:
    """Return the decrease of the loss per distance to each model, ``(..., n)``; 0 for empty places."""

    def loss(model: Tree) -> Tensor:
        return local.whole(overlay(weights, model), only=nothing, split="val").loss[..., None]

    trained, before, found = local.structure.names("weight"), loss(base), []
    for k, model in enumerate(models):
        length = norm(pick(model - base, trained))
        due = (told[..., k : k + 1] > 0) & (length > 0)
        slope = (before - loss(model)) / length if due.any() else torch.zeros_like(length)
        found.append(torch.where(due & slope.isfinite(), slope, 0.0))
    return torch.cat(found, dim=-1)


def _mixed(structure: ModelStructure, models: Sequence[Tree], shares: Tensor) -> Tree:
    """Return the mean of models; a variance is that of the mixture, about its mean."""

    def mean(trees: Sequence[Tree]) -> Tree:
        first, *rest = (tree * shares[..., k : k + 1] for k, tree in enumerate(trees))
        for tree in rest:
            first = first + tree
        return first

    center = mean(models)
    found = [(n.removesuffix("var") + "mean", n) for n in structure.names("statistic") if n.endswith("running_var")]
    pairs = [(m, v) for m, v in found if m in center and v in center]
    means, variances = {m for m, _ in pairs}, {v for _, v in pairs}

    def about(model: Tree) -> Tree:
        variance, off = pick(model, variances), pick(model, means).flat - pick(center, means).flat
        return Tree(variance.layout, variance.flat + off.square())

    return overlay(center, mean([about(model) for model in models]))
