"""What a site must not lose: the memory of its client, after the round that counted last and the one after it."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path

import torch

from idiolect.core.errors import UsageError
from idiolect.core.tree import Tree
from idiolect.core.types import Trees
from idiolect.storage.run_directory import read_tensors, write_tensors

FORMAT = "idiolect site state 1"


class SiteState:
    """The states of one client in one run: a file per round, checksummed, whole or not there.

    A round starts from the state that the coordinator names, which is that after the last round in which the client's
    result counted. So a round that is played twice (a server that was killed, a result that came too late) starts from
    the same state twice, and nothing is trained double. Two files are kept: that state and the newest.

    Args:
        folder: of all states of this client; one folder a run is made in it. Only its owner can read it.
        run: the run.
        fresh: the memory of a client that has not trained yet.

    Raises:
        UsageError: if another process uses the folder, or it cannot be made.

    Example:
        >>> import tempfile
        >>> state = SiteState(Path(tempfile.mkdtemp()), "run-1", {"share": Tree.of({"bias": torch.zeros(1)})})
        >>> state.save(1, 0, {"share": Tree.of({"bias": torch.ones(1)})})
        >>> state.load(1)["share"]["bias"].item(), state.load(0)["share"]["bias"].item(), state.rounds()
        (1.0, 0.0, [1])
    """

    def __init__(self, folder: Path, run: str, fresh: Trees) -> None:
        if not re.fullmatch(r"[\w-]{1,100}", run):
            raise UsageError(f"{run!r:.80} cannot name a run: use letters, digits, '_' and '-'")
        self.folder, self._fresh = folder / run, fresh
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"{self.folder} cannot be made ({error.strerror}): is state-dir a folder of yours?"
            ) from None
        self._lock = locked(folder / "lock")
        for torn in self.folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            torn.unlink()

    def rounds(self) -> list[int]:
        """Return the rounds after which there is a state."""
        found = (re.fullmatch(r"state-(\d+)\.safetensors", p.name) for p in self.folder.iterdir())
        return sorted(int(m[1]) for m in found if m)

    def load(self, after: int) -> Trees:
        """Return the memory after a round; after round 0 it is that of the start.

        Raises:
            UsageError: if it is not there, damaged, or of another model or method.
        """
        if after == 0:
            return dict(self._fresh)
        path = self._path(after)
        if not path.exists():
            known = ", ".join(map(str, self.rounds())) or "no round at all"
            raise UsageError(
                f"no state after round {after} in {self.folder}, only after {known}: mount the right folder, "
                "restore a backup, or join with --restored to go on from what is there"
            )
        tensors, about = read_tensors(path)
        if about.get("format") != FORMAT:
            raise UsageError(f"{path} is {about.get('format', 'no state')!r}, this version reads {FORMAT!r}")
        if about.get("round") != str(after):
            raise UsageError(f"{path} is the state after round {about.get('round')}: somebody has renamed it")
        wanted = {f"{p}/{n}": (t.shape, t.dtype) for p, tree in self._fresh.items() for n, t in tree.items()}
        found = {name: (t.shape, t.dtype) for name, t in tensors.items()}
        odd = sorted(name for name in wanted.keys() | found.keys() if found.get(name) != wanted.get(name))
        if odd:
            raise UsageError(f"{path} is of another model or method: {', '.join(odd[:4])} differ")
        return {p: self._tree(p, tree, tensors) for p, tree in self._fresh.items()}

    def newest(self, no_later: int) -> int:
        """Return the last round up to `no_later` after which there is a state; 0 if there is none."""
        return max((r for r in self.rounds() if r <= no_later), default=0)

    def save(self, after: int, base: int, memory: Trees) -> None:
        """Write the memory after a round that started from the state `base`; keep these two alone."""
        tensors = {f"{p}/{n}": t for p, tree in memory.items() for n, t in tree.items()}
        write_tensors(self._path(after), tensors, {"format": FORMAT, "round": str(after)}, mode=0o600)
        for other in set(self.rounds()) - {after, base}:
            self._path(other).unlink()

    def close(self) -> None:
        """Let another process use the folder."""
        os.close(self._lock)

    def _path(self, after: int) -> Path:
        return self.folder / f"state-{after:06}.safetensors"

    def _tree(self, part: str, like: Tree, tensors: dict[str, torch.Tensor]) -> Tree:
        rows = [tensors[f"{part}/{name}"].reshape(-1) for name in like]
        return Tree(like.layout, torch.cat(rows).to(like.flat)) if rows else like


def locked(path: Path) -> int:
    """Open a file that no other process has open so; the lock goes with the process, however it ends."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise UsageError(f"{path} cannot be opened ({error.strerror}): is the folder yours?") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(file, 64).decode() or "another process"
        os.close(file)
        raise UsageError(f"{path.parent} is in use by {owner}: only one at a time may be at work in it") from None
    os.ftruncate(file, 0)
    os.write(file, f"process {os.getpid()}".encode())
    return file
