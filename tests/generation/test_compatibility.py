"""Every cell of docs/compatibility.md: each family in each mode, or the error that says why not."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import parse

from tests.support.compatibility import AS_STATIC, MODES, REFUSED, families, generate
from tests.support.families import available, build, prompt
from tests.support.generating import turboquant
from turboquant_hf.cache import TurboQuantLayer

pytestmark = [
    pytest.mark.slow,  # whole generations, one per family and mode
    pytest.mark.skipif(
        parse(transformers.__version__) < parse("5.24"), reason="the page is about transformers 5.24 and later"
    ),
]
PACKED = {family.name: family for family in families() if family.packed}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PACKED)
def test_a_family_gives_dynamic_caches_tokens_in_every_mode(name, mode, monkeypatch):
    family = PACKED[name]
    if not available(family):
        pytest.skip(f"this transformers has no {family.kind}")
    tiles: dict[int, int] = {}
    commit = TurboQuantLayer.commit

    def counting(self):
        commit(self)
        if self.is_initialized:
            tiles[id(self)] = self.tiles[0].count

    monkeypatch.setattr(TurboQuantLayer, "commit", counting)
    pattern, _ = REFUSED.get((name, mode), (None, None))
    if pattern is not None:
        with pytest.raises(Exception, match=pattern):
            MODES[mode](build(family), prompt(family))
        return
    if (name, mode) in AS_STATIC:
        ours, static = turboquant(static=True), {"cache_implementation": "static"}
        assert torch.equal(*(generate(build(family), prompt(family), **cache) for cache in (ours, static)))
        return
    assert MODES[mode](build(family), prompt(family))
    assert len(tiles) >= family.packed and max(tiles.values()) >= 2


def test_refused_cells_are_cells():
    assert all(name in PACKED and mode in MODES for name, mode in (*REFUSED, *AS_STATIC))
