"""`cpu.prepare`: clips and captions to a cache, against the way of the older `prepare_dataset` scripts.

6 clips of 49 x 256 x 256 are brought to 128 x 128 and encoded by the model that comes with the package. The baseline
does what the scripts do, without what they do on top (they also write each clip as a new mp4): decode a clip, turn its
frames into float32 one at a time and resize them, encode it alone with diffusers' VAE, encode its caption alone with
transformers' T5, `torch.save` both in float32. Ours is `cogvideox prepare`, with hashing, checksums and flushing to
disk. Both load their models inside the timer.

Most of the ratio is the VAE at its 8 to 32 channels, where ours takes a seventh of the processor time; at the published
widths the VAE gains what `cpu.vae.encode` says. The rest (reading, text, writing) takes about half.

`cpu.prepare.rerun`: the same command again on 1,000 clips that are finished. There is nothing to compare it with, so
the figure is a budget of 2 s over the processor seconds of the whole command, start of the interpreter included.
"""

import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import av
import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import AutoTokenizer, T5EncoderModel

from benchmarks.clips import draw_clips
from benchmarks.interleave import Ratio, interleave
from cogvideox_factory import preparation
from cogvideox_factory.data.entry import read_entry
from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.metrics import console
from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.recipe import check
from cogvideox_factory.tiny.world import random_scene, render
from cogvideox_factory.torch_engine import prepare
from cogvideox_factory.weights import resolve_model

NUM_CLIPS, FRAMES, SOURCE, SIZE, TOKENS = 6, 49, 256, 128, 24
LIMIT = 0.1
NUM_FINISHED, BUDGET_SECONDS = 1000, 2.0


def decode(path: Path) -> Tensor:
    """Return pixels in [-1, 1] [3, F, H, W], transformed frame by frame."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    tensors = [torch.from_numpy(frame).permute(2, 0, 1).float() for frame in frames[:FRAMES]]
    small = [interpolate(t[None], (SIZE, SIZE), mode="bicubic", antialias=True)[0] for t in tensors]
    return torch.stack([(t / 255.0 - 0.5) / 0.5 for t in small], dim=1)


@torch.no_grad()
def their_way(model: Path, clips: Path, out: Path) -> None:
    """Encode one clip after the other as the older scripts do."""
    tokenizer = AutoTokenizer.from_pretrained(model / "tokenizer")
    text_encoder = T5EncoderModel.from_pretrained(model / "text_encoder")
    vae = AutoencoderKLCogVideoX.from_pretrained(model / "vae")
    for kind in ("video_latents", "prompt_embeds"):
        (out / kind).mkdir(parents=True, exist_ok=True)
    for path in sorted(clips.glob("*.mp4")):
        moments = vae._encode(decode(path)[None])  # [1, 2C, F', h, w]
        torch.save(moments[0].clone(), out / "video_latents" / f"{path.stem}.pt")
        ids = tokenizer(
            path.with_suffix(".txt").read_text(), padding="max_length", max_length=TOKENS, truncation=True,
            return_tensors="pt",
        ).input_ids  # fmt: skip
        torch.save(text_encoder(ids)[0][0].clone(), out / "prompt_embeds" / f"{path.stem}.pt")


def copy_model(folder: Path) -> Path:
    """Return the package's model with positions for larger pictures; its VAE and text encoder know no size."""
    shutil.copytree(resolve_model("tiny-t2v"), folder)
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_height": 32, "sample_width": 32}))
    return folder


def our_way(model: Path, clips: Path, out: Path) -> None:
    """Prepare an empty cache."""
    shutil.rmtree(out, ignore_errors=True)
    config = check(
        {
            "model": {"path": str(model)},
            "data": {"root": str(clips), "num_frames": FRAMES, "height": SIZE, "width": SIZE, "fps": 8.0},
            "cache": {"dir": str(out)},
            "run": {"device": "cpu", "deterministic": False},
        },
        source="benchmark",
    )
    console.quiet = True
    prepare.run(config)
    console.quiet = False


