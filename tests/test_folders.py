import json
import multiprocessing
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from posmask.errors import BadSetting, DamagedFolder
from posmask.storage.atomic import claim, move_file, remove_file, replacing, scratch_file
from posmask.storage.layout import stale_paths
from posmask.storage.manifest import (
    check_aside,
    check_folder,
    file_entry,
    file_sha256,
    finished,
    identity,
    read_manifest,
    remove,
    sealed_manifest,
    set_aside,
    take_apart,
    write_folder,
    write_in_parts,
)

MADE_FROM = {"layer": 5, "seed": 0}


@pytest.fixture
def folder(tmp_path):
    with write_folder(tmp_path / "cell", MADE_FROM, tokens=12) as draft:
        (draft / "rows.csv").write_text("value\n1\n")
        (draft / "deep").mkdir()
        (draft / "deep" / "sae.bin").write_bytes(bytes(range(100)))
    return tmp_path / "cell"


def test_a_folder_is_finished_only_for_its_identity(folder):
    assert finished(folder, MADE_FROM)
    assert not finished(folder, {**MADE_FROM, "layer": 19})
    manifest = read_manifest(folder, verify=True)
    assert manifest["tokens"] == 12
    assert manifest["identity"] == identity(MADE_FROM)
    assert set(manifest["files"]) == {"rows.csv", "deep/sae.bin"}


def test_an_interrupted_folder_is_not_finished(tmp_path):
    def interrupted():
        with write_folder(tmp_path / "cell", MADE_FROM) as draft:
            (draft / "rows.csv").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "cell").mkdir()  # as left by an interrupted copy
    assert not finished(tmp_path / "cell", MADE_FROM)
    with pytest.raises(DamagedFolder, match="was never finished"):
        read_manifest(tmp_path / "cell")


def test_every_flipped_byte_truncation_missing_and_swapped_file_is_detected(folder):
    for file in (folder / "deep" / "sae.bin", folder / "rows.csv", folder / "manifest.json"):
        content = file.read_bytes()
        for index in range(len(content)):
            file.write_bytes(content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :])
            with pytest.raises(DamagedFolder, match=file.name.replace(".", r"\.")):
                read_manifest(folder, verify=True)
        for length in range(len(content)):
            file.write_bytes(content[:length])
            with pytest.raises(DamagedFolder, match=file.name.replace(".", r"\.")):
                read_manifest(folder, verify=True)
        file.write_bytes(content)
        assert read_manifest(folder, verify=True)
    weights, rows = folder / "deep" / "sae.bin", folder / "rows.csv"
    parked = folder / "parked"
    weights.rename(parked)
    with pytest.raises(DamagedFolder, match=r"sae\.bin is missing"):
        read_manifest(folder, verify=True)
    rows.rename(weights)
    parked.rename(rows)
    with pytest.raises(DamagedFolder, match=r"sae\.bin is not what was written.*rows\.csv is not what was written"):
        read_manifest(folder, verify=True)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "link", "deep/../../outside", "linked/outside"])
def test_a_manifest_that_lists_a_file_outside_its_folder_raises_an_error(folder, tmp_path, name):
    (tmp_path / "outside").write_text("x")
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "linked").symlink_to(tmp_path)
    entry = {"bytes": 1, "sha256": file_sha256(tmp_path / "outside")}
    (folder / "manifest.json").write_text(sealed_manifest(MADE_FROM, {}, {name: entry}))
    with pytest.raises(DamagedFolder, match="lies outside the folder"):
        read_manifest(folder, verify=True)


def make_parts(path, stop=None, made_from=MADE_FROM):
    made = []
    with write_in_parts(path, made_from) as parts:
        for number in range(4):
            if number == stop:
                raise KeyboardInterrupt
            name = f"part-{number}"
            if name not in parts:
                made.append(number)
                parts.add(name, lambda file, number=number: file.write_bytes(bytes([number]) * 10))
    return made


