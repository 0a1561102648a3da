"""Finds the YAML files that the package ships."""

from importlib.resources import files
from pathlib import Path


def config_path(*parts: str) -> Path:
    """Path of a file or folder under ``configs/``. It need not exist.

    A wheel carries the folder as package data (``turboquant_hf/_configs``, see pyproject.toml); a source
    checkout and an editable install read the checkout's own ``configs/``.

    Equivalent to ``Path("configs", *parts)`` in the root of a checkout.
    """
    package = Path(str(files("turboquant_hf")))
    shipped = package / "_configs"
    root = shipped if shipped.is_dir() else package.parent / "configs"
    return root.joinpath(*parts)
