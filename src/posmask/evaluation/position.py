"""Dependence of firing on position: mutual information against a permutation null, and the shift design."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from posmask.data.activations import Batch
from posmask.errors import DegenerateResult
from posmask.evaluation.means import MeanOverLatents
from posmask.evaluation.retention import N_FOLDS, PositionMass, raise_if_none
from posmask.kernels import operations
from posmask.results.rows import Measure
from posmask.sae.autoencoder import Codes
from posmask.seeds import generator

__all__ = [
    "COMPONENTS",
    "N_NULL_DRAWS",
    "InformationMeasures",
    "PositionInformation",
    "ShiftDesign",
    "ShiftMeasures",
    "binary_entropy",
]

N_NULL_DRAWS = 19  # Under the null, the probability of exceeding all of them is 1/20.
MIN_SHIFT_FIRINGS = 20
COMPONENTS = ("position", "content", "interaction")


class PositionInformation:
    """Accumulates firings by position, unchanged and with each text's tokens rotated through the context.

    information(j) = I(latent j fires; position) / H(latent j fires), in [0, 1]: the share of the uncertainty about
    firing that position explains. Finite samples raise it above 0 for every latent, more so if firings come in runs.
    Rotating the positions of each text by a random amount preserves both effects; 19 such rotations are the null.

    `position_information` = mean over latents of (information - its mean over the null draws);
    `position_information_null` = that mean; `position_bound_share` = the share of latents whose information is above
    all of their 19 null draws: 0.05 by chance. Only latents with 20 firings in each half of the texts count.

    Args:
        n_positions: positions per context.
        d_sae: number of latents.
        n_texts: number of texts.
        kept_positions: the positions that have kept tokens, ascending; tokens rotate among them.
        device: of the batches and codes.
    """

    def __init__(
        self,
        n_positions: int,
        d_sae: int,
        n_texts: int,
        kept_positions: Int[Tensor, " position"],
        device: torch.device | None = None,
    ) -> None:
        self._kept_positions = kept_positions.to(device)
        self._null = torch.zeros(N_NULL_DRAWS, n_positions, d_sae, device=device)
        self._null_tokens = torch.zeros(N_NULL_DRAWS, n_positions, device=device)
        self._rotation: Int[Tensor, "draw text"] = torch.randint(
            len(kept_positions), (N_NULL_DRAWS, n_texts), generator=generator(0, "rotations")
        ).to(device)

    def update(self, batch: Batch, codes: Codes) -> None:
        """Add kept tokens (`batch.kept()`) and their codes."""
        kept = self._kept_positions
        place = torch.searchsorted(kept, batch.position.long())
        for draw in range(N_NULL_DRAWS):
            rotation = self._rotation[draw, batch.text.long()]
            position = kept[(place + rotation) % len(kept)]
            operations.count_at_(self._null_tokens[draw], position)
            operations.count_at_(self._null[draw].view(-1), position[codes.token] * codes.d_sae + codes.latent)

    def by_latent(self, used: PositionMass) -> Float[Tensor, " latent"]:
        """Each latent's information minus the mean of its null; NaN if it has too few firings or always fires.

        Args:
            used: accumulated from the same codes.
        """
        counted, real, null = self._split(used)
        information = real.new_full((len(counted),), torch.nan)
        information[counted] = real - null.mean(0)
        return information

    def with_null(
        self, used: PositionMass, bin_of_position: Int[Tensor, " position"]
    ) -> tuple[Float[Tensor, " latent"], Float[Tensor, "draw latent"]]:
        """Information about the bin of positions of every latent, and that in each null draw; NaN where undefined.

        Args:
            used: accumulated from the same codes.
            bin_of_position: the bin of each position.
        """
        real, *null = (
            _information(_binned(firings, bin_of_position), _binned(tokens, bin_of_position))
            for firings, tokens in (
                (used.firings.sum(0), used.tokens.sum(0)),
                *zip(self._null, self._null_tokens, strict=True),
            )
        )
        return real, torch.stack(null)

    def null_rate(self, bin_of_position: Int[Tensor, " position"]) -> Float[Tensor, "bin latent"]:
        """The share of each bin's tokens at which latents fire in the first null draw."""
        firings, tokens = (_binned(counts[0], bin_of_position) for counts in (self._null, self._null_tokens))
        return firings / tokens.clamp(min=1)[:, None]

    def without_fold(self, used: PositionMass, fold: int) -> Float[Tensor, " latent"]:
        """The information of every latent about position without one fold of texts; NaN where undefined.

        Args:
            used: accumulated from the same codes.
        """
        firings, tokens = (counts.sum(0) - counts[fold] for counts in (used.firings, used.tokens))
        return _information(firings, tokens)

    def _split(
        self, used: PositionMass
    ) -> tuple[Bool[Tensor, " latent"], Float[Tensor, " counted"], Float[Tensor, "draw counted"]]:
        n_fired, n_tokens = used.firings.sum((0, 1)), used.tokens.sum()
        counted = used.counted() & (n_fired < n_tokens)  # A latent that always fires has entropy 0.
        null = torch.stack(
            [
                _information(firings[:, counted], tokens)
                for firings, tokens in zip(self._null, self._null_tokens, strict=True)
            ]
        )
        return counted, _information(used.firings[..., counted].sum(0), used.tokens.sum(0)), null

    def measures(self, used: PositionMass) -> list[Measure]:
        """`position_information`, `position_information_null` and `position_bound_share` of these latents.

        Args:
            used: accumulated from the same codes.

        Raises:
            DegenerateResult: no latent fires often enough.
        """
        of_all = InformationMeasures()
        of_all.add(self, used)
        return of_all.measures()

    def corrected(
        self, used: PositionMass
    ) -> tuple[
        Float[Tensor, " counted"],
        Float[Tensor, "fold counted"],
        Float[Tensor, " counted"],
        Bool[Tensor, " counted"],
    ]:
        """Of each latent with enough firings: information minus the mean of its null, and the same without each fold.

        Args:
            used: accumulated from the same codes.

        Returns:
            These two, the mean of the null, and whether the information is above all null draws.
        """
        counted, real, null = self._split(used)
        by_fold, by_fold_tokens = used.firings[..., counted], used.tokens
        firings, tokens, expected = by_fold.sum(0), by_fold_tokens.sum(0), null.mean(0)
        without = []
        for fold in (by_fold_tokens.sum(1) > 0).nonzero()[:, 0].tolist():
            remaining = tokens - by_fold_tokens[fold]
            scaled_null = expected * float(tokens.sum() / remaining.sum())  # The null's mean falls as 1 / tokens.
            without.append(_information(firings - by_fold[fold], remaining) - scaled_null)
        return real - expected, torch.stack(without), expected, real > null.amax(0)


