"""The authors' FedFSA code: its clients and servers, driven round by round as its own main loop does."""

from __future__ import annotations

import copy
import random
import sys
from types import ModuleType, SimpleNamespace

import torch
from torch.nn.utils import parameters_to_vector

from benchmarks.protocol import Counter, Game, Session, serve
from benchmarks.workloads import ALPHA, RHO, RHO_LARGER, TOP, examples, network


def without_torchvision() -> None:
    """Let its data module be imported: of torchvision it names what only photographs need."""
    stand_in = ModuleType("torchvision")
    stand_in.transforms = ModuleType("torchvision.transforms")  # type: ignore[attr-defined]
    sys.modules |= {"torchvision": stand_in, "torchvision.transforms": stand_in.transforms}


def prepare(session: Session) -> Game:
    assert session.checkout, "give --peer fedfsa=CHECKOUT"
    torch.set_num_threads(session.count)
    random.seed(0)
    without_torchvision()
    sys.path.insert(0, str(session.checkout / "FedFSA"))
    from training.FedAvg import ClientFedAvg, ServerFedAvg
    from training.FedFSA import ClientFedFSA, ServerFedFSA
    from utils.utils import get_mdl_params

    work, net = session.work, network(session.work)
    args = SimpleNamespace(
        device="cpu", bs=128, local_bs=work.batch, local_ep=work.epochs, lr=work.lr, lr_decay=1.0, globallr=1.0,
        momentumForSGD=0.0, weight_decay=0.0, num_users=work.clients, use_RI=False, beta=0.1,
        rho_default=RHO, rho_larger=RHO_LARGER, TopC=TOP, alpha=ALPHA,
    )  # fmt: skip
    x, y = examples(work)
    fsa = session.method == "fedfsa"
    made = ClientFedFSA if fsa else ClientFedAvg
    clients = [made(copy.deepcopy(net), args, x[i], y[i], x[i][:1], y[i][:1], "FMNIST", i) for i in range(work.clients)]
    start = get_mdl_params(net)
    server = ServerFedFSA(net, args, start, work.examples) if fsa else ServerFedAvg(net, args, start)
    counter = Counter()

    def one_round() -> None:
        cohort = random.sample(clients, work.per_round)
        for client in cohort:
            server.process_for_communication(client.id)
            client.synchronize_with_server(server.comm_vecs)
            client.train_cnn(0, False)
            server.receive_from_clienti(client.id, client.comm_vecs)
        server.global_update([client.id for client in cohort])

    return Game(lambda: counter.during(one_round), lambda: parameters_to_vector(server.model.parameters()))


if __name__ == "__main__":
    serve(prepare)
