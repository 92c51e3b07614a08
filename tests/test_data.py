"""Datasets, prompts of the main template kinds, and grading."""
import json
import sys

import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import data
from data import (UserError, answer_ids, decoder, end_of_turn_id, extract_number, grade, load_rows, make_examples)

# --- datasets --------------------------------------------------------------------------------------------------------


def test_cups_rows_are_true_and_have_no_rationales():
    rows = load_rows("cups", "train")
    assert not any("rationales" in row for row in rows)
    for row in load_rows("cups", "test")[:50]:
        words = row["queries"].replace(".", "").split()
        cup = words[5]
        for swap in words[7:13]:
            a, b = swap.split("-")
            cup = {a: b, b: a}.get(cup, cup)
        assert cup == row["groundtruth"] and row["responses"] == f"The answer is {cup}."


def test_word_problems_are_true():
    test = load_rows("words", "test")
    assert not {str(r["queries"]) for r in test} & {str(r["queries"]) for r in load_rows("words", "train")}
    gives = {"gets": 1, "finds": 1, "buys": 1, "wins": 1, "gives": -1, "loses": -1, "sells": -1, "drops": -1}
    for row in test:
        content = row["queries"][0]["content"].replace(",", "").replace(".", "").split()
        total, worked, sign = int(content[2]), "", None
        for word in content[3:content.index("How")]:
            sign = gives.get(word, sign)
            if word.isdigit():
                after = total + sign * int(word)
                worked += f"{total} {'+' if sign > 0 else '-'} {word} = {after}. "
                total = after
        assert (row["groundtruth"], row["rationales"]) == (str(total), worked) and total >= 0
        assert row["responses"] == f"The answer is {total}."


def test_reasoning_gym_makes_rows_and_scores_answers(monkeypatch):
    options = ["size=60", "max_terms=2", "max_digits=2"]
    splits = [load_rows("reasoning_gym:chain_sum", split, options=options) for split in ("train", "validation", "test")]
    train, validation, test = ([row["queries"][0]["content"] for row in rows] for rows in splits)
    assert len(train) + len(validation) > 50 and len(test) == 60
    assert not {*train} & {*validation} and not {*train, *validation} & {*test}
    assert [row["queries"][0]["content"] for row in load_rows("reasoning_gym:chain_sum", "test", options=options)] == test
    assert len(load_rows("reasoning_gym:chain_sum", "test", options=["size=700"])) == 500
    grader, why = data.choose_grader("auto", "reasoning_gym:chain_sum", splits[0])
    assert (grader, why) == ("scorer", None)
    for row in splits[2]:
        a, sign, b = row["queries"][0]["content"].split("problem: ")[1].split(" =")[0].split()
        answer = str(int(a) + int(b) * (1 if sign == "+" else -1))
        assert row["groundtruth"] == answer and row["responses"] == f"The answer is {answer}."
        for text in (row["responses"], f"{a} and so on.\nThe answer is: **{answer}**", f"So \\boxed{{{answer}}}", answer):
            assert grade(grader, text, row) == (answer, True)
        assert not grade(grader, f"The answer is {answer}1.", row)[1] and not grade(grader, "", row)[1]
    # an answer of several lines, and a scorer that cannot read every text
    for task in ("spiral_matrix", "rotate_matrix", "prime_factorization", "spell_backward", "countdown"):
        rows = load_rows(f"reasoning_gym:{task}", "test", options=["size=5"])
        assert all(grade("scorer", "Well.\n" + row["responses"], row)[1] for row in rows)
        assert not any(grade("scorer", "The answer is a fish.", row)[1] for row in rows)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="reasoning_gym: pip install reasoning-gym"):
        load_rows("reasoning_gym:chain_sum", "test")


def test_what_no_rule_can_judge_is_not_graded():
    def chosen(*truths, given="auto"):
        return data.choose_grader(given, "jsonl", [{"groundtruth": truth} for truth in truths])

    paragraph, lines = "It rains because warm air rises. " * 5, "First.\nThen."
    for truth in (paragraph, lines):
        grader, why = chosen(truth, truth, "short")
        assert grader == "none" and f"groundtruths such as {truth!r:.60} are longer than a line" == why
    assert chosen("short", "short", lines)[0] == "text" and chosen(lines, given="text") == ("text", None)
    assert chosen(json.dumps(["a choice of words"] * 9))[0] == "text" and chosen(json.dumps({"a": paragraph}))[0] == "json"
    assert chosen(None, None) == ("none", "no row has a groundtruth") and chosen(None, "5", given="none")[0] == "none"
    for truths, given in (((None, "5"), "auto"), ((None, None), "text")):
        with pytest.raises(UserError, match="no groundtruth in .*; only `grader: none` does without"):
            chosen(*truths, given=given)


