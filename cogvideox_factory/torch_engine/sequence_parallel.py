"""One token stream over several ranks: every rank holds some rows, attention exchanges them.

The joint stream of text and video is cut into equal contiguous parts; the last is filled up with rows that nobody
attends to and that carry no loss, so any text length, any video and any number of ranks go together. All work but
attention is by row. Attention exchanges rows for heads (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv 2309.14509): one
all-to-all with q, k and v packed before it and one after it. Where the ranks do not divide the heads, keys and values
also travel a ring (Liu et al. 2023, arXiv 2310.01889): `ulysses * ring` ranks, the heads divided among `ulysses`.

Gradients: each rank's are of its own rows, so a parameter's gradient is the *sum* over the sequence group. Reduction
over ranks averages; `gather_rows` makes up for it by the factor that its backward pass multiplies with.

Legend: B batch, S joint tokens, R rows of one rank, P ranks of the sequence group, U of them that
divide the heads, L heads, K head size, D width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import _functional_collectives as funcol

from cogvideox_factory.errors import FactoryError
from cogvideox_factory.torch_engine.attention import attention_backward, attention_forward


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SequenceGroup:
    """The ranks that share one stream, of which this process is number `rank`."""

    rank: int
    group: dist.ProcessGroup
    """All of them, in the order of their rows."""
    ulysses: dist.ProcessGroup
    """Neighbours, which divide the heads among them."""
    ring: dist.ProcessGroup
    """Those with the same heads, along which keys and values travel."""

    @property
    def size(self) -> int:
        """P."""
        return self.group.size()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Share:
    """The rows of a stream of `num_tokens` tokens that one rank holds."""

    sequence: SequenceGroup
    num_tokens: int

    @property
    def num_rows(self) -> int:
        """Rows of each rank, those that fill up the last one's included."""
        return -(-self.num_tokens // self.sequence.size)

    @property
    def num_token_rows(self) -> int:
        """Rows of this rank that are tokens, and no filling."""
        return min(max(self.num_tokens - self.start, 0), self.num_rows)

    @property
    def start(self) -> int:
        """The stream's row that is this rank's first."""
        return self.sequence.rank * self.num_rows

    def num_text_rows(self, text_length: int) -> int:
        """Return how many of this rank's rows are of the `text_length` text tokens in front of the stream."""
        return min(max(text_length - self.start, 0), self.num_rows)

    def cut(self, x: Tensor, *, dim: int, start: int = 0) -> Tensor:
        """Return this rank's rows of `x`, whose axis `dim` begins at the stream's row `start`: as many as it has."""
        first = min(max(self.start - start, 0), x.shape[dim])
        stop = min(max(self.start + self.num_rows - start, 0), x.shape[dim])
        return x.narrow(dim, first, stop - first)

    def fill(self, x: Tensor, *, dim: int, value: float = 0) -> Tensor:
        """Return `x` with rows of `value` behind it up to `num_rows`."""
        missing = self.num_rows - x.shape[dim]
        return F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, missing], value=value) if missing else x


def ulysses_degree(size: int, num_heads: int, ring: int | None = None) -> int:
    """Return how many of `size` ranks divide the heads among them; the others make the ring.

    Args:
        size: of the sequence group.
        num_heads: of the model.
        ring: ranks of the ring; by default the fewest that work.

    Raises:
        FactoryError: a ring that does not divide the group, or leaves heads that cannot be divided.
    """
    fitting = [u for u in range(size, 0, -1) if size % u == 0 and num_heads % u == 0]
    if ring is None:
        return fitting[0]
    if size % ring or size // ring not in fitting:
        raise FactoryError(
            f"parallel.ring={ring} with parallel.sequence={size}: the {num_heads} heads must divide among "
            f"sequence / ring ranks. Use a ring of {' or '.join(str(size // u) for u in fitting)}."
        )
    return size // ring


def sequence_attention(q: Tensor, k: Tensor, v: Tensor, share: Share) -> Tensor:
    """Return the attention of this rank's rows to all tokens, heads joined: [B, R, L * K].

    Args:
        q: this rank's rows of the queries [B, L, R, K], normalised and rotated.
        k: as q.
        v: as q.
        share: which rows they are.
    """
    sequence = share.sequence
    packed = torch.stack([x.transpose(1, 2) for x in (q, k, v)], dim=2)  # [B, R, 3, L, K]
    packed = _Exchange.apply(
        packed, sequence.ulysses, _rows_for_heads, _heads_for_rows
    )  # [B, R * ulysses, 3, L / ulysses, K]
    out = _RingAttention.apply(packed, share)  # [B, R * U, L / U, K]
    out = _Exchange.apply(out, sequence.ulysses, _heads_for_rows, _rows_for_heads)
    return out.flatten(2)  # pyright: ignore[reportOptionalMemberAccess]


def gather_rows(x: Tensor, share: Share) -> Tensor:
    """Return all rows [B, S, D] from each rank's [B, R, D]; every rank must go on with them in the same way."""
    return _Gather.apply(x, share)  # pyright: ignore[reportReturnType]


def _exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Give part i of the first axis to rank i of `group`, and return what the others gave, in their order."""
    return funcol.wait_tensor(funcol.all_to_all_single(x.contiguous(), None, None, group))


def _rows_for_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return [B, R * U, ..., L / U, K] from [B, R, ..., L, K]."""
    size = group.size()
    if size == 1:
        return x
    parts = x.unflatten(-2, (size, -1)).movedim(-3, 0)  # [U, B, R, ..., L / U, K]
    return _exchange(parts, group).movedim(0, 1).flatten(1, 2)


