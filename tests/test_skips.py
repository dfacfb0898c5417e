"""With all data at hand a test that skips fails, unless it is hardware that it needs (conftest.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SKIPS = """
import pytest

def test_called(): pytest.skip("not today")

@pytest.mark.skip(reason="marked")
def test_marked(): pass

@pytest.mark.skipif(True, reason="marked with a condition")
def test_marked_with_a_condition(): pass

@pytest.mark.xfail
def test_expected_to_fail(): assert False

def test_of_a_gpu(): pytest.skip("needs hardware: a GPU")

@pytest.mark.skipif(True, reason="needs hardware: two GPUs")
def test_of_two(): pass

def test_that_passes(): pass
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "outcome"),
    [("/data", {"2 failed", "1 passed", "2 skipped", "4 errors"}), ("", {"1 passed", "7 skipped", "1 xfailed"})],
    ids=["with data", "without"],
)
def test_what_becomes_of_skips(tmp_path, data, outcome):
    (tmp_path / "pytest.ini").touch()
    (tmp_path / "test_skips.py").write_text(SKIPS)
    (tmp_path / "test_absent.py").write_text('import pytest\npytest.importorskip("a_package_that_is_not_there")\n')
    whole = "import pytest\npytest.skip('a whole module', allow_module_level=True)\n"
    (tmp_path / "test_whole.py").write_text(whole)
    environment = os.environ | {"PUNA_TEST_DATA": data, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "--continue-on-collection-errors"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    closing = done.stdout.splitlines()[-1].strip("= ").split(" in ")[0]
    assert set(closing.split(", ")) == outcome, done.stdout
    assert done.returncode == (1 if data else 0)
