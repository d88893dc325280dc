"""`cogvideox launch`: `train` in many processes, started, watched, and started again after a crash."""

import tyro
from pydantic import BaseModel, ConfigDict

from cogvideox_factory.cli import train
from cogvideox_factory.cli.engine import require_able
from cogvideox_factory.cli.original import expand
from cogvideox_factory.cli.settings import parse
from cogvideox_factory.config.section import NotNegative, Positive
from cogvideox_factory.errors import FactoryError

USAGE = "cogvideox launch --nproc 8 -- train RECIPE.yaml [--section.setting VALUE ...]"
_BY_TORCHRUN = ("prepare", "generate")
"""Commands that many processes share too, and that need no checkpoint to go on."""
DESCRIPTION = f"""Train in many processes: {USAGE}
Each attempt is a fresh torchrun (msrun with engine=mindspore). A process that crashes or is killed ends the others, and
all start again from the newest checkpoint; what a process refuses (exit codes 2 to 7) is not tried again. Outputs lie
in RUN/logs/. Of several machines each runs the same words with a --node-rank of its own."""


class Launch(BaseModel):
    """How many processes, where."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    nproc: Positive
    """Processes on this machine: one a card."""
    restarts: NotNegative = 3
    """Fresh starts after crashes, in all; the same step is not tried more than three times."""
    nodes: Positive = 1
    """Machines, each with `nproc` processes."""
    node_rank: NotNegative = 0
    """Which of the machines this is, from 0."""
    master_addr: str | None = None
    """Name or address of machine 0, which all can reach."""
    master_port: Positive | None = None
    """Port there, of the first attempt; later ones count up. Default: 29500, or any free one on a single machine."""

    def check(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            FactoryError: a machine that is not one of `nodes`, no way to reach the first, or settings without effect.
        """
        if self.nodes == 1:
            for flag, value in (("node-rank", self.node_rank), ("master-addr", self.master_addr)):
                if value:
                    raise FactoryError(f"--{flag} {value} has no effect with one machine; remove it, or set --nodes")
        elif self.node_rank >= self.nodes:
            raise FactoryError(
                f"--node-rank {self.node_rank}: {self.nodes} machines are numbered 0 to {self.nodes - 1}."
            )
        elif not self.master_addr:
            raise FactoryError(f"--nodes {self.nodes} needs --master-addr, the name or address of machine 0.")


def run(argv: list[str]) -> int:
    """Parse, start, and return the exit code of the run."""
    at = argv.index("--") if "--" in argv else len(argv)
    own, words = argv[:at], argv[at + 1 :]
    options = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
    chosen = tyro.cli(Launch, args=own, prog="cogvideox launch", description=DESCRIPTION, config=options)
    chosen.check()
    if words[:1] != ["train"]:
        if not words:
            raise FactoryError(f"nothing follows `--`; usage: {USAGE}")
        way = "torchrun --nproc-per-node N -m cogvideox_factory" if words[0] in _BY_TORCHRUN else "cogvideox"
        raise FactoryError(f"launch is for train; start this as `{way} {words[0]} …`. Usage: {USAGE}")
    ours = expand("train", words[1:], launched=chosen.nproc * chosen.nodes)
    config = parse("train", ours, sections=train.SECTIONS, description=train.DESCRIPTION)
    require_able(config, train.SECTIONS)
    from pathlib import Path

    from cogvideox_factory import supervise

    launch = supervise.Launch(
        words=tuple(words), engine=config.engine, run_folder=Path(config.train.dir), num_processes=chosen.nproc,
        num_nodes=chosen.nodes, node_rank=chosen.node_rank, master_addr=chosen.master_addr or "127.0.0.1",
        restarts=chosen.restarts,
        master_port=chosen.master_port or (29500 if chosen.nodes > 1 else None),
    )  # fmt: skip
    return supervise.Supervisor(launch=launch).run()
