"""Saving while training goes on.

A save has three parts. Each process copies its part of the state to the host (*staged*), where training does not change
it; a thread writes, syncs and hashes it; and at the next step boundary after all have *written* it is committed: the
leading process adds the manifest and renames the folder. The thread talks to no other process, so what processes say
to each other is all said by their main threads, in one order. With `in_background` off the second part is waited for,
and on a CPU nothing is copied.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideox_factory.errors import StorageError
from cogvideox_factory.metrics import say
from cogvideox_factory.torch_engine.checkpoint import Draft, Part, Word, own_parts
from cogvideox_factory.torch_engine.device import synchronize
from cogvideox_factory.torch_engine.passage import host_like
from cogvideox_factory.torch_engine.ranks import Ranks


class Saver:
    """Saves the state of a run; all processes call its methods at the same points.

    Args:
        run: the run folder.
        keep: complete checkpoints that stay.
        device: where the state is.
        in_background: write while training goes on.
        wait_seconds: how long a write may take before its disk counts as hanging.
    """

    def __init__(
        self, run: Path, *, keep: int, ranks: Ranks, device: torch.device, in_background: bool, wait_seconds: float
    ) -> None:
        self.run = run
        self.on_saved: Callable[[float], None] = lambda seconds: None
        """Told how many seconds each checkpoint took in all."""
        self._keep, self._ranks, self._device = keep, ranks, device
        self._in_background, self._wait_seconds = in_background, wait_seconds
        self._hand: _Save | None = None
        self._buffers: dict[str, Tensor] = {}

    @property
    def is_busy(self) -> bool:
        """Whether a save is in hand that is not committed."""
        return self._hand is not None

    @property
    def word(self) -> Word | None:
        """What this process has to tell the others (`hear`) of the save in hand; None while it is written."""
        return self._hand.draft.word if self._hand else None

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, must: bool) -> None:
        """Save the state after update number `step`, once the save in hand is committed.

        A full disk is survived, because the older checkpoints are still there, unless this one `must` be; that one is
        waited for as well.

        Raises:
            StorageError: it must be saved and could not be, or a disk hangs.
        """
        self.settle()
        with self._surviving(step, must=must):
            began = time.monotonic()
            draft = Draft(self.run, step, tensors, state, ranks=self._ranks)
            self._hand = _Save(draft, began)
            parts = own_parts(tensors, self._ranks)
            if self._in_background or self._device.type != "cpu":
                parts = self._stage(parts)
            self._hand.start(parts, in_background=self._in_background)
            self._hand.stall = time.monotonic() - began
        if must or not self._in_background:
            self.settle(must=must)

    def hear(self, words: Sequence[Word | None], *, must: bool = False) -> None:
        """Commit the save in hand if all processes (`words` in their order) have written their parts.

        Raises:
            StorageError: one could not, and it `must` be saved; otherwise that is said.
        """
        written = [word for word in words if word is not None]
        if self._hand is None or len(written) < len(words):
            return
        hand, self._hand = self._hand, None
        with self._surviving(hand.draft.step, must=must):
            began = time.monotonic()
            folder = hand.draft.commit(written, keep=self._keep)
            now = time.monotonic()
            stall, total = hand.stall + now - began, now - hand.began
            behind = f", {stall:.3g} s of them in training's way" if self._in_background else ""
            say(f"step {hand.draft.step}: {folder} saved in {total:.3g} s{behind}")
            self.on_saved(total)

    def settle(self, *, must: bool = False) -> None:
        """Wait for the save in hand, if there is one, and commit it.

        Raises:
            StorageError: as `hear`; or it was not written in time, which is no disk to go on with.
        """
        hand = self._hand
        if hand is None:
            return
        began = time.monotonic()
        hand.wait(self._wait_seconds)
        hand.stall += time.monotonic() - began
        words = self._ranks.gather(hand.draft.word)
        late = [rank for rank, word in enumerate(words) if word is None]
        if late:
            problem = Word(problem=(
                f"process {late[0]} still writes {hand.draft.target} after {self._wait_seconds:g} s; its disk hangs. "
                "Choose another --train.dir, or a longer --parallel.timeout-seconds."
            ))  # fmt: skip
            words = [word or problem for word in words]
        self.hear(words, must=must or bool(late))

    def close(self) -> None:
        """Give up what is in hand, without a word to the others."""
        if self._hand:
            self._hand.draft.abandon()
            self._hand = None

    def _stage(self, parts: Mapping[str, Part]) -> dict[str, Part]:
        """Copy `parts` to the host, but for what can be written from where it is.

        A run that saves in the background keeps the memory for its next save.
        """
        staged: dict[str, Part] = {}
        for name, part in parts.items():
            if part.tensor.device.type == "cpu" and not self._in_background:
                staged[name] = part  # an offloaded optimizer's, which nobody changes meanwhile
                continue
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != part.tensor.shape or buffer.dtype != part.tensor.dtype:
                buffer = host_like(part.tensor)
                if self._in_background:
                    self._buffers[name] = buffer
            buffer.copy_(part.tensor, non_blocking=True)
            staged[name] = Part(tensor=buffer, start=part.start)
        synchronize(self._device)
        return staged

    @contextmanager
    def _surviving(self, step: int, *, must: bool) -> Iterator[None]:
        try:
            yield
        except StorageError as error:
            if must:
                raise
            say(f"NOT SAVED at step {step}, trying again at the next: {error}")


class _Save:
    """A save that is written or waits to be committed."""

    def __init__(self, draft: Draft, began: float) -> None:
        self.draft = draft
        self.began = began
        self.stall = 0.0
        """Seconds that training stood still for it."""
        self._thread: threading.Thread | None = None

    def start(self, parts: Mapping[str, Part], *, in_background: bool) -> None:
        if not in_background:
            self.draft.write(parts)
            return
        # A daemon: a run that is told to leave at once does not wait for it.
        self._thread = threading.Thread(target=self.draft.write, args=(parts,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        if self._thread:
            self._thread.join(seconds)
