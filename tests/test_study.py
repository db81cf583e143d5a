import csv
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from pydantic import Field
from typer.testing import CliRunner

from conftest import D_MODEL, N_POSITIONS, make_sae, train_on
from posmask import masks
from posmask.cli.commands import app
from posmask.data.activations import Activations
from posmask.data.tokens import split_of
from posmask.errors import BadSetting, PosmaskError
from posmask.evaluation import downstream, position, retention, suite
from posmask.evaluation.downstream import WindowMass
from posmask.interop.reading import import_sae
from posmask.interop.saelens_files import export_saelens
from posmask.kernels import runtime
from posmask.masks.base import MaskSettings, PositionMask
from posmask.probing import datasets
from posmask.probing.order_tasks import ORDER_TASKS
from posmask.report import write_report
from posmask.report.reading import read_studies
from posmask.results import rows
from posmask.results.comparisons import LEVEL, read_verdicts
from posmask.sae import rules
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.files import read_sae, write_sae
from posmask.sae.rules import rule_settings
from posmask.storage.layout import LATENT_WORDS_FILE, LATENTS_FILE
from posmask.storage.manifest import damage_under, identity, read_manifest
from posmask.study import cell as study_cell
from posmask.study import engines, harvests, targets
from posmask.study import run as study_run
from posmask.study.saes import make_sae as make_sae_of_cell
from posmask.study.source import Source
from posmask.study.study_file import read_study
from posmask.training.checkpoints import Checkpoints

SECONDS = ("train_seconds", "evaluate_seconds")  # Only these metrics differ between equal runs.


def run(path, root):
    lines = []
    result = study_run.run_study(read_study(path), root, say=lines.append)
    return result, lines


def test_a_study_runs_from_text_to_results(finished):
    root, results = finished.root, finished.results
    with (root / "results.csv").open() as file:
        assert next(
            csv.reader(file)
        ) == "cell,mask,budget,gating,seed,metric,slice,value,ci_low,ci_high,n,reason".split(",")
    assert repr(rows.read_rows(root / "results.csv")) == repr(results)
    metrics = {row.metric for row in results if row.cell == "slice-compute"}
    assert metrics >= {
        "explained_variance", "l0", "dead_share", "retention", "retention_chance", "profile_fidelity",
        "order_accuracy", "order_shuffled", "order_permuted", "probe_accuracy", "train_seconds", "train_tokens",
        "evaluate_seconds", "ce_recovered", "kl_recovered", "ablation_effect", "causal_specificity",
        "position_information", "position_information_null", "position_bound_share", "shift_position",
        "shift_content", "shift_interaction", "mean_openness", "strictness",
    }  # fmt: skip
    assert all(row.value > 0 for row in results if row.metric in SECONDS)
    by_slice = {(row.cell, row.metric, row.slice): row for row in results}
    assert by_slice["slice-compute", "d_sae", ""].value == 4 * 32
    assert by_slice["open", "train_tokens", ""].value == 20 * 256
    assert by_slice["llm", "order_bag_accuracy", "task=toy_order;about=local"].value == 0.5
    for pooling in ("mean", "segments4", "moment"):
        assert ("open", "order_accuracy", f"task=toy_order;about=local;k=5;pooling={pooling}") in by_slice
    for cell, source in (("open", "sae"), ("llm", "llm")):
        slice_text = f"dataset=toy;k=1;source={source};pooling=mean;protocol=default;train=40"
        assert (cell, "probe_accuracy", slice_text) in by_slice
        assert (cell, "probe_accuracy", f"{slice_text};class=odd") in by_slice
    for after in ("0", "0.05", "0.5", "1"):
        assert ("slice-compute", "retention", f"after={after}") in by_slice
    verdicts = read_verdicts(root / "verdicts.csv")
    assert {(verdict.label, verdict.against) for verdict in verdicts} == {
        ("slice-compute", "open"), ("slice-compute", "open + segments4"), ("open + segments4", "open"),
        ("open + moment", "open"), ("slice-compute", "slice-compute + zero-step"),
        ("slice-compute", "slice-compute + matched"), ("slice-compute + zero-step", "open"),
        ("slice-compute + matched", "open"),
    }  # fmt: skip
    assert {verdict.verdict for verdict in verdicts} == {"undecided"}  # one seed
    # Without training the mask reconstructs as `open` does, and its codes are those of `open` in its slices.
    at_zero = by_slice["slice-compute", "explained_variance", "control=zero-step"]
    assert at_zero.value == pytest.approx(by_slice["open", "explained_variance", ""].value, abs=1e-6)
    for metric, where in (
        ("order_accuracy", "task=toy_order;about=local;k=5"),
        ("probe_accuracy", "dataset=toy;k=5;source=sae"),
    ):
        values = [
            row.value
            for name in ("zero-step", "matched")
            for row in results
            if row.metric == metric and row.slice.startswith(f"{where};pooling={name}") and "class" not in row.slice
        ]
        assert len(values) == 2
        assert values[0] == values[1]
    verdict_ev = next(verdict for verdict in verdicts if verdict.column == "explained_variance")
    ev_slice, ev_open = (by_slice[cell, "explained_variance", ""].value for cell in ("slice-compute", "open"))
    assert verdict_ev.effect == pytest.approx(ev_slice - ev_open)
    saebench_output = json.loads((root / "cells" / "open-seed0" / "saebench.json").read_text())
    slice_text = "dataset=toy;k=5;source=sae;pooling=mean;protocol=default;train=40"
    assert saebench_output["eval_result_metrics"]["sae"]["sae_top_5_test_accuracy"] == pytest.approx(
        by_slice["open", "probe_accuracy", slice_text].value
    )
    for name in ("open-seed0", "slice-compute-seed0"):
        folder = root / "cells" / name
        assert {path.name for path in folder.iterdir()} == {
            "manifest.json", "settings.json", "sae.json", "sae.safetensors", "openness.safetensors", "curve.csv",
            "latents.parquet", "profiles.parquet",
            "dead.safetensors", "parts_of_evaluation.json",
            "rows.csv", "units.safetensors", "saebench.json", LATENTS_FILE, LATENT_WORDS_FILE,
        }  # fmt: skip


def test_finished_cells_are_reused_only_with_the_same_settings(study_file, finish, tmp_path):
    root = tmp_path / "run"
    finish(root)
    times = {path: path.stat().st_mtime_ns for path in (root / "cells").rglob("*")}
    _, lines = run(study_file, root)
    assert lines == ["3 of 3 folders are finished and stay as they are."]
    assert {path: path.stat().st_mtime_ns for path in (root / "cells").rglob("*")} == times

    study_file.write_text(study_file.read_text().replace("n_slices = 4", "n_slices = 2"))
    settings = read_study(study_file)
    assert [state for _, state in targets.cell_states(settings, root)] == ["finished", "finished", "other settings"]
    _, lines = run(study_file, root)
    assert "slice-compute-seed0 was made from other settings: moved to" in lines[1]
    assert read_manifest(root / "stale" / "slice-compute-seed0-1", verify=True)
    assert read_manifest(root / "cells" / "slice-compute-seed0")["made_from"]["cell"]["mask"]["n_slices"] == 2
    assert set((root / "cells" / "open-seed0").iterdir()) <= set(times)


