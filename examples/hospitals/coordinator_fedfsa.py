"""The same run with FedFSA, here with personal normalization layers as in FedBN: a method is composed of parts."""

from network import make_network

import idiolect
import idiolect.flower
from idiolect import Method, parts
from idiolect.core.scope import batch_norm

fedfsa = idiolect.methods.fedfsa(rho=0.05, rho_larger=0.1, alpha=0.5)
method = Method((parts.share(~batch_norm), *fedfsa.parts[1:]), "FedFSA, normalization kept")
training = idiolect.Training(lr=0.1)

app = idiolect.flower.server_app(
    model=make_network, method=method, training=training, rounds=4, sites=3, quorum=3, deadline=600
)
