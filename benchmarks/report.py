"""results/*.json as Markdown (on standard output) and, where matplotlib is installed, as results/figures.svg, with the
measured curves in results/curves.svg.

python benchmarks/report.py [FOLDER]     every figure
python benchmarks/report.py --readme     the figures that have a goal, into the README between its two marks
"""

import fnmatch
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
# Goals that only a GPU can answer, by figure.
GPU_GOALS = {
    "feed-forward: fast / PEFT LoRA": 1.05,
    "feed-forward: lean / PEFT LoRA": 1.15,
    **{f"step: {method} / PEFT LoRA": 0.85 for method in ("mole", "mola", "dynmole", "hydralora", "smora")},
    "step: mixlora / our own LoRA": 1.10,
    "peak memory of a step: * / PEFT LoRA": 0.6,
}
VERDICTS = ("met", "undecided", "too noisy", "not met", "not measured")
MARKS = re.compile(r"(?<=<!-- made by benchmarks/report.py -->\n).*?(?=<!-- end -->)", re.DOTALL)


def main() -> None:
    if "--readme" in sys.argv:
        text = README.read_text(encoding="utf-8")
        README.write_text(with_summary(text, read(RESULTS)), encoding="utf-8")
        return
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    found = read(folder)
    print("\n\n".join(section(result) for result in found))
    if matplotlib_draws():
        draw(found, folder / "figures.svg")
        draw_curves([result for result in found if "curves" in result], folder / "curves.svg")


