"""One table in four formats. The same table gives the same bytes: no clock, no machine."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pandas as pd

from mixlora.records import by_metric
from mixlora.tables.cells import MEAN, Cell, Further, Row, Table
from mixlora.tables.table import LEVEL

ONE_SEED, TIED, UNTESTED, DIRTY, INCOMPLETE, UNTRAINED = "¹", "≈", "?", "‡", "†", "*"
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Dialect:
    """How one format writes the parts of a cell."""

    escape: Callable[[str], str]
    bold: Callable[[str], str]
    small: Callable[[str], str]  # for marks and printed values
    spread: Callable[[str], str]


def percent(value: float, decimals: int) -> str:
    return f"{100 * value:.{decimals}f}"


def shown(cell: Cell, decimals: int, dialect: Dialect) -> str:
    """Mean ± deviation, marks, and in brackets what was printed."""
    printed = "" if cell.published is None else " " + dialect.small(f"({number(cell.published)})")
    if cell.mean is None:
        return dialect.escape(cell.empty) + printed
    text = percent(cell.mean, decimals)
    text = dialect.bold(text) if cell.best else text
    if cell.deviation is not None:
        text += dialect.spread(percent(cell.deviation, decimals))
    marks = (TIED if cell.tied else "") + (UNTESTED if cell.untested else "")
    marks += (ONE_SEED if cell.deviation is None and not cell.untrained else "") + (DIRTY if cell.dirty else "")
    if not cell.complete:
        marks += f" {len(cell.values)}/{cell.expected}"
    return text + (dialect.small(dialect.escape(marks)) if marks else "") + printed


def number(value: float) -> str:
    """As it was printed: at least one decimal, no more zeros."""
    return repr(value)


def extra(value: Further) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else value or ""


def head(table: Table) -> list[str]:
    """Labels of all columns; a task says how many examples stand behind it."""
    return [f"{label} ({n})" if n else label for label, n in zip(labels(table), sizes(table), strict=True)]


def labels(table: Table) -> list[str]:
    untrained = table.untrained | ({MEAN} if table.untrained else set())
    marks = {INCOMPLETE: table.incomplete, UNTRAINED: untrained}
    tasks = [
        label + "".join(mark for mark, names in marks.items() if name in names) for name, label in table.columns.items()
    ]
    return [*lead_labels(table), *tasks, *table.extra_columns.values()]


def sizes(table: Table) -> list[str]:
    """Below each label: examples of a task; empty for what is no task, or was not scored."""
    n = [f"n={table.examples[name]}" if table.examples.get(name) else "" for name in table.columns]
    return ["" for _ in lead_labels(table)] + n + ["" for _ in table.extra_columns]


def lead_labels(table: Table) -> list[str]:
    """Model and setting are columns only where there are several."""
    return [name for name, used in zip(("Model", "Setting", "Method"), lead_used(table), strict=True) if used]


def lead_used(table: Table) -> tuple[bool, bool, bool]:
    models = len({row.model for row in table.rows}) > 1
    return models, len({row.setting for row in table.rows if row.setting}) > 1, True


def body(table: Table, row: Row, dialect: Dialect) -> list[str]:
    lead = [label for label, used in zip(row.labels, lead_used(table), strict=True) if used]
    cells = [shown(table.cells[row, column], table.recipe.table.decimals, dialect) for column in table.columns]
    extras = [extra(table.extras[row, name]) for name in table.extra_columns]
    return [*map(dialect.escape, lead), *cells, *map(dialect.escape, extras)]


def legend(table: Table) -> list[str]:
    """What the marks mean: only those that occur, so a clean table has a short legend."""
    return [*count_line(table), *mark_lines(table), *empty_lines(table), *source_line(table)]


def of_runs(table: Table) -> list[Cell]:
    """The cells with a mean, but for the base model's."""
    return [cell for cell in table.cells.values() if cell.mean is not None and not cell.untrained]


def count_line(table: Table) -> list[str]:
    seeds = [len(cell.values) for cell in of_runs(table)]
    shown = by_metric({table.columns[task]: metric for task, metric in table.metrics.items()})
    asked = [f"scored: {'; '.join(table.scoring)}"] if table.scoring else []
    return ["percent" + spread(seeds), f"metric: {shown}", *asked] if seeds else []


