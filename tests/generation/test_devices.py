"""Layers on several devices and KV heads in several processes give the tokens of one device and process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

from tests.conftest import make_llama
from tests.support.generating import generate, inputs_of, turboquant
from tests.support.tensor_parallel import NEW, PROMPT, TILES
from turboquant_hf import TurboQuantCache

ROOT = Path(__file__).parents[2]


def tokens_of(model, preset=None, device="cpu", attention="auto") -> list[list[int]]:
    options = {} if preset is None else turboquant(preset, attention=attention, **TILES)
    return generate(model, inputs_of(length=PROMPT, padding=19, device=device), new=NEW, **options).tolist()


@pytest.mark.parametrize(
    ("where", "preset"), [("mixed", "lossless"), ("mixed", "k4v4"), ("cpu", "k4v4"), ("disk", "lossless")]
)
def test_weights_that_hooks_move_between_devices(tmp_path, where, preset):
    """accelerate's hooks move weights and inputs between devices around every module; layers keep their own cache."""
    expected = tokens_of(make_llama(num_hidden_layers=4), preset)
    model = make_llama(num_hidden_layers=4)
    if where == "mixed":
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
        places |= {f"model.layers.{index}": "disk" if index % 2 else "cpu" for index in range(4)}
        model = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
        assert model.model.layers[1].self_attn.q_proj.weight.device.type == "meta"
    elif where == "cpu":
        model = cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        model = disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert tokens_of(model, preset) == expected
    assert preset != "lossless" or tokens_of(model) == expected


def test_layers_of_one_cache_may_lie_on_different_devices():
    """Each layer takes the device of its first keys, and an error names both devices if others come."""
    cache = TurboQuantCache(make_llama().config, "lossless")
    real, meta = torch.randn(1, 2, 9, 8), torch.empty(1, 2, 9, 8, device="meta")
    assert cache.update(real, real, 0)[0].device.type == "cpu"
    assert cache.update(meta, meta, 1)[0].device.type == "meta"
    assert [layer.device.type for layer in cache.layers] == ["cpu", "meta"]
    with pytest.raises(ValueError, match="on meta does not continue this layer's .* on cpu"):
        cache.update(meta, meta, 0)
    assert cache.tokens == 9


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def tensor_parallel(folder: Path, output: Path, processes: int = 2) -> list[dict]:
    """The results of the processes of `tensor_parallel.py`."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += [f"--master-port={free_port()}", str(Path(__file__).parents[1] / "support" / "tensor_parallel.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [*command, str(folder), str(output)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads((output / f"{rank}.json").read_text()) for rank in range(processes)]


def check_tensor_parallel(tmp_path, device="cpu"):
    model = make_llama(head_dim=16, vocab_size=200)  # transformers 5.17 shares `lm_head` out in equal parts
    model.save_pretrained(tmp_path / "model")
    found = tensor_parallel(tmp_path / "model", tmp_path)
    model.to(device)
    expected = {"dynamic": tokens_of(model, device=device)}
    for name in ("lossless", "k4v4"):
        for attention in ("keep", "auto"):
            expected[f"{name}-{attention}"] = tokens_of(model, name, device, attention)
    for rank, own in enumerate(found):
        assert own["heads"] == 1 and own["tiles"] >= 2 and own["attention"] == "turboquant"
        for name, tokens in expected.items():
            assert own[name] == tokens, f"process {rank}, {name}"
    return found


@pytest.mark.slow
def test_tensor_parallel_processes(tmp_path):
    """Two gloo processes with one of two KV heads each: statistics, scales and rotations are per head."""
    check_tensor_parallel(tmp_path)


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.gpu
@two_gpus
def test_tensor_parallel_on_two_gpus(tmp_path):
    found = check_tensor_parallel(tmp_path, "cuda:0")
    assert [own["device"] for own in found] == ["cuda:0", "cuda:1"]


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("offloading", [False, True], ids=["resident", "offloaded"])
@pytest.mark.parametrize("preset", ["lossless", "k4v4"])
@torch.no_grad()
def test_layers_on_two_gpus(tmp_path, preset, offloading):
    """Logits of a split model against the same model on one GPU, and where each layer's cache is."""
    sizes = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 8, "head_dim": 64}
    sizes["max_position_embeddings"] = 4096
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{index}": index // 2 for index in range(4)}
    ids = torch.randint(3, 199, (2, 1500), generator=torch.Generator().manual_seed(0)).to("cuda:0")
    logits = []
    for split in (False, True):
        model = make_llama(**sizes).half()
        model = dispatch_model(model, places) if split else model.to("cuda:0")
        model.set_attn_implementation("turboquant")
        cache = TurboQuantCache(model.config, preset, offloading=offloading and split)
        model(ids[:, :1300], past_key_values=cache)
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits[:, -1].to("cuda:0") for i in range(1300, 1500)]
        logits.append(torch.stack(steps))
        devices = [layer.device.index for layer in cache.layers]
        assert devices == ([0, 0, 1, 1] if split else [0] * 4)
    torch.testing.assert_close(*logits, rtol=1e-2, atol=1e-2)
    cache.save(tmp_path / "x")
    loaded = TurboQuantCache.load(tmp_path / "x", model.config)
    assert [layer.device.index for layer in loaded.layers] == [0, 0, 1, 1]
    for a, b in zip(cache.layers, loaded.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
