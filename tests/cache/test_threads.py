"""What all caches of a process share, asked for by many threads at once, and what of it is kept."""

from __future__ import annotations

import ast
import copy
import gc
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Barrier

import pytest
import torch

import turboquant_hf
from turboquant_hf import TurboQuantStaticCache
from turboquant_hf.cache.cache import never_packed
from turboquant_hf.cache.static_layer import TurboQuantStaticLayer
from turboquant_hf.cache.static_plan import PLANS, StaticPlan, plan_name
from turboquant_hf.config import load_preset

THREADS = 8
PRESET = load_preset("k4v4", tile=8, recent_window=8, min_statistics=24)


def make_plan(max_len, kind=StaticPlan):
    return kind(
        quantizers=PRESET.layer_quantizers(0, 1), head_dims=(16, 16), batch=1, heads=2, max_len=max_len,
        dtype=torch.float32, device=torch.device("cpu"), tile=8, sinks=4, recent_window=8, min_statistics=24,
    )  # fmt: skip


def make_layer(max_len, tokens=20):
    layer = TurboQuantStaticLayer(PRESET, *PRESET.layer_quantizers(0, 1), max_len, never_packed)
    layer.update(*torch.randn(2, 1, 2, tokens, 16))
    return layer


def in_threads(function, arguments):
    """function(argument) for THREADS arguments, begun together."""
    barrier = Barrier(THREADS)

    def call(argument):
        barrier.wait()
        return function(argument)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(call, arguments, timeout=300))


@dataclass(frozen=True, eq=False)
class SlowPlan(StaticPlan):
    """Lets other threads go on wherever a registry looks at it."""

    def __hash__(self):
        time.sleep(1e-4)
        return super().__hash__()

    def __repr__(self):
        time.sleep(1e-4)
        return super().__repr__()


@pytest.mark.parametrize("kind", [StaticPlan, SlowPlan])
def test_fresh_plans_of_many_threads_get_names_of_their_own(kind):
    def register(thread):
        plans = [make_plan(1000 * thread + n, kind) for n in range(1, 40)]
        return [(plan_name(plan), plan) for plan in plans]

    pairs = [pair for made in in_threads(register, range(THREADS)) for pair in made]
    assert len({name for name, _ in pairs}) == len(pairs)
    assert all(PLANS[name] is plan for name, plan in pairs)


def test_one_plan_in_many_threads_has_one_name():
    for max_len in range(500, 520):
        plans = in_threads(lambda _, n=max_len: make_plan(n, SlowPlan), range(THREADS))
        names = in_threads(plan_name, plans)
        assert len(set(names)) == 1 and PLANS[names[0]] == plans[0]


def test_a_name_lives_as_long_as_anybody_who_may_use_it():
    first, second = make_layer(6001), make_layer(6001)
    name = first.plan_name
    assert second.plan_name == name
    copied, unpickled = copy.deepcopy(first), pickle.loads(pickle.dumps(second))
    del first, second
    gc.collect()
    for layer in (copied, unpickled):
        assert layer.plan_name == name
        layer.update(*torch.randn(2, 1, 2, 1, 16))
        assert int(layer.get_seq_length()) == 21
    del copied, layer
    gc.collect()
    unpickled.update(*torch.randn(2, 1, 2, 1, 16))
    del unpickled
    gc.collect()
    assert name not in PLANS


def test_the_next_cache_of_a_size_gets_the_name_that_graphs_were_compiled_for():
    name = make_layer(6002).plan_name
    gc.collect()
    assert name not in PLANS
    assert make_layer(6002).plan_name == name
    assert make_layer(6003).plan_name != name


def test_names_and_plans_are_dropped_with_their_caches(llama):
    gc.collect()
    before = len(PLANS)
    for length in range(7000, 7020):
        cache = TurboQuantStaticCache(llama.config, length, PRESET)
        cache.early_initialization(batch_size=1, num_heads=2, head_dim=8, dtype=torch.float32, device="cpu")
    assert len(PLANS) > before
    del cache
    gc.collect()
    assert len(PLANS) == before


def test_plans_that_read_alike_are_told_apart(monkeypatch):
    monkeypatch.setattr(StaticPlan, "__repr__", lambda self: "plan")
    plans = [make_plan(8000 + n) for n in range(3)]
    names = [plan_name(plan) for plan in plans]
    assert [PLANS[name] for name in names] == plans and len(set(names)) == 3
    assert [plan_name(replace(plan)) for plan in plans] == names


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
def test_what_a_module_remembers_is_locked_and_bounded(path):
    """A registry needs a lock beside it; a memo a size, and `once` where it keeps tensors."""
    tree = ast.parse(path.read_text())
    assigned = [node.value for node in tree.body if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value]
    if any(is_empty_container(value) for value in assigned):
        assert any(name_of(value) in ("Lock", "RLock") for value in assigned), "a registry without a lock"
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for function in functions if path.parts[-2] != "evaluation" else []:
        for decorator in function.decorator_list:
            assert name_of(decorator) != "cache", f"{function.name}: a memo without a bound"
            if name_of(decorator) == "lru_cache":
                assert isinstance(decorator, ast.Call) and (decorator.args or decorator.keywords), function.name
                returns = "" if function.returns is None else ast.unparse(function.returns)
                assert not returns.startswith(("torch.Tensor", "Tensor", "tuple[torch.Tensor")), (
                    f"{function.name}: threads must share its tensors; see primitives/memo.py"
                )
