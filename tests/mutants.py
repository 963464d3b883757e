"""Bugs to plant, one at a time, and where the tests must notice.

The first twenty are those the first prototype of this project was tried with; seven of them (marked) passed every
generic check there. Each is a line of the package, what it becomes, and the tests that are run against it.
"""

from dataclasses import dataclass

METHODS, ORACLES, LAWS = "tests/test_methods.py", "tests/test_oracles.py", "tests/test_laws.py"
ENGINE, DATA, KERNELS = "tests/test_engine.py", "tests/test_data_clients.py", "tests/test_kernels.py"


@dataclass(frozen=True)
class Mutant:
    """One planted bug."""

    name: str
    file: str
    before: str
    after: str
    tests: str
    only: str = ""


PROTOTYPE = [
    Mutant(
        "SCAFFOLD: sign of the new variate",
        "parts/variates.py",
        "pick(local.start, slot.memory) - pick(local.end, slot.memory)",
        "pick(local.end, slot.memory) - pick(local.start, slot.memory)",
        LAWS,
        "scaffold or variates",
    ),
    Mutant(
        "SCAFFOLD: sign of the correction",
        "parts/variates.py",
        "pick(slot.received - slot.memory, direction)",
        "pick(slot.memory - slot.received, direction)",
        LAWS,
        "scaffold",
    ),
    Mutant(
        "SCAFFOLD: c averaged by examples (survived)",
        "parts/variates.py",
        "uniform=True",
        "uniform=False",
        LAWS,
        "variates",
    ),
    Mutant(
        "SAM: norm per tensor",
        "parts/sharpness.py",
        "lambda g, at: g * (rho / (norm(g) + EPSILON))",
        "lambda g, at: Tree.of({n: t * (rho / (t.norm() + EPSILON)) for n, t in g.items()})",
        ORACLES,
        "fedsam",
    ),
    Mutant(
        "SAM: statistics of the perturbed pass",
        "parts/sharpness.py",
        "return here._replace(gradient=there.gradient)",
        "return there",
        ORACLES,
        "fedsam",
    ),
    Mutant(
        "SAM: radius not divided by the norm",
        "parts/sharpness.py",
        "lambda g, at: g * (rho / (norm(g) + EPSILON))",
        "lambda g, at: g * rho",
        LAWS,
        "sam_on_a_quadratic",
    ),
    Mutant(
        "MoFedSAM: sign of the direction (survived)",
        "parts/momentum.py",
        'moved = central.old - arrival.uploads["share"]',
        'moved = arrival.uploads["share"] - central.old',
        ORACLES,
        "mofedsam",
    ),
    Mutant(
        "MoFedSAM: not divided by rate and steps (survived)",
        "parts/momentum.py",
        " / (central.lr * arrival.steps)",
        "",
        LAWS,
        "momentum_of_the_server",
    ),
    Mutant(
        "FedALA: a padded step teaches the mask",
        "parts/mix.py",
        "sum(1 if b.valid is None else b.valid for b in batches)",
        "len(batches)",
        METHODS,
        "FedALA-padding or FedALA-engines",
    ),
    Mutant(
        "FedALA: sign of the gap",
        "parts/mix.py",
        "gap = pick(weights, old) - old",
        "gap = old - pick(weights, old)",
        METHODS,
        "FedALA-neutral",
    ),
    Mutant("FedALA: no clamp (survived)", "parts/mix.py", ".flat.clamp(0, 1)", ".flat", LAWS, "fedala"),
    Mutant(
        "FedBN: sends everything",
        "parts/share.py",
        "pick(local.end, slot.memory), pick(local.end, slot.received)",
        "pick(local.end, slot.memory), pick(local.end, local.anatomy.exchangeable)",
        METHODS,
        "FedBN-nothing_personal",
    ),
    Mutant(
        "engine: padded steps are taken",
        "client.py",
        "weights = where(valid, moved, weights)",
        "weights = moved",
        METHODS,
        "FedAvg-padding",
    ),
    Mutant(
        "engine: statistics changed in place",
        "model.py",
        "else row[n].clone() for n",
        "else row[n] for n",
        METHODS,
        "FedAvg-engines or FedAvg-nothing_is_changed",
    ),
    Mutant(
        "engine: stacked memory belongs to the neighbour",
        "testing/stacked.py",
        'kept = {p: Tree(layouts["memory"][p].layout, flat[i])',
        'kept = {p: Tree(layouts["memory"][p].layout, flat[i - 1])',
        METHODS,
        "FedBN-engines",
    ),
    Mutant(
        "server: equal weights instead of examples (survived)",
        "server.py",
        "1.0 if equal else float(arrival.examples)",
        "1.0",
        LAWS,
        "weighting",
    ),
    Mutant(
        "FedFSA: the least sensitive layers (survived)",
        "parts/sharpness.py",
        '"most": score,',
        '"most": -score,',
        ORACLES,
        "fedfsa",
    ),
    Mutant(
        "FedFSA: sensitivity written into the old memory",
        "parts/sharpness.py",
        "Tree(slot.memory.layout, torch.cat([score, chosen]))",
        "Tree(slot.memory.layout, slot.memory.flat.copy_(torch.cat([score, chosen])))",
        METHODS,
        "FedFSA-nothing_is_changed",
    ),
    Mutant(
        "Ditto: anchored to itself (survived)",
        "parts/proximal.py",
        "direct=lambda d, at: _pull(strength, d, at, local.shared)",
        "direct=lambda d, at: _pull(strength, d, at, slot.memory)",
        LAWS,
        "ditto",
    ),
]

