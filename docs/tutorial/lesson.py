"""What the six lessons share: the packaged model's keys and values, its answers through a cache, and pictures.

A lesson is a Python file in jupytext's percent format. It runs as it stands (`python docs/tutorial/1_naive.py`), opens
as a notebook in Jupyter and VS Code, and becomes a page of the site (`bash scripts/docs.sh`).

Settings, from the environment:
    TUTORIAL_QUICK    any text: a small setting for tests (few tokens, the model's first layers)
    TUTORIAL_FIGURES  folder of the pictures; docs/_build/figures where it is not set
"""

from __future__ import annotations

import base64
import html
import io
import os
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle  # noqa: F401  (lessons draw with it)

from turboquant_hf import CachePreset, load_preset
from turboquant_hf.evaluation import capture, errors, load_model, measure, packaged_text, round_trip  # noqa: F401

QUICK = bool(os.environ.get("TUTORIAL_QUICK"))
TOKENS = 512 if QUICK else 1024
"""Tokens that the model reads: of the captured keys, and of the window that a cache is measured on."""
START = 384
"""Tokens that are read raw and packed then; the answers to what follows are scored."""
QUICK_LAYERS = 6
LAYER, HEAD = (2, 0) if QUICK else (10, 1)
"""The head that lessons look at: an ordinary one, with clear outliers."""
HERE = Path(__file__).parent
FIGURES = Path(os.environ.get("TUTORIAL_FIGURES") or HERE.parent / "_build" / "figures")
THEMES = {
    "light": {
        "paper": "#ffffff", "ink": "#1f2328", "faint": "#59636e", "grid": "#d1d9e0",
        "blue": "#0969da", "orange": "#bc4c00", "green": "#1a7f37", "red": "#cf222e", "map": "RdBu_r",
    },
    "dark": {
        "paper": "#131416", "ink": "#f0f6fc", "faint": "#9198a1", "grid": "#3d444d",
        "blue": "#58a6ff", "orange": "#f0883e", "green": "#3fb950", "red": "#ff7b72", "map": "berlin",
    },
}  # fmt: skip


@lru_cache(maxsize=1)
def model_and_tokenizer() -> tuple[Any, Any]:
    """SmolLM2-135M in float32 on the CPU; its first layers alone in the small setting."""
    model, tokenizer = load_model(attn_implementation="turboquant")
    if QUICK:
        model.model.layers = model.model.layers[:QUICK_LAYERS]
        model.config.num_hidden_layers = QUICK_LAYERS
        model.config.layer_types = None
    return model, tokenizer


@lru_cache(maxsize=4)
def tokens(part: int = 0) -> torch.Tensor:
    """Token ids [1, TOKENS] of the text that every CPython carries (Python's own reference); parts do not overlap."""
    _, tokenizer = model_and_tokenizer()
    text = packaged_text()[40_000 * part :][: 12 * TOKENS]
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :TOKENS]


