"""Loss and every gradient are the same however the work is cut: padding, order, micro-batches, ranks, checkpointing."""
import copy
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

import data
import latro
from evaluate import run_script, world_size


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


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 4))
def test_micro_batches_are_the_cheapest_cut(lengths, size):
    def pushed(groups):
        return sum(len(group) * max(lengths[i] for i in group) for group in groups)

    groups = latro.micro_batches(lengths, size)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert [lengths[i] for group in groups for i in group] == sorted(lengths, reverse=True)
    assert max(pushed([group]) for group in groups) <= size * max(lengths)
    order, fewest = [i for group in groups for i in group], -(-len(lengths) // size)
    cheapest = {}  # by the number of groups, over all ways to cut
    for bits in itertools.product([False, True], repeat=len(order) - 1):
        ends = [i + 1 for i, cut in enumerate(bits) if cut] + [len(order)]
        some = [order[a:b] for a, b in zip([0, *ends], ends)]
        if max(pushed([group]) for group in some) <= size * max(lengths):
            cheapest[len(some)] = min(pushed(some), cheapest.get(len(some), 10**9))
    most = min(2 * fewest, len(lengths))
    count = next((n for n in range(fewest, most) if cheapest[n] <= 1.08 * sum(lengths)), most)
    assert (len(groups), pushed(groups)) == (count, cheapest[count])


def one_update(model, tokenizer, examples, monkeypatch=None, rollouts=None, gradient_checkpointing=False, **settings):
    """(rollouts, figures, sums, gradients) of one update from `model`, against a reference that differs from it."""
    config = latro.Config(**{"rloo_k": 4, "response_length": 12, "per_device_train_batch_size": 8, "temperature": 1.3,
                             "gradient_accumulation_steps": 1, "rollout_batch_size": 64, "max_grad_norm": 0.0,
                             "kl_coef": 0.1, "stop_seqs": [" cup"]} | settings)
    mesh, (trained, sampler, reference) = init_device_mesh("cpu", (world_size(),)), [copy.deepcopy(model) for _ in range(3)]
    policy = latro.make_policy(trained, sampler, mesh, gradient_checkpointing)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter *= 1.1
    reference = latro.shard(reference, model.dtype, model.dtype, mesh)
    optimizer = Recorder(policy.parameters(), lr=3e-4, weight_decay=0.0, fused=True)
    if rollouts is not None:
        monkeypatch.setattr(latro, "sample_rollouts", lambda *arguments: rollouts)
    keys = [f"key {i}" for i in range(len(examples))]
    result = latro.update(policy, reference, sampler, optimizer, tokenizer, examples, keys, config, "cpu")
    return *result, optimizer.gradients, optimizer


def assert_same(a, b, rtol):
    """Losses and gradients of two updates, relative to the size of each gradient."""
    for name in ("policy_loss", "sft_loss", "reward", "kl"):
        assert a[2][name] / a[2]["rollouts"] == pytest.approx(b[2][name] / b[2]["rollouts"], rel=rtol, abs=rtol)
    for x, y in zip(a[3], b[3], strict=True):
        assert (x - y).norm() <= rtol * max(x.norm(), 1e-3)


@pytest.fixture(params=["float32", "float64"])
def start(request, tiny, cups):
    """(model, tokenizer, examples, tolerance); GPT-2 in float64, because Llama's norm always computes in float32."""
    if request.param == "float32":
        return tiny[0], tiny[1], cups[:2], 1e-5
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tiny[1]), n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=2,
                                       bos_token_id=None, initializer_range=0.3)).double().eval()
    return model, tiny[1], cups[:2], 1e-10


def test_micro_batches_order_and_padding(start, monkeypatch):
    model, tokenizer, examples, rtol = start
    whole = one_update(model, tokenizer, examples)
    rollouts = whole[0]
    assert len({len(r.ids) for r in rollouts}) > 3 and any(not r.finished for r in rollouts) and any(r.finished for r in rollouts)
    for size in (1, 3, 4):
        assert_same(one_update(model, tokenizer, examples, monkeypatch, rollouts, per_device_train_batch_size=size,
                               gradient_accumulation_steps=8 if size == 1 else 4), whole, rtol)
    swapped = one_update(model, tokenizer, examples[::-1], monkeypatch, rollouts[4:][::-1] + rollouts[:4])
    assert_same(swapped, whole, rtol)
    logprobs = [latro.score(latro.Scorer(model), batch, 1.3, "cpu")[0][:1] for batch in (rollouts[:1], rollouts)]
    torch.testing.assert_close(*logprobs, rtol=rtol, atol=rtol)


