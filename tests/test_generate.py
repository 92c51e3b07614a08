"""Sampling, truncation and scoring against slow, obvious references, and against transformers on a real model."""
import copy
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

import latro
from data import UserError, decoder, load_rows, make_examples
from evaluate import FewRowsLinear, Scorer, generate, stop_token_ids, token_logprobs, truncate, uniform_rows


def plain_logprobs(model, ids, start, temperature=1.0):
    """log π of ids[start:] by one plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, start - 1:-1].double() / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[start:])[:, None])[:, 0]


def test_greedy_is_transformers_greedy(smol, gsm8k):
    model, tokenizer = smol
    prompts = [e.prompt for e in make_examples(tokenizer, load_rows("gsm8k", "test", gsm8k)[:8])]
    assert len({len(p) for p in prompts}) > 4
    stop = stop_token_ids(tokenizer, model, "eos")
    ours = [ids for ids, _, _ in generate(model, prompts, 64, stop_ids=stop)]
    width = max(map(len, prompts))
    batch = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    theirs = model.generate(batch, attention_mask=mask, max_new_tokens=64, do_sample=False)[:, width:].tolist()
    for i, (row, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert row == expected[:len(row)]
        assert len(row) == 64 or row[-1] in stop
        assert generate(model, [prompts[i]], 64, stop_ids=stop)[0][0] == row


def test_sampled_logprobs_are_those_of_a_fresh_pass(smol, gsm8k):
    """Unequal prompts, rows that leave early by text and by token, and y scored on the cache."""
    model, tokenizer = smol
    decode = decoder(tokenizer)
    examples = make_examples(tokenizer, load_rows("gsm8k", "train", gsm8k)[:3])
    chosen = {}

    def continuation(row, ids):
        n = truncate(ids, {2}, [" the"], decode)[0]
        chosen[row] = n, examples[row // 4].answers[0]
        return chosen[row]

    out = generate(model, [e.prompt for e in examples], 24, num_samples=4, temperature=0.8,
                   uniforms=uniform_rows(map(str, range(12)), 24), stop_ids={2}, stop_seqs=[" the"], decode=decode,
                   continuations=continuation, room=max(len(e.answers[0]) for e in examples))
    assert len({len(ids) for ids, _, _ in out}) > 4
    for row, (ids, logprobs, answer) in enumerate(out):
        prompt, (n, y) = examples[row // 4].prompt, chosen[row]
        torch.testing.assert_close(torch.tensor(logprobs).double(), plain_logprobs(model, prompt + ids, len(prompt), 0.8),
                                   atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(torch.tensor(answer).double(), plain_logprobs(model, prompt + ids[:n] + y, len(prompt) + n),
                                   atol=2e-4, rtol=1e-4)


def test_a_sample_depends_on_its_own_randomness_only(tiny, cups):
    model, tokenizer = tiny
    model = model.double()
    prompts, noise = [e.prompt for e in cups], uniform_rows(map(str, range(12)), 20)
    options = {"temperature": 1.0, "stop_ids": {2}, "stop_seqs": [" cup"], "decode": decoder(tokenizer)}
    together = generate(model, prompts, 20, num_samples=2, uniforms=noise, **options)
    assert 1 < len({len(ids) for ids, _, _ in together})
    for i, prompt in enumerate(prompts):
        for j in range(2):
            alone = generate(model, [prompt], 20, uniforms=noise[2 * i + j:2 * i + j + 1], **options)[0]
            assert alone[0] == together[2 * i + j][0]
            assert alone[1] == pytest.approx(together[2 * i + j][1], abs=1e-9)
    model.float()


def test_samples_follow_the_distribution(tiny, cups):
    model, _ = tiny
    n, prompt = 4000, cups[0].prompt
    counts = torch.zeros(model.config.vocab_size)
    for ids, _, _ in generate(model, [prompt], 1, num_samples=n, temperature=2.0,
                              uniforms=torch.rand(n, 1, generator=torch.Generator().manual_seed(0))):
        counts[ids[0]] += 1
    expected = (model(torch.tensor([prompt])).logits[0, -1] / 2).softmax(-1)
    assert (counts / n - expected).abs().sum() / 2 < 0.04  # total variation; the same test at temperature 1 gives > 0.1
    assert (counts / n - (expected.log() * 2).softmax(-1)).abs().sum() / 2 > 0.1


def test_finished_rows_leave_the_batch(tiny, cups, monkeypatch):
    model, tokenizer = tiny
    seen, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: seen.append(len(k["input_ids"])) or forward(*a, **k))
    out = generate(model, [e.prompt for e in cups], 30, num_samples=4, temperature=1.0, stop_ids=set(range(2, 12)),
                   uniforms=uniform_rows(map(str, range(24)), 30))
    lengths = [len(ids) for ids, _, _ in out]
    assert seen == [6] + [sum(length > t for length in lengths) for t in range(max(lengths))]  # prefilled once


def assert_same(got, expected):
    """Two results of generate: the same tokens, and the same log-probabilities but for rounding."""
    assert [row[0] for row in got] == [row[0] for row in expected]
    for a, b in zip(got, expected):
        assert a[1] == pytest.approx(b[1], abs=1e-6) and a[2] == pytest.approx(b[2], abs=1e-6)


@pytest.mark.parametrize("batch_size, look_every", [(1, 1), (5, 1), (5, 4), (24, 7), (9, 16)])
def test_batch_size_and_looks_change_nothing(tiny, cups, monkeypatch, batch_size, look_every):
    """Rows that wait for a place, and a host that looks seldom, get the same tokens and figures; a prompt is prefilled
    once, whenever its samples begin; a free place is taken at once."""
    model, tokenizer = copy.deepcopy(tiny[0]).double(), tiny[1]
    options = {"num_samples": 4, "temperature": 1.3, "uniforms": uniform_rows(map(str, range(24)), 30), "stop_ids": {2, 5},
               "stop_seqs": [" cup", "1 3"], "decode": decoder(tokenizer), "room": 6,
               "continuations": lambda row, ids: (len(ids) // 2, cups[row // 4].answers[0])}
    prompts = [e.prompt[i:] for i, e in enumerate(cups)]
    expected, fed, forward = generate(model, prompts, 30, **options), [], model.forward
    assert len({len(ids) for ids, _, _ in expected}) > 5
    monkeypatch.setattr(model, "forward", lambda *a, **k: fed.append((*k["input_ids"].shape, k["logits_to_keep"]))
                        or forward(*a, **k))
    got = generate(model, prompts, 30, batch_size=batch_size, look_every=look_every, **options)
    assert_same(got, expected)
    assert sum(n for n, length, kept in fed if kept < length) == 6  # prompts
    steps = [(n, length) for n, length, kept in fed if kept == length]
    assert max(steps)[0] == batch_size
    assert batch_size > 1 or steps.count((1, 6)) == 24  # where no row samples, y is fed in one step
    if look_every == 1:
        positions = sum(len(ids) + len(cups[row // 4].answers[0]) for row, (ids, _, _) in enumerate(got))
        assert sum(n * length for n, length in steps) == positions  # each sampled token and each of y once, and no more


def trace(step, arguments):
    """What a GPU's capture does, as far as a CPU can: run it a few times, then record its operations on tensors, with
    every number of the host's as it is now; to look at a tensor's value is an error. What is replayed reads from the
    arguments given here and writes to the same results every time."""
    for _ in range(3):
        results = [x.clone() for x in step(*arguments)]
    recorded = make_fx(step)(*arguments)

    def replay(*new):
        for mine, x in zip(arguments, new):
            mine.copy_(x)
        for mine, x in zip(results, recorded(*arguments)):
            mine.copy_(x)
        return results

    return replay


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_captured_step_replays(tiny, cups, temperature):
    captured, model = [], copy.deepcopy(tiny[0]).double()
    options = {"num_samples": 4, "temperature": temperature, "uniforms": uniform_rows(map(str, range(24)), 30),
               "stop_ids": {2, 5}, "stop_seqs": [" cup", "1 3"], "decode": decoder(tiny[1]), "room": 6, "batch_size": 11,
               "continuations": lambda row, ids: (len(ids) // 2, cups[row // 4].answers[0]), "look_every": 4}
    prompts = [e.prompt[i:] for i, e in enumerate(cups)]
    expected = generate(model, prompts, 30, **options)

    def capture(step, arguments):
        captured.append(len(arguments[0]))
        return trace(step, arguments)

    got = generate(model, prompts, 30, capture=capture, **options)
    assert_same(got, expected)
    assert captured[0] == 11 and len(set(captured)) == len(captured) <= 5  # of 11, 8, 4, 2, 1


class Looks(TorchDispatchMode):
    """Counts values that the host reads, each of which waits for a GPU."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return function(*args, **kwargs or {})


