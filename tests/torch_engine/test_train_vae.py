"""VAE training: it learns, it keeps what it should keep, its folder loads elsewhere, wrong settings are refused."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.models import tiny_facts
from cogvideox_factory.recipe import check
from cogvideox_factory.tiny.world import random_scene, render
from cogvideox_factory.torch_engine import train_vae
from cogvideox_factory.torch_engine.vae import CogVideoXVAE
from cogvideox_factory.weights import load_folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for index in range(8):
        frames = render(random_scene(3, index), num_frames=9, height=32, width=48, fps=8)
        export_to_video(frames, folder / f"{index}.mp4", fps=8)
        (folder / f"{index}.txt").write_text("a shape")
    return folder


@pytest.fixture(scope="module")
def vae_config(tmp_path_factory):
    file = tmp_path_factory.mktemp("vae") / "vae.json"
    file.write_text(json.dumps(tiny_facts("cogvideox-5b").vae.to_dict()))
    return file


def settings(clips, out, **vae):
    vae = {"steps": 30, "batch_size": 4, "num_held_out": 2, "log_every": 10, "dir": str(out), **vae}
    size = {"num_frames": 9, "height": 32, "width": 48, "fps": 8.0}
    return check(
        {"data": {"root": str(clips), **size}, "vae": vae, "run": {"device": "cpu", "dtype": "float32"}}, source="test"
    )


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def fresh(clips, vae_config, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "vae-run"
    config = settings(clips, out, config=str(vae_config), learning_rate=2e-3, steps=60, crop=32)
    return train_vae.run(config), out


def test_a_fresh_vae_learns_and_says_how_well(fresh):
    _, out = fresh
    losses = [row["mse"] for row in rows(out) if "mse" in row]
    assert np.mean(losses[-2:]) < 0.5 * losses[0]
    assert [row["held_out_psnr"] for row in rows(out) if "held_out_psnr" in row][-1] > 10


def test_its_folder_is_one_diffusers_loads(fresh, clips):
    folder, _ = fresh
    ours = CogVideoXVAE.from_folder(folder, dtype=torch.float32)
    theirs = AutoencoderKLCogVideoX.from_pretrained(folder)
    assert theirs.config.scaling_factor == ours.config.scaling_factor != 0.7
    video = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    with torch.no_grad():
        mean, _ = ours.encode(video)
        expected = theirs.encode(video).latent_dist.mean
    assert torch.allclose(mean.transpose(1, 2), expected, atol=1e-4)


def test_scaled_latents_have_unit_variance(fresh, clips):
    folder, _ = fresh
    vae = CogVideoXVAE.from_folder(folder, dtype=torch.float32)
    frames = np.stack([render(random_scene(3, i), num_frames=9, height=32, width=48, fps=8) for i in range(8)])
    with torch.no_grad():
        mean, _ = vae.encode(train_vae.pixels_from_uint8(torch.from_numpy(frames)))
    assert float((mean * vae.config.scaling_factor).std()) == pytest.approx(1, abs=0.15)


def test_balanced_latents_lead_to_the_same_pictures_and_load_in_diffusers(fresh, clips, tmp_path):
    folder, _ = fresh
    balanced = train_vae.run(settings(clips, tmp_path / "out", start=str(folder), steps=0, balance=1.0))
    before = AutoencoderKLCogVideoX.from_pretrained(folder)
    after = AutoencoderKLCogVideoX.from_pretrained(balanced)
    frames = np.stack([render(random_scene(3, i), num_frames=9, height=32, width=48, fps=8) for i in range(8)])
    video = train_vae.pixels_from_uint8(torch.from_numpy(frames))
    with torch.no_grad():
        old, new = before.encode(video).latent_dist.mean, after.encode(video).latent_dist.mean
        assert torch.allclose(after.decode(new).sample, before.decode(old).sample, atol=1e-3)
    assert after.config.scaling_factor == 1.0
    assert _spread_of_directions(new) < 4 < 40 < _spread_of_directions(old)


def _spread_of_directions(latents):
    samples = latents.movedim(1, -1).flatten(0, -2).double()
    moments = torch.linalg.eigvalsh(samples.T @ samples / len(samples))
    return float(moments[-1] / moments[0])


def test_decoder_training_keeps_every_latent(fresh, clips, tmp_path):
    folder, _ = fresh
    again = train_vae.run(settings(clips, tmp_path / "more", start=str(folder), parts="decoder", learning_rate=1e-3))
    before, after = load_folder(folder), load_folder(again)
    changed = {name.split(".")[0] for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"decoder"}
    assert (folder / "config.json").read_text() == (again / "config.json").read_text()


def test_the_same_seed_gives_the_same_weights(clips, vae_config, tmp_path):
    made = [
        train_vae.run(settings(clips, tmp_path / name, config=str(vae_config), steps=3, image_share=0.5))
        for name in ("one", "two")
    ]
    one, two = map(load_folder, made)
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_the_loss_is_what_its_parts_say():
    vae = CogVideoXVAE(tiny_facts("cogvideox-5b").vae)
    pixels = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    noise = torch.zeros(1, 3, 16, 4, 4)
    loss, parts = train_vae.reconstruction_loss(vae, pixels, noise, weighting=train_vae.Weights(l1=0.5, kl=0.25))
    mean, logvar = vae.encode(pixels)
    error = vae.decode(mean) - pixels
    own = torch.distributions.Normal(mean, torch.exp(logvar / 2))
    unit = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    kl = torch.distributions.kl_divergence(own, unit).mean()
    torch.testing.assert_close(loss, (error**2).mean() + 0.5 * error.abs().mean() + 0.25 * kl)
    assert set(parts) == {"mse", "l1", "kl"}


@pytest.mark.parametrize(
    ("changes", "law"),
    [
        ({"data": {"root": ""}}, "--data.root"),
        ({"data": {"fps": None}}, "--data.fps"),
        ({"data": {"buckets": "auto"}}, r"data\.buckets has no effect"),
        ({"vae": {"crop": 40}}, "larger than the clips"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(clips, vae_config, tmp_path, changes, law):
    values = settings(clips, tmp_path / "run", config=str(vae_config)).model_dump()
    for section, fields in changes.items():
        values[section] |= fields
    with pytest.raises(FactoryError, match=law):
        train_vae.run(check(values, source="test"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("vae", "law"),
    [({"crop": 20}, "multiple of 8"), ({"config": "a", "start": "b"}, "give one"),
     ({"config": "a", "parts": "decoder"}, "use both"), ({"steps": 0}, "balances nothing"),
     ({"balance": 0.5, "parts": "decoder"}, "choose one")],
)  # fmt: skip
def test_contradictions_are_named(clips, tmp_path, vae, law):
    with pytest.raises(FactoryError, match=law):
        settings(clips, tmp_path / "run", **vae)


def test_a_used_folder_is_refused(fresh, clips, vae_config):
    _, out = fresh
    with pytest.raises(FactoryError, match="holds a run already"):
        train_vae.run(settings(clips, out, config=str(vae_config)))
