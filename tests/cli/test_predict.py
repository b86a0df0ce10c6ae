"""`glimmer predict`: keys, prompts, rows, and whole runs in this process. Several: mindformers/test_launch.py."""

import ast
import fcntl
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import termios
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml
from checkpoints import DEMO
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glimmer import LLM
from glimmer.cli import identity, options, predict
from glimmer.cli.predict import COMMAND
from glimmer.cli.results import Results, read_prompts, row, save
from glimmer.config import EngineConfig, SamplingParams
from glimmer.errors import ConfigError, EngineError, GlimmerError
from glimmer.mindformers import launch
from glimmer.mindformers import options as mindformers

ROOT = Path(__file__).resolve().parents[2]
YAML = ROOT / "configs/glm4_moe/predict_glm4_moe.yaml"


def ask(*argv: str, running: int = 1, home: Path | None = ROOT) -> predict.Job:
    settings = COMMAND.read(list(argv), home)
    return predict.read_job(settings, list(argv), running, lambda: Path("/demo"), home)


def refusal(*argv: str, **how) -> str:
    with pytest.raises(ConfigError) as caught:
        ask(*argv, **how)
    return str(caught.value)


# ---------------------------------------------------------------------- keys


def test_every_setting_exists_in_the_engine():
    assert set(predict.ENGINE_OPTIONS) <= {field.name for field in fields(EngineConfig)}
    assert set(predict.ANSWERS) <= {field.name for field in fields(SamplingParams)}
    special = {"weights", "use_parallel", "prompts", "do_sample", "max_length"}
    assert {row.setting for row in mindformers.TRANSLATED.values()} <= set(COMMAND.own) | special


def test_no_key_is_in_two_tables():
    for key in [*COMMAND.own, *mindformers.TRANSLATED, *mindformers.REFUSED]:
        foreign = COMMAND.foreign
        tables = [key in COMMAND.own, key in foreign.translated, key in foreign.refused, foreign.is_ignored(key)]
        assert sum(tables) == 1, f"{key} is in {sum(tables)} tables"


