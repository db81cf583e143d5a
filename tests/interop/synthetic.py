"""Synthetic pooled activations, identical under any NumPy: only uniform draws, sums and products of float64."""

import hashlib

import numpy as np

CLASSES = ("0", "1", "2", "3", "4")
N_TRAIN, N_TEST = 250, 60  # Texts per class.


def latents(seed: int, n_features: int = 96) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return (training, test): class -> [text feature], float32, non-negative and sparse, as pooled SAE codes.

    Latents 0 to 39 fire more often and more strongly in one class, in eight steps; the last two never fire.
    """
    random = np.random.default_rng(seed)
    rate = 0.02 + 0.2 * random.random(n_features) * random.random(n_features)
    sides = []
    for n_texts in (N_TRAIN, N_TEST):
        side = {}
        for number, name in enumerate(CLASSES):
            class_latents = np.arange(n_features) % len(CLASSES) == number
            excess = np.where(
                class_latents & (np.arange(n_features) < 40), 0.5 - 0.06 * (np.arange(n_features) // 5), 0.0
            )
            fires = random.random((n_texts, n_features)) < rate + excess
            value = random.random((n_texts, n_features)) * (0.2 + excess)
            value[:, -2:] = 0.0
            side[name] = (fires * value).astype(np.float32)
        sides.append(side)
    return sides[0], sides[1]


def channels(seed: int, n_features: int = 24) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Like `latents`, but dense and of either sign, as the pooled channels of a model."""
    random = np.random.default_rng(seed)
    middle = random.random((len(CLASSES), n_features)) - 0.5
    sides = [
        {
            name: (random.random((n, n_features)) + random.random((n, n_features)) - 1 + middle[i]).astype(np.float32)
            for i, name in enumerate(CLASSES)
        }
        for n in (N_TRAIN, N_TEST)
    ]
    return sides[0], sides[1]


def sha256(*arrays: np.ndarray) -> str:
    """Return the checksum of the little-endian bytes of the arrays."""
    checksum = hashlib.sha256()
    for array in arrays:
        checksum.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes())
    return checksum.hexdigest()


TABLES = {
    # hub name: (text column, label column, labels, other column, its values)
    "LabHC/bias_in_bios": ("hard_text", "profession", list(range(28)), "gender", [0, 1]),
    "canrager/amazon_reviews_mcauley_1and5": ("text", "category", [1, 2, 3, 4, 5, 6], "rating", [1.0, 5.0]),
    "fancyzhx/ag_news": ("text", "label", [0, 1, 2, 3], "source", ["", "wire"]),
}
EXTENSIONS = {".c": "C", ".h": "C", ".py": "Python", ".html": "HTML", ".java": "Java", ".php": "PHP", ".rs": "Rust"}


def table_rows(path: str, split: str) -> list[dict]:
    """Return rows with the columns of a hub table."""
    text, label, labels, other, values = TABLES[path]
    random = np.random.default_rng(len(path) + len(split))
    n_rows = {"train": 2400, "test": 800}[split]
    return [
        {text: f"{split} text {i}", label: labels[int(a * len(labels))], other: values[int(b * len(values))]}
        for i, (a, b) in enumerate(random.random((n_rows, 2)))
    ]


def translation_rows(pair: str) -> list[dict]:
    """Return rows of a language pair of Helsinki-NLP/europarl."""
    return [{"translation": {language: f"{language} {pair} {i}" for language in pair.split("-")}} for i in range(90)]


def code_rows() -> list[dict]:
    """Return rows as stored in the files of codeparrot/github-code, with a path but no language."""
    random = np.random.default_rng(5)
    extensions = list(EXTENSIONS)
    return [
        {
            "content": "x" * int(380 + 600 * b) + f" // {i}",
            "repo_name": "some/one",
            "path": f"src.c/file{i}{extensions[int(a * a * len(extensions))]}",
            "license": "mit",
            "size": 1,
        }
        for i, (a, b) in enumerate(random.random((2000, 2)))
    ]
