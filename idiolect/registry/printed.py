"""Methods and local trainings from what they print as: how runs and messages to sites name them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from idiolect.core.errors import UsageError
from idiolect.core.method import Method
from idiolect.core.part import Part
from idiolect.registry.expression import evaluate
from idiolect.registry.names import METHODS, OPTIMIZERS, SCHEDULES
from idiolect.rounds.training import Group, Training


def method_from(text: str, parts: Sequence[Callable[..., Part]] = ()) -> Method:
    """Return the method that prints as a text.

    Args:
        text: the text. Only names of idiolect's methods and parts, and of `parts`, are looked up.
        parts: functions marked `@part`.

    Raises:
        UsageError: one line, if the text is no method.

    Example:
        >>> from idiolect import methods
        >>> method_from(repr(methods.fedbn())) == methods.fedbn()
        True
    """
    found = evaluate(text, METHODS | {make.__name__: make for make in parts}, "method")
    if not isinstance(found, Method):
        raise UsageError(f"method: {text[:80]!r} is not a method")
    return found


def training_from(text: str) -> Training:
    """Return the local training that prints as a text.

    Raises:
        UsageError: one line, if the text is no training.

    Example:
        >>> training_from("Training(lr=0.5)").lr
        0.5
    """
    found = evaluate(text, METHODS | OPTIMIZERS | SCHEDULES | {"Training": Training, "Group": Group}, "training")
    if not isinstance(found, Training):
        raise UsageError(f"training: {text[:80]!r} is not a Training")
    return found
