"""Study files: all problems are named at once in plain words, and paths are relative to the file."""

import json
from pathlib import Path

import huggingface_hub
import pytest
from typer.testing import CliRunner

from conftest import make_texts
from posmask.cli.commands import app
from posmask.errors import BadSetting, NothingToDo
from posmask.results.rows import read_rows
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
        " has 10 problems; `posmask init` writes a complete file:",
        "  model.layers is not a setting: did you mean layer?",
        "  sae.n_positions is not a setting: it belongs in [corpus]",
        "  training.n_step is not a setting: did you mean n_steps?",
        '  cell "open": width is not a setting: remove it',
        '  cell "slice-compute": mask.slices is not a setting: did you mean n_slices?',
        "  sae.d_sae is missing",
        "  training.learning_rate is missing",
        "  model.layer = 0 must be above 0",
        "  seeds = [0, [1]] holds [1], which must be a whole number",
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
    beside = f", and {tmp_path}/models holds other" if name == "models/none" else ""
    with pytest.raises(BadSetting, match=rf"model '.*' is missing: there is no such folder{beside}.*; check the path"):
        _ = Source(study.model).made_from


def test_a_missing_folder_of_a_cell_to_start_from_is_said_to_be_missing(study_file, tmp_path):
    text = study_file.read_text().replace('mask = { kind = "open" }', 'mask = { kind = "open" }\ninit_from = "saes/a"')
    study_file.write_text(text.partition("[[comparisons]]")[0].replace("budget", 'init_from = "saes/a"\nbudget'))
    with pytest.raises(BadSetting, match=rf"init_from = '{tmp_path}/saes/a' does not exist: give the folder of an SAE"):
        read_study(study_file)


@pytest.fixture
def posmask(tmp_path, monkeypatch):
    """Run the command line in a folder with a model and texts."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        return CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)

    return run


def test_a_written_study_file_runs_as_it_stands(posmask, tmp_path, model_folder):
    (tmp_path / "model").symlink_to(model_folder)
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in make_texts(700)))
    result = posmask("init", "--model", "model", "--texts", "texts.jsonl", "--out", "mine/My study.toml")
    path = tmp_path / "mine" / "My study.toml"
    assert result.output.startswith("Written: mine/My study.toml; next: `posmask plan")
    study = read_study(path)
    assert (study.name, study.model.layer, study.corpus.n_positions) == ("my-study", 2, 16)
    assert 4000 <= study.corpus.training_tokens < 6000
    assert study.training.n_steps * study.training.batch_tokens <= study.corpus.training_tokens
    with pytest.raises(BadSetting, match="exists: remove it, or give another path with --out"):
        posmask("init", "--model", "model", "--texts", "texts.jsonl", "--out", path)
    assert "The page: run/report.html" in posmask("run", path, "--root", "run").output
    cells = {row.cell for row in read_rows(tmp_path / "run" / "results.csv")}
    assert cells == {"llm", "open", "slice"}


def test_a_study_file_for_a_hub_dataset_reads_no_texts(posmask, tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr("posmask.data.texts.load_from_hub", None)
    posmask("init", "--model", model_folder, "--texts", "hf:some/set")
    corpus = read_study(tmp_path / "study.toml").corpus
    assert (corpus.texts, corpus.n_texts, corpus.training_tokens) == ("hf:some/set", 100_000, 2_000_000)


def test_too_few_texts_for_a_study_file_are_refused_with_numbers(posmask, tmp_path, model_folder):
    (tmp_path / "few.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in make_texts(12)))
    with pytest.raises(
        NothingToDo, match=r"320 kept tokens are needed, but \d training texts \(of 12 in all, of which 25"
    ):
        posmask("init", "--model", model_folder, "--texts", "few.jsonl")
    assert not (tmp_path / "study.toml").exists()
