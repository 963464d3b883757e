"""Personalized federated learning for PyTorch: a method is a composition of small parts."""

from idiolect import methods, models, parts
from idiolect.compute.metrics import Metric, accuracy
from idiolect.core import scope
from idiolect.core.errors import UsageError
from idiolect.core.method import Method
from idiolect.core.part import Part, part
from idiolect.data import ClientData, federate, load
from idiolect.rounds.optim import SGD, Adam, Constant, Cosine, Exponential, StepDecay
from idiolect.rounds.training import Group, Training
from idiolect.running.fit import fit
from idiolect.running.run import Run

__all__ = [
    "SGD",
    "Adam",
    "ClientData",
    "Constant",
    "Cosine",
    "Exponential",
    "Group",
    "Method",
    "Metric",
    "Part",
    "Run",
    "StepDecay",
    "Training",
    "UsageError",
    "accuracy",
    "federate",
    "fit",
    "load",
    "methods",
    "models",
    "part",
    "parts",
    "scope",
]