def mark_lines(table: Table) -> list[str]:
    cells, means = list(table.cells.values()), of_runs(table)
    best, whole = any(cell.best for cell in cells), all(cell.complete for cell in means)
    of_whole = "" if whole else ", of the cells with all their runs if there is one"
    in_mean = f"; {table.columns[MEAN]} is over it as well" if MEAN in table.columns else ""
    of_examples = ", and the test knows the examples only" if best else ""
    occurs_and_means = [
        (best, f"bold: best of its model in the column{of_whole}"),
        (
            any(cell.tied for cell in cells),
            f"{TIED} not distinguishable from the best (paired test over examples and seeds, Holm over all pairs of "
            f"its model in the column, p ≥ {LEVEL})",
        ),
        (
            any(cell.untested for cell in cells),
            f"{UNTESTED} not tested: there are no predictions, no seed in common with the best, or the seeds in common "
            "say otherwise than the means",
        ),
        (any(cell.deviation is None for cell in means), f"{ONE_SEED} one seed: no deviation{of_examples}"),
        (
            any(cell.untrained for cell in cells),
            f"{table.recipe.table.base}: without an adapter, same examples and protocol; not compared",
        ),
        (
            bool(table.untrained),
            f"{UNTRAINED} scored and not trained on, for the runs had no training rows of it{in_mean}",
        ),
        (any(cell.dirty for cell in cells), f"{DIRTY} with a run made with code that differs from its commit"),
        (not whole, "k/m: only k of the m runs are in the cell"),
        (
            "activated" in table.extra_columns,
            "activated: parameters at work for a token, router included; at most, where a gate chooses how many",
        ),
        ("peak_memory" in table.extra_columns, "peak GiB: of the whole run, scoring included"),
    ]
    return [meaning for occurs, meaning in occurs_and_means if occurs]


def empty_lines(table: Table) -> list[str]:
    """What stands in place of a number."""
    no_rate = ", or no learning rate could be chosen" if len(table.recipe.learning_rates) > 1 else ""
    meanings = {
        "not run": "there is no such run yet",
        "failed": f"the run ended with an error{no_rate}",
        "unfinished": "the run was interrupted",
        "dirty": "made with code that differs from its commit, left out",
        "other data": "made with other data, prompts, weights, processes or another protocol than the rest, left out",
        "in part": "no mean: no seed has a score of every task",
    }
    found = {cell.empty for cell in table.cells.values() if cell.mean is None}
    return [f"{word}: {meaning}" for word, meaning in meanings.items() if word in found]


def source_line(table: Table) -> list[str]:
    printed = any(cell.published is not None for cell in table.cells.values())
    return [f"(in brackets): published, {table.recipe.source}"] if printed else []


def spread(seeds: Sequence[int]) -> str:
    """What stands behind a mean, for the legend; nothing where no cell has more than one seed."""
    least, most = min(seeds), max(seeds)
    if most == 1:
        return ""
    return f", mean ± sample deviation over {most if least == most else f'{least} to {most}'} seeds"


# ---- formats

# What means something in Markdown: * and < anywhere, _ unless it stands inside a word.
MARKDOWN = re.compile(r"[*<\\]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])")


def markdown_text(text: str) -> str:
    return MARKDOWN.sub(r"\\\g<0>", text)


def markdown(table: Table) -> str:
    dialect = Dialect(
        lambda t: markdown_text(t).replace("|", "\\|"), lambda t: f"**{t}**", lambda t: t, lambda t: f" ± {t}"
    )
    titles = [dialect.escape(title) for title in head(table)]
    rows = [body(table, row, dialect) for row in table.rows]
    left = len(lead_labels(table))
    rule = ["---" if i < left else "--:" for i in range(len(titles))]
    title = f"**{markdown_text(table.recipe.title)}**"
    lines = [title, "", *("| " + " | ".join(cells) + " |" for cells in (titles, rule, *rows)), ""]
    return "\n".join([*lines, *(f"- {markdown_text(line)}" for line in (*legend(table), *table.notes))]) + "\n"


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "≈": r"$\approx$", "¹": r"$^{1}$",
    "†": r"$^{\dagger}$", "‡": r"$^{\ddagger}$", "–": "--", "—": "---", "−": "$-$", "≥": r"$\geq$", "≤": r"$\leq$",
    "·": r"$\cdot$", "×": r"$\times$", "→": r"$\to$", "<": r"\textless{}", ">": r"\textgreater{}", "…": r"\ldots{}",
    "µ": r"$\mu$", "€": r"\texteuro{}", "“": "{``}", "”": "{''}", "‘": "{`}", "’": "{'}",
    "|": r"\textbar{}", "[": "{[}", "*": "{*}",  # after the \\ of the line before they would belong to it
}  # fmt: skip
GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "varepsilon", "ζ": "zeta", "η": "eta", "θ": "theta",
    "ι": "iota", "κ": "kappa", "λ": "lambda", "μ": "mu", "ν": "nu", "ξ": "xi", "π": "pi", "ρ": "rho", "ς": "varsigma",
    "σ": "sigma", "τ": "tau", "υ": "upsilon", "φ": "varphi", "χ": "chi", "ψ": "psi", "ω": "omega", "Γ": "Gamma",
    "Δ": "Delta", "Θ": "Theta", "Λ": "Lambda", "Ξ": "Xi", "Π": "Pi", "Σ": "Sigma", "Φ": "Phi", "Ψ": "Psi",
    "Ω": "Omega",
}  # fmt: skip
LATEX |= {letter: rf"$\{name}$" for letter, name in GREEK.items()}
# Letters of UTF-8, LaTeX's usual input since 2018, that it has in every encoding of fonts: an ogonek, ð, þ and đ are an
# error in the one that is loaded without being asked for.
LETTERS = set("ßæœøłıÆŒØŁ")
OGONEK = "0328"


