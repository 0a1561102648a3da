"""Make a profile of a model: second moments of what its attention sees, and the maps that suit them best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from turboquant_hf.cache import ATTENTION_NAME, TurboQuantCache, TurboQuantLayer
from turboquant_hf.cache.hybrid import packed_part
from turboquant_hf.cache.profiles import profile_fields
from turboquant_hf.cache.switching import attention_of, why_dense
from turboquant_hf.config import load_preset
from turboquant_hf.evaluation.harness import decoding
from turboquant_hf.kernels.codes import HALF_MAX
from turboquant_hf.primitives.moments import rounding_error, rounding_map, shrunk
from turboquant_hf.quantizers.profile import Profile
from turboquant_hf.quantizers.profiled import HeadMaps

SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
"""`make_profile` tries to move moments this far towards their diagonals (`primitives.shrunk`)."""
TILE, SINKS = 128, 4
"""As in the presets: keys are centred tile by tile, and sinks are never coded."""


@dataclass
class Moments:
    """Second moments, float64 [H, D, D], one list entry per packed layer.

    Attributes:
        queries: E[q q'] over the query heads that read a KV head.
        keys: E[k k'] of keys without the mean of their tile.
        values: E[v v'].
    """

    queries: list[torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @staticmethod
    def mean(parts: Sequence[Moments]) -> Moments:
        """The mean of the moments of windows of the same length."""
        sides = zip(*((m.queries, m.keys, m.values) for m in parts), strict=True)
        return Moments(*([sum(x) / len(parts) for x in zip(*side, strict=True)] for side in sides))


def make_profile(
    model,
    windows: Sequence[torch.Tensor],
    *,
    share: float | None = None,
    values: bool = False,
    note: Callable[[str], None] = print,
) -> Profile:
    """The profile of a model, from windows of a text.

    Args:
        model: a causal language model whose attention can be set to "turboquant"; it is set back afterwards.
        windows: token ids [1, T], at least two windows of equal length, best that of the contexts to come.
        share: how far moments are moved towards their diagonals. None chooses one of `SHARES` for keys and one for
            values: maps are made from every second window, and their error is predicted for the other windows.
        values: map values, too. Without it they are coded as without a profile, with the unit of the profile's text.
        note: called with each line that a user should see.

    Returns: a profile in memory; `save` writes it.
    Raises: ValueError for a model whose attention cannot be set, or for windows that are too few, too short or of
        different lengths.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from turboquant_hf import TurboQuantCache, make_profile
        >>> sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, intermediate_size=64, **sizes))
        >>> windows = torch.randint(100, (2, 1, 300)).unbind()
        >>> profile = make_profile(model, windows, note=lambda line: None)
        >>> TurboQuantCache(model.config, profile=profile).profile is profile
        True
    """
    if len(windows) < 2 or any(x.shape != windows[0].shape for x in windows) or windows[0].shape[1] < SINKS + TILE:
        raise ValueError(
            f"windows={[list(x.shape) for x in windows]} is not supported; allowed: two and more of equal length, each "
            f"of at least {SINKS + TILE} tokens"
        )
    with _our_attention(model):
        found = [window_moments(model, window) for window in windows]
    whole = Moments.mean(found)
    fitted, kept = Moments.mean(found[::2]), Moments.mean(found[1::2])
    shares = {"keys": share, "values": share if values else None}
    if share is None:
        shares["keys"] = best_share(fitted.keys, fitted.queries, kept.keys, kept.queries)
    key_maps = [_maps(*pair, shares["keys"]) for pair in zip(whole.keys, whole.queries, strict=True)]
    value_maps, known = [_unmapped(x) for x in whole.values], 0
    if values:
        weights, known = output_weights(model, whole)
        if known < len(weights):
            note(f"values: {len(weights) - known} of {len(weights)} layers have no o_proj: their channels count alike")
        if share is None:
            shares["values"] = best_share(fitted.values, weights, kept.values, weights)
        value_maps = [_maps(*pair, shares["values"]) for pair in zip(whole.values, weights, strict=True)]
    about = {
        "tokens": sum(x.shape[1] for x in windows),
        "context": windows[0].shape[1],
        "share": shares,
        "output_weights": f"{known} of {len(key_maps)} layers",
    }
    return Profile(profile_fields(model.config), tuple(zip(key_maps, value_maps, strict=True)), about)


@torch.inference_mode()
def window_moments(model, window: torch.Tensor) -> Moments:
    """The moments of one window [1, T], read at once. Sinks are left out, and keys at the end that fill no tile."""
    cache = TurboQuantCache(model.config, load_preset("lossless", recent_window=window.shape[1]))
    if not cache.packed_layers:
        raise ValueError(f"model={type(model).__name__} is not supported: nothing of its cache is packed")
    queries: dict[int, torch.Tensor] = {}

    def observe(layer: TurboQuantLayer, index: int) -> Callable[[torch.Tensor], None]:
        return lambda query: queries.__setitem__(index, second_moment(_grouped(query[0, :, SINKS:], layer.num_heads)))

    for index, layer in enumerate(cache.packed_layers):
        layer.observe = observe(layer, index)
    decoding.prefill(model, window.to(model.device), cache, chunk=0)
    keys, values = [], []
    for index, layer in enumerate(cache.packed_layers):
        if index not in queries:
            raise ValueError(f"model={type(model).__name__} is not supported: its attention shows no queries")
        k, v = (x[0, :, SINKS:].float() for x in layer.tail.view())
        if not k.abs().amax() < HALF_MAX / 2:
            raise ValueError(f"layer {index}: keys beyond {HALF_MAX / 2:g} are not supported; use no profile")
        tiles = k[:, : k.shape[1] // TILE * TILE].unflatten(1, (-1, TILE))
        keys.append(second_moment((tiles - tiles.mean(dim=2, keepdim=True)).flatten(1, 2)))
        values.append(second_moment(v))
    return Moments([queries[index] for index in range(len(keys))], keys, values)


def second_moment(x: torch.Tensor) -> torch.Tensor:
    """E[x x'] over the tokens of x [H, T, D]: float64 [H, D, D] on the CPU."""
    x = x.float()
    return (x.transpose(1, 2) @ x / x.shape[1]).double().cpu()


def output_weights(model, moments: Moments) -> tuple[list[torch.Tensor], int]:
    """The sum of W_o' W_o over the query heads that read a KV head, for every packed layer.

    It is known for attention modules with a `layer_idx` and a linear `o_proj` of plain numbers. Other layers get the
    identity.

    Returns: one float64 [H, D, D] per layer, and the number of layers for which it is known.
    """
    found = {}
    for module in model.modules():
        weight, index = getattr(getattr(module, "o_proj", None), "weight", None), getattr(module, "layer_idx", None)
        if isinstance(weight, torch.Tensor) and weight.is_floating_point() and not weight.is_meta and index is not None:
            found.setdefault(index, weight.detach())
    cache = TurboQuantCache(model.config, load_preset("lossless"))
    places = [index for index, layer in enumerate(cache.layers) if packed_part(layer) is not None]
    result, known = [], 0
    for index, values in zip(places, moments.values, strict=True):
        heads, dim = values.shape[:2]
        weight = found.get(index)
        if weight is None or weight.dim() != 2 or weight.shape[1] % (heads * dim):
            result.append(torch.eye(dim, dtype=torch.float64).expand(heads, dim, dim))
            continue
        known += 1
        rows = weight.float().unflatten(1, (heads, -1, dim)).permute(1, 2, 0, 3).flatten(1, 2)
        result.append((rows.transpose(1, 2) @ rows).double().cpu())
    return result, known


def best_share(
    moments: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    kept_moments: Sequence[torch.Tensor],
    kept_weights: Sequence[torch.Tensor],
) -> float:
    """The share whose maps of `moments` and `weights` give the least predicted error for the moments kept apart.

    The errors of heads differ by orders of magnitude, so their geometric mean is compared.
    """

    def predicted(share: float) -> float:
        logs = []
        for moment, weight, kept, kept_weight in zip(moments, weights, kept_moments, kept_weights, strict=True):
            matrix, _ = rounding_map(shrunk(moment, share), shrunk(weight, share))
            logs.append(rounding_error(matrix, kept, kept_weight).log().mean())
        return float(torch.stack(logs).mean())

    return min(SHARES, key=predicted)


def _maps(moment: torch.Tensor, weight: torch.Tensor, share: float) -> HeadMaps:
    matrix, energy = rounding_map(shrunk(moment, share), shrunk(weight, share))
    return HeadMaps(matrix.float().contiguous(), energy.float().contiguous())


def _unmapped(moment: torch.Tensor) -> HeadMaps:
    """The identity map, with the energy of values that have this moment."""
    energy = moment.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True).expand(moment.shape[:2])
    matrix = torch.eye(moment.shape[1]).expand(moment.shape)
    return HeadMaps(matrix.contiguous(), energy.clamp(min=1e-30).float().contiguous())


def _grouped(query: torch.Tensor, heads: int) -> torch.Tensor:
    """Queries [Hq, T, D] by KV head, those of its query heads end to end: [heads, Hq / heads * T, D]."""
    return query.unflatten(0, (heads, -1)).flatten(1, 2)


@contextmanager
def _our_attention(model: Any):
    """The model with attention "turboquant", which shows its queries to the cache."""
    why, before = why_dense(model), attention_of(model)
    if why is not None:
        raise ValueError(f"model={type(model).__name__} is not supported: {why} shows no queries to the cache")
    if before != ATTENTION_NAME:
        model.set_attn_implementation(ATTENTION_NAME)
    try:
        yield
    finally:
        if before != ATTENTION_NAME:
            model.set_attn_implementation(before)
