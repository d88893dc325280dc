"""`cogvideox plan`: what is printed and written, without a model, a card or a framework."""

import json
import subprocess
import sys

import pytest

from cogvideox_factory.cli import main


def test_a_recipe_is_planned_without_its_weights(capsys, tmp_path):
    report = tmp_path / "plan.json"
    assert main(["plan", "recipes/t2v_lora.yaml", "--card", "RTX 4090", "--clips", "100", "--json", str(report)]) == 0
    out = capsys.readouterr().out
    assert "49 x 480 x 720 = 17,550 + 226 tokens" in out
    assert "1500 steps are 15.0 epochs of 100 clips" in out
    assert ": fits" in out
    found = json.loads(report.read_text())
    assert found["fits"]
    assert found["choices"][0]["settings"] == []
    assert found["recipe"]["device_bytes"] <= found["machine"]["memory"]
    hours = found["recipe"]["seconds_a_step"] * 1500 / 3600
    assert found["recipe"]["hours"] == pytest.approx(hours)


def test_what_does_not_fit_is_said_with_what_would(capsys):
    words = ["recipes/t2v_full.yaml", "--model.path", "THUDM/CogVideoX1.5-5B", "--card", "H100", "--cards", "8"]
    assert main(["plan", *words]) == 0
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out
    assert "--train.batch-size 8, for 8 groups of cards" in out
    assert "--parallel.zero" in out.split("best first")[1]
    assert main(["plan", "recipes/t2v_full.yaml", "--card", "x", "--memory-gib", "2"]) == 0
    assert "NOTHING FITS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["recipes/t2v_lora.yaml", "--card", "H10"], "card 'H10' is not known"),
        (["recipes/t2v_lora.yaml", "--parallel.sequence", "4", "--cards", "2"], "do not divide 2 card"),
        (["recipes/t2v_lora.yaml", "--task", "i2v"], "task=i2v"),
        ([], "which model"),
    ],
)
def test_what_cannot_be_planned_is_an_error(words, says, capsys):
    assert main(["plan", *words]) == 2
    assert says in capsys.readouterr().err


def test_no_framework_is_loaded():
    code = (
        "import sys; from cogvideox_factory.cli import main; main(['plan', 'recipes/t2v_lora.yaml', '--cards', '2']);"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
