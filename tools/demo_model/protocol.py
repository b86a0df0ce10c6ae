"""The parts of GLM's tokenizer that every checkpoint of the family shares: its pre-tokeniser and its added tokens.

The demo model and the random checkpoints of the tests are made with them. Not here: a vocabulary.
"""

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
