"""Study files: all problems are named at once in plain words, and paths are relative to the file."""

from pathlib import Path

import huggingface_hub
import pytest

from posmask.errors import BadSetting
from posmask.study import targets
from posmask.study.source import Source
from posmask.study.study_file import read_study


def refusal(study_file, *replaced):
    """Return the lines of the refusal of a study with these replacements."""
    text = study_file.read_text()
    for old, new in replaced:
        assert old in text
        text = text.replace(old, new)
    study_file.write_text(text)
    with pytest.raises(BadSetting) as raised:
        read_study(study_file)
    return str(raised.value).removeprefix(str(study_file)).splitlines()


def test_all_missing_and_unknown_settings_are_named_at_once(study_file):
    lines = refusal(
        study_file,
        ("n_steps = 20", "n_step = 20"),
        ("learning_rate = 5e-3", ""),
        ("d_sae = 32", "n_positions = 32"),
        ('name = "open"\nmask = { kind = "open" }', 'name = "open"\nmask = { knd = "open" }\nwidth = 3'),
        ("n_slices = 4", 'slices = "x"'),
        ("layer = 2", "layer = 0\nlayers = 1"),
        ("seeds = [0]", "seeds = [0, [1]]"),
    )
    assert lines == [
        " has 10 problems:",
        "  model.layers is not a setting: did you mean layer?",
        "  sae.n_positions is not a setting: it belongs in [corpus]",
        "  training.n_step is not a setting: did you mean n_steps?",
        '  cell "open": width is not a setting: remove it',
        '  cell "slice-compute": mask.slices is not a setting: did you mean n_slices?',
        "  sae.d_sae is missing",
        "  training.learning_rate is missing",
        "  seeds = [0, [1]] holds [1], which must be a whole number",
        "  model.layer = 0 must be above 0",
        '  cell "open": mask: mask kind is missing: choose one of '
        "open, slice, hard, cohort, band, soft, importance, split, switch, windows",
    ]


def test_all_settings_that_do_not_fit_together_are_named_at_once(study_file):
    lines = refusal(
        study_file,
        ("ks = [1, 5, 20]", "ks = [1, 5, 99]"),
        ("retention_positions = 4", "retention_positions = 15"),
        ("shift_windows = 4", "shift_windows = 8"),
        ('against = "open + segments4"', 'against = "opne"'),
    )
    assert len(lines) == 5
    for line, part in zip(lines[1:], ("'opne'", "8 shift windows", "retention_positions", "99 latents"), strict=True):
        assert part in line


def test_all_cells_that_cannot_be_built_are_named_at_once(study_file):
    lines = refusal(study_file, ("n_slices = 4", "n_slices = 17"), ("k = 4 }", "k = 40 }"))
    assert [line.partition(":")[0] for line in lines[1:]] == ['  cell "open"', '  cell "slice-compute"']


def test_a_whole_table_may_be_set_from_the_command_line(study_file):
    study = read_study(study_file, ["model.sizes.hidden_size=12"])
    assert study.model.sizes == {"hidden_size": 12}
    with pytest.raises(BadSetting, match=r"model\.size is not a setting: did you mean sizes"):
        read_study(study_file, ["model.size.hidden_size=12"])


def test_paths_are_relative_to_the_study_file(study_file, tmp_path, monkeypatch, model_folder):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "texts.txt").write_text("red")
    (folder / "model").symlink_to(model_folder)
    text = (
        study_file.read_text().replace(str(model_folder), "model").replace('tables = ["words"]', 'texts = "texts.txt"')
    )
    (folder / "study.toml").write_text(text)
    identities = set()
    for where, path in ((tmp_path, "mine/study.toml"), (folder, "study.toml"), (Path("/"), folder / "study.toml")):
        monkeypatch.chdir(where)
        study = read_study(Path(path))
        assert Path(study.model.name).is_dir()
        assert Path(study.corpus.texts).read_text() == "red"
        source = Source(study.model)
        identities.add(tuple(target.identity for target in targets.targets_of(study, source, tmp_path / "run")))
    assert len(identities) == 1
    monkeypatch.chdir(tmp_path)
    assert read_study(Path("mine/study.toml"), ["corpus.texts=here.txt"]).corpus.texts == "here.txt"


@pytest.mark.parametrize("name", ["/no/model", "./model", "models/none", "a/b/c", "none/"])
def test_a_missing_model_folder_is_not_looked_up_on_a_hub(name, study_file, tmp_path, monkeypatch, model_folder):
    (tmp_path / "models" / "other").mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)  # an error if it is called
    study = read_study(study_file, [])
    study_file.write_text(study_file.read_text().replace(str(model_folder), name))
    study = read_study(study_file)
    holds = "other" if name == "models/none" else ""
    with pytest.raises(BadSetting, match=rf"model '.*' is missing: there is no such folder, and .* holds .*{holds}"):
        _ = Source(study.model).made_from


def test_a_missing_folder_of_a_cell_to_start_from_is_said_to_be_missing(study_file, tmp_path):
    text = study_file.read_text().replace('mask = { kind = "open" }', 'mask = { kind = "open" }\ninit_from = "saes/a"')
    study_file.write_text(text.partition("[[comparisons]]")[0].replace("budget", 'init_from = "saes/a"\nbudget'))
    with pytest.raises(BadSetting, match=rf"init_from = '{tmp_path}/saes/a' does not exist: give the folder of an SAE"):
        read_study(study_file)
