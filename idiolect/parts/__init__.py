"""The ideas that methods are composed of."""

from idiolect.parts.alignment import aligned_features
from idiolect.parts.alternate import head_then_body
from idiolect.parts.attention import attention
from idiolect.parts.critical import critical_mix
from idiolect.parts.mix import adaptive_mix
from idiolect.parts.mixed_heads import mixed_heads
from idiolect.parts.momentum import server_momentum
from idiolect.parts.proximal import personal_model, proximal
from idiolect.parts.share import share
from idiolect.parts.sharpness import adaptive_sam, flexible_sam, sam
from idiolect.parts.similar import similar_bodies
from idiolect.parts.tune import finetune
from idiolect.parts.variates import control_variates

__all__ = [
    "adaptive_mix",
    "adaptive_sam",
    "aligned_features",
    "attention",
    "control_variates",
    "critical_mix",
    "finetune",
    "flexible_sam",
    "head_then_body",
    "mixed_heads",
    "personal_model",
    "proximal",
    "sam",
    "server_momentum",
    "share",
    "similar_bodies",
]
