"""Textbook loops of methods with a loss of their own; see :mod:`idiolect.testing.oracles.averaging`.

The features of an example are what the last linear layer is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Unpack

import torch
from torch import Tensor, nn

from idiolect.testing.oracles.common import (
    Batches,
    Direction,
    OracleResult,
    State,
    World,
    average,
    cohort_of,
    deployed,
    everything,
    local_training,
    loss_of,
    lr_of,
    receive,
    start,
    trainable,
)


def last_linear(model: nn.Module) -> nn.Linear:
    """The last linear layer of a model: its head."""
    named = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    return [module for name, module in named if not name.endswith(("private", "spread"))][-1]


def attach(model: nn.Module, name: str, outputs: int) -> None:
    """List a linear map of the head's input, zero at first, in the head, which does not use it."""
    last = last_linear(model)
    beside = nn.Linear(last.in_features, outputs, dtype=last.weight.dtype)
    nn.init.zeros_(beside.weight)
    nn.init.zeros_(beside.bias)
    last.add_module(name, beside)


def beside_head(model: nn.Module, name: str, z: Tensor) -> Tensor:
    """What a layer that is listed in the head makes of features."""
    outputs: Tensor = last_linear(model).get_submodule(name)(z)
    return outputs


def features_and_outputs(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the head is given and what the model returns."""
    given: list[Tensor] = []
    hook = last_linear(model).register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    outputs = model(x)
    hook.remove()
    return given[0], outputs


def looking_on(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same in evaluation mode, without a gradient; the model goes back to training."""
    model.eval()
    with torch.no_grad():
        found = features_and_outputs(model, x)
    model.train()
    return found


def slope(model: nn.Module, loss: Tensor) -> State:
    """Gradient of a loss in all trainable tensors of a model; zero where it does not depend on one."""
    tensors = trainable(model)
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(tensors.items(), found, strict=True)}


