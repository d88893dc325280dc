"""F8, F9, F10: caches whose files are cut, flipped, deleted, swapped, doubled, or of other settings."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache as once
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from cogvideox_factory import draws
from cogvideox_factory.data.cache import Cache
from cogvideox_factory.data.cache_check import DAMAGED, FOREIGN, MISSING, OK, ORPHAN, audit_cache, set_aside
from cogvideox_factory.data.cache_index import open_cache
from cogvideox_factory.data.entry import read_entry
from cogvideox_factory.data.fingerprint import CacheSettings, TextSettings, VideoSettings
from cogvideox_factory.data.manifest import Manifest, read_manifest
from cogvideox_factory.data.memo import Memo
from cogvideox_factory.data.survey import survey
from cogvideox_factory.errors import UnfitError
from tests.faults.makers import SPEC, good_set
from tests.faults.trial import Trial, Verdict, files_of, folder_of_this_run, spread

SHAPE = (3, 4, 8, 8)
_TEXT = TextSettings(text_encoder="b" * 64, tokenizer="c" * 64, dtype="float32", max_sequence_length=5)


def settings(*, image_variants: int = 0, **more) -> CacheSettings:
    """Return the settings of a cache whose numbers are drawn."""
    video = VideoSettings.from_spec(SPEC, vae="a" * 64, dtype="float32", image_variants=image_variants)
    return CacheSettings(model="drawn", video=replace(video, **more), text=_TEXT)


def fill(cache: Cache, manifest: Manifest) -> tuple[int, int]:
    """Do what `prepare` does, with drawn numbers for encoders; return how many clips and captions were made."""
    clips, captions = cache.missing_clips(manifest.clips), cache.missing_captions(manifest.clips)
    variants = cache.settings.video.image_variants
    for clip in clips:
        content = clip.content or ""
        more: dict[str, Any] = {}
        if variants:
            shape = (variants, *SHAPE[1:])
            more = {k: draws.normal(0, k, content, shape=shape) for k in ("image_mean", "image_logvar")}
            more["image_sigmas"] = [0.0] + [0.05] * (variants - 1)
        moments = {key: draws.normal(0, key, content, shape=SHAPE) for key in ("mean", "logvar")}
        cache.write_clip(clip, **moments, **more)
    for caption in captions:
        cache.write_caption(caption, draws.normal(0, "text", caption, shape=(5, 8)))
    return len(clips), len(captions)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A finished cache to be copied and spoilt."""

    folder: Path
    manifest: Manifest
    settings: CacheSettings
    files: dict[str, bytes]

    def copy(self, to: Path) -> Cache:
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(self.folder, to)
        return Cache(to, self.settings)


@once
def finished(image_variants: int = 0) -> Finished:
    """Return a cache of three clips; with `image_variants`, as image-to-video has it."""
    work = folder_of_this_run("cache")
    good_set(work / "set")
    memo = Memo(work / "cache" / "survey.jsonl")
    with mock.patch("cogvideox_factory.data.memo._FRESH_NS", 0):  # clips of this very second are remembered too
        manifest = survey(read_manifest(work / "set"), SPEC, memo=memo, num_workers=0)
    wanted = settings(image_variants=image_variants)
    cache = Cache(work / "cache", wanted)
    fill(cache, manifest)
    cache.publish(manifest)
    memo.save()
    return Finished(folder=cache.folder, manifest=manifest, settings=wanted, files=files_of(cache.folder, skip=()))


def artefacts() -> list[tuple[str, Finished, str]]:
    """Return (kind, cache, file) of one file of each of the seven kinds a cache consists of."""
    plain, image = finished(), finished(3)
    seen, clip = Cache(plain.folder, plain.settings), plain.manifest.clips[1]
    image_clip = Cache(image.folder, image.settings).clip_file(image.manifest.clips[0])
    return [
        ("clip", plain, seen.clip_file(clip)), ("image clip", image, image_clip),
        ("caption", plain, seen.caption_file(clip.caption)), ("empty caption", plain, seen.caption_file("")),
        ("cache.json", plain, "cache.json"), ("clips.jsonl", plain, "clips.jsonl"),
        ("survey.jsonl", plain, "survey.jsonl"),
    ]  # fmt: skip


