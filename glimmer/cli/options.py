"""The one table of settings: the fields of EngineConfig and SamplingParams as flags, variables and YAML keys.

    field            flag                                        environment             YAML
    max_model_len    --max-model-len, -c, --context-length, ...  GLIMMER_MAX_MODEL_LEN   max_model_len: 4096

Names, types and defaults come from the dataclasses (config.py); this file adds what a command line needs besides: a
help text, and the names that users of vLLM, SGLang and llama-server type. Each command (a `Command`) says which of the
fields it takes, and adds options of its own. A value on the command line is stronger than one in the environment, that
is stronger than the YAML file of --config, and that than the default. Everything that cannot be understood is refused
before a model is opened: unknown names, empty values, two different values of one setting.
Not here: the keys of MindSpore Transformers (mindformers/options.py), and what a command does with its settings.
"""

import difflib
import fnmatch
import io
import math
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from glimmer import __version__
from glimmer.cli.exits import say
from glimmer.cli.lazy import lazy
from glimmer.config import EngineConfig, SamplingParams
from glimmer.errors import ConfigError, RequestError
from glimmer.foreign import parse_json, read_text, typed_text
from glimmer.server.settings import ServerConfig

if TYPE_CHECKING:
    import omegaconf
else:
    omegaconf = lazy("omegaconf")

Config = TypeVar("Config", EngineConfig, SamplingParams, ServerConfig)
T = TypeVar("T")
Kind = Callable[[Any], Any]

DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"  # what is drawn as one
UNCLEAR = ("0", "1", "yes", "no", "on", "off")  # after a switch: its value, or a word of its own?

# ---------------------------------------------------------------------- kinds of values: text or YAML in, value out
# The docstring of a kind says what it accepts, for error messages.


def text(value: Any) -> str:
    """text in UTF-8"""
    if not isinstance(value, str):
        raise ValueError
    return typed_text(value)


def path(value: Any) -> str:
    """a path, without a NUL character"""
    if not isinstance(value, str) or "\0" in value:
        raise ValueError
    return os.path.expanduser(value)


def whole(value: Any) -> int:
    """a whole number"""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError
    return int(_digits(value))


def number(value: Any) -> float:
    """a number"""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or math.isnan(float(_digits(value))):
        raise ValueError
    return float(value)


def _digits(value: T) -> T:
    """A number or the text of one; ValueError for a text that only Python takes for one, such as 1_0 or １０."""
    if isinstance(value, str) and not re.fullmatch(r"[\x20-\x5e\x60-\x7e]*", value):
        raise ValueError
    return value


def count(value: Any) -> int:
    """a whole number from 1 on"""
    if whole(value) < 1:
        raise ValueError
    return whole(value)


def truth(value: Any) -> bool:
    """True or False"""
    return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]


def size(value: Any) -> int:
    """a number of bytes, or e.g. 512MB or 59GB"""
    found = re.fullmatch(r"([0-9]{1,30}(?:\.[0-9]{1,30})?) *(?:([KMGT])(?:i?B)?)?", str(value), re.IGNORECASE)
    if found is None:
        raise ValueError
    return int(float(found[1]) * 1024 ** " KMGT".index((found[2] or " ").upper()))


def texts(value: Any) -> list[str]:
    """a text in UTF-8 or a list of texts"""
    return [text(item) for item in prompts(value)]


def prompts(value: Any) -> list[str]:
    """a text or a list of texts"""
    # As they were typed: some of them name files, which is found out later.
    items = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(item, str) for item in items):
        raise ValueError
    return items


def counts(value: Any) -> list[int]:
    """whole numbers from 1 on"""
    return [count(item) for item in (value if isinstance(value, list) else [value])]


def ids(value: Any) -> list[int]:
    """token ids, e.g. 5 or 5,17"""
    words = [word for item in (value if isinstance(value, list) else [value]) for word in str(item).split(",")]
    return [whole(word) for word in words]


def biases(value: Any) -> dict[int, float]:
    """JSON {"token id": number}"""
    table = parse_json(value) if isinstance(value, str) else dict(value)
    return {whole(token): number(bias) for token, bias in table.items()}


def speculation(value: Any) -> dict[str, Any]:
    """auto, off, mtp, ngram, a number of tokens, or JSON such as {"method": "mtp", "num_speculative_tokens": 1}"""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, str) and value.lstrip().startswith("{"):
        return dict(parse_json(value))
    words = str(value).lower()
    words = {"false": "off", "true": "auto"}.get(words, words)  # what YAML makes of off and on
    return {"method": "mtp", "num_speculative_tokens": whole(value)} if words.isdecimal() else {"method": words}


