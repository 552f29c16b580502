"""Laws of the sources and of `load`: what is read, what is missing, and what is said about it."""

import hashlib
import json
import socket
import sys
import time
import types
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixlora import online as network
from mixlora import tasks
from mixlora.config.schema import BadRow, Data, Mixture, Options, Overlap, Splits, Task
from mixlora.errors import ConfigError, DataError, Interrupted
from mixlora.tasks import hub, overlap, sources
from mixlora.tasks import own as own_files
from mixlora.tasks.data import hold_out
from mixlora.tasks.example import Example
from mixlora.tasks.parse import Reader
from mixlora.tasks.table import MissingSplit


def rows(number: int, start: int = 0) -> list[dict]:
    return [{"q": f"question {i}", "o": ["a", "b"], "key": i % 2, "more": i} for i in range(start, start + number)]


def task(**values) -> Task:
    splits = values.pop("splits", {"train": "train", "validation": "validation", "test": "test"})
    base = {"name": "quiz", "path": "me/quiz", "question": "{q}", "options": Options(field="o"), "answer": "key"}
    return Task(**(base | values), splits=Splits(**splits))


@pytest.fixture
def folder(tmp_path):
    """me/quiz/default with 40 training, 6 validation and 8 test rows."""
    place = tmp_path / "data" / "me" / "quiz" / "default"
    place.mkdir(parents=True)
    for split, number, start in (("train", 40, 0), ("validation", 6, 40), ("test", 8, 50)):
        pq.write_table(pa.Table.from_pylist(rows(number, start)), place / f"{split}.parquet")
    return tmp_path / "data"


def load(folder, *chosen: Task, **data) -> dict[str, tasks.TaskData]:
    mixture = Mixture(name="mix", mixture={t.name: t for t in chosen or (task(),)})
    return tasks.load(mixture, Data(source=str(folder), **({"overlap": Overlap.note} | data)), seed=0)


def questions(examples) -> list[str]:
    return [example.question for example in examples]


# ---- a folder laid out like the hub


def test_a_folder_gives_its_splits_and_their_sha256(folder):
    data = load(folder)["quiz"]
    assert [len(split) for split in (data.train, data.validation, data.test)] == [40, 6, 8]
    content = (folder / "me/quiz/default/test.parquet").read_bytes()
    assert data.fingerprints["test"] == hashlib.sha256(content).hexdigest()
    assert data.complete
    assert not data.notes


def test_a_changed_file_is_read_again(folder):
    """`load_dataset(folder)` of datasets 5.2 gives the old rows here."""
    before = load(folder)["quiz"]
    pq.write_table(pa.Table.from_pylist(rows(9)), folder / "me/quiz/default/test.parquet")
    after = load(folder)["quiz"]
    assert len(after.test) == 9
    assert before.fingerprints["test"] != after.fingerprints["test"]
    assert before.fingerprints["train"] == after.fingerprints["train"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "me/quitz"}, r"Did you mean me/quiz\? .*data\.source=sample"),
        ({"config": "other"}, r"holds the configs default"),
        ({"splits": {"test": "tests"}}, r"tests\.parquet.*holds test\.parquet, train\.parquet, validation\.parquet"),
        ({"splits": {"train": "train"}}, r"has no test split"),
        ({"path": "../../etc"}, r"there is no"),
    ],
)
def test_what_is_missing_is_named_with_what_is_there(folder, values, message):
    with pytest.raises(DataError, match=message):
        load(folder, task(**values))


def test_a_missing_folder_names_the_sources_that_work(tmp_path):
    with pytest.raises(DataError, match=r"data\.source=.*nowhere.*data\.source=sample or hub"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b"", lambda b: b[:100] + b"\xff" * 200 + b[300:]])
def test_a_damaged_file_is_named(folder, damage):
    path = folder / "me/quiz/default/test.parquet"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"test\.parquet"):
        load(folder)


