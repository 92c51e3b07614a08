"""Kill a run at random moments, continue it, and compare it with one that was never interrupted, byte for byte.

    python tests/kill.py --kills 20 [--ranks 2] [--folder DIR]
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUN = ("--config", "tiny.yaml", "--max_steps", "24", "--num_evaluations", "4", "--num_samples", "0", "--save_steps",
       "2", "--sanity_check", "true", "--gradient_accumulation_steps", "2", "--checkpoint_path", "latest")


def start(folder, name, ranks=1):
    launch = [sys.executable] if ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(os.path.join(folder, f"{name}.log"), "a") as log:
        return subprocess.Popen([*launch, os.path.join(ROOT, "latro.py"), *RUN, "--run_name", name], cwd=folder,
                                env=environment, stdout=log, stderr=log, start_new_session=True)


def family(pid):
    """A process and all that it started, as Linux knows them: torchrun's workers have sessions of their own."""
    path = f"/proc/{pid}/task/{pid}/children"
    children = open(path).read().split() if os.path.exists(path) else []
    return [pid, *(other for child in children for other in family(int(child)))]


def kill(process, number=signal.SIGKILL):
    """The signal to every process of a run, as a machine that goes down would."""
    for pid in family(process.pid):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def remains(run):
    """What must not depend on interruptions: metrics without timings, samples, and the exported weights."""
    with open(f"{run}/metrics.jsonl") as file:
        metrics = [{k: v for k, v in json.loads(line).items() if not k.endswith("_s")} for line in file]
    names = "samples.jsonl", "best/model.safetensors", "final/model.safetensors"
    files = [open(f"{run}/{name}", "rb").read() for name in names]
    return metrics, files


def kill_and_continue(folder, kills, rng, ranks=1, before_continuing=lambda run: None):
    """(remains of an undisturbed run, remains of one that was killed `kills` times); the embedded base must exist."""
    begin = time.time()
    assert start(folder, "undisturbed", ranks).wait() == 0
    whole = time.time() - begin
    for i in range(kills):
        process = start(folder, "killed", ranks)
        try:
            process.wait(rng.uniform(0.35, 1.0) * whole)
        except subprocess.TimeoutExpired:
            kill(process)
        process.wait()
        steps = sum("reward" in line for line in open(f"{folder}/runs/killed/metrics.jsonl")) if os.path.exists(
            f"{folder}/runs/killed/metrics.jsonl") else 0
        print(f"kill {i + 1}: exit {process.returncode}, {steps} steps logged", flush=True)
        if process.returncode == 0:  # it was finished: begin again
            assert remains(f"{folder}/runs/undisturbed") == remains(f"{folder}/runs/killed")
            shutil.rmtree(f"{folder}/runs/killed")
        before_continuing(f"{folder}/runs/killed")
    assert start(folder, "killed", ranks).wait() == 0
    return remains(f"{folder}/runs/undisturbed"), remains(f"{folder}/runs/killed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--folder", default=tempfile.mkdtemp(prefix="latro-kill-"))
    options = parser.parse_args()
    for name in ("undisturbed", "killed"):
        shutil.rmtree(f"{options.folder}/runs/{name}", ignore_errors=True)
    subprocess.run([sys.executable, os.path.join(ROOT, "latro.py"), "--config", "tiny.yaml", "--max_steps", "1",
                    "--sanity_check", "true"], cwd=options.folder, check=True, capture_output=True)  # makes the base
    undisturbed, killed = kill_and_continue(options.folder, options.kills, random.Random(), options.ranks)
    print("the same, byte for byte" if undisturbed == killed else "DIFFERENT")
    sys.exit(undisturbed != killed)
