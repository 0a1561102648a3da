# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {name: python3, display_name: Python 3, language: python}
# ---

# %% [markdown]
# # 2. Rotation spreads the energy
#
# [Lesson 1](1_naive.py) showed keys with a few very strong channels. Such outliers spoil rounding. This lesson
# removes them with a **rotation**: it turns the vector in its 64-dimensional space. A rotation loses nothing, because
# turning back gives the same vector.

# %%
import math

import lesson
import torch
from lesson import claim, relative_error, round_trip, say, show, table

from turboquant_hf.primitives import hadamard_matrix, rotation_matrix
from turboquant_hf.quantizers import Uniform

captured = lesson.captured()
queries, keys, values = captured[lesson.LAYER]
key = keys[lesson.HEAD]  # one head: [tokens, 64 channels]
dim = key.shape[1]

# %% [markdown]
# ## The Walsh-Hadamard transform
#
# The rotation that we use is a table of plus and minus ones, divided by the square root of its size. It is called the
# **Walsh-Hadamard transform**. Two steps make it:
#
# 1. Flip the sign of some channels. Which ones is drawn at random once, and never changes.
# 2. Multiply by the Hadamard matrix. Its rows are orthogonal: any two of them agree in exactly half of the places.
#
# If a vector has all its energy in one channel, then afterwards every channel has an equal, small share.

# %% tags=["hide-input"]
small = hadamard_matrix(8).float()
spike = torch.zeros(8)
spike[2] = 1.0
spread = small @ spike / math.sqrt(8)


def draw_hadamard(figure, c):
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.2, 1.6, 1.2))
    left.bar(range(8), spike, color=c.red)
    left.set(ylim=(-1.1, 1.1), title="before: one spike", xlabel="channel", yticks=(-1, 0, 1))
    for row in range(8):
        for column in range(8):
            plus = small[row, column] > 0
            middle.add_patch(lesson.Rectangle((column, 7 - row), 0.92, 0.92, color=c.blue if plus else c.grid))
            middle.text(column + 0.46, 7 - row + 0.44, "+" if plus else "−", ha="center", va="center",
                        color=c.paper if plus else c.ink, fontsize=9)  # fmt: skip
    middle.set(xlim=(0, 8), ylim=(0, 8), aspect="equal", title="times the Hadamard matrix")
    middle.axis("off")
    right.bar(range(8), spread, color=c.blue)
    right.set(ylim=(-1.1, 1.1), title="after: equal shares", xlabel="channel", yticks=(-1, 0, 1))
    for axis in (left, right):
        axis.axhline(0, color=c.faint, lw=0.8)


show(
    draw_hadamard, "2-hadamard", "A spike times the 8 by 8 Hadamard matrix becomes eight equal small numbers", (8, 2.9)
)

# %% [markdown]
# There is a fast way to compute it: add and subtract pairs, then pairs of pairs, and so on. No multiplication is
# needed until the end.


# %%
def fast_transform(x: torch.Tensor) -> torch.Tensor:
    """The Walsh-Hadamard transform of the last axis, by log2(d) rounds of sums and differences."""
    size = x.shape[-1]
    step = 1
    while step < size:
        pairs = x.unflatten(-1, (-1, 2, step))
        first, second = pairs.unbind(-2)
        x = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        step *= 2
    return x / math.sqrt(size)


difference = (fast_transform(key) - key @ hadamard_matrix(dim).float() / math.sqrt(dim)).abs().max().item()

# %% tags=["remove-input"]
say(
    f"The fast way takes {dim} x {int(math.log2(dim))} = {dim * int(math.log2(dim))} additions for {dim} channels. "
    "The matrix takes "
    f"{dim} x {dim} = {dim * dim:,} multiplications and additions. Both give the same: the largest difference over "
    f"the real keys is {difference:.0e}."
)
claim(difference < 1e-4)

# %% [markdown]
# ## One real key, before and after
#
# `rotation_matrix` makes the whole rotation, random signs included.

