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
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from itertools import combinations
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


# --- Raw rows -------------------------------------------------------------------------------------
def read_jsonl(path: str) -> list[dict]:
    """Rows of a JSONL file; UserError names the file and the line that is no JSON object."""
    rows = []
    try:
        lines = Path(path).read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            if line.strip():
                row = json.loads(line)
                # Half a surrogate pair could not be written out.
                json.dumps(row, ensure_ascii=False).encode()
                if not isinstance(row, dict):
                    raise ValueError("not a JSON object")
                rows.append(row)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}")
    except ValueError as error:
        raise UserError(f"{path}, line {number}: {error}; JSON objects in UTF-8 are read")
    require(rows, f"{path}: holds no rows")
    return rows


def load_dataset(source, split, names):
    import datasets  # half a second that the embedded default does not need
    parts = [(source, name) for name in names]
    if isdir(source):  # each configuration is a folder, or there is only one
        folders = [*filter(isdir, (f"{source}/{name}" for name in names))]
        parts = [(folder, None) for folder in folders or [source]]
    rows = []
    try:
        for path, name in parts:
            rows += datasets.load_dataset(path, name, split=split)
    except Exception as error:  # dozens of types: no network, no such split, a broken file
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"dataset {source}, split {split}: cannot be loaded ({reason}); "
                        "check name and network, or give a local dataset_path")
    return rows


def check_columns(row, where, **columns):
    require(isinstance(row, dict), f"{where}: {row!r:.40} is no object")
    for name, kind in columns.items():
        value = row.get(name)
        require(value is not None, f"{where}: no column {name}, but {', '.join(row)}")
        wrong = f"{where}: column {name} holds {value!r:.40}, no {kind.__name__}"
        require(isinstance(value, kind), wrong)


def raw_rows(source, split, names=(None,), **columns):
    """Rows of one split as the hub stores them. UserError where one lacks one of `columns`.

    `source` is a JSONL file, a folder with {split}.jsonl, or a folder or a hub id for the
    datasets library; `names` are the hub's configurations, whose rows are joined.
    """
    files = filter(isfile, [source, f"{source}/{split}.jsonl"])
    file = next(files, None)
    rows = read_jsonl(file) if file else load_dataset(source, split, names)
    for number, row in enumerate(rows, 1):
        check_columns(row, f"{source}, row {number}", **columns)
    return rows


# --- Datasets: each function returns or yields the rows of a split, "train" or "test" ---------------
# path is a local copy in the hub's columns, or None.
def user(content: str) -> list[dict]:
    return [{"role": "user", "content": content}]


def make_row(query, answer, said=None, **more):
    """`said` is the answer as the response has it, where that is not the groundtruth."""
    response = f"The answer is {said or answer}."
    return {"queries": query, "responses": response, "groundtruth": answer, **more}


def make_cups(part):
    rng = random.Random(f"cups {part}")
    count = {"train": 4000, "base": 26_000, "test": 500}[part]
    tests = [] if part == "test" else make_cups("test")
    held_out = {row["queries"] for row in tests}
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
            rows.append(make_row(query, str(ball), rationales=track))
    return rows


def cups(split, path=None):
    """The embedded default: a ball under one of 5 cups, 6 swaps; where is it? No rationales."""
    rows = make_cups(split)
    for row in rows:
        del row["rationales"]
    return rows


def cups_base(split, path=None):
    """The embedded base model's corpus: 70% of the solutions guess at once, 30% track the ball."""
    if split == "test":
        return make_cups("test")
    rows = make_cups("base")
    rng = random.Random("base")
    for row in rows:
        if rng.random() < 0.7:  # guesses are uniform: nothing but their odds is to be learnt
            row["rationales"] = " Hmm,"
            row["responses"] = f"The answer is {rng.randint(1, 5)}."
    return rows


