"""The commands of the original's README, as its users type them: its scripts, its flags, on a tiny model."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cogvideox_factory.checkpoints import list_checkpoints
from cogvideox_factory.cli import main
from cogvideox_factory.config import Config
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.original.translate import SCRIPTS, translate
from cogvideox_factory.recipe import read_recipe
from tests.clips import draw_lists
from tests.ending import ask_to_end
from tests.original.brought import config_of

SCRIPTS_FOLDER = Path(__file__).parents[2] / "scripts"
SIZE = {"H": "48", "W": "80", "F": "9", "MAX_SEQUENCE_LENGTH": "16"}
SIZE_FLAGS = "--height_buckets 48 --width_buckets 80 --frame_buckets 9 --max_num_frames 9 --max_sequence_length 16"


@contextmanager
def start(name: str, *words: str, **variables: object) -> Iterator[subprocess.Popen]:
    """Start a script of `scripts/` as from a shell, with these variables and no others of its own."""
    kept = {key: os.environ[key] for key in ("PATH", "PYTHONPATH", "HOME", "OMP_NUM_THREADS") if key in os.environ}
    environment = kept | {"PYTHON": sys.executable} | {key: str(value) for key, value in variables.items()}
    command = ["bash", str(SCRIPTS_FOLDER / name), *words]
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield running
    finally:
        ask_to_end(running)


def script(name: str, *words: str, **variables: object) -> subprocess.CompletedProcess:
    """Run a script to its end."""
    with start(name, *words, **variables) as running:
        printed, said = running.communicate(timeout=240)
    return subprocess.CompletedProcess(running.args, running.returncode, printed, said)


def words_of(name: str, *extra: str, **variables: object) -> list[list[str]]:
    """Return the commands that a script would run, as words."""
    done = script(name, *extra, PYTHON="echo", **variables)
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("Running command: ") for line in done.stdout.splitlines() if line.startswith("Running")]
    return [shlex.split(line) for line in lines]


def settings_of(words: list[str], *, num_processes: int) -> Config:
    """Return the settings of a command with `--original NAME`."""
    place = words.index("--original")
    name, typed = SCRIPTS[words[place + 1]], words[place + 2 :]
    return config_of(translate(name, typed, origin="mindspore", num_processes=num_processes))


@pytest.fixture(scope="module")
def prepared(readme_clips, tiny_model, tmp_path_factory) -> Path:
    """A cache, by `prepare_dataset.sh`."""
    folder = tmp_path_factory.mktemp("prepared") / "preprocessed-dataset"
    done = script(
        "prepare_dataset.sh", NUM_NPUS=1, MODEL_NAME_OR_PATH=tiny_model("cogvideox1.5-5b"), DATA_ROOT=readme_clips,
        OUTPUT_DIR=folder, **SIZE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cogvideox prepare --model.path" in done.stdout
    return folder


def test_quick_start_prepare_train_infer_by_the_scripts(prepared, tiny_model, tmp_path):
    """PyNative, because a graph is compiled longer than all of this takes."""
    model = tiny_model("cogvideox1.5-5b")
    done = script(
        "train_text_to_video_sft.sh", "--lr_warmup_steps", "1", NUM_NPUS=1, MODEL_NAME_OR_PATH=model,
        DATA_ROOT=prepared, OUTPUT_ROOT_DIR=tmp_path, MAX_TRAIN_STEPS="2", LEARNING_RATES="fast 1e-5", MINDSPORE_MODE=1,
        **SIZE,
    )  # fmt: skip
    name = "cogvideox-sft__optimizer_adamw_bf16__steps_2__lr-schedule_cosine_with_restarts__learning-rate_"
    assert done.returncode == 1, "one of the two runs fails, and the other does not make up for it"
    assert f"FAILED: {name}fast (exit code 2)" in done.stderr
    assert "--learning_rate fast: that is not a number" in done.stderr
    run = tmp_path / f"{name}1e-5"
    assert (run / "final/transformer/config.json").is_file()
    config = read_recipe(run / "config.yaml")
    assert (config.task, config.model.path, config.run.seed) == ("t2v", str(model), 42)
    assert (config.run.dtype, config.text.max_sequence_length) == ("bfloat16", 16)
    assert (config.cache.dir, config.data.root) == (str(prepared), "")
    assert (config.data.height, config.data.width, config.data.num_frames) == (48, 80, 9)
    train = config.train
    assert (train.method, train.steps, train.save_every, train.num_workers) == ("full", 2, 2000, 2)
    assert (train.batch_size, train.gradient_accumulation, train.learning_rate) == (1, 1, 1e-5)
    assert (train.schedule, train.warmup_steps, train.num_cycles) == ("cosine_with_restarts", 1, 1)
    assert (train.beta1, train.beta2, train.weight_decay, train.max_grad_norm) == (0.9, 0.95, 0.001, 1.0)
    assert (train.checkpointing, train.master_weights) == ("save_attention", "float32")
    assert (config.parallel.sequence, config.parallel.zero) == (1, 0)
    told = "--enable_slicing: no effect, the VAE takes clips one at a time in any case"
    assert told in done.stdout

    done = script(
        "run_infer_text_to_video.sh", "--sampling.steps", "2", NUM_NPUS=1, MODEL_NAME_OR_PATH=model,
        PROMPT="a red circle; it's \"big\" $HOME", TRANSFORMER_PATH=run, OUTPUT_DIR=tmp_path / "out", **SIZE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/output.mp4").stat().st_size > 0
    assert 'a red circle; it\'s \\"big\\" $HOME' in (tmp_path / "out/output.json").read_text()


def test_image_to_video_by_their_programs(old_clips, tiny_model, tmp_path, capsys):
    model = f"--pretrained_model_name_or_path {tiny_model('cogvideox1.5-5b-i2v')}"
    lists = "--caption_column prompt.txt --video_column videos.txt"
    words = f"{model} --data_root {old_clips} {lists} --output_dir {tmp_path / 'cache'} {SIZE_FLAGS} --dtype fp32"
    words += " --save_image_latents --vae_cache --embeddings_cache --id_token BW_STYLE --video_reshape_mode center"
    assert main(["prepare", "--original", "prepare-dataset", *words.split()]) == 0
    words = f"{model} --data_root {tmp_path / 'cache'} {lists} --vae_cache --embeddings_cache {SIZE_FLAGS}"
    words += f" --output_dir {tmp_path / 'run'} --max_train_steps 2 --train_batch_size 2 --optimizer adamw --rank 4"
    words += " --lora_alpha 4 --noised_image_dropout 0.5"
    assert main(["train", "--original", "image-to-video-lora", *words.split()]) == 0
    config = read_recipe(tmp_path / "run/config.yaml")
    assert (config.task, config.lora.rank, config.train.image_dropout) == ("i2v", 4, 0.5)
    assert (config.data.trigger_word, config.data.crop) == ("BW_STYLE", "center"), "as the cache was prepared"
    out = capsys.readouterr().out
    printed = next(line for line in out.splitlines() if line.startswith("  cogvideox train"))
    again = [*shlex.split(printed)[1:], "--train.dir", str(tmp_path / "again")]
    assert main(again) == 0, "the printed command is the same run"
    assert read_recipe(tmp_path / "again/config.yaml").model_dump(exclude={"train": {"dir"}}) == config.model_dump(
        exclude={"train": {"dir"}}
    )


def test_clips_of_many_shapes_by_a_bucket_file(tiny_model, tmp_path, capsys):
    """Larger clips, and positions for them: the smallest resolution of a bucket file is 144p."""
    folder = shutil.copytree(tiny_model("cogvideox1.5-5b"), tmp_path / "model")
    config = json.loads((folder / "transformer/config.json").read_text()) | {"sample_height": 32, "sample_width": 32}
    (folder / "transformer/config.json").write_text(json.dumps(config))
    clips = draw_lists(tmp_path / "clips", [(9, 144, 256), (9, 256, 144)], seed=0, prompts="prompts.txt")
    buckets = tmp_path / "bucket.yaml"
    buckets.write_text('bucket_config:\n  "144p": { 9: [1.0, 1] }\n')
    model = f"--pretrained_model_name_or_path {folder} --max_sequence_length 16"
    lists, cache = "--caption_column prompts.txt --video_column videos.txt", tmp_path / "cache"
    words = f"{model} --data_root {clips} {lists} --output_dir {cache} --vae_cache --embeddings_cache"
    words += f" --data.buckets {buckets} --height_buckets 64 --width_buckets 96 --frame_buckets 17"
    assert main(["prepare", "--original", "prepare-dataset", *words.split()]) == 0
    words = f"{model} --data_root {cache} --embeddings_cache --max_train_steps 2 --optimizer adamw"
    words += f" --output_dir {tmp_path / 'run'} --dynamic_shape --bucket_config {buckets}"
    assert main(["train", "--original", "text-to-video-sft", *words.split()]) == 0
    shapes = {
        line.split(" of ")[1].split(" ")[0] for line in capsys.readouterr().out.splitlines() if " tokens; " in line
    }
    assert shapes == {"9x144x256", "9x256x144"}


def test_buckets_for_a_cache_of_one_size_are_told(prepared, readme_clips):
    words = f"--pretrained_model_name_or_path m --data_root {prepared} --max_train_steps 2 --bucket_config b.yaml"
    script = SCRIPTS["text-to-video-sft"]
    with pytest.raises(FactoryError, match=r"--data\.buckets b\.yaml"):
        translate(script, [*words.split(), "--embeddings_cache"], origin="mindspore")
    found = translate(script, [*words.split(), "--vae_cache", "--embeddings_cache"], origin="mindspore")
    assert "--bucket_config: no effect, the cache was prepared at one size" in found.said
    words = f"--pretrained_model_name_or_path m --data_root {prepared} --vae_cache --num_train_epochs 2"
    found = translate(script, words.split(), origin="mindspore")
    num_clips = len((readme_clips / "videos.txt").read_text().split())
    assert found.settings["train.steps"] == 2 * -(-num_clips // 4), "four a step, twice"


def test_the_pytorch_projects_command_line_trains_from_clips(old_clips, tiny_model, tmp_path):
    words = f"--pretrained_model_name_or_path {tiny_model('cogvideox-2b')} --data_root {old_clips} "
    words += "--caption_column prompt.txt --video_column videos.txt --height_buckets 48 --width_buckets 80 "
    words += "--frame_buckets 9 --rank 4 --lora_alpha 4 --mixed_precision no --num_train_epochs 1 --train_batch_size 2 "
    words += f"--output_dir {tmp_path} --optimizer adamw --seed 3 --dataloader_num_workers 0 --report_to none "
    words += "--gradient_checkpointing --nccl_timeout 1800 --lr_scheduler constant --random_flip 0.5"
    assert main(["train", "--original", "pytorch:text-to-video-lora", *words.split()]) == 0
    config = read_recipe(tmp_path / "config.yaml")
    assert (config.train.steps, config.train.batch_size, config.run.seed) == (2, 2, 3)
    assert (config.data.flip_probability, config.data.short_clips) == (0.5, "reject")


@pytest.mark.parametrize(
    ("name", "sft", "rate", "model"),
    [
        ("train_text_to_video_sft.sh", True, 1e-5, "THUDM/CogVideoX1.5-5b"),
        ("train_image_to_video_sft.sh", True, 2e-5, "THUDM/CogVideoX1.5-5b-I2V"),
        ("train_text_to_video_lora.sh", False, 1e-5, "THUDM/CogVideoX1.5-5b"),
        ("train_image_to_video_lora.sh", False, 2e-5, "THUDM/CogVideoX1.5-5b-I2V"),
    ],
)
def test_the_train_scripts_have_the_shipped_defaults(name, sft, rate, model):
    (words,) = words_of(name, VAE_CACHE=0, EMBEDDINGS_CACHE=0)
    assert " ".join(words[1:11]) == "-m cogvideox_factory launch --nproc 8 --restarts 0 -- train --original"
    config = settings_of(words, num_processes=8)
    assert config.model.path == model
    assert (config.train.steps, config.train.save_every, config.train.warmup_steps) == (
        100000 if sft else 3000,
        2000,
        800,
    )
    assert config.train.learning_rate == pytest.approx(rate if sft else 8 * rate), "scale_lr, over 1 or 8 clips a step"
    assert (config.parallel.sequence, config.parallel.zero) == ((8, 3) if sft else (1, 0))
    assert (config.train.compile, config.train.optimizer) == ("default", "adamw")
    assert (config.data.height, config.data.width, config.data.num_frames) == (768, 1360, 77)
    assert (config.text.max_sequence_length, config.run.seed, config.run.dtype) == (224, 42, "bfloat16")
    assert (config.data.captions, config.data.videos) == ("prompts.txt", "videos.txt")
    assert (config.data.root, config.train.weight_decay) == ("preprocessed-dataset", 0.001)
    (cached,) = words_of(name)
    assert {"--vae_cache", "--embeddings_cache"} <= set(cached)


def test_several_sizes_are_buckets():
    (words,) = words_of("prepare_dataset.sh", HEIGHT_BUCKETS="480 720", WIDTH_BUCKETS="720 960", FRAME_BUCKETS="9 49")
    prepared = settings_of(words, num_processes=8).data
    (words,) = words_of("train_text_to_video_sft.sh", H="480 720", W="720 960", F="9 49", VAE_CACHE=0,
                        EMBEDDINGS_CACHE=0)  # fmt: skip
    for data in (prepared, settings_of(words, num_processes=8).data):
        assert (data.buckets, data.height, data.width, data.num_frames) == ("auto", 720, 960, 49)


def test_every_combination_of_the_four_lists_is_run():
    lists = {"LEARNING_RATES": "1e-5 2e-5", "LR_SCHEDULES": "cosine linear", "OPTIMIZERS": "adam adamw_bf16"}
    runs = words_of("train_text_to_video_lora.sh", MAX_TRAIN_STEPS="10 20", OUTPUT_ROOT_DIR="out", **lists)
    folders = [words[words.index("--output_dir") + 1] for words in runs]
    assert len(set(folders)) == 16
    first = "out/cogvideox-lora__optimizer_adam__steps_10__lr-schedule_cosine__learning-rate_1e-5"
    assert folders[0] == first, "named as the original named them"


def test_a_run_that_was_stopped_ends_a_sweep(tmp_path):
    stopping = tmp_path / "python"
    stopping.write_text("#!/bin/sh\nexit 75\n")
    stopping.chmod(0o755)
    done = script("train_text_to_video_lora.sh", PYTHON=stopping, NUM_NPUS=1, LEARNING_RATES="1e-5 2e-5 3e-5")
    assert done.returncode == 75
    assert done.stdout.count("Running command") == 1
    assert "learning-rate_1e-5 (exit code 75); the same script goes on." in done.stderr
    assert "FAILED" not in done.stderr


def test_a_stop_of_a_script_reaches_the_run_on_many_cards_and_ends_the_sweep(prepared, tiny_model, tmp_path):
    """The signal is for the script alone, as a scheduler or `kill` sends it; the run saves where it is."""
    name = "cogvideox-lora__optimizer_adamw_bf16__steps_9999__lr-schedule_cosine_with_restarts__learning-rate_1e-5"
    with start(
        "train_text_to_video_lora.sh", "--run.device", "cpu", NUM_NPUS=2, MINDSPORE_MODE=1, DATA_ROOT=prepared,
        MODEL_NAME_OR_PATH=tiny_model("cogvideox1.5-5b"), OUTPUT_ROOT_DIR=tmp_path, MAX_TRAIN_STEPS=9999,
        LEARNING_RATES="1e-5 2e-5", **SIZE,
    ) as running:  # fmt: skip
        end = time.monotonic() + 200
        while not (tmp_path / name / "metrics.jsonl").exists() and running.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        running.terminate()
        printed, said = running.communicate(timeout=100)
    assert running.returncode == 75, printed + said
    assert [path.name for path in tmp_path.iterdir()] == [name], "no second run"
    (saved,) = list_checkpoints(tmp_path / name)
    logged = [json.loads(line)["step"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    assert saved >= max(logged) > 0
    assert f"Stopped in {name} (exit code 75); the same script goes on." in said


def test_many_nodes_and_shapes_and_larger_models_by_variables():
    more = {"NUM_NPUS": 16, "NODE_RANK": 1, "MASTER_ADDR": "10.0.0.1", "ENABLE_DYNAMIC_SHAPE": 1, "VAE_CACHE": 0}
    (words,) = words_of(
        "train_text_to_video_sft.sh", EMBEDDINGS_CACHE=0, TRANSFORMER_CONFIG="30b.yaml", SP_SIZE=8, **more
    )
    launcher = " ".join(words[: words.index("train")])
    assert launcher.endswith("launch --nproc 8 --restarts 0 --nodes 2 --node-rank 1 --master-addr 10.0.0.1 --")
    config = settings_of(words, num_processes=16)
    assert config.model.transformer_config == "30b.yaml"
    assert Path(config.data.buckets or "").is_file(), "the bucket file of recipes/"
    assert (config.parallel.sequence, config.train.batch_size) == (8, 1)
    done = script("train_text_to_video_sft.sh", NUM_NPUS=12, PYTHON="echo")
    assert done.returncode == 1
    assert "multiple of 8" in done.stderr


def test_with_the_other_engine_msrun_starts_what_torchrun_would():
    more = {"ENGINE": "mindspore", "NUM_NPUS": 16, "NODE_RANK": 1, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": 4000}
    (words,) = words_of("prepare_dataset.sh", **more)
    launcher = words[1 : words.index("prepare")]
    assert launcher[:2] == ["-m", "mindspore.parallel.cluster.run"]
    assert launcher[-3:] == ["python", "-m", "cogvideox_factory"]
    given = {"--worker_num=16", "--local_worker_num=8", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=4000"}
    assert given < set(launcher)
    (words,) = words_of("train_text_to_video_sft.sh", **more)
    assert " ".join(words[: words.index("train")]).endswith("--nodes 2 --node-rank 1 --master-addr 10.0.0.1 --")
    assert words[-2:] == ["--engine", "mindspore"]


def test_prepare_and_infer_scripts_have_the_shipped_defaults():
    (words,) = words_of("prepare_dataset.sh", SAVE_IMAGE_LATENTS=1)
    launcher = "-m torch.distributed.run --nproc-per-node 8 --standalone -m cogvideox_factory prepare --original"
    assert " ".join(words[1:10]) == launcher
    config = settings_of(words, num_processes=8)
    assert (config.task, config.model.path) == ("i2v", "THUDM/CogVideoX1.5-5b")
    assert (config.cache.dir, config.run.dtype) == ("preprocessed-dataset", "bfloat16")
    assert (config.data.captions, config.data.num_frames) == ("prompt.txt", 77)
    (words,) = words_of("run_infer_image_to_video.sh", IMAGE_PATH="a b.png", LORA_PATH="l")
    config = settings_of(words, num_processes=8)
    assert (config.parallel.sequence, config.parallel.zero) == (8, 3)
    assert (config.task, config.generate.image, config.generate.lora) == ("i2v", ["a b.png"], ["l"])
    assert (config.generate.out, config.model.path) == (
        "./output_infer_768_1360_77/output.mp4", "THUDM/CogVideoX1.5-5b-I2V",
    )  # fmt: skip
    done = script("run_infer_image_to_video.sh")
    assert done.returncode != 0
    assert "give IMAGE_PATH" in done.stderr


@pytest.mark.parametrize("name", ["cogvideox_text_to_video_lora", "cogvideox_text_to_video_sft",
    "cogvideox_image_to_video_lora", "cogvideox_image_to_video_sft", "prepare_dataset", "infer"])  # fmt: skip
def test_their_programs_are_modules_of_that_name(name):
    """One is started; the others are read, as starting takes a second each."""
    path = Path(__file__).parents[2] / "cogvideox_factory" / "original" / f"{name}.py"
    wanted = name.removeprefix("cogvideox_").replace("_", "-")
    assert f'"--original", "{wanted}", *sys.argv[1:]' in path.read_text()
    assert wanted in SCRIPTS
    if name == "infer":
        command = [sys.executable, "-m", f"cogvideox_factory.original.{name}", "--help"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert "--npy_output_path" in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "recipe.yaml", "--original", "text-to-video-sft"], "must come first"),
        (["train", "--original"], "does the work of text-to-video-lora"),
        (["prepare", "--original=infer", "--prompt", "x"], "cogvideox generate --original infer"),
    ],
)
def test_original_in_the_wrong_place_is_told(words, says, capsys):
    assert main(words) == 2
    assert says in capsys.readouterr().err
