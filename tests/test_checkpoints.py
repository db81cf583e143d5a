"""Checkpoints: resumed training equals uninterrupted training bit for bit, and foreign files stay untouched."""

import shutil
import time

import pytest
import torch

from conftest import D_SAE, KINDS, MASKS, N_POSITIONS, RULES
from posmask.data.activations import training_batches
from posmask.errors import BadSetting, DegenerateResult
from posmask.masks import make_mask, mask_settings
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.rules import rule_settings
from posmask.training import checkpoints as training_checkpoints
from posmask.training.checkpoints import Checkpoints, remove_checkpoints
from posmask.training.loop import train
from posmask.training.settings import TrainingSettings

SETTINGS = TrainingSettings(
    n_steps=20, batch_tokens=256, learning_rate=5e-3, dead_after_eligible_tokens=300, aux_k=4, mask_learning_rate=0.1
)
# Settings with which every mask changes within 20 steps, before and after most interruptions.
QUICK = {
    "soft": {"pressure": 0.5, "last_temperature": 0.3, "freeze_at": 0.9},
    "importance": {"n_prunings": 4, "first_pruning": 0.2, "last_pruning": 0.9, "regrow": 0.3},
    "split": {"first_splitting": 0.3, "last_splitting": 0.8, "watch_steps": 4, "gradient_sharing": 0.5},
    "windows": {"gradient_sharing": 0.5},
}
MADE_FROM = {"what": "test"}


class _Stopped(Exception):
    pass


def make(kind, gating, rule, d_model):
    tie = {} if gating == "forward" else {"gradient_sharing": 0.0}
    mask = make_mask(mask_settings({**MASKS[kind], "gating": gating, **QUICK.get(kind, {}), **tie}), N_POSITIONS, D_SAE)
    return SparseAutoencoder(d_model, rule_settings(RULES[rule]), mask)


def trained(activations, kind, gating, rule, folder=None, stop=None, settings=SETTINGS):
    """Resume from the newest checkpoint in `folder`; write one after step `stop` and interrupt the next step."""
    sae = make(kind, gating, rule, activations.d_model)
    sae.center, sae.scale = activations.center_and_scale
    checkpoints = None if folder is None else Checkpoints(folder, MADE_FROM)
    n_done = 0 if checkpoints is None else checkpoints.done

    def after(done):
        if stop is not None and done > stop:
            raise _Stopped
        if checkpoints is not None:
            checkpoints.due = lambda at_end: done == stop

    n_left, pairs = settings.n_steps - n_done, sae.rule.pairs_tokens
    batches = training_batches(activations, settings.batch_tokens, n_left, 0, after=n_done, pairs=pairs)
    return train(sae, batches, settings, "test", after, checkpoints)


def assert_same(run, expected):
    for (name, a), (_, b) in zip(
        (*run.sae.named_parameters(), *run.sae.named_buffers()),
        (*expected.sae.named_parameters(), *expected.sae.named_buffers()),
        strict=True,
    ):
        assert torch.equal(a, b), name
    assert run.curve == expected.curve
    assert run.snapshots.by_step.keys() == expected.snapshots.by_step.keys()
    for step, openness in run.snapshots.by_step.items():
        assert torch.equal(openness, expected.snapshots.by_step[step]), step
    assert torch.equal(run.dead, expected.dead)


@pytest.mark.parametrize(
    ("kind", "gating", "rule"),
    [
        *((kind, gating, "topk") for kind, gating in KINDS),
        *(("slice", "forward", rule) for rule in RULES if rule != "topk"),
    ],
)
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(activations, tmp_path, kind, gating, rule):
    uninterrupted = trained(activations, kind, gating, rule)
    for stop in (3, 9, 13, 18):  # each run resumes from the previous one
        with pytest.raises(_Stopped):
            trained(activations, kind, gating, rule, tmp_path, stop)
    trained(activations, kind, gating, rule, tmp_path, 20)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [18, 20]
    assert_same(trained(activations, kind, gating, rule, tmp_path), uninterrupted)  # no steps remain
    shutil.rmtree(tmp_path / f"{20:09d}")
    assert_same(trained(activations, kind, gating, rule, tmp_path), uninterrupted)


