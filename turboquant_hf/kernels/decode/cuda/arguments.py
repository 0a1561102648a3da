"""The kernel's arguments: one structure, named once here, from which the C declaration is made."""

from __future__ import annotations

import ctypes

FIELDS = (
    ("query", "const u16*", "[B, H, all_rows, D], the model's dtype"),
    ("key_turn", "const float*", "the keys' rotation: its signs [D] (HADAMARD), or the transposed matrix [D, D]"),
    ("order", "const u16*", "[B, H, D]: the channel that stands in each coded place; null: the identity"),
    ("balance", "const float*", "[B, H, D]: the query is divided by it; null: ones"),
    ("key_gain", "const float*", "[B, H]: factor of all scales of the keys; null: ones"),
    ("key_codes", "const u8*", "[B, H, capacity, 128 * KEY_ROW_BYTES]"),
    ("key_scales", "const u8*", "[B, H, capacity, KEY_GROUPS, 128]"),
    ("key_means", "const u8*", "[B, H, capacity, D] in half precision (HAS_MEAN)"),
    ("value_codes", "const u8*", "[B, H, capacity, D * VALUE_ROW_BYTES]"),
    ("value_scales", "const u8*", "[B, H, capacity, 128]"),
    ("value_turn", "const float*", "the values' rotation, not transposed"),
    ("value_gain", "const float*", "[B, H]: factor of all scales of the values; null: ones"),
    ("sink_keys", "const u16*", "[B, H, sinks, D]"),
    ("sink_values", "const u16*", "[B, H, sinks, D]"),
    ("tail_keys", "u16*", "[B, H, tail_stride, D]"),
    ("tail_values", "u16*", "[B, H, tail_stride, D]"),
    ("new_keys", "const u16*", "[B, H, fresh, D]: the tail's newest tokens, which the kernel writes to the tail"),
    ("new_values", "const u16*", "[B, H, fresh, D]"),
    ("starts", "const i64*", "[B]: each sequence's first position that is not padding"),
    ("mask", "const u8*", "[B, mask_stride]: 0 hides a position (MASKED)"),
    ("s_aux", "const float*", "[query heads]: logits that take probability and carry no value; null: none"),
    ("counts", "const int*", "{tiles, length} on the device, which replace tiles and tail; null: none"),
    ("work", "float*", "the blocks' parts of each result, see workspace.py"),
    ("arrivals", "int*", "per query row, how many blocks are done; zeros before and after the launch"),
    ("result", "u16*", "like query"),
    ("heads", "int", "H, KV heads"),
    ("all_rows", "int", "query rows per KV head"),
    ("queries", "int", "new tokens; row n is token n % queries"),
    ("tiles", "int", "filled tiles per head"),
    ("capacity", "int", "tiles that a head has room for"),
    ("sinks", "int", "raw tokens before the tiles"),
    ("tail", "int", "raw tokens after the tiles, fresh ones included"),
    ("tail_stride", "int", "tokens from one head of the tail to the next"),
    ("ring", "int", "tokens of the ring that the tail is; 0: the tail begins at its first token"),
    ("fresh", "int", "tokens of new_keys and new_values"),
    ("key_turn_stride", "int", "from one head's rotation to the next; 0: all heads share one"),
    ("value_turn_stride", "int", "the same for the rotation of the values"),
    ("mask_stride", "int", "from one sequence's mask to the next"),
    ("scaling", "float", "of q . k"),
    ("softcap", "float", "(SOFTCAP)"),
    ("sparse", "float", "log2 of the threshold (SPARSE)"),
)
"""(name, C type, meaning) in the order of the structure. Words in capitals are constants of source.py."""

_NUMBERS = {"int": ctypes.c_int, "float": ctypes.c_float}


class Arguments(ctypes.Structure):
    """The kernel's only parameter: addresses of device memory (None or 0: null) and numbers, by name."""

    _fields_ = tuple((name, _NUMBERS.get(kind, ctypes.c_void_p)) for name, kind, _ in FIELDS)


def declaration() -> str:
    """`Arguments` in C, which must have the same size."""
    lines = [f"    {kind} {name};{f'  // {meaning}' if meaning else ''}" for name, kind, meaning in FIELDS]
    size = f'static_assert(sizeof(Arguments) == {ctypes.sizeof(Arguments)}, "the fields of arguments.py");'
    return "\n".join(["struct Arguments {", *lines, "};", size])