class InformationMeasures:
    """The measures of `PositionInformation`, from blocks of latents."""

    def __init__(self) -> None:
        self._means = {name: MeanOverLatents() for name in ("information", "null", "bound")}
        self._n = self._n_frequent = 0
        self._used: PositionMass | None = None

    def add(self, information: PositionInformation, used: PositionMass) -> None:
        """Add the latents of a block.

        Args:
            used: accumulated from the same codes.
        """
        corrected, without, null, is_bound = information.corrected(used)
        self._used = used
        self._n_frequent += int(used.counted().sum())
        self._n += len(corrected)
        self._means["information"].add(corrected, without)
        self._means["null"].add(null)
        self._means["bound"].add(is_bound.double())

    def measures(self) -> list[Measure]:
        """`position_information`, `position_information_null` and `position_bound_share`.

        Raises:
            DegenerateResult: no latent fires often enough.
        """
        raise_if_none(self._n_frequent, self._used)
        if self._n == 0:
            raise DegenerateResult(
                "every latent that fires often enough fires at every token, so firing tells nothing about position"
            )
        information, n = self._means["information"], self._n
        return [
            Measure("position_information", information.value, *information.interval(), n),
            Measure("position_information_null", self._means["null"].value, n=n),
            Measure("position_bound_share", self._means["bound"].value, n=n),
        ]


def _binned(counts: Float[Tensor, "position ..."], bin_of_position: Int[Tensor, " position"]) -> Tensor:
    n_bins = int(bin_of_position.max()) + 1
    return counts.new_zeros(n_bins, *counts.shape[1:]).index_add_(0, bin_of_position, counts)


