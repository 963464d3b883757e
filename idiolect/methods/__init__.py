"""The catalogue: each method is a composition of parts."""

from idiolect.methods.averaging import fedavg, fedavg_ft, fedprox, local
from idiolect.methods.drift import scaffold
from idiolect.methods.features import fedas, feddbe, knnper
from idiolect.methods.normalisation import bn_only, fedbn, silobn
from idiolect.methods.personal import ditto, fedala
from idiolect.methods.sharpness import fedasam, fedfsa, fedsam, mofedsam

__all__ = [
    "bn_only",
    "ditto",
    "fedala",
    "fedas",
    "fedasam",
    "fedavg",
    "fedavg_ft",
    "fedbn",
    "feddbe",
    "fedfsa",
    "fedprox",
    "fedsam",
    "knnper",
    "local",
    "mofedsam",
    "scaffold",
    "silobn",
]
