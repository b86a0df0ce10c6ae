"""Packed files: the same bits as loading gives, whatever stops the writer, and no wrong numbers from a damaged one."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glimmer import LLM, SamplingParams
from glimmer.backends import selection
from glimmer.backends.files import PackedFiles
from glimmer.checkpoint import packed_file
from glimmer.checkpoint.packed_file import Form, PackedFile
from glimmer.cli.main import main
from glimmer.errors import CheckpointError, ConfigError
from glimmer.model.packed import open_weights, prepare
from glimmer.model_config import ModelConfig

TOKENS = [5, 60, 200, 7, 31, 90, 250, 3, 64, 128, 17, 99, 250, 251, 40, 8]
PARAMS = SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=5, ignore_eos=True)

pytestmark = pytest.mark.skipif(
    not isinstance(selection.choose(selection.HOST), PackedFiles), reason="packed files are the kernels'"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GLIMMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(checkpoint, tmp_path):
    """model(**variant) -> a checkpoint of its own, which may be changed."""
    return lambda **variant: shutil.copytree(checkpoint(**variant), tmp_path / "model")


def pack(model: Path, quantization: str | None = None, group_size: int | None = None, out: Path | None = None) -> Path:
    config = ModelConfig.load(str(model))
    form = Form.of("bfloat16", quantization, group_size)
    return prepare(model, config, form, selection.choose(selection.HOST, 2), out)


def load(model: Path, **settings) -> LLM:
    return LLM(str(model), max_model_len=64, max_num_seqs=4, dtype="bfloat16", **settings)


def answer(llm: LLM) -> str:
    """The tokens and log-probabilities of an answer, to the last bit."""
    (output,) = llm.generate({"prompt_token_ids": TOKENS}, PARAMS)
    return repr([output.outputs[0].token_ids, output.prompt_logprobs])


def answers(model: Path, **settings) -> str:
    with load(model, **settings) as llm:
        return answer(llm)


def is_mapped(directory: Path) -> bool:
    return str(directory.resolve()) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    "variant, settings",
    [
        ({}, {}),
        ({"fp8": True, "mtp": "full"}, {}),
        ({"attention_bias": False, "use_qk_norm": True}, {"quantization": "int8"}),
        ({"moe_intermediate_size": 37, "intermediate_size": 101, "mtp": "without_copies"}, {"quantization": "int4"}),
        ({"hidden_size": 128, "n_routed_experts": 12}, {"quantization": "int4", "group_size": 64}),
    ],
    ids=str,
)
def test_what_is_mapped_computes_what_is_loaded(variant, settings, model):
    directory = model(**variant)
    before = answers(directory, **settings)
    packed = pack(directory, **settings)
    with load(directory, **settings) as llm:
        assert is_mapped(packed)
        assert answer(llm) == before


def test_nothing_is_copied(model):
    """The pages of the mapped weights are clean and the file's own: processes share them."""
    packed = pack(model())
    with load(packed.parent) as llm:
        answer(llm)
        maps = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
        ours = [one for one in maps if str(packed) in one]
        size, resident, dirty = (
            sum(int(found) for one in ours for found in re.findall(rf"(?m)^{name}: +(\d+)", one))
            for name in ("Size", "Rss", "Private_Dirty")
        )
        assert resident >= size - 8 and dirty == 0


def test_one_that_is_stale_is_named_and_not_used(model, caplog):
    directory = model(index=False)
    packed = pack(directory)
    weights = load_file(directory / "model.safetensors")
    save_file({name: values * 2 for name, values in weights.items()}, directory / "model.safetensors")
    with caplog.at_level(logging.WARNING, "glimmer"), load(directory) as llm:
        assert not is_mapped(packed)
        changed = answer(llm)
    (warning,) = [record.getMessage() for record in caplog.records if "packed" in record.getMessage()]
    assert str(packed) in warning and "model.safetensors" in warning
    assert pack(directory) == packed
    with load(directory) as llm:
        assert is_mapped(packed) and answer(llm) == changed
    assert len(list(packed.glob("weights-*.bin"))) == 1, "the older one is gone"


