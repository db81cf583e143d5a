import json
import multiprocessing

import pytest

from posmask import folders
from posmask.errors import DamagedFolder
from posmask.folders import finished, identity, read_manifest, set_aside, write_folder

MADE_FROM = {"layer": 5, "seed": 0}


@pytest.fixture
def folder(tmp_path):
    with write_folder(tmp_path / "cell", MADE_FROM, tokens=12) as draft:
        (draft / "rows.csv").write_text("value\n1\n")
        (draft / "deep").mkdir()
        (draft / "deep" / "sae.bin").write_bytes(bytes(range(100)))
    return tmp_path / "cell"


def test_a_finished_folder_is_found_by_what_made_it(folder):
    assert finished(folder, MADE_FROM)
    assert not finished(folder, {**MADE_FROM, "layer": 19})
    manifest = read_manifest(folder, verify=True)
    assert manifest["tokens"] == 12
    assert manifest["identity"] == identity(MADE_FROM)
    assert set(manifest["files"]) == {"rows.csv", "deep/sae.bin"}


def test_an_interrupted_folder_never_looks_finished(tmp_path):
    def interrupted():
        with write_folder(tmp_path / "cell", MADE_FROM) as draft:
            (draft / "rows.csv").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "cell").mkdir()  # as a copy that was cut off would leave it
    assert not finished(tmp_path / "cell", MADE_FROM)
    with pytest.raises(DamagedFolder, match="was never finished"):
        read_manifest(tmp_path / "cell")


def test_every_flipped_byte_cut_and_missing_file_is_found(folder):
    file = folder / "deep" / "sae.bin"
    content = file.read_bytes()
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(DamagedFolder, match=r"sae\.bin is not what was written"):
            read_manifest(folder, verify=True)
    file.write_bytes(content[:-1])
    with pytest.raises(DamagedFolder, match="is not what was written"):
        read_manifest(folder, verify=True)
    file.unlink()
    with pytest.raises(DamagedFolder, match="is missing"):
        read_manifest(folder, verify=True)


def test_an_unreadable_manifest_says_so(folder):
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DamagedFolder, match=r"manifest\.json cannot be read"):
        finished(folder, MADE_FROM)
    (folder / "manifest.json").write_text(json.dumps({"files": {}}))
    with pytest.raises(DamagedFolder, match="cannot be read"):
        read_manifest(folder)


def test_set_aside_keeps_every_earlier_folder(folder, tmp_path):
    assert set_aside(folder, tmp_path / "stale").name == "cell-1"
    with write_folder(folder, {}) as draft:
        (draft / "new").touch()
    assert set_aside(folder, tmp_path / "stale").name == "cell-2"
    assert read_manifest(tmp_path / "stale" / "cell-1", verify=True)["made_from"] == MADE_FROM


def _hold(path, held, release):
    with folders.claim(path, wait=False) as mine:
        held.put(mine)
        release.wait(20)


def test_a_folder_is_claimed_by_one_process_at_a_time_and_its_end_ends_the_claim(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    path, held, release = tmp_path / "cells" / "a", spawn.Queue(), spawn.Event()
    other = spawn.Process(target=_hold, args=(path, held, release))
    other.start()
    assert held.get(timeout=30)
    with folders.claim(path, wait=False) as mine:
        assert not mine
    with folders.claim(path.with_name("b"), wait=False) as mine:
        assert mine
    other.kill()  # as a machine might: nothing is cleaned up
    other.join()
    with folders.claim(path, wait=True) as mine:
        assert mine
