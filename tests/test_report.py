"""A report holds everything in one file, says what the records say, and is the same twice."""

import contextlib
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from invented_runs import right, write_run
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.legend import Legend
from PIL import Image

from mixlora import compare
from mixlora.errors import ConfigError, ResourceError
from mixlora.records import read_json, write_json, write_lines
from mixlora.tables import plots, report, routing, show, table
from mixlora.tables import recipe as recipes
from mixlora.tables.recipe import Group, Point
from mixlora.tables.study import Study

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import screenshots

RECIPE = Path(__file__).parent / "recipes" / "marks"


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    made = Study(recipes.load(str(RECIPE)), RECIPE, str(tmp_path_factory.mktemp("runs")))
    for method in ("lora", "mole"):
        scores = {"arc_easy": right(20, 0.5, 0), "arc_challenge": right(20, 0.4, 0)}
        folder = write_run(made, Point(Group("tiny", "arc", method), 0), scores, method=method, command="train <this>")
        losses = [{"arc_easy": 2.0 / step, "arc_challenge": 3.0 / step} for step in range(1, 6)]
        lines = [
            {"step": i + 1, "loss": 2.5 / (i + 1), "task_losses": of, "tokens": 10 * i, "seconds": float(i)}
            for i, of in enumerate(losses)
        ]
        lines[2]["loss"] = "nan"
        write_lines(folder / "metrics.jsonl", lines)
        options = {"options": ["<b>one</b>", "two"], "log_likelihoods": [-1.0, -2.0], "target": 0, "prediction": 0}
        rows = [{"id": "x", "prompt": "Which & <why>?", "acc": 1.0} | options]
        write_lines(folder / "predictions" / "arc_easy.jsonl", rows)
        gates = {f"model.layers.{i}.mlp.up_proj.gate": [9, 9, 0, 0, 0, 0, 0, 0] for i in range(4)}
        write_json(folder / "routing.json", {} if method == "lora" else dict.fromkeys(scores, gates))
    made.forget()
    return made


def test_smoothing_is_the_mean_of_the_last_finite_values():
    values = np.random.default_rng(0).normal(2, 1, 500)
    values[[0, 1, 7, *range(100, 180), 499]] = np.nan
    values[50] = np.inf
    for window in (1, 3, 25, 600):
        finite = ([v for v in values[max(0, i - window + 1) : i + 1] if np.isfinite(v)] for i in range(len(values)))
        want = [np.mean(some) if some else np.nan for some in finite]
        np.testing.assert_allclose(plots.smooth(values.tolist(), window), want, rtol=0, atol=1e-12)
    assert plots.smooth([], 3) == []
    assert plots.smooth([1e18, 2, 2, 2, 2], 2)[2:] == [2, 2, 2]  # one outlier is gone when its window is


def folder_of(study: Study, method: str) -> Path:
    return study.run(Point(Group("tiny", "arc", method), 0)).folder


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ({"options": ["a", "b"], "log_likelihoods": [-2.0, -1.0], "target": 0, "prediction": 1}, [(1, 0), (0, 1)]),
        ({"options": ["A", "B"], "log_likelihoods": [-2.0, -1.0], "target": "B", "prediction": "B"}, [(0, 0), (1, 1)]),
        ({"options": ["a", "b"], "log_likelihoods": [-2.0, -1.0], "target": 0}, [(1, 0), (0, 0)]),
        ({"options": ["a", "b"], "target": 0, "prediction": "It is B."}, "It is B."),
        ({"target": "4", "prediction": "#### 5"}, "#### 5"),
    ],
    ids=["likelihood", "label token", "the harness's", "generated option", "generated"],
)
def test_an_example_of_every_protocol_is_shown(row, shown):
    found = report.example({"id": "x", "prompt": "Which?", "acc": 0.0} | row, "acc")
    if isinstance(shown, str):
        assert found["said"] == shown
    else:
        assert [(line["target"], line["chosen"]) for line in found["options"]] == shown


def test_nothing_is_loaded_from_elsewhere_and_text_is_escaped(study):
    page = report.run_page(folder_of(study, "mole"))
    assert not re.search(r'(src|href)="(?!#|data:)', page)
    assert "url(http" not in page
    assert "Which &amp; &lt;why&gt;?" in page
    assert "&lt;b&gt;one&lt;/b&gt;" in page
    assert "train &lt;this&gt;" in page


