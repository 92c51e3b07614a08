"""Settings: what is written is what is meant, whichever way it is given; and what a run keeps from one day to the next."""
import datetime
import os
import shutil
import signal
import time
import types

import pytest
from conftest import rows
from transformers import AutoTokenizer

import data
import evaluate
import latro
from data import UserError
from evaluate import parse, read_yaml, settle
from latro import Config

SHORT = ("--config", "tiny.yaml", "--sanity_check", "true", "--num_samples", "0", "--max_steps")


@pytest.mark.parametrize("written, key, value", [
    ("run_name: 12:30", "run_name", "12:30"), ("run_name: 1.10", "run_name", "1.10"), ("run_name: 007", "run_name", "007"),
    ("run_name: 1e3", "run_name", "1e3"), ("run_name: yes", "run_name", "yes"), ("run_name: 2024-01-01", "run_name", "2024-01-01"),
    ("run_name: null", "run_name", None), ("run_name: ~", "run_name", None), ("run_name:", "run_name", None),
    ("stop_seqs: [yes]", "stop_seqs", ["yes"]), ("stop_seqs: [1.10, 12:30]", "stop_seqs", ["1.10", "12:30"]),
    ("stop_seqs: no", "stop_seqs", ["no"]), ("stop_seqs: []", "stop_seqs", []), ("stop_seqs: ['#', null]", "stop_seqs", ["#", "null"]),
    ("learning_rate: 5e-7", "learning_rate", 5e-7), ("seed: 010", "seed", 10), ("sanity_check: True", "sanity_check", True),
    ("max_steps: null", "max_steps", None), ("dtype: float32", "dtype", "float32"), ("dataset_path: ~/x", "dataset_path", "HOME/x"),
    ("model_name_or_path: ~/m", "model_name_or_path", "HOME/m"), ("date: 2024-02-29", "date", "2024-02-29")])
def test_a_text_key_gets_the_text_that_was_written(tmp_path, written, key, value):
    (tmp_path / "c.yaml").write_text(written)
    value = value.replace("HOME", os.path.expanduser("~")) if isinstance(value, str) else value
    config = latro.load_config(["--config", str(tmp_path / "c.yaml")])
    assert getattr(config, key) == value and type(getattr(config, key)) is type(value)


@pytest.mark.parametrize("written", ["model_name_or_path: {a: b}", "model_name_or_path: [a, b]", "model_name_or_path:",
                                     "seed: 1.5", "seed: yes", "sanity_check: yes", "sanity_check: 1", "stop_seqs: {a: b}",
                                     "stop_seqs: [[a]]", "dtype: null", "learning_rate: 1,5", "seed: [1, 2]"])
def test_a_value_of_another_type_is_named(tmp_path, written):
    (tmp_path / "c.yaml").write_text(written)
    with pytest.raises(UserError, match=written.partition(":")[0]):
        latro.load_config(["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize("words, stops", [
    ("--stop_seqs --end", ["--end"]), ("--stop_seqs a --end --seed 1", ["a", "--end"]), ("--stop_seqs=--", ["--"]),
    ("--stop_seqs -- ### --seed 1", ["--", "###"]), ("--seed 1 --stop_seqs", []), ("--stop_seqs --seed=1", [])])
def test_stop_sequences_that_begin_with_dashes(words, stops):
    assert settle(Config, parse(Config, words.split())).stop_seqs == stops


def test_the_settings_of_a_run_are_read_back_as_they_were(tmp_path):
    config = Config(run_name="12:30", stop_seqs=["yes", "null", "- a: b", "\n"], max_steps=3, learning_rate=1e-6, date="2024-02-29")
    _, state = latro.find_checkpoint(tmp_path, None)
    latro.begin(tmp_path, config, state)
    assert settle(Config, read_yaml(f"{tmp_path}/config.yaml")) == config


def test_data_is_judged_before_the_base_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latro, "load_model", lambda *a: 1 / 0)
    for arguments, says in ((["--dataset_name", "nosuch"], "dataset_name nosuch: unknown"),
                            (["--dataset_name", "jsonl", "--dataset_path", "no.jsonl"], "no.jsonl: no such file"),
                            (["--grader", "best"], "grader best: unknown")):
        with pytest.raises(UserError, match=says):
            latro.main(arguments)
    assert not os.listdir(tmp_path)


def test_an_evaluation_at_the_end_alone(apart):
    latro.main([*SHORT, "2", "--num_evaluations", "0", "--run_name", "x"])
    assert [row["step"] for row in rows("runs/x/metrics.jsonl") if "split" in row] == [2]
    assert os.path.exists("runs/x/best") and os.path.exists("runs/x/evaluation-best.json")


@pytest.mark.parametrize("before, at", [(1, 0), (2, 2), (3, 4)])
def test_told_to_stop_in_an_evaluation(apart, monkeypatch, before, at):
    """It ends at once, what was learned is kept, no step follows; the same command goes on to the same end."""
    real, calls, judged = latro.evaluate, [], evaluate.grade

    def told(*arguments):
        calls.append(1)
        if len(calls) == before:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    arguments = [*SHORT, "4", "--num_evaluations", "2", "--run_name", "x", "--checkpoint_path", "latest"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(latro, "evaluate", told)
        patch.setattr(evaluate, "grade", lambda *a: 1 / 0 if len(calls) == before else judged(*a))
        latro.main(arguments)
    assert latro.checkpoints("runs/x") == [f"runs/x/checkpoints/step-{at}"] * (at > 0)
    assert not os.path.exists("runs/x/final")
    latro.main(arguments)
    steps = [(row["step"], "split" in row) for row in rows("runs/x/metrics.jsonl")]
    assert steps == [(0, True), (1, False), (2, False), (2, True), (3, False), (4, False), (4, True)]


def test_a_second_signal_ends_at_once(apart, monkeypatch):
    """One that comes later: torchrun passes the first one on."""
    class Gone(Exception):
        pass

    def leave(code):
        raise Gone(code)

    def twice(*arguments):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 5)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(latro, "update", twice)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with pytest.raises(Gone, match="130"):
            latro.main([*SHORT, "2", "--num_evaluations", "0", "--run_name", "x"])
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
            signal.signal(number, handler)


