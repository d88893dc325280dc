"""A video and the memory that is free: what must wait on the host, whether to decode in tiles, what is said of it."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from cogvideox_factory.plan.generation import Generation, Need, need
from cogvideox_factory.plan.memory import MATRIX_BYTES

ROOM = 0.9
"""Part of the free memory that a plan may fill: kernels have workspaces, and allocators gaps."""


def modes(video: Generation, *, group: int) -> list[Generation]:
    """Return `video` with every way of offload, the fastest first; divided weights have none."""
    plain = replace(video, offload="none", group=1)
    if video.shards > 1:
        return [plain]
    return [
        plain, replace(plain, offload="model"), replace(plain, offload="group", group=group),
        replace(plain, offload="block"),
    ]  # fmt: skip


def first_fit(video: Generation, free: int, *, group: int) -> Generation | None:
    """Return `video` with the fastest offload that takes at most `ROOM` of `free` bytes, or None."""
    return next((each for each in modes(video, group=group) if fits(each, free)), None)


def fits(video: Generation, free: int) -> bool:
    """Whether `video` takes at most `ROOM` of `free` bytes."""
    return need(video).device <= ROOM * free


def settle(
    video: Generation,
    *,
    offload: str,
    group: int,
    tiling: bool | Literal["auto"],
    free: int | None,
    accelerator: bool,
) -> Generation:
    """Return `video` as it is made: `offload` and `tiling` as asked, or where they are auto as `free` bytes allow.

    Nothing waits elsewhere than on an accelerator. Where nothing says what is free, auto is what takes little: tiles,
    and models by turns. Where nothing fits, it is what takes least.
    """
    video = replace(video, tiling=tiling is not False)
    if offload != "auto":
        video = next(each for each in modes(video, group=group) if each.offload == offload)
    elif accelerator and video.shards == 1:
        if free is None:
            video = replace(video, offload="model")
        else:
            video = first_fit(video, free, group=group) or modes(video, group=group)[-1]
    if tiling == "auto" and free is not None:
        whole = replace(video, tiling=False)
        if fits(whole, free):
            return whole
    return video


def report(video: Generation, *, free: int | None, group: int, accelerator: bool) -> list[str]:
    """Return the lines about memory that making `video` begins with: what it needs and, if that is too much, a way."""
    told = need(video)
    lines = [f"memory on the device: {needs_of(told)} ({ways_of(video)})"]
    if free is not None:
        lines[0] += f"; {_gib(free)} are free"
    if free is None or fits(video, free):
        return lines
    lines.append(f"that is more than {ROOM:.0%} of what is free, and may fail")
    better = first_fit(video, free, group=group) if accelerator else None
    if better is not None:
        lines[1] += f"; --generate.offload {better.offload} needs {_gib(need(better).device)}"
    elif more := savings(video, accelerator=accelerator):
        saved, setting = more[0]
        lines[1] += f"; {setting} needs about {_gib(saved)} less"
    return lines


def needs_of(told: Need) -> str:
    """Return what is needed in each phase, and the most of it."""
    phases = {"text": told.text, "denoising": told.denoise, "decoding": told.decode}
    listed = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in phases.items() if value)
    host = f", and {_gib(told.host)} of host memory" if told.host else ""
    return f"about {_gib(told.device)} at most: {listed}{host}"


def ways_of(video: Generation) -> str:
    """Return how weights are kept and pictures decoded."""
    groups = f" of {video.group}" if video.offload == "group" else ""
    base = "" if video.base == "model" else f"base {video.base}, "
    return f"{base}offload {video.offload}{groups}, tiling {video.tiling}"


def savings(video: Generation, *, accelerator: bool) -> list[tuple[int, str]]:
    """Return (bytes saved on the device, what to set) for each single change that saves a hundredth, the most first."""
    now = need(video).device
    found = [(now - need(other).device, setting) for setting, other in _changes(video, accelerator)]
    return sorted((item for item in found if item[0] > now // 100), reverse=True)


def _changes(video: Generation, accelerator: bool) -> Iterator[tuple[str, Generation]]:
    fewer = video.num_frames // 16 * 8 + 1
    part = -(-video.latent_frames * fewer // video.num_frames)
    yield f"--generate.num-frames {fewer}", replace(video, num_frames=fewer, latent_frames=part)
    if not video.tiling:
        yield "--sampling.tiling True", replace(video, tiling=True)
    if video.item_bytes == 4 and accelerator:
        yield "--run.dtype bfloat16", replace(video, item_bytes=2)
    if video.shards > 1:
        return
    if accelerator:
        for mode in ("model", "block"):
            yield f"--generate.offload {mode}", replace(video, offload=mode, group=1)
    if video.base == "model":
        for base in MATRIX_BYTES:
            yield f"--generate.base {base}", replace(video, base=base)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
