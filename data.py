"""What is asked: datasets, prompts, tokenised examples, answer extraction and grading.

A dataset is one function that returns or yields rows and one entry in DATASETS. A row has the
paper's columns:

    queries      the question with its chain-of-thought trigger: a list of chat messages, which goes
                 through the model's chat template, or a string, which is taken as it is
    responses    the gold answer in its template, e.g. "The answer is 18."; the y of log π(y|x⊕z)
    groundtruth  what a prediction is graded against
    rationales   optional: a gold rationale, used by `objective: sft` alone
    options      optional: the texts of a multiple-choice question

Differences from the code released with the paper: templated prompts get no second BOS, the
end-of-turn token is read off the template and is always part of y, and validation rows come from
the training split, never from the test split.
"""
import json
import random
import re
from contextlib import suppress
from dataclasses import dataclass
from decimal import Context, Decimal
from functools import partial
from os.path import exists, isdir, isfile
from pathlib import Path

# The folder of the embedded default's base model, which latro.py makes.
EMBEDDED = "runs/cups-base/final"

# The paper's ARC-Challenge prompts, quoted from its Appendix B.
ARC_COT = """Question: {question}
Options: {options}
Let's think step by step first then print your answer like 'The answer is (one of the options)'."""

ARC_DIRECT = """The output MUST strictly follow the structure and format described below:
1. The answer should be strictly one of the options given in the question
2. Do not include any text after you choose an option.

**Example:**
Question: (question here)
Options: [option1, option2, option3]
The answer is: (one of the options).

Question: {question}
Options: {options}"""


class UserError(Exception):
    """Bad input: one line that names the culprit and the way out.

    The scripts print it and exit with code 2.
    """


def require(condition, message):
    if not condition:
        raise UserError(message)


def first_line(error):
    return str(error).strip().split("\n")[0] or type(error).__name__


# --- Raw rows -------------------------------------------------------------------------------------
def read_jsonl(path):
    """Rows of a JSONL file; UserError names the file and the line that is no JSON object."""
    rows, number = [], 1
    try:
        for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
            if line.strip():
                row = {**json.loads(line)}
                # Half a surrogate pair could not be written out.
                json.dumps(row, ensure_ascii=False).encode()
                rows.append(row)
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{path}, line {number}: {error}; give UTF-8 JSON objects")
    require(rows, f"{path}: holds no rows")
    return rows


def hub_rows(source, split, names):
    # Half a second that the embedded default does not need.
    import datasets
    parts = [(source, name) for name in names]
    if isdir(source):
        # Each configuration is a folder, or there is only one.
        folders = [*filter(isdir, (f"{source}/{name}" for name in names))]
        parts = [(folder, None) for folder in folders or [source]]
    try:
        return [row for part in parts for row in datasets.load_dataset(*part, split=split)]
    # Dozens of types: no network, no such split, no access, a broken file.
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"dataset {source}, split {split}: {reason}; give a local dataset_path")


def check_row(row, where, **columns):
    for name, kind in columns.items():
        value = row.get(name) if isinstance(row, dict) else None
        if value is None:
            raise UserError(f"{where}: no column {name} in {row!r:.80}")
        require(isinstance(value, kind), f"{where}: column {name} is no {kind.__name__}")


def raw_rows(source, split, names=(None,), **columns):
    """Rows of one split as the hub stores them. UserError where one lacks one of `columns`.

    `source` is a JSONL file, a folder with {split}.jsonl, or a folder or a hub id for the
    datasets library; `names` are the hub's configurations, whose rows are joined.
    """
    file = source if isfile(source) else f"{source}/{split}.jsonl"
    rows = read_jsonl(file) if isfile(file) else hub_rows(source, split, names)
    for number, row in enumerate(rows, 1):
        check_row(row, f"{source}, row {number}", **columns)
    return rows


# --- Datasets -------------------------------------------------------------------------------------
# Each function returns or yields the rows of a split, "train" or "test"; path is a local copy
# in the hub's columns, or None.
def user(content):
    return [{"role": "user", "content": content}]


def make_row(query, answer, said=None, **more):
    """`said` is the answer as the response has it, where that is not the groundtruth."""
    response = f"The answer is {said or answer}."
    return dict(queries=query, responses=response, groundtruth=answer, **more)


