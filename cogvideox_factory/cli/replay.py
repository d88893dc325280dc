"""`cogvideox replay`: a training step that went wrong, once more and with a look at every module."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import BaseModel, ConfigDict

from cogvideox_factory.errors import NonFiniteError

DESCRIPTION = """Compute a step again whose loss or gradient was not finite, or a spike, from what its run kept in
RUN/replay/: the same batch to the bit, with the weights of the newest checkpoint at that time. Prints the loss of every
clip and the first module whose output or gradient is not finite; exit code 7 if there is one. Another dtype tells
whether it is a matter of range."""


class Replay(BaseModel):
    """Which step, and on what."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    file: Annotated[str, tyro.conf.Positional]
    """RUN/replay/step-N.json."""
    device: str | None = None
    """auto, cpu, cuda, npu, or cuda:1 and so on. Default: the run's."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Arithmetic of the model. Default: the run's."""
    checkpoint: str | None = None
    """Checkpoint whose weights are taken. Default: the newest at the time of the step."""


def run(argv: list[str]) -> None:
    """Parse and replay.

    Raises:
        NonFiniteError: it went wrong again.
    """
    settings = tyro.cli(Replay, args=argv, prog="cogvideox replay", description=DESCRIPTION)
    from cogvideox_factory.torch_engine import replay

    weights_of = None if settings.checkpoint is None else Path(settings.checkpoint)
    if not replay.run(Path(settings.file), device=settings.device, dtype=settings.dtype, weights_of=weights_of):
        raise NonFiniteError("the step went wrong again. Try --dtype float32, or another --checkpoint of the run.")
