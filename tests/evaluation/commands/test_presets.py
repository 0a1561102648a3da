"""The table of presets."""

import pytest

from turboquant_hf import cli, preset_names
from turboquant_hf.evaluation.commands.presets import description


def test_presets_lists_every_shipped_preset(capsys):
    assert cli.main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"at 512", "at 2k", "at 32k"} <= {cell.strip() for cell in lines[0].split("  ")}
    for name in preset_names():
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        assert len(description(name)) > 15 and line.endswith(description(name))
    assert lines[2].startswith("k25v25 ") and any(line.startswith("k4v4 (default) ") for line in lines)


def test_presets_describes_a_users_own_file(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("# Raw keys,\n# for a try.\nkeys: lossless\n# not this\n")
    assert cli.main(["presets", "--preset", str(path), "--tokens", "300", "4096"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "at 300" in lines[0] and "at 4k" in lines[0] and lines[2].endswith("Raw keys, for a try.")


@pytest.mark.parametrize("flag", ["--tokens", "--head-dim", "--layers", "--kv-heads"])
@pytest.mark.parametrize("value", ["0", "-3", "1.5", "many"])
def test_presets_names_an_invalid_number_in_the_error(flag, value, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["presets", flag, value])
    assert exit.value.code == 2
    assert f"argument {flag}: {value!r} is not supported; allowed: whole numbers from 1" in capsys.readouterr().err


def test_presets_marks_a_head_dim_that_a_preset_cannot_serve(capsys):
    assert cli.main(["presets", "--head-dim", "24", "--preset", "polar-4"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[:6] == ["polar-4", *"-----"]
