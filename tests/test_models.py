"""Architectures: each prompt once, one rollout per row, or refused; and whatever is chosen is right.

The reference is the model's own forward pass over one sequence at a time, in its own attention, and autograd.
"""
import contextlib
import os
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT
from transformers import AutoConfig, AutoModelForCausalLM

import latro
from data import UserError
from evaluate import (Rollout, Scorer, check_model, generate, init_distributed, load_model, rank, run_script,
                      score, uniform_rows)

CPU = torch.device("cpu")
SLIDING = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}  # the sequences are longer
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
ENCODER = {"d_model": 32, "init_std": 0.3, "encoder_attention_heads": 4, "decoder_layers": 2,
           "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
# name: (model type, its options, what becomes of it: "packed", "rows", or the refusal)
MODELS = {
    "Llama": ("llama", {"num_key_value_heads": 4}, "packed"),
    "Llama, tied, GQA": ("llama", {"tie_word_embeddings": True}, "packed"),
    "Mistral": ("mistral", {"sliding_window": 9}, "packed"),
    "Phi-3": ("phi3", {"sliding_window": 9}, "packed"),
    "Qwen2": ("qwen2", {}, "packed"),
    "Qwen2, a window in half of the layers": ("qwen2", SLIDING | {"use_sliding_window": True}, "packed"),
    "Qwen3": ("qwen3", {}, "packed"),
    "Gemma": ("gemma", {}, "packed"),
    "Gemma 3": ("gemma3_text", SLIDING, "packed"),  # tied
    "Granite": ("granite", {"logits_scaling": 4.0, "attention_multiplier": 0.3}, "packed"),
    "Cohere": ("cohere", {"logit_scale": 0.2}, "packed"),
    "Cohere 2": ("cohere2", SLIDING | {"logit_scale": 0.2}, "packed"),
    "OLMo 2": ("olmo2", {}, "packed"),
    "OLMo 3": ("olmo3", SLIDING, "packed"),
    "SmolLM3": ("smollm3", {}, "packed"),
    "Starcoder 2": ("starcoder2", {"sliding_window": 9}, "packed"),
    "Mixtral": ("mixtral", {"num_local_experts": 4}, "packed"),
    "GPT-2": ("gpt2", GPT, "packed"),
    "GPT-NeoX": ("gpt_neox", {}, "packed"),
    "OPT": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "packed"),
    "Gemma 2": ("gemma2", {"sliding_window": 9}, "rows"),  # soft-capped scores
    "gpt-oss": ("gpt_oss", SLIDING | {"num_local_experts": 4}, "rows"),  # sinks
    "MPT": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, "rows"),
    "Falcon, rotary": ("falcon", {"alibi": False}, "rows"),
    "GPT-J": ("gptj", GPT | {"rotary_dim": 4}, "rows"),
    "GPT-Neo, global": ("gpt_neo", {"num_heads": 4, "attention_types": [[["global"], 2]]}, "rows"),
    "GPT-Neo": ("gpt_neo", {"num_heads": 4, "attention_types": [[["global", "local"], 1]]},
                "the window of its local layers follows the longest row of a batch"),
    "Falcon, ALiBi": ("falcon", {"alibi": True}, "cannot be sampled or scored: too many values to unpack"),
    "Bloom": ("bloom", {"n_layer": 2, "n_head": 4}, "cannot be sampled or scored: too many values to unpack"),
    "BART": ("bart", ENCODER, "generate is off by .* nats from"),  # they ignore position_ids
    "MBart": ("mbart", ENCODER, "generate is off by .* nats from"),
    "Pegasus": ("pegasus", ENCODER, "generate is off by .* nats from"),
    "Marian": ("marian", ENCODER | {"decoder_vocab_size": 64}, "generate is off by .* nats from"),
    "BERT": ("bert", {}, "score is off by .* nats from"),  # sees what follows
    "Mamba": ("mamba", {"state_size": 4}, "cannot be sampled or scored: 'linear_attention'"),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"]}, "cannot be sampled or scored"),
    "Llama 4": ("llama4_text", {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
                "cannot be sampled or scored"),
}
PACKED, ROWS = ([name for name in MODELS if MODELS[name][2] == way] for way in ("packed", "rows"))
REFUSED = [name for name in MODELS if name not in PACKED + ROWS]