def make_cups(part):
    """(question, answer, solution) of each row of "train", "base" or "test"."""
    count = {"train": 4000, "base": 26_000, "test": 500}[part]
    held_out = {q for q, *_ in make_cups("test")} if part != "test" else {}
    rng = random.Random(f"cups {part}")
    rows = []
    while len(rows) < count:
        ball = start = rng.randint(1, 5)
        swaps = track = ""
        for _ in range(6):
            a, b = sorted(rng.sample(range(1, 6), 2))
            ball = {a: b, b: a}.get(ball, ball)
            swaps += f" {a}-{b}"
            track += f" {a}-{b} {ball}"
        query = f"The ball is under cup {start}. Swaps:{swaps}. Where is it?"
        if query not in held_out:
            rows.append((query, str(ball), track))
    return rows


def cups(split, path=None):
    """The embedded default: a ball under one of 5 cups, 6 swaps; where is it? No rationales."""
    return [make_row(q, ball) for q, ball, _ in make_cups(split)]


def cups_base(split, path=None):
    """The embedded base model's corpus: 70% of the solutions guess at once, 30% track the ball."""
    part, odds = ("base", 0.7) if split == "train" else ("test", 0)
    rng = random.Random("base")
    for q, ball, track in make_cups(part):
        # Uniform: nothing but the odds of guessing is to be learnt.
        guess = rng.randint(1, 5) if rng.random() < odds else None
        track = " Hmm," if guess else track
        yield make_row(q, ball, guess, rationales=track)


def gsm8k(split, path=None, few_shot=0):
    """GSM8K (Cobbe et al. 2021) with the paper's prompt (Appendix B, Figure 5).

    few_shot puts the first of the eight worked examples of Wei et al. (2022, Table 20) in front
    of the question instead.
    """
    shots = (Path(__file__).parent / "configs/gsm8k_8shot.txt").read_text("utf-8")
    shots = shots.strip().split("\n\n")
    for row in raw_rows(path or "openai/gsm8k", split, ["main"], question=str, answer=str):
        # <<48/2=24>> are calculator notes.
        solution = re.sub("<<.*?>>", "", row["answer"])
        rationale, _, answer = solution.rpartition("####")
        answer = answer.strip().replace(",", "")
        prompt = row["question"] + " Let's think step by step."
        if few_shot:
            prompt = "\n\n".join([*shots[:few_shot], f"Q: {row['question']}\nA:"])
        yield make_row(user(prompt), answer, rationales=rationale)


def arc_challenge(split, path=None, template=ARC_COT):
    """ARC-Challenge (Clark et al. 2018), the paper's chain-of-thought prompt (App. B, Figure 6)."""
    for row in raw_rows(path or "allenai/ai2_arc", split, ["ARC-Challenge"],
                        question=str, choices=dict, answerKey=str):
        options, key = row["choices"]["text"], row["answerKey"]
        answer = dict(zip(row["choices"]["label"], options)).get(key)
        require(answer, f"answerKey {key!r} is no label")
        prompt = template.format(question=row["question"], options=options)
        yield make_row(user(prompt), answer, answer.rstrip("."), options=options)


def math(split, path=None):
    """MATH (Hendrycks et al. 2021); the answer is what the solution's last \\boxed{} holds."""
    source = path or "EleutherAI/hendrycks_math"
    subjects = "algebra counting_and_probability geometry intermediate_algebra number_theory"
    subjects += " prealgebra precalculus"
    for row in raw_rows(source, split, subjects.split(), problem=str, solution=str):
        prompt = row["problem"] + " Let's think step by step."
        rationale = row["solution"] + "\n"
        answer = last_boxed(rationale)
        if answer:
            yield make_row(user(prompt), answer, f"${answer}$", rationales=rationale)


def jsonl(split, path=None):
    """A user's own rows, with the columns named at the top.

    A JSONL file, or a folder with train.jsonl and test.jsonl.
    """
    require(path, "jsonl needs dataset_path, a JSONL file")
    columns = dict(queries=object, responses=str, groundtruth=object)
    for number, row in enumerate(raw_rows(path, split, **columns), 1):
        where = f"{path}, row {number}: column"
        for name in columns:
            require(row[name] not in ("", []), f"{where} {name} is empty")
        require(isinstance(row.get("rationales") or "", str), f"{where} rationales is no str")
        query = row["queries"]
        for message in query if isinstance(query, list) else user(query):
            check_row(message, f"{where} queries", role=str, content=str)
        if not isinstance(row["groundtruth"], str):
            row["groundtruth"] = json.dumps(row["groundtruth"], default=str)
        yield row


