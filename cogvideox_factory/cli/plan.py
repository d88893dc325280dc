"""`cogvideox plan`: what a recipe needs on a machine, before there is one."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import BaseModel, ConfigDict, Field

from cogvideox_factory.cli.settings import parse_with
from cogvideox_factory.cli.train import SECTIONS
from cogvideox_factory.config import Config
from cogvideox_factory.config.section import Positive
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.metrics import duration, say
from cogvideox_factory.models import PUBLISHED, TransformerConfig, facts_for
from cogvideox_factory.plan.advice import UTILISATION, Choice, as_given, fitting, seconds
from cogvideox_factory.plan.machine import Machine
from cogvideox_factory.plan.memory import Training, in_words, need

DESCRIPTION = """Say what a training run needs in memory, part by part, and how long it takes, on cards you name, and
which settings make it fit. Calculated from numbers alone: no weights, no data set and no card are needed. Times are
arithmetic over a share of the card's peak (--utilisation) and know nothing of copies and communication."""

_SHOWN = 6


class Plan(BaseModel):
    """The machine."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    card: str = "H100"
    """Such as "RTX 4090", "A100", "H100", "Ascend910B2"; any name with --memory-gib."""
    cards: Positive = 1
    """Of that kind, on all machines together."""
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Of one card. Default: as it is sold, the larger where there are two (A100: 80)."""
    utilisation: Annotated[float, Field(gt=0, le=1)] = UTILISATION
    """Share of its peak that a card keeps up; a run prints its own as `mfu`."""
    clips: Positive | None = None
    """Clips of the data set, for epochs and the size of the cache."""
    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = None
    """Write what is said here as well."""


def run(argv: list[str]) -> None:
    """Parse, calculate, print.

    Raises:
        FactoryError: settings or a card that cannot be planned with.
    """
    config, ask = parse_with("plan", argv, sections=SECTIONS, description=DESCRIPTION, own=Plan)
    machine = Machine.of(ask.card, cards=ask.cards, memory_gib=ask.memory_gib)
    training, passes, shape = training_of(config, machine.cards)
    half = training.item_bytes == 2
    given = as_given(training, passes=passes)
    found = fitting(_for_each_group(training), machine, passes=passes)
    report = {
        "model": asdict(training.model), "shape": shape, "machine": asdict(machine),
        "recipe": _row(given, machine, config, half, ask.utilisation),
        "fits": need(training).device <= machine.memory,
        "choices": [_row(choice, machine, config, half, ask.utilisation) for choice in found],
    }  # fmt: skip
    _print(report, config, training, ask)
    if ask.json_file:
        from cogvideox_factory.publish import publish_text

        publish_text(Path(ask.json_file), json.dumps(report, indent=1) + "\n")
        say(f"report: {ask.json_file}")


