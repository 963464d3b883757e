"""Models that are common today: every engine gives the same numbers, and a saved personal model predicts elsewhere.

``python -m pytest -m slow tests/test_real_models.py`` runs all models, methods and engines.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_worlds import CASES, frozen_normalization, prediction
from safetensors.torch import load_file, save_model

from idiolect import Machine, Training, fit, methods, scope

ENGINES = ("sequential", "threads", "processes", "stacked")
METHODS = {
    "FedAvg": methods.fedavg(),
    "FedBN": methods.fedbn(names=scope.normalization),
    "FedRep": methods.fedrep(),
    "FedFSA": methods.fedfsa(rho=0.05, rho_larger=0.2),
    "Ditto": methods.ditto(),
}
ELSEWHERE = """
import sys
sys.path.insert(0, sys.argv[1])
from model_worlds import CASES, prediction
from safetensors.torch import load_model, save_file
net = CASES[sys.argv[2]].model().double()
load_model(net, sys.argv[3])
save_file({"outputs": prediction(net.eval(), CASES[sys.argv[2]]).contiguous()}, sys.argv[4])
"""


def trained(name, method, engine):
    torch.manual_seed(0)
    case = CASES[name]
    training, machine = Training(lr=0.05, batch_size=4, local_epochs=1), Machine(engine=engine)
    settings = {"rounds": 2, "loss": case.loss, "metrics": case.metrics, "training": training, "machine": machine}
    return fit(case.model().double(), case.clients(), METHODS[method], **settings)


def personal(run):
    return torch.cat([run.federation.personal(client).flat for client in sorted(run.federation.clients)])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_every_engine_and_another_process(name, method, tmp_path):
    if method == "FedBN" and frozen_normalization(CASES[name]):
        pytest.skip("it has no normalization layer that is trained")
    run = trained(name, method, "sequential")
    for engine in ENGINES[1:]:
        assert torch.allclose(personal(trained(name, method, engine)), personal(run), 1e-8, 1e-10), engine
    net = run.personal("north")
    save_model(net, str(tmp_path / "net.safetensors"))
    files = [str(tmp_path / "net.safetensors"), str(tmp_path / "outputs.safetensors")]
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", ELSEWHERE, here, name, *files], check=True, cwd=Path(__file__).parents[1])
    assert torch.allclose(load_file(files[1])["outputs"], prediction(net, CASES[name]), 1e-12, 1e-13)
