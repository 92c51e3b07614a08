"""The scripts as users run them: the embedded default, two ranks, a user's JSONL, and a real model on real data."""
import glob
import json
import math
import os
import shutil

import pytest
import torch
import yaml
from conftest import rows, script
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import evaluate
import latro

STEP_KEYS = {"step", "epoch", "reward", "answer_logprob", "kl", "finished", "rationale_length", "policy_loss",
             "sft_loss", "grad_norm", "lr", "skipped", "generate_s", "score_s", "train_s", "step_s", "tokens_per_s",
             "work_ratio", "stop_in_answer", "sampling_gap"}
EVALUATION_KEYS = {"step", "split", "n", "accuracy", "answer_logprob", "answer_logprob_no_rationale",
                   "rationale_length", "finished"}


def check_run(run, steps):
    """Every file of a finished run is there, every metric, and all are finite."""
    metrics = rows(f"{run}/metrics.jsonl")
    updates, evaluations = ([r for r in metrics if ("split" in r) is kind] for kind in (False, True))
    assert [r["step"] for r in updates] == list(range(1, steps + 1))
    assert evaluations[0]["step"] == 0 and evaluations[-1]["step"] == steps
    for row, keys in [(r, STEP_KEYS) for r in updates] + [(r, EVALUATION_KEYS) for r in evaluations]:
        assert row.keys() == keys
        unmeasured = {k for k, v in row.items() if v is None}
        sft = keys is STEP_KEYS and "objective: sft\n" in open(f"{run}/config.yaml").read()
        assert unmeasured == ({"kl", "sampling_gap"} if sft else set())
        assert all(math.isfinite(v) for k, v in row.items() if k not in {"split", *unmeasured})
    assert {os.path.basename(p) for p in glob.glob(f"{run}/*")} >= {
        "config.yaml", "metrics.jsonl", "samples.jsonl", "curves.png", "best", "final"}
    assert not glob.glob(f"{run}/*.partial")
    return updates, evaluations


