"""Seconds per round on real sites: three sites and a server as processes on this machine, over Flower.

python -m benchmarks.sites tiny plain     # Flower's own commands: a new process imports everything for each message
python -m benchmarks.sites tiny warm      # `idiolect serve` and `idiolect join`
python -m benchmarks.sites w1 warm
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from idiolect.flower.server.submit import PROJECT
from idiolect.flower.system.launch import (
    CONNECTION,
    SAFE_SETTINGS,
    flower_environment,
    free_port,
    run_flwr,
    write_connection,
)

APPS = """
import torch, idiolect, idiolect.flower
from benchmarks.workloads import WORKLOADS, network

work = WORKLOADS["{work}"]

def data(client):
    generator = torch.Generator().manual_seed(int(client[-1]))
    x = torch.randn(work.examples, *work.shape, generator=generator)
    y = torch.randint(0, work.classes, (work.examples,), generator=generator)
    return idiolect.ClientData((x, y), test=(x[:20], y[:20]))

method = idiolect.methods.fedbn() if work.batch_norm else idiolect.methods.fedavg()
training = idiolect.Training(lr=work.lr, local_epochs=work.epochs, batch_size=work.batch)
site = idiolect.flower.client_app(model=lambda: network(work), data=data)
coordinator = idiolect.flower.server_app(model=lambda: network(work), method=method, training=training,
                                         rounds={rounds}, sites=3, quorum=3)
"""


class ProcessGroup:
    """Processes that are ended together."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, command: list[str], log: Path, env: dict[str, str], cwd: Path) -> None:
        with log.open("ab") as output:
            self.processes.append(
                subprocess.Popen(command, stdout=output, stderr=output, env=env, cwd=cwd, start_new_session=True)
            )

    def end(self) -> None:
        for process in self.processes:
            os.killpg(process.pid, signal.SIGKILL)


def plain(group: ProcessGroup, folder: Path, env: dict[str, str]) -> Path:
    """Start Flower's own commands with default settings, except for telemetry; return the directory of the run."""
    bin_, port = Path(sys.executable).parent, free_port()
    own = {**env, **SAFE_SETTINGS, "PATH": f"{bin_}:{env['PATH']}"}
    del own["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"]
    superlink = [str(bin_ / "flower-superlink"), "--insecure", "--port", str(port)]
    group.start(superlink, folder / "link.log", {**own, "FLWR_HOME": str(folder / "link")}, folder)
    time.sleep(8)
    for i in range(3):
        config = f'client-id="site-{i}" state-dir="{folder}/state-{i}"'
        arguments = [
            "--insecure",
            "--superlink",
            f"127.0.0.1:{port}",
            "--port",
            str(free_port()),
            "--node-config",
            config,
        ]
        home = {**own, "FLWR_HOME": str(folder / f"node-{i}")}
        group.start([str(bin_ / "flower-supernode"), *arguments], folder / f"node-{i}.log", home, folder)
    project = PROJECT.format(name="bench", module="task", app="coordinator").replace("relay:app", "task:site")
    (folder / "app" / "pyproject.toml").write_text(project)
    write_connection(folder / "flower", f"127.0.0.1:{port}", None)
    run_flwr(["run", str(folder / "app"), CONNECTION], folder / "flower")
    return folder / "run"


def warm(group: ProcessGroup, folder: Path, env: dict[str, str]) -> Path:
    """Start our commands; return the directory of the run."""
    idiolect, port = [sys.executable, "-m", "idiolect"], free_port()
    serve = [*idiolect, "serve", "server", "--insecure", "--port", str(port)]
    group.start(serve, folder / "serve.log", env, folder)
    for i in range(3):
        arguments = ["join", "app/task.py:site", "--as", f"site-{i}", "--server", f"127.0.0.1:{port}", "--insecure"]
        group.start([*idiolect, *arguments], folder / f"site-{i}.log", env, folder)
    while "serving" not in (folder / "serve.log").read_text():
        time.sleep(0.2)
    group.start([*idiolect, "submit", "app/task.py:coordinator", "server"], folder / "submit.log", env, folder)
    return folder / "server" / "run"


def main(work: str, mode: str, rounds: int = 6) -> None:
    group = ProcessGroup()
    with tempfile.TemporaryDirectory(prefix="sites-") as name:
        folder = Path(name)
        (folder / "app").mkdir()
        (folder / "app" / "task.py").write_text(APPS.format(work=work, rounds=rounds))
        root = str(Path(__file__).parents[1])
        env = {**flower_environment(folder / "flower"), "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
        try:
            metrics = (plain if mode == "plain" else warm)(group, folder, env) / "metrics.jsonl"
            lines: list[str] = []
            while len(lines) < rounds:
                time.sleep(1)
                lines = metrics.read_text().splitlines() if metrics.exists() else []
        finally:
            group.end()
    seconds = [json.loads(line)["seconds"] for line in lines][1:]
    spread = f"{min(seconds):.1f} to {max(seconds):.1f}; rounds 2 to {rounds}; load {os.getloadavg()[0]:.1f}"
    print(f"{work}, {mode}: {median(seconds):.1f} s per round ({spread})")


if __name__ == "__main__":
    main(*sys.argv[1:3])
