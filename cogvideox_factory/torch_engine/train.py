"""`train`: a cache or raw clips to a run folder with a LoRA or a fine-tuned transformer.

`run` reads as the recipe does: check, load, resume, loop, export. Task, method and source of the data are values, not
four trainers; the loop itself is in `loop.py`.
"""

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cogvideox_factory.attempt import run_started
from cogvideox_factory.checkpoints import list_checkpoints
from cogvideox_factory.config import Config
from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.loader import CacheSource, Draws, Loader, RawSource
from cogvideox_factory.data.sampler import Sampler, hold_out
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.metrics import say, speaking
from cogvideox_factory.model_card import describe_run
from cogvideox_factory.plan import memory
from cogvideox_factory.publish import require_room, sweep
from cogvideox_factory.ranks import Layout
from cogvideox_factory.recipe import write_recipe
from cogvideox_factory.resume import check_resume, find_start, identity, record_of, shared_files, shared_settings
from cogvideox_factory.run_folder import check_allowed, locked
from cogvideox_factory.run_plan import Clips, check_sample_images, make_draws, model_flops, num_tokens, open_clips
from cogvideox_factory.step_records import Work
from cogvideox_factory.time_limit import TimeLimit
from cogvideox_factory.torch_engine.announce import say_arithmetic, say_memory
from cogvideox_factory.torch_engine.bad_steps import BadSteps
from cogvideox_factory.torch_engine.compilation import compile_blocks
from cogvideox_factory.torch_engine.device import (
    device_name,
    dtype_name,
    require_compiler,
    set_determinism,
    set_tf32,
    take_card,
    versions,
)
from cogvideox_factory.torch_engine.encode import Encoder
from cogvideox_factory.torch_engine.examine import first_not_finite
from cogvideox_factory.torch_engine.exhausted import InHand, told
from cogvideox_factory.torch_engine.feed import Frozen, load_frozen, make_samples
from cogvideox_factory.torch_engine.learner import export, load_transformer, make_objective, make_update
from cogvideox_factory.torch_engine.ledger import Ledger
from cogvideox_factory.torch_engine.loop import Loop, state_tensors
from cogvideox_factory.torch_engine.objective import Objective
from cogvideox_factory.torch_engine.optim import Ema, Update
from cogvideox_factory.torch_engine.ranks import Ranks, joined, num_processes
from cogvideox_factory.torch_engine.saving import Saver
from cogvideox_factory.torch_engine.start import Plan, make_plan, peak_tflops, training_numbers
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer
from cogvideox_factory.torch_engine.watch import Watch, to_device
from cogvideox_factory.tracker import Tracker


def run(config: Config) -> Path:
    """Train as the settings say and return the run folder.

    Raises:
        FactoryError: settings, data, model, cache, checkpoint or disk unfit, all before the first step.
        NonFiniteError: the loss or a gradient became NaN or Inf.
        StoppedError: stopped by a signal after a checkpoint was saved.
    """
    if not config.cache.dir and not config.data_sets:
        raise FactoryError("train on what? give --cache.dir FOLDER (prepared) or --data.root FOLDER (raw clips)")
    started = run_started()
    take_card(config.run.device)
    plan = make_plan(config)
    check_sample_images(plan)
    if config.parallel.guidance > 1:
        raise FactoryError(
            f"parallel.guidance={config.parallel.guidance} divides what generate does twice a step; training has no "
            "guidance. Leave it at 1, and raise parallel.sequence if one video is too much for a process."
        )
    tracker = _make_tracker(plan)
    if config.train.compile != "none":
        require_compiler(plan.device)
    layout = Layout(size=num_processes(), **config.parallel.layout)
    if layout.size == 1 and layout.zero:
        say(f"one process: parallel.zero={layout.zero} divides among those that torchrun starts, and changes nothing")
    heads = plan.model.num_attention_heads
    set_determinism(config.run.deterministic)
    seconds = config.parallel.timeout_seconds
    with joined(layout, num_heads=heads, device=plan.device, timeout_seconds=seconds) as ranks, speaking(ranks.leads):
        return _run(plan, ranks, tracker, started)


def _make_tracker(plan: Plan) -> Tracker | None:
    train = plan.config.train
    if train.tracker == "none":
        return None
    settings = plan.config.model_dump(mode="json")
    return Tracker(train.tracker, project=train.tracker_project, folder=plan.run_folder, settings=settings)


