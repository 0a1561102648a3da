"""Attention that reads packed tiles: the definition, and fast versions for CPUs, Triton and CUDA C++."""

from turboquant_hf.kernels.decode.inputs import History, PackedSide, RawTokens, Scoring
from turboquant_hf.kernels.decode.reference import decode_attention

__all__ = ["History", "PackedSide", "RawTokens", "Scoring", "decode_attention"]