def test_a_text_of_a_parquet_file_that_is_no_unicode_is_named(folder):
    """The format promises UTF-8 and writers do not keep it."""
    path = folder / "me/quiz/default/train.parquet"
    table = pq.read_table(path)
    raw = pa.array([b"fine"] * 30 + [b"caf\xe9"] + [b"fine"] * 9, pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    pq.write_table(table.set_column(table.schema.get_field_index("q"), "q", text), path)
    with pytest.raises(DataError, match=r"train\.parquet, row 30, field 'q': is not UTF-8") as caught:
        load(folder)
    assert caught.value.status == 3


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_empty_split_stops_the_run_and_names_the_task(folder, split):
    path = folder / f"me/quiz/default/{split}.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(DataError, match=rf"task quiz: .*{split}\.parquet has no row") as caught:
        load(folder)
    assert caught.value.status == 3


def test_a_task_of_one_row_is_a_task(folder):
    for split in ("train", "test"):
        path = folder / f"me/quiz/default/{split}.parquet"
        pq.write_table(pq.read_table(path).slice(0, 1), path)
    data = load(folder, task(splits={"train": "train", "validation": None, "test": "test"}))["quiz"]
    assert (len(data.train), data.held_out, len(data.test)) == (1, 0, 1)


def test_the_manifest_marks_what_is_not_complete(folder):
    stated = {"train": {"complete": False, "hub_rows": 4000}, "test": {"complete": True, "sha256": "0"}}
    (folder / "manifest.json").write_text(json.dumps({"me/quiz": {"configs": {"default": stated}}}))
    data = load(folder)["quiz"]
    assert not data.complete
    assert any("40 of 4,000 rows" in note for note in data.notes)
    assert any("sha256 differ" in note for note in data.notes)


def test_a_damaged_manifest_is_named(folder):
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json"):
        load(folder)


# ---- what becomes of the splits


def test_without_training_rows_a_task_is_only_evaluated_and_says_so(folder):
    (folder / "me/quiz/default/train.parquet").unlink()
    data = load(folder)["quiz"]
    assert not data.train
    assert len(data.test) == 8
    assert any("evaluated but not trained" in note for note in data.notes)
    assert not data.complete


def test_a_split_that_the_task_does_not_name_is_not_missing(folder):
    assert load(folder, task(splits={"test": "test"}))["quiz"].complete
    assert load(folder, task(eval_only=True))["quiz"].complete


@pytest.mark.parametrize("validation", [None, "test", "absent"])
def test_rows_are_held_out_where_no_validation_split_is_distinct_from_test(folder, validation):
    data = load(folder, task(splits={"train": "train", "validation": validation, "test": "test"}))["quiz"]
    assert data.held_out == len(data.validation) == 2
    assert data.complete is (validation != "absent")
    assert sorted(questions([*data.train, *data.validation])) == sorted(f"question {i}" for i in range(40))
    assert not set(questions(data.validation)) & set(questions(data.test))
    again = load(folder, task(splits={"train": "train", "validation": None, "test": "test"}))["quiz"]
    assert questions(again.validation) == questions(data.validation)


def test_the_first_held_out_rows_are_a_sample_of_the_whole_file():
    rows = [Example(id=str(i), task="t", question=str(i), answer="") for i in range(4000)]
    rest, held = hold_out("t", rows)
    places = [int(example.id) for example in held]
    assert len(held) == 200
    assert max(places[:20]) > 3000  # train.eval_limit takes the first of them
    assert [int(example.id) for example in rest] == sorted({*range(4000)} - {*places})


def test_of_a_large_set_no_more_than_500_rows_are_held_out():
    rows = [Example(id=str(i), task="t", question=str(i), answer="") for i in range(10_100)]
    assert [len(hold_out("t", some)[1]) for some in (rows[:9_980], rows[:10_000], rows)] == [499, 500, 500]


def test_validation_rows_are_never_trained_on(folder):
    data = load(folder)["quiz"]
    assert not set(questions(data.train)) & set(questions(data.validation) + questions(data.test))


def test_eval_only_and_train_only(folder):
    chosen = task(name="a", eval_only=True), task(name="b", train_only=True)
    data = load(folder, *chosen)
    assert [len(s) for s in (data["a"].train, data["a"].validation, data["a"].test)] == [0, 6, 8]
    assert [len(s) for s in (data["b"].train, data["b"].validation, data["b"].test)] == [40, 0, 0]
    (folder / "me/quiz/default/train.parquet").unlink()
    with pytest.raises(DataError, match=r"train\.parquet"):
        load(folder, chosen[1])


def test_the_name_in_the_mixture_is_the_name_of_the_examples(folder):
    mixture = Mixture(name="mix", mixture={"mine": task()})
    data = tasks.load(mixture, Data(source=str(folder)), seed=0)
    assert data["mine"].test[0].id == "mine/test/0"


def test_skipped_rows_are_noted(folder):
    bad = rows(200)
    bad[7]["key"] = 5
    pq.write_table(pa.Table.from_pylist(bad), folder / "me/quiz/default/test.parquet")
    with pytest.raises(DataError, match=r"test\.parquet, row 7, field 'key'"):
        load(folder)
    data = load(folder, on_bad_row=BadRow.skip)["quiz"]
    assert len(data.test) == 199
    assert any("1 of 200 rows skipped: row 7" in note for note in data.notes)


@pytest.fixture
def overlapping(folder):
    """Two tasks; the other one trains on three questions that quiz tests, in other words only by case and order."""
    some = rows(30, 100) + [row | {"q": row["q"].upper() + "?", "o": ["b", "a"]} for row in rows(3, 50)]
    place = folder / "me" / "other" / "default"
    place.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(some), place / "train.parquet")
    return folder, task(), task(name="other", path="me/other", splits={"train": "train"}, train_only=True)


