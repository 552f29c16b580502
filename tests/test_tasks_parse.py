"""Laws of the parser: what is wrong with a row is named, what is right with it is kept to the letter."""

import pytest

from mixlora.config.schema import Answer, BadRow, Options, Replacement, Style, Task, Wording
from mixlora.errors import ConfigError, DataError
from mixlora.tasks.parse import check, examples
from mixlora.tasks.styles import STYLES
from mixlora.tasks.table import table_of
from mixlora.tasks.template import template


def task(**values) -> Task:
    base = {
        "name": "quiz",
        "path": "owner/quiz",
        "question": "Q: {question}",
        "options": Options(field="choices.text", labels="choices.label"),
        "answer": "key",
    }
    return Task(**(base | values))


def row(question="Why?", texts=("a", "b", "c"), labels=("A", "B", "C"), key="B") -> dict:
    return {"question": question, "choices": {"text": list(texts), "label": list(labels)}, "key": key}


def parse(a_task, *rows, on_bad_row=BadRow.error):
    return examples(a_task, table_of(list(rows), "quiz.jsonl"), "train", on_bad_row)


def one(a_task, a_row):
    return parse(a_task, a_row)[0][0]


def test_a_row_becomes_an_example():
    found = one(task(), row())
    assert (found.id, found.question, found.options, found.gold, found.answer) == (
        "quiz/train/0", "Q: Why?", ("a", "b", "c"), 1, "b",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "extra", "columns", "texts"),
    [
        (Options(field="o"), {}, {"o": ["x", "y"], "key": 1}, ("x", "y")),
        (Options(field="o"), {"answer_values": ["0", "1"]}, {"o": ["x", "y"], "key": "1"}, ("x", "y")),
        (Options(field="o"), {}, {"o": {"A": "x", "B": "y", "E": None}, "key": "B"}, ("x", "y")),
        (Options(columns=["o1", "o2"]), {"answer_values": ["1", "2"]}, {"o1": "x", "o2": "y", "key": 2}, ("x", "y")),
        (Options(columns=["o1", "o2"]), {}, {"o1": "x", "o2": "y", "key": 1}, ("x", "y")),
        (Options(fixed=["no", "yes"]), {"answer_values": [False, True]}, {"key": True}, ("no", "yes")),
        (Options(fixed=["no", "yes"]), {"answer_values": [False, True]}, {"key": "True"}, ("no", "yes")),
        (Options(fixed=["no", "yes"]), {}, {"key": "yes"}, ("no", "yes")),
    ],
)
def test_options_live_where_the_task_says(options, extra, columns, texts):
    found = one(task(options=options, **extra), {"question": "Why?"} | columns)
    assert (found.options, found.gold) == (texts, 1)


@pytest.mark.parametrize("labels", ["123", "12345", "ABC", "ABCDE"])
def test_arcs_numbers_and_three_to_five_options_are_fine(labels):
    found = one(task(), row(texts=[f"text {label}" for label in labels], labels=labels, key=labels[-1]))
    assert found.answer == f"text {labels[-1]}"


