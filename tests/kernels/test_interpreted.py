"""Runs the tests of Triton kernels in Triton's interpreter: file by file, each in a process of its own (`conftest`).

`pytest -rP tests/kernels/test_interpreted.py` shows every interpreted test by name.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import INTERPRETED

FOLDER = Path(__file__).parent
USES_DEVICE = re.compile(r"^def test_\w+\([^)]*\bdevice\b", re.MULTILINE)
FILES = [path.name for path in sorted(FOLDER.glob("test_*.py")) if USES_DEVICE.search(path.read_text())]
"""The files with tests that run on `device`."""


def test_the_files_of_kernels_are_found():
    assert {"test_counts.py", "test_decode_attention.py", "test_encode_tiles.py", "test_statistics.py"} < set(FILES)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.parametrize("name", FILES)
def test_kernels_in_the_interpreter(name):
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", "-k", "not cuda", FOLDER / name],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=FOLDER.parent.parent,
        capture_output=True,
        text=True,
    )
    print(re.sub(r"^.* SKIPPED .*\n", "", run.stdout, flags=re.MULTILINE))
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " PASSED" in run.stdout, run.stdout
