"""`glimmer plan MODEL`: what a model needs, what a machine has, what lives where, how fast it will be, what to type.

Nothing is loaded: a checkpoint's headers suffice, and so does a config.json alone. --memory, --disk-speed, --gpu and
--nodes describe another machine. Not here: the planning itself (planning.py), what machines have (machine.py).
"""

import json
import shlex
from typing import TYPE_CHECKING, Any

from glimmer.cli import demo
from glimmer.cli.lazy import lazy
from glimmer.cli.options import ENGINE, Command, Option, count, pick, size, text, truth
from glimmer.config import MAX_BYTES, EngineConfig
from glimmer.errors import CheckpointError, ConfigError
from glimmer.hub import model_directory
from glimmer.model_config import check_directory

if TYPE_CHECKING:
    from glimmer.cli import machine as machines
    from glimmer.cli import planning
    from glimmer.cli.machine import Machine
    from glimmer.cli.planning import Candidate, Planner, Speed
    from glimmer.device import Card
else:
    machines, planning = lazy("glimmer.cli.machine"), lazy("glimmer.cli.planning")

GIB = 1 << 30
WIDTH = 22  # of the first column

COMMAND = Command(
    "plan",
    "What MODEL needs in each form, what this machine has, what will lie where, how fast it should be and what\n"
    "limits it, and the commands to paste. Nothing is loaded; MODEL may consist of a config.json alone.",
    "[MODEL] [options]",
    {
        "the model": pick(ENGINE, "model", "max_model_len", "kv_cache_dtype", "kv_cache_memory_bytes"),
        "the machine": {
            "memory": Option(
                size, "SIZE", "memory that may be taken, e.g. 64GB; with --gpu, on each card", "0.9 of what is free"
            ),
            "disk_speed": Option(size, "SIZE", "bytes a second that the disk reads, e.g. 1.5GB", "measured"),
            "gpu": Option(text, "NAME[:N]", "N cards of a known kind in place of this CPU, e.g. H100:2"),
            "nodes": Option(count, "N", "machines with so many cards each", "1"),
            **pick(ENGINE, "threads"),
            "remeasure": Option(
                truth, "", "measure this machine anew: else what was measured in the last 24 hours counts"
            ),
        },
        "output": {"json": Option(truth, "", "print the plan as one JSON object")},
    },
    positional=("model",),
)


def main(argv: list[str]) -> int:
    """Print the plan; 0 always, for that nothing fits is a finding too."""
    if COMMAND.asks_for_help(argv):
        return 0
    settings = COMMAND.read(argv)
    gpu, nodes, memory = settings.take("gpu"), settings.take("nodes", 1), settings.take("memory")
    speed, anew = settings.take("disk_speed"), settings.take("remeasure", False)
    if nodes > 1 and gpu is None:
        raise ConfigError(f"--nodes {nodes} without --gpu", "cards in each machine", "name them, e.g. --gpu H100:8")
    for name, value in (("memory", memory), ("disk_speed", speed)):
        if value is not None and not 1 <= value <= MAX_BYTES:
            raise ConfigError(
                f"{name}={value}", f"more than nothing, {MAX_BYTES:g} at most", f"correct {name}, or leave it out"
            )
    card = None if gpu is None else machines.accelerator(gpu)
    given = settings.fields(pick(ENGINE, "max_model_len", "kv_cache_dtype", "kv_cache_memory_bytes"))
    threads = settings.fields(pick(ENGINE, "threads"))
    name = settings.take("model") or str(demo.default_model(COMMAND.name))
    directory = check_directory(model_directory(name))
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"there is no config.json in {directory}", "a model's directory, or a config.json alone", "check the path"
        )
    planner = planning.Planner(directory, settings.check(EngineConfig, given | threads | {"model": str(directory)}))
    share = planner.engine.gpu_memory_utilization
    disk = machines.disk_of(directory, speed)
    if card is None:
        machine = machines.this_machine(planner.engine.threads, memory, share, disk, anew)
    else:
        machine = machines.describe(*card, nodes, memory, share, disk)
    candidates = planner.candidates(machine)
    if machine.kept is not None:
        machine.kept.keep()
    chosen = planning.recommended(candidates)
    commands = [] if chosen is None else _commands(name, planner, machine, chosen, given, memory)
    if settings.take("json", False):
        print(json.dumps(_as_json(name, planner, machine, candidates, chosen, commands), ensure_ascii=False))
        return 0
    _print_model(name, planner)
    _print_machine(machine)
    _print_candidates(candidates, machine)
    if chosen is None:
        print("\nnothing fits\n" + "\n".join(f"  {line}" for line in _nearest(planner, machine, candidates)))
        return 0
    print(f"\nrecommended: {chosen.name}\n" + "\n".join(f"  {line}" for line in _reasons(planner, machine, chosen)))
    print("\n" + "\n".join(commands))
    if machine.accelerator is not None and machine.accelerator.device_memory is not None:
        print("\n" + _parallel_config(machine))
    return 0