def test_gradient_checkpointing(start, monkeypatch):
    model, tokenizer, examples, rtol = start
    whole = one_update(model, tokenizer, examples)
    assert_same(one_update(model, tokenizer, examples, monkeypatch, whole[0], gradient_checkpointing=True), whole, rtol)


def test_gradient_checkpointing_without_dropout():
    """OPT's layers drop out by themselves where they are in training mode."""
    model = OPTForCausalLM(OPTConfig(vocab_size=60, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, dropout=0.5,
                                     word_embed_proj_dim=32, max_position_embeddings=64)).eval()
    policy = latro.make_policy(model, copy.deepcopy(model), None, gradient_checkpointing=True)
    ids, rows, columns, targets = torch.arange(10)[None], torch.zeros(3, dtype=torch.long), torch.tensor([2, 5, 9]), torch.tensor([3, 4, 5])
    torch.testing.assert_close(policy(ids, rows, columns, targets), latro.Scorer(model)(ids, rows, columns, targets))


def test_bfloat16_gradients_add_up_in_float32(tiny, cups):
    """Of the policy of one process: exactly the sum of what plain autograd gives for each micro-batch."""
    master, sampler, plain = (latro.cast(copy.deepcopy(tiny[0]), dtype) for dtype in (torch.float32, torch.bfloat16, torch.bfloat16))
    policy = latro.make_policy(master, sampler, None)
    expected = [torch.zeros_like(p) for p in master.parameters()]
    for rollout in latro.gold_rollouts(tiny[1], cups[:2]):
        latro.score(policy, [rollout], 1.0, "cpu")[0].sum().backward()
        loss = latro.score(latro.Scorer(plain), [rollout], 1.0, "cpu")[0].sum()
        for total, gradient in zip(expected, torch.autograd.grad(loss, list(plain.parameters()))):
            total += gradient
    for parameter, total in zip(policy.parameters(), expected, strict=True):
        assert parameter.grad.dtype == torch.float32 and torch.equal(parameter.grad, total)
    assert all(p.grad is None for p in sampler.parameters()) and any(g.bfloat16().ne(g).any() for g in expected)


def test_one_process_shares_weights_and_nothing_else(tiny, cups):
    """Float32: the sampler's weights are the policy's, its modules know nothing of checkpointing, which does recompute;
    a frozen parameter stays as it is."""
    master, sampler = copy.deepcopy(tiny[0]), copy.deepcopy(tiny[0])
    frozen = [next(model.get_decoder().layers[0].parameters()) for model in (master, sampler)]
    for parameter in frozen:
        parameter.requires_grad_(False)
    policy = latro.make_policy(master, sampler, None, gradient_checkpointing=True)
    latro.refresh(sampler, policy)
    assert all(p.data_ptr() == q.data_ptr() for p, q in zip(policy.parameters(), sampler.parameters(), strict=True))
    assert not any(getattr(module, "gradient_checkpointing", False) for module in sampler.modules())
    passes = []
    for layer in latro.decoder_layers(policy.forward.__self__.model):
        layer.input_layernorm.register_forward_hook(lambda *_: passes.append(1))
    latro.score(policy, latro.gold_rollouts(tiny[1], cups[:1]), 1.0, "cpu")[0].sum().backward()
    assert len(passes) == 2 * len(master.get_decoder().layers)
    assert [p for p in policy.parameters() if p.grad is None] == frozen[:1]


