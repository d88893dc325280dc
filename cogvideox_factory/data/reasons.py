"""The states a clip can end in and the reasons that send it there.

Every clip of the input ends in exactly one state, so the counts of the states add up to the input. The words
are stable: tests, reports and users match them.
"""

from cogvideox_factory.errors import DataError

PENDING = "pending"
IMPORTED = "imported"
USABLE = ("used", "trimmed", "retimed", "padded", IMPORTED)
"""used: every frame as it is; trimmed: the start of a longer clip; retimed: frames picked for another rate;
padded: the last frame repeated, because the user asked for it; imported: its latents were made elsewhere."""

# Reason code -> state. A code names what was found, a state what becomes of the clip.
REASONS: dict[str, str] = {
    "row.duplicate": "duplicate",
    "row.malformed": "malformed",
    "text.empty": "uncaptioned",
    "text.missing": "uncaptioned",
    "text.encoding": "malformed",
    "text.control": "malformed",
    "path.empty": "missing",
    "path.missing": "missing",
    "path.is_dir": "missing",
    "path.not_file": "missing",
    "path.denied": "missing",
    "path.nul": "malformed",
    "path.outside": "outside",
    "video.unreadable": "corrupt",
    "video.truncated": "corrupt",
    "video.corrupt": "corrupt",
    "video.resolution_change": "corrupt",
    "video.changed": "corrupt",
    "video.decoder_crash": "failed",
    "video.no_stream": "unsupported",
    "video.codec": "unsupported",
    "video.hdr": "unsupported",
    "video.rotation": "unsupported",
    "video.too_large": "too_large",
    "video.too_long": "too_large",
    "video.too_short": "too_short",
    "bucket.none": "no_bucket",
    "image.still": "too_short",
    "image.missing": "missing",
    "image.outside": "outside",
    "image.unreadable": "corrupt",
    "image.changed": "corrupt",
    "latent.nonfinite": "failed",
    "import.missing": "missing",
    "import.ambiguous": "malformed",
    "import.caption": "malformed",
    "import.unreadable": "corrupt",
    "import.dtype": "unsupported",
    "import.shape": "unsupported",
}
STATES = (PENDING, *USABLE, *dict.fromkeys(REASONS.values()))


class ClipError(DataError):
    """One clip or row cannot be used; `code` is its reason, `state` what it becomes."""

    def __init__(self, code: str, message: str) -> None:
        assert code in REASONS, code
        super().__init__(f"{message} [{code}]")
        self.code = code
        self.message = message

    @property
    def state(self) -> str:
        """The state a clip with this reason ends in."""
        return REASONS[self.code]


def printable(text: str) -> str:
    """Return `text` with control and bidirectional override characters escaped, safe for a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
