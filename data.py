"""What is asked: datasets, prompts, tokenised examples, answer extraction and grading.

A dataset is one function that returns or yields rows and one entry in DATASETS. A row has the
paper's columns:

    queries      the question with its chain-of-thought trigger: a list of chat messages, which goes
                 through the model's chat template, or a string, which is taken as it is
    responses    the gold answer in its template, e.g. "The answer is 18."; the y of log π(y|x⊕z)
    groundtruth  what a prediction is graded against; None where no rule can judge answers
    rationales   optional: a gold rationale, used by `objective: sft` alone
    options      optional: the texts of a multiple-choice question

Differences from the code released with the paper: templated prompts get no second BOS, the
end-of-turn token is read off the template and is always part of y, and validation rows come from
the training split, never from the test split.
"""
import difflib
import json
import random
import re
import unicodedata
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache, partial
from os.path import exists, isdir, isfile
from pathlib import Path

# The folder of the embedded default's base model, which latro.py makes.
EMBEDDED = "runs/cups-base/final"


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
    except (OSError, TypeError, ValueError, RecursionError) as error:
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


# name, pronoun; what gives more, what takes
PEOPLE = "Mia she|Tom he|Ana she|Ben he|Zoe she|Sam he|Eva she|Max he".split("|")
THINGS = "shells coins cards books apples pens stamps beads".split()
GAINS = "gets {} more|finds {}".split("|")
LOSSES = "gives away {}|loses {}".split("|")


def words(split, path=None, worked=1.0):
    """Word problems of three small additions and subtractions; a share of them has a worked rationale."""
    count = {"train": 4000, "test": 500}[split]
    held_out = {str(row["queries"]) for row in words("test")} if split == "train" else {}
    rng, odds = random.Random(f"words {split}"), random.Random("worked")
    rows = []
    while len(rows) < count:
        (name, pronoun), things = rng.choice(PEOPLE).split(), rng.choice(THINGS)
        start = total = rng.randint(3, 12)
        events, steps = [], ""
        for _ in range(3):
            gain = total < 3 or rng.random() < 0.5
            n = rng.randint(2, 6 if gain else min(6, total))
            after = total + n if gain else total - n
            events.append(rng.choice(GAINS if gain else LOSSES).format(n))
            steps += f"{total} {'+' if gain else '-'} {n} = {after}. "
            total = after
        query = "{} has {} {}, {}, {} and {}. ".format(name, start, things, *events)
        query = user(f"{query}How many {things} does {pronoun} have? Let's think step by step.")
        if str(query) not in held_out:
            rationale = steps if odds.random() < worked else ""
            rows.append(make_row(query, str(total), rationales=rationale))
    return rows


def prompt_file(name):
    """A prompt that is quoted from a paper."""
    return (Path(__file__).parent / f"configs/{name}.txt").read_text("utf-8").strip()


def gsm8k(split, path=None, few_shot=0):
    """GSM8K (Cobbe et al. 2021) with the paper's prompt (Appendix B, Figure 5).

    few_shot puts the first of the eight worked examples of Wei et al. (2022, Table 20) in front
    of the question instead.
    """
    shots = prompt_file("gsm8k_8shot").split("\n\n")
    for row in raw_rows(path or "openai/gsm8k", split, ["main"], question=str, answer=str):
        # <<48/2=24>> are calculator notes.
        solution = re.sub("<<.*?>>", "", row["answer"])
        rationale, _, answer = solution.rpartition("####")
        answer = answer.strip().replace(",", "")
        require(whole_number(answer), f"{path or 'gsm8k'}: no number is behind #### in {row['answer']!r:.60}")
        prompt = row["question"] + " Let's think step by step."
        if few_shot:
            prompt = "\n\n".join([*shots[:few_shot], f"Q: {row['question']}\nA:"])
        yield make_row(user(prompt), answer, rationales=rationale)


def arc_challenge(split, path=None, template="arc_cot"):
    """ARC-Challenge (Clark et al. 2018), the paper's chain-of-thought prompt (App. B, Figure 6)."""
    template = prompt_file(template)
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


