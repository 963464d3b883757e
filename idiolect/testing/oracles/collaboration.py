"""Textbook loops of methods whose clients learn from those that resemble them."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from itertools import combinations
from statistics import median_low
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idiolect.testing.oracles.common import (
    Batches,
    Direction,
    Loss,
    OracleResult,
    State,
    World,
    average,
    cohort_of,
    copy_of,
    deployed,
    gradient,
    local_training,
    loss_of,
    lr_of,
    receive,
    start,
    trainable,
)


def weighted(states: list[State], weights: list[float]) -> State:
    """Sum of states, each times its weight."""
    total = {name: torch.zeros_like(tensor) for name, tensor in states[0].items()}
    for state, weight in zip(states, weights, strict=True):
        for name, tensor in state.items():
            total[name] = total[name] + weight * tensor
    return total


def plain(loss: Loss) -> Direction:
    """The direction g."""
    return lambda model, x, y, _: gradient(model, x, y, loss)


def to_anchor(anchor: State, strength: float, loss: Loss) -> Direction:
    """The direction g + λ (w − u)."""

    def direction(model: nn.Module, x: Tensor, y: Tensor, _: State) -> State:
        now, g = trainable(model), gradient(model, x, y, loss)
        return {name: g[name] + strength * (now[name].detach() - anchor[name]) for name in g}

    return direction


def fedamp(strength: float, others: float, sigma: float | None, **world: Unpack[World]) -> OracleResult:
    """FedAMP among the clients of a round: w_i is trained along g + λ (w − u_i), and nothing is shared.

    After the round u_i = Σ_j ξ_ij w_j with ξ_ij = κ / (m − 1) exp(−‖w_i − w_j‖² / σ), and ξ_ii what is missing to 1.
    A client that is absent keeps its u_i, which is the initial weights at first.

    Args:
        strength: λ.
        others: κ.
        sigma: σ; None takes the lower median of the squared distances of the round's pairs.
        world: see :class:`World`.

    Reference: Huang et al., AAAI 2021.
    """
    models, _ = start(world)
    anchors = [copy_of(model, trainable(model)) for model in models]
    result = OracleResult()
    for t in range(world["rounds"]):
        cohort = cohort_of(world, t)
        for i in cohort:
            how = to_anchor(anchors[i], strength, loss_of(world))
            local_training(models[i], world["batches"](t, i), lr_of(world, t), how, {}, world)
        sent = {i: copy_of(models[i], trainable(models[i])) for i in cohort}

        def apart(i: int, j: int, sent: dict[int, State] = sent) -> float:
            return sum(float(((sent[i][name] - sent[j][name]) ** 2).sum()) for name in sent[i])

        width = sigma or median_low([apart(i, j) for i in cohort for j in cohort if i < j])
        for i in cohort:
            xi = {j: others / (len(cohort) - 1) * math.exp(-apart(i, j) / width) for j in cohort if j != i}
            xi[i] = 1 - sum(xi.values())
            anchors[i] = weighted([sent[j] for j in cohort], [xi[j] for j in cohort])
        result.shared.append({})
        result.deployed.append([copy_of(model, model.state_dict()) for model in models])
    return result


def critical(before: State, after: State, top: float) -> dict[str, Tensor]:
    """True where |(after − before) after| is above 0 and among the ``top`` share of its tensor, rounded down."""
    masks = {}
    for name, old in before.items():
        change = ((after[name] - old) * after[name]).abs().flatten()
        best = sorted(range(len(change)), key=lambda k: -change[k].item())[: int(top * len(change))]
        mask = torch.zeros(len(change), dtype=torch.bool)
        mask[best] = True
        masks[name] = (mask & (change > 0)).reshape(old.shape)
    return masks


def fedcac(top: float, beta: int, **world: Unpack[World]) -> OracleResult:
    """FedCAC among the clients of a round.

    A client starts critical values from the mean of its partners' models, the rest from the shared model. Partners are
    the client itself and those whose share of common critical values is at least mean + (t + 1) / β (max − mean) over
    the ordered pairs of the round. Running statistics are shared.

    Args:
        top: share of values of a tensor that are critical.
        beta: rounds over which the bar rises to the largest overlap.
        world: see :class:`World`.

    Reference: Wu et al., ICCV 2023.
    """
    models, shared = start(world)
    names = [name for name in trainable(world["model"]) if name in shared]
    masks = [{name: torch.zeros_like(shared[name], dtype=torch.bool) for name in names} for _ in models]
    custom = [{name: shared[name] for name in names} for _ in models]
    result = OracleResult()

    def starting(i: int) -> State:
        return shared | {name: torch.where(masks[i][name], custom[i][name], shared[name]) for name in names}

    for t in range(world["rounds"]):
        cohort = cohort_of(world, t)
        for i in cohort:
            receive(models[i], starting(i))
            before = copy_of(models[i], names)
            local_training(models[i], world["batches"](t, i), lr_of(world, t), plain(loss_of(world)), shared, world)
            masks[i] = critical(before, copy_of(models[i], names), top)
        overlap = {}
        for i in cohort:
            size = sum(int(masks[i][name].sum()) for name in names)
            for j in cohort:
                differ = sum(int((masks[i][name] != masks[j][name]).sum()) for name in names)
                overlap[i, j] = 1 - differ / (2 * size)
        others = [value for (i, j), value in overlap.items() if i != j]
        mean, largest = sum(others) / len(others), max(others)
        bar = mean + (t + 1) / beta * (largest - mean)
        for i in cohort:
            partners = [j for j in cohort if j == i or overlap[i, j] >= bar]
            custom[i] = average([models[j] for j in partners], [1] * len(partners), names)
        shared = average([models[i] for i in cohort], [world["weights"][i] for i in cohort], shared)
        result.shared.append(shared)
        result.deployed.append(deployed(models, shared))
        for i, state in enumerate(result.deployed[-1]):
            state |= starting(i)
    return result


def pfedsim(warmup: int, head: str, **world: Unpack[World]) -> OracleResult:
    """FedAvg for ``warmup`` rounds; then own heads, on bodies mixed from the clients of the own last round.

    Body of client i: Σ_j a_ij body_j, with a_ij in proportion to −log(1 − s_ij), where s_ij is the mean over classes
    of the cosine between rows of the heads' matrices, between 0 and 0.9999, and s_ii = 0.9999. A client's first start
    after the warm-up is the shared model.

    Args:
        warmup: rounds of FedAvg.
        head: name of the head's layer.
        world: see :class:`World`.

    Reference: Tan et al., 2023.
    """
    models, shared = start(world)
    bodies: dict[int, State] = {}
    own: dict[int, State] = {}
    layer = [name for name in shared if name.rpartition(".")[0] == head]
    result = OracleResult()
    for t in range(world["rounds"]):
        cohort = cohort_of(world, t)
        for i in cohort:
            receive(models[i], shared | bodies.get(i, {}) | own.get(i, {}))
            local_training(models[i], world["batches"](t, i), lr_of(world, t), plain(loss_of(world)), shared, world)
        sent = {i: copy_of(models[i], shared) for i in cohort}
        for i in cohort if t >= warmup else ():
            closeness = []
            for j in cohort:
                pairs = zip(sent[i][f"{head}.weight"], sent[j][f"{head}.weight"], strict=True)
                cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in pairs]
                alike = 0.9999 if j == i else min(0.9999, max(0.0, sum(cosines) / len(cosines)))
                closeness.append(-math.log(1 - alike))
            mixed = weighted([sent[j] for j in cohort], [c / sum(closeness) for c in closeness])
            bodies[i] = {name: tensor for name, tensor in mixed.items() if name not in layer}
            own[i] = {name: sent[i][name] for name in layer}
        shared = average([models[i] for i in cohort], [world["weights"][i] for i in cohort], shared)
        result.shared.append(shared)
        result.deployed.append(deployed(models, shared))
        for i, state in enumerate(result.deployed[-1]):
            state |= bodies.get(i, {}) | own.get(i, {})
    return result


def features(net: nn.Module, x: Tensor) -> Tensor:
    """What the last layer of a chain is given, in evaluation mode."""
    assert isinstance(net, nn.Sequential)
    net.eval()
    with torch.no_grad():
        found: Tensor = net[:-1](x)
    return found


def by_class(net: nn.Module, epoch: Batches) -> dict[int, list[Tensor]]:
    """The features of all examples of each class that occurs."""
    found: dict[int, list[Tensor]] = {}
    for x, y in epoch:
        for z, label in zip(features(net, x), y.tolist(), strict=True):
            found.setdefault(label, []).append(z)
    return found


def train_head(net: nn.Module, epoch: Batches, lr: float, world: World) -> None:
    """Train the last layer of a chain on the features of these batches."""
    assert isinstance(net, nn.Sequential)
    seen = [(features(net, x), y) for x, y in epoch]
    local_training(net[-1], seen, lr, plain(loss_of(world)), {}, world)


def train_body(net: nn.Module, batches: Batches, lr: float, direction: Direction, world: World) -> None:
    """Train all of a chain but its last layer."""
    assert isinstance(net, nn.Sequential)
    net[-1].requires_grad_(False)
    local_training(net, batches, lr, direction, {}, world)
    net[-1].requires_grad_(True)


def to_targets(targets: dict[int, Tensor], strength: float, loss: Loss) -> Direction:
    """The gradient in a chain of the loss, and λ times the mean squared distance of features to their targets."""

    def direction(net: nn.Module, x: Tensor, y: Tensor, _: State) -> State:
        assert isinstance(net, nn.Sequential)
        z, tensors = net[:-1](x), trainable(net)
        near = F.mse_loss(z, torch.stack([targets[label] for label in y.tolist()])) if targets else 0.0
        found = torch.autograd.grad(loss(net[-1](z), y) + strength * near, list(tensors.values()))
        return dict(zip(tensors, found, strict=True))

    return direction


def smallest_form(p: Tensor) -> Tensor:
    """The minimum of αᵀPα over α ≥ 0 that sums to one, by a look at every support."""
    best, at = math.inf, torch.zeros(len(p), dtype=p.dtype)
    for size in range(1, len(p) + 1):
        for support in map(list, combinations(range(len(p)), size)):
            on = torch.linalg.lstsq(p[support][:, support], torch.ones(size, 1, dtype=p.dtype)).solution[:, 0]
            on = on / on.sum()
            value = float(on @ p[support][:, support] @ on)
            if (on >= 0).all() and value < best:
                best, at = value, torch.zeros(len(p), dtype=p.dtype).index_put((torch.tensor(support),), on)
    return at


def fedpac(
    strength: float,
    classes: int,
    first_epoch: Callable[[int, int], Batches],
    deploy_epoch: Callable[[int, int], Batches],
    head_lr: float | None = None,
    **world: Unpack[World],
) -> OracleResult:
    """FedPAC among the clients of a round, on a chain whose last layer is the head.

    A client takes its mixed head, trains it for an epoch on features of the received body, then the body under that
    head with features pulled to the class means of the last round's clients, where there are such, else to its own
    under the received body; in the first round without a pull. Class means are of the trained bodies, over all
    examples. Heads are mixed with weights that minimize Σ α_j² V_j + Σ_y ‖Σ_j α_j (h_i[y] − h_j[y])‖², where
    h_i[y] = p_y f_y and V_i = (Σ_y p_y E‖f‖²_y − Σ_y p_y² ‖f_y‖²) / n_i under the received body; those below 0.001
    are left out. To predict, the newest body takes the client's mixed head, trained for an epoch.

    Args:
        strength: λ.
        classes: number of classes.
        first_epoch: ``first_epoch(round, client)`` lists the batches of one epoch, before local training.
        deploy_epoch: the same for predicting once that round is over.
        head_lr: of the head; None takes the round's.
        world: see :class:`World`.

    Reference: Xu et al., ICLR 2023.
    """
    models, shared = start(world)
    last = f"{len(list(models[0].children())) - 1}."
    layer = [name for name in trainable(models[0]) if name.startswith(last)]
    mixed = [copy_of(model, layer) for model in models]
    means: dict[int, Tensor] = {}
    result = OracleResult()
    for t in range(world["rounds"]):
        cohort, lr = cohort_of(world, t), lr_of(world, t)
        forms, variances = [], []
        sums: dict[int, Tensor] = {}
        counts: dict[int, int] = {}
        for i in cohort:
            net, epoch = models[i], first_epoch(t, i)
            receive(net, shared | mixed[i])
            received = by_class(net, epoch)
            n = sum(map(len, received.values()))
            width = next(iter(received.values()))[0].numel()
            form, variance = torch.zeros(classes, width, dtype=torch.float64), 0.0
            for c, zs in received.items():
                p, f = len(zs) / n, torch.stack(zs)
                form[c] = p * f.mean(0)
                variance += p * float((f**2).sum(1).mean()) - p**2 * float((f.mean(0) ** 2).sum())
            forms.append(form)
            variances.append(variance / n)
            train_head(net, epoch, head_lr or lr, world)
            targets = {c: means.get(c, torch.stack(zs).mean(0)) for c, zs in received.items()} if t else {}
            train_body(net, world["batches"](t, i), lr, to_targets(targets, strength, loss_of(world)), world)
            for c, zs in by_class(net, epoch).items():
                sums[c] = sums.get(c, 0.0) + torch.stack(zs).sum(0)
                counts[c] = counts.get(c, 0) + len(zs)
        means = {c: sums[c] / counts[c] for c in sums}
        heads = [copy_of(models[i], layer) for i in cohort]
        for i, own in zip(cohort, forms, strict=True):
            matrix = [[float(((own - a) * (own - b)).sum()) for a in forms] for b in forms]
            for j, v in enumerate(variances):
                matrix[j][j] += v
            alpha = smallest_form(torch.tensor(matrix, dtype=torch.float64))
            kept = [a if a >= 1e-3 else 0.0 for a in alpha.tolist()]
            mixed[i] = weighted(heads, [a / sum(kept) for a in kept])
        shared = average([models[i] for i in cohort], [world["weights"][i] for i in cohort], shared)
        result.shared.append(shared)
        copies = [deepcopy(model) for model in models]
        for i, net in enumerate(copies):
            receive(net, shared | mixed[i])
            train_head(net, deploy_epoch(t, i), head_lr or lr_of(world, min(t + 1, world["rounds"] - 1)), world)
        result.deployed.append([copy_of(model, model.state_dict()) for model in copies])
    return result
