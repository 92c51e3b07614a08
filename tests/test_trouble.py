"""Numerical trouble, determinism, and what must never reach the run directory."""
import glob
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, rows, script
from safetensors.torch import load_file

import latro

SHORT = ("--config", "tiny.yaml", "--max_steps", 6, "--num_evaluations", 2, "--num_samples", 0, "--sanity_check",
         "true")
ONE_PASS = ("--gradient_accumulation_steps", "1", "--per_device_train_batch_size", "16")


def weights(run):
    return load_file(f"{run}/final/model.safetensors")


def steps(run):
    return [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows(f"{run}/metrics.jsonl")
            if "split" not in row]


def test_two_runs_are_one(base):
    """Same seed, same machine: the same bytes, timings aside; and evaluating more often changes no training step."""
    for name, evaluations in (("once", 2), ("again", 2), ("often", 6)):
        script("latro.py", *SHORT, "--num_evaluations", evaluations, "--run_name", name, cwd=base)
    once, again, often = (f"{base}/runs/{name}" for name in ("once", "again", "often"))
    read = [[{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows(f"{run}/metrics.jsonl")]
            for run in (once, again)]
    assert read[0] == read[1] and open(f"{once}/samples.jsonl").read() == open(f"{again}/samples.jsonl").read()
    assert steps(once) == steps(often)
    for run in (again, often):
        assert all(torch.equal(a, b) for a, b in zip(weights(once).values(), weights(run).values(), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_that_are_not_finite_are_skipped_and_counted(base, monkeypatch, dtype):
    """The third and fourth updates have a loss that is not finite: the weights stay, and the run goes on."""
    monkeypatch.chdir(base)
    loss, calls = latro.latro_loss, []

    def sometimes_infinite(*arguments):
        calls.append(1)
        policy_loss, sft_loss = loss(*arguments)
        return policy_loss * (float("inf") if len(calls) in (3, 4) else 1), sft_loss

    monkeypatch.setattr(latro, "latro_loss", sometimes_infinite)
    latro.main([*map(str, SHORT), *ONE_PASS, "--dtype", dtype, "--run_name", f"trouble-{dtype}"])
    updates = steps(f"runs/trouble-{dtype}")
    assert [row["skipped"] for row in updates] == [0, 0, 1, 1, 0, 0]
    assert all(math.isfinite(row["grad_norm"]) for row in updates if not row["skipped"])
    assert updates[2]["policy_loss"] is None and updates[2]["sft_loss"] is not None
    assert all(w.isfinite().all() for w in weights(f"runs/trouble-{dtype}").values())


@pytest.mark.parametrize("where", ["reward", "gradient"])
def test_ten_in_a_row_end_the_run(base, monkeypatch, where):
    monkeypatch.chdir(base)
    place, name = {"reward": (latro, "rollout_rewards"), "gradient": (latro, "clip_grad_norm_")}[where]
    right, calls = getattr(place, name), []

    def nan_from_the_third_on(*arguments):
        calls.append(1)
        return right(*arguments) * (float("nan") if len(calls) > 2 else 1.0)

    monkeypatch.setattr(place, name, nan_from_the_third_on)
    run = f"runs/end-{where}"
    with pytest.raises(FloatingPointError, match="step 12: ten updates in a row"):
        latro.main([*map(str, SHORT), *ONE_PASS, "--max_steps", "40", "--num_evaluations", "20", "--run_name",
                    f"end-{where}"])
    assert [row["skipped"] for row in steps(run)] == [0, 0] + [1] * 10
    assert all(w.isfinite().all() for w in load_file(f"{run}/best/model.safetensors").values())


def test_no_secret_reaches_the_run_or_the_screen(base, monkeypatch):
    secrets = {"HF_TOKEN": "hf_planted0token", "WANDB_API_KEY": "planted0wandb0key", "MY_PASSWORD": "planted0password"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    printed = script("latro.py", *SHORT, "--max_steps", 1, "--num_evaluations", 1, "--run_name", "secret", cwd=base)
    texts = [printed.encode()] + [open(path, "rb").read()
                                  for path in glob.glob(f"{base}/runs/secret/**", recursive=True)
                                  if os.path.isfile(path)]
    assert len(texts) > 10 and not any(value.encode() in text for value in secrets.values() for text in texts)


def test_nothing_unpickles_or_trusts():
    """Weights are safetensors, YAML makes nothing but text, and a model's own code runs by an explicit key only."""
    sources = {name: open(os.path.join(os.path.dirname(latro.__file__), name)).read()
               for name in ("data.py", "evaluate.py", "latro.py")}
    for text in sources.values():
        assert not any(word in text for word in ("torch.load", "trust_remote_code=True", "pickle"))
        assert text.count("yaml.load") == text.count("yaml.BaseLoader")
    assert "use_safetensors=True" in sources["evaluate.py"]
    assert latro.Config().trust_remote_code is False


def test_an_interrupted_making_of_the_base_begins_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = []

    def interrupted(config, directory, *rest):
        made.append(directory)
        (tmp_path / directory / "config.yaml").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(latro, "train", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            latro.main([])
    assert made == ["runs/cups-base"] * 2 and not os.path.exists("runs/cups-base/final")


def test_an_error_on_one_rank_ends_all_with_its_traceback(tmp_path):
    """Also where the end of the process group waits for the other ranks, as NCCL's does."""
    (tmp_path / "one_fails.py").write_text("""
import time
import torch.distributed as dist
from evaluate import gather, init_distributed, rank, run_script

def main(argv):
    init_distributed()
    if rank() == 1:
        raise RuntimeError("this rank alone")
    gather([0])

dist.destroy_process_group = lambda: time.sleep(300)
run_script(main)
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               tmp_path / "one_fails.py"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}, capture_output=True,
                          text=True, timeout=100)
    assert done.returncode == 1 and "RuntimeError: this rank alone" in done.stderr
