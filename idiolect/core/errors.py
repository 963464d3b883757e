"""The exception for input that cannot be used."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(ValueError):
    """An error whose message is one line: what is wrong with the input, and how to correct it."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a suggestion such as `` (did you mean local_epochs?)`` if a known word is close, else an empty string.

    Example:
        >>> did_you_mean("local_epoch", ["local_epochs", "rounds"])
        ' (did you mean local_epochs?)'
        >>> did_you_mean("zebra", ["local_epochs", "rounds"])
        ''
    """
    close = get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


UsageError.__module__ = "idiolect"  # shown in tracebacks
