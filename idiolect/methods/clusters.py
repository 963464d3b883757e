"""Methods for clients of several kinds, which nobody has told apart."""

from __future__ import annotations

from idiolect.core.card import carded
from idiolect.core.method import Method, Weighting
from idiolect.core.scope import Scope, everything
from idiolect.parts import clusters, share


@carded("IFCA", 2020, "concept shift", "Ghosh et al., NeurIPS 2020")
def ifca(
    count: int = 2, names: Scope = everything, noise: float = 0.1, seed: int = 0, weighting: Weighting = "samples"
) -> Method:
    """FedAvg in clusters: each client joins the one of several models with the least loss on its own data.

    Generalized accuracy is that of the mean over all clients, whatever their cluster: a model that serves nobody.

    Args:
        count: number of clusters.
        names: what each cluster has its own of; with `head`, clusters share one body.
        noise: how far apart they begin, relative to the initial weights.
        seed: of that noise; another one is another start, which decides who finds together.
        weighting: mean over the clients of a cluster by training examples, or uniform (the authors').
    """
    return Method((share(everything), clusters(count, names, noise, seed)), "IFCA", weighting)
