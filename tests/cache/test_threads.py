"""State that all caches of a process share, used by many threads at once, and the memory that it takes."""

from __future__ import annotations

import ast
import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

import turboquant_hf
from turboquant_hf.cache.base import never_packed
from turboquant_hf.cache.static_layer import TurboQuantStaticLayer
from turboquant_hf.cache.traced import _LAYERS, layer_of
from turboquant_hf.config import load_preset

THREADS = 8
PRESET = load_preset("k4v4", tile=8, recent_window=8, min_statistics=24)


def make_layer(max_len, tokens=20):
    layer = TurboQuantStaticLayer(PRESET, *PRESET.layer_quantizers(0, 1), max_len, never_packed)
    layer.update(*torch.randn(2, 1, 2, tokens, 16))
    return layer


def in_threads(function, arguments):
    """Call function(argument) in THREADS threads, which begin together."""
    barrier = Barrier(THREADS)

    def call(argument):
        barrier.wait()
        return function(argument)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(call, arguments, timeout=300))


def test_layers_made_in_many_threads_get_different_numbers():
    made = in_threads(lambda _: [make_layer(60, tokens=1) for _ in range(40)], range(THREADS))
    layers = [layer for some in made for layer in some]
    assert len({int(layer.number) for layer in layers}) == len(layers)
    assert all(layer_of(layer.number) is layer for layer in layers)


def test_a_number_is_valid_as_long_as_its_layer_lives():
    layer = make_layer(60)
    copied, unpickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    names = {int(x.number) for x in (layer, copied, unpickled)}
    assert len(names) == 3 and names <= set(_LAYERS)
    for each in (copied, unpickled):
        assert layer_of(each.number) is each
        each.update(*torch.randn(2, 1, 2, 1, 16))
        assert each.get_seq_length() == 21 and layer.get_seq_length() == 20
    del layer, copied, unpickled, each
    gc.collect()
    assert not names & set(_LAYERS)


@pytest.mark.parametrize("name", ["turboquant", "turboquant_static"])
def test_models_generate_in_threads_as_they_do_alone(small_llama, name):
    models = [small_llama(seed=seed, head_dim=(16, 32)[seed % 2]) for seed in range(THREADS)]
    ids = torch.randint(3, 199, (2, 40), generator=torch.Generator().manual_seed(0))
    config = {"preset": "k4v4", "tile": 16, "recent_window": 0, "min_statistics": 16}

    def answers(model):
        options = {"cache_implementation": name, "cache_config": config, "max_new_tokens": 6, "do_sample": False}
        return [model.generate(ids, attention_mask=torch.ones_like(ids), **options) for _ in range(2)]

    together = in_threads(answers, models)
    assert all(torch.equal(*pair) for pair in together)
    assert all(torch.equal(pair[0], answers(model)[0]) for pair, model in zip(together, models, strict=True))


ROOT = Path(turboquant_hf.__file__).parent
CONTAINERS = {"dict", "list", "set", "defaultdict", "OrderedDict", "Counter", "deque"}
CONTAINERS |= {"WeakValueDictionary", "WeakKeyDictionary", "WeakIdKeyDictionary", "WeakSet"}


def name_of(node):
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def is_empty_container(node):
    if isinstance(node, (ast.Dict, ast.List)):
        return not (node.keys if isinstance(node, ast.Dict) else node.elts)
    return isinstance(node, ast.Call) and name_of(node) in CONTAINERS and not node.args


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_memories_of_modules_are_locked_and_bounded(path):
    """A registry needs a lock beside it. A memo needs a size limit, and `once` if it keeps tensors."""
    tree = ast.parse(path.read_text())
    assigned = [node.value for node in tree.body if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value]
    if any(is_empty_container(value) for value in assigned):
        assert any(name_of(value) in ("Lock", "RLock") for value in assigned), "a registry without a lock"
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for function in functions if "evaluation" not in path.parts else []:
        for decorator in function.decorator_list:
            assert name_of(decorator) != "cache", f"{function.name}: a memo without a bound"
            if name_of(decorator) == "lru_cache":
                assert isinstance(decorator, ast.Call) and (decorator.args or decorator.keywords), function.name
                returns = "" if function.returns is None else ast.unparse(function.returns)
                assert not returns.startswith(("torch.Tensor", "Tensor", "tuple[torch.Tensor")), (
                    f"{function.name}: threads must share its tensors; see primitives/memo.py"
                )