def form(value: Any) -> dict[str, Any]:
    """a JSON object, e.g. {"json": SCHEMA}"""
    found = parse_json(value) if isinstance(value, str) else value
    if not isinstance(found, dict):
        raise ValueError
    return found


# ---------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Option:
    """One option of a command.

    kind      what its value may be; value: how --help writes it, "" for True or False
    default   how --help writes the default; "" is none worth a word
    flags     other names for it, dashes included; off: names that set it to False
    choices   all possible values, for the shell's completion
    repeat    the values of a repeated option add up, and `kind` gets a list of them
    several   it takes all words up to the next option, and repeats
    field     a field of EngineConfig or SamplingParams: the environment may hold it too
    """

    kind: Kind
    value: str
    help: str
    default: str = ""
    flags: tuple[str, ...] = ()
    off: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    repeat: bool = False
    several: bool = False
    field: bool = False


class Words(NamedTuple):
    """What --help and the table add to a field: see Option."""

    value: str
    help: str
    default: str | None = None
    flags: tuple[str, ...] = ()
    off: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


WORDS = {
    # EngineConfig
    "model": Words("DIR", "a Hugging Face directory of the GLM-4.5 family", "the demo model", ("-m", "--model-path")),
    "dtype": Words("NAME", "auto, bfloat16 or float32", "auto: as stored", choices=("auto", "bfloat16", "float32")),
    "device": Words(
        "NAME", "auto, cpu, cuda or npu", "auto: the fastest there is", choices=("auto", "cpu", "cuda", "npu")
    ),
    "backend": Words("NAME", "cpu (our kernels) or reference (plain torch)", "auto: the fastest there is"),
    "tensor_parallel_size": Words(
        "N", "processes that share the model", "as many as were started", ("-tp", "--tp-size", "--tp")
    ),
    "max_model_len": Words(
        "N",
        "most tokens of prompt and answer together",
        "what model and memory allow",
        ("-c", "--ctx-size", "--context-length"),
    ),
    "seed": Words("N", "the same seed, the same answers", None, ("-s", "--random-seed")),
    "block_size": Words("N", "tokens in one block of the KV cache", None, ("--page-size",)),
    "max_num_seqs": Words("N", "most prompts computed together", None, ("-np", "--parallel", "--max-running-requests")),
    "max_num_batched_tokens": Words(
        "N", "most tokens computed in one step", None, ("-b", "--batch-size", "--chunked-prefill-size")
    ),
    "gpu_memory_utilization": Words("X", "share of the device's free memory to take", None, ("--mem-fraction-static",)),
    "max_memory_bytes": Words("SIZE", "the most to take on each device, e.g. 59GB", "only that share", ("--memory",)),
    "kv_cache_memory_bytes": Words("SIZE", "memory for the KV cache, e.g. 4GB", "what is left"),
    "kv_cache_dtype": Words(
        "NAME",
        "auto, or int8: half the memory for each token",
        "auto: the model's dtype",
        ("-ctk", "--cache-type-k"),
        choices=("auto", "int8"),
    ),
    "kv_cache_dir": Words("DIR", "keep KV blocks here: what was read once is not computed again"),
    "kv_cache_size_bytes": Words("SIZE", "the most that --kv-cache-dir may hold", "16GB", ("--kv-cache-size",)),
    "enable_prefix_caching": Words(
        "", "compute equal beginnings of prompts once", None, off=("--disable-radix-cache",)
    ),
    "skip_tokenizer_init": Words("", "load no tokenizer: prompts are token ids"),
    "threads": Words("N", "CPU threads of each process", "its part of the CPUs it may use", ("-t",)),
    "quantization": Words(
        "NAME", "fp8, int8 or int4: quantise while loading", "as stored", ("-q",), choices=("fp8", "int8", "int4")
    ),
    "group_size": Words("N", "with int4: inputs that share a scale, a multiple of 32", "32"),
    "speculative_config": Words(
        "HOW",
        "draft by mtp, ngram, auto or off; N: always N by mtp; or JSON",
        "auto",
        ("--mtp", "--spec-method"),
        choices=("auto", "off", "mtp", "ngram"),
    ),
    "prepare": Words("", "write the model's packed file first, where there is none (glimmer prepare)"),
    # SamplingParams
    "n": Words("N", "answers to each prompt"),
    "temperature": Words("X", "0 is greedy", None, ("--temp",)),
    "top_p": Words("X", "keep the likeliest tokens that sum to X"),
    "top_k": Words("N", "keep the N likeliest tokens; 0 is all"),
    "min_p": Words("X", "drop tokens less likely than X times the likeliest"),
    "repetition_penalty": Words(
        "X", "divide the logits of tokens that were there; 1 is none", None, ("--repeat-penalty",)
    ),
    "presence_penalty": Words("X", "subtract from the logits of tokens in the answer"),
    "frequency_penalty": Words("X", "the same, once for each occurrence"),
    "logit_bias": Words("JSON", "add to the logits of tokens, e.g. '{\"5\": -1.5}'"),
    "structured_outputs": Words("JSON", 'the form of the answer, e.g. \'{"choice": ["yes", "no"]}\''),
    "allowed_token_ids": Words("ID", "tokens that may come, and no others; may be repeated"),
    "bad_words": Words("TEXT", "a text that must not come in the answer; may be repeated"),
    "stop": Words("TEXT", "end the answer before this text; may be repeated", None, ("-r", "--reverse-prompt")),
    "stop_token_ids": Words("ID", "end the answer after this token; may be repeated"),
    "include_stop_str_in_output": Words("", "keep the text or the token that ended the answer"),
    "skip_special_tokens": Words("", "leave tokens such as <|user|> out of the answer's text"),
    "spaces_between_special_tokens": Words("", "without effect: nothing is put between tokens"),
    "detokenize": Words("", "make text of the answer's tokens"),
    "min_tokens": Words("N", "no end before that many tokens", None, ("--min-new-tokens",)),
    "max_tokens": Words("N", "most tokens of an answer", None, ("-n", "--n-predict", "--predict", "--max-new-tokens")),
    "ignore_eos": Words("", "the model's own end of sequence does not end the answer"),
    "logprobs": Words("N", "log-probabilities of the N likeliest tokens, for each token of the answer"),
    "prompt_logprobs": Words("N", "the same for each token of the prompt"),
    "truncate_prompt_tokens": Words("N", "keep the last N tokens of the prompt; -1: as many as the context holds"),
    # ServerConfig
    "host": Words("ADDRESS", "listen at this address; 0.0.0.0 is all of them"),
    "port": Words("N", "listen at this port; 0 is any free one"),
    "uds": Words("PATH", "listen on this unix socket, and not at an address"),
    "api_key": Words("KEY", "answer only who sends this key; @FILE has a key on each line; may be repeated"),
    "served_model_name": Words(
        "NAME", "the model's name in answers; may be repeated", "as MODEL is written", ("-a", "--alias")
    ),
    "root_path": Words("PATH", "the path under which a proxy serves this server", None, ("--api-prefix",)),
    "ssl_certfile": Words("FILE", "serve HTTPS with this certificate", None, ("--ssl-cert-file",)),
    "ssl_keyfile": Words("FILE", "the key of the certificate", None, ("--ssl-key-file",)),
    "allowed_origins": Words("ORIGIN", "a web page of another server that may ask; * is all; may be repeated"),
    "max_queue_requests": Words(
        "N", "requests that may wait for their first token; further ones get 503", None, ("--max-queued-requests",)
    ),
    "max_queue_tokens": Words("N", "tokens of their prompts together"),
    "max_body_bytes": Words("SIZE", "the longest body of a request"),
    "max_answers": Words("N", "the largest n of a request"),
    "max_logprobs": Words("N", "the most log-probabilities for a token"),
    "keep_alive": Words("SECONDS", "of silence, after which a stream gets a comment"),
    "max_stored_bytes": Words("SIZE", "responses that are kept for previous_response_id, together; 0 keeps none"),
    "stalled_client": Words("SECONDS", "after which a client that reads nothing is given up"),
    "shutdown_timeout": Words("SECONDS", "that SIGTERM leaves to what is being answered"),
    "on_engine_death": Words("NAME", "restart the engine when its process dies, or exit", choices=("restart", "exit")),
}


