"""Batch normalization by the inputs that are to be predicted."""

from __future__ import annotations

from idiolect.core.part import Part, part
from idiolect.core.scope import batch_norm
from idiolect.core.tree import EMPTY, Tree, overlay
from idiolect.core.types import Local, Setup


@part
def adapted_statistics() -> Part:
    r"""Normalize by the mean and variance of the inputs to predict, in place of the running statistics.

    .. math::  \mu_\ell = \frac1n \sum_k a_{\ell k}, \qquad  v_\ell = \frac1n \sum_k (a_{\ell k} - \mu_\ell)^2

    for each channel of each layer :math:`\ell` of batch normalization, over the n values :math:`a_{\ell k}` that it is
    given by all inputs together, where the layers before it normalize in the same way. Labels are not read. A rule
    for any method: federated training is unchanged, and nothing of it is sent or kept. Scale and shift stay as they
    are, so with FedBN or SiloBN a client adapts its own.

    Predictions are transductive: they depend on which inputs are predicted together. The mix of classes among these
    goes into the statistics, so inputs of few classes can be predicted worse than without; compare with the method
    without this part. A single input has no variance: it is predicted by the running statistics.

    Memory:    none.       Sends: nothing.       Receives: nothing.
    Cost:      none while training. One more forward pass to predict, with all inputs as one batch.
    Raises:    UsageError: if the model has no batch normalization.

    Example:
        >>> adapted_statistics()
        adapted_statistics()

    Reference: Li et al., AdaBN, Pattern Recognition 2018.
    Differs:   codes that go through PyTorch's cumulative average weigh batches equally, so their result depends on the
        batches, and keep the unbiased variance; here all inputs are one batch, and the variance is the one that a
        layer normalizes a batch by. Some public codes adapt two-dimensional layers alone; here all layers of batch
        normalization.
    """

    def memory(setup: Setup) -> Tree:
        batch_norm(setup.structure)  # or it raises
        return EMPTY

    def deploy(local: Local, weights: Tree) -> Tree:
        assert local.inputs is not None
        if len(local.inputs) < 2:
            return weights
        return overlay(weights, local.statistics(weights, local.inputs))

    return Part(memory=memory, deploy=deploy, transductive=True)
