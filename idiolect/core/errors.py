"""The exception for input that cannot be used."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn


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


def names_of(module: str, known: Iterable[str]) -> Callable[[str], NoReturn]:
    """Return the `__getattr__` of a module: a name that it does not have is refused with the nearest one.

    Example:
        >>> names_of("methods", ["fedbn", "ditto"])("fedbm")
        Traceback (most recent call last):
        AttributeError: methods has no 'fedbm' (did you mean fedbn?)
    """

    def missing(name: str) -> NoReturn:
        hint = "" if name.startswith("_") else did_you_mean(name, known) or f"; dir({module}) lists what there is"
        raise AttributeError(f"{module} has no {name!r}{hint}")

    return missing


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Refuse a path that cannot be written: an `OSError` in the block is a `UsageError` that names path and cause.

    Example:
        >>> with writing("/tmp"):
        ...     Path("/tmp").write_text("")
        Traceback (most recent call last):
        idiolect.UsageError: cannot write /tmp: Is a directory; give another path
    """
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; give another path") from error


def raised(error: BaseException, function: object = None) -> str:
    r"""Return an exception in one line, such as ``KeyError: 'n' (mine.py, line 12)``.

    Args:
        error: the exception.
        function: the user's function in whose file it arose, or the path of that file; None, or a file of an installed
            library, leaves out the place.

    Example:
        >>> raised(ValueError("too long\nby far"))
        'ValueError: too long'
    """
    said = f"{type(error).__name__}: {error}".partition("\n")[0].removesuffix(": ")
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    file = getattr(code, "co_filename", str(function))
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{said} ({Path(file).name}, line {lines[-1]})" if lines and "site-packages" not in file else said


def kind_of(value: Any) -> str:  # noqa: ANN401 - anything
    """Return what a value is, in words.

    Example:
        >>> kind_of(3), kind_of(None), kind_of("fedbn"), kind_of(print), kind_of(dict), kind_of({})
        ('an int', 'None', "text, 'fedbn'", 'the function print', 'the class dict', 'a dict')
    """
    if value is None:
        return "None"
    if inspect.isroutine(value):
        return f"the function {value.__name__}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, str):
        return f"text, {value!r:.60}"
    name = type(value).__name__
    if name == "Tensor":
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a{'n' if name[0].lower() in 'aeiou' else ''} {name}"


UsageError.__module__ = "idiolect"  # shown in tracebacks
