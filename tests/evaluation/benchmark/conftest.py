"""A recorder that writes nothing."""

import pytest

from turboquant_hf.evaluation.benchmark.rows import Recorder


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()