def test_the_page_shows_what_the_run_has(study):
    page = report.run_page(folder_of(study, "mole"))
    for title in ("Scores", "Loss by task", "Load: layer × expert", "Load: task × expert", "Entropy over depth"):
        assert f"<h3>{title}</h3>" in page
    assert "COLLAPSED: 4 of 4 gates" in page
    assert page.count("<svg") == page.count("<figure")
    assert "no gates" in report.run_page(folder_of(study, "lora"))


def test_whether_a_gate_collapsed_goes_by_what_it_said_of_itself(tmp_path):
    """An option that is left out has no trace in the configuration; without one all experts might be used by all."""
    method = {"num_experts": 8, "top_k": None, "gate": {"kind": "entropy"}}
    write_json(tmp_path / "config.yaml", {"method": method})
    loads = {"a": {"model.layers.0.gate": [9, 0, 0, 0, 0, 0, 0, 0]}}
    for file, says in (
        ({"least_experts": {"model.layers.0.gate": 1}, "loads": loads}, "COLLAPSED"),
        (loads, "No gate leaves a choice"),  # of an earlier version
    ):
        write_json(tmp_path / "routing.json", file)
        assert says in report.run_page(tmp_path)


@pytest.mark.full
def test_a_report_is_the_same_twice(study, tmp_path):
    folder = folder_of(study, "mole")
    assert report.run_page(folder) == report.run_page(folder)
    made = table.build(study)
    first = report.recipe_report(study, made, tmp_path / "a").read_bytes()
    assert first == report.recipe_report(study, made, tmp_path / "b").read_bytes()
    assert b"COLLAPSED" in first


def test_a_folder_with_nothing_but_a_configuration_has_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text("method: {name: lora}\n")
    assert "<h2>Examples</h2>" in report.run_page(tmp_path)


def test_a_run_that_failed_or_is_not_done_yet_has_a_page_that_says_so(study, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(folder_of(study, "mole"), folder)
    for name in ("results.json", "routing.json"):
        (folder / name).unlink()
    record = read_json(folder / "run.json")
    for outcome, said in (
        ({"status": "failed", "message": "3 steps <in a row>"}, "This run has failed: 3 steps &lt;in a row&gt;"),
        ({"status": "running"}, "This run is not finished"),
    ):
        write_json(folder / "run.json", record | outcome)
        report.show(folder, None)
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert said in page
        assert "<h3>Loss by task</h3>" in page
        assert "no gates" not in page  # nobody has counted yet
    with pytest.raises(ConfigError, match="it is not a run folder"):
        report.show(tmp_path, None)
    assert "is not finished" not in report.run_page(folder_of(study, "mole"))


def test_a_run_that_cannot_be_written_to_says_so_with_a_remedy_that_there_is(study, monkeypatch, capsys):
    folder = folder_of(study, "mole")
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != folder)
    for module in (report, routing):
        with pytest.raises(ConfigError, match=r"cannot be written to, and its report stands in it\. Copy it"):
            module.show(folder, None)
    assert "COLLAPSED: 4 of 4 gates" in capsys.readouterr().out  # the numbers, all the same


def test_plots_are_files_on_request(study, tmp_path):
    figures = report.run_figures(folder_of(study, "mole"))[:2]
    for kind, start in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        written = report.write_plots(figures, tmp_path, kind)
        assert [path.name for path in written] == [f"scores.{kind}", f"loss.{kind}"]
        assert all(path.read_bytes().startswith(start) for path in written)
    alike = [(title, "", figures[0][2]) for title in ("LoRA", "LoRA+", "(LoRA)")]
    names = [path.name for path in report.write_plots(alike, tmp_path / "alike", "png")]
    assert names == ["lora.png", "lora-2.png", "lora-3.png"]


def test_a_plot_for_which_the_disk_has_no_room_leaves_the_old_one(study, tmp_path, monkeypatch):
    path = tmp_path / "scores.png"
    path.write_text("old")
    monkeypatch.setattr("mixlora.failpoints.seen", Counter())
    monkeypatch.setenv("MIXLORA_FAIL", "write:full")
    with pytest.raises(ResourceError, match="no space left"):
        plots.write(report.run_figures(folder_of(study, "mole"))[0][2], path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("loss_on", "says"), [("answer", "the answer tokens"), ("all", "all tokens, those of the")])
def test_the_caption_says_over_which_tokens_the_loss_is(tmp_path, loss_on, says):
    write_json(tmp_path / "config.yaml", {"data": {"loss_on": loss_on}})
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 1.0, "task_losses": {}, "tokens": 1, "seconds": 1.0}])
    assert f"mean over {says}" in report.run_figures(tmp_path)[0][1]


