"""posmask against its peers on the same work: `bench.py [--quick] [GROUP ...]`, or `make bench`.

Each peer runs in an environment of its own under .bench/, set up here from peers/*.txt. Ours and theirs take turns in
one run, one thread each (see peers/steps_terms.py), each peer's step between two of ours (see rounds.py). Reported are
the median of the ratios of all rounds, their range, and median times. Results of a group replace those in results.json,
and all that stand there make the tables of docs/performance.md.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from rounds import figures, in_turn, is_wide

HERE = Path(__file__).parent
ROOT = HERE.parent
ENVIRONMENTS = ROOT / ".bench"
RESULTS = HERE / "results.json"
PAGE = ROOT / "docs" / "performance.md"
SHAPES = ("576x4608", "576x16384", "2304x9216")
WARM_UP = {"576x4608": 2}  # requests before the first that counts; else 1
PEERS = {
    "sae-lens": "sae_lens",
    "dictionary-learning": "dictionary_learning",
    "eai-sparsify": "sparsify",
    "overcomplete": "overcomplete",
    "sae-bench": "saebench",
}


@dataclass(frozen=True)
class Group:
    """Works that the same steps of peers answer: ours, each against what each peer does of the same kind."""

    ours: tuple[str, ...]
    theirs: str
    peers: tuple[str, ...]
    tuned: tuple[str, ...] = ()
    """Peers timed once more with what their users can switch on: bfloat16 autocast and KEEP_MEMORY."""


GROUPS = {
    "topk": Group(
        ("topk-float32", "topk-bf16-select", "mask-slice", "mask-cohort", "mask-contiguous", "mask-hard"),
        "topk",
        ("sae-lens", "dictionary-learning", "eai-sparsify", "overcomplete"),
        ("sae-lens", "eai-sparsify"),
    ),
    "batchtopk": Group(("batchtopk",), "batchtopk", ("sae-lens", "dictionary-learning", "overcomplete")),
    "matryoshka": Group(("matryoshka",), "matryoshka", ("sae-lens", "dictionary-learning")),
    "jumprelu": Group(("jumprelu",), "jumprelu", ("sae-lens", "dictionary-learning", "overcomplete")),
    "gated": Group(("gated",), "gated", ("sae-lens", "dictionary-learning")),
    "relu-l1": Group(
        ("relu-l1-float32", "relu-l1-bf16"),
        "relu-l1",
        ("sae-lens", "dictionary-learning", "overcomplete"),
        ("sae-lens",),
    ),
}
ROUNDS = {"576x4608": 8, "576x16384": 4, "2304x9216": 3}
# What posmask does for its own process: freed memory is kept, large tensors lie in huge pages.
KEEP_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TOP_PAD_": str(2**28),
    "THP_MEM_ALLOC_ENABLE": "1",
}
FEWER = {
    "576x4608": 5,
    "576x16384": 2,
    "2304x9216": 2,
}  # of groups other than topk: their steps take seconds to minutes


class Worker:
    """A process that does one thing each time it is asked."""

    def __init__(self, name: str, python: Path, *command: str) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by stop)
        more = KEEP_MEMORY if name.endswith("tuned") else {}
        environment = {**os.environ, "PYTHONPATH": str(HERE / "peers"), "PYTHONWARNINGS": "ignore", **more}
        self._process = subprocess.Popen(
            [str(python), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self.answers: list[dict] = []

        self._is_ready = False

    def wait(self) -> None:
        """Wait until it takes requests. Workers that were made before import their packages at the same time."""
        if not self._is_ready:
            self._read()
        self._is_ready = True

    def _read(self) -> dict:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self._log.seek(0)
        raise SystemExit(f"{self.name} ended before it answered:\n{self._log.read()[-3000:]}")

    def ask(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.answers.append(self._read())

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


def environment(name: str) -> Path:
    """The Python of a peer's environment, set up if it is not there."""
    folder = ENVIRONMENTS / name
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        pins = HERE / "peers" / f"{name}.txt"
        print(f"Setting up {folder.relative_to(ROOT)} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--constraint", str(pins), "torch"], check=True)
        subprocess.run([*pip, "--no-deps", "--requirement", str(pins)], check=True)
        ready.touch()
    return python