def judge(made: Finished, cache: Cache, file: str) -> tuple[Verdict, str, str]:
    """Return (verdict, what noticed, detail) of a cache in which `file` was spoilt, after mending it."""
    bad = audit_cache(cache.folder).of(DAMAGED, MISSING)
    layer = ""
    if bad:
        try:
            open_cache(cache.folder, made.settings)
            layer = "checksum"
        except UnfitError:
            layer = "header and size"
        if file not in {finding.file for finding in bad}:
            return Verdict.SILENT, layer, f"{file} was spoilt, told were {[finding.file for finding in bad]}"
    elif not _means_the_same(made, cache, file):
        return Verdict.SILENT, "", f"{file} differs and nothing was told"
    entries = {f.file for f in bad if f.file.endswith(".safetensors")}
    set_aside(audit_cache(cache.folder))
    made_again = sum(fill(cache, made.manifest))
    cache.publish(made.manifest)
    shutil.rmtree(cache.folder / "set-aside", ignore_errors=True)
    if files_of(cache.folder) != {
        name: data for name, data in made.files.items() if name not in (".lock", "survey.jsonl")
    }:
        return Verdict.LOST, layer, "mending and preparing again did not give the same files"
    if made_again != len(entries):
        return Verdict.LOST, layer, f"{made_again} entries were made again for {len(entries)} bad ones"
    return (Verdict.REFUSED if bad else Verdict.OK), layer, ""


def _means_the_same(made: Finished, cache: Cache, file: str) -> bool:
    """Tell whether a spoilt file says what it said."""
    if file == "survey.jsonl":
        memo = Memo(cache.folder / file)
        again = survey(read_manifest(made.folder.parent / "set"), SPEC, memo=memo, num_workers=0)
        return again.clips == made.manifest.clips
    path, data = cache.folder / file, made.files[file]
    if file.endswith(".json"):
        return json.loads(path.read_bytes()) == json.loads(data)
    if not file.endswith(".safetensors"):
        return path.read_bytes() == data
    (one, header), (two, other) = read_entry(path), read_entry(made.folder / file)
    same = header.metadata == other.metadata and one.keys() == two.keys()
    return same and all(np.array_equal(one[name].view(np.uint16), two[name].view(np.uint16)) for name in one)


