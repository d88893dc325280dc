"""What learns in a run: the loss of a micro-batch, its gradients added up, and an update of the weights."""

from collections.abc import Mapping

import mindspore as ms
from mindspore import Tensor

from cogvideox_factory.mindspore_engine.device import PYNATIVE, Mode
from cogvideox_factory.mindspore_engine.objective import Objective
from cogvideox_factory.mindspore_engine.optim import Update


class Learner:
    """A training step: `micro` for each micro-batch, then `update`."""

    def __init__(self, objective: Objective, update: Update, *, num_micros: int, mode: Mode = PYNATIVE) -> None:
        self.objective, self.update = objective, update

        def mean_loss(*arguments):
            losses = objective.losses(*arguments)
            return losses.mean() / num_micros, losses

        gradients = ms.value_and_grad(mean_loss, None, ms.ParameterTuple(update.trained), has_aux=True)

        def micro(*arguments):
            values, grads = gradients(*arguments)
            update.add(grads)
            return values[1]

        self._micro = mode.compiled(micro, of=objective.transformer)

    def micro(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Add the gradients of one micro-batch; return the loss of each of its samples, float32 [B]."""
        return self._micro(*self.objective.arguments(batch))

    def step(self, learning_rate: float) -> Tensor:
        """Update the weights; return the norm of the gradient."""
        return self.update.step(learning_rate)
