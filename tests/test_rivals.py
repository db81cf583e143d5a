"""Cells of one study that differ in more than their mask: rules, biases per position, pairs of tokens."""

import json
import re

import pytest
import torch

from posmask.data.activations import Activations
from posmask.errors import BadSetting
from posmask.report import page
from posmask.report.reading import read_studies
from posmask.sae.files import read_sae
from posmask.study import estimate, targets
from posmask.study import run as study_run
from posmask.study.source import Source
from posmask.study.study_file import read_study

MATRYOSHKA = '{ kind = "matryoshka", k = 4, parts = [0.25, 1.0] }'


def with_cells(study_file, *cells):
    """Write the study with its open cell and these cells; return its settings."""
    text = study_file.read_text()
    text = text[: text.index('[[cells]]\nname = "slice-compute"')]
    study_file.write_text(text + "".join(f"[[cells]]\n{cell}\n" for cell in cells))
    return read_study(study_file)


def cell(name, mask='{ kind = "open" }', **settings):
    lines = [f"{key} = {value}" for key, value in settings.items()]
    return "\n".join([f'name = "{name}"', f"mask = {mask}", *lines])


def made_from(study, root):
    return {target.label: target.made_from for target in targets.targets_of(study, Source(study.model, "cpu"), root)}


def test_a_cell_has_its_own_rule(study_file, begin, tmp_path):
    slices = '{ kind = "slice", n_slices = 4 }'
    study = with_cells(
        study_file,
        cell("nested", rule=MATRYOSHKA),
        cell("nested-slice", slices, rule=MATRYOSHKA, budget='"compute"'),
        cell("slice", slices, budget='"compute"'),
    )
    root = begin(tmp_path / "run", "open-seed0")
    results = study_run.run_study(study, root, say=lambda line: None)
    kinds = {"open": "topk", "nested": "matryoshka", "nested-slice": "matryoshka", "slice": "topk"}
    for name, kind in kinds.items():
        folder = root / "cells" / f"{name}-seed0"
        assert read_sae(folder).rule.settings.kind == kind
        made = json.loads((folder / "settings.json").read_text())
        assert made["sae"]["rule"]["kind"] == kind
        config = json.loads((folder / "saebench.json").read_text())["sae_cfg_dict"]
        assert config["sae"]["rule"]["kind"] == kind
        assert any(row.cell == name and row.metric == "explained_variance" for row in results)
    # A control compares with the unmasked SAE of the same rule only.
    controls = {row.cell for row in results if "zero-step" in row.slice}
    assert controls == {"slice"}
    about = page._about(read_studies([root])[0], 1)
    assert about[1:3] == ["topk, k = 4", "nested: matryoshka, k = 4"]
    assert "32 latents (nested-slice 128, slice 128)" in about


def test_a_rule_of_its_own_is_the_only_change_of_an_identity(study_file, tmp_path):
    plain = made_from(read_study(study_file), tmp_path)["open-seed0"]
    assert plain["cell"].keys().isdisjoint({"rule", "position_bias"})
    assert plain["sae"] == {"d_sae": 32, "rule": {"kind": "topk", "k": 4}}
    study = with_cells(
        study_file,
        cell("same", rule='{ kind = "topk", k = 4 }'),
        cell("other", rule='{ kind = "topk", k = 5 }'),
        cell("half", rule='{ kind = "topk", k = 5 }', step_fraction=0.5),
        cell("started", '{ kind = "slice", n_slices = 4 }', budget='"compute"', init_from='"half"',
             rule='{ kind = "topk", k = 5 }'),
    )  # fmt: skip
    made = made_from(study, tmp_path)
    assert made["open-seed0"] == plain
    assert made["same-seed0"] == plain | {"cell": plain["cell"] | {"name": "same"}}
    assert made["other-seed0"]["sae"]["rule"]["k"] == 5
    assert "rule" not in made["started-seed0"]["init_from"]
    assert study.baseline == "open"


