"""The table of options: the dataclasses' fields, other engines' names, where values come from and which is stronger."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

from glimmer.cli import bench, demo, doctor, options, predict, quantize
from glimmer.cli.options import ENGINE, SAMPLING, Command, Given, Option
from glimmer.config import EngineConfig, SamplingParams
from glimmer.errors import ConfigError, GlimmerError, RequestError

COMMANDS = [predict.COMMAND, bench.COMMAND, demo.COMMAND, doctor.COMMAND, quantize.COMMAND]
TRY = Command("try", "For tests.", "[options]", {"engine": ENGINE, "answers": options.without(SAMPLING, "seed")})


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch):
    for name in ENGINE | SAMPLING:
        monkeypatch.delenv(f"GLIMMER_{name.upper()}", raising=False)


def read(*argv: str, command: Command = TRY) -> dict:
    return {name: given.value for name, given in command.read(list(argv)).given.items()}


def refusal(*argv: str, command: Command = TRY) -> str:
    with pytest.raises(ConfigError) as caught:
        command.read(list(argv))
    assert all(part for part in (caught.value.found, caught.value.expected, caught.value.todo))
    return str(caught.value)


# ---------------------------------------------------------------------- the table


@pytest.mark.parametrize("config, table", [(EngineConfig, ENGINE), (SamplingParams, SAMPLING)])
def test_the_table_is_the_fields(config, table):
    assert list(table) == [one.name for one in fields(config)]
    for one in fields(config):
        assert table[one.name].help and table[one.name].field and one.name in options.WORDS
        if options.WORDS[one.name].default is None and one.default not in (MISSING, None):
            assert table[one.name].default == str(one.default)


def test_every_default_is_a_value_that_its_option_accepts():
    for config in (EngineConfig, SamplingParams):
        table = options.options_of(config)
        for one in fields(config):
            if one.default not in (MISSING, None):
                assert table[one.name].kind(str(one.default)) == one.default


def test_kinds_follow_the_annotations():
    @dataclass
    class Config:
        whole: int | None = None
        some_bytes: int | None = None
        share: float = 0.5
        on: bool = True
        name: str = "a"
        one_of: Literal["a", "b"] | None = None
        texts: str | Sequence[str] | None = None
        tokens: Sequence[int] | None = None
        table: Mapping[int, float] | None = None

    table = options.options_of(Config)
    found = {name: option.kind for name, option in table.items()}
    assert found == {
        "whole": options.whole, "some_bytes": options.size, "share": options.number, "on": options.truth,
        "name": options.text, "one_of": options.text, "texts": options.texts, "tokens": options.ids,
        "table": options.biases,
    }  # fmt: skip
    assert table["one_of"].choices == ("a", "b") and table["texts"].repeat and table["tokens"].repeat
    assert table["whole"].help == "see Config"

    @dataclass
    class Strange:
        value: complex = 1j

    with pytest.raises(TypeError, match="value"):
        options.options_of(Strange)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_no_name_has_two_meanings(command):
    keys = [f"--{key}" for key in command.own]
    other = [options._normal(name) for option in command.own.values() for name in (*option.flags, *option.off)]
    assert len(set(keys)) == len(keys) and len(set(other)) == len(other) and not set(keys) & set(other)
    assert {*keys, *other, "-h", "--help"} - {"-h", "--help"} <= set(command.flags)
    for name in other:  # a name of MindFormers for the same setting is as good
        key = command.flags[name].key
        assert key in command.own or command.foreign.translated[key].setting in command.own


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_is_made_from_the_table(command, capsys):
    assert command.asks_for_help(["x", "--help"]) and not command.asks_for_help(["x", "--", "--help"])
    page = capsys.readouterr().out
    for key, option in command.own.items():
        assert f"--{key.replace('_', '-')}" in page and option.help in page
        assert all(name in page for name in option.flags)
        if option.default not in ("", "False"):
            assert f"{option.help} ({option.default})" in page
    assert max(map(len, page.splitlines())) <= 120


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "names, setting, value",
    [
        ("--model -m --model-path --model_path", "model", "/a"),
        ("--tensor-parallel-size --tensor_parallel_size -tp --tp-size --tp", "tensor_parallel_size", 2),
        ("--max-model-len --context-length -c --ctx-size", "max_model_len", 4096),
        ("--max-num-seqs --max-running-requests -np --parallel", "max_num_seqs", 3),
        ("--gpu-memory-utilization --mem-fraction-static", "gpu_memory_utilization", 0.5),
        ("--kv-cache-dtype -ctk --cache-type-k", "kv_cache_dtype", "int8"),
        ("--kv-cache-dir", "kv_cache_dir", "/a"),
        ("--kv-cache-size-bytes --kv-cache-size --kv_cache_size", "kv_cache_size_bytes", 4096),
        ("--threads -t", "threads", 4),
        ("--max-tokens -n --n-predict --predict --max-new-tokens", "max_tokens", 7),
        ("--temperature --temp", "temperature", 0.5),
        ("--top-k", "top_k", -1),
        ("--top-p", "top_p", 0.9),
        ("--min-p", "min_p", 0.1),
        ("--repetition-penalty --repeat-penalty", "repetition_penalty", 1.1),
        ("--seed -s --random-seed", "seed", 5),
        ("--quantization -q", "quantization", "int4"),
        ("--block-size --page-size", "block_size", 32),
        ("--max-num-batched-tokens --chunked-prefill-size -b --batch-size", "max_num_batched_tokens", 512),
    ],
)
def test_names_of_other_engines(names, setting, value):
    for name in names.split():
        assert read(name, str(value)) == read(f"{name}={value}") == {setting: value}


def test_true_and_false():
    name = "enable_prefix_caching"
    for typed, value in (
        (["--enable-prefix-caching"], True),
        (["--enable-prefix-caching", "False"], False),
        (["--enable-prefix-caching=true"], True),
        (["--no-enable-prefix-caching"], False),
        (["--disable-radix-cache"], False),
        (["--enable-prefix-caching", "1"], None),
    ):
        if value is None:
            assert "or --enable-prefix-caching False" in refusal(*typed)  # a value, or a word by itself?
        else:
            assert read(*typed) == {name: value}
    assert "--disable-radix-cache alone" in refusal("--disable-radix-cache=False")
    settings = predict.COMMAND.read(["--chat", "False", "hi"])
    assert settings.take("chat") is False and settings.words == ["hi"]
    for word in ("0", "no", "Off", "YES"):
        with pytest.raises(ConfigError, match=f"--chat {word}"):
            predict.COMMAND.read(["--chat", word, "hi"])
    assert predict.COMMAND.read(["--chat", "--", "no"]).literal == ["no"]


def test_lists_add_up():
    assert read("--stop", "a", "--stop=b", "-r", "c") == {"stop": ["a", "b", "c"]}
    assert read("--stop-token-ids", "5", "--stop-token-ids", "7,9") == {"stop_token_ids": [5, 7, 9]}
    assert read("--logit-bias", '{"5": -1.5}') == {"logit_bias": {5: -1.5}}
    assert read("--prefill", "1", "2", "--prefill=3", "-t", "2", command=bench.COMMAND) == {
        "prefill": [1, 2, 3], "threads": 2,
    }  # fmt: skip
    assert read("--prefill", "--decode", "4", command=bench.COMMAND) == {"prefill": [], "decode": [4]}
    settings = predict.COMMAND.read(["--predict_data", "a", "b", "--predict_data", "c"])
    assert settings.take("prompts") == ["a", "b", "c"]


def test_other_repetitions_agree_or_are_refused():
    assert read("--temp", "1", "--temperature", "1") == {"temperature": 1.0}
    assert "temperature='1' and temperature='2'" in refusal("--temp", "1", "--temperature", "2")
    assert "config='a' and config='b'" in refusal("--config", "a", "--config", "b")
    assert "model='b' and model='a'" in refusal("a", "--model", "b", command=bench.COMMAND)


@pytest.mark.parametrize("argv", [["--model", ""], ["--model="], ["-m", ""], ["--stop", ""], ["--config", ""]])
def test_an_empty_value_is_refused(argv):
    assert "=''" in refusal(*argv) and "not an empty one" in refusal(*argv)


def test_empty_values_of_mindformers_keys_and_words():
    assert "pretrained_model_dir=''" in refusal("--pretrained_model_dir", "", "hi", command=predict.COMMAND)
    assert "predict_data=''" in refusal("--predict_data", "", command=predict.COMMAND)
    assert predict.COMMAND.read(["--load_checkpoint", "", "--adapter_id=", "hi"]).given == {}
    for command in (bench.COMMAND, demo.COMMAND, quantize.COMMAND):
        assert "model=''" in refusal("", command=command)


@pytest.mark.parametrize(
    "argv, command, words",
    [
        (["--top-kk", "3"], TRY, "nearest is 'top_k'"),
        (["--context-len=3"], TRY, "nearest is 'context_length'"),
        (["-x", "5"], TRY, "no option '-x'"),
        (["-x", "5"], predict.COMMAND, "after a lone --"),
        (["-5"], predict.COMMAND, "no option '-5'"),
        (["-temperature", "1"], TRY, "--temperature, with two dashes"),
        (["--prefil", "1"], bench.COMMAND, "nearest is 'prefill'"),
        (["--top-k", "1"], bench.COMMAND, "no key 'top_k'"),
        (["--qqq"], TRY, "no key 'qqq'"),
        (["--threads"], TRY, "--threads has no value"),
        (["--model", "-tp", "2"], TRY, "--model has no value"),
        (["--model", "--tp", "2"], TRY, "--model has no value"),
        (["word"], TRY, "'word'"),
        (["a", "b"], bench.COMMAND, "'b'"),
        (["a", "b", "c"], quantize.COMMAND, "MODEL OUT"),
        (["--temperature", "hot"], TRY, "a number"),
        (["--max-memory-bytes", "1" * 5000], TRY, "59GB"),
        (["--threads", "9" * 5000], TRY, "a whole number"),
        (["--logit-bias", "{"], TRY, "JSON"),
        (["--stop-token-ids", "a"], TRY, "token ids"),
        (["--stop-token-ids", "5,１"], TRY, "token ids"),
        (["--threads", "１"], TRY, "a whole number"),
        (["--threads", "1_0"], TRY, "a whole number"),
        (["--temperature", "0_1"], TRY, "a number"),
        (["--temperature", "٠.٥"], TRY, "a number"),
        (["--max-memory-bytes", "５GB"], TRY, "59GB"),
        (["--logit-bias", '{"1_0": 1}'], TRY, "JSON"),
        (["--logit-bias", '{"5": 1, "5": 2}'], TRY, "JSON"),
    ],
)
def test_refusals(argv, command, words):
    assert words in refusal(*argv, command=command)


def test_a_directory_as_a_prompt_is_probably_the_model(tmp_path):
    settings = predict.COMMAND.read([str(tmp_path), "hi"])
    with pytest.raises(ConfigError, match="which is a directory") as caught:
        predict.read_job(settings, [], 1, lambda: tmp_path)
    assert f"--model {tmp_path}" in caught.value.todo
    settings = predict.COMMAND.read(["--", str(tmp_path)])
    assert predict.read_job(settings, [], 1, lambda: tmp_path).literal == [str(tmp_path)]


def test_a_file_of_another_kind_is_no_prompt(tmp_path):
    (tmp_path / "prompts.csv").write_text("hi\n")
    for words in ([f"{tmp_path}/prompts.csv"], ["/dev/null"], ["--predict_data", f"{tmp_path}/prompts.csv"]):
        with pytest.raises(ConfigError, match="which is a file, as a prompt") as caught:
            predict.read_job(predict.COMMAND.read(words), [], 1, lambda: tmp_path)
        assert "a .txt or .jsonl file" in caught.value.expected
    for word in ("-", "/dev/stdin", "prompts.csv", f"{tmp_path}/other.csv"):
        assert predict.read_job(predict.COMMAND.read([word]), [], 1, lambda: tmp_path).prompts == [word]


@pytest.mark.parametrize("dash", ["\u2014", "\u2013", "\u2212", "\u2014-"])
def test_other_dashes_begin_no_prompt_where_an_option_is_meant(dash):
    for word in (f"{dash}temperature", f"{dash}max-tokens=5", f"{dash}seed"):
        with pytest.raises(ConfigError, match="another dash than -"):
            predict.COMMAND.read([word, "0", "hi"])
    assert predict.COMMAND.read([f"{dash}", f"{dash}\u4f60\u597d"]).words == [dash, f"{dash}\u4f60\u597d"]


# ---------------------------------------------------------------------- sources, and which is stronger


@pytest.mark.parametrize("name", sorted(ENGINE | SAMPLING))
def test_every_field_has_a_variable(name, monkeypatch):
    command = Command("try", "", "", {"all": SAMPLING | ENGINE})
    option = command.own[name]
    value = {
        options.whole: "3", options.number: "0.5", options.truth: "true", options.size: "2KB", options.ids: "1,2",
        options.texts: "end", options.biases: '{"1": 2}', options.path: "/a", options.text: "auto",
        options.speculation: "ngram",
        options.form: '{"choice": ["a", "b"]}',
    }[option.kind]  # fmt: skip
    monkeypatch.setenv(f"GLIMMER_{name.upper()}", value)
    given = command.read([]).given
    assert given == {name: Given(option.kind(value), name, f"environment variable GLIMMER_{name.upper()}", 2)}
    monkeypatch.setenv(f"GLIMMER_{name.upper()}", "")
    assert command.read([]).given == {}


def test_command_line_over_environment_over_file_over_default(tmp_path, monkeypatch):
    file = tmp_path / "c.yaml"
    file.write_text(
        "max-num-seqs: 5\nblock_size: 8\nthreads: 1\nmem-fraction-static: 0.5\nstop: [x, y]\nmodel: /file\n"
    )
    config = ["--config", str(file)]
    expected = {"config": str(file), "max_num_seqs": 5, "block_size": 8, "threads": 1, "gpu_memory_utilization": 0.5}
    expected |= {"stop": ["x", "y"], "model": "/file"}
    assert read(*config) == expected
    monkeypatch.setenv("GLIMMER_BLOCK_SIZE", "32")
    monkeypatch.setenv("GLIMMER_THREADS", "2")
    monkeypatch.setenv("GLIMMER_STOP", "z")
    assert read(*config) == expected | {"block_size": 32, "threads": 2, "stop": ["z"]}
    typed = read(*config, "--threads", "3", "--stop", "end", "-m", "/typed")
    assert typed == expected | {"block_size": 32, "threads": 3, "stop": ["end"], "model": "/typed"}
    assert EngineConfig(model="m").block_size == 16


@pytest.mark.parametrize(
    "argv, variables, content, words",
    [
        (["--dtype", "int3"], {}, "", "dtype='int3' (command line)"),
        ([], {"GLIMMER_DTYPE": "int3"}, "", "dtype='int3' (environment variable GLIMMER_DTYPE)"),
        ([], {}, "dtype: int3", "dtype='int3' (c.yaml)"),
        ([], {"GLIMMER_THREADS": "many"}, "", "threads='many' (environment variable GLIMMER_THREADS)"),
        ([], {}, "threads: many", "threads='many' (c.yaml)"),
        ([], {}, "thread: 3", "no key 'thread' (c.yaml)"),
        ([], {}, "temperature: .nan", "temperature=nan"),
        ([], {}, "model: ''", "model='' (c.yaml)"),
        ([], {}, "config: other.yaml", "no key 'config' (c.yaml)"),
        ([], {}, "max_model_len: 4\nctx-size: 5", "two values of max_model_len (c.yaml)"),
        (["--top-p", "3"], {}, "", "top_p=3.0 (command line)"),
        ([], {"GLIMMER_TOP_P": "3"}, "", "top_p=3.0 (environment variable GLIMMER_TOP_P)"),
    ],
)
def test_an_error_says_where_the_value_stood(argv, variables, content, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if content:
        (tmp_path / "c.yaml").write_text(content)
        argv = [*argv, "--config", "c.yaml"]
    with pytest.raises(GlimmerError) as caught:
        settings = TRY.read(argv)
        settings.check(EngineConfig, {"model": "m"} | settings.fields(ENGINE))
        settings.check(SamplingParams, settings.fields(options.without(SAMPLING, "seed")))
    assert words in str(caught.value), str(caught.value)
    assert isinstance(caught.value, (ConfigError, RequestError))


def test_a_variable_that_is_no_setting_is_named(monkeypatch, capsys):
    monkeypatch.setenv("GLIMMER_MAX_MODEL_LENGTH", "64")
    monkeypatch.setenv("GLIMMER_COLOUR", "")
    monkeypatch.setenv("GLIMMER_JOIN_TIMEOUT", "5")
    assert read() == {}
    assert capsys.readouterr().err.splitlines() == [
        "glimmer try: GLIMMER_COLOUR in the environment is no setting, and ignored",
        "glimmer try: GLIMMER_MAX_MODEL_LENGTH in the environment is no setting, and ignored; "
        "GLIMMER_MAX_MODEL_LEN is one",
    ]


def test_every_variable_that_is_read_is_known():
    sources = Path(options.__file__).parents[1].rglob("*.py")
    read = {name for file in sources for name in re.findall(r'"(GLIMMER_[A-Z_]+)"', file.read_text())}
    assert {"GLIMMER_JOIN_TIMEOUT", "GLIMMER_BACKEND"} <= read <= options.OTHER_VARIABLES | {"GLIMMER_BACKEND"}


def test_a_file_may_serve_several_commands(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("dtype: float32\nmax_tokens: 3\nmax_num_seqs: 4\nlogit_bias: {5: -1.5}\nseed:\n")
    settings = bench.COMMAND.read(["--config", str(file)])
    assert settings.take("dtype") == "float32" and "seed" not in settings.given
    assert settings.ignored == ["logit_bias", "max_num_seqs", "max_tokens"]
    assert "mean nothing here and are ignored: logit_bias, max_num_seqs, max_tokens" in capsys.readouterr().err
    assert predict.COMMAND.read(["--config", str(file)]).take("logit_bias") == {5: -1.5}


def test_a_typed_model_leaves_the_section_of_that_name(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: {model_config: {top_k: 5}}\n")
    settings = predict.COMMAND.read(["--config", str(file), "--model", "/typed"])
    assert settings.take("model") == "/typed" and settings.take("top_k") == 5


def test_a_command_has_options_of_its_own():
    command = Command("try", "", "", {"own": {"depth": Option(options.count, "N", "how deep", "3")}})
    assert read("--depth", "4", command=command) == {"depth": 4}
    assert "from 1 on" in refusal("--depth", "0", command=command)


@pytest.mark.parametrize(
    "command, flag, said",
    [
        (bench.COMMAND, "--temp", "'temperature' is a setting of other commands"),
        (bench.COMMAND, "--max-model-len", "'max_model_len' is a setting of other commands"),
        (bench.COMMAND, "--blocksize", "the nearest is 'block_size'"),
        (predict.COMMAND, "--tempreature", "the nearest is 'temperature'"),
        (predict.COMMAND, "--max-lenght", "the nearest is 'max_length'"),
    ],
)
def test_an_unknown_name_brings_one_that_is_near(command, flag, said):
    assert said in str(command.unknown(flag, "command line"))


def test_what_is_no_number_is_called_that():
    with pytest.raises(ConfigError, match=r"temperature='nan' \(command line\)\n  expected: a number"):
        predict.COMMAND.read(["--temperature", "nan", "hi"])


def test_homes_of_nobody_are_paths_like_others():
    assert options.path("~nobody-of-that-name/x") == "~nobody-of-that-name/x"
    assert options.path("~/x") == os.path.expanduser("~") + "/x"


@pytest.mark.parametrize("command", [bench.COMMAND, predict.COMMAND])
def test_a_removed_working_directory_is_refused(tmp_path, monkeypatch, command):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigError, match="the current directory: No such file"):
        command.read([])


# ---------------------------------------------------------------------- drafts


@pytest.mark.parametrize(
    "argv, content, expected",
    [
        (["--speculative-config", '{"method": "mtp", "num_speculative_tokens": 1}'], "", ("mtp", 1)),
        (["--spec-method", "ngram"], "", ("ngram", None)),
        (["--mtp", "auto"], "", ("auto", None)),
        (["--mtp", "off"], "", ("off", None)),
        (["--mtp", "3"], "", ("mtp", 3)),
        ([], "mtp: off", ("off", None)),  # which YAML takes for a truth value
        ([], "mtp: 2", ("mtp", 2)),
        ([], "speculative_config: {method: ngram, num_speculative_tokens: 4}", ("ngram", 4)),
        ([], "speculative_config:\n  method: ngram\n  num_speculative_tokens: 4\n", ("ngram", 4)),
        (["--mtp", "off"], "speculative_config: {method: ngram}", ("off", None)),
    ],
)
def test_ways_to_ask_for_drafts(argv, content, expected, tmp_path):
    if content:
        (tmp_path / "c.yaml").write_text(content)
        argv = [*argv, "--config", str(tmp_path / "c.yaml")]
    settings = TRY.read(argv)
    config = settings.check(EngineConfig, {"model": "m"} | settings.fields(ENGINE))
    assert (config.speculation.method, config.speculation.num_speculative_tokens) == expected


@pytest.mark.parametrize("value", ["[1]", '{"method"', "maybe", "-1", "0", "17", '{"draft_model": "x"}'])
def test_what_is_no_way_to_draft_is_refused_with_its_place(value):
    with pytest.raises(ConfigError) as caught:
        settings = TRY.read(["--speculative-config", value])
        settings.check(EngineConfig, {"model": "m"} | settings.fields(ENGINE))
    assert "speculative_config" in caught.value.found and "(command line)" in caught.value.found


def test_two_ways_to_draft_contradict_each_other():
    assert "one value" in refusal("--mtp", "2", "--spec-method", "ngram")


OTHER_LOCALE = """
import sys
from glimmer.cli.predict import COMMAND
from glimmer.cli.results import read_prompts
from glimmer.errors import ConfigError
given = COMMAND.read(sys.argv[1:]).given
print(ascii([given["stop"].value, read_prompts(given["prompts"].value, [], None, ["\\udce6\\udc80\\udc8e"])]))
try:
    COMMAND.read(["--stop", "\\udcff", "hi"])
except ConfigError as error:
    print(ascii(error.expected))
"""


def test_words_are_text_in_utf8_under_every_locale(tmp_path):
    (tmp_path / "文件.txt").write_text("一\n二\n", encoding="utf-8")
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ["--stop", "。", "--predict_data", "你好", "文件.txt"]
    run = [sys.executable, "-c", OTHER_LOCALE, *words]
    done = subprocess.run(run, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        ascii([["。"], ["你好", "一", "二", "怎"]]),
        "'a text in UTF-8 or a list of texts'",
    ], done.stderr
