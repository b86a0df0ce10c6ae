"""`glimmer chat`: in a real terminal (a pty), and through pipes, with a real server and the demo model."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import pytest

from glimmer.cli.chat import COMMANDS, Conversation, Talk
from glimmer.cli.chat_screen import History, harmless, split_blocks
from glimmer.cli.demo import TOOL
from glimmer.cli.main import main
from glimmer.errors import ConfigError


class Terminal:
    """`glimmer chat` in a pty of 100 columns."""

    def __init__(self, *words, home):
        self.master, slave = pty.openpty()
        env = os.environ | {
            "TERM": "xterm",
            "COLUMNS": "100",
            "LINES": "40",
            "HOME": str(home),
            "PROMPT_TOOLKIT_NO_CPR": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "glimmer", "chat", *words], stdin=slave, stdout=slave, stderr=slave, env=env,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self.seen, self.raw = "", b""

    def wait(self, pattern, timeout=60):
        """Wait until the terminal has shown something since the last wait."""
        deadline = time.monotonic() + timeout
        while not (found := re.search(pattern, self.seen, re.S)):
            left = deadline - time.monotonic()
            assert left > 0 and self.process.poll() is None, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.master], [], [], min(left, 0.2))[0]:
                piece = os.read(self.master, 1 << 16)
                self.raw += piece
                text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", piece)
                self.seen += text.decode(errors="replace")
        self.seen = self.seen[found.end() :]
        return found

    def type(self, text):
        os.write(self.master, text.encode())

    def end(self):
        self.wait(">")
        self.type("\x04")
        try:
            code = self.process.wait(20)
        finally:
            self.process.kill()
            os.close(self.master)
        return code


@pytest.mark.slow
def test_a_talk_in_a_terminal(server, tmp_path):
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([TOOL]))
    terminal = Terminal("--url", server.url, "--temperature", "0", home=tmp_path)
    terminal.wait("/help")
    terminal.type("What is 347 + 586?\r")
    terminal.wait("thought for")
    terminal.wait("933")
    terminal.wait("tokens/s")
    terminal.type("/thoughts\r")
    terminal.wait("carry 1")
    terminal.type("/set temperature warm\r")
    terminal.wait("a number")
    terminal.type('/set stop "open\r')
    terminal.wait("expected")
    terminal.type("/fly\r")
    terminal.wait("one of /help")
    terminal.type(f"/tools {tools}\r")
    terminal.wait("1 tools")
    terminal.type("/new\r")
    terminal.wait("a new conversation")
    terminal.type("巴黎今天天气怎么样？\r")
    terminal.wait("call of get_weather")
    terminal.wait("result of get_weather>")
    terminal.type("晴，21 度\r")
    terminal.wait("tokens/s")
    terminal.type(f"/save {tmp_path / 'talk.json'}\r")
    terminal.wait("saved")
    assert terminal.end() == 0
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [one["role"] for one in saved["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert json.loads(saved["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {"city": "巴黎"}
    history = tmp_path / ".local/state/glimmer/chat_history"
    assert "347 + 586" in history.read_text() and history.stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_only(server, tmp_path):
    terminal = Terminal("--url", server.url, "--temperature", "2", "--max_tokens", "900", home=tmp_path)
    terminal.wait("Ctrl-D ends")
    terminal.type("Tell me everything.\r")
    terminal.wait("everything[.].*(thinking|[a-z一-龥]{2})")
    terminal.type("\x03")
    terminal.wait("stopped|tokens/s", 20)
    terminal.type("\x03")  # at the prompt: nothing
    terminal.type("/help\r")
    terminal.wait("another answer")
    assert terminal.end() == 0


@pytest.mark.slow
def test_pipes(server, tmp_path):
    command = [sys.executable, "-m", "glimmer", "chat", "-", "--url", server.url, "--temperature", "0"]
    done = subprocess.run(command, input="What is 347 + 586?\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "933" in done.stdout and "<think>" not in done.stdout and done.stderr == ""
    cut = subprocess.run([*command, "--max-tokens", "2"], input="Hi", capture_output=True, text=True, timeout=60)
    assert cut.returncode == 0 and "cut" in cut.stderr
    with open("/dev/full", "w") as full:
        lost = subprocess.run(command, input="Hi", stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert lost.returncode == 1 and "No space left" in lost.stderr and "Traceback" not in lost.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, said",
    [
        (["--url", "ftp://x", "-p", "hi"], "http://HOST:PORT"),
        (["--url", "http://127.0.0.1:9", "-p", "hi"], "Connection refused"),
        (["--url", "http://127.0.0.1:9", "--threads", "1", "-p", "hi"], "without a server"),
        (["--temperature", "-1", "-p", "hi"], "temperature"),
        (["--tools", "nowhere", "-p", "hi"], "No such file"),
        (["/etc", "-p", "-"], "config.json"),
        (["nowhere", "-p", "hi"], "'nowhere' does not exist"),
        (["nowhere", "-p", "-"], "'nowhere' does not exist"),
        (["--temperature", "0", "-", "nowhere"], "'nowhere' does not exist"),
        (["--url", "http://127.0.0.1:9", "-"], "stdin is empty"),
        (["/dev/null", "-p", "hi"], "'/dev/null' is a file"),
        (["-p", ""], "empty"),
    ],
)
def test_what_is_refused(words, said, capfd):
    assert main(["chat", *words]) in (1, 2)
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    "text, whole",
    [
        ("", ""),
        ("a", ""),
        ("a\n", ""),
        ("a\n\nb", "a\n\n"),
        ("```\na\n\nb", ""),
        ("```\na\n\nb\n```\n\nc", "```\na\n\nb\n```\n\n"),
        ("````\n```\n\n````\n\nc", "````\n```\n\n````\n\n"),
        ("~~~\n```\n\n~~~\n\n", "~~~\n```\n\n~~~\n\n"),
        ("a\n\nb\n\nc", "a\n\nb\n\n"),
    ],
)
def test_blocks_of_markdown(text, whole):
    assert split_blocks(text) == (whole, text[len(whole) :])


def test_control_characters_are_shown_and_not_obeyed():
    assert harmless("a\x1b]0;title\x07b\tc\r\nd\x9b31m\x7f") == "a␛]0;title␇b\tc\nd\ufffd31m\ufffd"


def test_a_conversation_goes_back_and_on(tmp_path):
    talk = Conversation(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    talk.set_system("s")
    talk.set_system("t")
    assert [one["role"] for one in talk.messages] == ["system", "user", "assistant"]
    talk.save(tmp_path / "x.json")
    again = Conversation()
    again.load(tmp_path / "x.json")
    assert again.messages == talk.messages
    assert talk.drop_answer() and talk.messages[-1]["role"] == "user"
    assert not Conversation().drop_answer()


def test_a_saved_conversation_brings_its_tools(tmp_path):
    saved = Conversation(messages=[{"role": "user", "content": "a"}], tools=[TOOL])
    saved.save(tmp_path / "x.json")
    again = Conversation()
    again.load(tmp_path / "x.json")
    assert again.tools == [TOOL]
    (tmp_path / "x.json").write_text(json.dumps(saved.messages))
    again.load(tmp_path / "x.json")
    assert again.tools == [TOOL]  # a bare list of messages says nothing of tools


@pytest.mark.parametrize(
    "message, said",
    [
        ({"content": "a"}, "role"),
        ({"role": 5}, "role"),
        ({"role": "assistant", "tool_calls": 7}, "tool_calls"),
        ({"role": "assistant", "tool_calls": [{"id": "a"}]}, "function"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, "id"),
        ({"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": None}}]}, "name"),
    ],
)
def test_messages_in_no_known_form_are_refused(tmp_path, message, said):
    (tmp_path / "x.json").write_text(json.dumps([{"role": "user"}, message]))
    talk = Conversation(messages=[{"role": "user", "content": "kept"}])
    with pytest.raises(ConfigError, match=f"message 1: .*{said}"):
        talk.load(tmp_path / "x.json")
    assert talk.messages == [{"role": "user", "content": "kept"}]


def test_a_device_is_not_replaced_by_a_conversation(tmp_path):
    (tmp_path / "pipe").symlink_to(tmp_path / "fifo")
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "pipe"):
        with pytest.raises(ConfigError, match="no regular file"):
            Conversation().save(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "talk.json")
    Conversation().save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and json.loads((tmp_path / "talk.json").read_text())["messages"] == []


def test_a_history_that_cannot_be_written_stops_nothing(capsys):
    history = History("/dev/full")
    history.store_string("a")
    history.store_string("b")
    assert capsys.readouterr().err.count("not kept: /dev/full: No space left") == 1


def test_what_no_question_precedes_is_kept():
    greeting = [{"role": "assistant", "content": "Hello", "tool_calls": None}]
    talk = Conversation(messages=list(greeting))
    assert not talk.drop_answer() and talk.messages == greeting and talk.open_calls == []


@pytest.mark.slow
def test_ctrl_c_ends_a_single_question(server):
    words = ["-p", "Tell me everything.", "--url", server.url, "--temperature", "2", "--stop", "@@@@"]
    process = subprocess.Popen(
        [sys.executable, "-m", "glimmer", "chat", "--no-think", *words, "--presence-penalty", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        assert select.select([process.stdout], [], [], 60)[0]
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130 and "stopped" in said and "Traceback" not in said


def test_every_command_says_what_it_does():
    assert all(about and callable(do) and do.__qualname__.startswith(Talk.__name__) for about, do in COMMANDS.values())
