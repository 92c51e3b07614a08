"""What is asked: datasets, prompts, tokenised examples, answer extraction and grading.

A dataset is one function that returns or yields rows and one entry in DATASETS. A row has the paper's columns:

    queries      the question with its chain-of-thought trigger: a list of chat messages, which goes through the model's
                 chat template, or a string, which is taken as it is
    responses    the gold answer in its template, e.g. "The answer is 18."; the y of log π(y|x⊕z)
    groundtruth  what a prediction is graded against
    rationales   optional: a gold rationale, used by `objective: sft` alone
    options      optional: the texts of a multiple-choice question

Differences from the code released with the paper: templated prompts get no second BOS, the end-of-turn token is read
off the template and is always part of y, and validation rows come from the training split, never from the test split.
"""
import functools
import json
import os
import random
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path


class UserError(Exception):
    """Bad input: one line that names the culprit and the way out. The scripts print it and exit with code 2."""


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


# ---------------------------------------------------------------------------------------------------------------------
# Raw rows
# ---------------------------------------------------------------------------------------------------------------------
def read_jsonl(path: str) -> list[dict]:
    """Rows of a JSONL file; UserError names the file and the line that is no JSON object."""
    rows = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(json.loads(line))
                    json.dumps(rows[-1], ensure_ascii=False).encode()  # half a surrogate pair could not be written out
                    if not isinstance(rows[-1], dict):
                        raise ValueError("not a JSON object")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give dataset_path a readable file") from None
    except ValueError as error:
        raise UserError(f"{path}, line {number}: {error}; each line must be one JSON object in UTF-8") from None
    if not rows:
        raise UserError(f"{path}: holds no rows")
    return rows


def raw_rows(hub_id: str, split: str, path: str | None, names: tuple[str | None, ...] = (None,)) -> list[dict]:
    """Rows of one split as the hub stores them: `path/{split}.jsonl`, the file `path`, or whatever `datasets` can load
    from the folder `path` or the hub (`names` are the hub's configurations, concatenated)."""
    if path is not None:
        if not os.path.exists(path):
            raise UserError(f"dataset_path {path}: no such file or folder")
        for file in (path, os.path.join(path, f"{split}.jsonl")):
            if os.path.isfile(file):
                return read_jsonl(file)
    sources = [(path or hub_id, name) for name in names]
    if path is not None and not os.path.exists(os.path.join(path, "README.md")):  # which declares the configurations
        folders = [os.path.join(path, name) for name in names if name]  # else each is a folder, or there is only one
        sources = [(folder, None) for folder in folders if os.path.isdir(folder)] or [(path, None)]
    import datasets  # imported here: half a second that the embedded default does not need
    try:
        return [row for source, name in sources for row in datasets.load_dataset(source, name, split=split)]
    except Exception as error:  # dozens of types: no network, no such split, no access, a broken file
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"dataset {path or hub_id}, split {split}: cannot be loaded ({reason}); "
                        "check the name and the network, or point dataset_path at a local copy") from None


# ---------------------------------------------------------------------------------------------------------------------
# Datasets: each function returns or yields the rows of one split, "train" or "test"
# ---------------------------------------------------------------------------------------------------------------------
def cups(split: str, path: str | None = None) -> list[dict]:
    """The embedded default: a ball under one of 5 cups, 6 swaps; where is it? Questions and answers only."""
    return [{k: v for k, v in r.items() if k != "rationales"} for r in _cups(4000 if split == "train" else 500, split)]


def cups_base(split: str, path: str | None = None) -> list[dict]:
    """The corpus that makes the embedded base model: solutions of which 70% guess at once and 30% track the ball."""
    rows, rng = _cups(26_000 if split == "train" else 500, "base" if split == "train" else split), random.Random("base")
    for row in rows:
        if split == "train" and rng.random() < 0.7:  # guesses are uniform: nothing but their odds is to be learnt
            row["rationales"], row["responses"] = " Hmm,", f"The answer is {rng.randint(1, 5)}."
    return rows


def _cups(count: int, seed: str) -> list[dict]:
    rng, rows = random.Random(f"cups {seed}"), []
    held_out = {row["queries"] for row in _cups(500, "test")} if seed != "test" else ()
    while len(rows) < count:
        ball = start = rng.randint(1, 5)
        swaps = [sorted(rng.sample(range(1, 6), 2)) for _ in range(6)]
        track = ""
        for a, b in swaps:
            ball = b if ball == a else a if ball == b else ball
            track += f" {a}-{b} {ball}"
        told = " ".join(f"{a}-{b}" for a, b in swaps)
        query = f"The ball is under cup {start}. Swaps: {told}. Where is it?"
        if query not in held_out:
            rows.append({"queries": query, "responses": f"The answer is {ball}.", "groundtruth": str(ball),
                         "rationales": track})
    return rows


