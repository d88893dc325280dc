"""Reading folders of the older trainers: layouts, pairing, and one named reason for each thing refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.manifest import Source
from cogvideox_factory.data.originals import NO_SPREAD, Originals, Wanted, split_latents
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.errors import DataError

CHANNELS, WIDTH, LENGTH = 4, 8, 6
SPEC = ClipSpec(num_frames=9, height=32, width=48, fps=8)
SHAPE = (3, 4, 6)


def no_pt(data):
    raise ValueError("no torch here")


def read(root, *, image=False, buckets=None, read_pt=no_pt):
    wanted = Wanted(
        spec=SPEC, buckets=buckets, latent_channels=CHANNELS, text_length=LENGTH, text_width=WIDTH, image=image
    )
    return Originals(Source.detect(root), wanted, read_pt=read_pt)


def moments(seed, *, channels=2 * CHANNELS, frames=3, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=(channels, frames, *SHAPE[1:])).astype(dtype)


def embeds(seed):
    return np.random.default_rng(seed).normal(size=(LENGTH, WIDTH)).astype(np.float32)


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "prepared", 4)


def write(root, count):
    for kind in ("videos", "video_latents", "image_latents", "prompt_embeds", "prompts"):
        (root / kind).mkdir(parents=True)
    for i in range(count):
        np.save(root / f"video_latents/c{i}.npy", moments(i))
        np.save(root / f"image_latents/c{i}.npy", moments(100 + i, frames=1))
        np.save(root / f"prompt_embeds/c{i}.npy", embeds(i))
        (root / f"prompts/c{i}.txt").write_text(f"caption {i}")
    (root / "prompts.txt").write_text("".join(f"caption {i}\n" for i in range(count)))
    (root / "videos.txt").write_text("".join(f"videos/c{i}.mp4\n" for i in range(count)))
    return root


def reasons(originals):
    manifest = originals.survey()
    assert sum(manifest.counts().values()) == len(manifest.clips)
    return [clip.reason for clip in manifest.clips]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.booleans(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_layout_comes_back_as_it_was(channels, frames, height, width, is_sample, frames_first):
    mean = np.random.default_rng(0).normal(size=(frames, channels, height, width)).astype(np.float32)
    logvar = mean - 3
    whole = mean if is_sample else np.concatenate([mean, logvar], axis=1)
    stored = whole if frames_first else whole.swapaxes(0, 1)
    found = split_latents(stored, [(frames, height, width)], channels=channels)
    kind = f"{'samples' if is_sample else 'moments'}, {'frames' if frames_first else 'channels'} first"
    twofold = stored.shape[0] == stored.shape[1] or (frames == 2 * channels and is_sample)
    if twofold and found.kind != kind:  # the shape fits two readings: the documented one wins
        assert found.kind in ("moments, channels first", "samples, channels first")
        return
    assert found.kind == kind
    assert np.array_equal(found.mean, mean)
    assert np.array_equal(found.logvar, np.full_like(mean, NO_SPREAD) if is_sample else logvar)


def test_a_whole_folder_is_taken(root):
    originals = read(root, image=True)
    manifest = originals.survey()
    assert manifest.counts() == {"imported": 4}
    assert manifest.notes == ()
    assert len({clip.id for clip in manifest.clips}) == 4
    for i, clip in enumerate(manifest.clips):
        latents = originals.latents(clip)
        assert np.array_equal(np.concatenate([latents.mean, latents.logvar], 1).swapaxes(0, 1), moments(i))
        assert np.array_equal(originals.image_latents(clip).mean[0], moments(100 + i, frames=1)[:CHANNELS, 0])
        assert np.array_equal(originals.prompt_embeds(clip), embeds(i))
        assert clip.spec == SPEC


FAULTS = {
    "import.missing": lambda root: (root / "video_latents/c1.npy").unlink(),
    "import.ambiguous": lambda root: (root / "prompt_embeds/c1.pt").write_bytes(b""),
    "import.caption": lambda root: (root / "prompts/c1.txt").write_text("caption 2"),
    "import.unreadable": lambda root: (root / "video_latents/c1.npy").write_bytes(b"\x93NUMPY cut"),
    "import.dtype": lambda root: np.save(root / "prompt_embeds/c1.npy", embeds(1).astype(np.float64)),
    "import.shape": lambda root: np.save(root / "video_latents/c1.npy", moments(1, frames=2)),
    "latent.nonfinite": lambda root: np.save(root / "video_latents/c1.npy", moments(1) / np.float32(0)),
    "text.empty": lambda root: (root / "prompts.txt").write_text("caption 0\n \ncaption 2\ncaption 3\n"),
}


@pytest.mark.parametrize("code", FAULTS)
@pytest.mark.filterwarnings("ignore:divide")
def test_each_fault_has_its_name_and_touches_nothing_else(root, code):
    FAULTS[code](root)
    assert reasons(read(root, image=True)) == [None, code, None, None]


def test_more_ways_to_be_unreadable(root):
    np.save(root / "video_latents/c0.npy", np.array([{"a": 1}], object), allow_pickle=True)
    np.savez(root / "video_latents/c1", a=moments(1))
    (root / "video_latents/c1.npz").rename(root / "video_latents/c1.npy")
    (root / "video_latents/c2.npy").rename(root / "video_latents/c2.pt")
    (root / "video_latents/c3.npy").write_bytes(b"")
    assert reasons(read(root)) == ["import.unreadable"] * 4


def test_links_out_of_the_folder_are_not_followed(root, tmp_path):
    (root / "video_latents/c0.npy").rename(tmp_path / "outside.npy")
    (root / "video_latents/c0.npy").symlink_to(tmp_path / "outside.npy")
    assert reasons(read(root)) == ["import.missing", None, None, None]


def test_the_length_of_the_text_is_named(root):
    for i in range(4):
        np.save(root / f"prompt_embeds/c{i}.npy", np.zeros((4, WIDTH), np.float32))
    details = {clip.detail for clip in read(root).survey().clips}
    assert details == {
        "prompt_embeds (4, 8) should be (6, 8) (tokens, width); they were made with 4 tokens: "
        "set text.max_sequence_length=4"
    }


def test_copies_and_contradictions(root):
    (root / "videos.txt").write_text("".join(f"videos/{n}.mp4\n" for n in ("c0", "c0", "c2", "c3", "c4")))
    (root / "prompts.txt").write_text("caption 0\ncaption 0\ncaption 2\ncaption 2\ncaption 0\n")
    (root / "prompts/c3.txt").unlink()
    np.save(root / "video_latents/c4.npy", moments(0))
    np.save(root / "prompt_embeds/c4.npy", embeds(0))
    assert reasons(read(root)) == [None, "row.duplicate", None, "import.caption", "row.duplicate"]


def test_two_captions_cannot_share_one_embedding(root):
    (root / "videos.txt").write_text("videos/c0.mp4\nvideos/c0.mov\n")
    (root / "prompts.txt").write_text("caption 0\nanother\n")
    assert reasons(read(root)) == ["import.ambiguous"] * 2


def test_stems_are_found_up_to_the_last_dot_and_up_to_the_first(root):
    (root / "videos.txt").write_text("videos/a.b.mp4\nvideos/c1.x.mp4\n")
    (root / "prompts.txt").write_text("caption 0\ncaption 1\n")
    for kind in ("video_latents", "prompt_embeds"):
        (root / kind / "c0.npy").rename(root / kind / "a.b.npy")
    manifest = read(root).survey()
    assert manifest.counts() == {"imported": 2}
    assert manifest.notes == (
        "2 files of video_latents/ belong to no row, for example c2.npy",
        "2 files of prompt_embeds/ belong to no row, for example c2.npy",
    )


def test_shapes_of_many_buckets(root):
    np.save(root / "video_latents/c1.npy", moments(1, frames=2))
    np.save(root / "video_latents/c2.npy", moments(2, frames=4))
    (root / "videos/c2.txt").write_text('{"num_frames": 16, "height": 32, "width": 48}')
    (root / "videos/c3.txt").write_text("not json")
    keys = [clip.facts["bucket"] for clip in read(root, buckets=frozenset()).survey().clips]
    assert keys == ["9x32x48", "5x32x48", "16x32x48", "9x32x48"]
    listed = frozenset({Bucket(9, 32, 48), Bucket(13, 32, 48)})
    found = read(root, buckets=listed).survey().clips
    assert [clip.reason for clip in found] == [None, "import.shape", None, None]
    assert found[2].facts["bucket"] == "13x32x48"


def test_a_folder_nobody_prepared(tmp_path):
    (tmp_path / "prompts.txt").write_text("a\n")
    (tmp_path / "videos.txt").write_text("videos/a.mp4\n")
    with pytest.raises(DataError, match="holds no video_latents/ folder"):
        read(tmp_path).survey()


def test_a_wrong_size_says_what_to_set():
    with pytest.raises(ClipError, match=r"latents \(8, 2, 4, 6\) .* moments are \(8, 3, 4, 6\)"):
        split_latents(moments(0, frames=2), [SHAPE], channels=CHANNELS)