def test_changed_evaluation_settings_keep_the_training(study_file, finish, tmp_path, monkeypatch):
    root = tmp_path / "run"
    before = finish(root)
    text = (
        study_file.read_text()
        .replace("ks = [1, 5, 20]", "ks = [1, 5]")
        .replace("heldout_tokens = 1500", "heldout_tokens = 1200")
    )
    assert text.count("measure_forgetting = true") == 1
    study_file.write_text(text.replace("measure_forgetting = true", ""))
    fresh, _ = run(study_file, tmp_path / "fresh")

    trained = []
    monkeypatch.setattr(study_cell.loop, "train", lambda *arguments, **options: trained.append(arguments))
    settings = read_study(study_file)
    assert [state for _, state in targets.cell_states(settings, root)] == ["other settings", "trained", "trained"]
    after, lines = run(study_file, root)
    assert trained == []
    assert "open-seed0 keeps its training and is evaluated again." in lines

    def without_seconds(table):
        return [repr(row) for row in table if row.metric not in SECONDS]

    assert without_seconds(after) == without_seconds(fresh)
    seconds = [[row.value for row in table if row.metric == "train_seconds"] for table in (before, after)]
    assert seconds[0] == seconds[1]
    for name in ("open-seed0", "slice-compute-seed0"):
        for file in ("sae.safetensors", "sae.json", "curve.csv", "dead.safetensors"):
            kept, new = (folder / "cells" / name / file for folder in (root, tmp_path / "fresh"))
            assert kept.read_bytes() == new.read_bytes(), (name, file)


@pytest.mark.parametrize(
    ("old", "new", "computed"),
    [
        ("ks = [1, 5, 20]", "ks = [1, 5]", ["order", "probes"]),
        pytest.param('order_tasks = ["toy_order"]', "order_tasks = []", [], marks=pytest.mark.slow),
        pytest.param("probe_train = 40", "probe_train = 20", ["probes"], marks=pytest.mark.slow),
        ("shift_texts = 40", "shift_texts = 30", ["heldout"]),
        pytest.param("measure_forgetting = true", "", [], marks=pytest.mark.slow),
    ],
)
def test_only_the_parts_of_an_evaluation_that_changed_are_computed(
    study_file, finish, begin, tmp_path, monkeypatch, old, new, computed
):
    root = tmp_path / "run"
    finish(root)
    assert study_file.read_text().count(old) == 1
    study_file.write_text(study_file.read_text().replace(old, new))
    fresh, _ = run(study_file, begin(tmp_path / "fresh"))
    called = []
    for part, name in (("heldout", "_of_heldout_texts"), ("order", "_order"), ("probes", "_topics")):
        compute = getattr(suite, name)
        monkeypatch.setattr(suite, name, lambda *a, part=part, compute=compute: called.append(part) or compute(*a))
    monkeypatch.setattr(study_cell, "forgetting", None)
    after, _ = run(study_file, root)
    assert sorted(set(called)) == computed
    assert [repr(row) for row in after if row.metric not in SECONDS] == [
        repr(row) for row in fresh if row.metric not in SECONDS
    ]
    for path in (tmp_path / "fresh" / "cells").glob("*/*"):
        if path.name not in ("manifest.json", "rows.csv", "saebench.json"):
            assert (root / "cells" / path.parent.name / path.name).read_bytes() == path.read_bytes(), path


def test_poolings_that_training_texts_decide_are_rows_of_the_unmasked_cell(study_file, finish, tmp_path):
    root = tmp_path / "run"
    before = finish(root)
    study_file.write_text(study_file.read_text().replace('"moment"]', '"moment", "attention", "chosen"]'))
    after, _ = run(study_file, root)
    assert {row.cell for row in after if "pooling=chosen" in row.slice or "pooling=attention" in row.slice} == {"open"}
    value = {(row.cell, row.metric, row.slice): row.value for row in after}
    for k in (1, 5, 20):
        where = f"task=toy_order;about=local;k={k};pooling="
        validated = {name: value["open", "order_validation", where + name] for name in ("mean", "segments4", "moment")}
        best = max(validated, key=validated.__getitem__)
        assert value["open", "order_accuracy", f"{where}chosen"] == value["open", "order_accuracy", where + best]
    assert 0 < value["open", "order_accuracy", "task=toy_order;about=local;k=all;pooling=attention"] <= 1
    new = {"order_validation", "order_accuracy"}
    kept = [repr(row) for row in after if row.metric not in {*SECONDS, *new}]
    assert kept == [repr(row) for row in before if row.metric not in {*SECONDS, *new}]
    assert "open + chosen" in {verdict.label for verdict in read_verdicts(root / "verdicts.csv")}


@pytest.mark.parametrize("damaged", ["rows.csv", "sae.safetensors"])
def test_a_training_is_not_kept_from_a_damaged_folder(study_file, finish, tmp_path, damaged):
    root = tmp_path / "run"
    finish(root)
    file = root / "cells" / "open-seed0" / damaged
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    study_file.write_text(study_file.read_text().replace("ks = [1, 5, 20]", "ks = [1, 5]"))
    study = read_study(study_file)
    _, open_cell, _ = targets.targets_of(study, Source(study.model), root)
    assert targets.state_of(open_cell, verify=True) == "other settings"


