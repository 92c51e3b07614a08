"""A real model on real data, end to end: SmolLM2-135M-Instruct and GSM8K."""
import json

import pytest
import torch
from conftest import rows, script
from test_run import assert_plain_transformers_answers, check_run
from transformers import AutoModelForCausalLM, AutoTokenizer

import data


@pytest.fixture(scope="session")
def smol_run(tmp_path_factory, smollm2, gsm8k):
    folder = tmp_path_factory.mktemp("smol")
    for objective, size in (("latro", 4), ("sft", 1)):
        script("latro.py", "--model_name_or_path", smollm2, "--dataset_name", "gsm8k", "--dataset_path", gsm8k,
               "--per_device_train_batch_size", size, "--gradient_accumulation_steps", 2, "--rloo_k", 4, "--max_steps",
               2, "--response_length", 64 if objective == "latro" else 16, "--sanity_check", "true",
               "--num_evaluations", 1, "--objective", objective, "--run_name", objective, cwd=folder)
    return folder


def test_real_model_and_data(smol_run, smollm2, gsm8k):
    updates, _ = check_run(f"{smol_run}/runs/latro", 2)
    assert all(r["work_ratio"] <= 0.80 for r in updates)
    exported, start = (AutoModelForCausalLM.from_pretrained(path) for path in (f"{smol_run}/runs/latro/final", smollm2))
    assert exported.dtype == start.dtype == torch.bfloat16
    changed = sum((a != b).sum().item() for a, b in zip(exported.parameters(), start.parameters(), strict=True))
    assert changed > 0
    tokenizer = AutoTokenizer.from_pretrained(f"{smol_run}/runs/latro/final")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(smollm2).chat_template
    printed = script("evaluate.py", "--model", "runs/latro/final", "--dataset_name", "gsm8k", "--dataset_path", gsm8k,
                     "--limit", 8, "--num_samples", 4, "--dtype", "float32", cwd=smol_run)
    assert "maj@4" in printed
    result = json.load(open(f"{smol_run}/runs/latro/evaluation-final-limit=8-num_samples=4-dtype=float32.json"))
    assert {"model", "dataset", "split", "n", "num_samples", "accuracy", "accuracy_ci95", "maj_at_k", "maj_at_k_ci95",
            "answer_logprob", "answer_logprob_no_rationale", "finished", "rationale_length", "rows"} <= result.keys()
    assert result["n"] == 8 and [r["groundtruth"] for r in result["rows"]] == [
        r["groundtruth"] for r in data.load_rows("gsm8k", "test", gsm8k)[:8]]
    for row in result["rows"]:
        assert {"query", "groundtruth", "output", "prediction", "correct", "answer_logprob", "samples"} <= row.keys()
        assert len(row["samples"]) == 4
        assert row["answer_logprob"] == pytest.approx(sum(s["answer_logprob"] for s in row["samples"]) / 4)
    assert_plain_transformers_answers(f"{smol_run}/runs/latro/final", result["rows"][:3], 64)


def test_sft_trains_on_the_gold_rationales(smol_run, gsm8k):
    updates, _ = check_run(f"{smol_run}/runs/sft", 2)
    assert all(r["kl"] is None and r["generate_s"] < 1 for r in updates)
    gold = {r["rationales"] for r in data.load_rows("gsm8k", "train", gsm8k)}
    assert all(r["rationale"] in gold and r["response"].startswith("The answer is ")
               for r in rows(f"{smol_run}/runs/sft/samples.jsonl"))


def test_a_task_of_reasoning_gym(smollm2, tmp_path):
    """The model's own answers are graded by the task's scorer, and it trains."""
    printed = script("latro.py", "--model_name_or_path", smollm2, "--dataset_name", "reasoning_gym:chain_sum",
                     "--dataset_options", "size=40", "max_terms=2", "max_digits=1", "--max_steps", 1, "--limit", 12,
                     "--num_evaluations", 1, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1,
                     "--response_length", 64, "--run_name", "gym", cwd=tmp_path)
    assert "greedy accuracy" in printed and "rationales" in printed
    check_run(f"{tmp_path}/runs/gym", 1)
    result = json.load(open(f"{tmp_path}/runs/gym/evaluation-base.json"))
    assert result["accuracy"] > 0
    for row in result["rows"]:
        assert row["correct"] == (row["prediction"] == row["groundtruth"])
