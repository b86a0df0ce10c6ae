"""What quantisation costs: the model in bf16 and in each quantised form reads the same text, position by position;
and once more in bf16 with its KV cache in int8.

    python tools/quality.py [--model DIR] [--text FILE] [--write docs/numerics.md]

Without --text the texts are the demo model's held-out conversations, of which only what the model would have written
counts (everything after the last role tag of the assistant). Prints a markdown table; --write puts it between the marks
in a document. KL is the mean over positions of KL(bf16 || quantised), in nats; top-1 is how often both think the same
token likeliest; perplexity is of the text itself. The operations are those that serve this device (GLIMMER_BACKEND).
"""

import argparse
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from glimmer import device as devices
from glimmer.backends import selection
from glimmer.backends.base import KVCacheSpec
from glimmer.batch import Batch
from glimmer.checkpoint.files import Checkpoint
from glimmer.group import Group
from glimmer.model.load import WeightLoader, build_model
from glimmer.model_config import ModelConfig
from glimmer.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
BF16, INT8 = torch.bfloat16, torch.int8
FORMS = {"bf16": (None, None, BF16), "bf16, KV cache int8": (None, None, INT8), "int8": ("int8", None, BF16),
         "int4, groups of 32": ("int4", 32, BF16), "int4, groups of 128": ("int4", 128, BF16)}  # fmt: skip
COUNTS = {"fact": 60, "introduction": 40, "sum": 60, "json": 40, "repeat": 30, "tool": 40}
BEGIN, END = "<!-- quality: written by tools/quality.py -->", "<!-- quality ends -->"
BLOCK, LONGEST = 16, 2048  # slots of a block of cache; tokens of a text
ASSISTANT = "<|assistant|>"


@dataclass
class Marks:
    """One form's sums over all positions."""

    nbytes: int = 0
    positions: int = 0
    kl: float = 0.0
    same: int = 0
    loss: float = 0.0


class Reader:
    """A loaded model that gives the logits of all positions of a text."""

    def __init__(
        self, directory: Path, quantization: str | None, group_size: int | None, kept: torch.dtype, device: torch.device
    ):
        config = ModelConfig.load(directory)
        self.device = device
        with Checkpoint(directory) as checkpoint, torch.inference_mode():
            ops = selection.choose(device, devices.share_cores(1))
            residual = devices.residual_dtype(device, torch.bfloat16)
            self.model = build_model(config, checkpoint, Group(), ops, residual).eval()
            loader = WeightLoader(self.model, checkpoint, torch.bfloat16, quantization, group_size)
            loader.load()
        self.nbytes = loader.nbytes
        heads, layers = config.num_key_value_heads, config.num_hidden_layers
        self.blocks = list(range(-(-LONGEST // BLOCK)))
        self.kv = ops.allocate_kv(KVCacheSpec(layers, BLOCK, heads, config.head_dim, kept), len(self.blocks))

    @torch.inference_mode()
    def logprobs(self, ids: list[int], first: int) -> Tensor:
        """(len(ids) - first, V) float32: what it expects at each place from `first` on."""
        places = range(len(ids))
        batch = Batch.of(ids, places, places, [self.blocks], places[first - 1 : -1], [len(ids)], [len(ids)])
        batch = self.model.backend.prepare(batch)
        return self.model.logits(self.model(batch, self.kv)[batch.logits_indices]).float().log_softmax(-1).cpu()


def held_out(tokenizer: Tokenizer, seed: int) -> list[tuple[list[int], int]]:
    """(token ids, first place that counts) of finished conversations that the demo model was not trained on."""
    sys.path.insert(0, str(ROOT / "tools" / "demo_model"))
    from dialogue import Round, render
    from generate import heldout_examples

    names, texts = [field.name for field in fields(Round)], []
    for item in heldout_examples(seed, COUNTS):
        turn = Round(**{name: item[name] for name in names})
        ids = tokenizer.encode(render([turn], item["tools"]), add_special_tokens=False)
        (tag,) = tokenizer.encode(ASSISTANT, add_special_tokens=False)
        texts.append((ids, len(ids) - ids[::-1].index(tag)))
    return texts


def from_file(tokenizer: Tokenizer, path: Path) -> list[tuple[list[int], int]]:
    """A text in pieces; the first half of each is context and does not count."""
    ids = tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False)
    pieces = [ids[i : i + LONGEST] for i in range(0, len(ids), LONGEST // 2)]
    return [(piece, min(len(piece), LONGEST) // 2) for piece in pieces if len(piece) > 8]


def measure(directory: Path, texts: list[tuple[list[int], int]], device: torch.device) -> dict[str, Marks]:
    """Each form in turn, against the log-probabilities of the first, bf16."""
    results, exact = {}, []
    for form, how in FORMS.items():
        reader = Reader(directory, *how, device)
        marks = results[form] = Marks(reader.nbytes)
        for i, (ids, first) in enumerate(texts):
            found = reader.logprobs(ids, first)
            if form == "bf16":
                exact.append(found)
            marks.positions += len(found)
            marks.kl += float((exact[i].exp() * (exact[i] - found)).sum())
            marks.same += int((exact[i].argmax(1) == found.argmax(1)).sum())
            marks.loss -= float(found.gather(1, torch.tensor(ids[first:])[:, None]).sum())
    return results


def table(results: dict[str, Marks]) -> list[str]:
    """The figures as markdown."""
    lines = ["| weights | size | mean KL to bf16 | same top-1 | perplexity |", "|---|---|---|---|---|"]
    whole = results["bf16"].nbytes
    for form, marks in results.items():
        n = marks.positions
        cells = [form, f"{marks.nbytes / whole:.0%}", f"{marks.kl / n:.2g}", f"{marks.same / n:.2%}"]
        lines.append("| " + " | ".join([*cells, f"{torch.tensor(marks.loss / n).exp():.4f}"]) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "glimmer" / "demo")
    parser.add_argument("--text", type=Path, help="a text in UTF-8, instead of the demo model's held-out conversations")
    parser.add_argument("--seed", type=int, default=3, help="of the held-out conversations")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--write", type=Path, help="a document whose table is to be rewritten")
    args = parser.parse_args()
    device, tokenizer = devices.resolve(args.device, 0), Tokenizer.load(args.model)
    texts = from_file(tokenizer, args.text) if args.text else held_out(tokenizer, args.seed)
    results = measure(args.model, texts, device)
    source = args.text.name if args.text else "held-out conversations of the demo model"
    lines = [f"{results['bf16'].positions:,} positions of {len(texts)} texts ({source}):", "", *table(results)]
    print("\n".join(lines))
    if args.write:
        document = args.write.read_text(encoding="utf-8")
        fresh = "\n".join([BEGIN, "", *lines, "", END])
        document, count = re.subn(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: fresh, document, flags=re.DOTALL)
        if count != 1:
            sys.exit(f"{args.write} has {count} places for the table; it needs one, from {BEGIN} to {END}")
        args.write.write_text(document, encoding="utf-8")


if __name__ == "__main__":
    main()
