"""What a person with an Ascend card runs, tried here: every part is told, none ends another, the oracles can tell."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

import ast
import inspect
import sys
from pathlib import Path

import mindspore as ms

from cogvideox_factory.mindspore_engine import device
from cogvideox_factory.mindspore_engine.attention import AttentionKernel
from tests.ascend import oracles
from tests.ascend.__main__ import main
from tests.ascend.machine import describe
from tests.ascend.parts import PARTS, each, inlined_once, result
from tests.ascend.reporting import ROOT, carry_out

without_card = pytest.mark.skipif(device.is_ascend(), reason="this machine has an Ascend card")


@without_card
def test_a_machine_without_a_card_tries_what_it_can_and_says_of_the_rest_that_it_has_none(tmp_path, capsys):
    for_cards = [name for name, part in PARTS.items() if part.needs_card]
    assert main(["--only", *for_cards, "text-PyNative", "steps-PyNative", "--out", str(tmp_path / "report.txt")]) == 0
    report = (tmp_path / "report.txt").read_text()
    for name in for_cards:
        assert f"{name}: {PARTS[name].what}\n  skipped: no card\n" in report
    assert report.count("\n  held: ") == 3 + 1  # three lengths of text; the norms of the steps
    assert "s a step" in report
    assert "GiB" in report
    assert f"{len(for_cards)} skipped" in report.splitlines()[-1]
    assert report.rstrip() in capsys.readouterr().out


def test_every_function_that_only_a_card_can_verify_is_tried_and_is_in_the_page():
    functions = [node for node in ast.parse(inspect.getsource(device)).body if isinstance(node, ast.FunctionDef)]
    unseen = {f.name for f in functions if "nly Ascend can verify" in (ast.get_docstring(f) or "")}
    assert len(unseen) >= 3
    tried = {name for part in PARTS.values() for name in part.of}
    assert unseen <= tried
    for page in ("docs/ascend.md", "docs/zh/ascend.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert all(f"| `{name}` |" in text for name, part in PARTS.items() if part.of and part.needs_card), page


def program(text: str, lines: Path) -> list[str]:
    return [sys.executable, "-c", f"import os, time; open({str(lines)!r}, 'w').write('held\\tbefore\\n'); {text}"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("time.sleep(60)", "not done after 2 s"),
        ("print('so it says'); raise ValueError(7)", "so it says"),
    ],
)
def test_however_a_part_ends_what_it_found_and_how_it_ended_are_told(text, told, tmp_path):
    (before, failed) = carry_out(program(text, tmp_path / "x"), tmp_path / "x", limit_seconds=2)
    assert before == ("held", "before")
    assert failed[0] == "FAILED"
    assert told in failed[1]


def test_a_check_that_raises_is_told_and_the_next_begins():
    found = list(each({"first": lambda: iter([(1 / 0, "")]), "second": lambda: iter([result("sum", 2.0, 1.0)])}))
    assert found[0] == ("FAILED", "first: ZeroDivisionError('division by zero')")
    assert ("apart", "second, sum 2 of at most 1") in found


@pytest.mark.parametrize(("dtype", "limit"), [(ms.float32, 1e-4), (ms.float16, 5e-3)])
def test_oracles_agree_with_what_a_cpu_computes(dtype, limit):
    plain = AttentionKernel()
    found = oracles.attention(lambda q, k, v, *, num_heads, scale: plain(q, k, v), dtype, (2, 3, 50, 16))
    assert set(found) == {"output", "gradient of q", "gradient of k", "gradient of v"}
    assert max(found.values()) <= limit
    assert oracles.convolution(device.causal_conv3d, dtype) <= limit
    assert oracles.product(dtype) <= limit


def test_oracles_tell_what_is_wrong():
    plain = AttentionKernel()
    without_scale = oracles.attention(
        lambda q, k, v, *, num_heads, scale: plain(q / scale, k, v), ms.float32, (1, 2, 20, 16)
    )
    assert min(without_scale.values()) > 0.1

    def a_frame_late(out_channels):
        plain = device.causal_conv3d(out_channels)
        return lambda x, weight: plain(ms.ops.concat((x[:, :, :1], x[:, :, :-1]), axis=2), weight)

    assert oracles.convolution(a_frame_late, ms.float32) > 0.1
    assert result("x", float("nan"), 1.0)[0] == "apart"


@without_card
def test_parts_for_a_card_run_here_where_they_can():
    assert [kind for kind, _ in PARTS["determinism"].run()] == ["held"]
    assert [kind for kind, _ in inlined_once((1,))] == ["told", "held"]


def test_the_machine_is_described_whatever_is_not_there():
    text = "\n".join(describe())
    assert f"mindspore {ms.__version__}" in text
    assert "npu-smi" in text