def is_letter(sign: str) -> bool:
    """Whether it is a letter of Latin-1 or Latin Extended-A that is there without a package."""
    base, _, accent = unicodedata.decomposition(sign).partition(" ")
    return sign in LETTERS or ("À" <= sign <= "ž" and not base.startswith("<") and accent not in ("", OGONEK))


def latex_text(text: str) -> str:
    """Any text as LaTeX that every engine takes; a sign without a name becomes its code, never an error."""
    return "".join(LATEX.get(c, c if c.isascii() or is_letter(c) else f"(U+{ord(c):04X})") for c in text)


# A table wider than the text is made as wide as the text; one that fits keeps its size.
FIT = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"


def latex(table: Table) -> str:
    dialect = Dialect(
        latex_text,
        lambda t: rf"\textbf{{{t}}}",
        lambda t: rf"{{\scriptsize {t}}}",
        lambda t: rf"{{\scriptsize $\pm${t}}}",
    )
    left = len(lead_labels(table))
    titles = [latex_text(label) for label in labels(table)]
    below = [dialect.small(latex_text(n)) if n else "" for n in sizes(table)]
    lines = [
        "% needs \\usepackage{booktabs,graphicx}",
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{latex_text(table.recipe.title)}}}",
        rf"\label{{tab:{table.recipe.name.replace('_', '-')}}}",
        r"\footnotesize\setlength{\tabcolsep}{4pt}",
        FIT,
        rf"\begin{{tabular}}{{{'l' * left}{'r' * (len(titles) - left)}}}",
        r"\toprule",
        " & ".join(titles) + r" \\",
        *([" & ".join(below) + r" \\"] if any(below) else []),
    ]
    for group in table.groups():
        lines.append(r"\midrule")
        lines += [" & ".join(body(table, row, dialect)) + r" \\" for row in group]
    lines += [
        r"\bottomrule",
        r"\end{tabular}}",
        "",
        r"\smallskip",
        r"\begin{minipage}{\linewidth}\raggedright\footnotesize",
    ]
    lines += [latex_text(line) + r".\\" for line in (*legend(table), *table.notes)]
    return "\n".join([*lines, r"\end{minipage}", r"\end{table}"]) + "\n"


def csv(table: Table) -> str:
    """One line a cell, fractions and not percent: for other programs."""
    lines = []
    for row in table.rows:
        for column in table.columns:
            cell = table.cells[row, column]
            lines.append(
                {
                    "recipe": table.recipe.name,
                    "model": row.model,
                    "setting": row.setting,
                    "method": row.method or row.labels[2],
                    "column": column,
                    "metric": table.metrics.get(column, "") if cell.values else "",
                    "mean": cell.mean,
                    "deviation": cell.deviation,
                    "seeds": len(cell.values),
                    "seeds_expected": cell.expected,
                    "examples": cell.examples,
                    "best": int(cell.best),
                    "tied": int(cell.tied),
                    "untested": int(cell.untested),
                    "p_holm": cell.p,
                    "empty": cell.empty if cell.mean is None else "",
                    "dirty": int(cell.dirty),
                    "published_percent": cell.published,
                    **{name: table.extras[row, name] for name in table.extra_columns},
                }
            )
    return pd.DataFrame(lines).to_csv(index=False, float_format="%.10g", lineterminator="\n")


HTML = Dialect(
    lambda t: str(jinja2.utils.markupsafe.escape(t)),
    lambda t: f"<b>{t}</b>",
    lambda t: f"<small>{t}</small>",
    lambda t: f"<small> ± {t}</small>",
)


def environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(TEMPLATES)
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def html_parts(table: Table) -> dict[str, object]:
    """What the template of a table needs."""
    groups = [[body(table, row, HTML) for row in group] for group in table.groups()]
    return {
        "title": table.recipe.title,
        "head": list(zip(labels(table), sizes(table), strict=True)),
        "left": len(lead_labels(table)),
        "groups": groups,
        "legend": legend(table),
        "notes": table.notes,
    }


def html(table: Table) -> str:
    return environment().get_template("table.html.j2").render(**html_parts(table)) + "\n"


FORMATS: dict[str, Callable[[Table], str]] = {"md": markdown, "tex": latex, "csv": csv, "html": html}
