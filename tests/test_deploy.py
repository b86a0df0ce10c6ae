"""The examples in deploy/: their flags are the server's, their YAML is YAML, and nginx balances as its file says."""

import json
import re
import shlex
import shutil
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import yaml

from glimmer.cli.serve import COMMAND

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")


def documents(name):
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def words_of(name):
    """The words after `glimmer serve` in a file."""
    if name == "Dockerfile":
        entry, command = re.findall(r"^(?:ENTRYPOINT|CMD) (\[.*\])$", (DEPLOY / name).read_text(), re.M)
        return [*json.loads(entry)[2:], *json.loads(command)]
    if name == "kubernetes.yaml":
        return documents(name)[0]["spec"]["template"]["spec"]["containers"][0]["args"]
    if name == "leader-worker-set.yaml":
        node = documents(name)[0]["spec"]["leaderWorkerTemplate"]
        assert node["leaderTemplate"]["spec"] == node["workerTemplate"]["spec"]
        text = node["leaderTemplate"]["spec"]["containers"][0]["args"][0]
    else:
        text = (DEPLOY / name).read_text().replace("\\\n", " ")
        text = re.search(r"^ExecStart=(.*)$", text, re.M)[1]
    return shlex.split(text.partition("glimmer serve ")[2])


@pytest.mark.parametrize("name", ["Dockerfile", "glimmer.service", "kubernetes.yaml", "leader-worker-set.yaml"])
def test_the_flags_are_those_of_the_server(name):
    typed, words, _ = COMMAND.read_command_line(words_of(name))
    assert set(typed) >= {"model"} and not words
    seconds = typed.get("shutdown_timeout", "30")
    text = (DEPLOY / name).read_text()
    waits = re.findall(r"(?:TimeoutStopSec=|terminationGracePeriodSeconds: )(\d+)", text)
    assert all(int(wait) > float(seconds) for wait in waits)


def test_probes_are_paths_of_the_server():
    container = documents("kubernetes.yaml")[0]["spec"]["template"]["spec"]["containers"][0]
    paths = {name: container[name]["httpGet"]["path"] for name in container if name.endswith("Probe")}
    assert paths == {"startupProbe": "/health", "livenessProbe": "/health", "readinessProbe": "/ready"}


@pytest.mark.slow
@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_nginx_balances_and_streams(server, tmp_path):
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=llm", "-days", "1",
         "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = (DEPLOY / "nginx.conf").read_text()
    text = text.replace("10.0.0.1:8000", server.url.partition("//")[2]).replace("10.0.0.2:8000", "127.0.0.1:9")
    text = text.replace("listen 443", f"listen 127.0.0.1:{port}")
    text = re.sub(r"/etc/ssl/\S+\.pem", str(certificate), text)
    text = re.sub(r"/etc/ssl/\S+\.key", str(key), text)
    folders = " ".join(
        f"{name}_temp_path {tmp_path / name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    whole = (
        f"daemon off; pid {tmp_path / 'pid'}; error_log stderr; events {{}} http {{ access_log off; {folders} {text} }}"
    )
    (tmp_path / "nginx.conf").write_text(whole)
    process = subprocess.Popen([NGINX, "-c", str(tmp_path / "nginx.conf")], stderr=subprocess.PIPE, text=True)
    try:
        url = f"https://127.0.0.1:{port}"
        with httpx.Client(verify=False, timeout=30) as client:
            deadline = time.monotonic() + 20
            while True:
                try:
                    assert client.get(f"{url}/health").status_code == 200
                    break
                except httpx.TransportError:
                    assert process.poll() is None and time.monotonic() < deadline
                    time.sleep(0.05)
            assert client.get(f"{url}/metrics").status_code == 403
            body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "ignore_eos": True}
            for user in range(6):  # some of them hash to the server that is not there
                answer = client.post(f"{url}/v1/chat/completions", json=body, headers={"x-api-key": str(user)})
                assert answer.status_code == 200, answer.text
            with client.stream(
                "POST", f"{url}/v1/chat/completions", json=body | {"stream": True, "max_tokens": 900}
            ) as answer:
                pieces = [time.monotonic() for line in answer.iter_lines() if line.startswith("data: {")]
            # As they come, and not all at the end. How many there are depends on the machine's load: a server that
            # waits for a processor sends what has come meanwhile as one piece.
            assert len(pieces) > 2 and pieces[-1] - pieces[0] > 0.05
    finally:
        process.terminate()
        process.wait(10)
        process.stderr.close()
