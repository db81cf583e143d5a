"""What several processes hand to each other and take here, and the tables of docs/scaling.md.

python benchmarks/scaling.py           # runs 1, 2 and 4 processes (gloo, one thread each), some two minutes
python benchmarks/scaling.py --tables  # only writes what stands between the page's marks anew
"""

import json
import multiprocessing
import re
import resource
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import simulate
import torch
import torch.distributed as dist

from posmask.data.activations import Activations, training_batches
from posmask.data.harvest import harvest
from posmask.data.sites import LanguageModel
from posmask.data.tokens import Tokens
from posmask.masks import make_mask, mask_settings
from posmask.progress import duration
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.rules import rule_settings
from posmask.study import estimate
from posmask.training.checkpoints import Checkpoints
from posmask.training.distributed import ByData, ByPosition
from posmask.training.loop import train
from posmask.training.settings import TrainingSettings

ROOT = Path(__file__).parents[1]
FOUND, PAGE = ROOT / "benchmarks" / "scaling.json", ROOT / "docs" / "scaling.md"
D_MODEL, D_SAE, N_SLICES, N_POSITIONS, BATCH, K, N_STEPS = 576, 18432, 8, 128, 4096, 32, 8


class Noise(LanguageModel):
    """Gives random vectors in place of a model's."""

    def __init__(self) -> None:
        self.random, self.sink_norm = torch.Generator().manual_seed(0), 0.0

    def check_length(self, n_positions: int) -> None:
        pass

    def check_ids(self, ids: torch.Tensor) -> None:
        pass

    def vectors(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.randn(*ids.shape, D_MODEL, generator=self.random)


def vectors(folder: Path) -> Activations:
    """Random vectors at every position, twice a batch of them."""
    shape = 2 * BATCH // N_POSITIONS + 2, N_POSITIONS
    position = torch.arange(N_POSITIONS).expand(shape).contiguous()
    keep = position > 0
    text = torch.where(keep, torch.arange(shape[0])[:, None], -1)
    tokens = Tokens(torch.zeros_like(position), position, text, keep, position, position, position, position)
    return harvest(tokens, Noise(), folder, {"noise": True}, "noise")


def one_of(rank: int, n_processes: int, design: str, folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}-meeting", rank=rank, world_size=n_processes)
    try:
        activations = Activations(folder)
        mask = {"kind": "open"} if design == "data" else {"kind": "slice", "n_slices": N_SLICES}
        sae = SparseAutoencoder(
            D_MODEL, rule_settings({"kind": "topk", "k": K}), make_mask(mask_settings(mask), N_POSITIONS, D_SAE)
        )
        sae.center, sae.scale = activations.center_and_scale
        together = ByData(sae) if design == "data" else ByPosition(sae, activations.position[activations.keep])
        part = getattr(together, "local_sae", sae)
        settings = TrainingSettings(n_steps=N_STEPS, batch_tokens=BATCH, learning_rate=1e-3)
        sent, spent, clock = [], [], []

        def after_step(done: int) -> None:
            sent.append(together.bytes_sent)
            spent.append(time.process_time())
            clock.append(time.perf_counter())

        batches = training_batches(activations, BATCH, N_STEPS, 0, token_indices=together.token_indices)
        checkpoints = Checkpoints(Path(f"{out}-checkpoints"), {"what": design}, every_seconds=1e9)
        train(part, batches, settings, design, after_step, checkpoints, processes=together)
        quiet = range(1, N_STEPS - 1)  # the first and last step put a point on the curve
        found = {
            "rank": rank,
            "bytes_a_step": [sent[number] - sent[number - 1] for number in quiet],
            "processor_seconds": statistics.median(after - before for before, after in pairwise(spent[2:])),
            "seconds": statistics.median(after - before for before, after in pairwise(clock[2:])),
            "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }
        Path(f"{out}-{rank}.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


def measured() -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "vectors"
        vectors(folder)
        for design in ("data", "position"):
            for n_processes in (1, 2, 4):
                out = Path(temporary) / f"{design}-{n_processes}"
                spawn = multiprocessing.get_context("spawn")
                processes = [
                    spawn.Process(target=one_of, args=(rank, n_processes, design, folder, out))
                    for rank in range(n_processes)
                ]
                for process in processes:
                    process.start()
                for process in processes:
                    process.join()
                    assert process.exitcode == 0
                found = [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(n_processes)]
                sent = {n for one in found for n in one["bytes_a_step"]}
                rows.append(
                    {
                        "design": design,
                        "n_processes": n_processes,
                        "bytes_a_step": sorted(sent),
                        "processor_seconds": max(one["processor_seconds"] for one in found),
                        "seconds": max(one["seconds"] for one in found),
                        "peak_bytes": max(one["peak_bytes"] for one in found),
                    }
                )
                print(rows[-1])
    return rows


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def here() -> dict:
    """This machine's peak rates, on one thread."""
    torch.set_num_threads(1)
    machine = estimate.this_machine(["float32"])
    return {"product_rate": machine.product_rates["float32"], "bandwidth": machine.bandwidth}


def reckoned(row: dict, machine: dict) -> float:
    """Processor seconds of a step, without the network, by the formulas that GPUs are reckoned by."""
    job = simulate.Job("here", D_MODEL, 0, 0, 1, BATCH, BATCH, N_POSITIONS, N_SLICES, K, precision="float32")
    made = simulate.Linked(
        "here", {"float32": machine["product_rate"]}, machine["bandwidth"], "measured", *estimate.CPU_SHARES,
        overhead=0.0, transfer=None, memory=1e12, links=(1e9, 1e9),
    )  # fmt: skip
    parts = simulate.forecast(job, made, row["design"], D_SAE, row["n_processes"]).parts
    return sum(seconds for name, seconds in parts.items() if name not in ("network", "disk"))


def formula(row: dict) -> float:
    if row["design"] == "data":
        return simulate.bytes_by_data(D_MODEL, D_SAE, BATCH, row["n_processes"])
    return simulate.bytes_by_position(D_MODEL)


def traffic(found: dict) -> str:
    return table(
        [
            "divided by",
            "processes",
            "bytes a step, measured",
            "by the formula",
            "processor time of a step",
            "by the formulas",
        ],
        [
            [
                row["design"],
                str(row["n_processes"]),
                " or ".join(f"{n:,}" for n in row["bytes_a_step"]),
                f"{formula(row):,.0f}",
                f"{1000 * row['processor_seconds']:.0f} ms",
                f"{1000 * reckoned(row, found['machine']):.0f} ms",
            ]
            for row in found["runs"]
        ],
    )


def stops(machine: simulate.Linked) -> str:
    rows = []
    for name in simulate.MODELS:
        job = simulate.Job.of_model(name)
        for n_latents in simulate.LATENTS:
            line = [name if n_latents == simulate.LATENTS[0] else "", f"{n_latents:,}"]
            for design in simulate.DESIGNS:
                first, best, why = simulate.reach(job, machine, design, n_latents)
                if first is None:
                    line.append("none: memory")
                else:
                    line.append(f"{first.n_gpus}–{best.n_gpus}: {duration(best.seconds)}; {why or 'not by 512'}")
            rows.append(line)
    return table(["model", "latents", "by data", "by latents", "by position (64 groups)"], rows)


def harvests(machine: simulate.Linked) -> str:
    rows = []
    for name in simulate.MODELS:
        job = simulate.Job.of_model(name)
        times = [job.harvest(machine, n) for n in simulate.GPU_COUNTS]
        rows.append(
            [
                name,
                f"{times[0].bytes_held / 1e9:.0f} GB{'' if times[0].fits else ', does not fit'}",
                *(duration(one.seconds) for one in times),
                f"{job.disk_bytes / 1e12:.1f} TB",
                f"{simulate.most_latents_of_host(job) / 1e6:.1f} M",
            ]
        )
    head = ["model", "weights", *(f"{n} GPU{'s' * (n > 1)}" for n in simulate.GPU_COUNTS), "vectors on disk"]
    return table([*head, "latents at which the host is full"], rows)


def page(text: str, found: dict) -> str:
    """The page with its tables made anew."""
    machine = simulate.linked_gpu("h100")
    for name, made in (("traffic", traffic(found)), ("stops", stops(machine)), ("harvest", harvests(machine))):
        marks = re.compile(f"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        text = marks.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)
    return text


if __name__ == "__main__":
    if "--tables" not in sys.argv:
        FOUND.write_text(json.dumps({"machine": here(), "runs": measured()}, indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text(encoding="utf8"), json.loads(FOUND.read_text())), encoding="utf8")
