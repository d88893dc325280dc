import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from cogvideox_factory.torch_engine import feed_forward as module
from cogvideox_factory.torch_engine.feed_forward import FeedForward, output_unread

TOKENS, WIDTH, TEXT = 5, 4, 1


def build():
    draw = torch.Generator().manual_seed(0)
    part = FeedForward(WIDTH, eps=1e-5).double()
    for parameter in part.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw))
    return part, draw


def inputs(draw, batch):
    def one(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()

    return one(batch, TOKENS, WIDTH), tuple(one(*((WIDTH,) if batch == 1 else (batch, 1, WIDTH))) for _ in range(6))


def plain(part, x, vectors):
    def rows(of_video, of_text):
        counts = ((of_text, TEXT), (of_video, TOKENS - TEXT))
        return torch.cat([v.reshape(-1, 1, WIDTH).expand(-1, n, -1) for v, n in counts], dim=1)

    scale, shift, gate, *of_text = vectors
    normed = F.layer_norm(x, (WIDTH,)) * rows(scale, of_text[0]) + rows(shift, of_text[1])
    return x + rows(gate, of_text[2]) * part.down(F.gelu(part.up(normed), approximate="tanh"))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("trained", ["all", "vectors", "nothing"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_values_and_gradients(batch, trained, wrapped):
    part, draw = build()
    x, vectors = inputs(draw, batch)
    if wrapped:  # as an adapter would be put there
        part.up, part.down = nn.Sequential(part.up), nn.Sequential(part.down)
    if trained != "all":
        part.requires_grad_(False)
    if trained == "nothing":
        vectors = tuple(v.detach() for v in vectors)
    torch.testing.assert_close(part(x, vectors, TEXT), plain(part, x, vectors))
    extra = tuple(p for p in part.parameters() if p.requires_grad)
    assert gradcheck(lambda x, *v: part(x, v[:6], TEXT), (x, *vectors, *extra))


@pytest.mark.parametrize(("frozen", "checkpointed", "kept"), [(False, False, 16), (True, False, 11), (True, True, 16)])
def test_a_frozen_one_keeps_part_of_its_hidden_columns(frozen, checkpointed, kept):
    part, draw = build()
    x, vectors = inputs(draw, 1)
    part.requires_grad_(not frozen)
    part.checkpointed = checkpointed
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        part(x, vectors, TEXT)
    assert (TOKENS, kept) in shapes
    assert ((TOKENS, 16) in shapes) == (kept == 16)


def test_an_output_nobody_reads_is_not_computed():
    part, draw = build()
    x, vectors = inputs(draw, 1)
    expected = torch.autograd.grad(part(x, vectors, TEXT).sum(), x)[0]
    with output_unread():
        out = part(x, vectors, TEXT)
    assert not module._output_unread.get()
    assert out.shape == x.shape
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], expected)
