from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from cogvideox_factory.data.cache import Cache
from cogvideox_factory.data.fingerprint import CacheSettings, TextSettings, VideoSettings
from cogvideox_factory.data.loader import (
    CacheSource,
    Draws,
    Loader,
    RawSource,
    image_sigma,
    shape_of,
)
from cogvideox_factory.data.manifest import read_manifest
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.sampler import Pick, Sampler
from cogvideox_factory.data.survey import survey
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.draws import normal
from cogvideox_factory.errors import FactoryError, UnfitError

SPEC = ClipSpec(num_frames=9, height=32, width=48, fps=8)
SHAPE = (3, 4, 4, 6)
VARIANTS = 4


@pytest.fixture
def manifest(dataset):
    return survey(read_manifest(dataset), SPEC)


@pytest.fixture
def index(tmp_path, manifest):
    video = VideoSettings.from_spec(SPEC, vae="a", dtype="float32", image_variants=VARIANTS)
    text = TextSettings(text_encoder="b", tokenizer="c", dtype="float32", max_sequence_length=5)
    cache = Cache(tmp_path / "cache", CacheSettings(model="tiny", video=video, text=text))
    for clip in manifest.clips:
        image = np.zeros((VARIANTS, *SHAPE[1:])) + np.arange(VARIANTS)[:, None, None, None]
        cache.write_clip(
            clip, mean=normal(0, "m", clip.id, shape=SHAPE), logvar=normal(0, "l", clip.id, shape=SHAPE),
            image_mean=image, image_logvar=image, image_sigmas=[0, 0.1, 0.1, 0.1],
        )  # fmt: skip
    for number, caption in enumerate(cache.missing_captions(manifest.clips)):
        cache.write_caption(caption, np.full((5, 8), number))
    return cache.publish(manifest)


def draws(**more) -> Draws:
    return Draws(**{"seed": 5, "image_to_video": True, **more})


def loader(source, *, batch_size=2, drawn=None, **more) -> Loader:
    sampler = Sampler(source.buckets, batch_size=batch_size, seed=7, buckets=source.buckets)
    return Loader(source, sampler, drawn or draws(), **more)


def equal(one: dict, other: dict) -> bool:
    assert one.keys() == other.keys()
    return all(
        np.array_equal(value, other[key]) if isinstance(value, np.ndarray) else value == other[key]
        for key, value in one.items()
    )


def test_a_cached_batch_has_its_shapes_and_dtypes(index):
    batch = loader(CacheSource(index), drawn=draws(patch_size_t=2)).batch(0)
    assert shape_of(batch) == {
        "mean": (2, *SHAPE), "logvar": (2, *SHAPE), "prompt_embeds": (2, 5, 8), "noise": (2, 4, 4, 4, 6),
        "posterior_noise": (2, *SHAPE), "timesteps": (2,), "caption_keep": (2,), "image_keep": (2,),
        "image_mean": (2, 1, *SHAPE[1:]), "image_logvar": (2, 1, *SHAPE[1:]),
        "image_posterior_noise": (2, 1, *SHAPE[1:]),
    }  # fmt: skip
    kinds = {key: value.dtype for key, value in batch.items() if isinstance(value, np.ndarray)}
    assert {kinds[key] for key in ("mean", "logvar", "prompt_embeds", "image_mean")} == {np.dtype(ml_dtypes.bfloat16)}
    assert {kinds[key] for key in ("noise", "posterior_noise", "image_posterior_noise")} == {np.dtype(np.float32)}
    assert kinds["timesteps"] == np.int64
    assert kinds["caption_keep"] == kinds["image_keep"] == np.bool_
    assert len(batch["clip_ids"]) == 2


def test_text_to_video_has_nothing_of_an_image(index):
    batch = loader(CacheSource(index), drawn=draws(image_to_video=False)).batch(0)
    assert not [key for key in batch if key.startswith("image")]


