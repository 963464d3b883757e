"""The states of a client on disk: its memory after the last round that counted, and after the newest round."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from idiolect.core.errors import UsageError
from idiolect.core.tree import Tree
from idiolect.core.types import Trees
from idiolect.flower.system.files import lock_file
from idiolect.storage.run_directory import read_tensors, write_tensors

FORMAT = "idiolect site state 1"


class SiteState:
    """The states of one client in one run: a file per round, written as a whole and with a checksum.

    The coordinator names the state from which a round starts: that after the last round in which the client's result
    counted. If a round is repeated (the server was killed, the result came too late), it starts from the same state
    again, so nothing is trained twice. Two files are kept: that state and the newest one.

    Args:
        folder: folder of all runs of this client; each run has a folder in it. Only its owner can read it.
        run: name of the run.
        initial: the memory of a client that has not trained yet.

    Raises:
        UsageError: if another process uses the folder, or it cannot be created.

    Example:
        >>> import tempfile
        >>> state = SiteState(Path(tempfile.mkdtemp()), "run-1", {"share": Tree.of({"bias": torch.zeros(1)})})
        >>> state.save(1, 0, {"share": Tree.of({"bias": torch.ones(1)})})
        >>> state.load(1)["share"]["bias"].item(), state.load(0)["share"]["bias"].item(), state.rounds()
        (1.0, 0.0, [1])
    """

    def __init__(self, folder: Path, run: str, initial: Trees) -> None:
        if not re.fullmatch(r"[\w-]{1,100}", run):
            raise UsageError(f"invalid run name {run!r:.80}: use letters, digits, '_' and '-'")
        self.folder, self._initial = folder / run, initial
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot create {self.folder} ({error.strerror}): do you own state-dir?") from None
        self._lock = lock_file(folder / "lock")
        for temporary in self.folder.glob(".*.tmp"):  # left by a process that was killed while writing
            temporary.unlink()

    def rounds(self) -> list[int]:
        """Return the rounds after which there is a state."""
        found = (re.fullmatch(r"state-(\d+)\.safetensors", p.name) for p in self.folder.iterdir())
        return sorted(int(m[1]) for m in found if m)

    def load(self, after: int) -> Trees:
        """Return the memory after a round; after round 0 it is the initial memory.

        Raises:
            UsageError: if the state is missing, damaged, or of another model or method.
        """
        if after == 0:
            return dict(self._initial)
        path = self._path(after)
        if not path.exists():
            rounds = ", ".join(map(str, self.rounds())) or "none"
            raise UsageError(
                f"no state after round {after} in {self.folder} (saved rounds: {rounds}): mount the right folder, "
                "restore a backup, or join with --restored to continue from the newest state"
            )
        tensors, about = read_tensors(path)
        if about.get("format") != FORMAT:
            raise UsageError(f"{path} has the format {about.get('format', 'unknown')!r}, expected {FORMAT!r}")
        if about.get("round") != str(after):
            raise UsageError(f"{path} holds the state after round {about.get('round')}: the file was renamed")
        expected = {f"{p}/{n}": (t.shape, t.dtype) for p, tree in self._initial.items() for n, t in tree.items()}
        found = {name: (t.shape, t.dtype) for name, t in tensors.items()}
        different = sorted(n for n in expected.keys() | found.keys() if found.get(n) != expected.get(n))
        if different:
            raise UsageError(f"{path} belongs to another model or method: {', '.join(different[:4])} differ")
        return {p: self._tree(p, tree, tensors) for p, tree in self._initial.items()}

    def newest(self, no_later: int) -> int:
        """Return the last round up to `no_later` after which there is a state; 0 if there is none."""
        return max((r for r in self.rounds() if r <= no_later), default=0)

    def save(self, after: int, base_round: int, memory: Trees) -> None:
        """Write the memory after a round that started from the state after `base_round`; delete all other states."""
        tensors = {f"{p}/{n}": t for p, tree in memory.items() for n, t in tree.items()}
        write_tensors(self._path(after), tensors, {"format": FORMAT, "round": str(after)}, mode=0o600)
        for other in set(self.rounds()) - {after, base_round}:
            self._path(other).unlink()

    def close(self) -> None:
        """Unlock the folder for other processes."""
        os.close(self._lock)

    def _path(self, after: int) -> Path:
        return self.folder / f"state-{after:06}.safetensors"

    def _tree(self, part: str, like: Tree, tensors: dict[str, torch.Tensor]) -> Tree:
        rows = [tensors[f"{part}/{name}"].reshape(-1) for name in like]
        return Tree(like.layout, torch.cat(rows).to(like.flat)) if rows else like
