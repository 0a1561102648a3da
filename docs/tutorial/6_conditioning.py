# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {name: python3, display_name: Python 3, language: python}
# ---

# %% [markdown]
# # 6. What random rotation misses
#
# A random rotation treats all keys alike. It knows nothing of the data, and this is why it needs no data ([lesson
# 3](3_lloyd_max.py)). But keys have a structure that one can see after a few hundred tokens. This lesson uses it, in
# four steps: **centre**, **balance**, **group**, and a better code than rounding. Together they are this library's
# default for keys. The first three are called `conditioned`.

# %%
import math

import lesson
import torch
from lesson import claim, errors, round_trip, say, show, table

from turboquant_hf.primitives import distortion, lloyd_max, rotation_matrix, trellis_code
from turboquant_hf.quantizers import MSE, Conditioned

captured = lesson.captured()
queries, keys, values = captured[lesson.LAYER]
query, key = queries[lesson.HEAD], keys[lesson.HEAD]
dim = key.shape[1]

# %% [markdown]
# ## Step 1: centre
#
# Softmax ignores what all keys share: adding the same number to all scores changes nothing. So take the mean key
# away, keep it exactly once per 128 tokens, and round only the rest.

# %% tags=["hide-input"]
tiles = key[: len(key) // 128 * 128].unflatten(0, (-1, 128))
centred = (tiles - tiles.mean(1, keepdim=True)).flatten(0, 1)


def draw_centre(figure, c):
    axes = figure.subplots(1, 2, sharey=True)
    limit = key.abs().quantile(0.995).item()
    for axis, x, title in (
        (axes[0], key, "keys as they are: stripes"),
        (axes[1], centred, "without the mean of each 128"),
    ):
        picture = axis.imshow(x[:256], aspect="auto", cmap=c.map, vmin=-limit, vmax=limit, interpolation="nearest")
        axis.set(xlabel="channel", title=title)
    axes[0].set_ylabel("token")
    bar = figure.colorbar(picture, ax=axes, pad=0.01)
    bar.outline.set_visible(False)
    bar.set_label("value of the number")


show(
    draw_centre,
    "6-centre",
    "Keys with stripes on the left; without their mean on the right, most stripes are gone",
    (8, 3.4),
)

# %%
left = [
    (
        (k[:, : k.shape[1] // 128 * 128].unflatten(1, (-1, 128)).var(2, unbiased=False).sum())
        * 128
        / k[:, : k.shape[1] // 128 * 128].square().sum()
    ).item()
    for _, k, _ in captured
]

# %% tags=["remove-input"]
say(
    f"On average over all layers, the centred keys have only {100 * sum(left) / len(left):.0f} % of the energy. The "
    "rounding error is "
    "proportional to the energy, so it falls by the same factor. The mean costs 16 bits per channel and 128 tokens, "
    f"that is {16 / 128:g} bits per number."
)
claim(sum(left) / len(left) < 0.7)

# %% [markdown]
# Here is the proof that this matters. Add one constant vector, as long as the keys, to all keys of the head.
# Attention does not change at all. A quantizer that does not centre suffers from it.


# %%
def attention_moved(x: torch.Tensor, quantizer) -> float:
    """Share of attention that goes to other tokens when these keys [tokens, d] are rounded."""
    one_head = [part[lesson.HEAD :][:1] for part in captured[lesson.LAYER]]
    q, seen = lesson.late_queries(one_head)
    exact, found = (lesson.attention(q, k, seen) for k in (x[None], round_trip(quantizer, x[None], query[None])))
    return (found - exact).abs().sum(-1).mean().item() / 2


constant = key.norm(dim=1).mean() * torch.nn.functional.normalize(torch.ones(dim), dim=0)
flat = Conditioned(widths=((1.0, 4),), balance="none")
table(
    ["attention moved, 4-bit keys", "keys as they are", "plus a constant vector", "plus 4 times this vector"],
    [
        (name, *(f"{100 * attention_moved(key + f * constant, quantizer):.1f} %" for f in (0, 1, 4)))
        for name, quantizer in (("random rotation alone (mse)", MSE(bits=4)), ("centred", flat))
    ],
)

# %% tags=["remove-input"]
claim(attention_moved(key + 4 * constant, MSE(bits=4)) > 2 * attention_moved(key + 4 * constant, flat))

# %% [markdown]
# ## Step 2: balance
#
# What matters is the error of q·k, not of k. If queries hardly look at a channel, precision there is wasted. A
# rotation spreads the error evenly over all channels, strong queries or not. So multiply channel i of the keys by a
# number sᵢ and divide the queries by it: the products stay the same. The error of the products is least when keys and
# queries are **equally strong** in each channel: sᵢ = √(rms(qᵢ) / rms(kᵢ)).

# %% tags=["hide-input"]
rms_q, rms_k = query.square().mean(0).sqrt(), centred.square().mean(0).sqrt()
balance = (rms_q / rms_k).sqrt()


def draw_balance(figure, c):
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, k, q, title in (
        (axes[0], rms_k, rms_q, "as they are (a point is a channel)"),
        (axes[1], rms_k * balance, rms_q / balance, "balanced"),
    ):
        axis.scatter(k, q, s=26, color=c.blue)
        axis.set(xscale="log", yscale="log", title=title, xlabel="strength of the keys in a channel →")
    low, high = min(rms_k.min(), rms_q.min()).item() * 0.7, max(rms_k.max(), rms_q.max()).item() * 1.4
    for axis in axes:
        axis.plot([low, high], [low, high], color=c.faint, lw=1)
        axis.set(xlim=(low, high), ylim=(low, high), xticks=[], yticks=[])
        axis.minorticks_off()
    axes[0].set_ylabel("strength of the queries →")
    axes[0].text(0.04, 0.93, "queries stronger than keys", transform=axes[0].transAxes, color=c.faint)
    axes[0].text(0.97, 0.05, "keys stronger than queries", transform=axes[0].transAxes, color=c.faint, ha="right")
    axes[1].text(0.04, 0.93, "all 64 channels on the line", transform=axes[1].transAxes, color=c.faint)


show(
    draw_balance,
    "6-balance",
    "Each point is a channel: uneven strengths of keys and queries, equal ones after the balance",
    (8, 3.6),
)

# %%
gain = ((rms_q**2).sum() * (rms_k**2).sum() / (rms_q * rms_k).sum() ** 2).item()

# %% tags=["remove-input"]
say(f"For this head, theory says that the balance divides the squared error of the scores by {gain:.2f}.")
claim(gain > 1)

# %% [markdown]
# ## Step 3: group
#
# After the balance, channels still differ in importance, rms(qᵢ) · rms(kᵢ). Sort them, give the important ones more
# bits and the others fewer, and rotate each group for itself. The preset `k3v3` has 5 bits for the first quarter, 3
# for the second and 2 for the rest, which makes 3 bits on average.

# %% tags=["hide-input"]
importance = (rms_q * rms_k).sort(descending=True).values
share = 100 * importance.square().cumsum(0) / importance.square().sum()


def draw_groups(figure, c):
    axis = figure.subplots()
    for start, stop, color, label in (
        (0, 16, c.red, "5 bits"),
        (16, 32, c.orange, "3 bits"),
        (32, 64, c.blue, "2 bits"),
    ):
        axis.bar(range(start, stop), importance[start:stop], color=color, width=0.85)
        axis.text(
            (start + stop) / 2 - 0.5,
            importance[start] * 1.04 + 0.02 * importance[0],
            label,
            color=color,
            ha="center",
            fontsize=13,
        )
    axis.set(
        xlabel="the 64 channels, sorted", ylabel="importance for the scores", ylim=(0, importance[0] * 1.15), xticks=[]
    )


show(
    draw_groups,
    "6-groups",
    "Channels sorted by importance; the first quarter gets 5 bits, the second 3, the rest 2",
    (8, 3.0),
)

# %% tags=["remove-input"]
say(
    f"In this head, the first quarter of the channels carries {share[15]:.0f} % of what scores are made of (energy), "
    f"the last half {100 - share[31]:.0f} %."
)
claim(share[15] > 40)

# %% [markdown]
# ## Step 4: a trellis instead of rounding
#
# Lloyd-Max is the best way to round numbers **one by one**. Several numbers can be coded better together. A *trellis
# code* has twice as many slots as its bits can name. Which half of them a number may use depends on the codes of its
# neighbours, and a search finds the best path. The presets `k4v4` and `k3v3` use it.

# %%
rows, gains = [], []
turned = torch.cat([(k @ rotation_matrix(dim, seed=0).T).flatten(0, 1)[::16] for _, k, _ in captured[::3]])
turned = turned * math.sqrt(dim) / turned.norm(dim=1, keepdim=True)
for bits in (1, 2, 3, 4):
    book, code = lloyd_max(bits, dim), trellis_code(bits, dim)
    words = turned.reshape(-1, code.word)
    single = (book.decode(book.encode(turned)) - turned).square().mean().item()
    together = (code.decode(code.encode(words)) - words).square().mean().item()
    gains.append(single / together)
    rows.append((bits, 4.0**-bits, together, single, distortion(book, dim)))
table(["bits", "no code is below", "trellis, real keys", "Lloyd-Max, real keys", "Lloyd-Max, theory"], rows)


# %% tags=["hide-input"]
def draw_trellis(figure, c):
    axis = figure.subplots()
    for i, (_, bound, together, single, _) in enumerate(rows):
        axis.bar(i - 0.2, single / bound, width=0.36, color=c.faint)
        axis.bar(i + 0.2, together / bound, width=0.36, color=c.blue)
        axis.text(i - 0.2, single / bound + 0.03, f"{single / bound:.2f}", ha="center", color=c.faint)
        axis.text(i + 0.2, together / bound + 0.03, f"{together / bound:.2f}", ha="center", color=c.blue)
    axis.axhline(1, color=c.red, lw=1.5)
    axis.text(3.55, 1.04, "no code can\nbe below", color=c.red, va="bottom")
    for i in range(4):
        for x, word in ((i - 0.2, "one by one"), (i + 0.2, "trellis")):
            axis.text(x, 0.08, word, rotation=90, color=c.paper, ha="center", va="bottom", fontsize=9)
    axis.set(xticks=range(4), xticklabels=[f"{r[0]} bit{'s' * (r[0] > 1)}" for r in rows], xlim=(-0.6, 4.3),
             ylabel="error, times the least possible")  # fmt: skip


show(
    draw_trellis,
    "6-trellis",
    "A trellis code closes a part of the gap between rounding and the theoretical limit",
    (8, 3.2),
)

# %% tags=["remove-input"]
say(
    f"With the same bits, the trellis divides the error by {min(gains):.2f} to {max(gains):.2f}. At 3 bits it closes "
    f"{100 * (rows[2][3] - rows[2][2]) / (rows[2][3] - rows[2][1]):.0f} % of the gap between rounding and the limit. "
    "Decoding takes a few instructions more. Encoding needs the search, and is slower."
)
claim(min(gains) > 1.1)

# %% [markdown]
# ## All steps on the model
#
# Keys have 3 bits on average, values are exact. The scales of conditioned keys take one byte, as in the presets. The
# first 4 tokens of the text, the *sinks*, stay raw in all rows: they are unlike all other tokens.

# %%
three_bits = ((0.25, 5), (0.25, 3), (0.5, 2))
presets = [
    lesson.preset("mse", MSE(bits=3), sinks=4),
    lesson.preset("centre", Conditioned(widths=((1.0, 3),), balance="none", scale_format="e3m5"), sinks=4),
    lesson.preset("balance", Conditioned(widths=((1.0, 3),), scale_format="e3m5"), sinks=4),
    lesson.preset("groups", Conditioned(widths=three_bits, scale_format="e3m5"), sinks=4),
    lesson.preset("trellis", Conditioned(widths=three_bits, codebook="trellis", scale_format="e3m5"), sinks=4),
    lesson.preset("mse 4", MSE(bits=4), sinks=4),
]
answers = lesson.answers(presets)
LABELS = {
    "mse": "random rotation alone",
    "centre": "+ centre",
    "balance": "+ balance",
    "groups": "+ groups",
    "trellis": "+ trellis",
    "mse 4": "for comparison: random  \nrotation alone, 4 bits",
}


# %% tags=["hide-input"]
def draw_ladder(figure, c):
    axis = figure.subplots()
    for i, (name, label) in enumerate(LABELS.items()):
        kl = answers[name]["kl"]
        axis.barh(-i, kl, color=c.faint if name.startswith("mse") else c.blue, height=0.7)
        axis.text(kl, -i, f"  {kl:.3f}", va="center", fontsize=12)
        axis.text(0, -i, f"{label}  ", va="center", ha="right", fontsize=12)
    axis.set(
        yticks=[],
        xlabel="KL with 3-bit keys (shorter is better)",
        xlim=(0, 1.15 * max(r["kl"] for r in answers.values())),
    )
    axis.spines["left"].set_visible(False)


show(
    draw_ladder,
    "6-ladder",
    "Bars of the KL with 3-bit keys: centring, balance, groups and the trellis each make it smaller",
    (8, 3.0),
)

# %%
named = {LABELS[name].replace("  \n", " "): row for name, row in answers.items()}
table(
    ["keys", "real bits", "KL", "same top token"],
    [(name, r["key_bits"], r["kl"], f"{100 * r['top1']:.0f} %") for name, r in named.items()],
)

# %% tags=["remove-input"]
say(
    f"Together, the steps divide the KL by {answers['mse']['kl'] / answers['trellis']['kl']:.1f}. One more bit for "
    f"every number, without these steps, divides it by {answers['mse']['kl'] / answers['mse 4']['kl']:.1f}."
)
claim(
    answers["groups"]["kl"] < answers["mse 4"]["kl"] and answers["groups"]["key_bits"] < answers["mse 4"]["key_bits"],
    model=True,
)
claim(answers["mse"]["kl"] > 3 * answers["groups"]["kl"], model=True)
claim(answers["mse"]["kl"] > answers["centre"]["kl"] > answers["balance"]["kl"], model=True)

# %% [markdown]
# ## Profiles: statistics from another text
#
# Order and balance come from the first tokens of a text. What if they come from a **profile**, that is from another
# text which the model read before? Then nothing has to wait. The table measures the error of the scores with 3-bit
# keys, on the tokens after the first 256.


# %%
def learned(quantizer, k: torch.Tensor, q: torch.Tensor):
    """The state that the quantizer learns from keys [heads, tokens, d] and queries."""
    k = k[:, : k.shape[1] // 128 * 128]
    weight = torch.ones(1, k.shape[1] // 128, 128)
    return quantizer.fit(k.unflatten(1, (-1, 128))[None], weight, q.square().mean(1).sqrt()[None])


def score_error(quantizer, state, k: torch.Tensor, q: torch.Tensor) -> float:
    k = k[:, : k.shape[1] // 128 * 128]
    packed = quantizer.encode(k.unflatten(1, (-1, 128))[None], state)
    return errors(k, quantizer.decode(packed, state, dim, torch.float32)[0].flatten(1, 2), q)["inner"]


other = lesson.captured(1)
quantizer = Conditioned(widths=three_bits)
found = {
    "no statistics (random rotation, centred)": [],
    "the first 256 tokens of this text": [],
    "another text (a profile)": [],
    "the tokens themselves": [],
}
plain = Conditioned(widths=((1.0, 3),), balance="none")
for (q, k, _), (other_q, other_k, _) in zip(captured, other, strict=True):
    parts = q.unflatten(1, (-1, k.shape[1]))
    early_q, late_q, early, late = (
        parts[:, :, :256].flatten(1, 2),
        parts[:, :, 256:].flatten(1, 2),
        k[:, :256],
        k[:, 256:],
    )
    states = (
        None,
        learned(quantizer, early, early_q),
        learned(quantizer, other_k, other_q),
        learned(quantizer, late, late_q),
    )
    for name, state in zip(found, states, strict=True):
        method = plain if state is None else quantizer
        found[name].append(score_error(method, state or learned(plain, early, early_q), late, late_q))
means = {name: sum(x) / len(x) for name, x in found.items()}
table(["order and balance from", "error of the scores"], list(means.items()))

# %% tags=["remove-input"]
say(
    f"The first 256 tokens are {means['the first 256 tokens of this text'] / means['the tokens themselves']:.2f} "
    "times, and another text is "
    f"{means['another text (a profile)'] / means['the tokens themselves']:.2f} times as bad as the ideal. Without "
    "any statistics it is "
    f"{means['no statistics (random rotation, centred)'] / means['the tokens themselves']:.2f} times. So order and "
    "balance belong to the **model** more than to the text, and a profile can replace the wait for 256 tokens."
)
claim(means["another text (a profile)"] < means["no statistics (random rotation, centred)"])

# %% [markdown]
# ## A story from the web: "data-oblivious is optimal"
#
# TurboQuant's theorem says that its error is within a small factor of the best possible, **for the worst-case
# vector**. Keys are not the worst case. The ladder above is the difference between a guarantee for every input and
# the best for this one.
#
# **What to remember.** Take out what all keys share. Measure keys where queries look. Spend bits on important
# channels. These three are cheap, need a few hundred tokens, and together matter more than one more bit. You now know
# all parts of this library's default preset: [quantizers.md](../quantizers.md) describes them briefly, and
# [choosing.md](../choosing.md) says which preset to take.