def reasoning_gym(split, path=None, task="", options=()):
    """A task of the reasoning-gym library (Stojanovski et al. 2025), which makes its rows and scores
    its answers; `options` are the task's settings, such as "size=1000"."""
    try:
        import reasoning_gym as gym
    except ImportError:
        raise UserError("dataset_name reasoning_gym: pip install reasoning-gym")
    near = difflib.get_close_matches(task, gym.factory.DATASETS, 5, 0)
    require(task in near, f"dataset_name reasoning_gym:{task}: no such task; near it are {near}")
    settings = {"size": 1000, **dict(map(parse_option, options))}
    try:
        # a row's seed is its split's plus its number: they lie far apart
        test = settings | {"seed": 10 ** 9, "size": min(settings["size"], 500)}
        test = gym.create_dataset(task, **test)
        dataset = test if split == "test" else gym.create_dataset(task, **settings | {"seed": 0})
        held_out = {item["question"] for item in test} if split == "train" else {}
        items = [item for item in dataset if item["question"] not in held_out and item["answer"] is not None]
    # a setting that is unknown, of the wrong type or out of range
    except Exception as error:
        raise UserError(f"dataset_options {[*options]}: {task} refuses them ({first_line(error)})")
    require(items, f"dataset_name reasoning_gym:{task}: it has no gold answers to learn from")

    def scorer(item, text):
        # some cannot read every text
        with suppress(Exception):
            return dataset.score_answer(text, item)
        return 0.0

    for item in items:
        query = user(item["question"] + "\nLet's think step by step.")
        yield make_row(query, str(item["answer"]), scorer=partial(scorer, item))


def parse_option(word):
    """(key, value) of "key=value", where the value is JSON or text."""
    key, _, value = word.partition("=")
    with suppress(ValueError):
        value = json.loads(value)
    return key, value


def jsonl(split, path=None):
    """A user's own rows, with the columns named at the top.

    A JSONL file, or a folder with train.jsonl and test.jsonl.
    """
    require(path, "jsonl needs dataset_path, a JSONL file")
    columns = dict(queries=object, responses=str)
    for number, row in enumerate(raw_rows(path, split, **columns), 1):
        where = f"{path}, row {number}: column"
        require(row["queries"], f"{where} queries is empty")
        require(isinstance(row.get("rationales") or "", str), f"{where} rationales is no str")
        query = row["queries"]
        for message in query if isinstance(query, list) else user(query):
            check_row(message, f"{where} queries", role=str, content=str)
        truth = row.setdefault("groundtruth")
        if truth is not None and not isinstance(truth, str):
            row["groundtruth"] = json.dumps(truth, default=str)
        yield row


# name: (function, grader); None lets the groundtruths decide
DATASETS = {
    "cups": (cups, "number"),
    "cups_base": (cups_base, "number"),
    "words": (words, "number"),
    # of its base model, and SFT's
    "words_base": (partial(words, worked=0.4), "number"),
    "words_direct": (partial(words, worked=0.0), "number"),
    "gsm8k": (gsm8k, "number"),
    "arc_challenge": (arc_challenge, "option"),
    # SFT's (Figure 7)
    "arc_challenge_direct": (partial(arc_challenge, template="arc_direct"), "option"),
    "math": (math, "math"),
    "jsonl": (jsonl, None),
    "reasoning_gym:TASK": (reasoning_gym, "scorer"),
}


def find_dataset(name):
    """(function, grader) of a dataset's name."""
    kind, colon, task = str(name).partition(":")
    key = f"{kind}:TASK" if colon else kind
    require(key in DATASETS, f"dataset_name {name}: unknown; choose one of {[*DATASETS]}")
    function, grader = DATASETS[key]
    return partial(function, task=task) if colon else function, grader