def test_between_looks_the_host_reads_nothing(tiny, cups):
    model, looks = copy.deepcopy(tiny[0]), []
    forward = model.forward

    def counted(*arguments, **options):
        with Looks() as mode:
            out = forward(*arguments, **options)
        looks.append(mode.count)
        return out

    model.forward = counted
    generate(model, [e.prompt for e in cups], 32, look_every=16, num_samples=2)
    assert len(looks) == 33 and not any(looks[1:])  # the first is the prompts'


def test_answers_are_fed_many_positions_at_a_time(tiny, cups, monkeypatch):
    """As evaluation without a rationale does; as wide as the vocabulary, logits of 256 positions exist at most."""
    model, y, fed, forward = tiny[0], [i % 30 for i in range(45)], [], tiny[0].forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: fed.append(tuple(k["input_ids"].shape)) or forward(*a, **k))
    out = generate(model, [e.prompt for e in cups], 0, num_samples=4, continuations=lambda row, ids: (0, y), room=45)
    assert fed[1:] == [(24, 10)] * 4 + [(24, 5)]  # after the prefill
    ids = torch.tensor([cups[5].prompt + y])
    expected = forward(ids).logits[0, -46:-1].log_softmax(-1)[range(45), y].tolist()
    assert out[23][2] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("look_every", [1, 16])
