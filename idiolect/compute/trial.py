"""Passes over a few examples, before training, that show what a model is."""

from __future__ import annotations

from torch import nn

from idiolect.compute.autograd import Model
from idiolect.compute.hidden import alike
from idiolect.core.copied import copied
from idiolect.core.errors import UsageError
from idiolect.core.makers import makers_in_pass
from idiolect.core.nest import Nest, logits
from idiolect.core.structure import Trial

_PASSES = 2


def tried(model: Model, x: Nest) -> Model:
    """Return the model with the structure that passes over examples show.

    The layer that makes the output is the head. A buffer that training passes do not change is a constant, another one
    outside of normalization layers is the client's own state.

    Args:
        model: the model.
        x: ``(b, ...)`` inputs, at least two.

    Raises:
        UsageError: if the forward pass changes a parameter.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> net.register_buffer("mask", torch.full((4,), -torch.inf))
        >>> "mask" in tried(Model(net), torch.ones(2, 3)).structure.layout.names
        False
    """
    makers = makers_in_pass(copied(model.predicting), lambda module: _predictions(model.run(module, x)))
    return model.after(Trial(makers, _changed(model, x)))


def _predictions(outputs: Nest) -> Nest:
    """Return the predictions among outputs, or all outputs where nothing says which they are."""
    try:
        return logits(outputs)
    except UsageError:
        return outputs


def _changed(model: Model, x: Nest) -> frozenset[str]:
    module = copied(model.training)
    before = {n: t.detach().clone() for n, t in [*module.named_parameters(), *module.named_buffers()]}
    for key in range(_PASSES):
        model.run(module, x, key)
    after = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    moved = {n for n, t in before.items() if n in after and not bool(alike(t, after[n]).all())}
    weights = moved & {n for n, _ in module.named_parameters()} - _renormalized(module)
    if weights:
        raise UsageError(
            f"the forward pass changes parameter {min(weights)!r}: do that once before training, "
            "such as by calling the model on a batch"
        )
    return frozenset(moved)


def _renormalized(module: nn.Module) -> set[str]:
    """Return embeddings that a pass brings to a largest norm, which the next pass from the same weights repeats."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    found = [(n, m) for n, m in module.named_modules() if isinstance(m, kinds) and m.max_norm is not None]
    return {f"{n}.weight" if n else "weight" for n, _ in found}