# ---------------------------------------------------------------------- text


def gib(nbytes: float) -> str:
    """e.g. 12.3 GiB."""
    return f"{nbytes / GIB:,.1f} GiB" if nbytes >= GIB / 10 else f"{nbytes / 2**20:,.1f} MiB"


def rate(value: float) -> str:
    """Three digits or more, e.g. 0.412, 35.9, 1,861."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _row(first: str, *cells: str) -> str:
    return (f"  {first:<{WIDTH}}" + "".join(f"{cell:>14}" for cell in cells)).rstrip()


def _print_model(name: str, planner: "Planner") -> None:
    config, stored = planner.config, planner.stored
    layers, experts, top = config.num_hidden_layers, config.n_routed_experts, config.num_experts_per_tok
    print(f"{name}: {layers} layers, {experts} experts, {top} a token, {config.context:,} tokens of context")
    print(f"  from {planning.source_files(planner.directory)}; stored in {planning.NAMES[stored.kind]}")
    for note in stored.notes:
        print(f"  {note}")
    held = {kind: planner.shapes(kind, None).held for kind in planning.NAMES}
    print("\n" + _row("needs", *planning.NAMES.values()))
    print(_row("routed experts", *(gib(one.experts) for one in held.values())))
    print(_row("the rest", *(gib(one.rest) for one in held.values())))
    if stored.mtp is not None:
        print(_row("MTP layer (drafts)", *(gib(one.mtp) for one in held.values())))
    print(_row("all", *(gib(one.nbytes) for one in held.values())))
    dtype = str(planner.cache_spec(1, False).dtype).removeprefix("torch.")
    print(f"  {'KV cache':<{WIDTH}}{planner.token_bytes() / 1024:,.1f} KiB a token, in {dtype}")


def _print_machine(machine: "Machine") -> None:
    print(f"\n{machine.name}")
    card, disk = machine.accelerator, machine.disk
    if card is not None:
        speeds = f"{card.bandwidth:,.0f} GB/s, {card.bfloat16:,.0f} TFLOP/s in bfloat16, {card.int8:,.0f} TOP/s in int8"
        print(f"  each card           {card.memory} GiB, {gib(machine.usable)} of it to take")
        print(f"  by its maker        {speeds}")
        print(f"  source              {card.source}")
        print("".join(f"  note                {note}\n" for note in machine.notes), end="")
        return
    print(f"  memory              {gib(machine.total)}, {gib(machine.free)} free, {gib(machine.usable)} to take")
    speed = f"{disk.speed / 1e9:,.2f} GB/s ({disk.how})" if disk.speed else f"speed unknown: {disk.how}"
    print(f"  disk                {gib(disk.free)} free, {speed}")
    print(f"  processor           {machine.threads} threads, {machine.kernels or 'no kernels of our own'}")
    if machine.limits is not None:
        read, bf16, int8 = (machine.limits[name] / 1e9 for name in ("read", "bfloat16", "int8"))
        print(
            f"  measured            reads {read:,.1f} GB/s; {bf16:,.0f} G operations/s in bfloat16, {int8:,.0f} in int8"
        )
        if machine.kept is not None and machine.kept.taken:
            hours, minutes = divmod(round(machine.kept.oldest / 60), 60)
            print(f"  {'':<20}up to {hours} h {minutes:02} min ago (--remeasure measures anew)")
    else:
        print("  measured            nothing: without the CPU kernels no speed is predicted")
    print("".join(f"  note                {note}\n" for note in machine.notes), end="")
    for one in machine.cards:
        like = machines.known(one)
        speeds = "bandwidth and arithmetic unknown"
        if like is not None:
            speeds = f"{like.bandwidth:,.0f} GB/s, {like.bfloat16:,.0f} TFLOP/s in bfloat16; to plan: --gpu {like.name}"
        print(f"  {one.device:<20}{one.name}, {gib(one.total)}, {gib(one.free)} free; {speeds}")


def _print_candidates(candidates: "list[Candidate]", machine: "Machine") -> None:
    print("\n" + _row("plan", "context", "prefill", "decode") + "   limited by")
    for found in candidates:
        where = {"memory": "all in memory", planning.DISK: "experts on disk", None: "does not fit"}[found.where]
        label = f"{found.name}, {where}"
        if found.where is None:
            needs = f"{gib(found.needed)} needed" + (
                f", {gib(found.paged)} with experts on disk" if found.paged else ""
            )
            print(_row(label) + f"   {needs}")
            continue
        speeds = [f"{rate(one.rate)}/s" if one else "unknown" for one in (found.prefill, found.decode)]
        limits = f"   {found.prefill.limit}, {found.decode.limit}" if found.prefill and found.decode else ""
        note = "" if found.available else "   (another checkpoint)"
        print(_row(label, f"{found.context:,}", *speeds) + limits + note)
    bound = ": bounds by the data sheet, not measured" if machine.accelerator is not None else ", without drafts"
    print(f"  tokens/s of a prompt of {planning.PROMPT} and of one answer after {planning.CONTEXT} tokens{bound}")


def _why(speed: "Speed") -> str:
    whole = sum(speed.seconds.values())
    parts = sorted(speed.seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{100 * value / whole:.0f} % {name}" for name, value in parts if value >= whole / 20)


def _reasons(planner: "Planner", machine: "Machine", chosen: "Candidate") -> list[str]:
    """Why, and what lives where."""
    held = planner.shapes(chosen.kind, machine).held
    weights = held.rest + (held.mtp if chosen.mtp else 0) + (held.experts if chosen.where == "memory" else 0)
    each = " on each card" if machine.accelerator is not None else ""
    lines = [f"memory{each}: {gib(weights)} of weights, {gib(chosen.cache)} of KV cache ({chosen.context:,} tokens)"]
    if chosen.where == planning.DISK:
        lines[0] += f", {gib(chosen.slots * held.record)} for {chosen.slots:,} of {chosen.experts:,} experts"
        how = "as counted so far" if chosen.counted else "were choices even; where they are not, fewer"
        lines.append(
            f"disk: all experts, {gib(held.experts)}; {1 - chosen.hits:.0%} of the chosen ones are read, {how}"
        )
    if planner.stored.mtp is not None and not chosen.mtp:
        lines.append("the MTP layer does not fit beside it: no drafts are made")
    if chosen.where == "memory" and machine.accelerator is None:
        most = min(planner.config.context, (machine.usable - chosen.needed) // planner.token_bytes() + chosen.least)
        if most > chosen.context and planner.engine.max_model_len is planner.engine.kv_cache_memory_bytes is None:
            wanted = most * planner.token_bytes() // 2**20 + 1
            lines.append(f"--kv-cache-memory-bytes {wanted}MB has room for {most:,} tokens")
    for what, speed in (("prefill", chosen.prefill), ("decode", chosen.decode)):
        if speed is not None and machine.accelerator is not None:
            lines.append(f"{what}: at most {rate(speed.rate)} tokens/s, by the {speed.limit} of the data sheet")
        elif speed is not None:
            lines.append(f"{what}: {rate(speed.rate)} tokens/s; of the time {_why(speed)}")
    if machine.accelerator is None and machine.disk.free < held.nbytes:
        lines.append(f"prepare writes {gib(held.nbytes)}, and {gib(machine.disk.free)} are free where the model lies")
    if chosen.where == planning.DISK:
        lines += _nearest(planner, machine, [chosen])
    return lines


def _nearest(planner: "Planner", machine: "Machine", candidates: "list[Candidate]") -> list[str]:
    """What would be enough, with numbers."""
    share, each = planner.engine.gpu_memory_utilization, " on each card" if machine.accelerator is not None else ""
    lines = []
    for found in candidates:
        if not found.available or found.where == "memory":
            continue
        add = f"{gib(found.needed - machine.usable)} more than the {gib(machine.usable)} to take{each}"
        lines.append(f"{found.name} all in memory with {found.least:,} tokens: {gib(found.needed)}{each}, {add}")
        if found.paged is not None and found.where is None:
            add = f"{gib(found.paged - machine.usable)} more"
            lines.append(f"{found.name} with experts on disk: {gib(found.paged)}, {add}")
        if machine.accelerator is not None:
            cards = planning.cards_for(planner, machine, found.kind)
            enough = f"{cards} cards like these" if cards else "on no number of such cards"
            lines.append(f"{found.name} fits on {enough}" if cards else f"{found.name} fits {enough}")
    if not lines:
        lines.append("no form that can be made of this checkpoint fits; another checkpoint may (see above)")
    if machine.accelerator is None and not machine.described:
        lines.append(f"to take is {share:.0%} of what is free: what others free is won (--memory SIZE plans with more)")
    return lines


# ---------------------------------------------------------------------- commands


def _commands(
    name: str, planner: "Planner", machine: "Machine", chosen: "Candidate", given: dict[str, Any], memory: int | None
) -> list[str]:
    """What to paste."""
    flags = [] if chosen.as_stored else [f"--quantization {chosen.name}"]
    prepare = [f"glimmer prepare {shlex.quote(name)} {' '.join(flags)}".rstrip()]
    for key, value in given.items():
        flags.append(f"--{key.replace('_', '-')} {value}")
    if machine.cards:
        flags.append("--device cpu")  # "auto" would take a card, for which this is no plan
    if chosen.where == planning.DISK and "max_model_len" not in given:
        flags.append(f"--max-model-len {chosen.context}")  # else slots get more, and the cache less
    card = machine.accelerator
    if memory is not None:
        flags.append(f"--memory {memory // 2**20}MB")
    elif card is not None and card.device_memory is not None:
        flags.append(f"--memory {card.device_memory}")
    if machine.processes == 1:
        own = [] if card is not None or (planner.directory / "packed.json").is_file() else prepare
        return [*own, f"glimmer serve {shlex.quote(name)} {' '.join(flags)}".rstrip()]
    start = f"torchrun --nproc-per-node {machine.processes // machine.nodes}"
    on_each = []
    if machine.nodes > 1:
        on_each = [f"# on each machine, with RANK 0 to {machine.nodes - 1} and the ADDRESS of the first"]
        start += f" --nnodes {machine.nodes} --node-rank RANK --master-addr ADDRESS --master-port 29500"
    flags.append(f"--tensor-parallel-size {machine.processes}")
    return [*on_each, f"{start} -m glimmer serve {shlex.quote(name)} {' '.join(flags)}"]


def _parallel_config(machine: "Machine") -> str:
    """The advice of the guide's appendix, as its YAML files have it."""
    assert machine.accelerator is not None
    return (
        "# in a configuration for MindFormers (docs/mindformers.md). Ascend is preliminary here: not measured\n"
        f"parallel_config:\n  data_parallel: 1\n  model_parallel: {machine.processes}\n"
        f'context:\n  max_device_memory: "{machine.accelerator.device_memory}"'
    )


