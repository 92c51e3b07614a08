"""Every key reaches what it steers, and the figures of an evaluation and of a run are what they say."""
import json
import math
import os
import shutil
import types
import weakref

import pytest
import torch
from conftest import rows
from test_data import make_tokenizer

import data
import evaluate
import latro
from evaluate import interval95, majority, stop_token_ids


def test_stop_token_ids():
    """The end of the turn and the model's own EOS ids always; eos and pad as asked."""
    tokenizer = make_tokenizer("llama3")
    tokenizer.pad_token = "<|start_header_id|>"
    end, eos, pad = (tokenizer.convert_tokens_to_ids(t) for t in ("<|eot_id|>", "<|end_of_text|>", tokenizer.pad_token))
    for own, always in ((None, {end}), (77, {end, 77}), ([77, 78], {end, 77, 78})):
        model = types.SimpleNamespace(generation_config=types.SimpleNamespace(eos_token_id=own))
        for name, asked in (("eos", {eos}), ("pad", {pad}), ("both", {eos, pad})):
            assert stop_token_ids(tokenizer, model, name) == always | asked


def test_majority_and_interval():
    def vote(*predictions):
        return majority([{"prediction": p, "correct": p == "1"} for p in predictions])

    assert vote(None, None, "1") and vote("1", "2") and not vote("2", "1") and not vote("2", "1", "2")
    assert not vote(None, None) and not vote()
    assert interval95(0.5, 10) == pytest.approx([0.23659, 0.76341], abs=1e-5)  # Wilson (1927), without correction
    assert interval95(0.9, 100) == pytest.approx([0.82563, 0.94477], abs=1e-5)
    for n in range(1, 200):  # all right, or all wrong: rounding does not exclude it
        assert interval95(1.0, n)[1] == 1.0 and interval95(0.0, n)[0] == 0.0


def test_gold_responses_that_their_grader_calls_wrong(capsys):
    row = {"responses": "The answer is 5.", "groundtruth": "5"}
    wrong = [row | {"groundtruth": "6"}, row | {"responses": "The answer is fivefold."}]
    options = row | {"options": ["4", "5"], "responses": "The answer is (A)."}
    for rows_, grader, said in (
            ([row, row, row | {"responses": "The answer is five."}], "number", ""), ([row | {"responses": r"The answer is $\frac{10}{2}$."}], "math", ""),
            ([row, *wrong, row], "number", "grader number calls 2 of 4 gold responses wrong; the first is "
                                           "'The answer is 5.', groundtruth '6'"),
            ([options | {"responses": "The answer is (B)."}, options], "option", "calls 1 of 2 .* is (A)")):
        evaluate.check_rows(rows_, grader, None)
        printed = capsys.readouterr().out
        assert not printed if not said else all(part in printed for part in said.split(" .* "))


def test_an_evaluation_is_what_its_options_say(tiny, cups):
    model, tokenizer = tiny
    decode, question = data.decoder(tokenizer), [cups[0], *cups[:5]]  # the first one twice

    def judged(**options):
        settings = evaluate.Settings(**{"response_length": 16, "num_samples": 3, "stop_seqs": [" cup"]} | options)
        return evaluate.evaluate(settings, model, tokenizer, question, "number", 3, "")

    def outputs(result):
        return [[s["output"] for s in row["samples"]] for row in result["rows"]]

    result = judged()
    assert result["rows"][0]["output"] == result["rows"][1]["output"]  # greedy
    assert outputs(result)[0] != outputs(result)[1]  # each row and sample has randomness of its own
    assert len({*outputs(result)[0]}) > 1 and outputs(judged()) == outputs(result) != outputs(judged(seed=1))
    cold = judged(temperature=1e-6)
    assert all(o == row["output"] for row, three in zip(cold["rows"], outputs(cold)) for o in three)
    some = [(s, tokenizer.encode(s["output"])) for row in result["rows"] for s in [row, *row["samples"]]]
    some = [(s, ids) for s, ids in some if decode(ids) == s["output"]]
    for s, ids in some:
        n, _, finished = evaluate.truncate(ids, {2}, [" cup"], decode)
        assert (s["rationale_length"], s["finished"]) == (n, finished or len(ids) < 16)
    assert len(some) > 9 and {(" cup" in s["output"], s["finished"]) for s, _ in some} >= {(True, True), (False, False)}
    for example, row in zip(question, result["rows"]):
        assert row["answer_logprob"] == pytest.approx(sum(s["answer_logprob"] for s in row["samples"]) / 3)
        y = example.answers[0]
        logprobs = model(torch.tensor([example.prompt + y])).logits[0, len(example.prompt) - 1:-1].log_softmax(-1)
        assert row["answer_logprob_no_rationale"] == pytest.approx(logprobs[range(len(y)), y].sum().item(), abs=1e-4)


