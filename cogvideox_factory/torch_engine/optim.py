"""Updating weights: AdamW over float32 master weights, or bfloat16 throughout with stochastic rounding.

An `Update` owns what happens between `backward` and the next forward pass: accumulation, clipping by the global
norm, skipping a non-finite step, the optimizer, and writing masters back into the model. Nothing in it waits for
the device.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cogvideox_factory.draws import generator
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.torch_engine.parallel import Layout, Ranks, like, local, total_norm
from cogvideox_factory.torch_engine.spikes import Spikes


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) on bfloat16 weights and moments: 8 bytes a parameter with the gradient.

    bfloat16 keeps 8 bits, so rounding to nearest loses every update below 1/256 of a weight; rounding up or down
    with the probability of the remainder keeps them on average (Gupta et al. 2015, arXiv 1502.02551).
    """

    found_inf: Tensor | None = None

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, betas: tuple[float, float], eps: float,
        weight_decay: float, seed: int,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed
        self.num_steps = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update; `num_steps` counts from 1 and seeds the rounding."""
        assert closure is None
        self.num_steps += 1
        index = 0
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group, index)
                index += 1

    def _update(self, param: Tensor, group: dict, index: int) -> None:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        beta1, beta2 = group["betas"]
        assert param.grad is not None
        grad = param.grad.float()
        first = state["exp_avg"].float().lerp_(grad, 1 - beta1)
        second = state["exp_avg_sq"].float().lerp_(grad.square(), 1 - beta2)
        denominator = (second / (1 - beta2**self.num_steps)).sqrt_().add_(group["eps"])
        new = param.float().mul_(1 - group["lr"] * group["weight_decay"])
        new.addcdiv_(first, denominator, value=-group["lr"] / (1 - beta1**self.num_steps))
        draws = torch.Generator(param.device)
        draws.manual_seed(int(generator(self.seed, "rounding", self.num_steps, index).integers(2**62)))
        for target, value in ((param, new), (state["exp_avg"], first), (state["exp_avg_sq"], second)):
            rounded = round_stochastically(value, draws)
            if self.found_inf is not None:
                rounded = torch.where(self.found_inf.bool(), target, rounded)
            target.copy_(rounded)


def round_stochastically(value: Tensor, draws: torch.Generator) -> Tensor:
    """Round float32 to bfloat16, up or down with the probability of the distance, so the mean is kept."""
    bits = value.contiguous().view(torch.int32)
    carry = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=draws)
    # Adding below the kept 16 bits carries into them as often as the remainder says; sign and magnitude separate.
    return ((bits + carry) & -65536).view(torch.float32).to(torch.bfloat16)


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
        ranks: Ranks | None = None,
        spike_factor: float | None = None,
    ) -> None:
        self.ranks = ranks or Ranks(layout=Layout())
        self.trained = {name: p for name, p in named_parameters if p.requires_grad}
        if not self.trained:
            raise FactoryError("no weight is to be trained; check train.method and lora.target_modules.")
        self.spikes = Spikes(spike_factor, device=device, ranks=self.ranks)
        self.max_grad_norm = max_grad_norm
        self.loss_scale = LossScale(dtype, device)
        self.num_skipped = torch.zeros((), device=device)
        self.masters: dict[str, Tensor] = {}
        hyper = {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        if stochastic_bf16:
            for p in self.trained.values():
                if p.dtype != torch.bfloat16:
                    p.data = p.data.to(torch.bfloat16)
            self.masters = {name: self._part(p) for name, p in self.trained.items()}
            self.optimizer: torch.optim.Optimizer = StochasticAdamW(self.masters.values(), seed=seed, **hyper)
        else:
            self.masters = {name: self._master(p) for name, p in self.trained.items()}
            self.optimizer = torch.optim.AdamW(list(self.masters.values()), fused=True, **hyper)

    @staticmethod
    def _part(parameter: Tensor) -> Tensor:
        """Return what this process holds of `parameter`, as a weight of its own in the same memory."""
        return parameter if not isinstance(parameter, DTensor) else local(parameter).detach().requires_grad_()

    def _master(self, parameter: nn.Parameter) -> Tensor:
        """Return the float32 weights to optimise; gradients of a half-precision parameter are moved there at once,
        so accumulation is exact and each half gradient lives only until it is added."""
        if parameter.dtype == torch.float32:
            return self._part(parameter)
        master = parameter.detach().float().requires_grad_()
        master.grad = torch.zeros_like(master)

        def move(p: Tensor) -> None:
            assert master.grad is not None
            assert p.grad is not None
            master.grad.add_(p.grad)
            p.grad = None

        parameter.register_post_accumulate_grad_hook(move)
        return master

    @torch.no_grad()
    def step(self, learning_rate: float) -> Tensor:
        """Clip, update and clear the gradients; return the global gradient norm (a device scalar).

        A step whose norm is not finite, or a spike, leaves weights and moments as they are and is counted in
        `num_skipped`.
        """
        for name, p in self._divided():
            self.masters[name].grad = None if p.grad is None else local(p.grad)
        grads = [p.grad for p in self.masters.values() if p.grad is not None]
        norm = total_norm(grads, self.ranks) / self.loss_scale.scale
        accepted = self.spikes.accept(norm)
        factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0) / self.loss_scale.scale
        torch._foreach_mul_(grads, torch.where(accepted, factor, 0.0))
        self.optimizer.found_inf = (~accepted).float()  # type: ignore[attr-defined]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.num_skipped += ~accepted
        self.loss_scale.update(norm.isfinite())
        self._write_back()
        self.clear_gradients()
        return norm

    @torch.no_grad()
    def clear_gradients(self) -> None:
        """Forget what backward passes have added up."""
        for p in self.masters.values():
            if p.grad is not None:
                p.grad.zero_()
        for name, p in self._divided():
            p.grad = self.masters[name].grad = None

    @torch.no_grad()
    def weight_norm(self) -> Tensor:
        """Return the norm of all trained weights (a device scalar); it is finite exactly if they are."""
        return total_norm([local(master) for master in self.masters.values()], self.ranks)

    def _divided(self) -> list[tuple[str, nn.Parameter]]:
        """Return the weights of which this process holds a part, which is its master."""
        return [(name, p) for name, p in self.trained.items() if isinstance(p, DTensor)]

    @torch.no_grad()
    def _write_back(self) -> None:
        pairs = [
            (p, self.masters[name]) for name, p in self.trained.items()
            if p is not self.masters[name] and not isinstance(p, DTensor)
        ]  # fmt: skip
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])

    def tensors(self) -> dict[str, Tensor]:
        """Return all state by name: weights, moments, counters (every value a tensor of one element or more)."""
        state = {f"model.{name}": like(master, self.trained[name]) for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self._moments(master).items():
                state[f"optimizer.{key}.{name}"] = like(value, self.trained[name])
        return state

    def _moments(self, master: Tensor) -> dict[str, Tensor]:
        """Return the optimizer's tensors of one weight, made as zeros before the first step."""
        state = self.optimizer.state[master]
        if not state:
            state["exp_avg"] = torch.zeros_like(master)
            state["exp_avg_sq"] = torch.zeros_like(master)
            if isinstance(self.optimizer, torch.optim.AdamW):
                state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        return {key: value for key, value in state.items() if isinstance(value, Tensor)}

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
        if isinstance(self.optimizer, StochasticAdamW):
            self.optimizer.num_steps = int(scalars["num_updates"])
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
        return {f"ema.{name}": like(part, self._update.trained[name]) for name, part in self.averages.items()}
