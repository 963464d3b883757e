"""Personalised federated learning for PyTorch: a method is a composition of small parts."""

from idiolect import methods, models, parts, scope
from idiolect.data import ClientData, federate, load
from idiolect.engine.evaluate import Metric, accuracy
from idiolect.errors import UsageError
from idiolect.fit import fit
from idiolect.method import Method
from idiolect.optim import SGD, Adam, Constant, Cosine, Exponential, Step
from idiolect.part import Part, part
from idiolect.run import Run
from idiolect.training import Group, Training

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
    "Step",
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