def test_an_evaluation_that_grades_nothing(tiny, cups):
    """z alone is generated, by training's stop; perplexities are those of all answers' tokens."""
    model, tokenizer = tiny
    settings = evaluate.Settings(response_length=16, num_samples=3, stop_seqs=[" cup"])
    graded, judged = (evaluate.evaluate(settings, model, tokenizer, cups, grader, 3, "") for grader in ("number", "none"))
    assert not {"accuracy", "maj_at_k", "break_even"} & judged.keys() and not {"perplexity"} & graded.keys()
    for name in ("answer_logprob", "answer_logprob_no_rationale", "finished", "rationale_length"):
        assert judged[name] == pytest.approx(graded[name], abs=1e-6)
    cut = 0
    for ours, theirs in zip(judged["rows"], graded["rows"]):
        assert not {"correct", "prediction", "majority"} & ours.keys()
        for a, b in zip([ours, *ours["samples"]], [theirs, *theirs["samples"]]):
            assert b["output"].startswith(a["output"]) and " cup" not in a["output"][:-4]
            cut += a["output"] != b["output"]
    assert cut > 3
    tokens = sum(len(e.answers[0]) for e in cups)
    for end in ("", "_no_rationale"):
        total = sum(row[f"answer_logprob{end}"] for row in judged["rows"])
        assert judged[f"perplexity{end}"] == pytest.approx(2.718281828 ** (-total / tokens))


def test_a_guess_has_its_template_for_free(tiny, cups):
    """log π of the answer behind x and the words that all answers begin with."""
    model, tokenizer = tiny
    result = evaluate.evaluate(evaluate.Settings(response_length=2), model, tokenizer, cups, "number", 0, "")
    for example, row in zip(cups, result["rows"]):
        y = example.answers[0]
        [begun] = tokenizer([" The answer is"], add_special_tokens=False)["input_ids"]
        assert y[:len(begun)] == begun
        ids = torch.tensor([example.prompt + y])
        logprobs = model(ids).logits[0, len(example.prompt) + len(begun) - 1:-1].log_softmax(-1)
        expected = logprobs[range(len(y) - len(begun)), y[len(begun):]].sum().item()
        assert row["guess_logprob"] == pytest.approx(expected, abs=1e-4)
    # without a look at x: by how often the other answers have the same cup, and once more each
    cups_ = [e.row["groundtruth"] for e in cups]
    kinds = len({*cups_})
    expected = sum(math.log(cups_.count(c) / (len(cups_) - 1 + kinds)) for c in cups_) / len(cups_)
    assert evaluate.blind_guess([e.answers[0] for e in cups]) == pytest.approx(expected)


def test_break_even():
    """At the break-even share a rationale's mean log π is a guess's: here by trying shares one by one."""
    def rows(right, wrong, guess, unfinished=0):
        kinds = [(True, -1.0, True, 4)] * right + [(False, -9.0, True, 4)] * wrong + [(True, -30.0, False, 4)] * unfinished
        kinds += [(False, -4.0, True, 0)] * 3
        names = "correct", "answer_logprob", "finished", "rationale_length"
        return [{"guess_logprob": guess, "samples": [dict(zip(names, kind)) for kind in kinds]}]

    for guess in (-5.0, -8.0, -2.0):
        found = evaluate.break_even(rows(3, 7, guess, unfinished=5), -50.0)
        tried = min((abs(share * -1.0 + (1 - share) * -9.0 - guess), share) for share in (i / 1000 for i in range(1001)))
        assert found["right"] == 0.3 and found["break_even"] == pytest.approx(tried[1], abs=1e-3)
        assert (found["logprob_right"], found["logprob_wrong"], found["logprob_guess"]) == (-1, -9, guess)
    assert evaluate.break_even(rows(3, 7, -20.0), -50.0)["break_even"] == 0 and evaluate.break_even(rows(3, 7, -0.5), -50.0)["break_even"] == 1
    # none right, none wrong, none finished; greedy outputs where nothing was sampled
    assert evaluate.break_even(rows(0, 7, -4.5), -50.0)["break_even"] == 0.5 and evaluate.break_even(rows(3, 0, -4.0), -50.0)["break_even"] == 0
    assert evaluate.break_even(rows(0, 0, -4.0, unfinished=3), -50.0)["right"] == 0
    # the likelier of the model's own guess and one without a look at the question
    assert evaluate.break_even(rows(3, 7, -20.0), -5.0) == evaluate.break_even(rows(3, 7, -5.0), -20.0)
    greedy = {"guess_logprob": -3.0, "samples": [], "correct": True, "answer_logprob": -1.0, "finished": True,
              "rationale_length": 3}
    assert evaluate.break_even([greedy], -50.0)["right"] == 1