@pytest.mark.parametrize("file", sorted((ROOT / "configs/glm4_moe").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_files_hold_only_keys_that_mean_something(file):
    running = yaml.safe_load(file.read_text()).get("parallel_config", {}).get("model_parallel", 1)
    asked = ask("--config", str(file), "hello", running=running)
    assert asked.ignored == [] and asked.engine["model"] == "/path/hf_dir"


def test_commented_keys_of_the_shipped_file_are_known():
    commented = re.findall(r"^# (\w+):", YAML.read_text(), re.MULTILINE)
    assert len(commented) >= 5 and all(COMMAND.find(f"--{key}") for key in commented)


def test_command_line_over_file_over_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("pretrained_model_dir: /from/file\nseed: 3\nmax_new_tokens: 7\nmodel: {model_config: {top_k: 5}}\n")
    asked = ask("--config", str(file), "--seed", "4", "--model.model_config.temperature=0.5")
    assert asked.engine == {"model": "/from/file", "seed": 4, "tensor_parallel_size": 1}
    assert asked.sampling == {"max_tokens": 7, "top_k": 5, "temperature": 0.5}
    assert ask("--config", str(file), "--model", "/typed").engine["model"] == "/typed"
    bare = ask("hello")
    assert bare.engine == {"model": "/demo", "tensor_parallel_size": 1}
    assert bare.sampling == {"max_tokens": predict.MAX_TOKENS} and bare.prompts == ["hello"]


def test_references_in_the_file_see_the_command_line(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("max_num_seqs: ${parallel_config.model_parallel}\nparallel_config:\n  model_parallel: 2\n")
    command = ["--config", str(file), "--parallel_config.model_parallel", "3"]
    assert ask(*command, running=3).engine["max_num_seqs"] == 3


@given(st.text(min_size=1))
def test_a_text_arrives_as_it_is(text):
    given_, prompts, literal = COMMAND.read_command_line(["--predict_data=" + text, "--stop=" + text, "--", text])
    assert given_ == {"predict_data": [text], "stop": [text]} and prompts == [] and literal == [text]
    if not text.startswith("-"):
        given_, prompts, _ = COMMAND.read_command_line([text, "--predict_data", text, "--stop", text])
        assert given_ == {"predict_data": [text], "stop": [text]} and prompts == [text]


@pytest.mark.parametrize("word", ["-x", "-1", "-model", "--fly"])
def test_a_prompt_that_begins_with_a_dash_follows_a_lone_double_dash(word):
    assert COMMAND.read_command_line(["-", "--", word]) == ({}, ["-"], [word])
    assert "after a lone --" in refusal(word, "5")


def test_texts_with_equals_and_braces_pass_a_file_unchanged():
    asked = ask("--config", str(YAML), "--predict_data=${a.b} = $c", "x=1", "--system=--${d}", "--chat", running=8)
    assert asked.data == ["${a.b} = $c"] and asked.prompts == ["x=1"] and asked.system == "--${d}"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--prallel_config.model_parallel", "2"], ["'prallel_config.model_parallel'", "is 'parallel_config.model_"]),
        (["--model_parallel", "2"], ["nearest is 'parallel_config.model_parallel'"]),
        (["--max-token", "2"], ["nearest is 'max_tokens'"]),
        (["--qqq", "2"], ["no key 'qqq'"]),
        (["--seed", "many"], ["seed='many'", "a whole number"]),
        (["--temperature", "hot"], ["a number"]),
        (["--use_parallel", "perhaps"], ["True or False"]),
        (["--kv-cache-memory-bytes", "4 boxes"], ["512MB"]),
        (["--context.max_device_memory", "lots"], ["context.max_device_memory='lots'", "59GB"]),
        (["--context.max_device_memory", "0GB"], ["max_memory_bytes=0"]),
        (["--device_target", "TPU"], ["Ascend, GPU or CPU"]),
        (["--model"], ["--model has no value", "a path"]),
        (["-model", "/a"], ["'-model'", "--model, with two dashes"]),
        (["-max-tokens=3"], ["--max-tokens=3, with two dashes"]),
        (["--run_mode", "finetune"], ["'predict'", "does not train"]),
        (["--parallel_config.data_parallel", "2"], ["raise predict_batch_size"]),
        (["--parallel_config.pipeline_stage", "2"], ["set it to 1"]),
        (["--adapter_id", "lora"], ["merge the adapter"]),
        (["--load_ckpt_format", "ckpt"], ["'safetensors'"]),
        (["--temperature", "1", "--model.model_config.temperature", "2"], ["values that agree"]),
        (["--system", "Be brief."], ["add --chat"]),
        (["--resume"], ["add --output"]),
        (["--pretrained_model_dir", "/a", "--load_checkpoint", "/b"], ["'/a'", "'/b'", "one Hugging Face directory"]),
        (["--config", "/nowhere.yaml"], ["No such file"]),
        (["--config", str(ROOT)], ["--config"]),
    ],
)
def test_refusals_name_the_key_and_what_is_accepted(argv, words):
    message = refusal(*argv)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("content", ["a: [", "- 1\n- 2", "text", "seed: ${nowhere}", "\x80"])
def test_a_broken_file_is_refused(tmp_path, content):
    (tmp_path / "c.yaml").write_bytes(content.encode("latin-1"))
    assert "c.yaml" in refusal("--config", str(tmp_path / "c.yaml"), "hello")


def test_impossible_sampling_is_refused_before_loading():
    with pytest.raises(GlimmerError, match="top_p=3"):
        ask("--top-p", "3")


def test_keys_that_mean_nothing_are_named_once(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "output_dir: ./output\nuse_legacy: False\ntrainer:\n  type: T\n  model_name: glm4_moe\n"
        "context:\n  mode: 0\n  ascend_config:\n    precision_mode: p\nparallel:\n  parallel_mode: M\n"
        "model:\n  model_config:\n    rotary_dtype: bfloat16\nparallel_config:\nprocessor: {}\n"
    )
    assert ask("--config", str(file), "--context.mode", "1").ignored == [
        "context.ascend_config.precision_mode",
        "context.mode",
        "model.model_config.rotary_dtype",
        "output_dir",
        "parallel.parallel_mode",
        "trainer.model_name",
        "trainer.type",
        "use_legacy",
    ]


@pytest.mark.parametrize(
    "argv, running, result",
    [
        ([], 1, 1),
        ([], 4, 4),
        (["--use_parallel", "True"], 4, 4),
        (["--use_parallel", "False"], 1, 1),
        (["--config", str(YAML)], 8, 8),
        (["--config", str(YAML), "--use_parallel", "False"], 1, 1),
        (["--config", str(YAML), "--parallel_config.model_parallel", "2"], 2, 2),
        (["--parallel_config.model_parallel", "2", "--use_parallel", "True"], 2, 2),
        (["--tensor-parallel-size=1", "--use_parallel=True"], 1, 1),
    ],
)
def test_processes(argv, running, result):
    assert ask(*argv, running=running).engine["tensor_parallel_size"] == result


@pytest.mark.parametrize(
    "argv, running, words",
    [
        (["--config", str(YAML), "北京"], 1, ["model_parallel=8", "1 process runs", "'北京'\" 8", "--use_parallel"]),
        (["--config", str(YAML)], 2, ["model_parallel=8", "2 processes run", "--parallel_config.model_parallel 2"]),
        (["--use_parallel", "True", "x"], 1, ["use_parallel=True", "1 process runs"]),
        (["--use_parallel", "False", "x"], 2, ["use_parallel=False", "start one process"]),
        (["--use_parallel", "False", "--parallel_config.model_parallel", "2"], 1, ["model_parallel=2"]),
    ],
)
def test_never_another_number_of_processes_than_asked_for(argv, running, words):
    message = refusal(*argv, running=running)
    assert all(word in message for word in words), message


def test_a_file_that_contradicts_itself_is_no_silent_single_process(tmp_path):
    (tmp_path / "c.yaml").write_text("use_parallel: False\nparallel_config:\n  model_parallel: 8\n")
    assert "model_parallel=8" in refusal("--config", str(tmp_path / "c.yaml"), "x")


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
@settings(max_examples=20, deadline=None)
def test_the_command_in_a_refusal_survives_the_shell(text):
    """The two commands that a refusal offers carry the same words, whatever is quoted in them."""
    argv = ["--use_parallel=True", "--predict_data=" + text]
    offered = [refusal(*argv, home=home).split("start 2 with\n")[1].split("\n    or add")[0] for home in (ROOT, None)]
    words = []
    for line in offered:
        printed = subprocess.run(["sh", "-c", rf"printf '%s\0' {line.strip()}"], capture_output=True, check=True).stdout
        words.append(printed.decode().split("\0")[:-1])
    launcher, torchrun = words
    assert launcher[:2] == ["bash", "scripts/msrun_launcher.sh"] and launcher[3] == "2"
    assert launch.split_command(launcher[2])[2:] == tuple(argv) and torchrun[-2:] == argv


@pytest.mark.parametrize(
    "argv, temperature, do_sample",
    [
        (["--do_sample", "False"], 0.0, False),
        (["--do_sample", "False", "--temperature", "0.8"], 0.0, False),
        (["--do_sample", "True", "--temperature", "0.8"], 0.8, True),
        (["--do_sample", "True"], None, True),
        (["--config", "FILE", "--temperature", "0.8"], 0.8, False),
        (["--config", "FILE"], 0.0, False),
    ],
)
def test_do_sample(tmp_path, argv, temperature, do_sample):
    (tmp_path / "c.yaml").write_text("do_sample: False\ntemperature: 1.0\n")
    asked = ask(*(str(tmp_path / "c.yaml") if word == "FILE" else word for word in argv))
    assert asked.sampling.get("temperature") == temperature and asked.do_sample is do_sample


def test_memory(tmp_path):
    (tmp_path / "c.yaml").write_text('context:\n  mode: 0\n  max_device_memory: "59GB"\n')
    asked = ask("--config", str(tmp_path / "c.yaml"))
    assert asked.engine["max_memory_bytes"] == 59 * 2**30 and asked.ignored == ["context.mode"]
    assert ask("--max-memory-bytes", "4GB").engine["max_memory_bytes"] == 2**32


def test_lengths(tmp_path):
    (tmp_path / "c.yaml").write_text("max_length: 100\n")
    file = ["--config", str(tmp_path / "c.yaml")]
    asked = ask(*file)
    assert asked.engine["max_model_len"] == 100 and asked.sampling["max_tokens"] is None
    both = ask(*file, "--max_new_tokens", "30")
    assert "max_model_len" not in both.engine and both.sampling["max_tokens"] == 30
    assert ask(*file, "--max-model-len", "50").engine["max_model_len"] == 50


@pytest.mark.parametrize(
    "text, number", [("59GB", 59 * 2**30), ("512MB", 2**29), ("1.5g", 3 * 2**29), ("4096", 4096), ("2 KiB", 2048)]
)
def test_sizes(text, number):
    assert options.size(text) == number


# ---------------------------------------------------------------------- prompts


def test_prompts_come_from_texts_and_files(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeff请介绍一下北京\r\nline one\\nline two\r\n\r\nlast\r\n\r\n\r\n".encode())
    expected = ["请介绍一下北京", "line one\nline two", "", "last"]
    assert read_prompts([str(file)], [], None) == expected
    assert read_prompts([], [str(file)], None) == expected
    assert read_prompts(["p.txt"], [], tmp_path) == expected, "a relative path is found beside the script"
    assert read_prompts(["a\\nb"], ["a\\nb"], None) == ["a\nb", "a\\nb"]
    assert read_prompts(["what is robots.txt"], [], None) == ["what is robots.txt"]


@pytest.mark.parametrize(
    "content, words", [(None, "No such file"), (b"\n\n", "empty"), (b"\xff\xfe\x00", r"utf-8[\s\S]*save it in UTF-8")]
)
def test_prompt_files_that_cannot_be_read(tmp_path, content, words):
    file = tmp_path / "p.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_prompts([str(file)], [], None)


@pytest.mark.parametrize(
    "typed, meant",
    [
        (r"a\nb", "a\nb"),
        (r"$\\nabla$ in C:\\new", r"$\nabla$ in C:\new"),
        (r"\\\n", r"\\n"),
        (r"\t \\ x", r"\t \\ x"),
    ],
)
def test_a_backslash_before_an_n_is_a_new_line_unless_it_is_escaped(tmp_path, typed, meant):
    (tmp_path / "p.txt").write_text(f"{typed}\n")
    assert read_prompts([typed, str(tmp_path / "p.txt")], [typed], None) == [meant, meant, typed]
    assert read_prompts([], [], None, [typed]) == [typed]


def test_prompts_and_conversations_of_a_jsonl_file(tmp_path):
    file = tmp_path / "p.jsonl"
    talk = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "hi"}]
    lines = [{"prompt": "\\nabla\nand\u2028so"}, {"messages": talk}, {"prompt": ""}]
    file.write_text("\ufeff" + "\r\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    assert read_prompts([], [str(file)], None) == ["\\nabla\nand\u2028so", talk, ""]


@pytest.mark.parametrize(
    "line",
    [
        "text",
        "5",
        "{}",
        '{"prompt": 5}',
        '{"messages": []}',
        '{"messages": ["hi"]}',
        '{"prompt": "a", "temperature": 1}',
        '{"text": "a"}',
        "[" * 100_000,
        '{"prompt": ' + "9" * 5000 + "}",
        "",
    ],
)
def test_a_line_that_is_no_prompt_is_refused_by_its_number(tmp_path, line):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n' + line + '\n{"prompt": "b"}\n')
    with pytest.raises(ConfigError, match=r"p\.jsonl line 2"):
        read_prompts([], [str(file)], None)


def test_lone_surrogates_in_a_jsonl_file_are_no_text(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "user", "content": "\\ud800"}]}\n')
    with pytest.raises(ConfigError, match=r"p\.jsonl line 1: .*surrogate"):
        read_prompts([], [str(tmp_path / "p.jsonl")], None)


