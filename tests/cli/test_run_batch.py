"""`glimmer run-batch`: OpenAI's batch files in, rows out, cut off at any moment and continued."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from glimmer.cli.main import main
from glimmer.cli.run_batch import read_requests
from glimmer.errors import ConfigError

CHAT = {"messages": [{"role": "user", "content": "What is 347 + 586?"}], "max_tokens": 8, "temperature": 0}


def request(name, body=CHAT, url="/v1/chat/completions", **others):
    return {"custom_id": name, "method": "POST", "url": url, "body": body, **others}


def write(path, requests):
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in requests))
    return str(path)


def rows(path):
    return {row["custom_id"]: row for row in map(json.loads, path.read_text().splitlines())}


@pytest.mark.slow
def test_rows_of_good_and_bad_requests_and_resume(server, tmp_path, capsys):
    completion = request("text", {"prompt": "Beijing\u2028is", "max_tokens": 3, "logprobs": 2}, "/v1/completions")
    bad = request("bad", CHAT | {"temperature": -1})
    source = write(tmp_path / "in.jsonl", [request("chat"), completion, bad, "", request("北京")])
    words = ["run-batch", "-i", source, "-o", str(tmp_path / "out.jsonl"), "--url", server.url]
    assert main([*words, "--concurrency", "2"]) == 1
    found = rows(tmp_path / "out.jsonl")
    assert set(found) == {"chat", "text", "bad", "北京"}
    status = {name: row["response"]["status_code"] for name, row in found.items()}
    assert status == {"chat": 200, "text": 200, "bad": 400, "北京": 200}
    assert found["bad"]["response"]["body"]["error"]["param"] == "temperature"
    assert found["chat"]["response"]["body"]["usage"]["completion_tokens"] == 8
    assert found["chat"]["error"] is None and len(found["text"]["response"]["body"]["choices"]) == 1

    assert main(words) == 2 and "is there already" in capsys.readouterr().err
    write(tmp_path / "in.jsonl", [request("chat"), completion, request("bad"), request("北京"), request("new")])
    with open(tmp_path / "out.jsonl", "a") as file:
        file.write('{"custom_id": "new", "resp')  # cut off
    assert main([*words, "--resume"]) == 0
    again = rows(tmp_path / "out.jsonl")
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(again) == 5
    assert again["chat"] == found["chat"] and again["bad"]["response"]["status_code"] == 200
    assert main([*words, "--resume"]) == 0 and rows(tmp_path / "out.jsonl") == again


@pytest.mark.slow
def test_its_own_server_ends_with_it_even_if_it_is_killed(tmp_path):
    source = write(tmp_path / "in.jsonl", [request(str(i), CHAT | {"max_tokens": 500}) for i in range(4)])
    out = tmp_path / "out.jsonl"
    words = ["run-batch", "-i", source, "-o", str(out), "--max-model-len", "1024", "--threads", "1"]
    command = [sys.executable, "-m", "glimmer", *words, "--concurrency", "1"]
    marked = os.environ | {"BATCH_OF_A_TEST": str(tmp_path)}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=marked)
    deadline = time.monotonic() + 60
    while not out.exists() or not out.read_text().count("\n"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    deadline = time.monotonic() + 20
    while survivors(str(tmp_path)):
        assert time.monotonic() < deadline, survivors(str(tmp_path))
        time.sleep(0.1)
    assert subprocess.run([*command, "--resume"], timeout=120, env=marked).returncode == 0
    assert set(rows(out)) == set("0123")
    assert not survivors(str(tmp_path))


def survivors(mark):
    """Processes that carry the mark in their environment."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/environ", "rb") as file:
                if f"BATCH_OF_A_TEST={mark}".encode() in file.read():
                    found.append(process)
        except OSError:
            continue
    return found


def test_only_a_new_line_ends_a_request(tmp_path):
    prompts = ["a\u2028b", "a\u2029b", "a\x85b", "a\x7fb"]
    lines = [
        json.dumps(request(str(number), {"prompt": prompt}, "/v1/completions"), ensure_ascii=False)
        for number, prompt in enumerate(prompts)
    ]
    (tmp_path / "in.jsonl").write_text("\r\n".join(lines), newline="")
    assert [one["body"]["prompt"] for one in read_requests(tmp_path / "in.jsonl")] == prompts


@pytest.mark.slow
def test_ctrl_c_waits_for_no_answer_of_a_server(server, tmp_path):
    long = {"prompt": "x", "max_tokens": 3500, "ignore_eos": True}
    source = write(tmp_path / "in.jsonl", [request(str(number), long, "/v1/completions") for number in range(64)])
    words = ["run-batch", "-i", source, "-o", str(tmp_path / "out.jsonl"), "--url", server.url]
    # As a shell's foreground job has it: a background job of a script would ignore SIGINT.
    handler = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    process = subprocess.Popen([sys.executable, "-m", "glimmer", *words], stderr=subprocess.DEVNULL, **handler)
    try:
        deadline = time.monotonic() + 60
        while not re.search(r"^vllm:num_requests_running\S* [1-9]", server.get("/metrics").text, re.M):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    finally:
        process.kill()


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "line 2"),
        ("[]", "no JSON object"),
        ({"url": "/v1/completions", "body": {}}, "custom_id is no text"),
        (request(""), "custom_id is no text"),
        (request("b", method="GET"), "method is 'GET'"),
        (request("b", url="/v1/embeddings"), "/v1/embeddings"),
        (request("b", body=[]), "body is no JSON object"),
        (request("b", body=CHAT | {"stream": True}), "stream"),
        (request("a"), "lines 1 and 2"),
        ('{"custom_id": "b", "custom_id": "c"}', "line 2"),
        ('{"custom_id": ' + "9" * 5000 + "}", "line 2"),
        ("[" * 5000, "line 2"),
    ],
)
def test_the_whole_input_is_checked_first(tmp_path, line, said):
    write(tmp_path / "in.jsonl", [request("a"), line])
    with pytest.raises(ConfigError, match=said):
        read_requests(tmp_path / "in.jsonl")


@pytest.mark.parametrize(
    "words, said",
    [
        (["-o", "x"], "no input_file"),
        (["-i", "x"], "no output_file"),
        (["-i", "nowhere", "-o", "out"], "No such file"),
        (["-i", "empty", "-o", "out"], "no request"),
        (["-i", ".", "-o", "out"], "directory"),
        (["-i", "in", "-o", "/dev/full"], "no regular file"),
        (["-i", "in", "-o", "no/where"], "No such file"),
        (["-i", "in", "-o", "locked"], "another process"),
        (["-i", "in", "-o", "out", "--url", "http://127.0.0.1:9", "--threads", "1"], "without a server"),
        (["-i", "in", "-o", "out", "--url", "http://127.0.0.1:9"], "Connection refused"),
        (["-i", "in", "-o", "out", "nowhere"], "before it was ready"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, capfd, words, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in", [request("a")])
    (tmp_path / "empty").write_text("\n")
    with open(tmp_path / "locked", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(["run-batch", *words]) in (1, 2)
    assert said in capfd.readouterr().err
    assert not (tmp_path / "out").exists() or not (tmp_path / "out").read_text()


def test_a_name_that_no_file_can_have(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in", [request("a")])
    (tmp_path / "job.yaml").write_text('output_file: "a\\0b"\n')
    assert main(["run-batch", "-i", "in", "--url", "http://127.0.0.1:9", "--config", "job.yaml"]) == 2
    assert "NUL" in capsys.readouterr().err
