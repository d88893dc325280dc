"""The feed-forward half of a block, by the names of its checkpoint: `net.0.proj`, GELU (tanh form), `net.2`."""

from mindspore import Tensor, nn, ops

from cogvideox_factory.mindspore_engine.linear import Linear


class FeedForward(nn.Cell):
    """Four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The checkpoint counts a dropout between the two.
        self.net = nn.CellList([_GeluLinear(width, 4 * width), nn.Identity(), Linear(4 * width, width)])

    def construct(self, x: Tensor) -> Tensor:
        """Map [B, S, D] to [B, S, D]."""
        return self.net[2](self.net[0](x))


class _GeluLinear(nn.Cell):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = Linear(in_features, out_features)

    def construct(self, x: Tensor) -> Tensor:
        return ops.gelu(self.proj(x), approximate="tanh")
