"""Loss and every gradient are the same however the work is cut: packing, order, passes, ranks, checkpointing."""
import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

import data
import latro
from evaluate import Scorer, gather, generate, init_distributed, on_rank_0, rank, run_script, score

CPU = torch.device("cpu")


class Recorder(torch.optim.AdamW):
    """The optimizer of training, which keeps the gradients, what of them and of its state is on this rank, and the
    weights after the step."""

    def step(self):
        parameters = self.param_groups[0]["params"]
        self.gradients = [latro.full(p.grad).clone() for p in parameters]
        super().step()
        self.weights = [latro.full(p.detach()).clone() for p in parameters]
        held = [[p, p.grad, self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]] for p in parameters]
        self.shares = [sum(local(x).numel() for x in kind) / sum(x.numel() for x in kind) for kind in zip(*held)]


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def one_update(model, tokenizer, examples, monkeypatch=None, rollouts=None, **settings):
    """(rollouts, figures, means, gradients, optimizer) of one update from `model`, against a reference that differs
    from it."""
    config = latro.Config(**{
        "rloo_k": 4, "response_length": 12, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
        "temperature": 1.3, "max_grad_norm": 0.0, "kl_coef": 0.1, "stop_seqs": [" cup"],
        "dtype": str(model.dtype).removeprefix("torch.")} | settings)
    policy, reference, sampler = latro.set_out(copy.deepcopy(model), config, CPU)
    with torch.no_grad():
        for parameter in reference.parameters() if reference else []:
            parameter *= 1.1
    optimizer = Recorder(policy.parameters(), lr=3e-4, weight_decay=0.0, fused=True)
    if rollouts is not None:
        monkeypatch.setattr(latro, "sample_rollouts", lambda *arguments: rollouts)
    keys = [f"key {i}" for i in range(len(examples))]
    result = latro.update(policy, reference, sampler, optimizer, tokenizer, examples, keys, config, CPU)
    return *result, optimizer.gradients, optimizer


def assert_same(a, b, rtol):
    """Losses and gradients of two updates, relative to the size of each gradient."""
    for name in ("policy_loss", "sft_loss", "reward", "kl"):
        assert a[2][name] == pytest.approx(b[2][name], rel=rtol, abs=rtol)
    for x, y in zip(a[3], b[3], strict=True):
        assert (x - y).norm() <= rtol * max(x.norm(), 1e-3)


@pytest.fixture(params=["float32", "float32, a rollout a row", "float64"])
def start(request, tiny, cups):
    """(model, tokenizer, examples, tolerance); GPT-2 in float64, because Llama's norm always computes in float32."""
    model, rtol = copy.deepcopy(tiny[0]), 1e-5
    if request.param == "float64":
        torch.manual_seed(0)
        model, rtol = GPT2LMHeadModel(GPT2Config(
            vocab_size=len(tiny[1]), n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=2,
            bos_token_id=None, initializer_range=0.3)).double().eval(), 1e-10
    model.set_attn_implementation("sdpa" if "row" in request.param else "packed")
    return model, tiny[1], cups[:2], rtol


def test_passes_and_order(start, monkeypatch):
    """Of whole groups, of parts of one (after a pass without gradient), of parts of two."""
    model, tokenizer, examples, rtol = start
    whole = one_update(model, tokenizer, examples)
    rollouts = whole[0]
    assert len({len(r.ids) for r in rollouts}) > 3 and len({r.finished for r in rollouts}) == 2
    for size in (1, 2, 3, 4):
        assert_same(one_update(model, tokenizer, examples, monkeypatch, rollouts, per_device_train_batch_size=size,
                               gradient_accumulation_steps=8), whole, rtol)
    swapped = one_update(model, tokenizer, examples[::-1], monkeypatch, rollouts[4:][::-1] + rollouts[:4])
    assert_same(swapped, whole, rtol)
    logprobs = [score(Scorer(model), part, 1.3)[:1] for part in (rollouts[:1], rollouts)]
    torch.testing.assert_close(*logprobs, rtol=rtol, atol=rtol)


def test_gradient_checkpointing(start, monkeypatch):
    model, tokenizer, examples, rtol = start
    whole = one_update(model, tokenizer, examples)
    assert_same(one_update(model, tokenizer, examples, monkeypatch, whole[0], gradient_checkpointing=True), whole, rtol)


def test_gradient_checkpointing_without_dropout():
    """OPT's layers drop out by themselves where they are in training mode."""
    model = OPTForCausalLM(OPTConfig(
        vocab_size=60, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, dropout=0.5,
        word_embed_proj_dim=32, max_position_embeddings=64)).eval()
    plain, rollouts = Scorer(copy.deepcopy(model)), [latro.Rollout([3, 4], [5, 6], [5, 6], [7, 8, 9])]
    policy, *_ = latro.set_out(model, latro.Config(dtype="float32", gradient_checkpointing=True), CPU)
    torch.testing.assert_close(score(policy, rollouts), score(plain, rollouts))


