"""Everything that is learnt from, drawn from one seed: the tokenizer, the training examples, the held-out questions.

    python tools/demo_model/generate.py --out build/demo_model

writes tokenizer.json, tokenizer_config.json and train.npz (token ids, which of them are to be predicted, where each
example begins, which task it is). The held-out questions are drawn by evaluate.py, through `heldout_examples`. None of
them is ever drawn for training: a question's own text decides on which side it falls (`dialogue.held_out`).
Not here: any word of the sentences (talk.py, tooling.py, words.py), the model, its training.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import talk
import tooling
from dialogue import SEPARATOR, Round, held_out, part, plain, render
from protocol import GLM_ADDED_TOKENS, GLM_SPLIT
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 4096
SPACED = 400  # tokens that are a space and a word
SPECIAL = list(GLM_ADDED_TOKENS)
EXAMPLES = {  # how many of each task
    "call": 48000, "tools": 20000, "strange tools": 20000, "sum": 40000, "fact": 50000, "introduction": 14000,
    "raw": 12000, "json": 24000, "repeat": 20000, "small talk": 6000, "mixed": 6000,
    "two calls": 12000,
}  # fmt: skip


# ---- examples ---------------------------------------------------------------------------------------------------


def rounds_for(task: str, rng: Random, lang: str) -> Round:
    draw = {
        "sum": talk.sum_of_two, "fact": talk.fact, "introduction": talk.introduction, "json": talk.form,
        "repeat": lambda rng, lang: talk.repeat(rng, lang, strange=rng.random() < 0.7),
        "small talk": talk.small_talk,
    }[task]  # fmt: skip
    while held_out((drawn := draw(rng, lang)).key):
        pass
    return drawn


STRANGE = {  # how often a tool's words are found nowhere else
    "call": 0.5, "tools": 0.3, "strange tools": 0.5, "two calls": 0.1,
}  # fmt: skip


def tool_rounds(rng: Random, lang: str, task: str = "tools") -> tuple[list[Round], list[dict[str, Any]]]:
    """One to three requests to one set of tools, one in eight of which needs none of them; or one request's calls."""
    if task == "two calls":
        box = places_box(rng, lang, STRANGE[task])
        while held_out((drawn := tooling.request(rng, lang, box, rng.choice(tooling.of_places(box)), 1)).key):
            pass
        return [replace(drawn, reply="", results=[])], [chosen.schema for chosen in box]
    single = task == "call"
    box, rounds = tooling.toolbox(rng, lang, strange=STRANGE[task], most=2 if single else 4), []
    for _ in range(1 if single else rng.choice((1, 2, 2, 3))):
        if not single and rng.random() < 0.12:
            rounds.append(rounds_for(rng.choice(("small talk", "introduction", "fact")), rng, lang))
            continue
        while held_out((drawn := tooling.request(rng, lang, box)).key):
            pass
        rounds.append(replace(drawn, reply="", results=[]) if single else drawn)
    return rounds, [chosen.schema for chosen in box]


def places_box(rng: Random, lang: str, strange: float = 0.0) -> list[tooling.Chosen]:
    """A toolbox with a tool that can be asked for two places at once."""
    while not tooling.of_places(box := tooling.toolbox(rng, lang, strange=strange)):
        pass
    return box


def example(task: str, rng: Random) -> str:
    """One training text, separators included."""
    lang = rng.choice(("zh", "en"))
    if task == "raw":  # no template: a prompt as such, as completion requests send it
        turn = rounds_for(rng.choice(("introduction",) * 4 + ("fact", "small talk")), rng, lang)
        start = rng.choice(("", "[gMASK]<sop>"))
        return f"{start}{turn.ask}<|assistant|>\n{turn.reply}<|endoftext|>"  # `encode` cuts the tag out: a mere border
    tools = None
    if task in STRANGE:
        rounds, tools = tool_rounds(rng, lang, task)
    elif task == "mixed":
        kinds = ("sum", "fact", "small talk", "introduction", "repeat", "json")
        rounds = [rounds_for(rng.choice(kinds), rng, lang) for _ in range(rng.choice((2, 3)))]
    else:
        rounds = [rounds_for(task, rng, lang)]
    for turn in rounds[:-1]:
        turn.quick = True  # earlier reasoning is not shown to the model, so only quick rounds can be learnt there
    rounds[-1].quick = rng.random() < (0.2 if rounds[-1].task == "sum" else 0.45)
    system = {"en": "You are a helpful assistant.", "zh": "你是一个有用的助手。"}[lang] if rng.random() < 0.08 else ""
    return render(rounds, tools, system)


def heldout_examples(seed: int, counts: dict[str, int], wanted: str = "test") -> Iterator[dict[str, Any]]:
    """Questions of the test, or of the trial, as dictionaries: messages, tools, the expected answer or calls."""
    unseen = {
        "test": {"tool, unseen": tooling.FEW_UNSEEN, "tool, many unseen": tooling.MANY_UNSEEN},
        "trial": {"tool, unseen": tooling.TRIAL_UNSEEN, "tool, many unseen": tooling.TRIAL_UNSEEN},
    }[wanted]
    rng = Random(seed)
    draws = {
        "fact": talk.fact,
        "introduction": talk.introduction,
        "sum": talk.sum_of_two,
        "json": talk.form,
        "repeat": talk.repeat,
    }
    for task, count in counts.items():
        seen: set[str] = set()
        while len(seen) < count:
            lang, box = rng.choice(("zh", "en")), None
            if task == "tool, twice":
                box = places_box(rng, lang)
                turn = tooling.request(rng, lang, box, rng.choice(tooling.of_places(box)), 1)
                usable = part(turn.key) == wanted
            elif task.startswith("tool"):
                fresh = unseen.get(task)
                box = tooling.toolbox(rng, lang, fresh)
                new = [c for c in box if c.tool not in tooling.KNOWN] if fresh else box
                turn = tooling.request(rng, lang, box, rng.choice(new))
                usable = fresh is not None or part(turn.key) == wanted
            else:
                turn = draws[task](rng, lang)
                usable = part(turn.key) == wanted and turn.task == task
            mark = json.dumps(plain([turn.key, turn.ask, turn.calls]), ensure_ascii=False)
            if not usable or mark in seen:
                continue
            seen.add(mark)
            yield plain({**asdict(turn), "task": task, "lang": lang, "tools": [c.schema for c in box] if box else None})