def gsm8k(split, path=None, few_shot=0):
    """GSM8K (Cobbe et al. 2021) with the paper's prompt (Appendix B, Figure 5).

    few_shot puts the first of the eight worked examples of Wei et al. (2022, Table 20) in front
    of the question instead.
    """
    shots = Path(__file__).parent / "configs/gsm8k_8shot.txt"
    shots = shots.read_text("utf-8").strip().split("\n\n")[:few_shot]
    source = path or "openai/gsm8k"
    for row in raw_rows(source, split, ["main"], question=str, answer=str):
        rationale, _, answer = row["answer"].rpartition("####")
        rationale = re.sub("<<.*?>>", "", rationale)  # calculator notes: <<48/2=24>>
        answer = answer.strip().replace(",", "")
        prompt = row["question"] + " Let's think step by step."
        if few_shot:
            prompt = "\n\n".join([*shots, f"Q: {row['question']}\nA:"])
        yield make_row(user(prompt), answer, rationales=rationale)


def arc_challenge(split, path=None, template=ARC_COT):
    """ARC-Challenge (Clark et al. 2018), the paper's chain-of-thought prompt (App. B, Figure 6)."""
    source = path or "allenai/ai2_arc"
    columns = {"question": str, "choices": dict, "answerKey": str}
    for row in raw_rows(source, split, ["ARC-Challenge"], **columns):
        choices, key = row["choices"], row["answerKey"]
        check_columns(choices, f"{source}: choices", label=list, text=list)
        labels, options = choices["label"], choices["text"]
        require(key in labels, f"{source}: answerKey {key!r} is none of {labels}")
        answer = options[labels.index(key)]
        prompt = template.format(question=row["question"], options=options)
        yield make_row(user(prompt), answer, answer.rstrip("."), options=options)


def math(split, path=None):
    """MATH (Hendrycks et al. 2021); the answer is what the solution's last \\boxed{} holds."""
    source = path or "EleutherAI/hendrycks_math"
    subjects = """algebra counting_and_probability geometry intermediate_algebra
                  number_theory prealgebra precalculus""".split()
    for row in raw_rows(source, split, subjects, problem=str, solution=str):
        prompt = row["problem"] + " Let's think step by step."
        rationale = row["solution"] + "\n"
        answer = last_boxed(rationale)
        if answer is not None:
            yield make_row(user(prompt), answer, f"${answer}$", rationales=rationale)


def jsonl(split, path=None):
    """A user's own rows, with the columns named at the top.

    A JSONL file, or a folder with train.jsonl and test.jsonl.
    """
    require(path, "dataset_name jsonl needs dataset_path, a JSONL file")
    columns = {"queries": object, "responses": str, "groundtruth": object}
    rows = raw_rows(path, split, **columns)
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}: column"
        for name in columns:
            require(row[name] not in ("", []), f"{where} {name} is empty")
        rationale = row.get("rationales") or ""
        require(isinstance(rationale, str), f"{where} rationales is no string")
        query, truth = row["queries"], row["groundtruth"]
        for message in query if isinstance(query, list) else user(query):
            check_columns(message, f"{where} queries", role=str, content=str)
        if not isinstance(truth, str):
            row["groundtruth"] = json.dumps(truth, default=str)
    return rows


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
# split: what it is made of
SPLITS = {
    "train": ["train"],
    "validation": ["train"],
    "test": ["test"],
    "all": ["train", "test"],
}


