"""Reading safetensors: what a checkpoint hands out, what it refuses and with which words, and what memory it holds."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from glimmer.checkpoint.buffers import KEPT, Buffers
from glimmer.checkpoint.files import DTYPES, INDEX, Checkpoint
from glimmer.errors import CheckpointError
from glimmer.foreign import read_bytes

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write_raw(path: Path, header: object, data: bytes | int = b"") -> Path:
    """A file as its bytes: `header` as JSON, or as bytes just as they are; `data`, or a hole of that many bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    hole = data if isinstance(data, int) else 0
    path.write_bytes(len(text).to_bytes(8, "little") + text + (b"" if hole else data))
    if hole:
        os.truncate(path, path.stat().st_size + hole)
    return path


def write_index(directory: Path, names: dict[str, str]) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def values(dtype: torch.dtype) -> torch.Tensor:
    noise = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)) * 40
    return noise > 0 if dtype is torch.bool else noise.abs().to(dtype) if dtype is torch.uint8 else noise.to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [x.flatten().view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


# ---- what it hands out ---------------------------------------------------------------------------------------------


def test_every_type_and_slice(directory):
    tensors = {f"x.{code}": values(dtype) for code, dtype in DTYPES.items()}
    save_file(tensors, directory / "model.safetensors")
    with Checkpoint(directory) as checkpoint:
        assert checkpoint.names() == set(tensors)
        for name, tensor in tensors.items():
            assert name in checkpoint
            assert (checkpoint.shape(name), checkpoint.dtype(name)) == ((6, 5), tensor.dtype)
            assert checkpoint.nbytes(name) == tensor.nbytes
            assert checkpoint.file(name) == directory / "model.safetensors"
            for rows, cols in (
                (None, None),
                ((2, 5), None),
                (None, (1, 4)),
                ((0, 6), (0, 5)),
                ((3, 4), (4, 5)),
                ((2, 2), None),
            ):
                part = checkpoint.tensor(name, rows, cols)
                assert same_bits(part, tensor[slice(*rows or (None,)), slice(*cols or (None,))])
        assert "y" not in checkpoint


def test_scalars_vectors_and_nothing(directory):
    tensors = {
        "scalar": torch.tensor(2.5),
        "vector": torch.arange(7),
        "none": torch.zeros(0, 4),
        "cube": torch.randn(2, 3, 4),
    }
    save_file(tensors, directory / "model.safetensors")
    checkpoint = Checkpoint(directory)
    for name, tensor in tensors.items():
        assert same_bits(checkpoint.tensor(name), tensor)
    assert checkpoint.tensor("vector", (2, 5)).tolist() == [2, 3, 4]
    assert checkpoint.tensor("none", (0, 0)).shape == (0, 4)
    assert torch.equal(checkpoint.tensor("cube", (1, 2), (0, 2)), tensors["cube"][1:2, 0:2])


def test_tensors_are_their_own_and_outlive_the_file(directory):
    tensor = torch.randn(100, 8)
    save_file({"x": tensor}, directory / "model.safetensors")
    checkpoint = Checkpoint(directory)
    whole, part = checkpoint.tensor("x"), checkpoint.tensor("x", (10, 20), (2, 4))
    os.truncate(directory / "model.safetensors", 0)
    assert torch.equal(whole, tensor)
    checkpoint.close()
    assert torch.equal(part, tensor[10:20, 2:4])
    with pytest.raises(AssertionError, match="closed"):
        checkpoint.tensor("x")


def test_memory_is_used_again_when_no_tensor_over_it_is_left():
    buffers = Buffers()
    first = buffers.empty(1000)
    part, address = first[10:20].view(2, 5), first.data_ptr()
    part.fill_(7)
    del first
    buffers.empty(1000).fill_(1)
    buffers.empty(1000).fill_(2)
    assert part.eq(7).all(), "a view of it is still held"
    del part
    one, other = buffers.empty(999), buffers.empty(998)
    assert address in (one.data_ptr(), other.data_ptr()) and (len(one), len(other)) == (999, 998)
    address = buffers.empty(KEPT // 2).data_ptr()
    assert buffers.empty(KEPT // 2).data_ptr() == address
    held = [buffers.empty(KEPT // 4) for _ in range(10)]
    del held
    buffers.empty(1)
    assert sum(map(len, buffers._free)) <= KEPT


def test_tensors_keep_their_values_while_others_are_read(directory):
    tensors = {f"x.{i}": torch.full((64, 64), float(i)) for i in range(50)}
    save_file(tensors, directory / "model.safetensors")
    with Checkpoint(directory) as checkpoint, ThreadPoolExecutor(4) as threads:
        held: dict[str, torch.Tensor] = {}

        def read(turn: int) -> None:
            name = f"x.{turn * 7 % 50}"
            whole = checkpoint.tensor(name)
            held[name] = whole[turn % 60 :][:3]

        list(threads.map(read, range(3000), timeout=60))
        for name, part in held.items():
            assert torch.equal(part, tensors[name][:3])


def test_data_after_a_header_of_odd_length(directory):
    text = json.dumps({"x": ENTRY}).encode()
    text += b" " * (9 - len(text) % 8)
    data = torch.arange(6.0)
    write_raw(directory / "model.safetensors", text, data.numpy().tobytes())
    checkpoint = Checkpoint(directory)
    assert checkpoint.tensor("x").flatten().tolist() == data.tolist()
    assert checkpoint.tensor("x", (1, 2), (1, 3)).tolist() == [[4, 5]]


def test_slices_outside_the_shape_are_our_own_mistake(directory):
    save_file({"x": torch.zeros(4, 4), "scalar": torch.tensor(1.0)}, directory / "model.safetensors")
    checkpoint = Checkpoint(directory)
    for name, rows, cols in (
        ("x", (0, 5), None),
        ("x", (3, 2), None),
        ("x", (-1, 2), None),
        ("x", None, (0, 5)),
        ("scalar", (0, 1), None),
    ):
        with pytest.raises(AssertionError):
            checkpoint.tensor(name, rows, cols)


def test_unread_names_what_nobody_asked_for(directory):
    save_file({name: torch.zeros(2) for name in ("a", "b", "mtp.a", "mtp.b")}, directory / "model.safetensors")
    checkpoint = Checkpoint(directory)
    assert checkpoint.unread() == ["a", "b", "mtp.a", "mtp.b"]
    checkpoint.tensor("b", (0, 1))
    checkpoint.shape("a")
    assert checkpoint.unread() == ["a", "mtp.a", "mtp.b"]
    assert checkpoint.unread(ignoring=lambda name: name.startswith("mtp.")) == ["a"]


def test_missing_tensor_is_named(directory):
    save_file({"a": torch.zeros(2)}, directory / "model.safetensors")
    checkpoint = Checkpoint(directory)
    for ask in (checkpoint.shape, checkpoint.dtype, checkpoint.nbytes, checkpoint.file, checkpoint.tensor):
        with pytest.raises(CheckpointError, match=r"no tensor 'model\.norm' among the 1"):
            ask("model.norm")


# ---- several files and the index -----------------------------------------------------------------------------------


def test_files_that_the_index_does_not_name_count_too(directory):
    save_file({"a": torch.ones(2)}, directory / "model-00001-of-00001.safetensors")
    save_file({"mtp": torch.ones(3)}, directory / "mtp.safetensors")
    (directory / "._mtp.safetensors").write_bytes(b"left by a file manager")
    write_index(directory, {"a": "model-00001-of-00001.safetensors"})
    checkpoint = Checkpoint(directory)
    assert checkpoint.names() == {"a", "mtp"}
    assert checkpoint.file("mtp").name == "mtp.safetensors"


@pytest.mark.parametrize("chosen", ["1.safetensors", "2.safetensors", "3.safetensors"])
def test_index_decides_between_files(directory, chosen):
    for i in (1, 2, 3):
        save_file({"a": torch.tensor([i])}, directory / f"{i}.safetensors")
    write_index(directory, {"a": chosen})
    checkpoint = Checkpoint(directory)
    assert checkpoint.tensor("a").item() == int(chosen[0])


def test_threads_that_read_from_several_files(directory):
    for i in range(4):
        save_file({str(i): torch.full((64, 64), i)}, directory / f"{i}.safetensors")
    with Checkpoint(directory) as checkpoint, ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda i: checkpoint.tensor(str(i % 4)).unique().tolist(), range(2000), timeout=60)
        assert list(found) == [[i % 4] for i in range(2000)]


def test_twice_without_an_index(directory):
    save_file({"a": torch.tensor([1])}, directory / "1.safetensors")
    save_file({"a": torch.tensor([2])}, directory / "2.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor 'a' lies in 1\.safetensors and in 2\.safetensors"):
        Checkpoint(directory)


@pytest.mark.parametrize(
    "text, message",
    [
        (b"{", "is no readable JSON"),
        (b"\xff\xfe", "is no readable JSON"),
        (b'{"weight_map": {"a": "1", "a": "2"}}', "the key 'a' comes twice"),
        (b"[]", "is not an index"),
        (b"{}", "is not an index"),
        (b'{"weight_map": ["a"]}', "is not an index"),
        (b'{"weight_map": {"a": 1}}', "is not an index"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer"),
    ],
)
def test_bad_index(directory, text, message):
    save_file({"a": torch.zeros(2)}, directory / "m.safetensors")
    (directory / INDEX).write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(directory)


@pytest.mark.parametrize(
    "table, message",
    [
        ({"a": "m.safetensors", "b": "m.safetensors"}, r"1 tensors are not .*'b' not in 'm\.safe"),
        ({"a": "n.safetensors"}, r"lacks 1 of the 1 files .*with 1 tensors: n\.safetensors"),
        ({"a": "../m.safetensors"}, r"lacks 1 of the 1 files .*: \.\./m\.safetensors"),
        ({"a": "m.safetensors"}, None),
    ],
)
def test_an_index_that_disagrees_is_kept_for_whoever_knows_what_is_wanted(directory, table, message):
    save_file({"a": torch.ones(2)}, directory / "m.safetensors")
    write_index(directory, table)
    checkpoint = Checkpoint(directory)
    assert torch.equal(checkpoint.tensor("a"), torch.ones(2))
    fault = checkpoint.index_fault
    assert fault is None if message is None else re.search(message, fault.found)


def test_twice_with_an_index_that_names_neither(directory):
    for i in (1, 2, 3):
        save_file({"a": torch.tensor([i])} if i < 3 else {"b": torch.ones(1)}, directory / f"{i}.safetensors")
    write_index(directory, {"a": "3.safetensors"})
    with pytest.raises(CheckpointError, match=r"tensor 'a' lies in 1\.safetensors and in 2\.safetensors"):
        Checkpoint(directory)


def test_index_names_files_that_are_missing(directory):
    save_file({"a": torch.zeros(2)}, directory / "model-00001-of-00003.safetensors")
    write_index(
        directory, {name: f"model-0000{i}-of-00003.safetensors" for name, i in (("a", 1), ("b", 2), ("c", 3), ("d", 3))}
    )
    fault = Checkpoint(directory).index_fault
    assert fault is not None and "lacks 2 of the 3 files" in fault.found and "with 3 tensors" in fault.found
    assert "model-00002-of-00003.safetensors, model-00003-of-00003.safetensors" in fault.found


# ---- directories that are none -------------------------------------------------------------------------------------


def test_no_directory(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no directory .*nowhere"):
        Checkpoint(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file") as caught:
        Checkpoint(str(tmp_path / "model.safetensors"))
    assert str(tmp_path) in caught.value.todo


@pytest.mark.parametrize(
    "files, message",
    [
        ([], r"has no config\.json and no \*\.safetensors files$"),
        (["config.json"], r"has no \*\.safetensors files$"),
        (["a.safetensors"], r"has no config\.json$"),
        (
            ["config.json", "pytorch_model.bin", "x.gguf"],
            r"no \*\.safetensors files, but \*\.bin and \*\.gguf files, which are not",
        ),
        (["glm-Q4_K_M.gguf"], r"no \*\.safetensors files, but \*\.gguf files, which are not read"),
    ],
)
def test_directory_that_lacks_something(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path)
    assert re.search(message, caught.value.found)


def test_broken_link_and_directory_in_place_of_a_file(directory):
    link = directory / "model.safetensors"
    link.symlink_to(directory / "gone")
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        Checkpoint(directory)
    link.unlink()
    link.mkdir()
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        Checkpoint(directory)


# ---- files that change, and limits of the process ------------------------------------------------------------------


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


def overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"overwrit")


def replace(path: Path) -> None:
    copy = path.with_suffix(".part")
    shutil.copyfile(path, copy)
    copy.replace(path)


@pytest.mark.parametrize("change", [shrink, overwrite, replace, Path.unlink])
def test_a_file_that_changes_while_the_checkpoint_is_read_is_refused(directory, change):
    for name in "bca":
        save_file({f"{name}.{i}": torch.randn(50, 8) for i in range(2)}, directory / f"{name}.safetensors")
    checkpoint = Checkpoint(directory)
    checkpoint.tensor("a.0")
    time.sleep(0.02)  # file systems keep times in steps of a few milliseconds
    change(directory / "b.safetensors")
    checkpoint.tensor("a.1")
    with pytest.raises(CheckpointError, match=r"b\.safetensors has been changed, or has gone") as caught:
        checkpoint.tensor("b.0")
    assert "download or copy has finished" in caught.value.todo


@pytest.mark.parametrize("change", [shrink, overwrite])
def test_a_file_that_changes_while_it_is_open_is_refused(directory, change):
    save_file({name: torch.randn(50, 8) for name in "ab"}, directory / "model.safetensors")
    checkpoint = Checkpoint(directory)
    checkpoint.tensor("a")
    time.sleep(0.02)
    change(directory / "model.safetensors")
    with pytest.raises(CheckpointError, match="has been changed"):
        checkpoint.tensor("a", (0, 1))


@pytest.mark.parametrize("name", ["model.safetensors", INDEX])
def test_a_pipe_is_not_waited_for(directory, name):
    save_file({"x": torch.zeros(1)}, directory / "a.safetensors")
    os.mkfifo(directory / name)
    with pytest.raises(CheckpointError, match="Is a pipe"):
        Checkpoint(directory)


LIMITED = """
import os, resource, sys
from glimmer.checkpoint.files import Checkpoint
from glimmer.errors import CheckpointError

free = os.open("/", os.O_RDONLY)
os.close(free)
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (free + 2, hard))
with Checkpoint(sys.argv[1]) as checkpoint:  # one file at a time
    print(len(checkpoint.names()))
resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
try:
    Checkpoint(sys.argv[1])
except CheckpointError as error:
    print(error.found, error.todo)
"""


def test_a_limit_of_open_files_is_no_damage(directory):
    """In a process of its own, in which nobody else opens and closes files."""
    for i in range(40):
        save_file({f"x.{i}": torch.zeros(1)}, directory / f"{i}.safetensors")
    child = subprocess.run([sys.executable, "-c", LIMITED, directory], capture_output=True, text=True, timeout=60)
    count, said = child.stdout.splitlines()
    assert count == "40" and "open files" in said and "ulimit -n" in said, child.stderr


@pytest.mark.parametrize("number, words", [(errno.ENOMEM, "ulimit -v"), (errno.EACCES, "permission denied")])
def test_what_the_system_refuses_is_called_that(directory, monkeypatch, number, words):
    save_file({"x": torch.zeros(1)}, directory / "model.safetensors")

    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError) as caught:
        read_bytes(directory / "model.safetensors")
    assert words in str(caught.value) and "download" not in str(caught.value)


# ---- broken files --------------------------------------------------------------------------------------------------


def test_truncated_file_gives_both_sizes(directory):
    path = directory / "model.safetensors"
    save_file({"x": torch.zeros(1000)}, path)
    size = path.stat().st_size
    os.truncate(path, size - 1500)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(directory)
    assert f"is cut short: it has {size - 1500:,} bytes" in caught.value.found
    assert f"{size:,} bytes" in caught.value.expected
    assert "download model.safetensors again" in caught.value.todo


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "ends within its header: it has 0 bytes"),
        (b"1234567", "ends within its header: it has 7 bytes"),
        ((100).to_bytes(8, "little") + b"{}", "ends within its header: it has 10 bytes"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "claims a header of 1,152,921,504,606,846,976 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 4999\n", "is a git-lfs pointer"),
        (b"<!DOCTYPE html><html>Not found</html>", "claims a header"),
    ],
)
def test_files_that_are_no_safetensors(directory, content, message):
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(directory)


DEEP = b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    "header, message",
    [
        (b"{", "has a header that is no readable JSON"),
        (b"\xff\xff", "has a header that is no readable JSON"),
        (b'{"x": 1' + b"0" * 5000 + b"}", "has a header that is no readable JSON"),
        (DEEP, "has a header that is no readable JSON"),
        (b'{"x": {"shape": ' + b"[" * 500 + b"]" * 500 + b"}}", "nested more than 64 deep"),
        (b'{"x": {"shape": [1' + b"0" * 400 + b"]}}", "an integer of 401 digits"),
        (json.dumps({"x": ENTRY})[:-1].encode() + b', "x": ' + json.dumps(ENTRY).encode() + b"}", "'x' comes twice"),
        (b"[]", "has a header that is no table"),
        ({"x": None}, "describes tensor 'x' as None"),
        ({"x": {**ENTRY, "dtype": 5}}, "describes tensor 'x'"),
        ({"x": {**ENTRY, "dtype": "Q4"}}, "has tensor 'x' of type 'Q4'"),
        ({"x": {**ENTRY, "shape": "23"}}, "describes tensor 'x'"),
        ({"x": {**ENTRY, "shape": [2.0, 3]}}, "describes tensor 'x'"),
        ({"x": {**ENTRY, "shape": [True, 6]}}, "describes tensor 'x'"),
        ({"x": {**ENTRY, "shape": [-2, -3]}}, "describes tensor 'x'"),
        ({"x": {**ENTRY, "shape": [2, 4]}}, "gives tensor 'x' 24 bytes"),
        ({"x": {**ENTRY, "shape": [1 << 40] * 3}}, "has tensor 'x' of shape"),
        ({"x": {**ENTRY, "shape": [0, 1 << 62, 1 << 62]}}, "has tensor 'x' of shape"),
        ({"x": {**ENTRY, "shape": [1] * 70 + [6]}}, "has tensor 'x' of shape"),
        ({"x": {**ENTRY, "data_offsets": [0]}}, "describes tensor 'x'"),
        ({"x": {**ENTRY, "data_offsets": [-24, 0]}}, "describes tensor 'x'"),
        ({"x": {**ENTRY, "data_offsets": [24, 0]}}, "gives tensor 'x' -24 bytes"),
        ({"x": {**ENTRY, "data_offsets": [0, 1e999]}}, "describes tensor 'x'"),
        ({"x": {**ENTRY, "data_offsets": [24, 48]}}, "leaves a gap before it"),
        ({"x": {**ENTRY, "data_offsets": [1 << 62, (1 << 62) + 24]}}, "leaves a gap before it"),
        ({"x": ENTRY, "y": ENTRY}, "has tensor 'y' at byte .* overlaps the tensor before it"),
        ({"x": ENTRY, "y": {**ENTRY, "data_offsets": [24, 48]}}, "is cut short"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "has 16 bytes too many"),
        ({"\ud800" * 1000: None}, "half of a surrogate pair"),
        ({"x" * 100_000: None}, "describes tensor 'xxx"),
    ],
)
def test_hostile_headers(directory, header, message):
    write_raw(directory / "model.safetensors", header, b"\0" * 24)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(directory)
    assert len(str(caught.value).encode()) < 2000  # a message can be printed, whatever the file holds


def check_consistent(directory: Path) -> None:
    """The checkpoint is refused with a CheckpointError, or everything that it hands out fits the file."""
    path = directory / "model.safetensors"
    try:
        checkpoint = Checkpoint(directory)
    except CheckpointError as error:
        assert error.found and error.expected and error.todo
        str(error).encode()
        return
    data = path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
    assert sum(checkpoint.nbytes(name) for name in checkpoint.names()) == data
    for name in checkpoint.names():
        shape = checkpoint.shape(name)
        tensor = checkpoint.tensor(name)
        assert tensor.shape == shape and tensor.nbytes == checkpoint.nbytes(name)
        tensor.clone()
        if shape and shape[0]:
            assert checkpoint.tensor(name, (shape[0] - 1, shape[0])).shape == (1, *shape[1:])
    checkpoint.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "model.safetensors"
    save_file({"a.weight": torch.randn(4, 6).bfloat16(), "a.bias": torch.randn(4), "e": torch.zeros(0, 2)}, path)
    return path.read_bytes()


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, 260), st.integers(0, 255)), max_size=4),
    digits=st.lists(st.tuples(st.integers(0, 40), st.sampled_from('0123456789-.,[]{}" ')), max_size=3),
    cut=st.one_of(st.none(), st.integers(0, 400)),
)
def test_mutated_file(whole, edits, digits, cut):
    content = bytearray(whole)
    places = [i for i, byte in enumerate(content[8:-64], 8) if chr(byte) in "0123456789"]
    for i, char in digits:
        content[places[i % len(places)]] = ord(char)
    for i, byte in edits:
        content[i % len(content)] = byte
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").touch()
        (Path(folder) / "model.safetensors").write_bytes(content[:cut])
        check_consistent(Path(folder))


