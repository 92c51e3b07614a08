"""The pieces made to be copied run from their own source text alone, and are right on small cases.

A piece is a section of evaluate.py or latro.py, the text between two header comments. It is executed here with nothing
but the imports below: no `data`, no config, nothing of the other sections.
"""
import functools
import inspect
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import data
import evaluate
import latro

# what who copies a section imports with it
IMPORTS = {
    "generate": {"Callable": Callable, "Collection": Collection, "Sequence": Sequence, "dataclass": dataclass,
                 "field": field, "torch": torch, "nn": nn, "pad_sequence": pad_sequence, "Cache": Cache,
                 "DynamicLayer": DynamicLayer},
    "truncate": {"Callable": Callable, "Collection": Collection, "Sequence": Sequence, "bisect_left": bisect_left},
    "score": {"math": math, "functools": functools, "inspect": inspect, "accumulate": accumulate, "chain": chain,
              "Callable": Callable, "dataclass": dataclass, "torch": torch, "nn": nn,
              "cross_entropy": cross_entropy, "scaled_dot_product_attention": scaled_dot_product_attention,
              "pad_sequence": pad_sequence, "checkpoint": checkpoint, "AttentionInterface": AttentionInterface,
              "AttentionMaskInterface": AttentionMaskInterface, "sdpa_mask": sdpa_mask,
              "sdpa_attention_forward": sdpa_attention_forward},
    "The objective": {"torch": torch},
}


def copied(name):
    """The namespace that a section makes by itself."""
    source = inspect.getsource(latro if name == "The objective" else evaluate)
    rule = "# " + "-" * 75 + "\n"
    [section] = re.findall(f"{rule}# {name}: .*?\n{rule}(.*?){rule}", source, re.DOTALL)
    namespace = {"__name__": __name__, **IMPORTS[name]}
    exec(section, namespace)
    return namespace


@pytest.fixture
def registered():
    """Executing the score section registers its own attention; afterwards the project's counts again."""
    yield
    AttentionInterface.register("packed", evaluate.packed_attention)


def test_generate(tiny, cups):
    model, tokenizer = tiny
    piece, decode = copied("generate"), data.decoder(tokenizer)
    arguments = (model, [e.prompt for e in cups], 12)
    options = {"num_samples": 2, "temperature": 1.0, "uniforms": evaluate.uniform_rows(map(str, range(12)), 12)}
    ours = piece["generate"](*arguments, **options, stop=piece["stopper"]({2}, [" cup"], decode))
    assert ours == evaluate.generate(*arguments, **options, stop=evaluate.stopper({2}, [" cup"], decode))
    assert 1 < len({len(ids) for ids, _ in ours})


def test_truncate():
    truncate = copied("truncate")["truncate"]
    assert truncate([0, 1, 2], (), ["bc"], lambda ids: "".join("abc"[i] for i in ids)) == (1, 3, True)


def test_score(tiny, registered):
    piece, (model, _) = copied("score"), tiny
    own = model.config._attn_implementation
    rollouts = [piece["Rollout"]([5, 6, 7], z, z, [8, 9]) for z in ([3, 4, 5, 6], [3], [])]
    expected = []
    for r in rollouts:
        logprobs = model(torch.tensor([r.ids])).logits[0, :-1].log_softmax(-1)
        logprobs = logprobs[range(len(r.ids) - 1), r.ids[1:]]
        expected.append([logprobs[2:-2].sum().item(), logprobs[-2:].sum().item()])
    for attention in ("packed", own):
        model.set_attn_implementation(attention)
        scorer = piece["Scorer"](model)
        assert scorer.packed == (attention == "packed")
        scores = piece["score"](scorer, rollouts)
        torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-4, rtol=1e-4)
        scores.sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        model.zero_grad()


def test_a_packed_row():
    """x₁ s₁ s₂ x₂ s₁: each prompt once for its neighbours, each last token predicted and not fed."""
    piece = copied("score")
    x, longer = [10, 11], [20, 21, 22]
    rollouts = [piece["Rollout"](x, [1, 2], [1, 2, 3], [3, 4]), piece["Rollout"](x, [], [5], [5, 6]),
                piece["Rollout"](longer, [7], [7], [8])]
    ids, positions, segments, scored = piece["pack"](rollouts, True, True)
    assert ids == [[10, 11, 1, 2, 3, 5, 20, 21, 22, 7]]
    assert positions == [[0, 1, 2, 3, 4, 2, 0, 1, 2, 3]]
    assert segments == [(2, 0), (3, 0), (1, 0), (3, 3), (1, 3)]
    assert sorted(scored) == sorted([
        (0, 0, 0, 1, 1), (0, 0, 0, 2, 2), (0, 0, 0, 3, 3), (0, 1, 0, 3, 3), (0, 1, 0, 4, 4),
        (1, 0, 0, 1, 5), (1, 1, 0, 1, 5), (1, 1, 0, 5, 6), (2, 0, 0, 8, 7), (2, 1, 0, 9, 8)])
    ids, _, _, scored = piece["pack"](rollouts, False, False)  # the actions alone, a row per rollout
    assert ids == [[10, 11, 1, 2], [10, 11], [20, 21, 22]]
    assert scored == [(0, 0, 0, 1, 1), (0, 0, 0, 2, 2), (0, 0, 0, 3, 3), (1, 0, 1, 1, 5), (2, 0, 2, 2, 7)]


