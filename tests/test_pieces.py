"""The pieces made to be copied run from their own source text alone, and are right on small cases."""
import inspect
import typing
from bisect import bisect_left
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicLayer

import data
import evaluate
import latro

# what a copied function needs to have imported
IMPORTS = {"torch": torch, "nn": nn, "typing": typing, "Callable": Callable, "checkpoint": checkpoint, "Cache": Cache,
           "DynamicLayer": DynamicLayer, "bisect_left": bisect_left}


def copied(function):
    namespace = dict(IMPORTS)
    exec(inspect.getsource(function), namespace)
    return namespace[function.__name__]


def test_copied_generate(tiny, cups):
    model, tokenizer = tiny
    arguments = (model, [e.prompt for e in cups], 12)
    options = {"num_samples": 2, "temperature": 1.0, "uniforms": evaluate.uniform_rows(map(str, range(12)), 12), "stop_ids": {2},
               "stop_seqs": [" cup"], "decode": data.decoder(tokenizer), "continuations": lambda i, ids: (len(ids), [3]), "room": 1}
    assert copied(evaluate.generate)(*arguments, **options) == evaluate.generate(*arguments, **options)


def test_copied_truncate():
    assert copied(evaluate.truncate)([0, 1, 2], (), ["bc"], lambda ids: "".join("abc"[i] for i in ids)) == (1, 3, True)


def test_copied_token_logprobs():
    hidden, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    ours = copied(evaluate.token_logprobs)(hidden, lambda h: h, targets, 0.5)
    torch.testing.assert_close(ours, (hidden / 0.5).log_softmax(-1)[range(4), targets])


def test_copied_advantages():
    advantages = copied(latro.rloo_advantages)(torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]))
    assert advantages.tolist() == [[1 - 4, 2 - 3.5, 6 - 1.5], [-1.5, -1.5, 3.0]]


def test_copied_rewards():
    phi, kl, finished = torch.tensor([-3.0, -3.0, 0.4]), torch.tensor([0.0, 1.0, 0.0]), torch.tensor([True, False, False])
    rewards = copied(latro.rollout_rewards)(phi, kl, finished, 0.5, 2.0)
    assert rewards.tolist() == pytest.approx([-3.0, -6.5, 0.0])  # an unfinished one is always lowered, also where φ > 0
    logprob, length = torch.tensor([-2.0]), torch.tensor([4.0])
    assert [copied(latro.answer_reward)(logprob, length, kind).item() for kind in ("logprob", "mean_logprob", "prob")
            ] == pytest.approx([-2.0, -0.5, 0.1353353])


def test_copied_loss():
    z, phi = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-3.0, -5.0], requires_grad=True)
    losses = copied(latro.latro_loss)(z, phi, torch.tensor([2.0, -1.0], requires_grad=True), 0.5, 4)
    assert [x.item() for x in losses] == [0.0, 1.0]
    sum(losses).backward()
    assert z.grad.tolist() == [-0.5, 0.25] and phi.grad.tolist() == [-0.125, -0.125]
