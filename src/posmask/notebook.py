"""The steps of a study as functions for notebooks and scripts: texts -> vectors -> SAE -> training -> measures.

`import posmask` exports them. A study adds seeds, order and standard probing, metrics inside the model, comparisons and
the report page.
"""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from posmask import masks
from posmask.data.activations import Activations, evaluation_batches, finished_activations, training_batches
from posmask.data.harvest import harvest
from posmask.data.texts import why_unusable
from posmask.data.tokens import pack
from posmask.errors import BadSetting, DamagedFolder
from posmask.evaluation.reconstruction import Reconstruction
from posmask.evaluation.retention import PositionMass, mask_measures, retention, special_positions
from posmask.results.rows import Measure
from posmask.sae import rules
from posmask.sae.autoencoder import PositionBias, SparseAutoencoder
from posmask.storage.manifest import check_folder
from posmask.study.settings import ModelSettings
from posmask.study.source import Source
from posmask.training import loop
from posmask.training.settings import TrainingSettings

__all__ = ["fit", "make_sae", "measure", "read_vectors"]


def read_vectors(
    texts: Sequence[str],
    model: str,
    layer: int | float,
    folder: Path | str,
    *,
    n_tokens: int,
    n_positions: int = 128,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
) -> Activations:
    """The model's vectors after a layer for every token of some texts, harvested once into `folder`.

    Texts are packed into contexts of `n_positions`, each of which begins with BOS. A second call with the same texts
    and model reads what is there; other vectors of this function's in `folder` are replaced.

    Args:
        model: a name on the hub, a folder, or `embedded:SmolLM2-135M-Instruct`.
        layer: how many layers the vectors have passed, or a share of the model's depth below 1.
        n_tokens: kept tokens to harvest, at least.

    Raises:
        BadSetting: the model cannot be loaded, a text is not a string of characters, or `folder` holds something that
            posmask did not write.
        NothingToDo, DegenerateResult: what the texts or the vectors lack.
    """
    source = Source(ModelSettings(name=model, layer=layer, precision=precision))
    digest = hashlib.sha256()
    for number, text in enumerate(texts):
        if (reason := why_unusable(text)) is not None:
            raise BadSetting(f"texts[{number}] is a value {reason}, which no tokenizer takes: leave it out")
        digest.update(hashlib.sha256(text.encode()).digest())
    made_from = {
        "model": source.made_from,
        "texts": digest.hexdigest(),
        "n_positions": n_positions,
        "n_tokens": n_tokens,
        "stored": "model",
    }
    folder = Path(folder)
    with contextlib.suppress(DamagedFolder):  # `harvest` reports and repairs it.
        if (activations := finished_activations(folder, made_from)) is not None:
            return activations
    check_folder(folder, made_from)
    tokens = pack(list(texts), source.tokenizer, n_positions, n_tokens)
    return harvest(tokens, source.loaded, folder, made_from, folder.name)


def make_sae(
    activations: Activations,
    d_sae: int,
    *,
    mask: Mapping[str, Any],
    rule: Mapping[str, Any],
    budget: Literal["width", "compute"] = "width",
    n_positions: int = 128,
    seed: int = 0,
    position_bias: PositionBias | None = None,
) -> SparseAutoencoder:
    """An untrained SAE for these vectors; masks and rules are named as in study files.

    Args:
        mask: such as `{"kind": "slice", "n_slices": 8}`; see docs/masks.md.
        rule: such as `{"kind": "topk", "k": 32}`.
        budget: width: `d_sae` latents in all. compute: `d_sae` latents open at each position.
        position_bias: a vector per position that is subtracted before encoding and added back after decoding: `mean`,
            the mean of these vectors at the position, or `learned`, which starts at it.

    Raises:
        BadSetting: mask, rule and sizes do not fit together.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> vectors = SimpleNamespace(d_model=4, center_and_scale=(torch.zeros(4), torch.ones(())))
        >>> mask, rule = {"kind": "slice", "n_slices": 2}, {"kind": "topk", "k": 2}
        >>> make_sae(vectors, 6, mask=mask, rule=rule, budget="compute", n_positions=8).d_sae
        12
    """
    settings = masks.mask_settings(dict(mask), may_import=True)
    if budget == "compute":
        d_sae = masks.MASKS[settings.kind].width_at_equal_compute(settings, n_positions, d_sae)
    made = masks.make_mask(settings, n_positions, d_sae, seed)
    sae = SparseAutoencoder(activations.d_model, rules.rule_settings(dict(rule)), made, seed, position_bias)
    sae.center, sae.scale = activations.center_and_scale
    if position_bias is not None:
        sae.start_position_bias_(activations.position_means(n_positions, settings.position_origin))
    return sae


def fit(
    sae: SparseAutoencoder,
    activations: Activations,
    *,
    n_steps: int,
    batch_tokens: int = 4096,
    learning_rate: float = 4e-3,
    seed: int = 0,
    label: str = "",
    **settings: Any,
) -> loop.Trained:
    """Train an SAE in place on harvested vectors.

    Args:
        seed: decides the order of the tokens.
        settings: more of `TrainingSettings`.
    """
    training = TrainingSettings(n_steps=n_steps, batch_tokens=batch_tokens, learning_rate=learning_rate, **settings)
    batches = training_batches(
        activations, batch_tokens, n_steps, seed, pairs=sae.rule.pairs_tokens, device=sae.encoder.device
    )
    return loop.train(sae, batches, training, label or sae.mask.settings.kind)


def measure(sae: SparseAutoencoder, heldout: Activations, *, retention_positions: int = 16) -> list[Measure]:
    """Reconstruction (overall and by position), the mask, and whether latents keep to their positions without it.

    Definitions: docs/metrics.md. What needs the model or tasks is left to studies.

    Args:
        heldout: vectors of texts that the SAE was not trained on.
        retention_positions: how many top positions stand in for a mask, for latents whose mask binds them to none.

    Raises:
        DegenerateResult: the SAE codes nothing or explains nothing.
    """
    n_positions, position_origin = sae.mask.n_positions, sae.mask.settings.position_origin
    reconstruction = Reconstruction(n_positions, heldout.n_texts, heldout.center_and_scale[0])
    lifted = PositionMass(n_positions, sae.d_sae)
    for stored in evaluation_batches(heldout):
        batch = stored.kept()
        codes = sae.encode_batch(batch)
        reconstruction.update(batch, codes, sae.decode_batch(codes, batch))
        lifted.update(batch, sae.encode_batch(batch, use_mask=False), position_origin)
    sinks = heldout.sinks
    reconstruction.update_sinks(sinks, sae.decode_batch(sae.encode_batch(sinks), sinks))
    special = special_positions(lifted, sae.mask.bound_positions(), retention_positions)
    return [*reconstruction.measures(), *mask_measures(sae.mask), *retention(lifted, special)]
