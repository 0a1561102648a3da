# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {name: python3, display_name: Python 3, language: python}
# ---

# %% [markdown]
# # 5. Keys are not values
#
# A cache holds two vectors per token. Both have the same size, so it seems natural to give both the same number of
# bits. This lesson shows why that is wrong, and looks at three tricks for the value side: boundary layers, sparse
# reading and block size.

# %%
import math

import lesson
import torch
from lesson import claim, relative_error, round_trip, say, show, table

from turboquant_hf.quantizers import MSE

captured = lesson.captured()
dim = captured[0][1].shape[2]

# %% [markdown]
# ## Two different jobs
#
# One step of attention is: output = p₁v₁ + p₂v₂ + ..., where the weights p are the softmax of the scores q·k₁, q·k₂,
# ....
#
# - An error in a **key** changes a score. Softmax turns it into a factor on the weight, and other tokens get read.
# - An error in a **value** is multiplied by its weight and added to the errors of the other tokens. These are
#   independent, so they partly **cancel**.
#
# The cell below rounds only the keys, or only the values, and looks at the error of the output, over every third
# layer.

# %%
layers = captured[:: 1 if lesson.QUICK else 3]
rows, reach = [], []
for bits in (2, 3, 4):
    quantizer = MSE(bits=bits, scale="norm-corrected")
    found = []
    for layer in layers:
        q, seen = lesson.late_queries(layer)
        _, k, v = layer
        p = lesson.attention(q, k, seen)
        keys_rounded = lesson.attention(q, round_trip(quantizer, k), seen) @ v
        values_rounded = p @ round_trip(quantizer, v)
        found.append((relative_error(p @ v, keys_rounded), relative_error(p @ v, values_rounded)))
        reach.append((1 / p.square().sum(-1)).mean().item())
    key_error, value_error = (sum(column) / len(found) for column in zip(*found, strict=True))
    rows.append((bits, key_error, value_error, key_error / value_error))
table(["bits", "error of the output, keys rounded", "error of the output, values rounded", "keys / values"], rows)

own = sum(relative_error(v, round_trip(MSE(bits=3, scale="norm-corrected"), v)) for _, _, v in captured) / len(captured)

# %% tags=["remove-input"]
say(
    f"At 3 bits, a value itself has an error of {own:.3f}, and the output that is made of values has one of "
    f"{rows[1][2]:.3f}. Rounded "
    f"keys leave {rows[1][3]:.1f} times as much. On average, a query spreads its attention over as many tokens as "
    f"{sum(reach) / len(reach):.0f} equally strong ones."
)
claim(rows[1][3] > 1, model=True)

# %% [markdown]
# ## Where to spend the bits
#
# Now the whole model. Each cell of the picture is the KL for so many bits per key number and per value number. The
# three outlined cells take **equal memory**.

# %%
widths = (2, 3, 4)
corrected = {b: MSE(bits=b, scale="norm-corrected") for b in widths}
presets = [lesson.preset(f"K{k} V{v}", corrected[k], corrected[v]) for k in widths for v in widths]
answers = lesson.answers(presets)


# %% tags=["hide-input"]
def draw_grid(figure, c):
    axis = figure.subplots()
    low, high = (math.log(f(r["kl"] for r in answers.values())) for f in (min, max))
    for k in widths:
        for v in widths:
            kl = answers[f"K{k} V{v}"]["kl"]
            share = (math.log(kl) - low) / max(high - low, 1e-9)
            axis.add_patch(
                lesson.Rectangle((v + 0.03, k + 0.03), 0.94, 0.94, color=c.red, alpha=0.1 + 0.6 * share, lw=0)
            )
            axis.text(v + 0.5, k + 0.57, f"{kl:.3f}", ha="center", va="center", fontsize=15)
            axis.text(v + 0.5, k + 0.24, f"{k + v} bits per pair", ha="center", va="center", fontsize=8, color=c.ink)
            if k + v == 6:
                axis.add_patch(
                    lesson.Rectangle((v + 0.03, k + 0.03), 0.94, 0.94, facecolor="none", edgecolor=c.ink, lw=2)
                )
    middles = [w + 0.5 for w in widths]
    axis.set(xlim=(2, 5), ylim=(2, 5))
    axis.set_xticks(middles, [f"{w}-bit values" for w in widths])
    axis.set_yticks(middles, [f"{w}-bit keys" for w in widths])
    axis.set_title("KL (smaller is better); outlined: three caches of equal size")
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