def load_rows(name: str, split: str, path: str | None = None, few_shot: int = 0) -> list[dict]:
    """Rows of split "train", "validation", "test" or "all" of the dataset `name`.

    Validation is a tenth of the training questions, at most 500, drawn with a seed that never
    changes: a model is never chosen on questions that it trained on, nor on the test split. A
    single JSONL file has no test split; "all" is all of it. UserError where an argument or a row
    is wrong.
    """
    known = ", ".join(DATASETS)
    require(name in DATASETS, f"dataset_name {name}: unknown; choose one of {known}")
    require(split in SPLITS, f"split {split}: unknown; choose one of {', '.join(SPLITS)}")
    require(exists(path or "."), f"dataset_path {path}: no such file or folder")
    single = isfile(path or "")
    if single and split == "test":
        raise UserError(f"split test: {path} is a single file; use validation or all")
    if few_shot not in range(9 if name == "gsm8k" else 1):
        raise UserError(f"few_shot {few_shot}: gsm8k has 8 worked examples, others none")
    options = {"few_shot": few_shot} if few_shot else {}
    rows = []
    for part in ["train"] if single else SPLITS[split]:
        rows += DATASETS[name][0](part, path, **options)
    if SPLITS[split] == ["train"]:
        questions = list(dict.fromkeys(str(row["queries"]) for row in rows))
        count = len(questions)
        require(count > 1, f"dataset {name}: {count} training questions, 2 are needed")
        random.Random("validation").shuffle(questions)
        held_out = set(questions[:min(500, count // 10) or 1])
        validates = split == "validation"
        rows = [row for row in rows if (str(row["queries"]) in held_out) == validates]
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


def prompt_text(tokenizer, query: str | list[dict]) -> str:
    """The text of x: a string as it is, messages through the chat template.

    Messages are joined by newlines if there is no template.
    """
    if isinstance(query, str):
        return query
    template = tokenizer.apply_chat_template
    if tokenizer.chat_template:
        return template(query, tokenize=False, add_generation_prompt=True)
    return "\n".join(message["content"] for message in query)


def end_of_turn_id(tokenizer) -> int:
    """The token that ends the assistant's turn: the template's first special one after the content.

    The EOS token where the template has none, UserError if there is no EOS token either.
    """
    if tokenizer.chat_template:
        turns = user("question") + [{"role": "assistant", "content": "ANSWER"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        _, _, after = text.partition("ANSWER")
        special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
        for token in tokenizer.encode(after, add_special_tokens=False):
            if token in special:
                return token
    end = tokenizer.eos_token_id
    require(end is not None, "the tokenizer has no EOS token: set eos_token in its config")
    return end


def make_examples(tokenizer, rows: list[dict], context: int | None = None) -> list[Example]:
    """Tokenise rows.

    `context` is how many tokens x⊕y may have: the model's context less the rationale's length.
    UserError where a prompt has more or none, or where the chat template refuses it.
    """
    def encode(texts):
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    def encode_continuations(texts):
        # Behind an anchor that is cut off again: some tokenizers put a space before a text's
        # first word. Neither anchor merges with what follows it.
        anchors = ["a" if text[:1].isspace() else "\n" for text in texts]
        joined = encode([anchor + text for anchor, text in zip(anchors, texts)])
        length = {anchor: len(encode([anchor])[0]) for anchor in "a\n"}
        return [ids[length[anchor]:] for anchor, ids in zip(anchors, joined)]

    try:
        prompts = encode([prompt_text(tokenizer, row["queries"]) for row in rows])
    except Exception as error:  # of the template ("no system role") or of the tokenizer
        raise UserError(f"queries: tokenizer or chat template refuses them ({error})")
    end = [end_of_turn_id(tokenizer)]
    bos = [tokenizer.bos_token_id]
    adds_bos = tokenizer("a")["input_ids"][:1] == bos
    responses = [row["responses"] for row in rows]
    spaced = encode_continuations([f" {response}" for response in responses])
    bare = encode_continuations(responses)
    rationales = encode_continuations([row.get("rationales") or "" for row in rows])
    examples = []
    for row, prompt, *answers, rationale in zip(rows, prompts, spaced, bare, rationales):
        query = row["queries"]
        templated = tokenizer.chat_template and not isinstance(query, str)
        # A template writes its own BOS; a string may begin with one.
        if adds_bos and not templated and prompt[:1] != bos:
            prompt = bos + prompt
        require(prompt, f"queries: {query!r:.80} has no tokens")
        answers = tuple(answer + end for answer in answers)
        longest = len(prompt) + max(map(len, answers))
        if context is not None and longest > context:
            raise UserError(
                f"a prompt and its answer take {longest} tokens; the context less "
                f"response_length has {context}: lower it, or shorten {query!r:.80}")
        examples.append(Example(row, prompt, answers, rationale))
    return examples


def answer_ids(example: Example, rationale: list[int], decode: Callable) -> list[int]:
    """sep⊕y for this rationale: sep is empty where x⊕z ends in white space, else one space."""
    text = decode((example.prompt + rationale)[-8:])  # a character may span several tokens
    return example.answers[text[-1:].isspace()]


def decoder(tokenizer) -> Callable[[list[int]], str]:
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
    words += map("-".join, combinations("12345", 2))
    vocabulary = ["<unk>", "<pad>", "<eos>", "The", ".", "?", " ", "\n"]
    vocabulary += [f" {word}" for word in words]
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, "<unk>"))
    pieces = Regex(r" ?[^\s.?]+|[.?\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    config = LlamaConfig(
        vocab_size=len(vocabulary), max_position_embeddings=256,
        hidden_size=128, intermediate_size=384, tie_word_embeddings=True,
        num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=None, eos_token_id=2, pad_token_id=1)
    return LlamaForCausalLM(config), tokenizer


# --- Answers: extraction and grading --------------------------------------------------------------
NUMBER = re.compile(
    r"(?<![\w.])[-−–]?\\?[$€£]?[-−–]?"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def statement(text):
    """What follows the last "answer is" or "####" in a text, or None."""
    _, *stated = re.split(r"(?i)answer\s+is\s*:?|####", text)
    return stated[-1] if stated else None


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{…} or \\fbox{…}, braces balanced, or of "\\boxed 2", or None."""
    box = re.match(r"(?s).*\\(?:boxed|fbox)(?:\s*\{|\s+(\w+))", text)
    if not box or box[1]:
        return box and box[1]
    rest = text[box.end():]
    depth = 1
    for token in re.finditer(r"\\.|[{}]", rest):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return rest[:token.start()]


def extract_number(text: str) -> str | None:
    """The number a text answers with, in plain decimal notation ("1234.5"), or None.

    Looked for, in this order: the first number after the last "answer is" or "####"; the first in
    the last \\boxed{}; the last one anywhere. Thousands separators, currency and percent signs,
    units and markup are dropped; "−" is "-".
    """
    # LaTeX's thousands separators
    text = re.sub(r"(?<=\d)(?:\{,\}|,?\\[,!])(?=\d)", ",", text)
    stated = NUMBER.findall(statement(text) or "")
    boxed = NUMBER.findall(last_boxed(text) or "")
    found = stated[:1] + boxed[:1] + NUMBER.findall(text)[-1:]
    if not found:
        return None
    digits = re.sub(r"[^\d.]", "", found[0])
    number = format(Decimal(digits), "f")  # exact, whatever its length
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    negative = re.search("[-−–]", found[0]) and number != "0"
    return f"-{number}" if negative else number


def answer_line(text):
    """The line after the last "answer is", or the last line that is not blank."""
    stated = statement(text)
    lines = (stated or text).strip().split("\n")
    return lines[0 if stated else -1]


def extract_text(text):
    """The line that a text answers with, normalised."""
    return normalise(answer_line(text))


def normalise(text):
    """Lower case, white space folded, no quotes, markup or punctuation around it.

    But C++ is not C, nor A- A.
    """
    text = " ".join(text.lower().split())
    return text.strip("!\"$%&'()*,./:;<=>?@[\\]^_`{|}~ ’‘“”")


def extract_option(text: str, options: list[str]) -> str | None:
    """The option a text answers with, or None where none or more than one is named.

    After the last "answer is" (else in the last line): the whole answer equals an option's text;
    or it begins with an option's letter or number ("B", "(B)", "B. salt water", "2)"); or exactly
    one option stands in it as whole words, where an option inside a longer one that stands there
    too ("water" in "salt water") does not count.
    """
    answer = extract_text(text)
    texts = [normalise(option) for option in options]
    if answer and answer in texts:
        return options[texts.index(answer)]
    before = r"\W*(?:(?:option|choice|letter|answer|boxed|text)\W+)*"
    after = r"(?:\W*$|[).:,](?!\d)|\s*[-–]\s)"
    label = re.match(f"{before}([a-j1-9]){after}", answer)
    if label and label[1] not in texts:
        index = "abcdefghij".find(label[1]) if label[1].isalpha() else int(label[1]) - 1
        return options[index] if index < len(options) else None

    def named_in(whole):
        return [t for t in texts if t and re.search(rf"(?<!\w){re.escape(t)}(?!\w)", whole)]

    named = named_in(answer)
    longest = max(named, key=len, default="")
    return options[texts.index(longest)] if named and set(named) <= set(named_in(longest)) else None


def extract_json(text):
    """The JSON value a text answers with, in canonical form (sorted keys), or None.

    After the last "answer is" or anywhere, the first object or array that parses.
    """
    decode = json.JSONDecoder().raw_decode
    for part in (statement(text) or "", text):
        for bracket in re.finditer(r"[\[{]", part):
            try:
                value, _ = decode(part, bracket.start())
                return json.dumps(value, sort_keys=True)
            except (ValueError, RecursionError):
                pass


def extract_math(text):
    """The LaTeX a text answers with.

    The last \\boxed{}, else the first $…$ of the line after the last "answer is", or that line.
    """
    line = answer_line(text)
    formula = re.search(r"(?:(?<!\\)\$|\\\()(.+?)(?:(?<!\\)\$|\\\))", line)
    return last_boxed(text) or (formula[1] if formula else line).strip(" *.:$")


def math_equal(prediction, truth):
    """Equality of two LaTeX answers by the math-verify library."""
    from math_verify import parse, verify  # slow to import
    gold, given = parse(f"${truth}$"), parse(f"${prediction}$")
    return prediction == truth or verify(gold, given)


GRADERS = {
    "number": extract_number,
    "text": extract_text,
    "json": extract_json,
    "option": extract_option,
    "math": extract_math,
}


def choose_grader(given: str | None, name: str, rows: list[dict]) -> str:
    """`given`, or the dataset's grader, or, for a user's JSONL, what fits its groundtruths.

    number where every one is one, json where every one is an object or array, else text.
    """
    grader = given or DATASETS[name][1]
    if grader == "option":
        for row in rows:
            check_columns(row, "grader option", options=list)
            truth, options = row["groundtruth"], row["options"]
            if truth not in options or {*map(type, options)} != {str}:
                raise UserError(f"grader option: groundtruth {truth!r} is none of "
                                "its row's options; all must be texts")
    if grader:
        return grader
    truths = [row["groundtruth"].strip() for row in rows]
    if all(map(NUMBER.fullmatch, truths)):
        return "number"
    if all(truth[:1] in "{[" and extract_json(truth) for truth in truths):
        return "json"
    return "text"


def grade(grader: str, text: str, row: dict) -> tuple[str | None, bool]:
    """(prediction, correct) of a model's whole output.

    Predictions are normalised: equal answers vote together.
    """
    text = text.split("\nQ:")[0]  # a few-shot prompt's model may go on to a next question
    truth = row["groundtruth"]
    extract = GRADERS[grader]
    if grader == "option":
        extract = partial(extract, options=row["options"])
    prediction = extract(text)
    if not prediction:
        return None, False
    if grader == "math":
        return prediction, math_equal(prediction, truth)
    if grader == "text":
        truth = normalise(truth)
    elif grader != "option":
        truth = extract(truth)
    return prediction, prediction == truth


def check_gold(rows: list[dict], grader: str) -> tuple[int, dict | None]:
    """How many rows' own `responses` the grader calls wrong, and the first such row."""
    wrong = [row for row in rows if not grade(grader, row["responses"], row)[1]]
    return len(wrong), wrong[0] if wrong else None
