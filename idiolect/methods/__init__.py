"""The catalogue: each method is a composition of parts."""

from idiolect.methods.averaging import fedavg, fedavg_ft, fedprox, local
from idiolect.methods.collaboration import fedamp, fedcac, fedpac, pfedsim
from idiolect.methods.drift import scaffold
from idiolect.methods.normalisation import bn_only, fedbn, silobn
from idiolect.methods.personal import ditto, fedala
from idiolect.methods.sharpness import fedasam, fedfsa, fedsam, mofedsam

__all__ = [
    "bn_only",
    "ditto",
    "fedala",
    "fedamp",
    "fedasam",
    "fedavg",
    "fedavg_ft",
    "fedbn",
    "fedcac",
    "fedfsa",
    "fedpac",
    "fedprox",
    "fedsam",
    "local",
    "mofedsam",
    "pfedsim",
    "scaffold",
    "silobn",
]
