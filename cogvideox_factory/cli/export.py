"""`cogvideox export`: what a run learnt, in the form another program reads, with a card beside it."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field

from cogvideox_factory.errors import FactoryError, MissingError
from cogvideox_factory.metrics import say

if TYPE_CHECKING:
    from cogvideox_factory.card_facts import Base, Task
    from cogvideox_factory.export import Source, Weights

DESCRIPTION = """Write what a run learnt in the form another program reads, with a model card beside it.
diffusers: a LoRA file, or a transformer folder. peft: an adapter folder. comfyui: one file with the names of ComfyUI's
own CogVideoX. merged: a LoRA folded into its base, as a transformer folder. The source is a run folder, one of its
checkpoints, a LoRA of anybody's in any of these forms, or a transformer folder."""


class Export(BaseModel):
    """Settings of an export."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    source: Annotated[str, tyro.conf.Positional]
    """Run folder, checkpoint, LoRA (file or folder) or transformer folder."""
    to: Literal["diffusers", "peft", "comfyui", "merged"]
    """The form."""
    out: str | None = None
    """Folder of the result. Default: beside the source, with the form behind its name (runs/mine-peft)."""
    overwrite: bool = False
    """Replace a folder that is there."""
    alpha: Literal["kept", "baked"] = "kept"
    """Of a LoRA. kept: where each form has it. baked: multiplied into the tensors, for readers that know no alpha."""
    weights: Literal["auto", "raw", "average"] = "auto"
    """Of a checkpoint: as they were at that step, or their moving average. auto: the average, if the run keeps one."""
    dtype: Literal["kept", "float32", "bfloat16", "float16"] = "kept"
    """Of the tensors."""
    base: str | None = None
    """The model it belongs to, a folder or a hub id: what a LoRA is merged into, and what the card names. Default: the
    run's."""
    strength: Annotated[float, Field(gt=-100, lt=100)] | None = None
    """merged: how strongly the LoRA is folded in (default 1, as it was trained)."""
    max_shard_gb: Annotated[float, Field(gt=0)] | None = None
    """Transformer folders: largest file (default 2). As much memory is needed."""
    push_to_hub: str | None = None
    """Upload the result to this repository of the Hugging Face hub, in one commit; the token is that of `hf auth login`
    or HF_TOKEN."""
    public: bool = False
    """push_to_hub: let everybody see a repository that is made for it. Without it only you do."""


def run(argv: list[str]) -> None:
    """Parse, find, convert, publish, and upload if asked to."""
    options = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
    ask = tyro.cli(Export, args=argv, prog="cogvideox export", description=DESCRIPTION, config=options)
    from cogvideox_factory import export, hub
    from cogvideox_factory.card_facts import base_of
    from cogvideox_factory.publish import publish_folder, replace_folder

    source = export.find_source(Path(ask.source).expanduser())
    settings = _settings_of(source)
    base = ask.base or settings.get("model", {}).get("path", "")
    out = Path(ask.out) if ask.out else _beside(Path(ask.source), ask.to)
    weights = _weights_of(source, ask)
    _check(ask, source, weights)
    if out.exists() and not ask.overwrite:
        raise FactoryError(f"{out} is there already. Give another --out, or --overwrite True.")
    if out.exists():
        export.require_replaceable(out, source.path)
    repository = hub.repository_of(ask.push_to_hub) if ask.push_to_hub else None
    publish = replace_folder if ask.overwrite else publish_folder
    with publish(out) as folder:
        files = export.write(
            folder, weights, target=ask.to, name=out.name, baked=ask.alpha == "baked",
            dtype=None if ask.dtype == "kept" else ask.dtype, base=base_of(base).hub_id,
            base_transformer=_transformer_of(base, settings) if ask.to == "merged" else None,
            strength=1.0 if ask.strength is None else ask.strength,
            max_shard_bytes=round((ask.max_shard_gb or 2) * 10**9),
        )  # fmt: skip
        _write_card(folder, files, ask, source, weights, base_of(base), name=repository or out.name)
    say(f"{ask.to}: {', '.join(files)} and README.md in {out}")
    if repository:
        say(f"uploaded to {hub.push_folder(out, repository, public=ask.public)}")


def _beside(source: Path, to: str) -> Path:
    source = source.expanduser().absolute()
    return source.with_name(f"{source.stem if source.is_file() else source.name}-{to}")


def _settings_of(source: "Source") -> dict[str, Any]:
    from cogvideox_factory.recipe import read_recipe

    return read_recipe(source.run / "config.yaml").model_dump() if source.run else {}


