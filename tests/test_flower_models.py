"""Models that are common today, on sites: their personal models are those of the simulation, bit for bit."""

from dataclasses import dataclass

import pytest

pytest.importorskip("flwr")

from flower_worlds import World, assert_same
from model_worlds import CASES, SIZES

from idiolect import Training, methods, scope

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
