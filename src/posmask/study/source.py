"""The model and texts that a study reads, and their parts of every identity."""

from functools import cached_property
from typing import Any

from posmask.data import embedded, models, sites
from posmask.data.texts import content_of
from posmask.data.tokens import TRAINING_SHARE, VALIDATION_SHARE
from posmask.errors import BadSetting
from posmask.kernels import runtime
from posmask.study.settings import MeasurementSettings, ModelSettings

__all__ = ["Source", "texts_identity"]


class Source:
    """The model that a study reads vectors from, loaded only when something must be harvested."""

    def __init__(self, settings: ModelSettings, device: str = "cpu") -> None:
        precision = runtime.fast_precision(device) if settings.precision == "auto" else settings.precision
        self._settings = settings
        self.name = settings.name
        self._device = device
        self._precision: runtime.Precision = precision
        self._texts: dict[str | None, dict[str, Any]] = {}

    @cached_property
    def layer(self) -> int:
        """The number of the layer, from 1."""
        return models.layer_number(self._settings.name, self._settings.layer)

    @cached_property
    def d_model(self) -> int:
        """The size of a vector, from the model's configuration."""
        return models.vector_size(self.name)

    @cached_property
    def made_from(self) -> dict[str, Any]:
        """The part of every identity that belongs to the model: weights, layer, site, precision and sinks."""
        return {
            "weights": models.weights_identity(self._settings.name),
            "layer": self.layer,
            "precision": self._precision,
            "sink_norm": self._settings.sink_norm,
            **({} if self._settings.site == "residual_after" else {"site": self._settings.site}),
        }

    def texts_identity(self, study: MeasurementSettings) -> dict[str, Any]:
        """`texts_identity`, computed once, so that all identities of a run are of the same texts."""
        texts = study.corpus.texts
        if texts not in self._texts:
            self._texts[texts] = texts_identity(study)
        return self._texts[texts]

    def check_texts(self, study: MeasurementSettings) -> None:
        """Check, after texts were read, that they are those of `texts_identity`.

        Raises:
            BadSetting: a file was changed, added or removed in the meantime.
        """
        if self.texts_identity(study) != texts_identity(study):
            raise BadSetting(
                f"corpus.texts = {study.corpus.texts!r} was changed during this run, which identifies results by the "
                "texts: run again when the files stay as they are"
            )

    @cached_property
    def tokenizer(self) -> Any:
        return models.load_tokenizer(self._settings.name)

    @cached_property
    def loaded(self) -> sites.LanguageModel:
        settings = self._settings
        return models.load_model(
            settings.name,
            self.layer,
            self._precision,
            site=settings.site,
            device=self._device,
            sink_norm=settings.sink_norm,
        )


def texts_identity(study: MeasurementSettings) -> dict[str, Any]:
    """The part of every identity that belongs to the texts: checksums of their packages or files, and the split."""
    carriers = {
        carrier.package: carrier.wheel_sha256 for carrier in embedded.CARRIERS if carrier != embedded.MODEL_CARRIER
    }
    shares = [TRAINING_SHARE, VALIDATION_SHARE]
    texts = study.corpus.texts
    own = {} if texts is None else {"own": content_of(texts), "key": "whole text"}
    return {"carriers": carriers, "shares": shares, **own}
