"""Groups of cells, read from a settings file and narrowed by flags."""

import pytest
import yaml

from tests.support.toys import TOY, toy
from turboquant_hf.config import load_preset
from turboquant_hf.evaluation.benchmark import caches, settings
from turboquant_hf.evaluation.benchmark.calls import VARIANTS
from turboquant_hf.resources import config_path


def test_shipped_settings_name_only_what_exists():
    data = yaml.safe_load(config_path("eval", "benchmark.yaml").read_text())
    for section in ("full", "quick", "cpu"):
        for level, groups in settings.read_groups(data, section).items():
            assert groups, (section, level)
            for group in groups:
                assert set(group.caches) <= set(VARIANTS if level == "generate" else caches.RIVALS)
                assert set(group.static_cells) <= set(group.cells)
                assert group.shape.heads % group.shape.kv_heads == 0
                for preset in group.presets:
                    load_preset(preset).validate(group.shape.head_dim)
                    assert all(tokens >= load_preset(preset).first_encode for _, tokens in group.cells)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cells": [[1, 0]]}, "from 1"),
        ({"cells": [[1, 2, 3]]}, r"\[batch, tokens\]"),
        ({"dtype": "int8"}, "bfloat16"),
        ({"shape": "none"}, "toy"),
        ({"token": 4}, "cells"),
    ],
)
def test_read_groups_names_what_is_wrong(change, message):
    sizes = {name: getattr(TOY, name) for name in list(settings.Shape.__annotations__)[1:]}
    data = {"shapes": {"toy": sizes}, "full": {"kernel": [{"shape": "toy", "cells": [[1, 4]], **change}]}}
    with pytest.raises(ValueError, match=message):
        settings.read_groups(data, "full")


def test_narrow_replaces_and_merges():
    shapes = {"toy": TOY, "other": settings.Shape("other", 8, 1, 1, 8, 8, 8)}
    groups = [toy(cells=((1, 512), (2, 1024)), static_cells=((1, 512),)), toy(cells=((4, 512),))]
    found = settings.narrow(groups, shapes, tokens=[256])
    assert [group.cells for group in found] == [((1, 256), (2, 256)), ((4, 256),)]
    assert found[0].static_cells == found[0].cells and not found[1].static_cells
    merged = settings.narrow(groups, shapes, batch=[1], tokens=[256], presets=["k3v3"], dtype="float16")
    assert {(group.cells, group.presets, group.dtype) for group in merged} == {(((1, 256),), ("k3v3",), "float16")}
    borrowed = settings.narrow(groups, shapes, names=["other"])
    assert [(group.shape.name, group.cells) for group in borrowed] == [("other", groups[0].cells)]
    with pytest.raises(ValueError, match="toy, other"):
        settings.narrow(groups, shapes, names=["absent"])