def test_changed_evaluation_settings_keep_a_checkpoint(study_file, begin, tmp_path, monkeypatch):
    root = begin(tmp_path / "run")
    monkeypatch.setattr(study_cell, "CHECKPOINT_SECONDS", 0.0)

    def fail(*arguments, **options):
        raise BadSetting("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(study_cell, "evaluate", fail)
        with pytest.raises(BadSetting, match="stopped"):
            run(study_file, root)
    study_file.write_text(study_file.read_text().replace("ks = [1, 5, 20]", "ks = [1, 5]"))
    steps = []

    def checkpoints(*arguments, **options):
        kept = Checkpoints(*arguments, **options)
        steps.append(kept.done)
        fail()

    monkeypatch.setattr(study_cell, "Checkpoints", checkpoints)
    with pytest.raises(BadSetting, match="stopped"):
        run(study_file, root)
    assert steps[0] > 0


def test_settings_can_be_overridden(study_file):
    changes = [
        "training.n_steps=30",
        "name = other",
        'cells=[{name = "open", mask = {kind = "open"}}]',
        "comparisons=[]",
    ]
    changed = read_study(study_file, [*changes, "model.layer=0.5"])
    assert (changed.name, changed.training.n_steps, len(changed.cells), changed.model.layer) == ("other", 30, 1, 0.5)
    assert Source(changed.model).made_from["layer"] == 2  # of 3
    for change, message in (
        ("training.n_step=30", "training.n_step is not a setting: did you mean n_steps?"),
        ("trainings.n_steps=30", "'trainings' is not a table of a study; did you mean training?"),
        ("seeds.first=1", "'seeds.first=1' changes no setting"),
        ("name", "'name' changes no setting: write TABLE.KEY=VALUE"),
        ("training.n_steps=many", 'training.n_steps = "many" must be a whole number'),
    ):
        with pytest.raises(BadSetting, match=re.escape(message)):
            read_study(study_file, [change])


def test_cells_with_different_seeds_are_compared_on_the_shared_seeds(study_file, begin, tmp_path):
    text = (
        study_file.read_text()
        .replace("measure_forgetting = true", "seeds = [1]")
        .replace("seeds = [0]", "seeds = [0, 1]", 1)
    )
    study_file.write_text(text)
    results, _ = run(study_file, begin(tmp_path / "run", "open-seed0"))
    seeds = {cell: {row.seed for row in results if row.cell == cell} for cell in ("open", "slice-compute")}
    assert seeds == {"open": {0, 1}, "slice-compute": {1}}
    by_seed = {
        (row.cell, row.seed): row.value for row in results if (row.metric, row.slice) == ("explained_variance", "")
    }
    (verdict,) = (
        v
        for v in read_verdicts(tmp_path / "run" / "verdicts.csv")
        if (v.label, v.column, v.against) == ("slice-compute", "explained_variance", "open")
    )
    assert verdict.n_seeds == 1
    assert verdict.effect == pytest.approx(by_seed["slice-compute", 1] - by_seed["open", 1])
    # Adding seeds keeps the finished cells.
    study_file.write_text(text.replace("seeds = [1]", "seeds = [0, 1]"))
    states = dict(targets.cell_states(read_study(study_file), tmp_path / "run"))
    assert states["slice-compute-seed1"] == "finished"
    assert states["slice-compute-seed0"] == "missing"


def test_validation_and_evaluation_use_disjoint_texts(study_file, tmp_path):
    heldout = []
    for split in ("evaluation", "validation"):
        settings = read_study(study_file, [f"corpus.eval_split={split}"])
        data = harvests.prepare(settings, Source(settings.model), tmp_path / "run")
        (task, _), (dataset, _) = data.order["toy_order"], data.probes["toy"]
        assert {split_of(text) for text in (*task.texts[::2], *dataset.texts)} == {split}
        heldout.append(data.heldout.token_id[:400])
    assert not torch.equal(*heldout)
    assert len(list((tmp_path / "run" / "activations").glob("training-*"))) == 1  # both use the same training tokens


def test_processes_with_the_same_root_share_the_work_and_give_the_same_bytes(
    study_file, finished, tmp_path, monkeypatch
):
    """Threads replace processes here: a claim excludes both."""
    labels, fill = [], study_cell.fill
    monkeypatch.setattr(
        engines, "fill", lambda study, target, *rest: (labels.append(target.label), fill(study, target, *rest))
    )
    with ThreadPoolExecutor(2) as pool:
        both = [job.result()[0] for job in [pool.submit(run, study_file, tmp_path / "shared") for _ in range(2)]]
    assert sorted(labels) == ["baselines", "open-seed0", "slice-compute-seed0"]
    assert repr(both[0]) == repr(both[1])
    for row, expected in zip(both[0], finished.results, strict=True):
        assert row.metric in SECONDS or repr(row) == repr(expected)
    for cell in ("open-seed0", "slice-compute-seed0"):
        pair = [root / "cells" / cell for root in (finished.root, tmp_path / "shared")]
        for file in ("sae.safetensors", "curve.csv", "settings.json"):
            assert (pair[0] / file).read_bytes() == (pair[1] / file).read_bytes()
        lines = [
            [line for line in (folder / "rows.csv").read_text().splitlines() if "_seconds" not in line]
            for folder in pair
        ]
        assert lines[0] == lines[1]


@pytest.mark.slow
@pytest.mark.embedded
def test_two_jobs_give_the_same_results_as_one(tmp_path):
    cells = 'cells=[{name = "open", mask = {kind = "open"}}, {name = "cut", mask = {kind = "slice", n_slices = 8}}]'
    changes = [
        cells, "comparisons=[]", "corpus.training_tokens=20000", "corpus.heldout_tokens=20000", "training.n_steps=10",
        "evaluation.forgetting_fractions=[0, 0.5, 1]",
        'evaluation.order_tasks=["chronology"]', 'evaluation.probe_datasets=["ag_news"]', "sae.d_sae=512",
    ]  # fmt: skip
    settings = read_study(Path(__file__).parents[1] / "studies" / "quick.toml", changes)
    results = [study_run.run_study(settings, tmp_path / str(n_jobs), print, n_jobs) for n_jobs in (1, 2)]
    log = (tmp_path / "2" / "jobs" / "2.log").read_text()
    assert "Traceback" not in log
    for expected, row in zip(*results, strict=True):
        assert (row.cell, row.metric, row.slice, row.n) == (expected.cell, expected.metric, expected.slice, expected.n)
        assert row.metric in SECONDS or row.value == pytest.approx(expected.value, rel=0.02, abs=0.02, nan_ok=True)


def test_layers_and_seeds_have_different_identities(study_file):
    settings = read_study(study_file)
    other_layer = settings.model_copy(update={"model": settings.model.model_copy(update={"layer": 1})})
    other_seed = settings.model_copy(update={"seeds": (1,)})
    identities = [
        identity(target.made_from)
        for study in (settings, other_layer, other_seed)
        for target in targets.targets_of(study, Source(study.model), study_file.parent)
        if target.cell is not None
    ]
    assert len(set(identities)) == 6


def test_only_damaged_folders_are_reported_and_recomputed(study_file, finish, tmp_path):
    root = tmp_path / "run"
    before = finish(root)
    cell = root / "cells" / "open-seed0"
    (cell / "rows.csv").write_text((cell / "rows.csv").read_text().replace("open,open", "open,shut", 1))
    time_of_other = (root / "cells" / "slice-compute-seed0" / "rows.csv").stat().st_mtime_ns
    (n_folders, (damage,)) = damage_under(root)
    assert n_folders == 3 + 5  # training, held-out and shift harvests, a task and a dataset
    assert damage.startswith(f"{cell / 'rows.csv'} is not what was written")
    after, lines = run(study_file, root)
    assert lines[1] == f"open-seed0 is damaged: moved to {root / 'stale' / 'open-seed0-1'}."
    assert (root / "cells" / "slice-compute-seed0" / "rows.csv").stat().st_mtime_ns == time_of_other
    assert damage_under(root) == (n_folders, [])
    for expected, row in zip(before, after, strict=True):
        assert expected.metric in SECONDS or repr(expected) == repr(row)


@pytest.fixture
def precious(tmp_path):
    """Write a user's folder with an unrelated manifest, outside every run folder."""
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"name": "my site"}')
    (folder / "thesis.txt").write_text("years of work")
    return folder


def files_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("where", ["checkpoints/open-seed0/notes", "checkpoints/open-seed0", "checkpoints"])
def test_a_run_removes_nothing_through_a_link_in_the_checkpoints(study_file, begin, tmp_path, precious, where):
    root = tmp_path / "run"
    (root / where).parent.mkdir(parents=True)
    (root / where).symlink_to(precious)
    before = files_in(precious)
    if where.endswith("notes"):
        (root / "checkpoints" / "open-seed0" / ".DS_Store").write_bytes(b"junk")
        run(study_file, begin(root, "slice-compute-seed0"))
        assert (root / "checkpoints" / "open-seed0" / ".DS_Store").exists()
    else:
        with pytest.raises(BadSetting, match=f"{where} is a symbolic link, which posmask did not write"):
            run(study_file, root)
        assert not (root / "activations").exists()  # raised before the harvest
    assert files_in(precious) == before


@pytest.mark.parametrize("name", ["results.csv", "verdicts.csv", "report.html"])
@pytest.mark.parametrize("kind", ["a file", "a link"])
def test_existing_user_files_raise_before_work_and_are_kept(study_file, tmp_path, name, kind):
    root = tmp_path / "project"
    root.mkdir()
    file = root / name if kind == "a file" else tmp_path / "elsewhere"
    file.write_text("date,weight\n2024-01-01,12.5\n")
    if kind == "a link":
        (root / name).symlink_to(file)
    message = f"project/{name} is a .*, which posmask did not write and does not replace: choose another path, or move"
    with pytest.raises(BadSetting, match=message):
        run(study_file, root)
    assert file.read_text() == "date,weight\n2024-01-01,12.5\n"
    assert [path.name for path in root.iterdir()] == [name]


def test_a_run_replaces_its_earlier_results_and_page(study_file, finish, tmp_path):
    root = tmp_path / "run"
    finish(root)
    page = write_report(root)
    old = page.read_bytes()
    assert b'<meta name="generator" content="posmask ' in old
    compute = 'n_slices = 4 }\nbudget = "compute"\nmeasure_forgetting = true\n'
    assert compute in study_file.read_text()
    study_file.write_text(study_file.read_text().replace(compute, "n_slices = 2 }\n"))
    run(study_file, root)
    assert not page.exists()
    page.write_bytes(old)
    assert write_report(root).read_bytes() != old


