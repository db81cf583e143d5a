"""Results of different settings are never mixed: runs, the report and `verify` compare identities."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import make_sae, make_texts
from posmask.cli.commands import app
from posmask.errors import BadSetting, DamagedFolder
from posmask.report import write_report
from posmask.report.reading import read_studies
from posmask.results.rows import read_rows, write_rows
from posmask.sae.files import write_sae
from posmask.storage import layout
from posmask.storage.layout import STUDY_FILE
from posmask.storage.manifest import file_entry, read_manifest, sealed_manifest
from posmask.storage.record import read_record
from posmask.study import engines, harvests
from posmask.study import run as run_module
from posmask.study.run import _begin, evaluate_folder, run_study
from posmask.study.saes import read_init
from posmask.study.source import Source
from posmask.study.study_file import read_study
from posmask.study.targets import targets_of

CHANGED = ["training.learning_rate=0.004"]


def run(path, root, changes=()):
    return run_study(read_study(path, changes), root, say=lambda line: None)


class Killed(Exception):
    pass


def test_the_report_excludes_cells_of_other_settings_and_names_them(study_file, finish, tmp_path, monkeypatch):
    root = tmp_path / "run"
    finish(root)
    old = {row.value for row in read_studies([root])[0].rows if row.cell == "slice-compute"}
    make_target = engines.make_target

    def killed_at_the_second_cell(settings, target, *args):
        if target.label == "slice-compute-seed0":
            raise Killed
        make_target(settings, target, *args)

    monkeypatch.setattr(engines, "make_target", killed_at_the_second_cell)
    with pytest.raises(Killed):
        run(study_file, root, CHANGED)
    (read,) = read_studies([root])
    assert {row.cell for row in read.rows} == {"llm", "open"}
    assert [cell.cell for cell in read.cells] == ["open"]
    assert not old & {row.value for row in read.rows if row.cell == "open" and row.metric == "explained_variance"}
    page = write_report(root).read_text(encoding="utf8")
    assert "made from other settings than the study has now: slice-compute-seed0" in page


def test_the_report_excludes_cells_that_left_the_study(study_file, finish, tmp_path):
    root = tmp_path / "run"
    finish(root)
    study_file.write_text(study_file.read_text().partition('[[cells]]\nname = "slice-compute"')[0])
    run(study_file, root)
    (read,) = read_studies([root])
    assert {row.cell for row in read.rows} == {"llm", "open"}
    assert [cell.cell for cell in read.cells] == ["open"]
    assert any("no longer cells of this study: slice-compute-seed0" in warning for warning in read.warnings)


def test_rows_and_verdicts_of_cells_outside_the_record_are_excluded(study_file, finish, tmp_path):
    root = tmp_path / "run"
    finish(root)
    record = json.loads((root / STUDY_FILE).read_text())
    del record["folders"]["slice-compute-seed0"]
    (root / STUDY_FILE).write_text(json.dumps(record))
    (read,) = read_studies([root])
    assert {row.cell for row in read.rows} == {"llm", "open"}
    compared = {label for verdict in read.verdicts for label in (verdict.label, verdict.against)}
    assert {label.partition(" + ")[0] for label in compared} == {"open"}


def test_a_cell_replaced_during_the_run_raises_and_no_table_is_written(study_file, begin, tmp_path, monkeypatch):
    other = begin(tmp_path / "other")
    run(study_file, other, CHANGED)
    root = begin(tmp_path / "run")
    make = engines.Local.make

    def make_and_replace(*args):
        make(*args)
        shutil.rmtree(root / "cells" / "open-seed0")
        shutil.copytree(other / "cells" / "open-seed0", root / "cells" / "open-seed0")

    monkeypatch.setattr(engines.Local, "make", make_and_replace)
    with pytest.raises(BadSetting, match=r"open-seed0 was replaced during this run .* --root"):
        run(study_file, root)
    assert not (root / "results.csv").exists()


def test_a_run_stops_when_another_with_other_settings_takes_its_root(study_file, tmp_path, monkeypatch):
    root = tmp_path / "run"
    fill = engines.fill
    calls = []

    def taken_over(settings, target, *args):
        fill(settings, target, *args)
        calls.append(target.label)
        if len(calls) == 1:
            changed = read_study(study_file, CHANGED)
            targets = targets_of(changed, Source(changed.model), root)
            _begin(changed, targets, root, recompute=True)

    monkeypatch.setattr(engines, "fill", taken_over)
    with pytest.raises(BadSetting, match=r"now belongs to a run with other settings .* --root"):
        run(study_file, root)
    assert calls == ["baselines"]
    assert not (root / "results.csv").exists()


def test_a_cell_never_starts_from_a_cell_with_other_settings(study_file, begin, tmp_path):
    text = (
        study_file.read_text()
        .partition("[[comparisons]]")[0]
        .replace('name = "open"', 'name = "open"\nstep_fraction = 0.5')
    )
    study_file.write_text(text + 'init_from = "open"\n')
    root = begin(tmp_path / "run")
    run(study_file, root)
    settings = read_study(study_file, CHANGED)
    targets = {target.label: target for target in targets_of(settings, Source(settings.model), root)}
    target = targets["slice-compute-seed0"]
    with pytest.raises(BadSetting, match="open-seed0 was replaced"):
        read_init(target.init_folder, 12, target.init_identity)


def test_verify_finds_swapped_cells_and_lost_manifests(study_file, finish, tmp_path):
    root = tmp_path / "run"
    finish(root)
    cells = root / "cells"
    (cells / "open-seed0").rename(cells / "x")
    (cells / "slice-compute-seed0").rename(cells / "open-seed0")
    (cells / "x").rename(cells / "slice-compute-seed0")
    with pytest.raises(DamagedFolder) as error:
        CliRunner().invoke(app, ["verify", str(root)], catch_exceptions=False)
    assert str(error.value).count("is not the folder that study.json lists") == 2
    run(study_file, root)
    (cells / "open-seed0" / "manifest.json").unlink()
    with pytest.raises(DamagedFolder, match=r"open-seed0 has no manifest\.json"):
        CliRunner().invoke(app, ["verify", str(root)], catch_exceptions=False)


def test_a_damaged_record_is_reported_and_written_again(study_file, finish, tmp_path):
    root = tmp_path / "run"
    finish(root)
    before = read_record(root)
    for text in ("[]", '{"study": 1, "baseline": null, "folders": {}}', '{"folders": 3}'):
        (root / STUDY_FILE).write_text(text)
        with pytest.raises(DamagedFolder, match=r"study\.json cannot be read"):
            read_record(root)
        assert any("study.json cannot be read" in warning for warning in read_studies([root])[0].warnings)
        with pytest.raises(BadSetting, match=r"study\.json is a file, which posmask did not write"):
            run(study_file, root)
    (root / STUDY_FILE).write_text("")
    run(study_file, root)
    assert read_record(root) == before


def test_the_baseline_is_the_same_for_comparisons_and_page(study_file, finish, tmp_path):
    text = study_file.read_text()
    half = '[[cells]]\nname = "open-half"\nmask = { kind = "open" }\nstep_fraction = 0.5\n'
    study_file.write_text(text.replace("[[cells]]", f"{half}[[cells]]", 1))
    root = tmp_path / "run"
    finish(root)
    run(study_file, root)
    (read,) = read_studies([root])
    assert read.rows[-1].cell != "llm"
    assert next(row.cell for row in read.rows if row.mask == "open") == "open-half"
    assert read.baseline == read_study(study_file).baseline == "open"
    assert {verdict.against for verdict in read.verdicts} == {
        "open", "open + segments4", "slice-compute + zero-step", "slice-compute + matched",
    }  # fmt: skip


def children_of(process):
    result = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(process)], capture_output=True, text=True, check=False
    )
    return [int(line.split()[0]) for line in result.stdout.splitlines() if "multiprocessing.spawn" in line]


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("sent", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_workers_end_when_their_run_is_killed(sent, tmp_path, model_folder):
    script = Path(__file__).parent / "reliability" / "endless.py"
    command = [sys.executable, str(script), str(model_folder), str(tmp_path / "run")]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "jobs" / "at-work").exists():
            assert time.monotonic() < deadline, "the worker did not start"
            assert process.poll() is None
            time.sleep(0.1)
        (worker,) = children_of(process.pid)
        process.send_signal(sent)
        process.wait(10)
        deadline = time.monotonic() + 10
        while alive(worker):
            assert time.monotonic() < deadline, "the worker outlived its run"
            time.sleep(0.05)
    finally:
        process.kill()


def write_other_results(root):
    """Change the numbers of a cell in the joined table, as a run with other settings would."""
    table = [
        replace(row, value=row.value + 1) if row.cell == "open" else row for row in read_rows(root / "results.csv")
    ]
    write_rows(root / "results.csv", table)


def write_other_record(root, labels):
    """Let other settings decide these folders, as a run that begins with them does."""
    record = json.loads((root / STUDY_FILE).read_text())
    record["folders"] |= dict.fromkeys(labels, "0" * 16)
    (root / STUDY_FILE).write_text(json.dumps(record, indent=1))


def test_the_report_takes_no_numbers_from_a_table_of_other_settings(finish, tmp_path):
    """A run that was overtaken writes its table last."""
    root = tmp_path / "run"
    finish(root)
    (expected,) = read_studies([root])
    write_other_results(root)
    (read,) = read_studies([root])
    assert list(map(repr, read.rows)) == list(map(repr, expected.rows))
    assert read.verdicts == []
    assert any("results.csv has other numbers than the folders of" in warning for warning in read.warnings)


def test_the_report_excludes_table_rows_of_cells_of_other_settings(finish, tmp_path):
    root = tmp_path / "run"
    finish(root)
    write_other_record(root, ["open-seed0", "slice-compute-seed0"])
    (read,) = read_studies([root])
    assert {row.cell for row in read.rows} == {"llm"}
    assert read.cells == []
    assert read.verdicts == []
    assert any("made from other settings than the study has now: open-seed0" in line for line in read.warnings)


def test_the_report_excludes_baselines_of_other_settings(finish, tmp_path):
    root = tmp_path / "run"
    finish(root)
    write_other_record(root, ["baselines"])
    (read,) = read_studies([root])
    assert {row.cell for row in read.rows} == {"open", "slice-compute"}
    assert any("made from other settings than the study has now: baselines" in line for line in read.warnings)


def test_a_run_that_was_overtaken_in_its_last_cell_writes_no_table(study_file, finish, tmp_path, monkeypatch):
    root = tmp_path / "run"
    finish(root)
    shutil.rmtree(root / "cells" / "slice-compute-seed0")
    make = engines.Local.make

    def make_and_be_overtaken(*args):
        make(*args)
        write_other_record(root, ["open-seed0"])

    monkeypatch.setattr(engines.Local, "make", make_and_be_overtaken)
    with pytest.raises(BadSetting, match=r"now belongs to a run with other settings .* --root"):
        run(study_file, root)
    assert not (root / "results.csv").exists()


@pytest.mark.parametrize("label", ["open-seed0", "baselines"])
def test_rows_of_another_cell_in_a_sealed_folder_are_refused(study_file, finish, tmp_path, label):
    root = tmp_path / "run"
    finish(root)
    folder = layout.cell_folder(root, label)
    manifest = read_manifest(folder)
    rows_file = folder / "rows.csv"
    rows_file.write_text(rows_file.read_text().replace("\nopen,", "\nslice-compute,").replace("\nllm,", "\nopen,"))
    files = {**manifest["files"], "rows.csv": file_entry(rows_file)}
    facts = {key: manifest[key] for key in manifest if key not in ("identity", "made_from", "files", "sha256")}
    (folder / "manifest.json").write_text(sealed_manifest(manifest["made_from"], facts, files))
    with pytest.raises(DamagedFolder, match=r"rows\.csv holds rows of"):
        run(study_file, root)
    (root / "results.csv").unlink(missing_ok=True)
    (read,) = read_studies([root])
    assert {row.cell for row in read.rows} == {"llm", "open", "slice-compute"} - {
        "llm" if label == "baselines" else "open"
    }
    assert any("holds rows of" in warning for warning in read.warnings)


def test_an_evaluation_needs_a_root_of_the_same_settings(study_file, finish, tmp_path):
    root = tmp_path / "run"
    finish(root)
    before = (root / "baselines" / "manifest.json").read_bytes()
    study = read_study(study_file, ["evaluation.shift_texts=30"])
    with pytest.raises(BadSetting, match="belongs to the study 'tiny' with another model, other texts or another"):
        evaluate_folder(study, root, root / "cells" / "open-seed0", lambda line: None)
    assert (root / "baselines" / "manifest.json").read_bytes() == before


@pytest.mark.slow
def test_two_runs_with_other_settings_on_one_root_mix_nothing(study_file, finish, tmp_path):
    """Threads replace processes here: a claim excludes both."""
    root = tmp_path / "run"
    finish(tmp_path / "warm")
    with ThreadPoolExecutor(2) as threads:
        both = [threads.submit(run, study_file, root, changes) for changes in ((), CHANGED)]
        errors = [result.exception() for result in both]
    assert all(isinstance(error, BadSetting | None) for error in errors)
    assert None not in errors or errors.count(None) == 1
    (read,) = read_studies([root])
    for cell in read.cells:
        assert read_manifest(cell.path)["identity"] == read_record(root).folders[cell.path.name]
        of_cell = [row for row in read.rows if (row.cell, row.seed) == (cell.cell, cell.seed)]
        assert list(map(repr, of_cell)) == list(map(repr, read_rows(cell.path / "rows.csv")))


def test_a_start_that_changes_during_the_run_is_refused(study_file, finish, tmp_path, monkeypatch):
    finish(tmp_path / "first")
    start = shutil.copytree(tmp_path / "first" / "cells" / "open-seed0", tmp_path / "start")
    (start / "manifest.json").unlink()
    for name in ("settings.json", "rows.csv"):
        (start / name).unlink()
    text = study_file.read_text().partition('[[cells]]\nname = "slice-compute"')[0]
    study_file.write_text(f'{text}init_from = "{start}"\n')

    def change(*args, recompute):
        write_sae(make_sae("open", rule={"kind": "topk", "k": 4}, seed=3), start)

    monkeypatch.setattr(run_module, "_begin", change)
    monkeypatch.setattr(engines, "check_listed", lambda *args: None)
    with pytest.raises(BadSetting, match=r"sae\.safetensors was changed during this run"):
        run(study_file, tmp_path / "run")


def test_texts_that_change_while_they_are_read_end_the_run(study_file, tmp_path, monkeypatch):
    """They are hashed for the identity of results first, then read."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(2000)))
    study_file.write_text(study_file.read_text().replace('tables = ["words"]', f"texts = {json.dumps(str(texts))}"))
    read = harvests.read_texts
    calls = []

    def read_and_change(*args):
        yield from read(*args)
        calls.append(args)
        texts.write_text(texts.read_text() + '{"text": "another"}\n')

    monkeypatch.setattr(harvests, "read_texts", read_and_change)
    with pytest.raises(BadSetting, match=r"texts\.jsonl' was changed during this run"):
        run(study_file, tmp_path / "run")
    assert len(calls) == 1
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.parent.name != ".locks"]