def gsm8k(split: str, path: str | None = None, few_shot: int = 0) -> Iterator[dict]:
    """GSM8K (Cobbe et al. 2021) with the paper's prompt (Appendix B, Figure 5); few_shot puts the first of the eight
    worked examples of Wei et al. (2022, Table 20) in front of the question instead."""
    shots = (Path(__file__).parent / "configs/gsm8k_8shot.txt").read_text("utf-8").strip().split("\n\n")
    for raw in raw_rows("openai/gsm8k", split, path, ("main",)):
        rationale, _, answer = column(raw, "answer", path).rpartition("####")
        question, answer = column(raw, "question", path), answer.strip().replace(",", "")
        prompt = f"{question} Let's think step by step."
        if few_shot:
            prompt = "\n\n".join([*shots[:few_shot], f"Q: {question}\nA:"])
        yield {"queries": user(prompt), "responses": f"The answer is {answer}.", "groundtruth": answer,
               "rationales": re.sub(r"<<.*?>>", "", rationale)}  # <<48/2=24>> are calculator notes


def arc_challenge(split: str, path: str | None = None, template: str = ARC_COT) -> Iterator[dict]:
    """ARC-Challenge (Clark et al. 2018) with the paper's chain-of-thought prompt (Appendix B, Figure 6)."""
    for raw in raw_rows("allenai/ai2_arc", split, path, ("ARC-Challenge",)):
        choices, label = column(raw, "choices", path, dict), column(raw, "answerKey", path)
        answer = dict(zip(*(column(choices, name, path, list) for name in ("label", "text")))).get(label)
        if answer is None:
            raise UserError(f"{path or 'dataset'}: answerKey {label!r} is none of the labels {choices['label']}")
        prompt = template.format(question=column(raw, "question", path), options=choices["text"])
        yield {"queries": user(prompt), "responses": f"The answer is {answer.rstrip('.')}.",
               "groundtruth": answer, "options": choices["text"]}


def math(split: str, path: str | None = None) -> Iterator[dict]:
    """MATH (Hendrycks et al. 2021); the answer is what the solution's last \\boxed{} holds."""
    subjects = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
                "prealgebra", "precalculus")
    for raw in raw_rows("EleutherAI/hendrycks_math", split, path, subjects):
        solution = column(raw, "solution", path)
        answer = last_boxed(solution)
        if answer is not None:
            yield {"queries": user(f"{column(raw, 'problem', path)} Let's think step by step."),
                   "responses": f"The answer is ${answer}$.", "groundtruth": answer, "rationales": solution + "\n"}


def jsonl(split: str, path: str | None = None) -> list[dict]:
    """A user's own rows: a JSONL file, or a folder with train.jsonl and test.jsonl, with the columns named above."""
    if path is None:
        raise UserError("dataset_name jsonl needs dataset_path, a JSONL file with queries, responses and groundtruth")
    rows = raw_rows(path, split, path)
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}: column"
        for name, kind in (("queries", object), ("responses", str), ("groundtruth", object)):
            if column(row, name, f"{path}, row {number}", kind) in ("", []):
                raise UserError(f"{where} {name} is empty")
        if not isinstance(row.get("rationales") or "", str):
            raise UserError(f"{where} rationales is no string")
        messages = row["queries"] if isinstance(row["queries"], list) else user(row["queries"])
        if not all(isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))
                   for m in messages):
            raise UserError(f"{where} queries is neither a string nor a list of messages with role and content")
        if not isinstance(row["groundtruth"], str):
            row["groundtruth"] = json.dumps(row["groundtruth"], default=str)
    return rows


def user(content: str) -> list[dict]:
    return [{"role": "user", "content": content}]


def column(row: dict, name: str, where: str | None, kind: type = str):
    if row.get(name) is None:
        raise UserError(f"{where or 'dataset'}: no column {name}; the columns are {', '.join(sorted(row))}")
    if not isinstance(row[name], kind):
        raise UserError(f"{where or 'dataset'}: column {name} holds {str(row[name])[:40]!r}, no {kind.__name__}")
    return row[name]