@pytest.mark.parametrize("name", ["baselines", "cells/open-seed0"])
def test_a_folder_that_posmask_did_not_write_is_not_moved(study_file, tmp_path, precious, name):
    root = tmp_path / "run"
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (precious / "manifest.json").unlink()
    precious.rename(root / name)
    with pytest.raises(BadSetting, match=f"{name} holds thesis.txt, which posmask did not write"):
        run(study_file, root)
    assert files_in(root / name) == {Path("thesis.txt"): b"years of work"}
    assert not (root / "activations").exists()


def test_an_interrupted_cell_leaves_no_files_and_the_next_run_resumes(study_file, begin, tmp_path, monkeypatch):
    evaluate = study_cell.evaluate

    def stop(sae, *rest):
        if sae.mask.settings.kind == "slice":
            raise KeyboardInterrupt
        return evaluate(sae, *rest)

    monkeypatch.setattr(study_cell, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        run(study_file, begin(tmp_path / "run", "open-seed0"))
    assert [path.name for path in (tmp_path / "run" / "cells").iterdir()] == ["open-seed0"]
    assert not (tmp_path / "run" / "results.csv").exists()
    monkeypatch.setattr(study_cell, "evaluate", evaluate)
    _, lines = run(study_file, tmp_path / "run")
    assert lines == ["2 of 3 folders are finished and stay as they are."]


def test_training_tokens_are_never_held_out_tokens(study_file, tmp_path):
    settings = read_study(study_file)
    data = harvests.prepare(settings, Source(settings.model), tmp_path)
    texts_of = {}
    for name in ("training", "heldout"):
        vectors = getattr(data, name)
        texts = [
            vectors.token_id[(vectors.text == number) & vectors.keep] for number in vectors.text.unique() if number >= 0
        ]
        texts_of[name] = {tuple(ids.tolist()) for ids in texts if len(ids) == 14}
        assert len(texts_of[name]) > 50
    assert not texts_of["training"] & texts_of["heldout"]


STARTED = """
[[cells]]
name = "open-half"
mask = { kind = "open" }
step_fraction = 0.5
[[cells]]
name = "upcycled"
mask = { kind = "slice", n_slices = 4 }
budget = "compute"
init_from = "open-half"
[[cells]]
name = "split"
mask = { kind = "split", start_latents = 32, max_latents = 48, n_windows = 4, n_splittings = 1, watch_steps = 3 }
budget = "compute"
init_from = "open-half"
[[cells]]
name = "switch"
mask = { kind = "switch", n_experts = 4 }
budget = "compute"
[[cells]]
name = "by-sentence"
mask = { kind = "soft", low = 0.3, high = 0.7, position_origin = "sentence", free_fraction = 0.25 }
"""


def test_cells_with_init_from_train_for_the_remaining_steps(study_file, finish, tmp_path):
    study_file.write_text(study_file.read_text().replace("measure_forgetting = true\n", "") + STARTED)
    root = tmp_path / "run"
    finish(root)
    results, _ = run(study_file, root)
    value = {(row.cell, row.metric): row.value for row in results if not row.slice}
    for cell, n_steps in (("open", 20), ("open-half", 10), ("upcycled", 10), ("split", 10), ("switch", 20)):
        total = 10 if cell == "open-half" else 20  # The source's steps count towards the total.
        assert value[cell, "train_tokens"] == total * 256
        curve = (root / "cells" / f"{cell}-seed0" / "curve.csv").read_text().splitlines()
        assert int(curve[-1].split(",")[0]) == n_steps
    assert [value[cell, "d_sae"] for cell in ("upcycled", "split", "switch")] == [128, 48, 128]
    assert value["upcycled", "strictness"] == 1
    assert value["switch", "mean_openness"] == 1
    # The start is part of a cell's identity, and the source cell is trained first.
    study_file.write_text(study_file.read_text().replace("step_fraction = 0.5", "step_fraction = 0.4"))
    settings = read_study(study_file)
    states = dict(targets.cell_states(settings, root))
    assert {cell for cell, state in states.items() if state == "other settings"} == {
        "open-half-seed0", "upcycled-seed0", "split-seed0",
    }  # fmt: skip


def test_cells_can_start_from_a_users_sae(study_file, finish, begin, tmp_path):
    finish(tmp_path / "first")
    sae_folder = tmp_path / "first" / "cells" / "open-seed0"
    base = study_file.read_text().replace("measure_forgetting = true\n", "")
    both_cells = base.replace('{ kind = "open" }', f'{{ kind = "open" }}\ninit_from = "{sae_folder}"').replace(
        'budget = "compute"', f'budget = "compute"\ninit_from = "{sae_folder}"'
    )
    study_file.write_text(both_cells)
    results, _ = run(study_file, begin(tmp_path / "second"))
    tokens = {row.cell: row.value for row in results if row.metric == "train_tokens"}
    assert tokens == {"open": 2 * 20 * 256, "slice-compute": 2 * 20 * 256}
    start = json.loads((sae_folder / "sae.json").read_text())
    for change, message in (
        ({"layer": 3}, "was trained on the residual stream after layer 3, .* the residual stream after layer 2"),
        ({"site": "residual_before"}, "was trained on the residual stream after layer 1, .* after layer 2"),
        ({"site": "mlp"}, "was trained on the MLP output of layer 2, .* the residual stream after layer 2"),
        ({"site": "head"}, "layer 2 and site 'head' are not a site of a model"),
        ({"layer": "2"}, "layer '2' and site 'residual_after' are not a site of a model"),
        ({"weights": "others"}, "was trained on weights 'others' of a model"),
    ):
        (sae_folder / "sae.json").write_text(json.dumps({**start, "origin": {**start["origin"], **change}}))
        with pytest.raises(BadSetting, match=message):
            run(study_file, tmp_path / "third")
    (sae_folder / "sae.json").write_text(json.dumps(start))
    study_file.write_text(both_cells.replace("k = 4", "k = 3"))
    with pytest.raises(BadSetting, match=r"would start from an SAE with the rule .* but its own is"):
        run(study_file, tmp_path / "third")
    study_file.write_text(both_cells.replace("d_sae = 32", "d_sae = 24"))
    with pytest.raises(BadSetting, match="does not open one copy of each of the 32 latents"):
        run(study_file, tmp_path / "third")
    study_file.write_text(both_cells.replace(str(sae_folder), str(tmp_path / "nowhere")))
    with pytest.raises(BadSetting, match=r"init_from = '.*/nowhere' does not exist: give the folder of an SAE"):
        run(study_file, tmp_path / "third")
    single_cell = base.replace('budget = "compute"', f'budget = "compute"\ninit_from = "{sae_folder}"')
    study_file.write_text(single_cell)
    with pytest.raises(BadSetting, match="let all start from the same folder, or none"):
        read_study(study_file)


def test_the_residual_stream_between_two_layers_has_two_names(tmp_path):
    site = {"weights": "abc", "layer": 3, "site": "residual_before"}
    for origin, fits in (
        ({"layer": 2, "site": "residual_after"}, True),
        ({"layer": 2}, True),  # Earlier versions did not record the site.
        ({"layer": 3, "site": "residual_before"}, True),
        ({}, True),
        ({"layer": 3, "site": "residual_after"}, False),
        ({"layer": 3}, False),
        ({"layer": 3, "site": "attention"}, False),
        ({"layer": 2, "site": "mlp"}, False),
    ):
        write_sae(make_sae("open"), tmp_path, origin)
        if fits:
            assert set(targets.checked_init(tmp_path, site)) == {"sha256"}
        else:
            with pytest.raises(BadSetting, match="start from an SAE of the same layer and site"):
                targets.checked_init(tmp_path, site)


def test_exports_state_the_explained_variance_at_their_position(finish, tmp_path):
    results = finish(tmp_path / "run")
    cell = tmp_path / "run" / "cells" / "slice-compute-seed0"
    result = CliRunner().invoke(app, ["export", str(cell), str(tmp_path / "lossy"), "--to", "saelens-lossy"])
    assert result.exit_code == 0, result.output
    cfg = json.loads((tmp_path / "lossy" / "cfg.json").read_text())
    measured = cfg["metadata"]["posmask_explained_variance"]
    (expected,) = (
        row.value for row in results if (row.cell, row.metric, row.slice) == ("slice-compute", "explained_variance", "")
    )
    assert measured["right_positions"] == pytest.approx(expected, abs=1e-4)
    assert (measured["position"], measured["n_tokens"]) == (8, 1512)
    # The file itself reconstructs as measured.
    ours = import_sae(tmp_path / "lossy", tmp_path / "imported", n_positions=16)
    (folder,) = (tmp_path / "run" / "activations").glob("evaluation-*")
    kept = Activations(folder).batch(torch.arange(Activations(folder).n_tokens)).kept()
    sae = read_sae(cell)
    lifted = sae.decode(sae.encode(kept.vectors, kept.position, use_mask=False))
    variance = (kept.vectors - kept.vectors.mean(0)).double().square().sum()
    for name, output in {"one_position": ours(kept.vectors, kept.position), "lifted": lifted}.items():
        error = (kept.vectors - output).detach().double().square().sum()
        assert measured[name] == pytest.approx(float(1 - error / variance), abs=2e-4)
    sentence = (
        f"Explained variance on 1,512 held-out tokens: {measured['right_positions']:.3f} with the right positions, "
        f"{measured['one_position']:.3f} with position 8 for all, {measured['lifted']:.3f} with the mask lifted."
    )
    assert sentence in " ".join(result.output.split())
    assert sentence in (tmp_path / "lossy" / "LOSSY.md").read_text()
    assert sentence in (tmp_path / "lossy" / "README.md").read_text()
    kept_mask = export_saelens(cell, tmp_path / "theirs", unknown_position="typical")["metadata"]
    assert kept_mask["posmask_explained_variance"] == measured
    lifted = export_saelens(cell, tmp_path / "lifted", lossy=True, unknown_position="lifted")["metadata"]
    assert lifted["posmask_explained_variance"] == measured
    assert "posmask_explained_variance" not in export_saelens(cell, tmp_path / "strict")["metadata"]
    open_cell = cell.with_name("open-seed0")
    assert "posmask_explained_variance" not in export_saelens(open_cell, tmp_path / "open", lossy=True)["metadata"]
    shutil.rmtree(tmp_path / "run" / "activations")
    assert export_saelens(cell, tmp_path / "later", lossy=True)["metadata"]["posmask_explained_variance"] is None
    assert (
        "is not measured: the cell's run folder has no held-out vectors"
        in (tmp_path / "later" / "LOSSY.md").read_text()
    )


def test_an_imported_sae_is_evaluated_and_used_as_a_start(study_file, finish, begin, tmp_path):
    """An open cell that is exported to SAELens and imported keeps its numbers and can initialize cells."""
    first = finish(tmp_path / "first")
    export_saelens(tmp_path / "first" / "cells" / "open-seed0", tmp_path / "theirs", lossy=True)
    import_sae(tmp_path / "theirs", tmp_path / "imported")
    settings = read_study(study_file)
    results = study_run.evaluate_folder(settings, tmp_path / "first", tmp_path / "imported")
    assert {row.cell for row in results} == {"imported", "llm"}
    values = {(row.metric, row.slice): row.value for row in results if row.cell == "imported"}
    expected = {(row.metric, row.slice): row.value for row in first if row.cell == "open" and row.metric in METRICS}
    expected = {key: value for key, value in expected.items() if key in values}
    assert len(expected) > 50
    for key, value in expected.items():
        assert values[key] == pytest.approx(value, abs=2e-2, nan_ok=True), key
    assert values["explained_variance", ""] == pytest.approx(expected["explained_variance", ""], abs=1e-5)
    assert "dead_share" not in {metric for metric, _ in values}
    folder = tmp_path / "first" / "evaluated" / "imported"
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(study_run.evaluate_folder(settings, tmp_path / "first", tmp_path / "imported")) == len(results)
    assert written == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    theirs = study_run.evaluate_folder(settings, tmp_path / "first", tmp_path / "theirs")
    theirs = [replace(row, cell="imported") for row in theirs if row.cell == "theirs"]
    assert repr(theirs) == repr([row for row in results if row.cell == "imported"])
    assert {path.name for path in folder.parent.iterdir()} == {"imported", "theirs"}
    base = study_file.read_text()
    text = base.replace("measure_forgetting = true\n", "")
    init_from = f'init_from = "{tmp_path / "imported"}"'
    text = text.replace('{ kind = "open" }', f'{{ kind = "open" }}\n{init_from}')
    study_file.write_text(text.replace('budget = "compute"', f'budget = "compute"\n{init_from}'))
    second, _ = run(study_file, begin(tmp_path / "second"))
    started = read_sae(tmp_path / "second" / "cells" / "slice-compute-seed0")
    assert torch.equal(started.scale, read_sae(tmp_path / "first" / "cells" / "open-seed0").scale)
    explained = {row.cell: row.value for row in second if row.metric == "explained_variance" and not row.slice}
    assert explained["open"] > values["explained_variance", ""]
    page = write_report(tmp_path / "first").read_text()
    assert '"imported"' in page
    assert "is left out" not in page
    study_file.write_text(base.replace("n_positions = 16", "n_positions = 12"))
    with pytest.raises(BadSetting, match="for contexts of 16 positions, the study's have 12: set"):
        study_run.evaluate_folder(read_study(study_file), tmp_path / "third", tmp_path / "imported")


def external_folder(folder, d_model=D_MODEL, **origin):
    """Write an SAE like one that `import` writes."""
    mask = masks.make_mask(masks.mask_settings({"kind": "open"}), N_POSITIONS, 32)
    sae = SparseAutoencoder(d_model, rule_settings({"kind": "topk", "k": 4}), mask)
    write_sae(sae, folder, {"imported": {}, **origin})
    return folder


def test_an_evaluation_harvests_no_training_tokens_and_is_reported(study_file, tmp_path):
    root = tmp_path / "run"
    theirs = external_folder(tmp_path / "theirs", metadata={"prepend_bos": False})
    result = CliRunner().invoke(app, ["evaluate", str(theirs), str(study_file), "--root", str(root)])
    assert result.exit_code == 0, result.output
    assert "It was trained on contexts without BOS" in result.output
    harvested = {folder.name.rpartition("-")[0] for folder in (root / "activations").iterdir()}
    assert "training" not in harvested
    assert {"evaluation", "shift"} <= harvested
    studies = read_studies([root])
    assert [(cell.cell, cell.seed) for cell in studies[0].cells] == [("theirs", 0)]
    assert {row.cell for row in studies[0].rows} == {"theirs", "llm"}
    assert not [warning for warning in studies[0].warnings if "missing" in warning or "left out" in warning]
    assert "theirs" in write_report(root).read_text()
    # Another evaluation setting makes the results those of another study.
    other = read_study(study_file, ["evaluation.shift_texts=6"])
    study_run.evaluate_folder(other, root, external_folder(tmp_path / "others"))
    (study,) = read_studies([root])
    assert [cell.cell for cell in study.cells] == ["others"]
    assert any(
        "Excluded, evaluated with other settings" in warning and "theirs" in warning for warning in study.warnings
    )


def test_an_sae_of_another_size_is_refused_before_anything_is_harvested(study_file, tmp_path):
    settings, root = read_study(study_file), tmp_path / "run"
    wide = external_folder(tmp_path / "wide", d_model=D_MODEL + 1)
    with pytest.raises(BadSetting, match=rf"codes vectors of {D_MODEL + 1} numbers, .* gives {D_MODEL}: choose an SAE"):
        study_run.evaluate_folder(settings, root, wide)
    text = study_file.read_text().replace('budget = "compute"', f'budget = "compute"\ninit_from = "{wide}"')
    study_file.write_text(text.replace('{ kind = "open" }', f'{{ kind = "open" }}\ninit_from = "{wide}"'))
    with pytest.raises(BadSetting, match=rf"codes vectors of {D_MODEL + 1} numbers"):
        run(study_file, root)
    assert not root.exists()


@pytest.mark.parametrize(
    ("theirs", "ours", "fits"),
    [
        ("gemma-2-2b", "google/gemma-2-2b", True),
        ("gpt2-small", "openai-community/gpt2", True),
        ("EleutherAI/pythia-70m-deduped", "EleutherAI/pythia-70m-deduped", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "embedded:SmolLM2-135M-Instruct", True),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-8B", True),
        ("gemma-2-2b", "google/gemma-2-2b-it", False),
        ("gemma-2-2b", "google/gemma-2-9b", False),
        ("gemma-2-2b", "./folder", True),
        (None, "google/gemma-2-2b", True),
    ],
)
def test_an_sae_of_another_model_is_refused(theirs, ours, fits, tmp_path):
    folder = external_folder(tmp_path / "theirs", **({} if theirs is None else {"model": theirs}))
    source = SimpleNamespace(name=ours, d_model=D_MODEL)
    if fits:
        targets.check_fits(folder, source)
        return
    with pytest.raises(BadSetting, match=f"trained on {theirs}, the study reads {ours}: .* --model-name {ours}"):
        targets.check_fits(folder, source)


METRICS = ("explained_variance", "l0", "order_accuracy", "probe_accuracy", "retention", "ce_recovered")


HYPOTHESIS = {"cell": "slice-compute", "against": "open + moment", "column": "local k=5", "expected": "better"}


@pytest.mark.parametrize(
    ("hypothesis", "change", "message"),
    [
        ({"cell": "slcie"}, {}, "hypotheses name 'slcie', which is not a cell: choose from open, slice-compute"),
        ({"against": "open + max"}, {}, "hypotheses name 'open + max', but open has only ['moment', 'segments4']"),
        ({"column": "order k=5"}, {}, "in 'order k=5': choose a column from explained_variance, ce_recovered"),
        ({"column": "block k=5"}, {}, "in block k=5, but no order task is about block order: add one"),
        ({"column": "explained_variance"}, {}, "which does not depend on the pooling: compare the cells themselves"),
        ({"expected": "nicer"}, {}, "hypothesis \"slice-compute\": expected = \"nicer\" must be 'better', 'worse'"),
        ({}, {"seeds": [0, 1]}, "'open + moment' with 2 seeds, which decide nothing: give both at least 3"),
        ({}, {"cell_seeds": [0, 1]}, "have the seeds [0, 1] and [0, 1, 2]: give both the same"),
        ({}, {"margins": {"accuracy": 0}}, "margins.accuracy = 0 must be above 0"),
        ({}, {"margins": {"acuracy": 0.1}}, "margins.acuracy is not a setting: did you mean accuracy?"),
        ({}, {"twice": True}, "in local k=5 twice, or for nothing: remove it"),
        ({}, {"tasks": ["toy_order", "kept"]}, "kept, which are kept for confirmation"),
    ],
)
def test_hypotheses_that_cannot_be_tested_are_refused(hypothesis, change, message, study_file, texts, monkeypatch):
    kept = replace(ORDER_TASKS["toy_order"], for_confirmation=True)
    monkeypatch.setitem(ORDER_TASKS, "kept", kept)
    written = HYPOTHESIS | hypothesis
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in written.items())
    text = study_file.read_text().replace("seeds = [0]", f"seeds = {change.get('seeds', [0, 1, 2])}")
    text += f"\n[[hypotheses]]\n{lines}" * (2 if "twice" in change else 1)
    for name, value in change.get("margins", {}).items():
        text += f"\n[margins]\n{name} = {value}\n"
    if "cell_seeds" in change:
        text = text.replace('name = "slice-compute"', f'name = "slice-compute"\nseeds = {change["cell_seeds"]}')
    if "tasks" in change:
        text = text.replace('["toy_order"]', json.dumps(change["tasks"]))
        text = text.replace("[corpus]", '[corpus]\neval_split = "validation"')
    study_file.write_text(text)
    with pytest.raises(BadSetting) as error:
        read_study(study_file)
    assert message in str(error.value)


