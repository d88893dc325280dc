"""Learning rate as a pure function of the step, so that resuming needs no scheduler state."""

import math

SCHEDULES = ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial")


def learning_rate(
    step: int,
    *,
    peak: float,
    schedule: str,
    num_steps: int,
    warmup_steps: int = 0,
    num_cycles: int = 1,
    power: float = 1.0,
) -> float:
    """Return the rate of update number `step`, counted from 1 to `num_steps`.

    Warm-up rises linearly and reaches `peak` at step `warmup_steps`; every falling schedule then runs over the
    remaining steps. cosine_with_restarts (SGDR, Loshchilov & Hutter 2017, arXiv 1608.03983) jumps back to `peak`
    `num_cycles - 1` times.
    """
    assert 1 <= step <= num_steps, (step, num_steps)
    if step <= warmup_steps:
        return peak * step / warmup_steps
    # From 0 at the first step after warm-up; it would be 1 at the step after the last.
    progress = (step - 1 - warmup_steps) / (num_steps - warmup_steps)
    match schedule:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - progress)
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
        case "cosine_with_restarts":
            return peak * 0.5 * (1 + math.cos(math.pi * (progress * num_cycles % 1)))
        case "polynomial":
            return peak * (1 - progress) ** power
    raise AssertionError(schedule)