def test_splits_are_disjoint_and_fixed():
    splits = {split: [r["queries"] for r in load_rows("cups", split)] for split in ("train", "validation", "test")}
    assert [len(s) for s in splits.values()] == [3600, 400, 500]
    assert not set(splits["train"]) & set(splits["validation"]) and not set(splits["train"]) & set(splits["test"])
    assert not {r["queries"] for r in load_rows("cups_base", "train")} & set(splits["test"])
    assert splits["validation"] == [r["queries"] for r in load_rows("cups", "validation")]


def test_gsm8k(gsm8k):
    train, validation, test = (load_rows("gsm8k", split, gsm8k) for split in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (6973, 500, 1319)
    assert test[0]["queries"][0]["content"].endswith("farmers' market? Let's think step by step.")
    assert test[0]["responses"] == "The answer is 18." and test[0]["groundtruth"] == "18"
    assert "<<" not in test[0]["rationales"] and test[0]["rationales"].endswith("market.\n")
    assert all(extract_number(r["groundtruth"]) and grade("number", r["responses"], r)[1] for r in test)
    shot = load_rows("gsm8k", "test", gsm8k, few_shot=2)[0]["queries"][0]["content"]
    assert shot.count("Q: ") == 3 and shot.count("The answer is") == 2
    shot = load_rows("gsm8k", "test", gsm8k, few_shot=8)[0]["queries"][0]["content"]
    assert shot.count("Q: ") == 9 and shot.count("The answer is") == 8 and shot.endswith("market?\nA:")
    with pytest.raises(UserError, match="gsm8k has 8 worked examples"):
        load_rows("cups", "test", few_shot=8)


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))


def test_gsm8k_rows(tmp_path):
    """Needs no download: what is cut from a solution, and its answer."""
    solution = "He has 2*3=<<2*3=6>>6 boxes,\nso 6*200=<<6*200=1200>>1200 eggs, 1200+0=<<1200+0=1200>>1200.\n#### 1,200"
    write(tmp_path / "test.jsonl", [{"question": "How many?", "answer": solution}])
    [row] = load_rows("gsm8k", "test", str(tmp_path))
    assert row == {"queries": data.user("How many? Let's think step by step."), "responses": "The answer is 1200.",
                   "groundtruth": "1200", "rationales": "He has 2*3=6 boxes,\nso 6*200=1200 eggs, 1200+0=1200.\n"}
    for n in (1, 8):
        [row] = load_rows("gsm8k", "test", str(tmp_path), few_shot=n)
        prompt = row["queries"][0]["content"]
        assert prompt.count("Q: ") == n + 1 and prompt.count("The answer is") == n
        assert prompt.endswith("\n\nQ: How many?\nA:")


def test_the_hubs_configurations_are_joined(monkeypatch):
    import datasets
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split: [
        {"problem": f"{path} {name} {split}", "solution": r"\boxed{1}"}])
    asked = [row["queries"][0]["content"].removesuffix(" Let's think step by step.")
             for row in load_rows("math", "test")]
    assert asked == [f"EleutherAI/hendrycks_math {name} test" for name in (
        "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
        "precalculus")]