def test_nothing_is_fed_past_a_learned_table_of_positions(look_every):
    """A prompt, L tokens and y fill GPT-2's context to the last place; beside it a y without tokens."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)).eval()
    prompts, answers = [[5] * 50, [6] * 10], [[7, 8, 9], []]
    out = generate(model, prompts, 11, look_every=look_every, room=3, continuations=lambda row, ids: (len(ids), answers[row]))
    for prompt, y, (ids, logprobs, scored) in zip(prompts, answers, out, strict=True):
        expected = plain_logprobs(model, prompt + ids + y, len(prompt)).tolist()
        assert logprobs + scored == pytest.approx(expected, abs=1e-4)


def test_everything_stops_at_once_and_nothing_stops(tiny, cups):
    model, tokenizer = tiny
    prompts, noise = [e.prompt for e in cups], uniform_rows(map(str, range(6)), 10)
    for stop_ids, length in ((range(len(tokenizer)), 1), ((), 10)):
        out = generate(model, prompts, 10, temperature=1.0, uniforms=noise, stop_ids=stop_ids, room=9,
                       continuations=lambda i, ids: (len(ids) if len(ids) > 1 else 0, cups[i].answers[0]))
        for example, (ids, _, answer) in zip(cups, out, strict=True):
            assert len(ids) == length
            z = ids if length > 1 else []
            expected = plain_logprobs(model, example.prompt + z + example.answers[0], len(example.prompt) + len(z))
            torch.testing.assert_close(torch.tensor(answer).double(), expected, atol=1e-4, rtol=1e-4)


def test_no_new_tokens_scores_the_bare_answer(tiny, cups):
    model, _ = tiny
    out = generate(model, [e.prompt for e in cups], 0, continuations=lambda i, ids: (0, cups[i].answers[0]), room=9)
    for example, (ids, _, answer) in zip(cups, out, strict=True):
        assert ids == []
        expected = plain_logprobs(model, example.prompt + example.answers[0], len(example.prompt))
        torch.testing.assert_close(torch.tensor(answer).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float64, 1e-12)])
@pytest.mark.parametrize("outputs, bias", [(96, False), (96, True), (40, True)])
def test_few_rows_linear_is_linear(dtype, tolerance, outputs, bias):
    plain = torch.nn.Linear(48, outputs, bias, dtype=dtype)
    ours = copy.deepcopy(plain)
    ours.__class__ = FewRowsLinear
    for shape in (1,), (2, 1), (8, 1), (2, 3), (3, 4), (16, 1), (17,), (20, 5):
        x = torch.randn(*shape, 48, dtype=dtype, requires_grad=True)
        a, b = ours(x), plain(x)
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
        for grads in zip(torch.autograd.grad(a.sum(), (x, *ours.parameters())),
                         torch.autograd.grad(b.sum(), (x, *plain.parameters()))):
            torch.testing.assert_close(*grads, atol=4 * tolerance, rtol=4 * tolerance)


def test_models_on_a_cpu_decode_with_few_rows_linear(smol):
    assert all(isinstance(m, FewRowsLinear) for m in smol[0].modules() if isinstance(m, torch.nn.Linear))


@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
def test_token_logprobs(chunk):
    torch.manual_seed(0)
    head = torch.nn.Linear(5, 7, bias=False).double()
    hidden, targets = torch.randn(8, 5, dtype=torch.double, requires_grad=True), torch.randint(0, 7, (8,))
    temperature = torch.rand(8, dtype=torch.double) + 0.5
    slopes = torch.randn(8, dtype=torch.double)
    ours = token_logprobs(hidden, head, targets, temperature, chunk)
    plain = (head(hidden) / temperature[:, None]).log_softmax(-1)[range(8), targets]
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=0)
    expected, got = (torch.autograd.grad(f, [hidden, head.weight], slopes) for f in (plain, ours))
    torch.testing.assert_close(got, expected)
    known, hidden_grads = token_logprobs(hidden, head, targets, temperature, chunk, slopes)
    torch.testing.assert_close((known, hidden_grads, head.weight.grad), (plain.detach(), *expected))


# Truncation: the pieces of text that tokens stand for are bytes, so that characters and stops may be split anywhere.
PIECES = [b"The", b" answer", b" is", b"The answer", b"T", b"he", b"an", b"swer is", b" ", b"\n", b"**", b"x", b"is 5",
          "→".encode(), "→".encode()[:1], "→".encode()[1:], b"answer:", b"s The", b"\n\nThe ans"]
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


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.integers(0, EOS), max_size=12), st.sampled_from([(), (EOS,), (EOS, 8)]),
       st.lists(st.sampled_from(["The answer is", "answer:", "\nThe answer", "→", "x→", "answer is"]), max_size=3, unique=True))
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


def test_generation_stops_where_truncate_says(tiny, cups):
    """The sampler's own look at the text and the exact cut agree: the last sampled token completes the stop."""
    model, tokenizer = tiny
    decode = decoder(tokenizer)
    for stops in ([" cup"], ["ball is"], [" 3", "?"], ["r cup 2"]):
        out = generate(model, [e.prompt for e in cups], 30, num_samples=8, temperature=1.5, stop_seqs=stops, decode=decode,
                       uniforms=uniform_rows(map(str, range(48)), 30), stop_ids={2})
        for ids, _, _ in out:
            n, m, finished = truncate(ids, {2}, stops, decode)
            assert m == len(ids) and (finished or len(ids) == 30)
        assert sum(len(ids) < 30 for ids, _, _ in out) > 4 or stops == ["r cup 2"]


