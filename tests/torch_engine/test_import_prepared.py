"""The older trainers' prepared folders: written here as they document it, imported, trained on."""

import contextlib
import hashlib
import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from cogvideox_factory import intake
from cogvideox_factory.data import clip as naming
from cogvideox_factory.data.cache_index import open_cache, verify_cache
from cogvideox_factory.data.entry import read_entry
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.data.video import read_clip
from cogvideox_factory.errors import DataError, FactoryError, UnfitError
from cogvideox_factory.recipe import check
from cogvideox_factory.torch_engine import import_prepared, objective, prepare, train
from cogvideox_factory.torch_engine.border import to_tensor
from cogvideox_factory.torch_engine.encode import Encoder
from cogvideox_factory.torch_engine.text_encoder import TextEncoder
from cogvideox_factory.torch_engine.vae import CogVideoXVAE
from tests.clips import draw_lists
from tests.torch_engine.runs import losses

VARIANT = {"t2v": "cogvideox1.5-5b", "i2v": "cogvideox-5b-i2v"}
SIZE = {"num_frames": 9, "height": 64, "width": 96}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Five drawn clips in two lists, as the older trainers take them."""
    return draw_lists(tmp_path_factory.mktemp("clips"), [tuple(SIZE.values())] * 5, seed=1, prompts="prompts.txt")


@pytest.fixture(scope="module")
def encoded(tiny_model, clips):
    """What our VAE and text encoder make of the clips, in the originals' layout, float32."""
    made = {}

    @torch.no_grad()
    def make(task):
        if task not in made:
            folder = tiny_model(VARIANT[task])
            vae = Encoder(
                CogVideoXVAE.from_folder(folder / "vae", dtype=torch.float32, device="cpu"), None, max_sequence_length=0
            )
            text = TextEncoder.from_folder(folder, dtype=torch.float32, device="cpu")
            rows = []
            for index, caption in enumerate((clips / "prompts.txt").read_text().split("\n")[:5]):
                pixels = read_clip(clips / f"videos/{index}.mp4", ClipSpec(fps=8, **SIZE)).pixels
                moments = torch.cat(vae.video(to_tensor(pixels)[None]), dim=2)[0]  # [F, 2C, h, w]
                clean = torch.zeros(1), torch.zeros(1, *pixels[0].shape)
                image = torch.cat(vae.image(to_tensor(pixels[:1]), *clean), dim=2)[0]
                embeds = text.encode([caption], 16)[0].float()
                rows.append(
                    {
                        "caption": caption,
                        "video_latents": moments.transpose(0, 1).numpy(),
                        "image_latents": image.transpose(0, 1).numpy(),
                        "prompt_embeds": embeds.numpy(),
                    }
                )
            made[task] = rows
        return made[task]

    return make


def write_original(folder, clips, rows, *, suffix=".npy", change=lambda kind, array: array):
    """Write a prepared folder as `prepare_dataset` documents it: uuid names, C first, lists in another order."""
    names = [f"{index * 7919 % 5:08x}-aa-{index}" for index in range(len(rows))]
    order = sorted(range(len(rows)), key=lambda index: names[index])
    for index, row in enumerate(rows):
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        (folder / "prompts").mkdir(exist_ok=True)
        shutil.copy(clips / f"videos/{index}.mp4", folder / f"videos/{names[index]}.mp4")
        (folder / f"videos/{names[index]}.txt").write_text(json.dumps(SIZE))
        (folder / f"prompts/{names[index]}.txt").write_text(row["caption"])
        for kind in ("video_latents", "image_latents", "prompt_embeds"):
            (folder / kind).mkdir(exist_ok=True)
            array = change(kind, row[kind])
            path = folder / kind / f"{names[index]}{suffix}"
            np.save(path, array) if suffix == ".npy" else torch.save(torch.from_numpy(array), path)
    (folder / "prompts.txt").write_text("".join(f"{rows[i]['caption']}\n" for i in order))
    (folder / "videos.txt").write_text("".join(f"videos/{names[i]}.mp4\n" for i in order))
    return [names[i] for i in order]


