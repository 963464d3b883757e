"""idiolect: a federation that plays rounds; the setting is the engine, as in "2 threads" or "stacks of 10"."""

from __future__ import annotations

from importlib.metadata import version

import torch

from benchmarks.protocol import Game, Session, serve
from benchmarks.workloads import ALPHA, CLIP, RHO, RHO_LARGER, TOP, examples, network
from idiolect.compute.autograd import Model
from idiolect.core.method import Method
from idiolect.data import ClientData
from idiolect.engines.federation import Federation
from idiolect.engines.processes import Processes
from idiolect.engines.sequential import Engine, Sequential
from idiolect.engines.stacked import Stacked
from idiolect.engines.threads import Threads
from idiolect.methods import fedavg, fedbn, fedfsa
from idiolect.parts import flexible_sam, server_momentum
from idiolect.rounds.training import Training


def engine(setting: str, cohort: int) -> Engine:
    if setting == "gpu":
        return Stacked(min(cohort, 100))
    if setting == "sequential":
        return Sequential()
    made, number = setting.rsplit(" ", 1) if setting.startswith("stacks of") else setting.split(" ", 1)[::-1]
    return {"threads": Threads, "processes": Processes, "stacks of": Stacked}[made](int(number))


def method(seat: Session) -> Method:
    if seat.method == "fedavg":
        return fedbn() if seat.work.batch_norm else fedavg()
    if seat.work.batch_norm:
        return Method((*fedbn().parts, flexible_sam(RHO, RHO_LARGER, TOP), server_momentum(ALPHA)), "FedBN + FSA")
    return fedfsa(RHO, RHO_LARGER, TOP, ALPHA)


def prepare(seat: Session) -> Game:
    torch.set_num_threads(1)
    work = seat.work
    training = Training(work.lr, work.epochs, work.batch, clip=CLIP if seat.method == "fedfsa" else None)
    x, y = (torch.from_numpy(part).to(seat.device) for part in examples(work))
    clients = {f"{i:04}": ClientData((x[i], y[i])) for i in range(work.clients)}
    model, share = Model(network(work), device=torch.device(seat.device)), work.per_round / work.clients
    made = engine(seat.setting, work.per_round)
    game = Federation(model, method(seat), training, 10**6, share, seed=1, engine=made, clients=clients)
    start, taken = model.structure.trainable, work.steps_per_client

    def play() -> int:
        played = game.play()
        return taken * (len(played.cohort) - len(played.dropped))

    def weights() -> torch.Tensor:
        shared = game.server["share"]
        return torch.cat([(shared if n in shared else model.initial)[n].flatten().cpu() for n in start.names])

    return Game(play, weights, {"idiolect": version("idiolect")})


if __name__ == "__main__":
    serve(prepare)
