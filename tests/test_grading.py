"""Grading: what outputs answer, as a person would read them. Each row is a kind of answer that was seen somewhere."""
import json
import os
import signal
from collections import Counter

import pytest

import data
from data import extract_number, extract_option, grade

# --- numbers ---------------------------------------------------------------------------------------------------------
PLAIN = [
    ("$1,234.50", "1234.5"), ("18.", "18"), ("18.00", "18"), ("−5", "-5"), ("-5", "-5"), ("5%", "5"), ("0.50", "0.5"),
    (".5", "0.5"), ("007", "7"), ("-0", "0"), ("none at all", None), ("", None), ("First 3, then 7.", "7"),
    ("9007199254740993", "9007199254740993"), ("v2.0 gives 18", "18"), ("5 * 3 = 15 apples", "15"), ("10-3=7", "7"),
    ("3-4 = -1", "-1"), ("It costs $5.", "5"), ("3, 4 and 5,", "5"), ("1,2,3", "3"), ("So there are eighteen.", "18"),
    ("The answer is 18 eggs.", "18"), ("The answer is: $18.", "18"), ("the ANSWER is 1,000,000", "1000000"),
    ("The answer is 123456789012345678901234567890.", "123456789012345678901234567890"), ("The answer is .5.", "0.5"),
    ("The answer is -$5", "-5"), ("The answer is $-5", "-5"), ("The answer is --5", "-5"), ("The answer is - 5", "-5"),
    ("The answer is 5 because 2 + 3", "5"), ("The answer is unknown, so 12", "12"), ("The answer is x. 7", "7")]
# where the answer is
PLACE = [
    ("#### 18", "18"), ("#### 1,200\n", "1200"), ("#### 9 * 2 = 18", "18"), ("The answer is 9 * 2 = 18", "18"),
    ("The answer is 3. The answer is 4.", "4"), ("The answer is 17. Wait, no: the answer is 18.", "18"),
    ("The answer is 18. Let me check that this answer is right: 9 * 2 = 18.", "18"),
    ("The answer is 18. Let me check that this answer is right: 9 * 3 = 27.", "18"),
    (r"<think>so the answer is 17?</think> It is \boxed{18}", "18"), ("<think>so the answer is 17, or", None),
    ("<think>17</think>", "17"), ("Answer: 42\n\nCheck: 21 * 2 = 42, 42 / 2 = 21.", "42"), ("**Answer:** 42", "42"),
    ("Answer: There are 3 boxes. Each holds 6. So 18.", "18"), ("The answer is that John has 18 apples.", "18"),
    ("The area is 18 m^2.", "18"), ("The area is 18 m².", "18"), (r"\boxed{72}", "72"), (r"\boxed{x_{1}=18}", "18"),
    (r"so $\boxed{-3}$ it is 4", "-3"), (r"\boxed{3}, so the answer is 4", "4"), (r"\boxed{3}? No: \boxed{5}", "5"),
    (r"The answer is $\boxed{18}$. Thanks, 5 stars!", "18"), ("The answer is\n\n18", "18"), ("answer is...42", "42"),
    ("The answer is 18.\n\nQ: 1+1?\nA: The answer is 2.", "18"), ("The answer is 18.\nQ: 1+1?\nA: 2", "18"),
    ("18\n\nQuestion: What is 1 + 1?\nAnswer: 2", "18"), ("So 18.\n\nHuman: and 5 * 5?\n\nAssistant: 25", "18"),
    ("P: (1,2)\nQ: (3,4)\nThe distance is \\sqrt{8}, squared 8", "8"), ("Let Q be a point.\nQ: (3,4), then 25", "25"),
    ("She pays **$64** for 16 glasses.", "64"), ("The total is 64.\n\nLet me know if you have 2 more!", "64"),
    ("Total: 9 fruit (6 pears and 3 plums).", "9"), ("So 18 of the 25 students passed.", "18"),
    ("答案是18。", "18"), ("答えは18です。", "18"), ("정답은18입니다.", "18"), ("La respuesta es 18 euros, 3 cada uno.", "18"),
    ("The answer is not 12.", None), ("She has a total of 18.", "18"), ("He made a profit of 18 dollars.", "18"),
    (r"\boxed{1} is wrong. The answer is 21.", "21"), (r"So \boxed{5}. Wrong: the answer is 15.", "15"),
    ("The answer is 18 = 9 * 2", "18"), ("x = - 5", "-5"), ("18<think>the answer is 17</think>", "18"),
    ("<thinking>the answer is 17</thinking>18", "18"), ("Let me restate it.\n\nProblem: Tom has 3.\n\nThe answer is 18.", "18"),
    ("The answer is 18.\nHuman: 5?\nThe answer is 5", "18"), ("The answer is:", None)]
