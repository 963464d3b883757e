"""Three hospitals and a coordinator on this machine, as real processes with TLS and keys; two of them are killed.

For FedBN and for FedFSA the run is played twice: undisturbed, and with a site and then the server killed (SIGKILL) in
the middle of a round. Both must end with the same personal models, bit for bit, and so must the simulator. A tap in the
line proves that no normalization of any site was sent.

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
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from tap import Tap

import idiolect

HERE, SITES, ROUNDS = Path(__file__).parent, ("north", "south", "west"), 4
IDIOLECT = (sys.executable, "-m", "idiolect")


class Hospitals:
    """A server, three sites and a tap between them, each in a folder of its own."""

    def __init__(self, place: Path, coordinator: str) -> None:
        self.place, self.coordinator = place, coordinator
        self.server, self.port = place / "server", free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for folder, files in {"hub": ("network.py", coordinator), "site": ("network.py", "hospital.py")}.items():
            (place / folder).mkdir()
            for file in files:
                shutil.copy(HERE / file, place / folder)
        call("keys", self.server, "--host", "127.0.0.1")
        for name in SITES:
            call("keys", place / name, "--site", name)
            shutil.copy(self.server / "ca.crt", place / name)
            shutil.copy(place / name / f"{name}.pub", self.server / "sites")
        self.tap = Tap(self.server, self.port)

    def start_server(self) -> None:
        """Serve, and submit the run, which goes on where it was."""
        self.start("server", "serve", self.server, "--port", self.port)
        wait(lambda: connects(self.port), "the server")
        wait(lambda: self.admitted() == len(SITES), "the sites' keys")
        self.start("submit", "submit", self.place / "hub" / self.coordinator, self.server)

    def admitted(self) -> int:
        """Return how many sites the server lets in."""
        file = self.server / "sites.json"
        return len(json.loads(file.read_text())) if file.exists() else 0

    def start_site(self, name: str) -> None:
        """Join."""
        file, folder = self.place / "site" / "hospital.py", self.place / name
        self.start(name, "join", file, "--as", name, "--server", self.tap.address, "--folder", folder)

    def start(self, name: str, *command: object) -> None:
        """Start one of our commands in a process group of its own."""
        with (self.place / f"{name}.out").open("ab") as out:
            words = [*IDIOLECT, *map(str, command)]
            self.processes[name] = subprocess.Popen(words, stdout=out, stderr=out, start_new_session=True)

    def kill(self, *names: str) -> None:
        """Kill processes with all they have started, as a loss of power would."""
        for name in names:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.processes[name].pid, signal.SIGKILL)
            self.processes.pop(name).wait()

    def status(self) -> dict:
        """Return what the coordinator says of itself."""
        file = self.server / "run" / "status.json"
        return json.loads(file.read_text()) if file.exists() else {"round": 0, "phase": "", "sites": {}}

    def at_work(self, played: int) -> bool:
        """Whether the sites are at work on the round after so many."""
        status = self.status()
        return status["round"] == played and any(s["state"] == "at work" for s in status["sites"].values())

    def play(self, disturbed: bool, say: Callable[[str], None]) -> float:
        """Play the run to its end; return its seconds."""
        began = time.monotonic()
        try:
            if "server" not in self.processes:
                self.start_server()
            for name in SITES:
                self.start_site(name)
            if disturbed:
                wait(lambda: self.at_work(1), "round 2")
                say("kill site south in round 2")
                self.kill("south")
                self.start_site("south")
                wait(lambda: self.at_work(2), "round 3")
                say("kill the server in round 3")
                self.kill("server", "submit")
                self.start_server()
            wait(lambda: self.status()["phase"] == "done", "the end of the run")
            wait(lambda: self.processes["submit"].poll() is not None, "the end of submit")
            return time.monotonic() - began
        finally:
            self.kill(*list(self.processes))
            self.tap.close()

    def told(self, name: str) -> str:
        """Return what a process has printed."""
        return (self.place / f"{name}.out").read_text()

    def personal(self, name: str) -> dict[str, torch.Tensor]:
        """Return the final model of a site."""
        (file,) = (self.place / name / "state" / name).glob("*/personal.safetensors")
        return load_file(file)


def simulated(coordinator: str, rounds: int = ROUNDS) -> dict[str, dict[str, torch.Tensor]]:
    """Return the personal models of the same run in the simulator."""
    told = importlib.import_module(Path(coordinator).stem)
    torch.manual_seed(0)  # as every site and the coordinator do, from the run's seed
    net, clients = make_network(), {name: load_my_data(name) for name in SITES}
    machine = idiolect.Machine(engine="sequential")
    run = idiolect.fit(net, clients, told.method, rounds=rounds, training=told.training, machine=machine)
    return {name: run.personal(name).state_dict() for name in SITES}


def sent(tap: Tap, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Return the tensors whose bytes or names went up the line."""
    return [n for n, t in tensors.items() if t.numpy().tobytes() in tap.up or f'"{n}"'.encode() in tap.up]


def call(*words: object) -> None:
    """Run one of our commands to its end."""
    subprocess.run([*IDIOLECT, *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def wait(ready: Callable[[], bool], what: str, seconds: float = 300) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise SystemExit(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.05)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def connects(port: int) -> bool:
    """Whether somebody listens on a port."""
    with socket.socket() as line:
        return line.connect_ex(("127.0.0.1", port)) == 0


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two models are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def main() -> int:
    """Play both methods, undisturbed and disturbed; print what was found."""
    console, good = Console(), True
    table = Table("method", "site", "killed = undisturbed", "= simulator", "shared tensors sent", "normalization sent")
    for coordinator in ("coordinator.py", "coordinator_fedfsa.py"):
        name = importlib.import_module(Path(coordinator).stem).method.name
        expected, models, taps = simulated(coordinator), [], []
        for disturbed in (False, True):
            with tempfile.TemporaryDirectory(prefix="hospitals-") as place:
                hospitals = Hospitals(Path(place), coordinator)
                how = "killing a site and the server" if disturbed else "undisturbed"
                with console.status(f"{name}, {how}: three sites, {ROUNDS} rounds"):
                    seconds = hospitals.play(disturbed, lambda what: console.print(f"  {what}"))
                console.print(f"{name}, {how}: {seconds:.0f} s, {seconds_a_round(hospitals.server):.1f} s a round")
                models.append({site: hospitals.personal(site) for site in SITES})
                taps.append(hospitals.tap)
        for site in SITES:
            quiet, killed = models[0][site], models[1][site]
            norm = {n: t for n, t in quiet.items() if n.split(".")[0] in ("1", "5")}
            shared = [n for n in quiet if n not in norm]
            told = [set(sent(tap, quiet)) for tap in taps]
            leaked = sorted(set().union(*told) & norm.keys())
            same = (alike(quiet, killed), alike(quiet, expected[site]))
            count = min(len(t & set(shared)) for t in told)
            good &= all(same) and not leaked and count == len(shared)
            words = ["yes" if s else "NO" for s in same]
            table.add_row(name, site, *words, f"{count} of {len(shared)}", ", ".join(leaked) or f"0 of {len(norm)}")
    console.print(table)
    return 0 if good else 1


def seconds_a_round(server: Path) -> float:
    """Return the median over the rounds of a run."""
    records = [json.loads(line) for line in (server / "run" / "metrics.jsonl").read_text().splitlines()]
    return sorted(record["seconds"] for record in records)[len(records) // 2]


if __name__ == "__main__":
    raise SystemExit(main())
