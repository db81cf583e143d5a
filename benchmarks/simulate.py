"""Predict what harvest, storage and training take on 1 to 512 GPUs, and where each way to divide the work stops.

python benchmarks/simulate.py                          # five models up to 70B
python benchmarks/simulate.py STUDY.toml --gpu a100    # the model, tokens, batches, k and masks of a study

Dictionaries of 65,536 to 16,777,216 latents, divided by data, by latents or by position. All numbers are counts times
published rates (`posmask.estimate.GPUS`); nothing is measured on a GPU. What a process holds and sends is what
`parallel.py` and `training.py` do, except for sharded latents, which posmask does not have. docs/scaling.md has the
formulas, the sources, and checks against runs.
"""

import argparse
import math
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from posmask.data import models
from posmask.data.activations import bytes_per_token
from posmask.errors import BadSetting, PosmaskError
from posmask.kernels import runtime
from posmask.masks.base import PositionMask
from posmask.progress import duration
from posmask.study import estimate
from posmask.study.estimate import DISK_RATE, Machine
from posmask.study.saes import make_sae
from posmask.study.settings import StudySettings
from posmask.study.study_file import read_study
from posmask.training import distributed

GPUS_A_NODE = 8
NODE_DISK = 8 * 3.84e12  # bytes, and of memory:
NODE_MEMORY = 2e12
LINKS = {"a100": (300e9, 25e9), "h100": (450e9, 50e9)}
"""Bytes per second that one GPU sends in one direction, within a machine of 8 and beyond it."""
LINK_SHARES = (0.65, 0.9)
"""The shares of these that are reached (assumed)."""


@dataclass(frozen=True)
class Linked(Machine):
    """A GPU with `memory` bytes of its own and `links` to others, as in `LINKS`."""

    memory: float = 80e9
    links: tuple[float, float] = (0.0, 0.0)
    link_shares: tuple[float, float] = LINK_SHARES

    def link_rate(self, n_gpus: int) -> float:
        """Bytes per second that each of `n_gpus` sends when all exchange something."""
        far = n_gpus > GPUS_A_NODE
        return self.links[far] * self.link_shares[far]


def linked_gpu(name: str) -> Linked:
    """
    Raises:
        BadSetting: the rates of the GPU or of its links are unknown.
    """
    machine = estimate.gpu_named(name)
    if name not in LINKS:
        raise BadSetting(f"the links of GPU {name!r} to others are unknown: choose from {', '.join(LINKS)}")
    return Linked(**vars(machine), links=LINKS[name])


Design = Literal["data", "latents", "position"]
DESIGNS: tuple[Design, ...] = ("data", "latents", "position")
LATENTS = (2**16, 2**18, 2**20, 2**22, 2**24)
MOST_GPUS = 512
GPU_COUNTS = (1, GPUS_A_NODE, GPUS_A_NODE**2, MOST_GPUS)
_PAYS = 1.5  # times as fast, for twice the GPUs

_GEMMA = {"model_type": "gemma2", "vocab_size": 256000, "max_position_embeddings": 8192, "tie_word_embeddings": True}
_LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False}


def _sizes(family: dict, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int) -> dict:
    return family | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


MODELS = {
    "gemma-2-2b": _sizes(_GEMMA, 2304, 9216, 26, 8, 4, 256),
    "gemma-2-9b": _sizes(_GEMMA, 3584, 14336, 42, 16, 8, 256),
    "llama-3.1-8b": _sizes(_LLAMA, 4096, 14336, 32, 32, 8, 128),
    "gemma-2-27b": _sizes(_GEMMA, 4608, 36864, 46, 32, 16, 128),
    "llama-3.1-70b": _sizes(_LLAMA, 8192, 28672, 80, 64, 8, 128),
}
"""Numbers of their config.json."""