def test_a_start_with_other_training_settings_of_the_rule_is_part_of_the_identity(study_file, tmp_path):
    batch = '{{ kind = "batchtopk", k = 4, threshold_rate = {} }}'
    study = with_cells(
        study_file,
        cell("half", rule=batch.format(0.1), step_fraction=0.5),
        cell("started", init_from='"half"', rule=batch.format(0.2)),
    )
    assert made_from(study, tmp_path)["started-seed0"]["init_from"]["rule"]["threshold_rate"] == 0.1


def test_cells_with_a_bias_per_position(study_file, begin, tmp_path):
    slices = '{ kind = "slice", n_slices = 4 }'
    study = with_cells(
        study_file,
        cell("mean", position_bias='"mean"', measure_forgetting="true"),
        cell("learned", position_bias='"learned"'),
        cell("sliced", slices, position_bias='"mean"', budget='"compute"', init_from='"half"', step_fraction=1),
        cell("half", position_bias='"mean"', step_fraction=0.5),
    )
    assert study.baseline == "open"
    root = begin(tmp_path / "run", "open-seed0")
    results = study_run.run_study(study, root, say=lambda line: None)
    saes = {name: read_sae(root / "cells" / f"{name}-seed0") for name in ("open", "mean", "learned", "sliced")}
    (folder,) = (root / "activations").glob("training-*")
    activations = Activations(folder)
    means = saes["mean"].normalize(activations.position_means(16, "context"))[1:].nan_to_num(0)
    assert saes["open"].position_bias is None
    assert torch.equal(saes["mean"].position_bias[1:], means)
    assert torch.equal(saes["sliced"].position_bias[1:], means)
    moved = (saes["learned"].position_bias.detach()[1:] - means).abs()
    assert 0 < float(moved.max()) < 0.2
    for name in saes:
        values = {row.metric: row.value for row in results if row.cell == name and not row.slice}
        assert values["explained_variance"] > 0.5
        assert values["kl_recovered"] > 0.5
    assert not any("zero-step" in row.slice for row in results)  # The baseline has no bias per position.
    assert any("retention" in row.metric and "after" in row.slice for row in results if row.cell == "mean")
    about = page._about(read_studies([root])[0], 1)
    assert "mean: topk, k = 4, position bias mean" in about
    assert made_from(study, root)["mean-seed0"]["cell"]["position_bias"] == "mean"


def test_an_estimate_uses_the_rule_of_each_cell(study_file, tmp_path):
    relu = '{ kind = "relu", l1_coefficient = 0.1 }'
    study = with_cells(study_file, cell("relu", rule=relu))
    machine = estimate.Machine("round", {"bfloat16": 1e12, "float32": 1e11}, 1e30, "nowhere", 1.0, 1.0, 1.0, 0.0, None)
    plan = estimate.plan(study, tmp_path / "run", estimate.Rates(machine, 0.0, 0.0))
    # A rule without k computes four products instead of one.
    assert plan.seconds("training", "relu") == pytest.approx(4 * plan.seconds("training", "open"), rel=0.01)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([cell("x", rule='{ kind = "tpok", k = 4 }')], "'tpok'"),
        ([cell("x", rule='{ kind = "topk", n = 4 }')], "rule.n is not a setting"),
        ([cell("x", rule='{ kind = "topk", k = 64 }')], "k = 64 is more than the 32 latents"),
        ([cell("x", position_bias='"median"')], "cell \"x\": position_bias = \"median\" must be 'mean' or 'learned'"),
        (
            [
                cell("half", step_fraction=0.5, position_bias='"mean"'),
                cell("x", '{ kind = "slice", n_slices = 4 }', budget='"compute"', init_from='"half"'),
            ],
            "x has position_bias = None, but starts from half with 'mean': give both the same",
        ),
        (
            [
                cell("half", step_fraction=0.5),
                cell("x", '{ kind = "slice", n_slices = 4 }', budget='"compute"', init_from='"half"', rule=MATRYOSHKA),
            ],
            "but starts from half with the rule {'kind': 'topk', 'k': 4}: give both the same",
        ),
    ],
)  # fmt: skip
def test_settings_of_cells_that_do_not_fit_are_refused(study_file, cells, message):
    with pytest.raises(BadSetting, match=re.escape(message)):
        with_cells(study_file, *cells)
