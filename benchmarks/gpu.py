"""`python -m benchmarks gpu`: training steps of the published models on one card, ours beside diffusers' in one loop.

CogVideoX-5B at 49 x 480 x 720 and CogVideoX1.5-5B at 77 x 768 x 1360, random weights, batch 1, bfloat16, LoRA (rank 64
on attention) and SFT (bfloat16 states, rounded stochastically). Both models start from the same numbers, go through the
same objective and the same update, and keep what their own gradient checkpointing keeps: ours attention outputs, theirs
block inputs. VAE, text encoder and data are outside: a step is forward, backward, clipping and optimizer.

Ours runs with products in bfloat16 and, where the card has it, in float8 (`train.fp8=rowwise`); as it is and, on
CUDA cards, compiled.

TFLOP/s are of the model (`plan.flops`): three forward passes a step (for LoRA two in linear layers), with no credit for
recomputing.
`--tiny` runs it all with a small model on whatever there is, to see that it runs.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox_factory.errors import MissingError
from cogvideox_factory.models import PUBLISHED, TransformerConfig, tiny_facts
from cogvideox_factory.plan.flops import training_flops
from cogvideox_factory.torch_engine.attention import backend_name
from cogvideox_factory.torch_engine.compilation import compile_blocks
from cogvideox_factory.torch_engine.device import peak_memory, require_compiler, require_float8, reset_peak_memory
from cogvideox_factory.torch_engine.layout import diffusers_names
from cogvideox_factory.torch_engine.linear import set_float8
from cogvideox_factory.torch_engine.lora import add_lora
from cogvideox_factory.torch_engine.optim import Update
from cogvideox_factory.torch_engine.positions import make_positions
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
RANK, NUM_STEPS, DTYPE = 64, 5, torch.bfloat16
LIMIT = 0.02
"""How far the first losses may be apart, relatively: all round everything to 8 bits, in another order, or products of 4
bits and sums of thousands."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, a shape and what is trained."""

    name: str
    config: TransformerConfig
    latents: tuple[int, int, int]
    """Frames, height and width."""
    text_length: int
    method: str

    @property
    def video_tokens(self) -> int:
        """Of the joint stream, those that are no text."""
        frames, height, width = self.latents
        return frames // (self.config.patch_size_t or 1) * (height // 2) * (width // 2)

    @property
    def tokens(self) -> int:
        """Of the joint stream."""
        return self.text_length + self.video_tokens

    @property
    def flops(self) -> int:
        """Of a step, recomputation apart."""
        config, is_lora = self.config, self.method == "lora"
        return training_flops(
            config, video_tokens=self.video_tokens, text_length=self.text_length, method="lora" if is_lora else "full",
            adapter_weights=config.num_layers * len(TARGETS) * 2 * RANK * config.width if is_lora else 0,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one model took for one case."""

    case: Case
    who: str
    seconds: float | None
    """A step, the median; None where memory did not do."""
    peak_bytes: int

    @property
    def row(self) -> str:
        """One line of the second table in README.md."""
        name = f"| `{self.case.name}` | {self.who} | {self.case.tokens:,} "
        if self.seconds is None:
            return f"{name}| out of memory | | |"
        return (
            f"{name}| {self.seconds:.3g} | {self.case.flops / self.seconds / 1e12:.3g} | {self.peak_bytes / 1e9:.3g} |"
        )


def cases(*, tiny: bool) -> list[Case]:
    """Return the workloads, LoRA before SFT."""
    found = []
    for name, variant, latents, text in (
        ("5b.49", "cogvideox-5b", (13, 60, 90), 226),
        ("15.77", "cogvideox1.5-5b", (20, 96, 170), 224),
    ):
        config = PUBLISHED[variant].transformer
        if tiny:
            latents, text, config = (4, 8, 12), 16, tiny_facts(variant).transformer
        for method in ("lora", "sft"):
            case = Case(name=f"gpu.{method}.{name}", config=config, latents=latents, text_length=text, method=method)
            found.append(replace(case, name=case.name + ".tiny") if tiny else case)
    return found


def fill(target: Tensor, name: str, place: int) -> None:
    """Set a parameter by its diffusers `name`, the `place`-th, alike for both models: variance 1 / inputs."""
    if target.dim() == 1:
        target.fill_(1.0 if "norm" in name.split(".")[-2] and name.endswith("weight") else 0.0)
        return
    draw = torch.Generator(target.device).manual_seed(place)
    target.copy_(torch.randn(target.shape, generator=draw, device=target.device) * target[0].numel() ** -0.5)


@torch.no_grad()
def our_model(case: Case, device: torch.device, *, float8: bool = False, compiled: bool = False) -> nn.Module:
    """Return our model, ready to train."""
    with torch.device("meta"):
        model = CogVideoXTransformer(case.config)
    model.to(DTYPE).to_empty(device=device)
    own = model.state_dict()
    for place, (name, slot) in enumerate(sorted(diffusers_names(case.config).items())):
        fill(own[slot.name][slot.start : slot.stop].view(slot.shape), name, place)
    model.set_checkpointing("save_attention")
    if case.method == "lora":
        add_lora(model, rank=RANK, alpha=RANK, target_modules=TARGETS, seed=0)
    else:
        model.requires_grad_(True)
    if float8:
        set_float8(model.transformer_blocks, "rowwise")
    if compiled:
        compile_blocks(model, "default", num_shapes=1)
    return model


@torch.no_grad()
def their_model(case: Case, device: torch.device) -> nn.Module:
    """Return diffusers' model, ready to train."""
    from diffusers import CogVideoXTransformer3DModel
    from peft import LoraConfig

    with torch.device("meta"):
        model = CogVideoXTransformer3DModel.from_config(case.config.to_dict())
    assert isinstance(model, CogVideoXTransformer3DModel)
    model.to(DTYPE).to_empty(device=device)
    own = model.state_dict()
    for place, name in enumerate(sorted(diffusers_names(case.config))):
        fill(own[name], name, place)
    model.enable_gradient_checkpointing()
    if case.method == "lora":
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights=True, target_modules=TARGETS))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model


