"""The demo model's marks on questions it never saw, answered by glimmer itself, greedily.

    python tools/demo_model/evaluate.py --model glimmer/demo

prints one line for each mark with what was asked for; --json writes them to a file, and --card into the table of a
model card, between its two lines <!-- marks -->. Half of the questions
of every kind are asked with reasoning and half without, sums both ways. The questions are drawn by generate.py, from
the same seed each time; training never sees them. Expert load and the MTP layer's guesses are counted on glimmer's own
answers by this folder's model.py, whose routers count. Not here: training, any choice made from these marks.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from export import load
from generate import heldout_examples
from model import layout_of

from glimmer import LLM, SamplingParams

COUNTS = {"fact": 300, "introduction": 60, "sum": 300, "json": 200, "repeat": 60, "tool": 200, "tool, unseen": 200,
          "tool, twice": 60, "tool, many unseen": 200}  # fmt: skip
CALLS = {  # the marks that a call counts for
    "tool": ("tool calls", "tool calls, known tools"), "tool, unseen": ("tool calls", "tool calls, unseen tools"),
    "tool, twice": ("tool calls, two in a row",), "tool, many unseen": ("tool calls, many unseen words",),
}  # fmt: skip
GOALS = {
    "city facts right": 0.95, "sums right, with reasoning": 0.90, "tool calls well-formed": 0.99,
    "tool calls right": 0.90, "JSON valid": 0.98, "MTP first guess accepted": 0.70,
}  # fmt: skip
BORDER = "<!-- marks -->\n"
CALL = re.compile(r"<tool_call>([^\n<]+)\n((?:<arg_key>[^<]+</arg_key>\n<arg_value>[^<]*</arg_value>\n)*)</tool_call>")
ARGUMENT = re.compile(r"<arg_key>([^<]+)</arg_key>\n<arg_value>([^<]*)</arg_value>\n")


class Marks:
    """Right and asked, by the mark's name."""

    def __init__(self):
        self.right: dict[str, int] = defaultdict(int)
        self.asked: dict[str, int] = defaultdict(int)

    def add(self, name: str, right: bool) -> None:
        self.right[name] += right
        self.asked[name] += 1

    def share(self, name: str) -> float:
        return self.right[name] / self.asked[name]


def split(text: str) -> tuple[str | None, str]:
    """An answer as (reasoning or None, content)."""
    match = re.fullmatch(r"\n<think>(.*?)</think>(.*)", text, re.DOTALL)
    return (match[1], match[2].strip()) if match else (None, text.strip())


def calls_in(content: str, tools: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]] | None:
    """The calls that make up a content, with typed arguments; None if they are not well-formed for these tools."""
    calls = list(CALL.finditer(content))
    if not calls or CALL.sub("", content).strip():
        return None
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    out = []
    for call in calls:
        name, arguments = call[1], dict(ARGUMENT.findall(call[2]))
        known = schemas.get(name, {}).get("properties", {})
        if (
            name not in schemas
            or set(arguments) - set(known)
            or set(schemas[name].get("required", [])) - set(arguments)
        ):
            return None
        try:
            typed = {k: v if known[k]["type"] == "string" else json.loads(v) for k, v in arguments.items()}
        except json.JSONDecodeError:
            return None
        out.append((name, typed))
    return out


