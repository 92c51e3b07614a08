"""The estimator's expectation is the gradient of Eq. 3, exactly, by enumerating every rationale and every K-tuple.

The model is small enough that all its rationales (up to 3 tokens of a vocabulary of 5) can be listed, up to 125 of
them and two million triples. Everything under test is what training calls: cut_rollout, score, answer_reward,
rollout_rewards, rloo_advantages, latro_loss.
"""
import itertools

import pytest
import tokenizers
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import latro
from data import decoder, make_examples
from evaluate import Scorer, cut_rollout, score

LENGTH = 3
# words of the vocabulary after <eos>; the answer; stop sequences
CASES = {
    "stop token": (["a", "b", "c", "d"], "ab", []),
    "one-token stop": ([" X", " a", "b", "c"], "X a", ["X"]),
    "one-token stop, white space": (["X", "\n", "a", " "], "Xa", ["X"]),
    "two-token stop": ([" X", "Y", " a", "b"], "XY a", ["XY"]),
    "length limit": (["a", "b", "c", "d"], "ab", []),
}


def make_model(case, seed, attention="packed"):
    words, response, stops = CASES[case]
    vocabulary = {"<eos>": 0} | {word: i + 1 for i, word in enumerate(words)} | {"Q": len(words) + 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<eos>"))
    pattern = "|".join(sorted(map(tokenizers_escape, vocabulary), key=len, reverse=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    torch.manual_seed(seed)
    # GPT-2, because it computes in float64 throughout; Llama's norm always computes in float32
    model = GPT2LMHeadModel(GPT2Config(vocab_size=5, n_embd=8, n_layer=1, n_head=2, n_positions=32, eos_token_id=0,
                                       bos_token_id=None, initializer_range=0.6)).double().eval()
    model.set_attn_implementation(attention)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    prompt = "a" if "a" in words else words[0]
    [example] = make_examples(tokenizer, [{"queries": prompt, "responses": response, "groundtruth": "-"}])
    return model, tokenizer, example, [] if case == "length limit" else stops


def tokenizers_escape(word):
    return word.replace("\n", r"\n")


def every_sample(example, stop_ids, stops, decode):
    """All that can be sampled: sequences that end with their stop, or at LENGTH tokens."""
    done, going = [], [[]]
    while going:
        ids = going.pop()
        rollout = cut_rollout(example, ids, stop_ids, stops, decode)
        if rollout.finished or len(ids) == LENGTH:
            done.append(ids)
        else:
            going += [ids + [token] for token in range(5)]
    return done


def plain_logprob(model, ids, start, temperature=1.0):
    logits = model(torch.tensor([ids])).logits[0, start - 1:-1] / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[start:])[:, None]).sum()


def exact_logprobs(model, reference, samples, rollouts, temperature):
    """log π(z|x), log π_0(z|x) and log π(y|x⊕z) of every sample, (M,) each, plain model calls only."""
    columns = []
    for ids, rollout in zip(samples, rollouts):
        x = rollout.prompt
        columns.append(torch.stack([
            plain_logprob(model, x + ids, len(x), temperature), plain_logprob(reference, x + ids, len(x), temperature),
            plain_logprob(model, x + rollout.rationale + rollout.answer, len(x) + len(rollout.rationale))]))
    return torch.stack(columns, 1)


def gradient_of(total, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()), retain_graph=True)])


def exact_gradient(model, logprobs, rollouts, beta, kind, gamma):
    """∇J by autograd through the sum over all rationales."""
    log_p, log_p0, log_y = logprobs
    lengths = torch.tensor([len(r.answer) for r in rollouts])
    phi = {"logprob": log_y, "mean_logprob": log_y / lengths, "prob": log_y.exp()}[kind]
    unfinished = torch.tensor([not r.finished for r in rollouts])
    shaped = phi.detach() - unfinished * (gamma - 1) * phi.detach().abs()
    p = log_p.exp()
    return gradient_of((p * shaped + p.detach() * phi - beta * p * (log_p - log_p0.detach())).sum(), model)


def scored(model, reference, rollouts, temperature):
    """(log π(z|x) and log π(y|x⊕z), log π_0(z|x)) by the scoring pass of training."""
    with torch.no_grad():
        ref = score(Scorer(reference), rollouts, temperature, answers=False)
    return score(Scorer(model), rollouts, temperature), ref[:, 0]