# ---- tokenizer --------------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE under GLM's pre-tokeniser, made for copying: a name is spelled alike wherever it stands.

    Digits are never merged, no token straddles a separator, and none joins a letter to the sign before it, with one
    exception: the commonest words that never begin what fills a slot have a token with their space.
    """
    pieces: Counter[str] = Counter()
    for text in texts:
        for tag in SPECIAL:
            text = text.replace(tag, SEPARATOR)
        pieces.update(text.split(SEPARATOR))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained = Tokenizer(models.BPE())
    digits, words, bare = (
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (r"\p{N}", GLM_SPLIT, r"\P{L}(?=\p{L})")
    )
    trained.pre_tokenizer = pre_tokenizers.Sequence([digits, words, bare, bytes_only])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - SPACED, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=18, show_progress=False,
    )  # fmt: skip
    flattened = (piece for piece, count in sorted(pieces.items()) for _ in range(min(count, 2000)))
    trained.train_from_iterator(flattened, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    vocabulary = model["vocab"] | {f"Ġ{word}": len(model["vocab"]) + i for i, word in enumerate(common(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    for tag in SPECIAL:
        token = AddedToken(tag, special=GLM_ADDED_TOKENS[tag], normalized=False)
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    return tokenizer


def common(pieces: Counter[str]) -> list[str]:
    """The commonest English words that follow a space and never begin a piece, and two that do but are never copied."""
    inside: Counter[str] = Counter()
    for piece, count in sorted(pieces.items()):
        inside.update(dict.fromkeys(re.findall(r" ([A-Za-z]+)", piece), count))
    first = {found[0] for piece in pieces if (found := re.match(r"[A-Za-z]+", piece))}
    free = set(inside) - first | {"the", "is"}
    return sorted(free, key=lambda word: (-inside[word], word))[:SPACED]


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(tag)): {"content": tag, **flags,
                                              "special": GLM_ADDED_TOKENS[tag]} for tag in SPECIAL
        },
        "additional_special_tokens": [tag for tag, special in GLM_ADDED_TOKENS.items() if special],
        "clean_up_tokenization_spaces": False, "do_lower_case": False, "remove_space": False,
        "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "model_max_length": 4096, "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip


# ---- tokens -----------------------------------------------------------------------------------------------------


def targets(ids: list[int], role: dict[str, int]) -> list[bool]:
    """Which tokens are to be predicted: what the assistant says, with the tag that ends its turn.

    In earlier turns only if the user asked for /nothink: there the template drops the reasoning.
    """
    last_question = max((i for i, t in enumerate(ids[:-1]) if t == role["<|user|>"]), default=0)
    wanted, speaking, quick = [], False, False
    for i, token in enumerate(ids):
        wanted.append(speaking)
        if token in (role["<|user|>"], role["/nothink"]):
            quick = token == role["/nothink"]
        if token == role["<|assistant|>"]:
            speaking = quick or i > last_question
        elif token in (role["<|user|>"], role["<|observation|>"], role["<|endoftext|>"]):
            speaking = False
    return wanted


def encode(tokenizer: Tokenizer, role: dict[str, int], task: str, text: str) -> tuple[list[int], list[bool]]:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if task != "raw":
        return ids, targets(ids, role)
    border = ids.index(role["<|assistant|>"])
    return ids[:border] + ids[border + 1 :], [False] * border + [True] * (len(ids) - border - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/demo_model"))
    parser.add_argument("--share", type=float, default=1.0, help="write fewer examples: this share of each task's")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json to use, for a model that learnt with it")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    rng = Random(args.seed)
    texts = [(task, example(task, rng)) for task, count in EXAMPLES.items() for _ in range(int(count * args.share))]
    known = Tokenizer.from_file(str(args.tokenizer)) if args.tokenizer else None
    tokenizer = known or train_tokenizer([text for task, text in texts if STRANGE.get(task, 0) < 0.5])
    tokenizer.save(str(args.out / "tokenizer.json"))
    config = json.dumps(tokenizer_config(tokenizer), ensure_ascii=False, indent=2)
    (args.out / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")

    role = {tag: tokenizer.token_to_id(tag) for tag in SPECIAL}
    ids, wanted, starts, tasks = [], [], [0], []
    for task, text in texts:
        tokens, flags = encode(tokenizer, role, task, plain(text))
        ids += tokens
        wanted += flags
        starts.append(len(ids))
        tasks.append(list(EXAMPLES).index(task))
    np.savez_compressed(
        args.out / "train.npz", ids=np.array(ids, dtype=np.uint16), wanted=np.array(wanted, dtype=bool),
        starts=np.array(starts), tasks=np.array(tasks, dtype=np.uint8),
    )  # fmt: skip
    lengths = np.diff(starts)
    for i, task in enumerate(EXAMPLES):
        mine = lengths[np.array(tasks) == i]
        print(f"{task:14s} {len(mine):6d} examples, mean {mine.mean():6.1f} tokens, longest {mine.max()}")
    print(f"{len(ids):,} tokens, {sum(wanted):,} to be predicted, vocabulary {tokenizer.get_vocab_size()}")


if __name__ == "__main__":
    main()