def test_a_raw_batch_has_its_shapes(manifest):
    batch = loader(RawSource(manifest.usable, latent_channels=4)).batch(0)
    assert batch["pixels"].shape == (2, 9, 32, 48, 3)
    assert batch["pixels"].dtype == np.uint8
    assert batch["image_noise_sigma"].shape == (2,)
    assert batch["image_pixel_noise"].shape == (2, 32, 48, 3)
    assert batch["image_pixel_noise"].dtype == batch["image_noise_sigma"].dtype == np.float32
    assert set(batch["captions"]) <= {"a first clip", "a second clip", "a third clip"}
    assert batch["noise"].shape == (2, *SHAPE)


@pytest.mark.parametrize("kind", ["cache", "raw"])
def test_batches_do_not_depend_on_workers_or_where_one_starts(index, manifest, kind):
    source = CacheSource(index) if kind == "cache" else RawSource(manifest.usable, latent_channels=4)
    drawn = draws(caption_dropout=0.3, image_dropout=0.3, flip_probability=0.5)
    straight = list(loader(source, drawn=drawn, num_workers=0).batches(0, 8))
    for num_workers, ahead in ((1, None), (4, None), (4, 1), (2, 7)):
        again = list(loader(source, drawn=drawn, num_workers=num_workers, ahead=ahead).batches(0, 8))
        assert all(equal(one, other) for one, other in zip(straight, again, strict=True))
    resumed = list(loader(source, drawn=drawn).batches(5, 8))
    assert all(equal(one, other) for one, other in zip(straight[5:], resumed, strict=True))


def test_ranks_and_accumulation_see_the_numbers_of_one_rank(index):
    source = CacheSource(index)
    whole = loader(source, batch_size=4).batch(3)
    for num_ranks, num_micros in ((2, 1), (1, 2), (2, 2), (4, 1)):
        parts = [
            loader(source, batch_size=4, rank=rank, num_ranks=num_ranks, num_micros=num_micros).batch(3, micro)
            for micro in range(num_micros)
            for rank in range(num_ranks)
        ]
        assert [i for part in parts for i in part["clip_ids"]] == whole["clip_ids"]
        assert np.array_equal(np.concatenate([part["noise"] for part in parts]), whole["noise"])


def test_entries_are_read_once_and_a_batch_of_one_is_not_copied(index, monkeypatch):
    """Bytes counted: what is read is what the files hold, and the arrays of the batch lie in what was read."""
    read, real = [], np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda *given, **named: (read.append(real(*given, **named)), read[-1])[1])
    source = CacheSource(index)
    files = {clip.id: (clip.clip_file, clip.text_file) for clip in index.clips}
    for step, batch in enumerate(loader(source, batch_size=1, num_workers=0).batches(0, 6)):
        sizes = sorted(path.stat().st_size for path in files[batch["clip_ids"][0]])
        assert sorted(data.nbytes for data in (read if step else read[1:])) == sizes  # first the empty caption's
        for key in ("mean", "logvar", "image_mean", "image_logvar", "prompt_embeds"):
            assert any(np.shares_memory(batch[key], data) for data in read), key
        read.clear()
    batch = loader(source, batch_size=2, num_workers=0).batch(0)
    assert not any(np.shares_memory(batch["mean"], data) for data in read)  # two become one: a copy, and only one


def test_accumulation_steps_come_in_turn(index):
    steps = loader(CacheSource(index), batch_size=4, num_micros=2)
    stream = steps.batches(0)
    got = [next(stream)["clip_ids"] for _ in range(4)]
    stream.close()
    assert got == [steps.batch(step, micro)["clip_ids"] for step in (0, 1) for micro in (0, 1)]


def test_no_two_places_share_their_noise(index):
    stream = loader(CacheSource(index), batch_size=4).batches(0, 6)  # 24 places of 3 clips: 8 epochs
    noise = np.concatenate([batch["noise"].reshape(4, -1) for batch in stream])
    correlation = np.corrcoef(noise) - np.eye(len(noise))
    assert np.abs(correlation).max() < 0.4
    assert noise.mean() == pytest.approx(0, abs=0.05)
    assert noise.std() == pytest.approx(1, abs=0.05)


