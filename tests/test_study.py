"""The embedded study: its figures against ones worked out by hand, its commands, and what it does not do again."""
import json
import os

import pay
import pytest
import study
import words

import evaluate
import latro


def evaluation(name, seed):
    """Two questions, whose right answer is "1"."""
    def samples(*predictions):
        return [{"prediction": p, "correct": p == "1"} for p in predictions] * 16

    accuracy, answer = (0.1, -2.0) if name == "base" else (0.5 + 0.1 * seed, -1.0 - seed)
    rows = [{"samples": first, "answer_logprob": answer + more, "answer_logprob_no_rationale": bare}
            for first, more, bare in ((samples("1", "2", "1", None), -0.5, -10.0),
                                      (samples("2", "1", "2", "2"), 0.5, -12.0))]
    return {"n": 2, "accuracy": accuracy, "answer_logprob": answer, "rationale_length": 12.0 + seed, "rows": rows}


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """(folder, settings): a folder with a base; the settings of each command that the study gives are put into the
    list, and in place of the command, which is not run, the files that it would make are made up."""
    commands = []

    def script(log, name, *arguments):
        argv = [str(a) for a in arguments]
        if name == "latro.py":
            settings = latro.load_config(argv)
            folder = tmp_path / "runs" / settings.run_name
            for made in ("best", "final"):
                (folder / made).mkdir(parents=True)
            (folder / "config.yaml").write_text("# torch 2, commit abc\nmodel_name_or_path: x\n")
        else:
            settings = evaluate.settle(evaluate.Settings, evaluate.parse(evaluate.Settings, argv))
            assert os.path.isdir(settings.model) and settings.response_length == 24
            name, _, seed = os.path.basename(settings.out).removesuffix(".json.partial").rpartition("-")
            assert settings.seed == int(seed) and settings.num_samples == (64 if name in ("base", "latro-best") else 8)
            with open(settings.out, "w") as file:
                json.dump(evaluation(name, int(seed)), file)
        commands.append(settings)

    monkeypatch.setattr(study, "script", script)
    (tmp_path / "runs/cups-base/final").mkdir(parents=True)
    return tmp_path, commands


def run(folder):
    study.main(["--out", str(folder / "docs"), "--runs", str(folder / "runs")])


def test_tables_and_picture(fake):
    folder, _ = fake
    run(folder)
    page, figures = (folder / "docs/study.md").read_text(), json.loads((folder / "docs/study.json").read_text())
    # seeds: base has three equal ones, the others 50, 60, 70 and −1, −2, −3; the lengths are 12, 13, 14
    # maj@8: question 1 has 4 votes for "1" and 2 for "2", question 2 has 2 and 6
    assert "| base | 10.0 ± 0.0 | 50.0 ± 0.0 | −2.00 ± 0.00 | 13.0 ± 1.0 |" in page
    assert "| LaTRO | 60.0 ± 10.0 | 50.0 ± 0.0 | −2.00 ± 1.00 | 13.0 ± 1.0 |" in page
    assert "| LaTRO, reward prob | 60.0 ± 10.0 |" in page and "`--reward prob`: π(y\\|x⊕z)" in page
    for n in (2, 4, 8, 12, 16, 24):
        assert f"| {n} | 60.0 ± 10.0 | 50.0 ± 0.0 |" in page
    # maj@1: 2 of 4 samples and 1 of 4; maj@2: "1 2" is a tie that the first to come wins, "2 1" too
    assert "| base | 37.5 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0 |" in page and figures["maj@k"]["LaTRO"]["1"] == [37.5] * 3
    # −log π of six rows: three times 10 and 12; three times 1.5 and 2.5; 0.5, 1.5, 1.5, 2.5, 2.5, 3.5
    assert "| base, no rationale | 10.00 | 11.00 | 12.00 |" in page
    assert "| base, its rationales | 1.50 | 2.00 | 2.50 |" in page
    assert "| LaTRO, its rationales | 1.00 | 2.00 | 3.00 |" in page
    assert figures["table"]["LaTRO"]["accuracy"] == pytest.approx([50, 60, 70]) and figures["questions"] == 2
    assert f"It took\n0 minutes on {os.cpu_count()} cores, " in page and "; torch 2, commit abc.\n" in page
    assert (folder / "docs/study.png").read_bytes()[:4] == b"\x89PNG"


def test_every_vote_is_evaluates_own(tiny, cups):
    model, tokenizer = tiny
    settings = evaluate.Settings(response_length=12)
    result = evaluate.evaluate(settings, model, tokenizer, cups, "number", 8, "")
    assert study.maj(result["rows"], 8) == 100 * result["maj_at_k"]


