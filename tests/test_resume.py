"""Checkpoints, preemption, sharding over ranks and nodes, and the plan."""
import glob
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import pytest
import torch
from conftest import ROOT, rows, script
from kill import RUN, kill, kill_and_continue, remains, start
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import data
import evaluate
import latro
from evaluate import init_distributed

STEPS = 24


def damage(run):
    """Cut the newest checkpoint's tensors short."""
    newest = latro.checkpoints(run)
    if newest:
        path = glob.glob(f"{newest[0]}/*.distcp")[0]
        os.truncate(path, os.path.getsize(path) - 1)


def test_killed_at_random_and_continued(base):
    """Three kills, the newest checkpoint damaged after the second: the same bytes as a run that nothing happened to."""
    calls = []
    undisturbed, killed = kill_and_continue(
        str(base), 3, random.Random(0), before_continuing=lambda run: calls.append(1) or len(calls) == 2
        and damage(run))
    assert undisturbed == killed
    assert len(undisturbed[0]) == STEPS + 5
    assert len(latro.checkpoints(f"{base}/runs/killed")) == 2  # save_total_limit
    assert not glob.glob(f"{base}/runs/killed/**/*.partial", recursive=True)


def test_a_damaged_checkpoint_is_named_and_skipped(base):
    run = f"{base}/runs/undisturbed"
    before = remains(run)
    for name in ("best", "final"):
        shutil.rmtree(f"{run}/{name}")
    newest, older = latro.checkpoints(run)
    damage(run)
    printed = script("latro.py", *RUN, "--run_name", "undisturbed", cwd=base)
    assert f"warning: runs/undisturbed/checkpoints/{os.path.basename(newest)} is damaged and skipped" in printed
    assert remains(run) == before
    assert "finished already" in script("latro.py", *RUN, "--run_name", "undisturbed", cwd=base)
    with open(f"{older}/state.json", "w"):
        pass
    printed = script("latro.py", *RUN, "--run_name", "other", "--checkpoint_path", older, cwd=base, code=2)
    assert f"checkpoint_path {older}: no whole checkpoint" in printed


def test_a_checkpoint_of_another_model_is_an_error(tmp_path):
    """And nothing of the run is overwritten."""
    def start(width):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(
            "llama", vocab_size=60, hidden_size=width, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4))

    def side(model):
        policy = latro.Scorer(model)
        return policy, torch.optim.AdamW(policy.parameters(), fused=True)

    device = init_distributed()
    for name in latro.LOGS:
        (tmp_path / name).touch()
    _, state = latro.find_checkpoint(tmp_path, None)
    state.step = 3
    latro.save_checkpoint(tmp_path, *side(start(32)), state, 1)
    latro.load_checkpoint(f"{tmp_path}/checkpoints/step-3", *side(start(32)))
    (tmp_path / "config.yaml").write_text("of the run")
    found = latro.find_checkpoint(tmp_path, "latest")
    assert found == (f"{tmp_path}/checkpoints/step-3", state)
    config = latro.Config(checkpoint_path="latest", run_name=tmp_path.name, dtype="float32")
    with pytest.raises(data.UserError, match="checkpoint_path .*/step-3: does not fit the model"):
        latro.train(config, str(tmp_path), start(64), None, [], [], device, *found)
    assert (tmp_path / "config.yaml").read_text() == "of the run"