def class_counts(batches: Batches, epochs: int, classes: int) -> list[int]:
    """How many examples of each class there are in one of several epochs."""
    return [sum(int((y == c).sum()) for _, y in batches) // epochs for c in range(classes)]


def federated(
    world: World,
    direction_of: Callable[[int, nn.Module, Batches], Direction],
    trained: Callable[[int, nn.Module], None] = lambda client, model: None,
) -> OracleResult:
    """The rounds of federated averaging, where each client has a direction of its own.

    Args:
        world: see :class:`World`.
        direction_of: (client, model as received, batches) -> the direction of its local steps.
        trained: (client, model) is called after its local training.
    """
    models, shared = start(world)
    result = OracleResult()
    for t in range(world["rounds"]):
        cohort = cohort_of(world, t)
        for i in cohort:
            receive(models[i], shared)
            batches = world["batches"](t, i)
            direction = direction_of(i, deepcopy(models[i]), batches)
            local_training(models[i], batches, lr_of(world, t), direction, shared, world)
            trained(i, models[i])
        shared = average([models[i] for i in cohort], [world["weights"][i] for i in cohort], shared)
        result.shared.append(shared)
        result.deployed.append(deployed(models, shared))
    return result


def fedlc(tau: float, epochs: int, **world: Unpack[World]) -> OracleResult:
    """FedLC: FedAvg on the loss of outputs f_c − τ n_c^(−1/4); a class without examples counts as 1e-8.

    Args:
        tau: size of the margin.
        epochs: how many epochs a client's batches cover.
        world: see :class:`World`.

    Reference: Zhang et al., ICML 2022.
    """
    classes = last_linear(world["model"]).out_features

    def of_client(i: int, received: nn.Module, batches: Batches) -> Direction:
        counts = class_counts(batches, epochs, classes)
        margins = torch.tensor([tau / max(n, 1e-8) ** 0.25 for n in counts], dtype=torch.float64)
        return lambda model, x, y, _: slope(model, loss_of(world)(model(x) - margins, y))

    return federated(world, of_client)


def not_true(outputs: Tensor, label: int, tau: float) -> Tensor:
    """Probabilities of the classes of one example that are not its label."""
    others = [c for c in range(len(outputs)) if c != label]
    return torch.softmax(outputs[others] / tau, dim=0)


def fedntd(beta: float, tau: float, **world: Unpack[World]) -> OracleResult:
    """FedNTD: FedAvg on the loss plus β τ² KL(q ‖ p) over the classes that are not the label.

    Args:
        beta: strength.
        tau: temperature of p, the model's, and of q, those of the model as received.
        world: see :class:`World`.

    Reference: Lee et al., NeurIPS 2022.
    """

    def of_client(i: int, received: nn.Module, batches: Batches) -> Direction:
        def direction(model: nn.Module, x: Tensor, y: Tensor, _: State) -> State:
            taught, outputs = looking_on(received, x)[1], model(x)
            loss = loss_of(world)(outputs, y)
            for k, label in enumerate(y.tolist()):
                q, p = not_true(taught[k], label, tau), not_true(outputs[k], label, tau)
                loss = loss + beta * tau * tau * (q * (q / p).log()).sum() / len(y)
            return slope(model, loss)

        return direction

    return federated(world, of_client)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the angle between two vectors."""
    return torch.dot(a, b) / (torch.dot(a, a) * torch.dot(b, b)).sqrt()


def moon(mu: float, tau: float, **world: Unpack[World]) -> OracleResult:
    """MOON: FedAvg on the loss plus μ times −log of e^(cos(z, z_received)/τ) over it plus e^(cos(z, z_last)/τ).

    The last model is the one a client's own training ended with; without one there is no second term.

    Args:
        mu: strength of the contrast.
        tau: its temperature.
        world: see :class:`World`.

    Reference: Li, He and Song, CVPR 2021.
    """
    last: dict[int, nn.Module] = {}

    def of_client(i: int, received: nn.Module, batches: Batches) -> Direction:
        def direction(model: nn.Module, x: Tensor, y: Tensor, _: State) -> State:
            z, outputs = features_and_outputs(model, x)
            loss = loss_of(world)(outputs, y)
            if i in last:
                now, then = looking_on(received, x)[0], looking_on(last[i], x)[0]
                for k in range(len(x)):
                    near, far = math.e ** (cosine(z[k], now[k]) / tau), math.e ** (cosine(z[k], then[k]) / tau)
                    loss = loss - mu * (near / (near + far)).log() / len(x)
            return slope(model, loss)

        return direction

    def trained(i: int, model: nn.Module) -> None:
        last[i] = deepcopy(model)

    return federated(world, of_client, trained)


def fedrod(epochs: int, **world: Unpack[World]) -> OracleResult:
    """FedRoD: the shared head trains by balanced softmax, a private one on what it leaves of the plain loss.

    The loss is −log of n_y e^(g_y) over Σ n_c e^(g_c), plus the plain loss of g(z) + p(z) in the tensors of p alone. p
    is linear, begins at zero and is listed as ``private`` in the layer beside which it stands.

    Args:
        epochs: how many epochs a client's batches cover.
        world: see :class:`World`; everything is shared.

    Reference: Chen and Chao, ICLR 2022.
    """
    world = {**world, "shared": everything(world["model"]), "model": deepcopy(world["model"])}
    classes = last_linear(world["model"]).out_features
    attach(world["model"], "private", classes)

    def of_client(i: int, received: nn.Module, batches: Batches) -> Direction:
        counts = class_counts(batches, epochs, classes)
        logs = torch.tensor([math.log(max(n, 1e-8)) for n in counts], dtype=torch.float64)

        def direction(model: nn.Module, x: Tensor, y: Tensor, _: State) -> State:
            z, outputs = features_and_outputs(model, x)
            generic = slope(model, loss_of(world)(outputs + logs, y))
            own = outputs.detach() + beside_head(model, "private", z.detach())
            personal = slope(model, loss_of(world)(own, y))
            return {name: personal[name] if ".private." in name else generic[name] for name in generic}

        return direction

    return federated(world, of_client)


@dataclass
class PrototypeResult(OracleResult):
    """What FedProto left behind, with one entry per round.

    Attributes:
        prototypes: the prototype of each class that has one.
    """

    prototypes: list[dict[int, Tensor]] = field(default_factory=list)


def fedproto(lam: float, by_examples: bool, epochs: int, **world: Unpack[World]) -> PrototypeResult:
    """FedProto: every client alone, but for λ times the mean square of z − c_y, where class y has a prototype c_y.

    After training, in evaluation mode, each client averages z over its examples of each class; the server averages
    these over the clients that have the class.

    Args:
        lam: strength λ.
        by_examples: the server weighs clients by their examples of the class instead of equally.
        epochs: how many epochs a client's batches cover.
        world: see :class:`World`; nothing is shared.

    Reference: Tan et al., AAAI 2022.
    """
    models, _ = start({**world, "shared": []})
    prototypes: dict[int, Tensor] = {}
    result = PrototypeResult()

    def pulled(model: nn.Module, x: Tensor, y: Tensor, _: State) -> State:
        z, outputs = features_and_outputs(model, x)
        loss = loss_of(world)(outputs, y)
        for k, label in enumerate(y.tolist()):
            if label in prototypes:
                loss = loss + lam * ((z[k] - prototypes[label]) ** 2).mean() / len(y)
        return slope(model, loss)

    for t in range(world["rounds"]):
        told: dict[int, list[tuple[Tensor, int]]] = {}
        for i in cohort_of(world, t):
            batches = world["batches"](t, i)
            local_training(models[i], batches, lr_of(world, t), pulled, {}, world)
            x, y = (torch.cat(tensors) for tensors in zip(*batches[: len(batches) // epochs], strict=True))
            z = looking_on(models[i], x)[0]
            for label in set(y.tolist()):
                told.setdefault(label, []).append((z[y == label].mean(0), int((y == label).sum())))
        for label, means in told.items():
            weights = [float(n) if by_examples else 1.0 for _, n in means]
            total = sum((w * mean for w, (mean, _) in zip(weights, means, strict=True)), torch.zeros(()))
            prototypes[label] = total / sum(weights)
        result.shared.append({})
        result.deployed.append(deployed(models, {}))
        result.prototypes.append(dict(prototypes))
    return result


@dataclass
class GaussianResult(OracleResult):
    """What FedCR left behind, with one entry per round.

    Attributes:
        gaussians: mean and standard deviation of each class.
    """

    gaussians: list[dict[int, tuple[Tensor, Tensor]]] = field(default_factory=list)


def divergence(mean_p: Tensor, dev_p: Tensor, mean_q: Tensor, dev_q: Tensor) -> Tensor:
    """KL(p || q) of Gaussians with independent dimensions."""
    normal = torch.distributions.Normal
    return torch.distributions.kl_divergence(normal(mean_p, dev_p), normal(mean_q, dev_q)).sum()


def fedcr(
    beta: float,
    renewal: float,
    bound: bool,
    epochs: int,
    noise: Callable[[int, int, int], Tensor],
    **world: Unpack[World],
) -> GaussianResult:
    """FedCR: features z become N(z, softplus(Vz + v)²), whose divergence from the Gaussian of their class is held down.

    The loss is the mean over samples of that of the head, plus β KL(class ‖ features). After training, in evaluation
    mode, each client adds up, class by class, precisions and precisions times means of its examples; the server adds
    those of the clients and a unit Gaussian, and turns the sums into a mean and a deviation. V and v are zero at first
    and are listed as ``spread`` in the head; they are shared like the body; the head is not. No deviation is below
    1e-4.

    Args:
        beta: strength β.
        renewal: how far class means and deviations go to the new ones.
        bound: take KL(features ‖ class) instead.
        epochs: how many epochs a client's batches cover.
        noise: ``noise(round, client, step)`` is ``(samples, batch, features)`` of standard normal numbers.
        world: see :class:`World`; what is shared is decided here.

    Reference: Zhang et al., ICML 2023.
    """
    net = deepcopy(world["model"])
    attach(net, "spread", last_linear(net).in_features)
    head = {id(tensor) for tensor in last_linear(net).parameters(recurse=False)}
    personal = {name for name, tensor in net.named_parameters() if id(tensor) in head}
    shared_names = [name for name in everything(net) if name not in personal]
    models, shared = start({**world, "model": net, "shared": shared_names})
    unit = torch.zeros(last_linear(net).in_features, dtype=torch.float64)
    gaussians = {c: (unit, torch.ones_like(unit)) for c in range(last_linear(net).out_features)}
    result = GaussianResult()

    def deviation(model: nn.Module, z: Tensor) -> Tensor:
        return (1 + torch.exp(beside_head(model, "spread", z))).log().clamp(min=1e-4)

    for t in range(world["rounds"]):
        cohort = cohort_of(world, t)
        precision = {c: torch.zeros_like(unit) for c in gaussians}
        weighted = {c: torch.zeros_like(unit) for c in gaussians}
        for i in cohort:
            receive(models[i], shared)
            batches, step = world["batches"](t, i), iter(range(10**6))

            def direction(
                model: nn.Module, x: Tensor, y: Tensor, _: State, t: int = t, i: int = i, step: Iterator[int] = step
            ) -> State:
                z, _outputs = features_and_outputs(model, x)
                sigma, draws = deviation(model, z), noise(t, i, next(step))
                loss = torch.zeros((), dtype=torch.float64)
                for draw in draws:
                    loss = loss + loss_of(world)(last_linear(model)(z + sigma * draw), y) / len(draws)
                for k, label in enumerate(y.tolist()):
                    p, q = gaussians[label], (z[k], sigma[k])
                    loss = loss + beta * (divergence(*q, *p) if bound else divergence(*p, *q)) / len(y)
                return slope(model, loss)

            local_training(models[i], batches, lr_of(world, t), direction, shared, world)
            for x, y in batches[: len(batches) // epochs]:
                z = looking_on(models[i], x)[0]
                sigma = deviation(models[i], z).detach()
                for k, label in enumerate(y.tolist()):
                    precision[label] = precision[label] + 1 / sigma[k] ** 2
                    weighted[label] = weighted[label] + z[k] / sigma[k] ** 2
        for c, (mean, dev) in gaussians.items():
            if (precision[c] > 0).any():
                new_mean, new_dev = weighted[c] / (1 + precision[c]), (1 + precision[c]) ** -0.5
                gaussians[c] = (1 - renewal) * mean + renewal * new_mean, (1 - renewal) * dev + renewal * new_dev
        shared = average([models[i] for i in cohort], [world["weights"][i] for i in cohort], shared)
        result.shared.append(shared)
        result.deployed.append(deployed(models, shared))
        result.gaussians.append(dict(gaussians))
    return result
