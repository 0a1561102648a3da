"""The attention implementation "turboquant": SDPA for dense tensors, kernels or pieces for packed handles."""

from transformers import AttentionInterface, AttentionMaskInterface

from turboquant_hf.attention.forward import turboquant_attention_forward
from turboquant_hf.attention.mask import turboquant_mask
from turboquant_hf.cache import ATTENTION_NAME


def register_attention() -> None:
    """Add "turboquant" to transformers' tables of attentions and masks. Idempotent."""
    AttentionInterface.register(ATTENTION_NAME, turboquant_attention_forward)
    # Without a mask function of the same name, transformers passes no mask at all, and padding is lost.
    AttentionMaskInterface.register(ATTENTION_NAME, turboquant_mask)


__all__ = ["register_attention", "turboquant_attention_forward", "turboquant_mask"]