def test_what_ends_like_a_file_is_one_or_says_that_it_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    long, strange = "长" * 300 + ".txt", "~nobody-of-that-name/a b.txt"
    for missing in ("请看看notes.txt", "prompts.jsonl", "./my prompts.txt", strange, long):
        with pytest.raises(ConfigError, match="after a lone --"):
            read_prompts([], [missing], None, say=said.append)
    assert said == []
    assert read_prompts([], ["what is robots.txt"], None, say=said.append) == ["what is robots.txt"]
    assert "taken as a prompt" in said.pop()
    (tmp_path / "请看看notes.txt").write_text("a\nb\n")
    name = "请看看notes.txt"
    assert read_prompts([], [name], None, [name], said.append) == ["a", "b", name]
    assert "2 prompts from 请看看notes.txt" in said.pop()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.txt").mkdir()
    for strange in ("pipe.txt", "folder.txt"):
        with pytest.raises(ConfigError, match=r"no regular file|Is a directory"):
            read_prompts([], [strange], None)


@pytest.mark.parametrize("word", ["-", "/dev/stdin"])
def test_prompts_from_stdin(word):
    program = "import sys; from glimmer.cli.results import read_prompts; print(read_prompts([], [sys.argv[1]], None))"
    for content, code in (("你好\na\\nb\n", 0), ("", 1)):
        done = subprocess.run(
            [sys.executable, "-c", program, word],
            input=content.encode(),
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        assert done.stdout.decode() == ("" if code else "['你好', 'a\\nb']\n")


def test_jsonl_from_stdin(tmp_path):
    """What the first line is decides; from then on each line is one."""
    program = (
        "import sys; from glimmer.cli.results import read_prompts; print(read_prompts([], ['-'], None, say=print))"
    )
    talk = [{"role": "user", "content": "hi"}]
    lines = [json.dumps({"prompt": "a\\nb"}), json.dumps({"messages": talk})]
    for content, code, said in (
        ("\n".join(lines) + "\n", 0, str(["a\\nb", talk])),
        (lines[0] + "\n\n", 0, str(["a\\nb"])),
        (lines[0] + "\nplain\n", 1, "stdin line 2: plain"),
        ('{"prompt": 5}\n{"a": "b"}\n', 0, str(['{"prompt": 5}', '{"a": "b"}'])),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=content,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code and said in done.stdout + done.stderr, done
        assert ("read as a line of a .jsonl file" in done.stdout) == content.startswith(lines[0])


def test_no_prompt_and_no_text():
    for prompts in ([], ["\udcff"]):
        with pytest.raises(ConfigError):
            read_prompts([], prompts, None)


# ---------------------------------------------------------------------- rows

PROMPTS = ["请介绍一下北京", "line\nbreak", "x" * 50]
ANSWERED = [row(i, prompt, None, None) for i, prompt in enumerate(PROMPTS)]
LINES = b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in ANSWERED)


@given(cut=st.integers(0, len(LINES)))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_run_cut_off_anywhere_can_be_resumed(tmp_path, cut):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(LINES[:cut])
    rows = Results(PROMPTS, file, resume=True)
    complete = LINES[:cut].count(b"\n") + (cut > 0 and LINES[cut : cut + 1] == b"\n")
    assert list(rows.rows) == list(range(complete))
    for i in rows.todo:
        rows.add(ANSWERED[i])
    assert file.read_bytes() == LINES


def test_rows_of_others_are_never_touched(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(LINES)
    for prompts, resume, words in (
        (PROMPTS, False, "--resume"),
        (["other", *PROMPTS[1:]], True, "line 1 answers prompt 0.*'other'"),
        (PROMPTS[:2], True, "line 3 answers prompt 2.*None"),
    ):
        with pytest.raises(ConfigError, match=words):
            Results(prompts, file, resume)
        assert file.read_bytes() == LINES
    file.write_bytes(b"notes\n" + LINES)
    with pytest.raises(ConfigError, match="line 1 is no row"):
        Results(PROMPTS, file, resume=True)
    with pytest.raises(ConfigError, match="No such file"):
        Results(PROMPTS, tmp_path / "nowhere/rows.jsonl", resume=True)


def test_rows_that_something_else_made_are_refused_by_what_differs(tmp_path):
    file = tmp_path / "rows.jsonl"
    began = {"model_digest": "a", "temperature": 0.5, "chat": True}
    rows = Results(PROMPTS, file, False, began)
    rows.add(ANSWERED[0])
    rows.close()
    content = file.read_bytes()
    Results(PROMPTS, file, True, began).close()
    for now, words in (
        (began | {"model_digest": "b"}, "line 1 was made with model_digest a, which is now b"),
        (began | {"temperature": 0.6}, "temperature 0.5, which is now 0.6"),
        ({"model_digest": "a", "temperature": 0.5}, "chat True, which is now the default"),
        (began | {"system": "x"}, "system the default, which is now x"),
        ({}, "model_digest a"),
    ):
        with pytest.raises(ConfigError, match=words):
            Results(PROMPTS, file, True, now)
        assert file.read_bytes() == content
    file.write_bytes(LINES)
    with pytest.raises(ConfigError, match="it does not name"):
        Results(PROMPTS, file, True, began)


def test_a_file_has_one_writer(tmp_path):
    file = tmp_path / "rows.jsonl"
    first = Results(PROMPTS, file, False)
    for resume in (False, True):
        with pytest.raises(ConfigError, match="being written by another process"):
            Results(PROMPTS, file, resume)
    first.add(ANSWERED[0])
    first.close()
    failed = Results(PROMPTS, file, True)
    failed.add(ANSWERED[1] | {"error": "too long"})
    failed.close()
    again = Results(PROMPTS, file, True)
    assert list(again.rows) == [0] and again.todo == [1, 2], "a row that failed is tried again"
    with pytest.raises(ConfigError, match="being written by another process"):
        Results(PROMPTS, file, True)
    again.add(ANSWERED[1])
    again.close()
    assert [json.loads(line)["error"] for line in file.read_text().splitlines()] == [None, None]
    assert os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize("name", ["/dev/full", "/dev/zero", "pipe"])
def test_rows_go_to_regular_files_only(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="no regular file"):
        Results(PROMPTS, tmp_path / name, True)


def test_a_row_that_does_not_fit_does_not_count(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    rows = Results(PROMPTS, file, False)
    rows.add(ANSWERED[0])
    content = file.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match="No space left"):
            rows.add(ANSWERED[1])
        with pytest.raises(ConfigError, match="No space left"):
            save(tmp_path / "a.txt", "x")
    assert list(rows.rows) == [0] and file.read_bytes() == content
    assert os.listdir(tmp_path) == ["rows.jsonl"]
    rows.add(ANSWERED[1])
    assert file.read_bytes().count(b"\n") == 2


def test_ctrl_c_while_a_row_is_written_counts_what_is_in_the_file(tmp_path, monkeypatch):
    rows = Results(PROMPTS, tmp_path / "rows.jsonl", False)

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        rows.add(ANSWERED[0])
    assert list(rows.rows) == [0] and (tmp_path / "rows.jsonl").read_bytes().count(b"\n") == 1


def test_a_row_is_a_line_for_every_reader(tmp_path):
    text = "a\u2028b\u2029c\x85d\x0be\nf\r北京"
    rows = Results([text], tmp_path / "rows.jsonl", False)
    rows.add(row(0, text, None, None))
    [line] = (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["prompt"] == text and "北京" in line


def test_a_model_is_known_by_its_files(tmp_path, checkpoint):
    model = shutil.copytree(checkpoint(), tmp_path / "a")
    digest = identity.of_model(str(model))
    assert digest == identity.of_model(str(shutil.copytree(model, tmp_path / "b")))
    names = ["config.json", "chat_template.jinja", "generation_config.json", next(model.glob("*.safetensors")).name]
    for name in names:
        changed = shutil.copytree(model, tmp_path / name)
        content = bytearray((changed / name).read_bytes())
        content[-1] ^= 1
        (changed / name).write_bytes(content)
        assert identity.of_model(str(changed)) != digest, name


def test_save_is_all_or_nothing(tmp_path):
    save(tmp_path / "a.txt", "北京")
    assert (tmp_path / "a.txt").read_text("utf-8") == "北京" and os.listdir(tmp_path) == ["a.txt"]
    with pytest.raises(ConfigError, match="No such"):
        save(tmp_path / "nowhere/a.txt", "x")


# ---------------------------------------------------------------------- whole runs


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, checkpoint):
    """run(*argv) -> (exit code, stdout, stderr) of the command in an empty directory; tiny model, few tokens."""
    monkeypatch.chdir(tmp_path)
    small = ["--model", str(checkpoint(dtype="float32")), "--max-model-len", "256", "--max-tokens", "6"]

    def command(*argv: str) -> tuple[int, str, str]:
        kept = [word for pair in zip(small[::2], small[1::2]) if pair[0] not in argv for word in pair]
        code = predict.main([*kept, *argv], home=ROOT)
        out, err = capsys.readouterr()
        return code, out, err

    command.model = small[1]
    return command


def saved(tmp_path: Path) -> list[str]:
    [result] = ast.literal_eval((tmp_path / "text_generation_result.txt").read_text("utf-8"))
    return result["text_generation_text"]


def test_one_prompt(run, tmp_path):
    code, out, err = run("--temperature=0", "请介绍一下北京")
    [answer] = saved(tmp_path)
    assert code == 0 and out == f"'text_generation_text': [{answer!r}]\n"
    assert answer.startswith("请介绍一下北京") and len(answer) > len("请介绍一下北京")
    assert "1 prompt, 6 tokens" in err and "Traceback" not in err


def test_rows_resume_and_errors_in_rows(run, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("北京\n\n" + "long " * 100 + "\nwhy\n")
    code, _, err = run("--output", "rows.jsonl", "--predict_data", "prompts.txt", "--seed", "5")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()]
    assert code == 2, "two prompts have no answer"
    assert sorted(r["index"] for r in rows) == [0, 1, 2, 3]
    by_index = {r["index"]: r for r in rows}
    assert "empty" in by_index[1]["error"] and "500" in by_index[2]["error"] and "prompt 2 failed" in err
    good = by_index[0]
    assert good["error"] is None and good["prompt_tokens"] == 6 and good["finish_reason"] in ("stop", "length")
    assert saved(tmp_path)[3] == "why" + by_index[3]["text"] and "[error: " in saved(tmp_path)[1]
    whole = saved(tmp_path)

    lines = [json.dumps(by_index[i], ensure_ascii=False) for i in (1, 0)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + '\n{"index": 3, "pro', encoding="utf-8")
    code, _, err = run("--output", "rows.jsonl", "--resume", "--predict_data", "prompts.txt", "--seed", "5")
    assert code == 2 and "1 of 4 rows are in rows.jsonl already" in err, "a row that failed is tried again"
    assert saved(tmp_path) == whole, "the same answers as without the interruption"
    assert len((tmp_path / "rows.jsonl").read_text("utf-8").splitlines()) == 4

    file.write_text("北京\nwhy\n")
    for resumed in (["--output", "few.jsonl"], ["--output", "few.jsonl", "--resume"]):
        code, _, err = run(*resumed, "--predict_data", "prompts.txt")
    assert code == 0 and "loaded" not in err, "nothing to do, so no model is loaded"


def test_chat_uses_the_template_and_does_not_echo(run, tmp_path, monkeypatch):
    seen = []
    generate = LLM.generate
    monkeypatch.setattr(LLM, "generate", lambda *a, **k: seen.append(generate(*a, **k)) or seen[-1])
    code, _, _ = run("--chat", "--no-think", "--system", "Be brief.", "why?")
    [[output]] = seen
    assert code == 0 and saved(tmp_path) == [output.outputs[0].text]
    assert all(part in output.prompt for part in ("<|system|>", "Be brief.", "<|user|>", "why?", "<|assistant|>"))
    assert "</think>" in output.prompt


def test_control_tokens_in_a_message_are_text_where_that_is_asked_for(run, tmp_path, monkeypatch):
    lengths = {}
    for name in ("control", "text"):
        options = ["--chat", "--special-tokens-in-content", name, "--output", f"{name}.jsonl"]
        assert run(*options, "a <|user|> b")[0] == 0
        [line] = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        lengths[name] = json.loads(line)["prompt_tokens"]
        assert json.loads(line)["made_by"].get("special_tokens_in_content", "control") == name
    assert lengths["text"] > lengths["control"]
    code, _, err = run("--special-tokens-in-content", "text", "hi")
    assert code == 2 and "--special-tokens-in-content without --chat" in err
    code, _, err = run("--chat", "--special-tokens-in-content", "letters", "hi")
    assert code == 2 and "control or text" in err


def test_seeds_agree_in_the_guides_command(checkpoint, tmp_path):
    """It is greedy, as in MindSpore Transformers; with do_sample it is not."""
    words = ["--config", "configs/glm4_moe/predict_glm4_moe.yaml", "--run_mode", "predict", "--max_new_tokens", "12"]
    words += ["--pretrained_model_dir", str(checkpoint(dtype="float32")), "--use_parallel", "False"]
    jobs = {}
    for seed, sampled in (("0", False), ("1", False), ("1", True)):
        folder = tmp_path / f"{seed}{sampled}"
        folder.mkdir()
        argv = [*words, "--seed", seed, *["--do_sample", "True"] * sampled, "--predict_data", "请介绍一下北京"]
        command = [sys.executable, str(ROOT / "run_mindformer.py"), *argv]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        jobs[seed, sampled] = subprocess.Popen(command, cwd=folder, env=env, stdout=-1, stderr=-1, text=True)
    said = {key: (*job.communicate(timeout=120), job.returncode) for key, job in jobs.items()}
    assert [code for _, _, code in said.values()] == [0, 0, 0], said
    answers = {key: out for key, (out, _, _) in said.items()}
    assert answers["0", False] == answers["1", False] != answers["1", True]
    assert "answers are greedy" in said["0", False][1]


def test_defaults_of_the_checkpoint_are_weaker_than_keys(run, tmp_path, monkeypatch, checkpoint):
    model = tmp_path / "model"
    model.mkdir()
    for file in checkpoint(dtype="float32").iterdir():
        (model / file.name).symlink_to(file)
    (model / "generation_config.json").unlink()
    (model / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.6, "top_p": 0.9}')
    seen = []
    generate = LLM.generate
    monkeypatch.setattr(LLM, "generate", lambda *a, **k: seen.append(a[2]) or generate(*a, **k))
    common = ["hi", "--model", str(model)]
    for argv, temperature, top_p in (([], 0.6, 0.9), (["--top_p=0.5"], 0.6, 0.5), (["--do_sample=False"], 0.0, 0.9)):
        code, _, _ = run(*common, *argv)
        assert code == 0 and [(p.temperature, p.top_p) for p in seen[-1]] == [(temperature, top_p)]
    (model / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')
    for argv, temperature in (([], 0.0), (["--do_sample", "True"], 1.0), (["--temperature", "0.3"], 0.3)):
        run(*common, *argv)
        assert [p.temperature for p in seen[-1]] == [temperature]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--model", "/nowhere", "x"], "'/nowhere' does not exist"),
        (["--dtype", "float16", "x"], "dtype='float16'"),
        ([], "no prompt"),
        (["x", "--output", "/nowhere/rows.jsonl"], "/nowhere/rows.jsonl"),
        (["x", "--output", "/"], "--output /: Is a directory"),
        (["x", "--max-model-len", "1000000"], "max_model_len=1000000"),
    ],
)
def test_bad_input_gets_three_lines(run, argv, words):
    code, out, err = run(*argv)
    lines = err.strip().splitlines()[-3:]
    assert code == 2 and out == "" and "Traceback" not in err
    assert lines[0].startswith("glimmer predict: ") and words in lines[0]
    assert lines[1].startswith("  expected: ") and lines[2].startswith("  to do:    ")


def test_ranks_that_were_asked_for_different_things(run, monkeypatch):
    """Rank 0's word reaches this process as if it came from another machine."""
    other = {"tensor_parallel_size": 1, "max_model_len": 256, "seed": 7}
    monkeypatch.setattr("glimmer.parallel.Group.broadcast", lambda self, task: task | {"engine": other})
    code, _, err = run("hi", "--seed", "8")
    assert code == 2 and "seed=8, but 7 on rank 0" in err and "the same command" in err


def test_interruption_keeps_rows_and_says_how_to_go_on(run, tmp_path, monkeypatch):
    add = Results.add

    def add_then_interrupt(self, row):
        add(self, row)
        raise KeyboardInterrupt

    monkeypatch.setattr(Results, "add", add_then_interrupt)
    code, out, err = run("one", "two", "--output", "rows.jsonl")
    assert code == 130 and out == "" and "1 of 2 rows are in rows.jsonl" in err and "--resume" in err
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "text_generation_result.txt").exists()


