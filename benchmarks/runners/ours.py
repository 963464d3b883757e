"""idiolect: a federation that plays rounds; the setting is the engine, as in "2 threads" or "stacks of 10"."""

from __future__ import annotations

from importlib.metadata import version

import torch

from benchmarks.protocol import Game, Seat, serve
from benchmarks.workloads import ALPHA, CLIP, RHO, RHO_LARGER, TOP, examples, network
from idiolect.data import ClientData
from idiolect.engine.federation import Federation
from idiolect.engine.one_by_one import Engine, OneByOne
from idiolect.engine.processes import Processes
from idiolect.engine.stacked import Stacked
from idiolect.engine.threads import Threads
from idiolect.method import Method
from idiolect.methods import fedavg, fedbn, fedfsa
from idiolect.model import Model
from idiolect.parts import flexible_sam, server_momentum
from idiolect.training import Training


def engine(setting: str) -> Engine:
    if setting == "one by one":
        return OneByOne()
    made, number = setting.rsplit(" ", 1) if setting.startswith("stacks of") else setting.split(" ", 1)[::-1]
    return {"threads": Threads, "processes": Processes, "stacks of": Stacked}[made](int(number))


def method(seat: Seat) -> Method:
    if seat.method == "fedavg":
        return fedbn() if seat.work.batch_norm else fedavg()
    if seat.work.batch_norm:
        return Method((*fedbn().parts, flexible_sam(RHO, RHO_LARGER, TOP), server_momentum(ALPHA)), "FedBN + FSA")
    return fedfsa(RHO, RHO_LARGER, TOP, ALPHA)


def prepare(seat: Seat) -> Game:
    torch.set_num_threads(1)
    work = seat.work
    training = Training(work.lr, work.epochs, work.batch, clip=CLIP if seat.method == "fedfsa" else None)
    clients = {f"{i:03}": ClientData((x, y)) for i, (x, y) in enumerate(zip(*examples(work), strict=True))}
    model, share = Model(network(work)), work.per_round / work.clients
    made = engine(seat.setting)
    game = Federation(model, method(seat), training, clients, 10**6, share, seed=1, engine=made)
    start, taken = model.anatomy.trainable, work.steps_per_client

    def play() -> int:
        played = game.play()
        return taken * (len(played.cohort) - len(played.dropped))

    def weights() -> torch.Tensor:
        shared = game.server["share"]
        return torch.cat([(shared if n in shared else model.initial)[n].flatten() for n in start.names])

    return Game(play, weights, {"idiolect": version("idiolect")})


if __name__ == "__main__":
    serve(prepare)
