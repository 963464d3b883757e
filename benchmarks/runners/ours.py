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


def engine(setting: str, cohort: int) -> Engine:
    if setting == "gpu":
        return Stacked(min(cohort, 100))
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
    x, y = (torch.from_numpy(part).to(seat.device) for part in examples(work))
    clients = {f"{i:04}": ClientData((x[i], y[i])) for i in range(work.clients)}
    model, share = Model(network(work), device=torch.device(seat.device)), work.per_round / work.clients
    made = engine(seat.setting, work.per_round)
    game = Federation(model, method(seat), training, 10**6, share, seed=1, engine=made, clients=clients)
    start, taken = model.anatomy.trainable, work.steps_per_client

    def play() -> int:
        played = game.play()
        return taken * (len(played.cohort) - len(played.dropped))

    def weights() -> torch.Tensor:
        shared = game.server["share"]
        return torch.cat([(shared if n in shared else model.initial)[n].flatten().cpu() for n in start.names])

    return Game(play, weights, {"idiolect": version("idiolect")})


if __name__ == "__main__":
    serve(prepare)
