"""PFLlib: its FedAvg and FedBN servers and clients, driven round by round as its own `train` does, without evaluation.

It drops ragged batches. To take the same steps, each client repeats some examples to fill its last batch.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.utils import parameters_to_vector

from benchmarks.protocol import Counter, Game, Session, serve
from benchmarks.workloads import Workload, examples, network


def store(work: Workload, folder: Path) -> None:
    """Write the clients in PFLlib's format, whose reader looks in ``../dataset`` every time a client trains."""
    x, y = examples(work)
    rows = np.concatenate([np.arange(work.examples), np.arange(-work.examples % work.batch)])
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        for i in range(work.clients):
            held = np.empty((), dtype=object)
            held[()] = {"x": x[i][rows], "y": y[i][rows]} if split == "train" else {"x": x[i][:1], "y": y[i][:1]}
            np.savez(folder / split / f"{i}.npz", data=held)


def prepare(session: Session) -> Game:
    if session.method != "fedavg":
        raise SystemExit("PFLlib has no FedFSA")
    assert session.checkout, "give --peer pfllib=CHECKOUT"
    torch.set_num_threads(session.count)
    work, home = session.work, Path(tempfile.mkdtemp(prefix="pfllib-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    store(work, home / "dataset" / "synthetic")
    (home / "system").mkdir()
    os.chdir(home / "system")
    sys.path.insert(0, str(session.checkout / "system"))
    from flcore.servers.serveravg import FedAvg
    from flcore.servers.serverbn import FedBN

    args = SimpleNamespace(
        model=network(work).to(session.device), algorithm="", dataset="synthetic", device=session.device,
        num_classes=work.classes, num_clients=work.clients, join_ratio=work.per_round / work.clients,
        random_join_ratio=False,
        batch_size=work.batch, local_epochs=work.epochs, local_learning_rate=work.lr, learning_rate_decay=False,
        learning_rate_decay_gamma=1.0, global_rounds=1, few_shot=0, time_select=False, goal="", time_threthold=1e9,
        save_folder_name="items", top_cnt=100, auto_break=False, eval_gap=10**9, client_drop_rate=0.0,
        train_slow_rate=0.0, send_slow_rate=0.0, dlg_eval=False, dlg_gap=1, batch_num_per_client=0,
        num_new_clients=0, fine_tuning_epoch_new=0,
    )  # fmt: skip
    server = (FedBN if work.batch_norm else FedAvg)(args, 0)
    counter = Counter()

    def one_round() -> None:
        server.selected_clients = server.select_clients()
        server.send_models()
        for client in server.selected_clients:
            client.train()
        server.receive_models()
        server.aggregate_parameters()

    return Game(lambda: counter.during(one_round), lambda: parameters_to_vector(server.global_model.parameters()))


if __name__ == "__main__":
    serve(prepare)
