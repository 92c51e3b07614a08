"""The README's examples run, and its table of keys is the one of --help."""
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from transformers import AutoConfig

import data
import evaluate
import latro

with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
    README = file.read()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
LLAMA = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}
SHAPES = {"meta-llama/Llama-3.1-8B-Instruct": ("llama", LLAMA),
          "mistralai/Mistral-7B-Instruct-v0.3": ("mistral", LLAMA | {"vocab_size": 32768}),
          "microsoft/Phi-3.5-mini-instruct": ("phi3", LLAMA | {
              "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_key_value_heads": 32, "pad_token_id": 0}),
          "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", LLAMA | {
              "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
              "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True})}
SHAPES["runs/sft/final"] = SHAPES["runs/words-base/final"] = SHAPES["HuggingFaceTB/SmolLM2-135M-Instruct"]  # trained by the command before


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Every python and torchrun command of the README's shell blocks, as (words, standard variables that it sees): the
    blocks and the scripts that they start are run by bash, with a python and torchrun that note how they were called."""
    here = tmp_path_factory.mktemp("readme")
    (here / ".venv/bin").mkdir(parents=True)
    (here / "tests").mkdir()
    for name in ("fsdp_launch.sh", "requirements.txt", "tests/setup.sh", "tests/run.sh", "tests/requirements.txt"):
        shutil.copy(os.path.join(ROOT, name), here / name)
    (here / ".venv/bin/python").write_text(f"""#!{sys.executable}
import json, os, sys
if sys.argv[1] == "-c":
    print(8)  # GPUs, which fsdp_launch.sh counts
else:
    with open({str(here / "log")!r}, "a") as log:
        print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]), file=log)
