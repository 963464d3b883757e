"""pfl-research: its FederatedAveraging on its SimulatedBackend, one central iteration a round.

It takes the examples in one order in all epochs and keeps nothing of a client between rounds.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector

from benchmarks.protocol import Counter, Game, Session, serve
from benchmarks.runners.bare import data
from benchmarks.workloads import network


def crew(count: int) -> list[subprocess.Popen[str]]:
    """Start the other processes of a torch.distributed group, as torchrun does; they play when rank 0 says so."""
    if count == 1 or "RANK" in os.environ:
        return []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"TORCHELASTIC_RUN_ID": "bench", "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(group | {"MASTER_PORT": str(port), "RANK": "0"})
    command = [sys.executable, "-m", "benchmarks.runners.pflresearch", *sys.argv[1:]]
    pipe = subprocess.PIPE
    return [
        subprocess.Popen(command, env=os.environ | {"RANK": str(rank)}, stdin=pipe, stdout=pipe, text=True, bufsize=1)
        for rank in range(1, count)
    ]


def prepare(session: Session) -> Game:
    if session.method != "fedavg":
        raise SystemExit("pfl-research has no FedFSA")
    if session.work.batch_norm:
        raise SystemExit("pfl-research keeps nothing of a client between rounds: it has no FedBN")
    processes = session.count if "process" in session.setting else 1
    torch.set_num_threads(1 if processes > 1 else session.count)
    others = crew(processes)
    if session.checkout:
        sys.path.insert(0, str(session.checkout))
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(work)

        def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            self.train()
            return F.cross_entropy(self.net(x), y)

        def metrics(self, *_: torch.Tensor) -> dict[str, float]:
            return {}

    class OneRound(TrainingProcessCallback):
        def after_central_iteration(self, *_: object, **__: object) -> tuple[bool, Metrics]:
            return True, Metrics()

    work, (x, y) = session.work, data(session.work)
    population = FederatedDataset(
        lambda i: Dataset([x[i], y[i]], user_id=str(i)), get_user_sampler("minimize_reuse", list(range(work.clients)))
    )
    backend = SimulatedBackend(training_data=population, val_data=population)
    net = Net()
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0))
    federated = FederatedAveraging()
    whole = NNAlgorithmParams(
        central_num_iterations=10**9, evaluation_frequency=10**9, train_cohort_size=work.per_round, val_cohort_size=0
    )
    local = NNTrainHyperParams(local_num_epochs=work.epochs, local_learning_rate=work.lr, local_batch_size=work.batch)
    counter = Counter()

    def play() -> int:
        for other in others:
            assert other.stdin
            other.stdin.write("go\n")
        steps = counter.during(
            lambda: federated.run(whole, backend, model, local, None, [OneRound()], send_metrics_to_platform=False)
        )
        central = 1
        return steps - central + sum(heard(other) for other in others)

    return Game(play, lambda: parameters_to_vector(net.parameters()), {"pfl": version("pfl")})


def heard(other: subprocess.Popen[str]) -> int:
    """Return the steps another process says it took."""
    assert other.stdout
    said = json.loads(other.stdout.readline())
    return int(said["steps"]) if "steps" in said else heard(other)


if __name__ == "__main__":
    serve(prepare)
