"""What the coordinator has: this file and network.py.

idiolect submit coordinator.py --server 127.0.0.1:8000
"""

from network import make_network

import idiolect
import idiolect.flower

app = idiolect.flower.server_app(
    model=make_network,
    method=idiolect.methods.fedbn(),
    training=idiolect.Training(lr=0.1),
    rounds=4,
    sites=3,
)