def test_finished_parts_are_kept_and_only_lost_parts_are_recomputed(tmp_path):
    path = tmp_path / "harvest"
    assert make_parts(tmp_path / "uninterrupted") == [0, 1, 2, 3]
    with pytest.raises(KeyboardInterrupt):
        make_parts(path, stop=3)
    assert not path.exists()
    (tmp_path / ".harvest.parts" / "part-1").write_bytes(b"rotten")
    assert make_parts(path) == [1, 3]
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "uninterrupted").iterdir()
    }
    assert not (tmp_path / ".harvest.parts").exists()
    (path / "part-2").write_bytes(b"rotten")
    take_apart(path)
    assert make_parts(path) == [2]
    assert read_manifest(path, verify=True)
    # Parts with another identity are not reused.
    take_apart(path)
    assert make_parts(path, made_from={"layer": 6}) == [0, 1, 2, 3]


def test_an_unreadable_manifest_raises_an_error(folder):
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DamagedFolder, match=r"manifest\.json cannot be read"):
        finished(folder, MADE_FROM)
    (folder / "manifest.json").write_text(json.dumps({"files": {}}))
    with pytest.raises(DamagedFolder, match="cannot be read"):
        read_manifest(folder)


def test_set_aside_keeps_every_earlier_folder(folder, tmp_path):
    assert set_aside(folder, stale_paths(tmp_path, "cell")) == tmp_path / "stale" / "cell-1"
    with write_folder(folder, {}) as draft:
        (draft / "new").touch()
    assert set_aside(folder, stale_paths(tmp_path, "cell")) == tmp_path / "stale" / "cell-2"
    assert read_manifest(tmp_path / "stale" / "cell-1", verify=True)["made_from"] == MADE_FROM


def _hold(path, held, release):
    with claim(path.parent, path.name, wait=False) as claimed:
        held.put(claimed)
        release.wait(20)


