"""Methods that change how the server aggregates."""

from __future__ import annotations

from idiolect.core.card import carded
from idiolect.core.method import Method, Weighting
from idiolect.core.scope import everything
from idiolect.parts import normalized_average, server_adaptive, server_sgd, share


@carded("FedAvgM", 2019, "convergence", "Hsu et al. 2019")
def fedavgm(momentum: float = 0.9, lr: float = 1.0, weighting: Weighting = "samples") -> Method:
    """FedAvg with momentum on the server.

    Args:
        momentum: momentum of the server, in [0, 1); 0 with `lr` 1 is FedAvg.
        lr: learning rate of the server.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), server_sgd(lr, momentum)), "FedAvgM", weighting)


@carded("FedAdagrad", 2021, "convergence", "Reddi et al., ICLR 2021")
def fedadagrad(lr: float = 0.1, tau: float = 1e-3, weighting: Weighting = "samples") -> Method:
    """FedAvg whose server applies Adagrad, without momentum.

    Args:
        lr: learning rate of the server.
        tau: degree of adaptivity; a smaller value adapts more.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), server_adaptive("adagrad", lr, beta1=0.0, tau=tau)), "FedAdagrad", weighting)


@carded("FedAdam", 2021, "convergence", "Reddi et al., ICLR 2021")
def fedadam(
    lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3, weighting: Weighting = "samples"
) -> Method:
    """FedAvg whose server applies Adam, without bias correction.

    Args:
        lr: learning rate of the server.
        beta1: decay of the mean update.
        beta2: decay of the mean squared update.
        tau: degree of adaptivity; a smaller value adapts more.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), server_adaptive("adam", lr, beta1, beta2, tau)), "FedAdam", weighting)


@carded("FedYogi", 2021, "convergence", "Reddi et al., ICLR 2021")
def fedyogi(
    lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3, weighting: Weighting = "samples"
) -> Method:
    """FedAdam whose mean squared update changes by bounded steps.

    Args:
        lr: learning rate of the server.
        beta1: decay of the mean update.
        beta2: 1 minus the step of the squared update.
        tau: degree of adaptivity; a smaller value adapts more.
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), server_adaptive("yogi", lr, beta1, beta2, tau)), "FedYogi", weighting)


@carded("FedNova", 2020, "convergence", "Wang et al., NeurIPS 2020")
def fednova(weighting: Weighting = "samples") -> Method:
    """FedAvg with normalized updates: clients that take more local steps do not have larger weights.

    Args:
        weighting: mean over clients by training examples, or uniform.
    """
    return Method((share(everything), normalized_average()), "FedNova", weighting)
