"""`import turboquant_hf` loads little, and the names exist when they are needed, in any order of imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIGHT = {"turboquant_hf", "turboquant_hf.import_hook", "turboquant_hf.names", "turboquant_hf.version"}
ATTENTION = """
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
assert "turboquant" in ALL_ATTENTION_FUNCTIONS and "turboquant" in ALL_MASK_ATTENTION_FUNCTIONS
"""
GENERATE = """
from transformers.generation.utils import GenerationMixin
assert hasattr(GenerationMixin._prepare_cache_for_generation, "_turboquant_original")
from transformers import GenerationConfig
for name in ("turboquant", "turboquant_static"):
    GenerationConfig(cache_implementation=name).validate()
"""


def loaded_after(code: str) -> set[str]:
    """Names of the modules that a new Python process has loaded after `code`."""
    code += "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_the_import_loads_nothing_beside_torch_and_transformers():
    plain = loaded_after("import torch, transformers")
    added = loaded_after("import torch, transformers, turboquant_hf") - plain
    assert {name for name in added if name.partition(".")[0] not in sys.stdlib_module_names} == LIGHT
    assert not loaded_after("import turboquant_hf") & {"torch", "transformers", "numpy", "yaml"}


@pytest.mark.slow
def test_a_generation_config_takes_the_names_without_loading_models():
    code = (
        "import turboquant_hf; from transformers import GenerationConfig; GenerationConfig(cache_implementation={!r})"
    )
    for name in ("turboquant", "turboquant_static"):
        assert "transformers.modeling_utils" not in loaded_after(code.format(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "import turboquant_hf; from transformers import LlamaForCausalLM",
        "from transformers import LlamaForCausalLM; import turboquant_hf",
        "import turboquant_hf; import transformers.generation.continuous_batching",
        "import turboquant_hf; import transformers.generation.utils",
        "from turboquant_hf.cache import TurboQuantCache",
        "from turboquant_hf.attention import register_attention",
        "from turboquant_hf import *; TurboQuantCache, load_preset",
        "import turboquant_hf; turboquant_hf.cache.TurboQuantCache, turboquant_hf.config.CachePreset",
    ],
)
def test_the_names_are_registered_whatever_is_imported_first(first):
    loaded_after(f"{first}\n{GENERATE}{ATTENTION}")


def test_an_unknown_name_is_an_attribute_error():
    import turboquant_hf

    with pytest.raises(AttributeError, match="'turboquant_hf' has no attribute 'TurboCache'"):
        turboquant_hf.TurboCache  # noqa: B018
    assert set(turboquant_hf.__all__) <= set(dir(turboquant_hf))
