"""The Triton backend on a GPU, in one command: are its ops right, and how fast are they and a model beside plain torch?

usage: gpu.py [--quick] [--parts PART ...] [--minutes N] [--out FILE] [--device DEVICE]

Each figure is a JSON line, written at once, to the output and to --out; a part that fails is a line with its error, and
the rest goes on. --parts: `right`, each op against the reference backend on the same device; `op`, what the device does
at best, and each op with GLM-4.5-Air's widths at 1 to 2,048 rows, eager and as a CUDA graph; `model`, prompts and
decoding (tokens a second) of a random checkpoint of Air's widths with two layers, by Triton, by Triton without graphs,
and by the reference. --quick: narrow widths and few rows, a minute. --minutes: what has not begun by then is left out.
The exit status is 1 if a part failed. TRITON_INTERPRET=1 and --device cpu try the program itself out, with --quick.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from make_checkpoint import CONFIG
from make_checkpoint import main as make_checkpoint

from glimmer.backends.base import KVCacheSpec, RouteRule
from glimmer.backends.reference import Reference
from glimmer.batch import Batch
from glimmer.errors import ConfigError, GlimmerError
from glimmer.weight import ExpertWeights, Weight

AIR = {
    "hidden_size": 4096, "num_attention_heads": 96, "num_key_value_heads": 8, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "num_hidden_layers": 2,
}  # fmt: skip
NARROW = {
    "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256,
    "moe_intermediate_size": 128, "num_hidden_layers": 2, "n_routed_experts": 8, "vocab_size": 1024,
}  # fmt: skip
KINDS = ("plain", "fp8", "int8", "int4")
COLD = 256 << 20  # bytes of weights that calls take in turn, so that none finds its own in a cache
BF16 = torch.bfloat16


class Report:
    """JSON lines, and how many parts have failed."""

    def __init__(self, out: Path | None, minutes: float):
        self.file = None if out is None else out.open("w")
        self.end = time.monotonic() + 60 * minutes
        self.failed = 0

    def line(self, part: str, **figures: Any) -> None:
        text = json.dumps({"part": part} | figures)
        for file in (sys.stdout, self.file):
            if file is not None:
                print(text, file=file, flush=True)

    def part(self, part: str, run: Callable[[], dict[str, Any]], **what: Any) -> None:
        """Run it, and write what it returns or how it failed."""
        if time.monotonic() > self.end:
            self.line(part, **what, left_out="no time is left (--minutes)")
            return
        try:
            figures = run()
        except Exception as error:  # whatever it is, the other parts are worth having
            self.failed += 1
            figures = {"error": str(error) or type(error).__name__, "traceback": traceback.format_exc()[-1500:]}
        self.line(part, **what, **figures)


class Bench:
    """The parts. ops: the Triton backend; config: the widths."""

    def __init__(self, ops: Reference, config: dict[str, Any], rows: tuple[int, ...], context: int):
        self.ops, self.config, self.rows, self.context = ops, CONFIG | config, rows, context
        self.device, self.reference = ops.device, Reference(ops.device)
        self.generator = torch.Generator(self.device).manual_seed(1)
        self.hidden, self.width = self.config["hidden_size"], self.config["moe_intermediate_size"]
        self.heads, self.kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        self.dim, self.experts = self.config["head_dim"], self.config["n_routed_experts"]

    # ---- inputs

    def noise(self, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).to(dtype)

    def weight(self, kind: str, out: int, inner: int) -> Weight:
        plain = Weight("plain", self.noise(out, inner) * inner**-0.5)
        return plain if kind == "plain" else plain.quantize(kind, 128)

    def batch(self, rows: int) -> Batch:
        """So many sequences that decode, each after `context` tokens; beyond 32 rows, one prompt."""
        counts = [1] * rows if rows <= 32 else [rows]
        lengths = [self.context + n if n == 1 else n for n in counts]
        blocks = [-(-length // 16) for length in lengths]
        tables = [list(range(sum(blocks[:s]), sum(blocks[: s + 1]))) for s in range(len(blocks))]
        slots = [
            table[p // 16] * 16 + p % 16
            for table, n, length in zip(tables, counts, lengths)
            for p in range(length - n, length)
        ]
        return Batch.of([0] * rows, [0] * rows, slots, tables, [0], counts, lengths).to(self.device)

    # ---- right or wrong

    def right(self, report: Report) -> None:
        for rows in (1, 7, 100):
            for name, call in self.cases(rows).items():
                report.part(
                    "right", partial(self.compare, call, 0.05 if "experts" in name else 0.01), op=name, rows=rows
                )

    def compare(self, call: Callable[[Reference], Any], allowed: float) -> dict[str, Any]:
        """allowed: roundings to bfloat16 take 0.004; experts' inner rows may fall on another code of FP8."""
        found, expected = call(self.ops).double(), call(self.reference).double()
        assert found.isfinite().all(), "there are numbers that are not finite"
        error = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
        assert error < allowed, f"off by {error:.2g} of the result's size"
        return {"error_of_norm": error}

    def cases(self, rows: int) -> dict[str, Callable[[Reference], Any]]:
        """{name: the result of an op}, the same inputs for whichever backend."""
        x, residual, norm = self.noise(rows, self.hidden), self.noise(rows, self.hidden), self.noise(self.hidden)
        rule, batch = RouteRule(min(8, self.experts), 1, 1, True, 1.0), self.batch(rows)
        logits, bias = (
            self.noise(rows, self.experts, dtype=torch.float32),
            self.noise(self.experts, dtype=torch.float32),
        )
        ids, scores = self.reference.route(logits, bias, rule)
        qkv = self.noise(rows, self.heads + 2 * self.kv_heads, self.dim)
        angles = self.noise(rows, self.dim // 4, dtype=torch.float32)

        def rope(ops: Reference) -> torch.Tensor:
            own = qkv.clone()
            q, k, _ = own.split((self.heads, self.kv_heads, self.kv_heads), 1)
            ops.rope_(q, k, angles.cos(), angles.sin())
            return own

        def linear(kind: str, ops: Reference) -> torch.Tensor:
            self.generator.manual_seed(2)
            weight = self.weight(kind, 2 * self.hidden, self.hidden)
            return ops.linear(x, ops.pack_linear([weight], BF16), None)

        def experts(kind: str, ops: Reference) -> torch.Tensor:
            self.generator.manual_seed(3)
            return ops.experts(x, ids, scores, self.expert_set(ops, kind))

        def attention(dtype: torch.dtype, ops: Reference) -> torch.Tensor:
            self.generator.manual_seed(4)
            kv, q, own = self.cache(ops, dtype, batch), qkv[:, : self.heads], qkv[:, self.heads :]
            ops.store_kv_(own[:, : self.kv_heads], own[:, self.kv_heads :], kv, batch.slot_mapping)
            return ops.attention(q, kv, batch, self.dim**-0.5)

        cases: dict[str, Callable[[Reference], Any]] = {
            "embed": lambda ops: ops.embed(torch.arange(rows, device=self.device), self.noise_of_table(), 3),
            "rms_norm": lambda ops: ops.rms_norm(x, norm, 1e-5),
            "add_rms_norm": lambda ops: torch.cat(ops.add_rms_norm(x, residual, norm, 1e-5)),
            "swiglu": lambda ops: ops.swiglu(x),
            "rope_": rope,
            "route": lambda ops: torch.cat(ops.route(logits, bias, rule)),
        }
        cases |= {f"linear[{kind}]": partial(linear, kind) for kind in KINDS}
        cases |= {f"experts[{kind}]": partial(experts, kind) for kind in KINDS}
        return cases | {f"attention[{d}]": partial(attention, d) for d in (BF16, torch.int8)}

    def noise_of_table(self) -> torch.Tensor:
        self.generator.manual_seed(5)
        return self.noise(200, self.hidden)

    def expert_set(self, ops: Reference, kind: str) -> Any:
        """All experts of a layer; there are few different ones, since making them takes time."""
        make = lambda: ExpertWeights(
            [self.weight(kind, self.width, self.hidden), self.weight(kind, self.width, self.hidden)],
            self.weight(kind, self.hidden, self.width),
        )
        few = [make() for _ in range(4)]
        return ops.pack_experts((few[e % 4] for e in range(self.experts)), self.experts, BF16)

    def cache(self, ops: Reference, dtype: torch.dtype, batch: Batch) -> Any:
        """A layer's cache with keys and values in all of its slots."""
        blocks = int(batch.block_tables.max()) + 1
        (kv,) = ops.allocate_kv(KVCacheSpec(1, 16, self.kv_heads, self.dim, dtype), blocks)
        for first in range(0, blocks * 16, 4096):
            slots = torch.arange(first, min(first + 4096, blocks * 16), device=self.device)
            k, v = (self.noise(len(slots), self.kv_heads, self.dim) for _ in range(2))
            ops.store_kv_(k, v, kv, slots)
        return kv

    # ---- how fast

    def seconds(self, run: Callable[[], Any], count: int) -> float:
        """Of one call of `count` that `run` makes, the median of a few runs."""
        run()
        times = []
        for _ in range(5):
            self.synchronize()
            begin = time.perf_counter()
            run()
            self.synchronize()
            times.append(time.perf_counter() - begin)
        return sorted(times)[2] / count

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def copy(self) -> dict[str, Any]:
        source = torch.zeros(1 << (30 if self.device.type == "cuda" else 22), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return {"gb_per_s": 2 * source.nbytes / self.seconds(lambda: target.copy_(source), 1) / 1e9}

    def product(self) -> dict[str, Any]:
        size = 8192 if self.device.type == "cuda" else 128
        a, b = self.noise(size, size), self.noise(size, size)
        return {"tflops": 2 * size**3 / self.seconds(lambda: a @ b, 1) / 1e12}

    def speed(self, calls: list[Callable[[], torch.Tensor]], nbytes: int, operations: int) -> dict[str, Any]:
        """Of calls that take their operands in turn; nbytes and operations of one of them."""

        def all_of_them() -> torch.Tensor:
            for call in calls:
                last = call()
            return last

        took = {"eager": self.seconds(all_of_them, len(calls))}
        if self.ops.captures:
            took["graph"] = self.seconds(self.ops.capture(all_of_them).replay, len(calls))
        best = min(took.values())
        figures = {f"us_{how}": seconds * 1e6 for how, seconds in took.items()}
        return figures | {"gb_per_s": nbytes / best / 1e9, "tflops": operations / best / 1e12}

    def speeds(self, report: Report) -> None:
        report.part("copy", self.copy)
        report.part("product", self.product)
        kinds = [(self.linears, kind) for kind in KINDS] + [(self.expert_layers, kind) for kind in KINDS]
        for measure, of in [*kinds, (self.attentions, BF16), (self.attentions, torch.int8)]:
            report.part("ops", lambda m=measure, o=of: m(report, o) or {}, name=measure.__name__, of=str(of))
        report.part("ops", lambda: self.small(report) or {}, name="small")

    def linears(self, report: Report, kind: str) -> None:
        out = (self.heads + 2 * self.kv_heads) * self.dim
        first = self.ops.pack_linear([self.weight(kind, out, self.hidden)], BF16)
        more = max(1, COLD // first.nbytes) if self.device.type == "cuda" else 0
        packed = [first] + [self.ops.pack_linear([self.weight(kind, out, self.hidden)], BF16) for _ in range(more)]
        for rows in self.rows:
            x = self.noise(rows, self.hidden)
            calls = [partial(self.ops.linear, x, w, None) for w in packed]
            nbytes = first.nbytes + x.nbytes + 2 * rows * out
            run = partial(self.speed, calls, nbytes, 2 * rows * out * self.hidden)
            report.part("op", run, op=f"linear[{kind}]", rows=rows)

    def expert_layers(self, report: Report, kind: str) -> None:
        layer, top_k = self.expert_set(self.ops, kind), min(8, self.experts)
        for rows in self.rows:
            x = self.noise(rows, self.hidden)
            ids = self.noise(rows, self.experts, dtype=torch.float32).topk(top_k).indices
            call = partial(self.ops.experts, x, ids, torch.rand(rows, top_k, device=self.device), layer)
            nbytes = layer.nbytes * len(ids.unique()) // self.experts + x.nbytes
            run = partial(self.speed, [call], nbytes, 6 * rows * top_k * self.hidden * self.width)
            report.part("op", run, op=f"experts[{kind}]", rows=rows)

    def attentions(self, report: Report, dtype: torch.dtype) -> None:
        for rows in self.rows:
            batch = self.batch(rows)
            kv, q = self.cache(self.ops, dtype, batch), self.noise(rows, self.heads, self.dim)
            keys = int(batch.seq_lens.sum())
            pairs = keys if rows <= 32 else rows * (rows + 1) // 2  # of a query and a key
            call = partial(self.ops.attention, q, kv, batch, self.dim**-0.5)
            run = partial(self.speed, [call], keys * kv.token_bytes, 4 * pairs * self.heads * self.dim)
            report.part("op", run, op=f"attention[{dtype}]", rows=rows)

    def small(self, report: Report) -> None:
        norm, rule = self.noise(self.hidden), RouteRule(min(8, self.experts), 1, 1, True, 1.0)
        for rows in self.rows:
            x, bias = self.noise(rows, self.hidden), self.noise(self.experts, dtype=torch.float32)
            logits = self.noise(rows, self.experts, dtype=torch.float32)
            calls: dict[str, tuple[Callable[[], Any], int]] = {
                "add_rms_norm": (partial(self.add_rms_norm, x, norm), 4 * x.nbytes),
                "swiglu": (partial(self.ops.swiglu, x), x.nbytes * 3 // 2),
                "route": (lambda: self.ops.route(logits, bias, rule)[1], logits.nbytes),  # noqa: B023
            }
            for name, (call, nbytes) in calls.items():
                report.part("op", partial(self.speed, [call] * 20, nbytes, 0), op=name, rows=rows)

    def add_rms_norm(self, x: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        return self.ops.add_rms_norm(x, x, norm, 1e-5)[0]

    # ---- a whole model

    def models(self, report: Report, directory: Path, quick: bool) -> None:
        report.part("checkpoint", lambda: make_checkpoint(directory, self.config) or {}, layers=2)
        for quantization in (None, "fp8"):
            for backend, graphs in (("triton", True), ("triton", False), ("reference", False)):
                run = partial(self.model, directory, backend, graphs, quantization, quick)
                report.part("model", run, backend=backend, graphs=graphs, quantization=quantization)

    def model(self, directory: Path, backend: str, graphs: bool, quantization: str | None, quick: bool) -> dict:
        from glimmer import LLM, SamplingParams  # what it needs may be missing where the ops alone could run

        prompts, batches, steps = ((64,), (1, 2), 4) if quick else ((512, 2048), (1, 8, 32), 64)
        length = max(prompts) + steps + 1
        ids = torch.arange(max(prompts)).mul(7).add(3).remainder(self.config["vocab_size"] - 3).tolist()
        figures: dict[str, Any] = {}
        if self.device.type == "cuda":  # what torch keeps of other parts is not free for this one
            gc.collect()
            torch.cuda.empty_cache()
        with LLM(
            str(directory), device=str(self.device), backend=backend, skip_tokenizer_init=True, max_model_len=length,
            max_num_seqs=max(batches), quantization=quantization, enable_prefix_caching=False,
            kv_cache_memory_bytes=(max(batches) + 1) * (length + 16) * self.token_bytes(),
        ) as llm:  # fmt: skip
            llm._engine.runner.backend.captures &= graphs

            def took(batch: int, prompt: int, tokens: int) -> tuple[float, list]:
                params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
                asked = [{"prompt_token_ids": ids[:prompt]}] * batch
                begin = time.perf_counter()
                answers = llm.generate(asked, params)
                return time.perf_counter() - begin, answers[0].outputs[0].token_ids

            for prompt in prompts:
                took(1, prompt, 1)
                figures[f"prefill_{prompt}"] = prompt / min(took(1, prompt, 1)[0] for _ in range(3))
            for batch in batches:
                took(batch, 16, 3)  # compiles, and captures
                alone = min(took(batch, 16, 1)[0] for _ in range(2))
                seconds, tokens = min(took(batch, 16, 1 + steps) for _ in range(2))
                figures[f"decode_b{batch}"] = batch * steps / (seconds - alone)
            figures["tokens"] = tokens[:8]  # which all backends should agree on, but for roundings
        return figures

    def token_bytes(self) -> int:
        return 4 * self.config["num_hidden_layers"] * self.kv_heads * self.dim


def backend_for(device: torch.device) -> Reference:
    """The Triton backend. Raises ConfigError where it cannot run."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no GPU that torch knows", "an NVIDIA or AMD GPU", "run this where there is one")
    try:
        from glimmer.backends.cuda.backend import Cuda
    except ImportError as error:
        raise ConfigError(f"no Triton: {error}", "the package triton", "pip install triton") from None
    ops = Cuda(device)
    if device.type == "cpu" and not ops._interpreted:
        raise ConfigError("device 'cpu'", "a GPU, or Triton's interpreter", "set TRITON_INTERPRET=1 to try this out")
    return ops


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=("right", "op", "model"), default=("right", "op", "model"))
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    try:
        ops = backend_for(torch.device(args.device))
    except GlimmerError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    begin, report = time.monotonic(), Report(args.out, args.minutes)
    checks = Bench(ops, NARROW, (1,), 100)
    bench = Bench(ops, NARROW, (1, 8), 100) if args.quick else Bench(ops, AIR, (1, 8, 32, 512, 2048), 4096)
    name = torch.cuda.get_device_name() if ops.device.type == "cuda" else "Triton's interpreter"
    report.line("device", name=name, torch=torch.__version__)
    with torch.inference_mode():
        if "right" in args.parts:
            report.part("right", lambda: checks.right(report) or {})
        if "op" in args.parts:
            bench.speeds(report)
    if "model" in args.parts:
        with tempfile.TemporaryDirectory() as directory:
            bench.models(report, Path(directory) / "checkpoint", args.quick)
    report.line("end", failed=report.failed, seconds=time.monotonic() - begin)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
