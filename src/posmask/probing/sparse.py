"""k-sparse probes in SAEBench's protocol: pick the k features whose class means differ most, fit on those alone."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from posmask.errors import DegenerateResult

__all__ = ["k_sparse_correct"]


def k_sparse_correct(
    train: Float[Tensor, "text feature"],
    train_label: Bool[Tensor, " text"],
    test: Float[Tensor, "test_text feature"],
    test_label: Bool[Tensor, " test_text"],
    ks: Sequence[int],
) -> dict[int, Bool[Tensor, " test_text"]]:
    """For each k, which test texts a k-sparse probe gets right.

    Features are ranked by |mean(positives) - mean(negatives)| on the training texts, raw; the probe on the k first is
    scikit-learn's logistic regression (L2, C = 1, lbfgs, at most 1000 iterations, intercept), features not
    standardised. Source: sae-bench 0.6.0, evals/sparse_probing/probe_training.py.

    Raises:
        DegenerateResult: a feature is not finite.
        DegenerateResult: every feature is constant over the training texts, so a probe could only guess.
    """
    if not bool(train.isfinite().all() and test.isfinite().all()):
        raise DegenerateResult(
            "pooled features hold NaN or infinite numbers: look at the vectors and the SAE's weights"
        )
    if bool((train == train[0]).all()):
        raise DegenerateResult(
            f"all {train.shape[1]:,} pooled features are constant over {len(train):,} training texts, so every probe "
            "would score exactly chance: the SAE is not trained, or its latents are closed on these texts"
        )
    difference = (train[train_label].mean(0) - train[~train_label].mean(0)).abs()
    ranked = torch.sort(difference, descending=True, stable=True).indices
    correct = {}
    for k in ks:
        chosen = ranked[:k]
        probe = LogisticRegression(C=1.0, max_iter=1000)
        # numpy's products may raise floating-point flags over finite numbers; these are finite, checked above.
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            # The protocol stops at 1000 iterations whether or not lbfgs is content.
            warnings.simplefilter("ignore", ConvergenceWarning)
            probe.fit(train[:, chosen].numpy(), train_label.numpy())
        predicted = np.asarray(probe.predict(test[:, chosen].numpy()), dtype=bool)
        correct[k] = torch.from_numpy(predicted) == test_label
    return correct
