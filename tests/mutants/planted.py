"""What a planted bug is."""

from dataclasses import dataclass

METHODS, ORACLES, LAWS = "tests/test_methods.py", "tests/test_oracles.py", "tests/test_laws.py"
ENGINE, DATA, KERNELS = (
    "tests/test_engine.py",
    "tests/test_data_clients.py",
    " ".join(f"tests/test_kernels{part}.py" for part in ("", "_steps", "_refused")),
)
ROUNDS, FAULTS, CRASHES, WIRE, STATE, REFUSALS = (
    f"tests/test_flower_{part}.py" for part in ("rounds", "faults", "crashes", "wire", "state", "refusals")
)


@dataclass(frozen=True)
class Mutant:
    """One planted bug: a line of the package, what it becomes, and the tests that must notice."""

    name: str
    file: str
    before: str
    after: str
    tests: str
    only: str = ""
