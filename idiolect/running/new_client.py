"""A model for a client that never trained: what stands in for the batch normalization it does not have."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from idiolect.compute.autograd import Model
from idiolect.core.errors import UsageError
from idiolect.core.method import Weighting
from idiolect.core.nest import Nest, named_tensors
from idiolect.core.part import require
from idiolect.core.scope import Names
from idiolect.core.tree import Tree, combine, overlay, pick
from idiolect.data import Placement, first_of
from idiolect.engines.federation import Federation

Rule = Literal["pooled", "average", "reestimate"]


def new_client(
    federation: Federation, rule: Rule = "pooled", x: Nest | None = None, weighting: Weighting = "samples"
) -> nn.Module:
    r"""Return a model for a client that never trained. The federation is not changed.

    Shared tensors are taken as they are. Where batch normalization is personal (FedBN, SiloBN), each of its
    tensors is the mean over the clients that have trained, such as :math:`\bar\mu = \sum_i p_i \mu_i`, and its
    counters are the largest of theirs. The rules differ in the running mean and variance:

    ``"average"``
        :math:`\bar\mu` and :math:`\bar v = \sum_i p_i v_i`, which is too small where means differ.
    ``"pooled"``
        :math:`\bar\mu` and the variance over all clients together,
        :math:`\bar v = \sum_i p_i (v_i + \mu_i^2) - \bar\mu^2`.
    ``"reestimate"``
        those of the new client's own examples, in every layer of batch normalization, also where the method
        shares them. All of `x` goes through the model as one batch: each layer normalizes by it, as in
        training, and keeps its mean and, as PyTorch does, its unbiased variance. So the result depends on no
        batch size and no order. Where memory is short, give a random part of the examples.

    Args:
        federation: whose model it is; at least one client has trained.
        rule: see above.
        x: ``(n, ...)`` examples of the new client, without labels, n at least 2; for ``"reestimate"`` alone.
        weighting: :math:`p_i` by training examples, or uniform.

    Returns:
        A copy of the user's module in evaluation mode. Where all tensors are shared (FedAvg; also Ditto, whose
        private models begin with training), ``"average"`` and ``"pooled"`` give the shared model.

    Raises:
        UsageError: if a personal tensor is not of batch normalization, and no scale or shift of another kind of
            normalization, no client has trained, or an argument cannot be used.

    Example:
        >>> import idiolect
        >>> levels = {"a": 0.0, "b": 10.0}
        >>> clients = {c: idiolect.ClientData(train=([[m - 1], [m + 1]], [0, 1])) for c, m in levels.items()}
        >>> net = nn.Sequential(nn.BatchNorm1d(1, momentum=1.0), nn.Linear(1, 2))
        >>> run = idiolect.fit(net, clients, idiolect.methods.fedbn(), rounds=1)
        >>> for rule, x in (("average", None), ("pooled", None), ("reestimate", torch.tensor([[20.0], [22.0]]))):
        ...     norm = new_client(run.federation, rule, x)[0]
        ...     print(rule, norm.running_mean.item(), norm.running_var.item())
        average 5.0 2.0
        pooled 5.0 27.0
        reestimate 21.0 2.0

    Reference: Li et al., ICLR 2021 (FedBN); Li et al., Pattern Recognition 2018 (AdaBN: the re-estimate).
    """
    rules, weightings = ("pooled", "average", "reestimate"), ("samples", "uniform")
    require(rule in rules, f"new_client: rule is one of {', '.join(map(repr, rules))}, not {rule!r}")
    require(weighting in weightings, f"new_client: weighting is 'samples' or 'uniform', not {weighting!r}")
    if rule == "reestimate":
        x = _checked(federation, x)
    else:
        require(x is None, f"new_client: rule {rule!r} reads no examples; leave x out, or take rule='reestimate'")
    model, shared = federation.model, federation.server["share"]
    weights = combine(model.structure.layout, model.initial, shared, _merged(federation, rule, weighting))
    if x is not None:
        weights = overlay(weights, model.statistics(weights, x, correction=1))
    return model.module(weights).to(model.home)


def _merged(federation: Federation, rule: Rule, weighting: Weighting) -> Tree:
    """Return the personal tensors that the clients which have trained give to a new one."""
    structure, known = federation.model.structure, sorted(federation.memory)
    personal = structure.exchangeable - set(federation.server["share"])
    scales = structure.normalization & structure.names("weight")  # of layers without statistics too
    alone = sorted(personal - structure.owned_by(_BatchNorm) - scales)
    if alone:
        raise UsageError(
            f"new_client: {alone[0]} is personal and not of batch normalization; "
            f"a new client of {federation.method.name} has to train first"
        )
    require(bool(known), "new_client: no client has trained yet; play a round first")
    given = personal | structure.names("counter")  # what is private begins as it did for everybody
    memories = [pick(federation.memory.get(client)["share"], given) for client in known]
    rows = Tree(memories[0].layout, torch.stack([memory.flat.double() for memory in memories]))
    sizes = [len(federation.clients[c].train) if weighting == "samples" else 1 for c in known]
    p = rows.flat.new_tensor(sizes) / sum(sizes)
    mean = Tree(rows.layout, p @ rows.flat)
    other = {name: rows[name].amax(dim=0) for name in structure.names("counter")}
    for name in personal if rule == "pooled" else ():
        center = name.removesuffix("var") + "mean"
        if name.endswith("running_var") and center in personal:
            other[name] = mean[name] + p @ (rows[center] - mean[center]) ** 2  # no cancellation, never below 0
    merged = overlay(mean, Tree.of(other))
    return Tree(merged.layout, merged.flat.to(federation.model.dtype))


def _running(model: Model) -> Names:
    return model.structure.owned_by(_BatchNorm) & model.structure.names("statistic")


def _checked(federation: Federation, x: Nest | None) -> Nest:
    """Return a new client's examples in the form of the others', or say what is wrong with them."""
    like, _ = first_of(next(iter(federation.clients.values())).train)
    if not _running(federation.model):
        raise UsageError(
            "new_client: no batch normalization with running statistics to re-estimate; take rule='average'"
        )
    wanted, own = dict(named_tensors(like, "x")), dict(named_tensors(x, "x"))
    if wanted.keys() != own.keys():
        raise UsageError(
            f"new_client: rule 'reestimate' needs {', '.join(wanted)} of the new client, not "
            f"{', '.join(own) or type(x).__name__}; {_form('its examples', next(iter(wanted.values())))}"
        )
    for place, tensor in own.items():
        form = wanted[place]
        fits = tensor.dim() == form.dim() and tensor.shape[1:] == form.shape[1:] and len(tensor) > 1
        if not fits or tensor.is_floating_point() != form.is_floating_point():
            raise UsageError(
                f"new_client: {place} is {tensor.dtype} of shape {tuple(tensor.shape)}; {_form('it', form)}"
            )
        if not torch.isfinite(tensor).all():
            row = int(torch.isfinite(tensor).logical_not().nonzero()[0, 0])
            raise UsageError(
                f"new_client: {place} has a value that is not finite in row {row}; remove the example or fill it in"
            )
    return Placement(federation.model.device, federation.model.dtype).batch(x, None)[0]


def _form(what: str, like: Tensor) -> str:
    return f"give {what} as one {like.dtype} tensor of shape (n, {str(tuple(like.shape[1:]))[1:]}, n above 1"
