"""A head that is computed from Gaussians of the features, which each client mixes from its own and those of all."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from idiolect.core.part import Part, part, require
from idiolect.core.rng import derive, uniform_hash
from idiolect.core.scope import Scope, head
from idiolect.core.structure import ModelStructure
from idiolect.core.tree import Tree, overlay, pick, vectors, wide
from idiolect.core.types import Central, Local, Pass, Query, Setup, Update
from idiolect.parts.common.classes import Classifier, classifier, of_class
from idiolect.parts.common.discriminant import Gaussians, best_shares, estimate, linear, log_prior, mixed


@part
def discriminant_head(
    own: float | None = None,
    covariance: Literal["full", "diagonal"] = "full",
    ridge: float = 1e-4,
    names: Scope = head,
) -> Part:
    r"""Compute the head from Gaussians of the features, which each client mixes from its own and those of all clients.

    .. math::  h(z)_c = z^\top \Sigma'^{-1} m_c - \tfrac12\, m_c^\top \Sigma'^{-1} m_c + \log \pi_{i,c}, \qquad
               \Sigma' = (1 - \epsilon)\, \Sigma + \epsilon\, \tfrac{\operatorname{tr} \Sigma}{d}\, I

    with features z, class means :math:`m_c`, one covariance :math:`\Sigma`, and the client's shares of classes
    :math:`\pi_i`: the classifier of Gaussian classes (linear discriminant analysis). A client trains the body under
    the head of the shared :math:`(m, \Sigma)`, which is fixed. It then computes the features of its examples, their
    class means :math:`\hat m` and the covariance within classes :math:`\hat\Sigma`, and sends

    .. math::  m_i = \beta_1 \hat m + (1 - \beta_1)\, m, \qquad \Sigma_i = \beta_2 \hat\Sigma + (1 - \beta_2)\, \Sigma

    whose mean over clients is the next :math:`(m, \Sigma)`. The two shares minimize the cross-entropy of the client's
    examples in two-fold cross-validation: each half is classified by the mix of the other half's Gaussians. To
    predict, a client does the same with features under the newest body, and takes the head of
    :math:`(m_i, \Sigma_i)`. So the head needs no training, also for a client that never trained.

    Args:
        own: both shares, in [0, 1], if they are fixed: 1 uses the client's own Gaussians, 0 those of all clients; None
            chooses them by cross-validation.
        covariance: ``"full"``, or ``"diagonal"`` for variances alone, if features are many.
        ridge: added to each variance of a client, above 0.
        names: the head, a linear layer with a bias. Its tensors should not be shared: ``share(~head)``.

    Memory:    none.
    Sends:     the means and the covariance, both ways: d values per class, and d (d + 1) / 2 or d.
    Cost:      no extra gradient. A pass over the examples without gradient in each round, and to predict; an
        eigendecomposition of a d by d matrix for each half, unless the covariance is diagonal.
    Raises:    UsageError: if an argument is out of range, the head is no linear layer with a bias, another layer has
        its weight (tied weights), or targets are not class labels.

    Example:
        >>> discriminant_head(covariance="diagonal")
        discriminant_head(own=None, covariance='diagonal', ridge=0.0001, names=head)

    Reference: McLaughlin and Su, pFedFDA, NeurIPS 2024.
    Differs:   the authors' code collects features of all epochs while the body still changes, so the two halves hold
        the same examples; here features are computed after training, in evaluation mode. It adds 0.0001 to every entry
        of the covariance, and 1 to its diagonal, whatever the scale of features; here `ridge` is added to the
        diagonal. A class has its own mean from three examples on, as in the code's evaluation; in its training, from
        one. The shares are a minimum of the loss within [0, 1], found by Newton's method from one half; the code takes
        ten steps of L-BFGS and clips the result. As in the code, the spread of means between clients does not enter
        the shared covariance. If no class has two examples, the shares are 0, as in the code, whose comment calls this
        the client's own. A covariance with a ridge is positive definite, so nothing is clipped.
    """
    require(own is None or 0 <= own <= 1, f"discriminant_head: own must be in [0, 1] or None, got {own}")
    require(ridge > 0, f"discriminant_head: ridge must be above 0, got {ridge}")

    def server(setup: Setup) -> Tree:
        found, like = classifier(names, setup.structure), wide(setup.weights).flat
        _tensors(setup.structure, found)
        seed = torch.tensor(derive("discriminant_head"), device=like.device)
        means = uniform_hash(seed, found.classes * found.features, like.dtype).view(found.classes, found.features)
        spread = torch.eye(found.features).to(like) if covariance == "full" else like.new_ones(found.features)
        return Tree.of({"means": means, "covariance": _packed(Gaussians(means, spread))})

    def begin(local: Local, weights: Tree) -> tuple[Tree, Tree]:
        found = classifier(names, local.structure)
        prior = log_prior(local.counts(found.classes).double())
        return _with_head(weights, local.structure, found, _unpacked(local.received), prior), local.memory

    def direction(direction: Tree, weights: Tree, local: Local) -> Tree:
        fixed = _tensors(local.structure, classifier(names, local.structure))
        return pick(direction, frozenset(direction) - set(fixed))

    def adapted(local: Local, weights: Tree) -> tuple[Gaussians, Tensor]:
        """Return the client's Gaussians under these weights, and the logarithms of its shares of classes."""
        found = classifier(names, local.structure)

        def both(seen: Pass, y: Tensor, facts: Tree) -> dict[str, Tensor]:
            return {"features": seen.features, "classes": of_class(y, found.classes).to(seen.features)}

        seen = local.each(
            weights, Query(found.layer, both, {"features": (found.features,), "classes": (found.classes,)})
        )
        z, y, others = seen["features"].double(), seen["classes"].double(), _unpacked(local.received)
        prior = log_prior(y.sum(-2))
        fixed = None if own is None else z.new_full((*z.shape[:-2], 2), own)
        shares = best_shares(z, y, others, prior, ridge) if fixed is None else fixed
        return mixed(shares, estimate(z, y, others, ridge), others), prior

    def finish(local: Local) -> tuple[Tree, Tree]:
        mine, where = adapted(local, local.end)[0], local.received.layout
        sent = vectors(means=mine.means.flatten(-2), covariance=_packed(mine)).flat
        return local.memory, Tree(where, sent.to(local.received.flat.dtype))

    def aggregate(central: Central, mean: Tree) -> Update:
        return Update(state=mean)

    def deploy(local: Local, weights: Tree) -> Tree:
        return _with_head(weights, local.structure, classifier(names, local.structure), *adapted(local, weights))

    return Part(server=server, begin=begin, direction=direction, finish=finish, aggregate=aggregate, deploy=deploy)


