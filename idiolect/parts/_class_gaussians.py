"""Gaussian features, regularized toward one Gaussian per class that all clients contribute to."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from idiolect.core.part import Part, part, require
from idiolect.core.scope import Scope, head
from idiolect.core.tree import Tree, combine, layout, vectors, wide
from idiolect.core.types import Central, Local, Objective, Pass, Query, Setup, Term, Update
from idiolect.parts.common.classes import classifier, of_class
from idiolect.parts.common.noise import count_steps, key_of
from idiolect.parts.common.spread import add_spread, divergence, noise, normal


@part
def class_gaussians(
    strength: float,
    samples: int = 18,
    renewal: float = 1.0,
    kl: Literal["code", "bound"] = "code",
    names: Scope = head,
) -> Part:
    r"""Make features Gaussian, and regularize them toward the Gaussian of their class, computed from all clients.

    .. math::  \frac{1}{J} \sum_j L\big(h(z + \sigma \odot \epsilon_j)\big)
               + \beta\, \mathrm{KL}\big(N(m_y, s_y^2) \,\Vert\, N(z, \sigma^2)\big), \qquad
               \sigma = \operatorname{softplus}(V z + v)

    where z are the features and h is the head. The map (V, v) is attached to the head, is initialized at zero, and
    belongs to the body. After training a client multiplies the Gaussians of all its examples of a class, and the
    server multiplies the clients' Gaussians and a unit Gaussian:

    .. math::  S_y^{-2} = 1 + \sum_{i, b: y_b = y} \sigma_b^{-2}, \qquad
               M_y = S_y^2 \sum_{i, b: y_b = y} \sigma_b^{-2} z_b

    A class that the cohort lacks keeps its Gaussian, initially N(0, 1). Noise is a hash of the client's seed and its
    number of steps, so that both passes of SAM use the same noise. The client predicts with the head at the mean, z:
    with a linear head this is the limit of the mean of outputs over samples.

    Args:
        strength: :math:`\beta`, at least 0.
        samples: J, number of samples of an example's features in each step, at least 1.
        renewal: step of the classes' means and standard deviations toward the new ones in each round, in (0, 1].
        kl: ``"code"`` as above, as in the authors' code; ``"bound"`` with the arguments swapped, as in their theory.
        names: the linear layer from features to classes.

    Memory:    the number of steps taken.
    Sends:     two tensors, classes by features, both ways; and (V, v) with the body.
    Cost:      no extra gradient, the head once per sample; one pass without a gradient per round.
    Raises:    UsageError: if an argument is out of its range, or targets are not class labels.

    Example:
        >>> class_gaussians(1e-3, samples=4)
        class_gaussians(strength=0.001, samples=4, renewal=1.0, kl='code', names=head)

    Reference: Zhang et al., FedCR, ICML 2023.
    Differs:   the authors map the last hidden layer to means and deviations; here the means are the features
        themselves. They multiply Gaussians during the last epoch, with a changing model; here they are multiplied
        after it, in one pass. The authors predict with the mean of sampled outputs. Deviations are at least 1e-4.
    """
    require(strength >= 0, f"class_gaussians: strength must be at least 0, got {strength}")
    require(samples >= 1, f"class_gaussians: samples must be at least 1, got {samples}")
    require(0 < renewal <= 1, f"class_gaussians: renewal must be in (0, 1], got {renewal}")
    require(kl in ("code", "bound"), f"class_gaussians: kl is 'code' or 'bound', not {kl!r}")

    def server(setup: Setup) -> Tree:
        _, classes, features = classifier(names, setup.structure)
        like = wide(setup.weights).flat
        return Tree.of({"mean": like.new_zeros(classes, features), "deviation": like.new_ones(classes, features)})

    def objective(local: Local) -> Objective:
        found = classifier(names, local.structure)

        def loss(inner: Term, seen: Pass, y: Tensor, facts: Tree) -> Tensor:
            z, sigma = normal(seen, found)
            drawn = (z + sigma * noise(seen, found, facts["seed"], samples)).to(seen.features.dtype)
            fits = [inner(seen._replace(outputs=seen.layer(draw)), y) for draw in drawn]
            own = of_class(y, found.classes).to(facts["mean"].dtype)
            of_classes = own @ facts["mean"], own @ facts["deviation"]
            pair = (of_classes, (z, sigma)) if kl == "code" else ((z, sigma), of_classes)
            return torch.stack(fits).mean() + strength * divergence(*pair).mean()

        where = layout((*local.received, "seed"), (*local.received.layout.shapes, torch.Size((1,))))
        return Objective(found.layer, loss, combine(where, local.received, vectors(seed=key_of(local))))

    def finish(local: Local) -> tuple[Tree, Tree]:
        found = classifier(names, local.structure)

        def sums(seen: Pass, y: Tensor, facts: Tree) -> Mapping[str, Tensor]:
            z, sigma = normal(seen, found)
            own = of_class(y, found.classes).to(z.dtype)
            return {"precision": own.T @ sigma**-2, "weighted": own.T @ (sigma**-2 * z)}

        shape = (found.classes, found.features)
        return local.memory, local.total(local.end, Query(found.layer, sums, {"precision": shape, "weighted": shape}))

    def aggregate(central: Central, mean: Tree) -> Update:
        there, precision = mean["precision"] > 0, 1 + central.arrived * mean["precision"]
        fresh = {"mean": central.arrived * mean["weighted"] / precision, "deviation": precision**-0.5}
        renewed = {name: torch.lerp(central.state[name], new, renewal) for name, new in fresh.items()}
        return Update(Tree.of({name: torch.where(there, new, central.state[name]) for name, new in renewed.items()}))

    return Part(
        attach=partial(add_spread, names),
        server=server,
        gradient=partial(count_steps, names),
        objective=objective,
        finish=finish,
        aggregate=aggregate,
        uniform=True,
    )
