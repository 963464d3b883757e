"""Memory of the operating system: allocation, and memory that processes share."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # parameters of `mallopt` in glibc


def keep_freed_memory() -> None:
    """Make the C library keep the memory that this process frees, for its next allocations.

    Otherwise a row of five megabytes that is allocated and freed in each step is returned to the system each time. This
    costs a thousand page faults: a SAM step on 1.3 million parameters spent a fifth of its time on them. It works for
    blocks of up to 32 MiB, the limit of glibc; with another C library it does nothing.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "gnu_get_libc_version"):
            library.mallopt(_MMAP_THRESHOLD, 32 << 20)
            library.mallopt(_TRIM_THRESHOLD, 1 << 30)


def shared(like: Tensor, *lead: int) -> Tensor:
    """Return zeros like a tensor, with leading axes, in memory that this process shares with processes forked later.

    On other devices than the CPU it is ordinary memory.
    """
    shape = torch.Size((*lead, *like.shape))
    size = shape.numel() * like.element_size()
    if not size or like.device.type != "cpu":
        return like.new_zeros(shape)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=like.dtype).view(shape)