def expected_gradient(model, logprobs, ref, rollouts, k, beta, kind, gamma, sft_penalty=1.0, baseline=None):
    """Minus the expectation of the training loss's gradient over all K-tuples, through the functions of training."""
    lengths = torch.tensor([len(r.answer) for r in rollouts], dtype=torch.double)
    phi = latro.answer_reward(logprobs[:, 1], lengths, kind)
    finished = torch.tensor([r.finished for r in rollouts])
    rewards = latro.rollout_rewards(phi, logprobs[:, 0] - ref, finished, beta, gamma).detach()
    probabilities = logprobs[:, 0].detach().exp()
    tuples = torch.cartesian_prod(*[torch.arange(len(rollouts))] * k)  # (M^K, K)
    weight = probabilities[tuples].prod(1, keepdim=True)
    advantages = (baseline or latro.rloo_advantages)(rewards[tuples])
    coefficient, visits = (torch.zeros(len(rollouts), dtype=torch.double).index_add(0, tuples.flatten(), x.flatten())
                           for x in (weight * advantages, weight.expand(-1, k)))
    policy_loss, sft_loss = latro.latro_loss(logprobs[:, 0], visits * phi, coefficient, sft_penalty, k)
    return gradient_of(-policy_loss - sft_loss, model)


def set_up(case, attention="packed"):
    model, tokenizer, example, stops = make_model(case, 0, attention)
    reference, *_ = make_model(case, 1, attention)
    decode, stop_ids = decoder(tokenizer), set() if case == "length limit" else {0}
    samples = every_sample(example, stop_ids, stops, decode)
    rollouts = [cut_rollout(example, ids, stop_ids, stops, decode) for ids in samples]
    assert all(r.stop_in_answer for r in rollouts)
    return model, reference, samples, rollouts, example, decode


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("attention, temperature", [("packed", 1.0), ("packed", 0.7), ("sdpa", 0.7)])
@pytest.mark.parametrize("case", CASES)
def test_expectation_is_the_gradient(case, attention, temperature):
    """K = 2 and 3, β = 0 and above, every reward, the penalty off and on; each prompt once, or a row per rollout."""
    model, reference, samples, rollouts, *_ = set_up(case, attention)
    plain = exact_logprobs(model, reference, samples, rollouts, temperature)
    logprobs, ref = scored(model, reference, rollouts, temperature)
    for beta, kind, gamma in itertools.product((0.0, 0.3), ("logprob", "mean_logprob", "prob"), (1.0, 2.0)):
        exact = exact_gradient(model, plain, rollouts, beta, kind, gamma)
        for k in (2, 3):
            assert error(expected_gradient(model, logprobs, ref, rollouts, k, beta, kind, gamma), exact) < 1e-8


BITES = {
    "the stop's probability left out": ("stop token", lambda r: setattr(r, "actions", r.rationale)),
    "the first token of a longer stop only": (
        "two-token stop", lambda r: setattr(r, "actions", r.actions[:len(r.rationale) + 1])),
    "white space trimmed off z": ("one-token stop, white space", None),
    "Eq. 4's second term left out": ("stop token", {"sft_penalty": 0.0}),
    "a rollout in its own baseline": ("stop token", {"baseline": lambda r: r - r.mean(1, keepdim=True)}),
}


@pytest.mark.parametrize("fault", BITES)
def test_faults_are_seen(fault):
    case, change = BITES[fault]
    model, reference, samples, rollouts, example, decode = set_up(case)
    plain = exact_logprobs(model, reference, samples, rollouts, 1.0)
    exact = exact_gradient(model, plain, rollouts, 0.3, "logprob", 1.0)
    options = change if isinstance(change, dict) else {}
    for rollout in rollouts:
        if change is None:
            white = len([*itertools.takewhile(lambda t: decode([t]).isspace(), rollout.rationale[::-1])])
            if white and rollout.finished:
                rollout.rationale = rollout.rationale[:-white]
                rollout.actions = rollout.rationale + rollout.actions[-1:]
                rollout.answer = example.answers[0]
        elif callable(change):
            change(rollout)
    logprobs, ref = scored(model, reference, rollouts, 1.0)
    ours = expected_gradient(model, logprobs, ref, rollouts, 2, 0.3, "logprob", 1.0, **options)
    assert error(ours, exact) > 0.02


def test_a_longer_stop_that_the_answer_lacks(tiny, cups):
    """Only its first token is scored; all of it where y begins with it."""
    (_, tokenizer), (ball, answer) = tiny, (tiny[1].encode(f" it The {word} is") for word in ("ball", "answer"))
    for ids, within in ((ball, False), (answer, True)):
        rollout = cut_rollout(cups[0], ids, {2}, ["The ball is", "The answer is"], decoder(tokenizer))
        assert rollout.finished and rollout.rationale == ids[:1] and rollout.stop_in_answer is within
        assert rollout.actions == (ids if within else ids[:2])