def test_dropped_captions_become_the_empty_one(index, manifest):
    drawn = draws(caption_dropout=0.5, image_dropout=0.5)
    kept = []
    for batch in loader(CacheSource(index), drawn=drawn, batch_size=4).batches(0, 10):
        for keep, embeds, image in zip(batch["caption_keep"], batch["prompt_embeds"], batch["image_keep"]):
            assert (float(embeds[0, 0]) == 0) == (not keep)  # the empty caption is number 0
            kept.append((bool(keep), bool(image)))
    assert len(set(kept)) == 4  # caption and image are dropped independently
    raw = loader(RawSource(manifest.usable, latent_channels=4), drawn=drawn).batch(0)
    assert [bool(caption) for caption in raw["captions"]] == raw["caption_keep"].tolist()
    for share, wanted in ((0.0, True), (1.0, False)):
        batch = loader(CacheSource(index), drawn=draws(caption_dropout=share)).batch(0)
        assert set(batch["caption_keep"].tolist()) == {wanted}


def test_noised_first_frames_are_taken_unless_noise_is_off(index):
    taken = {
        int(value)
        for batch in loader(CacheSource(index)).batches(0, 20)
        for value in batch["image_mean"][:, 0, 0, 0, 0]
    }
    assert taken == {1, 2, 3}
    clean = loader(CacheSource(index), drawn=draws(image_noise=False)).batch(0)
    assert (clean["image_mean"] == 0).all()


def test_timesteps_are_uniform_and_sigmas_as_trained():
    drawn = draws()
    steps = np.array([drawn.sample(Pick("c", epoch), (1, 1, 1, 1))["timesteps"] for epoch in range(2000)])
    assert steps.min() >= 0
    assert steps.max() <= 999
    assert steps.mean() == pytest.approx(499.5, abs=30)
    rng = np.random.default_rng(0)
    log = np.log([image_sigma(rng) for _ in range(2000)])
    assert log.mean() == pytest.approx(-3, abs=0.05)
    assert log.std() == pytest.approx(0.5, abs=0.03)


def test_flips_are_per_clip_and_whole(manifest):
    spec = replace(SPEC, crop="random")
    source = RawSource([replace(clip, spec=spec) for clip in manifest.usable], latent_channels=4)
    plain = loader(source, drawn=draws(flip_probability=0.0), batch_size=3).batch(2)
    flipped = loader(source, drawn=draws(flip_probability=1.0), batch_size=3).batch(2)
    assert np.array_equal(plain["pixels"], flipped["pixels"][:, :, :, ::-1])
    assert flipped["flipped"].all()
    assert not plain["flipped"].any()


def test_a_bad_entry_is_named_and_stops_the_run(index):
    bad = index.clips[1]
    data = bad.clip_file.read_bytes()
    bad.clip_file.write_bytes(data[:-5] + bytes([data[-5] ^ 4]) + data[-4:])
    for num_workers in (0, 3):
        with pytest.raises(UnfitError, match="checksum") as caught:
            list(loader(CacheSource(index), num_workers=num_workers).batches(0, 10))
        assert f"while reading clip {bad.name} ({bad.id}) for step" in caught.value.__notes__[0]


def test_a_clip_that_breaks_is_named_and_stops_the_run(dataset, manifest):
    (dataset / "videos/1.mp4").write_bytes(b"broken")
    with pytest.raises(ClipError) as caught:
        list(loader(RawSource(manifest.usable, latent_channels=4)).batches(0, 10))
    assert "videos/1.mp4" in caught.value.__notes__[0]


def test_an_uneven_batch_is_refused_at_once(index):
    with pytest.raises(FactoryError, match="does not divide"):
        loader(CacheSource(index), batch_size=3, num_ranks=2)