def test_scoring_attention(tiny, monkeypatch):
    """flash-attn only where the passes that score can have it; sampling keeps what the model prefers."""
    def chosen(asked="auto", compute=torch.bfloat16, device="cuda", found=True):
        monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: found)
        return latro.scoring_attention(tiny[0], asked, compute, torch.device(device))

    assert chosen() == "flash_attention_2"
    assert {chosen(asked="sdpa"), chosen(compute=torch.float32), chosen(device="cpu"), chosen(found=False)} == {"sdpa"}
    monkeypatch.setattr(tiny[0], "_supports_flash_attn", False)
    assert chosen() == "sdpa"
    monkeypatch.setattr(latro, "scoring_attention", lambda model, asked, *rest: {"auto": "sdpa", "as asked": "eager"}[asked])
    policy, reference, sampler = latro.set_out(
        copy.deepcopy(tiny[0]), latro.Config(attn_implementation="as asked"), torch.device("cpu"))
    scoring = policy.forward.__self__.model
    assert [m.config._attn_implementation for m in (scoring, reference.model, sampler)] == ["eager", "eager", "sdpa"]


PAIRS = [f"{a} {b}" for a in ("ball", "is", "under", "cup", "it", 1, 2, 3, 4, 5) for b in ("ball", "is", "cup", "it", 1, 2, 3, 4, 5)]
OBJECTIVES = [{}, {"reward": "prob"}, {"reward": "mean_logprob"}, {"sft_penalty": 0.3}, {"non_stop_penalty": False},
              {"penalty_reward_value": 3.0}, {"kl_coef": 0.4}, {"stop_seqs": PAIRS}, {"objective": "sft", "reward": "prob", "sft_penalty": 0.3}]


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
    assert config.stop_seqs is not PAIRS or not all(r.stop_in_answer for r in rollouts)  # a longer stop, which y lacks
    heat = 1.0 if config.objective == "sft" else 1.3

    def plain(model, r):
        x, logits = r.example.prompt, model(torch.tensor([r.ids])).logits[0]
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


def test_clipping_and_work(start):
    """max_grad_norm clips, and what is logged is the norm before; every position pushed is counted, and what was needed."""
    model, tokenizer, examples, rtol = start
    free, (rollouts, _, sums, gradients, _) = (one_update(
        model, tokenizer, examples, max_grad_norm=norm, per_device_train_batch_size=1, gradient_accumulation_steps=8)
        for norm in (0.0, 0.01))
    norm = sum(g.square().sum() for g in free[3]).sqrt().item()
    assert sums["grad_norm"] / 8 == pytest.approx(norm, rel=1e-4) and norm > 0.02
    for clipped, whole in zip(gradients, free[3], strict=True):
        torch.testing.assert_close(clipped, whole * 0.01 / norm, rtol=1e-3, atol=1e-8)
    tokens = sum(len(r.ids) for r in rollouts)
    assert (sums["tokens"], sums["needed"]) == (tokens, 2 * tokens)
    assert sums["positions"] == tokens + sum(len(r.example.prompt) + len(r.actions) for r in rollouts)


def test_cached_scores_are_those_of_a_full_pass(start):
    model, tokenizer, examples, rtol = start
    rollouts, figures, *_ = one_update(model, tokenizer, examples)
    fresh = latro.score(latro.Scorer(model), rollouts, 1.3, "cpu")[0].detach().double()
    for i, name in enumerate(("rationale_logprob", "answer_logprob")):
        torch.testing.assert_close(figures[name], fresh[:, i], rtol=10 * rtol, atol=10 * rtol)