def test_sampling_parameters_reach_other_ranks_unchanged(run, monkeypatch):
    """The task goes through JSON, as it does between processes."""
    sent = SamplingParams(logit_bias={5: -1.5, 7: 2.0}, stop=["x"], stop_token_ids=[9], temperature=0.3, max_tokens=2)
    seen, generate = [], LLM.generate
    monkeypatch.setattr(LLM, "default_sampling_params", lambda self: sent)
    monkeypatch.setattr(LLM, "generate", lambda *a, **k: seen.extend(a[2]) or generate(*a, **k))
    monkeypatch.setattr("glimmer.parallel.Group.broadcast", lambda self, task: json.loads(json.dumps(task)))
    code, _, err = run("hi", "--max-tokens", "2", "--seed", "3", "--do_sample", "True")
    assert code == 0, err
    assert seen == [replace(sent, seed=3 << 32)]


def sampled(monkeypatch) -> list[SamplingParams]:
    """The parameters of all prompts from now on."""
    seen: list[SamplingParams] = []
    generate = LLM.generate
    monkeypatch.setattr(LLM, "generate", lambda *a, **k: seen.extend(a[2]) or generate(*a, **k))
    return seen


@pytest.mark.parametrize(
    "home, argv, temperature",
    [
        (ROOT, ["hi"], 0),
        (None, ["hi"], 1),
        (None, ["--predict_data", "hi"], 0),
        (None, ["hi", "--max-new-tokens", "3"], 1),
        (ROOT, ["hi", "--do_sample", "True"], 1),
        (ROOT, ["hi", "--temperature", "0.5"], 0.5),
        (None, ["hi", "--do-sample", "False"], 0),
    ],
)
def test_the_guides_commands_are_greedy(checkpoint, tmp_path, monkeypatch, capsys, home, argv, temperature):
    """The checkpoint's generation_config.json has no do_sample and no temperature, as GLM-4.5's."""
    monkeypatch.chdir(tmp_path)
    seen = sampled(monkeypatch)
    model = ["--model", str(checkpoint(dtype="float32")), "--max-model-len", "64"]
    limit = [] if "--max-new-tokens" in argv else ["--max-tokens", "3"]
    assert predict.main([*model, *limit, *argv], home) == 0
    assert [params.temperature for params in seen] == [temperature]
    assert ("--do_sample True draws" in capsys.readouterr().err) == (temperature == 0 and "--do-sample" not in argv)