def test_a_valid_hypothesis_is_read(study_file, texts):
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in HYPOTHESIS.items())
    text = study_file.read_text().replace("seeds = [0]", "seeds = [0, 1, 2]")
    study_file.write_text(f"{text}\n[[hypotheses]]\n{lines}\n[margins]\naccuracy = 0.02\n")
    study = read_study(study_file)
    assert study.hypotheses[0].model_dump() == HYPOTHESIS
    assert study.margins.by_column()["local k=5"] == 0.02


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'init_from = "open-half"',
            'init_from = "opne"',
            "starts from 'opne', which is not a cell (a folder needs a slash)",
        ),
        (
            'init_from = "open-half"',
            'init_from = "switch"',
            "which is not an open cell that starts from random",
        ),
        ("step_fraction = 0.5", "", "which leaves no step of its 20"),
        ("step_fraction = 0.5", "step_fraction = 0.01", "step_fraction = 0.01 of open-half makes 0 steps"),
        ("step_fraction = 0.5", "step_fraction = 1.5", 'cell "open-half": step_fraction = 1.5 must be at most 1'),
        (
            "n_slices = 4 }\nbudget",
            "n_slices = 4, free_fraction = 1.5 }\nbudget",
            'cell "slice-compute": mask.free_fraction = 1.5 must be at most 1',
        ),
        ("low = 0.3", "low = 0.8", "low = 0.8 is above high = 0.7"),
        ("start_latents = 32", "start_latents = 16", "start_latents = 16 is not the 32 latents that are live"),
        (
            'kind = "slice", n_slices = 4 }\nbudget = "compute"\ninit_from',
            'kind = "cohort", n_cohorts = 8, positions_per_latent = 4 }\nbudget = "compute"\ninit_from',
            "does not open one copy of each of the 32 latents",
        ),
    ],
)
def test_invalid_starts_raise_before_any_work(study_file, old, new, message):
    text = study_file.read_text() + STARTED
    assert old in text
    study_file.write_text(text.replace(old, new))
    with pytest.raises(BadSetting, match=re.escape(message)):
        read_study(study_file)