def _run(plan: Plan, ranks: Ranks, tracker: Tracker | None, started: float) -> Path:
    config = plan.config
    ranks.require_agreement(shared_settings(config, versions()))
    set_tf32(config.run.tf32, plan.device)
    clips = open_clips(plan, dtype_name(plan.dtype))
    ranks.require_agreement(shared_files(plan, clips.described))
    wanted = identity(plan, clips.described, dtype_name(plan.dtype))
    ranks.from_lead(lambda: check_allowed(config.train.allow_change, wanted))
    with ExitStack() as stack:
        ranks.from_lead(lambda: stack.enter_context(locked(plan.run_folder)))
        start = ranks.from_lead(lambda: find_start(plan))
        changes = ranks.from_lead(lambda: check_resume(plan, start, wanted)) if start else []
        layout = {"device": device_name(plan.device), **asdict(ranks.layout)}
        record = record_of(plan, wanted, changes, versions=versions(), layout=layout)
        record |= {"data_counts": clips.source.counts}
        numbers, in_hand = training_numbers(plan, clips.sizes, ranks.layout), InHand("before the first step")
        accelerator = plan.device.type != "cpu"
        with told(plan.device, in_hand, lambda: memory.savings(numbers, accelerator=accelerator)):
            say_memory(plan, numbers, raw=isinstance(clips.source, RawSource))
            data = _make_data(plan, clips, ranks)
            _train(plan, data, ranks, in_hand, tracker, start=start, record=record, started=started)
    return plan.run_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class _Data:
    """What a run is trained and watched on, and in which order."""

    source: CacheSource | RawSource
    sampler: Sampler
    draws: Draws
    loader: Loader
    held_ids: list[str]
    """Clips that are watched and not trained on."""


def _make_data(plan: Plan, clips: Clips, ranks: Ranks) -> _Data:
    config, source = plan.config, clips.source
    train_ids, held_ids = sorted(set(source.buckets) - clips.excluded), []
    if config.validation.every:
        train_ids, held_ids = hold_out(train_ids, config.validation.num_clips)
        if unseen := len(source.buckets) - len(clips.excluded) - len(train_ids) - len(held_ids):
            say(f"{unseen} other windows of the {len(held_ids)} clips held out are not trained on either")
    num_micros = config.train.gradient_accumulation
    sampler = Sampler(
        train_ids, batch_size={key: size * num_micros for key, size in clips.sizes.items()},
        seed=config.run.seed, buckets=source.buckets, sets=source.sets, weights=clips.set_weights,
    )  # fmt: skip
    draws = make_draws(plan)
    loader = Loader(
        source, sampler, draws, num_micros=num_micros, num_workers=config.train.num_workers,
        rank=ranks.data_rank, num_ranks=ranks.layout.num_data_ranks,
    )  # fmt: skip
    return _Data(source=source, sampler=sampler, draws=draws, loader=loader, held_ids=held_ids)


def _train(
    plan: Plan, data: _Data, ranks: Ranks, in_hand: InHand, tracker: Tracker | None,
    *, start: Path | None, record: dict[str, Any], started: float,
) -> None:  # fmt: skip
    config = plan.config
    # The text encoder is the largest part; it is done with, where it can be, before the transformer is loaded.
    frozen = load_frozen(plan, data.source, ranks)
    transformer = load_transformer(plan, ranks)
    if config.train.compile != "none":
        num_shapes = len(data.sampler.batch_sizes)
        num_graphs = compile_blocks(transformer, config.train.compile, num_shapes=num_shapes)
        say(f"compiling blocks ({config.train.compile}): {num_graphs} graph(s) for {num_shapes} shape(s)")
    loop = _make_loop(plan, data, frozen, transformer, ranks, in_hand, tracker, record=record, started=started)
    say_arithmetic(plan, data.sampler, loop.update, start, ranks)
    if peak := peak_tflops(plan):
        say(f"MFU against {peak[0]:g} TFLOP/s a card ({peak[1]})")
    state_bytes = _num_bytes(loop.update, loop.ema)
    ranks.from_lead(lambda: _make_ready(plan, state_bytes))
    if tracker and ranks.leads:
        tracker.start()
    loop.run(start)
    with loop.averaged_weights():
        export(
            transformer, plan.run_folder, method=config.train.method, ranks=ranks,
            describe=partial(describe_run, plan.run_folder),
        )  # fmt: skip
    say(f"final weights in {plan.run_folder / 'final'}")


