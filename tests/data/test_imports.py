"""The ground runs without an engine: importing it must not import one."""

import subprocess
import sys
from pathlib import Path

ROOM = Path(__file__).parents[2] / "cogvideox_factory" / "data"


def test_no_engine_is_imported():
    names = [f"cogvideox_factory.data.{path.stem}" for path in ROOM.glob("*.py") if path.stem != "__init__"]
    assert len(names) > 10
    code = (
        "import importlib, sys\n"
        f"for name in {names}: importlib.import_module(name)\n"
        "engines = {'torch', 'mindspore', 'transformers', 'diffusers', 'PIL', 'cv2'} & set(sys.modules)\n"
        "assert not engines, engines\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOM.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
