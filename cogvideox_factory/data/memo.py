"""What was found in clips before, so that looking again at a data set that has not changed costs a `stat` a clip.

An answer is kept for a question (what clips are brought to) and a file in the state it was in: inode, size, time of
the last write and of the last change of its entry. The last cannot be set back, so a file that was replaced, edited or
restored under an old date is looked at anew. A file that changed within two seconds of being looked at is not
remembered, because a clock tick might hide its next change. A memo is never needed: damage only means looking again.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cogvideox_factory.data.manifest import Clip
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.publish import publish_text

FORMAT = 2
_FRESH_NS = 2_000_000_000
_SEAL = 16
"""Hexadecimal digits in front of a line."""
_KEPT = ("content", "state", "reason", "detail")


class Memo:
    """Answers from a file, and new ones to add to it.

    Args:
        file: where they are kept; it need not exist.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, dict[str, Any]] = _read(file)
        self._fresh: dict[str, dict[str, Any]] = {}

    def ask(self, clip: Clip, question: Any, look: Callable[[Clip], list[Clip]]) -> list[Clip]:
        """Return the clips that `look` makes of `clip`, from memory if its file is as it was.

        Args:
            clip: with a path.
            question: all that the answer depends on besides the file; anything JSON can hold.
            look: adds state, content and facts to a clip, or to each of its windows.
        """
        assert clip.path is not None
        key = hashlib.sha256(json.dumps([FORMAT, str(clip.path), question], sort_keys=True).encode()).hexdigest()
        before = _stamp(clip.path)
        row = self._known.get(key)
        if row and before is not None and row["stamp"] == before:
            self._fresh[key] = row
            return [_recalled(clip, row["stamp"], answer) for answer in row["clips"]]
        looked = look(clip)
        if before is not None and before == _stamp(clip.path) and time.time_ns() - max(before[2:]) > _FRESH_NS:
            self._fresh[key] = {"stamp": before, "clips": [_answer(clip, one) for one in looked]}
        return looked

    def save(self) -> None:
        """Write every answer that was given or found; those about other clips and questions stay."""
        rows = self._known | self._fresh
        if rows != self._known or not self._file.exists():
            publish_text(self._file, "".join(_sealed(json.dumps([key, row])) + "\n" for key, row in rows.items()))
            self._known = rows


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """Return what every undamaged line says."""
    try:
        lines = file.read_bytes().decode("ascii", "replace").split("\n")
    except OSError:
        return {}
    return dict(json.loads(line[_SEAL:]) for line in lines if line and line == _sealed(line[_SEAL:]))


def _sealed(text: str) -> str:
    """Return `text` behind its checksum: a flipped bit of an answer could give a clip other frames or another state."""
    return hashlib.sha256(text.encode()).hexdigest()[:_SEAL] + text


def _stamp(path: Path) -> list[int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _answer(clip: Clip, looked: Clip) -> dict[str, Any]:
    facts = {name: value for name, value in looked.facts.items() if name not in clip.facts}
    spec = asdict(looked.spec) if looked.spec else None
    return {name: getattr(looked, name) for name in _KEPT} | {"facts": facts, "spec": spec}


def _recalled(clip: Clip, stamp: list[int], answer: dict[str, Any]) -> Clip:
    return replace(
        clip, **{name: answer[name] for name in _KEPT}, stamp=(stamp[1], stamp[2]),
        facts={**clip.facts, **answer["facts"]}, spec=ClipSpec(**answer["spec"]) if answer["spec"] else None,
    )  # fmt: skip
