# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {name: python3, display_name: Python 3, language: python}
# ---

# %% [markdown]
# # 4. The QJL lesson: unbiased is not better
#
# TurboQuant's paper has a second method, **TurboQuant_prod**. It spends one of its bits on a *sketch* of what
# rounding left over. The sketch is called **QJL** ([its own paper](https://arxiv.org/abs/2406.03482)). The promise:
# products of queries and keys become right *on average*. This is true. It still makes the model worse. This lesson
# shows why, because the reason teaches how attention reacts to errors.

# %%
import lesson
import torch
from lesson import claim, errors, round_trip, say, show, slider, table

from turboquant_hf.quantizers import MSE, Prod

captured = lesson.captured()
queries, keys, values = captured[lesson.LAYER]
dim = keys.shape[2]

# %% [markdown]
# ## The residual and its sketch
#
# Rounding turns a key k into k' and leaves the **residual** r = k - k'. Attention needs q·k = q·k' + q·r. QJL
# multiplies the residual by a random matrix S and keeps only the **signs**, one bit each, and the length of r. From
# the signs, it estimates q·r. The estimate is right on average over all random matrices. But only one matrix is
# drawn.


# %%
def score_pairs(bits: int) -> dict[str, torch.Tensor]:
    """Scores of the head's queries and keys, exact and by two methods of equally many bits: [queries, tokens].

    A query cannot look into its future: such scores are minus infinity.
    """
    q, seen = lesson.late_queries(captured[lesson.LAYER])
    q = q[lesson.HEAD]
    found = {"exact": q @ keys[lesson.HEAD].T}
    for name, quantizer in (("mse", MSE(bits=bits)), ("prod", Prod(bits=bits))):
        found[name] = q @ round_trip(quantizer, keys)[lesson.HEAD].T
    return {name: scores.masked_fill(~seen, -torch.inf) for name, scores in found.items()}


two = score_pairs(2)


# %% tags=["hide-input"]
def draw_scatter(figure, c):
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    past = two["exact"].isfinite()
    exact, *found = (two[name][past][::31] for name in ("exact", "mse", "prod"))
    low, high = exact.quantile(0.002).item(), exact.quantile(0.998).item()
    notes = {"mse": "without QJL:\ntoo flat, but tight", "prod": "with QJL:\nright on average, but noisy"}
    for axis, scores, name, color in zip(axes, found, notes, (c.blue, c.orange), strict=True):
        axis.scatter(exact, scores, s=3, color=color, alpha=0.4, lw=0)
        axis.plot([low, high], [low, high], color=c.ink, lw=1.5)
        axis.text(0.03, 0.97, notes[name], transform=axis.transAxes, va="top", color=color, fontsize=12)
        axis.text(0.97, 0.04, "line: no error", transform=axis.transAxes, ha="right", color=c.ink)
        axis.set(xlabel="exact score q · k", xlim=(low, high), ylim=(1.3 * low, high + 0.4 * (high - low)))
    axes[0].set_ylabel("score after 2-bit rounding")


show(
    draw_scatter,
    "4-scatter",
    "Scores after 2-bit rounding against exact ones: a tight tilted cloud without QJL, a wide one with it",
    (8, 3.8),
)

# %% [markdown]
# ## Bias and variance
#
# An error has two parts. The **bias** is what is wrong on average: here, scores that are all a few percent too small.
# The **variance** is the noise around it. QJL trades one for the other, at equal bits.

# %%
METHODS = {
    "mse": MSE,
    "mse with another scale": lambda bits: MSE(bits=bits, scale="unbiased"),
    "prod (with QJL)": Prod,
    "prod, better sketch": lambda bits: Prod(bits=bits, sketch="orthogonal"),
}
rows, noise = [], {}
for name, make in METHODS.items():
    for bits in (2, 4):
        found = [errors(k, round_trip(make(bits=bits), k), q) for q, k, _ in captured]
        bias = sum(one["bias"] for one in found) / len(found)
        spread = sum(max(one["inner"] - one["bias"] ** 2, 0.0) for one in found) / len(found)
        noise[name, bits] = spread
        rows.append((name, bits, f"{100 * bias:+.1f} %", spread))
table(["method", "bits", "bias of a score", "variance of a score (relative, times d)"], rows)

# %% tags=["remove-input"]
say(
    f"At 4 bits, QJL takes the bias from {rows[1][2]} to {rows[5][2]} and multiplies the variance by "
    f"{noise['prod (with QJL)', 4] / noise['mse', 4]:.1f}. Look at the second method, too: if the key is stored with "
    "another **scale** "
    "(|y|² / (y·c) instead of |y|, where y is the rotated key and c its slots), the scores are unbiased **without "
    "any QJL bit**. A "
    "random sketch is not needed for that."
)
claim(noise["prod (with QJL)", 4] > 2 * noise["mse", 4])

