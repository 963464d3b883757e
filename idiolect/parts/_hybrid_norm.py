"""Batch normalization by a mix of the statistics of the batch and those of all clients."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from idiolect.core.part import Part, part, require
from idiolect.core.scope import batch_norm, nothing
from idiolect.core.structure import ModelStructure, Private
from idiolect.core.tree import Layout, Tree, counting, overlay, pick, vectors, where, wide
from idiolect.core.types import Arrival, Central, GradFn, Gradient, Local, Setup, Step, Update
from idiolect.parts.common.first import TRAINED, trained, untrained
from idiolect.parts.common.outputs import change_outputs

NAME = "hybrid_norm"


class Hybrid(Private):
    """How a layer of batch normalization mixes statistics in training, and the statistics of its last batch.

    Args:
        layer: the layer.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__()
        assert layer.running_mean is not None
        zeros = torch.zeros_like(layer.running_mean)
        self.factor = nn.Parameter(zeros.clone())
        for name in ("mean", "variance", "batch_mean", "batch_variance", "count"):
            self.register_buffer(name, zeros.clone(), persistent=False)

    def mixed(self, layer: _BatchNorm, x: Tensor, outputs: Tensor) -> Tensor:
        """Return the outputs of the layer in training, normalized by mixed statistics."""
        if not self.training:
            return outputs
        dtype = counting(x.dtype)
        over = [axis for axis in range(x.dim()) if axis != 1]
        variance, mean = torch.var_mean(x.to(dtype), over, correction=0)
        self.batch_mean, self.batch_variance = mean.detach(), variance.detach()
        self.count = torch.full_like(self.batch_mean, len(x))
        share = self.factor.to(dtype).sigmoid()
        mean, variance = (
            torch.lerp(self.mean.to(dtype), mean, share),
            torch.lerp(self.variance.to(dtype), variance, share),
        )
        scale = (variance + layer.eps).rsqrt() * (1 if layer.weight is None else layer.weight)
        shift = (0 if layer.bias is None else layer.bias) - mean * scale
        along = (-1, *[1] * (x.dim() - 2))
        return (x * scale.view(along) + shift.view(along)).to(outputs.dtype)


@part
def hybrid_norm(renewal: float = 0.002, predict: Literal["last", "smoothed"] = "last") -> Part:
    r"""Normalize in training by a learned mix of the batch's statistics and those of all clients.

    .. math::  y = \gamma\, \frac{x - m}{\sqrt{v + \varepsilon}} + \beta, \qquad
               m = (1 - a)\, \mu + a\, \mu_B, \quad v = (1 - a)\, \nu + a\, \nu_B, \quad a = \sigma(f)

    in every layer of batch normalization, with the mean :math:`\mu_B` and the biased variance :math:`\nu_B` of the
    batch, and :math:`f` for each channel, which trains with the other weights from 0, so a = ½. It stays with the
    client; a client that has not trained starts from the mean of those of the last cohort. The shared statistics
    :math:`(\mu, \nu)` are constants in training, and no running statistics are updated.

    Before a client trains, its examples pass once through the received model in training mode, and each layer's
    batches are pooled to a mean and a variance of the client. The server pools those of the cohort, with the weights
    :math:`p_i` of the method:

    .. math::  \hat\mu = \sum_i p_i \mu_i, \qquad \hat\nu = \sum_i p_i \big(\nu_i + (\mu_i - \hat\mu)^2\big), \qquad
               \mu \leftarrow \rho \hat\mu + (1 - \rho) \mu, \quad \nu \leftarrow \rho \hat\nu + (1 - \rho) \nu

    Predictions normalize by :math:`(\hat\mu, \hat\nu)`, or by :math:`(\mu, \nu)`: they are the running statistics of
    the shared model, which is complete. The user's model has ordinary layers, and gets ordinary layers back.

    Args:
        renewal: :math:`\rho`, in (0, 1]. With 0.002 the constants need hundreds of rounds. Near 1 they are those of a
            cohort's few classes, and training may diverge.
        predict: ``"last"`` for the pooled statistics of the last round, ``"smoothed"`` for :math:`(\mu, \nu)`.

    Memory:    f, and a flag that the client has trained.
    Sends:     f and a mean and a variance for each channel, both ways; the model has its running statistics besides.
    Cost:      one pass over the examples without gradient in each round.
    Raises:    UsageError: if `renewal` is out of range, the model has no batch normalization with running statistics,
        or these are not shared.

    Example:
        >>> hybrid_norm(renewal=0.1)
        hybrid_norm(renewal=0.1, predict='last')

    Reference: Chen et al., HBN, ICML 2025.
    Differs:   the authors' code records the mixed statistics instead of the batch's, so f biases what is shared; of
        one batch of 64 examples, always the same; here of all examples. It divides the pooled variance by the number
        of examples minus 1, though variances are over pixels too; here by their number. Before each evaluation the
        code passes examples of the cohort through the new model; here ``"last"`` are the statistics that the last
        cohort sent with its update, which are those of the model that it received. A client with one example
        normalizes by running statistics, as everywhere in this library, and sends the shared statistics back; the
        code skips clients with less than a batch. Weight decay, which the code has not, acts on f too.
    """
    require(0 < renewal <= 1, f"hybrid_norm: renewal must be in (0, 1], got {renewal}")

    def attach(module: nn.Module) -> None:
        for layer in list(module.modules()):
            if isinstance(layer, _BatchNorm) and layer.running_mean is not None and not hasattr(layer, NAME):
                layer.add_module(NAME, own := Hybrid(layer))
                change_outputs(layer, own.mixed)

    def server(setup: Setup) -> Tree:
        batch_norm(setup.structure)  # or it raises
        names = _running(setup.structure)
        require(bool(names), "hybrid_norm: no layer of batch normalization keeps running statistics")
        require(
            names <= set(setup.shared),
            "hybrid_norm needs shared running statistics, which all clients normalize by: share them too",
        )
        mean, variance = (wide(pick(setup.weights, _layer_tensors(setup.structure, leaf))).flat for leaf in _RUNNING)
        return vectors(mean=mean, variance=variance, factor=torch.zeros_like(mean))

    def begin(local: Local, weights: Tree) -> tuple[Tree, Tree]:
        places = {leaf: _own(local.structure, leaf) for leaf in ("mean", "variance", "factor")}
        given = [Tree(place, local.received.stretch(leaf)) for leaf, place in places.items()]
        kept = pick(weights, places["factor"].starts)
        given[-1] = where(local.memory[TRAINED] > 0, kept, given[-1])
        return overlay(weights, *given), local.memory

    def finish(local: Local) -> tuple[Tree, Tree]:
        mean, variance = _pooled(local)
        factor = pick(local.end, _own(local.structure, "factor").starts).flat
        return trained(local.memory), vectors(mean=mean, variance=variance, factor=factor)

    def aggregate(central: Central, mean: Tree) -> Update:
        apart = mean["mean"] - central.state["mean"]
        last = overlay(mean, vectors(variance=(mean["variance"] - apart.square()).clamp(min=0)))
        state = overlay(Tree(last.layout, torch.lerp(central.state.flat, last.flat, renewal)), pick(mean, {"factor"}))
        used, structure = last if predict == "last" else state, central.structure
        running = [_layer_tensors(structure, leaf) for leaf in _RUNNING]
        tops = [Tree(structure.layout.only(n), used[m]) for n, m in zip(running, ("mean", "variance"), strict=True)]
        return Update(state, overlay(central.new, *tops))

    return Part(
        attach=attach,
        memory=untrained,
        server=server,
        begin=begin,
        gradient=_standing,
        finish=finish,
        contribute=_second_moments,
        aggregate=aggregate,
    )


