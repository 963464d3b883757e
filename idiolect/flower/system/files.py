"""Private folders and lock files."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from idiolect.core.errors import UsageError


def private_folder(folder: Path) -> Path:
    """Create a folder that only its owner can enter, or restrict an existing one; return its absolute path.

    Raises:
        UsageError: if the folder cannot be created or restricted.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise UsageError(f"cannot use {folder} as a private folder: {error.strerror}") from None
    return folder.resolve()


def lock_file(path: Path) -> int:
    """Lock a file for this process and return its descriptor; the lock ends with the process, however it ends.

    Raises:
        UsageError: if the file cannot be opened, or another process has locked it.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise UsageError(f"cannot open {path} ({error.strerror}): do you own the folder?") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(file, 64).decode() or "another process"
        os.close(file)
        raise UsageError(f"{path.parent} is in use by {owner}: only one process may use it at a time") from None
    os.ftruncate(file, 0)
    os.write(file, f"process {os.getpid()}".encode())
    return file