def load_rows(name, split, path=None, few_shot=0, options=()):
    """Rows of split "train", "validation", "test" or "all" of the dataset `name`.

    Validation is a tenth of the training questions, at most 500, drawn with a seed that never
    changes: a model is never chosen on questions that it trained on, nor on the test split. A
    single JSONL file has no test split; "all" is all of it. UserError where an argument or a row
    is wrong.
    """
    parts = {"train": "train", "validation": "train", "test": "test", "all": "train test"}
    function, _ = find_dataset(name)
    require(split in parts, f"split {split}: unknown; choose one of {[*parts]}")
    require(exists(path or "."), f"dataset_path {path}: no such file")
    if isfile(path or ""):
        require(split != "test", f"split test: {path} is a single file; use all")
        parts["all"] = "train"
    require(few_shot in range(9 if name == "gsm8k" else 1), "few_shot: gsm8k has 8 worked examples")
    has_options = name.startswith("reasoning_gym:")
    require(has_options or not options, f"dataset_options: {name} has none, tasks of reasoning_gym have")
    own = {"few_shot": few_shot} if few_shot else {"options": options} if has_options else {}
    rows = [row for part in parts[split].split() for row in function(part, path, **own)]
    for number, row in enumerate(rows, 1):
        for column in ("groundtruth", "responses"):
            full = row[column] is None or row[column].strip()
            require(full, f"{path or name}, row {number}: column {column} is empty")
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

    Messages are joined by newlines if there is no template. A last message of the assistant's is the
    beginning of its answer, which goes on.
    """
    if isinstance(query, str):
        return query
    if not tokenizer.chat_template:
        return "\n".join(m["content"] for m in query)
    begun = query[-1]["role"] == "assistant"
    return tokenizer.apply_chat_template(
        query, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun)


def end_of_turn_id(tokenizer):
    """The token that ends the assistant's turn: the template's first special one after the content.

    The EOS token where the template has none, UserError if there is no EOS token either.
    """
    ends = [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        # a system prompt may well say "answer"
        turns = [*user("?"), {"role": "assistant", "content": "ANSWER?!"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        _, found, after = text.rpartition("ANSWER?!")
        after = tokenizer.encode(after if found else "", add_special_tokens=False)
        ends = [t for t in after if t in tokenizer.added_tokens_decoder] + ends
    require(ends[0] is not None, "the tokenizer has no EOS token; set eos_token")
    return ends[0]


def encode(tokenizer, texts):
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def in_front(tokenizer):
    """What the tokenizer puts in front of a text: nothing, BOS, "[gMASK] <sop>", a language tag."""
    ids, [inside] = tokenizer("a")["input_ids"], encode(tokenizer, ["a"])
    return next((ids[:i] for i in range(len(ids)) if ids[i:i + len(inside)] == inside), [])


def continued(tokenizer, texts):
    """The tokens of each text where it goes on from another.

    It is tokenised behind an anchor, which is cut off again: some tokenizers put a space before the
    first word. The anchor must not merge with the text: what is left has to decode to it.
    """
    decode, results = decoder(tokenizer), {}
    for anchor in "\na.":
        [cut] = encode(tokenizer, [anchor])
        begin = len(decode(cut))
        left = [text for text in texts if text not in results] or [""]
        for text, ids in zip(left, encode(tokenizer, [anchor + text for text in left])):
            kept, rest = ids[:len(cut)], ids[len(cut):]
            begun = decode(cut + rest[:4])[begin:].rstrip("\ufffd")
            # a tokenizer may not decode to what it encoded, in lower case or with unknown words
            if kept == cut and text.startswith(begun) or anchor == ".":
                results[text] = rest
    return [results[text] for text in texts]


def make_examples(tokenizer, rows, context=None, gold=False, vocabulary=None):
    """Tokenise rows.

    `context` is how many tokens x⊕y may have: the model's context less the rationale's length; or
    x⊕z⊕y, where z is the gold rationale; `vocabulary` how many tokens the model knows. UserError where
    a row has more, an empty prompt or an unknown token, or where the chat template refuses it.
    """
    try:
        prompts = encode(tokenizer, [prompt_text(tokenizer, row["queries"]) for row in rows])
    # Of the template, such as "no system role", or of the tokenizer.
    except Exception as error:
        raise UserError(f"queries: the chat template refuses them ({error})")
    spaced = continued(tokenizer, [" " + row["responses"] for row in rows])
    bare = continued(tokenizer, [row["responses"] for row in rows])
    rationales = continued(tokenizer, [row.get("rationales") or "" for row in rows])
    end, front = [end_of_turn_id(tokenizer)], in_front(tokenizer)
    examples = []
    for row, prompt, *answers, rationale in zip(rows, prompts, spaced, bare, rationales):
        query = row["queries"]
        # A template writes its own; a string may begin with it.
        if prompt[:len(front)] != front and (isinstance(query, str) or not tokenizer.chat_template):
            prompt = front + prompt
        require(prompt, f"queries: {query!r:.80} has no tokens")
        answers = tuple(ids + end for ids in answers)
        last = max(prompt + rationale + answers[0])
        if vocabulary and last >= vocabulary:
            raise UserError(f"{query!r:.40}: the model has no token {last}, {tokenizer.decode(last)!r}")
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


# --- Answers: where they are ----------------------------------------------------------------------
# "answer is", "Answer:", "####"; but not "answer is right", nor "answer options are"
STATED = re.compile(
    r"(?i)####+|\b(?:answers?|(?:right|correct|best) (?:choice|option)|final(?= ?:))\b(?!\s+(?:options|choices))"
    r"(?:(?!\b(?:is|are)\b)[^.:=\n]){0,40}(?:\b(?:is|are|be)\b|[:=])(?!\W*(?:right|correct|wrong|not)\b)"
    r"|答案(?:是|为|為|[:：])|(?:答え|正解)は|답은|정답[은:]"
    r"|\b(?:respuesta|réponse|antwort|risposta|resposta|ответ)\b[^.:\n]{0,20}?"
    r"(?:\b(?:es|est|ist|lautet|é|è)\b|:)")
BOXED = re.compile(r"\\(?:boxed|fbox)(?:\s*\{|\s+(\w+))")
BOLD = re.compile(r"\*\*([^*\n]*[^*\n:])\*\*(?!:)")
# where a model goes on to a question of its own or to a courtesy; "Q:" only behind an answer, for it
# may be a point of the solution
NEXT = re.compile(
    r"(?i)\n[^\S\n]*\n\W{0,9}(?:(?:question|human|user|problem|input|instruction)\b[^\n:]{0,9}:|q\d*: *[a-z]"
    r"|(?:let me know|i hope|would you like|feel free|do you|if you (?:have|need|want))\b)|<\|\w+\|>")
NEXT_SHOT = re.compile(r"(?i)\n\W{0,9}(?:q\d*|question|human|(?:next question|example).{0,9}):")


def last_boxed(text):
    """What the last \\boxed{…} or \\fbox{…} holds, braces balanced; 2 for "\\boxed 2"; or None."""
    *_, box = [None, *BOXED.finditer(text)]
    if not box or box[1]:
        return box and box[1]
    rest = text[box.end():]
    depth = 1
    for token in re.finditer(r"\\.|[{}]", rest):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return rest[:token.start()]


def final_part(text):
    """What an output says after thinking, without what follows its answer."""
    text = re.sub("<(/?)thinking>", r"<\1think>", text)
    thought, closed, after = text.rpartition("</think>")
    said = after.partition("<think>")[0]
    if closed and not said.strip():
        said = thought.partition("<think>")[0] or thought
    for marks in (NEXT, NEXT_SHOT):
        for mark in marks.finditer(said):
            before, more = said[:mark.start()], said[mark.start():]
            # a question that is only said again comes before any answer, in words alone
            again = claims(more) and not re.search(r"\d", before) and " " in before.strip()
            if claims(before) or marks is NEXT and before.strip() and not again:
                return before
    return said


def claims(text):
    """The answers that a text states, the last one first: what a \\boxed{} holds and what follows
    "answer is", "Answer:" or "####"; where there is none of these, what is in bold face."""
    found = [(mark.end(), text[mark.end():]) for mark in [*STATED.finditer(text)][-9:]]
    box = last_boxed(text)
    if box is not None:
        found.append(([*BOXED.finditer(text)][-1].end(), box))
    found = found or [(bold.start(), bold[1]) for bold in BOLD.finditer(text)]
    return [claim for _, claim in sorted(found, reverse=True)]


def statements(text):
    """The lines that a text answers with, the likeliest first: of each claim, then the last one."""
    said = [line for line in text.split("\n") if re.search(r"\w", MARKUP.sub("", line))]
    stated = [claim.strip(" \n:*").lstrip("# ").split("\n")[0] for claim in claims(text)]
    return [line for line in stated if line.strip()] + said[-1:]


def sentence(line):
    """The first sentence of a line."""
    return re.split(r"(?<=\w\w)[\"'”’)}*$]*[.!;]\s", line)[0]


# --- Answers: numbers -----------------------------------------------------------------------------
CURRENCY = r"(?:\b[A-Z]{1,2})?[$€£¥₹₩₽₫₺]|\b(?:[A-Z]{3}|Rs|Rp)\.?"
# what a text's numbers are freed from, in this order
PLAIN = [(re.compile(pattern), new) for pattern, new in (
    (r"\\[dtc]?frac\s*\{(-?[\d.]+)\}\s*\{([\d.]+)\}|\\[dtc]?frac\s*(\d)\s*(\d)", r" \1\3/\2\4 "),
    (r"[-−]\s+(?=\d+/\d)|(?<==)\s*[-−]\s+(?=[\d.])", "-"),
    (r"(?<=\d)\*\*(?=\d)", "^"),
    (r"\\(?:times|cdot)(?![A-Za-z])|\bx(?= ?10 ?\^)", "×"),
    (r"(?<=\d)(?:\{,\}|,?\\[,!;: ]|~)(?=\d)", ","),
    # markup, subscripts
    (r"</?\w+>", " "),
    (r"\\(?:text|math|mbox|operatorname)\w*|\*\*|__|`|\b_(?=\d)|(?<=\d)_(?![\w{])", ""),
    (r"(?<=[A-Za-z])_(?:\{\w+\}|\w+)", ""),
    (r"[\\{}]", ""),
    (r"\.\.+|…", " "),
    # "3 of the 20", "not 12"
    (r"(?i)(?:\bout of (?:(?:the|all|original) )*|(?<=\d )of |\bnot "
     r"|\bof (?:(?:the|all|those|her|his|their|original) )+)\d[\d,]*", ""),
    (r"(?i)\b(?:minus|negative)\s+(?=\W?\d)|(?<![\w)])–(?=[\d.])", "-"),
    (r"(?i)\bbetween (\S+) and (?=\W?\d)", r"\1-"),
    (rf"(?:{CURRENCY})\s?(?=-?\.?\d)|\$", ""),
    # 1,234 and 1,00,000; 10 000, 1'000 and 1_000; 1.000.000 and 1.000,50; a decimal comma
    (r"(?<=\d),(?=(?:\d\d\d?,)*\d{3}(?!\d))", ""),
    (r"(?<=\d)[ '’_](?=\d{3}(?!\d))(?<!\d{4}.)", ""),
    (r"(?<![\d.])(\d{1,3})\.(\d{3})(?:\.(\d{3})|(?=,\d\d\b))(?!\d)", r"\1\2\3"),
    (r"(?<![\d,.([])(\d+),(?=\d\d?(?![\d,]))", r"\1."),
)]
SCALES = {"k": 3, "M": 6, "B": 9, "thousand": 3, "million": 6, "billion": 9, "trillion": 12,
          "lakh": 5, "crore": 7, "万": 4, "億": 8, "亿": 8}
# sign, whole part of a mixed number, digits, denominator, exponent, powers of ten, scale
NUMBER = (r"((?<![A-Za-z\d.)\]])[-−])?(?<![A-Za-z\d_.^])(?:(\d+) +(?:and )?(?=\d+/\d))?"
          r"(\d+(?:\.\d+)?|\.\d+)(?:/(\d+))?(?:\^(-?\d+))?"
          r"(?:[eE]([-+]?\d+)|\s?[×*]\s?10\s?\^\s?\(?([-−]?\d+)\)?)?"
          rf"(?:([kKMB])\b|[ -]?((?i:{'|'.join([*SCALES][3:-3])}))\b|([万億亿]))?")
# an expression, a range, a time: 9 * 2, 18-20, 3:30
CHAIN = re.compile(rf"{NUMBER}(?:(?:\s*[-−–—+*×÷/:^~]\s*|\s+(?:to|or)\s+){NUMBER})*")
LEAD = re.compile(r"(?i)[^\w.\-−]*(?:(?:about|approximately|around|roughly|exactly|only|just|equal to|"
                  r"therefore|thus|now|a total of)\b[^\w.\-−]*)*")
TEENS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
         "fifteen sixteen seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = {w: i for i, w in enumerate(TEENS)} | {w: 20 + 10 * i for i, w in enumerate(TENS)}
SPELLED = re.compile(rf"(?i)\b(?:(?:{'|'.join(WORDS)}|hundred|thousand|million|minus)\b(?: and |[ -]?))+")


def spelled(text):
    """The last number of a text in words, "one hundred and forty-four", or None."""
    *_, run = ["", *SPELLED.findall(text.lower())]
    words = [word for word in re.findall("[a-z]+", run) if word != "and"]
    total = part = 0
    for word in words:
        part = part * 100 if word == "hundred" else part + WORDS.get(word, 0)
        if word in SCALES:
            total, part = total + part * 10 ** SCALES[word], 0
    sign = "-" * (words[:1] == ["minus"])
    return f"{sign}{total + part}" if {*words} - {"minus", "hundred", "thousand", "million"} else None


def plain(text):
    """The text with its numbers in plain notation: no markup, currencies, thousands separators."""
    # ² and ½ would become digits of the number before them
    text = re.sub(r"[⁻⁰¹²³⁴-⁹]+", r"^\g<0>", text)
    text = re.sub(r"[¼-¾⅐-⅞]", r" \g<0>", text)
    text = unicodedata.normalize("NFKC", text).replace("⁄", "/")
    for pattern, new in PLAIN:
        text = pattern.sub(new, text)
    return text


def value(found):
    """A match of NUMBER in canonical notation: "1234.5", "1/3"; None for a chain of several."""
    match = found and len(found[0]) < 300 and re.fullmatch(NUMBER, found[0])
    if not match:
        return None
    sign, whole, digits, below, exponent, *powers = match.groups()
    power = sum(SCALES.get(p.lower()) or SCALES.get(p) or int(p.replace("−", "-")) for p in powers if p)
    exponent = int(exponent or 1)
    # what is too large to write down, and 1/0
    zero = exponent < 0 and not float(digits) or below and not int(below)
    if abs(power) > 300 or abs(exponent) * len(digits) > 4000 or zero:
        return None
    number = Fraction(digits) ** exponent / int(below or 1) + int(whole or 0)
    number *= Fraction(10) ** power * (-1 if sign else 1)
    if number.denominator == 1:
        return str(number)
    decimal = f"{Decimal(repr(float(number))):f}"
    return decimal if Fraction(decimal) == number else str(number)


def whole_number(text):
    """The value of a text that is nothing but a number, or None."""
    text = plain(text[:99]).strip()
    # a long chain would be taken apart in very many ways
    return value(CHAIN.fullmatch(text)) if len(text) < 40 else None


def claimed_number(claim):
    """The match of the number, or chain of numbers, that a claim gives; or None."""
    # a sign may stand apart
    claim = re.sub(r"^[-−]\s+(?=[\d.])", "-", plain(claim[:2000]).strip(" \n:*(["))
    first = re.split(r"(?<=\w)[.!?;](?=\s)|。|\n", claim)[0]
    clause = re.split(r", |\(| (?:because|since|as|so|for|which)\b", first)[0]
    *_, right = sides = re.split("[=≈]", clause)
    if sides[1:]:
        # 9 * 2 = 18, and 18 = 9 * 2
        found = [CHAIN.search(side) for side in sides[::-1]]
        found = [match for match in found if value(match)] or [CHAIN.search(right)]
    else:
        found = [CHAIN.match(clause, LEAD.match(clause).end())]
    if found[0]:
        return found[0]
    # prose: of one sentence the first number, of several the last one
    paragraph = claim.split("\n\n")[0]
    numbers = [*CHAIN.finditer(paragraph)] or [None, *CHAIN.finditer(claim)]
    return numbers[0 if first == paragraph.strip(" .*") else -1]


def extract_number(text):
    """The number a text answers with, in plain decimal notation ("1234.5"), or None.

    Of the last claim that has one: what is behind its "=", else what it begins with, else its last
    one. Without a claim, the last number of the text. 1/2, 2 1/2, 5 million and 1.2 × 10^6 are
    numbers; an expression (9 * 2), a range or a time is none.
    """
    for claim in claims(text):
        found = claimed_number(claim)
        if found or not claim.strip():
            return value(found)
    # what is in brackets at the end, a reason or a check explains what is before
    said = re.split(r"(?i)\n[^\S\n]*\n\W{0,9}(?:verif|check|let me (?:check|verify))", text)[0]
    numerals = re.sub(r"(?:(?<=[\w%] )\([^()]*\)|(?<=\w), (?:since|because)\b.*)(?=\W*$)", "", plain(said))
    if found := [*CHAIN.finditer(numerals)]:
        return value(found[-1])
    return spelled(text)


# --- Answers: texts and options -------------------------------------------------------------------
# $ of LaTeX, but not of $5
MARKUP = re.compile(
    r"\\(?:boxed|fbox|text\w*|math\w+|mbox)\s*|</?\w+>|\*\*|__|```\w*|`"
    r"|(?<!\\)\$(?!\d[\d.,]*(?:\s|$))|\\[()\[\]]")
# an option's letter or number at the beginning; one that is chosen: "B is correct", "we are left with B"
LABEL = re.compile(
    r"[^\w+\-−$]*(?:(?i:the|la|option|choice|letter|answer|therefore|thus)\b\W*)*"
    r"(?:([A-J1-9])(?=\W*$|[).:;}\]\"'](?!\d)|,(?!\d| ?\(?[A-J]\b)|\s*[-–—]\s"
    r"|\s+(?:because|since|as|which|rather|and(?! \(?[A-J1-9]\b))\b"
    r"|[。，、；：）】\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af])"
    r"|([a-j])(?=\)|[.:]?\W*$|[.:]\s))")
CHOSEN = re.compile(
    r"(?:\b(?i:option|choice|opción|opção|pick|choose|go with|select|take|say|leaves)\s+\(?|选"
    r"|(?<!\w)\(?(?=[A-J]\)?\s+is\b)|(?i:\b(?:with|only|is|be|so|hence)|'s|[:=→])\s*\(?(?=[A-J]\W*$))"
    r"([A-J1-9])(?![A-Za-z\d])(?!\)?\s+is\s+(?:not|wrong|incorrect))")


@lru_cache(4096)
def fold(text, level=3):
    """A text as it is compared: 1 without markup and in one form of Unicode, 2 in lower case, 3
    without an article and without punctuation around it."""
    text = " ".join(text.split())
    if level > 0:
        text = MARKUP.sub("", text).strip("{} ")
        text = unicodedata.normalize("NFKC", text).translate(str.maketrans("’‘“”−‐‑–", "''\"\"----"))
    if level > 1:
        text = re.sub(r"(?<=\d)\s+(?=[°%A-Za-z])", "", text).casefold()
    if level > 2:
        bare = re.search(r"(?s)[\w+\-](?:.*[\w+\-#])?", re.sub(r"^\W{0,9}(?:the|an?) (?=.)", "", text))
        text = bare[0] if bare else text
    return text


def readings(text):
    """Folded readings of a text's answer: all of it; its last claim's line, else its last line, the
    line's first sentence, its beginning up to a comma or bracket; and, where nothing is claimed, what
    is before and behind "is"."""
    line = [*statements(text), ""][0]
    end = re.compile(r",| \(| (?:because|since|as|which)\b| [-–—] |: ")
    said = [text, line, end.split(line)[0], sentence(line)]
    if not claims(text):
        parts = re.split(r"(?:\b(?:is|are|was|were|called|named|by|ist|est|es)\b:?|'s\b)", sentence(line))
        said += [parts[0], *(end.split(part)[0] for part in parts[1:])]
    return [fold(reading) for reading in said]


def listed_texts(truth):
    """The accepted answers that a groundtruth lists as a JSON array, or None."""
    with suppress(ValueError, RecursionError):
        listed = json.loads(truth)
        return listed if isinstance(listed, list) and all(isinstance(t, str) for t in listed) else None


def extract_text(text):
    """What a text answers with, in lower case, no quotes, markup, article or punctuation around it;
    but C++ is not C, nor A- A. It is the last of the `readings`."""
    return readings(text)[-1]


def extract_option(text, options):
    """The option a text answers with, or None where none or more than one is named.

    Of each claim, the last one first, then of the last line: it equals an option, compared exactly
    first, then without regard to case, then to punctuation, as far as the options stay apart; or it
    begins with an option's letter or number ("B", "(B)", "B because"), or chooses one ("B is
    correct"); or exactly one option stands in it, where an option inside a longer one ("water" in
    "salt water") does not count; or it stands in exactly one option.
    """
    labels = dict(zip("ABCDEFGHIJ", options)) | dict(zip("123456789", options))
    distinct = [*dict.fromkeys(options)]

    def single(said, like):
        for level in range(4):
            folds = [fold(o, level) for o in distinct]
            some = [f for f in folds if f and like(f, fold(said, level))]
            longest = max(some, key=len, default="")
            if some and all(f in longest for f in some) and folds.count(longest) == 1:
                return distinct[folds.index(longest)]

    def within(part, whole):
        return re.search(rf"(?<![\w+\-])(?<!\d[.,]){re.escape(part)}(?!\w|[.,]\d)", whole)

    # a word at the beginning, before an explanation
    first = [line for line in text.strip().split("\n")[:1] if len(line) < 9 and not claims(text)]
    for line in first + statements(text):
        for said in (line, line.rstrip(". "), sentence(line)):
            if found := single(said, str.__eq__):
                return found
        said = fold(line, 1).replace("\\", "")
        if label := LABEL.match(said):
            mark = label[1] or label[2].upper()
            # it may be an option's text, too
            return mark if mark in options else labels.get(mark)
        if chosen := CHOSEN.findall(said):
            return labels.get(chosen[-1])
        clause = re.split(r"(?i)\b(?:because|since|as|not)\b|, |\(", line)[0]
        found = single(clause, within) or single(line, within)
        if found or len(said) > 3 and (found := single(sentence(line), lambda f, said: within(said, f))):
            return found
    chosen = CHOSEN.findall(fold(text, 1))
    return labels.get(chosen[-1]) if chosen else None


# --- Answers: JSON and mathematics ----------------------------------------------------------------
def extract_json(text):
    """The last JSON object or array in a text, in canonical form (sorted keys, 1.0 is 1), or None,
    also where the last one is cut short."""
    decoder = json.JSONDecoder(
        strict=False, parse_float=lambda x: int(float(x)) if float(x) % 1 == 0 else float(x))
    found, end = None, 0
    for match in re.finditer(r"[\[{]", text):
        if match.start() < end:
            continue
        try:
            found, end = decoder.raw_decode(text, match.start())
        except json.JSONDecodeError as error:
            if re.fullmatch(r"[\w.+\-\\]*\s*", text[error.pos:]) or error.msg.startswith("Unterminated"):
                return None
        # too deep, or too long a number
        except (RecursionError, ValueError, OverflowError):
            return None
    return None if found is None else json.dumps(found, sort_keys=True)


# the words of \text{…}
WORDING = re.compile(r"\\(?:text\w*|math\w+|mbox)\s*\{([^{}]*)\}")
FORMULA = re.compile(r"(?s)\\\[(.+?)\\\]|\$\$(.+?)\$\$|\\\((.+?)\\\)|(?<!\\)\$(.+?)(?<!\\)\$")


def extract_math(text):
    """The LaTeX a text answers with: of the last claim the first formula, or its first line; of a
    plain number the decimal notation. Spaces and sizes are dropped: equal answers vote together."""
    claim = [*claims(text), text.strip().split("\n")[-1]][0].strip()
    formula = FORMULA.search(claim)
    if formula and len(claim[:formula.start()].strip()) < 40:
        claim = next(filter(None, formula.groups()))
    claim = claim.strip().split("\n\n")[0].strip(" *:$\n").removesuffix(".")
    # x = 5 and 5! = 120 answer with what is on the right, 2x + y = 6 is an equation
    left = r"(?:[A-Za-z](?:_\{?\w+\}?)?(?:\(\w\))?|(?:\\[a-z]+|[^A-Za-z=])+)"
    claim = re.sub(rf"^{left}\s*=(?!.*=)|^[^,]*=.*=", "", claim).removesuffix("%").removesuffix("\\")
    claim = re.sub(r"\^?\{?\\circ\}?|°", "", claim).strip()
    prose = re.compile(r"(?<![\\{])\b[A-Za-z]{3,}\b.*(?<![\\{])\b[A-Za-z]{3,}\b")
    claim = re.split(r"\b(?:is|are)\b", claim)[-1].strip() if prose.search(claim) else claim
    if prose.search(claim) or re.match(r"[\d.,]+ [A-Za-z]{3,}$", claim):
        return value(claimed_number(claim)) or fold(claim)
    # 1,2 are two numbers
    if not re.search(r"\d,\s*\d\d?(?!\d)", claim) and (number := whole_number(claim)):
        return number
    claim = re.sub(r"(?<!\\)\\(?:(?:left|right|displaystyle)(?![a-z])|[,!;: ])|(?<!\w)\s+|\s+(?!\w)", "", claim)
    for name, short in (("\\lbrace", "\\{"), ("\\rbrace", "\\}"), ("π", "\\pi "), ("\\varnothing", "\\emptyset")):
        claim = claim.replace(name, short)
    claim = re.sub(r"√\(?(\w+)\)?", r"\\sqrt{\1}", claim)
    claim = WORDING.sub(r"\1", claim)
    claim = re.sub(r"([\^_]|\\sqrt)\{(\w)\}", r"\1\2", claim)
    return re.sub(r"\\[dt]frac", r"\\frac", claim).strip()


def math_equal(prediction, truth):
    """Equality of two LaTeX answers: of their words, or by the math-verify library, which knows
    nothing of number bases, of open and closed intervals, and takes 2x+y=6 for 6."""
    from math_verify import parse, verify
    both = prediction, truth
    words = {WORDING.sub(r"\1", x).strip().casefold() for x in both}
    bases = {base for x in both for base in re.findall(r"_\{?(\d+)\}?$", x)}
    ends = {end for x in both for end in re.findall(r"^\\?([\[(])[^,]*,[^,]*([\])])$", x)}
    equations = {"=" in x for x in both}
    if len(words) == 1 or max(map(len, (bases, ends, equations))) > 1:
        return len(words) == 1
    return verify(parse(f"${truth}$"), parse(f"${prediction}$"), allow_set_relation_comp=True)


GRADERS = dict(number=extract_number, text=extract_text, json=extract_json,
               option=extract_option, math=extract_math)


def choose_grader(given, name, rows):
    """(grader, why): `given`, or where that is "auto" the dataset's own, or, for a user's JSONL, what
    fits its groundtruths, and why.

    none where there is no groundtruth, or most are longer than a line; number where every one is a
    number, json where every one is an object or an array that does not list texts, else text.
    """
    _, own = find_dataset(name)
    grader, known = own if given == "auto" else given, [*GRADERS, "scorer", "none"]
    require(grader in [None, *known], f"grader {grader}: unknown; choose one of {known}")
    truths = [row["groundtruth"] for row in rows]
    if grader is None and not any(truths):
        return "none", "no row has a groundtruth"
    bare = next((row for row in rows if not row["groundtruth"]), None)
    require(grader == "none" or not bare, f"no groundtruth in {bare!r:.80}; only `grader: none` does without")
    needed = {"option": {"options": list}, "scorer": {"scorer": object}}.get(grader, {})
    for row in rows if needed else []:
        check_row(row, f"grader {grader}", **needed)
        wrong = f"grader option: groundtruth {row['groundtruth']!r} is none of its row's options"
        require(grader != "option" or row["groundtruth"] in row["options"], wrong)
    if grader:
        return grader, None
    texts = [truth for truth in truths if not whole_number(truth.rstrip("% "))]
    if not texts:
        return "number", "every groundtruth is a number"
    if all(extract_json(t) and t.strip()[0] in "{[" and not listed_texts(t) for t in truths):
        return "json", "every groundtruth is JSON"
    long = [t for t in texts if len(t) > 120 or "\n" in t.strip()]
    if len(long) > len(rows) / 2 and not listed_texts(long[0]):
        return "none", f"groundtruths such as {long[0]!r:.60} are longer than a line"
    return "text", f"groundtruth {texts[0]!r:.60} is no number"


def grade(grader, text, row):
    """(prediction, correct) of a model's whole output.

    Predictions are normalised: equal answers vote together. A text's groundtruth may be a list of
    accepted answers.
    """
    text, truth = final_part(text), row["groundtruth"]
    if grader == "scorer":
        # all of the last claim, which may have lines, or its first one; or the last line, or all
        said = [*claims(text)[:1], *statements(text)[:1], *[text] * (not claims(text))]
        said = [x for raw in said for x in (raw.strip(), MARKUP.sub("", raw).strip(" \n:"))]
        said = [x for raw in said for x in (raw.removesuffix("."), raw)]
        right = [x for x in said if row["scorer"](x) > 0.99]
        return [*right, *said, None][0], bool(right)
    if grader == "text":
        truths = {fold(accepted) for accepted in listed_texts(truth) or [truth]}
        said = readings(text)
        right = [reading for reading in said if reading in truths]
        return [*right, said[-1]][0] or None, bool(right)
    extract = GRADERS[grader]
    if grader == "option":
        extract = partial(extract, options=row["options"])
    prediction = extract(text)
    if not prediction:
        return None, False
    gold = truth if grader == "option" else extract(truth)
    correct = prediction == gold
    if grader == "math" and len(prediction) < 300:
        correct = correct or any(math_equal(prediction, x) for x in {truth, gold})
    return prediction, correct
