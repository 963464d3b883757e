"""The catalogue: each method is a composition of parts."""

from idiolect.methods.averaging import fedavg, fedavg_ft, fedprox, local
from idiolect.methods.drift import scaffold
from idiolect.methods.losses import fedcr, fedlc, fedntd, fedproto, fedrod, moon
from idiolect.methods.normalisation import bn_only, fedbn, silobn
from idiolect.methods.personal import ditto, fedala
from idiolect.methods.sharpness import fedasam, fedfsa, fedsam, mofedsam

__all__ = [
    "bn_only",
    "ditto",
    "fedala",
    "fedasam",
    "fedavg",
    "fedavg_ft",
    "fedbn",
    "fedcr",
    "fedfsa",
    "fedlc",
    "fedntd",
    "fedproto",
    "fedprox",
    "fedrod",
    "fedsam",
    "local",
    "mofedsam",
    "moon",
    "scaffold",
    "silobn",
]
