"""Compiled blocks against plain ones: the same loss and gradients, as many graphs as announced, in every layout."""

import shutil

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from cogvideox_factory.errors import FactoryError, MissingError
from cogvideox_factory.ranks import Layout
from cogvideox_factory.torch_engine import lora
from cogvideox_factory.torch_engine.border import whole
from cogvideox_factory.torch_engine.compilation import compile_blocks
from cogvideox_factory.torch_engine.device import require_compiler
from cogvideox_factory.torch_engine.examine import first_not_finite
from cogvideox_factory.torch_engine.optim import Update
from cogvideox_factory.torch_engine.ranks import Ranks, make_ranks
from cogvideox_factory.torch_engine.reuse import Reuse
from cogvideox_factory.torch_engine.sharding import distribute
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer
from tests.torch_engine.processes import run_in
from tests.torch_engine.test_sampling import video
from tests.torch_engine.test_transformer import config_of, positions_for

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine")
ALONE = Ranks(layout=Layout())
# Traces and differentiates as inductor's graphs are, and spends no time on machine code.
QUICK = "aot_eager"


@pytest.fixture(autouse=True)
def fresh_counters():
    counters.clear()
    yield
    torch._dynamo.reset()


def model(checkpointing: str, *, adapters=False, heads=2, num_layers=2) -> CogVideoXTransformer:
    sizes = {"num_layers": num_layers, "num_attention_heads": heads, "attention_head_dim": 16}
    made = CogVideoXTransformer(config_of("cogvideox-5b", **sizes))
    made.initialize(3)
    made.set_checkpointing(checkpointing)
    if adapters:
        lora.add_lora(made, rank=2, alpha=2, seed=0)
        draw = torch.Generator().manual_seed(1)
        for parameter in lora.lora_parameters(made):
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    else:
        made.requires_grad_(True)
    return made.train()


def inputs_of(made: CogVideoXTransformer, batch: int):
    draw, config = torch.Generator().manual_seed(2), made.config
    latents = torch.randn(batch, 4, config.in_channels, 8, 12, generator=draw)
    prompt = torch.randn(batch, config.max_text_seq_length, config.text_embed_dim, generator=draw)
    return latents, prompt, torch.full((batch,), 500)


def loss_of(made: CogVideoXTransformer, batch: int) -> torch.Tensor:
    inputs = inputs_of(made, batch)
    return made(*inputs, positions=positions_for(made, *inputs[:2])).square().mean()


def step(made: CogVideoXTransformer, batch: int = 1):
    """Return the loss and all gradients of a batch."""
    loss = loss_of(made, batch)
    loss.backward()
    grads = {name: whole(p.grad).clone() for name, p in made.named_parameters() if p.grad is not None}
    made.zero_grad()
    return loss.item(), grads


def assert_same(ours, theirs):
    (loss, grads), (expected, others) = ours, theirs
    assert loss == pytest.approx(expected, rel=1e-5)
    assert grads.keys() == others.keys()
    largest = max(grad.abs().max() for grad in others.values())
    for name, grad in others.items():
        assert (grads[name] - grad).abs().max() <= 1e-5 * grad.abs().max() + 1e-7 * largest, name


class Loss:
    """As much of a loss as `first_not_finite` asks for."""

    def __init__(self, transformer):
        self.transformer = transformer

    def __call__(self, batch):
        return loss_of(self.transformer, batch["batch"])


def update_of(made: CogVideoXTransformer) -> Update:
    return Update(
        made.named_parameters(), dtype=torch.float32, device=torch.device("cpu"), betas=(0.9, 0.95), eps=1e-8,
        weight_decay=0.0, max_grad_norm=1.0, stochastic_bf16=False, seed=0,
    )  # fmt: skip


@pytest.mark.slow
@needs_compiler
def test_machine_code_gives_the_same_loss_and_gradients(monkeypatch, tmp_path):
    # A process that was killed leaves half a library in the usual folder.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled, plain = (model("save_attention", num_layers=1) for _ in range(2))
    assert compile_blocks(compiled, "default", num_shapes=1) == 1
    expected = step(plain)
    for _ in range(2):
        assert_same(step(compiled), expected)
    with torch.no_grad():  # another batch, as sample videos have
        loss_of(compiled, 2)
    assert counters["stats"]["unique_graphs"] == 1, "what is not trained is not compiled"


