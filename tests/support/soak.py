"""Uses one cache at random for a long time: `python -m tests.support.soak STEPS PRESET ATTENTION [offload | graphs]`.

A tiny model takes decode steps, chat turns, rejected candidates, crops, beam reorders and resets with other batches. At
checkpoints, the next logits are compared with those of a fresh cache that reads the same tokens in one piece. At every
reset, the process's memory and its number of Python objects are noted. With `graphs`, steps of a few tokens are
recorded and replayed, on a GPU if there is one.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.conftest import make_llama
from tests.support.generating import TILES
from turboquant_hf import TurboQuantCache
from turboquant_hf.generation.recorders import RECORDERS, Repeat
from turboquant_hf.generation.steps import DecodeSteps

MAX_TOKENS = 400
CHECK_EVERY = 97
PAGE = 4096


@dataclass
class Report:
    """The results. errors: largest difference of logits at each checkpoint; memory: at each reset."""

    steps: int = 0
    operations: dict[str, int] = field(default_factory=dict)
    errors: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)
    bytes_per_token: float = 0.0
    seconds: float = 0.0
    recorded: int = 0
    refused: int = 0

    def growth(self, values: list[int]) -> int:
        """Growth from the mean of the second fifth to the mean of the last fifth. The first fifth is a warm-up."""
        part = len(values) // 5
        return round((sum(values[-part:]) - sum(values[part : 2 * part])) / part) if part else 0

    def summary(self) -> dict:
        return {
            "steps": self.steps,
            "operations": self.operations,
            "checkpoints": len(self.errors),
            "largest error": max(self.errors, default=0.0),
            "mean KL to a fresh cache": sum(self.divergences) / max(len(self.divergences), 1),
            "resets": len(self.resident),
            "memory growth, MB": self.growth(self.resident) / 2**20,
            "growth in Python objects": self.growth(self.objects),
            "bytes a token, at most": round(self.bytes_per_token),
            "recorded steps": self.recorded,
            "loops that refused to record": self.refused,
            "seconds": round(self.seconds, 1),
        }


class Soak:
    """One model, one cache, the tokens [B, T] that it holds, and where each sequence begins."""

    def __init__(self, preset: str, attention: str, offloading: bool, seed: int, graphs: bool = False) -> None:
        self.random = random.Random(seed)
        self.device = torch.device("cuda" if graphs and torch.cuda.is_available() else "cpu")
        self.model = make_llama(head_dim=16).to(self.device)
        self.model.set_attn_implementation(attention)
        self.preset, self.report = preset, Report()
        self.cache = TurboQuantCache(self.model.config, preset, offloading=offloading, **TILES)
        self.graphs, self.steps = graphs, None
        self.begin()

    def begin(self) -> None:
        batch, length = self.random.randint(1, 3), self.random.randint(1, 60)
        self.starts = [self.random.choice([0, 0, self.random.randrange(length)]) for _ in range(batch)]
        self.starts[self.random.randrange(batch)] = 0
        self.ids = torch.empty(batch, 0, dtype=torch.long, device=self.device)
        self.feed(length)
        if self.graphs:
            self.steps = DecodeSteps(self.model, self.cache, MAX_TOKENS)

    def mask(self, length: int) -> torch.Tensor:
        return (torch.arange(length) >= torch.tensor(self.starts)[:, None]).long().to(self.device)

    def run(self, ids: torch.Tensor, cache: TurboQuantCache) -> torch.Tensor:
        mask = self.mask(cache.tokens + ids.shape[1])
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if not cache.tokens:
            cache.note_padding(mask)
        forward = self.steps if self.steps is not None and cache is self.cache else self.model
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return forward(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]

    def feed(self, tokens: int) -> None:
        new = torch.tensor([[self.random.randrange(3, 199) for _ in range(tokens)] for _ in self.starts])
        new = new.to(self.device)
        self.logits = self.run(new, self.cache)
        self.ids = torch.cat([self.ids, new], dim=1)
        assert self.cache.tokens == self.ids.shape[1] and self.logits.isfinite().all()

    def crop(self) -> None:
        length = self.ids.shape[1]
        removed = min(self.random.choice([1, 3, 10, 50, 200]), length - max(self.starts) - 1)
        if removed > 0:
            self.cache.crop(-removed)
            self.ids = self.ids[:, : length - removed]

    def candidates(self) -> None:
        """Several tokens at once, some of which are taken back, as in assisted decoding."""
        tokens = self.random.randint(2, 8)
        self.feed(tokens)
        rejected = self.random.randrange(tokens)
        if rejected:
            self.cache.crop(-rejected)
            self.ids = self.ids[:, :-rejected]

    def reorder(self) -> None:
        order = [self.random.randrange(len(self.starts)) for _ in self.starts]
        self.cache.reorder_cache(torch.tensor(order, device=self.device))
        self.ids, self.starts = self.ids[order], [self.starts[row] for row in order]

    def restart(self) -> None:
        if self.steps is not None:
            self.report.recorded += len(self.steps._graphs)
            self.report.refused += self.steps.refused
            self.steps.close()
            self.steps = None
        self.cache.reset()
        assert self.cache.nbytes == self.cache.spare_nbytes == 0
        gc.collect()
        self.report.resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE)
        self.report.objects.append(len(gc.get_objects()))
        self.begin()

    def check(self) -> None:
        fresh = TurboQuantCache(self.model.config, self.preset, **TILES)
        new = torch.full_like(self.ids[:, :1], 7)
        self.run(self.ids, fresh)
        expected, got = self.run(new, fresh), self.run(new, self.cache)
        self.ids = torch.cat([self.ids, new], dim=1)
        self.report.errors.append((got - expected).abs().max().item())
        got, expected = got.log_softmax(-1), expected.log_softmax(-1)
        self.report.divergences.append((expected.exp() * (expected - got)).sum(-1).mean().item())
        held = self.cache.nbytes + self.cache.spare_nbytes
        self.report.bytes_per_token = max(self.report.bytes_per_token, held / (self.ids.numel() + 200 * len(self.ids)))

    @torch.inference_mode()
    def soak(self, steps: int) -> Report:
        """Run until `steps` decode steps are done."""
        begin, report = time.perf_counter(), self.report
        operations = {self.crop: 6, self.candidates: 6, self.reorder: 4, self.restart: 2}
        while report.steps < steps:
            if self.ids.shape[1] > MAX_TOKENS:
                operation = self.restart
            elif self.random.random() < 0.9:
                operation = None
            else:
                operation = self.random.choices([*operations, self.turn], [*operations.values(), 3])[0]
            if operation is None:
                self.feed(1)
                report.steps += 1
                if report.steps % CHECK_EVERY == 0:
                    self.check()
            else:
                operation()
                report.operations[operation.__name__] = report.operations.get(operation.__name__, 0) + 1
        report.seconds = time.perf_counter() - begin
        return report

    def turn(self) -> None:
        self.feed(self.random.randint(5, 60))


def soak(
    steps: int,
    preset: str = "lossless",
    attention: str = "turboquant",
    offloading: bool = False,
    seed: int = 0,
    graphs: bool = False,
):
    """The `Report` of `steps` decode steps among random operations."""
    return Soak(preset, attention, offloading, seed, graphs).soak(steps)


if __name__ == "__main__":
    given = sys.argv[1:]
    torch.set_num_threads(1)
    RECORDERS.setdefault("cpu", Repeat)
    options = {"offloading": "offload" in given[3:], "graphs": "graphs" in given[3:]}
    report = soak(int(given[0]) if given else 100_000, *given[1:3], **options)
    print(json.dumps(report.summary(), indent=1))
