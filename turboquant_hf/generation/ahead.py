"""Lets the host launch step n + 1 before it knows whether step n was the last.

After every token, `generate` asks the device whether all sequences are finished. The device is idle until the host has
the answer and has launched the next step. transformers has a check that reads the answer one step late
(`DeferredStopCheck`, from 5.17 on), but uses it only on Apple GPUs ("mps"). Here it also serves recorded steps:

    device    | step 1 | step 2 | step 3 |
    host       launch 2, is 1 the last? launch 3, is 2 the last? ...

- If a call ends by its length alone, the host knows the last step in advance.
- Otherwise one step too many runs. transformers takes back its token, scores and cache entries. Its random numbers are
  taken back here. In a cache that outlives the call, a tile may be encoded one token earlier than without that step.
- Code of users would see that step. A call with processors, criteria or a streamer of their own is therefore served
  only if it ends by its length alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from transformers.generation import MaxLengthCriteria
from transformers.generation import utils as upstream

from turboquant_hf.cache import PackedCache, TurboQuantLayer
from turboquant_hf.cache.wrapping import MARK
from turboquant_hf.generation.recorders import default_generator


def excess_steps(arguments: Mapping[str, Any], cache: PackedCache) -> int | None:
    """How many steps too many may run in a decoding loop of `generate`, 0 or 1; None if the host must not run ahead.

    Args:
        arguments: those of the loop, by name.
    """
    config, criteria = arguments["generation_config"], arguments["stopping_criteria"]
    if arguments.get("synced_gpus") or getattr(config, "is_assistant", False):
        return None
    if all(type(criterion) is MaxLengthCriteria for criterion in criteria):
        return 0
    streamer = arguments.get("streamer")
    others = [*criteria, *arguments["logits_processor"], *([] if streamer is None else [streamer])]
    if not all(type(other).__module__.startswith("transformers.") for other in others):
        return None
    is_kept = config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
    # A cache that outlives the call must take the extra step back. Only packed layers can. Sliding windows and
    # recurrent states would need a record of what they drop.
    return None if is_kept and not all(isinstance(layer, TurboQuantLayer) for layer in cache.layers) else 1


def register_ahead() -> None:
    """Put a subclass in the place of transformers' check. Idempotent.

    The subclass behaves differently only for caches whose `excess_steps` is not None.
    """
    original = getattr(upstream, "DeferredStopCheck", None)
    if original is None or hasattr(original, MARK):
        return

    class DeferredStopCheck(original):
        def __init__(self, input_ids: torch.Tensor, max_length: int, cache: Any, cache_is_returned: bool, *args: Any):
            excess = getattr(cache, "excess_steps", None)
            super().__init__(input_ids, max_length, cache, cache_is_returned and excess != 0, *args)
            self.generator = default_generator(input_ids.device) if excess else None
            self.states: deque[torch.Tensor] = deque(maxlen=2)

        @staticmethod
        def is_supported(device: torch.device, cache: Any, *args: Any, **kwargs: Any) -> bool:
            ours = getattr(cache, "excess_steps", None) is not None
            return ours or original.is_supported(device, cache, *args, **kwargs)

        def __call__(self, *args: Any) -> bool:
            if self.generator is not None:
                self.states.append(self.generator.get_state())  # does not wait for the device
            return super().__call__(*args)

        def finish(self) -> int:
            undone = super().finish()
            if undone and self.generator is not None:
                self.generator.set_state(self.states[0])
            return undone

    setattr(DeferredStopCheck, MARK, original)
    upstream.DeferredStopCheck = DeferredStopCheck
