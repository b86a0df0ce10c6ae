"""Runner: Step -> Batch -> logits; and how many blocks of cache fit beside the weights.

Everything that depends on the machine's memory is decided here, from headers and free bytes, before anything is loaded.
Not here: which tokens to compute (scheduler.py), what to do with logits (sampler.py).
"""

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from glimmer import device as devices
from glimmer.backends import selection
from glimmer.backends.base import Backend, KVCacheSpec
from glimmer.batch import Batch
from glimmer.checkpoint import formats
from glimmer.checkpoint.fingerprint import fingerprints
from glimmer.checkpoint.packed_file import MANIFEST, Form, digest_of, source_of
from glimmer.config import EngineConfig
from glimmer.engine.capture import StepCapture
from glimmer.engine.chain import DraftChains
from glimmer.engine.sequence import Step
from glimmer.errors import CheckpointError, ConfigError, NotEnoughMemory
from glimmer.group import Group
from glimmer.model.experts import PagingStats
from glimmer.model.load import build_model, has_mtp
from glimmer.model.names import check_tensor_parallel
from glimmer.model.packed import Loader, PackedLoader, loader_of, open_weights
from glimmer.model_config import ModelConfig

log = logging.getLogger("glimmer")
T = TypeVar("T")


@dataclass(frozen=True)
class KVCacheConfig:
    """num_blocks of cache, and the longest sequence that they and the model allow."""

    num_blocks: int
    max_model_len: int


