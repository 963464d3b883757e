"""Methods for clients that fall into clusters which are not known in advance."""

from __future__ import annotations

from idiolect.core.card import carded
from idiolect.core.method import Method, Weighting
from idiolect.core.scope import Scope, everything
from idiolect.parts import clusters, share


@carded("IFCA", 2020, "concept shift", "Ghosh et al., NeurIPS 2020")
def ifca(
    count: int = 2, names: Scope = everything, noise: float = 0.1, seed: int = 0, weighting: Weighting = "samples"
) -> Method:
    """FedAvg within clusters: each client joins the cluster whose model has the lowest loss on the client's data.

    Generalized accuracy is that of the mean over all clients, whatever their cluster; no client uses that model.

    Args:
        count: number of clusters.
        names: tensors of which each cluster has its own copy; with `head`, clusters share one body.
        noise: size of the difference between initial cluster models, relative to the initial weights.
        seed: seed of that noise; the initial models decide which clients join the same cluster.
        weighting: mean over the clients of a cluster by training examples, or uniform (the authors').
    """
    return Method((share(everything), clusters(count, names, noise, seed)), "IFCA", weighting)
