"""The parts of the report. As a program, `python -m tests.ascend.parts NAME FILE`, it does one and writes its results.

A result is a kind and a text: held or apart (against an oracle or the golden files, with both figures), told, FAILED.
"""

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Results = Iterator[tuple[str, str]]
_LEVELS = {"PyNative": "op by op", "O0": "graphs", "O1": "graphs of level O1", "O2": "graphs of level O2, by GE"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One thing to try."""

    what: str
    run: Callable[[], Results]
    needs_card: bool = True
    of: tuple[str, ...] = ()
    """Functions of `device` that it tries."""
    limit_seconds: float = 1800.0


def result(what: str, error: float, limit: float) -> tuple[str, str]:
    return "held" if error <= limit else "apart", f"{what} {error:.2g} of at most {limit:.2g}"


def each(checks: dict[str, Callable[[], Results]]) -> Results:
    """Do one after the other; one that fails is written down and the next begins."""
    for name, check in checks.items():
        began = time.monotonic()
        try:
            for kind, text in check():
                yield kind, f"{name}, {text}"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what the report is for
            yield "FAILED", f"{name}: {error!r}"[:2000].replace("\n", " ")
            traceback.print_exc()
        yield "told", f"{name}: {time.monotonic() - began:.1f} s"


# --- functions of device.py -------------------------------------------------------------------------------------------


def _dtypes(*, with_float32: bool = True) -> dict[str, float]:
    """Return the dtypes of this machine and what one rounding comes to, which a few operations may add up."""
    from cogvideox_factory.mindspore_engine.device import is_ascend

    float32 = {"float32": 1e-4} if with_float32 else {}
    return float32 | {"float16": 5e-3} | ({"bfloat16": 4e-2} if is_ascend() else {})


def _pick_device() -> Results:
    from cogvideox_factory.mindspore_engine.device import is_ascend, pick_device

    yield "held" if is_ascend() else "apart", f"device auto is {pick_device('auto')}"


def _pick_dtype() -> Results:
    from cogvideox_factory.mindspore_engine.device import dtype_name, pick_dtype
    from cogvideox_factory.models import PUBLISHED
    from tests.ascend.oracles import product

    for name, facts in PUBLISHED.items():
        yield "told", f"auto for {name} is {dtype_name(pick_dtype('auto', facts.transformer))}"

    def one(name: str, limit: float) -> Callable[[], Results]:
        return lambda: iter([result("product", product(pick_dtype(name)), limit)])

    yield from each({name: one(name, limit) for name, limit in _dtypes().items()})


def _flash_attention() -> Results:
    from cogvideox_factory.mindspore_engine.device import DTYPES, flash_attention
    from tests.ascend.oracles import attention

    def one(name: str, limit: float, shape: tuple[int, int, int, int]) -> Callable[[], Results]:
        return lambda: (
            result(what, error, limit) for what, error in attention(flash_attention, DTYPES[name], shape).items()
        )

    shapes = ((2, 3, 274, 64), (1, 30, 1576, 64), (1, 2, 500, 96))  # heads and head sizes of the models
    return each({
        f"{name} {list(shape)}": one(name, limit, shape)
        for name, limit in _dtypes(with_float32=False).items() for shape in shapes
    })  # fmt: skip


def _causal_conv3d() -> Results:
    from cogvideox_factory.mindspore_engine.device import DTYPES, causal_conv3d
    from tests.ascend.oracles import convolution

    def one(name: str, limit: float) -> Callable[[], Results]:
        return lambda: iter([result("output", convolution(causal_conv3d, DTYPES[name]), limit)])

    return each({name: one(name, limit) for name, limit in _dtypes().items()})


def inlined_once(depths: tuple[int, ...] = (2, 8, 32)) -> Results:
    from dataclasses import replace

    from cogvideox_factory.mindspore_engine.border import to_array, to_tensor
    from cogvideox_factory.mindspore_engine.transformer import CogVideoXTransformer
    from tests.ascend.oracles import apart
    from tests.golden import cases
    from tests.mindspore_engine.parity import MODES, predict_by

    step = cases.step_of("cogvideox-5b")
    arguments = tuple(map(to_tensor, (step.latents, step.prompt_embeds, step.timesteps)))
    for layers in depths:
        model = CogVideoXTransformer(replace(cases.config_of("cogvideox-5b"), num_layers=layers))
        model.initialize(seed=0)
        expected = to_array(predict_by(model, MODES["PyNative"])(*arguments))
        began = time.monotonic()
        found = predict_by(model, MODES["O0"])(*arguments)
        yield "told", f"{layers} layers are compiled in {time.monotonic() - began:.1f} s"
        yield result(f"{layers} layers, graph and op by op", apart(found, expected), 1e-4)


def _set_determinism() -> Results:
    from cogvideox_factory.mindspore_engine.border import to_array, to_tensors
    from cogvideox_factory.mindspore_engine.device import set_determinism
    from tests.ascend.steps import batch_of, learner_of, shape_here
    from tests.mindspore_engine.parity import MODES

    set_determinism(True)
    shape, found = shape_here(), set()
    for _ in range(2):
        learner = learner_of(shape, MODES["PyNative"])
        for step in range(3):
            learner.micro(to_tensors(batch_of(shape, step)))
            learner.step(1e-3)
        found.add(b"".join(to_array(master).tobytes() for master in learner.update.masters))
    yield result("two runs of three steps, other bits", float(len(found) - 1), 0.0)


def _peak_memory() -> Results:
    import numpy as np

    from cogvideox_factory.mindspore_engine.border import to_tensor
    from cogvideox_factory.mindspore_engine.device import peak_memory

    before, tensor = peak_memory(), to_tensor(np.ones((256, 2**20), np.float32))
    total = float(tensor.sum())
    grown = (peak_memory() - before) / 2**30
    yield "told", f"the sum of a GiB of ones is {total:g}, the peak grew by {grown:.3f} GiB"
    yield "held" if 1 <= grown < 2 else "apart", f"peak_memory grew by {grown:.3f} GiB for 1 GiB"


# --- the golden files -------------------------------------------------------------------------------------------------


def _golden(room: str, level: str) -> Callable[[], Results]:
    """Return the part that holds one room of the engine to the golden files."""
    return lambda: each(_checks(room, level))


def _checks(room: str, level: str) -> dict[str, Callable[[], Results]]:
    from cogvideox_factory.mindspore_engine.device import DTYPES, Mode
    from cogvideox_factory.mindspore_engine.vae import CogVideoXVAE
    from tests.golden import cases
    from tests.mindspore_engine import parity

    mode = Mode(graph=level != "PyNative", jit_level="O0" if level == "PyNative" else level)
    if room == "transformer":
        found = {case: lambda case=case: parity.transformer(case, mode) for case in (*cases.VARIANTS, cases.LARGER)}
    elif room == "half":
        found = {
            f"{case} in {name}": lambda case=case, name=name, limit=limit: parity.in_half(
                case, DTYPES[name], limit=limit
            )
            for case in cases.VARIANTS for name, limit in _dtypes(with_float32=False).items()
        }  # fmt: skip
    elif room == "vae":
        vae = CogVideoXVAE.from_folder(cases.vae_folder(), mode=mode)
        found = {f"{n} frames": lambda n=n: parity.frames(vae, n) for n in cases.VIDEO_FRAMES}
    elif room == "text":
        found = {f"{n} tokens": lambda n=n: parity.texts(n, mode) for n in cases.TEXT_LENGTHS}
    elif room == "training":
        found = {case: lambda case=case: parity.training(case, mode) for case in cases.TRAININGS}
    else:
        found = {
            case: lambda case=case: parity.denoising(
                case, parity.predict_by(parity.model_of(cases.DENOISING[case]), mode)
            )
            for case in cases.DENOISING
        }

    def told(check: Callable[[], list[parity.Apart]]) -> Callable[[], Results]:
        return lambda: (result(part.what, part.error, part.limit) for part in check())

    return {name: told(check) for name, check in found.items()}


def _steps(level: str) -> Callable[[], Results]:
    def run() -> Results:
        from cogvideox_factory.mindspore_engine.device import Mode
        from tests.ascend.steps import timed

        yield from timed(Mode(graph=level != "PyNative", jit_level="O0" if level == "PyNative" else level))

    return run


def _tests(*words: str) -> Results:
    """Run the engine's own tests; what they print is the report."""
    import subprocess

    words = (sys.executable, "-m", "pytest", "tests/mindspore_engine", "--tb=short", "-p", "no:cacheprovider", *words)
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    yield "held" if done.returncode == 0 else "apart", "\n           ".join(done.stdout.splitlines()[-200:])


_ROOMS = {
    "transformer": "a call and the gradients of the five variants",
    "vae": "encoding and decoding at 1 to 81 frames",
    "text": "T5",
    "training": "ten steps, LoRA and all weights, t2v and i2v",
    "denoising": "ten steps of DDIM and DPM",
}

PARTS: dict[str, Part] = {
    "device": Part(what="the card is found", run=_pick_device, of=("pick_device",)),
    "dtypes": Part(what="products in each dtype, against float64", run=_pick_dtype, of=("pick_dtype",)),
    "attention": Part(what="the flash kernel and its gradients, against float64", run=_flash_attention,
                      of=("flash_attention",)),
    "convolution": Part(what="Conv3D in each dtype, against float64", run=_causal_conv3d, of=("causal_conv3d",)),
    "layers": Part(what="a block compiled once, however many there are", run=inlined_once, of=("inlined_once",)),
    "determinism": Part(what="the same bits twice", run=_set_determinism, of=("set_determinism",)),
    "collectives": Part(what="what processes send one another, by the engine's tests (2 and 4 cards)",
                        run=lambda: _tests("-k", "collectives"),
                        of=("communicator", "reduce_scatter", "all_to_all")),
    "memory": Part(what="the peak of the card's memory", run=_peak_memory, of=("peak_memory",)),
    **{
        f"{room}-{level}": Part(
            what=f"{what}, {_LEVELS[level]}, against the golden files", run=_golden(room, level),
            needs_card=level == "O2", of=("_by_ge",) if (room, level) == ("transformer", "O2") else (),
        )
        for level in _LEVELS for room, what in _ROOMS.items()
    },
    "half": Part(what="a call in half precision, against the golden files", run=_golden("half", "PyNative"),
                 needs_card=False),
    **{
        f"steps-{level}": Part(what=f"steps of training, timed, {told}", run=_steps(level), needs_card=level == "O2",
                               limit_seconds=3600.0)
        for level, told in _LEVELS.items()
    },
    "tests": Part(what="the engine's own tests (on a CPU: make test-mindspore)", run=_tests, limit_seconds=7200.0),
}  # fmt: skip


def main(name: str, path: str) -> int:
    """Do a part and write its results into a file as they come; 1 where a check of it failed."""
    from cogvideox_factory.mindspore_engine.device import pick_device

    pick_device("auto")
    failed = False
    with Path(path).open("a", encoding="utf-8", buffering=1) as file:
        for kind, text in PARTS[name].run():
            file.write(f"{kind}\t{text}\n")
            failed |= kind == "FAILED"
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