def options_of(config: type) -> dict[str, Option]:
    """One Option for each field of a dataclass, by name: kind and default are the field's own."""
    hints = get_type_hints(config)
    found = {}
    for one in fields(config):
        words = WORDS.get(one.name, Words("VALUE", f"see {config.__name__}"))
        kind, choices, repeat = _kind(one.name, hints[one.name])
        default = words.default
        if default is None:
            default = "" if one.default in (MISSING, None) else str(one.default)
        value = "" if kind is truth else words.value
        choices = words.choices or choices
        found[one.name] = Option(kind, value, words.help, default, words.flags, words.off, choices, repeat, field=True)
    return found


def _kind(name: str, hint: Any) -> tuple[Kind, tuple[str, ...], bool]:
    """(kind, choices, repeat) for the annotation of a field."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    members = tuple(member for member in members if member is not type(None))
    origins = {get_origin(member) or member for member in members}
    if Literal in origins:
        return text, tuple(str(choice) for member in members for choice in get_args(member)), False
    if Mapping in origins:
        return {"speculative_config": speculation, "structured_outputs": form}.get(name, biases), (), False
    if Sequence in origins:
        return (ids if int in {a for member in members for a in get_args(member)} else texts), (), True
    if members == (str,):
        return path if name in PATHS else text, (), False
    kinds: dict[Any, Kind] = {(bool,): truth, (int,): size if name.endswith("_bytes") else whole, (float,): number}
    if members not in kinds:
        raise TypeError(f"no kind of value for {name}: {hint}")
    return kinds[members], (), False


PATHS = ("model", "kv_cache_dir", "uds", "ssl_certfile", "ssl_keyfile")  # fields that are
ENGINE = options_of(EngineConfig)
SAMPLING = options_of(SamplingParams)
TABLES = {
    key for key, option in (ENGINE | SAMPLING).items() if option.kind in (biases, speculation, form)
}  # no sections
SERVER = options_of(ServerConfig)
MAX_YAML = 1 << 20  # bytes of a file of settings

GENERAL = {"config": Option(path, "FILE.yaml", "read settings from this file; what is typed is stronger")}
# Variables that are no settings of a command: parallel.py and hub.py read them.
WAITS = ("JOIN", "COLLECTIVE", "HEARTBEAT", "REQUEST", "MISMATCH")
OTHER_VARIABLES = {"GLIMMER_CACHE", *(f"GLIMMER_{what}_TIMEOUT" for what in WAITS)}


def pick(table: Mapping[str, Option], *names: str) -> dict[str, Option]:
    """Some fields of a table."""
    return {name: table[name] for name in names}


def without(table: Mapping[str, T], *names: str) -> dict[str, T]:
    """A table but for some of its names."""
    return {name: value for name, value in table.items() if name not in names}


def default(option: Option, said: str) -> Option:
    """An option for which a command has a default of its own."""
    return replace(option, default=said)


# ---------------------------------------------------------------------- the names of another program


class Translation(NamedTuple):
    """A name of another program: the setting it stands for, the kind of its value, and what is to be known about it."""

    setting: str
    kind: Kind
    help: str
    may_be_empty: bool = False  # an empty value is as good as none
    several: bool = False


@dataclass(frozen=True)
class Foreign:
    """The names that a command takes besides its own.

    translated   names for settings that exist here        ignored   patterns of names that mean nothing here
    refused      {name: (the only value, what to do)}      page      where all of them are documented
    switches     names that mean nothing here and have no value
    """

    translated: Mapping[str, Translation] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    refused: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    page: str = ""
    switches: tuple[str, ...] = ()

    def is_ignored(self, key: str) -> bool:
        """Whether a key means nothing here."""
        names = (*self.ignored, *self.switches)
        return key not in self.translated and any(fnmatch.fnmatchcase(key, pattern) for pattern in names)

    @cached_property
    def sections(self) -> set[str]:
        """Names under which a YAML file nests others; they may be empty."""
        return {
            key[:i] for key in (*self.translated, *self.refused, *self.ignored) for i, c in enumerate(key) if c == "."
        }


# ---------------------------------------------------------------------- a command and its settings


class Given(NamedTuple):
    """A value, the key that gave it, where that stood, and how strong it is: see STRENGTH."""

    value: Any
    key: str
    source: str
    strength: int


FILE, ENVIRONMENT, COMMAND_LINE = STRENGTH = (1, 2, 3)


@dataclass(frozen=True)
class Settings:
    """What a command has been asked for.

    given     {setting: Given}, only what somebody has given
    words     words on the command line that belong to no option; literal: those after a lone --
    ignored   keys that mean nothing here
    """

    given: dict[str, Given]
    words: list[str]
    literal: list[str]
    ignored: list[str]

    def take(self, name: str, otherwise: Any = None) -> Any:
        """The value of a setting, or `otherwise` if nobody has given one."""
        return self.given[name].value if name in self.given else otherwise

    def fields(self, table: Mapping[str, Option]) -> dict[str, Any]:
        """The settings among the names of a table."""
        return {name: self.given[name].value for name in table if name in self.given}

    def check(self, config: type[Config], values: Mapping[str, Any]) -> Config:
        """config(**values); an error says where the value at fault came from."""
        try:
            return config(**values)
        except (ConfigError, RequestError) as error:
            named = (name for name in self.given if re.search(rf"\b{name}\b", error.found))
            sources = dict.fromkeys(self.given[name].source for name in named if name in values)
            if sources:
                error.found += f" ({', '.join(sources)})"
            raise


class Flag(NamedTuple):
    """What a flag means: a key, and False for a flag that sets it to False."""

    key: str
    positive: bool = True


@dataclass(frozen=True)
class Command:
    """The command line of one command.

    name, about   its name, and what --help says first
    usage         what follows the name in the first line of --help
    options       {title: {key: Option}} in the order of --help
    positional    keys of the words without a flag, in their order; None: any number of them (prompts)
    foreign       names of another program
    notes         lines at the end of --help
    """

    name: str
    about: str
    usage: str
    options: Mapping[str, Mapping[str, Option]]
    positional: tuple[str, ...] | None = ()
    foreign: Foreign = Foreign()
    notes: tuple[str, ...] = ()

    @cached_property
    def own(self) -> dict[str, Option]:
        """All options by key."""
        return {key: option for table in self.options.values() for key, option in table.items()} | GENERAL

    @cached_property
    def flags(self) -> dict[str, Flag]:
        """Every flag with what it means; words of a long one are joined by `_`."""
        found = {f"--{key}": Flag(key) for key in (*self.own, *self.foreign.translated, *self.foreign.refused)}
        for key, option in self.own.items():
            for name in option.flags:
                found.setdefault(_normal(name), Flag(key))
            for name in option.off:
                found.setdefault(_normal(name), Flag(key, False))
        for key in self.own:
            if self.kind(key) is truth and not key.startswith("no_"):
                found.setdefault(f"--no_{key}", Flag(key, False))
        return found

    def find(self, word: str) -> Flag | None:
        """What a flag, with its dashes, means; None if it is unknown."""
        name = _normal(word)
        key = name.removeprefix("--")
        return self.flags.get(name) or (Flag(key) if word.startswith("--") and self.foreign.is_ignored(key) else None)

    def kind(self, key: str) -> Kind:
        """The kind of a key's value."""
        if key in self.own:
            return self.own[key].kind
        return self.foreign.translated[key].kind if key in self.foreign.translated else text

    # ------------------------------------------------------------------ reading

    def asks_for_help(self, argv: list[str]) -> bool:
        """Print --help or --version if one is asked for."""
        typed = argv[: argv.index("--")] if "--" in argv else argv
        if not {"-h", "--help"}.isdisjoint(typed):
            print(self.help(), end="")
        elif not {"-V", "--version"}.isdisjoint(typed):
            print(f"glimmer {__version__}")
        else:
            return False
        return True

    def read(self, argv: list[str], home: Path | None = None) -> Settings:
        """All settings: from the command line, the environment, and the YAML file that --config names.

        home: where relative paths are looked for if they are not in the current directory. Raises ConfigError.
        """
        typed, words, literal = self.read_command_line(argv)
        _check_directory()
        given = self.resolve(COMMAND_LINE, typed, "command line")
        weaker = [self.resolve(ENVIRONMENT, {key: value}, name) for name, key, value in self.read_environment()]
        for line in unknown_variables():
            say(self.name, line)
        ignored = set(given[1])
        if "config" in given[0]:
            file = locate(given[0]["config"].value, home)
            content = self.read_yaml(file, typed)
            found, idle = self.resolve(FILE, {k: v for k, v in content.items() if k not in typed}, str(file))
            weaker.append((found, idle))
            ignored |= set(idle)
        settings = dict(given[0])
        for found, _ in weaker:
            settings = found | settings
        if ignored:
            say(self.name, f"these keys mean nothing here and are ignored: {', '.join(sorted(ignored))}")
        return Settings(settings, words, literal, sorted(ignored))

    def read_command_line(self, argv: list[str]) -> tuple[dict[str, Any], list[str], list[str]]:
        """({key: value as typed}, words without an option, words after a lone --).

        `--key value`, `--key=value`, a flag alone, and single-dash names alike. Raises ConfigError: an unknown name, a
        value that is missing or empty, two different values.
        """
        given: dict[str, Any] = {}
        plain: list[str] = []
        words, literal = list(argv), list[str]()
        if "--" in words:
            at = words.index("--")
            words, literal = words[:at], words[at + 1 :]
        while words:
            word = words.pop(0)
            if not word.startswith("-") or word == "-":
                self._check_dash(word)
                plain.append(word)
                continue
            name, equals, value = word.partition("=")
            flag = self.find(name)
            if flag is None:
                raise self.unknown(word, "command line")
            key = flag.key
            option = self.own.get(key)
            several = option.several if option else key in self._several
            if not flag.positive:
                if equals:
                    raise ConfigError(f"{word!r}", f"{name} alone", f"write {name}, or --{_dashed(key)}=True")
                value = "False"
            elif several:
                values = [value] if equals else list(self._values(words))
                if not values and option is None:
                    raise self._no_value(name, key)
                self._add(given, key, values)
                continue
            elif not equals and ((option is not None and option.kind is truth) or key in self.foreign.switches):
                following = words[0].lower() if words else ""
                if following in UNCLEAR:
                    raise ConfigError(
                        f"{name} {words[0]}",
                        f"{name}, or {name} False",
                        f"choose one of these; {words[0]!r} as a word of its own is written after a lone --",
                    )
                value = words.pop(0) if following in ("true", "false") else "True"
            elif not equals:
                if not words or words[0].startswith("--") or self.find(words[0]) is not None:
                    raise self._no_value(name, key)
                value = words.pop(0)
            self._add(given, key, [value] if option is not None and option.repeat else value)
        if self.positional is not None:
            self._place(given, plain + literal)
            return given, [], []
        return given, plain, literal

    def _check_dash(self, word: str) -> None:
        """Refuse an option whose dashes a text processor has made long ones: it would be a prompt."""
        name = word.partition("=")[0].lstrip(DASHES)
        if name and word[0] in DASHES and self.find(f"--{name}") is not None:
            raise ConfigError(
                f"{word!r} begins with another dash than -",
                f"--{_dashed(name)}",
                "type the dashes anew; a prompt of that kind is written after a lone --",
            )

    def _values(self, words: list[str]) -> Iterator[str]:
        """Take the words up to the next option."""
        while words and (not re.match(r"-[^\d.]", words[0]) or words[0] == "-"):
            yield words.pop(0)

    def _add(self, given: dict[str, Any], key: str, value: Any) -> None:
        for one in value if isinstance(value, list) else [value]:
            if one == "" and not self._may_be_empty(key):
                raise self._empty(key, "command line")
        if isinstance(value, list):
            given.setdefault(key, []).extend(value)
        elif given.setdefault(key, value) != value:
            raise ConfigError(
                f"{key}={given[key]!r} and {key}={value!r} (command line)", "one value", "leave one of them out"
            )

    def _place(self, given: dict[str, Any], words: list[str]) -> None:
        """The words without a flag, as the values of the positional options."""
        assert self.positional is not None
        if len(words) > len(self.positional):
            accepted = " ".join(f"{key.upper()}" for key in self.positional) or "options only"
            raise ConfigError(
                f"{words[len(self.positional)]!r} (command line)", accepted, f"see glimmer {self.name} --help"
            )
        for key, word in zip(self.positional, words):
            self._add(given, key, word)

    def _empty(self, key: str, source: str) -> ConfigError:
        accepted = f"{self.kind(key).__doc__}, not an empty one"
        return ConfigError(f"{key}='' ({source})", accepted, f"give {key} a value, or leave it out")

    def _no_value(self, name: str, key: str) -> ConfigError:
        return ConfigError(f"{name} has no value", str(self.kind(key).__doc__), f"write {name} VALUE, or {name}=VALUE")

    def _may_be_empty(self, key: str) -> bool:
        translation = self.foreign.translated.get(key)
        return key not in self.own and (translation is None or translation.may_be_empty)

    @cached_property
    def _several(self) -> set[str]:
        return {key for key, translation in self.foreign.translated.items() if translation.several}

    def read_environment(self) -> Iterator[tuple[str, str, str]]:
        """(a name for messages, key, value) of the variables GLIMMER_<FIELD>; an empty one is none."""
        for key, option in self.own.items():
            name = f"GLIMMER_{key.upper()}"
            value = os.environ.get(name, "") if option.field else ""
            if value:
                yield f"environment variable {name}", key, value

    def read_yaml(self, file: Path, typed: Mapping[str, Any]) -> dict[str, Any]:
        """The file as {key: value}, sections as dotted keys, with what is typed merged in and ${...} resolved.

        ConfigError: no such file, not a YAML of keys, or a key twice under two of its names.
        """
        try:
            tree = omegaconf.OmegaConf.load(io.StringIO(read_text(file, MAX_YAML, ConfigError)))
            written = omegaconf.OmegaConf.to_container(tree)
            for key, value in without(typed, *GENERAL).items():
                usable = isinstance(written, dict) and not isinstance(written.get(key), dict)  # not a section
                if isinstance(value, str) and "${" not in value and usable:  # what is typed is meant literally
                    omegaconf.OmegaConf.update(tree, key, value)
            content = omegaconf.OmegaConf.to_container(tree, resolve=True)
        except ConfigError as error:
            raise ConfigError(f"--config {error.found}", error.expected, error.todo) from None
        except _unreadable() as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            raise ConfigError(
                f"--config {file}: {reason}",
                "a YAML file such as configs/glm4_moe/predict_glm4_moe.yaml",
                "check the path and the line",
            ) from None
        if not isinstance(content, dict):
            raise ConfigError(f"--config {file} holds no keys", "keys with values, a line each", "see configs/glm4_moe")
        found: dict[str, Any] = {}
        for name, value in self._flat(content):
            flag = self.find(f"--{name}")
            key = flag.key if flag is not None and flag.positive else name
            if key in GENERAL:  # a file cannot name another file
                raise self.unknown(name, str(file))
            if key in found and found[key] != value:
                raise ConfigError(f"two values of {key} ({file})", "one value", "leave one of them out")
            found[key] = value
        return found

    def _flat(self, tree: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
        """(dotted key, value) of everything that is not a section."""
        for key, value in tree.items():
            table = above == "" and key in TABLES
            if isinstance(value, dict) and value and not table:
                yield from self._flat(value, f"{above}{key}.")
            else:
                yield f"{above}{key}", value

    # ------------------------------------------------------------------ resolving

    def resolve(self, strength: int, values: Mapping[str, Any], source: str) -> tuple[dict[str, Given], list[str]]:
        """One value for each setting that a source gives, and the keys of it that mean nothing here.

        Raises ConfigError: unknown key, wrong kind, the other value of a refused key, keys that contradict each other.
        """
        found: dict[str, Given] = {}
        ignored: list[str] = []
        for key, value in values.items():
            empty = value in (None, "", [], {})
            if empty and value != "" and key in self.foreign.sections:
                continue
            flag = self.find(f"--{key}")
            if flag is None and strength == FILE and _normal(f"--{key}").removeprefix("--") in ENGINE | SAMPLING:
                ignored.append(key)  # a file may serve several commands
            elif flag is None or not flag.positive:
                raise self.unknown(key, source)
            elif self.foreign.is_ignored(key):
                ignored.append(key)
            elif key in self.foreign.refused:
                only, todo = self.foreign.refused[key]
                if not empty and str(value) != str(only):
                    raise ConfigError(f"{key}={value!r} ({source})", "no value" if only is None else f"{only!r}", todo)
            elif value is None or (empty and key not in self.own and self._may_be_empty(key)):
                continue
            elif value == "":
                raise self._empty(key, source)
            else:
                translation = self.foreign.translated.get(key)
                setting = translation.setting if translation and key not in self.own else key
                given = Given(self._convert(key, value, source), key, source, strength)
                rival = found.setdefault(setting, given)
                if rival.value != given.value:
                    raise ConfigError(
                        f"{rival.key}={rival.value!r} and {key}={given.value!r} ({source})",
                        f"values that agree, since both mean {setting}",
                        "leave one of them out",
                    )
        return found, ignored

    def _convert(self, key: str, value: Any, source: str) -> Any:
        kind = self.kind(key)
        try:
            return kind(value)
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError):
            raise ConfigError(f"{key}={value!r} ({source})", str(kind.__doc__), f"correct {key}") from None

    def unknown(self, word: str, source: str) -> ConfigError:
        """The refusal of a flag (with its value, if it has one) or key in no table, with the nearest one that is."""
        name = word.partition("=")[0]
        short = name.startswith("-") and not name.startswith("--")
        if short and self.find(f"-{name}") is not None:
            todo = "correct it; a prompt of that kind is written after a lone --"
            return ConfigError(f"{word!r}", f"-{word}, with two dashes", todo)
        key = _normal(name).lstrip("-")
        names = {flag.removeprefix("--"): flag for flag in self.flags if flag.startswith("--")}
        tail = key.rpartition(".")[2]
        near = [known for known in names if known.rpartition(".")[2] == tail]
        near = near or (difflib.get_close_matches(key, names, 1, 0.6 if len(key) > 5 else 0.75) if len(key) > 2 else [])
        nearest = f"; the nearest is {near[0]!r}" if near else ""
        elsewhere = [known for known, words in WORDS.items() if _normal(f"--{key}") in (f"--{known}", *words.flags)]
        if elsewhere:
            nearest = f"; {elsewhere[0]!r} is a setting of other commands"
        others = f" or {self.foreign.page}" if self.foreign.page else ""
        todo = f"see glimmer {self.name} --help{others}"
        if self.positional is None and source == "command line":
            todo += "; a prompt that begins with a dash is written after a lone --"
        what = f"no option {name!r}" if short else f"no key {key!r}"
        return ConfigError(f"{what} ({source})", f"a name that glimmer {self.name} knows{nearest}", todo)

    # ------------------------------------------------------------------ help

    def help(self) -> str:
        """What --help prints."""
        lines = [f"usage: glimmer {self.name} {self.usage}", "", *self.about.splitlines()]
        for title, table in self.options.items():
            lines += ["", title, *(_entry(_names(key, option), _help(option)) for key, option in table.items())]
        lines += ["", "general", _entry("-h, --help", "this page"), _entry("-V, --version", "the version")]
        lines += [_entry(_names(key, option), _help(option)) for key, option in GENERAL.items()]
        if any(option.field for option in self.own.values()):
            lines += ["", "Defaults are in brackets. Settings of engine and answers may also stand in the environment,"]
            lines += ["as GLIMMER_<NAME>, e.g. GLIMMER_MAX_MODEL_LEN=4096; what is typed is stronger."]
        return "\n".join([*lines, *self.notes]) + "\n"


