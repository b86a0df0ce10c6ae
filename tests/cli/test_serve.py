"""The settings of `glimmer serve`: names of other servers, refusals before anything is loaded, TLS, prefixes."""

import re
import shutil
import socket
import ssl
import subprocess
import warnings

import httpx
import pytest
from servers import Server

from glimmer.cli import serve
from glimmer.cli.main import main
from glimmer.cli.options import SERVER
from glimmer.errors import ConfigError
from glimmer.mindformers import launch
from glimmer.server import http_process
from glimmer.server.settings import Keys, ServerConfig

OPENSSL = shutil.which("openssl")


@pytest.mark.parametrize(
    "words, setting, value",
    [
        ("--api-key a --api-key b", "api_key", ["a", "b"]),
        ("--served-model-name x --alias y", "served_model_name", ["x", "y"]),
        ("--max-body-bytes 1MB", "max_body_bytes", 1 << 20),
        ("--max-queued-requests 7", "max_queue_requests", 7),
        ("--shutdown-timeout 2.5", "shutdown_timeout", 2.5),
        ("-np 4 --ctx-size 512 -tp 2", "max_model_len", 512),
    ],
)
def test_names_and_kinds(words, setting, value):
    assert serve.COMMAND.read(["DIR", *words.split()]).take(setting) == value


def test_the_environment_and_flags_that_are_not_needed(monkeypatch, capsys):
    monkeypatch.setenv("GLIMMER_API_KEY", "secret")
    monkeypatch.setenv("GLIMMER_PORT", "9000")
    words = "--jinja --reasoning-parser glm45 --enable-auto-tool-choice --tool-call-parser glm47 --trust-remote-code"
    settings = serve.COMMAND.read(["DIR", *words.split()])
    assert settings.fields(SERVER) == {"api_key": ["secret"], "port": 9000} and settings.take("model") == "DIR"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "reasoning_parser" in said and "secret" not in said


@pytest.mark.parametrize(
    "words",
    ["--port 70000", "--on-engine-death hope", "--ssl-certfile x", "--root-path x", "--api-key @/no/such/file",
     "--max-queue-requests 0", "--fly", "--keep-alive nan", "--api-key ''", "a b", "/no/such/model", "/etc"],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_loaded(words, capsys):
    assert main(["serve", *words.replace("''", "").split(" ")]) == 2
    said = capsys.readouterr().err
    assert "expected:" in said and "listening" not in said


def test_keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# comment\n one \n\n")
    keys = Keys(["two", f"@{file}"])
    assert [keys.open_with(key) for key in ("one", "two", "# comment", "", "on")] == [True, True, False, False, False]
    assert not Keys([]) and keys
    file.write_text("\n")
    with pytest.raises(ConfigError, match="no key in"):
        Keys([f"@{file}"])


def test_several_ranks_are_started_by_the_launcher():
    alone = serve.command_for({"model": "DIR"})
    several = serve.command_for({"model": "DIR", "tensor_parallel_size": 2})
    assert launch.parse(several[3:]).worker_num == 2 and several[1:3] == ["-m", "glimmer.mindformers"]
    assert alone[-2:] == ["{socket}", '{"model": "DIR"}'] and ServerConfig().host == "127.0.0.1"


def test_certificates_that_are_none(tmp_path, capsys):
    junk = tmp_path / "junk.pem"
    junk.write_text("-----BEGIN CERTIFICATE-----\njunk\n")
    for file in (junk, tmp_path, tmp_path / "absent.pem"):
        assert main(["serve", "--port", "0", "--ssl-certfile", str(file), "--ssl-keyfile", str(file)]) == 2
        said = capsys.readouterr().err
        assert "PEM" in said and "expected:" in said and "Traceback" not in said and "listening" not in said


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """(certificate, its key, another key), PEM files."""
    if OPENSSL is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("certificates")
    files = certificate, key, other = [folder / name for name in ("c.pem", "k.pem", "other.pem")]
    curve = [OPENSSL, "ecparam", "-name", "prime256v1", "-genkey", "-noout"]
    for command in (
        [*curve, "-out", key],
        [*curve, "-out", other],
        [OPENSSL, "req", "-x509", "-key", key, "-out", certificate, "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1"],
    ):  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=30)
    return files


def test_a_key_of_another_certificate(certificates, capsys):
    certificate, _, other = map(str, certificates)
    assert main(["serve", "--port", "0", "--ssl-certfile", certificate, "--ssl-keyfile", other]) == 2
    said = capsys.readouterr().err
    assert "PEM" in said and other in said and "listening" not in said


@pytest.mark.slow
def test_https_below_a_prefix(certificates):
    """One server for both: its own TLS, and a proxy's prefix, which is in a request's path or is not."""
    certificate, key = map(str, certificates[:2])
    words = ["--ssl-certfile", certificate, "--ssl-keyfile", key, "--root-path", "/llm/", "--api-key", "secret"]
    with Server(*words) as server:
        assert re.fullmatch(r"https://127.0.0.1:\d+/llm", server.url)
        host = server.url.removesuffix("/llm")
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        with httpx.Client(verify=ssl.create_default_context(cafile=certificate), timeout=60) as client:
            for url in (host, server.url):
                assert client.get(f"{url}/health").status_code == 200  # and needs no key
                page = client.get(f"{url}/")
                assert page.status_code == 200 and client.get(page.url.join("web/main.js")).status_code == 200
                refused = client.post(f"{url}/v1/messages", json={})
                assert refused.status_code == 401 and refused.json()["type"] == "error"  # Anthropic's shape
                refused = client.post(f"{url}/v1/messages", json={}, headers={"x-api-key": "secret"})
                assert refused.status_code == 400 and refused.json()["type"] == "error"
                answer = client.post(f"{url}/v1/chat/completions", json=body, headers={"x-api-key": "secret"})
                assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] > 0
                assert client.get(f"{url}/nothing", headers={"x-api-key": "secret"}).status_code == 404
            alone = client.get(server.url)
            assert alone.is_redirect and alone.headers["location"] == "/llm/"
            assert client.get(f"{server.url}more/v1/models", headers={"x-api-key": "secret"}).status_code == 404
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")  # nobody has vouched for this certificate
        port = int(host.rpartition(":")[2])
        for version, spoken in ((ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True)):
            assert speaks(port, version) == spoken, version


def speaks(port: int, version: ssl.TLSVersion) -> bool:
    """Whether the server on this port greets a client that knows no newer version of TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that is what the test is about
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, version
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        try:
            with context.wrap_socket(plain):
                return True
        except ssl.SSLError as error:
            assert "NO_PROTOCOLS" not in str(error)  # the server has refused, and not this client
            return False


def test_a_socket_s_path_that_another_has(tmp_path, capsys):
    path, file = tmp_path / "http.sock", tmp_path / "notes.txt"
    file.write_text("not a socket")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        for taken in (path, file):
            assert main(["serve", "--uds", str(taken)]) == 2
            assert "cannot be listened on" in capsys.readouterr().err
    http_process._give_way(str(path))  # whoever listened there was killed
    assert not path.exists() and file.read_text() == "not a socket"
