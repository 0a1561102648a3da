"""Decode attention in CUDA C++, compiled at run time by NVRTC: the fast path on NVIDIA cards from sm_80 on."""

from turboquant_hf.kernels.decode.cuda.geometry import ROWS_PER_BLOCK
from turboquant_hf.kernels.decode.cuda.step import Step, decode_attention
from turboquant_hf.kernels.decode.cuda.support import available, supports
from turboquant_hf.kernels.decode.cuda.workspace import largest_workspace, unread_tiles

__all__ = ["ROWS_PER_BLOCK", "Step", "available", "decode_attention", "largest_workspace", "supports", "unread_tiles"]
