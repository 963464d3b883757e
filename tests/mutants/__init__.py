"""Bugs to plant, one at a time, and where the tests must notice; a module for each topic."""

from importlib import import_module
from pkgutil import iter_modules

TOPICS = [m.name for m in iter_modules(__path__) if m.name != "planted"]
MUTANTS = [mutant for topic in TOPICS for mutant in import_module(f"mutants.{topic}").MUTANTS]
