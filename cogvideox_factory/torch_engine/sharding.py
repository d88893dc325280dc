"""Weights divided among processes by torch's FSDP2: every replica is a whole model, divided among its shards.

| `zero` | weights | gradients | optimizer | communication of a step with n forward passes |
|---|---|---|---|---|
| 0 | whole | whole | whole | gradients averaged once |
| 1 | gathered for each forward pass and its backward | whole until the step | divided | n gathers, 1 reduction |
| 2 | as 1 | divided after each backward pass | divided | n gathers, n reductions |
| 3 | gathered block by block, forward and backward | divided | divided | 2n gathers, n reductions |

Rajbhandari et al., ZeRO (arXiv 1910.02054); Zhao et al., FSDP (arXiv 2304.11277).

Importing this takes a second (DTensor), which a single process need not wait for where it only makes videos.
"""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from cogvideox_factory.ranks import Layout
from cogvideox_factory.torch_engine.ranks import Ranks
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer


def distribute(
    transformer: CogVideoXTransformer, ranks: Ranks, *, dtype: torch.dtype, whole: Collection[nn.Parameter] = ()
) -> None:
    """Divide the weights of a loaded (and LoRA-ed) `transformer`, which then computes in `dtype`.

    Those in `whole`, all frozen, every process keeps as they are.

    Gradients come back in float32, averaged over all ranks. Every block is a unit of its own; the modulation, which
    has a fifth of a model's weights, is another.
    """
    transformer.sequence = ranks.sequence
    if ranks.mesh is None:
        return
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.promote_types(dtype, torch.float32), cast_forward_inputs=False
    )
    drops = ranks.layout.zero == 3
    # Between replicas torch holds a second, float32 copy of all gradients until the last is there, be it only one.
    mesh = ranks.mesh if ranks.layout.grid[0] > 1 else ranks.mesh["shards"]
    blocks = list(transformer.transformer_blocks)
    for unit in [transformer.modulation, *blocks]:
        # The last block's backward comes right after its forward: dropping its weights would be for nothing.
        keeps = not drops or unit is blocks[-1]
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=not keeps, ignored_params=set(whole))
    fully_shard(transformer, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=set(whole))
    for method in ("embed_time", "instants"):  # called before the first step, and need weights as well
        register_fsdp_forward_method(transformer, method)


def reduce_gradients(transformer: nn.Module, layout: Layout, *, last: bool) -> None:
    """Say before a backward pass whether it is the `last` of a step: stages 0 and 1 reduce only then."""
    if isinstance(transformer, FSDPModule):
        transformer.set_requires_gradient_sync(last or layout.zero >= 2)


def drop_gathered(transformer: nn.Module) -> None:
    """Let go of what forward passes have gathered and not dropped, so that parameters are what is divided again.

    After a pass without a backward one, as in validation, blocks keep a copy in the dtype they compute in, which knows
    nothing of what is written to the weights meanwhile.
    """
    for module in transformer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def like(part: Tensor, tensor: Tensor, *, mesh: DeviceMesh | None = None) -> Tensor:
    """Return `part`, which goes with the rows of `local(tensor)`, as a tensor divided as `tensor` is.

    Args:
        part: [rows, ...]; its other axes may be any.
        tensor: whole or divided.
        mesh: the processes of `tensor`, where `part` is in host memory and `tensor` is not.
    """
    if not isinstance(tensor, DTensor):
        return part
    if mesh is None:
        mesh = tensor.device_mesh
    shape = torch.Size((tensor.shape[0], *part.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, mesh, tensor.placements, shape=shape, stride=stride, run_check=False)


def host_mesh(tensor: Tensor) -> DeviceMesh | None:
    """Return the processes that divide `tensor`, for parts in host memory; every process must call this alike."""
    if not isinstance(tensor, DTensor):
        return None
    mesh = tensor.device_mesh
    return (
        mesh if mesh.device_type == "cpu" else init_device_mesh("cpu", mesh.shape, mesh_dim_names=mesh.mesh_dim_names)
    )


def total_norm(grads: Iterable[Tensor], ranks: Ranks) -> Tensor:
    """Return the norm of all gradients as one vector, from the parts that each process holds (a device scalar)."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(grads))))
    return norm if ranks.mesh is None else ranks.over_shards(norm.square()).sqrt()