def test_a_stop_of_many_tokens(tiny, cups):
    options = {"temperature": 1.0, "uniforms": uniform_rows(["0"], 30), "decode": decoder(tiny[1])}
    [(ids, _, _)] = generate(tiny[0], [cups[0].prompt], 30, **options)
    [(cut, _, _)] = generate(tiny[0], [cups[0].prompt], 30, stop_seqs=[decoder(tiny[1])(ids[2:22])], **options)
    assert cut == ids[:22]


def architecture(name):
    """A tiny random model of an architecture with a sliding window, or with logits scaled behind the head."""
    from transformers import AutoConfig, AutoModelForCausalLM
    options = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
               "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0,
               "initializer_range": 0.3}
    special = {"mistral": {"sliding_window": 9}, "gemma3_text": {"sliding_window": 9, "layer_types": [
        "sliding_attention", "full_attention"]}, "gemma2": {"sliding_window": 9}, "granite": {"logits_scaling": 4.0},
        "cohere": {"logit_scale": 0.2}, "qwen3": {}, "phi3": {}}[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **options | special)).eval()


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "gemma2", "granite", "cohere", "qwen3", "phi3"])
def test_architectures(name):
    """Sampling, y on the cache and the scoring pass agree with a plain forward pass, sliding windows included."""
    model = architecture(name)
    latro.check_head(model, [3, 4, 5, 6, 7])
    prompts, y = [[3, 4, 5], [6, 7, 8, 9, 10, 11, 12]], [20, 21, 22, 23]
    arguments = {"num_samples": 3, "temperature": 1.0, "uniforms": uniform_rows(map(str, range(6)), 24), "room": 4,
                 "continuations": lambda row, ids: (3 * row + 2, y)}
    out = generate(model, prompts, 24, **arguments)
    if name in ("mistral", "gemma3_text", "gemma2"):
        with pytest.raises(ValueError, match="sliding window"):
            generate(model, prompts, 24, **arguments, capture=lambda step, arguments: step)
    else:
        captured = generate(model, prompts, 24, **arguments, capture=lambda step, arguments: step)
        assert [ids for ids, *_ in captured] == [ids for ids, *_ in out]
    for row, (ids, logprobs, answer) in enumerate(out):
        prompt, n = prompts[row // 3], 3 * row + 2
        torch.testing.assert_close(torch.tensor(logprobs).double(), plain_logprobs(model, prompt + ids, len(prompt)),
                                   atol=1e-4, rtol=1e-4)
        expected = plain_logprobs(model, prompt + ids[:n] + y, len(prompt) + n)
        torch.testing.assert_close(torch.tensor(answer).double(), expected, atol=1e-4, rtol=1e-4)
        whole = prompt + ids[:n] + y
        columns = torch.arange(len(prompt) + n, len(whole))
        ours = Scorer(model)(torch.tensor([whole]), torch.zeros(4, dtype=torch.long), columns, torch.tensor(y), torch.ones(4))
        torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=1e-4)