@dataclass(frozen=True)
class Job:
    """What is to be done, with every dictionary.

    Args:
        below: a model's parameters up to the site.
        weights: all of its parameters.
        n_groups: groups of positions that share no latent, for masks that bind every latent to one.
        k: active latents a token.
    """

    name: str
    d_model: int
    below: int
    weights: int
    harvested_tokens: int = 8_000_000_000
    trained_tokens: int = 8_000_000_000
    batch_tokens: int = 131_072
    n_positions: int = 1024
    n_groups: int = 64
    k: int = 64
    stored: Literal["float32", "bfloat16", "int8"] = "int8"
    model_precision: runtime.Precision = "bfloat16"
    precision: runtime.Precision = "bfloat16"

    @classmethod
    def of_model(cls, name: str) -> "Job":
        """One of `MODELS`, read after half of its layers."""
        sizes = MODELS[name]
        outline = models.load_outline(name, sizes["num_hidden_layers"] // 2, sizes=sizes)
        below, above = outline.n_parameters()
        return cls(name, outline.d_model, below, below + above)

    @classmethod
    def of_study(cls, study: StudySettings) -> "Job":
        """A study's model, tokens and batches; as many groups of positions as its strictest mask makes.

        Raises:
            BadSetting: the model's sizes are unknown here, or the rule has no k.
        """
        asked, rule = study.model, study.sae.rule
        if (k := getattr(rule, "k", None)) is None:
            raise BadSetting(f"the simulation needs a rule with k active latents, and {rule.kind} has no k: take topk")
        layer = asked.layer if isinstance(asked.layer, int) else models.layer_number(asked.name, asked.layer)
        outline = models.load_outline(asked.name, layer, asked.site, asked.sizes)
        below, above = outline.n_parameters()
        precision = "float32" if asked.precision == "float32" else "bfloat16"
        masks = [make_sae(study, cell, 1, study.seeds[0]).mask for cell in study.cells]
        return cls(
            asked.name,
            outline.d_model,
            below,
            below + above,
            study.corpus.training_tokens,
            study.training.n_steps * study.training.batch_tokens,
            study.training.batch_tokens,
            study.corpus.n_positions,
            max(_n_groups(mask) for mask in masks),
            k,
            precision if asked.storage_dtype == "model" else asked.storage_dtype,
            precision,
            study.training.precision if study.training.precision != "auto" else "bfloat16",
        )

    @property
    def disk_bytes(self) -> int:
        """The training vectors."""
        return self.harvested_tokens * bytes_per_token(self.d_model, self.stored)

    def harvest(self, machine: Machine, n_gpus: int) -> "Harvest":
        """Each GPU holds the whole model and takes a share of the contexts."""
        a_token = machine.pass_seconds(self.below, self.model_precision)
        written = bytes_per_token(self.d_model, self.stored) / DISK_RATE
        held = {"float32": 4, "bfloat16": 2}[self.model_precision] * self.weights
        return Harvest(held, held <= machine.memory, self.harvested_tokens * (a_token + written) / n_gpus)


def _n_groups(mask: PositionMask) -> int:
    return 1 if distributed.why_undivided(mask) else distributed.position_groups(mask)[0]


@dataclass(frozen=True)
class Harvest:
    """`bytes_held` are the model's weights; `seconds` are as if it could be split where they do not fit."""

    bytes_held: int
    fits: bool
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """One dictionary, one way to divide its training, one number of GPUs.

    `bytes_held` is by what it is for, on the fullest GPU; `bytes_sent` what a process hands to the others in a step,
    once for each sum or exchange; `parts` seconds of a step by what they go to. `limit` is "memory" or "groups" where
    it cannot be done, else the dearest part.
    """

    design: Design
    n_latents: int
    n_gpus: int
    bytes_held: dict[str, float]
    bytes_sent: float
    parts: dict[str, float]
    seconds: float
    limit: str

    @property
    def possible(self) -> bool:
        return self.limit not in ("memory", "groups")


def forecast(job: Job, machine: Linked, design: Design, n_latents: int, n_gpus: int) -> Forecast:
    d, n, p, tokens = job.d_model, n_latents, n_gpus, job.batch_tokens
    row = _FLOAT * d
    if design == "data":
        owned, live, here, active = n, n, tokens / p, float(job.k)
        sent = bytes_by_data(d, n, tokens, p) if p > 1 else 0.0
        carried = _ring(sent, p)
    elif design == "latents":
        owned, live, here, active = n / p, n / p, float(tokens), job.k / p
        found, whole = _FLOAT * job.k * tokens, row * tokens
        spread = bytes_per_token(d, job.stored) * tokens / p
        sent = 0.0 if p == 1 else spread + found + whole
        carried = (p - 1) * spread + (p - 1) / p * found + _ring(whole, p)
    else:
        share = math.ceil(job.n_groups / p) / job.n_groups
        owned, live, here, active = n * share, n / job.n_groups, tokens * share, float(job.k)
        sent = bytes_by_position(d) if p > 1 else 0.0
        carried = _ring(sent, p)
    read = tokens / p if design == "latents" else here  # Sharded latents see all, but from each other's memory.
    numbers = (2 * d + 1) * owned + d
    held = {
        "weights, gradient, moments": 4 * _FLOAT * numbers,
        "gradients to be summed": _FLOAT * numbers if design == "data" and p > 1 else 0.0,
        "rounded encoder": 2 * d * owned if job.precision == "bfloat16" else 0.0,
        "mask": _TABLES * _FLOAT * job.n_positions * owned,
        "pre-activations": _FLOAT * max(_PIECE, _LEAST_ROWS * live),
        "batch": _BATCHES * row * here,
    }
    parts = machine.step_parts(d, owned, live, active, here, job.precision)
    parts |= {
        "host": parts["host"] * read / here,
        "disk": read * bytes_per_token(d, job.stored) / DISK_RATE,
        "network": carried / machine.link_rate(p) if p > 1 else 0.0,
    }
    seconds = sum(parts.values()) * job.trained_tokens / tokens
    if design == "position" and p > job.n_groups:
        limit = "groups"
    elif sum(held.values()) > machine.memory:
        limit = "memory"
    else:
        limit = max(parts, key=lambda name: parts[name])
    return Forecast(design, n, p, held, sent, parts, seconds, limit)


_FLOAT = 4
_TABLES = 2  # of positions x latents: openness, and where it is above 0
_PIECE, _LEAST_ROWS = 2**20, 256  # of choosing.py: numbers chosen from at a time
_BATCHES = 3  # of a batch's size: vectors, inputs, what is left


def _ring(n_bytes: float, n_gpus: int) -> float:
    """What each GPU of a ring sends, so that all have the sum."""
    return 2 * (n_gpus - 1) / n_gpus * n_bytes


def bytes_by_data(d_model: int, n_latents: int, batch_tokens: int, n_processes: int) -> float:
    """What a process of `ByData` hands over in a step: gradients, which latents fired, each token's place."""
    gradients = _FLOAT * ((2 * d_model + 1) * n_latents + d_model)
    return gradients + n_latents + 8 * n_processes + 8 * math.ceil(batch_tokens / n_processes) + _DECISION


def bytes_by_position(d_model: int) -> float:
    """What a process of `ByPosition` hands over in a step: the decoder bias's gradient, and a norm."""
    return _FLOAT * d_model + _FLOAT + _DECISION


_DECISION = 8  # whether a checkpoint is due


def host_bytes_by_position(d_model: int, n_latents: int) -> float:
    """What a process of `ByPosition` needs of its host at a checkpoint: the whole SAE, and all of it with its moments
    gathered.
    """
    return 4 * _FLOAT * (2 * d_model + 1) * n_latents


def most_latents_of_host(job: Job) -> int:
    """With how many latents a machine's memory is full at a checkpoint by position."""
    return int(NODE_MEMORY / GPUS_A_NODE / host_bytes_by_position(job.d_model, 1))


def forecasts(job: Job, machine: Linked, n_latents: int) -> Iterator[Forecast]:
    """Every design on 1, 8, 64 and 512 GPUs."""
    for n_gpus in GPU_COUNTS:
        for design in DESIGNS:
            yield forecast(job, machine, design, n_latents, n_gpus)


def reach(job: Job, machine: Linked, design: Design, n_latents: int) -> tuple[Forecast | None, Forecast, str]:
    """(on the fewest GPUs that can, on the most that pay, what stops it), GPUs in powers of two up to `MOST_GPUS`.

    More GPUs pay as long as twice as many are 1.5 times as fast. What stops it is the part that is farthest from
    halving then; "memory" where no number can, "" where nothing did.
    """
    every = [forecast(job, machine, design, n_latents, 2**n) for n in range(MOST_GPUS.bit_length())]
    able = [one for one in every if one.possible]
    if not able:
        return None, every[-1], every[-1].limit if every[-1].limit != "groups" else "memory"
    best = 0
    while best + 1 < len(able) and able[best].seconds >= _PAYS * able[best + 1].seconds:
        best += 1
    later = every[every.index(able[best]) + 1 :]
    if not later:
        return able[0], able[best], ""
    here, more = able[best].parts, later[0].parts
    why = max(more, key=lambda name: more[name] - here[name] / 2) if later[0].possible else later[0].limit
    return able[0], able[best], why


def assumptions(job: Job, machine: Linked) -> list[str]:
    """What the forecasts assume, in sentences."""
    (near, far), (near_share, far_share) = machine.links, machine.link_shares
    whole = host_bytes_by_position(job.d_model, LATENTS[-1])
    return [
        "Nothing here was measured on a GPU: counts times published rates.",
        machine.sentence(),
        f"GPUs in machines of {GPUS_A_NODE}; each sends {near / 1e9:,.0f} GB/s within one, of which {near_share:.0%} "
        f"are reached, and {far / 1e9:,.0f} GB/s ({far_share:.0%}) beyond: assumed too. Disk: {DISK_RATE / 1e9:.0f} "
        "GB/s a GPU. Nothing overlaps.",
        f"{job.trained_tokens:,} tokens trained on in batches of {job.batch_tokens:,}, k = {job.k}, contexts of "
        f"{job.n_positions:,}; vectors stored as {job.stored}, products in {job.precision}.",
        "data: each GPU has the whole dictionary and a part of the batch. latents: it has a part of the dictionary "
        "and sees the whole batch (posmask cannot do this). position: it has some positions' latents and sees their "
        "tokens.",
        f"position is another SAE than the other two: as many latents in all, of which 1 in {job.n_groups} is open at "
        f"a position ({job.n_groups} groups of positions that share no latent).",
        f"By position each process also needs its host's memory at checkpoints, for all latents: {whole / 1e9:,.0f} GB "
        f"at {LATENTS[-1]:,} of {job.name}. A machine with {NODE_MEMORY / 1e12:.0f} TB for {GPUS_A_NODE} stops at "
        f"{most_latents_of_host(job):,}.",
    ]


def print_forecasts(jobs: list[Job], machine: Linked) -> None:
    """Print what each job takes on 1 to 512 GPUs, and the assumptions."""
    console = Console(highlight=False)
    width = min(console.width, 100)
    for job in jobs:
        harvest = {n: job.harvest(machine, n) for n in GPU_COUNTS}
        times = ", ".join(f"{duration(one.seconds)} on {n}" for n, one in harvest.items())
        fits = harvest[1].fits
        note = "" if fits else ", more than a GPU has, and posmask cannot split it: the times assume a split"
        summary = (
            f"{job.name}: {_bytes(harvest[1].bytes_held)} of weights{note}. Harvest of {job.harvested_tokens:,} "
            f"tokens: {times} GPUs; {_bytes(job.disk_bytes)} on disk, of the {_bytes(NODE_DISK)} in a machine of "
            f"{GPUS_A_NODE}."
        )
        print(textwrap.fill(summary, width))
        console.print(_table(job, machine))
        print()
    for line in assumptions(jobs[0], machine):
        print(textwrap.fill(f"- {line}", width, subsequent_indent="  "))


def _table(job: Job, machine: Linked) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False, header_style="bold")
    table.add_column("latents", no_wrap=True)
    for name in ("GPUs", "divided by", "a GPU holds", "sent a step", "training", "dearest"):
        table.add_column(name, justify="left" if name in ("divided by", "dearest") else "right", no_wrap=True)
    for n_latents in LATENTS:
        for one in forecasts(job, machine, n_latents):
            table.add_row(
                f"{n_latents:,}" if (one.n_gpus, one.design) == (1, "data") else "",
                str(one.n_gpus) if one.design == "data" else "",
                one.design,
                _bytes(sum(one.bytes_held.values())),
                _bytes(one.bytes_sent),
                duration(one.seconds) if one.possible else "–",
                one.limit if one.possible else f"{one.limit}: no",
            )
    return table


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:,.1f} TB"


def main() -> None:
    parser = argparse.ArgumentParser(description="Predict memory, traffic and time on 1 to 512 GPUs.")
    parser.add_argument("study", nargs="?", type=Path, metavar="STUDY.toml", help="default: five models up to 70B")
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(LINKS)}; default: h100")
    words = parser.parse_args()
    try:
        machine = linked_gpu(words.gpu)
        jobs = [Job.of_study(read_study(words.study))] if words.study else [Job.of_model(name) for name in MODELS]
    except (PosmaskError, OSError) as error:
        sys.exit(f"simulate: {error}")
    print_forecasts(jobs, machine)


if __name__ == "__main__":
    main()