NUMBERS = st.one_of(st.integers(-2, 40), st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=3))
SHAPES = st.one_of(NUMBERS, st.lists(NUMBERS, max_size=10), st.lists(st.integers(0, 4), max_size=3))
ENTRIES = st.one_of(
    st.recursive(NUMBERS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner)),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from([*DTYPES, "U64", "", 3]),
            "shape": SHAPES,
            "data_offsets": st.one_of(
                NUMBERS, st.tuples(NUMBERS, NUMBERS), st.tuples(st.integers(0, 40), st.integers(0, 40))
            ),
        }
    ),
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    header=st.dictionaries(st.text(max_size=5), ENTRIES, max_size=4),
    good=st.lists(st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 3), max_size=4)), max_size=4),
    size=st.integers(0, 100),
)
def test_invented_headers(header, good, size):
    end = 0
    for i, (code, shape) in enumerate(good):  # some that are right, so that the wrong ones are not always alone
        begin, end = end, end + torch.Size(shape).numel() * DTYPES[code].itemsize
        header = header | {f"good.{i}": {"dtype": code, "shape": shape, "data_offsets": [begin, end]}}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").touch()
        write_raw(Path(folder) / "model.safetensors", header, bytes(size if len(header) > len(good) else end))
        check_consistent(Path(folder))