def caller(model: nn.Module, case: Case, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return (latents, prompt, timesteps) -> v for either model, its positions made once."""
    frames, height, width = case.latents
    positions = make_positions(case.config, frames, height, width, case.text_length, device, DTYPE)
    if isinstance(model, CogVideoXTransformer):
        return lambda latents, prompt, timesteps: model(latents, prompt, timesteps, positions=positions)
    assert positions.rotary is not None
    rotary = tuple(table[case.text_length :, 0].repeat_interleave(2, dim=-1) for table in positions.rotary)
    return lambda latents, prompt, timesteps: model(
        latents, prompt, timesteps, image_rotary_emb=rotary, return_dict=False
    )[0]


def models(device: torch.device) -> dict[str, Callable[[Case, torch.device], nn.Module]]:
    """Return what is measured on `device`, by name; what it has not got is said."""
    kinds = {"ours": {}}
    if _has(require_float8, device):
        kinds["ours, float8"] = {"float8": True}
    if device.type == "cuda" and _has(require_compiler, device):
        kinds |= {name.replace("ours", "ours, compiled"): {"compiled": True, **kind} for name, kind in kinds.items()}
    return {name: partial(our_model, **kind) for name, kind in kinds.items()} | {"diffusers": their_model}


def _has(require: Callable[[torch.device], None], device: torch.device) -> bool:
    try:
        require(device)
    except MissingError as error:
        print(f"gpu: left out: {error}")
        return False
    return True


def measure(
    case: Case, who: str, make: Callable[[Case, torch.device], nn.Module], device: torch.device
) -> tuple[Row, float]:
    """Return what `NUM_STEPS` steps of one model took, after one that is not counted, and the first step's loss."""
    reset_peak_memory(device)
    loss = float("nan")
    try:
        loss, seconds = _time(make(case, device).train(), case, device)
    except torch.OutOfMemoryError:
        seconds = None
    row = Row(case=case, who=who, seconds=seconds, peak_bytes=peak_memory(device))
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()
    return row, loss


def _time(model: nn.Module, case: Case, device: torch.device) -> tuple[float, float]:
    frames, height, width = case.latents
    draw = torch.Generator(device).manual_seed(0)
    shape = (1, frames, case.config.in_channels, height, width)
    latents, target = (torch.randn(shape, generator=draw, device=device).to(DTYPE) for _ in range(2))
    text = (1, case.text_length, case.config.text_embed_dim)
    prompt = torch.randn(text, generator=draw, device=device).to(DTYPE)
    timesteps = torch.tensor([500], device=device)
    call = caller(model, case, device)
    update = Update(
        model.named_parameters(), dtype=DTYPE, device=device, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4,
        max_grad_norm=1.0, stochastic_bf16=case.method == "sft", seed=0,
    )  # fmt: skip

    def step() -> float:
        loss = (call(latents, prompt, timesteps).float() - target.float()).square().mean()
        loss.backward()
        update.step(1e-5)
        return loss.item()  # waits for the device

    first, seconds = step(), []
    for _ in range(NUM_STEPS):
        start = perf_counter()
        step()
        seconds.append(perf_counter() - start)
    return first, median(seconds)


def heading(device: torch.device) -> str:
    """Return the card, the versions and the attention kernel, in one line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    cuda: Any = torch.version.cuda
    libraries = f"CUDA {cuda}, cuDNN {torch.backends.cudnn.version()}, " if device.type == "cuda" else ""
    kernel = backend_name(device, DTYPE)
    return (
        f"{name}, torch {version('torch')}, {libraries}diffusers {version('diffusers')}; our attention: {kernel}, "
        "diffusers': what torch prefers"
    )


def run(*, tiny: bool = False) -> Iterator[str]:
    """Yield the heading, then the rows as they come; without an accelerator, unless `tiny`, say why there are none.

    Raises:
        AssertionError: the two models' first losses differ.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type == "cpu" and not tiny:
        print("gpu: skipped, there is no accelerator; `python -m benchmarks gpu --tiny` runs it with a small model")
        return
    yield heading(device)
    entrants = models(device)
    for case in cases(tiny=tiny):
        losses = {}
        for who, make in entrants.items():
            row, losses[who] = measure(case, who, make, device)
            yield row.row
        theirs = losses["diffusers"]
        for who, loss in losses.items():
            apart = abs(loss - theirs) / theirs
            assert not apart > LIMIT, f"{case.name}: first losses of {who} and diffusers differ by {apart:.2g}"
