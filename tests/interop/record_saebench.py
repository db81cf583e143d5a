"""Record the results of sae-bench on synthetic activations, in its environment: `record_saebench.py OUT.json`.

A row is `class number * N_TRAIN + text` in training and `class number * N_TEST + text` in test. Its label is whether
the class is that of the probe. Rows are in the order in which the probe reads them.
"""

import hashlib
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["JAXTYPING_DISABLE"] = "1"  # sae-bench's annotations fail the checks of newer jaxtyping.

import numpy as np
import sae_bench.evals.sparse_probing.main as peer
import sae_bench.evals.sparse_probing.probe_training as probes
import sae_bench.sae_bench_utils.dataset_info as dataset_info
import sae_bench.sae_bench_utils.dataset_utils as dataset_utils
import torch
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from synthetic import CLASSES, EXTENSIONS, channels, code_rows, latents, sha256, table_rows, translation_rows

KS = (1, 2, 5, 10, 20, 50)
ALL_LATENTS = {"select_top_k": None, "use_sklearn": False, "batch_size": 250, "epochs": 100, "lr": 1e-2}
SEED, LATENTS_SEED, STREAM_SEED = 7, 0, 42
STREAM_KS = (1, 2, 5)
TEXTS = (80, 20, 42)  # Training and test texts of a probe, seed.
STREAM_DATASETS = {"one": 1, "two": 2}  # name: seed of its latents; the seed of its channels is larger by 100.


class Recorder:
    """Wraps four functions of sae-bench, calls them unchanged and records their results.

    Rows are recorded by calling `prepare_probe_data` a second time, from the same state of torch's generator, with the
    row number of each text instead of its activations.
    """

    def __init__(self):
        self.rows, self.features, self.curve = [], None, []
        prepare, top_k, test, train = (
            probes.prepare_probe_data,
            probes.get_top_k_mean_diff_mask,
            probes.test_probe_gpu,
            probes.train_probe_on_activations,
        )
        self.calls = []

        def prepare_probe_data(activations, name, perform_scr=False):
            state = torch.get_rng_state()
            counts = np.cumsum([0, *map(len, activations.values())])
            numbered = {
                key: torch.arange(start, end, dtype=torch.float64)[:, None]
                for key, start, end in zip(activations, counts[:-1], counts[1:], strict=True)
            }
            rows, labels = prepare(numbered, name, perform_scr)
            torch.set_rng_state(state)
            prepared = prepare(activations, name, perform_scr)
            assert torch.equal(prepared[1], labels)
            self.rows.append(rows[:, 0].long().numpy())
            return prepared

        def get_top_k_mean_diff_mask(acts, labels, k):
            mask = top_k(acts, labels, k)
            self.features = (~mask).nonzero()[:, 0].tolist()
            return mask

        def test_probe_gpu(inputs, *rest):
            accuracy = test(inputs, *rest)
            self.curve.append(accuracy)
            return accuracy

        def train_probe_on_activations(train_acts, test_acts, **options):
            self.rows, by_class, curves = [], [], []
            fit, fit_all = probes.train_sklearn_probe, probes.train_probe_gpu

            def note(fitted):
                by_class.append(self.features)
                curves.append(self.curve[1::2])  # Training and test accuracy alternate.
                self.features, self.curve = None, []
                return fitted

            probes.train_sklearn_probe = lambda *a, **b: note(fit(*a, **b))
            probes.train_probe_gpu = lambda *a, **b: note(fit_all(*a, **b))
            try:
                fitted, accuracies = train(train_acts, test_acts, **options)
            finally:
                probes.train_sklearn_probe, probes.train_probe_gpu = fit, fit_all
            for number, (name, accuracy) in enumerate(accuracies.items()):
                train_rows, test_rows = self.rows[2 * number : 2 * number + 2]
                call = {"class": name, "k": options["select_top_k"], "accuracy": accuracy}
                call |= {"n_features": train_acts[name].shape[1]}
                call |= {"train_rows": train_rows, "test_rows": test_rows}
                call |= {"epoch_accuracies": curves[number]} if curves[number] else {"features": by_class[number]}
                self.calls.append(call)
            return fitted, accuracies

        probes.prepare_probe_data = prepare_probe_data
        probes.get_top_k_mean_diff_mask = get_top_k_mean_diff_mask
        probes.test_probe_gpu = test_probe_gpu
        probes.train_probe_on_activations = train_probe_on_activations