@pytest.mark.parametrize("window", [None, 2, 3, 9])
def test_packed_attention(registered, window):
    """Against one softmax under the mask of who sees whom."""
    torch.manual_seed(0)
    segments, heads = [(4, 0), (3, 0), (1, 0), (2, 3), (5, 3)], 4
    owner = [(i, parent, t + (segments[parent][0] if parent != i else 0))
             for i, (length, parent) in enumerate(segments) for t in range(length)]  # its position in x⊕s
    seen = torch.tensor([[own[0] in (at[0], at[1]) and 0 <= at[2] - own[2] < (window or 99) for own in owner]
                         for at in owner])
    query = torch.randn(1, heads, 15, 8, dtype=torch.double)
    key, value = torch.randn(2, 1, 2, 15, 8, dtype=torch.double)
    ours, _ = copied("score")["packed_attention"](None, query, key, value, None, segments, 0.3, window)
    wide = [x.repeat_interleave(2, 1) for x in (key, value)]
    weights = (query @ wide[0].transpose(2, 3) * 0.3).masked_fill(~seen, -math.inf).softmax(-1)
    torch.testing.assert_close(ours, (weights @ wide[1]).transpose(1, 2), atol=1e-12, rtol=0)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_token_logprobs(chunk):
    torch.manual_seed(0)
    head = nn.Linear(5, 7, bias=False).double()
    hidden, targets = torch.randn(8, 5, dtype=torch.double, requires_grad=True), torch.randint(0, 7, (8,))
    temperature, slopes = torch.rand(2, 8, dtype=torch.double) + 0.5
    ours = copied("score")["token_logprobs"](hidden, head, targets, temperature, chunk)
    plain = (head(hidden) / temperature[:, None]).log_softmax(-1)[range(8), targets]
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=0)
    torch.testing.assert_close(*[torch.autograd.grad(f, [hidden, head.weight], slopes) for f in (ours, plain)])


def test_logits_exist_a_chunk_at_a_time():
    """And are computed again in the backward pass, not kept."""
    sizes, hidden = [], torch.randn(10, 5, requires_grad=True)
    logprobs = copied("score")["token_logprobs"](
        hidden, lambda h: sizes.append(len(h)) or h, torch.zeros(10, dtype=torch.long), chunk=4)
    assert sizes == [4, 4, 2]
    logprobs.sum().backward()
    assert sorted(sizes) == [2, 2, 4, 4, 4, 4]


def test_advantages():
    advantages = copied("The objective")["rloo_advantages"](torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]))
    assert advantages.tolist() == [[1 - 4, 2 - 3.5, 6 - 1.5], [-1.5, -1.5, 3.0]]


def test_rewards():
    piece = copied("The objective")
    phi, kl, finished = torch.tensor([[-3.0, -3.0, 0.4], [0.0, 1.0, 0.0], [1, 0, 0]])
    rewards = piece["rollout_rewards"](phi, kl, finished.bool(), 0.5, 2.0)
    assert rewards.tolist() == pytest.approx([-3.0, -6.5, 0.0])  # an unfinished one is always lowered, also at φ > 0
    logprob, length = torch.tensor([-2.0]), torch.tensor([4.0])
    phi = [piece["answer_reward"](logprob, length, kind).item() for kind in ("logprob", "mean_logprob", "prob")]
    assert phi == pytest.approx([-2.0, -0.5, 0.1353353])


def test_loss():
    z, phi = torch.tensor([[-1.0, -2.0], [-3.0, -5.0]]).unbind()
    advantages = torch.tensor([2.0, -1.0], requires_grad=True)
    z.requires_grad_(), phi.requires_grad_()
    losses = copied("The objective")["latro_loss"](z, phi, advantages, 0.5, 4)
    assert [x.item() for x in losses] == [0.0, 1.0]
    sum(losses).backward()
    assert z.grad.tolist() == [-0.5, 0.25] and phi.grad.tolist() == [-0.125, -0.125] and advantages.grad is None
