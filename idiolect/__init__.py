"""Personalized federated learning for PyTorch: a method is a composition of small parts.

A name is imported when it is first used, so that `import idiolect` does not load PyTorch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from idiolect import data, flower, methods, models, parts
    from idiolect.cli.load import load_run
    from idiolect.compute.losses import own_loss
    from idiolect.compute.metrics import Metric, accuracy
    from idiolect.core import scope
    from idiolect.core.errors import UsageError
    from idiolect.core.method import Method
    from idiolect.core.normalization import register_normalization
    from idiolect.core.part import Part, part
    from idiolect.data import ClientData, federate, load
    from idiolect.rounds.optim import SGD, Adam, AdamW, RMSprop
    from idiolect.rounds.schedule import Constant, Cosine, Exponential, StepDecay, Warmup
    from idiolect.rounds.training import Group, Training
    from idiolect.running.fit import fit
    from idiolect.running.options import Machine, Output
    from idiolect.running.run import Run

    __version__: str

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "ClientData",
    "Constant",
    "Cosine",
    "Exponential",
    "Group",
    "Machine",
    "Method",
    "Metric",
    "Output",
    "Part",
    "RMSprop",
    "Run",
    "StepDecay",
    "Training",
    "UsageError",
    "Warmup",
    "accuracy",
    "data",
    "federate",
    "fit",
    "flower",
    "load",
    "load_run",
    "methods",
    "models",
    "own_loss",
    "part",
    "parts",
    "register_normalization",
    "scope",
]

_MODULES = {
    "data": "idiolect.data",
    "flower": "idiolect.flower",
    "methods": "idiolect.methods",
    "models": "idiolect.models",
    "parts": "idiolect.parts",
    "scope": "idiolect.core.scope",
}
_HOME = {
    "idiolect.cli.load": ("load_run",),
    "idiolect.compute.losses": ("own_loss",),
    "idiolect.compute.metrics": ("Metric", "accuracy"),
    "idiolect.core.errors": ("UsageError",),
    "idiolect.core.method": ("Method",),
    "idiolect.core.normalization": ("register_normalization",),
    "idiolect.core.part": ("Part", "part"),
    "idiolect.data": ("ClientData", "federate", "load"),
    "idiolect.rounds.optim": ("SGD", "Adam", "AdamW", "RMSprop"),
    "idiolect.rounds.schedule": ("Constant", "Cosine", "Exponential", "StepDecay", "Warmup"),
    "idiolect.rounds.training": ("Group", "Training"),
    "idiolect.running.fit": ("fit",),
    "idiolect.running.options": ("Machine", "Output"),
    "idiolect.running.run": ("Run",),
}

if not TYPE_CHECKING:  # for a type checker there are the names above, and no others

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used (PEP 562)."""
        from importlib import import_module

        if name in _MODULES:
            found = import_module(_MODULES[name])
        elif name == "__version__":
            from importlib.metadata import version

            found = version("idiolect")
        else:
            home = next((module for module, names in _HOME.items() if name in names), None)
            if home is None:
                from idiolect.core.errors import names_of

                names_of("idiolect", __all__)(name)
            found = getattr(import_module(home), name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        """Return the public names, imported or not."""
        return sorted({*globals(), *__all__, "__version__"})
