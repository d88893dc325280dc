"""What made a cache: the settings of its two parts, their fingerprints, and a readable difference.

The video part and the text part are kept apart, so a change of size leaves the embeddings good, and a change
of captions the latents.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.errors import UnfitError

FORMAT = 1
"""Number of the cache's format; another one is not read."""
_LATER: dict[str, Any] = {"windows": "first", "max_slowdown": None, "imported": False}
"""Settings that the first caches did not record, and what they were then."""
UNKNOWN = "unknown"
_SET_BY = {
    "trigger_word": "data.trigger_word", "video.image_variants": "cache.image_noise_variants",
    "video.seed": "run.seed", "video.short_policy": "data.short_clips", "video.tiling": "data.vae_tiling",
} | {
    f"video.{name}": f"data.{name}"
    for name in ("num_frames", "height", "width", "fps", "fps_policy", "crop", "buckets", "windows", "max_slowdown")
}  # fmt: skip
"""What a user sets, where a cache has another name for it."""
_FOLLOWS = {"video.seed": ("video.crop", "video.image_variants"), "video.max_slowdown": ("video.short_policy",)}
"""Settings that are None unless another one needs them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSettings:
    """All that decides the latents of a clip, besides its bytes."""

    vae: str
    """SHA-256 of the VAE's weights and config (`hash_folder`)."""
    dtype: str
    """Arithmetic the VAE ran in."""
    num_frames: int
    height: int
    width: int
    fps: float
    fps_policy: str
    short_policy: str
    crop: str
    tiling: bool = False
    image_variants: int = 0
    """First frames kept a clip: 0 for text-to-video, else the clean one and the rest noised."""
    seed: int | None = None
    """Of random crops and image noise; None where neither is used."""
    buckets: str | None = None
    """What gives each clip a size and length of its own (`Buckets.to_json`); those above are the model's then."""
    windows: str = "first"
    """What sources are cut into (`Windows`); a window's place is part of what it is made of, not of what with."""
    max_slowdown: float | None = None
    """Bound of a short policy that slows clips."""
    imported: bool = False
    """Made elsewhere: the VAE is the recipe's by assumption, and what is `UNKNOWN` nobody wrote down."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "fps", float(self.fps))  # 8 and 8.0 are one setting and must hash alike

    @classmethod
    def from_spec(
        cls,
        spec: ClipSpec,
        *,
        vae: str,
        dtype: str,
        tiling: bool = False,
        image_variants: int = 0,
        seed: int = 0,
        buckets: str | None = None,
        windows: str = "first",
    ) -> Self:
        """Build from what clips are brought to; what decides nothing is left out."""
        random = spec.crop == "random" or image_variants > 1
        return cls(
            vae=vae, dtype=dtype, tiling=tiling, image_variants=image_variants, seed=seed if random else None,
            buckets=buckets, windows=windows, max_slowdown=spec.max_slowdown if spec.short_policy == "slow" else None,
            num_frames=spec.num_frames, height=spec.height, width=spec.width, fps=spec.fps,
            fps_policy=spec.fps_policy, short_policy=spec.short_policy, crop=spec.crop,
        )  # fmt: skip

    def of(self, spec: ClipSpec | None) -> Self:
        """Return the settings of one clip: how it came to its size and place does not matter to its latents."""
        alone = replace(self, buckets=None, windows="first", max_slowdown=None)
        if self.buckets is None or spec is None:
            return alone
        return replace(alone, num_frames=spec.num_frames, height=spec.height, width=spec.width)

    def without_images(self) -> Self:
        """Return the settings of the video latents alone, for a clip whose image is kept in an entry of its own."""
        return replace(self, image_variants=0, seed=self.seed if self.crop == "random" else None)

    def of_image(self, spec: ClipSpec | None) -> Self:
        """Return the settings of an image of a clip's own: frames and rate do not matter to it."""
        return replace(self.of(spec), num_frames=1, fps=0.0, fps_policy="", short_policy="")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSettings:
    """All that decides the embedding of a caption, besides its text."""

    text_encoder: str
    """SHA-256 of the encoder's weights and config."""
    tokenizer: str
    """SHA-256 of the tokenizer's files."""
    dtype: str
    max_sequence_length: int
    imported: bool = False
    """Made elsewhere: encoder and tokenizer are the recipe's by assumption."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSettings:
    """What a cache is made with."""

    model: str
    """Name of the model, for people; what counts are the hashes."""
    video: VideoSettings
    text: TextSettings
    trigger_word: str = ""
    """Put in front of every caption before it was encoded."""

    def as_imported(self) -> Self:
        """Return these settings for entries made elsewhere: what cannot be known of them is not claimed."""
        video = replace(
            self.video, imported=True, dtype=UNKNOWN, fps=0.0, fps_policy=UNKNOWN, short_policy=UNKNOWN, crop=UNKNOWN,
            tiling=False, seed=None, windows="first", max_slowdown=None,
        )  # fmt: skip
        return replace(self, video=video, text=replace(self.text, imported=True, dtype=UNKNOWN))

    def to_json(self) -> dict[str, Any]:
        """Return what `cache.json` records."""
        return {
            "format": FORMAT,
            "model": self.model,
            "trigger_word": self.trigger_word,
            "video": {"fingerprint": fingerprint(self.video), "settings": _named(self.video)},
            "text": {"fingerprint": fingerprint(self.text), "settings": _named(self.text)},
        }


class Difference(NamedTuple):
    """One setting in which a cache and a run differ."""

    name: str
    recorded: Any
    wanted: Any


def fingerprint(part: VideoSettings | TextSettings) -> str:
    """Return the SHA-256 of a part's settings in canonical JSON."""
    named = {"format": FORMAT, "part": type(part).__name__, **_named(part)}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def _named(part: VideoSettings | TextSettings) -> dict[str, Any]:
    """Return the settings by name; those that came later only where they are not as before, so older caches fit."""
    return {name: value for name, value in asdict(part).items() if name not in _LATER or _LATER[name] != value}