# ---------------------------------------------------------------------- JSON


def _as_json(
    name: str,
    planner: "Planner",
    machine: "Machine",
    candidates: "list[Candidate]",
    chosen: "Candidate | None",
    commands: list[str],
) -> dict[str, Any]:
    """Everything that is printed; bytes, bytes/s, operations/s, tokens/s."""
    config, stored, card, disk = planner.config, planner.stored, machine.accelerator, machine.disk
    held = {planning.NAMES[kind]: planner.shapes(kind, None).held for kind in planning.NAMES}
    parallel = None
    if card is not None and card.device_memory is not None:
        parallel = {"data_parallel": 1, "model_parallel": machine.processes, "max_device_memory": card.device_memory}
    return {
        "model": name,
        "stored": planning.NAMES[stored.kind],
        "headers": stored.complete,
        "notes": list(stored.notes),
        "layers": config.num_hidden_layers,
        "experts": config.n_routed_experts,
        "context": config.context,
        "needs": {
            kind: {"experts": one.experts, "rest": one.rest, "mtp": one.mtp, "all": one.nbytes}
            for kind, one in held.items()
        },
        "kv_bytes_per_token": planner.token_bytes(),
        "machine": {
            "name": machine.name,
            "processes": machine.processes,
            "nodes": machine.nodes,
            "memory": {"total": machine.total, "free": machine.free, "usable": machine.usable},
            "disk": {"free": disk.free, "speed": disk.speed, "how": disk.how},
            "threads": machine.threads,
            "kernels": machine.kernels,
            "limits": machine.limits,
            "source": None if card is None else card.source,
            "notes": list(machine.notes),
            "accelerators": [_card_json(one) for one in machine.cards],
        },
        "candidates": [_candidate_json(found) for found in candidates],
        "recommended": None if chosen is None else chosen.name,
        "commands": commands,
        "parallel": parallel,
        "nearest": _nearest(planner, machine, candidates if chosen is None else [chosen]),
    }


def _card_json(card: "Card") -> dict[str, Any]:
    like = machines.known(card)
    return card._asdict() | {
        "bandwidth": None if like is None else like.bandwidth * 1e9,
        "bfloat16": None if like is None else like.bfloat16 * 1e12,
        "int8": None if like is None else like.int8 * 1e12,
    }


def _candidate_json(found: "Candidate") -> dict[str, Any]:
    def speed(one: "Speed | None") -> dict[str, Any] | None:
        if one is None:
            return None
        return {"tokens_per_second": one.rate, "limited_by": one.limit, "seconds": one.seconds}

    return {
        "form": found.name,
        "available": found.available,
        "where": found.where,
        "needed": found.needed,
        "needed_with_experts_on_disk": found.paged,
        "mtp": found.mtp,
        "kv_cache": found.cache,
        "context": found.context,
        "slots": found.slots,
        "hits": found.hits,
        "prefill": speed(found.prefill),
        "decode": speed(found.decode),
    }
