"""Updating weights: what happens between `backward` and the next forward pass.

An `Update` accumulates, clips by the global norm, skips a step that is not finite, lets the optimizer work on float32
master weights (or on bfloat16 ones, rounded stochastically), and writes masters back into the model. Nothing in it
waits for the device, unless the optimizer works in host memory: then it waits for the gradients, once a step.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cogvideox_factory.errors import FactoryError
from cogvideox_factory.ranks import Layout
from cogvideox_factory.torch_engine.border import local
from cogvideox_factory.torch_engine.optimizers import make_optimizer
from cogvideox_factory.torch_engine.passage import host_like
from cogvideox_factory.torch_engine.ranks import Ranks
from cogvideox_factory.torch_engine.sharding import host_mesh, like, total_norm
from cogvideox_factory.torch_engine.spikes import Spikes


class LossScale:
    """Dynamic loss scale for float16, kept on the device; 1 and constant for other dtypes."""

    GROWTH_STEPS = 2000

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.enabled = dtype == torch.float16
        self.scale = torch.tensor(2.0**16 if self.enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, finite: Tensor) -> None:
        """Halve after an overflow, double after 2000 good steps."""
        if not self.enabled:
            return
        self.good_steps = torch.where(finite, self.good_steps + 1, 0)
        grow = self.good_steps >= self.GROWTH_STEPS
        self.scale = torch.where(finite, torch.where(grow, self.scale * 2, self.scale), self.scale * 0.5)
        self.good_steps = torch.where(grow, 0, self.good_steps)


class Update:
    """Turn gradients of `named_parameters` into new weights."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        dtype: torch.dtype,
        device: torch.device,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        max_grad_norm: float,
        stochastic_bf16: bool,
        seed: int,
        optimizer: str = "adamw",
        beta3: float | None = None,
        offload: bool = False,
        ranks: Ranks | None = None,
        spike_factor: float | None = None,
    ) -> None:
        assert not (offload and stochastic_bf16), "weights that the model computes with stay with it"
        self.ranks = ranks or Ranks(layout=Layout())
        self.trained = {name: p for name, p in named_parameters if p.requires_grad}
        if not self.trained:
            raise FactoryError("no weight is to be trained; check train.method and lora.target_modules.")
        self.spikes = Spikes(spike_factor, device=device, ranks=self.ranks)
        self.max_grad_norm = max_grad_norm
        self.loss_scale = LossScale(dtype, device)
        self.num_skipped = torch.zeros((), device=device)
        self.offload = offload
        self._host_mesh = host_mesh(next(iter(self.trained.values()))) if offload else None
        self._sums: dict[str, Tensor] = {}
        """Accumulated float32 gradients of half-precision weights."""
        self.masters: dict[str, Tensor] = {}
        for name, p in self.trained.items():
            if stochastic_bf16 and p.dtype != torch.bfloat16:
                p.data = p.data.to(torch.bfloat16)
            self.masters[name] = self._master(name, p, stochastic=stochastic_bf16)
        self.optimizer = make_optimizer(
            optimizer, list(self.masters.values()), shapes=[p.shape for p in self.trained.values()], betas=betas,
            beta3=beta3, eps=eps, weight_decay=weight_decay, total=self.ranks.over_shards, seed=seed,
            num_skipped=self.num_skipped,
        )  # fmt: skip

    def _master(self, name: str, parameter: nn.Parameter, *, stochastic: bool) -> Tensor:
        """Return the weights to optimise: float32, in host memory with `offload`; or the parameter's own memory."""
        own = stochastic or parameter.dtype == torch.float32
        if not own:
            self._sums[name] = self._sum(parameter)
        if self.offload:
            weight = local(parameter).detach()
            master = host_like(weight, dtype=torch.float32).copy_(weight).requires_grad_()
            master.grad = host_like(master).zero_()
        elif own:
            master = parameter
            if isinstance(parameter, DTensor):  # a weight of its own in the same memory
                master = local(parameter).detach().requires_grad_()
        else:
            master = parameter.detach().float().requires_grad_()
            master.grad = self._sums[name]
        return master

    @staticmethod
    def _sum(parameter: nn.Parameter) -> Tensor:
        """Return what gradients of a half-precision parameter are added to at once, in float32: accumulation is exact
        and each half gradient lives only until it is added."""
        total = torch.zeros_like(parameter, dtype=torch.float32)

        def move(p: Tensor) -> None:
            assert p.grad is not None
            total.add_(p.grad)
            p.grad = None

        parameter.register_post_accumulate_grad_hook(move)
        return total

    @torch.no_grad()
    def step(self, learning_rate: float) -> Tensor:
        """Clip, update and clear the gradients; return the global gradient norm (a device scalar).

        A step whose norm is not finite, or a spike, leaves weights and state as they are and is counted in
        `num_skipped`.
        """
        grads = self._gradients()
        norm = total_norm(grads.values(), self.ranks) / self.loss_scale.scale
        accepted = self.spikes.accept(norm)
        factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0) / self.loss_scale.scale
        torch._foreach_mul_(list(grads.values()), torch.where(accepted, factor, 0.0))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        skipped = accepted.logical_not().float()
        self.optimizer.found_inf = self._hand_over(grads, skipped)
        self.optimizer.step()
        self.num_skipped += skipped
        self.loss_scale.update(norm.isfinite())
        self._write_back()
        self.clear_gradients()
        return norm

    @torch.no_grad()
    def clear_gradients(self) -> None:
        """Forget what backward passes have added up; the next one's own tensors then take the place, with no sum."""
        for total in self._sums.values():
            total.zero_()
        for parameter in self.trained.values():
            parameter.grad = None

    @torch.no_grad()
    def weight_norm(self) -> Tensor:
        """Return the norm of all trained weights (a device scalar); it is finite exactly if they are."""
        weights = self.trained if self.offload else self.masters
        return total_norm([local(weight) for weight in weights.values()], self.ranks)

    def _gradients(self) -> dict[str, Tensor]:
        """Return what this process holds of every gradient, where the model is."""
        grads = dict(self._sums)
        for name, p in self.trained.items():
            if name not in grads and p.grad is not None:
                grads[name] = local(p.grad)
        return grads

    def _hand_over(self, grads: dict[str, Tensor], found_inf: Tensor) -> Tensor:
        """Give the optimizer its gradients; return `found_inf` where it works."""
        for name, master in self.masters.items():
            if not self.offload:
                master.grad = grads.get(name)
            elif name in grads:
                assert master.grad is not None
                master.grad.copy_(grads[name], non_blocking=True)
        # The copy of one number waits for those queued before it.
        return found_inf.cpu() if self.offload else found_inf

    @torch.no_grad()
    def _write_back(self) -> None:
        pairs = [
            (local(p), self.masters[name]) for name, p in self.trained.items()
            if self.offload or self.masters[name].dtype != p.dtype
        ]  # fmt: skip
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])

    def tensors(self) -> dict[str, Tensor]:
        """Return all state by name: weights, moments, counters (every value a tensor of one element or more)."""
        whole = self.optimizer.WHOLE
        state = {f"model.{name}": self.divided(name, master) for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.optimizer.state[master].items():
                state[f"optimizer.{key}.{name}"] = value if key in whole else self.divided(name, value)
        return state | {f"optimizer.{key}": value for key, value in self.optimizer.common.items()}

    def divided(self, name: str, part: Tensor) -> Tensor:
        """Return `part`, which goes with the rows that this process holds of weight `name`, as part of a whole."""
        return like(part, self.trained[name], mesh=self._host_mesh)

    def scalars(self) -> dict[str, Any]:
        """Return the counters that are no tensors of the model's size (this waits for the device)."""
        return {
            "loss_scale": float(self.loss_scale.scale),
            "loss_scale_good_steps": float(self.loss_scale.good_steps),
            "num_skipped": float(self.num_skipped),
            "num_updates": float(getattr(self.optimizer, "num_steps", 0)),
            "recent_norms": self.spikes.state(),
        }

    def restore(self, scalars: dict[str, Any]) -> None:
        """Take over the counters and copy the (already loaded) masters into the model."""
        self.loss_scale.scale.fill_(scalars["loss_scale"])
        self.loss_scale.good_steps.fill_(scalars["loss_scale_good_steps"])
        self.num_skipped.fill_(scalars["num_skipped"])
        self.spikes.restore(scalars.get("recent_norms", []))
        if hasattr(self.optimizer, "num_steps"):
            self.optimizer.num_steps = int(scalars["num_updates"])  # type: ignore[attr-defined]
        self._write_back()


class Ema:
    """Exponential moving average of the trained weights, float32.

    The decay warms up as (1 + n) / (10 + n), so early averages are not dominated by the starting point.
    """

    def __init__(self, update: Update, *, decay: float) -> None:
        self.decay = decay
        self._update = update
        self.averages = {name: weight.detach().float().clone() for name, weight in update.masters.items()}

    @torch.no_grad()
    def update(self, *, step: int) -> None:
        """Move the averages towards the weights after update number `step`."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        masters = self._update.masters
        torch._foreach_lerp_(list(self.averages.values()), [masters[n].float() for n in self.averages], weight)

    def tensors(self) -> dict[str, Tensor]:
        """Return the averages by checkpoint name."""
        return {f"ema.{name}": self._update.divided(name, part) for name, part in self.averages.items()}
