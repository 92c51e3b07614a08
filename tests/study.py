"""The embedded study: trains and evaluates all that docs/study.md shows, offline, on 2 CPU cores in a quarter of an hour.

    python tests/study.py [--out docs] [--runs runs/study]

Two runs at a time, on one thread each. What is finished is not done again: the same command continues a study that was
interrupted. Writes study.md (tables), study.json (every figure of every seed) and study.png.
"""
import argparse
import concurrent.futures
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean as mean, quantiles, stdev

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
import latro  # noqa: E402
from data import UserError  # noqa: E402

SEEDS = (0, 1, 2)
ROWS = {  # run: (row of the table, flags beside --config tiny.yaml, what it is)
    "latro": ("LaTRO", "", r"the default: K = 8, β = 0.05, both terms of Eq. 4, reward log π(y\|x⊕z), L = 24"),
    "sft": ("SFT on answers", "--objective sft", "128 gold answers per step, no rationale"),
    "sft_penalty-0": ("LaTRO, sft_penalty 0", "--sft_penalty 0", "Eq. 4's first term alone: the answer is not trained"),
    "kl_coef-0": ("LaTRO, β = 0", "--kl_coef 0", "no KL to the base, no reference model"),
    "rloo_k-2": ("LaTRO, K = 2", "--rloo_k 2", "64 prompts per step in place of 16: 128 rollouts, as with every K"),
    "rloo_k-4": ("LaTRO, K = 4", "--rloo_k 4", "32 prompts per step"),
    "rloo_k-16": ("LaTRO, K = 16", "--rloo_k 16", "8 prompts per step"),
    "reward-mean_logprob": ("LaTRO, reward mean_logprob", "--reward mean_logprob", "log π per token of y"),
    "reward-prob": ("LaTRO, reward prob", "--reward prob", r"π(y\|x⊕z), VeriFree's"),
}
LENGTHS = (2, 4, 8, 12, 16)  # L of the sweep, beside the default's
LENGTH = 24  # the default's, and of every evaluation: rationale and answer together
MANY, KS = 64, (1, 2, 4, 8, 16, 32, 64)  # samples per question where maj@k is shown, and its k; elsewhere 8
CURVES = {"base, no rationale": ("base", "answer_logprob_no_rationale"),
          "base, its rationales": ("base", "answer_logprob"), "LaTRO, its rationales": ("latro-best", "answer_logprob")}
FIGURES = {"accuracy": "greedy accuracy, %", "maj@8": "maj@8, %", "answer_logprob": r"mean log π(y\|x⊕z)",
           "rationale_length": "rationale length, tokens"}
CHILDREN: list[subprocess.Popen] = []


def evaluations() -> dict[str, tuple[str | None, str, str, int]]:
    """name: (run, the run's flags, folder of the model, samples per question); a file for each name and seed."""
    jobs = {"base": (None, "", "cups-base/final", MANY)}
    jobs |= {f"{run}-best": (run, flags, "best", MANY if run == "latro" else 8) for run, (_, flags, _) in ROWS.items()}
    jobs |= {f"length-{n}": (f"length-{n}", f"--response_length {n} --num_evaluations 1", "final", 8) for n in LENGTHS}
    return jobs | {f"length-{LENGTH}": ("latro", "", "final", 8)}


def script(log: Path, name: str, *arguments, threads: int = 1) -> None:
    """Run a script of the project; what it prints is added to the file `log`."""
    with log.open("a") as file:
        CHILDREN.append(child := subprocess.Popen([sys.executable, ROOT / name, *map(str, arguments)], stdout=file,
                                                  stderr=file, env=os.environ | {"OMP_NUM_THREADS": str(threads)}))
        if child.wait():
            raise UserError(f"{name} failed in the study; what it printed is at the end of {log}")


def work(runs: Path, run: str | None, seed: int, todo: list[tuple[Path, str, str, int]]) -> None:
    """Train a run, as far as that is not done, and make those evaluations of it that are missing."""
    log = runs / f"{run or 'base'}-{seed}.log"
    if run:
        script(log, "latro.py", "--config", "tiny.yaml", "--model_name_or_path", runs / "cups-base/final",
               "--output_dir", runs, "--run_name", f"{run}-{seed}", "--checkpoint_path", "latest",
               "--seed", seed, "--num_samples", 0, *todo[0][1].split())
    for file, _, folder, samples in todo:
        model = runs / (f"{run}-{seed}" if run else "") / folder
        script(log, "evaluate.py", "--model", model, "--dataset_name", "cups", "--response_length", LENGTH,
               "--num_samples", samples, "--seed", seed, "--out", f"{file}.partial")
        os.replace(f"{file}.partial", file)