def _information(
    firings: Float[Tensor, "position latent"], tokens: Float[Tensor, " position"]
) -> Float[Tensor, " latent"]:
    seen = tokens > 0
    share = (tokens[seen] / tokens.sum()).double()
    rate = (firings[seen] / tokens[seen, None]).double()
    overall = binary_entropy((firings.sum(0) / tokens.sum()).double())
    return (overall - share @ binary_entropy(rate)) / overall


def binary_entropy(p: Float[Tensor, "*latent"]) -> Float[Tensor, "*latent"]:
    """The entropy in nats of events of probability p."""
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))


class ShiftDesign:
    """Splits each latent's variance into position, content and their interaction, on texts seen in several windows.

    Every token (content) of `n_texts` pieces of `length` tokens was seen once in each of `n_windows` windows of the
    context (`tokens.shifted`). For activation a[c, w] of a latent on content c in window w, the two-way random
    effects a = mean + position[w] + content[c] + interaction[c, w] have the variance components

        interaction = MS_interaction              content = (MS_content - MS_interaction) / n_windows
        position = (MS_window - MS_text_by_window) / n_contents

    (Searle, Casella and McCulloch 1992, section 4.3), with the mean squares of two-way analysis of variance without
    repetition. The tokens of a piece share the text before it, so windows are compared with the interaction of whole
    texts with windows, not of single tokens. Estimates are unbiased, so a component that is 0 may be estimated slightly
    below 0. `shift_position`, `shift_content` and `shift_interaction` are the shares of the components, averaged over
    latents that fire at least 20 times; they sum to 1. A latent that depends on content alone has shares (0, 1, 0). A
    latent that is open in one window only has nearly all its variance in the interaction, whatever it responds to, so
    a mask does not raise `shift_position` by construction.

    Content whose token is an attention sink in any window counts as content at which no latent fires.

    Args:
        n_texts: number of texts.
        length: tokens per text.
        n_windows: windows that each text was seen in.
        d_sae: number of latents.
        device: of the batches and codes.
    """

    def __init__(
        self, n_texts: int, length: int, n_windows: int, d_sae: int, device: torch.device | None = None
    ) -> None:
        self._length = length
        self._content = torch.zeros(n_texts * length, d_sae, device=device)
        self._window = torch.zeros(n_texts, n_windows, d_sae, device=device)
        self._squares = torch.zeros(n_texts, d_sae, device=device)
        self._firings = torch.zeros(d_sae, device=device)
        self._tokens = torch.zeros(n_texts, n_windows, device=device)

    def update(self, batch: Batch, codes: Codes) -> None:
        """Add kept tokens (`batch.kept()`) and their codes."""
        text, offset = batch.text.long(), batch.position.long() - 1
        window = text * self._tokens.shape[1] + offset // self._length - 1
        content = text * self._length + offset % self._length
        value = codes.value

        def add(table: Tensor, row: Tensor, values: Tensor) -> None:
            operations.add_at_(table.view(-1), row[codes.token] * codes.d_sae + codes.latent, values)

        add(self._content, content, value)
        add(self._window, window, value)
        add(self._squares, text, value.square())
        operations.count_at_(self._firings, codes.latent)
        operations.count_at_(self._tokens.view(-1), window)

    def measures(self, mask: str) -> list[Measure]:
        """`shift_position`, `shift_content` and `shift_interaction` of these latents.

        Args:
            mask: `on` or `lifted`, reported in the slice.

        Raises:
            DegenerateResult: no latent fires often enough.
        """
        of_all = ShiftMeasures()
        of_all.add(self)
        return of_all.measures(mask)

    @property
    def n_tokens(self) -> int:
        """Tokens of the texts, each counted once."""
        return len(self._content)

    @property
    def firings(self) -> Float[Tensor, " latent"]:
        """Firings of each latent in all windows."""
        return self._firings

    def by_latent(self) -> tuple[Float[Tensor, "component latent"], Float[Tensor, "fold component latent"]]:
        """Shares of position, content and interaction of each latent, and the same without each fold of texts.

        NaN for latents that fire fewer than 20 times.
        """
        counted = self._counted()
        parts = []
        for part in self._shares_and_without(counted):
            parts.append(part.new_full((*part.shape[:-1], len(counted)), torch.nan))
            parts[-1][..., counted] = part
        return parts[0], parts[1]

    def with_null(self, n_draws: int) -> tuple[Float[Tensor, " latent"], Float[Tensor, "draw latent"]]:
        """The variance between windows relative to that between windows of a text, and that with windows permuted.

        The statistic is MS_window / MS_text_by_window. In each null draw the windows of each text are in random order.
        If a latent depends on content alone, all orders have the same probability. NaN for latents that never fire.
        """
        n_texts, n_windows = self._tokens.shape
        sums = self._window.double()
        of_texts = sums.sum(1)
        grand = of_texts.sum(0).square() / (n_texts * n_windows)
        within_texts = sums.square().sum((0, 1)) - of_texts.square().sum(0) / n_windows
        random = generator(0, "windows")

        def statistic(windows: Float[Tensor, "window latent"]) -> Float[Tensor, " latent"]:
            between = windows.square().sum(0) / n_texts - grand
            return between / (n_windows - 1) / ((within_texts - between) / ((n_texts - 1) * (n_windows - 1)))

        text, null = torch.arange(n_texts)[:, None], []
        for _ in range(n_draws):
            order = torch.rand(n_texts, n_windows, generator=random).argsort(1).to(sums.device)
            null.append(statistic(sums[text, order].sum(0)))
        return statistic(sums.sum(0)), torch.stack(null)

    def _counted(self) -> Bool[Tensor, " latent"]:
        """The latents that fire at least 20 times."""
        assert bool((self._tokens == self._tokens[:, :1]).all()), "some content was not seen in every window"
        return self._firings >= MIN_SHIFT_FIRINGS

    def _shares_and_without(
        self, counted: Bool[Tensor, " latent"]
    ) -> tuple[Float[Tensor, "component counted"], Float[Tensor, "fold component counted"]]:
        """Shares of the variance components of some latents, and the same without each fold of texts."""
        n_texts, n_windows = self._tokens.shape
        by_text = [
            self._content[:, counted].double().square().unflatten(0, (n_texts, -1)).sum(1),
            self._squares[:, counted].double(),
        ]
        window = self._window[..., counted].double()

        def shares(texts: Tensor) -> Tensor:
            content, squares = (part[texts].sum(0) for part in by_text)
            sums = window[texts]
            n = len(texts) * self._length
            grand = sums.sum((0, 1)).square() / (n * n_windows)
            between_windows = sums.sum(0).square().sum(0) / n - grand
            between_texts = sums.sum(1).square().sum(0) / (self._length * n_windows) - grand
            between_contents = content / n_windows - grand
            text_by_window = sums.square().sum((0, 1)) / self._length - grand - between_windows - between_texts
            rest = squares - grand - between_windows - between_contents
            interaction = rest / ((n - 1) * (n_windows - 1))
            text_error = text_by_window / ((len(texts) - 1) * (n_windows - 1))
            content_part = (between_contents / (n - 1) - interaction) / n_windows
            position_part = (between_windows / (n_windows - 1) - text_error) / n
            split = torch.stack([position_part, content_part, interaction])
            return split / split.sum(0)

        every = torch.arange(n_texts)
        n_folds = min(N_FOLDS, n_texts)
        return shares(every), torch.stack([shares(every[every % n_folds != fold]) for fold in range(n_folds)])


class ShiftMeasures:
    """The measures of `ShiftDesign`, from blocks of latents."""

    def __init__(self) -> None:
        self._means = {name: MeanOverLatents() for name in COMPONENTS}
        self._n = self._n_tokens = 0

    def add(self, design: ShiftDesign) -> None:
        """Add the latents of a block."""
        shares, without = design.by_latent()
        self._n_tokens = design.n_tokens
        self._n += int((design.firings >= MIN_SHIFT_FIRINGS).sum())
        for number, name in enumerate(COMPONENTS):
            self._means[name].add(shares[number], without[:, number])

    def measures(self, mask: str) -> list[Measure]:
        """`shift_position`, `shift_content` and `shift_interaction`.

        Args:
            mask: `on` or `lifted`, reported in the slice.

        Raises:
            DegenerateResult: no latent fires often enough.
        """
        if self._n == 0:
            raise DegenerateResult(
                f"no latent fires {MIN_SHIFT_FIRINGS} times on the {self._n_tokens:,} tokens of the shift design: "
                "raise shift_texts"
            )
        where = {"mask": mask}
        return [
            Measure(f"shift_{name}", mean.value, *mean.interval(), self._n, where) for name, mean in self._means.items()
        ]