def test_a_new_mask_or_rule_needs_one_class_and_one_registry_entry(study_file, begin, tmp_path, monkeypatch):
    """As documented in docs/architecture.md: the study, its table and its page need no other change."""

    class Odd(PositionMask):
        class Settings(MaskSettings):
            kind: Literal["odd"] = "odd"

        def _start(self, random):
            parity = torch.arange(self.n_positions)[:, None] % 2
            self._fix((parity == torch.arange(self.n_bound) % 2).float())

    class Floored(rules.ActivationRule):
        class Settings(rules.RuleSettings):
            kind: Literal["floored"] = "floored"
            floor: float = Field(gt=0)

        def codes(self, preactivation, openness, take):
            value = rules.gated(preactivation, openness)
            return value * (value > self.settings.floor)

    monkeypatch.setitem(masks.MASKS, "odd", Odd)
    monkeypatch.setitem(rules.RULES, "floored", Floored)
    text = study_file.read_text().replace('{ kind = "topk", k = 4 }', '{ kind = "floored", floor = 0.1 }')
    text = text.replace('{ kind = "slice", n_slices = 4 }\nbudget = "compute"', '{ kind = "odd", leak = 0.1 }')
    study_file.write_text(text)
    results, _ = run(study_file, begin(tmp_path / "run"))
    assert {row.mask for row in results} == {"none", "open", "odd"}
    assert write_report(tmp_path / "run").is_file()
    sae = read_sae(tmp_path / "run" / "cells" / "slice-compute-seed0")
    assert isinstance(sae.mask, Odd)
    assert isinstance(sae.rule, Floored)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_steps = 20", "n_step = 20", "training.n_step is not a setting: did you mean n_steps?"),
        ("n_steps = 20", "n_steps = 0", "training.n_steps = 0 must be above 0"),
        ("n_steps = 20", "", "training.n_steps is missing"),
        (
            "batch_tokens = 256",
            "batch_tokens = 2048",
            "training.batch_tokens = 2,048 is more than corpus.training_tokens",
        ),
        ("k = 4 }", "k = 40 }", "k = 40 is more than the 32 latents"),
        ("n_slices = 4", "n_slices = 17", "n_slices = 17 is more than the 16 positions"),
        ('kind = "slice", n_slices = 4', 'kind = "hard", positions_per_latent = 4', "has no equal-compute form"),
        ('"slice", n_slices = 4', '"switch", n_experts = 4', "a 'switch' mask cannot be trained on without its router"),
        (
            "n_slices = 4",
            "n_slices = 4, gradient_sharing = 0.9",
            "slice-compute has gradient_sharing = 0.9, but its latents are not copies",
        ),
        ('kind = "slice"', 'kind = "slcie"', "mask kind 'slcie' is unknown: choose one of open, slice"),
        ('name = "slice-compute"', 'name = "open"', "two cells are called 'open'"),
        ('name = "slice-compute"', 'name = "../up"', 'name = "../up" must be lower-case letters'),
        ('"toy_order"', '"toy_ordre"', "evaluation: order_tasks has 'toy_ordre', which is unknown: choose from"),
        ("seeds = [0]", "seeds = []", "seeds = [] must be a list of at least 1"),
        ("seeds = [0]", "seeds = [1, 1]", "repeats a seed"),
        ("retention_positions = 4", "retention_positions = 15", "retention would be 1 for everything"),
        ("ks = [1, 5, 20]", "ks = [0]", "evaluation.ks = [0] holds 0, which must be above 0"),
        ("ks = [1, 5, 20]", "ks = [1, 5, 99]", "probes on 99 latents of sae.d_sae = 32"),
        ("learning_rate = 5e-3", "learning_rate = inf", "training.learning_rate = inf must be a finite number"),
        ('kind = "open"', 'kind = ["open"]', "mask kind ['open'] is unknown"),
        ('name = "open"', 'name = "llm"', "stands for the model itself: rename it"),
        ('against = "open + segments4"', 'against = "opne"', "comparisons name 'opne', which is not a cell"),
        ('"open + segments4"', '"open + segments8"', "open has only ['moment', 'segments4']"),
        ('"open + segments4"', '"open"', "'slice-compute' against 'open' twice, or for nothing"),
        ('"moment"]', '"momentum"]', "order_poolings has 'momentum', which is unknown: choose from segmentsN"),
        ('"moment"]', '"segments0"]', "order_poolings has 'segments0', which is unknown"),
        ('["segments4", "moment"]', '["chosen"]', "'chosen', but nothing beside the mean to choose from"),
        (
            'order_train_groups = 30\norder_test_groups = 10\norder_poolings = ["segments4", "moment"]',
            'order_train_groups = 7\norder_test_groups = 10\norder_poolings = ["segments4", "chosen"]',
            "order_train_groups = 7, of which a quarter is for the choice",
        ),
        ("ks = [1, 5, 20]", "ks = [1, 20]", "ks = [1, 20] must include 1 and 5"),
        ("model_contexts = 8", "model_contexts = 1", "evaluation.model_contexts = 1 must be above 1"),
        ("model_contexts = 8", "model_contexts = 6", "gives 4 causal windows less than two contexts each"),
        ("shift_windows = 4", "shift_windows = 8", "8 shift windows leave 1 tokens of 16 positions"),
        ("shift_windows = 4", "shift_windows = 4\nforgetting_fractions = [0]", "of 20 steps are the steps [0]"),
        (
            "shift_windows = 4",
            "shift_windows = 4\nforgetting_fractions = [0, 0.01, 1]",
            "name fractions that differ by a step",
        ),
        ("measure_forgetting = true", "seeds = [0, 0]", "repeats a seed"),
        ("measure_forgetting = true", "seeds = [1]", "'slice-compute' with 'open + segments4', which share no seed"),
        ("measure_forgetting = true", "seeds = []", 'cell "slice-compute": seeds = [] must be a list of at least 1'),
        ("layer = 2", "layer = 1.5", "model.layer = 1.5 must be a whole number or below 1"),
        (
            'tables = ["words"]',
            'tables = ["words"]\neval_split = "training"',
            "corpus.eval_split = \"training\" must be 'validation' or 'evaluation'",
        ),
        ("[model]", "[model", "is not a readable TOML file"),
    ],
)
def test_invalid_settings_raise_before_any_work(study_file, old, new, message):
    assert old in study_file.read_text()
    study_file.write_text(study_file.read_text().replace(old, new))
    with pytest.raises(BadSetting, match=re.escape(message)):
        read_study(study_file)