def test_what_gets_no_gradient_has_no_moments_in_a_checkpoint(tmp_path):
    """Such as the vision tower of Gemma 3."""
    def start():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
            "llama", vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4))
        model.unused = torch.nn.Parameter(torch.randn(3))
        return latro.Scorer(model), torch.optim.AdamW(model.parameters(), fused=True)

    init_distributed()
    (policy, optimizer), (fresh, other) = start(), start()
    for parameter in policy.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter is not policy.model.unused else None
    optimizer.step()
    for name in latro.LOGS:
        (tmp_path / name).touch()
    latro.save_checkpoint(tmp_path, policy, optimizer, types.SimpleNamespace(step=1), 1)
    latro.load_checkpoint(f"{tmp_path}/checkpoints/step-1", fresh, other)
    for mine, loaded in zip(policy.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(mine, loaded)
        assert all(torch.equal(value, other.state[loaded][name]) for name, value in optimizer.state[mine].items())


BY_EPOCHS = ("--model_name_or_path", "runs/cups-base/final", "--dataset_name", "cups", "--sanity_check", "true",
             "--rloo_k", "2", "--per_device_train_batch_size", "4", "--num_train_epochs", "3", "--learning_rate",
             "1e-4", "--response_length", "8", "--num_evaluations", "2", "--save_steps", "1", "--save_total_limit",
             "99", "--dtype", "float32")


def test_a_run_by_epochs_continues_with_another_batch(apart):
    """As on another number of ranks: it ends after as many prompts, the learning rate goes on where it was, and the
    step whose evaluation was cut off is evaluated again."""
    for accumulation in ("2", "4"):  # 4 prompts a step, then 8
        latro.main([*BY_EPOCHS, "--run_name", "x[1]", "--checkpoint_path", "latest", "--gradient_accumulation_steps",
                    accumulation])
        if accumulation == "2":
            assert len(latro.checkpoints("runs/x[1]")) == 12
            for path in ["runs/x[1]/final", *latro.checkpoints("runs/x[1]")[:6]]:
                shutil.rmtree(path)
    metrics = rows("runs/x[1]/metrics.jsonl")
    assert [row["step"] for row in metrics if "split" in row] == [0, 6, 9]
    steps = [row for row in metrics if "reward" in row]
    ends = [row["epoch"] for row in steps]
    assert ends == [i / 4 for i in range(1, 7)] + [2.0, 2.5, 3.0]
    assert [row["lr"] for row in steps] == pytest.approx([1e-4 * (1 - begin / 3) for begin in [0, *ends[:-1]]])


def test_going_on_from_a_chosen_checkpoint(apart, monkeypatch):
    """Back in the same run: what came later goes at once, its end too. In another run: it gets a best model of its own,
    though nothing beats the first run's, and also where no step is left. A copy that a user made is no checkpoint."""
    latro.main([*BY_EPOCHS, "--run_name", "x", "--max_steps", "4"])
    shutil.copytree("runs/x/checkpoints/step-1", "runs/x/checkpoints/step-1-copy")
    back = [*BY_EPOCHS, "--run_name", "x", "--checkpoint_path", "./runs/x/checkpoints/step-2", "--max_steps", "3"]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(latro, "update", lambda *arguments: 1 / 0)
        latro.main(back)
    assert sorted(os.listdir("runs/x/checkpoints")) == ["step-1", "step-1-copy", "step-2"]
    assert sorted(os.listdir("runs/x")) == ["best", "checkpoints", "config.yaml", "curves.png", "metrics.jsonl",
                                            "samples.jsonl"]
    latro.main([*back, "--save_total_limit", "2"])
    assert sorted(os.listdir("runs/x/checkpoints")) == ["step-1-copy", "step-2", "step-3"]
    assert [row["step"] for row in rows("runs/x/metrics.jsonl")] == [0, 1, 2, 2, 3, 3]
    assert os.path.exists("runs/x/final")
    state = json.load(open("runs/x/checkpoints/step-3/state.json"))
    json.dump(state | {"best": 2.0}, open("runs/x/checkpoints/step-3/state.json", "w"))
    for name, steps in (("y", "4"), ("z", "2")):
        latro.main([*BY_EPOCHS, "--run_name", name, "--checkpoint_path", "runs/x/checkpoints/step-3", "--max_steps",
                    steps])
        assert os.path.exists(f"runs/{name}/best") and os.path.exists(f"runs/{name}/evaluation-best.json")
    # another run's checkpoint does not go on here
    with pytest.raises(data.UserError, match="runs/x: holds a run already"):
        latro.main([*BY_EPOCHS, "--run_name", "x", "--checkpoint_path", "runs/y/checkpoints/step-4"])
    assert len(rows("runs/x/metrics.jsonl")) == 6


def test_steps_of_epochs():
    """Every prompt once: the last step of the last epoch is made too, and what was consumed is not made again."""
    config = latro.Config(num_train_epochs=2.0)
    cases = (16, 8), (17, 8), (17, 16), (1, 64), (17, 8, 3, 24)
    assert [config.total_steps(*case) for case in cases] == [4, 5, 3, 1, 5]
    assert latro.Config(num_train_epochs=1.0, max_steps=99).total_steps(16, 8) == 99


def test_the_best_model_so_far_outlives_a_full_disk(apart, monkeypatch):
    """While the next one is written the old one is whole; afterwards nothing else is left of it."""
    save, calls = latro.transformers.PreTrainedModel.save_pretrained, []

    def full(*arguments, **options):
        calls.append(load_file("runs/x/best/model.safetensors") if calls else None)
        if len(calls) == 3:
            raise OSError("No space left on device")
        save(*arguments, **options)

    monkeypatch.setattr(latro.transformers.PreTrainedModel, "save_pretrained", full)
    real, right = latro.evaluate, iter([0.0, 0.1, 0.2, 0.3])
    monkeypatch.setattr(latro, "evaluate", lambda *a, **k: real(*a, **k) | {"accuracy": next(right)})
    with pytest.raises(data.UserError, match="best: cannot be written"):
        latro.main([*BY_EPOCHS, "--run_name", "x", "--max_steps", "3", "--num_evaluations", "3"])
    assert len(calls) == 3 and load_file("runs/x/best/model.safetensors").keys() == calls[2].keys()
    assert sorted(os.listdir("runs/x")) == ["best", "checkpoints", "config.yaml", "curves.png", "metrics.jsonl",
                                            "samples.jsonl"]


def test_one_job_at_a_time(apart):
    other = latro.lock("runs/x", None, False)
    arguments = [*BY_EPOCHS, "--run_name", "x", "--max_steps", "1", "--checkpoint_path", "latest"]
    with pytest.raises(data.UserError, match="runs/x: another process writes to it; stop it, or give another run_name"):
        latro.main(arguments)
    assert os.listdir("runs/x") == ["metrics.jsonl"]
    other.close()
    latro.main(arguments)
    assert os.path.exists("runs/x/final")


def test_a_full_disk_while_a_checkpoint_is_written(base):
    """One line, and nothing half written is left. Files of more than 4 MB cannot be written; weights are smaller."""
    done = subprocess.run(["bash", "-c", 'ulimit -f 4000; exec "$@"', "-", sys.executable,
                           os.path.join(ROOT, "latro.py"), *BY_EPOCHS, "--run_name", "full"], cwd=base,
                           env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: runs/full/checkpoints/step-1: cannot be written" in done.stderr
    assert os.listdir(f"{base}/runs/full/checkpoints") == []


def test_told_to_stop_between_checkpoints(apart, monkeypatch):
    """No save_steps: the step that was being made is kept all the same."""
    update = latro.update

    def told(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return update(*arguments)

    monkeypatch.setattr(latro, "update", told)
    with pytest.raises(SystemExit, match="143"):
        latro.main([*BY_EPOCHS, "--run_name", "x", "--save_steps", "99"])
    assert latro.checkpoints("runs/x") == ["runs/x/checkpoints/step-1"]


def test_told_to_stop_in_the_last_evaluation(apart, monkeypatch, capsys):
    evaluate, export, calls = latro.evaluate, latro.export, []

    def told(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments, **options)

    monkeypatch.setattr(latro, "evaluate", told)
    arguments = [*BY_EPOCHS, "--run_name", "x", "--max_steps", "1", "--checkpoint_path", "latest"]
    with pytest.raises(SystemExit, match="143"):
        latro.main(arguments)
    assert "--run_name x --checkpoint_path latest" in capsys.readouterr().out
    assert latro.checkpoints("runs/x") and not os.path.exists("runs/x/final")
    monkeypatch.setattr(latro, "export", lambda folder, *a: export(folder, *a) or folder.endswith("final")
                        and signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit, match="143"):  # once more, where all but the table is done
        latro.main(arguments)
    assert os.path.exists("runs/x/final") and not os.path.exists("runs/x/evaluation-best.json")
    latro.main(arguments)
    assert os.path.exists("runs/x/evaluation-best.json")


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    """And what a kill left of a last line, cut within a character."""
    text = '{"step": 1, "query": "⊕"}\n'.encode()
    _, state = latro.find_checkpoint(tmp_path, None)
    for size in (0, len(text), 2 * len(text)):
        for name in latro.LOGS:
            (tmp_path / name).write_bytes(2 * text + text[:-4])
            state.logs[name] = size
        latro.begin(tmp_path, latro.Config(), state)
        assert [(tmp_path / name).read_bytes() for name in latro.LOGS] == [(2 * text)[:size]] * 2


@pytest.fixture(scope="module")
def alone(base):
    script("latro.py", "--config", "tiny.yaml", "--run_name", "alone", "--num_samples", 0, "--max_steps", 8,
           "--num_evaluations", 1, "--sanity_check", "true", cwd=base)
    return f"{base}/runs/alone"


@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_a_checkpoint_continues_on_another_number_of_ranks(base, alone, first, then):
    """The same global batch throughout: 4 sequences of gradient accumulation over all ranks."""
    name = f"from-{first}-to-{then}"
    for ranks, steps in ((first, 4), (then, 8)):
        script("latro.py", "--config", "tiny.yaml", "--run_name", name, "--checkpoint_path", "latest", "--num_samples",
               0, "--gradient_accumulation_steps", 4 // ranks, "--save_steps", 4, "--max_steps", 8, "--num_evaluations",
               1, "--save_total_limit", 5, "--sanity_check", "true", cwd=base, ranks=ranks)
        if steps == 4:  # as if killed after step 4
            for left in ("final", "best", "evaluation-best.json", "checkpoints/step-8"):
                path = f"{base}/runs/{name}/{left}"
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    runs = f"{base}/runs/{name}", alone
    ours, undivided = ([r for r in rows(f"{run}/metrics.jsonl") if "reward" in r] for run in runs)
    assert [r["step"] for r in ours] == list(range(1, 9))
    for a, b in zip(ours, undivided, strict=True):
        assert a["reward"] == pytest.approx(b["reward"], rel=0.05, abs=0.05) and a["epoch"] == b["epoch"]
    weights = [load_file(f"{run}/final/model.safetensors") for run in runs]
    assert all((a - b).norm() < 0.05 * b.norm() for a, b in zip(weights[0].values(), weights[1].values(), strict=True))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop(base, ranks, number):
    """The step is finished, a checkpoint written, the command to continue printed; signals repeat, reach everybody."""
    name = f"stop-{ranks}-{number}"
    process = start(str(base), name, ranks)
    log = f"{base}/{name}.log"
    deadline = time.time() + 120
    while not os.path.exists(f"{base}/runs/{name}/metrics.jsonl") or len(rows_so_far(base, name)) < 4:
        assert time.time() < deadline and process.poll() is None, open(log).read()
        time.sleep(0.05)
    begin = time.time()
    for _ in range(1 if (ranks, number) == (1, signal.SIGINT) else 3):  # a second Ctrl-C ends one process at once
        kill(process, number)
        time.sleep(0.1)
    assert process.wait(30) != 0 and time.time() - begin < 30
    # torchrun, told thrice, leaves before its ranks
    while f"--run_name {name} --checkpoint_path latest" not in open(log).read():
        assert time.time() - begin < 30, open(log).read()
        time.sleep(0.05)
    assert "stopped after step" in open(log).read()
    assert latro.checkpoints(f"{base}/runs/{name}")
    if ranks == 1 and number == signal.SIGTERM:  # the same command goes on, and ends where an undisturbed run ends
        assert start(str(base), name).wait() == 0
        assert remains(f"{base}/runs/{name}") == remains(f"{base}/runs/undisturbed")


def rows_so_far(base, name):
    with open(f"{base}/runs/{name}/metrics.jsonl") as file:
        return [line for line in file if "reward" in line]


def test_two_nodes(base):
    """Two launchers on loopback, as on two machines; shard_size 1: whole weights on each, gradients averaged (HSDP)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = ["--config", "tiny.yaml", "--max_steps", "2", "--num_evaluations", "1", "--num_samples", "0",
                 "--run_name", "nodes", "--shard_size", "1"]
    nodes = []
    for i in range(2):
        if sys.prefix == os.path.join(ROOT, ".venv"):  # set up by tests/run.sh: the launcher itself
            command = [os.path.join(ROOT, "fsdp_launch.sh"), *arguments]
        else:
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(i),
                       "--master_addr", "127.0.0.1", "--master_port", port, os.path.join(ROOT, "latro.py"), *arguments]
        environment = {"OMP_NUM_THREADS": "1", "NNODES": "2", "NODE_RANK": str(i), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": port}
        nodes.append(subprocess.Popen(command, cwd=base, env=os.environ | environment, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT, text=True))
    printed = [node.communicate(timeout=200)[0] for node in nodes]
    assert all(node.returncode == 0 for node in nodes), printed
    assert len(rows_so_far(base, "nodes")) == 2
    samples = rows(f"{base}/runs/nodes/samples.jsonl")  # of both ranks' prompts, each K times
    first = [row["query"] for row in samples if row["step"] == 1]
    assert len(first) == 256 and len({*first}) == 32


def test_a_rank_that_dies_ends_the_job(base, tmp_path):
    (tmp_path / "dies.py").write_text(f"""
import sys
sys.path.insert(0, {ROOT!r})
import evaluate, latro
whole = latro.update
def update(*arguments):
    if evaluate.rank():
        raise RuntimeError("this rank dies")
    return whole(*arguments)
latro.update = update
evaluate.run_script(latro.main)
""")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                           str(tmp_path / "dies.py"), "--config", "tiny.yaml", "--run_name", "dies"], cwd=base,
                           timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode != 0 and "this rank dies" in done.stderr


ARCHITECTURES = ["llama", "mistral", "phi3", "qwen2", "qwen3", "gemma", "gemma2"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_architectures_train_a_step_and_export(kind, tied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, tokenizer = data.embedded_model()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=tied,
        pad_token_id=1, bos_token_id=None, eos_token_id=2), dtype=torch.bfloat16)
    model.save_pretrained("start")
    tokenizer.save_pretrained("start")
    set_out, made = latro.set_out, []
    monkeypatch.setattr(latro, "set_out", lambda *arguments: made.append(set_out(*arguments)) or made[-1])
    latro.main(["--config", "tiny.yaml", "--model_name_or_path", "start", "--max_steps", "1", "--num_evaluations", "1",
                "--num_samples", "0", "--sanity_check", "true", "--run_name", "r", "--response_length", "8", "--dtype",
                "bfloat16"])
    final = AutoModelForCausalLM.from_pretrained("runs/r/final")
    assert final.dtype == torch.bfloat16 and rows("runs/r/metrics.jsonl")[1]["skipped"] == 0
    for parameter, master in zip(final.parameters(), made[0][0].model.parameters(), strict=True):
        master = latro.full(master.detach())  # exactly the float32 weights, in the dtype of sampling
        assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), parameter)
    moved = [not torch.equal(a, b) for a, b in zip(final.parameters(), model.parameters(), strict=True)]
    assert sum(moved) > len(moved) // 2
    head, embedding = final.get_output_embeddings().weight, final.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) is tied


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_plan_is_exact(kind, monkeypatch):
    """Held bytes against those of the tensors of a real update; only what comes and goes is an estimate."""
    settings = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
                "pad_token_id": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32)
    config = latro.Config(response_length=10, rollout_batch_size=8, rloo_k=4, dtype="bfloat16",
                          per_device_eval_batch_size=3)
    needs = latro.plan(config, model, 1, context=20)
    policy, reference, _ = latro.set_out(model, config, torch.device("cpu"))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    def held(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    assert needs["weights, float32"] == held(policy.parameters())
    assert needs["gradients"] == held(p.grad for p in policy.parameters())
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert needs["optimizer, two moments"] == held(moments)
    assert needs["sampling copy"] == held(model.parameters()) and needs["reference"] == held(reference.parameters())
    slots, made = evaluate.Slots.__init__, []
    monkeypatch.setattr(evaluate.Slots, "__init__", lambda cache, *a: made.append(cache) or slots(cache, *a))
    latro.generate(model, [[3] * 20] * 2, 10, num_samples=4)
    assert needs["KV cache"] == held(made[0].tensors)


def test_dry_run(tmp_path, monkeypatch, capsys):
    """Of the shape of Llama-3.1-8B, from its config alone: what the README says; a budget too small names a way out."""
    AutoConfig.for_model("llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                         num_attention_heads=32, num_key_value_heads=8,
                         tie_word_embeddings=False).save_pretrained(tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.jsonl").write_text("\n".join(json.dumps({"queries": f"q{i}", "responses": "a",
                                                             "groundtruth": "a"}) for i in range(100)))
    arguments = ["--config", "gsm8k.yaml", "--model_name_or_path", "llama", "--dataset_name", "jsonl", "--dataset_path",
                 "my.jsonl", "--dry_run", "8", "--gpu_memory"]
    latro.main([*arguments, "80"])
    printed = capsys.readouterr().out
    for text in ("8,030,261,248 parameters", "24 prompts, 384 sequences", "90 training prompts"):
        assert text in printed
    assert "together                                        52.297" in printed
    assert sorted(os.listdir(tmp_path)) == ["llama", "my.jsonl"]
    with pytest.raises(data.UserError, match="gpu_memory: more than 24.0 GiB are needed, most by sampling copy; lower"):
        latro.main([*arguments, "24"])
    with pytest.raises(data.UserError, match="shard_size: 3 does not divide the 8 ranks"):
        latro.main([*arguments, "80", "--shard_size", "3"])
    latro.main([*arguments, "80", "--objective", "sft"])
    assert "per step: 384 prompts, 384 sequences\n" in capsys.readouterr().out


def test_refreshing_the_sampling_copy_holds_one_parameter_at_a_time():
    """Peak memory of the process while the bfloat16 copy is refreshed from float32 shards (Linux counts it)."""
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("needs Linux's /proc")
    config = AutoConfig.for_model("llama", vocab_size=60, hidden_size=512, intermediate_size=1024, num_hidden_layers=24,
                                  num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    policy, _, sampler = latro.set_out(model, latro.Config(dtype="bfloat16", kl_coef=0), torch.device("cpu"))
    latro.refresh(sampler, policy)  # what is allocated once is allocated
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    before = memory("VmRSS")
    latro.refresh(sampler, policy)
    copy_size = 2 * sum(p.numel() for p in sampler.parameters())
    assert copy_size > 100e6 and memory("VmHWM") - before < 0.2 * copy_size


def memory(name):
    """Bytes, as /proc counts them."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def test_rows_that_do_not_divide_by_the_ranks(base):
    """Five questions on two ranks: all there, once, in order, as on one rank."""
    results = []
    for ranks in (1, 2):
        script("evaluate.py", "--model", "runs/cups-base/final", "--dataset_name", "cups", "--limit", 5,
               "--num_samples", 3, "--out", "five.json", "--response_length", 24, cwd=base, ranks=ranks)
        results.append(json.load(open(f"{base}/five.json")))
    one, two = ([{k: row[k] for k in ("query", "output",
                                      "correct")} | {"samples": [s["output"] for s in row["samples"]]}
                 for row in result["rows"]] for result in results)
    assert len(one) == 5 and one == two