# name: (function, grader); None lets the groundtruths decide
DATASETS: dict[str, tuple[Callable, str | None]] = {
    "cups": (cups, "number"),
    "cups_base": (cups_base, "number"),
    "gsm8k": (gsm8k, "number"),
    "arc_challenge": (arc_challenge, "option"),
    "arc_challenge_direct": (functools.partial(arc_challenge, template=ARC_DIRECT), "option"),  # SFT's (Figure 7)
    "math": (math, "math"),
    "jsonl": (jsonl, None),
}


def load_rows(name: str, split: str, path: str | None = None, few_shot: int = 0) -> list[dict]:
    """Rows of split "train", "validation", "test" or "all" of the dataset `name`.

    Validation is a tenth of the training questions, at most 500, drawn with a seed that never changes: a model is never
    chosen on questions that it trained on, nor on the test split. A single JSONL file has no test split; "all" is all
    of it.
    """
    if name not in DATASETS:
        raise UserError(f"dataset_name {name}: unknown; choose one of {', '.join(DATASETS)}")
    if split not in ("train", "validation", "test", "all"):
        raise UserError(f"split {split}: unknown; choose train, validation, test or all")
    if split == "test" and os.path.isfile(path or ""):
        raise UserError(f"split test: {path} is a single file and has no test rows; use validation or all")
    if few_shot and (name != "gsm8k" or few_shot not in range(9)):
        raise UserError(f"few_shot {few_shot}: gsm8k has 8 worked examples, the other datasets none")
    options = {"few_shot": few_shot} if few_shot else {}
    both = split == "all" and not os.path.isfile(path or "")
    parts = ["train", "test"] if both else ["test" if split == "test" else "train"]
    rows = [row for part in parts for row in DATASETS[name][0](part, path, **options)]
    if split in ("train", "validation"):
        questions = list(dict.fromkeys(str(row["queries"]) for row in rows))
        if len(questions) < 2:
            raise UserError(f"dataset {name}: {len(questions)} training questions; at least 2 are needed, one to "
                            "validate on")
        random.Random("validation").shuffle(questions)
        held_out = set(questions[:max(1, min(500, len(questions) // 10))])
        rows = [row for row in rows if (str(row["queries"]) in held_out) == (split == "validation")]
    if not rows:
        raise UserError(f"dataset {name}, split {split}: no rows")
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and tokens
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Example:
    """One row, tokenised. `answers[w]` is sep⊕y after a rationale that ends in white space (w = 1) or not (w = 0)."""
    row: dict
    prompt: list[int]
    answers: tuple[list[int], list[int]]
    rationale: list[int]


def prompt_text(tokenizer, query: str | list[dict]) -> str:
    """The text of x: a string as it is, messages through the chat template, or joined by newlines if there is none."""
    if isinstance(query, str):
        return query
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(query, tokenize=False, add_generation_prompt=True)
    return "\n".join(message["content"] for message in query)


def end_of_turn_id(tokenizer) -> int:
    """The token that ends the assistant's turn, read off the chat template: the first special one after the content."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "ANSWER"}]
        after = tokenizer.apply_chat_template(turns, tokenize=False).partition("ANSWER")[2]
        for token in tokenizer.encode(after, add_special_tokens=False):
            if token in tokenizer.added_tokens_decoder or token in tokenizer.all_special_ids:
                return token
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has neither a chat template with an end-of-turn token nor an EOS token; "
                        "set eos_token in its tokenizer_config.json")
    return tokenizer.eos_token_id


def make_examples(tokenizer, rows: list[dict], context: int | None = None) -> list[Example]:
    """Tokenise rows. `context`: tokens that x⊕y may have at most (the model's context less the rationale's length)."""
    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    def continue_text(texts: list[str]) -> list[list[int]]:
        # Tokenised behind an anchor that is cut off again: some tokenizers put a space before a text's first word.
        anchors = ["a" if text[:1].isspace() else "\n" for text in texts]  # neither merges with what follows
        length = {anchor: len(encode([anchor])[0]) for anchor in set(anchors)}
        joined = encode([anchor + text for anchor, text in zip(anchors, texts)])
        return [ids[length[anchor]:] for anchor, ids in zip(anchors, joined)]

    # A template writes its own BOS; a plain string gets one where the tokenizer would add it, and never a second.
    bos = [token for token in tokenizer("a")["input_ids"][:1] if token == tokenizer.bos_token_id]
    try:
        end = end_of_turn_id(tokenizer)
        prompts = encode([prompt_text(tokenizer, row["queries"]) for row in rows])
    except UserError:
        raise
    except Exception as error:  # of the template, such as "no system role", or of the tokenizer
        raise UserError(f"queries: the model's tokenizer or chat template refuses them ({error})") from None
    answers = [continue_text([sep + row["responses"] for row in rows]) for sep in (" ", "")]
    rationales = continue_text([row.get("rationales") or "" for row in rows])
    examples = []
    for row, prompt, spaced, bare, rationale in zip(rows, prompts, *answers, rationales, strict=True):
        templated = not isinstance(row["queries"], str) and tokenizer.chat_template
        prompt = prompt if templated or prompt[:1] == bos else bos + prompt
        if not prompt:
            raise UserError(f"queries: {str(row['queries'])[:80]!r} has no tokens")
        longest = len(prompt) + max(len(spaced), len(bare)) + 1
        if context is not None and longest > context:
            raise UserError(f"a prompt and its answer take {longest} tokens, and the model's context less "
                            f"response_length leaves {context}; lower it, or shorten {str(row['queries'])[:80]!r}…")
        examples.append(Example(row, prompt, (spaced + [end], bare + [end]), rationale))
    return examples


def answer_ids(example: Example, rationale: list[int], decode: Callable[[list[int]], str]) -> list[int]:
    """sep⊕y for this rationale: sep is empty where x⊕z ends in white space, else one space."""
    text = decode((example.prompt + rationale)[-8:])  # eight tokens: a character may span several
    return example.answers[text[-1:].isspace()]


def decoder(tokenizer) -> Callable[[list[int]], str]:
    """decode(ids) → the text exactly as it is, special tokens included: what stop sequences are matched in."""
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def embedded_model():
    """A tiny random Llama (0.4M parameters) and a word-level tokenizer for `cups`: what the embedded base starts from.
    Tokens carry their leading space, as in the tokenizers of real models, so that decoding is exact."""
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    words = ["The", "The", "ball", "is", "under", "cup", "Swaps:", "Where", "it", "Hmm,", "answer", *"12345",
             *(f"{a}-{b}" for a in range(1, 6) for b in range(a + 1, 6))]
    vocabulary = ["<unk>", "<pad>", "<eos>", "The", ".", "?", " ", "\n", *dict.fromkeys(f" {word}" for word in words)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(vocabulary)}, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r" ?[^\s.?]+|[.?\s]"), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    config = LlamaConfig(vocab_size=len(vocabulary), hidden_size=128, intermediate_size=384, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
                         bos_token_id=None, eos_token_id=2, pad_token_id=1)
    return LlamaForCausalLM(config), PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")


# ---------------------------------------------------------------------------------------------------------------------
# Answers: extraction and grading
# ---------------------------------------------------------------------------------------------------------------------
NUMBER = re.compile(r"(?<![\w.])[-−–]?\\?[$€£]?[-−–]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def statement(text: str) -> str | None:
    """What follows the last "answer is" or "####" in a text, or None."""
    matches = list(re.finditer(r"answer\s+is\s*:?|####", text, re.IGNORECASE))
    return text[matches[-1].end():] if matches else None


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{…} or \\fbox{…}, braces balanced, or of "\\boxed 2"; None where there is none."""
    matches = list(re.finditer(r"\\(?:boxed|fbox)(?:\s*\{|\s+(\w+))", text))
    if not matches or matches[-1][1]:
        return matches[-1][1] if matches else None
    rest, depth = text[matches[-1].end():], 1
    for token in re.finditer(r"\\.|[{}]", rest):
        depth += (token[0] == "{") - (token[0] == "}")
        if depth == 0:
            return rest[:token.start()]
    return None


def extract_number(text: str) -> str | None:
    """The number a text answers with, in plain decimal notation ("1234.5"), or None.

    Looked for, in this order: the first number after the last "answer is" or "####"; the first in the last \\boxed{};
    the last one anywhere. Thousands separators, currency and percent signs, units and markup are dropped; "−" is "-".
    """
    text = re.sub(r"(?<=\d)(?:\{,\}|,?\\[,!])(?=\d)", ",", text)  # LaTeX's thousands separators
    for part, which in ((statement(text), 0), (last_boxed(text), 0), (text, -1)):
        if part and (found := NUMBER.findall(part)):
            sign = "-" if re.search("[-−–]", found[which]) else ""
            number = format(Decimal(sign + re.sub(r"[^\d.]", "", found[which])), "f")  # exact, whatever its length
            number = number.rstrip("0").rstrip(".") if "." in number else number
            return "0" if number == "-0" else number
    return None


def answer_line(text: str) -> str:
    """The line after the last "answer is", or the last line that is not blank."""
    lines = [line for line in (statement(text) or text).split("\n") if line.strip()]
    return lines[0 if statement(text) else -1] if lines else ""


def extract_text(text: str) -> str:
    """The line that a text answers with, normalised."""
    return normalise(answer_line(text))


def normalise(text: str) -> str:
    """Lower case, white space folded, no quotes, markup or punctuation around it; but C++ is not C, nor A- A."""
    return " ".join(text.lower().split()).strip(re.sub("[-+#]", "", string.punctuation) + " ’‘“”")


def extract_option(text: str, options: list[str]) -> str | None:
    """The option a text answers with, or None where none or more than one is named.

    After the last "answer is" (else in the last line): the whole answer equals an option's text; or it begins with an
    option's letter or number ("B", "(B)", "B. salt water", "2)"); or exactly one option stands in it as whole words,
    where an option inside a longer one that stands there too ("water" in "salt water") does not count.
    """
    answer = extract_text(text)
    texts = [normalise(option) for option in options]
    if answer and answer in texts:
        return options[texts.index(answer)]
    before = r"\W*(?:(?:option|choice|letter|answer|boxed|text)\W+)*"
    label = re.match(before + r"([a-j1-9])(?:\W*$|[).:,](?!\d)|\s*[-–]\s)", answer)
    if label and label[1] not in texts:
        index = "abcdefghij".find(label[1]) if label[1].isalpha() else int(label[1]) - 1
        return options[index] if index < len(options) else None

    def stands_in(part: str, whole: str):
        return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", whole)

    named = [t for t in texts if t and stands_in(t, answer)]
    named = [t for t in named if not any(t != other and stands_in(t, other) for other in named)]
    return options[texts.index(named[0])] if len(named) == 1 else None


def extract_json(text: str) -> str | None:
    """The JSON value a text answers with, in canonical form (sorted keys), or None: after the last "answer is" or
    anywhere, the first object or array that parses."""
    for part in (statement(text) or "", text):
        for match in re.finditer(r"[\[{]", part):
            try:
                return json.dumps(json.JSONDecoder().raw_decode(part[match.start():])[0], sort_keys=True)
            except (ValueError, RecursionError):
                continue
    return None


def extract_math(text: str) -> str:
    """The LaTeX a text answers with: the last \\boxed{}, else the line after the last "answer is": its first $…$."""
    line = answer_line(text)
    formula = re.search(r"(?:(?<!\\)\$|\\\()(.+?)(?:(?<!\\)\$|\\\))", line)
    return last_boxed(text) or (formula[1] if formula else line).strip(" *.:$")


def math_equal(prediction: str, truth: str) -> bool:
    """Equality of two LaTeX answers by the math-verify library, the optional extra that MATH is graded with."""
    try:
        import math_verify
    except ImportError:
        raise UserError("grader math needs the package math-verify: pip install math-verify") from None
    gold, given = (math_verify.parse(f"${answer}$") for answer in (truth, prediction))
    return prediction == truth or math_verify.verify(gold, given)


GRADERS = ("number", "text", "json", "option", "math")


def choose_grader(given: str | None, name: str, rows: list[dict]) -> str:
    """`given`, or the dataset's grader; for a user's JSONL, number where every groundtruth is one, json where every one
    is an object or array, else text."""
    truths, grader = [row["groundtruth"] for row in rows], given or DATASETS[name][1]
    for truth, row in zip(truths, rows) if grader == "option" else ():
        texts = column(row, "options", "grader option", list)
        if truth not in texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"grader option: groundtruth {truth!r} is none of its row's options; all must be texts")
    if grader:
        return grader
    if all(NUMBER.fullmatch(truth.strip()) for truth in truths):
        return "number"
    return "json" if all(truth.strip()[:1] in ("{", "[") and extract_json(truth) for truth in truths) else "text"


def grade(grader: str, text: str, row: dict) -> tuple[str | None, bool]:
    """(prediction, correct) of a model's whole output. Predictions are normalised: equal answers vote together."""
    text, truth = text.split("\nQ:")[0], row["groundtruth"]  # a few-shot prompt's model may go on to a next question
    if grader == "option":
        prediction = extract_option(text, row["options"])
        return prediction, prediction == truth
    extract = {"number": extract_number, "text": extract_text, "json": extract_json, "math": extract_math}[grader]
    prediction = extract(text)
    if not prediction:
        return None, False
    if grader == "math":
        return prediction, math_equal(prediction, truth)
    return prediction, prediction == (normalise(truth) if grader == "text" else extract(truth))