def test_conversations_raw_prompts_and_how_long_answers_are(run, tmp_path, monkeypatch):
    lines = [{"prompt": "why"}, {"messages": [{"role": "user", "content": "why"}]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = sampled(monkeypatch)
    code, _, err = run("p.jsonl", "--output", "rows.jsonl")
    assert code == 0 and [params.max_tokens for params in seen] == [6, 6]
    rows = sorted(map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines()), key=lambda row: row["index"])
    assert [row["prompt"] for row in rows] == ["why", lines[1]["messages"]]
    assert saved(tmp_path) == ["why" + rows[0]["text"], rows[1]["text"]]
    assert [row["finish_reason"] for row in rows] == ["length", "length"]
    assert "2 of 2 answers are cut off after 6 tokens (max_tokens): 0, 1; --max-tokens N allows more" in err
    assert "'finish_reason': ['length', 'length']" in (tmp_path / "text_generation_result.txt").read_text()
    seen.clear()
    monkeypatch.setattr(predict, "MAX_TOKENS", 5)
    argv = ["p.jsonl", "--model", run.model, "--max-model-len", "40"]
    assert predict.main(argv) == 0
    assert [params.max_tokens for params in seen] == [5, None], "a conversation is answered until the context ends"


def test_cut_answers_are_named_with_what_cut_them(run):
    _, _, err = run("why", "--max-model-len", "32", "--max-tokens", "100", "--ignore-eos")
    assert "the answer is cut off where the context is full (max_model_len); a larger --max-model-len" in err
    _, _, err = run("why", "--ignore-eos", "--quiet")
    [line] = err.splitlines()
    assert "the answer is cut off after 6 tokens (max_tokens); --max-tokens N allows more" in line


def test_several_answers_and_logprobs(run, tmp_path):
    code, out, _ = run("why", "--n", "3", "--logprobs", "2", "--output", "rows.jsonl", "--ignore-eos", "--seed", "1")
    [row] = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert code == 0 and len(row["outputs"]) == 3 and row["outputs"][0]["text"] == row["text"]
    assert saved(tmp_path) == ["why" + one["text"] for one in row["outputs"]] and out.count("'why") == 3
    assert len(row["logprobs"]) == row["completion_tokens"] and all(2 <= len(place) <= 3 for place in row["logprobs"])
    assert "add --output" in refusal("why", "--logprobs", "1")


def test_tools(run, tmp_path, monkeypatch):
    seen, render = [], LLM.render
    monkeypatch.setattr(LLM, "render", lambda *a, **k: seen.append(a) or render(*a, **k))
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    (tmp_path / "t.json").write_text(json.dumps(tools))
    code, _, err = run("why", "--chat", "--tools", "t.json", "--max-model-len", "1024")
    assert code == 0 and seen[0][2] == tools, err
    for content in ("", "{}", "[]", "[1]", "[" * 100_000):
        (tmp_path / "t.json").write_text(content)
        code, _, err = run("why", "--chat", "--tools", "t.json")
        assert code == 2 and "t.json holds no tools" in err
    assert "add --chat" in refusal("why", "--tools", "t.json")
    assert "add --tools" in refusal("why", "--chat", "--tool-choice", "f")


@pytest.mark.parametrize(
    ("choice", "said"), [("f", "<tool_call>f"), ("required", "<tool_call>f"), ("nobody", "one of the tools (f)")]
)
def test_tool_choice(run, choice, said):
    Path("t.json").write_text(json.dumps([{"type": "function", "function": {"name": "f", "parameters": {}}}]))
    words = ("--chat", "--no-think", "--tools", "t.json", "--tool-choice", choice, "--max-tokens", "8")
    code, out, _ = run("Hello", *words, "--model", str(DEMO), "--max-model-len", "1024")
    assert code == (2 if choice == "nobody" else 0) and said in out


@pytest.mark.parametrize("prompt", ["no file has such a name " * 20, "words/" * 500])
def test_a_prompt_that_can_be_no_path(run, prompt):
    code, out, err = run(prompt, "--max-model-len", "4000")
    assert code == 0 and prompt[:5] in out and "Traceback" not in err


def test_a_working_directory_that_cannot_be_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *a, **k: False)
    rows = tmp_path / "elsewhere.jsonl"
    code, out, err = run("why", "--output", str(rows))
    assert code == 0 and "'why" in out and f"answers are in {rows} only" in err
    assert os.listdir(tmp_path) == ["elsewhere.jsonl"]
    code, _, err = run("why")
    assert code == 2 and "cannot be written" in err


