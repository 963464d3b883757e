"""The ideas that methods are composed of."""

from typing import TYPE_CHECKING

from idiolect.core.errors import names_of
from idiolect.parts._adapted_statistics import adapted_statistics
from idiolect.parts._adaptive_mix import adaptive_mix
from idiolect.parts._adaptive_sam import adaptive_sam
from idiolect.parts._aligned_features import aligned_features
from idiolect.parts._attention import attention
from idiolect.parts._balanced_softmax import balanced_softmax
from idiolect.parts._calibrated_logits import calibrated_logits
from idiolect.parts._class_gaussians import class_gaussians
from idiolect.parts._clusters import clusters
from idiolect.parts._conditional_valve import conditional_valve
from idiolect.parts._consistent_sam import consistent_sam
from idiolect.parts._control_variates import control_variates
from idiolect.parts._critical_mix import critical_mix
from idiolect.parts._discriminant_head import discriminant_head
from idiolect.parts._domain_bias import domain_bias
from idiolect.parts._dynamic import dynamic
from idiolect.parts._estimated_sam import estimated_sam
from idiolect.parts._feature_alignment import feature_alignment
from idiolect.parts._finetune import finetune
from idiolect.parts._first_order_mix import first_order_mix
from idiolect.parts._fisher_weights import fisher_weights
from idiolect.parts._flexible_sam import flexible_sam
from idiolect.parts._freeze import freeze
from idiolect.parts._gated_heads import gated_heads
from idiolect.parts._grown_mask import grown_mask
from idiolect.parts._head_ensemble import head_ensemble
from idiolect.parts._head_first import head_first
from idiolect.parts._hybrid_norm import hybrid_norm
from idiolect.parts._hypernetwork import hypernetwork
from idiolect.parts._local_adapter import local_adapter
from idiolect.parts._loss_weights import loss_weights
from idiolect.parts._meta_gradient import meta_gradient
from idiolect.parts._mixed_heads import mixed_heads
from idiolect.parts._model_contrast import model_contrast
from idiolect.parts._moreau_envelope import moreau_envelope
from idiolect.parts._nearest_neighbors import nearest_neighbors
from idiolect.parts._normalized_average import normalized_average
from idiolect.parts._not_true_distillation import not_true_distillation
from idiolect.parts._personal_mixture import personal_mixture
from idiolect.parts._personal_model import personal_model
from idiolect.parts._private_head import private_head
from idiolect.parts._prototypes import prototypes
from idiolect.parts._proximal import proximal
from idiolect.parts._relaxed_start import relaxed_start
from idiolect.parts._sam import sam
from idiolect.parts._server_adaptive import server_adaptive
from idiolect.parts._server_momentum import server_momentum
from idiolect.parts._server_sam import server_sam
from idiolect.parts._server_sgd import server_sgd
from idiolect.parts._share import share
from idiolect.parts._similar_bodies import similar_bodies

__all__ = [
    "adapted_statistics",
    "adaptive_mix",
    "adaptive_sam",
    "aligned_features",
    "attention",
    "balanced_softmax",
    "calibrated_logits",
    "class_gaussians",
    "clusters",
    "conditional_valve",
    "consistent_sam",
    "control_variates",
    "critical_mix",
    "discriminant_head",
    "domain_bias",
    "dynamic",
    "estimated_sam",
    "feature_alignment",
    "finetune",
    "first_order_mix",
    "fisher_weights",
    "flexible_sam",
    "freeze",
    "gated_heads",
    "grown_mask",
    "head_ensemble",
    "head_first",
    "hybrid_norm",
    "hypernetwork",
    "local_adapter",
    "loss_weights",
    "meta_gradient",
    "mixed_heads",
    "model_contrast",
    "moreau_envelope",
    "nearest_neighbors",
    "normalized_average",
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

if not TYPE_CHECKING:  # a type checker knows the names above, and no others
    __getattr__ = names_of(__name__, __all__)
