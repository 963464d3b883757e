"""The file of a site, which needs network.py in the same folder. Both stay at the site.

idiolect join hospital.py --as north --server 127.0.0.1:8000
"""

from network import make_network

import idiolect
import idiolect.flower


def load_my_data(client: str) -> idiolect.ClientData:
    """Return this hospital's images. A real site reads its own files here; these three have parts of one data set."""
    pool = idiolect.load("digits")
    split, shift = idiolect.data.Dirichlet(0.5), idiolect.data.Rotation(45) + idiolect.data.Contrast(0.5)
    parts = idiolect.federate(pool, split, clients=3, test=0.25, shift=shift, seed=0)
    return dict(zip(("north", "south", "west"), parts.values(), strict=True))[client]


app = idiolect.flower.client_app(model=make_network, data=load_my_data)
