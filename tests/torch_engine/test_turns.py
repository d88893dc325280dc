"""Models that take turns: who is on the device when, in what memory, and that no bit of a video depends on it."""

from itertools import product

import numpy as np
import pytest
import torch

from cogvideox_factory.lora_files import load_lora
from cogvideox_factory.torch_engine import swap
from cogvideox_factory.torch_engine.loading import load_pipeline
from cogvideox_factory.torch_engine.pipeline import CogVideoXPipeline
from cogvideox_factory.torch_engine.swap import Visitor
from cogvideox_factory.torch_engine.text_encoder import TextEncoder
from cogvideox_factory.torch_engine.turns import MODES, Turns
from tests.torch_engine.stepping import CPU, adapt, loss_of, small_model
from tests.torch_engine.test_generate import make_lora

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.inference_mode():
        yield


def here(visitors) -> list[bool]:
    return [visitor.is_here for visitor in visitors]


def guests_of(turns: Turns) -> list:
    return turns._guests
