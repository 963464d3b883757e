"""One run with real processes, TLS and keys: the sites' models equal those of the simulation, bit for bit."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr")

EXAMPLE = Path(__file__).parents[1] / "examples" / "hospitals"


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    import demo

    yield demo
    for name in ("demo", "coordinator", "coordinator_fedfsa", "hospital", "network", "recorder"):
        sys.modules.pop(name, None)


def test_three_sites_end_with_the_models_of_the_simulation(demo, tmp_path):
    hospitals = demo.Hospitals(tmp_path, "coordinator.py")
    file = tmp_path / "app" / "coordinator.py"
    file.write_text(file.read_text().replace("rounds=4", "rounds=2"))
    unregistered = tmp_path / "east"
    demo.run_command("keys", unregistered, "--site", "east")
    (unregistered / "ca.crt").write_bytes((tmp_path / "north" / "ca.crt").read_bytes())
    try:
        hospitals.start_server()
        hospitals.start_site("east")  # its key is not in the server's folder
        demo.wait(lambda: "rejected" in hospitals.output("east"), "the unregistered site to be rejected")
        hospitals.kill("east")
        hospitals.play(disturbed=False, log=print)
    finally:
        for name in ("submit", "north", "east"):
            print(hospitals.output(name))
    assert "has no east.pub" in hospitals.output("east")
    assert "'east'" not in hospitals.output("submit")
    assert hospitals.status()["round"] == 2
    expected = demo.simulate("coordinator.py", rounds=2)
    for name in demo.SITES:
        personal = hospitals.personal_model(name)
        assert demo.are_equal(personal, expected[name])
        sent = set(demo.sent_tensors(hospitals.recorder, personal))
        assert sent == {n for n in personal if n.split(".")[0] not in ("1", "5")}  # all but normalization layers
