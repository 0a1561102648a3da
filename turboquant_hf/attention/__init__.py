"""The attention implementation "turboquant": dense tensors go to SDPA, packed handles to the readers of tiles."""

from transformers import AttentionInterface, AttentionMaskInterface

from turboquant_hf.attention.forward import turboquant_attention_forward
from turboquant_hf.attention.mask import turboquant_mask
from turboquant_hf.cache import ATTENTION_NAME


def register_attention() -> None:
    """Add the name to transformers' attention and mask tables. Idempotent."""
    AttentionInterface.register(ATTENTION_NAME, turboquant_attention_forward)
    # Without a mask function of the same name transformers passes no mask at all, and padding is lost.
    AttentionMaskInterface.register(ATTENTION_NAME, turboquant_mask)


__all__ = ["register_attention", "turboquant_attention_forward", "turboquant_mask"]
