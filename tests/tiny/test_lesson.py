import pytest

from cogvideox_factory.data.manifest import read_manifest
from cogvideox_factory.data.video import probe
from cogvideox_factory.tiny import lesson
from cogvideox_factory.tiny.world import is_held_out, render


def videos(scenes):
    return [render(scene, **lesson.SIZE) for scene in scenes]


def test_a_lesson_is_captioned_clips_of_the_size_the_model_knows(tmp_path):
    lesson.draw_clips(tmp_path, "sks", num_clips=3, num_reminders=2)
    manifest = read_manifest(tmp_path)
    captions = {clip.name: clip.caption for clip in manifest.usable}
    assert len(captions) == 5
    assert all(("sks star" in caption) == name.startswith("sks") for name, caption in captions.items())
    info = probe(tmp_path / "sks-000.mp4")
    assert (info.num_frames, info.height, info.width, info.fps) == (9, 64, 64, 8)


@pytest.mark.parametrize("concept", ["sks", "bounce"])
def test_an_exam_asks_for_scenes_the_lesson_does_not_show(concept):
    exam = lesson.make_exam(concept, num_concept=6, num_known=4)
    assert len(exam.prompts) == 10
    assert all(is_held_out(scene) for scene in exam.scenes[6:])
    taught = {lesson.concept_scene(lesson._LESSON_SEED, index, concept) for index in range(200)}
    assert not taught & set(exam.scenes)


@pytest.mark.parametrize("concept", ["sks", "bounce"])
def test_the_right_videos_pass_and_others_fail(concept):
    exam = lesson.make_exam(concept, num_concept=8, num_known=8)
    verdicts = lesson.mark(exam, videos(exam.scenes))
    assert lesson.summary(exam, verdicts) == {"concept": 1.0, "known": 1.0}
    known = exam.scenes[8:]
    scores = lesson.summary(exam, lesson.mark(exam, videos([*known, *exam.scenes[:8]])))
    assert scores["concept"] == 0
    assert scores["known"] < 0.6


def test_first_frames_are_the_scenes_own(tmp_path):
    exam = lesson.make_exam("bounce", num_concept=2, num_known=2)
    files = lesson.draw_first_frames(tmp_path, exam.scenes)
    from cogvideox_factory.data.image import read_image

    for file, video in zip(files, videos(exam.scenes), strict=True):
        assert (read_image(file, 64, 64) == video[0]).all()
