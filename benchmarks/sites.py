"""Seconds a round on real sites: three sites and a server as processes on this machine, over Flower.

python -m benchmarks.sites tiny plain     # Flower as it comes: a new process imports all for each message
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

from idiolect.flower.coordinator.submit import PROJECT
from idiolect.flower.server.launch import LINK, SAFE, connect, environment, flwr, free_port

SITE = """
import torch, idiolect, idiolect.flower
from benchmarks.workloads import WORKLOADS, network

work = WORKLOADS["{work}"]

def data(client):
    dice = torch.Generator().manual_seed(int(client[-1]))
    x = torch.randn(work.examples, *work.shape, generator=dice)
    y = torch.randint(0, work.classes, (work.examples,), generator=dice)
    return idiolect.ClientData((x, y), test=(x[:20], y[:20]))

method = idiolect.methods.fedbn() if work.batch_norm else idiolect.methods.fedavg()
training = idiolect.Training(lr=work.lr, local_epochs=work.epochs, batch_size=work.batch)
site = idiolect.flower.client_app(model=lambda: network(work), data=data)
hub = idiolect.flower.server_app(model=lambda: network(work), method=method, training=training,
                                 rounds={rounds}, sites=3, quorum=3)
"""


class Crowd:
    """Processes that end together."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, words: list[str], log: Path, env: dict[str, str], cwd: Path) -> None:
        with log.open("ab") as out:
            self.processes.append(
                subprocess.Popen(words, stdout=out, stderr=out, env=env, cwd=cwd, start_new_session=True)
            )

    def end(self) -> None:
        for process in self.processes:
            os.killpg(process.pid, signal.SIGKILL)


def plain(crowd: Crowd, place: Path, env: dict[str, str]) -> Path:
    """Flower's own commands at their defaults, but for what would call home; return where the run is."""
    bin_, port = Path(sys.executable).parent, free_port()
    own = {**env, **SAFE, "PATH": f"{bin_}:{env['PATH']}"}
    del own["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"]
    link = [str(bin_ / "flower-superlink"), "--insecure", "--port", str(port)]
    crowd.start(link, place / "link.log", {**own, "FLWR_HOME": str(place / "link")}, place)
    time.sleep(8)
    for i in range(3):
        config = f'client-id="site-{i}" state-dir="{place}/state-{i}"'
        words = ["--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(free_port()), "--node-config", config]
        home = {**own, "FLWR_HOME": str(place / f"node-{i}")}
        crowd.start([str(bin_ / "flower-supernode"), *words], place / f"node-{i}.log", home, place)
    project = PROJECT.format(name="bench", module="task", app="hub").replace("relay:app", "task:site")
    (place / "hub" / "pyproject.toml").write_text(project)
    connect(place / "flower", f"127.0.0.1:{port}", None)
    flwr(["run", str(place / "hub"), LINK], place / "flower")
    return place / "run"


def warm(crowd: Crowd, place: Path, env: dict[str, str]) -> Path:
    """Our commands."""
    idiolect, port = [sys.executable, "-m", "idiolect"], free_port()
    serve = [*idiolect, "serve", "server", "--insecure", "--port", str(port)]
    crowd.start(serve, place / "serve.log", env, place)
    for i in range(3):
        words = ["join", "hub/task.py:site", "--as", f"site-{i}", "--server", f"127.0.0.1:{port}", "--insecure"]
        crowd.start([*idiolect, *words], place / f"site-{i}.log", env, place)
    while "serving" not in (place / "serve.log").read_text():
        time.sleep(0.2)
    crowd.start([*idiolect, "submit", "hub/task.py:hub", "server"], place / "submit.log", env, place)
    return place / "server" / "run"


def main(work: str, how: str, rounds: int = 6) -> None:
    crowd = Crowd()
    with tempfile.TemporaryDirectory(prefix="sites-") as name:
        place = Path(name)
        (place / "hub").mkdir()
        (place / "hub" / "task.py").write_text(SITE.format(work=work, rounds=rounds))
        here = str(Path(__file__).parents[1])
        env = {**environment(place / "flower"), "OMP_NUM_THREADS": "1", "PYTHONPATH": here}
        try:
            metrics = (plain if how == "plain" else warm)(crowd, place, env) / "metrics.jsonl"
            lines: list[str] = []
            while len(lines) < rounds:
                time.sleep(1)
                lines = metrics.read_text().splitlines() if metrics.exists() else []
        finally:
            crowd.end()
    seconds = [json.loads(line)["seconds"] for line in lines][1:]
    spread = f"{min(seconds):.1f} to {max(seconds):.1f}; rounds 2 to {rounds}; load {os.getloadavg()[0]:.1f}"
    print(f"{work}, {how}: {median(seconds):.1f} s a round ({spread})")


if __name__ == "__main__":
    main(*sys.argv[1:3])
