"""Behavior after killed processes, power loss, full disks, lack of memory and hostile files."""

import json
import math
import os
import pickle
import random
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from conftest import D_MODEL, MASKS, N_POSITIONS
from posmask.errors import BadSetting, DamagedFolder
from posmask.masks import make_mask, mask_settings
from posmask.results.rows import read_rows
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.files import read_sae, write_sae
from posmask.sae.rules import rule_settings
from posmask.storage.atomic import replacing
from posmask.storage.manifest import damage_under, finished, read_manifest, take_apart, write_folder, write_in_parts
from posmask.training.checkpoints import Checkpoints

sys.path.insert(0, str(Path(__file__).parent / "reliability"))

from tiny_study import write_tiny_model

HARNESS = Path(__file__).parent / "reliability" / "harness.py"


def run_harness(kills, *stages):
    command = [sys.executable, str(HARNESS), "--kills", str(kills), *(["--stages", *stages] if stages else [])]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def test_killed_runs_end_with_the_same_bytes():
    stages = run_harness(1, "harvest", "train")
    assert [(stage["stage"], stage["kills"]) for stage in stages] == [("harvest", 1), ("train", 1)]
    assert all(stage["ends"] for stage in stages)


@pytest.mark.slow
def test_a_hundred_kills_per_stage_change_no_byte():
    assert [stage["kills"] for stage in run_harness(100)] == [100] * 6


class _Disk:
    """A disk that loses unsynced file contents and directory entries.

    It records the tree before and after each rename and at each sync. Each change of a directory entry since the last
    sync of its folder may be lost independently, except that a surviving change of an entry implies that all earlier
    changes of this entry survive. A rename is a single change of two entries.
    """

    def __init__(self, monkeypatch, root):
        self._root, self._open, self._contents = root, {}, {}
        self._changes = []  # each {(inode of the folder, name): new inode of the entry, or None}
        self._synced = []  # the entries of each change that a sync of the folder has made durable
        self._names = {}
        self.watching = None
        self._look()

        def synced(descriptor):  # The real disk need not sync.
            self._look()
            number = os.fstat(descriptor).st_ino
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if not path.is_relative_to(self._root):
                return
            if path.is_dir():
                for change, durable in zip(self._changes, self._synced, strict=True):
                    durable |= {entry for entry in change if entry[0] == number}
            else:
                self._contents[number] = path.read_bytes()
            if self.watching is not None:
                self.watching()

        def recording(rename):
            def renamed(*args, **kwargs):
                self._look()
                rename(*args, **kwargs)
                self._look()

            return renamed

        monkeypatch.setattr(os, "fsync", synced)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, recording(getattr(os, name)))

    def _look(self):
        now = {}
        for folder in [self._root, *(path for path in self._root.rglob("*") if path.is_dir())]:
            for path in folder.iterdir():
                now[folder.stat().st_ino, path.name] = number = path.stat().st_ino
                if number not in self._open:  # The inode number of an open file is not reused.
                    self._open[number] = os.open(path, os.O_RDONLY)
        gone = {entry: number for entry, number in self._names.items() if entry not in now}
        for entry, number in now.items():
            if self._names.get(entry) != number:
                source = next((old for old, moved in gone.items() if moved == number), None)
                self._changes.append({entry: number} | ({} if source is None else {source: None}))
                gone.pop(source, None)
        self._changes += [{entry: None} for entry in gone]
        self._synced += [set() for _ in self._changes[len(self._synced) :]]
        self._names = now

    def after_power_loss(self, to, chance):
        """Write a possible state of the tree after a power loss; unsynced contents are truncated at random."""
        self._look()
        share = chance.choice((0.0, 0.2, 0.8, 1.0))  # share of unsynced changes that reached the disk
        both = zip(self._changes, self._synced, strict=True)
        kept = [durable == set(change) or chance.random() < share for change, durable in both]
        later = set()
        for number in reversed(range(len(self._changes))):
            kept[number] = kept[number] or not later.isdisjoint(self._changes[number])
            if kept[number]:
                later |= set(self._changes[number])
        names = {}
        for change, is_kept in zip(self._changes, kept, strict=True):
            names |= change if is_kept else {}
        shutil.rmtree(to, ignore_errors=True)
        self._make(self._root.stat().st_ino, names, to, chance)

    def _make(self, folder, names, to, chance):
        to.mkdir()
        for (within, name), number in names.items():
            if within != folder or number is None:
                continue
            if stat.S_ISDIR(os.fstat(self._open[number]).st_mode):
                self._make(number, names, to / name, chance)
                continue
            with open(f"/proc/self/fd/{self._open[number]}", "rb") as file:
                now = file.read()
            content = self._contents.get(number)
            (to / name).write_bytes(now[: chance.randrange(len(now) + 1)] if content != now else now)

    def close(self):
        for descriptor in self._open.values():
            os.close(descriptor)


