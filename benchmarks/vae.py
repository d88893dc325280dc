"""`cpu.vae.*` and `count.vae.*`: our VAE against diffusers' AutoencoderKLCogVideoX.

Timed: 5 latents of 20x24 to 17 frames of 160x192 and back, channels (32, 64, 64, 128), float32. Peak memory is what
one decode adds to a process that holds the model, each in a process of its own. The cache is counted, not timed:
what the published VAE keeps between frame batches at 480x720 in bfloat16, on the meta device.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from benchmarks.interleave import Ratio, interleave
from cogvideox_factory.models import VaeConfig
from cogvideox_factory.torch_engine.border import to_array
from cogvideox_factory.torch_engine.vae import CogVideoXVAE

CONFIG = VaeConfig(block_out_channels=(32, 64, 64, 128))
LATENTS = (1, 5, 16, 20, 24)
PIXELS = (1, 3, 17, 160, 192)
LIMIT = 1e-4


def models() -> tuple[AutoencoderKLCogVideoX, CogVideoXVAE]:
    """Return diffusers' model and ours with the same weights, frozen."""
    torch.manual_seed(0)
    theirs = AutoencoderKLCogVideoX.from_config(CONFIG.to_dict())
    assert isinstance(theirs, AutoencoderKLCogVideoX)
    theirs.eval().requires_grad_(False)
    ours = CogVideoXVAE(CONFIG).requires_grad_(False)
    ours.load_arrays((name, to_array(value)) for name, value in theirs.state_dict().items())
    return theirs, ours


def decoders() -> dict[str, Callable[[], Tensor]]:
    """Return the two ways to decode the same latents."""
    theirs, ours = models()
    latents = torch.randn(LATENTS, generator=torch.Generator().manual_seed(1))
    return {
        "theirs": lambda: theirs.decode(latents.transpose(1, 2), return_dict=False)[0],
        "ours": lambda: ours.decode(latents),
    }


def encoders() -> dict[str, Callable[[], Tensor]]:
    """Return the two ways to encode the same pixels."""
    theirs, ours = models()
    pixels = torch.rand(PIXELS, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return {
        "theirs": lambda: theirs.encode(pixels, return_dict=False)[0].mean.transpose(1, 2),
        "ours": lambda: ours.encode(pixels)[0],
    }


def speed(name: str, ways: dict[str, Callable[[], Tensor]], *, target: float) -> Ratio:
    """Compare the results, then time the two turn by turn."""
    error = (ways["theirs"]() - ways["ours"]()).abs().max()
    assert error < LIMIT, f"{name}: results differ by {error:.2g}"
    return interleave(name, ways["theirs"], ways["ours"], target=target, num_rounds=5, note=f"differ by {error:.1g}")


def peak_bytes(who: str) -> int:
    """Return what a decode adds to the peak memory of this process; run in a process of its own."""
    torch.set_num_threads(2)
    decode = decoders()[who]
    before = _high_water()
    decode()
    return _high_water() - before


def _high_water() -> int:
    """Return the peak resident bytes of this program; `getrusage` would count what its parent had before it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def peak_memory() -> Ratio:
    """Compare the peaks of one decode, diffusers' over ours."""
    peaks = {}
    for who in ("theirs", "ours"):
        command = [sys.executable, "-m", "benchmarks.vae", who]
        peaks[who] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    note = f"peak of {peaks['theirs'] / 1e6:.0f} MB becomes {peaks['ours'] / 1e6:.0f} MB"
    return _count("mem.vae.decode", peaks["theirs"], peaks["ours"], target=1 / 0.7, note=note)


def cache_bytes() -> Ratio:
    """Compare what the published decoder keeps between frame batches at 60x90 latents."""
    with torch.device("meta"):
        theirs, ours = AutoencoderKLCogVideoX().bfloat16(), CogVideoXVAE(VaeConfig()).bfloat16()
    latents = torch.empty(1, 5, 16, 60, 90, dtype=torch.bfloat16, device="meta")
    kept: dict[str, int] = {"theirs": 0, "ours": 0}

    def look(who: str, count: Callable[[Any, Any], int]) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, arguments: Any, out: Any) -> None:
            kept[who] = max(kept[who], count(arguments, out))

        return hook

    theirs.decoder.register_forward_hook(look("theirs", lambda _, out: _tree_bytes(out[1])))
    ours.decoder.register_forward_hook(look("ours", lambda arguments, _: arguments[1].cache_bytes()))
    theirs.decode(latents.transpose(1, 2))
    ours.decode(latents)
    note = f"{kept['theirs'] / 1e9:.2f} GB become {kept['ours'] / 1e9:.2f} GB"
    return _count("count.vae.cache_bytes", kept["theirs"], kept["ours"], target=4.8 / 2.8, note=note)


def _tree_bytes(cache: Any) -> int:
    if isinstance(cache, dict):
        return sum(_tree_bytes(value) for value in cache.values())
    return 0 if cache is None else cache.numel() * cache.element_size()


def _count(name: str, theirs: int, ours: int, *, target: float, note: str) -> Ratio:
    ratio = theirs / ours
    return Ratio(name=name, median=ratio, low=ratio, high=ratio, target=target, note=note)


@torch.no_grad()
def run() -> list[Ratio]:
    """Return all ratios of this suite."""
    return [
        speed("cpu.vae.decode", decoders(), target=1.3),
        speed("cpu.vae.encode", encoders(), target=1.1),
        peak_memory(),
        cache_bytes(),
    ]


if __name__ == "__main__":
    with torch.no_grad():
        print(peak_bytes(sys.argv[1]))
