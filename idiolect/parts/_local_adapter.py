"""A personal low-rank adapter per client beside the shared one, mixed with it for each input."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idiolect.core.errors import UsageError
from idiolect.core.part import Part, part, require
from idiolect.core.rng import uniform_hash
from idiolect.core.scope import lora_a
from idiolect.core.structure import ModelStructure, Private, structure_of
from idiolect.core.tree import EMPTY, Tree, overlay, pick, vectors
from idiolect.core.types import GradFn, Gradient, Local, Pass, Query, Setup, Step
from idiolect.parts.common.classes import filled
from idiolect.parts.common.outputs import change_outputs

NAME, COMPARED = "local_adapter", "local_adapter_compares"


class LocalAdapter(Private):
    """The personal adapter of one layer, whose product starts at zero, and its share of the layer's update.

    Args:
        layer: the layer, with an adapter as `peft` writes it.
        name: name of that adapter.
    """

    down: Any
    up: Any
    share: Tensor

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__()
        self.name = name
        self.down, self.up = deepcopy(_factors(layer, name))
        start = self.up.parameters() if isinstance(self.up, nn.Module) else [self.down]
        for tensor in start:
            nn.init.zeros_(tensor)
        self.requires_grad_(True)
        one = next(self.parameters()).detach().flatten()[:1]
        self.register_buffer("share", torch.zeros_like(one), persistent=False)

    def beside(self, layer: Any, x: Tensor, outputs: Tensor) -> Tensor:  # noqa: ANN401
        """Return the outputs of the layer with this share of its update replaced."""
        count = len(self.share)
        if count > 1:
            require(
                count == len(x),
                f"local_adapter: a layer gets {len(x)} rows for {count} examples: it needs examples on its first axis",
            )
        own = _product(layer, self._dropped(layer, x), self.down, self.up)
        change: Tensor = layer.scaling[self.name] * (own - _product(layer, x, *_factors(layer, self.name)))
        mixed = (change.transpose(0, -1) * self.share).transpose(0, -1)
        return outputs + mixed.to(outputs.dtype)

    def _dropped(self, layer: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        """Return the input of the own adapter after dropout, which draws nothing while the shared adapter trains."""
        known = self.name in getattr(layer, "lora_dropout", {}) and self.name in layer.lora_A  # `peft` drops no words
        p = getattr(layer.lora_dropout[self.name], "p", 0.0) if known else 0.0
        if p and layer.training and bool(self.share > 0):
            return F.dropout(x, p)
        return x

    def still(self, dropout: nn.Module, given: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
        """Return inputs that are not dropped while the shared adapter is frozen; a forward hook of its dropout."""
        return torch.where(self.share > 0, given[0], outputs) if dropout.training else outputs


def _factors(layer: Any, name: str) -> tuple[Any, Any]:  # noqa: ANN401
    """Return the factors of the adapter of a layer: modules, or parameters of an embedding."""
    if name in layer.lora_A:
        return layer.lora_A[name], layer.lora_B[name]
    return layer.lora_embedding_A[name], layer.lora_embedding_B[name]


def _product(layer: Any, x: Tensor, down: Any, up: Any) -> Tensor:  # noqa: ANN401
    """Return the product of two factors with the input of a layer."""
    if isinstance(down, nn.Module):
        result: Tensor = up(down(x.to(next(down.parameters()).dtype)))
    else:
        result = F.embedding(x, down.T, padding_idx=layer.base_layer.padding_idx) @ up.T
    return result


def _adapted(module: nn.Module) -> dict[str, str]:
    """Return the names of the layers with a trainable adapter, and the name of that adapter.

    Raises:
        UsageError: if there is none, or a layer does not add the product of one pair of factors to its output.
    """
    found: dict[str, str] = {}
    for tensor in sorted(lora_a(structure_of(module))):
        path, _, rest = f".{tensor}".rpartition(".lora_")
        path, names = path.removeprefix("."), rest.split(".")
        layer: Any = module.get_submodule(path)
        plain = len(names) > 1 and not {
            *getattr(layer, "lora_magnitude_vector", {}),
            *getattr(layer, "lora_variant", {}),
        }
        require(
            plain, f"local_adapter: the adapter of {path!r} is no plain LoRA in the layout of peft: train it with fedit"
        )
        require(path not in found, f"local_adapter: two adapters of {path!r} train at once: freeze all but one")
        found[path] = names[1]
    return found


def _last(module: nn.Module, name: str | None) -> tuple[nn.Module, int]:
    """Return the layer whose inputs are compared, and their width.

    Raises:
        UsageError: if it is not one linear layer.
    """
    try:
        name = structure_of(module).head if name is None else name
    except UsageError as error:
        reason = str(error).partition(":")[0]
        raise UsageError(f"local_adapter: {reason}: name the layer whose inputs are compared, layer=...") from None
    last: Any = dict(module.named_modules()).get(name)
    width = getattr(getattr(last, "base_layer", last), "in_features", None)
    if last is None or width is None:
        raise UsageError(
            f"local_adapter: {name!r} is no linear layer whose inputs can be compared: name one, layer=..."
        )
    return last, width


@part
def local_adapter(share: float = 0.5, largest: float = 0.5, references: int = 5, layer: str | None = None) -> Part:
    r"""Train a personal low-rank adapter beside the shared one; to predict, mix the two for each input.

    .. math::  y = W_0 x + (1 - c)\, s B_g A_g x + c\, s B_i A_i x

    in every layer with an adapter. The shared adapter g trains with c = 0, as without this part. In the same steps the
    client's own adapter i trains with c = a beside the received :math:`g^t`, which is fixed like all other tensors. A
    client predicts the input x with

    .. math::  c = c_{max} \max\Big(0, \frac1J \sum_{j=1}^{J} \cos\big(e_i(x), e_i(x_j)\big)\Big)

    where e is the input of the model's last layer under the own adapter alone (c = 1), averaged over all axes between
    the first and the last, and :math:`x_j` are random training examples. So inputs unlike the client's own examples
    are left to the shared adapter. A client that has not trained has c = 0.

    Args:
        share: a, in [0, 1]: share of the own adapter while it trains; 1 trains it alone.
        largest: :math:`c_{max}`, in [0, 1]: largest share of the own adapter in predictions.
        references: J, at least 1: number of training examples that inputs are compared with, drawn in each round.
        layer: name of the layer whose input is e; None takes the layer that makes the output.

    Memory:    the own adapter, and the mean direction of e over the references.       Sends: nothing.
    Receives:  nothing.
    Cost:      one more gradient per step, and a pass without gradient over the examples in each round. To predict, one
        more pass over the inputs.
    Raises:    UsageError: if an argument is out of range, or the model has no plain LoRA layer in the layout of `peft`.

    Example:
        >>> local_adapter(largest=1.0)
        local_adapter(share=0.5, largest=1.0, references=5, layer=None)

    Reference: Yang et al., FedDPA, NeurIPS 2024 (FedDPA-T).
    Differs:   the authors' code gives c to the shared adapter when it predicts, so inputs unlike the client's examples
        go to its own adapter; here it is as stated in the paper. The code cuts the gradient at the output of the frozen
        adapter, which hides the layers before it, and applies that adapter's dropout; here neither. It trains the own
        adapter from the second round on, in passes of their own; here from the first, in the same steps, so that
        clipping applies to both adapters together. The own A starts as the shared one instead of at random. The code
        compares the last token, which needs to know the padding.
    """
    for name, value in (("share", share), ("largest", largest)):
        require(0 <= value <= 1, f"local_adapter: {name} must be in [0, 1], got {value}")
    require(references >= 1, f"local_adapter: references must be at least 1, got {references}")

    def attach(module: nn.Module) -> None:
        for path, name in _adapted(module).items():
            adapted: Any = module.get_submodule(path)
            if not hasattr(adapted, NAME):
                adapted.add_module(NAME, own := LocalAdapter(adapted, name))
                change_outputs(adapted, own.beside)
                if name in getattr(adapted, "lora_dropout", {}):
                    adapted.lora_dropout[name].register_forward_hook(own.still)
        last, width = _last(module, layer)
        if not hasattr(last, COMPARED):
            last.add_module(COMPARED, mark := Private())
            mark.register_buffer(
                "none", next(p for p in module.parameters() if p.requires_grad).new_zeros(0, width), persistent=False
            )

    def memory(setup: Setup) -> Tree:
        return vectors(direction=setup.weights.flat.new_zeros(_compared(setup.structure)[1]))

    def gradient(grad: GradFn, local: Local) -> GradFn:
        own, received = _own(local.structure), _with_share(local.start, share)

        def both(at: Tree, step: Step) -> Gradient:
            here, there = grad(at, step), grad(overlay(received, pick(at, own)), step)
            return here._replace(gradient=overlay(here.gradient, pick(there.gradient, own)))

        return both

    def finish(local: Local) -> tuple[Tree, Tree]:
        seen = _compare(local, local.end)
        there = seen["there"]
        draws = uniform_hash(local.seed, there.shape[-1], torch.float64).masked_fill(there == 0, 1.0)
        kept = draws.topk(min(references, there.shape[-1]), largest=False).indices
        total = seen["features"].gather(-2, kept[..., None].expand(*kept.shape, seen["features"].shape[-1])).sum(-2)
        return vectors(direction=total / there.gather(-1, kept).sum(-1, keepdim=True).clamp(min=1)), EMPTY

    def deploy(local: Local, weights: Tree) -> Tree:
        alike = _compare(local, weights, local.inputs)["features"] @ local.memory["direction"]
        shares = {name: largest * alike.clamp(min=0) for name in weights if name.endswith(f"{NAME}.share")}
        return filled(weights, Tree.of(shares))

    return Part(
        attach=attach,
        memory=memory,
        gradient=gradient,
        finish=finish,
        deploy=deploy,
        transductive=True,
        gradients=1,
    )


def _own(structure: ModelStructure) -> frozenset[str]:
    """Return the names of the own adapter's tensors."""
    return frozenset(n for n in structure.names("weight") if f".{NAME}." in f".{n}")


