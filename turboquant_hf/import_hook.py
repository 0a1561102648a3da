"""Registers the cache and the attention when transformers loads its modules for them, and not earlier.

`import transformers` loads neither models nor generation. These take seconds, and the first model loads them.
Registering at `import turboquant_hf` would load them early. A finder on `sys.meta_path` waits for them instead:

    transformers.generation.configuration_utils   -> the names are added to its tables, nothing else is imported
    transformers.modeling_utils, .generation.utils -> `register_attention`, `register_cache`,
                                                      `register_steps`

The second line also waits until no module of `WATCHED` is half loaded, because registering imports all of them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from turboquant_hf.names import add_cache_names

TABLES = "transformers.generation.configuration_utils"
NEEDED = ("transformers.modeling_utils", "transformers.generation.utils")
OURS = ("turboquant_hf.attention", "turboquant_hf.cache", "turboquant_hf.generation")
WATCHED = (TABLES, *NEEDED, *OURS)


class RegisterLater(MetaPathFinder):
    """A finder for the modules of `WATCHED`: finds them as Python does, and notes when loading begins and ends."""

    def __init__(self) -> None:
        self.loading: set[str] = set()
        self.registered = False
        self._lock = threading.RLock()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in WATCHED:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, found), None)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            self.loading.add(name)
            try:
                execute(module)
            finally:
                self.loading.discard(name)
            self.loaded(name)

        spec.loader.exec_module = exec_module
        return spec

    def loaded(self, name: str) -> None:
        """Register what is possible now that the module `name` is loaded."""
        if name == TABLES:
            add_cache_names(sys.modules[name])
        elif not self.loading:
            self.register()

    def register(self) -> None:
        with self._lock:
            if self.registered:
                return
            self.registered = True  # the imports below call this method again
            try:
                for needed in NEEDED:
                    import_module(needed)
            except ImportError:
                # A half-loaded part of transformers led here. A module of `NEEDED` is loaded later, and registers then.
                self.registered = False
                return
            attention, cache, generation = map(import_module, OURS)
            attention.register_attention()
            cache.register_cache()
            generation.register_steps()


def install() -> None:
    """Wait for transformers' modules; register at once for those that are loaded already. Idempotent."""
    if any(isinstance(finder, RegisterLater) for finder in sys.meta_path):
        return
    finder = RegisterLater()
    sys.meta_path.insert(0, finder)
    for name in (TABLES, *NEEDED):
        if name in sys.modules:
            finder.loaded(name)
