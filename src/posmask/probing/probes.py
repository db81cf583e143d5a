"""Probes on pooled features after SAEBench's protocol: k-sparse probes, and a probe on all features.

k-sparse: raw features are ranked by |mean(positives) - mean(negatives)| over the training texts (or by Welch's t, which
does not favor features of large variance), and the probe is an L2 logistic regression (C = 1, with intercept, not
standardized) on the first k: the minimum of

    |w|^2 / 2 + sum over training texts of log(1 + exp(-y (w . f + b)))        y = +1 or -1

Source: sae-bench 0.6.0, evals/sparse_probing/probe_training.py, which fits each class and k with scikit-learn's lbfgs.
This module fits all tasks of a dataset at once by Newton's method, on features that are read once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from posmask.errors import DegenerateResult
from posmask.probing.pooling import PooledTexts

__all__ = [
    "OnFit",
    "ProbeTask",
    "Ranking",
    "all_feature_correct",
    "chosen_features",
    "k_sparse_correct",
    "logistic_regression",
]

_MOST_NEWTON_STEPS = 100
_MOST_HALVINGS = 30
_GRADIENT_TOLERANCE = 1e-6


@dataclass(frozen=True)
class ProbeTask:
    """A binary classification task: indices of its training and test texts, and which of them are positives."""

    train: Int[Tensor, " train_text"]
    train_label: Bool[Tensor, " train_text"]
    test: Int[Tensor, " test_text"]
    test_label: Bool[Tensor, " test_text"]


OnFit = Callable[[int, Int[Tensor, "task k"], Float[Tensor, "task k"]], None]
"""Called with fitted probes: k, the features that each chose in the order of choice, and their weights."""


Ranking = Literal["difference", "t"]
"""How features are ranked: by the difference of class means, as in SAEBench, or by Welch's t statistic."""


def chosen_features(
    features: PooledTexts, tasks: Sequence[ProbeTask], n_chosen: int, ranking: Ranking = "difference"
) -> Int[Tensor, "task chosen"]:
    """For each task the features of largest |difference of class means| or |t| on the training texts, largest first."""
    weight = torch.zeros(2, features.n_texts, len(tasks), dtype=torch.float64)
    n = torch.zeros(2, len(tasks), 1, dtype=torch.float64, device=features.device)
    for number, task in enumerate(tasks):
        for side, texts in enumerate((task.train[task.train_label], task.train[~task.train_label])):
            weight[side, texts, number], n[side, number] = 1 / len(texts), len(texts)
    score = features.weighted_sums(weight[0] - weight[1]).abs()
    if ranking == "t":
        both = torch.cat([*weight], 1)
        mean, of_squares = features.weighted_sums(both), features.weighted_sums(both, of_squares=True)
        variance = (of_squares - mean.square()).clamp(min=0).view(2, len(tasks), -1) / (n - 1).clamp(min=1)
        # A feature without variance in both classes either separates them or is constant.
        score = score / variance.sum(0).sqrt().clamp(min=1e-12)
    return torch.sort(score, dim=1, descending=True, stable=True).indices[:, :n_chosen]


def k_sparse_correct(
    features: PooledTexts,
    tasks: Sequence[ProbeTask],
    ks: Sequence[int],
    on_fit: OnFit = lambda *fit: None,
    ranking: Ranking = "difference",
) -> dict[int, list[Bool[Tensor, " test_text"]]]:
    """Fit k-sparse probes and report which test texts they classify correctly, by k and task.

    Args:
        features: one row per text.
        tasks: their probes are fitted together.
        ks: numbers of features.
        on_fit: called once per k, in ascending order.

    Raises:
        DegenerateResult: the chosen features are constant over a task's training texts.
    """
    chosen = chosen_features(features, tasks, max(ks), ranking)
    used, column = chosen.unique(return_inverse=True)
    columns = features.columns(used)
    n_train = max(len(task.train) for task in tasks)
    zeros = partial(torch.zeros, dtype=torch.float64, device=features.device)
    inputs = zeros(len(tasks), n_train, chosen.shape[1])
    target = zeros(len(tasks), n_train)  # +1, -1, or 0 for rows of padding
    for number, task in enumerate(tasks):
        rows = columns[task.train][:, column[number]]
        if bool((rows == rows[0]).all()):
            raise DegenerateResult(
                f"all {features.n_features:,} pooled features are constant over {len(rows):,} training texts, so "
                "every probe would be at chance: check that the SAE is trained and its latents are open on these texts"
            )
        inputs[number, : len(rows)] = rows.double()
        target[number, : len(rows)] = task.train_label.to(target) * 2 - 1
    correct: dict[int, list[Tensor]] = {}
    start = zeros(len(tasks), 0), zeros(len(tasks))
    for k in sorted(set(ks)):
        weight, intercept = start = logistic_regression(inputs[..., :k], target, start)
        on_fit(k, chosen[:, :k], weight)
        correct[k] = [
            (columns[task.test][:, column[number, :k]].double() @ weight[number] + intercept[number] > 0).cpu()
            == task.test_label
            for number, task in enumerate(tasks)
        ]
    return {k: correct[k] for k in ks}


