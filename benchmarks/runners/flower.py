"""Flower's simulation on Ray: its FedAvg strategy, and a client app that trains as its tutorials do."""

from __future__ import annotations

import queue
import threading
from functools import lru_cache
from importlib.metadata import version

import torch
import torch.nn.functional as F

from benchmarks.protocol import Game, Session, serve
from benchmarks.runners.bare import data
from benchmarks.workloads import WORKLOADS, Workload, network, normalization

asked: queue.Queue[bool] = queue.Queue()
"""True for a round, False for the end."""


@lru_cache
def held(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return everybody's examples, made once in each Ray worker."""
    return data(WORKLOADS[name])


def fit(work: Workload, net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> int:
    optimizer, steps = torch.optim.SGD(net.parameters(), lr=work.lr), 0
    for _ in range(work.epochs):
        for rows in torch.randperm(len(y)).split(work.batch):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
            steps += 1
    return steps


def prepare(session: Session) -> Game:
    if session.method != "fedavg":
        raise SystemExit("Flower has no FedFSA")
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    work, threads = session.work, 1 if "process" in session.setting else session.count
    name = work.name
    client, server = ClientApp(), ServerApp()
    answered: queue.Queue[int | str] = queue.Queue()
    now = {"arrays": ArrayRecord(network(work).state_dict())}

    @client.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(threads)
        me, net = int(context.node_config["partition-id"]), network(WORKLOADS[name])
        shared = message.content["arrays"].to_torch_state_dict()
        kept = context.state["kept"].to_torch_state_dict() if "kept" in context.state else {}
        net.load_state_dict({**shared, **kept})
        x, y = held(name)
        steps = fit(WORKLOADS[name], net, x[me], y[me])
        after = net.state_dict()
        if WORKLOADS[name].batch_norm:
            context.state["kept"] = ArrayRecord({k: after[k] for k in normalization(net)})
        numbers = MetricRecord({"num-examples": len(y[me]), "steps": steps})
        return Message(RecordDict({"arrays": ArrayRecord(after), "metrics": numbers}), reply_to=message)

    @server.main()
    def main(grid: Grid, _: Context) -> None:
        strategy = FedAvg(
            fraction_train=work.per_round / work.clients, fraction_evaluate=0.0, min_available_nodes=work.clients
        )
        number = 0
        while asked.get():
            number += 1
            messages = strategy.configure_train(number, now["arrays"], ConfigRecord(), grid)
            replies = list(grid.send_and_receive(messages))
            if errors := [reply.error.reason for reply in replies if reply.has_error()]:
                answered.put(errors[0].strip())
                return
            steps = sum(reply.content["metrics"]["steps"] for reply in replies)
            now["arrays"], _ = strategy.aggregate_train(number, replies)
            answered.put(int(steps))

    backend = {"client_resources": {"num_cpus": threads, "num_gpus": 0.0}, "init_args": {"num_cpus": session.count}}
    run = {"server_app": server, "client_app": client, "num_supernodes": work.clients, "backend_config": backend}
    threading.Thread(target=run_simulation, kwargs=run, name="simulation", daemon=True).start()

    def play() -> int:
        asked.put(True)
        if isinstance(said := answered.get(), str):
            raise SystemExit(said)
        return said

    def weights() -> torch.Tensor:
        state = now["arrays"].to_torch_state_dict()
        return torch.cat([state[n].flatten() for n, _ in network(work).named_parameters()])

    return Game(play, weights, {"flwr": version("flwr")})


def finish() -> None:
    """End the simulation, and Ray with it."""
    asked.put(False)
    for thread in threading.enumerate():
        if thread.name == "simulation":
            thread.join()


if __name__ == "__main__":
    from benchmarks.runners import flower  # Ray's workers look functions up by the name of their module

    serve(flower.prepare)
    flower.finish()
