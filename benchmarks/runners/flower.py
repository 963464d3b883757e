"""Flower's simulation on Ray: its FedAvg strategy, with a client app written like those in its tutorials."""

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

requests: queue.Queue[bool] = queue.Queue()
"""True requests a round, False ends the simulation."""


@lru_cache
def examples(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the examples of all clients, made once in each Ray worker."""
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
    results: queue.Queue[int | str] = queue.Queue()
    current = {"arrays": ArrayRecord(network(work).state_dict())}

    @client.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(threads)
        client_id, net = int(context.node_config["partition-id"]), network(WORKLOADS[name])
        shared = message.content["arrays"].to_torch_state_dict()
        personal = context.state["personal"].to_torch_state_dict() if "personal" in context.state else {}
        net.load_state_dict({**shared, **personal})
        x, y = examples(name)
        steps = fit(WORKLOADS[name], net, x[client_id], y[client_id])
        trained = net.state_dict()
        if WORKLOADS[name].batch_norm:
            context.state["personal"] = ArrayRecord({k: trained[k] for k in normalization(net)})
        numbers = MetricRecord({"num-examples": len(y[client_id]), "steps": steps})
        return Message(RecordDict({"arrays": ArrayRecord(trained), "metrics": numbers}), reply_to=message)

    @server.main()
    def main(grid: Grid, _: Context) -> None:
        strategy = FedAvg(
            fraction_train=work.per_round / work.clients, fraction_evaluate=0.0, min_available_nodes=work.clients
        )
        round_ = 0
        while requests.get():
            round_ += 1
            messages = strategy.configure_train(round_, current["arrays"], ConfigRecord(), grid)
            replies = list(grid.send_and_receive(messages))
            if errors := [reply.error.reason for reply in replies if reply.has_error()]:
                results.put(errors[0].strip())
                return
            steps = sum(reply.content["metrics"]["steps"] for reply in replies)
            current["arrays"], _ = strategy.aggregate_train(round_, replies)
            results.put(int(steps))

    backend = {"client_resources": {"num_cpus": threads, "num_gpus": 0.0}, "init_args": {"num_cpus": session.count}}
    run = {"server_app": server, "client_app": client, "num_supernodes": work.clients, "backend_config": backend}
    threading.Thread(target=run_simulation, kwargs=run, name="simulation", daemon=True).start()

    def play() -> int:
        requests.put(True)
        if isinstance(result := results.get(), str):
            raise SystemExit(result)
        return result

    def weights() -> torch.Tensor:
        state = current["arrays"].to_torch_state_dict()
        return torch.cat([state[n].flatten() for n, _ in network(work).named_parameters()])

    return Game(play, weights, {"flwr": version("flwr")})


def finish() -> None:
    """End the simulation and Ray."""
    requests.put(False)
    for thread in threading.enumerate():
        if thread.name == "simulation":
            thread.join()


if __name__ == "__main__":
    from benchmarks.runners import flower  # Ray's workers find functions by the name of their module

    serve(flower.prepare)
    flower.finish()
