"""A real model that learns to work answers out: makes all that docs/words.md shows, on 2 CPU cores.

    python tests/words.py [--model SMOLLM2] [--seeds 3] [--out docs] [--runs runs/words]

--model is a folder or hub id of SmolLM2-135M-Instruct (default: SMOLLM2, else the hub's). Two runs at a time, on one thread
each. What is finished is not done again. Writes words.md (table), words.json (every figure of every seed) and words.png.
"""
import argparse
import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean as mean

import study
from study import script, spread, table

import evaluate

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
ROWS = {  # run: (row of the table, flags beside --config words.yaml, what it is)
    "latro": ("LaTRO", "", "both terms of Eq. 4"),
    "first-term": ("LaTRO, `sft_penalty: 0`", "--sft_penalty 0", "the first term alone"),
    "prob": ("LaTRO, `reward: prob`", "--reward prob", "rewarded by π(y\\|x⊕z), VeriFree's"),
    "sft-answers": ("SFT on answers", "--objective sft --dataset_name words_direct --gradient_accumulation_steps 2", "32 gold answers an update"),
    "sft-gold": ("SFT on gold rationales", "--objective sft --gradient_accumulation_steps 2", "32 gold rationales and answers an update"),
}
# those that are no run of words.yaml: row of the table, what it is
STARTS = {"shipped": ("SmolLM2-135M-Instruct", "as it is shipped"),
          "base": ("after the short SFT", "words_base.yaml, 64 updates of 32 rows: the start of every row below")}
FIGURES = {"accuracy": "greedy, %", "maj_at_k": "maj@8, %", "answer_logprob": "log π(y\\|x⊕z)",
           "answer_logprob_no_rationale": "log π(y\\|x)", "finished": "finished, %", "rationale_length": "length"}
PERCENT = {"accuracy", "maj_at_k", "finished"}


def work(runs: Path, name: str, seed: int, model: str) -> None:
    """Train a run, as far as that is not done, and evaluate its best model on 200 test questions."""
    run = f"{name}-{seed}"
    log, file = runs / f"{run}.log", runs / f"{run}.json"
    if name in ROWS:
        script(log, "latro.py", "--config", "words.yaml", "--model_name_or_path", runs / "base/final",
               "--output_dir", runs, "--run_name", run, "--checkpoint_path", "latest", "--seed", seed, "--num_samples", 0,
               *ROWS[name][1].split())
        model = runs / run / "best"
    script(log, "evaluate.py", "--model", model, "--dataset_name", "words", "--limit", 200, "--num_samples", 8,
           "--response_length", 48, "--temperature", 0.7, "--per_device_eval_batch_size", 100, "--seed", seed,
           "--out", f"{file}.partial")
    os.replace(f"{file}.partial", file)


def run_all(runs: Path, model: str, seeds: int) -> None:
    """Make every run and evaluation that is missing."""
    start = runs / "base/final"
    if not start.exists():  # alone, on all cores: every run starts from it
        script(runs / "base.log", "latro.py", "--config", "words_base.yaml", "--model_name_or_path", model,
               "--output_dir", runs, "--run_name", "base", "--num_samples", 0, threads=os.cpu_count())
    jobs = [("base", 0, start), *((name, seed, None) for seed in range(seeds) for name in ROWS), ("shipped", 0, model)]
    jobs = [job for job in jobs if not (runs / "{}-{}.json".format(*job)).exists()]
    with ThreadPoolExecutor(2) as pool:
        study.wait_for([pool.submit(work, runs, *job) for job in jobs], pool)


def summarise(runs: Path, seeds: int) -> dict:
    """Every figure of every seed, from the evaluation files, and the curves of validation."""
    summary = {"table": {}, "curves": {}, "break_even": {}}
    for name in [*STARTS, *ROWS]:
        files = [runs / f"{name}-{seed}.json" for seed in range(seeds if name in ROWS else 1)]
        held = [json.loads(file.read_text("utf-8")) for file in files]
        summary["table"][name] = {key: [e[key] for e in held] for key in (*FIGURES, "accuracy_ci95")}
        summary["break_even"][name] = [e["break_even"] for e in held]
    for name in ROWS:
        logs = [(runs / f"{name}-{seed}/metrics.jsonl").read_text("utf-8") for seed in range(seeds)]
        rows = [[row for row in map(json.loads, log.splitlines()) if "split" in row] for log in logs]
        summary["curves"][name] = {
            key: [[row[key] for row in run] for run in rows] for key in ("step", "accuracy", "rationale_length")}
    return summary


def page(s: dict) -> str:
    lines = []
    for name, row in s["table"].items():
        label, what = STARTS[name] if name in STARTS else ROWS[name][::2]
        cells = [spread([100 * x for x in row[key]] if key in PERCENT else row[key],
                        2 if key.startswith("answer") else 1) for key in FIGURES]
        low, high = min(row["accuracy_ci95"])
        lines.append([label, f"{cells[0]} [{100 * low:.0f}–{100 * high:.0f}]", *cells[1:], what])
    pay = [[STARTS[name][0] if name in STARTS else ROWS[name][0],
            f"{100 * mean(b['right'] for b in found):.0f}", f"{100 * mean(b['break_even'] for b in found):.0f}",
            *(f"{mean(b[key] for b in found):.1f}".replace("-", "−")
              for key in ("logprob_right", "logprob_wrong", "logprob_guess"))]
           for name, found in s["break_even"].items() if mean(s["table"][name]["rationale_length"]) > 0.5]
    seeds = len(s["table"]["latro"]["accuracy"])
    return f"""# Word problems: a real model that learns to work answers out

`python tests/words.py --seeds {seeds}` wrote this page, `words.json` (every figure of every seed) and the picture.
It took {s['minutes']:.0f} minutes on {s['machine']}; {s['made_by']}.

![accuracy and rationale length against the update](words.png)

200 test questions; mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)}, behind the accuracy the 95% Wilson interval
of its lowest seed. Each row below the start: 24 updates of 64 sequences from it, its `best/` by 200 validation rows; samples
at temperature 0.7.

{table(["", *FIGURES.values(), ""], *lines)}

## Whether rationales pay

Of what each model that has rationales samples: the share that is right, the share from which on they pay, and mean log π of
the gold answer behind a right one, a wrong one, and of a guess without one.

{table(["", "right, %", "break-even, %", "right", "wrong", "guess"], *pay)}
"""


def draw(path: Path, s: dict) -> None:
    """words.png: greedy accuracy and rationale length on validation rows, every seed, against the update."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4), layout="constrained")
    for key, title, axis in zip(("accuracy", "rationale_length"),
                                ("greedy accuracy, validation, %", "rationale length, tokens"), figure.subplots(1, 2)):
        for i, (name, curves) in enumerate(s["curves"].items()):
            for j, (steps, values) in enumerate(zip(curves["step"], curves[key])):
                values = [100 * x for x in values] if key == "accuracy" else values
                axis.plot(steps, values, "o-", color=f"C{i}", markersize=3, linewidth=1,
                          label=ROWS[name][0].replace("`", "") if j == 0 else None)
        axis.set_title(title)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("SMOLLM2", HUB))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default="docs", help="folder of words.md, words.json and words.png")
    parser.add_argument("--runs", type=Path, default="runs/words", help="folder of the runs and their evaluations")
    options = parser.parse_args(argv)
    with study.timed(options.out, options.runs):
        run_all(options.runs, options.model, options.seeds)
    summary = study.made_on(options.runs) | summarise(options.runs, options.seeds)
    study.publish(options.out, "words", summary, page(summary))
    draw(options.out / "words.png", summary)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    evaluate.run_script(main)
