"""Where a training step's time goes: `profile_posmask.py WORK SHAPE STEPS` prints JSON, milliseconds a step by part.

Under cProfile, one thread; a part is the time inside the named functions themselves.
"""

import cProfile
import json
import pstats
import sys

sys.argv.insert(3, "1")  # steps_posmask reads the number of threads there

import steps_posmask  # noqa: E402
import steps_terms  # noqa: E402

PARTS = {
    "the encoder's product": ("torch.mm", "torch.addmm"),
    "choosing": ("largest_of_rows", "above_floor", "join_entries", "kthvalue", "dot_rows", "bfloat16"),
    "reconstruction, residual, gradients of codes": ("explain",),
    "gradients of encoder and decoder": ("sum_rows", "count_sort"),
    "Adam": ("_fused_adam_",),
    "clipping": ("_foreach_norm", "_foreach_mul_"),
    "taking off center and bias, unit decoder rows": ("centered", "normalize_rows"),
}


def main(work: str, shape: str, n_steps: int) -> None:
    d_model, _ = steps_terms.sizes(shape)
    profile = cProfile.Profile()

    def some_steps():
        vectors = steps_terms.make_batches(d_model, steps_terms.BATCH_TOKENS)
        for number in range(n_steps + 5):
            if number == 5:
                profile.enable()
            yield vectors[number % len(vectors)]
        profile.disable()

    steps_posmask.on_demand = lambda *given: some_steps()
    plain = steps_posmask.TrainingSettings
    steps_posmask.TrainingSettings = lambda **given: plain(**{**given, "n_steps": n_steps + 5})
    steps_posmask.main(work, shape, 1)
    times = dict.fromkeys(PARTS, 0.0)
    total = 0.0
    for (_, _, name), (_, _, own, _, _) in pstats.Stats(profile).stats.items():
        total += own
        for part, names in PARTS.items():
            if any(one in name for one in names):
                times[part] += own
                break
    times["everything else"] = total - sum(times.values())
    print(json.dumps({part: round(1000 * time / n_steps, 2) for part, time in times.items()}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[4]))
