"""The ideas that methods are composed of."""

from idiolect.parts.envelope import moreau_envelope
from idiolect.parts.estimate import estimated_sam
from idiolect.parts.mix import adaptive_mix
from idiolect.parts.mixture import personal_mixture
from idiolect.parts.momentum import server_momentum
from idiolect.parts.normalised import normalised_average
from idiolect.parts.proximal import personal_model, proximal
from idiolect.parts.relax import relaxed_start
from idiolect.parts.server_step import server_adaptive, server_sgd
from idiolect.parts.share import share
from idiolect.parts.sharpness import adaptive_sam, flexible_sam, sam
from idiolect.parts.tune import finetune
from idiolect.parts.variates import control_variates

__all__ = [
    "adaptive_mix",
    "adaptive_sam",
    "control_variates",
    "estimated_sam",
    "finetune",
    "flexible_sam",
    "moreau_envelope",
    "normalised_average",
    "personal_mixture",
    "personal_model",
    "proximal",
    "relaxed_start",
    "sam",
    "server_adaptive",
    "server_momentum",
    "server_sgd",
    "share",
]
