"""Presets by the flags of a command."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from turboquant_hf.config import CachePreset, load_preset
from turboquant_hf.evaluation.labels import UNCOMPRESSED
from turboquant_hf.quantizers.profile import Profile

MEASURED_ALONE = {"recent_window": 0, "encode_first": True, "min_statistics": 256}
"""Fields with which only the sinks are read raw once 256 tokens are seen, for any preset."""


NO_PROFILE = "none"
"""What --profile says for no profile at all."""


def resolve_presets(names: Iterable[str], profile: str | None = None, **overrides: Any) -> list[CachePreset]:
    """Presets by name or YAML path, with the overrides that are not None; `profile` as for `with_profile`."""
    given = {key: value for key, value in overrides.items() if value is not None}
    return [with_profile(load_preset(name, **given), profile) for name in names]


def with_profile(preset: CachePreset, profile: str | None) -> CachePreset:
    """A preset with what --profile says, where it takes a profile: None leaves it as it is.

    The file is read here, so that a run knows what is in it and not only its name.
    """
    if profile is None or not preset.takes_profile:
        return preset
    return preset.with_overrides(profile=None if profile == NO_PROFILE else Profile.load(profile))


def resolve_caches(
    names: Iterable[str], recent_window: int | None, profile: str | None = None
) -> dict[str, CachePreset | None]:
    """{cache name: preset}, with "uncompressed" (None) first. Names may be presets or YAML files.

    `recent_window=0` also encodes new tokens before attention reads them (`CachePreset.encode_first`), and waits for at
    most 256 tokens of statistics. Only the sinks are then read raw. Otherwise the question, at least, would be read
    raw, and a short prompt would hide the loss that is measured.

    Raises:
        ValueError: an unknown preset, or two of the same name.
    """
    overrides = {} if recent_window is None else {"recent_window": recent_window, "encode_first": recent_window == 0}
    caches: dict[str, CachePreset | None] = {UNCOMPRESSED: None}
    for name in names:
        if str(name) == UNCOMPRESSED:
            continue
        preset = with_profile(load_preset(name, **overrides), profile)
        if recent_window == 0:
            enough = min(preset.min_statistics, MEASURED_ALONE["min_statistics"])
            preset = preset.with_overrides(min_statistics=enough)
        if preset.name in caches:
            raise ValueError(f"preset={name!r}: the name {preset.name!r} is given twice")
        caches[preset.name] = preset
    return caches


def check_packed(caches: Mapping[str, CachePreset | None], length: int) -> None:
    """Raise ValueError if prompts of up to `length` tokens are too short for a preset to pack anything."""
    for name, preset in caches.items():
        if preset is not None and length < preset.first_encode:
            raise ValueError(
                f"lengths: {length} is not supported with {name}, which packs nothing before {preset.first_encode} "
                "tokens; allowed: longer prompts, or a smaller --recent-window"
            )


def recent_windows(presets: Iterable[CachePreset | None]) -> dict[str, int]:
    """{preset: number of newest tokens that it keeps raw}, for metrics.json."""
    return {preset.name: preset.recent_window for preset in presets if preset is not None}
