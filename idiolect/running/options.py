"""`Machine` and `Output`: where a run takes place, and what it writes and shows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from idiolect.core.calls import called
from idiolect.core.errors import UsageError, did_you_mean
from idiolect.core.values import arguments
from idiolect.engines.base import Engine
from idiolect.engines.choose import NAMES
from idiolect.storage.disk import Kind

Precision = Literal["full", "bfloat16"]


@called
@dataclass(frozen=True)
class Machine:
    """The hardware of a run and how it is used. Results are the same on all engines but for rounding.

    Args:
        engine: how clients are trained: ``"auto"``, ``"sequential"``, ``"threads"``, ``"processes"``, ``"stacked"``
            (see `idiolect.engines.choose`), or an engine object such as ``Stacked(16)``. The engine chosen is in the
            notes of the run and in its config.
        device: ``"cpu"``, ``"cuda"``, …; ``"auto"`` is a GPU if there is one, else the device of the model. The models
            of a finished run are on the device of the given model.
        precision: ``"bfloat16"`` runs forward passes in mixed precision; docs/performance.md says what it costs.
        memory: where the clients' memories are between rounds: ``"ram"``; ``"disk"``, in the folder `memory` of the
            output directory or in a temporary folder; ``"auto"``, on disk if they would take more than an eighth of
            the RAM of the machine or its container.

    Raises:
        UsageError: if a value is none of these.

    Example:
        >>> Machine(engine="stacked", device="cpu").memory
        'auto'
        >>> Machine(memory="tape")
        Traceback (most recent call last):
        idiolect.UsageError: memory is 'auto' or 'ram' or 'disk', not 'tape'
    """

    engine: str | Engine = "auto"
    device: str | torch.device = "auto"
    precision: Precision = "full"
    memory: Kind = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.engine, str):
            if self.engine not in NAMES:
                hint = did_you_mean(self.engine, [name for name in (*NAMES, "flower") if name != self.engine])
                raise UsageError(f"no engine {self.engine!r}{hint}; {_THERE_ARE}")
        elif isinstance(self.engine, type) or not all(hasattr(self.engine, name) for name in _ENGINE):
            raise UsageError(f"{self.engine!r} is no engine; {_THERE_ARE}, or an engine object such as Stacked(16)")
        if not isinstance(self.device, str | torch.device):
            raise UsageError(f"device is text such as 'cpu' or 'cuda', not {self.device!r}")
        for name, kinds in (("precision", Precision), ("memory", Kind)):
            if getattr(self, name) not in get_args(kinds):
                raise UsageError(f"{name} is {' or '.join(map(repr, get_args(kinds)))}, not {getattr(self, name)!r}")


@called
@dataclass(frozen=True)
class Output:
    """Files and messages of a run.

    Args:
        directory: folder for the run: config, metrics (one line a round), tensors, report. None writes nothing.
        resume: True continues the run in `directory`, which must have been started with the same settings; it may have
            fewer rounds. ``"auto"`` does so if there is one, and else starts it: one program for the first start and
            every restart.
        report: write report.html at the end.
        progress: show a progress bar with the time left.
        about: more entries for config.json, such as where the data come from.

    Raises:
        UsageError: if `resume` has no directory, or a value is of the wrong type.

    Example:
        >>> Output("runs/first").report
        True
        >>> Output(resume=True)
        Traceback (most recent call last):
        idiolect.UsageError: resume needs the directory of the run to go on with: Output(directory=..., resume=True)
    """

    directory: str | Path | None = None
    resume: bool | Literal["auto"] = False
    report: bool = True
    progress: bool = False
    about: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.directory, str | os.PathLike | None):
            raise UsageError(f"directory is a path such as 'runs/first', not {self.directory!r}")
        flags = {name: getattr(self, name) for name in ("resume", "report", "progress")}
        arguments("Output", flags, {"resume": bool | Literal["auto"], "report": bool, "progress": bool})
        if self.resume and self.directory is None:
            raise UsageError("resume needs the directory of the run to go on with: Output(directory=..., resume=True)")
        if not isinstance(self.about, Mapping | None):
            raise UsageError(f"about is a dict of names to values, not {self.about!r}")


_THERE_ARE = f"there are {', '.join(NAMES)}, and idiolect.flower.simulation() for a cluster"
_ENGINE = ("width", "learner", "train", "measure", "close")