def test_bfloat16_gradients_add_up_in_float32(tiny, cups):
    """Of the policy of one process: exactly the sum of what plain autograd gives for each pass."""
    model = copy.deepcopy(tiny[0])
    model.set_attn_implementation("packed")
    plain = Scorer(latro.cast(copy.deepcopy(model), torch.bfloat16))
    policy, _, sampler = latro.set_out(model, latro.Config(dtype="bfloat16"), CPU)
    assert {p.dtype for p in policy.parameters()} == {torch.float32} and sampler.dtype == torch.bfloat16
    expected = [torch.zeros(p.shape) for p in plain.parameters()]
    learner = Scorer(sampler)
    for rollout in latro.gold_rollouts(tiny[1], cups[:2]):
        score(learner, [rollout]).sum().backward()
        latro.collect_gradients(learner, policy)
        loss = score(plain, [rollout]).sum()
        for total, gradient in zip(expected, torch.autograd.grad(loss, list(plain.parameters()))):
            total += gradient
    for parameter, total in zip(policy.parameters(), expected, strict=True):
        assert parameter.grad.dtype == torch.float32 and torch.equal(parameter.grad, total)
    assert all(p.grad is None for p in sampler.parameters()) and any(g.bfloat16().ne(g).any() for g in expected)


def test_bfloat16_update_and_refresh(tiny, cups):
    """The step is taken in float32, by one process as by many, and its rounding is what is sampled from next."""
    model, moved = latro.cast(copy.deepcopy(tiny[0]), torch.bfloat16), 0
    model.set_attn_implementation("packed")
    config = latro.Config(dtype="bfloat16", response_length=12, rloo_k=4, per_device_train_batch_size=8,
                          gradient_accumulation_steps=1)
    policy, reference, sampler = latro.set_out(model, config, CPU)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    latro.update(policy, reference, sampler, optimizer, tiny[1], cups[:2], ["a", "b"], config, CPU)
    for master, plain, old in zip(policy.parameters(), sampler.parameters(), reference.parameters(), strict=True):
        master = latro.full(master.detach())
        assert torch.equal(master.bfloat16(), plain) and master.bfloat16().ne(master).any()
        moved += plain.ne(old).sum()
    assert moved > 100


def test_one_process_shares_weights(tiny, cups):
    """Float32: the sampler's weights are the policy's; checkpointing does recompute, where there is a gradient; a
    frozen parameter stays as it is."""
    model, passes = copy.deepcopy(tiny[0]), []
    frozen = next(model.get_decoder().layers[0].parameters()).requires_grad_(False)
    sample = generate(model, [cups[0].prompt], 5)
    policy, _, sampler = latro.set_out(model, latro.Config(dtype="float32", gradient_checkpointing=True), CPU)
    assert all(p is q for p, q in zip(policy.parameters(), sampler.parameters(), strict=True))
    for layer in latro.decoder_layers(sampler):
        layer.input_layernorm.register_forward_hook(lambda *_: passes.append(1))
    assert generate(sampler, [cups[0].prompt], 5) == sample
    assert len(passes) == 6 * len(model.get_decoder().layers)  # the prompt and five steps
    passes.clear()
    score(policy, latro.gold_rollouts(tiny[1], cups[:1])).sum().backward()
    assert len(passes) == 2 * len(model.get_decoder().layers)
    assert [p for p in policy.parameters() if p.grad is None] == [frozen]


PAIRS = [f"{a} {b}" for a in ("ball", "is", "under", "cup", "it", 1, 2, 3, 4, 5)
         for b in ("ball", "is", "cup", "it", 1, 2, 3, 4, 5)]
OBJECTIVES = [{}, {"reward": "prob"}, {"reward": "mean_logprob"}, {"sft_penalty": 0.3}, {"non_stop_penalty": False},
              {"penalty_reward_value": 3.0}, {"kl_coef": 0.4}, {"stop_seqs": PAIRS},
              {"objective": "sft", "reward": "prob", "sft_penalty": 0.3}]


