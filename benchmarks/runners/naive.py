"""The loop most people write first: one module, `load_state_dict` for every client, `torch.optim`, default threads."""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

from benchmarks.protocol import Counter, Game, Session, serve
from benchmarks.runners.bare import data
from benchmarks.workloads import ALPHA, CLIP, RHO, network, normalization


def prepare(session: Session) -> Game:
    """FedAvg, FedBN where there is batch normalization; FedFSA with one radius for all layers, as at first."""
    work, net, (x, y) = session.work, network(session.work), data(session.work)
    shared = copy.deepcopy(net.state_dict())
    own = normalization(net)
    personal = [{k: v.clone() for k, v in shared.items() if k in own} for _ in range(work.clients)]
    delta = torch.zeros_like(parameters_to_vector(net.parameters()))
    rng, counter = np.random.default_rng(1), Counter()

    def lookahead(bx: torch.Tensor, by: torch.Tensor) -> None:
        """Leave FedFSA's direction in the gradients, which hold the first one."""
        clip_grad_norm_(net.parameters(), CLIP)
        here = parameters_to_vector(net.parameters()).detach()
        slope = parameters_to_vector([p.grad for p in net.parameters()])
        vector_to_parameters(here + slope * RHO / (slope.norm() + 1e-7), net.parameters())
        net.zero_grad()
        F.cross_entropy(net(bx), by).backward()
        slope = parameters_to_vector([p.grad for p in net.parameters()])
        vector_to_parameters(here, net.parameters())
        vector_to_parameters(ALPHA * slope + (1 - ALPHA) * delta, [p.grad for p in net.parameters()])
        clip_grad_norm_(net.parameters(), CLIP)

    def train(client: int) -> dict[str, torch.Tensor]:
        net.load_state_dict({**shared, **personal[client]})
        optimizer = torch.optim.SGD(net.parameters(), lr=work.lr)
        for _ in range(work.epochs):
            for rows in torch.randperm(work.examples).split(work.batch):
                bx, by = x[client][rows], y[client][rows]
                optimizer.zero_grad()
                F.cross_entropy(net(bx), by).backward()
                if session.method == "fedfsa":
                    lookahead(bx, by)
                optimizer.step()
        after = {k: v.clone() for k, v in net.state_dict().items()}
        personal[client] = {k: v for k, v in after.items() if k in own}
        return after

    def weights() -> torch.Tensor:
        return torch.cat([shared[name].flatten() for name, _ in net.named_parameters()])

    def one_round() -> None:
        before, after = weights(), [train(c) for c in rng.permutation(work.clients)[: work.per_round]]
        shared.update({k: torch.stack([a[k] for a in after]).mean(0) for k in shared if k not in own})
        delta.copy_((before - weights()) / (work.lr * work.steps_per_client))

    return Game(lambda: counter.during(one_round), weights)


if __name__ == "__main__":
    serve(prepare)
