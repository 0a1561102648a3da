"""How exact a `decode_attention` must be: at most twice the error that plain torch makes in the same dtype."""

from __future__ import annotations

import torch

from tests.support.cases import attend, moved
from turboquant_hf.kernels.decode import reference

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def same_dtype_error(arguments, expected, dtype, options) -> float:
    """RMS error of plain torch whose decoded keys, values, rotated queries and probabilities are held in `dtype`."""
    query, held_tokens = arguments
    keys, values, sinks, tail = held_tokens.keys, held_tokens.values, held_tokens.sinks, held_tokens.tail
    batch, query_heads, count, dim = query.shape
    heads = keys.codes.shape[1]
    rows = query.reshape(batch, heads, -1, dim)

    def held(x):
        return x.to(dtype).double()

    k = keys.rotated(False)
    scores = held(keys.rotate_query(rows)) @ held(k).transpose(-1, -2)
    if keys.mean is not None:
        means = rows.double() @ keys.mean.double().transpose(-1, -2)
        scores = scores + means.repeat_interleave(keys.scale.shape[-1], dim=-1)
    raw = torch.cat([sinks.keys, tail.keys], dim=2)
    scores = torch.cat([scores, held(rows) @ held(raw).transpose(-1, -2)], dim=-1).unflatten(2, (-1, count))
    scores = scores * options["scaling"]
    if options.get("softcap"):
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    packed = k.shape[2]
    length = packed + tail.keys.shape[2]
    visible = reference._visible(held_tokens.starts, packed, length, sinks.keys.shape[2], count, options.get("mask"))
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    if options.get("s_aux") is not None:
        extra = options["s_aux"].double().reshape(1, heads, -1, 1, 1).expand(batch, -1, -1, count, 1)
        scores = torch.cat([scores, extra], dim=-1)
    p = held(scores.softmax(dim=-1).nan_to_num(0.0).flatten(2, 3))
    values_y = held(values.rotated(True))
    out = values.unrotate((p[..., :packed] @ values_y).float()).double()
    if values.mean is not None:
        out = out + p[..., :packed].unflatten(-1, (values.codes.shape[2], -1)).sum(-1) @ values.mean.double()
    raw_p = p[..., packed : packed + raw.shape[2]]
    out = out + raw_p @ held(torch.cat([sinks.values, tail.values], dim=2))
    out = out.reshape(expected.shape).to(dtype).double()
    return (out - expected).square().mean().sqrt().item()


def check(kernel, device, dtype, arguments, *, options=None, sparse=None):
    options = {"scaling": arguments[0].shape[-1] ** -0.5, **(options or {})}
    cast = moved(arguments, device, dtype)
    on_device = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    out = attend(kernel, cast, **on_device, **(sparse or {}))
    assert out.dtype == dtype and out.shape == arguments[0].shape
    wide = moved(cast, "cpu", torch.float32)
    expected = attend(reference.decode_attention, wide, **options).double()
    error = (out.cpu().double() - expected).square().mean().sqrt().item()
    scale = expected.square().mean().sqrt().item()
    allowed = 2 * same_dtype_error(wide, expected, dtype, options)
    assert error <= max(allowed, 2e-6 * scale), f"error {error:.3g}, allowed {allowed:.3g}, output {scale:.3g}"
