"""A pull of each client toward clients with similar weights."""

from __future__ import annotations

import torch

from idiolect.core.part import Part, part, require
from idiolect.core.structure import ModelStructure
from idiolect.core.tree import Tree, pick
from idiolect.core.types import Central, Local, Setup, Update
from idiolect.parts.common.pull import pull


@part
def attention(strength: float = 1.0, others: float = 1.0, sigma: float | None = None) -> Part:
    r"""Pull each client toward its own weighted mean over the cohort, in which similar models have larger weights.

    .. math::  \xi_{ij} = \frac{\kappa}{m - 1}\, e^{-\lVert w_i - w_j \rVert^2 / \sigma} \quad (j \neq i), \qquad
               \xi_{ii} = 1 - \sum_{j \neq i} \xi_{ij}, \qquad
               u_i = \sum_j \xi_{ij}\, w_j, \qquad  d = g + \lambda\, (w - u_i)

    over the m clients of a round. Each client receives only its own :math:`u_i`, and keeps it until it takes part
    again; initially :math:`u_i` is the initial weights.

    Args:
        strength: :math:`\lambda`, at least 0; 0 trains without other clients.
        others: :math:`\kappa`, in [0, 1]: share of other clients in :math:`u_i` if all models have the same weights.
            A client's weight in its own mean is therefore never negative.
        sigma: squared distance at which the weight of another client falls to 1 / e of that, above 0. None takes the
            (lower) median over the pairs of the cohort.

    Memory:    none.       Sends: all trainable weights.       Receives: as many, specific to this client.
    Cost:      their bytes, both ways; on the server the distance of each pair; no extra gradient.
    Raises:    UsageError: if an argument is out of range.

    Example:
        >>> attention()
        attention(strength=1.0, others=1.0, sigma=None)

    Reference: Huang et al., FedAMP, AAAI 2021, with :math:`A(x) = 1 - e^{-x/\sigma}`.
    Differs:   the paper's :math:`\alpha_k / \sigma` is :math:`\kappa / (m - 1)` here, and its
        :math:`\lambda / \alpha_k` is `strength`: with a fixed :math:`\alpha_k` and sigma the weights of other clients
        vanish if a model has many weights. All clients take part in the paper; here only those of a round are mixed.
        Some public code omits the square of the distance.
    """
    require(strength >= 0, f"attention: strength must be at least 0, got {strength}")
    require(0 <= others <= 1, f"attention: others must be in [0, 1], got {others}")
    require(sigma is None or sigma > 0, f"attention: sigma must be above 0, or None, got {sigma}")

    def rows(setup: Setup) -> Tree:
        return _trained(setup.structure, setup.weights)

    def direction(direction: Tree, weights: Tree, local: Local) -> Tree:
        return pull(strength, direction, weights, local.message)

    def finish(local: Local) -> tuple[Tree, Tree]:
        return local.memory, _trained(local.structure, local.end)

    def aggregate(central: Central, uploads: Tree) -> Update:
        count = len(uploads.flat)
        apart = _squared_distances(uploads.flat)
        width = _median(apart) if sigma is None else sigma
        shares = others / max(count - 1, 1) * torch.exp(-apart / width)
        shares.fill_diagonal_(0.0)
        shares += torch.diag(1 - shares.sum(dim=1))
        return Update(rows=Tree(uploads.layout, shares @ uploads.flat))

    return Part(
        rows=rows,
        direction=direction,
        finish=finish,
        aggregate=aggregate,
        individual=True,
        neutral={"strength": 0.0},
    )


def _trained(structure: ModelStructure, tree: Tree) -> Tree:
    """Return the trainable weights that may be sent to the server."""
    return pick(tree, structure.names("weight") & structure.exchangeable)


def _squared_distances(rows: torch.Tensor) -> torch.Tensor:
    """Return the squared distances of all pairs, from products about the mean: one kernel, with little cancellation."""
    centered = rows - rows.mean(dim=0)
    products = centered @ centered.T
    lengths = products.diagonal()
    return (lengths + lengths[:, None] - 2 * products).clamp(min=0)


def _median(apart: torch.Tensor) -> torch.Tensor:
    """Return the median over pairs, above 0; without pairs any number is valid."""
    pairs = apart[~torch.eye(len(apart), dtype=torch.bool, device=apart.device)]
    found = pairs.median() if len(pairs) else apart.new_ones(())
    return found.clamp(min=torch.finfo(apart.dtype).tiny)