show(draw_grid, "5-grid", "KL by bits of keys and of values: bits for keys help much more", (8, 3.9))

# %%
more_keys, more_values = answers["K4 V2"]["kl"], answers["K2 V4"]["kl"]

# %% tags=["remove-input"]
say(
    f"4-bit keys with 2-bit values have a KL of {more_keys:.3f}. The opposite, which takes the same memory, has "
    f"{more_values:.3f}: {more_values / more_keys:.1f} times more. If a bit is to be saved, save it on the values."
)
claim(more_values > 1.5 * more_keys, model=True)

# %% [markdown]
# ## Their numbers differ, too
#
# Keys have strong channels and a large part that all tokens share. Values have less of both.


# %%
def shared_part(x: torch.Tensor) -> float:
    """Energy of the mean vector, as a share of all energy."""
    return (x.mean(1).square().sum() / x.square().sum(-1).mean(1).sum()).item()


def strongest(x: torch.Tensor) -> float:
    rms = x.square().mean(1).sqrt()
    return (rms.amax(1) / rms.median(1).values).mean().item()


table(
    ["mean over all layers", "keys", "values"],
    [
        (title, *(sum(f(layer[side]) for layer in captured) / len(captured) for side in (1, 2)))
        for title, f in (
            ("strongest channel, times a typical one", strongest),
            ("share of energy that all tokens have in common", shared_part),
        )
    ],
)

# %% tags=["remove-input"]
claim(sum(shared_part(k) for _, k, _ in captured) > 1.5 * sum(shared_part(v) for _, _, v in captured))

# %% [markdown]
# ## Boundary layers
#
# The first and the last layers are said to be the most sensitive ones. *Boundary V* therefore keeps the values of a
# few layers at each end at 8 bits. Here it is with 4-bit keys and 2-bit values.

# %%
keys_and_values = {"keys": corrected[4], "values": corrected[2]}
presets = [lesson.preset(f"boundary {n}", **keys_and_values, boundary_layers=n) for n in (1, 2, 4)]
boundary = {"boundary 0": answers["K4 V2"], **lesson.answers(presets)}
table(
    ["8-bit layers at each end", "bits per value number, mean of the layers", "KL"],
    [(name.split()[1], r["value_bits"], r["kl"]) for name, r in boundary.items()],
)
flat = answers["K4 V3"]

# %% tags=["remove-input"]
say(
    f"Two layers at each end divide the KL by {boundary['boundary 0']['kl'] / boundary['boundary 2']['kl']:.2f} and "
    "take "
    f"{boundary['boundary 2']['value_bits'] - boundary['boundary 0']['value_bits']:.2f} bits more per value number. "
    "One more bit for the values of "
    f"**all** layers takes 1 bit more and divides it by {boundary['boundary 0']['kl'] / flat['kl']:.2f}. So compare "
    "boundary layers with caches of their real size, not with the cache without them."
)
claim(boundary["boundary 2"]["kl"] < boundary["boundary 0"]["kl"], model=True)

# %% [markdown]
# ## Sparse V: values that need not be read
#
# A weight of 10⁻⁶ contributes nothing that one could notice. If all weights of a **tile** (here 128 tokens) are so
# small, its values need not be read at all. This saves no memory. It saves time, because decoding a token is mostly
# reading.


# %%
def skipped(threshold: float) -> tuple[float, float]:
    """Share of tiles left out, where all weights are below threshold x the row's largest; and the output's error."""
    left_out, error = [], []
    for layer in layers:
        q, seen = lesson.late_queries(layer)
        _, k, v = layer
        p = lesson.attention(q, k, seen)
        whole = k.shape[1] // 128 * 128
        tiles = p[..., :whole].unflatten(-1, (-1, 128))
        unlikely = tiles.amax(-1) < threshold * p.amax(-1, keepdim=True)
        past = seen[:, :whole].unflatten(-1, (-1, 128))[..., 0]  # tiles that are in the query's past
        kept = torch.cat([tiles.masked_fill(unlikely[..., None], 0).flatten(2), p[..., whole:]], dim=-1)
        left_out.append((unlikely & past).sum().item() / (past.sum().item() * len(k)))
        error.append(relative_error(p @ v, kept @ v))
    return sum(left_out) / len(left_out), sum(error) / len(error)