def ours_of(work: str, shape: str, n_threads: int = 1) -> Worker:
    return Worker(work, Path(sys.executable), str(HERE / "steps_posmask.py"), work, shape, str(n_threads))


def run_group(
    name: str, shape: str, n_rounds: int, peers: set[str], works: set[str] | None = None, seconds: float | None = None
) -> list[dict]:
    group = GROUPS[name]
    ours = [ours_of(work, shape) for work in group.ours if works is None or work in works]
    theirs = []
    for peer in group.peers:
        if peer in peers:
            script = str(HERE / "peers" / f"steps_{PEERS[peer]}.py")
            tuned = peer in group.tuned and (works is None or has_bfloat16())
            for more in ([], ["tuned"]) if tuned else ([],):
                label = f"{peer} tuned" if more else peer
                theirs.append(Worker(label, environment(PEERS[peer]), script, group.theirs, shape, "1", *more))
    theirs.append(Worker("gemm-floor", Path(sys.executable), str(HERE / "floor.py"), shape))
    return measured(ours, theirs, n_rounds, {"shape": shape}, WARM_UP.get(shape, 1), seconds)


def measured(
    ours: list[Worker],
    theirs: list[Worker],
    n_rounds: int,
    terms: dict,
    warm_up: int = 2,
    seconds: float | None = None,
) -> list[dict]:
    """Run the workers in turn and stop them: one row per pair of ours and theirs."""
    for worker in (*ours, *theirs):
        worker.wait()
    in_turn(ours, theirs, n_rounds, warm_up, seconds)
    found = []
    for own in ours:
        for place, other in enumerate(theirs):
            times = [[answer["cpu_ms"] for answer in worker.answers] for worker in (own, other)]
            peer, _, setting = other.name.partition(" ")
            row = {
                **{"work": own.name, **terms, "peer": peer, **({"setting": setting} if setting else {})},
                **figures(*times, place, len(theirs)),
                "ours_peak_mb": round(own.answers[-1]["peak_mb"]),
                "peer_peak_mb": round(other.answers[-1]["peak_mb"]),
            }
            spread = f"{row['low']:.2f} to {row['high']:.2f} in {row['rounds']} rounds{', wide' * is_wide(row)}"
            print(f"{own.name:>17} {other.name:>20} {row['ratio']:7.2f}x  ({spread})", flush=True)
            found.append(row)
    for worker in (*ours, *theirs):
        worker.stop()
    return found


def run_harvest(
    n_rounds: int, precisions: tuple[str, ...] = ("float32", "bfloat16"), seconds: float | None = None
) -> list[dict]:
    from posmask.data.embedded_models import DEFAULT_MODEL, MODELS

    model, found = str(MODELS[DEFAULT_MODEL].folder()), []
    for precision in precisions:
        own = str(HERE / "harvest_posmask.py")
        work = {"float32": "harvest-float32", "bfloat16": "harvest-bf16"}[precision]
        ours = Worker(work, Path(sys.executable), own, "harvest", model, "1", precision)
        bare = Worker("bare-forward", Path(sys.executable), own, "forward", model, "1", precision)
        script = str(HERE / "peers" / "harvest_sae_lens.py")
        theirs = [
            Worker(label, environment("sae_lens"), script, model, "1", own_precision)
            for label, own_precision in (("sae-lens", "float32"), ("sae-lens tuned", "bfloat16"))
            if own_precision == "float32" or precision == "bfloat16"
        ]
        terms = {"shape": "SmolLM2-135M, layer 15"}
        rows = measured([ours], [bare, *theirs], n_rounds, terms, 2 if seconds is None else 1, seconds)
        by_name = {worker.name: worker for worker in (bare, *theirs)}
        for row in rows:
            worker, last = by_name[f"{row['peer']} {row.get('setting', '')}".strip()], ours.answers[-1]
            row["ours_bytes_a_token"] = round(last["bytes"] / last["tokens"])
            if "bytes" in worker.answers[-1]:
                row["peer_bytes_a_token"] = round(worker.answers[-1]["bytes"] / worker.answers[-1]["tokens"])
            row["ours_tokens_a_second"] = round(1000 * last["tokens"] / row["ours_ms"])
        found += rows
    return found