def test_answers_that_cannot_be_saved_are_printed(run, monkeypatch):
    def full(*args):
        raise ConfigError("no space", "space", "free some")

    monkeypatch.setattr(predict, "save", full)
    code, out, err = run("why")
    assert code == 2 and "'why" in out and "no space" in err


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("reason", [KeyboardInterrupt(), EngineError("a rank is lost", "all", "start again")])
@pytest.mark.parametrize("kept", [[], ["--output", "rows.jsonl"]])
def test_only_an_interrupted_generation_says_what_is_kept(run, monkeypatch, begun, reason, kept):
    def fail(*args, **how):
        raise reason

    monkeypatch.setattr(LLM, "generate" if begun else "__init__", fail)
    code, out, err = run("one", "--do_sample", "True", *kept)
    interrupted = isinstance(reason, KeyboardInterrupt)
    assert code == (130 if interrupted else 1) and out == ""
    word = "interrupted" if interrupted else "stopped"
    expected = [f"glimmer predict: {word}"] * interrupted
    if begun:
        what = "0 of 1 rows are in rows.jsonl; the same command with --resume answers the rest"
        what = what if kept else "no answer is kept (with --output FILE.jsonl those that are done would be)"
        expected = [f"glimmer predict: {word}; {what}"]
    said = [line for line in err.splitlines() if "loaded in" not in line]
    assert said[: len(expected)] == expected and len(said) == len(expected) + 3 * (not interrupted)


