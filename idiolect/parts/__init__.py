"""The ideas that methods are composed of."""

from idiolect.parts.momentum import server_momentum
from idiolect.parts.proximal import proximal
from idiolect.parts.share import share
from idiolect.parts.sharpness import adaptive_sam, flexible_sam, sam
from idiolect.parts.tune import finetune

__all__ = ["adaptive_sam", "finetune", "flexible_sam", "proximal", "sam", "server_momentum", "share"]
