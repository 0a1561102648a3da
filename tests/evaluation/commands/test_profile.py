"""`turboquant-hf profile`, and the commands that take what it writes."""

from __future__ import annotations

import json

import pytest

from turboquant_hf import Profile
from turboquant_hf.cache.profiles import FILE
from turboquant_hf.cli import main
from turboquant_hf.evaluation.commands import ablate
from turboquant_hf.evaluation.presets.named import resolve_caches, resolve_presets
from turboquant_hf.resources import config_path

SIZES = ["--context", "256", "--windows", "4"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"word{i * i % 97}" for i in range(900)))
    return path


@pytest.fixture(scope="module")
def made(tiny_folder, text, tmp_path_factory):
    """The file that the command writes into a folder."""
    folder = tmp_path_factory.mktemp("made")
    flags = ["--model", str(tiny_folder), "--device", "cpu", "--text", str(text)]
    assert main(["profile", *flags, *SIZES, "--output", str(folder)]) == 0
    return folder / FILE


def test_the_command_writes_one_file_and_says_what_is_in_it(tiny_folder, text, tmp_path, capsys):
    target = tmp_path / "x.safetensors"
    flags = ["--model", str(tiny_folder), "--device", "cpu", "--text", str(text), "--output", str(target)]
    assert main(["profile", *flags, *SIZES, "--share", "0.125"]) == 0
    assert (
        f"{target}: 2 layers from 1,024 tokens of text.txt; moments of keys moved 0.125 of the way"
        in capsys.readouterr().out
    )
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    about = Profile.load(target).about
    assert about["share"] == {"keys": 0.125, "values": None} and about["text"] == "text.txt"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--windows", "1"], "windows=1 is not supported; allowed: at least 2"),
        (["--share", "1.5"], "share=1.5 is not supported; allowed: from 0 to 1"),
        (["--output", "/nowhere/x"], "output='/nowhere/x' is not supported; allowed: a file in a folder that is there"),
        (["--context", "100000"], "context=100000 is not supported; allowed: 1 to"),
        (["--context", "100"], "of at least 132 tokens"),
    ],
    ids=["windows", "share", "output", "long-context", "short-context"],
)
def test_settings_that_do_not_serve_are_named(tiny_folder, text, tmp_path, capsys, flags, message):
    base = ["profile", "--model", str(tiny_folder), "--device", "cpu", "--text", str(text), "--output", str(tmp_path)]
    assert main([*base, *flags]) == 2
    assert message in capsys.readouterr().err


def test_perplexity_with_a_profile_of_the_model_is_lower_and_begins_sooner(made, tiny_folder, text, tmp_path):
    flags = ["--model", str(tiny_folder), "--device", "cpu", "--text", str(text), "--recent-window", "0"]
    flags += ["--context", "700", "--windows", "2", "--preset", "k3v3", "paper-mse-3"]
    kl = {}
    for profile in (str(made), "none"):
        output = tmp_path / profile.replace("/", "-")
        assert main(["perplexity", *flags, "--profile", profile, "--output", str(output)]) == 0
        results = json.loads((output / "metrics.json").read_text())["results"]
        kl[profile] = [row["kl"] for row in results]
    assert kl[str(made)][0] < kl["none"][0]


def test_a_run_with_another_profile_is_not_continued(made, tiny_folder, text, tmp_path, capsys):
    flags = ["perplexity", "--model", str(tiny_folder), "--device", "cpu", "--text", str(text), "--context", "300"]
    flags += ["--profile", str(tmp_path / "p"), "--output", str(tmp_path / "run"), "--windows", "1"]
    (tmp_path / "p").write_bytes(made.read_bytes())
    assert main(flags) == 0
    make = ["profile", "--model", str(tiny_folder), "--device", "cpu", "--text", str(text), *SIZES, "--share", "1"]
    assert main([*make, "--output", str(tmp_path / "p")]) == 0
    assert main(flags) == 2
    assert "contents=" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["needle", "retrieval", "baselines", "check"])
def test_commands_take_a_profile_and_name_a_damaged_one(command, made, tiny_folder, text, tmp_path, capsys):
    bad = tmp_path / "bad"
    bad.write_bytes(made.read_bytes()[:-1])
    flags = [command, "--model", str(tiny_folder), "--device", "cpu", "--text", str(text), "--profile", str(bad)]
    flags += ["--output", str(tmp_path / "run")]
    assert main(flags) == 2
    assert "bad' is damaged" in capsys.readouterr().err


def test_presets_without_use_for_a_profile_are_measured_without(made):
    kept, plain = resolve_presets(["k4v4", "paper-mse-4"], str(made))
    assert kept.profile is Profile.load(made) and plain.profile == "auto"
    assert resolve_presets(["k4v4"], "none")[0].profile is None
    caches = resolve_caches(["k4v4", "kivi-4"], 0, str(made))
    assert caches["k4v4"].profile is Profile.load(made) and caches["kivi-4"].profile == "auto"


def test_ablate_has_rows_for_each_transform(made):
    path = config_path("eval", "ablate.yaml")
    found = {name: preset for _, name, preset in ablate.read_variants(path, ["transform, 3"], str(made))}
    assert list(found) == ["none", "diagonal", "profile"]
    assert [preset.profile for preset in found.values()] == [None, None, Profile.load(made)]
    assert [name for _, name, _ in ablate.read_variants(path, ["transform, 3"])] == ["none", "diagonal"]