def test_a_claim_is_exclusive_and_ends_with_its_process(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    path, held, release = tmp_path / "cells" / "a", spawn.Queue(), spawn.Event()
    other = spawn.Process(target=_hold, args=(path, held, release))
    other.start()
    assert held.get(timeout=30)
    with claim(path.parent, path.name, wait=False) as claimed:
        assert not claimed
    with claim(path.parent, "b", wait=False) as claimed:
        assert claimed
    other.kill()  # no cleanup runs
    other.join()
    with claim(path.parent, path.name, wait=True) as claimed:
        assert claimed


def test_leftovers_of_an_interrupted_part_are_removed(tmp_path):
    path = tmp_path / "harvest"

    def killed(file):
        file.write_bytes(b"first")
        file.with_name(".tmpXyZ").write_bytes(b"half of the second part")

    def stopped():
        with write_in_parts(path, MADE_FROM) as parts:
            parts.add("first", killed)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with write_in_parts(path, MADE_FROM) as parts:
        assert "first" in parts
        parts.add("second", lambda file: file.write_bytes(b"second"))
    assert {file.name for file in path.iterdir()} == {"first", "second", "manifest.json"}


def link_to(path, target):
    path.symlink_to(target)


WAYS = {
    "a file": (lambda path, other: path.write_text("notes"), "cell is a file"),
    "a link to a folder": (link_to, "cell is a symbolic link"),
    "a link to nothing": (lambda path, other: path.symlink_to(other / "nothing"), "cell is a symbolic link"),
    "a folder": (lambda path, other: shutil.copytree(other, path), "cell holds"),
    "a folder within": (lambda path, other: shutil.copytree(other, path / "deep"), "cell holds"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("write", [write_folder, write_in_parts])
def test_only_files_that_posmask_wrote_are_replaced(tmp_path, write, way):
    other, path = tmp_path / "other", tmp_path / "cell"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    (other / "manifest.json").write_text(json.dumps({"name": "a site", "files": {}}))
    put, message = WAYS[way]
    put(path, other)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with (
        pytest.raises(BadSetting, match=f"{message}.*which posmask did not write.*move it away"),
        write(path, MADE_FROM),
    ):
        pytest.fail("the work started")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_only_an_unmodified_folder_of_the_same_purpose_is_replaced(folder):
    with write_folder(folder, {**MADE_FROM, "layer": 19}) as draft:
        (draft / "new").touch()
    assert {file.name for file in folder.iterdir()} == {"new", "manifest.json"}
    with pytest.raises(BadSetting, match=r"holds other results of posmask \(made from layer, seed\)"):
        check_folder(folder, {"what": "report"})
    (folder / "link").symlink_to(folder / "new")
    with pytest.raises(BadSetting, match="holds link, which posmask did not write"):
        check_folder(folder, MADE_FROM)
    for name in ("", ".", ".."):
        with pytest.raises(BadSetting, match="names no folder that could be replaced"):
            check_folder(Path(name), MADE_FROM)


def test_a_folder_created_during_the_work_is_kept(tmp_path):
    def overtaken():
        with write_folder(tmp_path / "cell", MADE_FROM):
            (tmp_path / "cell").mkdir()
            (tmp_path / "cell" / "thesis.txt").write_text("years of work")

    with pytest.raises(BadSetting, match=r"cell holds thesis.txt"):
        overtaken()
    assert [file.name for file in (tmp_path / "cell").iterdir()] == ["thesis.txt"]


def test_drafts_and_parts_are_removed_without_following_links(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    (tmp_path / ".new.draft-99999999").symlink_to(other)  # no process has this number
    with write_folder(tmp_path / "new", MADE_FROM):
        pass
    (tmp_path / ".parts.parts").symlink_to(other)
    with pytest.raises(BadSetting, match=r"\.parts\.parts is a symbolic link"):
        make_parts(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        make_parts(tmp_path / "harvest", stop=3)
    (tmp_path / ".harvest.parts" / "linked").symlink_to(other)
    (tmp_path / ".harvest.parts" / "below").mkdir()
    assert make_parts(tmp_path / "harvest") == [3]
    assert not remove(tmp_path / ".parts.parts")
    (folder / "linked").symlink_to(other)
    for refused in (take_apart, check_aside):
        with pytest.raises(BadSetting, match="is a symbolic link"):
            refused(tmp_path / ".parts.parts")
    with pytest.raises(BadSetting, match="holds linked"):
        take_apart(folder)
    assert not remove(folder)
    assert [file.read_text() for file in other.iterdir()] == ["years of work"]
    (folder / "linked").unlink()
    assert remove(folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    "name", ["../cell/rows.csv", "CELL/rows.csv", "deep/../rows.csv", "deep\\..\\rows.csv", "", "."]
)
def test_a_manifest_with_a_non_canonical_path_raises_an_error(folder, name):
    name = name.replace("CELL", str(folder))
    files = {name: file_entry(folder / "rows.csv")}
    (folder / "manifest.json").write_text(sealed_manifest(MADE_FROM, {}, files))
    with pytest.raises(DamagedFolder, match="which lies outside the folder"):
        finished(folder, MADE_FROM)


MARKS = (b"posmask's first line", b"posmask's last line")


@pytest.mark.parametrize("content", [b"", MARKS[0] + b"," * 10_000, b"," * 10_000 + MARKS[1]])
def test_a_file_that_posmask_wrote_is_replaced_and_removed(tmp_path, content):
    path = tmp_path / "results.csv"
    remove_file(path, *MARKS)
    path.write_bytes(content)
    with replacing(path, *MARKS) as beside:
        beside.write_bytes(b"new" + MARKS[0])
    assert path.read_bytes() == b"new" + MARKS[0]
    remove_file(path, *MARKS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["other content", "a link", "a folder", "a device"])
def test_a_file_that_posmask_did_not_write_is_kept(tmp_path, kind):
    path, other = tmp_path / "results.csv", tmp_path / "other.csv"
    other.write_bytes(MARKS[0])
    if kind == "other content":
        path.write_bytes(b"," * 10_000 + MARKS[0] + b"," * 10_000)
    elif kind == "a link":
        path.symlink_to(other)
    elif kind == "a folder":
        path.mkdir()
    else:
        path = Path("/dev/null")
    before = path.is_symlink(), path.stat(), other.read_bytes()

    def replace():
        with replacing(path, *MARKS):
            pytest.fail("the work started")

    def move():
        with scratch_file(path) as beside:
            beside.write_bytes(b"new")
            move_file(beside, path)

    for work in (replace, lambda: remove_file(path, *MARKS), *([] if kind == "other content" else [move])):
        with pytest.raises(BadSetting, match=r"(results\.csv|null) is .*, which posmask did not write .* move it away"):
            work()
    assert (path.is_symlink(), path.stat(), other.read_bytes()) == before


def test_threads_that_replace_the_same_file_take_turns(tmp_path):
    path = tmp_path / "results.csv"

    def write(number):
        with replacing(path) as draft:
            draft.write_text(f"{number}\n" * 2000)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(200)))
    lines = path.read_text().splitlines()
    assert len(lines) == 2000
    assert len(set(lines)) == 1
