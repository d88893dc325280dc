"""`cpu.loader*`: samples of a prepared cache, against `torch.load` of a file a part in a `DataLoader`.

64 samples at the shapes of 49 x 480 x 720 (moments of 13 x 16 x 60 x 90, 226 x 4096 text), in the page cache, shuffled,
batches of one, two readers on each side: processes that stay alive there, threads here. The baseline keeps float32, as
the older scripts write it, and converts to bfloat16. `cpu.loader` is reading alone; in `cpu.loader.draws` ours also
draws each sample's noise (keyed by clip and epoch) and the baseline draws as much from torch's own generator, as its
training step does. Entries have been read once before, so their checksums are not computed again.

`cpu.loader.tiny` is a training step of the embedded model on batches that are there already, over the same with the
loader running beside it: 0.95 means that loading costs 5 % of a step. One torch thread, because two on shapes this
small mostly wait for one another.
"""

import tempfile
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.interleave import Ratio, interleave
from benchmarks.pt_files import PtFiles
from cogvideox_factory.data.cache import Cache
from cogvideox_factory.data.cache_index import CacheIndex
from cogvideox_factory.data.fingerprint import CacheSettings, TextSettings, VideoSettings
from cogvideox_factory.data.loader import CacheSource, Draws, Loader
from cogvideox_factory.data.manifest import Clip, Manifest
from cogvideox_factory.data.sampler import Pick, Sampler
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.diffusion.schedule import alphas_cumprod
from cogvideox_factory.models import SchedulerConfig, TransformerConfig
from cogvideox_factory.torch_engine.border import to_tensor
from cogvideox_factory.torch_engine.objective import Objective, Scales
from cogvideox_factory.torch_engine.optim import Update
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer
from cogvideox_factory.torch_engine.watch import to_device
from cogvideox_factory.weights import resolve_model

CPU = torch.device("cpu")
NUM_SAMPLES, NUM_STEPS, TINY_BATCH = 64, 20, 4


class Reading(Draws):
    """No random numbers: reading alone."""

    def sample(self, pick: Pick, latent_shape: tuple[int, ...]) -> dict[str, Any]:
        return {"caption_keep": np.bool_(True)}


def write_cache(
    folder: Path, count: int, *, spec: ClipSpec, latents: tuple[int, ...], text: tuple[int, int]
) -> CacheIndex:
    """Write a cache of random numbers."""
    settings = CacheSettings(
        model="benchmark", video=VideoSettings.from_spec(spec, vae="v", dtype="float32"),
        text=TextSettings(text_encoder="t", tokenizer="t", dtype="float32", max_sequence_length=text[0]),
    )  # fmt: skip
    cache, draw = Cache(folder, settings), np.random.default_rng(0)
    clips = tuple(
        Clip(row=i + 1, name=f"{i}.mp4", caption=f"caption {i}", content=f"{i:064x}", spec=spec, state="used")
        for i in range(count)
    )
    for clip in clips:
        mean, logvar = (draw.standard_normal(latents, dtype=np.float32) for _ in range(2))
        cache.write_clip(clip, mean=mean, logvar=logvar)
        cache.write_caption(clip.caption, draw.standard_normal(text, dtype=np.float32))
    cache.write_caption("", np.zeros(text, np.float32))
    return cache.publish(Manifest(clips=clips, source="benchmark"))


def their_files(folder: Path, index: CacheIndex) -> PtFiles:
    """Return the same samples as the originals store them."""
    source = CacheSource(index)

    def samples() -> Iterator[tuple[str, Tensor, Tensor]]:
        for name in (clip.id for clip in index.clips):
            sample = source.sample(Pick(name, 0), Reading(seed=0))
            moments = [to_tensor(sample[key]).float().transpose(0, 1) for key in ("mean", "logvar")]
            yield name, torch.cat(moments).contiguous(), to_tensor(sample["prompt_embeds"])

    return PtFiles(folder, samples())


def their_epoch(loader: DataLoader, *, draws: bool) -> Callable[[], int]:
    """Return what reads every sample once."""

    def epoch() -> int:
        count = 0
        for batch in loader:
            moments = batch["moments"].bfloat16().transpose(1, 2)  # [B, F, 2C, h, w]
            mean, _ = moments.chunk(2, dim=2)
            batch["prompt_embeds"].bfloat16()
            if draws:
                torch.randn(mean.shape), torch.randn(mean.shape)
            count += len(mean)
        return count

    return epoch