def training_of(config: Config, cards: int) -> tuple[Training, int, str]:
    """Return the run of `config` on so many cards, its passes a step, and its shape in words.

    Raises:
        FactoryError: a model that is not known, or numbers that do not go together.
    """
    from cogvideox_factory import intake
    from cogvideox_factory.shapes import check_task, num_video_tokens

    model = transformer_of(config)
    check_task(config.task, model, source=config.model.transformer_config or config.model.path)
    shape = intake.training_shape(config, model)
    train, parallel = config.train, config.parallel
    if cards % parallel.sequence or cards % parallel.replicas:
        raise FactoryError(
            f"parallel.sequence={parallel.sequence} and parallel.replicas={parallel.replicas} do not divide "
            f"{cards} card(s)"
        )
    tokens, text = num_video_tokens(model, shape), intake.text_length(config, model)
    half, groups = config.run.dtype != "float32", cards // parallel.sequence
    training = Training(
        model=model, video_tokens=tokens, text_tokens=text, batch_size=-(-train.batch_size // groups),
        item_bytes=2 if half else 4, bfloat16=config.run.dtype != "float16", compiled=train.compile != "none",
        fp8=train.fp8 != "none", method=train.method, rank=config.lora.rank,
        adapted=tuple(config.lora.target_modules), use_dora=config.lora.use_dora, base=config.lora.base,
        checkpointing=train.checkpointing, checkpointing_layers=train.checkpointing_layers,
        activation_offload=train.activation_offload, swapped_blocks=train.swapped_blocks, optimizer=train.optimizer,
        optimizer_offload=train.optimizer_offload, stochastic=train.master_weights == "stochastic_bf16",
        average=train.ema_decay is not None, processes=cards, replicas=parallel.replicas, sequence=parallel.sequence,
        zero=parallel.zero,
    )  # fmt: skip
    size = f"{shape.num_frames} x {shape.height} x {shape.width} = {tokens:,} + {text} tokens"
    return training, train.gradient_accumulation, size


def transformer_of(config: Config) -> TransformerConfig:
    """Return the transformer that is planned for; a published one needs no download.

    Raises:
        FactoryError: no model is named, or it is nowhere.
    """
    if config.model.transformer_config:
        return TransformerConfig.from_file(Path(config.model.transformer_config))
    for facts in PUBLISHED.values():
        if facts.hub_id and facts.hub_id.lower() == config.model.path.lower() and not config.model.transformer:
            return facts.transformer
    from cogvideox_factory import intake, weights

    return intake.transformer_config(config, weights.resolve_model(config.model.path, revision=config.model.revision))


def _for_each_group(run: Training) -> Training:
    return replace(run, sequence=1, zero=0, replicas=1)


def _row(choice: Choice, machine: Machine, config: Config, half: bool, utilisation: float) -> dict[str, Any]:
    each = seconds(choice, machine, half=half, utilisation=utilisation)
    run = choice.run
    clips = run.processes // run.sequence * run.batch_size * config.train.gradient_accumulation
    return {
        "settings": list(choice.settings), "device_bytes": choice.device, "host_bytes": choice.host,
        "clips_a_step": clips, "tflop_a_card": choice.flops / 1e12, "seconds_a_step": each,
        "hours": each and each * config.train.steps / 3600, "clips_an_hour": each and clips / each * 3600,
    }  # fmt: skip


def _print(report: dict[str, Any], config: Config, training: Training, ask: Plan) -> None:
    machine, row = report["machine"], report["recipe"]
    what = f"LoRA of rank {config.lora.rank}" if config.train.method == "lora" else "full fine-tuning"
    name = facts_for(training.model).name if not config.model.transformer_config else config.model.transformer_config
    say(
        f"{what}, {config.task}, like {name} ({training.model.num_parameters / 1e9:.2f} billion), {report['shape']}, "
        f"{row['clips_a_step']} clip(s) a step"
    )
    peak = machine["peak"]
    known = f", {peak[1]:g} TFLOP/s in half precision" if peak else ", of unknown speed"
    say(f"{machine['cards']} x {machine['card']}: {machine['memory'] / 2**30:.1f} GiB to fill{known}")
    say(f"as it is: {in_words(need(training))}: " + ("fits" if report["fits"] else "DOES NOT FIT"))
    groups = ask.cards // training.sequence
    if config.train.batch_size % groups:
        size = groups * training.batch_size
        say(f"--train.batch-size {size}, for {groups} groups of cards that take clips of their own")
    _say_time(row, config, ask)
    if training.fp8:
        say("products in float8 (train.fp8) are counted as if in half precision: what they gain is for a card to show")
    if ask.clips:
        epochs = row["clips_a_step"] * config.train.steps / ask.clips
        say(f"{config.train.steps} steps are {epochs:.1f} epochs of {ask.clips} clips")
    if not report["choices"]:
        say("NOTHING FITS: more cards, a smaller clip (--data.num-frames, --data.height, --data.width) or --lora.rank.")
        return
    _print_choices(report)


def _say_time(row: dict[str, Any], config: Config, ask: Plan) -> None:
    if row["seconds_a_step"] is not None:
        say(
            f"{row['tflop_a_card']:,.0f} TFLOP a card and step: {row['seconds_a_step']:.2f} s at {ask.utilisation:.0%} "
            f"of the peak, {duration(row['hours'] * 3600)} for {config.train.steps} steps"
        )


def _print_choices(report: dict[str, Any]) -> None:
    rows = report["choices"]
    say(f"what fits, best first ({min(len(rows), _SHOWN)} of {len(rows)}):")
    for number, row in enumerate(rows[:_SHOWN], start=1):
        figures = [f"{row['device_bytes'] / 2**30:.1f} GiB a card"]
        if row["host_bytes"]:
            figures.append(f"{row['host_bytes'] / 2**30:.1f} GiB of host memory a card")
        figures.append(f"{row['clips_a_step']} clip(s) a step")
        if row["seconds_a_step"] is not None:
            figures.append(f"{row['seconds_a_step']:.1f} s a step, {row['clips_an_hour']:,.0f} clips an hour")
        say(f"  {number}. {', '.join(figures)}\n     {' '.join(row['settings']) or 'as it is'}")
