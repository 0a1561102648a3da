# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {name: python3, display_name: Python 3, language: python}
# ---

# %% [markdown]
# # 1. Why naive quantization fails
#
# A language model keeps two vectors per token, per layer and per head: a **key** and a **value**. Together they are
# the *KV cache*. Each number takes 16 bits. This lesson tries the obvious way to make the cache smaller, which is to
# round the numbers, and looks at why it fails on real keys.
#
# All numbers on this page are computed on it, from the keys and values that SmolLM2-135M makes of a text. You need no
# GPU and no download: the model is a Python package.

# %%
import lesson
import torch
from lesson import claim, say, show, table

from turboquant_hf.quantizers import Uniform

captured = lesson.captured()
queries, keys, values = captured[lesson.LAYER]
key = keys[lesson.HEAD]  # one head: [tokens, 64 channels]

# %% tags=["remove-input"]
say(
    f"The model has {len(captured)} layers with {keys.shape[0]} KV heads each. A key has {keys.shape[2]} numbers. "
    f"One token therefore takes {len(captured) * 2 * keys.shape[0] * keys.shape[2] * 2:,} bytes of cache in 16 bit, "
    f"and a text of 8,192 tokens takes {len(captured) * 4 * keys.shape[0] * keys.shape[2] * 8192 / 2**20:.0f} MiB."
)

# %% [markdown]
# ## What are the 16 bits for?
#
# A 16-bit number (`bfloat16`) has one bit for the sign, 8 bits for the exponent (how large?) and 7 bits for the
# mantissa (which number of that size?). Here is the largest number in the keys of one head.

# %% tags=["hide-input"]
number = key.flatten()[key.abs().argmax()].bfloat16()
bits = f"{number.view(torch.int16).item() & 0xFFFF:016b}"


def draw_bits(figure, c):
    axis = figure.subplots()
    parts = [(0, 1, c.red, "sign:\nplus or minus"), (1, 9, c.blue, "exponent: how large?"),
             (9, 16, c.green, "mantissa: which number of this size?")]  # fmt: skip
    for start, stop, color, label in parts:
        for i in range(start, stop):
            axis.add_patch(lesson.Rectangle((i + 0.05, 0), 0.9, 0.9, facecolor="none", edgecolor=color, linewidth=2))
            axis.text(i + 0.5, 0.43, bits[i], ha="center", va="center", fontsize=16)
        axis.text((start + stop) / 2, -0.15, label, ha="center", va="top", color=color, fontsize=11)
    axis.set(xlim=(-0.6, 16.1), ylim=(-0.85, 1.0), title=f"The number {number.item():g} as a 16-bit float")
    axis.axis("off")


show(
    draw_bits, "1-bits", f"The 16 bits of {number.item():g}: one sign, eight exponent and seven mantissa bits", (8, 1.9)
)

# %% [markdown]
# Eight exponent bits can say 256 sizes, from 10⁻³⁸ to 10³⁸. How many of them do keys use? *Entropy* answers this: it
# is the number of bits that an ideal code would need.


# %%
def entropy(codes: torch.Tensor) -> float:
    share = codes.unique(return_counts=True)[1].double()
    share = share / share.sum()
    return -(share * share.log2()).sum().item()


every = torch.cat([layer[1].flatten() for layer in captured]).bfloat16().view(torch.int16).int() & 0xFFFF
exponent, mantissa = (every >> 7) & 0xFF, every & 0x7F
table(
    ["part of the 16 bits", "bits stored", "bits of information"],
    [("sign", 1, entropy(every >> 15)), ("exponent", 8, entropy(exponent)), ("mantissa", 7, entropy(mantissa))],
)

# %% tags=["remove-input"]
say(
    f"The exponent field stores 8 bits and holds {entropy(exponent):.1f} bits of information. So even a perfect "
    "**lossless** code that looks at one number at a time could shrink keys only from 16 bits to about "
    f"{entropy(every >> 15) + entropy(exponent) + entropy(mantissa):.0f}. To get to 4 bits, we have to round."
)
claim(entropy(exponent) < 4 and entropy(mantissa) > 6.5)

# %% [markdown]
# ## Rounding to 16 slots
#
# With 4 bits we can name 2⁴ = 16 **slots**. The obvious way, used by most "int4" caches, is *min-max*: put the first
# slot on the smallest number of a key, the last slot on the largest, and spread the others evenly. Each number is
# replaced by the nearest slot. Here are the 64 numbers of one real key.