@pytest.fixture
def memory_folder():
    """Return a folder in memory, where thousands of small files are fast."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder).resolve()


@pytest.mark.skipif(sys.platform != "linux", reason="names of open files are read from /proc")
def test_power_loss_at_any_sync_leaves_no_damage(memory_folder, monkeypatch):
    root, after, chance = memory_folder / "root", memory_folder / "after", random.Random(0)
    root.mkdir()
    disk, promised, made, seen = _Disk(monkeypatch, root), {}, set(), []
    content = {f"part-{number}": bytes([number]) * 1000 for number in range(4)}
    state = {"weights": torch.arange(100.0)}

    def check():
        """After a power loss, nothing is damaged, all promised parts exist, and a resumed run gives the same files."""
        watching, disk.watching = disk.watching, None
        for _ in range(2):
            disk.after_power_loss(after, chance)
            assert damage_under(after)[1] == []
            made.clear()
            make(after, lambda *_: None)
            assert not made & set(promised)
            assert read_all(after) == content | {"rows": b"1,2,3"}
            if (after / "table").exists():
                assert (after / "table").read_text() in ("old" * 100, "new" * 100)
            kept = Checkpoints(after / "study" / "checkpoints" / "cell", {})
            assert kept.done >= promised.get("checkpoint", 0)
            assert not kept.done or torch.equal(kept.read()["weights"], state["weights"] + kept.done)
        seen.append(1)
        disk.watching = watching

    def make(where, promise):
        if not finished(where / "study" / "harvest", {}):
            with write_in_parts(where / "study" / "harvest", {}) as parts:
                for name, what in content.items():
                    if name not in parts:
                        parts.add(name, lambda file, what=what: file.write_bytes(what))
                        made.add(name)
                        promise(name, True)
        if not finished(where / "study" / "cells" / "cell", {}):
            with write_folder(where / "study" / "cells" / "cell", {}) as draft:
                (draft / "deep").mkdir()
                (draft / "deep" / "rows").write_bytes(b"1,2,3")
            made.add("cell")
            promise("cell", True)

    def read_all(where):
        contents = {}
        for name in ("harvest", "cells/cell"):
            manifest = read_manifest(where / "study" / name, verify=True)
            contents |= {Path(file).name: (where / "study" / name / file).read_bytes() for file in manifest["files"]}
        return contents

    def promise(key, value):
        promised[key] = value
        check()

    disk.watching = check
    make(root, promise)
    checkpoints = Checkpoints(root / "study" / "checkpoints" / "cell", {})
    for done in (1, 2, 3, 4):
        checkpoints.write(done, {"weights": state["weights"] + done})
        promise("checkpoint", done)
    for word in ("old", "new"):
        with replacing(root / "table") as beside:
            beside.write_text(word * 100)
    # Recompute a damaged harvest from its intact parts, and replace a cell.
    del promised["part-0"]
    part = root / "study" / "harvest" / "part-0"
    disk.watching = None
    part.unlink()
    take_apart(root / "study" / "harvest")
    disk.watching = check
    make(root, promise)
    del promised["cell"]
    with write_folder(root / "study" / "cells" / "cell", {}, looked_at=True) as draft:
        (draft / "rows").write_bytes(b"1,2,3")
    promise("cell", True)
    disk.close()
    assert len(seen) > 40


def test_a_hostile_pickle_is_never_loaded(tmp_path, model_folder):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    mask = make_mask(mask_settings(MASKS["open"]), N_POSITIONS, 8)
    write_sae(SparseAutoencoder(D_MODEL, rule_settings({"kind": "topk", "k": 2}), mask), tmp_path)
    hostile = pickle.dumps(Hostile())
    (tmp_path / "sae.safetensors").write_bytes(hostile)
    with pytest.raises(DamagedFolder, match="holds no readable SAE"):
        read_sae(tmp_path)
    # As model weights: without safetensors, transformers must raise instead of loading a pickle.
    from posmask.data.models import load_model

    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"weight": Hostile()}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(BadSetting, match="cannot be loaded"):
        load_model(str(tmp_path / "model"), 2, "float32")
    assert not (tmp_path / "executed").exists()
    pickle.loads(hostile)  # The pickle does work.
    assert (tmp_path / "executed").exists()


def test_code_of_a_model_is_never_run(tmp_path, model_folder):
    from posmask.data.models import load_model, load_tokenizer

    shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}
    config["model_type"] = "hostile"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "hostile.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    with pytest.raises(BadSetting, match="cannot be loaded"):
        load_model(str(tmp_path / "model"), 2, "float32")
    load_tokenizer(str(tmp_path / "model"))  # The tokenizer has no code, so it can be loaded.
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_is_reported_and_the_run_resumes_with_space(tmp_path):
    """A limit on the file size gives the same error as a full disk."""
    code = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from pathlib import Path
import torch
from safetensors.torch import save_file
from posmask.cli import commands
from posmask.storage import manifest
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
def run():
    with manifest.write_in_parts(Path(sys.argv[1]) / "harvest", {}) as parts:
        for name in ("small", "large"):
            if name not in parts:
                print("made", name)
                size = 1000 if name == "small" else 100_000
                parts.add(name, lambda file: save_file({"x": torch.zeros(size)}, file))
commands.app = run
commands.main()
"""
    full, enough = (
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), str(limit)], capture_output=True, text=True, check=False
        )
        for limit in (50_000, 10_000_000)
    )
    assert (full.returncode, full.stdout) == (1, "made small\nmade large\n")
    assert "Traceback" not in full.stderr
    assert "check the path, its permissions and the space left on the disk" in full.stderr
    assert (enough.returncode, enough.stdout) == (0, "made large\n")
    assert set(read_manifest(tmp_path / "harvest", verify=True)["files"]) == {"small", "large"}