def test_kept_records_have_a_report_and_can_be_compared(study, tmp_path, capsys):
    show.keep_records(study, tmp_path)
    kept = [tmp_path / folder_of(study, method).name for method in ("lora", "mole")]
    routing.show(kept[1], None)
    page = (kept[1] / "report.html").read_text(encoding="utf-8")
    assert '<span class="target chosen">option 1</span>' in page
    assert "one</b>" not in page
    label = {"id": "x", "acc": 0.0, "log_likelihoods": [-1.0, -2.0], "target": "B", "prediction": "A"}
    assert report.example(label, "acc")["said"] == "A"  # which option a label is of was in the texts
    for folder in kept:
        write_json(folder / "results.json", {"arc_challenge": read_json(folder / "results.json")["arc_challenge"]})
    capsys.readouterr()
    assert compare.main([str(folder) for folder in kept]) == 0
    assert "arc_challenge: acc, McNemar" in capsys.readouterr().out
    assert compare.main([str(kept[0]), str(folder_of(study, "mole"))]) == 0  # one with prompts, one without


@pytest.mark.full
def test_the_routing_command_says_that_a_mixture_has_collapsed(study):
    command = [sys.executable, "-m", "mixlora.routing", f"run={folder_of(study, 'mole')}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "COLLAPSED: 4 of 4 gates" in done.stdout
    assert (folder_of(study, "mole") / "report.html").is_file()


@pytest.mark.full
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium (Debian: chromium)")
def test_no_page_is_wider_than_the_window_and_its_pictures_are_taken(study, tmp_path):
    pages = {"run": report.run_report(folder_of(study, "mole"))}
    pages["recipe"] = report.recipe_report(study, table.build(study), tmp_path)
    for name, page in pages.items():
        for width in screenshots.WIDTHS.values():
            assert screenshots.size_of("chromium", page, width)[0] == width, name
    written = screenshots.pictures("chromium", pages["recipe"], tmp_path / "shots", most=300)
    assert [path.stem for path in written] == ["desktop-light", "desktop-dark", "phone-light", "phone-dark"]
    lightness = []
    for path in written:
        with Image.open(path) as picture:
            assert picture.size == (screenshots.WIDTHS[path.stem.split("-")[0]], 300)
            lightness.append(picture.convert("L").getpixel((2, 2)))
    assert lightness[0] == lightness[2] > 200
    assert lightness[1] == lightness[3] < 60


def test_the_mean_on_top_is_the_mean_of_the_table(tmp_path):
    """Over the tasks that were trained on; over all where none of them was."""
    scores = {"a": 0.5, "b": 0.7, "c": 0.1}
    after = {name: {"value": value, "trained": name != "c"} for name, value in scores.items()} | {"d": {"value": None}}
    before = {name: {"value": value - 0.2} for name, value in scores.items()}
    assert report.summary({}, after, before) == [("mean of trained, %", "60.0 (+20.0)")]
    assert report.summary({}, {"c": after["c"]}, {}) == [("mean, %", "10.0")]


def test_the_right_one_of_a_free_answer_is_shown_as_its_text():
    row = {
        "id": "t/1",
        "prompt": "?",
        "target": 1,
        "prediction": "the sun",
        "options": ["the moon", "the sun"],
        "acc": 1.0,
    }
    assert report.example(row, "acc") == {"question": "?", "right": True, "said": "the sun", "target": "the sun"}


def test_of_a_sampled_program_the_first_is_shown_with_its_own_verdict_and_how_many_passed(tmp_path):
    verdicts = {"a": ["passed"] * 9 + ["timed out"], "b": ["timed out"] + ["passed"] * 9}
    rows = [
        {
            "id": name,
            "target": "ref",
            "prediction": f"first of {name}",
            "samples": [{"reply": "", "verdict": verdict} for verdict in of],
            "pass@1": 0.9,
        }
        for name, of in verdicts.items()
    ]
    write_lines(tmp_path / "predictions" / "code.jsonl", rows)
    found = report.examples(tmp_path, "code", {"metric": "pass@1"})
    assert [(row["right"], row["said"]) for row in found] == [
        (True, "first of a\n\n9 of 10 passed"),
        (False, "first of b\n\n9 of 10 passed"),
    ]


@contextlib.contextmanager
def drawn(draw) -> Iterator[Axes]:
    with plots.plt.rc_context(plots.STYLE):
        made = draw()
    made.canvas.draw()
    yield made.axes[0]
    plots.plt.close(made)


def spans(axes: Axes) -> list[list[tuple[float, float]]]:
    """Both ends of every error bar."""
    bars = (bar for bar in axes.collections if isinstance(bar, LineCollection))
    return [[(round(x, 9), round(y, 9)) for x, y in ends] for bar in bars for ends in bar.get_segments()]


def dots(axes: Axes) -> list[tuple[float, float]]:
    found = [dot.get_offsets().tolist() for dot in axes.collections if isinstance(dot, PathCollection)]
    return [(round(x, 9), y) for places in found for x, y in places]


def test_scores_are_bars_of_their_width_with_their_intervals_and_the_constant_guess():
    """The first task on top; one without a score has no bar."""
    after = {"a": {"value": 0.5, "interval": [0.4, 0.7], "majority": 0.25}, "b": {"value": 0.9}, "c": {"value": None}}
    with drawn(lambda: plots.scores(after, {"a": {"value": 0.2, "interval": [0.1, 0.35]}})) as axes:
        bars = [(round(bar.get_width(), 9), round(bar.get_y() + bar.get_height() / 2, 9)) for bar in axes.patches]
        assert bars == [(20, 1.2), (50, 0.8), (90, -0.2)]
        assert spans(axes) == [[(10, 1.2), (35, 1.2)], [(40, 0.8), (70, 0.8)], [(90, -0.2), (90, -0.2)]]
        assert dots(axes) == [(25, 1)]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_rows_are_dots_at_their_means_with_lines_as_long_as_their_deviations():
    with drawn(lambda: plots.bars(["a", "b"], [0.5, 0.25], [0.1, None], "Avg")) as axes:
        assert dots(axes) == [(50, 1), (25, 0)]
        assert spans(axes) == [[(40, 1), (60, 1)], [(25, 0), (25, 0)]]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_loads_are_drawn_as_shares_of_an_even_share():
    """Of a layer the mean over gates and tasks, however long these are; of the gate that tells most each task."""
    names = ("model.layers.0.q.gate", "model.layers.0.k.gate", "model.layers.7.q.gate")
    loads = {
        "a": dict(zip(names, ([100, 0], [3, 3], [4, 0, 0, 0]), strict=True)),
        "b": dict(zip(names, ([1, 1], [7, 7], [0, 0, 0, 40]), strict=True)),
    }
    with drawn(lambda: plots.layer_load(loads)) as axes:
        nothing = np.nan  # the gates of layer 0 have two experts
        want = [[1.25, 0.75, nothing, nothing], [2, 0, 0, 2]]
        np.testing.assert_allclose(axes.images[0].get_array().filled(np.nan), want)
    with drawn(lambda: plots.task_load(loads)) as axes:
        np.testing.assert_allclose(axes.images[0].get_array(), [[4, 0, 0, 0], [0, 0, 0, 4]])
        assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def legend_of(draw) -> list[str]:
    with drawn(draw) as axes:
        return [text.get_text() for legend in axes.figure.legends + axes.findobj(Legend) for text in legend.texts]


def test_every_task_and_method_has_its_place_in_the_legend_as_it_is_spelled():
    lines = [{"step": i, "loss": 1.0, "task_losses": {"_mine": 1.0, "$x$ 5$": 2.0}} for i in (1, 2)]
    assert legend_of(lambda: plots.task_losses(lines)) == ["$x$ 5$", "\u200b_mine"]
    assert legend_of(lambda: plots.losses({"_a": lines, "$^b": lines})) == ["\u200b_a", "$^b"]
    assert "$x$ 5$" in plots.svg(lambda: plots.task_losses(lines))


def test_lines_differ_in_dashes_where_their_colours_may_look_alike():
    styles = [(style["color"], style["linestyle"]) for style in plots.STYLE["axes.prop_cycle"]]
    assert len(set(styles)) == len(styles) >= 24
    for i, (colour, dashes) in enumerate(styles[:-1]):
        assert colour != styles[i + 1][0]
        assert dashes != styles[i + 1][1]
    assert dict(styles[:8])["#0b7fc7"] != dict(styles[:8])["#8a7fd1"]


def test_layers_without_a_gate_do_not_rename_the_others():
    with drawn(lambda: plots.layer_load({"t": {f"model.layers.{i}.gate": [1, 3] for i in (24, 25)}})) as axes:
        labels = [label.get_text() for label in axes.get_yticklabels()]
    assert {"24", "25"} <= {*labels}
    assert "0" not in labels
