"""Write what the MindSpore engine made: `python -m tests.golden.by_mindspore`, where MindSpore is installed.

A LoRA it trained, and a sample of the pixels of a video it made with it, for the other engine to make too.
"""

import shutil
import tempfile
from pathlib import Path

from cogvideox_factory.mindspore_engine import generate, train
from cogvideox_factory.tensors import save_tensors
from tests.golden import FOLDER, runs


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, lora = Path(name), runs.LORAS["mindspore"]
        run_folder = train.run(runs.recipe("t2v lora", folder, engine="mindspore"))
        shutil.copy(run_folder / "final" / "pytorch_lora_weights.safetensors", lora)
        ask = runs.video_request("t2v ddim lora", folder, engine="mindspore", generate={"lora": [str(lora)]})
        save_tensors(FOLDER / "by_mindspore.safetensors", {"video": runs.seen(generate.run(ask)[0])})


if __name__ == "__main__":
    main()