def run_all(runs: Path) -> None:
    """Make every evaluation file that is missing."""
    if not (runs / "cups-base/final").exists():  # alone, on all cores: every run starts from it
        latro.main(["--config", "cups_base.yaml", "--output_dir", str(runs), "--run_name", "cups-base"])
    jobs: dict[tuple, list] = {}
    for seed in SEEDS:
        for name, (run, *rest) in evaluations().items():
            if not (file := runs / f"{name}-{seed}.json").exists():
                jobs.setdefault((runs, run, seed), []).append((file, *rest))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        wait_for([pool.submit(work, *job, todo) for job, todo in jobs.items()], pool)


def wait_for(futures: list, pool) -> None:
    """Show how many are done; where one fails, or the study is told to stop, none goes on."""
    try:
        for done in tqdm(concurrent.futures.as_completed(futures), "study", len(futures), unit="run", smoothing=0):
            done.result()
    finally:  # a run in training then writes a checkpoint
        pool.shutdown(wait=False, cancel_futures=True)
        for child in CHILDREN:
            child.terminate()


@contextmanager
def timed(*folders: Path):
    """Make the folders; a line in the last one's seconds.txt for every part of a study that was interrupted."""
    begin = time.time()
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with (folders[-1] / "seconds.txt").open("a") as file:
            print(f"{time.time() - begin:.1f}", file=file)


def made_on(runs: Path) -> dict:
    """How long a study took, on which machine, and what made its runs."""
    info = Path("/proc/cpuinfo")
    cpu = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "") or [platform.processor()]
    made_by = {path.read_text("utf-8").split("\n")[0].strip("# ") for path in runs.glob("*/config.yaml")}
    return {"minutes": sum(map(float, (runs / "seconds.txt").read_text().split())) / 60,
            "machine": f"{os.cpu_count()} cores, {cpu[0]}", "made_by": "; ".join(sorted(made_by))}