_RUNNING = ("running_mean", "running_var")


def _own(structure: ModelStructure, leaf: str) -> Layout:
    """Return the layout of one tensor of each `Hybrid`."""
    return structure.layout.only({n for n in structure.layout.names if f".{n}".endswith(f".{NAME}.{leaf}")})


def _layer_tensors(structure: ModelStructure, leaf: str) -> frozenset[str]:
    """Return the names of one tensor of each layer that has a `Hybrid`."""
    return frozenset(n.removesuffix(f"{NAME}.factor") + leaf for n in _own(structure, "factor").names)


def _running(structure: ModelStructure) -> frozenset[str]:
    """Return the names of the running statistics of these layers."""
    return _layer_tensors(structure, "running_mean") | _layer_tensors(structure, "running_var")


def _standing(grad: GradFn, local: Local) -> GradFn:
    """Return a gradient function that leaves the running statistics as they are."""
    still = _running(local.structure)

    def mixing(at: Tree, step: Step) -> Gradient:
        out = grad(at, step)
        return out._replace(buffers=overlay(out.buffers, pick(at, still)))

    return mixing


def _second_moments(central: Central, arrival: Arrival) -> Tree:
    """Return an upload with second moments about the shared mean for variances, which limits cancellation."""
    sent = arrival.own
    return overlay(sent, vectors(variance=sent["variance"] + (sent["mean"] - central.state["mean"]).square()))


def _pooled(local: Local) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel over all batches of an epoch, at the weights of the start.

    Where the examples show none, they are those of all clients.
    """
    places = [_own(local.structure, leaf) for leaf in ("count", "batch_mean", "batch_variance")]
    none = Tree(places[0], torch.zeros_like(pick(local.start, places[0].starts).flat))
    blank = overlay(local.start, none)
    count = mean = variance = wide(none).flat
    for step in local.stream.epochs(1):
        seen = local.grad(blank, step, only=nothing).buffers
        here, mean_here, variance_here = (wide(pick(seen, place.starts)).flat for place in places)
        count = count + here
        share, apart = here / count.clamp(min=1), mean_here - mean
        variance = variance + share * (variance_here - variance) + share * (1 - share) * apart.square()
        mean = mean + share * apart
    shared = local.received
    return torch.where(count > 0, mean, shared["mean"]), torch.where(count > 0, variance, shared["variance"])
