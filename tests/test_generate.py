"""Sampling and truncation against slow, obvious references, and against transformers on a real model."""
import copy

import pytest
import torch
from conftest import READS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import make_model
from torch.utils._python_dispatch import TorchDispatchMode

from data import UserError, decoder, load_rows, make_examples
from evaluate import check_model, generate, stop_token_ids, stopper, truncate, uniform_rows


def plain_logprobs(model, ids, start, temperature=1.0):
    """log π of ids[start:] by one plain forward pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1:-1].double() / temperature
    return logits.log_softmax(-1)[range(len(ids) - start), ids[start:]].tolist()


def test_greedy_is_transformers_greedy(smol, gsm8k):
    """Eight unequal prompts together, and two of them alone."""
    model, tokenizer = smol
    prompts = [e.prompt for e in make_examples(tokenizer, load_rows("gsm8k", "test", gsm8k)[:8])]
    assert len({len(p) for p in prompts}) > 4
    stop_ids, width = stop_token_ids(tokenizer, model, "eos"), max(map(len, prompts))
    batch = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    ours = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    theirs = model.generate(batch, attention_mask=mask, max_new_tokens=32, do_sample=False)[:, width:].tolist()
    model.set_attn_implementation(ours)
    stop = stopper(stop_ids, [], None)
    out = generate(model, prompts, 32, stop=stop)
    for (ids, _), expected in zip(out, theirs, strict=True):
        assert ids == expected[:len(ids)]
        assert len(ids) == 32 or ids[-1] in stop_ids
    for i in (0, 5):
        assert generate(model, [prompts[i]], 32, stop=stop)[0][0] == out[i][0]
    ids, logprobs = out[3]
    assert logprobs == pytest.approx(plain_logprobs(model, prompts[3] + ids, len(prompts[3])), abs=2e-4)


@pytest.mark.parametrize("name", ["GPT-2", "GPT-Neo, global", "GPT-Neo", "MPT", "OPT", "GPT-J", "Llama", "Gemma 3"])
def test_the_last_position_of_a_context(name):
    """One prompt and its tokens fill the context, another's end long before; greedy is transformers' own."""
    model, prompts = make_model(name), [[*range(5, 55)], [7, 8, 9]]
    if name == "GPT-Neo":
        with pytest.raises((UserError, ValueError), match="^the window of its local layers .*batch$"):
            check_model(model, packed=True)
        return
    theirs = []
    for prompt in prompts:
        out = model.generate(torch.tensor([prompt]), max_new_tokens=14, do_sample=False, eos_token_id=None)
        theirs.append(out[0, len(prompt):].tolist())
    check_model(model, packed=True)
    for out in (generate(model, prompts, 14), generate(model, prompts, 14, batch_size=1)):
        for prompt, (ids, logprobs), expected in zip(prompts, out, theirs, strict=True):
            assert ids == expected
            assert logprobs == pytest.approx(plain_logprobs(model, prompt + ids, len(prompt)), abs=1e-4)


def test_sampled_logprobs_are_those_of_a_fresh_pass(smol, gsm8k):
    """Unequal prompts, rows that leave early by text and by token."""
    model, tokenizer = smol
    examples = make_examples(tokenizer, load_rows("gsm8k", "train", gsm8k)[:3])
    out = generate(model, [e.prompt for e in examples], 24, num_samples=4, temperature=0.8, batch_size=8,
                   uniforms=uniform_rows(map(str, range(12)), 24), stop=stopper({2}, [" the"], decoder(tokenizer)))
    assert len({len(ids) for ids, _ in out}) > 4
    for row, (ids, logprobs) in enumerate(out):
        prompt = examples[row // 4].prompt
        assert logprobs == pytest.approx(plain_logprobs(model, prompt + ids, len(prompt), 0.8), abs=2e-4)


@pytest.mark.parametrize("name", ["Mistral", "Gemma 3", "Qwen2, a window in half of the layers"])
def test_sliding_windows(name):
    """Of 9 tokens, shorter than a prompt and than what is sampled; rows of very unequal length share a batch."""
    model, prompts = make_model(name), [[5], [*range(30, 50)], [6, 7, 8]]
    out = generate(model, prompts, 24, num_samples=2, temperature=1.0, batch_size=4,
                   uniforms=uniform_rows("abcdef", 24))
    narrower = copy.deepcopy(model)
    narrower.config.sliding_window = 8
    for row, (ids, logprobs) in enumerate(out):
        prompt = prompts[row // 2]
        assert logprobs == pytest.approx(plain_logprobs(model, prompt + ids, len(prompt)), abs=1e-4)
        other = plain_logprobs(narrower, prompt + ids, len(prompt))
        assert max(abs(a - b) for a, b in zip(logprobs, other)) > 0.01  # the window does matter


def options(tokenizer, length):
    """Of sampling 24 rows that end at very different times."""
    return {"num_samples": 4, "temperature": 1.3, "uniforms": uniform_rows(map(str, range(24)), length),
            "stop": stopper({2, 5}, [" cup", "1 3"], decoder(tokenizer))}


def assert_same(got, expected):
    """Two results of generate: the same tokens, and the same log-probabilities but for rounding."""
    assert [ids for ids, _ in got] == [ids for ids, _ in expected]
    for (_, a), (_, b) in zip(got, expected):
        assert a == pytest.approx(b, abs=1e-6)


def test_a_sample_depends_on_its_own_randomness_only(tiny, cups):
    model, tokenizer = copy.deepcopy(tiny[0]).double(), tiny[1]
    prompts, settings = [e.prompt[i:] for i, e in enumerate(cups)], options(tokenizer, 20)
    together = generate(model, prompts, 20, **settings)
    assert 3 < len({len(ids) for ids, _ in together})
    noise, settings["num_samples"] = settings.pop("uniforms"), 1
    alone = [generate(model, [prompts[row // 4]], 20, **settings, uniforms=noise[row:row + 1])[0] for row in range(24)]
    assert_same(alone, together)


class Calls:
    """A model's forward pass, which notes what it is fed: (rows, tokens) of prompts, rows of steps."""

    def __init__(self, model, monkeypatch):
        self.prompts, self.steps, forward = [], [], model.forward

        def noted(*arguments, **options):
            rows, length = options["input_ids"].shape
            if "position_ids" in options:
                self.steps.append(rows)
            else:
                self.prompts.append((rows, length))
            return forward(*arguments, **options)

        monkeypatch.setattr(model, "forward", noted)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9, 16, 24, 99])