BAD = {
    "null question": (row(question=None), "question"),
    "blank question": (row(question=None) | {"question": ["x", None]}, "question"),
    "empty question in words of the task": (row(question=" \n"), "question"),
    "NaN for a null": (row(question=float("nan")), "question"),
    "half a surrogate": (row(question="\ud800"), "question"),
    "question of the wrong type": (row(question={"a": 1}), "question"),
    "null answer": (row(key=None), "key"),
    "empty answer": (row(key=""), "key"),
    "answer outside": (row(key="E"), "key"),
    "label -1": (row(key=-1), "key"),
    "one option": (row(texts="a", labels="A", key="A"), "choices.text"),
    "no option": (row(texts="", labels=""), "choices.text"),
    "empty option": (row(texts=("a", " ", "c")), "choices.text"),
    "null option": (row(texts=("a", None, "c")), "choices.text"),
    "an option twice": (row(texts=("a", "b", "a")), "choices.text"),
    "a label twice": (row(labels="ABA"), "choices.text"),
    "fewer labels": (row(labels="AB"), "choices.text"),
    "labels of the wrong type": (row() | {"choices": {"text": ["a", "b"], "label": None}}, "choices.label"),
    "options of the wrong type": (row() | {"choices": {"text": "ab", "label": ["A", "B"]}}, "choices.text"),
    "missing field": (row() | {"choices": {"label": ["A"]}}, "choices.text"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_with_file_row_and_field(name):
    bad, field = BAD[name]
    with pytest.raises(DataError, match=rf"quiz\.jsonl, row 2, field '{field}'.*data\.on_bad_row=skip"):
        parse(task(), row(), row(), bad)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_can_be_skipped_and_is_listed(name):
    bad, field = BAD[name]
    found, skipped = parse(task(), *[row()] * 50, bad, *[row()] * 50, on_bad_row=BadRow.skip)
    assert [example.id for example in found] == [f"quiz/train/{i}" for i in range(101) if i != 50]
    assert [(report.row, report.field) for report in skipped] == [(50, field)]


def test_more_than_one_percent_is_too_much_to_skip():
    with pytest.raises(DataError, match="2 of 102 rows are bad"):
        parse(task(), *[row()] * 100, *[row(key="")] * 2, on_bad_row=BadRow.skip)


def test_one_percent_is_of_the_rows_that_where_keeps():
    chosen = task(where={"lang": "en"})
    good, bad, other = (row() | {"lang": "en"}, row(key="") | {"lang": "en"}, row() | {"lang": "de"})
    found, skipped = parse(chosen, *[good] * 99, bad, on_bad_row=BadRow.skip)
    assert (len(found), len(skipped)) == (99, 1)
    with pytest.raises(DataError, match="1 of 99 rows are bad"):
        parse(chosen, *[good] * 98, bad, *[other] * 100, on_bad_row=BadRow.skip)


def test_a_known_repetition_is_kept():
    assert one(task(repeated_options=True), row(texts=("a", "b", "a"))).gold == 1


@pytest.mark.parametrize("on_bad_row", BadRow)
def test_a_missing_column_is_named_with_the_nearest(on_bad_row):
    with pytest.raises(DataError, match=r"quiz\.jsonl has no column 'question'\. Did you mean 'questions'"):
        parse(
            task(), {"questions": "Why?"} | {k: v for k, v in row().items() if k != "question"}, on_bad_row=on_bad_row
        )


def test_no_row_is_an_error_that_names_the_task():
    with pytest.raises(DataError, match=r"task quiz: quiz\.jsonl has no row where \{'key': 'Z'\}"):
        parse(task(where={"key": "Z"}), row())
    with pytest.raises(DataError, match=r"task quiz: quiz\.jsonl has no row\. "):
        parse(task())


def test_an_empty_question_beside_a_passage_is_empty():
    """What makes the question is its identity; an empty column of it may be the row's way."""
    passage = task(question="{text}\n{question}", identity="{question}")
    assert one(passage, row() | {"text": ""}).question == "Why?"
    with pytest.raises(DataError, match="field 'question': is empty"):
        one(passage, row(question="") | {"text": "long"})
    with pytest.raises(DataError, match="field 'text, question': is empty"):
        one(task(question="{text}\n{question}"), row(question="") | {"text": ""})


def test_where_keeps_the_rows_that_match():
    found, _ = parse(task(where={"image": None}), row() | {"image": b"png"}, row() | {"image": None})
    assert [example.id for example in found] == ["quiz/train/1"]


@pytest.mark.parametrize("nothing", [None, ""])
def test_what_is_empty_is_null_and_nothing_else_is(nothing):
    """A CSV file cannot hold a null; 0 and False are values."""
    rows = [row() | {"image": image} for image in (None, "", 0, False, "x.png")]
    found, _ = parse(task(where={"image": nothing}), *rows, row())
    assert [example.id.rpartition("/")[2] for example in found] == ["0", "1", "5"]
    for wanted, place in ((0, "2"), ("x.png", "3")):
        found, _ = parse(task(where={"image": wanted}), *rows[:3], rows[4])
        assert [example.id.rpartition("/")[2] for example in found] == [place]


def test_where_reads_dotted_paths():
    """A picture behind a dot is a picture, and what is not there is none."""
    chosen = task(where={"meta.image": None})
    rows = [row() | {"meta": {"image": "x.png"}}, row() | {"meta": {"image": None}}, row() | {"meta": {}}]
    found, _ = parse(chosen, *rows)
    assert [example.id.rpartition("/")[2] for example in found] == ["1", "2"]


def test_where_goes_by_the_value_however_a_file_types_it():
    """Every value of a CSV file is a text."""
    chosen = task(where={"lang": 1, "kept": True})
    rows = [row() | {"lang": lang, "kept": kept} for lang, kept in (("1", "true"), ("2", "true"), (1, True))]
    found, _ = parse(chosen, *rows)
    assert [example.id.rpartition("/")[2] for example in found] == ["0", "2"]


def test_a_number_that_no_reader_finds_is_refused():
    """Else no reply would have a number like it, nor be told from it."""
    number = task(options=None, answer="key", answer_kind=Answer.number, metric="flexible")
    assert one(number, row(key="Rs.107")).answer == "Rs.107"
    with pytest.raises(DataError, match="has no number"):
        parse(number, row(key="v1"))


def test_a_number_must_contain_its_mark():
    number = task(options=None, answer="solution", answer_kind=Answer.number, answer_contains="####")
    assert one(number, {"question": "1+1", "solution": "#### 2"}).answer == "#### 2"
    with pytest.raises(DataError, match=r"row 0, field 'solution': has no '####'"):
        parse(number, {"question": "1+1", "solution": "2"})
    with pytest.raises(DataError, match=r"row 0, field 'solution': has no number after '####'"):
        parse(number, {"question": "1+1", "solution": "2 #### two"})


def test_a_program_has_tests_and_the_name_that_they_call():
    code = task(options=None, answer="code", answer_kind=Answer.code, tests="{setup}\n{asserts}")
    program = {"question": "Twice", "setup": "", "asserts": ["assert twice(1) == 2", "assert twice(2) == 4"]}
    found = one(code, program | {"code": "def help(x):\r\n\treturn x\r\ndef twice(x):\r\n\treturn 2 * help(x)"})
    assert found.entry_point == "twice"
    assert found.tests == "\nassert twice(1) == 2\nassert twice(2) == 4"
    assert "\r" not in found.answer
    assert found.row["question"] == "Twice"
    with pytest.raises(DataError, match="defines no function"):
        parse(code, program | {"code": "x = 1"})


def test_strange_text_is_kept_to_the_letter():
    text = "\u202eright to left\u200b\x00 {key} <|im_end|> \r\n " + "long " * 10_000
    assert one(task(), row(question=text)).question == "Q: " + text


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("{a} and {b.c}", "1 and two"),
        ("{{{a}}} {{}}", "{1} {}"),
        ("{l.1}|{l}", "y|x\ny"),
        ("{two words}", "{a}"),
        ("{b.c|capitalize}, {caps|capitalize} {a|capitalize}", "Two, Yes, he 1"),
        ("{b.c.d}", None),
        ("{l.2}", None),
        ("{b}", None),
    ],
)
def test_templates_read_columns_keys_and_places(text, filled):
    values = {"a": 1, "b": {"c": "two"}, "l": ["x", "y"], "two words": "{a}", "caps": "yes, HE"}
    if filled is not None:
        assert template(text, "question")(values) == filled
        return
    with pytest.raises(Exception, match=r"is missing|holds a dict"):
        template(text, "question")(values)