def test_one_rank_and_two(start, tmp_path):
    """Two ranks, a prompt each, against one rank with both."""
    model, tokenizer, examples, rtol = start
    whole = one_update(model, tokenizer, examples)
    torch.save({"model": model, "tokenizer": tokenizer, "examples": examples, "rollouts": whole[0]}, tmp_path / "start.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    loaded = torch.load(tmp_path / "two.pt", weights_only=True)
    for shares in json.load(open(tmp_path / "shares.json")):  # of weights, gradients and both moments each rank holds half
        assert shares == [pytest.approx(0.5, abs=0.05)] * 4
    elements = sum(p.numel() for p in model.parameters())
    planned = latro.plan(latro.Config(), model, 2)["weights, float32"] / 4 / elements
    assert planned == pytest.approx(max(s[0] for s in json.load(open(tmp_path / "shares.json"))), abs=1e-9)
    for x, y in zip(loaded["gradients"], whole[3], strict=True):
        assert (x - y).norm() <= rtol * max(y.norm(), 1e-3)
    for x, y, gradient in zip(loaded["weights"], whole[4].weights, whole[3], strict=True):
        clear = gradient.abs() > 1e-4 * gradient.abs().max()  # AdamW's first step has the sign even of rounding errors
        assert (x - y)[clear].norm() <= 1e-6 * y.norm()


def on_two_ranks(folder):
    from evaluate import gather, init_distributed, on_rank_0, rank
    init_distributed()
    start = torch.load(f"{folder}/start.pt", weights_only=False)
    examples, rollouts = start["examples"][rank():rank() + 1], start["rollouts"][4 * rank():4 * rank() + 4]
    latro.sample_rollouts = lambda *arguments: rollouts
    *_, gradients, optimizer = one_update(start["model"], start["tokenizer"], examples, per_device_train_batch_size=4)
    *_, again, _ = one_update(start["model"], start["tokenizer"], examples, per_device_train_batch_size=4,
                              gradient_checkpointing=True)
    for x, y in zip(gradients, again, strict=True):
        torch.testing.assert_close(x, y)
    halves = latro.cast(copy.deepcopy(start["model"]), torch.bfloat16)
    weights = [p.float() for p in halves.parameters()]
    policy, *_ = latro.set_out(halves, latro.Config(dtype="bfloat16"), torch.device("cpu"))
    for parameter, weight in zip(policy.parameters(), weights, strict=True):
        assert parameter.dtype == torch.float32 and torch.equal(latro.full(parameter.detach()), weight)
    latro.score(policy, rollouts, 1.0, "cpu")[0].sum().backward()  # averaged in float32, not in the passes' bfloat16
    assert any(latro.full(p.grad).bfloat16().ne(latro.full(p.grad)).any() for p in [*policy.parameters()])

    with pytest.raises(data.UserError, match="on rank 0"):  # raised on both, or one would wait for the other
        on_rank_0(lambda: os.remove("/an/error/on rank 0"))

    # HSDP: copies of the shards, here of the whole weights
    policy, *_ = latro.set_out(copy.deepcopy(start["model"]), latro.Config(dtype="float32", shard_size=1), torch.device("cpu"))
    assert all(local(p).numel() == p.numel() for p in policy.parameters())

    # a checkpoint of which one rank's file is damaged is damaged for all
    latro.save_checkpoint(f"{folder}/checkpoints", policy, torch.optim.AdamW(policy.parameters()), {"step": 1}, 1)
    path = f"{folder}/checkpoints/step-1"
    assert latro.read_checkpoint(path)["step"] == 1
    for name in sorted(latro.read_checkpoint(path)["sha256"]):
        gather([0])
        if rank() == 0:
            with open(f"{path}/{name}", "r+b") as file:
                first = file.read(1)[0]
                file.seek(0)
                file.write(bytes([first ^ 255]))
        gather([0])
        assert latro.read_checkpoint(path) is None
        gather([0])
        if rank() == 0:
            with open(f"{path}/{name}", "r+b") as file:
                file.write(bytes([first]))

    # a loss that is not finite on one rank: the update is skipped on both
    right, calls = latro.latro_loss, []

    def infinite_after(*arguments):
        calls.append(1)
        z, y = right(*arguments)
        return z * (float("inf") if rank() and len(calls) > 1 else 1.0), y

    latro.latro_loss = infinite_after
    config = latro.Config(rloo_k=4, per_device_train_batch_size=4, gradient_accumulation_steps=1, response_length=12, dtype="float32")
    policy, _, sampler = latro.set_out(copy.deepcopy(start["model"]), config, torch.device("cpu"))
    other = torch.optim.AdamW(policy.parameters(), lr=1e-3, fused=True)
    _, _, sums = latro.update(policy, None, sampler, other, start["tokenizer"], examples, ["key"], config, torch.device("cpu"))
    assert sums["skipped"] == 4 and not other.state
    shares = gather([optimizer.shares])
    if rank() == 0:
        torch.save({"gradients": gradients, "weights": optimizer.weights}, f"{folder}/two.pt")
        json.dump(shares, open(f"{folder}/shares.json", "w"))


if __name__ == "__main__":
    run_script(lambda argv: on_two_ranks(*argv))
