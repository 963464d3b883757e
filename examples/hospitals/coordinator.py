"""The coordinator's file: the run, here with FedBN. It needs network.py in the same folder.

idiolect submit coordinator.py server
"""

from network import make_network

import idiolect
import idiolect.flower

method = idiolect.methods.fedbn()
training = idiolect.Training(lr=0.1)

app = idiolect.flower.server_app(
    model=make_network, method=method, training=training, rounds=4, sites=3, quorum=3, deadline=600
)