def test_ctrl_c_while_libraries_are_loading_is_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt  # as if somebody had just typed it")
    script, env = shutil.copy(ROOT / "run_mindformer.py", tmp_path), os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script, "hi"], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["predict", "bench", "doctor"])
def test_ctrl_c_while_a_command_is_loading_is_one_line(tmp_path, command):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt  # as if somebody had just typed it")
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    argv = [command, *["hi"] * (command == "predict")]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "glimmer", *argv], env=env, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"\nglimmer {command}: interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["predict", "bench"])
def test_sigterm_leaves_the_word_of_ctrl_c_and_ends_the_process(tmp_path, command):
    (tmp_path / "torch.py").write_text("import os\nos.kill(os.getpid(), 15)  # as if somebody had just sent it")
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    argv = [command, *["hi"] * (command == "predict"), "--model", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "glimmer", *argv], env=env, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (-15, "", f"glimmer {command}: interrupted\n")


def test_help_tells_of_every_name(capsys):
    assert predict.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in COMMAND.own:
        assert f"--{name.replace('_', '-')} " in out
    for name in (
        "config",
        "run_mode",
        "use_parallel",
        "predict_data",
        "predict_batch_size",
        "pretrained_model_dir",
        "parallel_config.data_parallel",
        "parallel_config.model_parallel",
        *mindformers.GENERATION,
    ):
        assert f"--{name}" in out
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.slow
def test_a_terminal_gets_bars(tmp_path, checkpoint):
    """stderr is a pseudo-terminal of 24 x 100 characters."""
    reader, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    model = str(checkpoint(dtype="float32"))
    command = [sys.executable, "-m", "glimmer", "predict", "--model", model, "--max-tokens=3", "hi"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, stdout=-1, stderr=terminal, text=True, timeout=120)
    os.close(terminal)
    shown = os.read(reader, 100_000).decode()
    assert "operations" not in shown
    os.close(reader)
    assert done.returncode == 0 and done.stdout.startswith("'text_generation_text': ['hi"), shown
    assert "loading: " in shown and "generating: " in shown and "tokens/s" in shown


