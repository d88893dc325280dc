"""What was found in clips before, so that looking again at a data set that has not changed costs a `stat` a clip.

An answer is kept for a question (what clips are brought to, what a model file hashes to) and a file in the state it was
in: inode, size, time of the last write and of the last change of its entry. The last cannot be set back, so a file that
was replaced, edited or restored under an old date is looked at anew. A file that changed within two seconds of being
looked at is not remembered, because a clock tick might hide its next change. Nor is a clip whose
decoder crashed, for the machine may be to blame. A memo is never needed: damage only means looking again.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cogvideox_factory.data.fingerprint import sha256_file
from cogvideox_factory.data.manifest import Clip
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.publish import publish_text

FORMAT = 3
_FRESH_NS = 2_000_000_000
_SEAL = 16
"""Hexadecimal digits in front of a line."""
_KEPT = ("content", "state", "reason", "detail")


class Memo:
    """Answers from a file, and new ones to add to it. Threads may ask at once.

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
        looked: list[Clip] = []

        def find() -> dict[str, Any]:
            looked.extend(look(clip))
            return {"clips": [_found(clip, one) for one in looked]}

        row, found_now = self._answer(clip.path, question, find)
        return looked if found_now else [_recalled(clip, row["stamp"], answer) for answer in row["clips"]]

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 of a file, from memory if it is as it was.

        Raises:
            OSError: it cannot be read.
        """
        return self._answer(path, "sha256", lambda: {"sha256": sha256_file(path)})[0]["sha256"]

    def _answer(self, path: Path, question: Any, find: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
        """Return the answer for a file, and whether it was found just now."""
        name = os.path.abspath(path)
        key = hashlib.sha256(json.dumps([FORMAT, name, question], sort_keys=True).encode()).hexdigest()
        before = _stamp(name)
        row = self._known.get(key)
        if row and before is not None and row["stamp"] == before:
            self._fresh[key] = row
            return row, False
        found = find()
        is_settled = before is not None and before == _stamp(name) and time.time_ns() - max(before[2:]) > _FRESH_NS
        if is_settled and not any(one["reason"] == "video.decoder_crash" for one in found.get("clips", ())):
            self._fresh[key] = {"path": name, "stamp": before, **found}
        return found, True

    def save(self) -> None:
        """Write every answer that was given or found.

        If there are new ones, the others are kept only as long as their files are as they were: a row about a file
        that is gone or changed can never answer again. Without new ones nothing is written.
        """
        if self._file.exists() and all(self._known.get(key) == row for key, row in self._fresh.items()):
            return
        kept = {key: row for key, row in self._known.items() if _stamp(row["path"]) == row["stamp"]}
        rows = kept | self._fresh
        publish_text(self._file, "".join(_sealed(json.dumps([key, row])) + "\n" for key, row in rows.items()))
        self._known = rows


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """Return what every undamaged line says."""
    try:
        lines = file.read_bytes().decode("ascii", "replace").split("\n")
    except OSError:
        return {}
    rows = dict(json.loads(line[_SEAL:]) for line in lines if line and line == _sealed(line[_SEAL:]))
    return {key: row for key, row in rows.items() if "path" in row and "stamp" in row}


def _sealed(text: str) -> str:
    """Return `text` behind its checksum: a flipped bit of an answer could give a clip other frames or another state."""
    return hashlib.sha256(text.encode()).hexdigest()[:_SEAL] + text


def _stamp(path: str) -> list[int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _found(clip: Clip, looked: Clip) -> dict[str, Any]:
    facts = {name: value for name, value in looked.facts.items() if name not in clip.facts}
    spec = asdict(looked.spec) if looked.spec else None
    return {name: getattr(looked, name) for name in _KEPT} | {"facts": facts, "spec": spec}


def _recalled(clip: Clip, stamp: list[int], answer: dict[str, Any]) -> Clip:
    return replace(
        clip, **{name: answer[name] for name in _KEPT}, stamp=(stamp[1], stamp[2]),
        facts={**clip.facts, **answer["facts"]}, spec=ClipSpec(**answer["spec"]) if answer["spec"] else None,
    )  # fmt: skip
