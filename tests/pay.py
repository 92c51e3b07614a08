"""Where rationales pay: a picture of evaluations that `python evaluate.py` wrote.

    python tests/pay.py "cups=runs/cups-base/evaluation.json" "GSM8K=gsm8k.json" … [--out docs/pay.png]

A panel for each LABEL=FILE: mean log π of the gold answer behind a rationale, by the share of rationales that are right (a line
from the wrong ones' to the right ones'), beside that of a guess. A dot stands at the share that the model has.
"""
import argparse
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure


def draw(path: Path, found: dict[str, dict]) -> None:
    figure = Figure(figsize=(3.4 * len(found), 3.6), layout="constrained")
    for axis, (label, pay) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items()):
        wrong, right, guess = (pay[f"logprob_{kind}"] for kind in ("wrong", "right", "guess"))
        share, needed = pay["right"], pay["break_even"]
        axis.plot([0, 100], [wrong, right], color="C0", label="behind a rationale")
        axis.axhline(guess, color="C1", linestyle="--", label="of a guess")
        axis.axvline(100 * needed, color="0.6", linestyle=":", label=f"break-even, {needed:.0%}")
        axis.plot(100 * share, wrong + share * (right - wrong), "o", color="C0", label=f"this model, {share:.0%}")
        axis.set(title=label, xlabel="rationales that are right, %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right")
    figure.supylabel("mean log π of the gold answer", fontsize=10)
    figure.savefig(path, dpi=130)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="LABEL=FILE")
    parser.add_argument("--out", type=Path, default="docs/pay.png")
    options = parser.parse_args(argv)
    pairs = [word.partition("=")[::2] for word in options.files]
    draw(options.out, {label: json.loads(Path(file).read_text("utf-8"))["break_even"] for label, file in pairs})


if __name__ == "__main__":
    main(sys.argv[1:])
