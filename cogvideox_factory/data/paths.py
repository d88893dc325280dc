"""From an entry of a list to a file under the data root.

An entry is a file name, never an address: it is joined to the root, resolved through links, and must still be
inside.
"""

import os
import stat
import unicodedata
from difflib import get_close_matches
from pathlib import Path

from cogvideox_factory.data.reasons import ClipError, printable

_MAX_GUESSES = 20
_MAX_NAMES = 5000


class PathResolver:
    """Turns entries into paths, remembering folder listings for the hints it gives.

    Args:
        root: the data root.
        allow_outside: accept entries that lead out of the root.
    """

    def __init__(self, root: Path, *, allow_outside: bool = False) -> None:
        self.root = Path(root)
        self._real_root = os.path.realpath(root)
        self._allow_outside = allow_outside
        self._folders: dict[str, str] = {}
        self._listings: dict[Path, dict[str, str]] = {}
        self._guesses = 0

    def resolve(self, entry: str) -> Path:
        """Return the resolved path of a readable regular file.

        Raises:
            ClipError: `path.*`, naming what is wrong with the entry.
        """
        shown = printable(entry)
        if not entry:
            raise ClipError("path.empty", "the row names no file")
        if "\0" in entry:
            raise ClipError("path.nul", f"{shown!r} holds a NUL character, which no file name can")
        try:
            entry.encode()
        except UnicodeEncodeError:
            raise ClipError("row.malformed", f"{shown} is not valid UTF-8; rename the file") from None
        real = self._real(os.path.join(self.root, entry))
        if not self._allow_outside and not self._inside(real):
            raise ClipError(
                "path.outside",
                f"{shown} leads out of the data root {self.root}; move it inside, or allow outside paths",
            )
        self._check_file(real, entry, shown)
        return Path(real)

    def _real(self, path: str) -> str:
        """Return `path` without links; each folder is followed once, not for every file in it."""
        folder, name = os.path.split(path)
        if name in ("", ".", ".."):
            return os.path.realpath(path)
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        real = os.path.join(self._folders[folder], name)
        return os.path.realpath(real) if os.path.islink(real) else real

    def _inside(self, real: str) -> bool:
        return os.path.commonpath([real, self._real_root]) == self._real_root

    def _check_file(self, real: str, entry: str, shown: str) -> None:
        try:
            mode = os.stat(real).st_mode
        except PermissionError as error:
            raise ClipError("path.denied", f"{shown}: no permission to look at it") from error
        except OSError as error:
            raise ClipError("path.missing", f"{shown} is not there{self._hint(entry)}") from error
        if stat.S_ISDIR(mode):
            raise ClipError("path.is_dir", f"{shown} is a folder, not a clip")
        if not stat.S_ISREG(mode):
            raise ClipError("path.not_file", f"{shown} is no regular file")
        if not os.access(real, os.R_OK):
            raise ClipError("path.denied", f"{shown}: no permission to read it")

    def _hint(self, entry: str) -> str:
        if "://" in entry:
            return " (entries are file names under the data root; addresses are never opened)"
        path = self.root / entry
        if "\\" in entry and (self.root / entry.replace("\\", "/")).exists():
            return " (use / between folders)"
        names = self._listing(path.parent)
        same = names.get(_folded(path.name))
        if same is None and self._guesses < _MAX_GUESSES and len(names) <= _MAX_NAMES:
            self._guesses += 1
            close = get_close_matches(path.name, list(names.values()), n=1, cutoff=0.75)
            same = close[0] if close else None
        return f" (did you mean {printable(same)!r}?)" if same else ""

    def _listing(self, folder: Path) -> dict[str, str]:
        if folder not in self._listings:
            try:
                names = sorted(os.listdir(folder)) if self._inside(os.path.realpath(folder)) else []
            except OSError:
                names = []
            self._listings[folder] = {_folded(name): name for name in names}
        return self._listings[folder]


def require_in_place(path: Path) -> None:
    """Refuse a resolved path that leads elsewhere by now: a link was put in its place, or in that of a folder above.

    Raises:
        ClipError: `video.changed`.
    """
    if os.path.realpath(path) != os.fspath(path):
        raise ClipError("video.changed", f"{path.name} became a link since the list was read; leave the clips alone")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
