"""A mix of the heads of clients with similar feature distributions."""

from __future__ import annotations

import torch

from idiolect.core.part import Part, part
from idiolect.core.scope import Scope, head
from idiolect.core.tree import Tree, layout, overlay, pick
from idiolect.core.types import Central, Local, Setup, Update
from idiolect.parts._aligned_features import class_sums
from idiolect.parts.common.classes import classifier
from idiolect.parts.common.simplex import smallest_on_simplex

_LEAST = 1e-3
"""Weights below it become 0."""


@part
def mixed_heads(names: Scope = head) -> Part:
    r"""Start from the mix of the cohort's heads that minimizes estimated variance plus squared bias for the client.

    .. math::  h_i = \sum_j \alpha_{ij} h_j, \qquad
               \alpha_i = \arg\min_{\alpha \geq 0, \sum \alpha = 1}
                   \sum_j \alpha_j^2 V_j + \Big\lVert \sum_j \alpha_j (m_i - m_j) \Big\rVert^2

    .. math::  m_{i} = \big( p_{i,y}\, \bar z_{i,y} \big)_y, \qquad
               V_i = \frac{1}{n_i} \Big( \frac{1}{n_i} \sum_k \lVert z_k \rVert^2 - \lVert m_i \rVert^2 \Big)

    with features z under the received body, their class means :math:`\bar z_{i,y}` and shares of classes
    :math:`p_{i,y}`: the variance of a mixed head plus its squared bias. Weights below 0.001 become 0, and the others
    are normalized to sum to one. An absent client keeps its last mix.

    Args:
        names: the head: the tensors of one linear layer.

    Memory:    none.
    Sends:     the trained head, a feature per class, one number.       Receives: a head specific to this client.
    Cost:      their bytes; a pass over the examples without gradient; a quadratic program per client on the server.
    Raises:    UsageError: if the head is not one linear layer, or targets are not classes.

    Example:
        >>> mixed_heads()
        mixed_heads(names=head)

    Reference: Xu et al., FedPAC, ICLR 2023, equation 9.
    Differs:   the matrix of the program is positive definite up to rounding; if it is not, the authors drop
        eigenvalues below 0.01, a number that depends on the scale of features; here they are raised to just above 0.
        Features are computed in evaluation mode.
    """

    def rows(setup: Setup) -> Tree:
        classifier(names, setup.structure)
        return pick(setup.weights, names(setup.structure))

    def begin(local: Local, weights: Tree) -> tuple[Tree, Tree]:
        return overlay(weights, local.message), local.memory

    def finish(local: Local) -> tuple[Tree, Tree]:
        found = local.total(local.start, class_sums(names, local.structure))
        count = found["counts"].sum(-1, keepdim=True)
        means = found.stretch("sums") / count
        spread = found.stretch("squares") / count - means.square().sum(-1, keepdim=True)
        own = pick(local.end, local.message)
        where = layout(
            (*own.layout.names, "means", "variance"), (*own.layout.shapes, means.shape[-1:], count.shape[-1:])
        )
        return local.memory, Tree(where, torch.cat([own.flat, means, (spread / count).clamp(min=0)], dim=-1))

    def aggregate(central: Central, uploads: Tree) -> Update:
        means, variances = uploads["means"].cpu().double(), uploads["variance"].cpu().double()
        centered = means - means.mean(dim=0)
        products = centered @ centered.T
        least = min(_LEAST, 0.5 / len(products))
        mixes = []
        for i, own in enumerate(products):
            bias = products - own - own[:, None] + own[i]
            mix = smallest_on_simplex(torch.diag(variances[:, 0]) + bias)
            mix = torch.where(mix < least, 0.0, mix)
            mixes.append(mix / mix.sum())
        heads = pick(uploads, names(central.structure))
        return Update(rows=Tree(heads.layout, torch.stack(mixes).to(heads.flat) @ heads.flat))

    return Part(rows=rows, begin=begin, finish=finish, aggregate=aggregate, individual=True)