@pytest.mark.parametrize(
    "text",
    [
        "{a!r}",
        "{a:>9}",
        "{a[0]}",
        "{.a}",
        "{}",
        "{ a}",
        "{a",
        "a}",
        "{'a': 1}",
        "{{a}",
        "{a|}",
        "{a|upper}",
        "{|capitalize}",
    ],
)
def test_templates_know_no_python(text):
    with pytest.raises(ConfigError, match="question"):
        template(text, "question")


def test_a_template_reaches_no_attribute():
    with pytest.raises(Exception, match="is missing"):
        template("{a.__class__}", "question")({"a": "x"})


def test_a_wording_is_cleaned_step_by_step_in_question_and_options():
    steps = [Replacement(pattern=r"\[(\w)\w*\]", by=r"<\1>"), Replacement(pattern="<s>")]
    wording = Wording(question="{question} [two]", clean=steps, option="|{text}")
    found = one(task(wordings={"lm_eval": wording}), row("[step] Why?", ["a [six]", "[one]", "c"]))
    turn = STYLES[Style.lm_eval].turns(found)[1]
    assert turn.question == " Why? <t>|a |<o>|c"
    assert (turn.answer, turn.length) == ("<o>", 3)
    assert found.options == ("a [six]", "[one]", "c")


@pytest.mark.parametrize(("pattern", "by"), [("[", ""), ("a", r"\1"), ("a", r"\q")])
def test_a_replacement_that_cannot_be_is_named(pattern, by):
    wording = Wording(clean=[Replacement(pattern="a"), Replacement(pattern=pattern, by=by)])
    with pytest.raises(ConfigError, match=r"task quiz: wordings\.lm_eval\.clean\[1\]"):
        one(task(wordings={"lm_eval": wording}), row())


