"""`train`: a cache or raw clips to a run folder with a LoRA or a fine-tuned transformer.

`run` reads as the recipe does: check, load, resume, loop, export. The loop itself is in `loop.py`.
"""

import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from cogvideox_factory.checkpoints import list_checkpoints
from cogvideox_factory.config import Config
from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.loader import Loader
from cogvideox_factory.data.sampler import Sampler, hold_out
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.metrics import say, speaking
from cogvideox_factory.mindspore_engine.device import versions
from cogvideox_factory.mindspore_engine.feed import Frozen, load_frozen, make_samples
from cogvideox_factory.mindspore_engine.learner import Learner, export, load_transformer, make_learner
from cogvideox_factory.mindspore_engine.loop import Loop, make_ready, state_tensors
from cogvideox_factory.mindspore_engine.optim import Ema
from cogvideox_factory.mindspore_engine.start import Plan, make_plan
from cogvideox_factory.mindspore_engine.transformer import CogVideoXTransformer
from cogvideox_factory.mindspore_engine.watch import Watch
from cogvideox_factory.model_card import describe_run
from cogvideox_factory.publish import require_room, sweep
from cogvideox_factory.recipe import write_recipe
from cogvideox_factory.resume import check_resume, find_start, identity, record_of, shared_files, shared_settings
from cogvideox_factory.run_folder import check_allowed, locked
from cogvideox_factory.run_plan import Clips, check_sample_images, make_draws, model_flops, num_tokens, open_clips
from cogvideox_factory.step_records import Work
from cogvideox_factory.time_limit import TimeLimit
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
    started = time.monotonic()
    plan = make_plan(config)
    with plan.machine.ranks.going_together(), speaking(plan.machine.ranks.leads):
        return _run(plan, started)


def _run(plan: Plan, started: float) -> Path:
    machine, ranks = plan.machine, plan.machine.ranks
    ranks.together(lambda: check_sample_images(plan))
    tracker = _make_tracker(plan)
    ranks.require_agreement(shared_settings(plan.config, versions()))
    clips = open_clips(plan, machine.dtype_name)
    ranks.require_agreement(shared_files(plan, clips.described))
    wanted = identity(plan, clips.described, machine.dtype_name)
    ranks.from_lead(lambda: check_allowed(plan.config.train.allow_change, wanted))
    with ExitStack() as stack:
        ranks.from_lead(lambda: stack.enter_context(locked(plan.run_folder)))
        found = ranks.from_lead(lambda: str(find_start(plan) or ""))
        start = Path(found) if found else None
        changes = ranks.from_lead(lambda: check_resume(plan, start, wanted)) if start else []
        layout = {"device": machine.device, **asdict(ranks.layout)}
        record = record_of(plan, wanted, changes, versions=versions(), layout=layout)
        _train(plan, clips, tracker, start=start, record=record, started=started)
    return plan.run_folder


def _make_tracker(plan: Plan) -> Tracker | None:
    train = plan.config.train
    if train.tracker == "none":
        return None
    settings = plan.config.model_dump(mode="json")
    return Tracker(train.tracker, project=train.tracker_project, folder=plan.run_folder, settings=settings)


def _train(
    plan: Plan, clips: Clips, tracker: Tracker | None, *, start: Path | None, record: dict[str, Any], started: float
) -> None:
    # The text encoder is the largest part; it is done with, where it can be, before the transformer is loaded.
    frozen = load_frozen(plan, clips.source)
    transformer = load_transformer(plan)
    loop = _make_loop(plan, clips, frozen, transformer, tracker, record=record, started=started)
    machine, ranks = plan.machine, plan.machine.ranks
    ranks.from_lead(lambda: _make_ready(plan, _num_bytes(loop.learner, loop.ema)))
    how = f"graphs at {machine.mode.jit_level}" if machine.mode.graph else "PyNative"
    say(f"MindSpore on {machine.device}, {machine.dtype_name}, {how}; {loop.sampler.epochs(1):.3g} epochs a step")
    if tracker and ranks.leads:
        tracker.start()
    loop.run(start)
    with loop.ema.in_model() if loop.ema else nullcontext():
        export(
            transformer, plan.run_folder, method=plan.config.train.method, ranks=ranks,
            describe=partial(describe_run, plan.run_folder),
        )  # fmt: skip
    say(f"final weights in {plan.run_folder / 'final'}")