def _make_loop(
    plan: Plan, data: _Data, frozen: Frozen, transformer: CogVideoXTransformer, ranks: Ranks, in_hand: InHand,
    tracker: Tracker | None, *, record: dict[str, Any], started: float,
) -> Loop:  # fmt: skip
    train, parallel, num_micros = plan.config.train, plan.config.parallel, plan.config.train.gradient_accumulation
    update = make_update(plan, transformer, ranks)
    ema = Ema(update, decay=train.ema_decay) if train.ema_decay else None
    objective = make_objective(plan, transformer)
    saver = Saver(
        plan.run_folder, keep=train.keep_checkpoints, ranks=ranks, device=plan.device,
        in_background=train.async_checkpoint,
        wait_seconds=parallel.timeout_seconds / 2,  # before the others give up waiting for this process
    )  # fmt: skip
    return Loop(
        objective=objective, update=update, ema=ema, sampler=data.sampler, loader=data.loader, encoder=frozen.encoder,
        device=plan.device, run_folder=plan.run_folder, num_steps=train.steps, num_micros=num_micros,
        rate={
            "peak": train.learning_rate, "schedule": train.schedule, "num_steps": train.steps,
            "warmup_steps": train.warmup_steps, "num_cycles": train.num_cycles, "power": train.power,
        },
        log_every=train.log_every, save_every=train.save_every, saver=saver, record=record,
        limit=TimeLimit(train.time_limit_minutes, save_bytes=_num_bytes(update, ema), started=started),
        ledger=Ledger(data.sampler, data.draws, num_micros=num_micros, ranks=ranks),
        bad_steps=_make_bad_steps(plan, data.loader, objective, update, frozen.encoder, ranks),
        work=_make_work(plan, list(data.sampler.batch_sizes), update, ranks),
        log_samples=train.log_samples, tracker=tracker,
        watch=Watch(
            every=plan.config.validation.every, source=data.source, clip_ids=data.held_ids,
            draws=make_draws(plan, quiet=True), samples=make_samples(plan, frozen, transformer, ranks),
            objective=objective, encoder=frozen.encoder, device=plan.device, run_folder=plan.run_folder, ranks=ranks,
        ),
        ranks=ranks, in_hand=in_hand, hang_seconds=parallel.hang_seconds, compiled=train.compile != "none",
    )  # fmt: skip


def _make_bad_steps(
    plan: Plan, loader: Loader, objective: Objective, update: Update, encoder: Encoder | None, ranks: Ranks
) -> BadSteps:
    def examine(batches: list[dict[str, Any]]) -> str | None:
        ready = [to_device(batch, plan.device) for batch in batches]
        if encoder:
            ready = [encoder.batch(batch) for batch in ready]
        return first_not_finite(objective, update, ready, ranks)

    policy = plan.config.train.on_bad_step
    return BadSteps(plan.run_folder, policy=policy, loader=loader, ranks=ranks, examine=examine)


def _make_work(plan: Plan, keys: list[str], update: Update, ranks: Ranks) -> Work:
    """Return what a sample of each shape costs."""
    is_lora, peak = plan.config.train.method == "lora", peak_tflops(plan)
    weights = sum(p.numel() for p in update.trained.values() if p.dim() == 2) if is_lora else 0
    return Work(
        tokens={key: num_tokens(plan, Bucket.parse(key)) + plan.text_length for key in keys},
        flops={key: model_flops(plan, Bucket.parse(key), adapter_weights=weights) for key in keys},
        num_cards=ranks.layout.size, peak_tflops=peak[0] if peak else None,
    )  # fmt: skip


def _num_bytes(update: Update, ema: Ema | None) -> int:
    """Return the bytes of a checkpoint's tensors."""
    return sum(t.numel() * t.element_size() for t in state_tensors(update, ema).values())


def _make_ready(plan: Plan, state_bytes: int) -> None:
    sweep(plan.run_folder)  # half a checkpoint of a run that was killed takes room too
    # Those that are there have theirs already; the next one always needs its own, before the oldest goes.
    missing = max(1, plan.config.train.keep_checkpoints + 1 - len(list_checkpoints(plan.run_folder)))
    require_room(plan.run_folder, missing * state_bytes, what=f"{missing} more checkpoint(s) of this run")
    write_recipe(plan.run_folder / "config.yaml", plan.config)
