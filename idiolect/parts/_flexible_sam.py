"""Sharpness-aware minimization with a larger radius on a client's most sensitive layers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from idiolect.core.part import Part, part, require
from idiolect.core.rng import uniform_hash
from idiolect.core.scope import Scope, weights
from idiolect.core.structure import ModelStructure
from idiolect.core.tree import Tree, norm, spread
from idiolect.core.types import GradFn, Local, Setup
from idiolect.parts.common.ascent import EPSILON, uphill


@part
def flexible_sam(
    rho: float,
    rho_larger: float,
    top: int,
    selection: Literal["most", "least", "random"] = "most",
    sensitivity: Literal["code", "paper"] = "code",
    layers: Scope = weights,
) -> Part:
    r"""Apply SAM with a larger radius on the layers that changed most in this client's last training.

    .. math::  \varepsilon_k = r_k \frac{g_k}{\lVert g \rVert + 10^{-7}}, \qquad
               r_k = \rho_{larger} \text{ if } k \in M_i \text{ else } \rho

    After training, each candidate tensor :math:`k` is scored, and the `top` highest are :math:`M_i` at the
    client's next participation. At its first one :math:`M_i` is empty. The score costs no gradient:

    .. math::  s_k = \mathrm{mean}\big( (N(w_k^{end}) - N(w_k^{start}))^2 \big) \;\text{(code)}, \qquad
               s_k = \mathrm{mean}\big( (w_k^{end} - w_k^{start})^2 \big) \;\text{(paper)}

    with :math:`N` the scaling of a tensor to [0, 1] by its own minimum and maximum.

    Args:
        rho: radius of the other tensors, at least 0.
        rho_larger: radius of the sensitive ones, at least 0.
        top: number of sensitive tensors; at least 1 and at most the model's candidates.
        selection: the most sensitive, the least sensitive (of those that changed), or random ones: the paper's
            ablation.
        sensitivity: the definition of the authors' code, or the formula of the paper.
        layers: scope of the candidates. Candidates are tensors with two or more dimensions outside normalization
            layers.

    Memory:    per client the candidates' sensitivities and the selected ones.
    Sends:     nothing.    Receives: nothing.
    Cost:      one more gradient per step.
    Raises:    UsageError: if an argument is out of range, or the model has fewer than `top` candidates.

    Example:
        >>> flexible_sam(0.05, 0.9, top=2)
        flexible_sam(rho=0.05, rho_larger=0.9, top=2, selection='most', sensitivity='code', layers=weights)

    Reference: Xing et al., AAAI 2025.
    Differs:   the authors exclude tensors by parts of their name (bn, downsample, shortcut, norm, bias); here
        biases and normalization are excluded by dimension and type, so the convolution of a shortcut is a candidate.
        A constant tensor, which makes all of their scores NaN, here ranks last.
    """
    require(rho >= 0 and rho_larger >= 0, f"flexible_sam: radii must be at least 0, got {rho}, {rho_larger}")
    require(top >= 1, f"flexible_sam: top must be at least 1, got {top}")
    require(
        selection in ("most", "least", "random"),
        f"flexible_sam: no selection {selection!r}: most, least or random",
    )
    require(sensitivity in ("code", "paper"), f"flexible_sam: no sensitivity {sensitivity!r}: code or paper")

    def memory(setup: Setup) -> Tree:
        names = _candidates(setup.structure, layers)
        if top > len(names):
            require(False, f"flexible_sam: top={top}, but the model has {len(names)} candidate tensors: lower top")
        zeros = setup.weights.flat.new_zeros(len(names))
        return Tree.of({f"{what}/{n}": zeros[:1] for what in ("sensitivity", "chosen") for n in names})

    def gradient(grad: GradFn, local: Local) -> GradFn:
        where = local.structure.trainable
        plain = torch.zeros_like(local.memory.flat[..., :1])
        chosen = [local.memory.get(f"chosen/{n}", plain) for n in where.names]
        radius = spread(rho + (rho_larger - rho) * torch.cat(chosen, dim=-1), where)
        return uphill(grad, lambda g, at: ((norm(g) + EPSILON).reciprocal(), radius * g)) if rho or rho_larger else grad

    def finish(local: Local) -> tuple[Tree, Tree]:
        names = _candidates(local.structure, layers)
        ends = [(local.start.stretch(n), local.end.stretch(n)) for n in names]
        score = torch.cat([_moved(start, end, sensitivity) for start, end in ends], dim=-1)
        rank = {
            "most": score,
            "least": torch.where(score > 0, -score, -torch.inf),
            "random": uniform_hash(local.seed, len(names), score.dtype),
        }[selection]
        first = rank.sort(dim=-1, descending=True, stable=True).indices[..., :top]
        chosen = torch.zeros_like(score).scatter(-1, first, 1.0)
        return Tree(local.memory.layout, torch.cat([score, chosen], dim=-1)), Tree.of({})

    return Part(
        memory=memory,
        gradient=gradient,
        finish=finish,
        gradients=1 if rho or rho_larger else 0,
        neutral={"rho": 0.0, "rho_larger": 0.0},
    )


def _candidates(structure: ModelStructure, layers: Scope) -> list[str]:
    pool = layers(structure) - structure.normalization
    return [n for n, shape in structure.trainable.shape_of.items() if n in pool and len(shape) >= 2]


def _moved(start: Tensor, end: Tensor, sensitivity: str) -> Tensor:
    if sensitivity == "code":
        start, end = _unit(start), _unit(end)
    moved = (end - start).square().mean(dim=-1, keepdim=True)
    return torch.where(moved.isnan(), -1.0, moved)


def _unit(x: Tensor) -> Tensor:
    low, high = x.aminmax(dim=-1, keepdim=True)
    return (x - low) / (high - low)
