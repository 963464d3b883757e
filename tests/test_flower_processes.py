"""One run over real processes, with TLS and keys: what the sites end with is what the simulator says, bit for bit."""

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
    for name in ("demo", "coordinator", "coordinator_fedfsa", "hospital", "network", "tap"):
        sys.modules.pop(name, None)


def test_three_sites_end_with_the_models_of_the_simulator(demo, tmp_path):
    hospitals = demo.Hospitals(tmp_path, "coordinator.py")
    hub = tmp_path / "hub" / "coordinator.py"
    hub.write_text(hub.read_text().replace("rounds=4", "rounds=2"))
    stranger = tmp_path / "east"
    demo.call("keys", stranger, "--site", "east")
    (stranger / "ca.crt").write_bytes((tmp_path / "north" / "ca.crt").read_bytes())
    try:
        hospitals.start_server()
        hospitals.start_site("east")  # its key is not in the server's folder
        demo.wait(lambda: "not let in" in hospitals.told("east"), "the stranger to be turned away")
        hospitals.kill("east")
        hospitals.play(disturbed=False, say=print)
    finally:
        for name in ("submit", "north", "east"):
            print(hospitals.told(name))
    assert "has no east.pub" in hospitals.told("east")
    assert "'east'" not in hospitals.told("submit")
    assert hospitals.status()["round"] == 2
    expected = demo.simulated("coordinator.py", rounds=2)
    for name in demo.SITES:
        own = hospitals.personal(name)
        assert demo.alike(own, expected[name])
        sent = set(demo.sent(hospitals.tap, own))
        assert sent == {n for n in own if n.split(".")[0] not in ("1", "5")}  # all but normalization