def on_a_terminal(tmp_path: Path, *argv: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `glimmer predict` where both are the same pseudo-terminal."""
    reader, terminal = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "glimmer", "predict", *argv],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=terminal, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    while True:
        try:
            piece = os.read(reader, 1000)
        except OSError:  # nobody has the other end any more
            break
        shown += piece
    os.close(reader)
    _, err = process.communicate(timeout=60)
    return process.returncode, shown.decode().replace("\r\n", "\n"), err


@pytest.mark.slow
def test_a_terminal_gets_plain_text(tmp_path, checkpoint):
    model = ["--model", str(checkpoint(dtype="float32")), "--max-tokens", "5", "--temperature", "0"]
    code, out, err = on_a_terminal(tmp_path, *model, "hi", "--output", "rows.jsonl")
    assert code == 0, err
    assert out.rstrip("\n") == saved(tmp_path)[0].rstrip("\n") and out.startswith("hi")
    [kept] = map(json.loads, (tmp_path / "rows.jsonl").read_text("utf-8").splitlines())
    assert "hi" + kept["text"] == saved(tmp_path)[0] and kept["completion_tokens"] > 0
    code, out, err = on_a_terminal(tmp_path, *model, "hi", "why")
    assert code == 0 and out.rstrip("\n") == "\n\n".join(saved(tmp_path)).rstrip("\n")


# ---------------------------------------------------------------------- documentation


@pytest.mark.parametrize("page", ["mindformers.md", "mindformers.zh.md"])
def test_the_pages_list_what_the_tables_hold(page):
    text = (ROOT / "docs" / page).read_text("utf-8")
    listed = dict(re.findall(r"^<!-- (\w+) -->\n\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL))
    rows = {name: re.findall(r"^\| `([^`]+)`", body, re.MULTILINE) for name, body in listed.items()}
    assert sorted(rows["translated"]) == sorted(mindformers.TRANSLATED)
    assert sorted(rows["refused"]) == sorted(mindformers.REFUSED)
    assert sorted(re.findall(r"`([^`]+)`", listed["ignored"])) == sorted(mindformers.IGNORED)
    for option in re.findall(r"`--([a-z-]+)", listed["translated"]):
        assert option.replace("-", "_") in COMMAND.own