DATED = ("{% for m in messages %}The {{ m.content }}{% endfor %}{{ strftime_now('%d %b %Y') }}{% set f = '%' ~ 'A' %}"
         "{% set now = strftime_now %}{{ now(f) }}{% if strftime_now is defined %} The{% endif %}")


def test_a_template_that_prints_todays_date_prints_the_runs(apart, monkeypatch):
    """However late it goes on or is evaluated, and in the tokenizer that is written, too."""
    with open("runs/cups-base/final/chat_template.jinja", "w") as file:
        file.write(DATED)
    (own := open("rows.jsonl", "w")).write("\n".join(
        '{"queries": [{"role": "user", "content": "ball %d"}], "responses": "The answer is 2.", "groundtruth": "2"}' % i
        for i in range(20)))
    own.close()
    seen, load = [], evaluate.load_model

    def loaded(*arguments):
        model, tokenizer = load(*arguments)
        seen.append(data.prompt_text(tokenizer, data.user("?")))
        return model, tokenizer

    arguments = [*SHORT, "2", "--dataset_name", "jsonl", "--dataset_path", "rows.jsonl", "--run_name", "x", "--save_steps",
                 "1", "--checkpoint_path", "latest"]
    monkeypatch.setattr(latro, "load_model", loaded)
    monkeypatch.setattr(evaluate, "load_model", loaded)
    latro.main(arguments)
    today = datetime.date.today()
    prompt = f"The ?{today:%d %b %Y}{today:%A} The"
    assert seen == [prompt] * 3 and read_yaml("runs/x/config.yaml")["date"] == [str(today)]
    assert data.prompt_text(AutoTokenizer.from_pretrained("runs/x/best"), data.user("?")) == prompt
    shutil.rmtree("runs/x/final")
    shutil.rmtree("runs/x/checkpoints/step-2")
    years_later = types.SimpleNamespace(**vars(time) | {"strftime": lambda form: "2031-01-01"})
    monkeypatch.setattr(latro, "time", years_later)
    latro.main(arguments)
    assert seen == [prompt] * 6
    evaluate.main(["--model", "runs/x", "--date", "2024-02-29"])
    assert seen[6:] == ["The ?29 Feb 2024Thursday The"] * 2  # base and best alike
    for day in ("2024-13-01", "2024-2-9", "20240229"):
        with pytest.raises(UserError, match=f"date: {day} is not YYYY-MM-DD"):
            evaluate.main(["--model", "runs/x", "--date", day])


def test_evaluations_of_other_files_have_other_names(apart):
    for folder in ("a", "b"):
        os.mkdir(folder)
        with open(f"{folder}/rows.jsonl", "w") as file:
            file.write('{"queries": "The ball is under cup 1.", "responses": "The answer is 2.", "groundtruth": "2"}\n' * 2)
        evaluate.main(["--model", "runs/cups-base/final", "--dataset_name", "jsonl", "--dataset_path", f"{folder}/rows.jsonl",
                       "--response_length", "4", "--stop_seqs", "答" * 99])
    assert sum(name.startswith("evaluation-") for name in os.listdir("runs/cups-base")) == 2


def test_a_token_that_the_model_does_not_know_is_named(apart):
    """Special tokens may lie beyond the embedding, as long as no text has them."""
    tokenizer = AutoTokenizer.from_pretrained("runs/cups-base/final")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained("runs/cups-base/final")
    for word in ("", "<image>"):
        with open("rows.jsonl", "w") as file:
            for i in range(20):
                file.write('{"queries": "The ball %s is under cup %d.", "responses": "The answer is 2.", "groundtruth": "2"}\n'
                           % (word, i))
        for main, more in ((evaluate.main, ["--model", "runs/cups-base/final"]), (latro.main, [*SHORT, "1", "--run_name", "x"])):
            arguments = [*more, "--dataset_name", "jsonl", "--dataset_path", "rows.jsonl", "--response_length", "4"]
            if word:
                with pytest.raises(UserError, match="the model has no token 33, '<image>'"):
                    main(arguments)
            else:
                main(arguments)
                shutil.rmtree("runs/x", ignore_errors=True)


def test_a_job_that_waited_goes_on_from_the_newest_checkpoint(apart, monkeypatch):
    """While it loaded its model, another one of the same run went on."""
    arguments = [*SHORT, "2", "--num_evaluations", "1", "--run_name", "x", "--save_steps", "1", "--checkpoint_path", "latest"]
    load, update, steps = latro.load_model, latro.update, []

    def meanwhile(*inputs):
        monkeypatch.setattr(latro, "load_model", load)
        latro.main(arguments)
        shutil.rmtree("runs/x/final")
        os.remove("runs/x/evaluation-best.json")
        monkeypatch.setattr(latro, "update", lambda *a: steps.append(1) or update(*a))
        return load(*inputs)

    monkeypatch.setattr(latro, "load_model", meanwhile)
    latro.main(arguments)
    assert not steps and latro.checkpoints("runs/x") == ["runs/x/checkpoints/step-2", "runs/x/checkpoints/step-1"]