def cut_files(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F8: each of the seven kinds, cut at evenly spread points."""
    for kind, made, file in artefacts():
        size = len(made.files[file])
        for point in spread(list(range(size)), count // 7):
            cache = made.copy(work / "cache")
            (cache.folder / file).write_bytes(made.files[file][:point])
            verdict, layer, detail = judge(made, cache, file)
            yield Trial(family="F8", name=f"{kind} at {point}", verdict=verdict, layer=layer, detail=detail)


def flipped_bits(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F9: one bit of each of the seven kinds, at drawn places."""
    for kind, made, file in artefacts():
        data = made.files[file]
        places = draws.generator(seed, "flip", kind).integers(0, 8 * len(data), count // 7)
        for place in places.tolist():
            cache = made.copy(work / "cache")
            spoilt = bytearray(data)
            spoilt[place // 8] ^= 1 << place % 8
            (cache.folder / file).write_bytes(spoilt)
            verdict, layer, detail = judge(made, cache, file)
            yield Trial(family="F9", name=f"{kind} bit {place}", verdict=verdict, layer=layer, detail=detail)


def wrong_files(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F10: deleted, swapped, doubled entries; other settings, one at a time; strangers and orphans."""
    made = finished()
    entries = [name for name in made.files if name.endswith(".safetensors")]
    clips, texts = ([n for n in entries if n.startswith(part)] for part in ("clips", "text"))
    tries = [("delete", file, "") for file in [*entries, "cache.json", "clips.jsonl"]]
    tries += [("swap", a, b) for part in (clips, texts) for a, b in zip(part, part[1:] + part[:1])]
    tries += [("double", file, "") for file in entries]
    tries += [("bytes of another kind", clips[0], texts[0]), ("bytes of another kind", texts[0], clips[0])]
    tries += [("setting", name, "") for name in _settings()]
    tries += [
        ("orphan", "", ""),
        ("foreign", "", ""),
        ("other list", "cache.json", ""),
        ("other list", "clips.jsonl", ""),
    ]
    for fault, file, other in spread(tries, count):
        verdict, detail = _try_wrong(made, made.copy(work / "cache"), fault, file, other)
        yield Trial(family="F10", name=f"{fault} {file} {other}".strip(), verdict=verdict, detail=detail)


def _settings() -> list[str]:
    return [f"video.{f.name}" for f in fields(VideoSettings)] + [f"text.{f.name}" for f in fields(TextSettings)] + [
        "trigger_word"
    ]  # fmt: skip


def _try_wrong(made: Finished, cache: Cache, fault: str, file: str, other: str) -> tuple[Verdict, str]:
    if fault == "setting":
        return _other_setting(made, cache, file)
    if fault in ("orphan", "foreign"):
        return _beside(made, cache, fault)
    path = cache.folder / file
    if fault == "delete":
        path.unlink()
    elif fault == "double":
        file = "{}/00/00{}".format(file.split("/")[0], path.name[2:])
        (cache.folder / file).parent.mkdir(exist_ok=True)
        shutil.copy(path, cache.folder / file)
    elif fault == "other list":
        path.write_bytes(finished(3).files[file])
    else:
        path.write_bytes(made.files[other])
    bad = {finding.file for finding in audit_cache(cache.folder).of(DAMAGED, MISSING)}
    if file not in bad:
        return Verdict.SILENT, f"{file} was not told, {bad} were"
    set_aside(audit_cache(cache.folder))
    made_again = sum(fill(cache, made.manifest))
    cache.publish(made.manifest)
    shutil.rmtree(cache.folder / "set-aside", ignore_errors=True)
    same = files_of(cache.folder) == {n: d for n, d in made.files.items() if n not in (".lock", "survey.jsonl")}
    wanted = 1 if file.endswith(".safetensors") and fault != "double" else 0
    if not same or made_again != wanted:
        return Verdict.LOST, f"{made_again} entries made again, the same files: {same}"
    return Verdict.REFUSED, ""


def _other_setting(made: Finished, cache: Cache, name: str) -> tuple[Verdict, str]:
    """Ask for the cache with one setting changed: the answer must name that one and no other."""
    part, _, key = name.partition(".")
    if not key:
        wanted = replace(made.settings, trigger_word="other")
    else:
        old = getattr(getattr(made.settings, part), key)
        new = not old if isinstance(old, bool) else old + 1 if isinstance(old, int | float) else f"other {old}"
        wanted = replace(made.settings, **{part: replace(getattr(made.settings, part), **{key: new})})
    try:
        open_cache(cache.folder, wanted)
    except UnfitError as error:
        named = [line.split()[0] for line in str(error).split("\n") if "  this run: " in line]
        return (Verdict.REFUSED, "") if named == [name] else (Verdict.SILENT, f"named were {named}")
    return Verdict.SILENT, "the cache was taken"


def _beside(made: Finished, cache: Cache, fault: str) -> tuple[Verdict, str]:
    """Put a good entry of other settings, or a stranger, beside the entries: told, and nothing is refused."""
    if fault == "orphan":
        fill(Cache(cache.folder, settings(crop="stretch")), made.manifest)
        wanted = {ORPHAN: len(made.manifest.clips)}
    else:
        (cache.folder / "clips" / "notes.txt").write_text("mine")
        (cache.folder / "my-clip.mp4").write_bytes(b"mine")
        wanted = {FOREIGN: 2}
    before = files_of(cache.folder)
    audit = audit_cache(cache.folder)
    open_cache(cache.folder, made.settings)
    set_aside(audit)
    told = {state: n for state, n in audit.counts().items() if n and state != OK}
    kept = files_of(cache.folder) == before
    return (Verdict.DEGRADED, "") if told == wanted and kept else (Verdict.SILENT, f"told {told}, kept {kept}")