# what a number is
KINDS = [
    ("The answer is 1/2", "0.5"), (r"The answer is \frac{3}{4}", "0.75"), (r"\boxed{\frac12}", "0.5"), ("is 1/3", "1/3"),
    ("2/4", "0.5"), ("The answer is 2 1/2.", "2.5"), ("The answer is 2½ hours", "2.5"), ("2 and 1/2", "2.5"),
    ("The answer is 5 million", "5000000"), ("The answer is $70k.", "70000"), ("5km", "5"), ("$2.5M", "2500000"),
    ("The answer is 1.2 × 10^6", "1200000"), (r"\boxed{1.2 \times 10^{6}}", "1200000"), ("1.5e3", "1500"),
    ("5e-07", "0.0000005"), ("4.5 × 10⁻⁴ m", "0.00045"), (r"\boxed{2^{10}}", "1024"), ("1e9999", None), ("5/0", None),
    ("The answer is 18-20.", None), ("The answer is 18 to 20", None), ("The answer is 3:30 pm", None),
    ("The answer is 3 + 4", None), ("10:30", None), ("18 - 4", None), ("3/4/2020", None), ("555-1234", None),
    ("1,00,000", "100000"), ("10 000", "10000"), ("10\u00a0000", "10000"), ("10~000", "10000"), ("1'000", "1000"),
    ("1.000.000", "1000000"), ("1.250,50 €", "1250.5"), ("3,5", "3.5"), (r"The answer is $1{,}234$.", "1234"),
    (r"\boxed{10\,000}", "10000"), (r"is $\$1,\!250$", "1250"), (r"\boxed{1,000}", "1000"), (r"is -\$5", "-5"),
    ("The answer is minus 5", "-5"), ("negative $5", "-5"), ("-€5", "-5"), ("-₹5", "-5"), ("-$-5", "-5"),
    ("Rs.100", "100"), ("Rs. 100", "100"), ("USD100", "100"), ("100 USD", "100"), ("__18__", "18"), ("**18**", "18"),
    (r"-\frac{1}{2}", "-0.5"), (r"$1.2\times10^{6}$", "1200000"), ("10**3", "1000"), (r"10^{-3}", "0.001"), ("$70K", "70000"),
    ("2.5 Million", "2500000"), ("$19.99", "19.99"), ("33.33%", "33.33"), ("twenty-five", "25"), ("minus twelve", "-12"),
    ("one hundred and forty-four tiles", "144"), ("five million", "5000000"), ("1e" + "9" * 5000, None),
    ("9" * 5000 + " 1/2", None), ("10^" + "9" * 5000, None), ("(3,4)", "4"), ("NT$100", "100"),
    ("_18_", "18"), ("`18`", "18"), ("<b>18</b>", "18"), ("１８", "18"), ("x1 + y2", None), ("答案：-5", "-5")]


@pytest.mark.parametrize("text, expected", PLAIN + PLACE + KINDS)
def test_numbers(text, expected):
    truth = "1" if expected is None else expected
    prediction, correct = grade("number", text, {"groundtruth": truth})
    assert (prediction, correct) == (expected, expected is not None)


@pytest.mark.parametrize("text, truth", [
    ("The answer is 1/2.", "1"), (r"\boxed{\frac{3}{4}}", "3"), ("The answer is 18-20.", "20"), ("5 million", "5"),
    ("The answer is 3:30.", "3"), ("The answer is 3:30.", "30"), ("The answer is 2 1/2", "2"), ("", "18"), ("19", "18")])
def test_numbers_that_are_others(text, truth):
    assert not grade("number", text, {"groundtruth": truth})[1]


def test_every_gold_response_and_gold_answer_of_gsm8k(gsm8k):
    for split in ("train", "validation", "test"):
        for row in data.load_rows("gsm8k", split, gsm8k):
            assert grade("number", row["responses"], row) == (extract_number(row["groundtruth"]), True)
    for split in ("train", "test"):
        raw = [json.loads(line) for line in open(f"{gsm8k}/{split}.jsonl")]
        rows = list(data.gsm8k(split, gsm8k))
        assert len(raw) == len(rows) > 1000
        assert all(grade("number", solution["answer"], row)[1] for solution, row in zip(raw, rows))


