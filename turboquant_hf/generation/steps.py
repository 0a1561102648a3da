"""`DecodeSteps`: replaces a model's `forward` during one decoding loop, and replays decode steps as graphs.

- The first step of a shape runs as it is over the fixed cache. This loads kernels and makes cuBLAS handles, which
  cannot be done while a graph is recorded.
- The second step is recorded and replayed. All further steps are replayed.
- Between two steps, the host encodes the tiles that are due. If that moves an array, the next step is recorded again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from turboquant_hf.cache import PackedCache
from turboquant_hf.cache.fixed_cache import FixedCache
from turboquant_hf.cache.messages import tell_eager_steps
from turboquant_hf.cache.ring import STEP_TOKENS
from turboquant_hf.generation.recorders import RECORDERS
from turboquant_hf.names import CACHE_ARGUMENTS

RECENT_STEPS = 32
"""The number of newest steps in which recordings are counted."""
MOST_RECORDINGS = 4
"""The most recordings of one shape within `RECENT_STEPS`. If addresses change more often, recording costs too much."""
MOST_SHAPES = 20
"""The most shapes recorded within `RECENT_STEPS`. If there are more, most of them occur only once."""


class DecodeSteps:
    """A forward function that replays graphs if it can, and calls the model's own forward otherwise.

    Args:
        model: the model. The `forward` of its class is called, because `model.forward` may be the wrapper of
            `generation.hook`, which calls this object.
        cache: the cache of the loop. Calls with another cache are passed on.
        expected: tokens per sequence that the loop may still bring.
    """

    def __init__(self, model: Any, cache: PackedCache, expected: int) -> None:
        self.model, self.cache, self.expected = model, cache, expected
        self.forward = type(model).forward.__get__(model)
        self.fixed = FixedCache(cache)
        self.refused, cache.recorded = False, True
        self._graphs: dict[Any, _Recorded] = {}
        self._warm: set = set()
        self._unpadded: bool | None = None
        self._steps = 0
        self._recordings: list[tuple[int, Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tokens = 0 if args or self.refused else self._tokens(kwargs)
        if not 1 <= tokens <= STEP_TOKENS:
            return self.forward(*args, **kwargs)
        reason = self._why_not(kwargs)
        if reason is None:
            try:
                return self._step(tokens, kwargs)
            except _NotRecordable as error:
                reason = str(error)
        self.refuse(reason)
        return self.forward(**kwargs)

    def refuse(self, reason: str) -> None:
        """Run every further step as it is, and log the reason once."""
        self.close()
        self.refused = True
        tell_eager_steps(self.model, reason)

    def close(self) -> None:
        """Free the graphs, and release the cache."""
        self._graphs.clear()
        self.fixed.release()
        self.cache.graph_nbytes, self.cache.recorded = 0, False

    @property
    def device(self) -> torch.device:
        """The device of the cache's layers, which hold tokens."""
        return self.cache.packed_layers[0].device

    # ------------------------------------------------------------------ what a call is

    def _tokens(self, kwargs: dict) -> int:
        """New tokens per sequence of a call that continues this cache; 0 for any other call."""
        if not any(kwargs.get(name) is self.cache for name in CACHE_ARGUMENTS):
            return 0
        given = [kwargs.get(name) for name in ("input_ids", "inputs_embeds")]
        given = [x for x in given if isinstance(x, torch.Tensor) and x.dim() >= 2]
        return given[0].shape[1] if given and self.fixed.holds_tokens() else 0

    def _why_not(self, kwargs: dict) -> str | None:
        for name in ("output_attentions", "output_hidden_states", "labels"):
            if kwargs.get(name) is not None and kwargs[name] is not False:
                return f"{name} was asked for"
        return self.fixed.why_not()

    # ------------------------------------------------------------------ a step

    def _step(self, tokens: int, kwargs: dict) -> Any:
        self._steps += 1
        self.expected = max(self.expected - tokens, tokens)  # room for this step, even behind the announced end
        where = self.fixed.prepare(tokens, self.expected)
        inputs = _Inputs(kwargs, self.fixed.room, self._is_padded(kwargs))
        recorded = self._graphs.get(inputs.key)
        if recorded is None or recorded.where != where:
            if inputs.key not in self._warm:
                self._warm.add(inputs.key)
                return self._first(inputs, tokens)
            recorded = self._record(inputs, tokens, where)
        recorded.inputs.load(inputs)
        output = recorded.graph.replay()
        self.fixed.replayed(tokens)
        return _copied(output)

    def _call(self, inputs: _Inputs, tokens: int) -> Callable[[], Any]:
        def call() -> Any:
            with self.fixed.step(tokens, inputs.padding):
                return self.forward(**inputs.arguments())

        return call

    def _first(self, inputs: _Inputs, tokens: int) -> Any:
        """Run a step as it is, over the fixed cache. If it fails, restore the states from before the step."""
        kept = self.fixed.snapshot()
        try:
            with RECORDERS[self.device.type].guard():
                output = self._call(inputs.static(), tokens)()
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            for state, before in kept:
                state.copy_(before)
            raise _NotRecordable(_first_line(error)) from error
        self.fixed.replayed(tokens)
        return output

    def _record(self, inputs: _Inputs, tokens: int, where: tuple) -> _Recorded:
        self._recordings = [(step, key) for step, key in self._recordings if step > self._steps - RECENT_STEPS]
        keys = [key for _, key in self._recordings]
        if keys.count(inputs.key) >= MOST_RECORDINGS or len(set(keys)) >= MOST_SHAPES:
            raise _NotRecordable("the shapes or addresses of its steps keep changing")
        self._recordings.append((self._steps, inputs.key))
        stale = [key for key, recorded in self._graphs.items() if recorded.where != where]
        for key in stale:
            del self._graphs[key]
        pool = next((recorded.graph.pool for recorded in self._graphs.values()), None)
        inputs = inputs.static()
        try:
            graph = RECORDERS[self.device.type](self._call(inputs, tokens), self.device, pool)
        except Exception as error:  # any error of a model's own code means that the step runs as it is
            raise _NotRecordable(_first_line(error)) from error
        recorded = self._graphs[inputs.key] = _Recorded(graph, inputs, where)
        self.cache.graph_nbytes = sum(recorded.graph.nbytes for recorded in self._graphs.values())
        return recorded

    def _is_padded(self, kwargs: dict) -> bool:
        """Whether the loop's 2D mask hides anything. Looked up once, because later steps only add ones."""
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return False
        if self._unpadded is None:
            self._unpadded = bool(mask.all())
        return not self._unpadded