# %% tags=["hide-input"]
token = int((key.abs().amax(1) / key.abs().median(1).values).argsort()[len(key) // 2])
one = key[token]
slots = torch.linspace(one.min(), one.max(), 16)
nearest = (one[:, None] - slots).abs().argmin(1)
fullest = nearest.bincount(minlength=16).sort(descending=True).values
crowd = fullest[:4].sum().item()
used = (fullest > 0).sum().item()
channel = int(one.abs().argmax())


def draw_slots(figure, c):
    axis = figure.subplots()
    for slot in slots:
        axis.axvline(slot, color=c.grid, lw=1.2, zorder=0)
    jitter = torch.rand(len(one), generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    axis.scatter(one, jitter, s=34, color=c.blue, zorder=2)
    axis.scatter([one[channel]], [jitter[channel]], s=90, color=c.red, zorder=3)
    side = -1 if one[channel] > 0 else 1
    axis.annotate(f"one outlier: channel {channel}", (one[channel], jitter[channel]), xytext=(14 * side, 0),
                  textcoords="offset points", ha="right" if side < 0 else "left", va="center", color=c.red)  # fmt: skip
    axis.text(one.median(), 1.08, f"{crowd} of 64 numbers share 4 slots", ha="center", color=c.blue)
    empty = slots[(nearest.bincount(minlength=16) == 0)]
    if len(empty):
        axis.text(empty.median(), -0.1, f"{16 - used} slots hold nothing", ha="center", va="top", color=c.faint)
    axis.set(ylim=(-0.25, 1.25), yticks=[], xlabel="the 64 numbers of one key; vertical lines are the 16 slots")
    axis.spines["left"].set_visible(False)


show(draw_slots, "1-slots", f"One outlier stretches the range, {16 - used} of 16 slots stay empty", (8, 2.8))

# %% tags=["remove-input"]
say(
    f"One number out of 64 decides where all slots lie. {crowd} numbers crowd into 4 slots, and {16 - used} of the "
    f"16 slots hold nothing. We pay for 4 bits and get {entropy(nearest):.1f} bits of information."
)
claim(crowd > 32, model=True)

# %% [markdown]
# ## The outliers are always in the same channels
#
# Is this key a bad example? The picture shows the keys of this head. Each row is a token, each column a channel. The
# outliers are stripes: they sit in the **same few channels** for every token.

# %% tags=["hide-input"]
rms = key.square().mean(0).sqrt()
strong = rms.argsort(descending=True)[:4].sort().values.tolist()


def draw_heat(figure, c):
    axis = figure.subplots()
    limit = key.abs().quantile(0.995).item()
    picture = axis.imshow(key[:256], aspect="auto", cmap=c.map, vmin=-limit, vmax=limit, interpolation="nearest")
    for i in strong:
        axis.annotate(f"{i}", (i, -0.5), xytext=(0, 3), textcoords="offset points", ha="center", color=c.red)
    axis.set(xlabel="channel", ylabel="token")
    axis.set_title("the four strongest channels are numbered", color=c.red, fontsize=10, pad=16)
    bar = figure.colorbar(picture, ax=axis, pad=0.01)
    bar.outline.set_visible(False)
    bar.set_label("value of the number")


show(draw_heat, "1-stripes", "Keys of one head: vertical stripes, a few channels are large for all tokens", (8, 4.2))

# %%
ratios = torch.cat(
    [(k.square().mean(1).sqrt().amax(1) / k.square().mean(1).sqrt().median(1).values) for _, k, _ in captured]
)
energy = rms.square().sort(descending=True).values

# %% tags=["remove-input"]
say(
    f"In this head, the strongest channel is {rms.max() / rms.median():.1f} times as large as a typical one, and the "
    "strongest "
    f"4 of 64 channels hold {100 * energy[:4].sum() / energy.sum():.0f} % of the energy (the sum of squares). "
    f"It is so in the whole model: the median over its {len(ratios)} KV heads is {ratios.median():.1f} times."
)
claim(ratios.median() > 3)

# %% [markdown]
# ## What it costs the model
#
# How good are the model's answers if it reads rounded keys and values? We compare the probabilities of the next token
# with those of the uncompressed model. **KL divergence** says how far they are apart: 0 means equal. "Same top token"
# is how often the most likely next token stays the same.

# %%
presets = [
    lesson.preset("8-bit min-max", Uniform(bits=8), Uniform(bits=8)),
    lesson.preset("4-bit min-max", Uniform(bits=4), Uniform(bits=4)),
    lesson.preset("3-bit min-max", Uniform(bits=3), Uniform(bits=3)),
    lesson.shipped("k3v3"),
]
answers = lesson.answers(presets)
table(
    ["cache", "bits per number, everything counted", "KL", "same top token"],
    [(name, (r["key_bits"] + r["value_bits"]) / 2, r["kl"], f"{100 * r['top1']:.0f} %") for name, r in answers.items()],
)
ratio = answers["4-bit min-max"]["kl"] / answers["8-bit min-max"]["kl"]

# %% tags=["remove-input"]
say(
    f"8 bits are nearly free. From 8 to 4 bits, the KL grows {ratio:,.0f} times. The last row is this library's "
    "preset `k3v3`. It takes "
    f"fewer bits than 4-bit min-max, and its KL is {answers['4-bit min-max']['kl'] / answers['k3v3']['kl']:.1f} "
    "times smaller. The next lessons build it up step by step."
)
claim(answers["k3v3"]["kl"] < answers["4-bit min-max"]["kl"] < answers["3-bit min-max"]["kl"], model=True)

# %% [markdown]
# ## A story from the web: "int4 keeps a quarter of the bits"
#
# It does not. Min-max stores two 16-bit numbers, the scale and the zero point, beside each group of codes. With
# groups of 64 numbers this is half a bit per number, and smaller groups cost more. Always ask for the bits *with
# everything counted*. In this library, every quantizer can say it:

# %%
table(
    ["codes", "numbers per group", "real bits per number"],
    [
        (f"{b} bits", group, Uniform(bits=b, group=group).bits_per_channel(64, 128))
        for b in (4, 3)
        for group in (64, 32, 16)
    ],
)

# %% tags=["remove-input"]
claim(Uniform(bits=4, group=64).bits_per_channel(64, 128) == 4.5)

# %% [markdown]
# **What to remember.** Keys have a few strong channels. A rounding that spreads its slots from the smallest to the
# largest number wastes most of them on empty space. [Lesson 2](2_rotation.py) removes the outliers without losing
# anything.