def _make_loop(
    plan: Plan, clips: Clips, frozen: Frozen, transformer: CogVideoXTransformer, tracker: Tracker | None,
    *, record: dict[str, Any], started: float,
) -> Loop:  # fmt: skip
    train, source, ranks = plan.config.train, clips.source, plan.machine.ranks
    num_micros = train.gradient_accumulation
    train_ids, held_ids = sorted(set(source.buckets) - clips.excluded), []
    if plan.config.validation.every:
        train_ids, held_ids = hold_out(train_ids, plan.config.validation.num_clips)
    sampler = Sampler(
        train_ids,
        batch_size={key: size * num_micros for key, size in clips.sizes.items()}, seed=plan.config.run.seed,
        buckets=source.buckets, sets=source.sets, weights=clips.set_weights,
    )  # fmt: skip
    draws = make_draws(plan)
    learner = make_learner(plan, transformer)
    ema = Ema(learner.update, decay=train.ema_decay) if train.ema_decay else None
    return Loop(
        learner=learner, ema=ema, sampler=sampler, draws=draws, encoder=frozen.encoder, run_folder=plan.run_folder,
        loader=Loader(
            source, sampler, draws, num_micros=num_micros, num_workers=train.num_workers, rank=ranks.data_rank,
            num_ranks=ranks.layout.num_data_ranks,
        ),
        num_steps=train.steps, num_micros=num_micros,
        rate={
            "peak": train.learning_rate, "schedule": train.schedule, "num_steps": train.steps,
            "warmup_steps": train.warmup_steps, "num_cycles": train.num_cycles, "power": train.power,
        },
        log_every=train.log_every, save_every=train.save_every, keep=train.keep_checkpoints, record=record,
        limit=TimeLimit(train.time_limit_minutes, save_bytes=_num_bytes(learner, ema), started=started),
        on_bad_step=train.on_bad_step,
        work=_make_work(plan, list(sampler.batch_sizes), learner), log_samples=train.log_samples, tracker=tracker,
        watch=Watch(
            every=plan.config.validation.every, source=source, clip_ids=held_ids, draws=make_draws(plan, quiet=True),
            samples=make_samples(plan, frozen, transformer), learner=learner, ranks=ranks,
            ready=lambda batch: make_ready(batch, frozen.encoder), run_folder=plan.run_folder,
        ),
        hang_seconds=plan.config.parallel.hang_seconds, ranks=ranks, compiled=plan.machine.mode.graph,
    )  # fmt: skip


def _make_work(plan: Plan, keys: list[str], learner: Learner) -> Work:
    """Return what a sample of each shape costs."""
    is_lora = plan.config.train.method == "lora"
    weights = sum(p.size for p in learner.update.trained if p.ndim == 2) if is_lora else 0
    return Work(
        tokens={key: num_tokens(plan, Bucket.parse(key)) + plan.text_length for key in keys},
        flops={key: model_flops(plan, Bucket.parse(key), adapter_weights=weights) for key in keys},
        num_cards=plan.machine.ranks.layout.size, peak_tflops=None,
    )  # fmt: skip


def _num_bytes(learner: Learner, ema: Ema | None) -> int:
    """Return the bytes of a checkpoint's tensors."""
    return state_tensors(learner.update, ema).num_bytes


def _make_ready(plan: Plan, state_bytes: int) -> None:
    sweep(plan.run_folder)  # half a checkpoint of a run that was killed takes room too
    # Those that are there have theirs already; the next one always needs its own, before the oldest goes.
    missing = max(1, plan.config.train.keep_checkpoints + 1 - len(list_checkpoints(plan.run_folder)))
    require_room(plan.run_folder, missing * state_bytes, what=f"{missing} more checkpoint(s) of this run")
    write_recipe(plan.run_folder / "config.yaml", plan.config)
