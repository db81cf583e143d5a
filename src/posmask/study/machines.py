"""What a machine that is not here would take: operations over its products, bytes over its memory. GPUs by name.

A pass of the model is 2 operations a parameter and token. A training step is one product with the live latents to
choose from, all else goes through the active codes and is a matter of bytes; rules without a k multiply four times.
What share of its peak a machine reaches is an assumption. How far the formulas carry was tried on a
processor (docs/planning.md). Where figures stand: docs/scaling.md.
"""

from dataclasses import dataclass

from posmask.errors import BadSetting

__all__ = ["DISK_RATE", "GPUS", "GPUS_A_NODE", "NODE_DISK", "NODE_MEMORY", "Machine", "gpu_named"]

DISK_RATE = 1e9
"""Bytes a second from and to the disk, for each GPU of a machine that is not here."""
GPUS_A_NODE = 8
NODE_DISK = 8 * 3.84e12  # bytes, and of memory:
NODE_MEMORY = 2e12

_PASSES_OVER_ROWS = 5  # each active code's row of the dictionary, for the code, its gradient, and three sums
_PASSES_OF_ADAM = 7  # parameter, gradient and two moments read, three written
_PASSES_OVER_CHOICE = 2  # pre-activations written, and read to choose from
_BYTES = 4  # all but products is float32
_TO_GPU = 12e9  # bytes a second from the host's memory, half of what PCIe 4 x16 has


@dataclass(frozen=True)
class Machine:
    """Peak rates, and the share of them that is reached.

    Args:
        product_rates: operations a second, by precision.
        bandwidth: bytes a second of its memory.
        memory: bytes.
        model_share, product_share, bandwidth_share: of the peak, in the model's passes, an SAE's products, the rest.
        source: where the peak rates stand.
        overhead: seconds that a step takes beside its work.
        links: bytes a second that one GPU sends to others, within a machine and out of it; None where it has no link.
        link_shares: of these, that are reached.
    """

    name: str
    product_rates: dict[str, float]
    bandwidth: float
    memory: float
    source: str
    model_share: float = 0.4
    product_share: float = 0.5
    bandwidth_share: float = 0.5
    overhead: float = 5e-3
    transfer: float | None = _TO_GPU
    """Bytes a second to it from the host; None where it is the host."""
    links: tuple[float, float] | None = None
    link_shares: tuple[float, float] = (0.65, 0.9)

    def pass_seconds(self, n_parameters: int, precision: str) -> float:
        """A token through so many of a model's parameters."""
        return 2 * n_parameters / (self.product_rates[precision] * self.model_share)

    def encode_seconds(self, d_model: int, n_live: float, n_active: int, precision: str) -> float:
        """A token's codes: a product with the live latents, and their choice."""
        product = 2 * d_model * n_live / (self.product_rates[precision] * self.product_share)
        moved = _BYTES * (_PASSES_OVER_CHOICE * n_live + n_active * d_model)
        return product + moved / (self.bandwidth * self.bandwidth_share) + self._sent(_BYTES * d_model)

    def step_seconds(
        self, d_model: int, width: int, n_live: float, n_active: float | None, batch_tokens: float, precision: str
    ) -> float:
        """A training step, see `step_parts`."""
        return sum(self.step_parts(d_model, width, n_live, n_active, batch_tokens, precision).values())

    def step_parts(
        self, d_model: int, width: float, n_live: float, n_active: float | None, batch_tokens: float, precision: str
    ) -> dict[str, float]:
        """Seconds of a training step, by what they go to.

        Args:
            n_live: latents that are open at a position, in the mean.
            n_active: of the rule; None: it has no k, so that reconstruction and gradients are products too.
        """
        n_products = 4 if n_active is None else 1
        product = n_products * 2 * d_model * n_live / (self.product_rates[precision] * self.product_share)
        moved = _BYTES * (_PASSES_OVER_CHOICE * n_live + _PASSES_OVER_ROWS * (n_active or 0) * d_model)
        adam = _BYTES * _PASSES_OF_ADAM * 2 * width * d_model
        rate = self.bandwidth * self.bandwidth_share
        return {
            "products": batch_tokens * product,
            "codes": batch_tokens * moved / rate,
            "Adam": adam / rate,
            "host": batch_tokens * self._sent(_BYTES * d_model),
            "overhead": self.overhead,
        }

    def link_rate(self, n_gpus: int) -> float:
        """Bytes a second that each of so many GPUs sends, where all exchange something.

        Raises:
            BadSetting: it has no link to others whose rate is known.
        """
        if self.links is None:
            raise BadSetting(f"the {self.name} has no link to others whose rate is known: take a100 or h100")
        far = n_gpus > GPUS_A_NODE
        return self.links[far] * self.link_shares[far]

    def _sent(self, n_bytes: float) -> float:
        return n_bytes / self.transfer if self.transfer else 0.0

    def sentence(self) -> str:
        """What is assumed of it."""
        peak = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in self.product_rates.items())
        return (
            f"{self.name}: {peak}, {self.bandwidth / 1e9:,.0f} GB/s ({self.source}), of which {self.model_share:.0%} "
            f"reached in the model, {self.product_share:.0%} in an SAE's products and {self.bandwidth_share:.0%} of "
            "the memory's rate: assumed, not measured."
        )


GPUS = {
    # Dense products with float32 sums. Float32 is what posmask's own products take: no TF32.
    # A link's rate is that of one direction, half of what a datasheet calls NVLink's.
    "a100": Machine(
        "A100 80 GB SXM",
        {"bfloat16": 312e12, "float32": 19.5e12},
        2039e9,
        80e9,
        "NVIDIA A100 datasheet, 2022",
        links=(300e9, 25e9),
    ),
    "h100": Machine(
        "H100 SXM",
        {"bfloat16": 989e12, "float32": 67e12},
        3350e9,
        80e9,
        "NVIDIA H100 datasheet, without sparsity",
        links=(450e9, 50e9),
    ),
    "l4": Machine("L4", {"bfloat16": 121e12, "float32": 30.3e12}, 300e9, 24e9, "NVIDIA L4 datasheet, without sparsity"),
    "rtx4090": Machine(
        "RTX 4090", {"bfloat16": 165.2e12, "float32": 82.6e12}, 1008e9, 24e9, "NVIDIA Ada whitepaper, without sparsity"
    ),
}


def gpu_named(name: str) -> Machine:
    """
    Raises:
        BadSetting: its rates are not known here.
    """
    if name not in GPUS:
        raise BadSetting(f"GPU {name!r} is not among those whose rates are known: choose from {', '.join(GPUS)}")
    return GPUS[name]