# %%
rotation = rotation_matrix(dim, seed=0)  # [64, 64]
rotated = key @ rotation.T
token = int((key.abs().amax(1) / key.square().mean(1).sqrt()).argsort()[len(key) // 2])
before, after = key[token], rotated[token]


# %% tags=["hide-input"]
def draw_bars(figure, c):
    axes = figure.subplots(1, 2, sharey=True)
    top = before.abs().max().item() * 1.1
    for axis, x, color, title in ((axes[0], before, c.red, "before"), (axes[1], after, c.blue, "after")):
        axis.bar(range(dim), x, color=color, width=0.9)
        axis.axhline(0, color=c.faint, lw=0.8)
        share = x.square().max() / x.square().sum()
        axis.set(title=f"{title}: largest has {100 * share:.0f} % of energy", xlabel="channel", ylim=(-top, top))
    axes[0].set_ylabel("value")


show(draw_bars, "2-key", "One key before the rotation, with an outlier, and after it, without", (8, 3.0))

# %%
turned = queries[lesson.HEAD, :256] @ rotation.T @ rotated.T
scores = queries[lesson.HEAD, :256] @ key.T
table(
    ["", "before", "after"],
    [
        ("length of this key", before.norm().item(), after.norm().item()),
        ("its largest number, times the typical one (rms)", (before.abs().max() / before.square().mean().sqrt()).item(),
         (after.abs().max() / after.square().mean().sqrt()).item()),
    ],
)  # fmt: skip

# %% tags=["remove-input"]
say(
    "Nothing is lost. Attention only looks at products of queries and keys, and if both are rotated, the products "
    f"stay the same: the largest relative change over {scores.numel():,} products is "
    f"{((turned - scores).abs().max() / scores.abs().max()).item():.0e}, the noise of 32-bit arithmetic."
)
claim(((turned - scores).abs().max() / scores.abs().max()) < 1e-5)

# %% [markdown]
# ## Each number becomes nearly Gaussian
#
# Divide the key by its length, so that it is a point on a sphere. Rotate it at random. Then each coordinate is a sum
# of many small random parts, and such sums follow the bell curve. With *d* channels, the curve is close to N(0, 1/d):
# mean 0, variance 1/d. The picture shows the numbers of all keys of this layer, under 32 rotations that are drawn
# from *all* rotations (`kind="qr"`), and under 32 random Walsh-Hadamard rotations.

# %%
unit = keys.flatten(0, 1)[::4]
unit = unit / unit.norm(dim=1, keepdim=True)
many, walsh = (
    torch.cat([(unit @ rotation_matrix(dim, seed=seed, kind=kind).T).flatten() for seed in range(32)])
    for kind in ("qr", "hadamard")
)
limit = 4.5 / math.sqrt(dim)


# %% tags=["hide-input"]
def bell(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(-x * x * dim / 2) * math.sqrt(dim / (2 * math.pi))


def draw_bell(figure, c):
    axis = figure.subplots()
    x = torch.linspace(-limit, limit, 300)
    axis.hist(unit.flatten().clamp(-limit, limit), bins=90, density=True, color=c.red, alpha=0.45)
    axis.hist(many, bins=90, range=(-limit, limit), density=True, color=c.blue, alpha=0.6)
    axis.hist(walsh, bins=90, range=(-limit, limit), density=True, histtype="step", color=c.green, lw=1.8)
    axis.plot(x, bell(x), color=c.ink, lw=2)
    axis.annotate("the curve N(0, 1/64)", (0.16, bell(torch.tensor(0.16))), xytext=(0.24, 2.4), color=c.ink,
                  arrowprops={"arrowstyle": "-", "color": c.ink})  # fmt: skip
    axis.text(-0.2, 2.0, "filled: after rotations\ndrawn from all", color=c.blue, ha="right")
    axis.text(-0.2, 1.1, "line: after Walsh-\nHadamard rotations", color=c.green, ha="right")
    axis.text(0.56, 0.93, "before: most numbers tiny,", color=c.red, transform=axis.transAxes)
    axis.text(limit, 1.0, "a few huge\n(all beyond\nthe edge)", color=c.red, ha="right")
    axis.set(xlabel="number of a key of length 1", yticks=[], xlim=(-limit, limit * 1.02))
    axis.spines["left"].set_visible(False)


show(draw_bell, "2-bell", "Rotated numbers follow the bell curve with variance 1/64; raw ones do not", (8, 3.6))


# %%
def kurtosis(x: torch.Tensor) -> float:
    """4 moments: 3 for the bell curve, more where there are outliers."""
    return ((x - x.mean()) ** 4).mean().item() / x.var().item() ** 2


rows = [("before", unit), ("after Walsh-Hadamard", walsh), ("after a rotation drawn from all", many)]
table(
    ["", "variance, times d", "kurtosis (outliers make it large)"],
    [*((name, dim * x.square().mean().item(), kurtosis(x)) for name, x in rows), ("the bell curve", 1.0, 3.0)],
)

# %% tags=["remove-input"]
say(
    "The Walsh-Hadamard rotation is the cheap one, and it is not quite as random: what comes from a single strong "
    "channel has the same "
    f"size everywhere and only random signs. Its kurtosis is {kurtosis(walsh):.2f}, below that of the bell curve. "
    "For rounding this does no harm, because there are no outliers."
)
claim(kurtosis(unit) > 6, model=True)
claim(abs(kurtosis(many) - 3) < 0.3 and kurtosis(walsh) < kurtosis(many))

# %% [markdown]
# ## Does rounding get better?
#
# The same min-max rounding as in lesson 1, with and without the rotation before it. The error is
# |x - x'|² / |x|², where x' is the rounded vector, over all heads of all layers.

# %%
whole = rotation_matrix(dim, seed=0)
rows = []
for bits in (4, 3, 2):
    plain = sum(relative_error(k, round_trip(Uniform(bits=bits), k)) for _, k, _ in captured) / len(captured)
    turned = sum(
        relative_error(k @ whole.T, round_trip(Uniform(bits=bits), k @ whole.T)) for _, k, _ in captured
    ) / len(captured)
    rows.append((bits, plain, turned, plain / turned))
table(["bits", "error without rotation", "error with rotation", "times less"], rows)

# %% tags=["remove-input"]
claim(all(row[3] > 1.3 for row in rows))

# %% [markdown]
# ## A story from the web: "after the rotation, coordinates are Gaussian and independent"
#
# Look again at the sentence above: *under random rotations*. A real cache draws **one** rotation and uses it for
# every token. If all keys share a common part, then so do all rotated keys. Each coordinate then has its own mean,
# which is far from 0.

# %% tags=["hide-input"]
alone = rotated / key.norm(dim=1, keepdim=True)
worst = int((alone.mean(0).abs() / alone.std(0)).argmax())


def draw_one(figure, c):
    axis = figure.subplots()
    x = torch.linspace(-limit, limit, 300)
    axis.hist(alone[:, worst], bins=60, range=(-limit, limit), density=True, color=c.orange, alpha=0.7)
    axis.plot(x, bell(x), color=c.ink, lw=2)
    mean = alone[:, worst].mean().item()
    top = axis.get_ylim()[1]
    axis.text(
        mean, top, f"what it is: coordinate {worst} of {len(key):,} real keys", color=c.orange, ha="center", va="bottom"
    )
    axis.text(-0.14 if mean > 0 else 0.14, 2.6, "what the\nstory says", ha="right" if mean > 0 else "left")
    axis.set(xlabel="number of a key of length 1, one rotation", yticks=[], xlim=(-limit, limit))
    axis.spines["left"].set_visible(False)


show(
    draw_one,
    "2-one",
    "One rotated coordinate over all tokens: a narrow hump far from zero, not the bell curve",
    (8, 3.0),
)

# %%
shift = (alone.mean(0).abs() / alone.std(0)).median().item()
shared = [k.mean(1).square().sum().item() / k.square().sum(-1).mean(1).sum().item() for _, k, _ in captured]

# %% tags=["remove-input"]
say(
    f"In this head, the mean of a typical rotated coordinate is {shift:.1f} of its standard deviations away from 0. "
    "In the whole model, "
    f"{100 * sum(shared) / len(shared):.0f} % of the energy of the keys is one vector that all tokens of a head share. "
    "A rotation turns this vector, but cannot remove it, and we spend bits on it for every token."
)
claim(sum(shared) / len(shared) > 0.3)

# %% [markdown]
# **What to remember.** A rotation loses nothing and spreads a spike over all channels. One min-max rounding then
# serves all of them. Since we know the shape of the numbers now, we can do better than evenly spread slots: [lesson
# 3](3_lloyd_max.py). What all keys share is taken out in [lesson 6](6_conditioning.py).
