"""Out of memory, told once: how much there was, what was in hand, and what would help, in numbers."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cogvideox_factory.errors import ExhaustedError
from cogvideox_factory.torch_engine.device import device_name, peak_memory, total_memory

_NUM_TOLD = 4
"""Settings named, the best of all."""


@dataclass(slots=True)
class InHand:
    """What is being done, for a message; whoever does it keeps it up to date."""

    what: str


@contextmanager
def told(device: torch.device, in_hand: InHand, savings: Callable[[], list[tuple[int, str]]]) -> Iterator[None]:
    """Turn what torch raises for want of memory on `device` into an error that says what would help.

    Args:
        device: of the work.
        in_hand: what is being done.
        savings: gives (bytes saved, setting), the best first; called only then.

    Raises:
        ExhaustedError: in its place. Other errors pass.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        total, peak = total_memory(device), peak_memory(device)
        lines = [f"  {setting}: about {saved / 2**30:.2f} GiB less" for saved, setting in savings()[:_NUM_TOLD]]
        raise ExhaustedError(
            "\n".join([
                f"out of memory {in_hand.what}: {peak / 2**30:.2f} GiB were in use at most, {device_name(device)} has "
                f"{total / 2**30:.2f} GiB.",
                *(["What would help, the most first:", *lines] if lines else []),
                f"torch says: {str(error).partition(chr(10))[0]}",
            ])
        ) from error  # fmt: skip


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether `error` says that memory ran out: torch has a class for cards, the CPU's and some drivers' only words."""
    words = r"out of memory|can't allocate memory|not enough memory"
    return isinstance(error, torch.OutOfMemoryError) or re.search(words, str(error)) is not None
