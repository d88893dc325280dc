"""Decoding in a process apart: a decoder that crashes, hangs or takes all memory costs its clip, and nothing else.

For files that nobody has decoded before: the first look of `prepare` and `doctor`, and what is encoded. A process is
started when one is needed and none is soon free, so threads that ask for long at once have one each; it serves the
next question, and leaves when it had none for a minute. A question and its answer are a line of JSON each, pixels
follow as they are.
"""

import atexit
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cogvideox_factory.data.clip import Clip
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.data.video_info import DEFAULT_LIMITS, Limits, VideoInfo
from cogvideox_factory.metrics import say

PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from cogvideox_factory.data.decoder import main; main()"
)
"""What a process runs: `decoder`, found where this process finds its modules."""


_PIPE = 1 << 20
"""Bytes, most that Linux lets anyone have."""


_PATIENCE_SECONDS = 0.5
"""Waited for a process that is at work before another is started, which takes about as long."""


class Pixels(NamedTuple):
    """What was decoded."""

    pixels: np.ndarray
    """uint8 [F, H, W, 3], RGB."""
    crop: dict[str, int]
    """Where they were cut from (`Fit.to_json`)."""


def probe_clip(path: Path, *, limits: Limits = DEFAULT_LIMITS) -> VideoInfo:
    """Describe a video or a picture, as `video.probe_clip`.

    Raises:
        ClipError: as there, or `video.decoder_crash`.
    """
    return _info(path, _ask(path, "probe", limits=asdict(limits))[0])


def probe_picture(path: Path) -> VideoInfo:
    """Describe a picture, as `image.probe_picture`.

    Raises:
        ClipError: as there, or `video.decoder_crash`.
    """
    return _info(path, _ask(path, "picture")[0])


def _info(path: Path, said: dict[str, Any]) -> VideoInfo:
    pts = tuple(said["pts"]) if said["pts"] is not None else None
    return VideoInfo(**said | {"path": path, "times": np.array(said["times"], np.float64), "pts": pts})


def find_cuts(path: Path, *, limits: Limits = DEFAULT_LIMITS) -> tuple[int, ...]:
    """Return the frames that begin a new scene, as `scenes.find_cuts`.

    Raises:
        ClipError: as there, or `video.decoder_crash`.
    """
    return tuple(_ask(path, "cuts", limits=asdict(limits))[0]["cuts"])


