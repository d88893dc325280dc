import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.data.caption_tokens import token_counter
from cogvideox_factory.errors import UnfitError


@pytest.fixture(scope="module")
def oracle(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model("cogvideox-2b") / "tokenizer", local_files_only=True)


@given(text=st.text(st.characters(codec="ascii", exclude_categories=("Cc",)), max_size=300))
@settings(max_examples=60, deadline=None)
def test_counts_are_those_of_transformers(tiny_model, oracle, text):
    count = token_counter(tiny_model("cogvideox-2b"))
    assert count is not None
    assert count(text) == len(oracle(text, truncation=False).input_ids)


def test_sentencepiece_files_are_counted_like_transformers(tmp_path):
    pieces = pytest.importorskip("sentencepiece")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (tmp_path / "text").write_text("".join(f"a red fox runs over the snow {n}\n" for n in range(200)))
    pieces.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(folder / "spiece"), vocab_size=60, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    count = token_counter(tmp_path)
    oracle = transformers.T5Tokenizer.from_pretrained(folder, extra_ids=0)
    for caption in ("a red fox", "  two   spaces ", "", "snow runs over the fox 7", "öäü unknown"):
        assert count(caption) == len(oracle(caption).input_ids), caption


def test_no_tokenizer_is_no_error_and_a_broken_one_is(tmp_path):
    assert token_counter(tmp_path) is None
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")
    with pytest.raises(UnfitError, match="cannot be read as a tokenizer"):
        token_counter(tmp_path)
