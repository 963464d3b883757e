"""Three hospitals and a coordinator on this machine, as real processes with TLS and keys; some of them are killed.

With FedBN and with FedFSA the run is played twice: without disturbance, and with one site and then the server killed
(SIGKILL) in the middle of a round. Both runs must give the same personal models, bit for bit, and so must the
simulation. A recording of the traffic proves that no normalization layer of any site was sent.

    python examples/hospitals/demo.py
"""

import contextlib
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from hospital import load_my_data
from network import make_network
from recorder import Recorder
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

import idiolect

HERE, SITES, ROUNDS = Path(__file__).parent, ("north", "south", "west"), 4
IDIOLECT = (sys.executable, "-m", "idiolect")


class Hospitals:
    """A server, three sites, and a recorder between them; each has a folder of its own."""

    def __init__(self, folder: Path, coordinator: str) -> None:
        self.folder, self.coordinator = folder, coordinator
        self.server, self.port = folder / "server", free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for name, files in {"app": ("network.py", coordinator), "site": ("network.py", "hospital.py")}.items():
            (folder / name).mkdir()
            for file in files:
                shutil.copy(HERE / file, folder / name)
        run_command("keys", self.server, "--host", "127.0.0.1")
        for name in SITES:
            run_command("keys", folder / name, "--site", name)
            shutil.copy(self.server / "ca.crt", folder / name)
            shutil.copy(folder / name / f"{name}.pub", self.server / "sites")
        self.recorder = Recorder(self.server, self.port)

    def start_server(self) -> None:
        """Start the server, and start or resume the run."""
        self.start("server", "serve", self.server, "--port", self.port)
        wait(lambda: is_listening(self.port), "the server")
        wait(lambda: self.registered_sites() == len(SITES), "the sites' keys")
        self.start("submit", "submit", self.folder / "app" / self.coordinator, self.server)

    def registered_sites(self) -> int:
        """Return the number of sites whose keys the server accepts."""
        file = self.server / "sites.json"
        return len(json.loads(file.read_text())) if file.exists() else 0

    def start_site(self, name: str) -> None:
        """Start a site."""
        file, folder = self.folder / "site" / "hospital.py", self.folder / name
        self.start(name, "join", file, "--as", name, "--server", self.recorder.address, "--folder", folder)

    def start(self, name: str, *command: object) -> None:
        """Start one of our commands in a process group of its own."""
        with (self.folder / f"{name}.out").open("ab") as output:
            arguments = [*IDIOLECT, *map(str, command)]
            self.processes[name] = subprocess.Popen(arguments, stdout=output, stderr=output, start_new_session=True)

    def kill(self, *names: str) -> None:
        """Kill processes with their children, as a power failure does."""
        for name in names:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.processes[name].pid, signal.SIGKILL)
            self.processes.pop(name).wait()

    def status(self) -> dict:
        """Return the status of the run."""
        file = self.server / "run" / "status.json"
        return json.loads(file.read_text()) if file.exists() else {"round": 0, "phase": "", "sites": {}}

    def is_training(self, completed: int) -> bool:
        """Return whether the sites are training in the round after this number of completed rounds."""
        status = self.status()
        return status["round"] == completed and any(s["state"] == "working" for s in status["sites"].values())

    def play(self, disturbed: bool, log: Callable[[str], None]) -> float:
        """Play the run to its end; return the seconds it took."""
        started = time.monotonic()
        try:
            if "server" not in self.processes:
                self.start_server()
            for name in SITES:
                self.start_site(name)
            if disturbed:
                wait(lambda: self.is_training(1), "round 2")
                log("kill site south in round 2")
                self.kill("south")
                self.start_site("south")
                wait(lambda: self.is_training(2), "round 3")
                log("kill the server in round 3")
                self.kill("server", "submit")
                self.start_server()
            wait(lambda: self.status()["phase"] == "done", "the end of the run")
            wait(lambda: self.processes["submit"].poll() is not None, "the end of submit")
            return time.monotonic() - started
        finally:
            self.kill(*list(self.processes))
            self.recorder.close()

    def output(self, name: str) -> str:
        """Return the output of a process."""
        return (self.folder / f"{name}.out").read_text()

    def personal_model(self, name: str) -> dict[str, torch.Tensor]:
        """Return the final personal model of a site."""
        (file,) = (self.folder / name / "state" / name).glob("*/personal.safetensors")
        return load_file(file)


