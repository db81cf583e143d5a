"""What survives: killed processes, lost power, full disks, too little memory, bad input, hostile files."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import D_MODEL, MASKS, N_POSITIONS
from posmask import folders
from posmask.errors import BadSetting, DamagedFolder
from posmask.mask_kinds import make_mask, mask_settings
from posmask.rules import rule_settings
from posmask.sae import SparseAutoencoder, read_sae, write_sae

sys.path.insert(0, str(Path(__file__).parent / "reliability"))

HARNESS = Path(__file__).parent / "reliability" / "harness.py"


def run_harness(kills, *stages):
    command = [sys.executable, str(HARNESS), "--kills", str(kills), *(["--stages", *stages] if stages else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_runs_that_were_killed_end_with_the_same_bytes():
    seen = run_harness(2, "harvest", "train", "report")
    assert [(stage["stage"], stage["kills"]) for stage in seen] == [("harvest", 2), ("train", 2), ("report", 2)]
    assert all(stage["ends"] for stage in seen)


@pytest.mark.slow
def test_a_hundred_kills_in_every_stage_change_no_byte():
    assert [stage["kills"] for stage in run_harness(100)] == [100] * 6


class _Disk:
    """A disk that loses what was not synced: remembers each file and each folder's names as of their last sync."""

    def __init__(self, monkeypatch):
        self.contents, self.names, self.moments = {}, {}, []
        fsync, self.watching = os.fsync, None

        def synced(descriptor):
            fsync(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            key = os.fstat(descriptor).st_ino
            if path.is_dir():
                self.names[key] = {one.name: one.stat().st_ino for one in path.iterdir()}
            else:
                self.contents[key] = path.read_bytes()
            if self.watching is not None:
                self.watching()

        monkeypatch.setattr(os, "fsync", synced)

    def after_power_loss(self, root, to, chance):
        """Copy `root` as it may stand after the power went: unsynced contents cut at random, synced ones whole."""
        shutil.rmtree(to, ignore_errors=True)
        for path in [root, *sorted(root.rglob("*"))]:
            target = to / path.relative_to(root)
            if path.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            content = self.contents.get(path.stat().st_ino)
            if content != (now := path.read_bytes()):
                content = now[: chance.randrange(len(now) + 1)] if content is None else content
            target.write_bytes(content)


@pytest.mark.skipif(sys.platform != "linux", reason="names of open files are read from /proc")
def test_power_loss_at_any_sync_leaves_only_what_is_whole(tmp_path, monkeypatch):
    disk, chance, seen = _Disk(monkeypatch), random.Random(0), []
    root, after = tmp_path / "root", tmp_path / "after"
    content = {f"part-{number}": bytes([number]) * 1000 for number in range(4)}

    def check():
        watching, disk.watching = disk.watching, None
        disk.after_power_loss(root, after, chance)
        assert folders.damage_under(after)[1] == []
        make(after)
        assert read_all(after) == content | {"rows": b"1,2,3"}
        seen.append(1)
        disk.watching = watching

    def make(where):
        if not folders.finished(where / "harvest", {}):
            with folders.write_in_parts(where / "harvest", {}) as parts:
                for name, what in content.items():
                    if name not in parts:
                        parts.add(name, lambda file, what=what: file.write_bytes(what))
        if not folders.finished(where / "cell", {}):
            with folders.write_folder(where / "cell", {}) as draft:
                (draft / "rows").write_bytes(b"1,2,3")

    def read_all(where):
        found = {}
        for name in ("harvest", "cell"):
            manifest = folders.read_manifest(where / name, verify=True)
            found |= {file: (where / name / file).read_bytes() for file in manifest["files"]}
        return found

    root.mkdir()
    disk.watching = check
    make(root)
    assert len(seen) > 15


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
    # As a model's weights: transformers must find no safetensors and refuse, not fall back on a pickle.
    from posmask.model import load_model

    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"weight": Hostile()}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(BadSetting, match="cannot be loaded"):
        load_model(str(tmp_path / "model"), 2, "float32")
    assert not (tmp_path / "executed").exists()
    pickle.loads(hostile)  # It would have worked.
    assert (tmp_path / "executed").exists()


def test_no_code_of_a_model_is_run(tmp_path, model_folder):
    from posmask.model import load_model, load_tokenizer

    shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}
    config["model_type"] = "hostile"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "hostile.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    with pytest.raises(BadSetting, match="cannot be loaded"):
        load_model(str(tmp_path / "model"), 2, "float32")
    load_tokenizer(str(tmp_path / "model"))  # It has no code of its own, so it may be read.
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_is_said_in_a_sentence_and_space_lets_the_run_go_on(tmp_path):
    """Files may not grow beyond a limit: what a write then gets is what a full disk gives it."""
    code = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from pathlib import Path
import torch
from safetensors.torch import save_file
from posmask import cli, folders
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
def run():
    with folders.write_in_parts(Path(sys.argv[1]) / "harvest", {}) as parts:
        for name in ("small", "large"):
            if name not in parts:
                print("made", name)
                size = 1000 if name == "small" else 100_000
                parts.add(name, lambda file: save_file({"x": torch.zeros(size)}, file))
cli.app = run
cli.main()
"""
    full, enough = (
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), str(limit)], capture_output=True, text=True, check=False
        )
        for limit in (50_000, 10_000_000)
    )
    assert (full.returncode, full.stdout) == (2, "made small\nmade large\n")
    assert "Traceback" not in full.stderr
    assert "check the path, its permissions and the space left on the disk" in full.stderr
    assert (enough.returncode, enough.stdout) == (0, "made large\n")
    assert set(folders.read_manifest(tmp_path / "harvest", verify=True)["files"]) == {"small", "large"}


@pytest.mark.parametrize(
    "failure", ["torch.zeros(2**40)", "bytearray(2**44)", "numpy.zeros(2**44)"], ids=["torch", "python", "numpy"]
)
def test_too_little_memory_is_said_in_a_sentence(failure):
    code = f"import numpy, torch; from posmask import cli; cli.app = lambda: {failure}; cli.main()"
    code = f"import resource; resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36)); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("posmask: memory ran out")
