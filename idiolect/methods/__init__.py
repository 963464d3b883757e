"""The catalogue: each method is a composition of parts."""

from idiolect.methods.averaging import fedavg, fedavg_ft, fedprox, local
from idiolect.methods.drift import fedinit, scaffold
from idiolect.methods.normalisation import bn_only, fedbn, silobn
from idiolect.methods.personal import apfl, ditto, fedala, pfedme
from idiolect.methods.server import fedadagrad, fedadam, fedavgm, fednova, fedyogi
from idiolect.methods.sharpness import fedasam, fedfsa, fedlesam, fedsam, mofedsam

__all__ = [
    "apfl",
    "bn_only",
    "ditto",
    "fedadagrad",
    "fedadam",
    "fedala",
    "fedasam",
    "fedavg",
    "fedavg_ft",
    "fedavgm",
    "fedbn",
    "fedfsa",
    "fedinit",
    "fedlesam",
    "fednova",
    "fedprox",
    "fedsam",
    "fedyogi",
    "local",
    "mofedsam",
    "pfedme",
    "scaffold",
    "silobn",
]