def simulate(coordinator: str, rounds: int = ROUNDS) -> dict[str, dict[str, torch.Tensor]]:
    """Return the personal models of the same run in the simulation."""
    settings = importlib.import_module(Path(coordinator).stem)
    torch.manual_seed(0)  # the run's seed, which every site and the coordinator use
    network, clients = make_network(), {name: load_my_data(name) for name in SITES}
    machine = idiolect.Machine(engine="sequential")
    run = idiolect.fit(network, clients, settings.method, rounds=rounds, training=settings.training, machine=machine)
    return {name: run.personal(name).state_dict() for name in SITES}


def sent_tensors(recorder: Recorder, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Return the tensors whose bytes or names were sent to the server."""
    return [n for n, t in tensors.items() if t.numpy().tobytes() in recorder.up or f'"{n}"'.encode() in recorder.up]


def run_command(*arguments: object) -> None:
    """Run one of our commands to its end."""
    subprocess.run([*IDIOLECT, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def wait(condition: Callable[[], bool], what: str, seconds: float = 300) -> None:
    """Wait until a condition is true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.05)


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def is_listening(port: int) -> bool:
    """Return whether a process listens on a port."""
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Return whether two models are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def main() -> int:
    """Play the runs of both methods, print the comparison, and return the exit status."""
    console, passed = Console(), True
    table = Table("method", "site", "killed = undisturbed", "= simulation", "shared tensors sent", "normalization sent")
    for coordinator in ("coordinator.py", "coordinator_fedfsa.py"):
        name = importlib.import_module(Path(coordinator).stem).method.name
        expected, models, recorders = simulate(coordinator), [], []
        for disturbed in (False, True):
            with tempfile.TemporaryDirectory(prefix="hospitals-") as folder:
                hospitals = Hospitals(Path(folder), coordinator)
                how = "with a site and the server killed" if disturbed else "undisturbed"
                with console.status(f"{name}, {how}: three sites, {ROUNDS} rounds"):
                    seconds = hospitals.play(disturbed, lambda event: console.print(f"  {event}"))
                per_round = seconds_per_round(hospitals.server)
                console.print(f"{name}, {how}: {seconds:.0f} s, {per_round:.1f} s per round")
                models.append({site: hospitals.personal_model(site) for site in SITES})
                recorders.append(hospitals.recorder)
        for site in SITES:
            undisturbed, killed = models[0][site], models[1][site]
            normalization = {n for n in undisturbed if n.split(".")[0] in ("1", "5")}
            shared = undisturbed.keys() - normalization
            sent = [set(sent_tensors(recorder, undisturbed)) for recorder in recorders]
            leaked = sorted(set().union(*sent) & normalization)
            same = (are_equal(undisturbed, killed), are_equal(undisturbed, expected[site]))
            count = min(len(names & shared) for names in sent)
            passed &= all(same) and not leaked and count == len(shared)
            answers = ["yes" if s else "NO" for s in same]
            leaks = ", ".join(leaked) or f"0 of {len(normalization)}"
            table.add_row(name, site, *answers, f"{count} of {len(shared)}", leaks)
    console.print(table)
    return 0 if passed else 1


def seconds_per_round(server: Path) -> float:
    """Return the median seconds of a round."""
    records = [json.loads(line) for line in (server / "run" / "metrics.jsonl").read_text().splitlines()]
    return sorted(record["seconds"] for record in records)[len(records) // 2]


if __name__ == "__main__":
    raise SystemExit(main())