def damage(packed: Path, how: str) -> None:
    (data,) = packed.glob("weights-*.bin")
    manifest = packed / packed_file.MANIFEST
    if how == "truncated":
        os.truncate(data, data.stat().st_size - 4096)
    elif how == "gone":
        data.unlink()
    elif how == "manifest":
        manifest.write_text(manifest.read_text().replace('"begin": 4096', '"begin": 8192', 1))
    elif how == "no JSON":
        manifest.write_bytes(manifest.read_bytes()[:100])
    elif how == "version":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 99}))


@pytest.mark.parametrize("how", ["truncated", "gone", "manifest", "no JSON", "version"])
def test_one_that_is_damaged_is_named_and_not_used(how, model, caplog):
    directory = model()
    before, packed = answers(directory), pack(directory)
    damage(packed, how)
    with caplog.at_level(logging.WARNING, "glimmer"):
        assert answers(directory) == before
    assert [r for r in caplog.records if str(packed) in r.getMessage() and "glimmer prepare" in r.getMessage()]


@pytest.mark.parametrize("place", [0.01, 0.5, 0.99])
def test_another_byte_is_found_before_anything_is_computed(place, model):
    packed = pack(model())
    (data,) = packed.glob("weights-*.bin")
    at = int(data.stat().st_size * place)
    with open(data, "r+b") as file:
        # A byte of a section, not of the padding behind it.
        sections = PackedFile(packed).sections()
        section = max((p for p in sections if p.begin <= at), key=lambda p: p.begin)
        file.seek(section.begin)
        byte = file.read(1)
        file.seek(section.begin)
        file.write(bytes([byte[0] ^ 16]))
    with pytest.raises(CheckpointError, match=r"has other bytes in .* than were written"):
        load(packed.parent)


def test_a_file_that_shrinks_ends_the_request_and_not_the_process(model):
    directory = model()
    packed = pack(directory)
    (data,) = packed.glob("weights-*.bin")
    with load(directory) as llm:
        answer(llm)
        os.truncate(data, 4096)
        (output,) = llm.generate({"prompt_token_ids": TOKENS}, PARAMS)
        assert output.outputs[0].finish_reason == "error"
        assert "has shrunk, or a part of it cannot be read" in str(output.error)
    data.unlink()
    assert answers(directory), "the process goes on"


LIMITED = """
import resource, sys
from glimmer import LLM
from glimmer.errors import CheckpointError
from glimmer.model.packed import PackedLoader

load = PackedLoader.load

def limited(self, *given):  # after memory has been divided
    used = int(open("/proc/self/statm").read().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + 65536, resource.RLIM_INFINITY))
    load(self, *given)

PackedLoader.load = limited
try:
    LLM(sys.argv[1], max_model_len=64, max_num_seqs=4)
except CheckpointError as error:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(error)
"""


