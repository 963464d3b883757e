"""Models that are common today, on sites: their personal models are those of the simulation, bit for bit."""

from dataclasses import dataclass
from functools import partial

import pytest

pytest.importorskip("flwr")

from flower_worlds import World, assert_same, tiny
from model_worlds import CASES, SIZES

from idiolect import Training, methods, scope
from idiolect.flower.coordinator.requests import TooFewSitesError
from idiolect.testing.worlds import adapted

NORMALIZATION = methods.fedbn(names=scope.normalization)
QUICK = {
    "BERT, from its configuration": NORMALIZATION,
    "BERT with LoRA (peft), its head trained": methods.fedsa_lora(),
    "ResNet-18, batch normalization": methods.fedbn(),
    "Cox survival": methods.fedfsa(rho=0.05, rho_larger=0.2),
    "image and table row": methods.ditto(),
}
LONG = {
    "causal transformer, tied embedding": NORMALIZATION,
    "LSTM on letters": methods.fedrep(),
    "ResNet-18, group normalization": NORMALIZATION,
    "U-Net, a class for each pixel": methods.fedbn(),
    "several labels": methods.fedfsa(rho=0.05, rho_larger=0.2),
    "regression": methods.ditto(),
}


@dataclass
class ModelWorld(World):
    """Sites with the model and examples of a case."""

    case: str = ""

    def __post_init__(self):
        super().__post_init__()
        self.clients = CASES[self.case].clients()

    def network(self):
        return CASES[self.case].model()


@pytest.mark.parametrize(
    ("name", "method"), [*QUICK.items(), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in LONG.items())]
)
def test_a_model_on_sites_is_that_of_the_simulation(tmp_path, name, method):
    if "BERT" in name:
        pytest.importorskip("transformers")
        pytest.importorskip("peft")
    settings = {"sizes": SIZES, "training": Training(lr=0.05, batch_size=4), "loss": CASES[name].loss}
    world = ModelWorld(tmp_path, method, rounds=2, **settings, case=name)
    assert_same(world, world.play(), world.simulated().federation)


def frozen(value, scaling=0.5):
    net = adapted(tiny())
    layer = next(m for m in net.modules() if hasattr(m, "scaling"))
    layer.scaling = {"default": scaling}
    next(p for p in layer.parameters() if not p.requires_grad).data.fill_(value)
    return net


@pytest.mark.parametrize("other", [{"value": 2.0}, {"value": 1.0, "scaling": 0.25}])
def test_another_base_model_at_a_site_is_refused(tmp_path, other):
    world = World(tmp_path, methods.fedsa_lora(), give_up=20, sizes={"ada": 4, "ben": 3})
    world.network = lambda: frozen(1.0)
    for client, net in {"ada": {"value": 1.0}, "ben": other}.items():
        world.models[client] = partial(frozen, **net)
        world.grid.stop(client)
        world.grid.start(client)
    with pytest.raises(TooFewSitesError, match="1 of 2 sites joined"):
        world.play()
    assert not world.events_of("ada")
    assert "frozen parameters, or the scaling of their adapters, are not equal" in world.events_of("ben")[0]
