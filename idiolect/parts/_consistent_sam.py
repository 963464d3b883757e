"""SAM with perturbations that are kept consistent over clients."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from idiolect.core.part import Part, part, require
from idiolect.core.structure import Private, structure_of
from idiolect.core.tree import Layout, Tree, axpy, combine, layout, norm, overlay, pick, zeros_like
from idiolect.core.types import Central, GradFn, Gradient, Local, Setup, Step, Update
from idiolect.parts.common.ascent import EPSILON

_OWNER = "consistent_sam"


@part
def consistent_sam(rho: float, report: Literal["code", "paper"] = "code") -> Part:
    r"""Apply SAM with each client's perturbation pulled, by a dual variable, toward one shared by the cohort.

    .. math::  q = g - \mu_i - s, \qquad  \hat s = \rho\, \frac{q}{\lVert q \rVert + 10^{-7}}, \qquad
               \mu_i \leftarrow \mu_i + \hat s - s, \qquad  \tilde g = \nabla F_i(w + \hat s)

    at every step; and on the server, with :math:`a` the mean of the clients' reports,
    :math:`s \leftarrow \rho\, a / (\lVert a \rVert + 10^{-7})`. All start at 0, so a client's first step is SAM's.
    :math:`\mu_i` and :math:`s` cover trainable tensors that are exchanged; personal tensors are perturbed along their
    gradient. The norm of :math:`q` is over all of them.

    Another SAM listed after it (``fedsmoo() + flexible_sam(...)``) is nested: :math:`g` and :math:`\tilde g` are
    then its gradients, and a step takes four gradients.

    Args:
        rho: radius, at least 0; 0 is the plain gradient, without duals and without the second pass.
        report: clients send :math:`\mu_i` (``"code"``), or :math:`\mu_i - \hat s` of their last step
            (``"paper"``).

    Memory:    mu_i, one tensor per weight, in the model, since it changes at every step; in the ``"paper"`` form also
        the last perturbation.
    Sends:     the report, one tensor per exchanged weight.      Receives: s, the same.
    Cost:      bytes double, both ways; one more gradient per step.
    Raises:    UsageError: if `rho` is negative, or `report` is neither.

    Example:
        >>> consistent_sam(0.1)
        consistent_sam(rho=0.1, report='code')

    Reference: Sun et al., FedSMOO, ICML 2023.
    Differs:   the gradient enters q without clipping; one public code clips it first. FedFSA's authors compare with a
        FedSMOO in which all layers read mu_i and s from the first value on; here each layer reads its own values.
    """
    require(rho >= 0, f"consistent_sam: rho must be at least 0, got {rho}")
    require(report in ("code", "paper"), f"consistent_sam: no report {report!r}: code or paper")
    kept = ("mu",) if report == "code" else ("mu", "last")

    def attach(module: nn.Module) -> None:
        if not hasattr(module, _OWNER):
            own = Private()
            for item in structure_of(module).items:
                if item.kind == "weight" and not item.private:
                    zeros = torch.zeros_like(module.get_parameter(item.name), requires_grad=False)
                    for what in kept:
                        own.register_buffer(_leaf(what, item.name), zeros.clone(), persistent=False)
            module.add_module(_OWNER, own)

    def server(setup: Setup) -> Tree:
        return zeros_like(pick(setup.shared, setup.structure.names("weight")))

    def gradient(grad: GradFn, local: Local) -> GradFn:
        s = local.received
        places = [_place(what, s.layout) for what in kept]

        def sharp(at: Tree, batch: Step) -> Gradient:
            here = grad(at, batch)
            mu = Tree(s.layout, combine(places[0], at).flat)
            q = axpy(-1.0, mu + s, here.gradient)
            up = q * (rho / (norm(q) + EPSILON))
            there = grad(axpy(1.0, up, at), batch)
            last = pick(up, s)
            after = [Tree(place, row.flat) for place, row in zip(places, (mu + last - s, last), strict=False)]
            return here._replace(gradient=there.gradient, buffers=overlay(here.buffers, *after))

        return sharp

    def finish(local: Local) -> tuple[Tree, Tree]:
        like = local.received.layout
        mu, *last = (Tree(like, combine(_place(what, like), local.end).flat) for what in kept)
        return local.memory, mu - last[0] if last else mu

    def aggregate(central: Central, mean: Tree) -> Update:
        return Update(mean * (rho / (norm(mean) + EPSILON)))

    if not rho:
        return Part(neutral={"rho": 0.0})
    return Part(
        attach=attach,
        server=server,
        gradient=gradient,
        finish=finish,
        aggregate=aggregate,
        gradients=1,
        neutral={"rho": 0.0},
    )


def _leaf(what: str, name: str) -> str:
    """Return the name of a weight's buffer, which has no dots."""
    return f"{what}/{name.replace('.', '/')}"


def _place(what: str, weights: Layout) -> Layout:
    """Return where the buffers for these weights are in a model's row."""
    return layout(tuple(f"{_OWNER}.{_leaf(what, n)}" for n in weights.names), weights.shapes)