@pytest.mark.slow
def test_a_limit_of_addresses_is_named(model):
    packed = pack(model())
    command = [sys.executable, "-c", LIMITED, str(packed.parent)]
    done = subprocess.run(command, timeout=120, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot be mapped" in done.stdout and "ulimit -v" in done.stdout


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from glimmer.backends import selection
from glimmer.backends.files import PackedFiles
from glimmer.checkpoint import packed_file
from glimmer.model.packed import prepare
from glimmer.model_config import ModelConfig

packed_file.SYNCED = 1
model, layers = Path(sys.argv[1]), int(sys.argv[2])
written = packed_file.PackedWriter.finish_layer

def finish_layer(self):
    global layers
    written(self)
    layers -= 1
    if layers == 0:
        os.pwrite(self._file, b"a part of the next layer", self.end)
        os.write(self._journal, b'{"layers": {"half a li')
        os.kill(os.getpid(), signal.SIGKILL)

packed_file.PackedWriter.finish_layer = finish_layer
prepare(model, ModelConfig.load(str(model)), packed_file.Form("bfloat16"), selection.choose(selection.HOST, 1))
"""


@pytest.mark.slow
def test_a_writer_that_was_killed_is_gone_on_with(model, monkeypatch):
    directory = model()
    whole = pack(directory)
    wanted = next(whole.glob("weights-*.bin")).read_bytes()
    shutil.rmtree(whole)
    for _ in range(2):
        command = [sys.executable, "-c", INTERRUPTED, str(directory), "7"]
        assert subprocess.run(command, timeout=120, check=False).returncode == -signal.SIGKILL
        assert not (whole / packed_file.MANIFEST).exists()
    added: list[str] = []
    add = packed_file.PackedWriter.add
    monkeypatch.setattr(
        packed_file.PackedWriter, "add", lambda self, layer, *rest: (added.append(layer), add(self, layer, *rest))
    )
    assert pack(directory) == whole
    assert len(set(added)) == len(PackedFile(whole).layers) - 14, "what was written before is kept"
    assert next(whole.glob("weights-*.bin")).read_bytes() == wanted
    assert {path.name for path in whole.iterdir()} >= {packed_file.MANIFEST}
    assert not (whole / packed_file.JOURNAL).exists()


HEAD = {"head": None, "data": "weights-01234567.bin"}  # None: that of the packed file


@pytest.mark.parametrize(
    "lines",
    [
        [[]],
        [5],
        ["x" * 100_000],
        [{}],
        [HEAD | {"head": 1}],
        [HEAD | {"data": "../outside.bin"}, {"layers": {}, "end": 4096}],
        [HEAD | {"data": 5}, {"layers": {}, "end": 4096}],
        [HEAD, {"layers": {}}],
        [HEAD, {"layers": {}, "end": "x"}],
        [HEAD, {"layers": {}, "end": -4096}],
        [HEAD, {"layers": {}, "end": 1 << 60}],
        [HEAD, {"layers": [1], "end": 4096}],
        [HEAD, {"layers": {"norm": 1}, "end": 4096}],
        [HEAD, {"layers": {"norm": {"weight": {"begin": 0}}}, "end": 4096}],
        [HEAD, 7],
    ],
    ids=lambda lines: str(lines)[:60],
)
def test_a_damaged_journal_is_gone_on_with_as_far_as_it_is_whole(model, tmp_path, lines):
    """From the beginning here; nothing is written outside."""
    directory, target = model(), tmp_path / "out" / "packed"
    target.mkdir(parents=True)
    (tmp_path / "out" / "outside.bin").write_bytes(bytes(8192))
    (target / HEAD["data"]).write_bytes(bytes(8192))
    source = packed_file.source_of(directory, ModelConfig.load(str(directory)).quantization_config)
    head = packed_file.head(Form("bfloat16"), selection.choose(selection.HOST).packed_layout, source)
    written = [
        line | {"head": head} if isinstance(line, dict) and line.get("head", 0) is None else line for line in lines
    ]
    (target / packed_file.JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in written))
    assert pack(directory, out=target) == target
    assert (tmp_path / "out" / "outside.bin").read_bytes() == bytes(8192)
    (data,) = target.glob("weights-*.bin")
    assert data.read_bytes() == next(pack(directory).glob("weights-*.bin")).read_bytes()


def test_files_of_others_are_not_written_over(model, tmp_path):
    """Neither another model's nor the checkpoint's own; what prepare has written may be written again."""
    directory, other = model(), tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("another model's")
    link = tmp_path / "link"
    link.symlink_to(directory)
    before = sorted(directory.iterdir())
    for out in (other, directory, link):
        with pytest.raises(ConfigError, match="files of its own"):
            pack(directory, out=out)
    assert sorted(directory.iterdir()) == before
    assert (other / "config.json").read_text() == "another model's" and len(list(other.iterdir())) == 1
    assert pack(directory, out=tmp_path / "new") == pack(directory, out=tmp_path / "new")


@pytest.mark.parametrize("name", [packed_file.LOCK, "config.json", packed_file.MANIFEST, ""])
def test_what_cannot_be_written_is_named(model, tmp_path, name):
    """A directory in a file's place; a file in the directory's."""
    directory, out = model(), tmp_path / "out"
    if name:
        (out / name).mkdir(parents=True)
        (out / packed_file.JOURNAL).touch()  # so that it is one of ours
    else:
        out.touch()
    with pytest.raises(CheckpointError, match=r"cannot be written: (Is a directory|File exists)"):
        pack(directory, out=out)


def test_a_manifest_that_names_another_file_is_damaged(model):
    """Be it one outside, which would be mapped, or removed when the packed file is made again."""
    packed = pack(model())
    table = json.loads((packed / packed_file.MANIFEST).read_text())
    outside = packed.parent / "weights-01234567.bin"
    outside.write_bytes(next(packed.glob("weights-*.bin")).read_bytes())
    del table["digest"]
    for data in ("../weights-01234567.bin", str(outside), "packed.lock", 5):
        table["data"] = data
        whole = table | {"digest": packed_file._digest(table)}
        (packed / packed_file.MANIFEST).write_text(json.dumps(whole))
        with pytest.raises(CheckpointError, match="as its data"):
            PackedFile(packed)
    assert pack(packed.parent) == packed and outside.exists()
    PackedFile(packed).close()


def test_what_is_there_and_cannot_be_used_is_named(model, caplog):
    """By a backend of another layout, by processes that share the model, or while it is not finished."""
    directory = model()
    packed, config, form = pack(directory), ModelConfig.load(str(directory)), Form("bfloat16")
    kernels, torches = selection.choose(selection.HOST), selection.choose(selection.HOST, backend="reference")
    (packed / packed_file.JOURNAL).touch()  # as an interrupted writer leaves it, that makes it again
    for backend, size, make, reason in (
        (torches, 1, False, "backend 'reference' has another layout"),
        (torches, 1, True, "backend 'reference' has another layout"),
        (kernels, 2, False, "of which each of 2 processes computes with a part"),
        (kernels, 1, False, "it is not finished"),
    ):
        if "finished" in reason:
            (packed / packed_file.MANIFEST).unlink()
        caplog.clear()
        with (
            caplog.at_level(logging.WARNING, "glimmer"),
            open_weights(directory, config, form, backend, size, make) as found,
        ):
            assert not isinstance(found, PackedFile)
        (warning,) = [record.getMessage() for record in caplog.records]
        assert str(packed) in warning and "is not used" in warning and reason in warning


def test_one_in_another_form_is_named(model, caplog):
    """Once, beside the model or in the cache directory; and not where there is one in the form that is asked for."""
    directory = model()
    int8, config, kernels = pack(directory, "int8"), ModelConfig.load(str(directory)), selection.choose(selection.HOST)
    for place in (int8, packed_file.places(directory, Form("bfloat16"))[1].parent / int8.name):
        if place != int8:
            shutil.move(int8, place)
        with open_weights(directory, config, Form("bfloat16"), kernels, 1) as found:
            assert not isinstance(found, PackedFile)
        (warning,) = [record.getMessage() for record in caplog.records]
        assert f"{place} is not used: packed-bfloat16 is asked for" in warning
        caplog.clear()
    plain = pack(directory)
    for form, wanted in ((Form("bfloat16"), plain), (Form("bfloat16", "int8"), place)):
        with open_weights(directory, config, form, kernels, 1) as found:
            assert isinstance(found, PackedFile) and found.directory == wanted
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_of_two_writers_one_is_refused(model):
    directory = model()
    head = packed_file.head(Form("bfloat16"), "layout", {})
    target = packed_file.places(directory, Form("bfloat16"))[0]
    first = packed_file.PackedWriter(target, head, lambda sections: [])
    with first, pytest.raises(ConfigError, match="another process is writing"):
        pack(directory)
    assert pack(directory) == target


def test_a_full_disk_is_seen_first(model, monkeypatch):
    directory = model()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1 << 20))
    with pytest.raises(CheckpointError, match=r"0\.00 GB free"):
        pack(directory)
    monkeypatch.undo()
    assert not list(directory.glob("packed-*"))


def test_where_the_model_cannot_be_written_the_cache_has_it(model, cache, monkeypatch):
    """Also where an older packed file lies beside it, which cannot be replaced."""
    directory = model()
    (pack(directory) / packed_file.MANIFEST).write_text("{}")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    packed = pack(directory)
    assert packed.is_relative_to(cache)
    with load(directory):
        assert is_mapped(packed)


def test_a_model_of_its_own(model, tmp_path, capfd):
    directory, out = model(mtp="full"), tmp_path / "out"
    before = answers(directory, quantization="int4")
    assert main(["prepare", str(directory), "--quantization", "int4", "--out", str(out)]) == 0
    assert str(out) in capfd.readouterr().out
    shutil.rmtree(directory)
    with LLM(str(out), max_model_len=64, max_num_seqs=4) as llm:
        assert is_mapped(out) and answer(llm) == before
        assert llm.generate("a", SamplingParams(max_tokens=1))[0].outputs
    for settings in ({"dtype": "float32"}, {"quantization": "int8"}, {"quantization": "int4", "group_size": 64}):
        with pytest.raises(ConfigError, match="prepared as packed-bfloat16-int4-32"):
            LLM(str(out), **settings)
    with pytest.raises(ConfigError, match="layout"):
        LLM(str(out), backend="reference")
    assert main(["prepare", str(out)]) == 2


def test_fp8_is_that_of_a_checkpoint_written_so(model, tmp_path):
    """The packed file, loading, and the checkpoint that `quantize` writes agree; that one is decoded independently."""
    directory, coded = model(mtp="full"), tmp_path / "coded"
    before = answers(directory, quantization="fp8")
    assert main(["quantize", str(directory), str(coded), "--quantization", "fp8"]) == 0
    assert answers(coded) == before
    assert main(["prepare", str(directory), "--quantization", "fp8"]) == 0
    assert answers(directory, quantization="fp8") == before and (directory / "packed-bfloat16-fp8").is_dir()
    plain, found = (
        {k: v for f in d.glob("*.safetensors") for k, v in load_file(f).items()} for d in (directory, coded)
    )
    scaled = [name for name in found if name.endswith(".weight_scale")]
    assert any(".experts." in name for name in scaled) and not any("lm_head" in n or "eh_proj" in n for n in scaled)
    for name in scaled:
        codes, values = found[name.removesuffix("_scale")], plain[name.removesuffix("_scale")].float()
        assert codes.dtype == torch.float8_e4m3fn and found[name].shape == (len(values), 1)
        assert (codes.float() * found[name] - values).norm() < 0.04 * values.norm()
    assert all(torch.equal(found[name], plain[name]) for name in plain if f"{name}_scale" not in found)


def test_prepare_on_the_way(model):
    directory = model()
    before = answers(directory)
    with load(directory, prepare=True) as llm:
        assert is_mapped(directory) and answer(llm) == before
    assert answers(directory) == before


@pytest.mark.parametrize(
    "argv, said",
    [
        ([], "no model is named"),
        (["/nowhere"], "does not exist"),
        (["MODEL", "--quantization", "int5"], "quantization='int5'"),
        (["MODEL", "--group-size", "48", "--quantization", "int4"], "group_size=48"),
        (["MODEL", "--out", "/proc/nothing"], "/proc"),
    ],
    ids=str,
)
def test_refusals(argv, said, checkpoint, capfd):
    argv = [str(checkpoint()) if word == "MODEL" else word for word in argv]
    assert main(["prepare", *argv]) == 2
    error = capfd.readouterr().err
    assert said in error and "Traceback" not in error and "to do:" in error


def test_checksums_are_crc32c():
    """Against the published check value, of four equal quarters and of what is no multiple of anything."""
    backend = selection.choose(selection.HOST)
    digits = torch.tensor(list(b"123456789"), dtype=torch.uint8)
    pages = torch.zeros(4 * 4096, dtype=torch.uint8)
    for i in range(4):
        pages[4096 * i : 4096 * i + 9] = digits
    (nine, four, other) = backend.checksums([digits, pages, pages[:-5].clone()])
    assert nine[:8] == "e3069283"
    assert four == four[:8] * 4 and other[:24] == four[:24] and other[24:] != four[24:]