def test_the_rows_of_a_question_stay_together(tmp_path):
    rows = [{"queries": f"{i % 30}?", "responses": f"Way {i}. The answer is 1.", "groundtruth": "1"} for i in range(90)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parts = [load_rows("jsonl", split, str(tmp_path / "rows.jsonl")) for split in ("train", "validation")]
    assert list(map(len, parts)) == [81, 9]  # of 30 questions 3 validate, each with its 3 rows
    train, validation = ({row["queries"] for row in part} for part in parts)
    assert len(train) == 27 and not train & validation


def test_validation_is_drawn_from_all_over():
    """Not the first rows, and a tenth of every stretch: files may be sorted."""
    rows = [r["queries"] for r in data.cups("train")]
    # always: models of earlier versions were chosen on these rows
    first = load_rows("cups", "validation")[0]["queries"]
    assert first == "The ball is under cup 1. Swaps: 2-5 4-5 2-3 3-5 2-4 3-4. Where is it?"
    assert len({row["queries"] for row in load_rows("cups_base", "validation")}) == 500  # at most
    at = sorted(map(rows.index, (r["queries"] for r in load_rows("cups", "validation"))))
    assert all(10 < sum(begin <= i < begin + 400 for i in at) < 80 for begin in range(0, 4000, 400))


def test_arc_and_math_from_local_copies_in_the_hubs_columns(tmp_path):
    arc = {"question": "What melts?", "choices": {"text": ["ice", "dry ice"], "label": ["1", "2"]}, "answerKey": "2",
           "id": "x"}
    write(tmp_path / "test.jsonl", [arc])
    [row] = load_rows("arc_challenge", "test", str(tmp_path))
    assert row["queries"][0]["content"] == (
        "Question: What melts?\nOptions: ['ice', 'dry ice']\n"
        "Let's think step by step first then print your answer like 'The answer is (one of the options)'.")
    assert row["responses"] == "The answer is dry ice." and row["options"] == ["ice", "dry ice"]
    [direct] = load_rows("arc_challenge_direct", "test", str(tmp_path))
    assert direct["queries"][0]["content"].startswith("The output MUST strictly follow the structure")
    for name in ("arc_challenge", "arc_challenge_direct"):
        assert grade(data.choose_grader("auto", name, [row])[0], "The answer is B.", row) == ("dry ice", True)
    arc["choices"]["text"][1] = "It does."
    write(tmp_path / "test.jsonl", [arc])
    assert [(row["responses"], row["groundtruth"]) for row in load_rows("arc_challenge", "test", str(tmp_path))] == [
        ("The answer is It does.", "It does.")]
    write(tmp_path / "test.jsonl", [{"problem": "p", "solution": r"So $x=\boxed{\frac{1}{2}}$.", "level": "1",
                                     "type": "a"}])
    [row] = load_rows("math", "test", str(tmp_path))
    assert row["rationales"] == r"So $x=\boxed{\frac{1}{2}}$." + "\n"
    assert row["groundtruth"] == r"\frac{1}{2}" and row["responses"] == r"The answer is $\frac{1}{2}$."
    boxes = {r"\boxed{a} or \fbox{3}": "3", r"\boxed 2$": "2", r"\boxed{\{1\}}": r"\{1\}", r"\boxed{1": None, "2": None}
    assert {text: data.last_boxed(text) for text in boxes} == boxes
    write(tmp_path / "train.jsonl",
          [{"question": "1+1?", "answer": "2"}, {"question": "2+2?", "answer": "2+2=4\n#### 4"}])
    assert [row["groundtruth"] for row in load_rows("gsm8k", "all", str(tmp_path / "train.jsonl"))] == ["2", "4"]


def test_all_is_both_parts():
    assert len(load_rows("cups", "all")) == 4500


def test_parquet_through_the_datasets_library(tmp_path, monkeypatch):
    import pandas
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    pandas.DataFrame([{"question": "1+1?",
                       "answer": "2\n#### 2"}] * 3).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    assert [r["groundtruth"] for r in load_rows("gsm8k", "test", str(tmp_path))] == ["2"] * 3
    for name, answer in (("main", "3"), ("socratic", "4")):  # without the README that declares the configurations
        (tmp_path / "hub" / name).mkdir(parents=True)
        pandas.DataFrame([{"question": "1+2?",
                           "answer": f"#### {answer}"}] * 2).to_parquet(tmp_path / f"hub/{name}/test-0.parquet")
    assert [r["groundtruth"] for r in load_rows("gsm8k", "test", str(tmp_path / "hub"))] == ["3"] * 2


def test_a_dataset_is_one_function_and_one_entry(monkeypatch):
    monkeypatch.setitem(data.DATASETS, "mine", (lambda split, path: [
        {"queries": f"{i}+1?", "responses": f"The answer is {i + 1}.", "groundtruth": str(i + 1)} for i in range(20)],
        "number"))
    assert len(load_rows("mine", "train")) == 18


# --- prompts ---------------------------------------------------------------------------------------------------------
LLAMA3 = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
          "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
          "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
MISTRAL = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]"
           "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}")
PHI35 = ("{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}")
QWEN = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# kind: template, special tokens, BOS, EOS, whether the tokenizer itself adds a BOS, end of turn, metaspace
KINDS = {
    "llama3": (LLAMA3, ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                        "<|eot_id|>"],
               "<|begin_of_text|>", "<|end_of_text|>", True, "<|eot_id|>", False),
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>", True, "</s>", True),
    "phi3.5": (PHI35, ["<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"], "<s>", "<|endoftext|>", False,
               "<|end|>", True),
    "qwen": (QWEN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>", False, "<|im_end|>", False),
    "none": (None, ["<s>", "</s>"], "<s>", "</s>", True, "</s>", False),
}


