import pytest

from cogvideox_factory.errors import FactoryError
from cogvideox_factory.models import PUBLISHED, tiny_facts
from cogvideox_factory.shapes import check_task, clip_shape


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_defaults_are_what_the_model_was_made_for(name):
    facts = PUBLISHED[name]
    shape = clip_shape(facts.transformer)
    assert (shape.num_frames, shape.height, shape.width) == (facts.num_frames, facts.height, facts.width)
    assert shape.fps == facts.fps
    assert shape.latent_height * 8 == shape.height
    padded = shape.latent_frames + shape.num_front_padding
    assert padded % (facts.transformer.patch_size_t or 1) == 0
    tiny = clip_shape(tiny_facts(name).transformer)
    assert (tiny.num_frames, tiny.height, tiny.width) == (9, 64, 96)


def test_frames_of_the_15_models_are_padded_in_front_where_they_must():
    model = PUBLISHED["cogvideox1.5-5b"].transformer
    found = {n: clip_shape(model, num_frames=n) for n in (77, 81, 85, 161)}
    assert {n: (s.latent_frames, s.num_front_padding) for n, s in found.items()} == {
        77: (20, 0), 81: (21, 1), 85: (22, 0), 161: (41, 1)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "ask", "says"),
    [
        ("cogvideox-5b", {"num_frames": 50}, "49 or 57"),
        ("cogvideox-5b", {"height": 481}, "multiples of 16"),
        ("cogvideox-5b-i2v", {"height": 512}, "learned positions for 480x720 only"),
        ("cogvideox1.5-5b", {"width": 2416}, "rotary positions up to 2400x2400"),
    ],
)
def test_what_a_model_cannot_take_is_refused(name, ask, says):
    with pytest.raises(FactoryError, match=str(next(iter(ask.values())))) as caught:
        clip_shape(PUBLISHED[name].transformer, **ask)
    assert says in str(caught.value)


def test_a_model_for_the_other_task_is_refused_and_fitting_ones_named():
    with pytest.raises(FactoryError, match=r"task=i2v, but here has in_channels=16.*CogVideoX1\.5-5B-I2V"):
        check_task("i2v", PUBLISHED["cogvideox-5b"].transformer, source="here")
    with pytest.raises(FactoryError, match=r"task=t2v, but here has in_channels=32"):
        check_task("t2v", PUBLISHED["cogvideox-5b-i2v"].transformer, source="here")
    for facts in PUBLISHED.values():
        check_task("i2v" if facts.transformer.is_image_to_video else "t2v", facts.transformer, source="here")
