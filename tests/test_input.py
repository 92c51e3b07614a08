"""Bad input: one line that names the culprit and the way out, exit code 2, nothing written or overwritten."""
import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types

import pytest
from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import Mamba2Config, Mamba2ForCausalLM

import evaluate
import latro
from data import UserError, embedded_model, load_rows

GOOD = {"queries": "The ball is under cup 1. Swaps: 1-2. Where is it?", "responses": "The answer is 2.",
        "groundtruth": "2"}
MANY = [GOOD | {"queries": f"The ball is under cup {i // 4 + 1}. Swaps: 1-{i % 4 + 2}. Where is it?"}
        for i in range(20)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, broken models, and good and broken data files."""
    place = tmp_path_factory.mktemp("input")
    model, tokenizer = embedded_model()
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    for name in ("no_weights", "cut_weights", "no_tokenizer", "small_embedding", "no_eos", "missing_weights",
                 "bad_config"):
        shutil.copytree(place / "model", place / name)
    os.remove(place / "no_weights/model.safetensors")
    with open(place / "cut_weights/model.safetensors", "r+b") as file:
        file.truncate(1000)
    os.remove(place / "no_tokenizer/tokenizer.json")
    os.remove(place / "no_tokenizer/tokenizer_config.json")
    (place / "bad_config/config.json").write_text("{")
    weights = load_file(place / "missing_weights/model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, place / "missing_weights/model.safetensors", {"format": "pt"})
    tokenizer.add_tokens([f"extra{i}" for i in range(9)])
    tokenizer.save_pretrained(place / "small_embedding")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path := place / "no_eos" / name).exists():
            path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}))

    def write(name, *rows):
        (place / name).write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))

    write("good.jsonl", *MANY)
    write("empty.jsonl")
    write("one.jsonl", GOOD)
    write("broken.jsonl", GOOD, GOOD, '{"queries": ')
    write("list.jsonl", GOOD, "[1]")
    write("no_column.jsonl", GOOD, {k: v for k, v in GOOD.items() if k != "responses"})
    write("deep.jsonl", GOOD, "[" * 100_000)
    write("unanswered.jsonl", *[{"question": f"{i}+1?", "answer": "#### 2" if i else "#### "} for i in range(20)])
    (place / "runs/foreign").mkdir(parents=True)
    write("runs/foreign/metrics.jsonl", "somebody else's")
    write("empty_answer.jsonl", GOOD, GOOD | {"responses": ""})
    write("empty_query.jsonl", GOOD, GOOD | {"queries": []})
    write("number_answer.jsonl", GOOD, GOOD | {"responses": 5})
    write("bad_messages.jsonl", GOOD, GOOD | {"queries": [{"role": "user"}]})
    write("bad_rationale.jsonl", GOOD, GOOD | {"rationales": 3})
    write("null.jsonl", *MANY[:19], GOOD | {"groundtruth": None})
    write("surrogate.jsonl", *MANY[:19], GOOD | {"queries": "\ud83d"})
    write("system.jsonl", *MANY[:19], GOOD | {"queries": [{"role": "system", "content": "cup"}]})
    write("no_tokens.jsonl", *MANY[:19], GOOD | {"queries": [{"role": "user", "content": ""}]})
    write("options.jsonl", *[row | {"options": [1, 2]} for row in MANY])
    write("long_rationale.jsonl", *[row | {"rationales": "cup " * 240} for row in MANY])
    strict = ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
              "{{ m.content }}{% endfor %}")
    shutil.copytree(place / "model", place / "strict")
    (place / "strict/chat_template.jinja").write_text(strict)
    write("long.jsonl", *MANY[:19], GOOD | {"queries": "cup " * 400})
    (place / "latin.jsonl").write_bytes('{"queries": "é"}'.encode("latin-1"))
    for name in ("gsm", "arc", "math", "nothing"):
        (place / name).mkdir()
    write("gsm/train.jsonl", {"problem": "1+1?"})
    write("arc/train.jsonl", {"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "E"})
    write("gsm.jsonl", *[{"question": "1+1?", "answer": 2}] * 2)
    write("arc.jsonl", *[{"question": "q", "choices": ["a"], "answerKey": "A"}] * 2)
    write("letters.jsonl", *[row | {"options": ["1", "2"], "groundtruth": "B"} for row in MANY])
    write("mixed.jsonl", *MANY[:19], GOOD | {"groundtruth": "two"})
    write("math/train.jsonl", {"problem": "p", "solution": "no box"})
    (place / "only_train").mkdir()
    write("only_train/train.jsonl", *MANY)
    (place / "empty_stop.yaml").write_text("stop_seqs: ['']")
    (place / "beside").mkdir()
    shutil.copytree(place / "model", place / "beside/model")
    write("beside/config.yaml", "something: else")
    write("list.yaml", "- 1")
    write("broken.yaml", "a: [")
    write("unknown.yaml", "learnin_rate: 1")
    write("typed.yaml", "rloo_k: many")
    (place / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (place / "runs/held").mkdir()
    write("runs/held/config.yaml", "model_name_or_path: m\ndataset_name: cups")
    write("runs/held/metrics.jsonl")
    for name in ("other/best", "alien"):
        (place / "runs" / name).mkdir(parents=True)
    write("runs/other/best/weights", "somebody else's")
    write("runs/alien/config.yaml", "seed: 3\nlr: 0.1")
    write("runs/alien/metrics.jsonl", "garbage")
    (place / "runs/trained").mkdir()
    write("runs/trained/config.yaml", "dataset_name: cups\nmodel_name_or_path: m")
    write("runs/trained/metrics.jsonl")
    Mamba2ForCausalLM(Mamba2Config(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_heads=4,
                                   head_dim=8, state_size=4, n_groups=1)).save_pretrained(place / "mamba")
    tokenizer.save_pretrained(place / "mamba")
    write("a_file", "x")
    return place


JSONL = "--dataset_name jsonl --dataset_path "
TRAINING = [  # arguments of latro.py → what the line must say
    ("--learning_rat 1", "learning_rat: unknown key; did you mean learning_rate"),
    ("--qqq 1", "qqq: unknown key; did you mean --help"),
    ("--rloo_k many", "rloo_k.*many"), ("--rloo_k 2.5", "rloo_k.*2.5"), ("--learning_rate fast", "learning_rate.*fast"),
    ("--sanity_check maybe", "sanity_check.*maybe"), ("--objective ppo", "objective.*ppo"),
    ("--reward none", "reward.*none"),
    ("--stop_token end", "stop_token.*end"), ("--dtype int8", "dtype.*int8"), ("--seed", "seed"), ("stray", "stray"),
    ("--rloo_k 1", "rloo_k: 1 .*baseline"), ("--rloo_k 3", "rloo_k: 3 does not divide"), ("--rloo_k 0", "rloo_k"),
    ("--temperature 0", "temperature: 0"), ("--temperature -1", "temperature"), ("--temperature nan", "temperature"),
    ("--kl_coef -0.1", "kl_coef"), ("--kl_coef nan", "kl_coef"), ("--sft_penalty inf", "sft_penalty"),
    ("--max_steps 0", "max_steps"), ("--learning_rate -1", "learning_rate"), ("--learning_rate nan", "learning_rate"),
    ("--penalty_reward_value 0.5", "penalty_reward_value"), ("--num_train_epochs 0", "num_train_epochs"),
    ("--response_length 0", "response_length"), ("--num_samples -1", "num_samples"),
    ("--num_evaluations -1", "num_evaluations"), ("--date tomorrow", "date: tomorrow is not YYYY-MM-DD"),
    ("--max_grad_norm -1", "max_grad_norm"), ("--per_device_train_batch_size 0", "per_device_train_batch_size"),
    ("--config missing.yaml", "missing.yaml"), ("--config list.yaml", "list.yaml"),
    ("--config broken.yaml", "broken.yaml"),
    ("--config binary.yaml", "binary.yaml"),
    ("--config unknown.yaml", "learnin_rate: unknown key; did you mean learning_rate"),
    ("--config typed.yaml", "rloo_k.*many"), ("--config empty_stop.yaml", "stop_seqs: an empty string"),
    ("--config", "config"),
    ("--dataset_name gsm9k", "gsm9k: unknown; choose one of"), ("--dataset_name jsonl", "needs dataset_path"),
    (JSONL + "nowhere.jsonl", "nowhere.jsonl: no such"), (JSONL + "empty.jsonl", "empty.jsonl: holds no rows"),
    (JSONL + "one.jsonl", "1 training questions"), (JSONL + "broken.jsonl", "broken.jsonl, line 3"),
    (JSONL + "list.jsonl", "line 2"), (JSONL + "deep.jsonl", "deep.jsonl, line 2"),
    ("--dataset_name gsm8k --dataset_path unanswered.jsonl", "unanswered.jsonl: no number is behind #### in "),
    ("--run_name foreign", "runs/foreign: holds .*metrics.jsonl.*, but no run"),
    ("--run_name foreign --checkpoint_path latest", "runs/foreign: holds .*metrics.jsonl.*, but no run"),
    ("--run_name other", "runs/other: holds .*best.*, but no run"), ("--run_name alien", "runs/alien: holds .*, but no run"),
    ("--run_name alien --checkpoint_path latest", "runs/alien: holds .*, but no run"), ("--run_name ..", "run_name .*: is a path"),
    ("--stop_seqs A --max_step 3", "max_step: unknown key; did you mean max_steps"),
    ("--stop_seqs A --config no.yaml", "no.yaml"),
    (JSONL + "no_column.jsonl", "row 2: no column responses"),
    (JSONL + "empty_answer.jsonl", "row 2: column responses is empty"),
    (JSONL + "empty_query.jsonl", "row 2: column queries is empty"),
    (JSONL + "number_answer.jsonl", "row 2: column responses"),
    (JSONL + "bad_messages.jsonl", "row 2: column queries"),
    (JSONL + "bad_rationale.jsonl", "row 2: column rationales"),
    (JSONL + "null.jsonl", "no groundtruth in .*; only `grader: none` does without"), (JSONL + "long.jsonl", "context"),
    (JSONL + "latin.jsonl", "UTF-8"),
    (JSONL + "surrogate.jsonl", "line 20: .*surrogates"),
    (JSONL + "system.jsonl --model_name_or_path strict", "refuses .*no system role"),
    (JSONL + "no_tokens.jsonl", "queries: .* has no tokens"),
    (JSONL + "options.jsonl --grader option", "grader option"),
    (JSONL + "long_rationale.jsonl --objective sft", "its rationale and its answer take 2.. tokens"),
    (JSONL + "nothing", "nothing"), ("--dataset_name gsm8k --dataset_path gsm", "no column (question|answer)"),
    ("--dataset_name gsm8k --dataset_path gsm.jsonl", "gsm.jsonl, row 1: column answer is no str"),
    ("--dataset_name arc_challenge --dataset_path arc.jsonl", "arc.jsonl, row 1: column choices is no dict"),
    (JSONL + "letters.jsonl --grader option", "groundtruth 'B' is none of its row's options"),
    ("--dataset_name arc_challenge --dataset_path arc", "answerKey"),
    ("--dataset_name math --dataset_path math", "math"),
    (JSONL + "good.jsonl --grader option", "grader option"), (JSONL + "good.jsonl --grader guess", "grader.*guess"),
    (JSONL + "good.jsonl --model_name_or_path ./nowhere", "nowhere: cannot be used"),
    (JSONL + "good.jsonl --model_name_or_path a_file", "a_file: cannot be used"),
    (JSONL + "good.jsonl --model_name_or_path no/body", "model no/body: cannot be used"),
    *[(JSONL + f"good.jsonl --model_name_or_path {name}", name) for name in (
        "nothing", "no_weights", "cut_weights", "no_tokenizer", "small_embedding", "missing_weights", "bad_config")],
    (JSONL + "good.jsonl --model_name_or_path no_eos", "EOS"),
    (JSONL + "good.jsonl --run_name held", "runs/held: holds a run already"),
    (JSONL + "only_train", "split test"),
    (JSONL + "good.jsonl --shard_size 3", "shard_size: 3 does not divide the 1 ranks"),
    (JSONL + "good.jsonl --checkpoint_path nothing", "checkpoint_path nothing: no whole checkpoint"),
    (JSONL + "good.jsonl --checkpoint_path latest", "checkpoint_path: latest needs run_name"),
    ("--stop_seqs The --objective sft --temperature 0", "temperature"),
    (JSONL + "good.jsonl --output_dir a_file", "a_file"), (JSONL + "good.jsonl --run_name a/b", "run_name"),
    (JSONL + "good.jsonl --attn_implementation sdpaa", "sdpaa"),
    (JSONL + "good.jsonl --grader scorer", "grader scorer: no column scorer"),
    ("--dataset_options size=9", "dataset_options: cups has none"),
    ("--dataset_name gsm8k:main", "gsm8k:main: unknown"),
    ("--dataset_name reasoning_gym:chain_sun", "chain_sun: no such task; near it are .'chain_sum'"),
    ("--dataset_name reasoning_gym:rush_hour", "rush_hour: it has no gold answers"),
    *[(f"--dataset_name reasoning_gym:chain_sum --dataset_options {words}", "dataset_options .*: chain_sum refuses")
      for words in ("size=many", "size=0", "terms=3", "size", "max_terms=1")],
]
JUDGING = [
    ("", "no trained run"), ("--model beside/model", "dataset_name"), ("--out x.json --model", "model"),
    ("--out x.json", "model"),
    ("--model runs/cups-base/final --dataset_name cups", "latro.py` makes it"),
    ("--model model --dataset_name jsonl --dataset_path good.jsonl --split test", "single file"),
    ("--model model", "dataset_name"), ("--model ./nowhere --dataset_name cups", "nowhere"),
    ("--model model --dataset_name cup", "did you mean|choose one of"), ("--modle model", "did you mean model"),
    ("--model model --dataset_name cups --split dev", "split dev"),
    ("--model model --dataset_name cups --few_shot 8", "few_shot"),
    ("--model model --dataset_name gsm8k --few_shot 9", "few_shot"),
    ("--model model --dataset_name cups --limit 0", "limit"),
    ("--model model --dataset_name cups --num_samples -1", "num_samples"),
    ("--model model --dataset_name cups --num_samples 2 --temperature 0", "temperature"),
    ("--model model --dataset_name cups --response_length -1", "response_length"),
    ("--model model --dataset_name cups --limit 2 --out nowhere/x.json", "nowhere/x.json"),
    ("--model model --dataset_name cups --limit 2 --out runs", "out runs: no file in an existing folder"),
    ("--model runs/trained --out x.json", "out x.json: is one file"),
    ("--model runs/trained", "model m: cannot be used"),
    ("--model runs/trained/best", "model runs/trained/best: cannot be used"),
    ("--model mamba --dataset_name cups", "model mamba: cannot be used .it cannot be sampled or scored"),
]


def contents(folder):
    found = {}
    for path, _, files in os.walk(folder):
        found[path] = None
        for name in files:
            with open(os.path.join(path, name), "rb") as file:
                found[os.path.join(path, name)] = file.read()
    return found


@pytest.mark.parametrize("main, arguments, says", [(latro.main, *case) for case in TRAINING] +
                         [(evaluate.main, *case) for case in JUDGING])
def test_bad_input(place, monkeypatch, main, arguments, says):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = contents(place)
    words = arguments.split()
    if main is latro.main and "--config" not in words:
        words = ["--response_length", "8", "--model_name_or_path", "model", *words]
    elif main is evaluate.main:
        words = ["--response_length", "8", *words]
    with pytest.raises((UserError, OSError), match=says) as caught:
        main(words)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert contents(place) == before


@pytest.mark.parametrize("name, says", [("latro.py", "objective"), ("evaluate.py", "objective")])
def test_one_line_and_exit_code_2(place, name, says):
    done = subprocess.run([sys.executable, os.path.join(ROOT, name), "--objective", "ppo"], cwd=place,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and says in line


def test_no_space_left_on_the_device(place, monkeypatch):
    """The disk fills while the best model is written: one line, and no half-written folder."""
    monkeypatch.chdir(place)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    arguments = JSONL + "good.jsonl --model_name_or_path model --max_steps 1 --response_length 8 --run_name full"
    with pytest.raises(UserError, match="full/best: cannot be written.*No space left on device"):
        latro.main(arguments.split())
    assert not os.path.exists(place / "runs/full/best") and not os.path.exists(place / "runs/full/best.partial")
    shutil.rmtree(place / "runs/full")


def test_a_head_that_is_not_the_models_is_found_before_anything_is_written(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(latro.Scorer, "head", lambda self, hidden: 3 * self.model.get_output_embeddings()(hidden))
    before = contents(place)
    with pytest.raises(UserError, match="model model: cannot be used .it cannot be sampled or scored: score is off by"):
        latro.main((JSONL + "good.jsonl --model_name_or_path model --max_steps 1 --response_length 8").split())
    assert contents(place) == before


def test_wandb(place, monkeypatch):
    """Missing: said before anything is written. There: every row is logged, evaluations under their split."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("WANDB_PROJECT", "p")
    arguments = (JSONL + "good.jsonl --model_name_or_path model --response_length 8 --max_steps 2 --run_name w").split()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    with pytest.raises(UserError, match="wandb is missing"):
        latro.main(arguments)
    assert not os.path.exists("runs/w")
    rows = []
    ids = []
    run = types.SimpleNamespace(log=lambda row, step: rows.append(row | {"at": step}), id="an-id",
                                finish=lambda: ids.append("finished"))
    wandb = types.SimpleNamespace(init=lambda **options: ids.append((options["id"], options["resume"])) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: True if name == "wandb" else find(name, *rest))
    latro.main(arguments)
    assert [row["at"] for row in rows] == [0, 1, 1, 2, 2]
    assert "validation/accuracy" in rows[0] and "reward" in rows[1] and not any("split" in row for row in rows)
    shutil.rmtree("runs/w/final")
    # goes on in the same run there
    latro.main([*arguments, "--checkpoint_path", "latest"])
    assert ids == [(None, "allow"), "finished", ("an-id", "allow"), "finished"]
    wandb.init = lambda **options: 1 / 0
    with pytest.raises(UserError, match="WANDB_PROJECT: division by zero; log in"):
        latro.main([*arguments, "--run_name", "w2"])
    wandb.init = lambda **options: run
    latro.main([*arguments, "--run_name", "w2"])  # nothing of the failed start is in the way
    shutil.rmtree("runs/w2")
    shutil.rmtree("runs/w")


def test_what_looks_odd_but_is_right(place, monkeypatch):
    """Stops that begin with dashes, or none, from YAML; no git on the machine; less than one step's worth of epochs."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("PATH", "")
    (place / "odd.yaml").write_text("stop_seqs: ['---', '-x']")
    latro.main(("--config odd.yaml --num_train_epochs 0.001 --response_length 8 --run_name odd --model_name_or_path "
                "model " + JSONL + "good.jsonl").split())
    settings = evaluate.read_yaml("runs/odd/config.yaml")
    assert settings["stop_seqs"] == ["---", "-x"] and "commit unknown" in open("runs/odd/config.yaml").readline()
    assert sum("reward" in line for line in open("runs/odd/metrics.jsonl")) == 1
    shutil.rmtree("runs/odd")
    (place / "no_stop.yaml").write_text("stop_seqs:")
    assert latro.load_config(["--config", "no_stop.yaml"]).stop_seqs == []


def test_one_grader_for_all_and_results_before_they_are_printed(place, monkeypatch):
    """The grader is that of all rows, whatever part of them is looked at."""
    monkeypatch.chdir(place)
    seen, arguments = [], (JSONL + "mixed.jsonl --response_length 8 --limit 1").split()
    monkeypatch.setattr(evaluate, "load_model", lambda *a: 1 / 0)
    check_rows = evaluate.check_rows
    monkeypatch.setattr(evaluate, "check_rows", lambda rows, grader, why: seen.append((len(rows), grader))
                        or check_rows(rows, grader, why))
    with pytest.raises(ZeroDivisionError):
        latro.main([*arguments, "--model_name_or_path", "model", "--max_steps", "1", "--run_name", "mixed"])
    assert seen == [(1, "text")]  # its closing table: the validation rows
    shutil.rmtree("runs/mixed")
    monkeypatch.undo()
    monkeypatch.chdir(place)
    judge = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda s, model, tokenizer, examples, grader, *rest:
                        seen.append(grader) or judge(s, model, tokenizer, examples, grader, *rest))
    monkeypatch.setattr(evaluate, "print_results", lambda results: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate.main([*arguments, "--model", "model"])
    assert seen[1:] == ["text"] and json.load(open("evaluation-model-dataset_name=jsonl-dataset_path=mixed.jsonl-response_length=8-limit=1-split=all.json"))["split"] == "all"
    os.remove("evaluation-model-dataset_name=jsonl-dataset_path=mixed.jsonl-response_length=8-limit=1-split=all.json")


def test_good_rows_load(place):
    assert len(load_rows("jsonl", "all", str(place / "good.jsonl"))) == 20


def test_output_that_cannot_show_every_letter():
    command = [sys.executable, "-c", "from evaluate import run_script; run_script(lambda argv: print('log π'))"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "latin-1"}, capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout) == (0, "log ?\n"), done.stderr
