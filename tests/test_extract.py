"""Golden answers: what each rule reads in a generated text, by table."""

import pytest

from mixlora.evaluation.extract import first_label, fold, option
from mixlora.evaluation.run import number_matches, text_matches
from mixlora.tasks.numbers import canonical_number, last_number, more_than_a_number, strict_number

LABELS, TEXTS = "ABCD", ("the moon", "the sun", "a stone", "A cat")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" b", "B"),
        ("(B)", "B"),
        ("b.", "B"),
        ("**B**", "B"),
        ("B. the sun", "B"),
        ("B) the sun", "B"),
        ("B\nBecause it is warm.", "B"),
        ("(B) the sun", "B"),
        ("The answer is (B).", "B"),
        ("The answer is B", "B"),
        ("the answer is b.", "B"),
        ("The correct answer is: C", "C"),
        ("Answer: D", "D"),
        ("I think it is (C), so the answer is C.", "C"),
        ("The answer is A. No, wait, the answer is B.", "B"),
        ("It must be (B) because of the heat.", "B"),
        ("The Sun.", "B"),
        ("a cat", "D"),
        ("**Answer:** B. the sun", "B"),
        ("**Answer**: B", "B"),
        ("Answer:\n\n**(B)** the sun", "B"),
        ("The correct option is B.", "B"),
        ("The answer is option B.", "B"),
        ("The answer is B, because the answer I gave fits.", "B"),
        ("B, because it is warm", "B"),
        ("A, I think", "A"),
        ("D, A cat", "D"),
        ("The answer is _B_", "B"),
        ("Answer: 'B'", "B"),
        ("The answer is B. I hope this answers", "B"),
        ("(B) is the best choice\n\nA dog barks.", "B"),
        ("B. This is the correct choice\nA is wrong", "B"),
        ("(B), since fish do not [as far as I know] bark", "B"),
        ("A, B and D are wrong. It is (C).", "C"),
        ("**B.** the sun", "B"),
        ("**B. the sun**", "B"),
        ("[B] the sun", "B"),
        ("Option B", "B"),
        (r"$\boxed{B}$", "B"),
        (r"\boxed{\text{C}}", "C"),
        ("The answer is the sun.", "B"),
        ("B\n\nQuestion: What is hot?\nA. ice\nB. fire", "B"),
        ("B. the sun\nA. the moon is cold", "B"),
        ("B. the sun, because (A) the moon is cold.", "B"),
        ("B. It cannot be (A).", "B"),
        ("The correct answer is B. Answer A is wrong because it is cold.", "B"),
        ("Answer B is correct. Answer A is wrong.", "B"),
        ("Answer\nB", "B"),
        ("The answer is B, A is wrong", "B"),
        ("The answer is B and A is wrong", "B"),
        ("The answer is A or B. It is warm, so the answer is B.", "B"),
        ("B. The answer is x.", "B"),
        ("Let me see.\n\nOptions:\nA. the moon is cold\nB. the sun\n\nAnswer: B", "B"),
        # the options listed again, each with a remark
        ("(A)\nthe moon is cold\n(B)\nthe sun\nThe answer is (B).", "B"),
        ("Option A:\nthe moon is cold\nOption B:\nthe sun\nThe answer is B.", "B"),
        ("a)\nthe moon is cold\nb)\nthe sun\nThe answer is B.", "B"),
        ("**A**\n\nIt is cold.\n\n**B**\n\nIt is hot.\n\n**Answer: B**", "B"),
        ("(A)\n(B)\n(C)\n(D)", None),
        ("A\n\nA. the moon\nB. the sun is too hot", "A"),
        ("Let me see.\n\n**Options:**\nA. the moon\nB. the sun\n\n**Answer:** B", "B"),
        ("Let me see.\n\nConsider each option.\nA. the moon is cold\nB. the sun\n\nThe correct answer is B", "B"),
        ("Let me see.\n\n**I weigh them:**\nA. It is cold\nB. It is hot\n\nThe correct answer is B", "B"),
        ("Sure.\n\nQuestion: Which is hot?\nA. the moon\nB. the sun\nAnswer: B", "B"),
        ("Question: Which is hot?\n(A) **The moon**\n(B) **The sun**\n\nAnswer: B", "B"),
        ("Question: Which is hot? A) the moon B) the sun\nAnswer: B", "B"),
        # a letter of a name or a word
        ("B. The answer is U.S. Congress", "B"),
        ("(B) The most likely answer is S. aureus, which is round", "B"),
        ("The answer is E. coli, so (B)", "B"),
        ("B. The answer is X-linked.", "B"),
        ("The answer is B, E. coli.", "B"),
        ("The answer is B, C. difficile.", "B"),
        ("The answer is C, H. pylori", "C"),
        ("Answer: A, J. Smith", "A"),
        # one option after another
        ("A. No, it is cold. (B) is right.", "B"),
        ("A) is too cold; (B) fits.", "B"),
        ("B) is right, (A) is cold.", "B"),
        # another question, which the model asks itself
        ("B\n\nQuestion: What is hot?\nA. ice\nB. fire\nAnswer: A", "B"),
        ("B. the sun\n\nQuestion: What is hot?\nA. ice\nB. fire\nAnswer: A", "B"),
        ("the sun\n\nFire is\nA. cold\nB. hot\nAnswer: A", "B"),
        ("I do not know.\n\nQuestion: What is hot?\nA. ice\nB. fire\nAnswer: A", None),
        ("\n\nQuestion: What is hot?\nA. ice\nB. fire\nAnswer: A", None),
        ("\n\nFire is\nA. cold\nB. hot\nAnswer: A", None),
        ("B. the sun\n\nQuestion: And today?\nA. the moon\nB. the sun\nAnswer: A", "B"),
        ("yes\n\nQuestion: Which?\nA. the moon\nB. the sun\nAnswer: B\n\nIce is\nA. cold\nB. hot\nAnswer: A", "B"),
        ("D. A cat\n\nAnd today?\nA. the moon\nB. the sun\nAnswer: A", "D"),
        # no answer
        ("A* is an algorithm, B is not", None),
        ("A. the moon\nB. the sun\nC. a stone\nD. A cat", None),
        ("A) the moon\nB) the sun", None),
        ("A, B and D are wrong. It must be C.", None),
        ("A, B and D are wrong. The answer must be: C", None),
        ("The answer is not (B).", None),
        ("It is not (A) or (B)", None),
        ("The answer is A. No, the answer is E.", None),
        ("(A) is tempting, but the answer is E.", None),
        ("The answer is A or B.", None),
        ("The answer is (A), (B) or (C)", None),
        ("The answer is A and B.", None),
        ("**A** or **B**", None),
        ("Answer A is wrong.", None),
        ("A\nB\nC\nD", None),
        ("", None),
        ("I do not know.", None),
        ("(A) or (B)", None),
        ("A and B", None),
        ("E", None),
        ("The answer is E", None),
        ("The answer is a dog", None),
        ("A dog has four legs.", None),
        ("1", None),
    ],
)
def test_an_option_in_a_free_answer(text, letter):
    assert option(text, LABELS, TEXTS) == letter


