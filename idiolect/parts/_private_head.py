"""A private head per client, added to the shared head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idiolect.core.part import Part, part
from idiolect.core.scope import Scope, head
from idiolect.core.structure import Private
from idiolect.core.tree import Tree
from idiolect.core.types import Local, Objective, Pass, Term
from idiolect.parts.common.classes import classifier, layer_in
from idiolect.parts.common.outputs import change_outputs


class PrivateHead(Private):
    """A linear layer whose outputs are added to another layer's in evaluation mode. It is initialized at zero."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(like))
        self.bias = nn.Parameter(torch.zeros_like(like[:, 0]))

    def beside(self, shared: nn.Module, x: Tensor, outputs: Tensor) -> Tensor:
        """Return the outputs of the shared head plus this head's, for the shared head's input."""
        return outputs if shared.training else outputs + F.linear(x, self.weight, self.bias)


@part
def private_head(names: Scope = head) -> Part:
    r"""Give each client a private head, trained on the client's examples to correct the shared head's outputs.

    .. math::  L(g(z)) + L\big(\operatorname{sg}[g(z)] + p_i(\operatorname{sg}[z])\big)

    where g is the shared head, :math:`p_i` the private one, z the features and sg stops the gradient, so that
    the second term trains neither body nor shared head. A client predicts with :math:`g(z) + p_i(z)`. The shared
    model is g alone: its private head is zero.

    List it after parts that change only the loss of the shared head, such as `balanced_softmax`: the second term uses
    the loss of the run, changed by the parts listed after this one.

    Args:
        names: the linear layer that is the shared head.

    Memory:    the private head.       Sends: nothing.       Receives: nothing.
    Cost:      no extra gradient.
    Raises:    UsageError: if `names` is not one linear layer.

    Example:
        >>> private_head()
        private_head(names=head)

    Reference: Chen and Chao, FedRoD, ICLR 2022.
    Differs:   the private head starts at zero instead of at random or as a copy of the shared one. It is linear; the
        paper's variant for new clients generates it from their distribution over classes.
    """

    def attach(module: nn.Module) -> None:
        shared = layer_in(module, names)
        if not hasattr(shared, "private"):
            shared.private = PrivateHead(shared.weight)
            change_outputs(shared, shared.private.beside)

    def objective(local: Local) -> Objective:
        found = classifier(names, local.structure)
        weight, bias = (found.tensor(f"private.{name}") for name in ("weight", "bias"))

        def loss(inner: Term, seen: Pass, y: Tensor, facts: Tree) -> Tensor:
            features = seen.features.detach()
            own = F.linear(features, seen.weights[weight], seen.weights[bias])
            return inner(seen, y) + inner(seen._replace(outputs=seen.layer(features).detach() + own), y)

        return Objective(found.layer, loss)

    return Part(attach=attach, objective=objective)
