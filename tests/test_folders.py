import json
import multiprocessing
import shutil
from pathlib import Path

import pytest

from posmask.errors import BadSetting, DamagedFolder
from posmask.storage.atomic import claim, move_file, remove_file, replacing, scratch_file
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


def test_every_flipped_byte_cut_missing_and_swapped_file_is_found_and_named(folder):
    for file in (folder / "deep" / "sae.bin", folder / "rows.csv", folder / "manifest.json"):
        content = file.read_bytes()
        for place in range(len(content)):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(DamagedFolder, match=file.name.replace(".", r"\.")):
                read_manifest(folder, verify=True)
        for length in range(len(content)):
            file.write_bytes(content[:length])
            with pytest.raises(DamagedFolder, match=file.name.replace(".", r"\.")):
                read_manifest(folder, verify=True)
        file.write_bytes(content)
        assert read_manifest(folder, verify=True)
    one, other = folder / "deep" / "sae.bin", folder / "rows.csv"
    parked = folder / "parked"
    one.rename(parked)
    with pytest.raises(DamagedFolder, match=r"sae\.bin is missing"):
        read_manifest(folder, verify=True)
    other.rename(one)
    parked.rename(other)
    with pytest.raises(DamagedFolder, match=r"sae\.bin is not what was written.*rows\.csv is not what was written"):
        read_manifest(folder, verify=True)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "link", "deep/../../outside", "linked/outside"])
def test_no_file_outside_a_folder_is_ever_taken_for_one_of_it(folder, tmp_path, name):
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


def test_parts_are_kept_through_a_stop_and_only_lost_ones_are_made_again(tmp_path):
    path = tmp_path / "harvest"
    assert make_parts(tmp_path / "whole") == [0, 1, 2, 3]
    with pytest.raises(KeyboardInterrupt):
        make_parts(path, stop=3)
    assert not path.exists()
    (tmp_path / ".harvest.parts" / "part-1").write_bytes(b"rotten")
    assert make_parts(path) == [1, 3]
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()
    }
    assert not (tmp_path / ".harvest.parts").exists()
    (path / "part-2").write_bytes(b"rotten")
    take_apart(path)
    assert make_parts(path) == [2]
    assert read_manifest(path, verify=True)
    # Parts of other work are of no use.
    take_apart(path)
    assert make_parts(path, made_from={"layer": 6}) == [0, 1, 2, 3]


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
    with claim(path, wait=False) as mine:
        held.put(mine)
        release.wait(20)


def test_a_folder_is_claimed_by_one_process_at_a_time_and_its_end_ends_the_claim(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    path, held, release = tmp_path / "cells" / "a", spawn.Queue(), spawn.Event()
    other = spawn.Process(target=_hold, args=(path, held, release))
    other.start()
    assert held.get(timeout=30)
    with claim(path, wait=False) as mine:
        assert not mine
    with claim(path.with_name("b"), wait=False) as mine:
        assert mine
    other.kill()  # as a machine might: nothing is cleaned up
    other.join()
    with claim(path, wait=True) as mine:
        assert mine


def test_what_a_kill_left_in_the_midst_of_a_part_is_gone_when_the_folder_is_finished(tmp_path):
    path = tmp_path / "harvest"

    def killed(file):
        file.write_bytes(b"one")
        file.with_name(".tmpXyZ").write_bytes(b"half of two, as safetensors would call it")

    def stopped():
        with write_in_parts(path, MADE_FROM) as parts:
            parts.add("one", killed)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with write_in_parts(path, MADE_FROM) as parts:
        assert "one" in parts
        parts.add("two", lambda file: file.write_bytes(b"two"))
    assert {file.name for file in path.iterdir()} == {"one", "two", "manifest.json"}


def link_to(path, target):
    path.symlink_to(target)


WAYS = {
    "a file": (lambda path, other: path.write_text("mine"), "cell is a file"),
    "a link to a folder": (link_to, "cell is a symbolic link"),
    "a link to nothing": (lambda path, other: path.symlink_to(other / "nothing"), "cell is a symbolic link"),
    "a folder": (lambda path, other: shutil.copytree(other, path), "cell holds"),
    "a folder within": (lambda path, other: shutil.copytree(other, path / "deep"), "cell holds"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("write", [write_folder, write_in_parts])
def test_nothing_that_posmask_did_not_write_is_replaced(tmp_path, write, way):
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
        pytest.fail("work was begun")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_only_a_folder_of_the_same_purpose_and_with_nothing_added_is_replaced(folder):
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


def test_what_comes_into_the_way_meanwhile_is_kept(tmp_path):
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
def test_a_manifest_names_files_downwards_only(folder, name):
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
            pytest.fail("work was begun")

    def move():
        with scratch_file(path) as beside:
            beside.write_bytes(b"new")
            move_file(beside, path)

    for work in (replace, lambda: remove_file(path, *MARKS), *([] if kind == "other content" else [move])):
        with pytest.raises(BadSetting, match=r"(results\.csv|null) is .*, which posmask did not write .* move it away"):
            work()
    assert (path.is_symlink(), path.stat(), other.read_bytes()) == before
