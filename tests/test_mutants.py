"""Planted bugs: every one must make the tests named for it fail (which pass without it, as the quick tests show)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import MUTANTS

ROOT = Path(__file__).parents[1]


def outcome(folder, mutant):
    """Run a mutant's tests on the package in a folder; return pytest's exit code and the end of its output."""
    select = ["-k", mutant.only] if mutant.only else []
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    command += ["-c", str(folder / "pyproject.toml"), *(str(folder / tests) for tests in mutant.tests.split()), *select]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout[-2000:]


def test_planted_lines_are_there():
    """Each line that is to be broken occurs exactly once: the list follows the code."""
    for mutant in MUTANTS:
        text = (ROOT / "idiolect" / mutant.file).read_text()
        assert text.count(mutant.before) == 1, (mutant.name, text.count(mutant.before))


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_planted_bug_is_caught(mutant, tmp_path):
    for name in ("idiolect", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    broken = tmp_path / "idiolect" / mutant.file
    broken.write_text(broken.read_text().replace(mutant.before, mutant.after))
    code, output = outcome(tmp_path, mutant)
    assert code == 1, f"survived: {output}"
