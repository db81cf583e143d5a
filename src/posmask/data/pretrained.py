"""Call `from_pretrained` of transformers and reject models whose files lack weights."""

import os
from collections.abc import Collection, Mapping
from typing import Any

from posmask.errors import BadSetting, first_line
from posmask.progress import announce

__all__ = ["import_transformers", "load_complete"]


def load_complete(description: str, **options: Any) -> Any:
    """Load a causal language model all of whose weights are in its files.

    Args:
        description: names the model in error messages.
        options: of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        BadSetting: the files lack weights or have them in other shapes; transformers fills these with random numbers.
    """
    try:
        loaded: Any = import_transformers().AutoModelForCausalLM.from_pretrained(
            **options, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except RuntimeError as error:
        if "memory" in str(error):
            raise
        raise BadSetting(
            f"the weights of {description} do not combine into its layers ({first_line(error)}): export the model again"
        ) from error
    model, report = loaded
    _check_complete(description, type(model).__name__, report)
    return model


def _check_complete(description: str, architecture: str, report: Mapping[str, Any]) -> None:
    missing, unknown = report["missing_keys"], report["unexpected_keys"]  # Tied weights are in neither.
    misshapen = [
        f"{key} of shape {list(stored)} instead of {list(needed)}" for key, stored, needed in report["mismatched_keys"]
    ]
    if missing and unknown:
        raise BadSetting(
            f"{description} lacks {len(missing)} weights of {architecture} ({_first_few(missing)}) but has "
            f"{len(unknown)} other tensors ({_first_few(unknown)}): rename these as transformers names them, or export "
            "the model again"
        )
    if missing:
        raise BadSetting(
            f"{description} lacks {len(missing)} weights of {architecture} ({_first_few(missing)}), which would be "
            "random: get all of its files, or export the model again"
        )
    if misshapen:
        raise BadSetting(
            f"{description} has {len(misshapen)} weights that do not fit its configuration ({_first_few(misshapen)}): "
            "take weights and configuration from the same model"
        )
    if unknown:
        announce(
            f"Ignoring {len(unknown)} tensors of {description} that {architecture} does not have "
            f"({_first_few(unknown)})."
        )


def _first_few(names: Collection[str]) -> str:
    """The first three in alphabetical order."""
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def import_transformers() -> Any:
    """Import transformers, which takes a second, and switch off its progress bars and warnings."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers
