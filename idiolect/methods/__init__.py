"""The catalog: each method is a composition of parts."""

from typing import TYPE_CHECKING

from idiolect.core.errors import names_of
from idiolect.methods.adapters import feddpa, fedit, fedsa_lora, ffa_lora
from idiolect.methods.averaging import fedavg, fedavg_ft, fedprox, local
from idiolect.methods.clusters import ifca
from idiolect.methods.collaboration import fedamp, fedcac, fedfomo, fedpac, pfedsim
from idiolect.methods.drift import fedinit, scaffold
from idiolect.methods.dual import feddyn, fedgloss, fedsmoo, fedspeed
from idiolect.methods.fairness import qfedavg
from idiolect.methods.features import fedas, fedcp, feddbe, fedthe, gpfl, knnper, pfedfda
from idiolect.methods.generated import pfedhn
from idiolect.methods.losses import fedcr, fedlc, fedntd, fedproto, fedrod, moon
from idiolect.methods.meta import per_fedavg
from idiolect.methods.normalization import adabn, bn_only, fedbn, hbn, silobn
from idiolect.methods.personal import apfl, ditto, fedala, pfedme
from idiolect.methods.server import fedadagrad, fedadam, fedavgm, fednova, fedyogi
from idiolect.methods.sharpness import fedasam, fedfsa, fedgamma, fedlesam, fedsam, mofedsam, sam_on
from idiolect.methods.split import fedbabu, fedper, fedrep, fedselect, lg_fedavg

__all__ = [
    "adabn",
    "apfl",
    "bn_only",
    "ditto",
    "fedadagrad",
    "fedadam",
    "fedala",
    "fedamp",
    "fedas",
    "fedasam",
    "fedavg",
    "fedavg_ft",
    "fedavgm",
    "fedbabu",
    "fedbn",
    "fedcac",
    "fedcp",
    "fedcr",
    "feddbe",
    "feddpa",
    "feddyn",
    "fedfomo",
    "fedfsa",
    "fedgamma",
    "fedgloss",
    "fedinit",
    "fedit",
    "fedlc",
    "fedlesam",
    "fednova",
    "fedntd",
    "fedpac",
    "fedper",
    "fedproto",
    "fedprox",
    "fedrep",
    "fedrod",
    "fedsa_lora",
    "fedsam",
    "fedselect",
    "fedsmoo",
    "fedspeed",
    "fedthe",
    "fedyogi",
    "ffa_lora",
    "gpfl",
    "hbn",
    "ifca",
    "knnper",
    "lg_fedavg",
    "local",
    "mofedsam",
    "moon",
    "per_fedavg",
    "pfedfda",
    "pfedhn",
    "pfedme",
    "pfedsim",
    "qfedavg",
    "sam_on",
    "scaffold",
    "silobn",
]

if not TYPE_CHECKING:  # a type checker knows the names above, and no others
    __getattr__ = names_of(__name__, __all__)