def test_rows_that_another_task_trains_on_are_found(overlapping):
    folder, *chosen = overlapping
    data = load(folder, *chosen)
    assert data["quiz"].trained_on == {"validation": [], "test": ["quiz/test/0", "quiz/test/1", "quiz/test/2"]}
    assert any("3 of 8 test rows are also trained on: quiz/test/0" in note for note in data["quiz"].notes)
    assert len(data["other"].train) == 33


def test_overlap_is_dropped_or_refused(overlapping):
    folder, *chosen = overlapping
    data = load(folder, *chosen, overlap=Overlap.drop)
    assert (len(data["quiz"].train), len(data["quiz"].test), len(data["other"].train)) == (40, 8, 30)
    assert any("3 of 33 training rows are dropped" in note for note in data["other"].notes)
    with pytest.raises(DataError, match=r"task quiz: 3 of 8 test .*quiz/test/0, .*data\.overlap=drop"):
        load(folder, *chosen, overlap=Data().overlap)


def test_where_nothing_is_trained_any_more_rows_of_another_run_are_only_said(overlapping):
    folder, quiz, other = overlapping
    chosen, options = Mixture(name="m", mixture={"quiz": quiz}), Data(source=str(folder))
    trained = tasks.load(Mixture(name="o", mixture={"other": other}), options)
    again = tasks.load(chosen, options, trained=trained)["quiz"]
    assert again.trained_on["test"] == ["quiz/test/0", "quiz/test/1", "quiz/test/2"]
    assert any("3 of 8 test rows are also trained on" in note for note in again.notes)
    assert tasks.load(chosen, options, trained={})["quiz"].trained_on["test"] == []