""")
    (here / ".venv/bin/srun").write_text('#!/bin/bash\nexport SLURM_NNODES=2 SLURM_NODEID=1 SLURM_JOB_NODELIST=n[0-1]\nexec "$@"\n')
    (here / ".venv/bin/scontrol").write_text("#!/bin/bash\nprintf 'n0\\nn1\\n'\n")
    for name in ("python", "srun", "scontrol"):
        (here / ".venv/bin" / name).chmod(0o755)
    shutil.copy(here / ".venv/bin/python", here / ".venv/bin/torchrun")
    requirements = (here / "requirements.txt").read_text()
    (here / f".venv/installed-{here.name}").write_text(requirements * 2)
    (here / ".venv/installed-tests").write_text((here / "tests/requirements.txt").read_text() + requirements)
    path = f"{here}/.venv/bin:{os.environ['PATH']}"
    for block in BLOCKS:
        subprocess.run(["bash", "-euo", "pipefail", "-c", block], cwd=here, env=os.environ | {"PATH": path}, check=True)
    subprocess.run([here / "fsdp_launch.sh", "--seed", "9"], env=os.environ | {"PATH": path, "NPROC": "1"}, check=True)
    with open(here / "log") as log:
        return [json.loads(line) for line in log]


def arguments_of(commands, script):
    """Of each command that runs the script, what follows it, and the words before."""
    found = [[i for i, word in enumerate(words) if os.path.basename(word) == script] for words in commands]
    return [(words[i[0] + 1:], words[:i[0]]) for words, i in zip(commands, found) if i]


def test_commands_are_found(commands):
    assert len(commands) > 20 and ["-m", "pytest"] in [words[1:3] for words in commands]
    assert {os.path.basename(w) for words in commands for w in words if w.endswith(".py")} == {
        "latro.py", "evaluate.py", "bench.py", "study.py", "kill.py", "gpu.py", "words.py", "pay.py"}
    assert (["--seed", "9"], ["python"]) in arguments_of(commands, "latro.py")  # one process: no torchrun around it
    launched = [" ".join(before) for _, before in arguments_of(commands, "latro.py") if "--node_rank" in before]
    assert any("--node_rank 0 --master_addr host0" in words for words in launched)
    assert any("--node_rank 1 --master_addr n0 --master_port 29500 --nproc_per_node 8" in words for words in launched)


def test_training_commands(commands, tmp_path, monkeypatch, capsys):
    """Each plans its run, for the ranks that it would start and 80 GiB, on the config of its model's shape."""
    row = {"queries": "q", "responses": "a", "groundtruth": "a"}
    (tmp_path / "my.jsonl").write_text("\n".join(json.dumps(row | {"queries": f"q{i}"}) for i in range(4)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda path, **_: AutoConfig.for_model(SHAPES[path][0], **SHAPES[path][1]))
    monkeypatch.setattr(latro, "load_rows", lambda name, split, path, *rest: (
        [row] * 6725 if path is None else data.load_rows(name, split, path, *rest)))
    planned = []
    for arguments, before in arguments_of(commands, "latro.py"):
        if "--help" in arguments:
            with pytest.raises(SystemExit, match="0"):
                latro.main(arguments)
            continue
        ranks = before[before.index("--nproc_per_node") + 1] if "--nproc_per_node" in before else "1"
        plan = [] if "--dry_run" in arguments else ["--dry_run", ranks, "--gpu_memory", "80"]
        latro.main(arguments + plan)
        printed = capsys.readouterr().out
        assert "steps in all" in printed
        planned.append(printed.split(":")[0])
    assert set(SHAPES) | {"runs/cups-base/final"} <= set(planned)


def test_evaluation_commands(commands, base, tmp_path, monkeypatch):
    """Each evaluates a few rows with the embedded base in the place of its model."""
    model, tokenizer = evaluate.load_model(str(base / "runs/cups-base/final"), evaluate.torch.float32)
    shutil.copytree(base / "runs/cups-base", tmp_path / "runs/cups-base")
    for name in ("runs/sft", "runs/NAME", "runs/other"):
        run = tmp_path / name
        shutil.copytree(base / "runs/cups-base/final", run / "best")
        (run / "config.yaml").write_text("model_name_or_path: runs/cups-base/final\ndataset_name: cups\nresponse_length: 24\n")
        (run / "metrics.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_model", lambda *_: (model, tokenizer))
    monkeypatch.setattr(evaluate, "load_rows", lambda *_: data.load_rows("cups", "test"))
    written = 0
    for arguments, _ in arguments_of(commands, "evaluate.py"):
        evaluate.main([*arguments, "--limit", "3", "--response_length", "4"])
        written += 1
    assert written >= 3 and len(list(run.glob("evaluation-best-*limit=3*.json"))) > 0


def test_other_commands(commands):
    """Scripts of the tests that have tests of their own: here only that --help knows the options."""
    for script in ("bench.py", "study.py", "kill.py", "gpu.py", "words.py", "pay.py"):
        for arguments, _ in arguments_of(commands, script):
            helped = subprocess.run([sys.executable, os.path.join(ROOT, "tests", script), "--help"], capture_output=True, text=True)
            assert helped.returncode == 0
            assert all(word in helped.stdout for word in arguments if word.startswith("--"))


PIECES, DATASET = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_copied_pieces(base, monkeypatch):
    monkeypatch.chdir(base)
    names = {}
    exec(PIECES, names)
    assert len({tuple(ids) for ids, *_ in names["samples"]}) > 1
    assert all(p.grad.abs().sum() > 0 for p in names["model"].model.layers.parameters())


def test_dataset_in_code(monkeypatch):
    assert len(DATASET.strip().splitlines()) <= 15
    monkeypatch.setattr(data, "DATASETS", dict(data.DATASETS))
    exec(DATASET, {})
    rows, validation = (data.load_rows("sums", split) for split in ("train", "validation"))
    assert len(rows) + len(validation) == 1000 and data.grade("number", rows[0]["responses"], rows[0])[1]


def test_jsonl_rows(tmp_path):
    for row, grader in zip(re.findall(r"```json\n(.*?)```", README, re.DOTALL), ("number", "none"), strict=True):
        (tmp_path / "my.jsonl").write_text(row * 3)
        rows = data.load_rows("jsonl", "all", str(tmp_path / "my.jsonl"))
        assert len(rows) == 3 and data.choose_grader("auto", "jsonl", rows)[0] == grader
        assert grader == "none" or data.grade("number", "The answer is 42.", rows[0])[1]


def test_every_key_is_there(capsys):
    """The table is what --help prints."""
    with pytest.raises(SystemExit):
        latro.main(["--help"])
    helped = re.findall(r"  --(\w+) +(.+) \[(.*)\]\n", capsys.readouterr().out)
    assert [name for name, *_ in helped] == [field.name for field in dataclasses.fields(latro.Config)]
    for name, comment, default in helped:
        comment = comment.replace("|", r"\|")
        assert f"| `{name}` | {default.replace('None', '')} | {comment} |" in README


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r"`((?:docs|tests|configs)/[\w./]+)`", README):
        assert target.startswith("https://") or os.path.exists(os.path.join(ROOT, target)), target
