"""The site: Sphinx with MyST pages and executed lessons. `bash scripts/docs.sh` builds it into docs/_build/html."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
# Lessons run in a kernel of their own, which finds the checkout by this.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from turboquant_hf.version import __version__  # noqa: E402

project = "turboquant_hf"
author = "the turboquant_hf authors"
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "conf.py", "figures", "tutorial/lesson.py"]

# Pages
myst_heading_anchors = 3

PICTURE = re.compile(r'<picture>\s*<source .* srcset="(.+)">\s*<img alt="(.+)" src="(.+)">\s*</picture>')

# Lessons: Python files in jupytext's percent format. The cache runs a lesson again only when its cells have changed.
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = os.environ.get("DOCS_EXECUTION", "cache")
nb_execution_cache_path = str(HERE / "_build" / "cells")
nb_execution_timeout = 1200
nb_execution_raise_on_error = True
nb_render_markdown_format = "myst"  # tables in what cells print
nb_output_stderr = "remove"  # on a new machine, the packaged model says there that it is being converted

# API reference. Single backticks in docstrings are code.
default_role = "code"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"turboquant_hf {__version__}"
html_copy_source = False
html_show_copyright = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0969da", "color-brand-content": "#0969da"},
    "dark_css_variables": {"color-brand-primary": "#58a6ff", "color-brand-content": "#58a6ff"},
}

linkcheck_timeout = 20
linkcheck_anchors = False


def plain_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings here are plain text: make reStructuredText of what it would misread."""
    out = (
        ["\\ "] if what in ("attribute", "data", "property") else []
    )  # else the words before a first colon are taken for a type
    inside = False
    for line in lines:
        label = re.match(r"(Returns|Raises|Example|Equivalent to): ?(?=\S)", line)
        inside = bool(label) or (inside and line.startswith(" "))
        line = re.sub(r"[*|]", r"\\\g<0>", line)  # shapes such as [B, *size] and norms, never markup
        if label:
            out += ["", f"**{label[1]}:** {line[label.end() :]}"]
        else:
            out.append(line.strip() if inside else line)
    lines[:] = out


def follow_theme(app, page: str, source: list[str]) -> None:
    """Make two images of each `<picture>`, as GitHub reads it: the site shows the one of the theme that is chosen."""

    def images(picture: re.Match[str]) -> str:
        dark, alt, light = picture.groups()
        themes = (("light", light), ("dark", dark))
        return "\n\n".join(f"```{{image}} {file}\n:alt: {alt}\n:class: only-{name}\n```" for name, file in themes)

    source[0] = PICTURE.sub(images, source[0])


def setup(app) -> None:
    app.connect("source-read", follow_theme)
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)  # before napoleon's
