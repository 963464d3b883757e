"""Batch normalization with the statistics of the inputs to predict."""

from __future__ import annotations

from idiolect.core.nest import rows_in
from idiolect.core.part import Part, part
from idiolect.core.scope import batch_norm
from idiolect.core.tree import EMPTY, Tree, overlay
from idiolect.core.types import Local, Setup


@part
def adapted_statistics() -> Part:
    r"""Normalize with the mean and variance of the inputs to predict, in place of the running statistics.

    .. math::  \mu_\ell = \frac1n \sum_k a_{\ell k}, \qquad  v_\ell = \frac1n \sum_k (a_{\ell k} - \mu_\ell)^2

    for each channel of each batch normalization layer :math:`\ell`, over the n values :math:`a_{\ell k}` that the
    layer receives from all inputs together; the layers before it normalize in the same way. Labels are not used. The
    part can be added to any method: federated training is unchanged, and no statistics are sent or kept. Scale and
    shift are unchanged, so with FedBN or SiloBN a client uses its own.

    Predictions are transductive: they depend on which inputs are predicted together. The class distribution of these
    inputs affects the statistics, so inputs of few classes can be predicted less accurately; compare with the method
    without this part. A single input has no variance: it is normalized with the running statistics.

    Memory:    none.       Sends: nothing.       Receives: nothing.
    Cost:      none while training. One more forward pass to predict, with all inputs as one batch.
    Raises:    UsageError: if the model has no batch normalization.

    Example:
        >>> adapted_statistics()
        adapted_statistics()

    Reference: Li et al., AdaBN, Pattern Recognition 2018.
    Differs:   code that uses PyTorch's cumulative average gives batches equal weights, so its result depends on the
        batches, and stores the unbiased variance; here all inputs form one batch, and the variance is the one with
        which a layer normalizes a batch. Some public code adapts only two-dimensional layers; here all batch
        normalization layers are adapted.
    """

    def memory(setup: Setup) -> Tree:
        batch_norm(setup.structure)  # or it raises
        return EMPTY

    def deploy(local: Local, weights: Tree) -> Tree:
        assert local.inputs is not None
        if rows_in(local.inputs) < 2:
            return weights
        return overlay(weights, local.statistics(weights, local.inputs))

    return Part(memory=memory, deploy=deploy, transductive=True)