def settings(tiny_model, root, cache, *, task="t2v", data=None, text=None, **training):
    values = {
        "task": task,
        "model": {"path": str(tiny_model(VARIANT[task]))},
        "data": {"root": str(root), "fps": 8.0} | (data or {}),
        "text": text or {},
        "cache": {"dir": str(cache)} | ({"image_noise_variants": 0} if task == "i2v" else {}),
        "run": {"device": "cpu", "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8.0},
        "train": {
            "steps": 5, "log_every": 1, "learning_rate": 1e-2, "batch_size": 2, "checkpointing": "none",
        } | ({"image_noise": False} if task == "i2v" else {}) | training,
    }  # fmt: skip
    return check(values, source="test")


@pytest.fixture
def named_by_caption(monkeypatch):
    """Draws are keyed by what a clip is called, which is the hash of its bytes: here its caption alone, so that the
    same clip draws the same numbers whether its video or its latents were hashed."""
    monkeypatch.setattr(naming, "clip_id", lambda content, caption: hashlib.sha256(caption.encode()).hexdigest())


@pytest.mark.parametrize(("task", "suffix"), [("t2v", ".npy"), ("t2v", ".pt"), ("i2v", ".npy"), ("i2v", ".pt")])
def test_an_imported_folder_trains_to_the_same_loss_as_our_cache(
    tiny_model, clips, encoded, tmp_path, named_by_caption, task, suffix
):
    """The originals keep float32 moments, which is all of what our cache keeps: every loss is equal, to the bit."""
    write_original(tmp_path / "theirs", clips, encoded(task), suffix=suffix)
    theirs = settings(tiny_model, tmp_path / "theirs", tmp_path / "imported", task=task, dir=str(tmp_path / "a"))
    index = import_prepared.run(theirs)
    assert index.recorded["counts"] == {"imported": 5}
    ours = settings(tiny_model, clips, tmp_path / "cache", task=task, dir=str(tmp_path / "b"))
    prepare.run(ours)
    one, other = train.run(theirs), train.run(ours)
    assert losses(one) == losses(other)
    assert len(losses(one)) == 5
    (a,), (b,) = (list((run / "final").glob("*.safetensors")) for run in (one, other))
    assert all(np.array_equal(value, load_file(b)[name]) for name, value in load_file(a).items())


def test_samples_train_as_a_posterior_without_spread(
    tiny_model, clips, encoded, tmp_path, named_by_caption, monkeypatch
):
    """Samples (here the means) keep no variance; without it our cache gives the same losses, but for e^-15 of noise."""

    def only_mean(kind, array):
        return array[: len(array) // 2] if kind.endswith("latents") else array

    write_original(tmp_path / "theirs", clips, encoded("t2v"), change=only_mean)
    theirs = settings(tiny_model, tmp_path / "theirs", tmp_path / "imported", dir=str(tmp_path / "a"))
    index = import_prepared.run(theirs)
    assert index.recorded["imported"]["latents"] == {"samples, channels first": 5}
    arrays = read_entry(index.clips[0].clip_file)[0]
    assert (arrays["logvar"].astype(np.float32) == -30).all()
    ours = settings(tiny_model, clips, tmp_path / "cache", dir=str(tmp_path / "b"))
    prepare.run(ours)
    one = train.run(theirs)
    monkeypatch.setattr(objective, "sample_posterior", lambda mean, logvar, noise: mean)
    np.testing.assert_allclose(losses(one), losses(train.run(ours)), rtol=1e-4)


def test_frames_first_is_read_too(tiny_model, clips, encoded, tmp_path):
    def frames_first(kind, array):
        return np.ascontiguousarray(array.swapaxes(0, 1)) if kind.endswith("latents") else array

    for name, change in (("first", lambda kind, array: array), ("second", frames_first)):
        write_original(tmp_path / name, clips, encoded("t2v"), change=change)
    plain, turned = (
        import_prepared.run(settings(tiny_model, tmp_path / name, tmp_path / f"{name}-cache"))
        for name in ("first", "second")
    )
    assert turned.recorded["imported"]["latents"] == {"moments, frames first": 5}
    for a, b in zip(plain.clips, turned.clips, strict=True):
        assert a.caption == b.caption
        for key, value in read_entry(a.clip_file)[0].items():
            assert (value == read_entry(b.clip_file)[0][key]).all()


def test_importing_again_writes_nothing_and_ends_the_same(tiny_model, clips, encoded, tmp_path):
    write_original(tmp_path / "theirs", clips, encoded("t2v"))
    config = settings(tiny_model, tmp_path / "theirs", tmp_path / "cache")
    import_prepared.run(config)
    before = {path: (path.read_bytes(), path.stat().st_ino) for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert verify_cache(tmp_path / "cache") == []
    listed = (tmp_path / "cache/cache.json").read_text(), (tmp_path / "cache/clips.jsonl").read_text()
    import_prepared.run(config)
    again = {path: (path.read_bytes(), path.stat().st_ino) for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert again == before
    assert listed == ((tmp_path / "cache/cache.json").read_text(), (tmp_path / "cache/clips.jsonl").read_text())


def test_what_was_imported_is_never_taken_for_what_prepare_makes(tiny_model, clips, encoded, tmp_path):
    write_original(tmp_path / "theirs", clips, encoded("t2v"))
    config = settings(tiny_model, tmp_path / "theirs", tmp_path / "cache")
    imported = import_prepared.run(config)
    recorded = imported.recorded
    assert recorded["video"]["settings"]["imported"] is True
    assert recorded["video"]["settings"]["crop"] == recorded["text"]["settings"]["dtype"] == "unknown"
    assert recorded["imported"]["from"] == str(tmp_path / "theirs")
    prepared = prepare.run(config)
    assert not {c.clip_file for c in imported.clips} & {c.clip_file for c in prepared.clips}
    assert not {c.text_file for c in imported.clips} & {c.text_file for c in prepared.clips}


def test_latents_that_were_scaled_or_come_from_another_vae_are_refused(tiny_model, clips, encoded, tmp_path):
    def scaled(kind, array):
        return array * np.float32(0.7) if kind == "video_latents" else array

    def other(kind, array):
        return np.ascontiguousarray(array[::-1]) if kind == "video_latents" else array

    def other_text(kind, array):
        return np.ascontiguousarray(array[::-1]) if kind == "prompt_embeds" else array

    for name, change, message in (
        ("scaled", scaled, "scaled twice"),
        ("other", other, "another VAE"),
        ("text", other_text, "Another text encoder"),
    ):
        write_original(tmp_path / name, clips, encoded("t2v"), change=change)
        with pytest.raises(DataError, match=message):
            import_prepared.run(settings(tiny_model, tmp_path / name, tmp_path / "cache"))
    assert not (tmp_path / "cache/cache.json").exists()


def test_without_videos_the_latents_are_taken_at_their_word_and_it_is_said(
    tiny_model, clips, encoded, tmp_path, capsys
):
    write_original(tmp_path / "theirs", clips, encoded("t2v"))
    shutil.rmtree(tmp_path / "theirs/videos")
    index = import_prepared.run(settings(tiny_model, tmp_path / "theirs", tmp_path / "cache"))
    assert index.recorded["imported"]["tested"]["latents"] == {"clips": 0}
    assert "is assumed" in capsys.readouterr().out


def test_settings_that_the_folder_cannot_follow(tiny_model, clips, encoded, tmp_path):
    write_original(tmp_path / "theirs", clips, encoded("i2v"))
    config = settings(tiny_model, tmp_path / "theirs", tmp_path / "cache", task="i2v")
    noisy = config.model_copy(update={"cache": config.cache.model_copy(update={"image_noise_variants": 4})})
    with pytest.raises(FactoryError, match="only the clean first frame"):
        import_prepared.run(noisy)
    with pytest.raises(FactoryError, match="trigger_word='zzz' cannot be put in front"):
        import_prepared.run(
            settings(tiny_model, tmp_path / "theirs", tmp_path / "cache", task="i2v", data={"trigger_word": "zzz"})
        )
    with pytest.raises(DataError, match=r"made with 16 tokens: set text\.max_sequence_length=16"):
        import_prepared.run(
            settings(tiny_model, tmp_path / "theirs", tmp_path / "c", task="i2v", text={"max_sequence_length": 20})
        )
    import_prepared.run(config)
    with pytest.raises(UnfitError, match=r"video\.height"):
        open_cache(tmp_path / "cache", prepare_settings(config, tiny_model))


def prepare_settings(config, tiny_model):
    """What a run at another height would want."""
    folder = tiny_model(VARIANT["i2v"])
    model = intake.transformer_config(config, folder)
    spec = intake.clip_spec(config, intake.training_shape(config, model))
    other = ClipSpec(num_frames=9, height=32, width=spec.width, fps=8)
    return intake.cache_settings(config, folder, model, other, "float32").as_imported()


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_settings_without_effect_are_named(tiny_model, clips, encoded, tmp_path, capsys):
    write_original(tmp_path / "theirs", clips, encoded("t2v"))
    asked = {"crop": "random", "windows": "all"}
    import_prepared.run(settings(tiny_model, tmp_path / "theirs", tmp_path / "cache", data=asked))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "without effect" in line]
    assert line.endswith(": data.fps=8.0, data.crop=random, data.windows=all")


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    for name, value in (("evil", Evil()), ("dict", {"a": torch.zeros(2)}), ("list", [1])):
        torch.save(value, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=r"no tensor file|no tensor file of|not one dense tensor"):
            import_prepared.read_pt((tmp_path / f"{name}.pt").read_bytes())
    for data in (b"", b"nonsense", b"PK\x03\x04", (tmp_path / "list.pt").read_bytes()[:-40]):
        with pytest.raises(ValueError, match=r"no tensor file|no tensor file of"):
            import_prepared.read_pt(data)
    assert "executed" not in capsys.readouterr().out
    torch.save(torch.ones(2, 3, dtype=torch.bfloat16)[:, 1:], tmp_path / "good.pt")
    assert np.array_equal(import_prepared.read_pt((tmp_path / "good.pt").read_bytes()), np.ones((2, 2), np.float32))


@given(st.integers(0, 10**6), st.integers(1, 255), st.booleans())
@hypothesis_settings(max_examples=150, deadline=None)
def test_a_damaged_tensor_file_is_a_value_error_or_an_array(place, flip, cut):
    file = io.BytesIO()
    torch.save(torch.arange(24.0).view(2, 3, 4), file)
    data = bytearray(file.getvalue())
    place %= len(data)
    data = data[:place] if cut else data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :]
    with contextlib.suppress(ValueError):
        assert isinstance(import_prepared.read_pt(bytes(data)), np.ndarray)


def test_the_factor_is_found_by_size():
    here = SimpleNamespace()
    import_prepared.require_unscaled(0.99, 1.02, 0.7, folder=here)
    import_prepared.require_unscaled(0.99, 1.05, 1.15258426, folder=here)
    for ratio, factor in ((0.71, 0.7), (1.4, 0.7), (1.14, 1.15258426), (0.88, 1.15258426)):
        with pytest.raises(DataError, match="scaled twice"):
            import_prepared.require_unscaled(0.99, ratio, factor, folder=here)
    for correlation in (0.2, float("nan")):
        with pytest.raises(DataError, match="another VAE"):
            import_prepared.require_unscaled(correlation, 1.0, 0.7, folder=here)