class Runner:
    """One rank's model and cache. Raises CheckpointError, ConfigError or NotEnoughMemory before it loads a weight.

    drafts_by: the method of speculation that there is: "mtp" (the MTP layer is loaded), "ngram" or "off".
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        group: Group,
        device: torch.device,
        on_load: Callable[[int, int], None] | None = None,
    ):
        check_ranks(config, model_config, group, device)
        check_tensor_parallel(model_config, group.size)
        self.device, self.block_size = device, config.block_size
        dtype = resolve_dtype(config.dtype, model_config.dtype)
        formats.check(model_config.quantization_config)  # first: another format's files may not even open
        spec = KVCacheSpec(
            num_layers=model_config.num_hidden_layers,
            block_size=config.block_size,
            num_kv_heads=model_config.key_value_heads(group.size),
            head_dim=model_config.head_dim,
            dtype=torch.int8 if config.kv_cache_dtype == "int8" else dtype,
        )
        threads = devices.share_cores(group.local_size, config.threads)
        self.backend = selection.choose(device, threads, spec, config.backend)
        log.info("operations: %s", _served(self.backend.table()))
        form = Form.of(str(dtype).removeprefix("torch."), config.quantization, config.group_size)
        with open_weights(
            Path(config.model), model_config, form, self.backend, group.size, config.prepare
        ) as checkpoint:
            residual = devices.residual_dtype(device, dtype)

            def plan(mtp: bool) -> tuple[Loader, KVCacheSpec]:
                model = build_model(model_config, checkpoint, group, self.backend, residual, mtp).eval()
                own = replace(spec, num_layers=spec.num_layers + mtp)
                least_cache(config, self.backend, own)
                return loader_of(model, checkpoint, dtype, form), own

            def divide(loader: Loader, spec: KVCacheSpec) -> KVCacheConfig:
                if isinstance(loader, PackedLoader):
                    loader.page(expert_slots(config, model_config, group, self.backend, spec, loader))
                return make_kv_cache_config(config, model_config, group, self.backend, spec, loader.nbytes)

            asked = config.speculation.method
            self.drafts_by = asked if asked != "auto" else "mtp" if has_mtp(model_config, checkpoint) else "off"
            perhaps = asked == "auto" and self.drafts_by == "mtp"  # all ranks have the layer then, or none
            try:
                loader, own = _on_all_ranks(group, partial(plan, True)) if perhaps else plan(self.drafts_by == "mtp")
                self.kv_cache_config = divide(loader, own)
            except (CheckpointError, ConfigError, NotEnoughMemory) as error:
                if not perhaps:
                    raise
                self.drafts_by = "off"
                loader, own = plan(mtp=False)
                self.kv_cache_config = divide(loader, own)
                log.warning("no drafts are made, since the MTP layer is left out: %s", error.found)
            self.model = loader.model
            self._mapped = loader if isinstance(loader, PackedLoader) else None
            if config.dtype == "auto" and dtype is not torch.float32 and loader.stores(torch.float32):
                log.warning(
                    "weights are stored in float32 and computed in %s; dtype=float32 (--dtype) keeps them as they are",
                    str(dtype).removeprefix("torch."),
                )
            for stored, (count, nbytes) in loader.widened.items():
                log.warning(
                    "%d matrices are stored in %s and computed as %s: they take %.2f GB of memory",
                    count, stored, str(dtype).removeprefix("torch."), nbytes / 1e9,
                )  # fmt: skip
            done = 0

            def progress(nbytes: int) -> None:
                nonlocal done
                done += nbytes
                if on_load is not None:
                    on_load(done, loader.nbytes)

            with torch.inference_mode():
                loader.load(progress)
        if on_load is not None:
            on_load(loader.nbytes, loader.nbytes)
        self.kv_block_bytes = self.backend.kv_block_bytes(own)
        self.kv_identity = "" if config.kv_cache_dir is None else _identity(config, model_config, group, self, own)
        self.kv = self.backend.allocate_kv(own, self.kv_cache_config.num_blocks)
        longest = -(-self.kv_cache_config.max_model_len // config.block_size)
        rows = 1 + (0 if self.drafts_by == "off" else config.speculation.max_drafts)
        self.capture = StepCapture(self.model, self.model.run_layers, self.kv, longest, rows)
        self.draft_capture = StepCapture(self.model, self.model.run_draft, self.kv, longest, rows)
        self.draft_chains = DraftChains(self.model, self.kv, longest)

    @property
    def paging(self) -> PagingStats | None:
        """What has been read of experts that do not fit into memory; None: all are in memory."""
        pager = self._mapped.pager if self._mapped is not None else None
        return pager.stats() if pager is not None else None

    def running(self) -> AbstractContextManager[None]:
        """See Backend.running."""
        return self.backend.running()

    def batch(self, step: Step) -> Batch:
        """The step as tensors, in the host's memory."""
        size = self.block_size
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        row = 0
        for chunk in step.chunks:
            blocks, span = chunk.sequence.blocks, range(chunk.start, chunk.start + chunk.n)
            tokens += chunk.token_ids
            positions += span
            slots += [blocks[p // size] * size + p % size for p in span]
            row += chunk.n
            rows += range(row - chunk.rows, row)
        return Batch.of(
            tokens=tokens,
            positions=positions,
            slot_mapping=slots,
            block_tables=[chunk.sequence.blocks for chunk in step.chunks],
            logits_indices=rows,
            query_lens=[chunk.n for chunk in step.chunks],
            seq_lens=[chunk.start + chunk.n for chunk in step.chunks],
        )

    @torch.inference_mode()
    def forward(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The hidden states (T, H) of all rows, and the logits (R, V) float32 of the rows that the batch wants, or None
        if it wants none. Both are valid until the next call."""
        batch = self.backend.prepare(batch)
        try:
            hidden = self.capture.run(batch)
            logits = self.model.logits(_rows(hidden, batch.logits_indices)) if len(batch.logits_indices) else None
        except torch.OutOfMemoryError as error:
            raise NotEnoughMemory(
                f"a step of {len(batch.tokens)} tokens ran out of memory: {str(error).splitlines()[0]}",
                "enough memory for a step's activations beside weights and cache",
                "lower max_num_batched_tokens, max_num_seqs or gpu_memory_utilization",
            ) from None
        except OSError as error:
            raise self._mapped.unread(error) if self._mapped is not None else error from error
        if self._mapped is not None:
            self._mapped.check()
        return hidden, logits

    def draft(self, hidden: Tensor, batch: Batch) -> Tensor:
        """MTP hidden states (T, H), valid until the next call; batch.tokens are the tokens that follow its rows.

        hidden: (T, H) of `forward`; see Glm4Moe.draft.
        """
        batch = self.backend.prepare(batch)
        return self.draft_capture.run(batch, hidden)

    def draft_chain(self, hidden: Tensor, batch: Batch | None, vocab_size: int) -> list[list[int]]:
        """For each of S sequences 1 + q guesses below vocab_size, each of which follows from those before it.

        hidden: (S, H) of `draft`, of the last row of each sequence. batch: q more rows of each, whose tokens are the
        guesses, so that those in it do not count; None if q is 0.
        """
        batch = None if batch is None else self.backend.prepare(batch)
        return self.draft_chains.run(hidden, batch, vocab_size).t().tolist()

    @torch.inference_mode()
    def forbid(self, logits: Tensor, allowed: Tensor) -> None:
        """See Backend.forbid_; allowed in the host's memory."""
        self.backend.forbid_(logits, allowed.to(logits.device))

    def export_blocks(self, blocks: Sequence[int]) -> Tensor:
        """What the blocks hold: (blocks, kv_block_bytes) uint8."""
        return self.backend.export_blocks(self.kv, blocks)

    def import_blocks(self, blocks: Sequence[int], data: Tensor) -> None:
        """Fill blocks with what `export_blocks` gave."""
        self.backend.import_blocks(self.kv, blocks, data)

    def checksum(self, data: memoryview) -> bytes:
        """See Backend.checksum."""
        return self.backend.checksum(data)


def _rows(hidden: Tensor, indices: Tensor) -> Tensor:
    """These rows of hidden (T, H), in ascending order."""
    return hidden if len(indices) == len(hidden) else hidden[indices]


def _on_all_ranks(group: Group, plan: Callable[[], T]) -> T:
    """plan(), if no rank's plan raises an error about the checkpoint or settings; else an error on every rank."""
    planned, fault = None, None
    try:
        planned = plan()
    except (CheckpointError, ConfigError) as error:
        fault = error
    if not group.all_reduce_min(int(planned is not None)):
        raise fault or CheckpointError("another process refuses the MTP layer", "a whole layer", "see its message")
    assert planned is not None, "the ranks have agreed"
    return planned


def check_ranks(config: EngineConfig, model_config: ModelConfig, group: Group, device: torch.device) -> None:
    """ConfigError, the same on every rank, unless all ranks have the same settings, config.json and files of weights.

    Each of them would answer with a part of another model otherwise. What a machine may have for itself is not
    compared: the directory's path, threads and memory.
    """
    if group.size == 1:
        return
    own = (
        "model",
        "backend",
        "device",
        "threads",
        "gpu_memory_utilization",
        "max_memory_bytes",
        "kv_cache_memory_bytes",
        "kv_cache_size_bytes",
        "prepare",
    )
    settings = {name: value for name, value in asdict(config).items() if name not in own}
    described = asdict(model_config)
    quantized = described.pop("quantization_config") or {}
    described |= {f"quantization_config.{name}": quantized[name] for name in sorted(quantized)}
    values = {"device": device.type} | settings
    values |= {f"{name} in config.json": value for name, value in described.items()}
    group.check_equal({name: str(value) for name, value in values.items()} | fingerprints(config.model))


def _identity(config: EngineConfig, model: ModelConfig, group: Group, runner: Runner, spec: KVCacheSpec) -> str:
    """Everything that the bytes of a block of the cache depend on but the tokens."""
    backend, directory = runner.backend, Path(config.model)
    form = Form.of(config.dtype, config.quantization, config.group_size)
    weights = source_of(directory, model.quantization_config)
    if standalone := digest_of(directory):
        weights[MANIFEST] = standalone
    kernels = (backend.kernels or "").partition(" ")[0]
    arithmetic = (backend.name, backend.cache_layout, kernels, runner.device.type)
    parts = (weights, asdict(model), str(form), str(spec), arithmetic, (group.rank, group.size))
    return json.dumps(parts, sort_keys=True, default=str)


def _served(table: list[tuple[str, str]]) -> str:
    """Which backend serves which ops, in one line."""
    ops: dict[str, list[str]] = {}
    for op, backend in table:
        ops.setdefault(backend, []).append(op)
    return "; ".join(f"{', '.join(served)} by {backend}" for backend, served in ops.items())


def resolve_dtype(asked: str, stored: str) -> torch.dtype:
    """The dtype to compute in. float16 checkpoints are computed in bfloat16: the family overflows float16."""
    if asked == "auto" and stored == "float16":
        log.info("float16 weights are computed in bfloat16: this family's activations overflow float16")
    name = asked if asked != "auto" else "bfloat16" if stored == "float16" else stored
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def make_kv_cache_config(
    config: EngineConfig, model: ModelConfig, group: Group, backend: Backend, spec: KVCacheSpec, weights: int
) -> KVCacheConfig:
    """Divide the free memory: weights (bytes of this rank), a step's activations, blocks of the cache.

    Raises NotEnoughMemory with what is needed and what there is; ConfigError if max_model_len exceeds the model's own.
    """
    longest = model.context
    if config.max_model_len is not None and config.max_model_len > longest:
        raise ConfigError(
            f"max_model_len={config.max_model_len}",
            f"at most {longest}: the model knows no position beyond",
            f"set max_model_len to {longest} or less, or leave it out",
        )
    device = backend.device
    free, usable, limit = _usable(config, group, device)
    activations = activation_bytes(config, model)
    block = backend.kv_block_bytes(spec)
    blocks_for: Callable[[int], int] = lambda tokens: -(-tokens // config.block_size)
    least = least_cache(config, backend, spec)
    cache = max(least, config.kv_cache_memory_bytes or 0)
    left = usable - weights - activations
    fits = group.all_reduce_min(int(left >= cache))  # all ranks go on, or none
    if left >= cache and not fits:
        raise NotEnoughMemory(
            f"too little memory for another of the {group.size} processes, which says more",
            "enough memory for weights, a step's activations and the KV cache on all of them; nothing has been loaded",
            "see that process's message",
        )
    if not fits:
        gib: Callable[[int], str] = lambda nbytes: f"{nbytes / 2**30:.2f} GiB"
        space = devices.address_space(device)
        limited = space is not None and space <= free
        raise NotEnoughMemory(
            f"{gib(weights + activations + cache)} needed on {device} by this process: {gib(weights)} for weights,"
            f" {gib(activations)} for a step's activations, {gib(cache)} for the KV cache;"
            f" {gib(free)} free for it{' within its limit of memory (ulimit -v)' if limited else ''},"
            f" of which {gib(usable)} may be used ({limit})",
            "enough memory for all three; nothing has been loaded",
            f"{'raise the limit (ulimit -v unlimited)' if limited else 'free some memory'}, on a CPU read experts from"
            " disk (prepare), share the model among more processes (tensor_parallel_size), quantise it (quantization),"
            f" lower max_model_len or max_num_batched_tokens, or raise {limit.partition('=')[0]}",
        )
    if config.kv_cache_memory_bytes is not None:
        left = config.kv_cache_memory_bytes
    else:
        left = min(left, max(devices.default_cache(device) or left, least))
    num_blocks = group.all_reduce_min(
        min(left // block, config.max_num_seqs * blocks_for(config.max_model_len or longest))
    )
    max_model_len = min(config.max_model_len or longest, num_blocks * config.block_size)
    if config.max_model_len is None and max_model_len < longest:
        log.warning("context limited to %d of the model's %d tokens by its cache's memory", max_model_len, longest)
    return KVCacheConfig(num_blocks, max_model_len)


def _usable(config: EngineConfig, group: Group, device: torch.device) -> tuple[int, int, str]:
    """Bytes that are free for this process, those of them that may be used, and the setting that says so."""
    free = group.all_reduce_min(devices.free_memory(device, group.local_size))  # all look before any of them takes some
    share, cap = int(free * config.gpu_memory_utilization), config.max_memory_bytes
    if cap is not None and cap < share:
        return free, cap, f"max_memory_bytes={cap}"
    return free, share, f"gpu_memory_utilization={config.gpu_memory_utilization}"


def expert_slots(
    config: EngineConfig, model: ModelConfig, group: Group, backend: Backend, spec: KVCacheSpec, loader: PackedLoader
) -> int | None:
    """Slots for routed experts beside everything else, or None where all experts fit into memory.

    Unless a size is asked for, the KV cache gets an eighth of what experts and cache share. Raises NotEnoughMemory
    where there are fewer slots than two tokens need.
    """
    free, usable, limit = _usable(config, group, backend.device)
    least = least_cache(config, backend, spec)
    shared = usable - loader.dense_bytes - activation_bytes(config, model)
    if shared - (config.kv_cache_memory_bytes or least) >= loader.expert_bytes:
        return None
    cache, slots = divide_paged(
        shared, config.kv_cache_memory_bytes, least, devices.default_cache(backend.device), loader.slot_bytes
    )
    if slots < 2 * model.num_experts_per_tok:
        needed = usable - shared + cache + 2 * model.num_experts_per_tok * loader.slot_bytes
        raise NotEnoughMemory(
            f"{usable / 2**30:.2f} GiB of memory ({limit}; {free / 2**30:.2f} GiB are free), of which"
            f" {max(shared, 0) / 2**30:.2f} are left for KV cache and experts",
            f"{needed * 65 / 64 / 2**30:.2f} GiB or more, with which experts are read from disk",
            f"raise {limit.partition('=')[0]}, free some memory, or lower max_model_len or max_num_batched_tokens",
        )
    return slots


def divide_paged(shared: int, asked: int | None, least: int, default: int | None, slot_bytes: int) -> tuple[int, int]:
    """(bytes of the KV cache, slots) of what cache and routed experts share, where not all experts fit."""
    cache = asked or max(least, min(shared // 8, default or shared))
    return cache, (shared - cache - shared // 64) // slot_bytes  # what is free changes while one looks


def least_cache(config: EngineConfig, backend: Backend, spec: KVCacheSpec) -> int:
    """Bytes of the smallest cache that the settings allow; ConfigError if they ask for less than that."""
    block, asked = backend.kv_block_bytes(spec), config.kv_cache_memory_bytes
    least = -(-(config.max_model_len or config.block_size) // config.block_size) * block
    if asked is not None and asked < least:
        raise ConfigError(
            f"kv_cache_memory_bytes={asked} for a context of {least // block * config.block_size} tokens",
            f"at least {least} bytes ({block} for each block of {config.block_size} tokens)",
            "raise kv_cache_memory_bytes or lower max_model_len",
        )
    return least


def activation_bytes(config: EngineConfig, model: ModelConfig) -> int:
    """A generous estimate of what one step holds at its widest moment."""
    hidden, top_k = model.hidden_size, model.num_experts_per_tok
    attention = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
    wide = max(3 * attention, 3 * model.intermediate_size, 3 * top_k * (hidden + model.moe_intermediate_size))
    tokens = min(config.max_num_batched_tokens, config.max_model_len or model.context)
    rows = min(config.max_num_seqs, tokens)
    return 4 * (tokens * (4 * hidden + wide) + 2 * rows * model.vocab_size)