def test_runs_are_what_the_page_says_and_made_once(fake):
    folder, commands = fake
    run(folder)
    runs = {c.run_name: c for c in commands if isinstance(c, latro.Config)}
    assert len(runs) == 3 * 14 and len(commands) - len(runs) == 3 * 16
    assert all(c.sequences == 128 and c.total_steps(3600, 1) == 40 and c.kl_coef in (0, 0.05) for c in runs.values())
    assert [runs[f"rloo_k-{k}-0"].prompts for k in (2, 4, 16)] == [64, 32, 8] and runs["latro-0"].prompts == 16
    assert runs["length-4-2"].response_length == 4 and runs["length-4-2"].seed == 2
    commands.clear()
    run(folder)
    assert commands == []
    (folder / "runs/base-2.json").unlink()
    run(folder)
    assert [c.model for c in commands] == [str(folder / "runs/cups-base/final")]
    assert len((folder / "runs/seconds.txt").read_text().split()) == 3


def test_a_run_that_fails_ends_the_study(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "ROOT", tmp_path)
    (tmp_path / "latro.py").write_text("print('the reason'); raise SystemExit(3)")
    (tmp_path / "evaluate.py").write_text("import time; time.sleep(60)")
    (tmp_path / "runs/cups-base/final").mkdir(parents=True)
    with pytest.raises(study.UserError, match="latro.py failed in the study.*latro-0.log"):
        run(tmp_path)
    assert "the reason" in (tmp_path / "runs/latro-0.log").read_text()
    assert study.CHILDREN and all(child.poll() is not None for child in study.CHILDREN)


@pytest.fixture
def fake_words(monkeypatch, tmp_path):
    """As `fake`, for the words study; accuracy is 0.1 before training, then 0.5, 0.6 of two seeds."""
    commands = []

    def script(log, name, *arguments, threads=1):
        argv = [str(a) for a in arguments]
        if name == "latro.py":
            settings = latro.load_config(argv)
            run = tmp_path / "runs" / settings.run_name
            for made in ("best", "final"):
                (run / made).mkdir(parents=True)
            (run / "config.yaml").write_text("# torch 2, commit abc\nmodel_name_or_path: x\n")
            rows = [{"step": step, "split": "validation", "accuracy": 0.5, "rationale_length": 9.0} for step in (0, 24)]
            (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        else:
            settings = evaluate.settle(evaluate.Settings, evaluate.parse(evaluate.Settings, argv))
            trained = os.path.basename(settings.model) == "best"
            accuracy = 0.5 + 0.1 * settings.seed if trained else 0.1
            result = dict(accuracy=accuracy, accuracy_ci95=[accuracy - 0.05, accuracy + 0.05], maj_at_k=accuracy, finished=1.0,
                          answer_logprob=-2.0, answer_logprob_no_rationale=-4.0, rationale_length=9.0, break_even=dict(
                              right=0.25, break_even=0.75, logprob_right=-1.0, logprob_wrong=-9.0, logprob_guess=-3.0))
            with open(settings.out, "w") as file:
                json.dump(result, file)
        commands.append(settings)

    monkeypatch.setattr(words, "script", script)
    monkeypatch.setattr(words, "HUB", "shipped")
    monkeypatch.delenv("SMOLLM2", raising=False)
    return tmp_path, commands


def test_the_words_study(fake_words):
    folder, commands = fake_words
    argv = ["--model", "shipped", "--seeds", "2", "--out", str(folder / "docs"), "--runs", str(folder / "runs")]
    words.main(argv)
    page = (folder / "docs/words.md").read_text()
    assert "| after the short SFT | 10.0 [5–15] | 10.0 | −2.00 | −4.00 | 100.0 | 9.0 |" in page
    assert "| LaTRO | 55.0 ± 7.1 [45–55] | 55.0 ± 7.1 | −2.00 ± 0.00 |" in page and "over 2 seeds" in page
    assert "| LaTRO, `reward: prob` | 25 | 75 | −1.0 | −9.0 | −3.0 |" in page
    assert (folder / "docs/words.png").read_bytes()[:4] == b"\x89PNG"
    base, *runs = [c for c in commands if isinstance(c, latro.Config)]
    judged = [c for c in commands if not isinstance(c, latro.Config)]
    assert (base.model_name_or_path, base.dataset_name, base.objective) == ("shipped", "words_base", "sft")
    assert len(runs) == 2 * len(words.ROWS) and len(judged) == 2 * len(words.ROWS) + 2
    start = str(folder / "runs/base/final")
    assert all(c.model_name_or_path == start and c.max_steps == runs[0].max_steps for c in runs)
    kept = [c for c in runs if c.objective == "latro"]
    assert {(c.sft_penalty, c.reward) for c in kept} == {(1, "logprob"), (0, "logprob"), (1, "prob")}
    assert {c.dataset_name for c in runs if c.objective == "sft"} == {"words", "words_direct"}
    assert all((c.limit, c.num_samples, c.temperature, c.response_length) == (200, 8, kept[0].temperature, 48) for c in judged)
    commands.clear()
    words.main(argv)
    assert commands == []
    file = folder / "runs/base-0.json"
    pay.main([f"cups={file}", f"words={file}", "--out", str(folder / "pay.png")])
    assert (folder / "pay.png").read_bytes()[:4] == b"\x89PNG"
