"""CogVideoX Factory: fine-tune the CogVideoX family on your own clips and generate video with the result.

`CogVideoXPipeline` and `export_to_video` are loaded on first use, so importing the package (and the numpy
ground under it) costs no framework import.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cogvideox_factory.data.export import export_to_video as export_to_video
    from cogvideox_factory.torch_engine.pipeline import CogVideoXPipeline as CogVideoXPipeline

_LAZY = {
    "CogVideoXPipeline": "cogvideox_factory.torch_engine.pipeline",
    "export_to_video": "cogvideox_factory.data.export",
}
__all__ = ["CogVideoXPipeline", "__version__", "export_to_video"]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