def tensors(sides):
    return [{name: torch.from_numpy(array) for name, array in side.items()} for side in sides]


def each_k(recorder):
    """Call `train_probe_on_activations` per k, all-latent probes last; the seed is set once, before the first call."""
    torch.manual_seed(SEED)
    for options in [{"select_top_k": k} for k in KS] + [ALL_LATENTS]:
        probes.train_probe_on_activations(*tensors(latents(LATENTS_SEED)), **options)
    return [
        {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in call.items()}
        for call in recorder.calls
    ]


def evaluation_stream(recorder):
    """Run `run_eval_single_sae` over two datasets; only the source of the activations is replaced."""
    recorder.calls.clear()
    now = iter(STREAM_DATASETS)

    def get_dataset_activations(name, *_):
        assert name == next(now)
        return tensors(channels(STREAM_DATASETS[name] + 100))

    pooled = iter([side for seed in STREAM_DATASETS.values() for side in tensors(latents(seed))])
    peer.get_dataset_activations = get_dataset_activations
    peer.activation_collection.create_meaned_model_activations = dict
    peer.activation_collection.get_sae_meaned_activations = lambda *_: next(pooled)
    config = SparseProbingEvalConfig(
        random_seed=STREAM_SEED, dataset_names=list(STREAM_DATASETS), k_values=list(STREAM_KS)
    )
    site = type("Site", (), {"hook_layer": 0, "hook_name": ""})
    sae = type("Sae", (), {"cfg": site})
    with tempfile.TemporaryDirectory() as folder:
        means, _ = peer.run_eval_single_sae(config, sae, None, "cpu", folder, save_activations=False)
    datasets = np.repeat(list(STREAM_DATASETS), 2 * len(CLASSES) * (1 + len(STREAM_KS)))
    recorded = []
    for dataset, call in zip(datasets.tolist(), recorder.calls, strict=True):
        where = {"dataset": dataset, "source": "llm" if call["n_features"] == 24 else "sae"}
        call["rows_sha256"] = sha256(call.pop("train_rows"), call.pop("test_rows"))
        if "epoch_accuracies" in call:
            call["n_epochs"] = len(call.pop("epoch_accuracies"))
        recorded.append(where | call)
    return {"probes": recorded, "means": means}


def sampled_texts():
    """Return the SHA-256 of the NUL-joined training and test texts per dataset and class, for synthetic rows."""

    def load_dataset(path, pair=None, **_):
        if path == "codeparrot/github-code":  # as its loading script converts the files
            rows = [row | {"language": EXTENSIONS["." + row["path"].rpartition(".")[2]]} for row in code_rows()]
            return [row | {"code": row["content"]} for row in rows if row["language"] != "Rust"]
        return translation_rows(pair) if pair else {split: table_rows(path, split) for split in ("train", "test")}

    dataset_utils.load_dataset = load_dataset
    checksums = {}
    for name, classes in dataset_info.chosen_classes_per_dataset.items():
        sides = dataset_utils.get_multi_label_train_test_data(name, *TEXTS)
        sides = [dataset_utils.filter_dataset(side, classes) for side in sides]
        checksums[name] = {
            label: [hashlib.sha256("\0".join(side[label]).encode()).hexdigest() for side in sides] for label in classes
        }
    return checksums


def main(path):
    torch.set_num_threads(1)
    recorder = Recorder()
    packages = ("sae-bench", "torch", "scikit-learn", "numpy")
    head = {
        "versions": {name: version(name) for name in packages},
        "each_k": {
            "seed": SEED,
            "latents_seed": LATENTS_SEED,
            "latents_sha256": sha256(*(array for side in latents(LATENTS_SEED) for array in side.values())),
            "probes": each_k(recorder),
        },
        "stream": {
            "seed": STREAM_SEED,
            "latents_seeds": STREAM_DATASETS,
            "channels_sha256": sha256(*(array for side in channels(101) for array in side.values())),
        }
        | evaluation_stream(recorder),
        "texts": dict(zip(("n_train", "n_test", "seed"), TEXTS, strict=True)) | {"sha256": sampled_texts()},
    }
    text = json.dumps(head)
    path.write_text(text.replace('{"class"', '\n{"class"').replace('{"dataset"', '\n{"dataset"') + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