# %% [markdown]
# ## Softmax forgives bias and amplifies noise
#
# Attention does not use scores as they are. **Softmax** takes e to the power of each score and divides by the sum.
#
# - If *all* scores are 1 % too small, softmax is a little flatter. That is all.
# - If *one* score is too large by n, its weight is multiplied by eⁿ. Noise does not average out, because a sum of
#   exponentials belongs to its luckiest members.
#
# The picture shows the strongest eight tokens for one real query, with 3-bit keys. (Of the queries that give one
# token a quarter to two thirds of their attention, it is the one with the median damage by QJL.) Move the slider to
# make the scores larger or smaller: models differ in that.

# %%
three = score_pairs(3)
weights = three["exact"].softmax(-1)
damage = (three["prod"].softmax(-1) - weights).abs().sum(-1) / 2
strongest = weights.max(-1).values
chosen = torch.nonzero((strongest > 0.25) & (strongest < 0.67))[:, 0]
query = int(chosen[damage[chosen].argsort()[len(chosen) // 2]])
top = three["exact"][query].argsort(descending=True)[:8]


# %% tags=["hide-input"]
def draw_softmax(factor: float):
    def draw(figure, c):
        axes = figure.subplots(1, 2, sharey=True)
        exact = (factor * three["exact"][query]).softmax(-1)
        parts = (("mse", c.blue, "without QJL"), ("prod", c.orange, "with QJL"))
        for axis, (name, color, title) in zip(axes, parts, strict=True):
            found = (factor * three[name][query]).softmax(-1)
            moved = (found - exact).abs().sum().item() / 2
            axis.bar(range(8), 100 * found[top], color=color, width=0.8)
            for i, weight in enumerate(100 * exact[top]):
                axis.plot([i - 0.48, i + 0.48], [weight, weight], color=c.ink, lw=2.2)
            axis.set_title(f"{title}: {100 * moved:.0f} % of the attention moved", color=color)
            axis.set(ylim=(0, 100), xticks=[], xlabel="the eight strongest tokens")
        weight = 100 * exact[top[0]].item()
        axes[0].annotate(
            "line: exact weight",
            (0.48, weight),
            xytext=(1.6, min(weight + 12, 90)),
            arrowprops={"arrowstyle": "-", "color": c.ink},
        )
        axes[0].set_ylabel("attention weight, %")

    return draw


factors = (0.25, 0.5, 1.0, 1.5, 2.0)
slider([draw_softmax(f) for f in factors], [f"x {f:g}" for f in factors], "scores multiplied by", "4-softmax",
       "Attention weights of eight tokens, exact and after rounding with and without QJL", (8, 3.4))  # fmt: skip

# %% [markdown]
# One query may be luck. Here is the share of attention that goes to the wrong tokens, as a mean over many queries of
# the whole model. The last row makes all exact scores 1 % smaller, which is a pure bias.


# %%
def moved(change, factor: float) -> float:
    """Mean share of the attention that moves."""
    total = []
    for layer in captured[:: 1 if lesson.QUICK else 3]:
        q, seen = lesson.late_queries(layer, step=8)
        exact, found = (lesson.attention(factor * q, k, seen) for k in (layer[1], change(layer[1])))
        total.append((found - exact).abs().sum(-1).mean().item() / 2)
    return sum(total) / len(total)


changes = {name: lambda k, make=make: round_trip(make(bits=4), k) for name, make in METHODS.items()}
changes["exact, all scores 1 % smaller"] = lambda k: 0.99 * k
shares = {name: [moved(change, factor) for factor in (0.5, 1.0, 2.0)] for name, change in changes.items()}
table(
    ["4-bit keys", "scores halved", "scores as they are", "scores doubled"],
    [(name, *(f"{100 * x:.1f} %" for x in found)) for name, found in shares.items()],
)

# %% tags=["remove-input"]
say(
    f"QJL moves {shares['prod (with QJL)'][1] / shares['mse'][1]:.1f} times as much attention as the same bits "
    "without QJL. The pure bias "
    f"of 1 % moves {100 * shares['exact, all scores 1 % smaller'][1]:.1f} %: that is the error which QJL was meant "
    "to repair."
)
claim(shares["prod (with QJL)"][1] > 1.5 * shares["mse"][1])
claim(shares["exact, all scores 1 % smaller"][1] < 0.5 * shares["mse"][1])

# %% [markdown]
# ## The model's answers
#
# Only the keys are rounded here, so that nothing else disturbs.

# %%
presets = [
    lesson.preset("mse 4", MSE(bits=4)),
    lesson.preset("mse 4, unbiased scale", MSE(bits=4, scale="unbiased")),
    lesson.preset("prod 4", Prod(bits=4)),
    lesson.preset("prod 4, orthogonal sketch", Prod(bits=4, sketch="orthogonal")),
    lesson.preset("mse 3", MSE(bits=3)),
    lesson.preset("prod 3", Prod(bits=3)),
]
answers = lesson.answers(presets)
table(
    ["keys", "real bits", "KL", "same top token"],
    [(name, r["key_bits"], r["kl"], f"{100 * r['top1']:.0f} %") for name, r in answers.items()],
)


# %% tags=["hide-input"]
def draw_kl(figure, c):
    axis = figure.subplots()
    bars = [("3 bits, no QJL", "mse 3", c.blue), ("3 bits + 1 bit QJL", "prod 4", c.orange),
            ("4 bits, no QJL", "mse 4", c.blue)]  # fmt: skip
    for i, (label, name, color) in enumerate(bars):
        kl = answers[name]["kl"]
        axis.barh(-i, kl, color=color, height=0.65)
        axis.text(kl, -i, f"  {kl:.3f}", va="center", color=color, fontsize=12)
        axis.text(0, -i, f"{label}  ", va="center", ha="right", fontsize=12)
    axis.set(yticks=[], xlabel="KL: distance from the uncompressed model (shorter is better)")
    axis.set_xlim(0, 1.12 * max(answers[name]["kl"] for _, name, _ in bars))
    axis.spines["left"].set_visible(False)


show(draw_kl, "4-model", "KL of the model: one bit of QJL beside one more ordinary bit", (8, 2.2))

# %% tags=["remove-input"]
say(
    "Compare the bars. Take keys with 3 ordinary bits and spend one more bit. As an ordinary bit, it divides the KL by "
    f"{answers['mse 3']['kl'] / answers['mse 4']['kl']:.1f}. As QJL, it "
    + (
        f"makes the KL {answers['prod 4']['kl'] / answers['mse 3']['kl']:.1f} times **larger** than without it."
        if answers["prod 4"]["kl"] > answers["mse 3"]["kl"]
        else f"divides it by {answers['mse 3']['kl'] / answers['prod 4']['kl']:.1f}."
    )
)
claim(answers["prod 4"]["kl"] > 2 * answers["mse 4"]["kl"], model=True)
claim(answers["prod 4, orthogonal sketch"]["kl"] > answers["mse 4"]["kl"], model=True)

# %% [markdown]
# ## Others found out the same way: old `turbo4` and new `turbo4`
#
# `turbo4` is a cache type of llama.cpp forks. Its first version had QJL (3 bits and 1 bit), for keys and values. Its
# authors dropped it later. Both are presets of this library, with everything else as it was.

# %%
turbo = lesson.answers([lesson.shipped("old-turbo4"), lesson.shipped("turbo4")])
table(
    ["cache", "real bits", "KL", "same top token"],
    [(n, (r["key_bits"] + r["value_bits"]) / 2, r["kl"], f"{100 * r['top1']:.0f} %") for n, r in turbo.items()],
)

# %% tags=["remove-input"]
say(
    f"Without QJL, and with fewer bits in all, the KL is {turbo['old-turbo4']['kl'] / turbo['turbo4']['kl']:.1f} "
    "times smaller."
)
claim(turbo["old-turbo4"]["kl"] > 2 * turbo["turbo4"]["kl"], model=True)

# %% [markdown]
# ## A story from the web: "QJL makes it lossless, with zero overhead"
#
# Lossless means that every bit comes back. The table above says how far that is from true. "Unbiased" was read as
# "without error", but it only means that the errors point in no direction. And the overhead is not zero: the length
# of the residual is stored, too.

# %%
bits = {
    name: quantizer.bits_per_channel(dim, 128) for name, quantizer in (("mse", MSE(bits=4)), ("prod", Prod(bits=4)))
}

# %% tags=["remove-input"]
say(
    f"Per number, `prod` takes {bits['prod']:.3f} bits where `mse` takes {bits['mse']:.3f}, for heads of {dim} "
    "channels."
)
claim(bits["prod"] > bits["mse"])

# %% [markdown]
# **What to remember.** Softmax forgives a common shrinking of all scores and punishes noise. So a method with less
# variance wins over one without bias. If you want unbiased scores, store another scale. [Lesson
# 5](5_keys_and_values.py) turns to the other half of the cache.