MORE = [
    Mutant(
        "MoFedSAM: shares of gradient and direction swapped",
        "parts/momentum.py",
        "alpha * pick(direction, known) + (1 - alpha) * known",
        "(1 - alpha) * pick(direction, known) + alpha * known",
        ORACLES,
        "mofedsam",
    ),
    Mutant(
        "MoFedSAM: everybody's steps are taken for ten",
        "parts/momentum.py",
        "(central.lr * arrival.steps)",
        "(central.lr * 10)",
        ORACLES,
        "mofedsam",
    ),
    Mutant(
        "FedFSA: both tensors scaled by one range",
        "parts/sharpness.py",
        "start, end = _unit(start), _unit(end)",
        "start, end = _unit(start), (end - start.amin()) / (start.amax() - start.amin())",
        ORACLES,
        "fedfsa",
    ),
    Mutant(
        "FedFSA: biases compete",
        "parts/sharpness.py",
        "if n in pool and len(shape) >= 2",
        "if n in pool",
        ORACLES,
        "fedfsa",
    ),
    Mutant(
        "FedFSA: the larger radius from the first round",
        "parts/sharpness.py",
        "radius = spread(rho + (rho_larger - rho) * torch.cat(chosen), where)",
        "radius = spread(0 * torch.cat(chosen) + rho_larger, where)",
        LAWS,
        "fedfsa",
    ),
    Mutant(
        "ASAM: stretched once", "parts/sharpness.py", "return stretch * scaled *", "return scaled *", ORACLES, "fedasam"
    ),
    Mutant(
        "FedProx: pushes away",
        "parts/proximal.py",
        "pick(weights, near) - near",
        "near - pick(weights, near)",
        ORACLES,
        "fedprox",
    ),
    Mutant(
        "share: pooled variance forgets the spread of means",
        "parts/share.py",
        "tree[var] + (tree[mean] - old[mean]) ** 2",
        "tree[var]",
        ORACLES,
        "pooled",
    ),
    Mutant(
        "share: a client starts from its first memory",
        "parts/share.py",
        "return pick(local.end, slot.memory), pick",
        "return slot.memory, pick",
        ORACLES,
        "fedbn",
    ),
    Mutant(
        "fine-tuning: everything is tuned",
        "parts/tune.py",
        "local.train(weights, only=names,",
        "local.train(weights, only=None,",
        LAWS,
        "fine_tuning",
    ),
    Mutant("clipping: never", "client.py", "direction = clip(direction, training.clip)", "pass", ORACLES, "fedavg"),
    Mutant(
        "weight decay: forgotten",
        "client.py",
        "direction = direction + pick(weights, direction) * decay",
        "pass",
        ORACLES,
        "fedavg",
    ),
    Mutant(
        "optimiser: momentum lives on through padding",
        "client.py",
        "state = {k: where(valid, v, first[k]) for k, v in after.items()}",
        "state = after",
        METHODS,
        "FedAvg-engines",
    ),
    Mutant(
        "Adam: no bias correction", "optim.py", "first / (1 - self.beta1**step.flat)", "first / 1", LAWS, "optimisers"
    ),
    Mutant(
        "memory: not copied at the boundary",
        "engine/memory.py",
        "{name: tree.clone() for name, tree in memory.items()}",
        "dict(memory)",
        METHODS,
        "memory_is_not_shared",
    ),
    Mutant(
        "memory: all clients have the last one's",
        "engine/memory.py",
        "self._kept[client] = {",
        "self._kept = dict.fromkeys([*self._kept, client], {}); self._kept[client] = {",
        ORACLES,
        "fedbn",
    ),
    Mutant(
        "cohort: drawn from the list's order",
        "engine/federation.py",
        "names = sorted(self.clients)",
        "names = list(self.clients)",
        ENGINE,
    ),
    Mutant("cohort: drawn with replacement", "engine/federation.py", "replace=False", "replace=True", ENGINE),
    Mutant("batches: the same order in every epoch", "engine/stream.py", '"order", epoch)', '"order")', ENGINE),
    Mutant(
        "batches: a last batch of one stays", "engine/stream.py", "len(rows[-1]) == 1", "len(rows[-1]) == -1", ENGINE
    ),
    Mutant(
        "checkpoint: memories of clients are lost",
        "checkpoint.py",
        "federation.memory.put(client, slots)",
        "pass",
        METHODS,
        "resume",
    ),
    Mutant("engine: what is not finite is kept", "engine/federation.py", "if reason:", "if False:", ENGINE),
    Mutant(
        "schedule: one round late",
        "engine/federation.py",
        "self.training.schedule(self.training.lr, min(self.round, self.rounds - 1), self.rounds)",
        "self.training.schedule(self.training.lr, max(self.round - 1, 0), self.rounds)",
        ORACLES,
        "fedavg",
    ),
    Mutant(
        "dropout: drawn anew in the second pass",
        "model.py",
        "self._seed(batch.key)",
        "pass",
        LAWS,
        "dropout",
    ),
    Mutant(
        "evaluation: in training mode",
        "model.py",
        "functional_call(self._predicting, ",
        "functional_call(self._training, ",
        ENGINE,
    ),
    Mutant(
        "evaluation: clients are weighed by training examples",
        "evaluation.py",
        "sizes = {c: len(federation.clients[c].splits()[split].y) for c in held}",
        "sizes = {c: len(federation.clients[c].train.y) for c in held}",
        ENGINE,
    ),
    Mutant(
        "bytes: down is counted once a round",
        "engine/federation.py",
        "down = len(cohort) * sum(",
        "down = sum(",
        ENGINE,
    ),
]

