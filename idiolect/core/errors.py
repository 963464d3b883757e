"""What a user is told when something they gave cannot be used."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(ValueError):
    """One line that names what is wrong with the input and what to do about it."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean local_epochs?)`` when a known word is close, else an empty string.

    Example:
        >>> did_you_mean("local_epoch", ["local_epochs", "rounds"])
        ' (did you mean local_epochs?)'
        >>> did_you_mean("zebra", ["local_epochs", "rounds"])
        ''
    """
    close = get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


UsageError.__module__ = "idiolect"  # the name that tracebacks show
