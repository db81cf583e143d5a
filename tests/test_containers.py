"""Places where people run posmask: read-only packages, no home, a parent folder of somebody else, odd terminals."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import posmask
from conftest import STUDY
from posmask.data import embedded
from posmask.errors import BadSetting
from posmask.report import write_report
from posmask.study import engines
from posmask.study.run import run_study
from posmask.study.study_file import read_study
from posmask.study.targets import cell_states

CANNOT_DROP = os.geteuid() == 0 and shutil.which("setpriv") is None
WITHOUT_RIGHTS = (
    ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner", "--inh-caps", "-all"]
    if os.geteuid() == 0
    else []
)
"""Begins a command that may not write to read-only folders, though it runs as root."""


@pytest.fixture
def read_only(tmp_path):
    """Copy the package into a folder that cannot be written to, with a home that cannot be either."""
    folder = tmp_path / "package"
    shutil.copytree(Path(posmask.__file__).parent, folder / "posmask", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "home").mkdir()
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    yield folder
    for path in folders:
        path.chmod(0o755)


def without_rights(code, folder, **environment):
    return subprocess.run(
        [*WITHOUT_RIGHTS, sys.executable, "-c", code],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(folder), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(CANNOT_DROP, reason="setpriv is not installed: root may write everywhere")
def test_compiled_loops_need_neither_a_writable_package_nor_a_home(read_only):
    code = "import os, posmask.kernels.cpu; print(os.environ['NUMBA_CACHE_DIR'])"
    done = without_rights(code, read_only, HOME=str(read_only / "home"))
    assert done.returncode == 0, done.stderr
    assert "posmask-numba-" in done.stdout
    assert not Path(done.stdout.strip()).exists()


def test_the_cache_of_compiled_loops_stays_where_it_can_be_written(tmp_path):
    code = "import os, posmask.kernels; print(os.environ.get('NUMBA_CACHE_DIR'))"
    package = Path(posmask.__file__).parents[1]
    for environment, expected in (({"HOME": str(tmp_path)}, "None"), ({"NUMBA_CACHE_DIR": "/x"}, "/x")):
        assert without_rights(code, package, **environment).stdout.strip() == expected


def test_a_user_without_a_home_is_told_to_name_a_cache(monkeypatch):
    monkeypatch.delenv("POSMASK_CACHE", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(BadSetting, match="this user has no home for downloads: set POSMASK_CACHE"):
        embedded.cache_folder()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_output_that_is_not_utf8_ends_no_command(encoding):
    code = """
from posmask.cli import commands
from posmask.cli.printing import console
def app():
    print("Δ −0.01 – ±")
    console.print("Δ −0.01 – ±")
commands.app = app
commands.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"0.01") == 2


def test_a_run_folder_may_be_the_current_one(study_file, finish, tmp_path, monkeypatch):
    finish(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    study = read_study(study_file)
    run_study(study, Path(), lambda line: None)
    assert {state for _, state in cell_states(study, Path())} == {"finished"}
    assert write_report(Path()).is_file()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"run"}


def test_an_empty_address_of_vectors_is_refused(study_file):
    with pytest.raises(BadSetting, match="activations_url"):
        read_study(study_file, ['activations_url=""'])


def test_no_more_processes_work_than_there_are_folders(study_file, finish, tmp_path, monkeypatch):
    finish(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "cells" / "slice-compute-seed0")
    numbers = []

    @contextlib.contextmanager
    def no_helpers(study, root, n_helpers, *others):
        numbers.append(n_helpers)
        yield

    monkeypatch.setattr(engines, "_helpers", no_helpers)
    run_study(read_study(study_file), tmp_path / "run", lambda line: None, n_jobs=50)
    assert numbers == [0]


def test_ten_thousand_cells_are_listed_in_seconds(study_file, tmp_path):
    text = study_file.read_text().partition("[[comparisons]]")[0]
    cells = (
        f'[[cells]]\nname = "c{number}"\nmask = {{ kind = "slice", n_slices = {2 + number % 3} }}\n'
        for number in range(10_000)
    )
    study_file.write_text(text + "".join(cells))
    root = tmp_path / "run"
    root.mkdir()
    started = time.process_time()
    states = cell_states(read_study(study_file), root)
    assert len(states) == 10_003
    assert time.process_time() - started < 12  # 5 s alone; others may use the processor.


def command(*words, limit_kilobytes=None, environment=None):
    """Run posmask's command line on toy texts."""
    script = Path(__file__).parent / "study_in_a_process.py"
    limit = [] if limit_kilobytes is None else ["bash", "-c", f'ulimit -v {limit_kilobytes}; exec "$@"', "bash"]
    return subprocess.run(
        [*limit, sys.executable, script, *map(str, words)],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_page_under_a_limit_of_address_space_is_made_or_refused(finish, tmp_path):
    """V8, which draws charts, ends the process that it runs in if it cannot reserve tens of gigabytes."""
    finish(tmp_path / "run")
    refused = command("report", tmp_path / "run", limit_kilobytes=16_000_000)
    assert refused.returncode == 1, refused.stderr
    assert "charts need V8, which cannot start with 16.4 GB of address space: raise the limit" in refused.stderr
    assert "Traceback" not in refused.stderr
    (tmp_path / "run" / "report.html").unlink(missing_ok=True)
    made = command("report", tmp_path / "run", limit_kilobytes=200_000_000)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow  # It compiles every loop, because it finds none compiled.
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root may become another user")
def test_a_run_of_a_user_who_is_unknown_and_has_no_home(model_folder, read_only, tmp_path):
    """As in containers that are started with a number for a user; the package's folder is not writable either."""
    shared = Path(tempfile.mkdtemp())
    try:
        shutil.copytree(model_folder, shared / "model")
        shutil.copytree(Path(__file__).parent, shared / "tests", ignore=shutil.ignore_patterns("__pycache__", "data"))
        shutil.copytree(read_only / "posmask", shared / "package" / "posmask")
        (shared / "study.toml").write_text(STUDY.replace("MODEL", str(shared / "model")))
        (shared / "work").mkdir()
        for path in (shared, *shared.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        (shared / "work").chmod(0o777)
        # The right to read everything is kept, because Python itself may be in root's home.
        may_read = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
        user = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", *may_read, "env", "-u", "HOME"]
        words = [sys.executable, shared / "tests" / "study_in_a_process.py", "run", shared / "study.toml"]
        done = subprocess.run(
            [*user, f"PYTHONPATH={shared / 'package'}", *words, "--root", shared / "work" / "run"],
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert (shared / "work" / "run" / "report.html").is_file()
        assert not [path for path in (shared / "package").rglob("*") if path.suffix in (".nbi", ".nbc")]
    finally:
        shutil.rmtree(shared)