def read(folder: Path) -> list[dict[str, Any]]:
    """The results of full size; a quick one shows no more than that a script runs."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [result for result in found if not result["quick"]]


def section(result: dict[str, Any]) -> str:
    """All figures of one benchmark, with where they were measured."""
    return "\n".join([measured(result), "", *table(result["rows"])])


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
    """One table for the CPUs and one for the GPUs, each with where and when it was measured."""
    lines: list[str] = []
    for kind, title in (("cpu", "On a CPU"), ("cuda", "On a GPU")):
        of_kind = [result for result in results if result["machine"]["kind"] == kind]
        rows = [row for result in of_kind for row in result["rows"] if row["goal"] is not None]
        seen = [row["figure"] for result in of_kind for row in result["rows"]]
        open_goals = GPU_GOALS if kind == "cuda" else {}
        missing = {figure: most for figure, most in open_goals.items() if not fnmatch.filter(seen, figure)}
        lines += [f"**{title}.** {counted(rows, len(missing))}.", "", "<details>"]
        lines += [f"<summary>{'; '.join(places(of_kind)) or 'Nothing has been measured yet'}</summary>", ""]
        lines += table(rows)
        lines += [f"| {figure} | bfloat16 | not measured | | ≤ {most:g} | |" for figure, most in missing.items()]
        lines += ["", "</details>", ""]
    return lines[:-1]


def counted(rows: list[dict[str, Any]], missing: int) -> str:
    """How many goals were met, and by name those that were not, each with its figures."""
    numbers = Counter(row["verdict"] for row in rows) + Counter({"not measured": missing})
    missed: dict[str, list[str]] = {}
    for row in (row for row in rows if row["verdict"] == "not met"):
        setting = row["setting"].partition(",")[0]
        missed.setdefault(row["figure"], []).append(f"{value(row)} ({setting}; goal {goal(row)})")
    named = "; ".join(f"{figure}: {', '.join(found)}" for figure, found in missed.items())
    each = (f"{numbers[verdict]} {verdict}" for verdict in VERDICTS if numbers[verdict])
    total = f"Of {numbers.total()} goals: {', '.join(each)}"
    return f"{total}. Not met: {named}" if named else total


def places(results: list[dict[str, Any]]) -> list[str]:
    """Each machine with the day and the commit of every script that ran on it."""
    runs: dict[str, list[str]] = {}
    for result in results:
        machine = result["machine"]
        where = f"{machine['device']}, {machine['threads']} threads"
        runs.setdefault(where, []).append(f"{result['benchmark']} {result['date']} at {machine['commit']}")
    return [f"{where}: {', '.join(found)}" for where, found in runs.items()]


def table(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "| figure | setting | median | 95 % interval of it | goal | |",
        "|---|---|---|---|---|---|",
        *map(line, rows),
    ]


def line(row: dict[str, Any]) -> str:
    least, most = interval(row)
    quartiles = "" if row.get("least") is not None else "quartiles "
    spread = "" if least is None else f"{quartiles}{least:.3f} to {most:.3f}"
    return f"| {row['figure']} | {row['setting']} | {value(row)} | {spread} | {goal(row)} | {verdict(row)} |"


def interval(row: dict[str, Any]) -> tuple[float | None, float | None]:
    """By which a figure is judged; of results from before it was kept, the quartiles, by which those were."""
    return (row["least"], row["most"]) if row.get("least") is not None else (row["low"], row["high"])


def value(row: dict[str, Any]) -> str:
    """Three digits, and two more where three would be on the other side of the goal."""
    v, most = row["value"], row["goal"]
    return f"{v:.5f}" if most is not None and (round(v, 3) <= most) != (v <= most) else f"{v:.3f}"


def goal(row: dict[str, Any]) -> str:
    return "" if row["goal"] is None else f"{'≥' if row['at_least'] else '≤'} {row['goal']:g}"


def verdict(row: dict[str, Any]) -> str:
    apart = "ratios far apart" if row.get("noisy") and row["verdict"] != "too noisy" else ""
    return ", ".join(filter(None, [row["verdict"], apart, row["note"]]))


def matplotlib_draws() -> bool:
    try:
        import matplotlib
    except ImportError:
        print("No drawing: matplotlib is not installed (pip install matplotlib).", file=sys.stderr)
        return False
    matplotlib.use("svg")
    return True


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Every ratio that has a goal: the median with its interval, and the goal as a tick."""
    import matplotlib.pyplot as plt

    rows = [row | {"device": result["machine"]["device"]} for result in results for row in result["rows"]]
    rows = [row for row in rows if row["goal"] is not None][::-1]
    if not rows:
        return
    figure, axes = plt.subplots(figsize=(10, 1 + 0.28 * len(rows)), layout="constrained")
    for y, row in enumerate(rows):
        low, high = (row["value"] if side is None else side for side in interval(row))
        color = {"met": "tab:green", "not met": "tab:red"}.get(row["verdict"], "tab:gray")
        axes.plot([low, high], [y, y], color=color, linewidth=2)
        axes.plot(row["value"], y, "o", color=color)
        axes.plot(row["goal"], y, "|", color="black", markersize=12)
    axes.set_yticks(
        range(len(rows)), [f"{row['figure']}, {row['setting']}, {row['device']}" for row in rows], fontsize=7
    )
    axes.set_xlabel("ratio; the tick is the goal; grey: undecided, or too noisy to believe")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path)
    print(f"drawn: {path}", file=sys.stderr)


def draw_curves(results: list[dict[str, Any]], path: Path) -> None:
    """The median time of every point of a curve, over that of its first point."""
    import matplotlib.pyplot as plt

    panels = [(result, *curve) for result in results for curve in result["curves"].items()]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(2.6 * len(panels), 2.8), layout="constrained", squeeze=False)
    for (result, name, points), axis in zip(panels, axes.flat, strict=True):
        places, seconds = [float(n) for n in points], list(points.values())
        times = [each / seconds[0] for each in seconds]
        axis.plot(places, times, "o-")
        axis.set(title=f"{name}\n{result['machine']['device']}", xlim=(0, None), ylim=(0, 1.1 * max(times)))
        axis.grid(alpha=0.3)
    axes.flat[0].set_ylabel("time / that of the first point")
    figure.savefig(path)
    print(f"drawn: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