@pytest.mark.parametrize("settings", OBJECTIVES, ids=lambda s: str(s)[:40])
def test_gradient_is_that_of_a_slow_reference(start, settings):
    """The whole update, of every objective, against plain autograd, rollout by rollout."""
    model, tokenizer, examples, rtol = start
    config, frozen = latro.Config(**{"kl_coef": 0.1, "temperature": 1.3} | settings), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in frozen.parameters():
            parameter *= 1.1
    if config.objective == "sft":
        examples = data.make_examples(tokenizer, data.load_rows("cups_base", "test")[:2])
        assert all(e.rationale for e in examples)
    rollouts, figures, _, gradients, _ = one_update(model, tokenizer, examples, **settings)
    if config.stop_seqs is PAIRS:  # a longer stop, which y lacks
        assert not all(r.stop_in_answer for r in rollouts)
    heat = 1.0 if config.objective == "sft" else 1.3

    def plain(model, r):
        x, logits = r.prompt, model(torch.tensor([r.ids])).logits[0]
        z = (logits / heat).log_softmax(-1)[[len(x) - 1 + t for t in range(len(r.actions))], r.actions].sum()
        begin = len(x) + len(r.rationale) - 1
        return z, logits.log_softmax(-1)[[begin + t for t in range(len(r.answer))], r.answer].sum()

    ours, theirs = ([plain(m, r) for r in rollouts] for m in (model, frozen))
    phi = [{"logprob": y, "mean_logprob": y / len(r.answer), "prob": y.exp()}[config.reward if heat > 1 else "logprob"]
           for (_, y), r in zip(ours, rollouts)]
    gamma = config.penalty_reward_value if config.non_stop_penalty else 1.0
    shaped = [f.item() - (0 if r.finished else (gamma - 1) * abs(f.item())) for f, r in zip(phi, rollouts)]
    rewards = [f - config.kl_coef * (z - z0).item() for f, (z, _), (z0, _) in zip(shaped, ours, theirs)]
    total = 0
    for i, (r, (z, y), f) in enumerate(zip(rollouts, ours, phi)):
        assert figures["answer_logprob"][i].item() == pytest.approx(y.item(), rel=1e-4)
        assert figures["rationale_logprob"][i].item() == pytest.approx(z.item(), rel=1e-4)
        if config.objective == "sft":
            total = total - (z + y) / len(rollouts)
            continue
        assert figures["ref_rationale_logprob"][i].item() == pytest.approx(theirs[i][0].item(), rel=1e-4)
        assert figures["reward"][i].item() == pytest.approx(rewards[i], rel=1e-3, abs=1e-3)
        group = rewards[i // 4 * 4:i // 4 * 4 + 4]
        advantage = rewards[i] - (sum(group) - rewards[i]) / 3
        total = total - (advantage * z + config.sft_penalty * f) / len(rollouts)
    expected = torch.autograd.grad(total, list(model.parameters()))
    for x, y in zip(gradients, expected, strict=True):
        assert (x - y).norm() <= 10 * rtol * max(y.norm(), 1e-3)


def test_clipping_and_work(start, monkeypatch):
    """max_grad_norm clips, and what is logged is the norm before; every position pushed is counted."""
    model, tokenizer, examples, rtol = start
    free = one_update(model, tokenizer, examples)
    rollouts, _, means, gradients, _ = one_update(model, tokenizer, examples, monkeypatch, free[0], max_grad_norm=0.01,
                                                  per_device_train_batch_size=1, gradient_accumulation_steps=8)
    norm = sum(g.square().sum() for g in free[3]).sqrt().item()
    assert means["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 0.02
    for clipped, whole in zip(gradients, free[3], strict=True):
        torch.testing.assert_close(clipped, whole * 0.01 / norm, rtol=1e-3, atol=1e-8)
    tokens, n = sum(len(r.ids) for r in rollouts), len(rollouts)
    prompts = sum(len(r.prompt) for r in rollouts)
    frozen = prompts + sum(len(r.actions) for r in rollouts) - n  # the last token is predicted, not fed
    assert means["work_ratio"] == pytest.approx((2 * (tokens - n) + frozen) / (2 * tokens))
    once = (tokens - n + frozen - 2 * prompts * 3 // 4) / (2 * tokens)  # each prompt once for its four rollouts
    if Scorer(model).packed:
        assert free[2]["work_ratio"] == pytest.approx(once) and once < 0.6


def test_what_is_sampled_is_what_is_scored(start):
    """And what is logged: of the cache, of the pass with gradient, of a pass of its own."""
    model, tokenizer, examples, rtol = start
    rollouts, figures, means, *_ = one_update(model, tokenizer, examples)
    fresh = score(Scorer(model), rollouts, 1.3).detach().double()
    for i, name in enumerate(("rationale_logprob", "answer_logprob")):
        torch.testing.assert_close(figures[name], fresh[:, i], rtol=10 * rtol, atol=10 * rtol)
    assert [r.sampler_logprob for r in rollouts] == pytest.approx(fresh[:, 0].tolist(), rel=10 * rtol)
    assert 0 < means["sampling_gap"] < 100 * rtol


def test_one_rank_and_two(start, tmp_path):
    """Two ranks, a prompt each, against one rank with both."""
    model, tokenizer, examples, rtol = start
    whole = one_update(model, tokenizer, examples)
    start = {"model": model, "tokenizer": tokenizer, "examples": examples, "rollouts": whole[0]}
    torch.save(start, tmp_path / "start.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    done = subprocess.run([*command, str(tmp_path)], env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    loaded = torch.load(tmp_path / "two.pt", weights_only=True)
    shares = json.load(open(tmp_path / "shares.json"))
    for of_rank in shares:  # of weights, gradients and both moments each rank holds half
        assert of_rank == [pytest.approx(0.5, abs=0.05)] * 4
    elements = sum(p.numel() for p in model.parameters())
    planned = latro.plan(latro.Config(), model, 2)["weights, float32"] / 4 / elements
    assert planned == pytest.approx(max(of_rank[0] for of_rank in shares), abs=1e-9)
    for kind in ("gradients", "parts of groups", "HSDP"):
        for x, y in zip(loaded[kind], whole[3], strict=True):
            assert (x - y).norm() <= rtol * max(y.norm(), 1e-3)
    for x, y, gradient in zip(loaded["weights"], whole[4].weights, whole[3], strict=True):
        clear = gradient.abs() > 1e-4 * gradient.abs().max()  # AdamW's first step has the sign even of rounding errors
        assert (x - y)[clear].norm() <= 1e-6 * y.norm()


def on_two_ranks(folder):
    init_distributed()
    start = torch.load(f"{folder}/start.pt", weights_only=False)
    model, tokenizer, examples = start["model"], start["tokenizer"], start["examples"][rank():rank() + 1]
    rollouts = start["rollouts"][4 * rank():4 * rank() + 4]
    latro.sample_rollouts = lambda *arguments: rollouts

    def gradients(**settings):
        *_, found, optimizer = one_update(model, tokenizer, examples, **{"per_device_train_batch_size": 4} | settings)
        return found, optimizer

    result = {}
    result["gradients"], optimizer = gradients()
    for x, y in zip(result["gradients"], gradients(gradient_checkpointing=True)[0], strict=True):
        torch.testing.assert_close(x, y)
    two = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    result["parts of groups"], _ = gradients(**two)

    # HSDP, copies of the shards, here of the whole weights: gradients are summed over the copies once per update
    all_reduce, counts = dist.all_reduce, []

    def counted(*arguments, **options):
        counts[-1] += 1
        return all_reduce(*arguments, **options)

    dist.all_reduce = counted
    for settings in ({}, two, {"shard_size": 1}, two | {"shard_size": 1}):
        counts.append(0)
        result["HSDP"], _ = gradients(**settings)
    dist.all_reduce = all_reduce
    groups = 1 + len(latro.decoder_layers(model))
    assert counts[0] == counts[1] and counts[2] == counts[3] == counts[0] + groups, counts

    halves = latro.cast(copy.deepcopy(model), torch.bfloat16)
    weights = [p.float() for p in halves.parameters()]
    policy, *_ = latro.set_out(halves, latro.Config(dtype="bfloat16"), CPU)
    for parameter, weight in zip(policy.parameters(), weights, strict=True):
        assert parameter.dtype == torch.float32 and torch.equal(latro.full(parameter.detach()), weight)
    score(policy, rollouts).sum().backward()  # averaged in float32, not in the passes' bfloat16
    assert any(latro.full(p.grad).bfloat16().ne(latro.full(p.grad)).any() for p in [*policy.parameters()])

    with pytest.raises((data.UserError, OSError), match="on rank 0"):  # raised on both, or one would wait for the other
        on_rank_0(lambda: os.remove("/an/error/on rank 0"))

    config = latro.Config(dtype="float32", shard_size=1)
    policy, *_ = latro.set_out(copy.deepcopy(model), config, CPU)
    assert all(local(p).numel() == p.numel() for p in policy.parameters())

    # a loss that is not finite on one rank: the update is skipped on both
    right, calls = latro.latro_loss, []

    def infinite_after(*arguments):
        calls.append(1)
        z, y = right(*arguments)
        return z * (float("inf") if rank() and len(calls) > 1 else 1.0), y

    latro.latro_loss = infinite_after
    config = latro.Config(rloo_k=4, response_length=12, dtype="float32", kl_coef=0, **two)
    policy, _, sampler = latro.set_out(copy.deepcopy(model), config, CPU)
    other = torch.optim.AdamW(policy.parameters(), lr=1e-3, fused=True)
    _, _, means = latro.update(policy, None, sampler, other, tokenizer, examples, ["key"], config, CPU)
    assert means["skipped"] == 1 and not other.state and all(p.grad is None for p in policy.parameters())
    shares = gather([optimizer.shares])
    if rank() == 0:
        torch.save(result | {"weights": optimizer.weights}, f"{folder}/two.pt")
        json.dump(shares, open(f"{folder}/shares.json", "w"))


if __name__ == "__main__":
    run_script(lambda argv: on_two_ranks(*argv))
