"""A loop over clients with nothing around it: functional layers, `torch.autograd.grad`, SGD on a flat row."""

from __future__ import annotations

from multiprocessing.connection import Connection

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, multiprocessing
from torch.nn.utils import parameters_to_vector

from benchmarks.protocol import Game, Session, serve
from benchmarks.workloads import ALPHA, CLIP, RHO, RHO_LARGER, TOP, Workload, examples, network, normalization


def cnn(p: list[Tensor], x: Tensor, _: Tensor) -> Tensor:
    x = F.max_pool2d(F.relu(F.conv2d(x, p[0], p[1])), 2)
    x = F.max_pool2d(F.relu(F.conv2d(x, p[2], p[3])), 2)
    x = F.relu(F.linear(x.flatten(1), p[4], p[5]))
    return F.linear(F.relu(F.linear(x, p[6], p[7])), p[8], p[9])


def mlp(p: list[Tensor], x: Tensor, statistics: Tensor) -> Tensor:
    hidden = F.batch_norm(F.linear(x, p[0], p[1]), statistics[0], statistics[1], p[2], p[3], training=True)
    return F.linear(F.relu(hidden), p[4], p[5])


class Loop:
    """The state of a federation, in shared memory, and one client's training."""

    def __init__(self, work: Workload, method: str) -> None:
        self.work, self.fsa = work, method == "fedfsa"
        self.forward = mlp if work.batch_norm else cnn
        net = network(work)
        named = dict(net.named_parameters())
        self.shapes = [p.shape for p in named.values()]
        self.sizes = [p.numel() for p in named.values()]
        personal = normalization(net)
        self.weight = [name.endswith("weight") and name not in personal for name in named]
        own = [torch.full((p.numel(),), name in personal) for name, p in named.items()]
        self.own = torch.cat(own).nonzero()[:, 0]
        self.shared = parameters_to_vector(net.parameters()).detach().share_memory_()
        self.delta = torch.zeros_like(self.shared).share_memory_()
        self.personal = self.shared[self.own].repeat(work.clients, 1).share_memory_()
        wide = 100 if work.batch_norm else 0
        self.statistics = torch.stack([torch.zeros(wide), torch.ones(wide)]).repeat(work.clients, 1, 1).share_memory_()
        self.larger = torch.zeros(work.clients, len(named), dtype=torch.bool).share_memory_()

    def split(self, row: Tensor) -> list[Tensor]:
        return [v.view(s) for v, s in zip(row.split(self.sizes), self.shapes, strict=True)]

    def train(self, client: int, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
        """Train a client; return its row and the steps taken."""
        row = self.shared.clone()
        row[self.own] = self.personal[client]
        p = [v.requires_grad_() for v in self.split(row)]
        delta, statistics, steps = self.split(self.delta), self.statistics[client], 0
        radii = [RHO_LARGER if larger else RHO for larger in self.larger[client].tolist()]
        for _ in range(self.work.epochs):
            for rows in torch.randperm(len(y)).split(self.work.batch):
                bx, by = x[rows], y[rows]
                g = torch.autograd.grad(F.cross_entropy(self.forward(p, bx, statistics), by), p)
                if self.fsa:
                    g = self.second(p, g, radii, delta, bx, by, statistics)
                with torch.no_grad():
                    torch._foreach_add_(p, g, alpha=-self.work.lr)
                steps += 1
        if self.fsa:
            self.choose(client, row.detach())
        self.personal[client] = row.detach()[self.own]
        return row.detach(), steps

    def second(
        self, p: list[Tensor], g: tuple[Tensor, ...], radii: list[float], delta: list[Tensor],
        x: Tensor, y: Tensor, statistics: Tensor,
    ) -> list[Tensor]:  # fmt: skip
        """Return FedFSA's direction: the gradient uphill, mixed with the server's, clipped."""
        with torch.no_grad():
            norm = min(float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(g)))), CLIP)
            factor = norm / max(norm, float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(g)))), 1e-12)
            up = torch._foreach_mul(g, [factor * r / (norm + 1e-7) for r in radii])
            torch._foreach_add_(p, up)
        g = torch.autograd.grad(F.cross_entropy(self.forward(p, x, statistics), y), p)
        with torch.no_grad():
            torch._foreach_sub_(p, up)
            out = torch._foreach_mul(g, ALPHA)
            torch._foreach_add_(out, delta, alpha=1 - ALPHA)
            norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(out))))
            if norm > CLIP:
                torch._foreach_mul_(out, CLIP / norm)
        return list(out)

    def choose(self, client: int, row: Tensor) -> None:
        """Mark the layers whose weights changed most, each scaled to its own range."""
        score = []
        for after, before, ranked in zip(self.split(row), self.split(self.shared), self.weight, strict=True):
            a, b = ((t - t.min()) / (t.max() - t.min()) for t in (after, before)) if ranked else (after[:0], after[:0])
            score.append(float((a - b).square().mean()) if ranked else -1.0)
        self.larger[client] = False
        self.larger[client, sorted(range(len(score)), key=lambda i: -score[i])[:TOP]] = True

    def aggregate(self, mean: Tensor) -> None:
        self.delta.copy_((self.shared - mean) / (self.work.lr * self.work.steps_per_client))
        self.shared.copy_(mean)


def data(work: Workload) -> tuple[Tensor, Tensor]:
    x, y = examples(work)
    return torch.from_numpy(x), torch.from_numpy(y)


def help_out(line: Connection, loop: Loop, total: Tensor) -> None:
    """Train the clients named on the line, one thread, until it is closed."""
    torch.set_num_threads(1)
    x, y = data(loop.work)
    line.send(0)
    try:
        while True:
            line.send(add_up(loop, line.recv(), x, y, total))
    except EOFError:
        return


def add_up(loop: Loop, clients: list[int], x: Tensor, y: Tensor, total: Tensor) -> int:
    taken = 0
    total.zero_()
    for c in clients:
        row, steps = loop.train(c, x[c], y[c])
        total += row
        taken += steps
    return taken


def prepare(session: Session) -> Game:
    work, loop = session.work, Loop(session.work, session.method)
    rng = np.random.default_rng(1)
    processes = session.count if "process" in session.setting else 1
    totals = torch.zeros(processes, len(loop.shared)).share_memory_()
    torch.set_num_threads(1 if processes > 1 else session.count)
    lines = []
    for i in range(processes if processes > 1 else 0):
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        arguments = (theirs, loop, totals[i])
        multiprocessing.get_context("spawn").Process(target=help_out, args=arguments, daemon=True).start()
        lines.append(ours)
    for line in lines:
        line.recv()
    x, y = data(work) if not lines else (totals, totals)

    def play() -> int:
        cohort = rng.permutation(work.clients)[: work.per_round].tolist()
        for i, line in enumerate(lines):
            line.send(cohort[i::processes])
        steps = sum(line.recv() for line in lines) if lines else add_up(loop, cohort, x, y, totals[0])
        loop.aggregate(totals.sum(0) / len(cohort))
        return steps

    return Game(play, lambda: loop.shared)


if __name__ == "__main__":
    serve(prepare)
