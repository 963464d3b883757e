r"""Low-rank adapters (LoRA): which tensors of a model are factors, recognized by the structure of their layer.

A LoRA layer adds :math:`s\,B A x` to the output of a frozen layer. It has attributes ``lora_A`` and ``lora_B``, or
``lora_embedding_A`` and ``lora_embedding_B``, and ``scaling``, as the library `peft` writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import nn

from idiolect.core.errors import UsageError

Factor = Literal["", "a", "b"]
"""The factor A, which is initialized at random, the factor B, which is initialized at zero, or neither."""

_TWINS = {
    "lora_A": "lora_B",
    "lora_B": "lora_A",
    "lora_embedding_A": "lora_embedding_B",
    "lora_embedding_B": "lora_embedding_A",
}


def factor_of(name: str, layers: Mapping[str, nn.Module]) -> Factor:
    """Return which factor of a LoRA layer a tensor belongs to.

    The initialization decides, not the letter: of an embedding the factor that is called A starts at zero.

    Args:
        name: name of the tensor.
        layers: the modules of the model by name.

    Raises:
        UsageError: if the layer has merged its factors into its weight, so that they have no effect.

    Example:
        >>> layer = nn.Module()
        >>> layer.lora_A, layer.lora_B, layer.scaling = nn.Linear(3, 2), nn.Linear(2, 3), 1.0
        >>> [factor_of(n, {"q": layer}) for n in ("q.lora_A.weight", "q.lora_B.bias", "q.weight")]
        ['a', 'b', '']
    """
    parts = name.split(".")
    for k, part in enumerate(parts):
        layer = layers.get(".".join(parts[:k]))
        if part in _TWINS and hasattr(layer, _TWINS[part]) and hasattr(layer, "scaling"):
            if getattr(layer, "merged", False):
                where = ".".join(parts[:k])
                raise UsageError(f"the adapter of {where!r} is merged into its weight: unmerge it (unmerge_adapter())")
            reversed_ = "embedding" in part or isinstance(layer, nn.Embedding)
            return "a" if part.endswith("B" if reversed_ else "A") else "b"
    return ""