@pytest.mark.parametrize(
    "failure", ["torch.zeros(2**40)", "bytearray(2**44)", "numpy.zeros(2**44)"], ids=["torch", "python", "numpy"]
)
def test_lack_of_memory_is_reported_without_traceback(failure):
    code = f"import numpy, torch; from posmask.cli import commands; commands.app = lambda: {failure}; commands.main()"
    code = f"import resource; resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36)); {code}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("posmask: memory ran out")


@pytest.mark.slow
def test_processes_and_shard_sizes_change_no_byte_and_batch_sizes_only_rounding(tmp_path):
    """One or two processes and other shard sizes change no byte; other model batch sizes change rounding only."""
    write_tiny_model(tmp_path / "model")

    def run(name, *, jobs=1, shard=65536, forward=4096):
        root = tmp_path / name / "run"
        root.parent.mkdir()
        script = Path(__file__).parent / "reliability" / "elsewhere.py"
        command = [sys.executable, script, tmp_path / "model", root, str(jobs), str(shard), str(forward)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        files = json.loads(result.stdout)
        results = read_rows(root / "results.csv")
        values = {
            (row.cell, row.metric, row.slice): row.value for row in results if not row.metric.endswith("_seconds")
        }
        return {file: digest for file, digest in files.items() if not file.startswith("vectors/")}, values

    files, rows = run("default")
    assert len(files) > 30
    assert run("two-jobs", jobs=2)[0] == files
    assert run("shards", shard=512)[0] == files
    _, others = run("batches", forward=100)
    assert others.keys() == rows.keys()
    differences = [abs(others[key] - value) for key, value in rows.items() if not math.isnan(value)]
    assert 0 < max(differences) < 1e-4  # 2.8e-5 was measured; 0 would mean that the setting has no effect
