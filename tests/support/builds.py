"""Lists what Triton would build in conversations of many lengths: `python -m tests.support.builds`, on a CPU.

Conversations run on CPU tensors. A launch computes the key of its build, as Triton does, and then stops. The first
conversations of a shape may build. The key of every later launch must be among theirs. Prints JSON:
{"launches": how many, "kernels": {name: builds of the first conversations}, "later": [what was built later, and why]}.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

PROMPTS = (*range(1, 40, 3), 97, 128, 129, 255, 256, 300, 511, 640, 641, 777, 895, 1024, 1153, 1280, 1535, 1793, 2000)
TURNS = (1, 2, 15, 17, 64, 129, 512)
SHAPES = (  # preset, head dim, dtype, settings
    ("k4v4", 128, torch.bfloat16, {}),
    ("k2v2", 64, torch.float16, {}),
    ("k3v2", 128, torch.bfloat16, {"recent_window": 0}),
    ("k4v4", 120, torch.bfloat16, {"tile": 64}),
    ("paper-mse-3", 64, torch.float32, {"tile": 8}),
)
HEADS, GROUP = 2, 2


class Builds:
    """The keys of all builds so far, each with its purpose."""

    def __init__(self) -> None:
        self.known: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
        self.later: list[str] = []
        self.launches, self.conversation, self.first = 0, "", True

    def note(self, kernel: JITFunction, key: str, *rest: Any) -> None:
        """Note a build instead of compiling. Returns nothing, so that the launch is left out."""
        self.launches += 1
        known = self.known[kernel.__name__]
        if key not in known:
            signature, _, constants, _, attributes, _ = rest
            names = list(signature)
            facts = {name: str(kind) for name, kind in signature.items()}
            for path, value in constants.items():
                facts[names[path[0]]] += f" = {value}"
            for path, value in attributes.items():
                facts[names[path[0]]] += f" {value}"
            if not self.first:
                self.later.append(f"{kernel.__name__} in {self.conversation}: {self._differences(known, facts)}")
            known[key] = facts

    @staticmethod
    def _differences(known: dict[str, dict[str, str]], facts: dict[str, str]) -> str:
        """The differences of a build from the most similar build."""

        def differs(other: dict[str, str]) -> list[str]:
            return [f"{name} {other[name]} -> {fact}" for name, fact in facts.items() if other[name] != fact]

        return "; ".join(min(map(differs, known.values()), key=len, default=["new"]))


BUILDS = Builds()
JITFunction._do_compile = lambda kernel, *build: BUILDS.note(kernel, *build)  # before the kernels wrap it

from tests.support.compiling import CompilerOnly  # noqa: E402
from turboquant_hf.cache import TurboQuantLayer  # noqa: E402
from turboquant_hf.config import load_preset  # noqa: E402
from turboquant_hf.kernels import dispatch  # noqa: E402
from turboquant_hf.kernels.decode import History, RawTokens, Scoring  # noqa: E402


class Conversation:
    """A prompt, steps, a further turn and more steps over one layer, as in a real cache."""

    def __init__(self, shape: tuple, batch: int, prompt: int, turn: int, padded: bool) -> None:
        name, self.dim, self.dtype, settings = shape
        self.preset = load_preset(name, **{"min_statistics": 128, **settings})
        self.batch, self.prompt, self.turn, self.padded = batch, prompt, turn, padded
        padding = "padded " if padded else ""
        BUILDS.conversation = f"{name} d{self.dim}, {padding}{batch} x {prompt} tokens, then {turn}"
        self.growing()

    def projected(self, tokens: int, heads: int = HEADS) -> torch.Tensor:
        """[B, heads, tokens, D] with the strides that a model's projection gives."""
        return torch.zeros(self.batch, tokens, heads, self.dim, dtype=self.dtype).transpose(1, 2)

    def growing(self) -> None:
        layer = TurboQuantLayer(self.preset, *self.preset.layer_quantizers(0, 1), returns_handles=lambda: True)
        layer.noted_starts = [3 * self.padded] * self.batch
        for tokens in (self.prompt, self.turn):
            self._chunk(layer, tokens)
            for count in (1, 5, 16):
                self._step(layer, count)
        layer.fix(16, 4, {})
        for count in (1, 5, 16):
            layer.fixed.append(self.projected(count), self.projected(count))
            layer.fixed.observe(self.projected(count, HEADS * GROUP))
            mask = torch.ones(self.batch, layer.fixed.room, dtype=torch.bool) if self.padded else None
            layer.fixed.attend(self.projected(count, HEADS * GROUP), scaling=0.1, mask=mask)
        layer.fixed.dense("keys"), layer.fixed.dense("values")

    def _chunk(self, layer: TurboQuantLayer, tokens: int) -> None:
        layer.update(self.projected(tokens), self.projected(tokens))
        layer.observe(self.projected(tokens, HEADS * GROUP))
        layer.commit()
        if layer.tiles[0].count:
            for side in ("keys", "values"):
                layer.dense(side), layer.decode(side, layer.tiles[0].count // 2, layer.tiles[0].count)

    def _step(self, layer: TurboQuantLayer, count: int) -> None:
        layer.update(self.projected(count), self.projected(count))
        query = self.projected(count, HEADS * GROUP)
        layer.observe(query)
        if layer.tiles[0].count and count <= layer.tail.count:
            raw = RawTokens(*layer.sinks.arrays), RawTokens(*layer.tail.view())
            mask = torch.ones(self.batch, layer.get_seq_length(), dtype=torch.bool) if self.padded else None
            history = History(*layer.packed_sides(), *raw, layer.sinks.starts)
            dispatch.decode_attention(query, history, Scoring(0.1), mask=mask)
        layer.commit()


def main() -> None:
    driver.set_active(CompilerOnly(90))
    dispatch.backend = lambda device=None: "triton"
    # An array that no kernel writes may be used as an index.
    torch.empty, torch.empty_like, torch.Tensor.new_empty = torch.zeros, torch.zeros_like, torch.Tensor.new_zeros
    for shape in SHAPES:
        BUILDS.first = True
        for padded in (False, True):
            Conversation(shape, 1, 1500, 300, padded)
        Conversation(shape, 1, 1, 1, padded=False)  # the first tile comes in steps
        BUILDS.first = False
        for index, prompt in enumerate(PROMPTS):
            turn = TURNS[index % len(TURNS)]
            Conversation(shape, 1 + index % 3, prompt, turn, padded=prompt > 3 and index % 2 == 1)
    kernels = {name: len(known) for name, known in sorted(BUILDS.known.items())}
    print(json.dumps({"launches": BUILDS.launches, "kernels": kernels, "later": BUILDS.later}))


if __name__ == "__main__":
    main()