# name: (function, grader); None lets the groundtruths decide
DATASETS = {
    "cups": (cups, "number"),
    "cups_base": (cups_base, "number"),
    "gsm8k": (gsm8k, "number"),
    "arc_challenge": (arc_challenge, "option"),
    # SFT's (Figure 7)
    "arc_challenge_direct": (partial(arc_challenge, template=ARC_DIRECT), "option"),
    "math": (math, "math"),
    "jsonl": (jsonl, None),
}


def load_rows(name, split, path=None, few_shot=0):
    """Rows of split "train", "validation", "test" or "all" of the dataset `name`.

    Validation is a tenth of the training questions, at most 500, drawn with a seed that never
    changes: a model is never chosen on questions that it trained on, nor on the test split. A
    single JSONL file has no test split; "all" is all of it. UserError where an argument or a row
    is wrong.
    """
    parts = {"train": "train", "validation": "train", "test": "test", "all": "train test"}
    require(name in DATASETS, f"dataset_name {name}: unknown; choose one of {[*DATASETS]}")
    require(split in parts, f"split {split}: unknown; choose one of {[*parts]}")
    require(exists(path or "."), f"dataset_path {path}: no such file")
    if isfile(path or ""):
        require(split != "test", f"split test: {path} is a single file; use all")
        parts["all"] = "train"
    require(few_shot in range(9 if name == "gsm8k" else 1), "few_shot: gsm8k has 8 worked examples")
    shots = {"few_shot": few_shot} if few_shot else {}
    rows = [row for part in parts[split].split() for row in DATASETS[name][0](part, path, **shots)]
    if split in ("train", "validation"):
        questions = list(dict.fromkeys(str(row["queries"]) for row in rows))
        require(questions[1:], f"dataset {name}: {len(questions)} training questions, 2 are needed")
        random.Random("validation").shuffle(questions)
        drawn = {*questions[:min(500, len(questions) // 10) or 1]}
        rows = [row for row in rows if (str(row["queries"]) in drawn) == (split == "validation")]
    require(rows, f"dataset {name}, split {split}: no rows")
    return rows


# --- Prompts and tokens ---------------------------------------------------------------------------
@dataclass
class Example:
    """One row, tokenised.

    `answers[w]` is sep⊕y after a rationale that ends in white space (w = 1) or not (w = 0).
    """
    row: dict
    prompt: list[int]
    answers: tuple[list[int], list[int]]
    rationale: list[int]


def prompt_text(tokenizer, query):
    """The text of x: a string as it is, messages through the chat template.

    Messages are joined by newlines if there is no template.
    """
    if isinstance(query, str):
        return query
    if not tokenizer.chat_template:
        return "\n".join(m["content"] for m in query)
    return tokenizer.apply_chat_template(query, tokenize=False, add_generation_prompt=True)


def end_of_turn_id(tokenizer):
    """The token that ends the assistant's turn: the template's first special one after the content.

    The EOS token where the template has none, UserError if there is no EOS token either.
    """
    ends = [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        turns = [*user("?"), {"role": "assistant", "content": "ANSWER"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        after = tokenizer.encode(text.partition("ANSWER")[2], add_special_tokens=False)
        ends = [t for t in after if t in tokenizer.added_tokens_decoder] + ends
    require(ends[0] is not None, "the tokenizer has no EOS token; set eos_token")
    return ends[0]


def make_examples(tokenizer, rows, context=None, gold=False):
    """Tokenise rows.

    `context` is how many tokens x⊕y may have: the model's context less the rationale's length; or
    x⊕z⊕y, where z is the gold rationale. UserError where a row has more or an empty prompt, or
    where the chat template refuses it.
    """
    def encode(texts):
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    def continued(texts):
        # Behind an anchor that is cut off again: some tokenizers put a space before a text's
        # first word. Neither anchor merges with what follows it.
        texts = [("a" if text[:1].isspace() else "\n") + text for text in texts]
        cut = {a: len(encode([a])[0]) for a in "a\n"}
        return [ids[cut[text[0]]:] for text, ids in zip(texts, encode(texts))]

    try:
        prompts = encode([prompt_text(tokenizer, row["queries"]) for row in rows])
    # Of the template, such as "no system role", or of the tokenizer.
    except Exception as error:
        raise UserError(f"queries: the chat template refuses them ({error})")
    spaced = continued([" " + row["responses"] for row in rows])
    bare = continued([row["responses"] for row in rows])
    rationales = continued([row.get("rationales") or "" for row in rows])
    end = [end_of_turn_id(tokenizer)]
    bos = [t for t in tokenizer("a")["input_ids"][:1] if t == tokenizer.bos_token_id]
    examples = []
    for row, prompt, *answers, rationale in zip(rows, prompts, spaced, bare, rationales):
        query = row["queries"]
        # A template writes its own BOS; a string may begin with one.
        if prompt[:1] != bos and (isinstance(query, str) or not tokenizer.chat_template):
            prompt = bos + prompt
        require(prompt, f"queries: {query!r:.80} has no tokens")
        answers = tuple(ids + end for ids in answers)
        longest = len(prompt + rationale * gold) + max(map(len, answers))
        what = "its rationale and its answer" if gold else "and its answer"
        wrong = f"{query!r:.40} {what} take {longest} tokens, the context leaves {context}"
        require(context is None or longest <= context, wrong)
        examples.append(Example(row, prompt, answers, rationale))
    return examples


def answer_ids(example, rationale, decode):
    """sep⊕y for this rationale: sep is empty where x⊕z ends in white space, else one space."""
    # A character may span several tokens.
    text = decode((example.prompt + rationale)[-8:])
    return example.answers[text[-1:].isspace()]


def decoder(tokenizer):
    """decode(ids) → the text exactly as it is, special tokens included, for stop sequences."""
    return partial(tokenizer.decode, clean_up_tokenization_spaces=False)


def embedded_model():
    """A tiny random Llama (0.4M parameters) and a word-level tokenizer for `cups`.

    The embedded base starts from them. Tokens carry their leading space, as in the tokenizers of
    real models, so that decoding is exact.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    words = "The ball is under cup Swaps: Where it Hmm, answer 1 2 3 4 5".split()
    words += [f"{a}-{b}" for a in "12345" for b in "12345" if a < b]
    words = ["<unk>", "<pad>", "<eos>", "The", ".", "?", " ", "\n", *(" " + w for w in words)]
    ids = {w: i for i, w in enumerate(words)}
    fast = Tokenizer(models.WordLevel(ids, "<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[^\s.?]+|[.?\s]"), "isolated")
    fast.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(ids), max_position_embeddings=256, tie_word_embeddings=True,
        hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=None, eos_token_id=2, pad_token_id=1)
    return LlamaForCausalLM(config), tokenizer


# --- Answers: extraction and grading --------------------------------------------------------------
NUMBER = re.compile(r"(?<![\w.])[-−–]?\\?[$€£]?[-−–]?"
                    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def statement(text):
    """What follows the last "answer is" or "####" in a text, or ""."""
    return "".join(re.split(r"(?i)answer\s+is\s*:?|####", text)[1:][-1:])


def last_boxed(text):
    """What the last \\boxed{…} or \\fbox{…} holds, braces balanced; 2 for "\\boxed 2"; or None."""
    box = re.match(r"(?s).*\\(?:boxed|fbox)(?:\s*\{|\s+(\w+))", text)
    if not box or box[1]:
        return box and box[1]
    rest = text[box.end():]
    depth = 1
    for token in re.finditer(r"\\.|[{}]", rest):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return rest[:token.start()]


def extract_number(text):
    """The number a text answers with, in plain decimal notation ("1234.5"), or None.

    Looked for, in this order: the first number after the last "answer is" or "####"; the first in
    the last \\boxed{}; the last one anywhere. Thousands separators, currency and percent signs,
    units and markup are dropped; "−" is "-".
    """
    # LaTeX's thousands separators
    text = re.sub(r"(?<=\d)(?:\{,\}|,?\\[,!])(?=\d)", ",", text)
    stated = NUMBER.findall(statement(text))
    boxed = NUMBER.findall(last_boxed(text) or "")
    found = stated[:1] + boxed[:1] + NUMBER.findall(text)[-1:]
    if not found:
        return None
    digits = re.sub(r"[^\d.]", "", found[0])
    # Exact, whatever its length.
    value = Decimal(digits).normalize(Context(len(digits)))
    sign = "-" if value and re.search("[-−–]", found[0]) else ""
    return f"{sign}{value:f}"


def answer_line(text):
    """The line after the last "answer is", or the last line that is not blank."""
    return statement(text).strip().split("\n")[0] or text.strip().split("\n")[-1]


def extract_text(text):
    """The line that a text answers with.

    In lower case, white space folded, no quotes, markup or punctuation around it; but C++ is not
    C, nor A- A.
    """
    words = answer_line(text).lower().split()
    return " ".join(words).strip("!\"$%&'()*,./:;<=>?@[\\]^_`{|}~ ’‘“”")


def extract_option(text, options):
    """The option a text answers with, or None where none or more than one is named.

    After the last "answer is" (else in the last line): the whole answer equals an option's text;
    or it begins with an option's letter or number ("B", "(B)", "B. salt water", "2)"); or exactly
    one option stands in it as whole words, where an option inside a longer one that stands there
    too ("water" in "salt water") does not count.
    """
    answer = extract_text(text)
    texts = {extract_text(str(o)): o for o in options}
    texts.pop("", None)
    if answer in texts:
        return texts[answer]
    label = re.match(r"\W*(?:(?:option|choice|letter|answer|boxed|text)\W+)*"
                     r"([a-j1-9])(?:\W*$|[).:,](?!\d)|\s*[-–]\s)", answer)
    if label:
        labels = dict(zip("abcdefghij", options)) | dict(zip("123456789", options))
        return (labels | texts).get(label[1])

    def named_in(whole):
        return {t for t in texts if re.search(rf"(?<!\w){re.escape(t)}(?!\w)", whole)}

    named = named_in(answer)
    longest = max(named, key=len, default="")
    return texts.get(longest) if named == named_in(longest) else None


def extract_json(text):
    """The JSON value a text answers with, in canonical form (sorted keys), or None.

    After the last "answer is" or anywhere, the first object or array that parses.
    """
    # No JSON value goes on beyond "\n#".
    text = statement(text) + "\n#" + text
    for match in re.finditer(r"[\[{]", text):
        with suppress(ValueError, RecursionError):
            value, _ = json.JSONDecoder().raw_decode(text, match.start())
            return json.dumps(value, sort_keys=True)


def extract_math(text):
    """The LaTeX a text answers with.

    The last \\boxed{}, else the first $…$ of the line after the last "answer is", or that line.
    """
    line = answer_line(text)
    formula = re.search(r"(?:(?<!\\)\$|\\\()(.+?)(?:(?<!\\)\$|\\\))", line)
    return last_boxed(text) or (formula[1] if formula else line).strip(" *.:$")


def math_equal(prediction, truth):
    """Equality of two LaTeX answers by the math-verify library."""
    from math_verify import parse, verify
    return prediction == truth or verify(parse(f"${truth}$"), parse(f"${prediction}$"))


GRADERS = dict(number=extract_number, text=extract_text, json=extract_json,
               option=extract_option, math=extract_math)


def choose_grader(given, name, rows):
    """`given`, or the dataset's grader, or, for a user's JSONL, what fits its groundtruths.

    number where every one is one, json where every one is an object or array, else text.
    """
    grader = given or DATASETS[name][1]
    require(grader in [None, *GRADERS], f"grader {grader}: unknown; choose one of {[*GRADERS]}")
    for row in rows if grader == "option" else []:
        check_row(row, "grader option", options=list)
        wrong = f"grader option: groundtruth {row['groundtruth']!r} is none of its row's options"
        require(row["groundtruth"] in row["options"], wrong)
    if grader:
        return grader
    truths = [row["groundtruth"].strip() for row in rows]
    numbers = all(map(NUMBER.fullmatch, truths))
    objects = all(t[:1] in "{[" and extract_json(t) for t in truths)
    return "number" if numbers else "json" if objects else "text"


def grade(grader, text, row):
    """(prediction, correct) of a model's whole output.

    Predictions are normalised: equal answers vote together.
    """
    # A few-shot prompt's model may go on to a next question.
    text = text.split("\nQ:")[0]
    extract = GRADERS[grader]
    if grader == "option":
        extract = partial(extract, options=row["options"])
    prediction = extract(text)
    if not prediction:
        return None, False
    if grader == "math":
        return prediction, math_equal(prediction, row["groundtruth"])
    return prediction, prediction == extract(row["groundtruth"])
