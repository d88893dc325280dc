"""The command line: one table, one file a command.

A command file parses its flags, calls one engine function and prints. It is imported only when it is asked for, so
`cogvideox --help` needs neither pydantic nor a framework.
"""

import os
import sys
from importlib import import_module

COMMANDS = {
    "demo": "the whole factory on an embedded model: clips, preparation, training, video, one page",
    "doctor": "looks at every clip of a data set, entry of a cache or checkpoint of a run: counts, reasons",
    "prepare": "videos + captions -> cache of latents and text embeddings",
    "import-prepared": "a folder the older trainers prepared -> the same cache",
    "plan": "what a recipe needs in memory and time on cards you name, and what makes it fit",
    "train": "cache or raw clips -> run folder with a LoRA or a fine-tuned transformer",
    "sweep": "one training run for each combination of settings; a table and a page of what came out",
    "launch": "starts `train` on many cards, and again after a crash",
    "generate": "prompts (and images or videos) -> videos",
    "export": "a run, LoRA or transformer -> diffusers, PEFT, ComfyUI or merged weights, with a card; to the hub",
    "replay": "a training step that went wrong, once more, with a look at every module",
    "evaluate": "metrics of a folder of videos; judges of what they show",
    "train-vae": "clips -> a VAE of this architecture, for models of your own",
}

_EPILOG = """
A recipe comes first, flags override single settings of it:
  cogvideox prepare  recipes/t2v_lora.yaml --data.root my-clips --cache.dir caches/my-clips
  cogvideox train    recipes/t2v_lora.yaml --data.root my-clips --cache.dir caches/my-clips --train.dir runs/mine
  cogvideox generate recipes/t2v_lora.yaml --generate.lora runs/mine --generate.prompt "a red fox in the snow"
`cogvideox COMMAND --help` lists every setting of a command with its default and unit.

Exit codes: 0 done, 1 our bug, 2 usage or setting, 3 data rejected, 4 missing dependency, model, device or memory,
5 cache or checkpoint unfit, 6 storage, 7 non-finite numbers, 8 another process of the run failed,
75 stopped on request (run again to go on), 130 Ctrl-C, 143 SIGTERM."""


def usage() -> str:
    """Return what `cogvideox --help` prints."""
    lines = ["usage: cogvideox COMMAND [RECIPE.yaml] [--section.setting VALUE ...]", "", "commands:"]
    lines += [f"  {name:<15} {text}" for name, text in COMMANDS.items()]
    return "\n".join(lines) + "\n" + _EPILOG


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from cogvideox_factory import __version__

        print(f"cogvideox-factory {__version__}")
        return 0
    from cogvideox_factory.errors import FactoryError, nearest

    name = argv[0]
    try:
        if name not in COMMANDS:
            raise FactoryError(f"no command {name!r}{nearest(name, list(COMMANDS))}; there are: {', '.join(COMMANDS)}")
        return import_module(f"cogvideox_factory.cli.{name.replace('-', '_')}").run(argv[1:]) or 0
    except FactoryError as error:
        from cogvideox_factory.launcher import rank_of

        who = f"process {rank}: " if (rank := rank_of(os.environ)) else ""
        if not error.echoed:
            print("\n  ".join([f"{who}error: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        print("interrupted", file=sys.stderr)
        return getattr(interrupt, "exit_code", 130)
