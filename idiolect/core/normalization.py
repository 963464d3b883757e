"""Normalization layers: which modules they are, and which of their buffers are running statistics."""

from __future__ import annotations

import re
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from idiolect.core.errors import UsageError

M = TypeVar("M", bound=type[nn.Module])

_KNOWN = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_NAME = re.compile(r"Norm(alization)?(Act|Gated|Affine)?\d*d?$")
_REGISTERED: set[type[nn.Module]] = set()


def register_normalization(layer: M) -> M:
    """Declare a class to be a normalization layer: its tensors then belong to the scope `normalization`.

    PyTorch's own classes need no declaration, nor classes that look like them: the name ends in Norm (LlamaRMSNorm,
    T5LayerNorm, LayerNorm2d, BatchNormAct2d), and all tensors are vectors of one length. The floating buffers of a
    declared class are running statistics, which are exchanged and averaged; of a class that only looks like one, those
    whose names begin with ``running_``. Real sites declare it in the code that they share with the coordinator.

    Args:
        layer: the class.

    Returns:
        The class, so that the function also serves as a decorator.

    Raises:
        UsageError: if it is no class of modules.

    Example:
        >>> import torch
        >>> @register_normalization
        ... class Rescale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gain = nn.Parameter(torch.ones(4))
        >>> from idiolect.core import scope
        >>> print(scope.normalization.show(nn.Sequential(nn.Linear(3, 4), Rescale())))
        1.gain  (4,)
    """
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise UsageError(f"register_normalization takes a class of modules, not {layer!r}")
    _REGISTERED.add(layer)
    return layer


def normalizes(module: nn.Module) -> bool:
    """Return whether a module is a normalization layer.

    Example:
        >>> [normalizes(m) for m in (nn.RMSNorm(4), nn.Linear(4, 4), nn.utils.parametrizations.weight_norm)]
        [True, False, False]
    """
    return isinstance(module, _KNOWN) or _registered(module) or _looks_alike(module)


def running_statistics(module: nn.Module) -> frozenset[str]:
    """Return the names of the buffers of a normalization layer that are running statistics."""
    own = {n for n, b in module.named_buffers(recurse=False) if b.is_floating_point()}
    if isinstance(module, _NormBase) or _registered(module):
        return frozenset(own)
    return frozenset(n for n in own if n.startswith("running_")) if _looks_alike(module) else frozenset()


def normalizes_by_batch(module: nn.Module) -> bool:
    """Return whether a layer normalizes by the statistics of a batch in training, which takes at least two values."""
    if isinstance(module, _BatchNorm):
        return True
    return not isinstance(module, _NormBase) and bool(running_statistics(module))


def _registered(module: nn.Module) -> bool:
    return any(kind in _REGISTERED for kind in type(module).__mro__)


def _looks_alike(module: nn.Module) -> bool:
    if not isinstance(module, nn.Module) or not _NAME.search(type(module).__name__):
        return False
    own: list[Tensor] = list(module.parameters(recurse=False))
    if not own or any(True for child in module.children() for _ in child.parameters()):
        return False
    own += [b for b in module.buffers(recurse=False) if b.is_floating_point() and b.numel() > 1]
    return len({t.numel() for t in own}) == 1 and all(max(t.shape, default=1) == t.numel() for t in own)