def assert_plain_transformers_answers(folder, evaluated, length):
    """What transformers alone makes of the folder says, greedily, what evaluate.py says that it does."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row in evaluated:
        ids = tokenizer(row["query"], add_special_tokens=False, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=length, do_sample=False)[0, ids["input_ids"].shape[1]:].tolist()
        out = out[:-1] if out[-1] == tokenizer.eos_token_id else out
        assert tokenizer.decode(out) == row["output"]


def test_default_learns_to_track(default_run):
    _, run, printed = default_run
    updates, evaluations = check_run(run, 40)
    base, best = (json.load(open(f"{run}/evaluation-{name}.json")) for name in ("base", "best"))
    assert (base["model"], best["model"]) == ("runs/cups-base/final", f"runs/{os.path.basename(run)}/best")
    assert base["n"] == best["n"] == 500 and base["split"] == "test"
    assert base["accuracy"] <= 0.30 and best["accuracy"] >= 0.97
    assert base["rationale_length"] < 2 and 11 < best["rationale_length"] < 14
    assert best["maj_at_k"] >= 0.97 and best["answer_logprob"] > base["answer_logprob"] + 0.5
    assert best["accuracy_ci95"][0] < best["accuracy"] <= best["accuracy_ci95"][1]
    assert "greedy accuracy" in printed and "maj@8" in printed
    assert updates[-1]["kl"] > 0.1 > updates[0]["kl"] and updates[-1]["reward"] > updates[0]["reward"] + 0.5
    assert sum(r["work_ratio"] for r in updates) / len(updates) <= 0.60
    assert max(r["sampling_gap"] for r in updates) < 1e-3
    assert evaluations[-1]["accuracy"] >= 0.97 and len(evaluations) == 21
    assert_plain_transformers_answers(f"{run}/best", best["rows"][:10], 24)


def test_bfloat16_learns_as_well(base, tmp_path):
    shutil.copytree(base / "runs/cups-base", tmp_path / "runs/cups-base")
    script("latro.py", "--config", "tiny.yaml", "--dtype", "bfloat16", "--run_name", "bf16",
           "--num_evaluations", 1, "--num_samples", 0, "--limit", 100, cwd=tmp_path)
    result = json.load(open(f"{tmp_path}/runs/bf16/evaluation-best.json"))
    assert result["accuracy"] >= 0.97 and result["n"] == 100
    assert [r["n"] for r in rows(f"{tmp_path}/runs/bf16/metrics.jsonl") if "split" in r] == [100, 100]


def test_auto_is_bfloat16_where_it_is_native(monkeypatch):
    for capabilities, expected in (({"amx_bf16": True}, torch.bfloat16), ({"bf16": True}, torch.bfloat16),
                                   ({"avx512_bf16": False}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        assert evaluate.resolve_dtype("auto", torch.device("cpu")) == expected
        assert evaluate.resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
        assert evaluate.resolve_dtype("float32", torch.device("cuda")) == torch.float32
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in torch 2.11
    assert evaluate.resolve_dtype("auto", torch.device("cpu")) == torch.float32


def test_run_directory_reproduces_the_run(default_run):
    _, run, _ = default_run
    with open(f"{run}/config.yaml") as file:
        text = file.read()
    assert yaml.safe_load(text)["rloo_k"] == 8 and f"torch {torch.__version__}" in text.splitlines()[0]
    samples = rows(f"{run}/samples.jsonl")
    assert [sum(r["step"] == step for r in samples) for step in (1, 2, 39, 40)] == [128, 8, 8, 128]
    tokenizer = AutoTokenizer.from_pretrained(f"{run}/best")
    for row in samples[:20]:
        assert tokenizer.decode(row["ids"][:row["z_start"]]) == row["query"]
        assert tokenizer.decode(row["ids"][row["z_start"]:row["y_start"]]) == row["rationale"]
        assert tokenizer.decode(row["ids"][row["y_start"]:]) == row["response"]


def test_logged_figures_are_those_of_plain_transformers(default_run):
    folder, run, _ = default_run
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/runs/cups-base/final", dtype=torch.float32)
    groups = [r for r in rows(f"{run}/samples.jsonl") if r["step"] == 1]
    for row in groups:
        ids, z, y = row["ids"], row["z_start"], row["y_start"]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        answer = sum(logprobs[i - 1, ids[i]].item() for i in range(y, len(ids)))
        rationale = sum(logprobs[z - 1 + i, token].item() for i, token in enumerate(row["actions"]))
        assert row["answer_logprob"] == pytest.approx(answer, abs=1e-4)
        assert row["rationale_logprob"] == pytest.approx(rationale, abs=1e-4)
        assert row["ref_rationale_logprob"] == pytest.approx(rationale, abs=1e-4)
        assert row["reward"] == pytest.approx(answer, abs=1e-4)
    for i in range(0, len(groups), 8):
        rewards = [r["reward"] for r in groups[i:i + 8]]
        for row in groups[i:i + 8]:
            assert row["advantage"] == pytest.approx(row["reward"] - (sum(rewards) - row["reward"]) / 7, abs=1e-6)


def test_evaluate_without_arguments_shows_the_newest_run(default_run):
    folder, run, _ = default_run
    before = json.load(open(f"{run}/evaluation-best.json"))
    printed = script("evaluate.py", cwd=folder)
    assert "base" in printed and "best" in printed and "500 questions" in printed and "100.0%" in printed
    script("evaluate.py", "--limit", 3, cwd=folder)
    assert json.load(open(f"{run}/evaluation-best-limit=3.json"))["n"] == 3
    assert json.load(open(f"{run}/evaluation-best.json")) == before  # the evaluator of training is this one
    written = evaluate.settle(latro.Config, evaluate.read_yaml(f"{run}/config.yaml"))
    assert latro.load_config(["--config", f"{run}/config.yaml"]) == written and written.run_name == os.path.basename(run)


def test_sft_on_answers_does_not_unlock_it(default_run):
    folder, _, _ = default_run
    printed = script("latro.py", "--config", "tiny.yaml", "--objective", "sft", "--run_name", "sft",
                     "--num_evaluations", 1, "--max_steps", 40, cwd=folder)
    assert "greedy accuracy" in printed
    check_run(f"{folder}/runs/sft", 40)
    assert json.load(open(f"{folder}/runs/sft/evaluation-best.json"))["accuracy"] <= 0.40


def test_two_ranks_do_what_one_does(default_run):
    folder, run, _ = default_run
    script("latro.py", "--config", "tiny.yaml", "--gradient_accumulation_steps", 2, "--max_steps", 40,
           "--num_evaluations", 1, "--run_name", "two", cwd=folder, ranks=2)
    updates, evaluations = check_run(f"{folder}/runs/two", 40)
    alone = [r for r in rows(f"{run}/metrics.jsonl") if "reward" in r]
    for key in STEP_KEYS - {"grad_norm"}:  # the first update sees the same prompts and the same randomness
        if not key.endswith("_s") and key != "work_ratio":
            assert updates[0][key] == pytest.approx(alone[0][key], rel=1e-4, abs=1e-5), key
    assert updates[0]["grad_norm"] == pytest.approx(alone[0]["grad_norm"], rel=1e-3)
    best = json.load(open(f"{folder}/runs/two/evaluation-best.json"))
    assert best["accuracy"] >= 0.97 and best["n"] == 500 and len(best["rows"]) == 500
    assert [r["query"] for r in best["rows"]] == [r["queries"] for r in data.load_rows("cups", "test")]


def test_paragraphs_train_without_a_grader(default_run):
    """No accuracy: perplexity is reported, and the best model is that of the highest log π(y|x⊕z)."""
    folder, _, _ = default_run
    with open(f"{folder}/paragraphs.jsonl", "w") as file:
        for row in data.load_rows("cups", "train")[:30]:
            file.write(json.dumps({"queries": row["queries"], "responses": f"{row['responses']} " * 9}) + "\n")
    printed = script("latro.py", "--model_name_or_path", f"{folder}/runs/cups-base/final", "--dataset_name", "jsonl",
                     "--dataset_path", "paragraphs.jsonl", "--run_name", "paragraphs", "--max_steps", 6,
                     "--num_evaluations", 3, "--response_length", 20, "--learning_rate", "3e-4", cwd=folder)
    assert "grader: none, since no row has a groundtruth" in printed and "there is no accuracy" in printed
    assert "perplexity of y per token" in printed and "accuracy" not in printed.split("3 questions")[1]
    run = f"{folder}/runs/paragraphs"
    metrics = rows(f"{run}/metrics.jsonl")
    evaluations = [row for row in metrics if "split" in row]
    judged = EVALUATION_KEYS - {"accuracy"} | {"perplexity", "perplexity_no_rationale"}
    assert [row.keys() for row in evaluations] == [judged] * 4
    best, tried = (json.load(open(f"{run}/evaluation-{name}.json")) for name in ("best", "base"))
    assert best["answer_logprob"] == pytest.approx(max(row["answer_logprob"] for row in evaluations[1:]), abs=1e-3)
    assert best["perplexity"] < tried["perplexity"] and "The answer is" in best["rows"][0]["groundtruth"]
    assert os.path.exists(f"{run}/curves.png")


def test_a_task_of_reasoning_gym_on_a_small_model(default_run):
    folder, _, _ = default_run
    printed = script("latro.py", "--config", "tiny.yaml", "--dataset_name", "reasoning_gym:chain_sum",
                     "--dataset_options", "size=100", "max_terms=3", "--max_steps", 2, "--num_evaluations", 1,
                     cwd=folder)
    assert "greedy accuracy" in printed
    [run] = glob.glob(f"{folder}/runs/reasoning_gym-chain_sum-latro-*")
    check_run(run, 2)
    assert len(json.load(open(f"{run}/evaluation-best.json"))["rows"]) == 100
    assert "100 questions" in script("evaluate.py", "--model", f"{run}/best", "--num_samples", 0, cwd=folder)


def test_own_jsonl_trains_and_evaluates(default_run):
    folder, _, _ = default_run
    with open(f"{folder}/my.jsonl", "w") as file:
        for row in data.load_rows("cups", "train")[:20]:
            file.write(json.dumps({k: row[k] for k in ("queries", "responses", "groundtruth")}) + "\n")
    base = f"{folder}/runs/cups-base/final"
    script("latro.py", "--model_name_or_path", base, "--dataset_name", "jsonl", "--dataset_path", "my.jsonl",
           "--run_name", "own", "--max_steps", 3, "--response_length", 20, "--learning_rate", "3e-4",
           "--num_evaluations", 1, cwd=folder)
    updates, evaluations = check_run(f"{folder}/runs/own", 3)
    assert evaluations[0]["n"] == 2 and updates[0]["epoch"] == pytest.approx(8 / 18)
    printed = script("evaluate.py", "--model", "runs/own/final", cwd=folder)
    assert "20 questions" in printed
    assert json.load(open(f"{folder}/runs/own/evaluation-final-split=all.json"))["split"] == "all"
    assert "holds a run already" in script("latro.py", "--model_name_or_path", base, "--dataset_name", "jsonl",
                                           "--dataset_path", "my.jsonl", "--run_name", "own", "--response_length", 20,
                                           cwd=folder, code=2)
