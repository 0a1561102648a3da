"""Attention that reads packed tiles."""

from turboquant_hf.kernels.decode.reference import PackedSide, RawTokens, decode_attention

__all__ = ["PackedSide", "RawTokens", "decode_attention"]
