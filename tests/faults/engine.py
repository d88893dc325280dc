"""Which engine's runs the faults are made in: said once, before the first trial."""

from typing import Any

_chosen = "torch"


def choose(name: str) -> None:
    """Make all faults of this process in runs of this engine."""
    global _chosen
    _chosen = name


def chosen() -> str:
    """Return its name, as settings call it."""
    return _chosen


def sizes() -> tuple[int, ...]:
    """Return how many processes its runs have."""
    return (1, 2) if _chosen == "torch" else (1,)


def ways_to_save() -> dict[str, dict[str, Any]]:
    """Return the ways it has of saving a checkpoint: name and settings of `train`."""
    return {"": {}} | ({"in the background, ": {"async_checkpoint": True}} if _chosen == "torch" else {})


def starts_fast() -> bool:
    """Tell whether a process of a run starts in well under a second."""
    return _chosen == "torch"


def run_settings() -> dict[str, dict[str, Any]]:
    """Return what its runs have in place of the usual, by section: less to compute where operators are slow."""
    if _chosen == "torch":
        return {}
    return {"train": {"steps": 3, "save_every": 1}, "lora": {"target_modules": ["to_q"]}}


def warm() -> None:
    """Import, once and in the parent, what every child would import; no kernel runs here."""
    if _chosen == "torch":
        import torch
        import torch.distributed.checkpoint
        import torch.distributed.fsdp
        import torch.distributed.launcher.api

        import cogvideox_factory.torch_engine.prepare
        import cogvideox_factory.torch_engine.train
        from cogvideox_factory.torch_engine.device import set_determinism

        set_determinism(torch.are_deterministic_algorithms_enabled())  # imports half of torch
    else:
        import cogvideox_factory.mindspore_engine.generate
        import cogvideox_factory.mindspore_engine.prepare
        import cogvideox_factory.mindspore_engine.train  # noqa: F401
    import tensorboard.summary.writer.event_file_writer  # noqa: F401  (after MindSpore, which has its own protobuf)
