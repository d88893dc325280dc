"""The loss of a batch: what is padded, what the image is, what is refused; its numbers are in `test_learner`."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

import mindspore as ms
import ml_dtypes
import numpy as np

from cogvideox_factory.diffusion.schedule import alphas_cumprod
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.mindspore_engine.border import load_parameters, to_array, to_tensor, to_tensors
from cogvideox_factory.mindspore_engine.objective import Objective, Scales, pad_image_latents
from cogvideox_factory.mindspore_engine.transformer import CogVideoXTransformer
from cogvideox_factory.mindspore_engine.vae import sample_posterior
from cogvideox_factory.models import PUBLISHED
from tests.golden import cases

VARIANT = "cogvideox1.5-5b-i2v"


@pytest.fixture(scope="module")
def objective() -> Objective:
    model = CogVideoXTransformer(cases.config_of(VARIANT))
    load_parameters(model, cases.weights_of(VARIANT).items(), source=VARIANT)
    alphas = alphas_cumprod(PUBLISHED[VARIANT].scheduler)
    return Objective(model, alphas_cumprod=alphas, scales=Scales(**cases.SCALES), dtype=ms.float32)


def test_moments_in_bfloat16_are_sampled_in_its_arithmetic():
    shape = (2, 3, 16, 4, 4)
    mean, logvar, noise = (cases.normal(name, shape=shape).astype(ml_dtypes.bfloat16) for name in ("m", "l", "n"))
    half = ml_dtypes.bfloat16(0.5)
    expected = mean + np.exp(half * logvar) * noise  # each step rounded
    found = sample_posterior(*map(to_tensor, (mean, logvar, noise.astype(np.float32))))
    assert found.dtype == ms.bfloat16
    assert np.array_equal(to_array(found), expected)


def test_an_image_stands_in_front_and_zeros_behind():
    image = cases.normal("image", shape=(2, 1, 16, 8, 12))
    padded = to_array(pad_image_latents(to_tensor(image), 4))
    assert np.array_equal(padded[:, :1], image)
    assert padded.shape == (2, 4, 16, 8, 12)
    assert not padded[:, 1:].any()
    assert np.array_equal(to_array(pad_image_latents(to_tensor(image), 1)), image)


def test_a_dropped_image_is_not_seen_and_a_kept_one_is(objective):
    batch = cases.batch_of(VARIANT, 1, 0) | {"image_keep": np.array([True, False])}
    other = batch | {"image_mean": -batch["image_mean"]}
    before, after = (to_array(objective(to_tensors(b))) for b in (batch, other))
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_the_padded_slot_carries_no_loss(objective):
    """The loss is that of the prediction behind the slot: noise in it is seen, but not to be predicted."""
    batch = cases.batch_of(VARIANT, 1, 0)
    predictions = []

    class Spy:
        config = objective.transformer.config
        positions = objective.transformer.positions

        def __call__(self, model_input, *args):
            predictions.append(model_input)
            return ms.ops.zeros_like(model_input[:, :, :16])

    spied = Objective(
        Spy(), alphas_cumprod=alphas_cumprod(PUBLISHED[VARIANT].scheduler), scales=Scales(**cases.SCALES),
        dtype=ms.float32,
    )  # fmt: skip
    loud = batch["noise"].copy()
    loud[:, 0] *= 100
    quiet, noisy = (to_array(spied(to_tensors(batch | {"noise": noise}))) for noise in (batch["noise"], loud))
    assert np.array_equal(quiet, noisy)
    assert not np.array_equal(to_array(predictions[0]), to_array(predictions[1]))


def test_what_the_model_cannot_take_is_said_before_it_computes(objective):
    batch = to_tensors(cases.batch_of(VARIANT, 1, 0))
    with pytest.raises(FactoryError, match="16 channels"):
        objective({name: tensor for name, tensor in batch.items() if not name.startswith("image")})
    with pytest.raises(FactoryError, match="patches of 2"):
        objective(batch | {"noise": batch["noise"][:, :3]})