WITHOUT_AUTOGRAD = [
    Mutant("kernels: a step uphill", "kernels.py", "1.0, -rate)", "1.0, rate)", KERNELS),
    Mutant(
        "kernels: the gradient moves the statistics it is given",
        "kernels.py",
        "combine(self.anatomy.buffers, weights).flat.clone()",
        "combine(self.anatomy.buffers, weights).flat",
        KERNELS,
    ),
    Mutant("kernels: the pass back goes on below what is asked for", "kernels.py", "i > lowest)", "True)", KERNELS),
    Mutant(
        "kernels: weighted cross-entropy is taken for the plain",
        "kernels.py",
        'return options == (None, -100, "mean", 0.0) and',
        "return",
        KERNELS,
    ),
    Mutant(
        "kernels: the step before the gradient of the input",
        "layers.py",
        "sink.put(bias, d.sum(0))\n        return below",
        "sink.put(bias, d.sum(0))\n        return d.mm(own[0]) if inward else d",
        KERNELS,
    ),
    Mutant("kernels: frozen statistics move", "kernels.py", "not batch.frozen", "True", KERNELS),
    Mutant("kernels: batches are not counted", "layers.py", "            own[-1].add_(1)\n", "", KERNELS),
    Mutant(
        "kernels: in place on the client's data",
        "layers.py",
        "    owned = False\n    for",
        "    owned = True\n    for",
        KERNELS,
    ),
    Mutant(
        "kernels: a bias summed over examples alone",
        "layers.py",
        "[0, 2, 3] if self.images",
        "[0, 2] if self.images",
        KERNELS,
    ),
    Mutant("chain: a tensor without a layer", "chain.py", "if name not in held), None)", "if False), None)", KERNELS),
    Mutant("chain: hooks", "chain.py", "any(getattr(layer, hooks) for hooks in _HOOKS)", "False", KERNELS),
    Mutant(
        "chain: gradients switched off", "chain.py", "if mixed or not torch.is_grad_enabled():", "if mixed:", KERNELS
    ),
    Mutant(
        "chain: an autograd function of its own",
        "chain.py",
        "if frame.f_code is torch.autograd.Function.apply.__code__:",
        "if False:",
        KERNELS,
    ),
    Mutant(
        "chain: another forward in evaluation",
        "chain.py",
        "for mode in (True, False))",
        "for mode in (True, True))",
        KERNELS,
    ),
    Mutant("chain: chance", "chain.py", "if drawn() != before:", "if False:", KERNELS),
]

MUTANTS = PROTOTYPE + MORE + WITHOUT_AUTOGRAD