def test_an_option_text_that_stands_twice_is_no_answer():
    assert option("same", "AB", ("same", "same")) is None


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("the correct answer is answer2", "answer2"),
        ("answer3 is wrong, answer1", "answer3"),
        ("Answer2", None),
        ("the answer is 2", None),
        ("", None),
        ("xanswer1y", "answer1"),
    ],
)
def test_the_first_label(text, label):
    assert first_label(text, ("answer1", "answer2", "answer3"), ()) == label


NUMBERS = [  # (text, strict, flexible)
    ("She has 3 left.\n#### 18", "18", "18"),
    ("#### 1,234", "1234", "1234"),
    ("####1234567.50", "1234567.5", "1234567.5"),
    ("#### $18", "18", "18"),
    ("#### -5", "-5", "-5"),
    ("#### −5", "-5", "-5"),
    ("#### -$5", "-5", "-5"),
    ("#### $-5", "-5", "-5"),
    ("#### 3/4", "0.75", "0.75"),
    ("#### 3 / 4 cups", "0.75", "0.75"),
    ("#### .5", "0.5", "0.5"),
    ("#### 18 dollars and 3 cents", "18", "3"),
    ("#### 72%", "72", "72"),
    ("#### 10.", "10", "10"),
    ("The answer is 42.", None, "42"),
    ("First 7, then 1,000 apples", None, "1000"),
    ("he pays 5, 6, and 7", None, "7"),
    ("2,3", None, "3"),
    ("10-3", None, "3"),
    ("10 - 3 = 7", None, "7"),
    ("x = -7", None, "-7"),
    ("it costs $2.50 a kg", None, "2.5"),
    ("18km", None, "18"),
    ("018", None, "18"),
    ("1/0", None, "1"),
    ("5.0", None, "5"),
    ("####", None, None),
    ("no number", None, None),
    ("", None, None),
    ("#### eighteen", None, None),
    ("#### 5\n#### 6", "5", "6"),
    ("#### 1e-05", "1e-05", "1e-05"),
    ("it is 1.5e-3 m", None, "0.0015"),
    ("0.00001", None, "1e-05"),
    ("2E3", None, "2000"),
    ("3e", None, "3"),
    ("Rs.107", None, "107"),
    ("see No.5", None, "5"),
    ("v1.2", None, None),
    ("The total cost - $18", None, "18"),
    ("Answer – 18", None, "18"),
    ("So she sells:\n- 18 eggs", None, "18"),
    ("it is -$18", None, "-18"),
    ("it is $-18", None, "-18"),
    ("it is $ 18", None, "18"),
    ("#### - 5", "-5", "5"),
    ("5 --18", None, "18"),
    (r"so \boxed{12,\!345}", None, "12345"),
    ("10{,}000", None, "10000"),
    (r"it is 1\,234\,567.5", None, "1234567.5"),
    ("#### $1{,}234$", "1234", "1234"),
    ("9999999800000001", None, "9999999800000001"),
    ("9,999,999,800,000,000.00", None, "9999999800000000"),
    ("1e20", None, "1" + "0" * 20),
    ("999999980000000.1/0.1", None, "9999999800000001"),
    ("99999998000000010/10", None, "9999999800000001"),
    ("99999998000000010/4", None, "2.4999999500000004e+16"),
    ("1" * 400, None, "1" * 400),
    ("#### -" + "1" * 400, "-" + "1" * 400, "-" + "1" * 400),
]