def make_model(name, dtype=torch.float32):
    """A tiny random model, in its own attention."""
    kind, options, _ = MODELS[name]
    common = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
              "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    if kind == "falcon":
        del common["head_dim"], common["num_key_value_heads"]
    torch.manual_seed(0)
    experts = {"experts_implementation": "eager"} if "num_local_experts" in options else {}  # else none in float64
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **common | options), **experts)
    return model.to(dtype).eval()


@contextlib.contextmanager
def float64_throughout():
    """Norms and softmaxes inside transformers compute in float32 whatever the model's dtype, which hides anything below
    1e-7: here a float64 tensor stays as it is."""
    to, as_float, softmax = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax

    def stays(x, *arguments, **options):
        return x if x.dtype == torch.float64 and torch.float32 in arguments else to(x, *arguments, **options)

    torch.Tensor.to, torch.Tensor.float = stays, lambda x: stays(x, torch.float32)
    torch.nn.functional.softmax = lambda x, dim=None, **options: softmax(x, dim)
    yield
    torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax = to, as_float, softmax


@pytest.mark.parametrize("name", MODELS)
def test_which_way(name):
    model, way = make_model(name), MODELS[name][2]
    if name in REFUSED:
        with pytest.raises((UserError, ValueError), match=way) as refusal:
            check_model(model, packed=True)
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 120
        return
    check_model(model, packed=True)
    assert Scorer(model).packed == (way == "packed")
    check_model(model, packed=False) if way == "rows" else None
    halves = make_model(name).bfloat16()
    check_model(halves, packed=True)
    assert Scorer(halves).packed == (way == "packed")


def some_rollouts():
    """Two prompts with three rollouts each: longer than the windows, empty, cut short, with a stop that y lacks."""
    x, longer = [5, 6, 7, 8, 9], [*range(30, 43)]
    z = [[*range(10, 22)], [], [22, 23, 24], [*range(44, 58)], [25, 26], [27]]
    y = [50, 51, 52, 2]
    actions = [z[0] + [50], [50, 51], z[2] + [13], z[3], z[4] + [50], z[5] + [50]]
    return [Rollout(x if i < 3 else longer, z[i], actions[i], y) for i in range(6)]


def plain_scores(model, rollouts, temperature):
    """(n, 2) as score gives them, of one plain forward pass per rollout."""
    scores = []
    for r in rollouts:
        logits = model(input_ids=torch.tensor([r.ids])).logits[0]
        start, end = len(r.prompt) - 1, len(r.prompt) + len(r.rationale) - 1
        wide = torch.promote_types(model.dtype, torch.float32)
        z = (logits.to(wide) / temperature).log_softmax(-1)[range(start, start + len(r.actions)), r.actions]
        y = logits.to(wide).log_softmax(-1)[range(end, end + len(r.answer)), r.answer]
        scores.append(torch.stack([z.sum(), y.sum()]))
    return torch.stack(scores)


def gradients(scores, model):
    """Of a sum in which every score counts for something else; no term may hide another."""
    weights = torch.linspace(-1, 1, scores.numel(), dtype=scores.dtype).view_as(scores)
    parameters = [*model.parameters()]
    found = torch.autograd.grad((scores * weights).sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]


def assert_close(a, b, tolerance):
    """Each relative to its own size."""
    for x, y in zip(a, b, strict=True):
        assert (x - y).norm() <= tolerance * max(y.norm(), 0.1)  # a key's bias has none but rounding errors