def make_tokenizer(kind):
    template, special, bos, eos, adds_bos, _, metaspace = KINDS[kind]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=metaspace))
    if metaspace:  # as in sentencepiece: a space before the first word of a text
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = tokenizers.decoders.Sequence(
            [tokenizers.decoders.Metaspace(prepend_scheme="first"), tokenizers.decoders.ByteFallback(),
             tokenizers.decoders.Fuse()])
        alphabet = [*map(chr, range(32, 127)), "\n", "▁"]
    else:
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    text = ["The answer is 18. What is two and two? Let's think step by step. user assistant"] * 3
    tokenizer.train_from_iterator(text,
                                  tokenizers.trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    if adds_bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, chat_template=template)


QUERY = [{"role": "user", "content": "What is two and two? Let's think step by step."}]


@pytest.mark.parametrize("kind", KINDS)
def test_templates(kind):
    tokenizer = make_tokenizer(kind)
    template, _, bos, _, _, end, _ = KINDS[kind]
    [example] = make_examples(tokenizer, [{"queries": QUERY, "responses": "The answer is 18.", "groundtruth": "18"}])
    if template:
        expected = tokenizer.apply_chat_template(QUERY, tokenize=True, add_generation_prompt=True)
        assert example.prompt == (expected if isinstance(expected, list) else expected["input_ids"])
    else:
        assert example.prompt == tokenizer(QUERY[0]["content"])["input_ids"]
    assert bos is None or example.prompt.count(tokenizer.bos_token_id) == ("bos_token" in (template or "bos_token"))
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids(end)
    for ids in example.answers:
        assert ids[-1] == tokenizer.convert_tokens_to_ids(end) and ids.count(ids[-1]) == 1
    # x⊕z⊕y is what the whole text tokenises to, whether z ends in white space or not
    decode = decoder(tokenizer)
    for rationale, sep in (("Two and two.", " "), ("Two and two.\n", ""), ("\nTwo", " "), (" Two ", ""), ("", " ")):
        rows = [{"queries": "Q", "responses": "A", "rationales": rationale}]
        [z] = (e.rationale for e in make_examples(tokenizer, rows))
        if not rationale:
            sep = "" if decode(example.prompt)[-1:].isspace() else " "
        y = answer_ids(example, z, decode)
        assert y == example.answers[sep == ""]
        assert decode(example.prompt + z + y[:-1]) == decode(example.prompt) + rationale + sep + "The answer is 18."


@pytest.mark.parametrize("kind", KINDS)
def test_white_space_that_a_response_begins_with_is_kept(kind):
    tokenizer = make_tokenizer(kind)
    rows = [{"queries": "Q", "responses": text} for text in ("\nThe answer is 5.", "\n\n#### 5", "  x", "x", "nd two")]
    for row, example in zip(rows, make_examples(tokenizer, rows)):
        assert decoder(tokenizer)([5] + example.answers[1][:-1])[len(decoder(tokenizer)([5])):] == row["responses"]


def test_a_single_file_has_no_test_rows(tmp_path):
    write(tmp_path / "g.jsonl", [{"question": f"q{i}", "answer": "a #### 1"} for i in range(20)])
    assert len(load_rows("gsm8k", "validation", str(tmp_path / "g.jsonl"))) == 2
    with pytest.raises(UserError, match="single file"):
        load_rows("gsm8k", "test", str(tmp_path / "g.jsonl"))


def test_a_templated_string_gets_no_second_bos():
    tokenizer = make_tokenizer("llama3")
    text = tokenizer.apply_chat_template(QUERY, tokenize=False, add_generation_prompt=True)
    [example] = make_examples(tokenizer, [{"queries": text, "responses": "A", "groundtruth": "A"}])
    assert example.prompt.count(tokenizer.bos_token_id) == 1


def test_a_template_that_ignores_the_assistants_turn_or_breaks():
    tokenizer = make_tokenizer("llama3")
    tokenizer.chat_template = "{{ bos_token }}Question: {{ messages[0]['content'] }}"
    assert end_of_turn_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.chat_template = "{% for %}"
    with pytest.raises(UserError, match="chat template refuses them"):
        make_examples(tokenizer, [{"queries": QUERY, "responses": "A", "groundtruth": "A"}])