def test_foreign_and_damaged_checkpoints_are_skipped(activations, tmp_path, capsys):
    work = activations, "importance", "forward", "topk"
    uninterrupted = trained(*work)
    for stop in (6, 12):
        with pytest.raises(_Stopped):
            trained(*work, tmp_path, stop)
    assert Checkpoints(tmp_path, {"what": "other work"}).done == 0
    assert Checkpoints(tmp_path, MADE_FROM).done == 12
    newest = tmp_path / f"{12:09d}" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert_same(trained(*work, tmp_path), uninterrupted)
    output = capsys.readouterr().err
    assert "A damaged checkpoint is skipped" in output
    assert "resumes from its checkpoint after 6 steps" in output


def test_a_checkpoint_left_by_an_interrupted_removal_is_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path, MADE_FROM)
    for done in (1, 2):
        checkpoints.write(done, {"a": torch.zeros(1)})
    (tmp_path / f"{1:09d}" / "manifest.json").unlink()
    assert Checkpoints(tmp_path, MADE_FROM).done == 2
    assert [path.name for path in tmp_path.iterdir()] == [f"{2:09d}"]


def test_a_third_checkpoint_left_by_a_killed_process_is_removed(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, MADE_FROM)
    for done in (1, 2):
        checkpoints.write(done, {"a": torch.zeros(1)})
    monkeypatch.setattr(training_checkpoints, "remove", lambda *path: None)  # killed after the last one was written
    checkpoints.write(3, {"a": torch.zeros(1)})
    monkeypatch.undo()
    assert Checkpoints(tmp_path, MADE_FROM).done == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{2:09d}", f"{3:09d}"]


