import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvideox_factory import text_encoder_files
from cogvideox_factory.errors import FactoryError, MissingError, UnfitError
from cogvideox_factory.torch_engine.text_encoder import TextEncoder, load_tokenizer

CAPTIONS = ["A red circle moves left.", "", "a slow pan, " * 30, "  two\nlines\tand   spaces "]


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A model folder a test may damage: only the two parts a text encoder reads."""
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(tiny_model("cogvideox-2b") / part, tmp_path / part)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_encode_is_what_diffusers_feeds_its_transformer(tiny_model, dtype):
    from diffusers import CogVideoXPipeline
    from transformers import AutoTokenizer, T5EncoderModel

    folder = tiny_model("cogvideox-5b")
    ours = TextEncoder.from_folder(folder, dtype=dtype)
    theirs = SimpleNamespace(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype),
    )
    with torch.no_grad():
        expected = CogVideoXPipeline._get_t5_prompt_embeds(
            theirs, CAPTIONS, max_sequence_length=20, device=torch.device("cpu")
        )
    got = ours.encode(CAPTIONS, 20)
    assert got.shape == (4, 20, ours.width) == (4, 20, 32)
    assert got.dtype == dtype == ours.dtype
    assert not got.requires_grad
    assert torch.equal(got, expected)


def test_padding_rows_are_kept_and_depend_on_the_text(tiny_model):
    encoder = TextEncoder.from_folder(tiny_model("cogvideox-2b"), dtype=torch.float32)
    red, blue = encoder.encode(["a red ball", "a blue ball"], 16)
    assert encoder.count_tokens("a red ball") == 4
    assert red[4:].abs().min() > 0
    assert (red[4:] != blue[4:]).any()


def test_tokens_are_counted_with_the_end_and_the_rest_is_reported(tiny_model):
    encoder = TextEncoder.from_folder(tiny_model("cogvideox-2b"), dtype=torch.float32)
    caption = "a red circle moves left"
    assert encoder.count_tokens(caption) == 6
    assert encoder.count_tokens("") == 1
    assert encoder.truncated_tokens(caption, 6) == 0
    assert encoder.truncated_tokens(caption, 4) == 2
    assert encoder.count_tokens("red " * 1000) == 1001


def test_half_precision_is_loaded_as_such(tiny_model):
    encoder = TextEncoder.from_folder(tiny_model("cogvideox-2b"), dtype=torch.bfloat16)
    assert {p.dtype for p in encoder.model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in encoder.model.parameters())
    assert not encoder.model.training


def test_a_list_is_asked_for(tiny_model):
    encoder = TextEncoder.from_folder(tiny_model("cogvideox-2b"), dtype=torch.float32)
    with pytest.raises(FactoryError, match="brackets"):
        encoder.encode("a red circle", 16)
    with pytest.raises(FactoryError, match="max_sequence_length=0"):
        encoder.encode(["a red circle"], 0)


def test_a_sentencepiece_folder_gives_sentencepieces_ids(tmp_path):
    """Published folders hold spiece.model, no tokenizer.json; transformers converts it while loading."""
    spm = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    folder = _write_sentencepiece_tokenizer(tmp_path / "tokenizer", spm)
    tokenizer = load_tokenizer(tmp_path)
    pieces = spm.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    for caption in [*CAPTIONS, "é東京 ﬁne “quotes” don't", " a\u200bb ", "x" * 50]:
        assert tokenizer(caption).input_ids == [*pieces.encode(caption), 1], caption
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer("<extra_id_0>").input_ids[0] == len(pieces) + 99


def _write_sentencepiece_tokenizer(folder, spm):
    """Write the four files of a published tokenizer folder, with a vocabulary of about sixty pieces."""
    folder.mkdir()
    corpus = folder.parent / "corpus.txt"
    corpus.write_text("a red circle moves left\nthe slow pan of two lines and spaces\nfine quotes don't\n" * 50)
    spm.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "spiece"), vocab_size=60, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, normalization_rule_name="nmt_nfkc", minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.vocab").unlink()
    size = spm.SentencePieceProcessor(model_file=str(folder / "spiece.model")).get_piece_size()
    extra = {f"<extra_id_{i}>": size + 99 - i for i in range(100)}
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    flags = {"normalized": False, "single_word": False, "special": True}
    decoder = {
        str(i): {"content": t, "lstrip": i > 2, "rstrip": i > 2, **flags}
        for t, i in {"<pad>": 0, "</s>": 1, "<unk>": 2, **extra}.items()
    }
    config = {
        "add_prefix_space": True, "added_tokens_decoder": decoder, "additional_special_tokens": list(extra),
        "clean_up_tokenization_spaces": True, "extra_ids": 100, "legacy": True, "model_max_length": 226,
        "sp_model_kwargs": {}, "tokenizer_class": "T5Tokenizer", **special,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps(extra))
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": list(extra), **special}))
    return folder


def test_the_missing_library_is_named(tmp_path, monkeypatch):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(b"")
    monkeypatch.setattr(text_encoder_files, "_PIECE_LIBRARIES", {"sentencepiece": "no_such_package.sentencepiece"})
    with pytest.raises(MissingError, match="pip install sentencepiece"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_a_missing_part_is_named(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(MissingError, match=part):
        TextEncoder.from_folder(folder, dtype=torch.float32)


def test_a_tokenizer_without_files_is_missing(folder):
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(MissingError, match="neither tokenizer"):
        load_tokenizer(folder)


def test_a_damaged_tokenizer_is_unfit(folder):
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(UnfitError, match="cannot be read as a tokenizer"):
        load_tokenizer(folder)


def test_pickled_weights_are_refused(folder):
    weights = folder / "text_encoder" / "model.safetensors"
    torch.save(load_file(weights), folder / "text_encoder" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(MissingError, match="can run code"):
        TextEncoder.from_folder(folder, dtype=torch.float32)


def test_missing_tensors_are_named(folder):
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["encoder.final_layer_norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UnfitError, match=r"encoder\.final_layer_norm\.weight"):
        TextEncoder.from_folder(folder, dtype=torch.float32)


def test_a_truncated_file_is_unfit(folder):
    weights = folder / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UnfitError, match="Download it again"):
        TextEncoder.from_folder(folder, dtype=torch.float32)


def test_another_size_is_unfit(folder):
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"d_ff": 96}))
    with pytest.raises(UnfitError, match="wi_0"):
        TextEncoder.from_folder(folder, dtype=torch.float32)


def test_another_model_is_unfit(folder):
    (folder / "text_encoder" / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}))
    with pytest.raises(UnfitError, match="clip_text_model"):
        TextEncoder.from_folder(folder, dtype=torch.float32)


def test_importing_does_not_import_transformers():
    code = "import cogvideox_factory.torch_engine.text_encoder, sys; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
