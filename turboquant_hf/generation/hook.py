"""Puts `DecodeSteps` in front of a model's forward while `generate` decodes over one of our caches."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

from turboquant_hf.cache import ATTENTION_NAME, PackedCache, TurboQuantStaticCache
from turboquant_hf.cache.messages import tell_eager_steps
from turboquant_hf.cache.wrapping import wrap_once
from turboquant_hf.generation.ahead import excess_steps, register_ahead
from turboquant_hf.generation.recorders import RECORDERS
from turboquant_hf.generation.steps import DecodeSteps
from turboquant_hf.kernels.dispatch import backend
from turboquant_hf.names import cache_argument

LOOPS = ("_sample", "_beam_search", "_assisted_decoding")
"""The decoding loops of `GenerationMixin`, which call the model."""


def register_steps() -> None:
    """Wrap the decoding loops. A call without one of our caches passes through. Idempotent."""
    for name in LOOPS:
        wrap_once(name, _wrap)
    register_ahead()


def _wrap(original: Callable) -> Callable:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        config, model_kwargs = bound.arguments["generation_config"], bound.arguments.get("model_kwargs", {})
        cache = model_kwargs.get(cache_argument(model_kwargs))
        if not isinstance(cache, PackedCache) or not cache.graph:
            return original(self, *args, **kwargs)
        if self.device.type not in RECORDERS or config.compile_config is not None:
            return original(self, *args, **kwargs)
        reason = why_not(self, cache, config)
        if reason is not None:
            if reason:
                tell_eager_steps(self, reason)
            return original(self, *args, **kwargs)
        expected = (config.max_length or 0) - bound.arguments["input_ids"].shape[1]
        steps = DecodeSteps(self, cache, max(expected, 0))
        if RECORDERS[self.device.type].asynchronous:
            cache.excess_steps = excess_steps(bound.arguments, cache)
        return _with_forward(self, steps, config, lambda: original(self, *args, **kwargs))

    return loop


_LOCK = threading.Lock()
_LOCAL = threading.local()
"""`steps` of this thread: {id of a model: the `DecodeSteps` of its loop}."""


def _with_forward(model: Any, steps: DecodeSteps, config: Any, run: Callable[[], Any]) -> Any:
    """Run a loop with `steps` as the model's forward, for this thread."""
    running = vars(_LOCAL).setdefault("steps", {})
    outer = running.get(id(model))
    compiles, config.disable_compile = config.disable_compile, True
    running[id(model)] = steps
    _lend(model)
    try:
        return run()
    finally:
        steps.cache.excess_steps = None
        _give_back(model)
        config.disable_compile = compiles
        if outer is None:
            del running[id(model)]
        else:
            running[id(model)] = outer
        steps.close()


def _lend(model: Any) -> None:
    """Let `model.forward` call the steps of the calling thread. Loops are counted: threads may share a model."""
    with _LOCK:
        if "_turboquant_loops" not in vars(model):
            original = model.forward

            @functools.wraps(original)  # generate reads the signature
            def forward(*args: Any, **kwargs: Any) -> Any:
                steps = vars(_LOCAL).get("steps", {}).get(id(model))
                return (original if steps is None else steps)(*args, **kwargs)

            model.forward, model._turboquant_loops = forward, 0
        model._turboquant_loops += 1


def _give_back(model: Any) -> None:
    with _LOCK:
        model._turboquant_loops -= 1
        if not model._turboquant_loops:
            del model.forward, model._turboquant_loops


def why_not(model: Any, cache: Any, config: Any) -> str | None:
    """Why the steps of this call are not recorded: None if they are, "" for a reason that is not logged."""
    if not cache.packed_layers or getattr(model, "_compiled_call_impl", None) is not None:
        return ""
    if "forward" in vars(model) and "_turboquant_loops" not in vars(model):
        return "its forward has been replaced"
    if model.config.is_encoder_decoder:
        return "encoder-decoder models are not served"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "the model lies on several devices"
    if model.config.get_text_config(decoder=True)._attn_implementation != ATTENTION_NAME:
        return f'its attention is not "{ATTENTION_NAME}"'
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, False):
            return f"{name} was asked for"
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "its modules have forward hooks, which a recorded step would not call"
    if model.device.type == "cuda" and backend(model.device) == "torch":
        return "there are no Triton kernels here"
    if isinstance(cache, TurboQuantStaticCache) and any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        return "its preallocated sliding-window layers ask the host for their position"
    return None