@pytest.mark.slow
def test_there_are_as_many_graphs_as_announced_and_a_shape_more_is_an_error():
    """Of four blocks: the first and the last have graphs of their own, those between them share one."""
    compiled, plain = (model("full", adapters=True, num_layers=4) for _ in range(2))
    limit = compile_blocks(compiled, "default", num_shapes=2, backend=QUICK)
    for batch in (1, 2, 1):
        assert_same(step(compiled, batch), step(plain, batch))
    assert counters["stats"]["unique_graphs"] == limit == 6
    with pytest.raises(FailOnRecompileLimitHit):
        step(compiled, 3)


def test_a_bad_step_is_looked_into_behind_the_compiler():
    compiled = model("none", adapters=True, num_layers=3)
    compile_blocks(compiled, "default", num_shapes=1, backend=QUICK)
    step(compiled)
    (part,) = compiled.blocks[2].attn.out.parts("default").values()
    part.lora_A.data.zero_()  # forward the adapter adds nothing; backward it overflows
    part.lora_B.data.fill_(3e38)
    update = update_of(compiled)
    update.loss_scale.scale.fill_(1e6)
    found = first_not_finite(Loss(compiled), update, [{"batch": 1}], ALONE)
    assert found == "the gradient that comes to the output of transformer_blocks.2.attn"


def test_adapters_on_some_layers_only_are_counted():
    compiled = CogVideoXTransformer(config_of("cogvideox-5b", num_layers=5))
    lora.add_lora(compiled, rank=2, alpha=2, seed=0, target_modules=[r"transformer_blocks\.[23]\..*to_q"])
    # Two before the first adapter, the one with it, the next with one, and the last.
    assert compile_blocks(compiled, "default", num_shapes=1, backend=QUICK) == 4
    step(compiled)
    assert counters["stats"]["unique_graphs"] == 4


@pytest.mark.parametrize("adapters", [False, True])
def test_blocks_that_make_videos_have_a_graph_for_each_batch_and_the_last_ones_own(adapters):
    compiled, plain = (model("none", adapters=adapters, num_layers=3).requires_grad_(False) for _ in range(2))
    limit = compile_blocks(compiled, "default", num_shapes=2, backend=QUICK, training=False)
    scales = [1.0, 6.0, 6.0, 1.0]
    expected = video(plain, guidance=scales)
    assert counters["stats"]["unique_graphs"] == 0
    for reuse in (None, Reuse(first_block=1e-12), None):
        assert (video(compiled, guidance=scales, reuse=reuse) - expected).abs().max() <= 1e-4
    assert counters["stats"]["unique_graphs"] == limit == 4
    with pytest.raises(FailOnRecompileLimitHit), torch.inference_mode():
        loss_of(compiled, 3)


def divided():
    """Return this rank's compiled and plain steps, weights and tokens divided, keys on a ring, and the graphs made."""
    ranks = make_ranks(Layout(size=2, zero=3, sequence=2), num_heads=3, device_type="cpu")
    results = []
    for compiled in (False, True):
        made = model("save_attention", heads=3, num_layers=3)
        distribute(made, ranks, dtype=torch.float32)
        if compiled:
            compile_blocks(made, "default", num_shapes=1, backend=QUICK)
        results.append(step(made))
    return *results, counters["stats"]["unique_graphs"]


def test_divided_weights_and_tokens_compile_whole(tmp_path):
    for plain, compiled, num_graphs in run_in(2, divided, folder=tmp_path):
        assert_same(compiled, plain)
        assert num_graphs == 1, "ranks that divide the tokens keep the text to the end"


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    with pytest.raises(FactoryError, match=r"compile='max-autotune' \(did you mean 'max_autotune'"):
        compile_blocks(model("none"), "max-autotune", num_shapes=1)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingError, match=r"no-such-compiler is not here.*--train\.compile none"):
        require_compiler(torch.device("cpu"))