def our_epoch(index: CacheIndex, draws: Draws) -> Callable[[], int]:
    """Return what reads every sample once."""
    source = CacheSource(index)
    sampler = Sampler(source.buckets, batch_size=1, seed=0, buckets=source.buckets)
    loader = Loader(source, sampler, draws, num_workers=2)

    def epoch() -> int:
        count = 0
        for batch in loader.batches(0, len(sampler)):
            tensors = {key: to_tensor(value) for key, value in batch.items() if isinstance(value, np.ndarray)}
            count += len(tensors["mean"])
        return count

    return epoch


def real_shapes(folder: Path) -> Iterator[Ratio]:
    """Compare bytes a sample and samples a second."""
    spec = ClipSpec(num_frames=49, height=480, width=720, fps=8)
    index = write_cache(folder / "ours", NUM_SAMPLES, spec=spec, latents=(13, 16, 60, 90), text=(226, 4096))
    theirs = their_files(folder / "theirs", index)
    loader = DataLoader(theirs, batch_size=1, shuffle=True, num_workers=2, persistent_workers=True)
    sizes = [_bytes(path for clip in index.clips for path in (clip.clip_file, clip.text_file))]
    sizes.append(_bytes((folder / "theirs").glob("*.pt")))
    less = sizes[1] / sizes[0]
    note = f"{sizes[1] / NUM_SAMPLES / 1e6:.1f} MB a sample become {sizes[0] / NUM_SAMPLES / 1e6:.1f} MB"
    yield Ratio(name="bytes.loader", median=less, low=less, high=less, target=1 / 0.55, note=note)
    for name, draws, target in (("cpu.loader", Reading(seed=0), 3.0), ("cpu.loader.draws", Draws(seed=0), None)):
        baseline, ours = their_epoch(loader, draws=target is None), our_epoch(index, draws)
        assert baseline() == ours() == NUM_SAMPLES
        note = "samples/s, reading alone" if target else "samples/s, with all noise drawn"
        yield interleave(name, baseline, ours, target=target, num_rounds=7, note=note)


def _bytes(paths: Any) -> int:
    return sum(path.stat().st_size for path in paths)


def tiny_training(folder: Path) -> Ratio:
    """Compare training steps without and with the loader."""
    model_folder = resolve_model("tiny-t2v")
    config = TransformerConfig.from_folder(model_folder / "transformer")
    spec = ClipSpec(num_frames=9, height=64, width=64, fps=8)
    shape = (3, config.in_channels, 8, 8)
    text = (config.max_text_seq_length, config.text_embed_dim)
    index = write_cache(folder / "tiny", NUM_SAMPLES, spec=spec, latents=shape, text=text)
    source = CacheSource(index)
    sampler = Sampler(source.buckets, batch_size=TINY_BATCH, seed=0, buckets=source.buckets)
    loader = Loader(source, sampler, Draws(seed=0, patch_size_t=config.patch_size_t), num_workers=2)
    transformer = CogVideoXTransformer.from_folder(model_folder / "transformer", dtype=torch.float32, device=CPU)
    objective = Objective(
        transformer.requires_grad_(True).train(), alphas_cumprod=alphas_cumprod(SchedulerConfig()),
        scales=Scales(video=1.0, image=1.0), device=CPU, dtype=torch.float32,
    )  # fmt: skip
    update = Update(
        transformer.named_parameters(), dtype=torch.float32, device=CPU, betas=(0.9, 0.95), eps=1e-8,
        weight_decay=1e-4, max_grad_norm=1.0, stochastic_bf16=False, seed=0,
    )  # fmt: skip

    def train(batches: Any) -> None:
        for batch in batches:
            objective(to_device(batch, CPU)).mean().backward()
            update.step(1e-6)

    ready = list(loader.batches(0, 8))
    return interleave(
        "cpu.loader.tiny", lambda: train(islice(cycle(ready), NUM_STEPS)), lambda: train(loader.batches(0, NUM_STEPS)),
        target=0.95, num_rounds=7, num_threads=1, note="a step with batches at hand over one with the loader",
    )  # fmt: skip


def run() -> Iterator[Ratio]:
    """Yield all ratios of this suite."""
    with tempfile.TemporaryDirectory() as name:
        yield from real_shapes(Path(name))
        yield tiny_training(Path(name))
