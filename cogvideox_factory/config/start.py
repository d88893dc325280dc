"""Settings of where a run starts: the checkpoint, the machine, the seed."""

from typing import Annotated, Literal

from pydantic import Field

from cogvideox_factory.config.section import NotNegative, Section


class Model(Section):
    """Which checkpoint to start from."""

    path: str = ""
    """Model folder in the diffusers layout, or a hub id such as THUDM/CogVideoX-5b; tiny-t2v and tiny-i2v are small
    models of moving shapes that come with this package."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); only for hub ids."""
    transformer: str | None = None
    """Folder of a fine-tuned transformer to use in place of the model's own."""
    transformer_config: str | None = None
    """config.json (or the same keys in YAML, as in recipes/transformers/) of a transformer of any size. Its weights are
    those of `transformer`, or random ones to train from (train.method full)."""


class MindSpore(Section):
    """How the MindSpore engine runs; used when engine is mindspore."""

    mode: Annotated[int, Field(ge=0, le=1)] = 1
    """0: what has a gradient, the VAE and the text encoder are compiled into graphs, one a shape, which takes about a
    second a layer on a CPU. 1 (PyNative): one operator after the other."""
    jit_level: Literal["O0", "O1", "O2"] = "O0"
    """How much the compiler of mode 0 may do; O2 needs an Ascend card."""
    amp_level: Literal["O0", "O1", "O2", "O3"] | None = None
    """O0: float32 throughout. O1, O2 (alike here): arithmetic in run.dtype over weights in float32. O3: weights in
    run.dtype as well. Norms and softmax are in float32. Default: O0 where run.dtype comes to float32, else O3."""


class Run(Section):
    """On what, and from which seed."""

    seed: NotNegative = 42
    """Every random number of a run follows from it."""
    device: str = "auto"
    """auto, cpu, cuda, npu, or cuda:1 and so on."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the model. auto: the published one on an accelerator, float32 on a CPU; `prepare` goes on with what
    a finished cache was made in."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """TFLOP/s of one card in the run's dtype, dense, for the MFU of a run. Default: the maker's, where it is known."""
    tf32: bool = False
    """Train and generate with float32 matrix products and convolutions in TF32 (10 bits of 23): several times faster on
    a CUDA card, where a run is in float32. Elsewhere it changes nothing."""
    deterministic: bool = True
    """Use only kernels that repeat bit for bit."""