# --- options ---------------------------------------------------------------------------------------------------------
WATERS = ["water", "saltwater", "salt water", "wind"]
CHOICES = [
    ("The answer is water.", "water"), ("The answer is saltwater.", "saltwater"), ("the answer is: Wind", "wind"),
    ("The answer is salt water.", "salt water"), ("The answer is (B).", "saltwater"), ("The answer is B", "saltwater"),
    ("The answer is B. saltwater", "saltwater"), ("The answer is D) wind", "wind"), ("The answer is ['wind'].", "wind"),
    ("The answer is 'wind'.", "wind"), ("The answer is water or wind.", None), ("The answer is neither.", None),
    ("The answer is the wind, of course.", "wind"), ("The answer is E.", None), ("I think\nwind", "wind"), ("", None),
    ("The answer is **(A) water**.", "water"), ("The answer is a gust of wind.", "wind"), ("Answer: B", "saltwater"),
    ("The answer is 2.", "saltwater"), ("The answer is option C.", "salt water"), ("The answer is windy.", None),
    ("The answer is (wind)", "wind"), (r"The final answer is: $\boxed{B}$.", "saltwater"), ("choice B", "saltwater"),
    ("**Answer:** (B)", "saltwater"), ("So I take choice B", "saltwater"), ("option B is correct", "saltwater"),
    ("The answer is the salt water here.", "salt water"), ("Therefore, (B) is the correct answer.", "saltwater"),
    ("The answer is C because water alone does not conduct.", "salt water"), (r"\boxed{B}", "saltwater"),
    ("The answer is C, because water alone does not conduct.", "salt water"), (r"\textbf{(B)}", "saltwater"),
    ("The answer is C since only the wind moves.", "salt water"), ("<b>B</b>", "saltwater"), ("答案是B。", "saltwater"),
    ("答案是 B", "saltwater"), ("The correct option is B.", "saltwater"), ("B\n\nWater alone is no wind.", "saltwater"),
    ("Option A is wrong, so I'd go with D!", "wind"), ("A is incorrect. That leaves only D.", "wind"),
    (r"The answer is $\text{(B)}$.", "saltwater"), ('{"answer": "B", "sure": true}', "saltwater"),
    ("The correct answer is not A.", None), ("The answer is A good wind", "wind")]
BALLS, GENES, SIGNS, SIGNED = ["-2", "+2", "2", "1"], ["R", "rr", "Rr", "RR"], ["$5", "5%", "5", "50"], ["-1", "+1", "-2", "+2"]
FORCES, COUNTS, GASES = ["2.5 N", "1.5 N", "3.5 N", "+"], ["5", "10", "15", "1"], ["C", "CO", "CO2", "O2"]
MORE_CHOICES = [
    (FORCES, "The answer is 2.5 N to the left.", "2.5 N"), (FORCES, "The answer is 1.5 N, east", "1.5 N"),
    (FORCES, "", None), (FORCES, "The answer is.", None), (FORCES, "The answer is 1.", "2.5 N"),
    (COUNTS, "The answer is 1, because", "1"), (COUNTS, "The answer is 5, since", "5"),
    (COUNTS, "The answer is 2.", "10"), (["rain", "train"], "It is rain, not a train", "rain"),
    *[(GENES, f"The answer is {gene}.", gene) for gene in GENES], (GENES, "The answer is rR.", None),
    *[(SIGNED, f"The answer is {sign}, because", sign) for sign in SIGNED],
    *[(SIGNS, f"The answer is {sign}.", sign) for sign in SIGNS], (SIGNED, "The answer is −2.", "-2"),
    *[(GASES, f"The answer is {gas}.", gas) for gas in GASES], (["It does.", "It does not."], "It does.", "It does."),
    (["sedimentary rock", "magma"], "Sedimentary", "sedimentary rock"), (["-5°C", "5°C"], "It was −5 °C.", "-5°C"),
    (["10°C", "5°C", "15°C", "2°C"], "The answer is 2°C because it is cold", "2°C"), (GASES, "C because of carbon", "C"),
    (["2", "3", "4", "1"], "The answer is 2.5", None), (WATERS, "The answer is A and B.", None), (WATERS, "It must be B.", "saltwater"),
    (SIGNS, "The answer is $5 because it is", "$5"), (["x", "water", "x"], "The answer is x.", "x"), (["C#", "C"], "It is **C#**", "C#"),
    (["salt water", "water"], "The answer is B because salt water is more.", "water")]


