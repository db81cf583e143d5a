"""Training in one of the processes of test_parallel.py, which import only this and what they train with."""

import copy
from pathlib import Path

import torch
import torch.distributed as dist

from posmask.data.activations import Activations, training_batches
from posmask.training.checkpoints import Checkpoints
from posmask.training.distributed import ByData, ByPosition
from posmask.training.loop import train
from posmask.training.settings import TrainingSettings

SETTINGS = TrainingSettings(n_steps=15, batch_tokens=240, learning_rate=5e-3, dead_after_eligible_tokens=300, aux_k=4)


class Stopped(Exception):
    pass


def trained(folder, sae, parallel_by=None, checkpoint_folder=None, write_at=0, stop=False):
    """Return the curve, the SAE and the bytes sent of one process, trained alone or by data or position with others.

    With `checkpoint_folder`, training resumes from the newest checkpoint in it and writes one after step `write_at`.

    Args:
        sae: is copied before training.
    """
    activations, sae = Activations(folder), copy.deepcopy(sae)
    sae.center, sae.scale = activations.center_and_scale
    if parallel_by is None:
        strategy, local_sae, token_indices, options = None, sae, None, {}
    else:
        strategy = ByData(sae) if parallel_by == "data" else ByPosition(sae, activations.position[activations.keep])
        local_sae, token_indices = getattr(strategy, "local_sae", sae), strategy.token_indices
        options = {"processes": strategy}
    made_from = {"mask": sae.mask.settings.kind}
    checkpoints = None if checkpoint_folder is None else Checkpoints(Path(checkpoint_folder), made_from)
    n_done = 0 if checkpoints is None else checkpoints.done

    def after_step(done):
        if stop and done > write_at:
            raise Stopped
        if checkpoints is not None:
            checkpoints.due = lambda at_end: done == write_at

    batches = training_batches(
        activations, SETTINGS.batch_tokens, SETTINGS.n_steps - n_done, 0, after=n_done, token_indices=token_indices
    )
    curve = train(local_sae, batches, SETTINGS, "test", after_step, checkpoints, **options).curve
    return curve, strategy.merge_() if parallel_by == "position" else sae, getattr(strategy, "bytes_sent", 0)


def train_all_cases(rank, n_processes, rendezvous, folder, cases, checkpoint_folder, out):
    """Train all cases, pairs of what is divided and an SAE, in one process, so that it starts only once."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=n_processes)
    try:
        for number, (parallel_by, sae) in enumerate(cases):
            curve, sae, sent = trained(folder, sae, parallel_by, f"{checkpoint_folder}-{number}", write_at=10)
            result = {"curve": [vars(point) for point in curve], "sae": sae.state_dict(), "sent": sent}
            torch.save(result, f"{out}-{number}-{rank}")
    finally:
        dist.destroy_process_group()
