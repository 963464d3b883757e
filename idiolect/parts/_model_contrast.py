"""A contrastive loss between the features of the received model and of the client's last model."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from idiolect.core.part import Part, part, require
from idiolect.core.scope import Scope, head, layer_of
from idiolect.core.tree import EMPTY, Tree, vectors
from idiolect.core.types import Local, Objective, Pass, Setup, Term


@part
def model_contrast(strength: float, temperature: float = 0.5, names: Scope = head) -> Part:
    r"""Pull features toward the received model's, and away from those of the client's last model.

    .. math::  L - \mu \log \frac{e^{\cos(z, z^t) / \tau}}{e^{\cos(z, z^t) / \tau} + e^{\cos(z, z_i^-) / \tau}}

    where :math:`z^t` are features of the model from which local training starts and :math:`z_i^-` those of the
    client's model at the end of its last participation, both in evaluation mode. A client that takes part for the
    first time has no last model, and trains on the plain loss.

    Args:
        strength: :math:`\mu`, at least 0; 0 is the plain loss.
        temperature: :math:`\tau`, above 0.
        names: the layer whose input the features are.

    Memory:    the client's last model.       Sends: nothing.       Receives: nothing.
    Cost:      two more passes without a gradient per step.
    Raises:    UsageError: if `strength` is negative or `temperature` not above 0.

    Example:
        >>> model_contrast(1.0)
        model_contrast(strength=1.0, temperature=0.5, names=head)

    Reference: Li, He and Song, MOON, CVPR 2021.
    Differs:   the authors put a projection of two layers before the head; here features are the input of the model's
        own head. Their code uses the initial weights as the last model of a client that joins late; here there is none.
    """
    require(strength >= 0, f"model_contrast: strength must be at least 0, got {strength}")
    require(temperature > 0, f"model_contrast: temperature must be above 0, got {temperature}")

    def memory(setup: Setup) -> Tree:
        return vectors(last=setup.weights.flat, trained=setup.weights.flat.new_zeros(1))

    def objective(local: Local) -> Objective:
        row = local.structure.layout

        def loss(inner: Term, seen: Pass, y: Tensor, facts: Tree) -> Tensor:
            near, far = (
                F.cosine_similarity(seen.features, seen.under(Tree(row, facts[model])).features, dim=1) / temperature
                for model in ("start", "last")
            )
            return inner(seen, y) - strength * facts["trained"].sum() * F.logsigmoid(near - far).mean()

        facts = vectors(start=local.start.flat, last=local.memory["last"], trained=local.memory["trained"])
        return Objective(layer_of(names, local.structure), loss, facts)

    def finish(local: Local) -> tuple[Tree, Tree]:
        trained = local.memory["trained"].new_ones(local.memory["trained"].shape)
        return vectors(last=local.end.flat, trained=trained), EMPTY

    return Part(memory=memory, objective=objective, finish=finish, neutral={"strength": 0.0})