@pytest.mark.parametrize(("text", "strict", "flexible"), NUMBERS)
def test_numbers(text, strict, flexible):
    assert (strict_number(text), last_number(text)) == (strict, flexible)


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("... #### 1,234", 1, 1),
        ("... the total is 1234 dollars", 0, 1),
        ("#### 1234, which is 2 more", 1, 1),
        ("#### 1235", 0, 0),
        ("1234 and then 7", 0, 0),
        ("", 0, 0),
    ],
)
def test_gsm8k_is_strict_and_flexible(text, strict, flexible):
    assert number_matches(text, "<<1200+34=1234>>\n#### 1,234") == {"strict": strict, "flexible": flexible}


def test_a_text_without_number_never_matches_one_without():
    """None is no number, so two of them are not equal numbers."""
    assert number_matches("nothing", "#### 0") == {"strict": 0, "flexible": 0}


def test_a_target_without_number_is_no_answer_of_every_reply():
    assert number_matches("nothing", "v1") == {"strict": 0, "flexible": 0}


def test_texts_are_compared_folded():
    assert text_matches("?", "!") == text_matches("", ".") == {"exact_match": 0}
    assert text_matches(" ! ", "!") == {"exact_match": 1}
    assert text_matches(" The  Sun. ", "the sun") == {"exact_match": 1}
    assert text_matches("", "the sun") == {"exact_match": 0}
    assert fold(' "A B"! ') == "a b"


def test_equal_numbers_have_one_spelling():
    same = ["0.5", ".5", "1/2", "0.50", "$0.5"]
    assert len({canonical_number(text) for text in same}) == 1


def test_an_option_that_begins_with_an_article_is_not_the_letter_a():
    """ "The answer is A rock" names the option; where no option is spelled so it is the letter, as before."""
    options = ["The sun", "A rock", "a rocket", "water"]
    read = {"The answer is: A rock": "B", "The answer is A rocket.": "C", "The answer is A because": "A", "A": "A"}
    assert {text: option(text, "ABCD", options) for text in read} == read
    assert (
        option("The answer is A rock", "ABC", ["A tree", "A rock", "a rock."]) == "A"
    )  # which of the two, nobody knows
    assert option("The answer is A rock pile", "ABC", ["A tree", "rock", "A rock pile"]) == "C"
    assert option("The answer is A rock pile", "ABC", ["A rock", "rock", "A rock pile"]) == "C"


def test_a_letter_that_no_option_has_may_be_an_options_text():
    assert option("The answer is X-ray", "AB", ("MRI", "X-ray")) == "B"
    assert option("The answer is A/C unit", "AB", ("fan", "A/C unit")) == "B"
    assert option("The answer is A, the rarest.", "ABCD", ("AB", "B", "A", "O")) == "A"
    for reply in ("The answer is C. difficile", "C. difficile", "Answer: C. difficile, a bacterium"):
        assert option(reply, "ABCD", ("E. coli", "C. difficile", "S. aureus", "H. pylori")) == "B"


OTHER_VALUES = (
    *("at 5:30", "1:05:30 h", "3 1/2", "12 000", "12\u202f000 km", "2 × 10^3", "10^6", "1.234,50", "12,5 %", "50 cm^2"),
    *(r"\frac{3}{4}", r"2\sqrt{3}", "5½", "3 × 10⁵", "2**10", "3^{10}", "1,00,000", "12'500"),
    *("12{,}5", r"10\,00"),
)


@pytest.mark.parametrize("text", OTHER_VALUES)
def test_a_value_that_is_not_one_number_is_known(text):
    assert more_than_a_number(text)


PLAIN = (
    *("7", "1,234", "18 eggs", "3/4", "$1,080.", "-2.50", "#### 72", "eggs, 500 more", "Total: 5", "Rs.107", "50%"),
    *("12{,}500", r"12,\!500"),
    *(r"\boxed{72}", "The answer is **72**.", r"72^\circ", "'18'", "x = 5", "12, 18", "(5)", "18."),
)


@pytest.mark.parametrize("text", PLAIN)
def test_a_plain_number_is_no_more_than_that(text):
    assert more_than_a_number(text) is None


def test_accents_are_the_same_however_they_are_written():
    assert text_matches("caf\u00e9", "cafe\u0301")["exact_match"] == 1.0