SAME = [
    ("Is it well-known?", "is it WELL known"), ("2+2", "2 + 2"), ("Cafe\u0301!", "caf\u00e9"), ("top-10", "top 10"),
    ("type-2 diabetes", "Type 2 diabetes"), ("- 3 apples", "3 apples"), ("3 \u00d7 4", "3*4"), ("a\ufe0f", "a"),
    ("50 %", "50%"), ("Hello (world)!", "hello (world)"), ("In 1990!", "in 1990"), ("Vitamin C!", "vitamin C."),
    ("\u25cf one", "one"), ("Aspirin\u00ae", "aspirin"),
]  # fmt: skip
OTHER = [
    ("What is 3 + 4?", "What is 3 - 4?"), ("3 * 4", "3 / 4"), ("3 \u00d7 4", "3 \u00f7 4"), ("x is -3", "x is 3"),
    ("a < b", "a > b"), ("x - y", "x / y"), ("$5 - $3", "$5 * $3"), ("(1) - 2", "(1) * 2"),
    ("What is x - 3?", "What is x / 3?"), ("2x - y", "2x + y"), ("2x - 3", "2x / 3"), ("17 % 5", "17 * 5"),
    ("\u0915\u0940", "\u0915\u093e"),  # two vowel signs on one letter
    ("What is 5!?", "What is 5?"), ("n! + 1", "n + 1"), ("(3 + 2)!/2", "(3 + 2)/2"), ("5% of 20", "5 of 20"),
    ("C#", "C"), ("a != b", "a = b"),
    ("\u221a9", "9"), ("A \u222a B", "A \u2229 B"), ("\U0001f600", "\U0001f622"), ("I \u2764 it", "I \U0001f622 it"),
    ("...", "?!"),
]  # fmt: skip


def test_a_sign_between_numbers_and_a_vowel_of_any_script_make_another_question():
    assert [pair for pair in SAME if overlap.folded(pair[0]) != overlap.folded(pair[1])] == []
    assert [pair for pair in OTHER if overlap.folded(pair[0]) == overlap.folded(pair[1])] == []


def test_rows_of_a_task_that_is_not_drawn_are_not_trained_on(overlapping):
    folder, quiz, other = overlapping
    other.weight = 0.0
    assert load(folder, quiz, other, overlap=Overlap.error)["quiz"].trained_on["test"] == []


def test_solved_examples_are_drawn_from_the_same_rows_in_training_and_after(overlapping):
    """Rows that are scored leave the pool of both; what is said of rows in training is not said again."""
    folder, quiz, other = overlapping
    chosen = Mixture(name="m", mixture={"quiz": quiz, "other": other})
    options = Data(source=str(folder), overlap=Overlap.drop)
    first = tasks.load(chosen, options)
    for trained in ({}, first):
        again = tasks.load(chosen, options, trained=trained)
        assert {name: data.train for name, data in again.items()} == {name: data.train for name, data in first.items()}


def test_held_out_rows_that_repeat_a_training_row_are_only_said(folder):
    """They are no published set, and some sets repeat a tenth of their own rows."""
    pq.write_table(pa.Table.from_pylist([*rows(20), *rows(20)]), folder / "me/quiz/default/train.parquet")
    data = load(folder, task(splits={"train": "train", "validation": None, "test": "test"}), overlap=Overlap.error)[
        "quiz"
    ]
    assert data.held_out == len(data.trained_on["validation"]) == 2
    assert any("2 of 2 validation rows are also trained on" in note for note in data.notes)


def test_thirteen_words_in_a_row_are_said_with_ids(folder):
    words = [f"w{i}" for i in range(40)]

    def text(first: int, number: int, end: str) -> dict:
        return {"q": " ".join(words[first : first + number]) + f" {end}", "o": ["a", "b"], "key": 0, "more": 0}

    pq.write_table(
        pa.Table.from_pylist([text(0, 20, "x"), text(20, 12, "y")]), folder / "me/quiz/default/train.parquet"
    )
    scored = [text(5, 13, "z"), text(5, 12, "z"), text(20, 12, "z"), {**text(7, 13, "z"), "q": "W7, " * 30}]
    pq.write_table(pa.Table.from_pylist(scored), folder / "me/quiz/default/test.parquet")
    data = load(folder)["quiz"]
    assert data.resembling == ["quiz/test/0"]
    assert any("1 of 4 test rows have 13 words in a row in common" in note for note in data.notes)
    assert len(data.train) == 2