def test_smollm2_prompt_keeps_its_end_of_turn_tokens(smollm2, gsm8k):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    row = load_rows("gsm8k", "test", gsm8k)[0]
    [example] = make_examples(tokenizer, [row])
    assert example.prompt.count(tokenizer.eos_token_id) == 2 and example.answers[0][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.prompt).endswith("step by step.<|im_end|>\n<|im_start|>assistant\n")


# special tokens in front and behind, as the tokenizer itself puts them
FRONTS = {"chatglm": "[gMASK] <sop> $A", "xglm": "</s> $A", "nllb": "eng $A </s>", "t5": "$A </s>", "gpt2": "$A"}


@pytest.mark.parametrize("kind", FRONTS)
def test_what_the_tokenizer_puts_in_front_of_a_plain_string(kind):
    """A prompt is tokenizer(text) less a trailing EOS; a string that has it already gets no second one."""
    tokenizer = make_tokenizer("none")
    special = [word for word in FRONTS[kind].split() if word != "$A"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=FRONTS[kind], special_tokens=[(word, tokenizer.convert_tokens_to_ids(word)) for word in special])
    for text in ("a", "What is two and two?", " a", "Let's"):
        [example] = make_examples(tokenizer, [{"queries": text, "responses": "A"}])
        whole = tokenizer(text)["input_ids"]
        assert example.prompt == (whole[:-1] if whole[-1] == tokenizer.eos_token_id else whole)
        given = tokenizer.decode(example.prompt)
        [again] = make_examples(tokenizer, [{"queries": given, "responses": "A"}])
        assert again.prompt == example.prompt


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_a_tokenizer_whose_normaliser_drops_newlines_keeps_the_first_word(scheme):
    """XGLM's kind: "\n" is a space, and a text's first word gets one."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = tokenizers.normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
    text = ["The answer is 18. First two and two."] * 3
    tokenizer.train_from_iterator(text, tokenizers.trainers.BpeTrainer(
        special_tokens=["<unk>", "</s>"], initial_alphabet=[*map(chr, range(33, 127)), "▁"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    decode = decoder(tokenizer)
    for rationale in ("First two and two.", "two", " First", "18"):
        [example] = make_examples(tokenizer, [{"queries": "a", "responses": "The answer is 18.", "rationales": rationale}])
        assert decode(example.prompt + example.rationale).split() == f"a{rationale}".split()
        for spaced, ids in enumerate(example.answers):
            assert decode(example.prompt + ids[:-1]) == ["a The answer is 18.", "aThe answer is 18."][spaced]


def test_an_answer_that_has_begun_goes_on():
    tokenizer = make_tokenizer("qwen")
    for begun in ("Let's think:", "<think>\n"):
        turns = [*QUERY, {"role": "assistant", "content": begun}]
        text = data.prompt_text(tokenizer, turns)
        assert text == data.prompt_text(tokenizer, QUERY) + begun.rstrip() or text.endswith(f"assistant\n{begun}")
    many = [*QUERY, {"role": "assistant", "content": "Four."}, *QUERY]
    assert data.prompt_text(tokenizer, many).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("system", ["Write your ANSWER last.", "ANSWER", "<answer>ANSWER?</answer>"])
def test_the_end_of_turn_of_a_template_that_speaks_of_answers(system):
    tokenizer = make_tokenizer("llama3")
    tokenizer.chat_template = "<|begin_of_text|>" + system + "<|end_of_text|>" + LLAMA3
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|eot_id|>")


def test_prompts_beyond_the_context_are_named():
    with pytest.raises(UserError, match="context"):
        make_examples(make_tokenizer("qwen"), [{"queries": "x" * 300, "responses": "A", "groundtruth": "A"}],
                      context=100)
    row = {"queries": "x" * 90, "responses": "!" * 9, "groundtruth": "A"}
    [example] = make_examples(make_tokenizer("qwen"), [row])
    whole = len(example.prompt) + max(map(len, example.answers))
    assert make_examples(make_tokenizer("qwen"), [row], context=whole) == [example]
    with pytest.raises(UserError, match=f"take {whole} tokens"):
        make_examples(make_tokenizer("qwen"), [row], context=whole - 1)


def test_messages_that_are_none(tmp_path):
    for message in ("text", 5, {"role": "user"}, {"role": "user", "content": ["text"]}):
        write(tmp_path / "my.jsonl", [{"queries": [message], "responses": "A", "groundtruth": "A"}])
        with pytest.raises(UserError, match="row 1: column queries: (no )?column (role|content)"):
            load_rows("jsonl", "all", str(tmp_path / "my.jsonl"))
