"""The benchmark's baselines are right: of the same rollouts they have the loss and the gradient of latro.update."""
import argparse
import copy
import dataclasses
import json
from functools import partial
from statistics import fmean

import bench
import pytest
import torch
from test_invariance import one_update

import latro
from evaluate import Scorer

CPU = torch.device("cpu")


class Recorder(torch.optim.AdamW):
    def step(self):
        self.gradients = [p.grad.clone() for p in self.param_groups[0]["params"]]
        super().step()


@pytest.fixture
def theirs(tiny):
    """A baseline's side that starts where test_invariance's update does, with a reference that differs."""
    policy, reference = copy.deepcopy(tiny[0]), copy.deepcopy(tiny[0]).requires_grad_(False)
    for parameter in reference.parameters():
        parameter *= 1.1
    side = bench.Side(policy, reference, policy, tiny[1], CPU)
    side.optimizer = Recorder(policy.parameters())
    return side


@pytest.mark.parametrize("learn", [bench.released, bench.trl])
def test_same_loss_and_gradient(learn, theirs, tiny, cups):
    settings = {"temperature": 1.0, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "kl_coef": 0.1,
                "rloo_k": 4, "response_length": 12, "max_grad_norm": 0.0, "stop_seqs": [" cup"]}
    rollouts, _, row, gradients, _ = one_update(*tiny, cups[:2], **settings)
    assert any(r.finished for r in rollouts) and not all(r.finished for r in rollouts)
    assert any(r.actions != r.ids[len(r.prompt):][:len(r.actions)] for r in rollouts)  # a stop that y lacks
    width = max(len(r.prompt) for r in rollouts) + 12
    config = dataclasses.replace(latro.Config(), **settings)
    phases, positions, losses = learn(theirs, rollouts, width, config)
    assert losses == pytest.approx([row[name] for name in ("policy_loss", "sft_loss")], rel=1e-4)
    for ours, baseline in zip(gradients, theirs.optimizer.gradients, strict=True):
        assert (ours - baseline).norm() <= 1e-4 * max(ours.norm(), 1e-3)
    ours = row["work_ratio"] * 2 * sum(len(r.ids) for r in rollouts)
    assert phases.keys() == {"score_s", "train_s"} and positions > 2 * ours


def test_their_update(theirs, cups):
    """The baselines' own rollouts are sampled to the end and cut by our rule."""
    config = bench.make_config(12, stop_seqs=[" cup"])
    torch.manual_seed(0)
    rollouts, width = bench.sample(theirs, cups[:2], config, keep_scores=True)
    assert len(rollouts) == 8 and width <= max(len(e.prompt) for e in cups[:2]) + 12
    assert all(r.finished or len(r.actions) == 12 for r in rollouts) and len({len(r.ids) for r in rollouts}) > 1
    for learn in (bench.released, bench.trl):
        figures = bench.their_update(learn, theirs, cups[:2], config, 0)
        assert figures["work_ratio"] > 1.5 and figures["generate_s"] > 0


def test_rows_end_where_they_are_told_to(tiny, cups):
    lengths = bench.gsm8k_lengths()
    assert len(lengths) == 32 and sum(n < 500 for n in lengths) == 17 and abs(fmean(lengths) - 358) < 5
    model = copy.deepcopy(tiny[0])
    model.generation_config.eos_token_id = None
    prompts, lengths = [e.prompt for e in cups[:4]], [12, 3, 12, 7, 1, 12, 12, 9, 2, 2, 5, 5, 3, 4, 5, 6]
    bench.our_generate(model, tiny[1], prompts, lengths, 12, 8)  # both assert it themselves
    bench.their_generate(model, prompts, lengths, 12, 8)


def test_prefix_contenders_agree(tiny, cups):
    """Packed or a row each: the same log-probabilities and gradients; fewer positions."""
    rollouts, found = bench.made_up_rollouts(cups[0], tiny[1], 4, 12), {}
    assert [len(r.rationale) for r in rollouts] == [12, 10, 8, 6]
    for attention in ("packed", "sdpa"):
        model = copy.deepcopy(tiny[0])
        model.set_attn_implementation(attention)
        found[attention] = bench.score_and_train(Scorer(model), rollouts, 0)
        assert all(p.grad is None for p in model.parameters())
    packed, rows = found.values()
    assert packed["logprob"] == pytest.approx(rows["logprob"], rel=1e-5)
    assert packed["positions"] < 0.6 * rows["positions"]


def test_vocabulary_cases_agree():
    context = argparse.Namespace(device=CPU)
    whole, ours = (bench.vocabulary_case(context, name, "16", 3000, 50) for name in ("whole", "ours"))
    for figure in ("loss", "hidden_grad", "weight_grad"):
        assert ours[figure] == pytest.approx(whole[figure], rel=1e-4)


def test_measure(capsys):
    calls = []

    def turn(name, number):
        calls.append(name)
        return {"seconds": 4.0 if name == "slow" else 2.0 + number}

    contenders = {name: partial(turn, name) for name in ("slow", "fast")}
    measured = bench.Bench(argparse.Namespace(repeats=3), CPU)
    measured.measure("a title", contenders, (("seconds", "slow"),))
    assert calls == ["slow", "fast", "fast", "slow", "slow", "fast"]
    assert measured.tables[0]["ratios"]["fast"] == {"seconds: slow ÷": [2.0, pytest.approx(4 / 3), 1.0]}
    assert "3 [2–4]" in capsys.readouterr().out
    json.dumps(measured.tables)
