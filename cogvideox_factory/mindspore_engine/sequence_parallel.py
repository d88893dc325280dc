"""One token stream over several processes: each holds some rows, attention exchanges them.

Text and video are each cut into equal contiguous parts, the last filled up with rows that nobody attends to and that
carry no loss; so any text length and any video go together with any number of processes, and all of them compile the
same graph. All work but attention is by row. Attention exchanges rows for heads (DeepSpeed-Ulysses, Jacobs et al. 2023,
arXiv 2309.14509): one all-to-all with q, k and v packed before it and one after it.

Gradients: each process' are of its own rows, so a parameter's gradient is the *sum* over the processes of a sequence,
and the mean over those that take other clips: the sum over all, divided by `Layout.num_data_ranks`.

Legend: B batch, T text tokens, N video tokens, S = T + N joint ones (text first), P processes of the sequence, L heads,
K head size, R rows of one process: ceil(T / P) of text, then ceil(N / P) of video.
"""

from mindspore import Tensor, nn, ops

from cogvideox_factory.errors import FactoryError
from cogvideox_factory.mindspore_engine.collectives import AllToAll, Group

Tokens = tuple[int, int]
"""(T, N)."""


class Cut(nn.Cell):
    """Takes this process' rows of text or of video."""

    def __init__(self, group: Group) -> None:
        super().__init__(auto_prefix=False)
        self.size, self.index = group.size, group.index

    def construct(self, x: Tensor) -> Tensor:
        """Return [B, ceil(N / P), ...] of `x` [B, N, ...]."""
        rows = _share(x.shape[1], self.size)
        return _filled(x, rows * self.size)[:, self.index * rows : (self.index + 1) * rows]


class HeadsForRows(nn.Cell):
    """Exchanges rows for heads before attention, and heads for rows after it."""

    def __init__(self, group: Group) -> None:
        super().__init__(auto_prefix=False)
        self.size = group.size
        self.there, self.back = AllToAll(group, split=2, concat=1), AllToAll(group, split=1, concat=2)

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Return all tokens of this process' heads, each [B, S, L / P, K], from its rows of all heads [B, R, L, K]."""
        packed = self.there(ops.concat((q, k, v), axis=-1))  # [B, P * R, L / P, 3 K]
        batch, _, heads, width = packed.shape
        parts = packed.reshape(batch, self.size, -1, heads, width)
        num_text = _share(tokens[0], self.size)
        text = parts[:, :, :num_text].reshape(batch, -1, heads, width)[:, : tokens[0]]
        video = parts[:, :, num_text:].reshape(batch, -1, heads, width)[:, : tokens[1]]
        whole, size = ops.concat((text, video), axis=1), width // 3  # [B, S, L / P, 3 K]
        return whole[..., :size], whole[..., size : 2 * size], whole[..., 2 * size :]

    def to_rows(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Return this process' rows of all heads [B, R, L, K] from all tokens of its heads [B, S, L / P, K]."""
        batch, _, heads, width = x.shape
        parts = []
        for part in (x[:, : tokens[0]], x[:, tokens[0] :]):
            filled = _filled(part, _share(part.shape[1], self.size) * self.size)
            parts.append(filled.reshape(batch, self.size, -1, heads, width))
        joint = ops.concat(parts, axis=2)  # [B, P, R, L / P, K]
        return self.back(joint.reshape(batch, -1, heads, width))


def require_divisible_heads(size: int, num_heads: int) -> None:
    """Refuse `size` processes a sequence that cannot divide the `num_heads` heads of the model.

    Raises:
        FactoryError: with the numbers that can.
    """
    if num_heads % size:
        fitting = ", ".join(str(n) for n in range(1, num_heads + 1) if num_heads % n == 0)
        raise FactoryError(
            f"parallel.sequence={size} needs heads divisible by {size}; this model has {num_heads}. Use one of "
            f"{fitting}, or --engine torch, which also sends keys and values round a ring."
        )


def _share(num_rows: int, size: int) -> int:
    """Return the rows of each of `size` processes, filling included."""
    return (num_rows + size - 1) // size


def _filled(x: Tensor, num_rows: int) -> Tensor:
    """Return `x` [B, N, ...] with rows of zeros behind it up to `num_rows`."""
    missing = num_rows - x.shape[1]
    if missing == 0:
        return x
    return ops.concat((x, ops.zeros((x.shape[0], missing, *x.shape[2:]), x.dtype)), axis=1)