def test_every_key_of_an_evaluation_arrives(tmp_path, monkeypatch):
    """Keys of the command line, of the run that the model belongs to, and what another dataset leaves out."""
    model, tokenizer = data.embedded_model()
    loaded, judged, asked = [], [], []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_model", lambda *a: loaded.append(a) or (model, tokenizer))
    monkeypatch.setattr(evaluate, "load_rows", lambda *a: asked.append(a) or data.load_rows("cups", "test")[:9])
    monkeypatch.setattr(evaluate, "resolve_dtype", lambda name, device: name)
    real = evaluate.evaluate
    short = evaluate.Settings(response_length=2, num_samples=2)
    monkeypatch.setattr(evaluate, "evaluate", lambda *a: judged.append(a) or real(short, *a[1:]))
    keys = {"dataset_path": "p", "dataset_options": ["a=1"], "grader": "text", "limit": 3, "num_samples": 2, "response_length": 21,
            "temperature": 0.5, "stop_token": "pad", "stop_seqs": [" cup", "x"], "per_device_eval_batch_size": 5,
            "dtype": "bfloat16", "attn_implementation": "eager", "trust_remote_code": True, "seed": 7,
            "date": "2024-02-29"}
    os.makedirs("runs/r/best")
    open("runs/r/metrics.jsonl", "w").close()
    with open("runs/r/config.yaml", "w") as file:
        json.dump({"model_name_or_path": "m", "dataset_name": "jsonl"} | keys, file)
    words = [w for k, v in keys.items() for w in (f"--{k}", *(v if isinstance(v, list) else [str(v)]))]
    elsewhere = ["--model", "best", "--dataset_name", "jsonl", "--split", "validation", *words]
    for argv, split in ((elsewhere, "validation"), (["--model", "runs/r/best"], "test")):
        evaluate.main(argv)
        assert asked.pop() == ("jsonl", split, "p", 0, ["a=1"])
        _, dtype, _, *rest = loaded.pop()
        assert (dtype, *rest) == ("bfloat16", "eager", True, "2024-02-29")
        s, _, _, examples, *rest = judged.pop()
        assert len(examples) == 3 and rest == ["text", 2, "best"]
        assert {k: v for k, v in vars(s).items() if k in keys} == keys
    evaluate.main(["--model", "runs/r/best", "--dataset_name", "gsm8k", "--few_shot", "2", "--split", "train"])
    assert asked.pop() == ("gsm8k", "train", None, 2, []) and judged.pop()[4] == "number"
    loaded.clear()
    evaluate.main(["--model", "runs/r", "--limit", "2"])
    assert [a[0] for a in loaded] == ["m", "runs/r/best"]
    assert sorted(os.listdir("runs/r")) == [
        "best", "config.yaml", "evaluation-base-limit=2.json",
        "evaluation-best-dataset_name=gsm8k-few_shot=2-split=train.json", "evaluation-best-limit=2.json",
        "evaluation-best.json", "metrics.jsonl"]


