import json
from dataclasses import fields, replace

import pytest

from cogvideox_factory.data.fingerprint import (
    CacheSettings,
    TextSettings,
    VideoSettings,
    compare,
    entry_key,
    fingerprint,
    hash_folder,
    require_match,
)
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.errors import UnfitError

SPEC = ClipSpec(num_frames=9, height=32, width=48, fps=8)
SETTINGS = CacheSettings(
    model="tiny",
    video=VideoSettings.from_spec(SPEC, vae="a" * 64, dtype="float32"),
    text=TextSettings(text_encoder="b" * 64, tokenizer="c" * 64, dtype="float32", max_sequence_length=16),
)


def other(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return "z" * 64 if value else 7


def changed():
    for part in ("video", "text"):
        settings = getattr(SETTINGS, part)
        for field in fields(settings):
            new = replace(settings, **{field.name: other(getattr(settings, field.name))})
            yield f"{part}.{field.name}", part, replace(SETTINGS, **{part: new})


@pytest.mark.parametrize(("name", "part", "wanted"), [pytest.param(*case, id=case[0]) for case in changed()])
def test_each_setting_is_named_when_it_differs_and_touches_its_part_only(tmp_path, name, part, wanted):
    recorded = json.loads(json.dumps(SETTINGS.to_json()))
    assert [difference.name for difference in compare(recorded, wanted)] == [name]
    assert fingerprint(getattr(wanted, part)) != fingerprint(getattr(SETTINGS, part))
    same = "text" if part == "video" else "video"
    assert fingerprint(getattr(wanted, same)) == fingerprint(getattr(SETTINGS, same))
    with pytest.raises(UnfitError, match=name) as caught:
        require_match(tmp_path, recorded, wanted, command="cogvideox prepare my.yaml")
    assert "cogvideox prepare my.yaml" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


def test_the_trigger_word_and_the_format_count_the_name_does_not(tmp_path):
    recorded = json.loads(json.dumps(SETTINGS.to_json()))
    assert compare(recorded, SETTINGS) == []
    assert compare(recorded, replace(SETTINGS, model="renamed")) == []
    assert [d.name for d in compare(recorded, replace(SETTINGS, trigger_word="sks"))] == ["trigger_word"]
    assert [d.name for d in compare({**recorded, "format": 0}, SETTINGS)] == ["format"]
    recorded["video"]["settings"]["from_the_future"] = 1
    assert [d.name for d in compare(recorded, SETTINGS)] == ["video.from_the_future"]


def test_equal_settings_hash_alike():
    assert fingerprint(replace(SETTINGS.video, fps=8)) == fingerprint(SETTINGS.video)
    seeded = VideoSettings.from_spec(SPEC, vae="a" * 64, dtype="float32", seed=3)
    assert seeded == SETTINGS.video  # nothing random, so the seed decides nothing
    noised = [VideoSettings.from_spec(SPEC, vae="a", dtype="f", image_variants=3, seed=s) for s in (1, 2)]
    assert fingerprint(noised[0]) != fingerprint(noised[1])
    assert entry_key("a", "b") != entry_key("b", "a")


def test_a_model_folder_is_hashed_by_names_and_bytes(tmp_path):
    folder = tmp_path / "vae"
    folder.mkdir()
    with pytest.raises(UnfitError, match="none of the files"):
        hash_folder(folder)
    (folder / "config.json").write_text("{}")
    (folder / "w.safetensors").write_bytes(b"123")
    first = hash_folder(folder)
    (folder / "notes.md").write_text("does not count")
    assert hash_folder(folder) == first
    (folder / "w.safetensors").write_bytes(b"124")
    second = hash_folder(folder)
    (folder / "w.safetensors").rename(folder / "v.safetensors")
    assert len({first, second, hash_folder(folder)}) == 3