def test_a_row_that_is_trained_on_is_not_said_to_resemble_as_well(folder):
    words = " ".join(f"w{i}" for i in range(15))
    row = {"q": words, "o": ["a", "b"], "key": 0, "more": 0}
    pq.write_table(pa.Table.from_pylist([row]), folder / "me/quiz/default/train.parquet")
    pq.write_table(pa.Table.from_pylist([row, row | {"q": words + " x"}]), folder / "me/quiz/default/test.parquet")
    data = load(folder)["quiz"]
    assert data.trained_on["test"] == ["quiz/test/0"]
    assert data.resembling == ["quiz/test/1"]
    assert any("1 of 2 test rows have 13 words" in note for note in data.notes)


def test_programs_are_compared_with_their_questions_and_options_are_not_compared():
    long = " ".join(f"w{i}" for i in range(13))
    plain = Example(id="a", task="a", question="Why?", answer=long, options=(long, "no"))
    program = Example(id="b", task="b", question="Write it", answer=long, entry_point="f")
    asked = Example(id="c", task="c", question=f"Please: {long}", answer="")
    found = [overlap.resembling([plain, program, asked], [row]) for row in (program, asked, plain)]
    assert found == [["b", "c"], ["b", "c"], []]


def test_a_row_of_a_megabyte_is_read_whole(tmp_path):
    WRITERS["csv"](tmp_path / "mine.csv", [{"q": "long " * 300_000, "key": 0, "more": 1}])
    keys = {"path": str(tmp_path / "mine.csv"), "options": Options(columns=["o1", "o2"])}
    assert len(load("hub", task(**keys, splits={"test": "all"}))["quiz"].test[0].question) > 1_400_000


def test_keys_are_checked_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match="exactly one of"):
        load(tmp_path / "nowhere", task(name="a"), task(name="b", options=Options()))
    with pytest.raises(ConfigError, match="empty mixture"):
        tasks.load(Mixture(name="none"), Data(source=str(tmp_path)), seed=0)


# ---- own files

WRITERS = {
    "jsonl": lambda path, some: path.write_text("\n".join(map(json.dumps, some)) + "\n"),
    "csv": lambda path, some: path.write_text(
        "q,o1,o2,key,more\n" + "".join(f'"{r["q"]}, so",a,b,{r["key"]},{r["more"]}\n' for r in some)
    ),
    "parquet": lambda path, some: pq.write_table(pa.Table.from_pylist(some), path),
}


@pytest.fixture(params=WRITERS)
def own(request, tmp_path):
    """(a task's keys, the path of a file with 20 rows)"""
    path = tmp_path / f"mine.{request.param}"
    WRITERS[request.param](path, rows(20))
    options = Options(columns=["o1", "o2"]) if request.param == "csv" else Options(field="o")
    return {"options": options, "path": str(path)}, path


