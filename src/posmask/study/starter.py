"""Write a first study file for a model and texts, with sizes that fit them."""

import json
import os
import re
from pathlib import Path
from typing import Any

from posmask.data import models
from posmask.data.texts import HUB_PREFIX, read_texts
from posmask.data.tokens import Split, SplitTexts, count_tokens, select_texts, shifted, whole_text_key
from posmask.errors import BadSetting, NothingToDo
from posmask.storage.atomic import replacing

__all__ = ["write_starter"]

_TRAINING_TOKENS, _HELDOUT_TOKENS, _HUB_TEXTS = 2_000_000, 100_000, 100_000
_SHIFT_TEXTS = (48, 24, 12, 6, 3, 2)
_LEAST_CONTEXTS = 20
"""Contexts for training, and as many for evaluation, below which a study would say nothing."""


def write_starter(model: str, texts: str, path: Path) -> None:
    """Write a commented study file of two cells that runs as it stands.

    Sizes follow from the model and from the number of tokens in the texts; a dataset on the hub is assumed to be large.

    Args:
        model: as in `model.name`, relative to the current folder.
        texts: as in `corpus.texts`, relative to the current folder.
        path: the file.

    Raises:
        BadSetting: the file exists, or the model or texts cannot be read.
        NothingToDo: the texts have too few tokens.
    """
    if path.exists():
        raise BadSetting(f"{path} exists: remove it, or give another path with --out")
    layer = models.layer_number(model, 0.5)
    outline = models.load_outline(model, layer)
    n_positions = 128
    try:
        outline.check_length(n_positions)
    except BadSetting:
        n_positions = 16
        outline.check_length(n_positions)
    sizes = _hub_sizes() if texts.startswith(HUB_PREFIX) else _sizes(texts, models.load_tokenizer(model), n_positions)
    d_sae = max(64, 4 * outline.d_model // 8 * 8)
    batch_tokens = max(b for b in (64, 128, 256, 512, 1024, 2048, 4096) if b == 64 or 50 * b <= sizes["training"])
    content = _TEMPLATE.format(
        name=re.sub(r"[^a-z0-9_.-]+", "-", path.stem.lower()).strip("-._") or "study",
        model=_as_toml(model, path) if Path(model).exists() else json.dumps(model),
        file=path.name,
        layer=layer,
        texts=json.dumps(texts) if texts.startswith(HUB_PREFIX) else _as_toml(texts, path),
        n_texts=f"n_texts = {_HUB_TEXTS:_}                # the first ones\n" if texts.startswith(HUB_PREFIX) else "",
        n_positions=n_positions,
        training=sizes["training"],
        heldout=sizes["heldout"],
        d_sae=d_sae,
        k=min(32, d_sae // 8),
        n_steps=sizes["training"] // batch_tokens,
        batch_tokens=batch_tokens,
        retention=n_positions // 8,
        shift_texts=sizes["shift"],
        contexts=min(16, sizes["heldout"] // n_positions // 2),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        draft.write_text(content, encoding="utf8")


def _as_toml(target: str, path: Path) -> str:
    """A path as a TOML string, relative to the study file."""
    if Path(target).is_absolute():
        return json.dumps(target)
    relative = os.path.relpath(target, path.parent)
    return json.dumps(relative if relative.startswith(".") else f"./{relative}")


def _hub_sizes() -> dict[str, int]:
    return {"training": _TRAINING_TOKENS, "heldout": _HELDOUT_TOKENS, "shift": _SHIFT_TEXTS[0]}


def _sizes(texts: str, tokenizer: Any, n_positions: int) -> dict[str, int]:
    """Numbers of training and held-out tokens and of texts in the shift design that the texts suffice for."""

    def of_split(split: Split) -> SplitTexts:
        return select_texts(read_texts(texts), split, key=whole_text_key)

    training, evaluation = of_split("training"), of_split("evaluation")
    n_training = _tokens_for(training, tokenizer, n_positions, _TRAINING_TOKENS)
    n_heldout = _tokens_for(evaluation, tokenizer, n_positions, _HELDOUT_TOKENS)
    for n_texts in _SHIFT_TEXTS:
        try:
            shifted(evaluation.texts, tokenizer, n_positions, n_texts, 5, description=str(evaluation))
        except NothingToDo:
            if n_texts == _SHIFT_TEXTS[-1]:
                raise
        else:
            return {"training": n_training, "heldout": n_heldout, "shift": n_texts}
    raise AssertionError("the loop returns or raises")


def _tokens_for(texts: SplitTexts, tokenizer: Any, n_positions: int, most: int) -> int:
    """The number of tokens to ask for: `most`, or nine tenths of the texts' tokens, rounded down to two digits."""
    n_tokens = count_tokens(texts.texts, tokenizer, most)
    if n_tokens >= most:
        return most
    if n_tokens < (needed := _LEAST_CONTEXTS * n_positions):
        raise NothingToDo(
            f"{needed:,} kept tokens are needed, but {texts} have {n_tokens:,}: give more or longer texts"
        )
    digit = 10 ** (len(str(n_tokens)) - 2)
    return n_tokens * 9 // 10 // digit * digit


_TEMPLATE = """\
# A first study: an unmasked SAE (the baseline) and one with a position mask, on the same model and texts.
#   posmask plan {file}       estimates its cost
#   posmask run {file}        harvests, trains, evaluates; writes a table and a page to runs/{name}
# A setting may also be replaced for one run: posmask run {file} --set model.layer=3
name = "{name}"
seeds = [0]                      # one SAE per cell and seed; verdicts need three: [0, 1, 2]

[model]
name = {model}
layer = {layer}                        # read the residual stream after this layer

[corpus]
texts = {texts}
{n_texts}n_positions = {n_positions}                # tokens per context; masks are tables over these positions
training_tokens = {training:_}      # from a quarter of the texts, chosen by a hash
heldout_tokens = {heldout:_}        # from the other texts: for reconstruction and fidelity

[sae]
d_sae = {d_sae}                     # latents of the unmasked SAE
rule = {{ kind = "topk", k = {k} }}   # k active latents per token

[training]
n_steps = {n_steps}
batch_tokens = {batch_tokens}              # n_steps * batch_tokens: each token about once
learning_rate = 4e-3

[evaluation]
retention_positions = {retention}
shift_texts = {shift_texts}                 # texts that are placed at several positions of the context
model_contexts = {contexts}              # contexts in which the model continues from reconstructions
# Probes on texts of posmask, 205 MB on first use:
# order_tasks = ["bigram_shift", "topic_permutation"]
# probe_datasets = ["ag_news"]

[[cells]]
name = "open"                    # no mask: the baseline
mask = {{ kind = "open" }}

[[cells]]
name = "slice"                   # each latent is open in one of 8 slices of the context
mask = {{ kind = "slice", n_slices = 8 }}
"""