@pytest.mark.parametrize("options, text, expected", [(WATERS, *row) for row in CHOICES] + MORE_CHOICES)
def test_options(options, text, expected):
    assert extract_option(text, options) == expected
    row = {"groundtruth": expected or options[0], "options": options}
    assert grade("option", text, row) == (expected, expected is not None)


# --- texts, JSON, mathematics ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("grader, text, truth, correct", [
    ("text", "Thus the answer is Paris.", "paris", True), ("text", "Paris", "Paris", True),
    ("text", "It is\nLondon", "Paris", False), ("text", "...", "?", False), ("text", "?", "?", True),
    ("text", "The answer is C.", "C++", False), ("text", "The answer is **C++**.", "C++", True),
    ("text", "A", "A-", False), ("text", "Paris. I hope this helps!", "Paris", True), ("text", r"\boxed{Paris}", "Paris", True),
    ("text", "The answer is Paris. It lies on the Seine.", "Paris", True), ("text", "Paris, of course", "Paris", True),
    ("text", "The capital of France is **Paris**.", "Paris", True), ("text", "Yes, both were.", "yes", True),
    ("text", "cafe\u0301", "caf\u00e9", True), ("text", "Don\u2019t", "Don't", True), ("text", "The Beatles", "Beatles", True),
    ("text", "Not Paris but London", "Paris", False), ("text", "New York", '["NYC", "New York"]', True),
    ("text", "Boston", '["NYC", "New York"]', False), ("text", "One. Two.\nThree.", "One. Two.\nThree.", True),
    ("text", "```\npositive\n```", "positive", True), ("text", "答案是：北京。", "北京", True),
    ("json", 'The answer is {"b": 1, "a": [2]}', '{"a": [2], "b": 1}', True), ("json", "{broken", '{"a": 1}', False),
    ("json", 'call: {"a": 2}', '{"a": 1}', False), ("json", "[" * 5000, '{"a": 1}', False),
    ("json", '{"say": "the answer is 5"}', '{"say": "the answer is 5"}', True), ("json", '{"a": 1.0}', '{"a": 1}', True),
    ("json", '{"a": 1.5}', '{"a": 1}', False), ("json", '{"a": 2} no: {"a": 1}', '{"a": 1}', True),
    ("json", '{"a": 1} or rather {"a": 2}', '{"a": 1}', False), ("json", '{"b": [1, 2], "c": ', "[1, 2]", False),
    ("json", '{"b": [1, 2], "c": "x', "[1, 2]", False), ("json", '```json\n{"a": 1}\n```', '{"a": 1}', True),
    ("json", '{"x": 1} and {"a": 1, "b": tru', '{"x": 1}', False), ("json", "[" + "9" * 5000 + "]", "[1]", False),
    ("json", '{"a": "one\ntwo"}', '{"a": "one\\ntwo"}', True), ("text", "The answer is Paris because it is.", "Paris", True),
    ("text", "New‑York", "New-York", True), ("math", r"\boxed{1,2}", "1.2", False), ("math", r"\boxed{2,1}", "1,2", True),
    ("math", "The answer is 18 dollars.", "18", True), ("math", r"\boxed{30^\circ}", "30", True),
    ("json", 'in {x: 1} it is {"a": 1}', '{"a": 1}', True), ("json", '{"a": "1"}', '{"a": 1}', False),
    ("math", r"so \boxed{\frac{1}{2}}", r"\frac12", True), ("math", "The answer is $0.5$.", r"\frac{1}{2}", True),
    ("math", r"\boxed{3}", "4", False), ("math", "", "4", False), ("math", r"\boxed{.5}", "0.5", True),
    ("math", r"The answer is \(x+1\), at last", "1+x", True), ("math", "The answer is $(1,2)$.", "1 < x < 2", True),
    ("math", "The answer is:\n\n\\[\n\\frac{1}{2}\n\\]", r"\frac{1}{2}", True), ("math", r"\boxed{x = 5}", "5", True),
    ("math", "The answer is:\n$$\n\\frac{1}{2}\n$$", r"\frac{1}{2}", True), ("math", r"\boxed{5! = 120}", "120", True),
    ("math", r"\boxed{2x+y=6}", "6", False), ("math", r"\boxed{[0,1]}", "(0,1)", False),
    ("math", r"\boxed{204_6}", "204_5", False), ("math", r"\boxed{(2,1)}", "(1,2)", False),
    ("math", "The function is even.", r"\text{even}", True), ("math", r"\boxed{\lbrace 3,1 \rbrace}", r"\{1,3\}", True),
    *[("math", form.format(truth), truth, True) for form in (
        "The answer is ${}$.", "The answer is ${}$. I hope it is correct.", "The answer is:\n\n\\[\n{}\n\\]", "\\boxed{{{}}}")
      for truth in (r"\frac{1}{2}", r"2\sqrt{3}", r"(-\infty,3]", r"\{1,2\}", r"x^{2}+1", r"\text{east}", "5!", r"\$3.50",
                    "|x|", ".5", "-3", r"\pi r", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "10,000", r"y = 2x + 3")]])