class _NotRecordable(Exception):
    """Why a step cannot be recorded."""


@dataclass
class _Recorded:
    """A graph, its inputs, and the addresses that it points to."""

    graph: Any
    inputs: _Inputs
    where: tuple


class _Inputs:
    """The arguments of a step. Tensors are copied into the graph's own tensors; all else must stay the same.

    A 2D attention mask grows with the context. It becomes `padding`, which is as long as the cache has room, or None if
    the mask hides nothing.

    Raises: _NotRecordable for an argument that cannot be compared.
    """

    def __init__(self, kwargs: dict, room: int, padded: bool) -> None:
        kwargs = dict(kwargs)
        self.mask = kwargs.pop("attention_mask", None)
        self.padding: torch.Tensor | None = None
        self._masked = isinstance(self.mask, torch.Tensor) and self.mask.dim() == 2
        if not self._masked:
            kwargs["attention_mask"] = self.mask
        self._room, self._padded = room, padded and self._masked
        self._leaves, self._spec = tree_flatten(kwargs)
        shapes = tuple((x.shape, x.dtype) if isinstance(x, torch.Tensor) else x for x in self._leaves)
        try:
            # The key includes the cache, which compares by identity.
            self.key = (shapes, str(self._spec), room, self._padded)
            hash(self.key)
        except TypeError as error:
            raise _NotRecordable(f"an argument of its steps cannot be compared ({error})") from error

    def static(self) -> _Inputs:
        """The same inputs in new tensors, which stay at their addresses."""
        new = object.__new__(_Inputs)
        vars(new).update(vars(self))
        new._leaves = [x.clone() if isinstance(x, torch.Tensor) else x for x in self._leaves]
        if self._padded:
            new.padding = torch.ones(len(self.mask), self._room, dtype=torch.bool, device=self.mask.device)
            new.load_mask(self.mask)
        return new

    def load(self, other: _Inputs) -> None:
        """Copy the values of another step's inputs."""
        for mine, new in zip(self._leaves, other._leaves, strict=True):
            if isinstance(mine, torch.Tensor):
                mine.copy_(new)
        if self._padded:
            self.load_mask(other.mask)

    def load_mask(self, mask: torch.Tensor) -> None:
        self.padding[:, : mask.shape[1]] = mask

    def arguments(self) -> dict:
        """The arguments of `forward`."""
        kwargs = tree_unflatten(self._leaves, self._spec)
        if self._masked:
            kwargs["attention_mask"] = self.padding
        return kwargs


def _copied(output: Any) -> Any:
    """A copy of a recorded output, because the next replay overwrites the graph's tensors."""
    if isinstance(output, torch.Tensor):
        return output.clone()
    if isinstance(output, dict):  # ModelOutput among them
        return type(output)(**{name: _copied(value) for name, value in output.items()})
    if type(output) in (tuple, list):
        return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, output)
    return output


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
