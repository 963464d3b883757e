"""The ideas that methods are composed of."""

from idiolect.parts.alignment import feature_alignment
from idiolect.parts.attention import attention
from idiolect.parts.bias import domain_bias
from idiolect.parts.calibrate import balanced_softmax, calibrated_logits
from idiolect.parts.class_means import aligned_features
from idiolect.parts.clusters import clusters
from idiolect.parts.consistent import consistent_sam
from idiolect.parts.contrast import model_contrast
from idiolect.parts.critical import critical_mix
from idiolect.parts.distil import not_true_distillation
from idiolect.parts.dynamic import dynamic
from idiolect.parts.envelope import moreau_envelope
from idiolect.parts.estimate import estimated_sam
from idiolect.parts.fisher import fisher_weights
from idiolect.parts.gaussians import class_gaussians
from idiolect.parts.meta import meta_gradient
from idiolect.parts.mix import adaptive_mix
from idiolect.parts.mixed_heads import mixed_heads
from idiolect.parts.mixture import personal_mixture
from idiolect.parts.momentum import server_momentum
from idiolect.parts.neighbours import nearest_neighbours
from idiolect.parts.normalised import normalised_average
from idiolect.parts.private_head import private_head
from idiolect.parts.prototypes import prototypes
from idiolect.parts.proximal import personal_model, proximal
from idiolect.parts.relax import relaxed_start
from idiolect.parts.server_sam import server_sam
from idiolect.parts.server_step import server_adaptive, server_sgd
from idiolect.parts.share import share
from idiolect.parts.sharpness import adaptive_sam, flexible_sam, sam
from idiolect.parts.similar import similar_bodies
from idiolect.parts.split import freeze, head_first
from idiolect.parts.tune import finetune
from idiolect.parts.variates import control_variates

__all__ = [
    "adaptive_mix",
    "adaptive_sam",
    "aligned_features",
    "attention",
    "balanced_softmax",
    "calibrated_logits",
    "class_gaussians",
    "clusters",
    "consistent_sam",
    "control_variates",
    "critical_mix",
    "domain_bias",
    "dynamic",
    "estimated_sam",
    "feature_alignment",
    "finetune",
    "fisher_weights",
    "flexible_sam",
    "freeze",
    "head_first",
    "meta_gradient",
    "mixed_heads",
    "model_contrast",
    "moreau_envelope",
    "nearest_neighbours",
    "normalised_average",
    "not_true_distillation",
    "personal_mixture",
    "personal_model",
    "private_head",
    "prototypes",
    "proximal",
    "relaxed_start",
    "sam",
    "server_adaptive",
    "server_momentum",
    "server_sam",
    "server_sgd",
    "share",
    "similar_bodies",
]
