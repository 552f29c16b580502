"""Laws of the formatter: what is tokenised is what is written, for training and for scoring alike."""

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mixlora.config.schema import Data, Style, Template
from mixlora.errors import ConfigError, DataError
from mixlora.models.tokenizer import byte_tokenizer
from mixlora.tasks.example import Example
from mixlora.tasks.prompts import Formatter

SHARED = Path(__file__).parents[2] / "shared"
QUESTION = Example(
    id="t/train/0", task="t", question="Which is warm?", answer="the sun", options=("the moon", "the sun"), gold=1
)
INSTRUCT = (  # trims the texts, writes its own BOS, blanks around: after Llama 2 and Mistral
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
)
THINKING = (  # an empty block of thoughts before a finished answer, and a date
    "<s>Today is {{ strftime_now('%d %b %Y') }}\n{% for m in messages %}{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


@lru_cache
def bos_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Bytes with a few merges, <s> before every text, </s> at its end, and perhaps a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e"), ("Ċ", "Ċ"), ("Ġ", "Ġ")]
    tokens = ["<s>", "</s>", "<think>", "</think>", *alphabet, *("".join(m) for m in merges)]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(tokens[:4])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = template
    return wrapped


TOKENIZERS = {
    "bytes": byte_tokenizer,
    "bos": bos_tokenizer,
    "instruct": lambda: bos_tokenizer(INSTRUCT),
    "thinking": lambda: bos_tokenizer(THINKING),
}
everywhere = pytest.mark.parametrize("template", [Template.auto, Template.plain])


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def options_of(form, example, **limits):
    """(the one prompt of its options, ids of each option, text of each option)"""
    choices = form.choices(example, **limits)
    assert len({choice.prompt for choice in choices}) == 1
    return list(choices[0].prompt.ids), [list(c.answer_ids) for c in choices], [c.text for c in choices]


def formatter(tokenizer, template=Template.auto, style=Style.cloze) -> Formatter:
    return Formatter(tokenizer, Data(template=template, style=style))


def example(**values) -> Example:
    return Example(**({"id": "t/train/0", "task": "t", "question": "What is it?", "answer": "it"} | values))


@everywhere
@pytest.mark.parametrize("answer", ["yes", " yes", "\nyes", "    return x\n", "日本", "a\n\nb"])
def test_nothing_of_question_or_answer_is_lost(tokenizer, template, answer):
    form = formatter(tokenizer, template)
    encoded = form.encode(example(answer=answer))
    assert tokenizer.decode(encoded.answer_ids).endswith(answer + tokenizer.decode(form.end_ids))
    assert "What is it?" in tokenizer.decode(encoded.prompt_ids)


@everywhere
def test_answer_ends_in_the_terminator_and_options_do_not(tokenizer, template):
    form = formatter(tokenizer, template)
    prompt, options, texts = options_of(form, QUESTION)
    encoded = form.encode(QUESTION)
    assert encoded.prompt_ids == prompt == list(form.prompt(QUESTION).ids)
    assert encoded.answer_ids == options[1] + form.end_ids
    assert texts == ["the moon", "the sun"]
    assert form.end_ids


@everywhere
def test_control_tokens_in_a_row_stay_text(tokenizer, template):
    form = formatter(tokenizer, template)
    clean = form.encode(example(question="a x b", answer="x"))
    hostile = " ".join(tokenizer.all_special_tokens)
    dirty = form.encode(example(question=f"a {hostile} b", answer=f"{hostile} x"))

    def count(encoded) -> int:
        return sum(i in tokenizer.all_special_ids for i in encoded.prompt_ids + encoded.answer_ids)

    assert count(dirty) == count(clean)
    assert hostile in tokenizer.decode(dirty.prompt_ids)


@pytest.mark.parametrize("name", ["bytes", "instruct"])
@pytest.mark.parametrize("question", ["Why?", " blanks around ", "two\n\nlines"])
def test_chat_is_what_the_template_writes(name, question):
    tokenizer = TOKENIZERS[name]()
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "the answer"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    encoded = formatter(tokenizer).encode(example(question=question, answer="the answer"))
    ids = encoded.prompt_ids + encoded.answer_ids
    text, wanted = tokenizer.decode(ids).replace(" </s>", "</s>"), tokenizer.decode(expected).replace(" </s>", "</s>")
    assert wanted.startswith(text)
    assert encoded.prompt_ids == expected[: len(encoded.prompt_ids)]


def test_thoughts_are_closed_in_the_prompt_and_the_date_stands_still():
    form = formatter(bos_tokenizer(THINKING))
    text = form.tokenizer.decode(list(form.prompt(QUESTION).ids))
    assert text.endswith("assistant\n<think>\n\n</think>\n\n")
    assert "Today is 26 Jul 2024" in text


def test_plain_keeps_the_tokenizers_bos_once():
    form = formatter(bos_tokenizer(), Template.plain)
    prompt = list(form.prompt(QUESTION).ids)
    assert form.tokenizer.decode(prompt) == "<s>Which is warm?\nAnswer:"
    assert form.tokenizer.decode(form.encode(QUESTION).answer_ids) == " the sun</s>"


@pytest.mark.parametrize(("cue", "answer"), [("", " it"), ("\nAnswer:", " it"), ("\nAnswer:\n", "\nit"), (" ", " it")])
def test_blanks_at_the_end_of_a_plain_prompt_go_to_the_answer(cue, answer):
    """A line break as well where options are scored, whose likelihoods stay as they were."""
    form = formatter(byte_tokenizer(), Template.plain)
    encoded = form.encode(example(cue=cue, options=("it", "that"), gold=0))
    assert form.tokenizer.decode(encoded.prompt_ids) == ("What is it?" + cue).rstrip()
    assert form.tokenizer.decode(encoded.answer_ids) == answer + "<|end|>"


@pytest.mark.parametrize("cue", ["\nAnswer:\n", "\nAnswer:\n\n", "\nAnswer:\n  "])
@pytest.mark.parametrize("answer", ["def it():\n    pass", "    return 1\n", "\nit", "the"])
def test_a_generated_answer_follows_the_line_break_of_its_cue(tokenizer, cue, answer):
    """As it is trained, and as solved examples show it. Otherwise a base model goes on in the question's last line."""
    form, asked = formatter(tokenizer, Template.plain), example(cue=cue, answer=answer)
    encoded, prompt = form.encode(asked), list(form.prompt(asked).ids)
    shown = list(form.prompt(asked, shots=[asked]).ids)
    texts = [tokenizer.decode(ids).removeprefix("<s>") for ids in (prompt, prompt + encoded.answer_ids, shown)]
    text = f"What is it?{cue}"
    assert encoded.prompt_ids == prompt
    assert texts == [
        text.rstrip(" "),
        text + answer + tokenizer.decode(form.end_ids),
        f"{text}{answer}\n\n{text}".rstrip(" "),
    ]


@everywhere
def test_letters_list_the_options(tokenizer, template):
    form = formatter(tokenizer, template, Style.letters)
    prompt, options, texts = options_of(form, QUESTION)
    assert "Which is warm?\nA. the moon\nB. the sun" in tokenizer.decode(prompt)
    assert texts == ["A", "B"]
    assert tokenizer.decode(form.encode(QUESTION).answer_ids[: -len(form.end_ids)]).strip() == "B"
    assert len({tuple(option) for option in options}) == 2


@everywhere
@pytest.mark.parametrize(
    ("style", "cue", "written"),
    [
        (Style.cloze, "\nAnswer:", "Which is warm?\nAnswer: the sun\n\nWhat melts?\nAnswer: ice\n\nIs it?\nAnswer:"),
        (Style.cloze, "\nSo:\n", "Which is warm?\nSo:\nthe sun\n\nWhat melts?\nSo:\nice\n\nIs it?\nSo:"),
        (
            Style.letters,
            "",
            "Which is warm?\nA. the moon\nB. the sun\nAnswer: B\n\nWhat melts?\nA. ice\nB. iron\nAnswer: A\n\n"
            "Is it?\nA. yes\nB. no\nAnswer:",
        ),
    ],
)
def test_solved_examples_stand_before_a_question_as_texts_with_their_answers(tokenizer, template, style, cue, written):
    """In a chat template too, where all of it is the user's text, and the question has its cue as they have."""
    form = formatter(tokenizer, template, style)
    first = replace(QUESTION, cue=cue)
    second = replace(first, question="What melts?", answer="ice", options=("ice", "iron"), gold=0)
    asked = replace(first, question="Is it?", options=("yes", "no"))
    text = tokenizer.decode(form.prompt(asked, shots=[first, second]).ids)
    assert text.count(written) == 1
    assert f"{written}\n" not in text
    if form.layout.name == "plain":
        assert text.removeprefix("<s>") == written
    else:
        assert written.rpartition("\n")[2] not in tokenizer.decode(form.prompt(asked).ids)


@everywhere
@pytest.mark.parametrize("room", [1, 7, 30])
def test_too_long_a_question_loses_its_beginning_only(tokenizer, template, room):
    form = formatter(tokenizer, template)
    short, long = example(question="?"), example(question="start " * 50 + "end?")
    limit = len(form.encode(short).prompt_ids) + len(form.encode(short).answer_ids) + room - 1
    whole, cut = form.encode(long), form.encode(long, max_length=limit)
    assert len(cut.prompt_ids) + len(cut.answer_ids) == limit
    assert cut.answer_ids == whole.answer_ids
    assert cut.cut == len(whole.prompt_ids) - len(cut.prompt_ids) > 0
    assert cut.prompt_ids[-room:] == whole.prompt_ids[-room:]
    assert cut.prompt_ids[0] == whole.prompt_ids[0] or not form.layout.head_ids
    assert form.encode(short, max_length=limit).cut == 0


@everywhere
def test_an_answer_is_never_cut(tokenizer, template):
    form = formatter(tokenizer, template)
    long = example(answer="it " * 100)
    assert not form.fits(long, 64)
    assert form.fits(example(), 200)
    with pytest.raises(DataError, match=r"t/train/0.*max_length=64"):
        form.encode(long, max_length=64)


@everywhere
def test_options_leave_room_for_the_longest(tokenizer, template):
    form = formatter(tokenizer, template)
    long = example(question="q" * 300, options=("a", "b" * 50), gold=0)
    prompt, options, _ = options_of(form, long, max_length=160)
    assert len(prompt) + max(map(len, options)) == 160


@everywhere
def test_an_option_that_leaves_no_room_for_the_question_is_refused(tokenizer, template):
    """It would be scored behind one token of the question, and beyond what the model may read."""
    form = formatter(tokenizer, template)
    long = example(question="q" * 300, options=("a", "b" * 50), gold=0)
    frame = len(form.prompt(example(question="q", cue="")).ids)
    longest = max(len(choice.answer_ids) for choice in form.choices(long))
    assert len(form.choices(long, max_length=frame + longest)[0].prompt.ids) == frame
    for room in (frame - 1, 0, -9):
        with pytest.raises(DataError, match=rf"t/train/0: an option takes {longest} tokens.*eval\.max_length"):
            form.choices(long, max_length=room + longest)


def test_fingerprint_changes_with_what_decides_a_prompt_and_with_nothing_else():
    forms = [
        formatter(byte_tokenizer()),
        formatter(byte_tokenizer(), Template.plain),
        formatter(byte_tokenizer(), style=Style.letters),
        formatter(bos_tokenizer()),
        formatter(bos_tokenizer(INSTRUCT)),
    ]
    assert len({form.fingerprint for form in forms}) == len(forms)
    again = byte_tokenizer()
    again(["a", "bb"], padding=True)
    assert formatter(again).fingerprint == forms[0].fingerprint


def test_show_marks_what_is_trained():
    assert formatter(bos_tokenizer()).show(QUESTION) == "<s>Which is warm?\nAnswer:⟦ the sun</s>⟧"


def test_a_chat_template_that_is_asked_for_must_be_there():
    with pytest.raises(ConfigError, match=r"data\.template=plain"):
        formatter(bos_tokenizer(), Template.chat)


@pytest.mark.parametrize("template", ["nothing", "{{ raise_exception('no') }}", "{{ messages[0].content * 2 }}"])
def test_a_chat_template_that_cannot_be_used_is_refused(template):
    with pytest.raises(ConfigError, match=r"data\.template=plain"):
        formatter(bos_tokenizer(template))


def golden() -> list[tuple[str, dict]]:
    path = SHARED / "golden" / "lm_eval_parity.json"
    if not path.is_file():
        return []
    tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
    return [(name, e) for name, task in tasks.items() if name != "winogrande" for e in task["examples"]]


@pytest.mark.skipif(not golden(), reason="needs ../shared/golden/lm_eval_parity.json")
def test_plain_tokens_are_those_of_lm_evaluation_harness():
    """Prompt and continuation of every recorded example of arc, openbookqa, piqa and boolq."""
    form = formatter(AutoTokenizer.from_pretrained(SHARED / "golden" / "tiny_model"), Template.plain)
    for name, doc in golden():
        question, cue = doc["prompt"].removesuffix("\nAnswer:"), "\nAnswer:" if "\nAnswer:" in doc["prompt"] else ""
        options = tuple(text.removeprefix(" ") for text in doc["continuations"])
        prompt, ids, _ = options_of(form, example(question=question, cue=cue, options=options, gold=0))
        assert ids == doc["continuation_tokens"], (name, doc["doc_id"])
        assert len(prompt) == doc["n_context_tokens"][0] or doc["truncated"][0], (name, doc["doc_id"])