def publish(out: Path, name: str, summary: dict, page: str) -> None:
    (out / f"{name}.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False), "utf-8")
    (out / f"{name}.md").write_text(page, "utf-8")


def table(*lines) -> str:
    """Markdown, the head first."""
    return "\n".join("| " + " | ".join(map(str, x)) + " |" for x in (lines[0], ["---"] * len(lines[0]), *lines[1:]))


def spread(values: list[float], digits: int = 1) -> str:
    """Mean ± standard deviation (n − 1), of one value itself."""
    more = f" ± {stdev(values):.{digits}f}" if values[1:] else ""
    return f"{mean(values):.{digits}f}{more}".replace("-", "−")


def maj(rows: list[dict], k: int) -> float:
    """maj@k in %, by evaluate.py's vote: the mean over all questions' disjoint groups of k samples."""
    return 100 * mean(evaluate.majority(row["samples"][i:i + k])
                      for row in rows for i in range(0, len(row["samples"]), k))


def summarise(runs: Path) -> dict:
    """Every figure of the study, from the evaluation files (lists: one per seed), and what made them."""
    held = {name: [json.loads((runs / f"{name}-{seed}.json").read_text("utf-8")) for seed in SEEDS]
            for name in evaluations()}

    def figures(name: str) -> dict[str, list[float]]:
        return {"accuracy": [100 * e["accuracy"] for e in held[name]], "maj@8": [maj(e["rows"], 8) for e in held[name]],
                **{key: [e[key] for e in held[name]] for key in ("answer_logprob", "rationale_length")}}

    return {"questions": held["base"][0]["n"],
            "table": {"base": figures("base")} | {label: figures(f"{run}-best") for run, (label, *_) in ROWS.items()},
            "lengths": {n: figures(f"length-{n}") for n in (*LENGTHS, LENGTH)},
            "maj@k": {label: {k: [maj(e["rows"], k) for e in held[name]] for k in KS}
                      for label, name in (("base", "base"), ("LaTRO", "latro-best"))},
            "nll_percentiles": {  # 1 to 99, over questions and seeds
                label: quantiles([-row[key] for e in held[name] for row in e["rows"]], n=100, method="inclusive")
                for label, (name, key) in CURVES.items()}}


def tables(s: dict) -> str:
    """study.md: what made it, every table, and what its rows mean."""
    def figures(row: dict[str, list[float]]) -> list[str]:
        return [spread(row[key], 2 if key == "answer_logprob" else 1) for key in FIGURES]

    meaning = {"base": "of the solutions it was made from 70% guess and 30% track the ball; every run starts here"}
    meaning |= {label: f"`{flags}`: {what}" if flags else what for label, flags, what in ROWS.values()}
    nll = [[label, *(f"{row[p - 1]:.2f}" for p in (10, 50, 90))] for label, row in s["nll_percentiles"].items()]
    return rf"""# The embedded study

`python tests/study.py` wrote this page, `study.json` (every figure of every seed) and the picture. It took
{s['minutes']:.0f} minutes on {s['machine']}; {s['made_by']}.

![accuracy of every row, accuracy against L, maj@k, −log π of the answer](study.png)

`cups`, {s['questions']} test questions; mean ± standard deviation (n − 1) over {len(SEEDS)} seeds.
A seed is that of training and of the evaluation's samples; the base is one model, of which only the samples differ.
Every run is `python latro.py --config tiny.yaml` with the row's flags: 40 updates of 128 sequences. The model is its
`best/`, chosen on validation rows.

{table(["", *FIGURES.values(), ""], *([label, *figures(row), meaning[label]] for label, row in s["table"].items()))}

maj@8 is over groups of 8 samples: one per question, or 8 of base and LaTRO, which have {MANY} samples. Mean log π is
over all samples; the length is the greedy rationale's.

## Rationale length L (the paper's Figure 3a)

Trained with `--response_length L`, evaluated with room for {LENGTH} tokens, rationale and answer together. The model is
`final/`: validation generates L tokens, and where L leaves the answer no room it would choose a model that does not
reason. Tracking the ball takes 12 tokens and the stop 3.

{table(["L", *FIGURES.values()], *([n, *figures(row)] for n, row in s["lengths"].items()))}

## maj@k (the paper's Figure 3b)

%, over disjoint groups of k of the {MANY} samples of a question; maj@1 is the accuracy of one sample.

{table(["k", *KS], *([label, *map(spread, row.values())] for label, row in s["maj@k"].items()))}

## −log π(y|x) with and without a rationale (the paper's Figure 2)

Nats, percentiles over questions and seeds; with rationales a question's mean over its {MANY} samples. y is all of
"The answer is 4.": without a rationale −log π(y|x) is mostly the price of beginning with "The".

{table(["", "10%", "50%", "90%"], *nll)}
"""


def draw(path: Path, s: dict) -> None:
    """study.png: the rows' accuracy, accuracy against L, maj@k, and the distribution of −log π of the answer."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, ((bars, lengths), (votes, answers)) = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    colors, caps = {"base": "tab:blue", "LaTRO": "tab:orange"}, {"linewidth": 1, "capsize": 2}

    def line(axis, rows: dict, color: str, label: str, style: str = "o-") -> None:
        axis.errorbar(list(rows), [mean(v) for v in rows.values()], [stdev(v) for v in rows.values()], fmt=style,
                      color=color, label=label, markersize=4, **caps)

    for key, label, color, style, offset in (("accuracy", "greedy", "tab:orange", "o-", -0.2),
                                             ("maj@8", "maj@8", "tab:blue", "s--", 0.2)):
        values = [row[key] for row in s["table"].values()]
        bars.barh([i + offset for i in range(len(values))], [mean(v) for v in values], 0.36, color=color, label=label,
                  xerr=[stdev(v) for v in values], error_kw=caps)
        line(lengths, {n: row[key] for n, row in s["lengths"].items()}, color, f"LaTRO, {label}", style)
        lengths.axhline(mean(s["table"]["base"][key]), color=color, linestyle=":", label=f"base, {label}")
    bars.set_yticks(range(len(s["table"])), [label.removeprefix("LaTRO, ") for label in s["table"]], fontsize=9)
    bars.invert_yaxis()
    lengths.set_xticks(list(s["lengths"]))
    for label, row in s["maj@k"].items():
        line(votes, row, colors[label], label)
    votes.set_xscale("log", base=2)
    votes.set_xticks(KS, map(str, KS))
    for (label, row), style in zip(s["nll_percentiles"].items(), ("--", "-", "-")):
        answers.plot(row, range(1, 100), style, color=colors[label.split(",")[0]], label=label, linewidth=1)
    answers.set_xscale("log")
    for axis, x, y in ((bars, "accuracy, %", ""), (lengths, "rationale length L in training", "accuracy, %"),
                       (votes, "k samples that vote", "maj@k, %"),
                       (answers, "−log π of the gold answer, nats, at most", "questions, %")):
        axis.set(xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    bars.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default="docs", help="folder of study.md, study.json and study.png")
    parser.add_argument("--runs", type=Path, default="runs/study", help="folder of the runs and their evaluations")
    options = parser.parse_args(argv)
    with timed(options.out, options.runs):
        run_all(options.runs)
    summary = made_on(options.runs) | summarise(options.runs)
    publish(options.out, "study", summary, tables(summary))
    draw(options.out / "study.png", summary)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    evaluate.run_script(main)
