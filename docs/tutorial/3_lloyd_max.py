# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {name: python3, display_name: Python 3, language: python}
# ---

# %% [markdown]
# # 3. Lloyd-Max, and what "PolarQuant" is and is not
#
# After a rotation, we know the shape of the numbers before we see them ([lesson 2](2_rotation.py)). So the slots can
# be placed once, for the known shape, and nothing about them must be stored with the data. This lesson places them,
# checks the error against theory, and sorts out two names and one number that the web gets wrong.

# %%
import math

import lesson
import torch
from lesson import claim, relative_error, round_trip, say, show, slider, table

from turboquant_hf.primitives import distortion, from_polar, lloyd_max, rotation_matrix, to_polar, uniform
from turboquant_hf.quantizers import MSE, Outlier, Polar

captured = lesson.captured()
queries, keys, values = captured[lesson.LAYER]
dim = keys.shape[2]

# %% [markdown]
# ## Slots where the numbers are
#
# A good set of slots has two properties. Each number goes to the nearest slot. Each slot lies at the mean of the
# numbers that go to it. Repeat these two steps, and the slots move to the best places. This is the **Lloyd-Max**
# algorithm, from 1957. `lloyd_max` runs it on the exact curve of a rotated coordinate, not on data.
#
# Move the slider: each bit doubles the number of slots.


# %% tags=["hide-input"]
def curve(x: torch.Tensor) -> torch.Tensor:
    """The density of a coordinate of a random point of the sphere, scaled to variance 1."""
    height = (1 - x * x / dim).clamp(min=0) ** ((dim - 3) / 2)
    return height / (height.sum() * (x[1] - x[0]))


def draw_levels(bits: int):
    def draw(figure, c):
        axis = figure.subplots()
        book = lloyd_max(bits, dim)
        x = torch.linspace(-4, 4, 801)
        y = curve(x)
        edges = [-4, *book.thresholds, 4]
        for i, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            inside = (x >= low - 0.005) & (x <= high + 0.005)
            axis.fill_between(x[inside], y[inside], color=c.blue, alpha=0.35 if i % 2 else 0.15, lw=0)
        axis.plot(x, y, color=c.ink, lw=1.5)
        for level in book.levels:
            axis.plot([level, level], [0, -0.03], color=c.orange, lw=2, clip_on=False)
        axis.text(0, -0.05, f"{2**bits} slots", color=c.orange, ha="center", va="top")
        axis.text(4, 0.40, f"{bits} bit{'s' * (bits > 1)}", ha="right", fontsize=17)
        axis.text(4, 0.35, f"error left: {100 * distortion(book, dim):.1f} %", ha="right", color=c.blue, fontsize=12)
        axis.set(xlim=(-4, 4), ylim=(-0.085, 0.45), yticks=[], xlabel="rotated number, in units of its typical size")
        axis.spines[["left", "bottom"]].set_visible(False)
        axis.text(-2.1, 0.2, "how often each\nnumber occurs", ha="right")

    return draw


slider(
    [draw_levels(b) for b in range(1, 6)],
    ["1 bit", "2 bits", "3 bits", "4 bits", "5 bits"],
    "width of a code",
    "3-levels",
    "The curve of a rotated number, cut into slots: narrow where numbers are frequent, wide where they are rare",
)

# %%
rows = []
for bits in range(1, 6):
    best, even = distortion(lloyd_max(bits, dim), dim), distortion(uniform(bits, dim), dim)
    rows.append((bits, 2**bits, best, even, f"{100 * (even / best - 1):.0f} %"))
table(["bits", "slots", "error of Lloyd-Max", "error of the best evenly spaced slots", "more"], rows)

# %% tags=["remove-input"]
say(
    "The slots for the known curve beat even the *best* evenly spaced slots, and by more with more bits. Each "
    f"further bit divides the error by about {rows[2][2] / rows[3][2]:.1f}."
)
claim(all(row[2] <= row[3] * 1.0001 for row in rows))

# %% [markdown]
# ## The whole method, by hand
#
# The paper [TurboQuant](https://arxiv.org/abs/2504.19874) calls this method **TurboQuant_mse**. It has four steps:
# take the length, rotate, round each number to its slot, store the length and the codes. Here it is by hand, beside
# the library's quantizer `mse`.

# %%
key = keys[lesson.HEAD]
rotation, book = rotation_matrix(dim, seed=0), lloyd_max(4, dim)

length = key.norm(dim=1, keepdim=True)  # one number per key
y = key @ rotation.T / length * math.sqrt(dim)  # numbers of variance 1
codes = book.encode(y)  # 4 bits per number
by_hand = book.decode(codes) * length / math.sqrt(dim) @ rotation

by_library = round_trip(MSE(bits=4, scale="norm"), keys)[lesson.HEAD]
difference = ((by_hand - by_library).norm() / key.norm()).item()

