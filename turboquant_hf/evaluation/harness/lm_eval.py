"""`--model turboquant` for EleutherAI's lm-evaluation-harness: log-likelihoods that are read through the packed cache.

The harness's own `hf` model computes a log-likelihood in one forward pass, which never reads a cache. Any preset would
look lossless. Here each text is fed in chunks through a `TurboQuantCache`. Importing this module registers the model;
`turboquant-hf run lm_eval --model turboquant ...` imports it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from turboquant_hf.cache import ATTENTION_NAME, TurboQuantCache
from turboquant_hf.cache.defaults import cache_defaults
from turboquant_hf.config import DEFAULT_PRESET, CachePreset, load_preset
from turboquant_hf.evaluation.harness.models import forward
from turboquant_hf.evaluation.presets.named import MEASURED_ALONE
from turboquant_hf.names import CACHE_NAME

logger = logging.getLogger(
    "lm_eval.models.turboquant"
)  # a child of the harness's logger, which also shows the level INFO

PADDING = 32
"""Rows of one batch differ by at most this many tokens. A batch starts to pack when its longest row has enough tokens
for its statistics. The statistics of shorter rows then come from fewer tokens."""

Request = tuple[Any, list[int], list[int]]
"""A request of the harness: (its texts or None, context tokens, continuation tokens)."""


@register_model("turboquant")
class TurboQuantLM(HFLM):
    """The harness's `hf` model with its keys and values in a TurboQuantCache, in every kind of task.

    Args:
        pretrained, **options: as for `hf`. Fields of a `CachePreset`, such as `recent_window=0`, change the preset.
        preset: name, YAML file or `CachePreset`; default: that of `turboquant-hf run --preset`, else k4v4.
        chunk: tokens fed at a time. A chunk is encoded before attention reads it, as in `turboquant-hf perplexity`.
            With `encode_first=False`, attention reads it raw. Generation encodes as in use, unless `encode_first` is
            given.

    Raises:
        ValueError: an unknown preset or field, a model without a packed layer, an encoder-decoder, or an adapter.
    """

    def __init__(self, pretrained: Any, preset: Any = None, chunk: int = 128, **options: Any) -> None:
        if not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"chunk={chunk!r} is not supported; allowed: at least 1")
        if options.get("peft"):
            raise ValueError(f"peft={options['peft']!r} is not supported; allowed: a model with its adapter merged")
        fields = {name: options.pop(name) for name in CachePreset.field_names() if name in options}
        self.cache_config = _cache_config(preset, fields)
        self.preset = _preset(self.cache_config)
        self.chunk = chunk
        super().__init__(pretrained, **options)
        if self.backend != "causal":
            raise ValueError(f"backend={self.backend!r} is not supported; allowed: causal")
        if "attn_implementation" in options:
            self.cache_config["attention"] = "keep"
        if self.cache_config.get("attention") != "keep" and self.model._can_set_attn_implementation():
            self.model.set_attn_implementation(ATTENTION_NAME)
        if not TurboQuantCache(self.model.config, self.preset).packed_layers:
            raise ValueError(
                f"pretrained={pretrained!r} is not supported: {type(self.model).__name__} has no layer whose cache is "
                "packed; allowed: --model hf, which gives the same figures"
            )
        self._scored = self._scored_packed = 0

    # ------------------------------------------------------------------ log-likelihoods

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._reported(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        return self._reported(super().loglikelihood_rolling, requests, disable_tqdm)

    def _reported(self, method, requests: list, disable_tqdm: bool) -> list:
        """Log how many scored tokens attended to packed tokens, because short tasks would look lossless."""
        self._scored = self._scored_packed = 0
        results = method(requests, disable_tqdm=disable_tqdm)
        share = f"turboquant_hf: {self._scored_packed} of {self._scored} scored tokens attended to packed tokens"
        if self._scored_packed:
            logger.info(share)
        elif self._scored:
            logger.warning(
                f"{share}: these texts are too short for preset {self.preset.name!r}, which packs nothing before "
                f"{self.preset.first_encode} tokens, and the figures are those of the uncompressed model. "
                "More few-shot examples, or recent_window=0 in --model_args, show more."
            )
        return results

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation in nats, whether it is the greedy continuation) for each request."""
        rows: dict[tuple[int, ...], list[int]] = {}  # tokens that the model reads -> the requests that they answer
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise ValueError(f"a continuation of {len(continuation)} tokens; allowed: up to {self.max_length}")
            rows.setdefault(tuple((context + continuation)[-self.max_length - 1 : -1]), []).append(index)
        answers: list[Any] = [None] * len(requests)
        progress = tqdm(
            total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Log-likelihoods through the cache"
        )
        for batch in self._batches(sorted(rows, key=lambda row: (-len(row), row)), override_bs):
            for row, own, greedy, last in zip(batch, *self._read(batch), strict=True):
                for index in rows[row]:
                    texts, _, continuation = requests[index]
                    answers[index] = _answer(own, greedy, last, continuation)
                    self._count(len(row), len(continuation))
                    if texts is not None:  # rolling windows have no key
                        self.cache_hook.add_partial("loglikelihood", texts, answers[index])
                    progress.update(1)
        progress.close()
        return answers

    def _batches(self, rows: list[tuple[int, ...]], size: int | None) -> list[list[tuple[int, ...]]]:
        """Batches of rows of similar lengths, longest first; of equal lengths if the model has recurrent states."""
        if not rows:
            return []
        if size is None:
            auto = self.batch_size == "auto"
            size = self._detect_batch_size([(None, list(rows[0]), [0])]) if auto else self.batch_size
        allowed = 0 if getattr(self.model, "_is_stateful", False) else PADDING
        batches: list[list[tuple[int, ...]]] = [[rows[0]]]
        for row in rows[1:]:
            if len(batches[-1]) == size or len(batches[-1][0]) - len(row) > allowed:
                batches.append([])
            batches[-1].append(row)
        return batches

    @torch.no_grad()
    def _read(self, rows: Sequence[tuple[int, ...]]) -> tuple[list, list, torch.Tensor]:
        """Feed rows of token ids through a cache.

        Returns:
            For each row of n tokens: log-probabilities [n - 1] of the second to the last token, whether each was the
            most likely token [n - 1], and all log-probabilities [V] behind the last token.
        """
        width = max(map(len, rows))
        tokens = torch.full((len(rows), width), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(tokens)
        for index, row in enumerate(rows):  # padding is on the left: the cache leaves it out of its statistics there
            tokens[index, width - len(row) :] = torch.tensor(row)
            mask[index, width - len(row) :] = 1
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        own, greedy = [], []
        start = 0
        for logits in self._chunks(tokens, mask):
            probabilities = logits.log_softmax(dim=-1, dtype=self.softmax_dtype)
            following = tokens[:, start + 1 : start + logits.shape[1] + 1, None]
            known = probabilities[:, : following.shape[1]]
            own.append(known.gather(-1, following).squeeze(-1))
            greedy.append(known.argmax(-1) == following.squeeze(-1))
            start += logits.shape[1]
        own, greedy = torch.cat(own, dim=1).cpu(), torch.cat(greedy, dim=1).cpu()
        ranges = [slice(width - len(row), None) for row in rows]
        return (
            [x[kept] for x, kept in zip(own, ranges, strict=True)],
            [x[kept] for x, kept in zip(greedy, ranges, strict=True)],
            probabilities[:, -1].cpu(),
        )

    def _chunks(self, tokens: torch.Tensor, mask: torch.Tensor):
        """Logits [B, up to `chunk`, V] of tokens [B, T], one chunk after another through a new cache."""
        padded = not bool(mask.all())
        cache = TurboQuantCache(self.model.config, self.preset)
        cache.note_padding(mask if padded else None)
        takes = inspect.signature(type(self.model).forward).parameters
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        for start in range(0, tokens.shape[1], self.chunk):
            stop = start + self.chunk
            options = {"attention_mask": mask[:, :stop]} if padded else {}
            if padded and "position_ids" in takes:
                options["position_ids"] = positions[:, start:stop]
            mixed = self.mixed_precision_dtype
            with torch.autocast(device_type=self.device.type, dtype=mixed, enabled=mixed is not None):
                yield forward(self.model, tokens[:, start:stop], cache, **options).logits

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        """Logits [B, T, V] of tokens [B, T] without padding; the harness measures its largest batch with it."""
        with torch.no_grad():
            return torch.cat(list(self._chunks(inps, torch.ones_like(inps))), dim=1)

    def _count(self, read: int, scored: int) -> None:
        """Count the last `scored` of `read` tokens, and those of them whose chunk attended to packed tiles."""
        first, self._scored = self.preset.first_encode, self._scored + scored
        if read >= first:
            chunks = -(-first // self.chunk) - self.preset.encode_first
            self._scored_packed += min(scored, max(read - chunks * self.chunk, 0))

    # ------------------------------------------------------------------ generation

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        if options.setdefault("cache_implementation", CACHE_NAME) == CACHE_NAME:
            options.setdefault("cache_config", self.cache_config)
        return super()._model_generate(context, max_length, stop, **options)

    def get_model_info(self) -> dict:
        return {**super().get_model_info(), "turboquant_preset": self.preset.name, "turboquant_chunk": self.chunk}


def _cache_config(preset: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """generate's `cache_config`: these model arguments, completed by the defaults of the process."""
    defaults = cache_defaults()
    if defaults is not None:
        defaults.calls += 1
        if preset is None:
            fields = {**defaults.cache_config, **fields}
    config = {"preset": DEFAULT_PRESET, **fields}
    if preset is not None:
        config["preset"] = preset.to_dict() if isinstance(preset, CachePreset) else str(preset)
    return config


def _preset(config: dict[str, Any]) -> CachePreset:
    """The preset by which log-likelihoods are read: see `resolve_caches` for what recent_window=0 means."""
    fields = {name: value for name, value in config.items() if name in CachePreset.field_names()}
    preset = load_preset(config["preset"], **{"encode_first": True, **fields})
    if preset.recent_window == 0 and "min_statistics" not in fields:
        preset = preset.with_overrides(min_statistics=min(preset.min_statistics, MEASURED_ALONE["min_statistics"]))
    return preset


def _answer(own: torch.Tensor, greedy: torch.Tensor, last: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Log-likelihood of a continuation, of which the row holds all tokens but the last, and whether it is greedy."""
    kept = slice(len(own) - len(continuation) + 1, None)
    final = continuation[-1]
    return float(own[kept].sum() + last[final]), bool(greedy[kept].all() and last.argmax() == final)