def test_time_between_checkpoints_follows_their_cost(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    checkpoints = Checkpoints(tmp_path, MADE_FROM, every_seconds=60.0)
    seen = []
    for seconds in (59, 61):
        now[0] = seconds
        seen.append(checkpoints.due())
    assert seen == [False, True]
    save = training_checkpoints.save_file
    monkeypatch.setattr(
        training_checkpoints, "save_file", lambda *args: (save(*args), now.__setitem__(0, now[0] + 4))
    )  # saving takes 4 s
    checkpoints.write(1, {"a": torch.zeros(1)})
    for seconds in (65 + 60, 65 + 199, 65 + 201):
        now[0] = seconds
        seen.append(checkpoints.due())
    assert seen[2:] == [False, False, True]


def test_the_time_of_the_first_checkpoint_follows_its_expected_size(activations, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    # 50 times the write time at 40 MB/s, and at least 90 s.
    for n_bytes, first in ((64e6, 90), (256e6, 320), (1e9, 1250)):
        now[0] = 0.0
        checkpoints = Checkpoints(tmp_path / str(n_bytes), MADE_FROM)
        checkpoints.expect(n_bytes)
        for at_end in (False, True):
            now[0] = first - 1
            assert not checkpoints.due(at_end=at_end)
            now[0] = first + 1
            assert checkpoints.due(at_end=at_end)
    # The expected size is the written size, apart from small tensors besides weights and moments.
    expected = []
    monkeypatch.setattr(Checkpoints, "expect", lambda self, n_bytes: expected.append(n_bytes))
    trained(activations, "slice", "forward", "topk", tmp_path / "cell", 20)
    state = Checkpoints(tmp_path / "cell", MADE_FROM).read()
    written = sum(tensor.nbytes for name, tensor in state.items() if not name.startswith("sae.mask"))
    assert expected[0] <= written <= 1.2 * expected[0]


@pytest.mark.parametrize(
    ("rule", "changes", "message"),
    [
        ("topk", {"learning_rate": 1e6, "max_gradient_norm": None}, "diverges|is (nan|inf)|NaN or infinite"),
        ({"kind": "relu", "l1_coefficient": 1e4}, {"n_steps": 200, "learning_rate": 0.05}, "are dead"),
    ],
)
def test_degenerate_training_raises_and_keeps_the_last_checkpoint(activations, tmp_path, rule, changes, message):
    sae = SparseAutoencoder(
        activations.d_model, rule_settings(RULES[rule] if isinstance(rule, str) else rule),
        make_mask(mask_settings({"kind": "open"}), N_POSITIONS, D_SAE),
    )  # fmt: skip
    sae.center, sae.scale = activations.center_and_scale
    checkpoints = Checkpoints(tmp_path / "cell", MADE_FROM)
    checkpoints.write(0, {"a": torch.zeros(1)})
    checkpoints.due = lambda at_end: False
    settings = SETTINGS.model_copy(update=changes)
    batches = training_batches(activations, settings.batch_tokens, settings.n_steps, 0)
    with pytest.raises(DegenerateResult, match=message):
        train(sae, batches, settings, "test", checkpoints=checkpoints)
    assert Checkpoints(tmp_path / "cell", MADE_FROM).read()


def test_a_state_with_nan_raises_and_is_not_written(activations, tmp_path):
    def spoil(done):
        with torch.no_grad():
            sae.decoder_bias[0] = torch.nan if done == 7 else sae.decoder_bias[0]
        checkpoints.due = lambda at_end: done in (5, 7)

    sae = make("slice", "forward", "topk", activations.d_model)
    sae.center, sae.scale = activations.center_and_scale
    checkpoints = Checkpoints(tmp_path, MADE_FROM)
    batches = training_batches(activations, 256, 20, 0)
    with pytest.raises(
        DegenerateResult, match=r"NaN or infinite numbers after step 7 \(in sae.decoder_bias\).*after 5 steps stays in"
    ):
        train(sae, batches, SETTINGS, "test", spoil, checkpoints)
    assert Checkpoints(tmp_path, MADE_FROM).done == 5


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def precious(tmp_path):
    """Write a user's folder with an unrelated manifest, outside every run folder."""
    folder = tmp_path / "precious"
    (folder / "deep").mkdir(parents=True)
    (folder / "manifest.json").write_text('{"name": "my site"}')
    (folder / "deep" / "thesis.txt").write_text("years of work")
    return folder


def test_only_checkpoints_are_removed_from_their_folder(tmp_path, precious):
    folder = tmp_path / "checkpoints" / "cell"
    folder.mkdir(parents=True)
    shutil.copytree(precious, folder / "copied")
    (folder / ".DS_Store").write_bytes(b"junk")
    (folder / "0 notes.txt").write_text("notes")
    (folder / "linked").symlink_to(precious)
    before = snapshot(folder)
    checkpoints = Checkpoints(folder, MADE_FROM)
    for done in (1, 2, 3):
        checkpoints.write(done, {"a": torch.zeros(1)})
    assert Checkpoints(folder, MADE_FROM).done == 3
    remove_checkpoints(folder)
    assert snapshot(folder) == before
    assert (folder / "linked").is_symlink()
    assert len(snapshot(precious)) == 2
    remove_checkpoints(tmp_path / "checkpoints" / "nowhere")


@pytest.mark.parametrize("where", ["checkpoints", "checkpoints/cell", "checkpoints/cell/000000002"])
def test_symbolic_links_are_not_followed(tmp_path, precious, where):
    link = tmp_path / where
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(precious)
    before = snapshot(precious)
    with pytest.raises(BadSetting, match=f"{link} is a symbolic link, which posmask did not write .* move it away"):
        Checkpoints(tmp_path / "checkpoints" / "cell", MADE_FROM).write(2, {"a": torch.zeros(1)})
    remove_checkpoints(tmp_path / "checkpoints" / "cell")
    assert snapshot(precious) == before


def test_a_checkpoint_with_other_files_raises_an_error_and_is_kept(tmp_path):
    Checkpoints(tmp_path, MADE_FROM).write(1, {"a": torch.zeros(1)})
    (tmp_path / "000000001" / "thesis.txt").write_text("years of work")
    with pytest.raises(BadSetting, match=r"000000001 holds thesis.txt, which posmask did not write"):
        Checkpoints(tmp_path, {"what": "other work"})
    remove_checkpoints(tmp_path)
    assert (tmp_path / "000000001" / "thesis.txt").exists()


def test_a_draft_left_by_a_killed_process_is_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path, MADE_FROM)
    checkpoints.write(1, {"a": torch.zeros(1)})
    (tmp_path / ".000000002.draft-99999999").mkdir()  # no process has this number
    (tmp_path / ".000000002.draft-99999999" / "state.safetensors").write_bytes(b"half")
    Checkpoints(tmp_path, MADE_FROM)
    assert [path.name for path in tmp_path.iterdir()] == ["000000001"]
    remove_checkpoints(tmp_path)
    assert not tmp_path.exists()
