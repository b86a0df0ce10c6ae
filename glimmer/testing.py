"""What tests and the demo need in place of a downloaded checkpoint: small files, real formats, fixed seeds.

Nothing here is imported by the engine. The tokenizer knows GLM's protocol but no language: it spells in bytes.
"""

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from glimmer.text.tokenizer import byte_symbols

# GLM's pre-tokeniser: contractions, words, up to three digits, punctuation, line ends, white space.
GLM_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# GLM's added tokens in the order of their ids; True marks those that decoding may skip.
GLM_ADDED_TOKENS = {
    "<|endoftext|>": True,
    "[MASK]": True,
    "[gMASK]": True,
    "[sMASK]": True,
    "<sop>": True,
    "<eop>": True,
    "<|system|>": True,
    "<|user|>": True,
    "<|assistant|>": True,
    "<|observation|>": True,
    "<|begin_of_image|>": True,
    "<|end_of_image|>": True,
    "<|begin_of_video|>": True,
    "<|end_of_video|>": True,
    "<|begin_of_audio|>": True,
    "<|end_of_audio|>": True,
    "<|begin_of_transcription|>": True,
    "<|end_of_transcription|>": True,
    "<|code_prefix|>": True,
    "<|code_middle|>": True,
    "<|code_suffix|>": True,
    "<think>": False,
    "</think>": False,
    "<tool_call>": False,
    "</tool_call>": False,
    "<tool_response>": False,
    "</tool_response>": False,
    "<arg_key>": False,
    "</arg_key>": False,
    "<arg_value>": False,
    "</arg_value>": False,
    "/nothink": True,
    "<|begin_of_box|>": False,
    "<|end_of_box|>": False,
    "<|image|>": False,
    "<|video|>": False,
}


def write_tokenizer(directory: str | Path, vocab_extra: int = 0) -> dict[str, int]:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja; return the added tokens' ids by name.

    Id b (0..255) is the byte b; ids 256.. are `vocab_extra` tokens of two bytes each (0..65,536 of them, in a fixed
    scattered order, so that many of them begin or end inside a UTF-8 character); then come GLM's 36 added tokens.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    symbols = byte_symbols()
    # An odd multiplier permutes 0..65535: the pairs are all different and look random.
    codes = [i * 40503 % 65536 for i in range(vocab_extra)]
    pairs = [(symbols[code // 256], symbols[code % 256]) for code in codes]
    vocab = {token: i for i, token in enumerate(symbols + [a + b for a, b in pairs])}

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(GLM_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(name, special=special, normalized=False)
                          for name, special in GLM_ADDED_TOKENS.items()])
    tokenizer.save(str(directory / "tokenizer.json"))

    ids = {name: tokenizer.token_to_id(name) for name in GLM_ADDED_TOKENS}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "added_tokens_decoder": {
            str(ids[name]): {"content": name, **flags, "special": special}
            for name, special in GLM_ADDED_TOKENS.items()
        },
        "additional_special_tokens": [name for name, special in GLM_ADDED_TOKENS.items() if special],
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 128000,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizer",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(Path(__file__).parent / "demo" / "chat_template.jinja", directory / "chat_template.jinja")
    return ids
