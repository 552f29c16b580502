"""results/*.json as Markdown (on standard output) and, where matplotlib is installed, as results/figures.svg.

python benchmarks/report.py [FOLDER]     every figure
python benchmarks/report.py --readme     the figures that have a goal, into the README between its two marks
"""

import fnmatch
import json
import re
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
# Goals that only a GPU can answer: the figures of steps.py that have them, and the goal.
GPU_GOALS = {
    **{f"step: {method} / PEFT LoRA": 0.85 for method in ("mole", "mola", "dynmole", "hydralora", "smora")},
    "step: mixlora / our own LoRA": 1.10,
    "peak memory of a step: * / PEFT LoRA": 0.6,
}
MARKS = re.compile(r"(?<=<!-- made by benchmarks/report.py -->\n).*?(?=<!-- end -->)", re.DOTALL)


def main() -> None:
    if "--readme" in sys.argv:
        text = README.read_text(encoding="utf-8")
        README.write_text(with_summary(text, read(RESULTS)), encoding="utf-8")
        return
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    found = read(folder)
    print("\n\n".join(section(result) for result in found))
    draw(found, folder / "figures.svg")


def read(folder: Path) -> list[dict[str, Any]]:
    """The results of full size; a quick one shows no more than that a script runs."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [result for result in found if not result["quick"]]


def section(result: dict[str, Any]) -> str:
    """All figures of one benchmark, with where they were measured."""
    lines = [
        measured(result),
        "",
        "| figure | setting | median | quartiles | goal | |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        spread = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
        lines.append(f"| {row['figure']} | {row['setting']} | {value(row)} | {spread} | {goal(row)} | {verdict(row)} |")
    return "\n".join(lines)


def measured(result: dict[str, Any]) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value)
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}, {machine['clock']} clock"
    return (
        f"**{result['benchmark']}**: {result['date']}, {machine['device']}, {threads}, commit {machine['commit']}; "
        f"{versions}"
    )


def with_summary(readme: str, results: list[dict[str, Any]]) -> str:
    """The README with the table of what has a goal between its marks."""
    if not MARKS.search(readme):
        raise SystemExit(f"report.py: {README.name} has no '<!-- made by benchmarks/report.py -->' ... '<!-- end -->'")
    lines = summary(results) if results else ["Nothing has been measured yet."]
    return MARKS.sub(lambda _: "\n".join(["", *lines, "", ""]), readme)


def summary(results: list[dict[str, Any]]) -> list[str]:
    machines = {
        f"{result['machine']['device']}, {result['machine']['threads']} threads, {result['date']}" for result in results
    }
    lines = [
        f"Measured on: {'; '.join(sorted(machines))}.",
        "",
        "| figure | setting | median | goal | |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        where = "GPU, " if result["machine"]["kind"] == "cuda" else ""
        for row in (row for row in result["rows"] if row["goal"] is not None):
            lines.append(f"| {row['figure']} | {where}{row['setting']} | {value(row)} | {goal(row)} | {verdict(row)} |")
    seen = [row["figure"] for result in results if result["machine"]["kind"] == "cuda" for row in result["rows"]]
    open_goals = {figure: most for figure, most in GPU_GOALS.items() if not fnmatch.filter(seen, figure)}
    lines += [f"| {figure} | GPU, bfloat16 | not measured | ≤ {most:g} | |" for figure, most in open_goals.items()]
    return lines


def value(row: dict[str, Any]) -> str:
    near_one = row["goal"] and row["goal"] > 0.999 > row["value"] > 0.99
    return f"{row['value']:.5f}" if near_one else f"{row['value']:.3f}"


def goal(row: dict[str, Any]) -> str:
    return "" if row["goal"] is None else f"{'≥' if row['at_least'] else '≤'} {row['goal']:g}"


def verdict(row: dict[str, Any]) -> str:
    words = [{None: "", True: "met", False: "not met"}[row["met"]], "noisy" if row["noisy"] else "", row["note"]]
    return ", ".join(filter(None, words))


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Every ratio that has a goal: the median with its quartiles, and the goal as a tick."""
    try:
        import matplotlib
    except ImportError:
        print("No drawing: matplotlib is not installed (pip install matplotlib).", file=sys.stderr)
        return
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    rows = [row | {"device": result["machine"]["device"]} for result in results for row in result["rows"]]
    rows = [row for row in rows if row["goal"] is not None][::-1]
    if not rows:
        return
    figure, axes = plt.subplots(figsize=(10, 1 + 0.28 * len(rows)), layout="constrained")
    for y, row in enumerate(rows):
        low, high = (row["value"] if row[side] is None else row[side] for side in ("low", "high"))
        color = "tab:gray" if row["noisy"] else "tab:green" if row["met"] else "tab:red"
        axes.plot([low, high], [y, y], color=color, linewidth=2)
        axes.plot(row["value"], y, "o", color=color)
        axes.plot(row["goal"], y, "|", color="black", markersize=12)
    axes.set_yticks(
        range(len(rows)), [f"{row['figure']}, {row['setting']}, {row['device']}" for row in rows], fontsize=7
    )
    axes.set_xlabel("ratio; the tick is the goal, grey is too noisy to believe")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path)
    print(f"drawn: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