def difference(theirs: Path, ours: Path) -> float:
    """Return the largest relative distance of two clips' moments; the resizers differ a little."""
    wanted = [torch.load(path, weights_only=True) for path in sorted((theirs / "video_latents").glob("*.pt"))]
    found = [read_entry(path)[0]["mean"].astype(np.float32) for path in ours.glob("clips/*/*.safetensors")]
    assert len(wanted) == len(found) == NUM_CLIPS
    worst = 0.0
    for moments in wanted:
        mean = moments.chunk(2)[0].transpose(0, 1).numpy()  # [F', C, h, w]
        worst = max(worst, min(float(np.linalg.norm(mean - other) / np.linalg.norm(mean)) for other in found))
    return worst


class Zeros:
    """An engine that writes zeros: what is measured never opens an entry's values."""

    def auto_dtype(self, device: str, transformer: TransformerConfig) -> str:
        """Return what `auto` comes to on a CPU."""
        return "float32"

    def encode(self, work: preparation.Work) -> dict[str, ClipError]:
        """Write the entries of `work`."""
        for caption in work.captions:
            work.cache.write_caption(caption, np.zeros((work.cache.settings.text.max_sequence_length, 64)))
        moments = np.zeros((3, 16, 8, 8))
        for clip in work.clips:
            work.cache.write_clip(clip, mean=moments, logvar=moments)
        return {}


def finish(clips: Path, cache: Path) -> list[str]:
    """Write 1,000 clips and their finished cache; return the command that prepares them."""
    drawn = export_to_video(
        render(random_scene(1, 0), num_frames=9, height=64, width=64, fps=8), clips / "0.mp4", fps=8
    )
    data = drawn.read_bytes()
    for index in range(NUM_FINISHED):
        (clips / f"{index}.mp4").write_bytes(data + index.to_bytes(8))  # other bytes, the same pictures
        (clips / f"{index}.txt").write_text(f"clip {index}")
    sections = {
        "model": {"path": "tiny-t2v"}, "data": {"root": str(clips), "fps": 8.0}, "cache": {"dir": str(cache)},
        "run": {"device": "cpu"},
    }  # fmt: skip
    preparation.run(check(sections, source="benchmark"), Zeros)
    words = [f"--{section}.{name}={value}" for section, values in sections.items() for name, value in values.items()]
    return [sys.executable, "-m", "cogvideox_factory", "prepare", *words]


def rerun(folder: Path, num_rounds: int = 5) -> Ratio:
    """Return the budget over the processor seconds of preparing 1,000 finished clips again."""
    command = finish(folder / "many", folder / "finished")
    budgets = []
    for number in range(num_rounds + 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert f"{NUM_FINISHED} clips, 0 to encode; 0 captions to encode" in said, said
        if number:  # the first remembers files that had just been written
            budgets.append(BUDGET_SECONDS / (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
    median = statistics.median(budgets)
    return Ratio(
        name="cpu.prepare.rerun", median=median, low=min(budgets), high=max(budgets), target=1.0,
        note=f"2 s over the processor time on {NUM_FINISHED:,} finished clips, {BUDGET_SECONDS / median:.2f} s",
    )  # fmt: skip


def run() -> list[Ratio]:
    """Return the ratios of this suite: clips a second, and the budget of a rerun."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        clips, theirs, ours = (Path(name) / part for part in ("clips", "theirs", "ours"))
        draw_clips(clips, num_clips=NUM_CLIPS, num_frames=FRAMES, size=SOURCE)
        model = copy_model(Path(name) / "model")
        their_way(model, clips, theirs)
        our_way(model, clips, ours)
        error = difference(theirs, ours)
        assert error < LIMIT, f"cpu.prepare: results differ by {error:.2g}"
        return [
            interleave(
                "cpu.prepare", lambda: their_way(model, clips, theirs), lambda: our_way(model, clips, ours), target=1.5,
                num_rounds=3, note=f"clips/s; latents differ by {error:.1g} (resizers)",
            ),
            rerun(Path(name)),
        ]  # fmt: skip