def run_probing(d_saes: tuple[int, ...], n_rounds: int) -> list[dict]:
    found = []
    for d_sae in d_saes:
        with tempfile.TemporaryDirectory() as folder:
            activations = f"{folder}/activations.npz"
            script = str(HERE / "peers" / "saebench_probing.py")
            theirs = Worker("sae-bench", environment("saebench"), script, activations, str(d_sae))
            theirs.wait()  # It writes the activations.
            ours = Worker("probing", Path(sys.executable), str(HERE / "probing_posmask.py"), activations)
            rows = measured([ours], [theirs], n_rounds, {"shape": f"d_sae {d_sae}"})
            for row in rows:
                row["ours_accuracy"] = round(ours.answers[-1]["accuracy"], 4)
                row["peer_accuracy"] = round(theirs.answers[-1]["accuracy"], 4)
            found += rows
    return found


# How a step grows: (work, shape, threads), timed in turn in one run.
SCALING = {
    "d_sae": [
        (work, f"576x{d_sae}", 1) for d_sae in (2304, 4608, 9216, 16384) for work in ("topk-float32", "mask-slice")
    ],
    "tokens a batch": [(f"topk-float32@{n}", "576x4608", 1) for n in (1024, 2048, 4096, 8192)],
    "positions a latent": [(f"mask-hard-{n}", "576x4608", 1) for n in (4, 8, 16, 32, 64, 128)],
    "threads": [(work, "576x4608", n) for n in (1, 2) for work in ("topk-float32", "topk-bf16-select", "mask-slice")],
}


HARVESTS = [(f"harvest-{precision}", "32 contexts", n) for n in (1, 2) for precision in ("float32", "bfloat16")]


def run_scaling(n_rounds: int) -> list[dict]:
    from posmask.data.embedded_models import DEFAULT_MODEL, MODELS

    found, model = [], str(MODELS[DEFAULT_MODEL].folder())
    script = str(HERE / "harvest_posmask.py")
    for name, points in {**SCALING, "threads of a harvest": HARVESTS}.items():
        if points is HARVESTS:
            workers = [
                Worker(work, Path(sys.executable), script, "harvest", model, str(n), work.removeprefix("harvest-"))
                for work, _, n in points
            ]
        else:
            workers = [ours_of(*point) for point in points]
        for worker in workers:
            worker.wait()
        in_turn([], workers, n_rounds)
        for worker, (work, shape, n_threads) in zip(workers, points, strict=True):
            # With two threads the time that passes counts, not what both spend.
            times = [answer["wall_ms" if name.startswith("threads") else "cpu_ms"] for answer in worker.answers]
            row = {"by": name, "work": work, "shape": shape, "threads": n_threads}
            found.append({**row, "ms": round(statistics.median(times), 2), "best_ms": round(min(times), 2)})
            print(f"{name}: {work} {shape} x{n_threads} {found[-1]['ms']:.1f} ms", flush=True)
            worker.stop()
    return found


PROFILED = ("topk-float32", "topk-bf16-select", "mask-slice", "mask-hard", "batchtopk")


def run_profile() -> list[dict]:
    found = []
    for work in PROFILED:
        command = [sys.executable, str(HERE / "profile_posmask.py"), work, SHAPES[0], "40"]
        environment = {**os.environ, "PYTHONPATH": str(HERE / "peers")}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found.append({"work": work, "shape": SHAPES[0], "ms": json.loads(done.stdout.splitlines()[-1])})
        print(f"profile: {work} {found[-1]['ms']}", flush=True)
    return found


