"""loss.csv -> a picture of the loss curve (SVG), drawn with nothing but text.

python tools/demo_model/plot.py build/demo_model/loss.csv tools/demo_model/loss.svg
"""

import argparse
import csv
import math
from pathlib import Path

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 860, 440, 56, 34, 46, 130
CURVES = {
    "loss": ("#111", "all tasks"), "call": ("#e67e22", "single calls"), "tools": ("#c0392b", "tools"),
    "sum": ("#2471a3", "sums"), "fact": ("#1e8449", "facts"), "introduction": ("#b7950b", "introductions"),
    "json": ("#7d3c98", "JSON"), "mtp": ("#909497", "MTP layer"),
}  # fmt: skip
TICKS = (10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)


def picture(rows: list[dict[str, str]]) -> str:
    """The curves over the step, the loss on a logarithmic scale, smoothed over five rows."""
    last = int(rows[-1]["step"])
    values = {name: smooth([float(row[name]) for row in rows]) for name in CURVES}
    lowest = min(v for curve in values.values() for v in curve if v > 0)
    floor = max(t for t in TICKS if t <= max(lowest, TICKS[-1]))

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(loss: float) -> float:
        share = math.log(TICKS[0] / max(loss, floor)) / math.log(TICKS[0] / floor)
        return TOP + (HEIGHT - TOP - BOTTOM) * share

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">Loss of the demo model (nats per predicted token)</text>',
    ]
    for tick in TICKS:
        if tick >= floor:
            out.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
            out.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for i in range(6):
        step = last * i // 5
        out.append(f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step}</text>')
    out.append(f'<text x="{x(last / 2):.1f}" y="{HEIGHT - 8}" text-anchor="middle">step</text>')
    for i, (name, (colour, label)) in enumerate(CURVES.items()):
        points = " ".join(
            f"{x(int(row['step'])):.1f},{y(v):.1f}" for row, v in zip(rows, values[name], strict=True) if v > 0
        )
        width = 2.2 if name == "loss" else 1.2
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        out.append(f'<text x="{WIDTH - RIGHT + 12}" y="{TOP + 18 * i + 10}" fill="{colour}">{label}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def smooth(values: list[float], reach: int = 2) -> list[float]:
    """Means over a window; zeros, which say "not measured", stay zero and count for nothing."""
    out = []
    for i, value in enumerate(values):
        near = [v for v in values[max(i - reach, 0) : i + reach + 1] if v > 0]
        out.append(sum(near) / len(near) if value > 0 else 0.0)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    with open(args.log, newline="") as file:
        args.picture.write_text(picture(list(csv.DictReader(file))), encoding="utf-8")


if __name__ == "__main__":
    main()
