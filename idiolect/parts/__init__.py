"""The ideas that methods are composed of."""

from idiolect.parts.clusters import clusters
from idiolect.parts.meta import meta_gradient
from idiolect.parts.mix import adaptive_mix
from idiolect.parts.momentum import server_momentum
from idiolect.parts.proximal import personal_model, proximal
from idiolect.parts.share import share
from idiolect.parts.sharpness import adaptive_sam, flexible_sam, sam
from idiolect.parts.split import freeze, head_first
from idiolect.parts.tune import finetune
from idiolect.parts.variates import control_variates

__all__ = [
    "adaptive_mix",
    "adaptive_sam",
    "clusters",
    "control_variates",
    "finetune",
    "flexible_sam",
    "freeze",
    "head_first",
    "meta_gradient",
    "personal_model",
    "proximal",
    "sam",
    "server_momentum",
    "share",
]