def test_graders(grader, text, truth, correct):
    assert grade(grader, text, {"groundtruth": truth})[1] is correct


def test_outputs_that_were_kept_aside():
    """700 outputs, and how a person would judge them; written without a look at the graders. Each judges most as they do."""
    with open(os.path.join(os.path.dirname(__file__), "outputs.jsonl"), encoding="utf-8") as file:
        outputs = [json.loads(line) for line in file]
    of, right = Counter(row["grader"] for row in outputs), Counter()
    for row in outputs:
        right[row["grader"]] += grade(row["grader"], row["text"], row)[1] == row["correct"]
    assert sum(of.values()) == 700 and min(right[grader] / of[grader] for grader in of) >= 0.85, right


@pytest.mark.parametrize("grader", data.GRADERS)
@pytest.mark.parametrize("text", [
    "The answer is 5." + "\n" * 9000 + "!x", " \n" * 9000 + "x", "1 1/2-" * 3000 + "x", "1/" * 9000 + "x", "10^5*" * 4000 + "x",
    "1×10^" * 4000 + "x", "answer is " * 2000 + "!x", "#" * 20000 + "!x", "The answer is 5. " + "," * 20000 + "\nx",
    "The answer is 5. " + '"' * 20000 + "\nx", "\\boxed{" * 3000, "{" * 20000, "**a" * 7000, "\\frac{" * 3000, "9" * 20000,
    "1," * 10000, "1 " * 10000, "(" * 20000, "a b " * 5000, "\\text{" * 3000], ids=lambda text: repr(text[-9:]))
def test_outputs_that_never_end_are_graded_all_the_same(grader, text):
    """No pattern takes a text apart in ever more ways: 20,000 characters are done long before a minute of the CPU's."""
    handler = signal.signal(signal.SIGVTALRM, lambda *unused: pytest.fail("still grading"))
    signal.setitimer(signal.ITIMER_VIRTUAL, 60)
    try:
        _, correct = grade(grader, text, {"groundtruth": "5", "options": ["5", "6"]})
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
    assert correct in (True, False)


def test_equal_answers_vote_together():
    for grader, texts in (("math", [r"\boxed{\frac{1}{2}}", r"\boxed{\dfrac{1}{2}}", "The answer is $0.5$.", r"\boxed{x=\frac12}"]),
                          ("math", [r"\boxed{2\sqrt 3}", r"\boxed{2 \sqrt 3}", r"The answer is $2\sqrt 3$."]),
                          ("math", [r"\boxed{-\frac{1}{2}}", r"\boxed{-0.5}", r"\boxed{-\frac12}"]),
                          ("math", [r"\boxed{30^\circ}", r"\boxed{30°}", r"\boxed{30}", r"\boxed{30^{\circ}}"]),
                          ("math", [r"\boxed{x^2}", r"\boxed{x^{2}}"]), ("math", [r"\boxed{\text{odd}}", r"\boxed{odd}"]),
                          ("number", ["#### 0.5", "1/2", r"\boxed{.50}"]), ("text", ["Paris.", "**Paris**", "paris"])):
        assert len({grade(grader, text, {"groundtruth": "7"})[0] for text in texts}) == 1


@pytest.mark.parametrize("truths, grader, why", [
    (["18", "-3.5", "1,000"], "number", "every groundtruth is a number"), (["18", "Paris"], "text", "groundtruth 'Paris' is no number"),
    (['{"name": "f"}', "[1]"], "json", "every groundtruth is JSON"), (["$5", "-2", "5%"], "number", "number"),
    (["3/4", "5e-07", "18"], "number", "number"), (['["NYC", "New York"]', "Paris"], "text", "no number"),
    (['["NYC"]', '["LA"]'], "text", "no number"), (["18", "3 apples"], "text", "'3 apples'")])
def test_default_grader_of_a_jsonl(truths, grader, why):
    chosen, reason = data.choose_grader("auto", "jsonl", [{"groundtruth": t} for t in truths])
    assert chosen == grader and why in reason