def logistic_regression(
    inputs: Float[Tensor, "task text feature"],
    target: Float[Tensor, "task text"],
    start: tuple[Float[Tensor, "task known"], Float[Tensor, " task"]] | None = None,
) -> tuple[Float[Tensor, "task feature"], Float[Tensor, " task"]]:
    """Fit L2 logistic regressions (C = 1) of all tasks at once by damped Newton steps.

    Args:
        target: +1 or -1; texts with target 0 are ignored.
        start: weights and intercepts of the solution on the first features, to start from.

    Returns:
        Weights and intercepts.
    """
    counts = target.abs()
    design = F.pad(inputs, (0, 1), value=1.0) * counts[..., None]
    rough = design.float()  # enough for the curvature; the float64 gradient determines the solution
    penalty = design.new_ones(design.shape[2])
    penalty[-1] = 0  # the intercept is free
    solution = design.new_zeros(len(design), design.shape[2])
    if start is not None:
        solution[:, : start[0].shape[1]], solution[:, -1] = start

    def loss(margin: Tensor, solution: Tensor) -> Tensor:
        return (F.softplus(-target * margin) * counts).sum(1) + (penalty * solution.square()).sum(1) / 2

    margin = (design @ solution[..., None])[..., 0]
    objective = loss(margin, solution)
    for _ in range(_MOST_NEWTON_STEPS):
        probability = torch.sigmoid(margin)
        error = (probability - (target > 0).double()) * counts
        gradient = (error[:, None] @ design)[:, 0] + penalty * solution
        if float(gradient.abs().max()) < _GRADIENT_TOLERANCE * design.shape[1]:
            break
        weight = (probability * (1 - probability)).float()
        curvature = (rough.transpose(1, 2) @ (rough * weight[..., None])).double()
        # The ridge on the intercept keeps the system solvable if all texts are separated with certainty.
        step = torch.linalg.solve(curvature + torch.diag(penalty + 1e-9), gradient)
        along = (design @ step[..., None])[..., 0]
        size, proposed = torch.ones_like(objective), objective + 1
        for _ in range(_MOST_HALVINGS):
            proposed = loss(margin - size[:, None] * along, solution - size[:, None] * step)
            if not bool((proposed > objective).any()):
                break
            size = torch.where(proposed > objective, size / 2, size)
        size = torch.where(proposed <= objective, size, 0.0)
        if not bool(size.any()):
            break
        margin, solution = margin - size[:, None] * along, solution - size[:, None] * step
        objective = torch.minimum(proposed, objective)
    return solution[:, :-1], solution[:, -1]


def all_feature_correct(
    features: PooledTexts, task: ProbeTask, random: torch.Generator, *, choose_on_test: bool = False
) -> Bool[Tensor, " test_text"]:
    """Fit a probe on all features and report which test texts it classifies correctly.

    One linear layer trained by AdamW (learning rate 0.01, batches of 250, at most 100 epochs) as in sae-bench 0.6.0.
    The result is that of the best epoch on a held-out fifth of the training texts. Training stops after 10 epochs
    without improvement, but not before 160 steps without improvement, which is 10 epochs on sae-bench's 4,000 texts.

    Args:
        features: one row per text.
        random: draws the held-out fifth, the initial weights and the batches.
        choose_on_test: as in sae-bench: train on all training texts, use the best epoch on the *test* texts (an
            optimistic number), and stop after 10 epochs without improvement, however few steps these are.
    """
    device = features.device
    train, test = features.rows(task.train), features.rows(task.test)
    label, test_label = task.train_label.float().to(device), task.test_label.to(device)
    if choose_on_test:
        chosen_on, chosen_label = test, test_label
    else:
        order = torch.randperm(len(train), generator=random).to(device)
        heldout, rest = order[: len(order) // 5], order[len(order) // 5 :]
        chosen_on, chosen_label = train[heldout], label[heldout] > 0
        train, label = train[rest], label[rest]
    # The initialization of `nn.Linear`, from the generator `random`.
    weight = torch.empty(1, features.n_features)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=random)
    bound = 1 / math.sqrt(features.n_features)
    bias = torch.empty(1).uniform_(-bound, bound, generator=random)
    weight, bias = (parameter.to(device).requires_grad_() for parameter in (weight, bias))
    optimizer = torch.optim.AdamW([weight, bias], lr=1e-2)

    def logits(rows: Tensor) -> Tensor:
        return F.linear(rows, weight, bias)[:, 0]

    best, right, since = 0.0, torch.zeros_like(test_label), 0
    patience = 10 if choose_on_test else max(10, 160 // math.ceil(len(train) / 250))
    for _ in range(100):
        for rows in torch.randperm(len(train), generator=random).to(device).split(250):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(logits(train[rows]), label[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            accuracy = float(((logits(chosen_on) > 0) == chosen_label).float().mean())
            since += 1
            if accuracy > best:
                best, right, since = accuracy, (logits(test) > 0) == test_label, 0
        if since == patience:
            break
    return right.cpu()