def entry_key(part_fingerprint: str, content: str) -> str:
    """Return the name of the entry that a part with this fingerprint makes of `content` (a SHA-256)."""
    return hashlib.sha256(f"{part_fingerprint}\n{content}".encode()).hexdigest()


def compare(recorded: dict[str, Any], wanted: CacheSettings) -> list[Difference]:
    """Return each setting in which a parsed `cache.json` differs from `wanted`, but for the model's name."""
    found = []
    if recorded.get("format") != FORMAT:
        found.append(Difference("format", recorded.get("format"), FORMAT))
    if recorded.get("trigger_word", "") != wanted.trigger_word:
        found.append(Difference("trigger_word", recorded.get("trigger_word"), wanted.trigger_word))
    for part_name, part in (("video", wanted.video), ("text", wanted.text)):
        values = recorded.get(part_name, {}).get("settings", {})
        names = dict.fromkeys([*(field.name for field in fields(part)), *values])
        for name in names:
            old, new = values.get(name, _LATER.get(name)), getattr(part, name, None)
            if old != new:
                found.append(Difference(f"{part_name}.{name}", old, new))
    return found


def require_match(folder: Path, recorded: dict[str, Any], wanted: CacheSettings, *, command: str) -> None:
    """Refuse a cache made with other settings.

    Args:
        folder: the cache, for the message.
        recorded: the parsed `cache.json`.
        wanted: what this run needs.
        command: what to type to make it fit.

    Raises:
        UnfitError: with one line a differing setting.
    """
    differences = compare(recorded, wanted)
    if not differences:
        return
    named = [(found, setting) for found in differences if (setting := _setting_behind(found, differences)) is not None]
    width = max(len(found.name) for found, _ in named)
    lines = [
        f"  {found.name:<{width}}  cache: {_short(found.recorded)}  this run: {_short(found.wanted)}"
        f"{f'  ({setting})' if setting else ''}"
        for found, setting in named
    ]
    raise UnfitError(
        "\n".join(
            [
                f"the cache {folder} was made with other settings (model {recorded.get('model')}):",
                *lines,
                f"Run `{command}` to make what is missing (entries that still fit are kept), or set this "
                "run's settings to the cache's.",
            ]
        )
    )


def _setting_behind(found: Difference, all_found: list[Difference]) -> str | None:
    """Return what the user sets to change it, "" if nothing of another name, None if another of `all_found` is why."""
    name, old, new = found
    names = {difference.name for difference in all_found}
    if None in (old, new) and names & set(_FOLLOWS.get(name, ())):
        return None
    if name == "video.windows" and (policy := str(old).partition(",")[0]) == str(new).partition(",")[0]:
        return "data.max_windows" if policy == "uniform" else "data.window_stride"
    if name == "video.buckets":
        try:
            old, new = (json.loads(rule) if rule else {} for rule in (old, new))
        except (ValueError, TypeError):  # nothing this program writes
            return _SET_BY[name]
        match [key for key in old | new if old.get(key) != new.get(key)]:
            case ["max_buckets"]:
                return "data.max_buckets"
            case ["seed"]:
                return "run.seed"
            case ["auto"] if names & {"video.num_frames", "video.height", "video.width"}:
                return None  # the shape that buckets are made around
    return _SET_BY.get(name, "")


def _short(value: Any) -> str:
    is_hash = isinstance(value, str) and len(value) == 64
    return f"{value[:12]}…" if is_hash else json.dumps(value, ensure_ascii=False)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(
    folder: Path,
    *,
    suffixes: Iterable[str] = (".json", ".safetensors", ".model", ".txt"),
    hash_file: Callable[[Path], str] = sha256_file,
) -> str:
    """Return one SHA-256 for the names and bytes of a model folder's files.

    Args:
        folder: the model, or a part of it.
        suffixes: of the files that count.
        hash_file: gives the SHA-256 of one file; one that remembers (`Memo.sha256`) spares reading gigabytes again.

    Raises:
        UnfitError: no such folder, or none of these files in it.
    """
    folder = Path(folder)
    chosen = tuple(suffixes)
    files = sorted(p for p in folder.glob("*") if p.is_file() and p.suffix in chosen) if folder.is_dir() else []
    if not files:
        raise UnfitError(f"{folder} holds none of the files of a model ({', '.join(chosen)}). Download it again.")
    total = hashlib.sha256()
    for path in files:
        total.update(f"{path.name}\n{hash_file(path)}\n".encode())
    return total.hexdigest()