# ---- size and memory -----------------------------------------------------------------------------------------------


def test_nothing_grows_with_the_file(directory):
    rows, cols = 50_000_000, 2048
    nbytes = rows * cols * 2
    header = {"x": {"dtype": "BF16", "shape": [rows, cols], "data_offsets": [0, nbytes]}}
    path = write_raw(directory / "model.safetensors", header, nbytes)
    assert path.stat().st_size > 200e9
    checkpoint = Checkpoint(directory)
    assert checkpoint.nbytes("x") == nbytes
    assert not checkpoint.tensor("x", (rows - 3, rows)).any()
    assert not checkpoint.tensor("x", (rows // 2, rows // 2 + 3), (7, 9)).any()


MEASURE = """
import sys
import torch
from glimmer.checkpoint.files import Checkpoint

torch.set_num_threads(1)

def status(key):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key + ":"))

def load(count=None):
    checkpoint = Checkpoint(sys.argv[1])
    start, peak = status("RssFile"), 0
    for name in sorted(checkpoint.names())[:count]:
        for i in range(3):
            copy = checkpoint.tensor(name, (512 * i, 512 * i + 512), (0, 600) if i == 1 else None).clone()
        peak = max(peak, status("RssFile") - start)
    return peak, status("RssFile") - start

load(2)  # for the code pages and the allocator
high = status("VmHWM")
print(*load(), status("VmHWM") - high)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_is_one_tensor(directory):
    count, nbytes = 70, 3 << 20
    header = {
        f"{i:03}": {"dtype": "BF16", "shape": [1536, 1024], "data_offsets": [i * nbytes, (i + 1) * nbytes]}
        for i in range(count)
    }
    write_raw(directory / "model.safetensors", header, count * nbytes)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(directory)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    peak, end, growth = map(float, done.stdout.split())
    assert peak < 8 and end < 2 and growth < 16, done.stdout  # MiB; a tensor has 3