def unknown_variables() -> list[str]:
    """A line for each variable in the environment that looks like a setting and is none."""
    known = {f"GLIMMER_{key.upper()}" for key in ENGINE | SAMPLING | SERVER} | OTHER_VARIABLES
    lines: list[str] = []
    for name in sorted(name for name in os.environ if name.startswith("GLIMMER_") and name not in known):
        near = difflib.get_close_matches(name, known, 1, 0.8)
        lines.append(f"{name} in the environment is no setting, and ignored" + (f"; {near[0]} is one" if near else ""))
    return lines


def _normal(name: str) -> str:
    """A long flag or a key with `_` between its words; dotted names and single-dash flags stay as they are."""
    if "." in name or (name.startswith("-") and not name.startswith("--")):
        return name
    return name[:2].replace("_", "-") + name[2:].replace("-", "_") if name.startswith("--") else name.replace("-", "_")


def _dashed(key: str) -> str:
    return key if "." in key else key.replace("_", "-")


def _names(key: str, option: Option) -> str:
    value = "[BOOL]" if option.kind is truth and option.default == "True" else option.value
    first = f"--{_dashed(key)} {value}".rstrip()
    off = [f"--no-{_dashed(key)}", *option.off] if option.default == "True" else []
    return ", ".join([first, *option.flags, *off])


def _help(option: Option) -> str:
    return option.help + (f" ({option.default})" if option.default not in ("", "False") else "")


def _entry(name: str, help: str) -> str:
    return f"  {name:36}{help}" if len(name) < 36 else f"  {name}\n{'':38}{help}"


def _check_directory() -> None:
    """Refuse a working directory that somebody has removed: libraries end the process when they meet one."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(
            f"the current directory: {error.strerror}", "a directory that is there", "change to another one with cd"
        ) from None


def _unreadable() -> tuple[type[Exception], ...]:
    """What reading a YAML file may raise."""
    yaml, errors = lazy("yaml"), lazy("omegaconf.errors")
    return (OSError, ValueError, RecursionError, yaml.YAMLError, errors.OmegaConfBaseException)


def locate(name: str, home: Path | None) -> Path:
    """A path as given, or below `home` if it is only there."""
    found = Path(os.path.expanduser(name))
    below = home is not None and not os.path.exists(found) and os.path.exists(home / name)
    return home / name if home is not None and below else found