def test_a_strangers_config_is_not_obeyed(tmp_path, monkeypatch):
    """Settings come from a run's folder only, one with metrics."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("dataset_name: cups\n")
    with pytest.raises(data.UserError, match="dataset_name None: unknown; choose one of"):
        evaluate.main(["--model", "best"])
    with pytest.raises(data.UserError, match="no trained run"):
        evaluate.main([])


def test_the_split_of_a_single_file(tmp_path, monkeypatch):
    """Of a run its validation rows, the others were trained on; of any other model all rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_rows", lambda name, split, *a: asked.append(split) or 1 / 0)
    asked = []
    os.makedirs("runs/r/best")
    for name in ("metrics.jsonl", "my.jsonl"):
        open(name if name == "my.jsonl" else f"runs/r/{name}", "w").close()
    with open("runs/r/config.yaml", "w") as file:
        file.write("model_name_or_path: m\ndataset_name: jsonl\ndataset_path: my.jsonl\n")
    for argv in ([], ["--model", "runs/r"], ["--model", "runs/r/best"], ["--model", "runs/r", "--split", "all"]):
        with pytest.raises(ZeroDivisionError):
            evaluate.main(argv)
    assert asked == ["validation", "validation", "all", "all"]


def test_models_are_evaluated_one_at_a_time(apart, monkeypatch):
    os.makedirs("runs/r")
    shutil.copytree("runs/cups-base/final", "runs/r/best")
    with open("runs/r/config.yaml", "w") as file:
        file.write("model_name_or_path: runs/cups-base/final\ndataset_name: cups\n")
    open("runs/r/metrics.jsonl", "w").close()
    held, load = [], evaluate.load_model

    def loads(*arguments):
        assert not any(model() for model in held)
        model, tokenizer = load(*arguments)
        held.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(evaluate, "load_model", loads)
    evaluate.main(["--limit", "2", "--response_length", "8", "--model", "runs/r"])
    assert len(held) == 2


def test_newest_run(tmp_path, monkeypatch):
    """By time, not by name; the making of the base does not count."""
    monkeypatch.chdir(tmp_path)
    for name, model, age in (("b", "m", 3), ("z", "m", 9), ("cups-base", "embedded", 0)):
        os.makedirs(f"runs/{name}/best")
        for file in ("best/config.json", "config.yaml", "metrics.jsonl"):
            with open(f"runs/{name}/{file}", "w") as out:
                out.write(f"model_name_or_path: {model}\n")
        os.utime(f"runs/{name}/config.yaml", (1e9 - age, 1e9 - age))
    assert str(evaluate.newest_run()) == "runs/b"


def test_data_order():
    """A pure function of the seed and of the prompts consumed: each once an epoch, every epoch in another order."""
    epochs = [latro.prompt_indices(seed, 20 * epoch, 20, 20) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs) and len({*map(tuple, epochs)}) == 3
    assert latro.prompt_indices(0, 15, 10, 20) == epochs[0][15:] + epochs[1][:5]


SHORT = ("--config", "tiny.yaml", "--sanity_check", "true", "--num_samples", "0", "--gradient_accumulation_steps", "1",
         "--per_device_train_batch_size", "8", "--response_length", "8")


def test_every_key_of_training_arrives(apart, monkeypatch):
    seen, drawn, made, whole, generate, set_out = [], [], [], latro.update, latro.generate, latro.set_out
    monkeypatch.setattr(latro, "update", lambda *a: seen.append(a) or whole(*a))
    monkeypatch.setattr(latro, "generate", lambda *a, **k: drawn.append((a, k)) or generate(*a, **k))
    monkeypatch.setattr(latro, "set_out", lambda *a: made.append(set_out(*a)) or made[-1])
    chosen, keys = [], []
    for seed in ("0", "1"):
        latro.main([*SHORT, "--max_steps", "3", "--seed", seed, "--run_name", seed, "--rloo_k", "4", "--stop_token",
                    "both", "--stop_seqs", "Hmm", "--temperature", "0.7", "--rollout_batch_size", "5", "--kl_coef",
                    seed, "--gradient_checkpointing", "true", "--dtype", "bfloat16" if seed == "1" else "float32"])
        chosen += [[e.row["queries"] for e in a[5]] for a in seen]
        keys += [key for a in seen for key in a[6]]
        (policy, reference, *_), *_ = seen
        assert (reference is None) is (seed == "0")  # kl_coef
        optimizer = seen[0][3]
        assert isinstance(optimizer, torch.optim.AdamW) and optimizer.param_groups[0]["weight_decay"] == 0
        (_, prompts, length), options = drawn[0]
        assert len(prompts) == 2 and length == 8 and options["temperature"] == 0.7 and options["batch_size"] == 5
        ended = [options["stop"](seen[0][4].encode(text)) for text in ("3<pad>", "3<eos>", "3 Hmm,", "3 4")]
        assert ended == [True, True, True, False] and options["num_samples"] == 4
        assert made[0][2].dtype == (torch.bfloat16 if seed == "1" else torch.float32)
        layer = latro.decoder_layers(seen[0][2])[0]
        assert getattr(layer.forward, "func", None) is latro.checkpoint
        steps = [row for row in rows(f"runs/{seed}/metrics.jsonl") if "reward" in row]
        assert [row["lr"] for row in steps] == pytest.approx([1.5e-4 * (1 - i / 3) for i in range(3)])
        assert all(0.2 < row["work_ratio"] < 1 for row in steps)
        for calls in (seen, drawn, made):
            calls.clear()
    # the order and the randomness are the seed's and the step's
    assert len({*map(str, chosen)}) == 6 and len({*keys}) == 12