rows = [(f"{t:g}", *skipped(t)) for t in (1e-4, 1e-3, 1e-2)]
table(
    ["threshold (of the largest weight)", "tiles left out", "error of the output"],
    [(t, f"{100 * share:.0f} %", error) for t, share, error in rows],
)

# %% tags=["remove-input"]
say(
    f"This text has only {captured[0][1].shape[1]:,} tokens, so most tiles are near. At a threshold of 0.001, "
    f"{100 * rows[1][1]:.0f} % of the tiles can be left out for an error of {rows[1][2]:.1g}."
)
claim(rows[0][2] < 1e-3)

# %% [markdown]
# ## Block size
#
# Each length (scale) that is stored serves one *block* of numbers. Smaller blocks follow the data better, but each
# costs 16 bits more. Here are 3-bit codes in blocks of 8, 16, 32 and 64 numbers.

# %%
rows = []
for block in (8, 16, 32, 64):
    quantizer = MSE(bits=3, block=block, scale="norm-corrected")
    k_error, v_error = (
        sum(relative_error(layer[side], round_trip(quantizer, layer[side])) for layer in captured) / len(captured)
        for side in (1, 2)
    )
    rows.append((block, quantizer.bits_per_channel(dim, 128), k_error, v_error))
flat4 = MSE(bits=4, scale="norm-corrected")
four = [sum(relative_error(x[s], round_trip(flat4, x[s])) for x in captured) / len(captured) for s in (1, 2)]


# %% tags=["hide-input"]
def draw_blocks(figure, c):
    axis = figure.subplots()
    axis.plot([r[1] for r in rows], [r[3] for r in rows], "o-", color=c.orange, lw=1.8, ms=8)
    for block, bits, _, error in rows:
        axis.annotate(
            f"3-bit codes,\nblocks of {block}",
            (bits, error),
            xytext=(-12 if block == 64 else 0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    place = (flat4.bits_per_channel(dim, 128), four[1])
    axis.scatter(*place, color=c.green, s=70)
    axis.annotate(
        "4-bit codes, one block of 64", place, xytext=(10, 0), textcoords="offset points", va="center", color=c.green
    )
    axis.set(xlabel="real bits per number, scales counted", ylabel="error of values", xlim=(3.0, 5.3), ylim=(0, None))
    axis.set_ylim(0, 1.4 * rows[-1][3])


show(
    draw_blocks,
    "5-blocks",
    "Smaller blocks of 3-bit codes cost bits and gain little; one more bit gains much more",
    (8, 3.4),
)

# %%
table(
    ["block", "real bits", "error of keys", "error of values"],
    [*rows, ("64, 4-bit codes", flat4.bits_per_channel(dim, 128), *four)],
)

# %% tags=["remove-input"]
say(
    "After a rotation, all numbers of a vector have the same size, so small blocks have little to follow. Going "
    "from blocks of 64 to 16 costs "
    f"{rows[1][1] - rows[3][1]:.2f} bits and divides the error of values by {rows[3][3] / rows[1][3]:.2f}. One more "
    f"bit of codes costs 1 bit and divides it by {rows[3][3] / four[1]:.1f}."
)
claim(four[1] < min(r[3] for r in rows))

# %% [markdown]
# ## A story from the web: "3-bit cache"
#
# One number cannot describe a cache. Is it keys or values? Are the scales counted? Are some layers or recent tokens
# kept in 16 bits? The picture above has three caches of 6 bits per pair, that is "3 bits".

# %%
same = {name: answers[name]["kl"] for name in ("K4 V2", "K3 V3", "K2 V4")}

# %% tags=["remove-input"]
say(
    "Their KLs are "
    + ", ".join(f"{kl:.3f} (`{name}`)" for name, kl in same.items())
    + f". The worst is {max(same.values()) / min(same.values()):.1f} times the best."
)

# %% [markdown]
# **What to remember.** Give keys more bits than values. Errors of values cancel, errors of keys select the wrong
# tokens. Boundary layers are a step between widths, small blocks rarely pay after a rotation, and unlikely tiles need
# not be read. [Lesson 6](6_conditioning.py) makes the keys better at the same size.