# %% tags=["remove-input"]
say(
    f"The relative difference between the two is {difference:.1e}. It comes from the length, which the library "
    "stores in 16 bits."
)
claim(difference < 1e-3)

# %% [markdown]
# ## Theory and real keys
#
# The paper proves an upper bound for this method, and a lower bound for **any** method of so many bits.


# %%
def measured(quantizer, side: int) -> float:
    """Mean error over all layers; side 1: keys, 2: values."""
    return sum(relative_error(layer[side], round_trip(quantizer, layer[side])) for layer in captured) / len(captured)


widths = (1, 2, 3, 4)
on_keys = [measured(MSE(bits=b, scale="norm"), 1) for b in widths]
on_values = [measured(MSE(bits=b, scale="norm"), 2) for b in widths]
exact = [distortion(lloyd_max(b, dim), dim) for b in widths]
upper = [math.sqrt(3) * math.pi / 2 * 4.0**-b for b in widths]
lower = [4.0**-b for b in widths]
table(
    ["bits", "no method is below", "Lloyd-Max, in theory", "real keys", "real values", "the paper's upper bound"],
    list(zip(widths, lower, exact, on_keys, on_values, upper, strict=True)),
)


# %% tags=["hide-input"]
def draw_theory(figure, c):
    axis = figure.subplots()
    axis.fill_between(widths, lower, upper, color=c.grid, alpha=0.6, lw=0)
    axis.plot(widths, exact, color=c.ink, lw=1.5)
    axis.scatter(widths, on_keys, color=c.blue, s=70, zorder=3)
    axis.scatter(widths, on_values, color=c.orange, s=22, zorder=4)
    axis.annotate("upper edge: the paper's bound", (1.45, upper[0] * 4**-0.45), xytext=(1.7, 0.62), color=c.faint,
                  arrowprops={"arrowstyle": "-", "color": c.faint})  # fmt: skip
    axis.annotate("lower edge: no method can be below", (1.9, 4**-1.9), xytext=(1.02, 0.009), color=c.faint,
                  arrowprops={"arrowstyle": "-", "color": c.faint})  # fmt: skip
    axis.annotate("line: theory of Lloyd-Max", (3.5, (exact[2] * exact[3]) ** 0.5), xytext=(3.3, 0.07), color=c.ink,
                  arrowprops={"arrowstyle": "-", "color": c.ink})  # fmt: skip
    axis.annotate("large dots: real keys", (2, on_keys[1]), xytext=(2.35, 0.18), color=c.blue,
                  arrowprops={"arrowstyle": "-", "color": c.blue})  # fmt: skip
    axis.text(2.35, 0.27, "small dots: real values", color=c.orange)
    axis.set(yscale="log", xticks=widths, xlabel="bits per number", ylabel="error of the vectors", ylim=(0.0025, 1))


show(draw_theory, "3-theory", "The error of real keys and values lies on the line that theory predicts", (8, 3.8))

# %%
off = max(abs(found / theory - 1) for found, theory in zip(on_keys + on_values, exact * 2, strict=True))

# %% tags=["remove-input"]
say(
    f"Real keys and values differ from the theory by at most {100 * off:.0f} %, and no data was needed to make the "
    "slots. The error hardly depends on what the model wrote into the cache. This is the strength of the method."
)
claim(off < 0.25, model=True)

# %% [markdown]
# ## A story from the web: "TurboQuant is PolarQuant plus QJL"
#
# Many posts and some code call the method above "PolarQuant". It is not. **PolarQuant** is [another
# paper](https://arxiv.org/abs/2502.02617) with another idea. It also rotates first. Then it turns pairs of numbers
# into an **angle** and a radius, pairs of radii into an angle and a radius, and so on. It rounds the angles. In the
# method above, there is no angle anywhere: you have just seen all of its steps.

# %% tags=["hide-input"]
four = torch.tensor([3.0, 4.0, 6.0, 8.0])
sample = torch.tensor([-1.3, 0.2, 0.9, -0.4])
named = [f"slot {code}" for code in book.encode(sample).tolist()]
radius, angles = to_polar(four)