def _with_share(weights: Tree, share: float) -> Tree:
    """Return weights under which the own adapter has this share in every layer."""
    shares = Tree(where := weights.layout.only(_shares(weights)), weights.flat.new_full((where.total,), share))
    return overlay(weights, shares)


def _shares(weights: Tree) -> frozenset[str]:
    return frozenset(n for n in weights if f".{n}".endswith(f".{NAME}.share"))


def _compared(structure: ModelStructure) -> tuple[str, int]:
    """Return the name of the layer whose inputs are compared, and their width."""
    name = next(n for n in structure.layout.names if f".{n}".endswith(f".{COMPARED}.none"))
    return f".{name}".rpartition(f".{COMPARED}")[0].removeprefix("."), structure.layout.shape_of[name][-1]


def _compare(local: Local, weights: Tree, inputs: Tensor | None = None) -> Tree:
    """Return the direction of e of each example under the own adapter alone, and 1 where there is an example."""
    name, width = _compared(local.structure)
    query = Query(name, _one, {"features": (width,), "there": ()})
    return local.each(_with_share(weights, 1.0), query, inputs)


def _one(seen: Pass, y: Tensor, facts: Tree) -> dict[str, Tensor]:
    features = seen.features
    features = F.normalize(features.flatten(1, -2).mean(1) if features.dim() > 2 else features, dim=-1)
    return {"features": features, "there": features.new_ones(len(features))}