@lru_cache(maxsize=4)
def captured(part: int = 0) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(queries, keys, values) of every layer, float32 [3 KV heads, tokens, 64 channels], without the first 4 tokens.

    Keys are as attention sees them, position included. Three query heads read each KV head: their queries lie end to
    end, so that they have as many heads as the keys.
    """
    return capture(model_and_tokenizer()[0], tokens(part))


def preset(name: str, keys: Any = "lossless", values: Any = "lossless", **options: Any) -> CachePreset:
    """A preset that packs every token before it is read, so that what it costs is seen."""
    everything = {"sinks": 0, "recent_window": 0, "min_statistics": 256, "encode_first": True}
    return CachePreset(name=name, keys=keys, values=values, **{**everything, **options})


def shipped(name: str, **options: Any) -> CachePreset:
    """A preset of `configs/cache`, with every token packed before it is read."""
    everything = {"recent_window": 0, "min_statistics": 256, "encode_first": True, **options}
    return load_preset(name, **everything)


def answers(presets: Sequence[CachePreset]) -> dict[str, dict[str, float]]:
    """Name -> what the model answers through each cache, beside the uncompressed model.

    `kl` is the mean KL divergence per token in nats, `top1` the share of tokens with the same most likely successor.
    What follows the first `START` tokens is scored, while every token is packed before it is read.
    """
    model, _ = model_and_tokenizer()
    _, rows = measure(model, [tokens()], presets, start=START)
    return {row["preset"]: row for row in rows}


def late_queries(layer: Sequence[torch.Tensor], step: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Every step-th query of the last half of the tokens, divided by sqrt(d), and which keys each of them may see.

    Returns: float32 [3 KV heads, n, 64], bool [n, tokens].
    """
    queries, keys, _ = layer
    tokens, dim = keys.shape[1:]
    places = torch.arange(tokens // 2, tokens, step)
    by_head = queries.unflatten(1, (-1, tokens))[:, :, places]  # [3, query heads, places, 64]
    seen = (torch.arange(tokens) <= places[:, None]).repeat(by_head.shape[1], 1)
    return by_head.flatten(1, 2) / dim**0.5, seen


def attention(queries: torch.Tensor, keys: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Attention weights [heads, n, tokens] of queries from `late_queries`."""
    return (queries @ keys.transpose(1, 2)).masked_fill(~seen, -torch.inf).softmax(-1)


def relative_error(vectors: torch.Tensor, decoded: torch.Tensor) -> float:
    """|x - x^|^2 / |x|^2 over all vectors."""
    return ((vectors - decoded).square().sum() / vectors.square().sum()).item()


def claim(holds: bool | torch.Tensor, *, model: bool = False) -> None:
    """Stop where a sentence of the page would be wrong; `model` claims need the whole model, so not in tests."""
    if not holds and not (model and QUICK):
        raise AssertionError("the page claims what its figures do not show")


# What follows shows things: as HTML inside a notebook, as files and plain text otherwise.


def in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def say(text: str) -> None:
    """A paragraph (Markdown) that holds computed numbers."""
    if in_notebook():
        from IPython.display import Markdown, display

        display(Markdown(text))
    else:
        print(text + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Rows as a Markdown table; floats get three significant digits."""
    lines = [header, ["---"] * len(header), *([cell(x) for x in row] for row in rows)]
    say("\n".join("| " + " | ".join(line) + " |" for line in lines))


def cell(x: Any) -> str:
    if not isinstance(x, float):
        return str(x)
    return f"{x:.3g}" if abs(x) < 1000 and (abs(x) >= 1e-3 or x == 0) else f"{x:,.0f}" if abs(x) >= 1 else f"{x:.1e}"


Draw = Callable[[Figure, SimpleNamespace], None]


def show(draw: Draw, name: str, alt: str, size: tuple[float, float] = (8.0, 3.6)) -> None:
    """Draw a picture in the light and in the dark theme. `alt` says in words what it shows."""
    pictures = {theme: _png(draw, theme, size) for theme in THEMES}
    FIGURES.mkdir(parents=True, exist_ok=True)
    for theme, data in pictures.items():
        (FIGURES / f"{name}-{theme}.png").write_bytes(data)
    if in_notebook():
        _html(_images(pictures, alt))
    else:
        print(f"[{FIGURES / name}-*.png: {alt}]\n")


def slider(draws: Sequence[Draw], marks: Sequence[str], title: str, name: str, alt: str, size=(8.0, 3.6)) -> None:
    """One picture per position of a slider, without a server: the page holds all of them."""
    frames = [{theme: _png(draw, theme, size) for theme in THEMES} for draw in draws]
    FIGURES.mkdir(parents=True, exist_ok=True)
    for index, frame in enumerate(frames):
        for theme, data in frame.items():
            (FIGURES / f"{name}-{index}-{theme}.png").write_bytes(data)
    if not in_notebook():
        print(f"[{FIGURES / name}-*.png: {alt}]\n")
        return
    middle = len(frames) // 2
    parts = [
        f'<div data-frame="{i}"{"" if i == middle else " hidden"}>{_images(frame, f"{alt}; {title}: {mark}")}</div>'
        for i, (frame, mark) in enumerate(zip(frames, marks, strict=True))
    ]
    names = html.escape("|".join(marks))
    script = (
        "const box=this.closest('[data-slider]');"
        "box.querySelectorAll('[data-frame]').forEach(f=>f.hidden=f.dataset.frame!==this.value);"
        "box.querySelector('output').textContent=box.dataset.marks.split('|')[this.value]"
    )
    _html(
        f'<div data-slider data-marks="{names}">{"".join(parts)}<label style="display:block;text-align:center">'
        f'{html.escape(title)}: <input type="range" min="0" max="{len(frames) - 1}" value="{middle}" '
        f'style="width:50%;vertical-align:middle" oninput="{script}"> <output style="font-weight:bold">'
        f"{html.escape(marks[middle])}</output></label></div>"
    )


def _png(draw: Draw, theme: str, size: tuple[float, float]) -> bytes:
    colors = THEMES[theme]
    ink, paper, grid = colors["ink"], colors["paper"], colors["grid"]
    style = {
        "figure.facecolor": paper, "axes.facecolor": paper, "axes.edgecolor": grid, "axes.labelcolor": ink,
        "axes.titlecolor": ink, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
        "axes.titlesize": 11, "text.color": ink, "xtick.color": ink, "ytick.color": ink, "grid.color": grid,
        "font.size": 10,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, SimpleNamespace(**colors))
        out = io.BytesIO()
        figure.savefig(out, dpi=130, metadata={"Software": None})
    return out.getvalue()


def _images(pictures: dict[str, bytes], alt: str) -> str:
    """Two pictures of which the site's theme hides one (Furo's classes)."""
    return "".join(
        f'<img class="only-{theme}" alt="{html.escape(alt)}" style="width:100%" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        for theme, data in pictures.items()
    )


def _html(text: str) -> None:
    from IPython.display import HTML, display

    display(HTML(text))