def _tensors(structure: ModelStructure, found: Classifier) -> tuple[str, str]:
    """Return the names of weight and bias of the head.

    Raises:
        UsageError: if it has no bias, or another layer has the same tensors.
    """
    weight, bias = found.tensor("weight"), found.tensor("bias")
    needs = f"discriminant_head: the layer {found.layer!r}"
    require(bias in structure.trainable.starts, f"{needs} has no trainable bias, which a head of Gaussians needs")
    tied = {*structure.aliases, *structure.aliases.values()} & {weight, bias}
    require(not tied, f"{needs} shares its weight with another layer, which a computed head would change: untie them")
    return weight, bias


def _with_head(weights: Tree, structure: ModelStructure, found: Classifier, of: Gaussians, prior: Tensor) -> Tree:
    """Return weights with the head of these Gaussians."""
    weight, bias = linear(of, prior)
    rows = dict(zip(_tensors(structure, found), (weight.flatten(-2), bias), strict=True))
    where = structure.layout.only(rows)
    row = vectors(**{name: rows[name] for name in where.names}).flat
    return overlay(weights, Tree(where, row.to(weights.flat.dtype)))


def _packed(of: Gaussians) -> Tensor:
    """Return the lower triangle of the covariance as a vector, or the variances."""
    if not of.full:
        return of.covariance
    row, column = torch.tril_indices(*of.covariance.shape[-2:])
    return of.covariance[..., row, column]


def _unpacked(sent: Tree) -> Gaussians:
    """Return the Gaussians that were sent, in float64."""
    means, values = sent["means"].double(), sent["covariance"].double()
    size = means.shape[-1]
    if values.shape[-1] == size:
        return Gaussians(means, values)
    row, column = torch.tril_indices(size, size)
    whole = values.new_zeros(*values.shape[:-1], size, size)
    whole[..., row, column] = values
    whole[..., column, row] = values
    return Gaussians(means, whole)