def test_one_file_is_sliced(own, tmp_path):
    keys, path = own
    data = load("hub", task(**keys, splits={"train": "[:50%]", "validation": "[50%:12]", "test": "[12:]"}))["quiz"]
    assert [len(split) for split in (data.train, data.validation, data.test)] == [10, 2, 8]
    assert data.test[0].id == "quiz/test/12"
    assert data.fingerprints["test"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_folder_of_own_files(own, tmp_path):
    keys, path = own
    data = load("sample", task(**keys | {"path": str(tmp_path)}, splits={"train": path.name, "test": path.name}))[
        "quiz"
    ]
    assert (len(data.train), data.held_out, len(data.test)) == (19, 1, 20)


def test_relative_paths_count_from_the_working_directory(own, tmp_path, monkeypatch):
    keys, path = own
    monkeypatch.chdir(tmp_path)
    assert len(load("hub", task(**keys | {"path": path.name}, splits={"test": "all"}))["quiz"].test) == 20


def test_a_column_can_name_the_split(tmp_path):
    some = [row | {"split": "test" if i % 4 == 0 else "train"} for i, row in enumerate(rows(40))]
    WRITERS["jsonl"](tmp_path / "mine.jsonl", some)
    data = load("hub", task(path=str(tmp_path / "mine.jsonl"), splits={"train": "train", "test": "test"}))["quiz"]
    assert (len(data.train) + data.held_out, len(data.test)) == (30, 10)
    with pytest.raises(DataError, match="none of them in 'dev'"):
        load("hub", task(path=str(tmp_path / "mine.jsonl"), splits={"test": "dev"}))


def test_a_split_that_a_file_does_not_have_says_how_to_name_one(own):
    with pytest.raises(DataError, match=r'train: "\[:90%\]"'):
        load("hub", task(**own[0]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.jsonl", b'{"q": "a"}\n{"q": ', r"cut\.jsonl, line 2: no JSON"),
        ("list.jsonl", b"[1]\n", r"line 1: holds a list"),
        ("latin.jsonl", b'{"q": "caf\xe9"}\n', r"latin\.jsonl is not UTF-8"),
        ("empty.jsonl", b"", r"empty\.jsonl"),
        ("empty.csv", b"q,key\n", r"task quiz: .*empty\.csv all has no row"),
        ("long.csv", b"q,key\na,b,c\n", r"row 0 has more values"),
        ("twice.csv", b"q,key,q\na,b,c\n", r"twice\.csv: its first line names 'q' twice\. Rename"),
        ("quote.csv", b'q,key\n"a,1\n', r"quote\.csv, line \d: no CSV"),
        ("text.parquet", b"not parquet", r"text\.parquet cannot be read as parquet"),
    ],
)
def test_a_damaged_own_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load("hub", task(path=str(tmp_path / name), splits={"test": "all"}))


def test_a_first_line_with_a_name_left_empty_is_a_table(tmp_path):
    """As pandas writes one: the index has no name. Spreadsheets leave several empty at the end."""
    (tmp_path / "some.csv").write_text(",q,key\n0,a,b\n1,c,d\n")
    found = own_files.read(task(path=str(tmp_path / "some.csv")), "all").rows
    assert found == [{"": "0", "q": "a", "key": "b"}, {"": "1", "q": "c", "key": "d"}]
    (tmp_path / "some.csv").write_text("q,key,,\na,b,,\n")
    assert own_files.read(task(path=str(tmp_path / "some.csv")), "all").rows == [{"q": "a", "key": "b", "": ""}]


def test_a_missing_own_file_names_what_is_there(tmp_path):
    (tmp_path / "mine.csv").write_text("q\n")
    with pytest.raises(DataError, match=r"there is no .*yours\.csv.*holds mine\.csv"):
        load("hub", task(path=str(tmp_path / "yours.csv"), splits={"test": "all"}))


def test_a_file_of_another_kind_is_not_taken_for_a_hub_id(tmp_path):
    (tmp_path / "mine.xlsx").write_bytes(b"PK")
    for splits in ({"test": "all"}, {"test": "mine.csv"}):
        with pytest.raises(DataError, match=r"mine\.xlsx is none of \.parquet, \.jsonl, \.csv"):
            load("hub", task(path=str(tmp_path / "mine.xlsx"), splits=splits))


# ---- the embedded sample and the hub


def test_the_sample_is_never_complete(monkeypatch):
    sample = types.ModuleType("mixlora.tasks.sample")
    sample.rows = lambda path, config, split: rows(4) if split == "test" else []
    monkeypatch.setitem(sys.modules, "mixlora.tasks.sample", sample)
    monkeypatch.setattr(tasks, "sample", sample, raising=False)
    table = sources.read(task(), "sample", "test")
    assert (len(table.rows), table.complete) == (4, False)
    assert table.sha256 == sources.read(task(), "sample", "test").sha256
    with pytest.raises(MissingSplit):
        sources.read(task(), "sample", "train")


@pytest.fixture
def online(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_ENDPOINT", "https_proxy", "HTTPS_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    network.heard.clear()


def test_a_hub_that_refuses_is_said_at_once_with_what_works(online, monkeypatch):
    with socket.socket() as taken:  # bound and not listening: a connection is refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(DataError, match=r"(?s)me/quiz.*data\.source=sample.*data\.source=/path/to/folder"):
            load("hub")


def test_a_signal_while_the_hub_is_read_is_no_mistake_of_the_data(online, monkeypatch):
    """The library raises an error of its own for whatever ends it."""

    def load_dataset(*arguments, **options):
        try:
            raise Interrupted("interrupted", 2)
        except Exception as error:
            raise RuntimeError("An error occurred while generating the dataset") from error

    monkeypatch.setattr(hub, "require", lambda task: None)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(Interrupted, match="interrupted"):
        load("hub")


def test_a_hub_that_never_answers_is_given_up(online, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(network, "PATIENCE", 0.3)
        began = time.monotonic()
        with pytest.raises(DataError, match="cannot be reached"):
            load("hub")
        assert time.monotonic() - began < 5
    assert network.PATIENCE < 10


class FakeHub:
    """Stands for `datasets`: two splits, and an error on any other set."""

    def __init__(self, splits):
        self.splits = splits

    def load_dataset(self, path, config, *, split):
        if path != "me/quiz":
            raise RuntimeError("Dataset doesn't exist")
        if split not in self.splits:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(self.splits)}.')
        return FakeSplit(pa.Table.from_pylist(self.splits[split]))


class FakeSplit:
    def __init__(self, table):
        self.data = types.SimpleNamespace(table=table)

    def __len__(self):
        return self.data.table.num_rows


def test_the_hub_gives_rows_or_says_what_is_missing(online, monkeypatch):
    monkeypatch.setattr(network, "unreachable", lambda url, patience: None)
    monkeypatch.setitem(sys.modules, "datasets", FakeHub({"train": rows(20), "test": rows(5)}))
    data = load("hub")["quiz"]
    assert (len(data.train), data.held_out, len(data.test), data.complete) == (19, 1, 5, False)  # no validation
    with pytest.raises(DataError, match=r"(?s)doesn't exist.*data\.source=sample"):
        load("hub", task(path="me/nothing"))


def test_a_local_source_never_opens_a_socket(folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    load(folder)


def test_rows_of_one_group_are_held_out_together():
    """WinoGrande's twins share their options, in either order, and one gives the other away."""
    task = Task(name="t", path="x", question="{q}", options=Options(columns=["a", "b"]), answer="y", group="{a}\n{b}")
    read = Reader.of(task)
    rows = [
        read({"q": f"{i} {turn}", "a": f"{'xy'[turn]}{i}", "b": f"{'yx'[turn]}{i}", "y": 0}, f"t/train/{2 * i + turn}")
        for i in range(100)
        for turn in (0, 1)
    ]
    assert rows[0].group == rows[1].group != rows[2].group
    rest, held = hold_out("t", rows)
    assert len(held) == 10
    assert not {row.group for row in rest} & {row.group for row in held}
    alone = [replace(row, group=()) for row in rows]
    assert (
        len({row.group for row in rows} & {rows[int(e.id.split("/")[2])].group for e in hold_out("t", alone)[1]}) == 10
    )
    one = [replace(row, group=("all",)) for row in rows]
    assert [len(part) for part in hold_out("t", one)] == [200, 0]  # or nothing would be left to train on


def test_the_same_question_and_right_answer_beside_other_wrong_ones_is_the_same():
    row = Example(id="a", task="t", question="What melts?", answer="ice", options=("ice", "stone"), gold=0)
    same = replace(row, options=("iron", "Ice!"), answer="Ice!", gold=1)
    assert {*overlap.keys(row)} & {*overlap.keys(same)}
    for other in (replace(row, options=("ice", "iron"), answer="iron"), replace(row, question="What burns?")):
        assert not {*overlap.keys(row)} & {*overlap.keys(other)}
