"""The README.md beside exported weights: what they are, what they learnt and from how much, and how to use them.

It tells nothing of the machine it was made on: no paths, and of the settings only those that shape the result.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import yaml

from cogvideox_factory.card_facts import HUB_ID, Base, Card, RunFacts, base_of, read_run
from cogvideox_factory.data.picture import write_png
from cogvideox_factory.errors import DataError
from cogvideox_factory.evaluate import read_video
from cogvideox_factory.metrics import say
from cogvideox_factory.publish import publish_text
from cogvideox_factory.report.curve import curve
from cogvideox_factory.report.strip import rows_of_frames

CARD, LOSS, SAMPLES = "README.md", "loss.png", "samples.png"
_CALL = ("num_frames", "height", "width", "max_sequence_length")
_USUAL_TOKENS = 226
"""What diffusers pads a prompt to unless it is told."""
_TOLD = {
    "text": ("max_sequence_length",),
    "data": ("fps_policy", "crop", "windows", "buckets", "trigger_word"),
    "lora": ("rank", "alpha", "use_rslora", "use_dora", "target_modules", "base"),
    "train": (
        "method", "steps", "batch_size", "gradient_accumulation", "optimizer", "learning_rate", "schedule",
        "warmup_steps", "beta1", "beta2", "weight_decay", "max_grad_norm", "master_weights", "caption_dropout",
        "image_dropout", "image_noise", "ema_decay",
    ),
    "run": ("seed", "dtype"),
}  # fmt: skip
"""Settings that a card shows; none of them is a path."""


def describe_run(run: Path, folder: Path) -> None:
    """Lay a card beside the weights of a finished run in `folder`, which becomes its `final/`.

    Raises:
        StorageError: the disk is full, read-only or failing.
    """
    facts = read_run(run)
    settings, base = facts.settings, base_of(facts.settings["model"]["path"])
    is_lora = settings["train"]["method"] == "lora"
    write_card(
        folder,
        Card(
            name=run.absolute().name, form="diffusers lora" if is_lora else "transformer",
            files=[path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.safetensors"))], base=base,
            task=settings["task"], run=facts, rank=settings["lora"]["rank"] if is_lora else None,
            is_dora=settings["lora"]["use_dora"],
        ),
    )  # fmt: skip


def write_card(folder: Path, card: Card) -> None:
    """Write README.md, and loss.png and samples.png where the run has them, into `folder`.

    Raises:
        StorageError: the disk is full, read-only or failing.
    """
    shown = {}
    if card.run and card.run.curves:
        shown[LOSS] = curve(card.run.curves, x_label="steps")
    if card.run and (videos := _read_videos(card.run.samples)):
        shown[SAMPLES] = rows_of_frames(videos)
    for name, picture in shown.items():
        write_png(folder / name, picture)
    publish_text(folder / CARD, render(card, pictures=list(shown)))


def render(card: Card, *, pictures: Sequence[str] = ()) -> str:
    """Return the text of a card; `pictures` lie beside it."""
    front = yaml.safe_dump(_front_matter(card), sort_keys=False, allow_unicode=True)
    parts = [f"---\n{front}---", f"# {card.name.split('/')[-1]}", f"{card.about} Made with CogVideoX Factory."]
    if card.run and SAMPLES in pictures:
        prompts = card.run.settings["validation"]["prompts"][: len(card.run.samples)]
        parts += [f"![First, middle and last frame of sample videos]({SAMPLES})"]
        quoted = [f"“{' '.join(prompt.split())}”" for prompt in prompts]
        parts += [f"From above: {'; '.join(quoted)}."]
    parts += ["## How to use it", *_usage(card)]
    if card.run:
        parts += ["## What it learnt from", _table(_learnt(card.run))]
        parts += [f"![Loss over steps]({LOSS})"] if LOSS in pictures else []
        told = yaml.safe_dump(_told(card.run.settings), sort_keys=False, allow_unicode=True)
        parts += ["## Settings", f"```yaml\n{told}```"]
    parts += ["## Licence", _licence_text(card.base)]
    return "\n\n".join(parts) + "\n"


def _front_matter(card: Card) -> dict[str, Any]:
    pipeline = {"t2v": "text-to-video", "i2v": "image-to-video", None: None}[card.task]
    library = {"peft": "peft", "diffusers lora": "diffusers", "transformer": "diffusers"}.get(card.form)
    trigger = card.run.settings["data"].get("trigger_word") if card.run else None
    tags = ["cogvideox", *([pipeline] if pipeline else []), *([] if card.is_whole else ["lora"])]
    tags += ["comfyui"] if card.form.startswith("comfyui") else []
    front = {
        "base_model": card.base.hub_id, "base_model_relation": "finetune" if card.is_whole else "adapter",
        "library_name": library, "pipeline_tag": pipeline, "instance_prompt": trigger, "tags": tags,
    }  # fmt: skip
    if card.base.hub_id is None:
        del front["base_model_relation"]
    return {key: value for key, value in front.items() if value is not None} | dict(card.base.licence)


def _usage(card: Card) -> list[str]:
    """Return paragraphs; the Python in them runs as it is where the base model is at hand."""
    if card.form == "comfyui lora":
        return [
            f"Put `{card.files[0]}` into `ComfyUI/models/loras` and load it with the node *Load LoRA* (model only), "
            "over a CogVideoX model loaded by ComfyUI itself. Strength 1 is as it was trained. "
            "For the nodes of ComfyUI-CogVideoXWrapper export with `--to diffusers --alpha baked`."
        ]
    if card.form == "comfyui model":
        return [
            f"Put `{card.files[0]}` into `ComfyUI/models/diffusion_models` and load it with *Load Diffusion Model*."
        ]
    flag = {"transformer": "--model.transformer"}.get(card.form, "--generate.lora")
    task = card.task or "t2v"
    prompt = _prompt(card)
    image = " --generate.image first.png" if task == "i2v" else ""
    base, name = f"--task {task} --model.path {quote(card.base.name)}", quote(card.name)
    command = f'cogvideox generate {base} {flag} {name}{image} --generate.prompt "{prompt}"'
    return [
        f"```python\n{_python(card, prompt)}```",
        f"Or with CogVideoX Factory, after `hf download {card.name} --local-dir {card.name}`:"
        if HUB_ID.fullmatch(card.name) else "Or with CogVideoX Factory:",
        f"```sh\n{command}\n```",
    ]  # fmt: skip


def _python(card: Card, prompt: str) -> str:
    is_i2v, facts = card.task == "i2v", card.base.facts
    name, base, file = (json.dumps(text, ensure_ascii=False) for text in (card.name, card.base.name, card.files[0]))
    pipeline = "CogVideoXImageToVideoPipeline" if is_i2v else "CogVideoXPipeline"
    dtype = f"torch.{facts.dtype if facts else 'bfloat16'}"
    imports = ["import torch", f"from diffusers import {pipeline}"]
    load = [f"pipe = {pipeline}.from_pretrained({base}, torch_dtype={dtype})"]
    if card.form == "transformer":
        imports[1] = f"from diffusers import {pipeline}, CogVideoXTransformer3DModel"
        load = [
            f'transformer = CogVideoXTransformer3DModel.from_pretrained({name}, subfolder="transformer",',
            f"                                                          torch_dtype={dtype})",
            f"pipe = {pipeline}.from_pretrained({base}, transformer=transformer, torch_dtype={dtype})",
        ]
    elif card.form == "peft":
        imports += ["from peft import PeftModel"]
        load += [f"pipe.transformer = PeftModel.from_pretrained(pipe.transformer, {name})"]
    else:
        load += [f"pipe.load_lora_weights({name}, weight_name={file})"]
    imports += [f"from diffusers.utils import export_to_video{', load_image' if is_i2v else ''}"]
    load += ['pipe.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")']
    sizes = _sizes(card)
    call = [*(['load_image("first.png")'] if is_i2v else []), f'prompt="{prompt}"']
    call += [f"{name}={sizes[name]}" for name in _CALL if name in sizes]
    make = [f"video = pipe({', '.join(call)}).frames[0]", f'export_to_video(video, "video.mp4", fps={sizes["fps"]:g})']
    return "\n".join([*imports, "", *load, *make]) + "\n"


def _sizes(card: Card) -> dict[str, Any]:
    names = ("num_frames", "height", "width", "fps")
    if card.run:
        tokens = card.run.settings["text"]["max_sequence_length"]
        longer = {} if tokens == _USUAL_TOKENS else {"max_sequence_length": tokens}
        return {name: card.run.settings["data"][name] for name in names} | longer
    facts = card.base.facts
    return {name: getattr(facts, name) for name in names} if facts else {"fps": 8}


def _prompt(card: Card) -> str:
    """Return a prompt for the snippets: one of the run's own, or its trigger word in a sentence."""
    settings = card.run.settings if card.run else {"validation": {"prompts": []}, "data": {}}
    own, trigger = settings["validation"]["prompts"], settings["data"].get("trigger_word")
    text = own[0] if own else f"{trigger} a red fox in the snow" if trigger else "a red fox in the snow"
    return re.sub(r'[\\"$`\n\r]', " ", text)  # it stands in quotes, in Python and in a shell