def test_continuous_batching(tiny, cups, monkeypatch, batch_size):
    """Rows that wait for a place get the same tokens and figures; a prompt is prefilled once, whenever its samples
    begin; a free place is taken at once, or, for an eighth of the batch, with others; each token is sampled once."""
    model, tokenizer = copy.deepcopy(tiny[0]).double(), tiny[1]
    prompts = [e.prompt[i:] for i, e in enumerate(cups)]
    expected = generate(model, prompts, 30, **options(tokenizer, 30))
    assert len({len(ids) for ids, _ in expected}) > 5
    calls = Calls(model, monkeypatch)
    got = generate(model, prompts, 30, batch_size=batch_size, **options(tokenizer, 30))
    assert_same(got, expected)
    assert sum(rows for rows, _ in calls.prompts) == len(prompts)
    width, tokens = min(batch_size, 24), sum(len(ids) for ids, _ in got)
    assert sum(calls.steps) == tokens and calls.steps[0] == width
    begun = 0  # replay: how full was the batch while rows waited?
    lengths = [len(ids) for ids, _ in got]
    running = []
    for rows in calls.steps:
        free = width - len(running)
        if free >= max(1, width // 8):
            some = lengths[begun:begun + free]
            running, begun = running + some, begun + len(some)
        assert rows == len(running)
        running = [left - 1 for left in running if left > 1]
    assert begun == 24 and not running


def test_finished_rows_leave_the_batch(tiny, cups, monkeypatch):
    calls = Calls(tiny[0], monkeypatch)
    out = generate(tiny[0], [e.prompt for e in cups], 30, num_samples=4, temperature=1.0,
                   uniforms=uniform_rows(map(str, range(24)), 30), stop=lambda ids: 2 <= ids[-1] < 12)
    lengths = [len(ids) for ids, _ in out]
    assert not any(2 <= token < 12 for ids, _ in out for token in ids[:-1])
    assert calls.prompts == [(6, max(len(e.prompt) for e in cups))]  # prefilled once for their samples
    assert calls.steps == [sum(length > t for length in lengths) for t in range(max(lengths))]


class Looks(TorchDispatchMode):
    """Counts values that the host reads, each of which waits for a GPU."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in READS
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_host_reads_once_a_step(tiny, cups, monkeypatch, temperature):
    """All that it needs in one tolist, which no dispatch mode sees; nothing else, in the model or around it."""
    calls, lists, tolist = Calls(tiny[0], monkeypatch), [], torch.Tensor.tolist
    noise = uniform_rows(map(str, range(12)), 16)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: lists.append(tuple(x.shape)) or tolist(x))
    with Looks() as looks:
        generate(tiny[0], [e.prompt for e in cups], 16, num_samples=2, temperature=temperature, uniforms=noise,
                 stop=lambda ids: ids[-1] == 2, batch_size=7)
    assert looks.count == 0 and lists == [(12, 16)] + [(rows, 2) for rows in calls.steps]  # the noise, then the steps


def test_samples_follow_the_distribution(tiny, cups):
    model, _ = tiny
    n, prompt = 4000, cups[0].prompt
    counts = torch.zeros(model.config.vocab_size)
    for ids, _ in generate(model, [prompt], 1, num_samples=n, temperature=2.0,
                           uniforms=torch.rand(n, 1, generator=torch.Generator().manual_seed(0))):
        counts[ids[0]] += 1
    expected = (model(torch.tensor([prompt])).logits[0, -1] / 2).softmax(-1)
    assert (counts / n - expected).abs().sum() / 2 < 0.04  # total variation; the same at temperature 1 gives > 0.1
    assert (counts / n - (expected.log() * 2).softmax(-1)).abs().sum() / 2 > 0.1


def test_uniforms_at_their_ends(tiny):
    """0 and the largest number below 1 draw tokens that can be drawn."""
    noise = torch.tensor([[0.0], [1 - 2 ** -53]], dtype=torch.float64)
    for ids, logprobs in generate(tiny[0], [[3]], 1, num_samples=2, temperature=1.0, uniforms=noise):
        assert 0 <= ids[0] < tiny[0].config.vocab_size and logprobs[0] > -50


def test_everything_stops_at_once_and_nothing_stops(tiny, cups):
    prompts = [e.prompt for e in cups]
    noise = uniform_rows(map(str, range(6)), 10)
    for stop, length in ((lambda ids: True, 1), (lambda ids: False, 10)):
        out = generate(tiny[0], prompts, 10, temperature=1.0, uniforms=noise, stop=stop)
        assert [len(ids) for ids, _ in out] == [len(logprobs) for _, logprobs in out] == [length] * 6
    assert generate(tiny[0], prompts, 0) == [([], [])] * 6
    assert generate(tiny[0], [], 5) == generate(tiny[0], [[3]], 5, num_samples=0) == []


# Truncation: the pieces of text that tokens stand for are bytes, so that characters and stops may be split anywhere.
PIECES = [b"The", b" answer", b" is", b"The answer", b"T", b"he", b"an", b"swer is", b" ", b"\n", b"**", b"x", b"is 5",
          "→".encode(), "→".encode()[:1], "→".encode()[1:], b"answer:", b"s The", b"\n\nThe ans",
          b"a", b"n", b"s", b"w", b"e", b"r", b":", b"i"]
PAD = EOS = len(PIECES)  # the pad id is the EOS id, and an ordinary token of the text for a caller who says so


def decode_pieces(ids):
    return b"".join(b"<eos>" if i == EOS else PIECES[i] for i in ids).decode(errors="replace")


def slow_truncate(ids, stop_ids, stop_seqs):
    """By the definition: token by token, character by character, on bytes."""
    for m in range(1, len(ids) + 1):
        if ids[m - 1] in stop_ids:
            return m - 1, m, True
        found = [(s.encode(), b"".join(b"<eos>" if i == EOS else PIECES[i] for i in ids[:m])) for s in stop_seqs]
        found = [(text.index(s), s) for s, text in found if s in text]
        if found:
            start = min(at + len(s) - len(s.lstrip()) for at, s in found)
            n = 0
            while sum(len(b"<eos>" if i == EOS else PIECES[i]) for i in ids[:n + 1]) <= start:
                n += 1
            return n, m, True
    return len(ids), len(ids), False


STOPS = ["The answer is", "answer:", "\nThe answer", "→", "x→", "answer is"]
# tokens one by one, or a stop letter by letter
SPELLED = [[PIECES.index(piece.encode()) for piece in stop.split("|")] for stop in (
    "a|n|s|w|e|r|:", "an|s|w|e|r| |i|s", "T|he| |an|swer is", "\n|T|he| answer| |i|s")]
SAMPLED = st.lists(st.integers(0, EOS).map(lambda i: [i]) | st.sampled_from(SPELLED), max_size=12).map(
    lambda parts: sum(parts, []))


@settings(max_examples=800, deadline=None)
@given(SAMPLED, st.sampled_from([(), (EOS,), (EOS, 8)]),
       st.lists(st.sampled_from(STOPS),
                max_size=3, unique=True))
def test_truncate_agrees_with_the_definition(ids, stop_ids, stop_seqs):
    n, m, finished = truncate(ids, stop_ids, stop_seqs, decode_pieces)
    assert (n, m, finished) == slow_truncate(ids, stop_ids, stop_seqs)
    assert 0 <= n <= m <= len(ids)


@pytest.mark.parametrize("pieces, stops, expected", [
    (["x", "The", " answer", " is"], ["The answer is"], (1, 4, True)),
    (["The answer", " is"], ["The answer is"], (0, 2, True)),  # the empty rationale
    (["x", "\n", "The answer", " is"], ["The answer is"], (2, 4, True)),  # z keeps its white space
    (["x", "\n\nThe ans", "swer is"], ["The answer is"], (3, 3, False)),
    (["x", "**", "answer:"], ["answer:"], (2, 3, True)),
    (["x"], [], (1, 1, False)),
])
def test_truncate_examples(pieces, stops, expected):
    assert truncate([PIECES.index(p.encode()) for p in pieces], (), stops, decode_pieces) == expected


@settings(max_examples=800, deadline=None)
@given(SAMPLED, st.sampled_from([(), (EOS,), (EOS, 8)]),
       st.lists(st.sampled_from(STOPS), max_size=3, unique=True))
def test_sampling_stops_where_truncate_says(ids, stop_ids, stop_seqs):
    """Token by token, wherever the text is split: stop is true first at the token that completes a stop."""
    stop = stopper(stop_ids, stop_seqs, decode_pieces)
    first = next((m for m in range(1, len(ids) + 1) if stop(ids[:m])), None)
    n, m, finished = truncate(ids, stop_ids, stop_seqs, decode_pieces)
    assert first == (m if finished else None)


def test_generation_stops_where_truncate_says(tiny, cups):
    """The sampler's own look at the text and the exact cut agree: the last sampled token completes the stop."""
    model, tokenizer = tiny
    decode = decoder(tokenizer)
    for stops in ([" cup"], ["ball is"], [" 3", "?"], ["r cup 2"]):
        out = generate(model, [e.prompt for e in cups], 30, num_samples=8, temperature=1.5,
                       uniforms=uniform_rows(map(str, range(48)), 30), stop=stopper({2}, stops, decode))
        for ids, _ in out:
            n, m, finished = truncate(ids, {2}, stops, decode)
            assert m == len(ids) and (finished or len(ids) == 30)
        assert sum(len(ids) < 30 for ids, _ in out) > 4 or stops == ["r cup 2"]


def test_a_stop_of_many_tokens(tiny, cups):
    decode, noise = decoder(tiny[1]), uniform_rows(["0"], 30)
    [(ids, _)] = generate(tiny[0], [cups[0].prompt], 30, temperature=1.0, uniforms=noise)
    stop = stopper((), [decode(ids[2:22])], decode)
    [(cut, _)] = generate(tiny[0], [cups[0].prompt], 30, temperature=1.0, uniforms=noise, stop=stop)
    assert cut == ids[:22]