def test_a_missing_layer_raises_before_anything_is_written(study_file, tmp_path):
    study_file.write_text(study_file.read_text().replace("layer = 2", "layer = 9"))
    with pytest.raises(BadSetting, match="layer = 9 does not exist: the model has 3 layers"):
        run(study_file, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_a_run_that_fails_to_prepare_keeps_finished_results(study_file, finish, tmp_path):
    root = tmp_path / "run"
    finish(root)
    good = study_file.read_text()
    before = (root / "results.csv").read_bytes()
    for old, new in (("layer = 2", "layer = 9"), ("training_tokens = 1500", "training_tokens = 10_000_000")):
        study_file.write_text(good.replace(old, new))
        with pytest.raises(PosmaskError):
            run(study_file, root)
        assert not (root / "stale").exists()
        assert (root / "results.csv").read_bytes() == before
    study_file.write_text(good)
    assert run(study_file, root)[1] == ["3 of 3 folders are finished and stay as they are."]


def test_old_results_are_removed_before_new_cells(study_file, finish, tmp_path, monkeypatch):
    root = tmp_path / "run"
    finish(root)
    study_file.write_text(study_file.read_text().replace("n_steps = 20", "n_steps = 21"))

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(study_cell, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        run(study_file, root)
    assert not (root / "results.csv").exists()


def test_seeds_are_paired_and_three_seeds_give_a_verdict(study_file, finish, tmp_path):
    text = study_file.read_text().replace("seeds = [0]", "seeds = [0, 1, 2]").replace("measure_forgetting = true\n", "")
    study_file.write_text(text)
    finish(tmp_path / "run")
    results, _ = run(study_file, tmp_path / "run")
    verdicts = {
        (v.against, v.column): v
        for v in read_verdicts(tmp_path / "run" / "verdicts.csv")
        if (v.label, v.column) == ("slice-compute", "explained_variance")
    }
    verdict = verdicts["open", "explained_variance"]
    assert verdict.n_seeds == 3
    by_seed = {
        (row.cell, row.seed): row.value for row in results if row.metric == "explained_variance" and not row.slice
    }
    differences = [by_seed["slice-compute", seed] - by_seed["open", seed] for seed in (0, 1, 2)]
    assert verdict.effect == pytest.approx(sum(differences) / 3)
    assert verdict.ci_low < verdict.effect < verdict.ci_high
    direction = "better" if verdict.effect > 0 else "worse"
    if verdict.p_equivalence < LEVEL:
        direction = "equivalent"
    elif verdict.p_corrected >= LEVEL or abs(verdict.effect) < verdict.margin:
        direction = "undecided"
    assert verdict.verdict == direction


def test_a_class_without_texts_raises_an_error(study_file, tmp_path, monkeypatch):
    monkeypatch.setitem(datasets.DATASETS, "toy", {"even": ("words", "0"), "missing": ("words", "7")})
    with pytest.raises(BadSetting, match="toy has no texts of its class 'missing': leave the dataset out"):
        run(study_file, tmp_path / "run")


@pytest.fixture
def one_cell(study_file):
    """Remove all cells but the open one from the study."""
    study_file.write_text(study_file.read_text().partition('[[cells]]\nname = "slice-compute"')[0])
    return study_file


def test_a_small_dataset_is_capped_and_rows_record_the_real_sizes(one_cell, finish, tmp_path):
    one_cell.write_text(one_cell.read_text().replace("probe_train = 40", "probe_train = 40_000"))
    one_cell.write_text(one_cell.read_text().replace("probe_test = 10", "probe_test = 10_000"))
    finish(tmp_path / "run")
    results, _ = run(one_cell, tmp_path / "run")
    row = next(
        row for row in results if row.metric == "probe_accuracy" and row.cell == "open" and "class" not in row.slice
    )
    n_train = int(rows.parse_slice(row.slice)["train"])
    assert 200 < n_train < 1000
    assert n_train / (n_train + row.n) == pytest.approx(0.8, abs=0.01)


def test_a_study_with_the_saebench_protocol(one_cell, finish, tmp_path):
    one_cell.write_text(one_cell.read_text().replace("ks = [1", 'probe_protocol = "saebench"\nks = [1'))
    finish(tmp_path / "run")
    results, _ = run(one_cell, tmp_path / "run")
    protocols = {rows.parse_slice(row.slice)["protocol"] for row in results if row.metric == "probe_accuracy"}
    assert protocols == {"saebench"}
    saebench_output = json.loads((tmp_path / "run" / "cells" / "open-seed0" / "saebench.json").read_text())
    assert saebench_output["sae_cfg_dict"]["probe_protocol"] == "saebench"
    assert saebench_output["eval_result_metrics"]["sae"]["sae_test_accuracy"] > 0


def test_a_study_without_probes_and_without_an_open_cell(study_file, begin, tmp_path):
    text = study_file.read_text()
    for old, new in (
        ('order_tasks = ["toy_order"]', "order_tasks = []"),
        ('probe_datasets = ["toy"]', "probe_datasets = []"),
        ('kind = "open"', 'kind = "hard", positions_per_latent = 4'),
        ('[[comparisons]]\ncell = "slice-compute"\nagainst = "open + segments4"\n', ""),
    ):
        assert old in text
        text = text.replace(old, new)
    study_file.write_text(text)
    results, _ = run(study_file, begin(tmp_path / "run"))
    assert read_verdicts(tmp_path / "run" / "verdicts.csv") == []
    assert "order_accuracy" not in {row.metric for row in results}
    page = write_report(tmp_path / "run").read_text(encoding="utf8")
    assert "The verdicts" not in page
    assert "explained variance" in page


def test_ablated_latents_are_chosen_on_other_texts_than_the_evaluation(study_file, begin, tmp_path, monkeypatch):
    settings = read_study(study_file)
    data = harvests.prepare(settings, Source(settings.model), begin(tmp_path / "run"))
    chosen_on, evaluated_on = set(), set()
    update, replace = WindowMass.update, suite.without_latents

    def spy(self, batch, codes):
        chosen_on.update(batch.text.tolist())
        update(self, batch, codes)

    def spy_replace(sae, latents):
        inner = replace(sae, latents)

        def replaced(batch, context):
            evaluated_on.update(batch.text.tolist())
            return inner(batch, context)

        return replaced

    monkeypatch.setattr(WindowMass, "update", spy)
    monkeypatch.setattr(suite, "without_latents", spy_replace)
    sae = make_sae_of_cell(settings, settings.cells[0], 12, 0)
    train_on(sae, data.training, settings.training)
    suite.evaluate(sae, torch.zeros(32).bool(), data, "test")
    assert len(chosen_on) > 20
    assert len(evaluated_on) > 4
    assert not chosen_on & evaluated_on


def test_metrics_that_cannot_be_computed_are_missing_with_their_reason(study_file, begin, tmp_path, monkeypatch):
    for module, name in (
        (retention, "MIN_FIRINGS"),
        (downstream, "MIN_CAUSAL_FIRINGS"),
        (position, "MIN_SHIFT_FIRINGS"),
    ):
        monkeypatch.setattr(module, name, 10**9)
    results, _ = run(study_file, begin(tmp_path / "run"))
    by_key = {(row.cell, row.metric, row.slice): row for row in results}
    for metric, where in (
        ("retention", ""), ("profile_fidelity", ""), ("position_information", ""), ("causal_specificity", ""),
        ("shift_content", "mask=on"), ("shift_content", "mask=lifted"), ("retention", "after=0.5"),
    ):  # fmt: skip
        row = by_key["slice-compute", metric, where]
        assert row.value != row.value, metric  # NaN
        assert "fire" in row.reason, metric
    assert by_key["slice-compute", "kl_recovered", ""].value < 1
    assert by_key["slice-compute", "explained_variance", ""].reason == ""
    page = write_report(tmp_path / "run").read_text(encoding="utf8")
    assert "Missing: causal_specificity of open (seed 0), slice-compute (seed 0): fewer than two latents fire" in page
    assert repr(rows.read_rows(tmp_path / "run" / "results.csv")) == repr(results)


def test_evaluating_an_untrained_sae_raises_an_error(study_file, tmp_path):
    settings = read_study(study_file)
    data = harvests.prepare(settings, Source(settings.model), tmp_path)
    sae = make_sae_of_cell(settings, settings.cells[0], 12, 0)
    with torch.no_grad():
        sae.encoder.zero_()
    with pytest.raises(PosmaskError, match="the SAE has 0 active latents per token"):
        study_cell.evaluate(sae, torch.zeros(32).bool(), data, "test")


@pytest.mark.parametrize("fast", ["float32", "bfloat16"])
def test_slow_bfloat16_is_reported_and_the_manifest_records_the_precision(one_cell, begin, tmp_path, monkeypatch, fast):
    monkeypatch.setattr(runtime, "fast_precision", lambda device="cpu": fast)
    monkeypatch.setattr(runtime, "bfloat16_slowdown", lambda: 5.78)
    one_cell.write_text(one_cell.read_text().replace("[training]", '[training]\nprecision = "bfloat16"'))
    lines: list[str] = []
    study_run.run_study(read_study(one_cell), begin(tmp_path / "run"), lines.append)
    warnings = [line for line in lines if "bfloat16" in line]
    assert len(warnings) == (fast == "float32")
    if warnings:
        assert "training.precision" in warnings[0]
        assert "5.8 times" in warnings[0]
        assert "'auto'" in warnings[0]
    manifest = json.loads((tmp_path / "run" / "cells" / "open-seed0" / "manifest.json").read_text())
    assert manifest["training_precision"] == "bfloat16"
