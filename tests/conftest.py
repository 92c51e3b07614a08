"""What the tests share: one process group, a tiny model, and the real model and data where they are at hand."""
import glob
import json
import os
import shutil
import subprocess
import sys
import time

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: the tests are for a CPU, also where there is a GPU

import torch  # noqa: E402

if os.path.isdir(os.environ.get("SMOLLM2", ".")):
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported; a model that is not there fails at once

# operations that read values on the host, which waits for a GPU then
READS = [getattr(torch.ops.aten, name).default
         for name in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select")]
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import data  # noqa: E402
import evaluate  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def process_group():
    return evaluate.init_distributed()


@pytest.fixture(scope="session")
def tiny():
    """(model, tokenizer): the embedded architecture with random weights that make its samples varied."""
    torch.manual_seed(0)
    model, tokenizer = data.embedded_model()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 6
    return model.eval(), tokenizer


@pytest.fixture(scope="session")
def cups(tiny):
    return data.make_examples(tiny[1], data.load_rows("cups", "train")[:6])


@pytest.fixture(scope="session")
def smollm2():
    if "SMOLLM2" not in os.environ:
        pytest.skip("SMOLLM2 is not set: a folder or hub id of SmolLM2-135M-Instruct")
    return os.environ["SMOLLM2"]


@pytest.fixture(scope="session")
def smol(smollm2):
    return evaluate.load_model(smollm2, torch.float32)


@pytest.fixture(scope="session")
def gsm8k():
    if "GSM8K" not in os.environ:
        pytest.skip("GSM8K is not set: a folder with GSM8K's train.jsonl and test.jsonl")
    return os.environ["GSM8K"]


def script(name, *arguments, cwd, ranks=1, code=0):
    """Run a script of the project in the folder cwd; returns what it printed."""
    launch = [sys.executable] if ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, os.path.join(ROOT, name), *map(str, arguments)], cwd=cwd, env=environment,
                          capture_output=True, text=True, timeout=500)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder in which runs/cups-base is made: by `python latro.py`, as for any user."""
    folder, shared = tmp_path_factory.mktemp("base"), tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all workers: the first to come makes it, the others wait
    try:
        os.mkdir(shared / "making")
        printed = script("latro.py", "--config", "tiny.yaml", "--max_steps", 1, "--sanity_check", "true",
                         cwd=shared / "making")
        assert "making the base model runs/cups-base/final (once)" in printed
        os.rename(shared / "making/runs/cups-base", shared / "cups-base")
    except FileExistsError:
        while not os.path.exists(shared / "cups-base"):
            time.sleep(0.2)
    shutil.copytree(shared / "cups-base", folder / "runs/cups-base")
    return folder


@pytest.fixture
def apart(base, tmp_path, monkeypatch):
    """A working directory of a test's own, where the base is made."""
    shutil.copytree(base / "runs/cups-base", tmp_path / "runs/cups-base")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def default_run(base):
    """`python latro.py` where the base is made: (folder, run directory, what was printed)."""
    printed = script("latro.py", cwd=base)
    [run] = glob.glob(f"{base}/runs/cups-latro-*")
    return base, run, printed
