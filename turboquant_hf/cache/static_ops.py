"""The ops of a preallocated layer, as torch.compile sees them: each takes whole buffers and says which it writes.

`plan` is the name of a `StaticPlan`. Nothing here depends on how much a cache holds, so that one graph serves every
step; on a CPU the bodies are plain torch that reads the counts.
"""

from __future__ import annotations

import torch

from turboquant_hf.cache.static_due import open_state
from turboquant_hf.cache.static_plan import PLANS
from turboquant_hf.cache.static_state import StaticState

BOTH = ("arena", "counts")
NO_CAPTURE = (
    "a chunk of more than 16 tokens is stored by code that waits for the device, which a CUDA graph cannot record: "
    "run the prefill outside the graph, as generate does"
)


@torch.library.custom_op("turboquant_hf::length", mutates_args=())
def length(counts: torch.Tensor) -> torch.Tensor:
    """Tokens held, int32 []. An op of its own: a compiler that reads the buffer itself may do so after `append` wrote."""
    return counts[1].clone()


@torch.library.custom_op("turboquant_hf::visible", mutates_args=())
def visible(arena: torch.Tensor, counts: torch.Tensor, tokens: int, pending: int, plan: str) -> torch.Tensor:
    """Mask [B, 1, tokens, max_len] of the newest `tokens`, of which `pending` are not stored yet."""
    state = StaticState(plan, arena, counts)
    position = torch.arange(state.plan.max_len, device=arena.device)
    newest = counts[1] + pending - tokens + torch.arange(tokens, device=arena.device)
    return ((position <= newest[:, None]) & (position >= state.starts[:, None, None]))[:, None]


@torch.library.custom_op("turboquant_hf::append", mutates_args=BOTH)
def append(key: torch.Tensor, value: torch.Tensor, arena: torch.Tensor, counts: torch.Tensor, plan: str) -> None:
    """Store up to 16 new tokens, [B, H, q, D], raw: in the ring, and in the sinks while those fill."""
    open_state(plan, arena, counts).append(key, value)


@torch.library.custom_op("turboquant_hf::attend", mutates_args=(*BOTH, "workspace"))
def attend(
    query: torch.Tensor,
    arena: torch.Tensor,
    counts: torch.Tensor,
    workspace: torch.Tensor,
    mask: torch.Tensor | None,
    s_aux: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    plan: str,
) -> torch.Tensor:
    """Attention of the newest q tokens, [B, Hq, q, D] -> [B, q, Hq, Dv], over sinks, tiles and ring; then `commit`.

    mask: bool [B, max_len], False hides a position. workspace: `dispatch.decode_workspace`. Serves rotated quantizers.
    """
    state = open_state(plan, arena, counts)
    state.observe(query)
    output = state.attend(query, workspace, scaling=scaling, mask=mask, softcap=softcap, s_aux=s_aux)
    state.commit()
    return output.transpose(1, 2).contiguous()


@torch.library.custom_op("turboquant_hf::commit", mutates_args=BOTH)
def commit(query: torch.Tensor | None, arena: torch.Tensor, counts: torch.Tensor, plan: str) -> None:
    """Count the newest tokens' queries, and encode what is old enough."""
    state = open_state(plan, arena, counts)
    if query is not None:
        state.observe(query)
    state.commit()


@torch.library.custom_op("turboquant_hf::dense", mutates_args=())
def dense(arena: torch.Tensor, counts: torch.Tensor, plan: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, H, max_len, D], decoded; zeros behind the newest token."""
    return StaticState(plan, arena, counts).dense()


@torch.library.custom_op("turboquant_hf::dense_with", mutates_args=())
def dense_with(
    key: torch.Tensor, value: torch.Tensor, arena: torch.Tensor, counts: torch.Tensor, plan: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dense` with a chunk that is not stored yet, raw, behind the newest token; ValueError if it is too long."""
    state = StaticState(plan, arena, counts)
    length = _host_length(state)
    state.check_room(length, key.shape[2])
    result = state.dense()
    for whole, new in zip(result, (key, value), strict=True):
        whole[:, :, length : length + new.shape[2]] = new
    return result


@torch.library.custom_op("turboquant_hf::store", mutates_args=BOTH)
def store(
    key: torch.Tensor,
    value: torch.Tensor,
    query: torch.Tensor | None,
    starts: torch.Tensor | None,
    arena: torch.Tensor,
    counts: torch.Tensor,
    plan: str,
) -> None:
    """Store a chunk of any length and encode what is old enough; `starts` [B]: the left padding of the first."""
    state = StaticState(plan, arena, counts)
    if _host_length(state) == 0 and starts is not None:
        state.starts.copy_(starts)
    state.store(key, value, query)


def _host_length(state: StaticState) -> int:
    if state.arena.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(NO_CAPTURE)
    return state.read_counts()[1]


@length.register_fake
def _(counts):
    return counts.new_empty(())


@visible.register_fake
def _(arena, counts, tokens, pending, plan):
    plan = PLANS[plan]
    return arena.new_empty((plan.batch, 1, tokens, plan.max_len), dtype=torch.bool)


@append.register_fake
def _(key, value, arena, counts, plan):
    return None


@attend.register_fake
def _(query, arena, counts, workspace, mask, s_aux, scaling, softcap, plan):
    batch, heads, count, _ = query.shape
    return query.new_empty((batch, count, heads, PLANS[plan].head_dims[1]))


@commit.register_fake
def _(query, arena, counts, plan):
    return None


def _fake_dense(plan: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    plan = PLANS[plan]
    shapes = ((plan.batch, plan.heads, plan.max_len, dim) for dim in plan.head_dims)
    return tuple(torch.empty(shape, dtype=plan.dtype, device=device) for shape in shapes)


@dense.register_fake
def _(arena, counts, plan):
    return _fake_dense(plan, arena.device)


@dense_with.register_fake
def _(key, value, arena, counts, plan):
    return _fake_dense(plan, arena.device)


@store.register_fake
def _(key, value, query, starts, arena, counts, plan):
    return None