def test_a_composite_models_scale_and_a_state(tiny, monkeypatch):
    """What scales the logits stands in the text's part of a composite config; a model with a state has no such cache."""
    text = types.SimpleNamespace(final_logit_softcapping=3.0)
    hidden = torch.randn(5, 128)
    with monkeypatch.context() as patch:
        patch.setattr(tiny[0], "config", types.SimpleNamespace(get_text_config=lambda: text))
        torch.testing.assert_close(Scorer(tiny[0]).head(hidden), 3 * torch.tanh(tiny[0].lm_head(hidden) / 3))
    for of, name, value in ((tiny[0], "_is_stateful", True), (tiny[0].config, "layer_types", ["full_attention", "conv"])):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="keeps a state"):
            patch.setattr(of, name, value, raising=False)
            generate(tiny[0], [[3]], 2)


def test_no_rows_and_uniforms_for_other_rows(tiny):
    assert generate(tiny[0], [], 5) == generate(tiny[0], [[3]], 5, num_samples=0) == []
    with pytest.raises(ValueError, match=r"uniforms: of shape \(2, 4\), not \(2, 5\)"):
        generate(tiny[0], [[3], [4]], 5, uniforms=torch.rand(2, 4))


def test_an_unknown_scale_of_the_logits_is_an_error(tiny, cups, monkeypatch):
    model, _ = tiny
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **k: type("Output", (), {"logits": forward(**k).logits * 3}))
    with pytest.raises(UserError, match="teach it to Scorer.head"):
        latro.check_head(model, cups[0].prompt)
    monkeypatch.setattr(model, "get_decoder", lambda: model)
    with pytest.raises(UserError, match="gives no hidden states"):
        latro.check_head(model, cups[0].prompt)