def conversation(item: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": item["ask"]}]


def ask(llm: LLM, items: list[dict[str, Any]], quick: list[bool], messages: list[list[dict]]) -> list[Any]:
    """One greedy answer to each conversation, with its own tools; `quick` ones without reasoning."""
    prompts = [
        llm.render(m, item["tools"], {"enable_thinking": False} if q else None)
        for item, q, m in zip(items, quick, messages)
    ]
    return llm.generate(prompts, SamplingParams(temperature=0, max_tokens=256))


def judge(marks: Marks, item: dict[str, Any], quick: bool, out: Any) -> bool:
    """Add one answer to the marks; says whether it was right."""
    task, answer = item["task"], out.outputs[0]
    thought, content = split(answer.text)
    marks.add("turns ended", answer.finish_reason == "stop")
    marks.add("reasoning where asked for, none where not", (thought is None) == quick)
    if task in CALLS:
        calls = calls_in(content, item["tools"])
        right = calls is not None and calls == [(name, arguments) for name, arguments in item["calls"]]
        for name in CALLS[task]:
            marks.add(f"{name} well-formed", calls is not None)
            marks.add(f"{name} right", right)
    elif task == "json":
        try:
            value = json.loads(content)
        except json.JSONDecodeError:
            value = None
        right = value == json.loads(item["reply"])
        marks.add("JSON valid", isinstance(value, dict))
        marks.add("JSON right", right)
    elif task == "sum":
        right = content == item["reply"]
        marks.add(f"sums right, {'without' if quick else 'with'} reasoning", right)
    else:
        right = all(words in content for words in item["answers"])
        name = {
            "fact": "city facts right",
            "introduction": "introductions with all facts right",
            "repeat": "words repeated",
        }
        marks.add(name[task], right)
    return right


def after_result(marks: Marks, llm: LLM, items: list[dict[str, Any]], quick: list[bool]) -> None:
    """The answers once the tools have replied."""
    messages = []
    for item, q in zip(items, quick):
        calls = [{"type": "function", "function": {"name": name, "arguments": a}} for name, a in item["calls"]]
        thought = {} if q else {"reasoning_content": item["think"]}
        replies = [{"role": "tool", "content": result} for result in item["results"]]
        messages.append(
            [*conversation(item), {"role": "assistant", "content": "", "tool_calls": calls, **thought}, *replies]
        )
    for item, out in zip(items, ask(llm, items, quick, messages)):
        marks.add("answers from a tool's result right", split(out.outputs[0].text)[1] == item["reply"])


def inside(model_dir: Path, outputs: list[Any]) -> tuple[list[float], list[float], float]:
    """Smallest and largest expert load of each MoE layer (1 is even), and how often the MTP layer guessed right."""
    model = load(model_dir)
    accepted = drafted = 0
    with torch.inference_mode():
        for out in outputs:
            start = len(out.prompt_token_ids)
            tokens = torch.tensor([*out.prompt_token_ids, *out.outputs[0].token_ids])
            layout = layout_of([(1, len(tokens))], torch.ones(len(tokens), dtype=torch.bool))
            guess = model.draft(model.trunk(tokens, layout), tokens.roll(-1), layout)
            rows = torch.arange(start - 1, len(tokens) - 2)  # row t guesses token t+2, after token t+1 was chosen
            accepted += int((model.lm_head(guess[rows]).argmax(dim=-1) == tokens[rows + 2]).sum())
            drafted += len(rows)
    loads = [router.load() for _, router in sorted(model.routers().items())]
    return [x.min().item() for x in loads], [x.max().item() for x in loads], accepted / drafted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("glimmer/demo"))
    parser.add_argument("--seed", type=int, default=1, help="of the held-out questions")
    parser.add_argument("--trial", action="store_true", help="ask what models are chosen by, not the test")
    parser.add_argument("--scale", type=float, default=1.0, help="ask fewer questions: this share of them")
    parser.add_argument("--card", type=Path, help="a model card whose table of marks is to be rewritten")
    parser.add_argument("--json", type=Path, help="also write the marks here")
    parser.add_argument("--wrong", type=int, default=0, help="show this many wrong answers of each kind")
    args = parser.parse_args()

    llm, marks = LLM(model=str(args.model), max_model_len=1024), Marks()
    counts = {task: max(int(count * args.scale), 1) for task, count in COUNTS.items()}
    items = list(heldout_examples(args.seed, counts, "trial" if args.trial else "test"))
    ways = [(False, True) if item["task"] == "sum" else (i % 2 == 1,) for i, item in enumerate(items)]
    asked = [(item, quick) for item, both in zip(items, ways) for quick in both]
    items, quick = [item for item, _ in asked], [q for _, q in asked]
    outputs = ask(llm, items, quick, [conversation(item) for item in items])
    shown: dict[str, int] = defaultdict(int)
    for item, q, out in zip(items, quick, outputs):
        if not judge(marks, item, q, out) and shown[item["task"]] < args.wrong:
            shown[item["task"]] += 1
            print(f"[{item['task']}] {item['ask']!r}\n    got  {out.outputs[0].text!r}")
            print(f"    want {item['reply']!r} {item['calls']}")
    with_tools = [i for i, item in enumerate(items) if item["tools"]]
    after_result(marks, llm, [items[i] for i in with_tools], [quick[i] for i in with_tools])
    least, most, accepted = inside(args.model, outputs)

    report: dict[str, Any] = {name: round(marks.share(name), 4) for name in sorted(marks.asked)}
    report["MTP first guess accepted"] = round(accepted, 4)
    report["expert load, least and most of each layer"] = [[round(a, 2), round(b, 2)] for a, b in zip(least, most)]
    lines = table(report, marks)
    print("\n".join(lines))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if args.card:
        before, _, after = args.card.read_text(encoding="utf-8").split(BORDER)
        args.card.write_text(BORDER.join([before, "\n" + "\n".join(lines) + "\n", after]), encoding="utf-8")
    missed = [name for name, goal in GOALS.items() if report[name] < goal]
    missed += ["expert load"] if min(least) < 1 / 3 or max(most) > 3 else []
    print("not reached: " + (", ".join(missed) or "none"))
    sys.exit(1 if missed else 0)


def table(report: dict[str, Any], marks: Marks) -> list[str]:
    """The report as a Markdown table: what was asked for first."""
    lines = ["| mark | reached | of | asked for |", "|---|---|---|---|"]
    for name in [*GOALS, *(name for name in sorted(marks.asked) if name not in GOALS)]:
        goal = f"{GOALS[name]:.0%}" if name in GOALS else ""
        lines.append(f"| {name} | {report[name]:.1%} | {marks.asked.get(name, 'all tokens')} | {goal} |")
    loads = report["expert load, least and most of each layer"]
    every = ", ".join(f"{a:.2f} to {b:.2f}" for a, b in loads)
    return [*lines, f"| expert load by layer, MTP last; 1 is even | {every} | all tokens | 0.33 to 3 |"]


if __name__ == "__main__":
    main()
