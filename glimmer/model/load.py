"""names x checkpoint -> a filled model, with every name accounted for.

`Plan` looks at headers only: what is missing, superfluous or misshapen is refused, and the bytes of this rank's share
are known, before the first weight is read. `Plan.fill` then walks the leaves; each asks for its own slices, which are
copied once from the memory-mapped files into the form that the backend wants.
"""

from collections.abc import Callable, Iterator

import torch

from glimmer.checkpoint import formats
from glimmer.checkpoint.files import Checkpoint
from glimmer.config import ModelConfig
from glimmer.errors import CheckpointError
from glimmer.model import names
from glimmer.model.glm4_moe import Glm4Moe
from glimmer.parallel import Group
from glimmer.weight import Weight

SHOWN = 8  # names in an error message; the rest is counted
MTP_ONLY = ("eh_proj.", "enorm.", "hnorm.", "embed_tokens.", "shared_head.")  # what an ordinary layer does not have


class Plan:
    """What this rank will read. Raises CheckpointError with the names when the checkpoint is not exactly the model.

    nbytes: bytes of this rank's weights once loaded in `dtype`. mtp: as Glm4Moe wants it, or None when not asked for.
    """

    def __init__(
        self, config: ModelConfig, checkpoint: Checkpoint, group: Group, dtype: torch.dtype, mtp: bool = False
    ):
        formats.check(config.quantization_config)
        self.checkpoint, self.dtype, self._config = checkpoint, dtype, config
        self._prefix = names.mtp_prefix(config)
        self.mtp = self._copies() if mtp else None
        self.entries = list(names.entries(config, group, self.mtp))
        self.nbytes = self._account()

    def _copies(self) -> tuple[bool, bool]:
        """Which copies the MTP layer brings along; CheckpointError if there is no such layer."""
        if f"{self._prefix}eh_proj.weight" not in self.checkpoint:
            raise CheckpointError(
                f"no MTP layer in {self.checkpoint.directory} ({self._prefix}eh_proj.weight is not there)",
                "a checkpoint with its multi-token-prediction layer, for drafting",
                "run without drafting, or add the file that holds the layer (GLM-4.7: mtp.safetensors)",
            )
        own = ("embed_tokens.weight", "shared_head.head.weight")
        return tuple(self._prefix + name in self.checkpoint for name in own)

    def _account(self) -> int:
        """Compare both sides, names and shapes; return the bytes of our cut."""
        missing, misshapen, wanted, nbytes = [], [], set(), 0
        for entry in self.entries:
            width = 4 if entry.exact else self.dtype.itemsize
            for part in (part for group in entry.groups for part in group):
                wanted.add(f"{part.name}.weight")
                if f"{part.name}.weight" not in self.checkpoint:
                    missing.append(f"{part.name}.weight")
                    continue
                kind, shape = formats.stored(self.checkpoint, part.name)
                if shape != part.shape:
                    misshapen.append(f"{part.name}.weight is {list(shape)}, config.json says {list(part.shape)}")
                out, inner = part.local_shape
                if kind == "fp8":
                    wanted.add(f"{part.name}.weight_scale")
                nbytes += out * inner + 4 * out if kind == "fp8" else out * inner * width
            for name, length, cut in entry.vectors:
                wanted.add(name)
                if name not in self.checkpoint:
                    missing.append(name)
                elif self.checkpoint.shape(name) != (length,):
                    misshapen.append(f"{name} is {list(self.checkpoint.shape(name))}, config.json says {[length]}")
                elif self.checkpoint.dtype(name) not in formats.FLOATS:
                    dtype = str(self.checkpoint.dtype(name)).removeprefix("torch.")
                    misshapen.append(f"{name} is {dtype}, where bfloat16, float16 or float32 can be read")
                nbytes += (length if cut is None else cut[1] - cut[0]) * width
        superfluous = sorted(self.checkpoint.names() - wanted - self._left_out())
        self._refuse("missing", missing, "download the checkpoint's missing files, or restore its own config.json")
        self._refuse("of another shape or type", misshapen, "use the config.json that belongs to these weights")
        self._refuse("superfluous", superfluous, "use the config.json that belongs to these weights")
        return nbytes

    def _left_out(self) -> set[str]:
        """What we knowingly leave: the MTP layer, when nobody asked for it. An ordinary layer there is not it."""
        layer = {name for name in self.checkpoint.names() if name.startswith(self._prefix)}
        is_mtp = any(name.removeprefix(self._prefix).startswith(MTP_ONLY) for name in layer)
        return layer if self.mtp is None and is_mtp else set()

    def _refuse(self, what: str, found: list[str], todo: str) -> None:
        if found:
            listed = ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
            raise CheckpointError(
                f"{len(found)} tensor{'s' * (len(found) > 1)} {what} in {self.checkpoint.directory}: {listed}",
                f"exactly the tensors of a glm4_moe with {self._config.num_hidden_layers} layers and"
                f" {self._config.n_routed_experts} experts, as config.json describes it",
                todo,
            )

    def fill(self, model: Glm4Moe, device: torch.device, progress: Callable[[int], None] = lambda nbytes: None) -> None:
        """Read our cuts into `model`. progress is told the bytes on disk of each group of matrices as it is done."""
        # Thousands of small copies: a second thread gains a fifth on an idle machine, and on a busy one it waits at
        # every one of them.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            self._fill(model, device, progress)
        finally:
            torch.set_num_threads(threads)

    def _fill(self, model: Glm4Moe, device: torch.device, progress: Callable[[int], None]) -> None:
        for entry in self.entries:
            leaf, dtype = model.get_submodule(entry.leaf), torch.float32 if entry.exact else self.dtype
            vectors = [formats.vector(self.checkpoint, name, cut) for name, _, cut in entry.vectors]
            if not entry.groups:
                leaf.fill(vectors[0], dtype, device)
            elif len(entry.groups) > 1 or ".experts." in entry.leaf:
                leaf.fill(self._experts(entry, progress), dtype, device)
            elif entry.leaf.endswith("embed_tokens"):
                leaf.fill(self._read(entry.groups[0])[0].dequantize(dtype), dtype, device)
            else:
                leaf.fill(self._read(entry.groups[0]), torch.cat(vectors) if vectors else None, dtype, device)
            self.checkpoint.release()
            progress(0 if len(entry.groups) > 1 else sum(self._nbytes(part) for g in entry.groups for part in g))

    def _experts(self, entry: names.Entry, progress: Callable[[int], None]) -> Iterator[list[Weight]]:
        """One expert at a time, its pages given back before the next is touched."""
        for parts in entry.groups:
            yield self._read(parts)
            self.checkpoint.release()
            progress(sum(self._nbytes(part) for part in parts))

    def _read(self, parts: tuple[names.Part, ...]) -> list[Weight]:
        weights = [formats.read(self.checkpoint, part.name, part.rows, part.cols) for part in parts]
        if len({w.kind for w in weights}) > 1:
            kinds = ", ".join(f"{p.name}: {w.kind}" for p, w in zip(parts, weights))
            raise CheckpointError(
                f"matrices that are computed together are stored in different formats ({kinds})",
                "one format for q, k and v, and one for gate and up",
                "use a checkpoint that quantises them alike",
            )
        return weights

    def _nbytes(self, part: names.Part) -> int:
        """Bytes of our cut on disk."""
        out, inner = part.local_shape
        return out * inner * self.checkpoint.dtype(f"{part.name}.weight").itemsize