def draw_polar(figure, c):
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    places = {"x": [0.06, 0.36, 0.66, 0.96], "r": [0.21, 0.81], "top": [0.51]}
    first = torch.hypot(four[0::2], four[1::2])
    box = {"boxstyle": "round,pad=0.35", "facecolor": c.paper}
    for x, value in zip(places["x"], four, strict=True):
        left.text(x, 0.1, f"{value:g}", ha="center", va="center", fontsize=13, bbox={**box, "edgecolor": c.ink})
    for x, value, angle in zip(places["r"], first, angles[0], strict=True):
        for child in (x - 0.15, x + 0.15):
            left.plot([child, x], [0.17, 0.43], color=c.faint, lw=1, zorder=0)
        left.text(x, 0.5, f"radius {value:g}", ha="center", va="center", bbox={**box, "edgecolor": c.faint})
        left.text(x, 0.27, f"angle {math.degrees(angle):.0f}°", ha="center", va="center", color=c.orange)
    for child in places["r"]:
        left.plot([child, 0.51], [0.57, 0.85], color=c.faint, lw=1, zorder=0)
    left.text(0.51, 0.92, f"radius {radius:.1f}", ha="center", va="center", bbox={**box, "edgecolor": c.ink})
    left.text(0.51, 0.68, f"angle {math.degrees(angles[1][0]):.0f}°", ha="center", va="center", color=c.orange)
    left.set(xlim=(-0.05, 1.07), ylim=(0, 1.05), title="PolarQuant: stores the angles and the top radius")
    right.text(0.5, 0.80, "     ".join(f"{x:.1f}" for x in sample.tolist()), ha="center", fontsize=13)
    right.annotate("", (0.5, 0.45), xytext=(0.5, 0.72), arrowprops={"arrowstyle": "->", "color": c.faint})
    right.text(0.54, 0.57, "nearest slot", color=c.blue)
    right.text(0.5, 0.30, "   ".join(named), ha="center", fontsize=12, color=c.blue)
    right.set(xlim=(0, 1), ylim=(0, 1.05), title="TurboQuant_mse: each number alone")
    for axis in (left, right):
        axis.axis("off")


show(
    draw_polar,
    "3-polar",
    "PolarQuant turns four numbers into three angles and a radius; TurboQuant_mse rounds each number alone",
    (8, 3.2),
)

# %%
back = from_polar(radius, angles)
claim(torch.allclose(back, four, atol=1e-5))
say(
    "The tree can be undone: from the angles and the radius come "
    f"{', '.join(f'{x:g}' for x in back.round(decimals=4))} again."
)

answers = lesson.answers([lesson.shipped(name) for name in ("paper-mse-3", "polar-4", "paper-mse-4")])
rows = [
    ("TurboQuant_mse, 3 bits", "paper-mse-3", MSE(bits=3, scale="norm")),
    ("PolarQuant", "polar-4", Polar()),
    ("TurboQuant_mse, 4 bits", "paper-mse-4", MSE(bits=4, scale="norm")),
]
errors = {name: measured(quantizer, 1) for _, name, quantizer in rows}
table(
    ["method", "real bits per number", "error of keys", "KL of the model", "same top token"],
    [
        (
            title,
            quantizer.bits_per_channel(dim, 128),
            errors[name],
            answers[name]["kl"],
            f"{100 * answers[name]['top1']:.0f} %",
        )
        for title, name, quantizer in rows
    ],
)
real = {name: quantizer.bits_per_channel(dim, 128) for _, name, quantizer in rows}

# %% tags=["remove-input"]
say(
    f"The two are different methods with different results. PolarQuant takes {real['polar-4']:.2f} bits and leaves "
    "an error of "
    f"{errors['polar-4']:.4f}. TurboQuant_mse leaves {errors['paper-mse-3']:.4f} with {real['paper-mse-3']:.2f} bits "
    f"and {errors['paper-mse-4']:.4f} with {real['paper-mse-4']:.2f}. Whoever mixes up the names mixes up these rows."
)
claim(errors["paper-mse-4"] < 0.5 * errors["polar-4"])
claim(real["paper-mse-3"] < real["polar-4"] < real["paper-mse-4"])

# %% [markdown]
# ## A story from the web: "2.5 bits"
#
# The paper reports results at 2.5 and 3.5 bits. The recipe is: 3 bits for a quarter of the channels (the strong
# ones), 2 bits for the others. Compute it yourself.

# %%
share = (32 * 3 + 96 * 2) / 128
real = {d: Outlier(bits=2, outlier_bits=3).bits_per_channel(d, 128) for d in (128, 64)}

# %% tags=["remove-input"]
say(
    f"32 channels of 3 bits and 96 channels of 2 bits are (32 x 3 + 96 x 2) / 128 = **{share:g} bits** of codes, not "
    "2.5. The two groups of "
    "channels are rotated apart, so each needs a length of its own, which takes 2 x 16 bits per vector. With them, "
    "the library counts "
    f"**{real[128]:g} bits** for heads of 128 channels and **{real[64]:g} bits** for heads of 64. So the name is right "
    "for 128 channels only, and only with the lengths counted. Whoever compares it with codes alone of another "
    "method compares two different things."
)
claim(share == 2.25 and real[128] == 2.5 and real[64] == 2.75)

# %% [markdown]
# **What to remember.** TurboQuant_mse is: rotate, divide by the length, Lloyd-Max slots. It is simple, needs no data
# and follows its theory. It is not PolarQuant. The paper's second method adds one bit of "QJL", which is said to make
# it lossless. It makes it worse: [lesson 4](4_qjl.py).