def _learnt(run: RunFacts) -> list[tuple[str, str]]:
    settings, total = run.settings, sum(run.counts.values())
    data, train = settings["data"], settings["train"]
    task = {"t2v": "text to video", "i2v": "image to video"}[settings["task"]]
    counts = ", ".join(f"{count} {state}" for state, count in run.counts.items())
    batch = train["batch_size"] * train["gradient_accumulation"]
    rows = [
        ("task", f"{task}, {'LoRA' if train['method'] == 'lora' else 'all weights'}"),
        ("clips", f"{total}: {counts}" if total else "not known"),
        ("size", f"{data['num_frames']} frames of {data['height']} x {data['width']} pixels, {data['fps']:g} a second"),
        ("steps", f"{run.step} of {batch} clip{'s' if batch > 1 else ''}"),
    ]
    if data.get("buckets"):
        rows[2] = ("size", f"buckets up to {rows[2][1]}")
    rows += [("trigger word", data["trigger_word"])] if data.get("trigger_word") else []
    rows += [(name, f"{points[-1][1]:.4f} at step {points[-1][0]}") for name, points in run.curves.items()]
    return rows


def _told(settings: Mapping[str, Any]) -> dict[str, Any]:
    told = {}
    for section, names in _TOLD.items():
        if section != "lora" or settings["train"]["method"] == "lora":
            told[section] = {name: settings[section][name] for name in names if name in settings[section]}
    buckets = told["data"].get("buckets")
    if buckets not in (None, "auto"):  # a file's name says nothing elsewhere
        told["data"]["buckets"] = "from a file"
    return told


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = [(name, " ".join(text.replace("|", "\\|").split())) for name, text in rows]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in cells)])


def _licence_text(base: Base) -> str:
    if not base.licence:
        return f"That of the base model ({base.short}), and what the clips allow."
    name = base.licence.get("license_name", base.licence["license"])
    link = base.licence.get("license_link")
    return f"The base model's: {f'[{name}]({link})' if link else name}. The clips may set limits of their own."


def _read_videos(paths: Sequence[Path]) -> list[np.ndarray]:
    videos = []
    for path in paths:
        try:
            videos.append(read_video(path))
        except DataError as error:  # not worth an export
            say(f"not on the card: {error}")
    return videos