def _check(ask: Export, source: "Source", weights: "Weights") -> None:
    """Refuse forms that a source cannot have, and settings that would do nothing.

    Raises:
        FactoryError: the first of them.
    """
    is_lora, merges = weights.lora is not None, ask.to == "merged"
    if not is_lora and ask.to in ("peft", "merged"):
        what = "is for LoRAs" if ask.to == "peft" else "folds a LoRA in"
        raise FactoryError(f"--to {ask.to} {what}; {ask.source} is a whole transformer. Use diffusers or comfyui.")
    for flag, is_set, applies, why in (
        ("--alpha baked", ask.alpha == "baked", is_lora and not merges, "a LoRA that stays one"),
        (f"--weights {ask.weights}", ask.weights != "auto", source.is_checkpoint, "a checkpoint"),
        ("--strength", ask.strength is not None, merges, "--to merged"),
        ("--max-shard-gb", ask.max_shard_gb is not None, merges or (not is_lora and ask.to == "diffusers"),
         "a transformer folder"),
        ("--public", ask.public, ask.push_to_hub is not None, "--push-to-hub"),
    ):  # fmt: skip
        if is_set and not applies:
            raise FactoryError(f"{flag} has no effect here, it is for {why}; remove it")


def _weights_of(source: "Source", ask: Export) -> "Weights":
    from cogvideox_factory.export import Weights, transformer_weights

    if source.is_checkpoint:
        return _reader_of(source.path)(source.path, asked=ask.weights, base=ask.base)
    return transformer_weights(source.transformer) if source.transformer else Weights(lora=source.lora)


def _reader_of(checkpoint: Path) -> Callable[..., "Weights"]:
    """Return what reads a checkpoint: the engine that wrote it.

    Raises:
        MissingError: it takes torch, which is not here.
    """
    from cogvideox_factory.checkpoints import read_state

    engine = read_state(checkpoint).get("settings", {}).get("engine", "torch")
    if engine == "mindspore":
        from cogvideox_factory.mindspore_engine import checkpoint_weights

        return checkpoint_weights.read
    if find_spec("torch") is None:
        raise MissingError(
            f"{checkpoint} is of the PyTorch engine, whose checkpoints take torch to read, and it is not installed "
            "here. Install: pip install -c constraints.txt -e . Or export the run folder once it is finished."
        )
    from cogvideox_factory.torch_engine import checkpoint_weights

    return checkpoint_weights.read


def _transformer_of(base: str, settings: dict[str, Any]) -> Path:
    """Return the transformer a LoRA is merged into: `base`'s, or the one its run had in that one's place."""
    from cogvideox_factory.weights import resolve_model, resolve_transformer

    if not base:
        raise FactoryError("--to merged into which model? This LoRA does not tell; give --base FOLDER or a hub id.")
    own = settings.get("model", {})
    if base == own.get("path") and own.get("transformer"):
        return resolve_transformer(own["transformer"])
    folder = resolve_model(base, revision=own.get("revision") if base == own.get("path") else None,
                           subfolders=("transformer",))  # fmt: skip
    return resolve_transformer(folder)


def _write_card(
    folder: Path, files: list[str], ask: Export, source: "Source", weights: "Weights", base: "Base", *, name: str
) -> None:
    from cogvideox_factory.card_facts import Card, Form, read_run
    from cogvideox_factory.checkpoints import read_state
    from cogvideox_factory.model_card import write_card

    step = read_state(source.path)["step"] if source.is_checkpoint else None
    facts = read_run(source.run, step=step) if source.run else None
    is_lora = weights.lora is not None and ask.to != "merged"
    forms: dict[tuple[bool, str], Form] = {
        (True, "diffusers"): "diffusers lora", (True, "peft"): "peft", (True, "comfyui"): "comfyui lora",
        (False, "comfyui"): "comfyui model",
    }  # fmt: skip
    task: Task | None = facts.settings["task"] if facts else None
    if task is None and (weights.config or base.facts):
        config = weights.config or (base.facts.transformer if base.facts else None)
        task = "i2v" if config and config.is_image_to_video else "t2v"
    card = Card(
        name=name, form=forms.get((is_lora, ask.to), "transformer"), files=files, base=base, task=task,
        rank=weights.lora.rank if weights.lora else None, is_dora=bool(weights.lora and weights.lora.use_dora),
        run=facts,
    )  # fmt: skip
    write_card(folder, card)