def machine() -> dict:
    facts = {}
    cpuinfo = Path("/proc/cpuinfo")  # Linux only
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    flags, name = facts.get("flags", "").split(), facts.get("model name", platform.processor())
    return {
        "processor": f"{name} (family {facts.get('cpu family')}, model {facts.get('model')})",
        "cores": os.cpu_count(),
        "features": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "system": platform.platform(terse=True),
        "threads": 1,
    }


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively, without which nobody chooses it."""
    from posmask.kernels import runtime

    return runtime.fast_precision() == "bfloat16"


def versions() -> dict:
    found = {name: version(name) for name in ("torch", "numba", "numpy", "transformers")}
    for peer, name in PEERS.items():
        pins = (HERE / "peers" / f"{name}.txt").read_text().splitlines()
        found[peer] = next(pin.split("==")[1] for pin in pins if pin.lower().startswith(f"{peer}=="))
    return {"python": platform.python_version(), **found}


def _key(row: dict) -> tuple:
    return row["work"], row["shape"], row["peer"], row.get("setting")


@dataclass
class Results:
    """What results.json holds."""

    machine: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    ratios: list[dict] = field(default_factory=list)
    scaling: list[dict] = field(default_factory=list)
    profile: list[dict] = field(default_factory=list)

    @classmethod
    def read(cls) -> "Results":
        return cls(**json.loads(RESULTS.read_text())) if RESULTS.exists() else cls()

    def put(self, rows: list[dict]) -> None:
        """Take rows in, each in place of the one of the same work, shape and peer; write the file."""
        place = {_key(row): row for row in self.ratios}
        self.ratios = list({**place, **{_key(row): row for row in rows}}.values())
        self.write()

    def write(self) -> None:
        self.machine, self.versions = machine(), versions()
        parts = {"machine": self.machine, "versions": self.versions}
        lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in parts.items()]
        for name in ("ratios", "scaling", "profile"):
            rows = ",\n".join(f"  {json.dumps(row)}" for row in getattr(self, name))
            lines.append(f' "{name}": [\n{rows}\n ]' if rows else f' "{name}": []')
        draft = RESULTS.with_suffix(".draft")
        draft.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        draft.replace(RESULTS)


def main() -> None:
    every = [*GROUPS, "harvest", "probing", "scaling", "profile"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(every)}; all if none is named")
    parser.add_argument(
        "--quick", action="store_true", help="the main ratios at the smallest shape; nothing is written"
    )
    parser.add_argument("--shape", action="append", choices=SHAPES, help="only at this shape")
    given = parser.parse_args()
    known = list(QUICK) if given.quick else every
    unknown = set(given.groups) - set(known)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))} is not a group: choose from {', '.join(known)}")
    facts = machine()
    print(f"{facts['processor']}, {facts['cores']} cores: {' '.join(facts['features'])}", flush=True)
    if given.quick:
        quick(given.groups or QUICK)
        return
    results = Results.read()
    for name in given.groups or every:
        started = time.perf_counter()
        if name == "harvest":
            results.put(run_harvest(3))
        elif name == "probing":
            results.put(run_probing((4608, 16384), 3))
        elif name == "scaling":
            results.scaling = run_scaling(3)
            results.write()
        elif name == "profile":
            results.profile = run_profile()
            results.write()
        else:
            for shape in given.shape or SHAPES:
                n_rounds = (ROUNDS if name == "topk" else FEWER)[shape]
                results.put(run_group(name, shape, n_rounds, set(PEERS)))
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        write_page(results)


# Peers of each group, and seconds after which no round begins.
QUICK = {
    "topk": ({"sae-lens", "eai-sparsify"}, 75),
    "batchtopk": ({"sae-lens"}, 40),
    "relu-l1": ({"sae-lens"}, 40),
    "harvest": ({"sae-lens"}, 50),
}


def quick(names: Iterable[str]) -> None:
    """The main ratios in at most six minutes on two cores with AVX2, after the peers' environments are set up.

    bfloat16 is left out where the CPU does not multiply it natively.
    """
    for peer in {peer for name in names for peer in QUICK[name][0]}:
        environment(PEERS[peer])
    started = time.perf_counter()
    works = {"topk-float32", "mask-slice", "mask-hard", "batchtopk", "relu-l1-float32"}
    works |= {"topk-bf16-select", "relu-l1-bf16"} if has_bfloat16() else set()
    for name in names:
        peers, seconds = QUICK[name]
        if name == "harvest":
            run_harvest(3, ("float32", "bfloat16") if has_bfloat16() else ("float32",), seconds)
        else:
            run_group(name, SHAPES[0], 5, peers, works, seconds)
    print(f"{time.perf_counter() - started:.0f} s", flush=True)


def write_page(results: Results) -> None:
    """Put the tables between their marks in docs/performance.md."""
    from tables import tables

    page = PAGE.read_text()
    for name, text in tables(results.__dict__).items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = page.partition(start)
        _, _, after = rest.partition(end)
        assert after, f"{PAGE} has no place for {name}"
        page = f"{before}{start}{text}\n{end}{after}"
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