def test_the_best_model_is_that_of_validation(apart, monkeypatch):
    """Of equals the later; judged on validation rows, by training's own settings."""
    accuracies, exported, judged, export, real = iter([0.9, 0.5, 0.2, 0.5, 0.1]), [], [], latro.export, latro.evaluate
    monkeypatch.setattr(latro, "export", lambda folder, *a: exported.append(os.path.basename(folder))
                        or export(folder, *a))

    def fixed(*arguments):
        judged.append(arguments)
        exported.append(len(judged) - 1)
        return real(*arguments) | {"accuracy": next(accuracies)}

    monkeypatch.setattr(latro, "evaluate", fixed)
    latro.main([*SHORT, "--max_steps", "4", "--num_evaluations", "4", "--run_name", "x", "--stop_token", "pad",
                "--stop_seqs", "Hmm", "--per_device_eval_batch_size", "3", "--seed", "5"])
    assert exported == [0, 1, "best", 2, 3, "best", 4, "final"]
    expected = [row["queries"] for row in data.load_rows("cups", "validation")[:4]]
    for settings, _, _, examples, grader, num_samples, *_ in judged:
        assert [e.row["queries"] for e in examples] == expected and grader == "number" and num_samples == 0
        assert (settings.response_length, settings.stop_token, settings.stop_seqs) == (8, "pad", ["Hmm"])
        assert settings.seed == 5 and settings.per_device_eval_batch_size == 3
    assert len(json.load(open("runs/x/evaluation-best.json"))["rows"]) == 4  # sanity_check


def test_a_models_own_code_runs_by_its_key_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in (False, True):
        seen = []
        monkeypatch.setattr(latro, "load_model", lambda *a: seen.append(a) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            latro.main(["--model_name_or_path", "m", "--dataset_name", "cups", "--attn_implementation", "eager",
                        *(["--trust_remote_code", "true"] if key else [])])
        assert seen[0][0] == "m" and seen[0][3:5] == ("eager", key)


def test_limit_and_sanity_check():
    model, tokenizer = data.embedded_model()
    for keys, sizes in (({"limit": 7}, [3600, 7, 7]), ({"sanity_check": True}, [16, 4, 4])):
        config = latro.Config(dataset_name="cups", response_length=24, **keys)
        splits, grader = latro.load_splits(config)
        assert [*map(len, splits)] == sizes and grader == "number"
        assert [*map(len, latro.tokenise_splits(config, splits, model, tokenizer))] == sizes[:2]


def test_nine_in_a_row_are_forgiven(apart, monkeypatch):
    right, calls = latro.rollout_rewards, []

    def often_nan(*arguments):
        calls.append(1)
        return right(*arguments) * (1.0 if len(calls) % 10 == 0 else float("nan"))

    monkeypatch.setattr(latro, "rollout_rewards", often_nan)
    latro.main([*SHORT, "--max_steps", "20", "--num_evaluations", "1", "--run_name", "x"])
    assert [row["skipped"] for row in rows("runs/x/metrics.jsonl") if "reward" in row] == ([1] * 9 + [0]) * 2
