"""Data: real sets by name, your own from files, splits into clients, and shifts between them.

:func:`load` gives a :class:`Pool`; :func:`federate` deals it out to clients by a split (:class:`Dirichlet`,
:class:`ByDomain`, …) and a shift (:class:`Rotation`, …). Whoever has clients already makes
:class:`ClientData` directly.
"""

from typing import TYPE_CHECKING

from idiolect.core.errors import names_of
from idiolect.data.augment import Augmentation
from idiolect.data.checking import Labels, check_clients, first_of
from idiolect.data.clients import ClientData, countable, holdings
from idiolect.data.deal import ByGroup, Deal, Shuffled, TimeBlocks
from idiolect.data.examples import Examples, LazyExamples, Placement
from idiolect.data.label_skew import Dirichlet, DirichletEqual, Pathological
from idiolect.data.partition import ByClient, ByDomain, Contiguous, Iid, QuantitySkew, Split
from idiolect.data.pool import Pool, federate
from idiolect.data.row_groups import parquet
from idiolect.data.shift import (
    Blur,
    Brightness,
    Color,
    Contrast,
    Noise,
    PermuteLabels,
    Rotation,
    SensorGain,
    SensorOffset,
    Shift,
)
from idiolect.data.sources import load
from idiolect.data.tables import read_table

__all__ = [
    "Augmentation",
    "Blur",
    "Brightness",
    "ByClient",
    "ByDomain",
    "ByGroup",
    "ClientData",
    "Color",
    "Contiguous",
    "Contrast",
    "Deal",
    "Dirichlet",
    "DirichletEqual",
    "Examples",
    "Iid",
    "Labels",
    "LazyExamples",
    "Noise",
    "Pathological",
    "PermuteLabels",
    "Placement",
    "Pool",
    "QuantitySkew",
    "Rotation",
    "SensorGain",
    "SensorOffset",
    "Shift",
    "Shuffled",
    "Split",
    "TimeBlocks",
    "check_clients",
    "countable",
    "federate",
    "first_of",
    "holdings",
    "load",
    "parquet",
    "read_table",
]

if not TYPE_CHECKING:  # a type checker knows the names above, and no others
    __getattr__ = names_of(__name__, __all__)
