"""Which profile a cache uses: the one that its preset names, or the one in the model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedConfig

from turboquant_hf.cache.messages import logger
from turboquant_hf.cache.serialization import model_fields
from turboquant_hf.config import AUTO, CachePreset
from turboquant_hf.quantizers.profile import Profile

FILE = "turboquant_profile.safetensors"
"""The name of a profile that is found by itself."""


def profile_for(preset: CachePreset, config: PreTrainedConfig, layers: int) -> Profile | None:
    """The profile of a cache of this preset for a model with so many packed layers.

    Raises:
        ValueError: it belongs to another model, is damaged, or the preset has no use for it.
        FileNotFoundError: there is no such file.
    """
    profile = preset.profile
    if profile is None or (profile == AUTO and not (preset.takes_profile and layers)):
        return None
    if not preset.takes_profile:
        raise ValueError(
            f"profile={str(profile)!r} is not supported by preset={preset.name!r}; allowed: a preset whose keys are "
            "'conditioned' with balance='query'"
        )
    if profile == AUTO:
        path = profile_in_folder(config)
        if path is None:
            return None
        logger.warning_once(f"turboquant_hf: keys and values are conditioned by the model's profile, {path}.")
        profile = path
    if not isinstance(profile, Profile):
        profile = Profile.load(profile)
    profile.check(profile_fields(config), layers)
    return profile


def profile_in_folder(config: PreTrainedConfig) -> Path | None:
    """The profile beside a model's configuration, in its folder or in the hub's snapshot on this machine."""
    name = getattr(config, "_name_or_path", None)
    if not name:
        return None
    path = Path(name, FILE)
    if path.is_file():
        return path
    try:
        found = try_to_load_from_cache(name, FILE, revision=getattr(config, "_commit_hash", None))
    except HFValidationError:  # the path of a folder
        return None
    return Path(found) if isinstance(found, str) else None


def profile_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """What of a model's configuration a profile depends on."""
    return {name: value for name, value in model_fields(config).items() if name != "vocab_size"}