@pytest.mark.parametrize("name", PACKED + ROWS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scores_and_gradients(name, dtype):
    """Packed, a rollout a row, and in layers that are computed again, against plain passes."""
    with float64_throughout() if dtype == "float64" else contextlib.nullcontext():
        check_scores_and_gradients(name, dtype, {"float32": 1e-4, "float64": 1e-10}[dtype])


def check_scores_and_gradients(name, dtype, tolerance):
    model, rollouts = make_model(name, getattr(torch, dtype)), some_rollouts()
    own = model.config._attn_implementation
    expected = plain_scores(model, rollouts, 0.7)
    expected_gradients = gradients(expected, model)
    for attention in (own, "packed") if name in PACKED else (own,):
        model.set_attn_implementation(attention)
        scorer = Scorer(model)
        scores = score(scorer, rollouts, 0.7)
        assert_close(scores, expected, tolerance)
        assert_close(gradients(scores, model), expected_gradients, tolerance)
        with torch.no_grad():
            assert_close(score(scorer, rollouts, 0.7, answers=False)[:, 0], expected[:, 0], tolerance)
    policy, *_ = latro.set_out(model, latro.Config(dtype=dtype, gradient_checkpointing=True, kl_coef=0.0), CPU)
    assert_close(gradients(score(policy, rollouts, 0.7), policy), expected_gradients, tolerance)


@pytest.mark.parametrize("name", PACKED + ROWS)
def test_samples(name):
    """What was sampled, in rows of unequal length that leave and wait, has the probability that a plain pass gives."""
    model, prompts = make_model(name), [[5, 6, 7], [*range(30, 43)]]
    out = generate(model, prompts, 24, num_samples=3, temperature=1.3, batch_size=4,
                   uniforms=uniform_rows(map(str, range(6)), 24), stop=lambda ids: len(ids) > 4 + ids[0] % 20)
    rollouts = [Rollout(prompts[i // 3], ids, ids, [3]) for i, (ids, _) in enumerate(out)]
    expected = plain_scores(model, rollouts, 1.3)[:, 0].tolist()
    assert [sum(logprobs) for _, logprobs in out] == pytest.approx(expected, abs=2e-4)
    assert len({len(ids) for ids, _ in out}) > 1


def test_a_refusal_is_one_line(tiny, tmp_path):
    tiny[1].save_pretrained(tmp_path)
    make_model("BART").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"cannot be used \(it cannot be sampled or scored: generate is off by"):
        load_model(str(tmp_path), torch.float32)
    make_model("GPT-2").save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), torch.float32)
    assert Scorer(model).packed
    for asked in ("sdpa", "eager"):
        model, _ = load_model(str(tmp_path), torch.float32, attn_implementation=asked)
        assert model.config._attn_implementation == asked and not Scorer(model).packed


def test_a_scale_of_the_logits(monkeypatch):
    """What scales the logits may stand in the text's part of a composite config; an unknown scale is refused."""
    model = make_model("Llama")
    text = types.SimpleNamespace(final_logit_softcapping=3.0)
    hidden = torch.randn(5, 32)
    with monkeypatch.context() as patch:
        config = types.SimpleNamespace(get_text_config=lambda: text, _attn_implementation="sdpa")
        patch.setattr(model, "config", config)
        torch.testing.assert_close(Scorer(model).head(hidden), 3 * torch.tanh(model.lm_head(hidden) / 3))
    forward = model.forward

    def scaled(**options):
        output = forward(**options)
        output.logits = output.logits * 3
        return output

    monkeypatch.setattr(model, "forward", scaled)
    with pytest.raises((UserError, ValueError), match="score is off by .* nats"):
        check_model(model, packed=True)


def test_two_ranks(tmp_path):
    """Sharded, packed and computed again, half of the rollouts a rank; against plain passes of one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    done = subprocess.run([*command, str(tmp_path)], env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name, dtype, tolerance in SHARDED:
        with float64_throughout():
            model, rollouts = make_model(name, getattr(torch, dtype)), some_rollouts()
            expected = sum_of_halves(plain_scores(model, rollouts, 0.7))
            expected = torch.autograd.grad(expected, [*model.parameters()])
        assert_close(torch.load(tmp_path / f"{name}.pt", weights_only=True), expected, tolerance)


SHARDED = [("Gemma 3", "float32", 1e-4), ("Llama, tied, GQA", "float64", 1e-10), ("Gemma 2", "float32", 1e-4)]


def sum_of_halves(scores):
    return (scores * torch.tensor([-1.0, 2.0])).sum() / 2  # FSDP averages over the ranks


def on_two_ranks(folder):
    init_distributed()
    half = some_rollouts()[3 * rank():3 * rank() + 3]
    for name, dtype, _ in SHARDED:
        model = make_model(name, getattr(torch, dtype))
        check_model(model, packed=True)
        config = latro.Config(dtype=dtype, gradient_checkpointing=True)
        policy, reference, _ = latro.set_out(model, config, CPU)
        with float64_throughout():
            scores = score(policy, half, 0.7)
            with torch.no_grad():
                torch.testing.assert_close(score(reference, half, 0.7), scores)
            (2 * sum_of_halves(scores)).backward()
        found = [latro.full(p.grad) for p in policy.parameters()]
        if rank() == 0:
            torch.save(found, f"{folder}/{name}.pt")


if __name__ == "__main__":
    run_script(lambda argv: on_two_ranks(*argv))
