"""A T5 tokenizer with a vocabulary of a few hundred pieces: caption words, word endings and single letters.

The same kind as the real one (SentencePiece unigram, `<pad>` 0, `</s>` 1, `<unk>` 2, `</s>` appended), stored
as `tokenizer.json`. Any printable ASCII text survives it: what is no known word is spelled.
"""

import json
import string
from pathlib import Path

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
_SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
_ENDINGS = ("es", "ed", "ing", "er", "est", "ly", "n't", "'s")
_WORDS = """
a an the this that its one two three four five some many few and or but while then as with without of on in
into onto at by for from to toward over under above below behind beside between across along around through
near far is are was be been it he she they we you i his her their there here not no more most very slightly
slowly quickly smoothly gently fast slow still red green blue yellow orange purple pink white black gray grey
brown cyan magenta dark bright light pale circle square triangle star ring cross diamond shape shapes ball box
line dot big small large tiny left right up down top bottom center middle corner edge side diagonally
horizontally vertically clockwise counterclockwise moves move moving slides slide drifts drift rises falls
bounces bounce spins spin rotates rotate grows shrinks appears disappears fades turns crosses circles passes
stays follows starts ends background foreground plain gradient noise texture video clip scene shot camera view
frame close wide zoom pan man woman person people child dog cat bird horse car train boat plane city street
road house room tree forest river sea ocean beach mountain sky cloud sun moon night day morning evening rain
snow wind water fire smoke grass flower field bridge walks walking runs running sits sitting stands standing
looks looking flies flying drives swims plays dances holds wearing high quality detailed cinematic realistic
cartoon animation style soft warm cold colorful beautiful old young new
"""


def vocabulary() -> list[tuple[str, float]]:
    """Return (piece, log probability) in the order of the token ids."""
    special = [(token, 0.0) for token in _SPECIAL.values()]
    words = [(f"▁{word}", -6.0 - index / 1000) for index, word in enumerate(dict.fromkeys(_WORDS.split()))]
    endings = [(ending, -7.0) for ending in _ENDINGS]
    letters = [(letter, -9.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    return [*special, ("▁", -5.0), *words, *endings, *letters]


def save(folder: Path) -> None:
    """Write `tokenizer.json` and its two companion files into `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    model = Tokenizer(models.Unigram(vocabulary(), unk_id=UNK_ID, byte_fallback=False))
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    model.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    end = [("</s>", EOS_ID)]
    model.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=end)
    model.add_special_tokens(list(_SPECIAL.values()))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(model.to_str(pretty=True), encoding="utf-8")
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 226, **_SPECIAL}
    for name, values in (("tokenizer_config.json", config), ("special_tokens_map.json", _SPECIAL)):
        (folder / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