def _heads_for_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Undo `_rows_for_heads`."""
    size = group.size()
    if size == 1:
        return x
    parts = x.unflatten(1, (size, -1)).movedim(1, 0)  # [U, B, R, ..., L / U, K]
    return _exchange(parts, group).movedim(0, -3).flatten(-3, -2)


class _Exchange(torch.autograd.Function):
    """`_rows_for_heads` or `_heads_for_rows`; the gradient takes the other way."""

    @staticmethod
    def forward(ctx: Any, x, group, there, back):
        ctx.group, ctx.back = group, back
        return there(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):
        return ctx.back(grads[0], ctx.group), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, share):
        ctx.share = share
        parts = funcol.wait_tensor(funcol.all_gather_tensor(x.contiguous(), 1, share.sequence.group))  # [B, P * R, D]
        return parts[:, : share.num_tokens]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):
        share = ctx.share
        own = share.fill(share.cut(grads[0], dim=1), dim=1)
        return own * share.sequence.size, None  # see the module's word on gradients


# --- attention, with keys and values on a ring ------------------------------------------------------------------------


class _RingAttention(torch.autograd.Function):
    """Attention of one rank's queries to the tokens of all ranks of the ring, from q, k, v in one [B, T, 3, L, K]."""

    @staticmethod
    def forward(ctx: Any, packed, share):
        out, lse = ring_attention_forward(packed, share.num_tokens, share.sequence.ring.group_name)
        ctx.share = share
        ctx.save_for_backward(packed, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):
        packed, out, lse = ctx.saved_tensors
        ring, num_tokens = ctx.share.sequence.ring.group_name, ctx.share.num_tokens
        return ring_attention_backward(grads[0].contiguous(), packed, out, lse, num_tokens, ring), None


# Operators of their own, because no compiler follows tensors from rank to rank.


@torch.library.custom_op("cogvideox::ring_attention_forward", mutates_args=())
def ring_attention_forward(packed: Tensor, num_tokens: int, ring: str) -> tuple[Tensor, Tensor]:
    """Return the output [B, T, L, K] and the log-sum-exp [B, L, T] of `packed` [B, T, 3, L, K].

    `num_tokens` of the stream are tokens; `ring` is the name of the group of processes.
    """
    q, total = packed[:, :, 0], None
    for keys, num_keys in _travel(packed[:, :, 1:], num_tokens, _group(ring)):
        if not num_keys:
            continue
        part = attention_forward(q, keys[:, :num_keys, 0], keys[:, :num_keys, 1], None)
        total = part if total is None else _merge(*total, *part)
    assert total is not None
    return total[0].to(q.dtype).contiguous(), total[1].contiguous()


@torch.library.register_fake("cogvideox::ring_attention_forward")
def _(packed, num_tokens, ring):
    batch, rows, _, heads, size = packed.shape
    lse = packed.new_empty(batch, heads, rows, dtype=torch.promote_types(packed.dtype, torch.float32))
    return packed.new_empty(batch, rows, heads, size), lse


@torch.library.custom_op("cogvideox::ring_attention_backward", mutates_args=())
def ring_attention_backward(
    grad: Tensor, packed: Tensor, out: Tensor, lse: Tensor, num_tokens: int, ring: str
) -> Tensor:
    """Return the gradient of `packed` from that of the output [B, T, L, K]."""
    q, group = packed[:, :, 0], _group(ring)
    dq = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
    of_keys = torch.zeros_like(packed[:, :, 1:], dtype=dq.dtype)  # follows the keys it belongs to
    for keys, num_keys in _travel(packed[:, :, 1:], num_tokens, group):
        if num_keys:
            k, v = keys[:, :num_keys].unbind(2)
            dq_part, dk, dv = attention_backward(grad, q, k, v, None, out, lse)
            dq += dq_part
            of_keys[:, :num_keys, 0] += dk
            of_keys[:, :num_keys, 1] += dv
        of_keys = _pass_on(of_keys, group)()
    return torch.cat([dq.unsqueeze(2), of_keys], dim=2).to(packed.dtype)


@torch.library.register_fake("cogvideox::ring_attention_backward")
def _(grad, packed, out, lse, num_tokens, ring):
    return packed.new_empty(packed.shape)


RING_OP = torch.ops.cogvideox.ring_attention_forward.default
"""As `attention.SAVED_OPS`, where ranks divide the stream."""


def _group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # pyright: ignore[reportArgumentType]


def _travel(keys: Tensor, num_tokens: int, ring: dist.ProcessGroup):
    """Yield (keys and values, how many of them are tokens) of every rank of the ring, this rank's first.

    The next ones are on their way while the caller works.
    """
    rows, own = keys.shape[1], dist.get_group_rank(ring, dist.get_rank())
    for step in range(ring.size()):
        last = step == ring.size() - 1
        coming = None if last else _pass_on(keys, ring)
        whose = (own - step) % ring.size()
        yield keys, min(max(num_tokens - whose * rows, 0), rows)
        if coming:
            keys = coming()


def _pass_on(x: Tensor, ring: dist.ProcessGroup):
    """Send `x` to the next rank of the ring; return a function that waits for the previous one's and returns it."""
    size = ring.size()
    if size == 1:
        return lambda: x
    own = dist.get_group_rank(ring, dist.get_rank())
    x, received = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    following, previous = (dist.get_global_rank(ring, (own + step) % size) for step in (1, -1))
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, x, following, ring), dist.P2POp(dist.irecv, received, previous, ring)]
    )

    def wait(sent: Tensor = x) -> Tensor:
        for work in works:
            work.wait()
        return received

    return wait


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention to two sets of keys from that to each: outputs [B, T, L, K], log-sum-exps [B, L, T]."""
    both = torch.logaddexp(lse, more_lse)
    weight, more_weight = ((part - both).exp().transpose(1, 2).unsqueeze(-1) for part in (lse, more_lse))
    return out * weight + more * more_weight, both
