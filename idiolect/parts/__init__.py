"""The ideas that methods are composed of."""

from idiolect.parts.consistent import consistent_sam
from idiolect.parts.dynamic import dynamic
from idiolect.parts.mix import adaptive_mix
from idiolect.parts.momentum import server_momentum
from idiolect.parts.proximal import personal_model, proximal
from idiolect.parts.server_sam import server_sam
from idiolect.parts.share import share
from idiolect.parts.sharpness import adaptive_sam, flexible_sam, sam
from idiolect.parts.tune import finetune
from idiolect.parts.variates import control_variates

__all__ = [
    "adaptive_mix",
    "adaptive_sam",
    "consistent_sam",
    "control_variates",
    "dynamic",
    "finetune",
    "flexible_sam",
    "personal_model",
    "proximal",
    "sam",
    "server_momentum",
    "server_sam",
    "share",
]