def test_a_wording_that_cannot_list_the_options_is_named():
    """Of labels that are too few once the style is asked for: in another one they are of no use."""
    message = r"task quiz: wordings\.lm_eval\.option: '\{txt\}'.*Did you mean 'text'"
    with pytest.raises(ConfigError, match=message):
        one(task(wordings={"lm_eval": Wording(option="{txt}")}), row())
    found = one(task(wordings={"lm_eval": Wording(labels=["A", "B"], option="{label}. {text}")}), row())
    message = r"task quiz: wordings\.lm_eval\.labels has 2 labels .*quiz/train/0 has 3 options\. Give it 3"
    with pytest.raises(ConfigError, match=message):
        STYLES[Style.lm_eval].check(found)


def test_a_row_without_the_blank_of_its_wording_is_named_before_it_is_asked():
    found = one(task(wordings={"lm_eval": Wording(blank="_")}), row("No blank"))
    with pytest.raises(DataError, match=r"quiz/train/0 has no blank '_'.*wordings\.lm_eval\.blank of task quiz"):
        STYLES[Style.lm_eval].check(found)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"options": None}, "needs options"),
        ({"answer_kind": Answer.text}, "takes no options"),
        ({"options": Options()}, "exactly one of"),
        ({"options": Options(field="a", fixed=["b", "c"])}, "exactly one of"),
        ({"options": Options(fixed=["a", "b"]), "answer_values": [1]}, "2 options but 1 answer_values"),
        ({"options": None, "answer_kind": Answer.code}, "needs tests"),
        ({"eval_only": True, "train_only": True}, "both true"),
        ({"cap": 0}, "cap must be at least 1"),
        ({"question": "{a"}, "column in braces"),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        parse(task(**values), row())


@pytest.mark.parametrize(
    ("options", "values"), [({"columns": ["a", "b"], "labels": "l"}, None), ({"field": "o", "labels": "l"}, ["0", "1"])]
)
def test_labels_that_nobody_would_read_are_refused(options, values):
    wrong = Task(name="t", question="{q}", answer="a", options=Options(**options), answer_values=values)
    with pytest.raises(ConfigError, match=r"options\.labels .* Set one"):
        check(wrong)
