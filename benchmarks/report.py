"""results/*.json as Markdown (on standard output) and, where matplotlib is installed, as results/figures.svg."""

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    print("\n\n".join(section(result) for result in found))
    draw(found, folder / "figures.svg")


def section(result: dict[str, Any]) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value)
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}, {machine['clock']} clock"
    lines = [
        f"**{result['benchmark']}**: {result['date']}, {machine['device']}, {threads}, "
        f"commit {machine['commit']}; {versions}",
        "",
        "| figure | setting | median | quartiles | goal | |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        spread = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
        goal = "" if row["goal"] is None else f"{'≥' if row['at_least'] else '≤'} {row['goal']:g}"
        verdict = {None: "", True: "met", False: "not met"}[row["met"]] + ", noisy" * row["noisy"]
        value = (
            f"{row['value']:.5f}"
            if row["goal"] and row["goal"] > 0.999 > row["value"] > 0.99
            else f"{row['value']:.3f}"
        )
        lines.append(f"| {row['figure']} | {row['setting']} | {value} | {spread} | {goal} | {verdict.lstrip(', ')} |")
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Every ratio that has a goal: the median with its quartiles, and the goal as a tick."""
    try:
        import matplotlib
    except ImportError:
        print("No drawing: matplotlib is not installed (pip install matplotlib).", file=sys.stderr)
        return
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    rows = [row for result in results for row in result["rows"] if row["goal"] is not None][::-1]
    if not rows:
        return
    figure, axes = plt.subplots(figsize=(10, 1 + 0.28 * len(rows)), layout="constrained")
    for y, row in enumerate(rows):
        low, high = (row["value"] if row[side] is None else row[side] for side in ("low", "high"))
        color = "tab:gray" if row["noisy"] else "tab:green" if row["met"] else "tab:red"
        axes.plot([low, high], [y, y], color=color, linewidth=2)
        axes.plot(row["value"], y, "o", color=color)
        axes.plot(row["goal"], y, "|", color="black", markersize=12)
    axes.set_yticks(range(len(rows)), [f"{row['figure']}, {row['setting']}" for row in rows], fontsize=7)
    axes.set_xlabel("ratio; the tick is the goal, grey is too noisy to believe")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path)
    print(f"drawn: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