def read_clip(
    path: Path,
    spec: ClipSpec,
    *,
    draw: tuple[int, str, str] | None = None,
    stamp: tuple[int, int] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Pixels:
    """Decode the frames that `spec` asks for, as `video.read_clip`; `draw` is the key of a random crop's generator.

    Raises:
        ClipError: as there, or `video.decoder_crash`.
    """
    said, pixels = _ask(path, "read", limits=asdict(limits), spec=asdict(spec), draw=draw, stamp=stamp)
    assert pixels is not None
    return Pixels(pixels, said["crop"])


def read_condition(clip: Clip, *, draw: tuple[int, str, str]) -> np.ndarray:
    """Return the own image of a surveyed clip, as `condition.read_condition`; `draw` as for `read_clip`.

    Raises:
        ClipError: as there, or `video.decoder_crash`.
    """
    assert clip.image_path is not None, f"{clip.name} has no image of its own"
    assert clip.spec is not None, f"{clip.name} has not been surveyed"
    spec, name = asdict(clip.spec), clip.image_name
    pixels = _ask(clip.image_path, "condition", name=name, spec=spec, draw=draw, stamp=clip.image_stamp)[1]
    assert pixels is not None
    return pixels


class _NoProcessError(Exception):
    """None can be started."""


class _Decoder:
    """A process that decodes, and answers one question at a time."""

    def __init__(self) -> None:
        self.is_good = False
        """Whether it waits for a question."""
        command = [sys.executable, "-P", "-c", PROGRAM, json.dumps(sys.path)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"}
            )
        except OSError as error:
            raise _NoProcessError(str(error)) from error
        assert self._process.stdout is not None
        if hasattr(fcntl, "F_SETPIPE_SZ"):  # pixels come in fewer turns
            with suppress(PermissionError):  # a user may hold only so many
                fcntl.fcntl(self._process.stdout, fcntl.F_SETPIPE_SZ, _PIPE)

    def ask(self, line: bytes) -> tuple[dict[str, Any], np.ndarray | None] | None:
        """Return an answer and its pixels, or None when the process has ended."""
        questions, answers = self._process.stdin, self._process.stdout
        assert questions is not None
        assert isinstance(answers, BufferedReader)
        self.is_good = False  # until the whole answer is there: it might be left in the middle of it
        try:
            questions.write(line)
            questions.flush()
        except BrokenPipeError:
            return None
        answer = answers.readline()
        if not answer.endswith(b"\n"):
            return None
        said, pixels = json.loads(answer), None
        if "shape" in said:
            pixels = np.empty(said["shape"], np.uint8)
            if answers.readinto(pixels.data) != pixels.nbytes:
                return None
        self.is_good = True
        return said, pixels

    def is_there(self) -> bool:
        """Tell whether the process has not ended."""
        return self._process.poll() is None

    def end(self) -> int:
        """Return the exit code of a process that has ended, or ends now that nobody will ask."""
        with self._process as process:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
            return process.wait()


class _Pool:
    """The processes there are, each with one thread at a time."""

    def __init__(self) -> None:
        self.idle: list[_Decoder] = []
        self._num_busy = 0
        self._changed = threading.Condition()

    @contextmanager
    def one(self) -> Iterator[tuple[_Decoder, bool]]:
        """Lend a process, and tell whether it has just been started; while others are at work, wait a little first."""
        with self._changed:
            self._changed.wait_for(lambda: self.idle or not self._num_busy, _PATIENCE_SECONDS)
            while self.idle and not self.idle[-1].is_there():
                self.idle.pop().end()
            known = self.idle.pop() if self.idle else None
            self._num_busy += 1
        decoder = None
        try:
            decoder = known or _Decoder()
            yield decoder, known is None
        finally:
            with self._changed:
                self._num_busy -= 1
                if decoder and decoder.is_good:
                    self.idle.append(decoder)
                self._changed.notify()

    def end(self) -> None:
        """End those that are idle."""
        while self.idle:
            self.idle.pop().end()


_pool = _Pool()


def _ask(path: Path, what: str, **more: Any) -> tuple[dict[str, Any], np.ndarray | None]:
    question = {"do": what, "path": str(path), **more}
    line = json.dumps(question).encode() + b"\n"
    while True:
        try:
            with _pool.one() as (decoder, is_fresh):
                answer = decoder.ask(line)
                code = decoder.end() if answer is None else 0
        except _NoProcessError as error:
            return _ask_here(question, str(error))
        if answer is not None:
            break
        if code < 0:
            raise ClipError("video.decoder_crash", f"{path.name}: {_ended_by(-code)}; convert it, or leave it out")
        if code or is_fresh:  # an idle one may have left just then
            raise RuntimeError(f"the process that decodes ended with exit code {code} at {path}")
    return _checked(*answer)


def _checked(said: dict[str, Any], pixels: np.ndarray | None) -> tuple[dict[str, Any], np.ndarray | None]:
    if "code" in said:
        raise ClipError(said["code"], said["message"])
    return said, pixels


def _ask_here(question: dict[str, Any], why: str) -> tuple[dict[str, Any], np.ndarray | None]:
    """Answer in this process, which a decoder that crashes would then end."""
    from cogvideox_factory.data import decoder

    _say_once(f"clips are decoded in this process, as none can be started for it: {why}")
    return _checked(*decoder.answer(json.loads(json.dumps(question))))


@cache
def _say_once(text: str) -> None:
    say(text)


def _ended_by(number: int) -> str:
    if number == signal.SIGALRM:
        return "its decoder did not come to an end"
    names = {int(known): known.name for known in signal.Signals}
    return f"its decoder crashed ({names.get(number, f'signal {number}')})"


def _forget() -> None:
    """In a fork: the processes answer to another."""
    global _pool
    _pool = _Pool()


atexit.register(lambda: _pool.end())
os.register_at_fork(after_in_child=_forget)
