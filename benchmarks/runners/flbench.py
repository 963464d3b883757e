"""FL-bench: its FedAvg and FedBN servers, one `train_one_round` a round, serial or on Ray workers."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import torch

from benchmarks.protocol import Counter, Game, Session, serve
from benchmarks.workloads import Workload, examples, network


class NoTransform:
    """What torchvision's `Compose` of nothing does."""

    def __init__(self, steps: list[object]) -> None:
        assert not steps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x


def without_torchvision() -> None:
    """Let FL-bench be imported: of torchvision this run uses an empty `Compose`, the rest is names."""
    torch.set_num_threads(1)
    for name in ("torchvision", "torchvision.io", "torchvision.io.image", "torchvision.models"):
        sys.modules[name] = MagicMock()
    sys.modules["torchvision"].transforms = ModuleType("torchvision.transforms")  # type: ignore[attr-defined]
    sys.modules["torchvision.transforms"] = sys.modules["torchvision"].transforms
    sys.modules["torchvision.transforms"].Compose = NoTransform  # type: ignore[attr-defined]


def partition(work: Workload, folder: Path) -> None:
    """Write which examples are whose, where FL-bench looks for it; as JSON, which `prepare` makes it read."""
    rows = np.arange(work.clients * work.examples).reshape(work.clients, -1).tolist()
    every = list(range(work.clients))
    split = {"train": every, "val": [], "test": every, "total": work.clients}
    held = {"separation": split, "data_indices": [{"train": r, "val": [], "test": []} for r in rows]}
    folder.mkdir(parents=True)
    (folder / "partition.pkl").write_text(json.dumps(held))
    (folder / "args.json").write_text(json.dumps({"split": "sample"}))


def prepare(session: Session) -> Game:
    if session.method != "fedavg":
        raise SystemExit("FL-bench has no FedFSA")
    assert session.checkout, "give --peer flbench=CHECKOUT"
    parallel, work = "process" in session.setting, session.work
    home = Path(tempfile.mkdtemp(prefix="flbench-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    partition(work, home / "data" / "bench")
    here = str(Path(__file__).parents[2])
    if parallel:
        import ray

        paths = {"PYTHONPATH": os.pathsep.join([str(session.checkout), here])}
        hook = "benchmarks.runners.flbench.without_torchvision"
        ray.init(
            num_cpus=session.count, include_dashboard=False, log_to_driver=False,
            runtime_env={"env_vars": paths, "worker_process_setup_hook": hook},
        )  # fmt: skip
    without_torchvision()
    torch.set_num_threads(1 if parallel else session.count)
    sys.path.insert(0, str(session.checkout))
    import src.server.fedavg as base
    from data.utils.datasets import BaseDataset
    from omegaconf import OmegaConf
    from src.server.fedbn import FedBNServer
    from src.utils.models import DecoupledModel

    base.FLBENCH_ROOT = home
    base.pickle = json  # it reads its partition so; ours is JSON, which carries no code
    base.HydraConfig = SimpleNamespace(get=lambda: SimpleNamespace(runtime=SimpleNamespace(output_dir=str(home))))
    settings = OmegaConf.load(session.checkout / "config" / "defaults.yaml")
    quiet = {"interval": -1, "train": False, "val": False, "test": False}
    told = {
        "mode": "parallel" if parallel else "serial",
        "dataset": {"name": "bench"},
        "parallel": {"num_workers": session.count, "num_cpus": session.count, "num_gpus": 0},
        "optimizer": {"lr": work.lr},
        "lr_scheduler": {"name": None},
        "common": {
            "join_ratio": work.per_round / work.clients, "global_epoch": 10_000, "local_epoch": work.epochs,
            "batch_size": work.batch, "buffers": "local", "client_side_evaluation": False, "verbose_gap": 10**9,
            "use_cuda": False, "save_log": False, "test": {"client": quiet, "server": quiet},
        },
    }  # fmt: skip
    x, y = (torch.from_numpy(a).flatten(0, 1) for a in examples(work))

    def synthetic(root: Path, args: object, **transforms: object) -> object:
        return BaseDataset(x, y, list(range(work.classes)), **transforms)

    base.DATASETS["bench"] = synthetic

    def own(**_: object) -> torch.nn.Module:
        net, model = network(work), DecoupledModel()
        model.base, model.classifier = net[:-1], net[-1:]
        return model

    settings = OmegaConf.merge(settings, told)
    base.MODELS[settings.model.name] = own
    server = (FedBNServer if work.batch_norm else base.FedAvgServer)(settings)
    counter, rounds = Counter(), iter(range(10_000))

    def one_round() -> None:
        server.current_epoch = next(rounds)
        server.selected_clients = server.client_sample_stream[server.current_epoch]
        server.train_one_round()

    def play() -> int:
        steps = counter.during(one_round)
        return work.steps_per_round if parallel else steps

    def weights() -> torch.Tensor:
        return torch.cat([server.public_model_params[name].flatten() for name, _ in server.model.named_parameters()])

    return Game(play, weights)


if __name__ == "__main__":
    serve(prepare)
