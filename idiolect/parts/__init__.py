"""The ideas that methods are composed of."""

from idiolect.parts.calibrate import balanced_softmax, calibrated_logits
from idiolect.parts.contrast import model_contrast
from idiolect.parts.distil import not_true_distillation
from idiolect.parts.gaussians import class_gaussians
from idiolect.parts.mix import adaptive_mix
from idiolect.parts.momentum import server_momentum
from idiolect.parts.private_head import private_head
from idiolect.parts.prototypes import prototypes
from idiolect.parts.proximal import personal_model, proximal
from idiolect.parts.share import share
from idiolect.parts.sharpness import adaptive_sam, flexible_sam, sam
from idiolect.parts.tune import finetune
from idiolect.parts.variates import control_variates

__all__ = [
    "adaptive_mix",
    "adaptive_sam",
    "balanced_softmax",
    "calibrated_logits",
    "class_gaussians",
    "control_variates",
    "finetune",
    "flexible_sam",
    "model_contrast",
    "not_true_distillation",
    "personal_model",
    "private_head",
    "prototypes",
    "proximal",
    "sam",
    "server_momentum",
    "share",
]
