"""LaTRO (Latent Reasoning Optimization, arXiv 2411.04282) in plain PyTorch.

    python latro.py                                               the embedded default, offline, on a laptop
    torchrun --nproc_per_node 8 latro.py --config gsm8k.yaml      the paper's run on 8 GPUs
    python latro.py --model_name_or_path M --dataset_name jsonl --dataset_path my.jsonl     your own rows
    python latro.py --config FILE.yaml --key value                defaults < YAML < command line; --help lists the keys

A model π samples K rationales z for a question x with gold answer y and is its own reward model:
r_k = log π(y|x⊕z_k) − β·[log π(z_k|x) − log π_0(z_k|x)]. With the leave-one-out advantage A_k the gradient (the paper's
Eq. 4) is the mean over rollouts of

    A_k · ∇ log π(z_k|x)  +  ∇ log π(y|x⊕z_k)

Differences from the paper: an epoch is every prompt once (the released code counts rollouts), and the penalty of an
unfinished rationale is taken from its own reward. From the released code: both terms are trained, stopping is an action
with a probability, and z is scored as the ids that were sampled, at the temperature that it was sampled at.
"""
import copy
import dataclasses
import functools
import gc
import hashlib
import importlib.util
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
import yaml
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import (DATASETS, Example, UserError, answer_ids, choose_grader, decoder, embedded_model, load_rows,
                  make_examples, read_jsonl)
from evaluate import (Common, Parser, Scorer, check_range, closing_split, context_left, evaluate, gather, generate,
                      init_distributed, key, load_model, on_rank_0, parse, rank, read_yaml, resolve_dtype, run_script,
                      stop_token_ids, truncate, uniform_rows, world_size)
from evaluate import main as evaluate_main


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Config(Common):
    # what
    model_name_or_path: str = key("runs/cups-base/final", "folder or hub id of the starting point (this one is made)")
    dataset_name: str = key("cups", f"one of {', '.join(DATASETS)}")
    sanity_check: bool = key(False, "a handful of rows of every split, to see it run")
    objective: str = key("latro", "latro, or sft: the gold rationale and answer, no sampling", ("latro", "sft"))
    # how long
    num_train_epochs: float = key(1.0, "passes over the training prompts, each prompt once per pass")
    max_steps: int | None = key(None, "end after so many updates, whatever num_train_epochs says")
    num_evaluations: int = key(4, "on validation rows, after that of the untrained model; the best model is kept")
    # how many at once; prompts per step and rank = per_device_train_batch_size * gradient_accumulation_steps / rloo_k
    per_device_train_batch_size: int = key(4, "sequences in a pass with gradient")
    gradient_accumulation_steps: int = key(8, "passes with gradient per update")
    rollout_batch_size: int = key(64, "rollouts decoded together; as some end, others begin")
    gradient_checkpointing: bool = key(False, "compute activations again in the backward pass, to save memory")
    # objective
    rloo_k: int = key(4, "K, rationales per prompt")
    reward: str = key("logprob", "of the answer: logprob (the paper), mean_logprob (per token) or prob (VeriFree)",
                      ("logprob", "mean_logprob", "prob"))
    kl_coef: float = key(0.05, "β, the weight of the KL to the starting point; 0 loads no reference model")
    sft_penalty: float = key(1.0, "the weight of Eq. 4's second term, the gradient of the reward itself")
    non_stop_penalty: bool = key(True, "penalise rationales that do not end within response_length")
    penalty_reward_value: float = key(2.0, "γ of that penalty: φ ← φ − (γ−1)·|φ|")
    # optimiser
    learning_rate: float = key(5e-7, "of AdamW, decaying linearly to 0")
    max_grad_norm: float = key(1.0, "clip the gradient to this norm; 0: off")
    # plan
    dry_run: int | None = key(None, "print memory and steps for so many ranks, and end: nothing is loaded or written")
    gpu_memory: float | None = key(None, "GiB of a GPU; a dry run that needs more says what to change")
    # files
    output_dir: str = key("runs", "where run directories are made")
    run_name: str | None = key(None, "name of the run directory; default: unique")
    save_steps: int | None = key(None, "write a checkpoint after every so many updates; none: only when told to stop")
    save_total_limit: int = key(2, "checkpoints kept, the newest")
    checkpoint_path: str | None = key(None, "continue from this checkpoint; latest: the newest whole one of run_name")
    shard_size: int | None = key(None, "ranks that weights are sharded over (HSDP over the rest); default: all")

    def __post_init__(self):
        super().__post_init__()
        check_range(self, ("per_device_train_batch_size", "gradient_accumulation_steps", "rollout_batch_size", "rloo_k",
                           "num_evaluations", "num_train_epochs", "max_steps", "learning_rate", "temperature",
                           "save_steps", "save_total_limit", "shard_size", "dry_run", "gpu_memory"))
        check_range(self, ("kl_coef", "sft_penalty", "max_grad_norm"), above=False)
        if not 1 <= self.penalty_reward_value < float("inf"):
            raise UserError(f"penalty_reward_value: {self.penalty_reward_value} is below 1: a bonus, not a penalty")
        if self.checkpoint_path == "latest" and self.run_name is None:
            raise UserError("checkpoint_path: latest needs run_name, the run to continue")
        if self.objective == "latro" and self.rloo_k < 2:
            raise UserError("rloo_k: 1 leaves no other rollout for the leave-one-out baseline; use 2 or more")
        if self.objective == "latro" and self.sequences % self.rloo_k:
            raise UserError(f"rloo_k: {self.rloo_k} does not divide per_device_train_batch_size * "
                            f"gradient_accumulation_steps = {self.sequences}; a step takes whole groups of rloo_k")

    @property
    def sequences(self) -> int:  # per step and rank
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def prompts(self) -> int:  # per step and rank
        return self.sequences // (self.rloo_k if self.objective == "latro" else 1)

    @property
    def needs_reference(self) -> bool:
        return self.objective == "latro" and self.kl_coef > 0

    def total_steps(self, count: int, ranks: int, step: int = 0, consumed: int = 0) -> int:
        """Updates of a run over `count` training prompts, of which `step` were made, with `consumed` prompts."""
        left = math.ceil((round(self.num_train_epochs * count) - consumed) / (self.prompts * ranks))
        return max(step, self.max_steps or step + left, 1)


def load_config(argv: list[str]) -> Config:
    """The settings of a command line; --config names a YAML file as given, or one in configs/ beside this file."""
    flag = Parser(add_help=False, allow_abbrev=False)
    flag.add_argument("--config")
    flag, argv = flag.parse_known_args(argv)
    if not flag.config and not any(a.startswith(("--model_name_or_path", "--dataset_name")) for a in argv):
        flag.config = "tiny.yaml"
    path = flag.config
    if path and not os.path.exists(path):
        shipped = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", path)
        path = shipped if os.path.exists(shipped) else path
    return parse(Config, argv, __doc__, read_yaml(path) if path else None)


# ---------------------------------------------------------------------------------------------------------------------
# Rewards, advantages, loss: plain functions of tensors, made to be copied
# ---------------------------------------------------------------------------------------------------------------------
def answer_reward(logprob: torch.Tensor, length: torch.Tensor, kind: str = "logprob") -> torch.Tensor:
    """φ of log π(y|x⊕z), the natural log summed over y's `length` tokens: itself (Eq. 3), per token, or the
    probability (VeriFree, arXiv 2505.21493). Differentiable; all shapes (B,)."""
    return {"logprob": logprob, "mean_logprob": logprob / length, "prob": logprob.exp()}[kind]


def rollout_rewards(phi: torch.Tensor, kl: torch.Tensor, finished: torch.Tensor, kl_coef: float,
                    gamma: float) -> torch.Tensor:
    """r_k = φ_k − β·[log π(z_k|x) − log π_0(z_k|x)]; all (B,), finished bool. An unfinished rationale's φ is lowered
    by (γ−1)·|φ| first: its own φ alone, so that neither its baseline nor another prompt's reward moves."""
    return torch.where(finished, phi, phi - (gamma - 1) * phi.abs()) - kl_coef * kl


def rloo_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """A_k = r_k − mean of the other K−1 rewards of the same prompt; rewards and result (B, K), K ≥ 2."""
    k = rewards.shape[1]
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (k - 1)


def latro_loss(rationale_logprobs: torch.Tensor, answer_rewards: torch.Tensor, advantages: torch.Tensor,
               sft_penalty: float, rollouts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two terms whose sum's gradient is minus Eq. 4: REINFORCE on z, and the gradient of the reward itself.

    All (B,), a part of the step's `rollouts`: losses of parts add up. No gradient flows through `advantages`.
    """
    policy_loss = -(advantages.detach() * rationale_logprobs).sum() / rollouts
    return policy_loss, -sft_penalty * answer_rewards.sum() / rollouts


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts
# ---------------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Rollout:
    """One sequence x⊕z⊕y. `actions` are the sampled tokens that make log π(z|x): z and the stop that ended it."""
    example: Example
    rationale: list[int]
    actions: list[int]
    answer: list[int]
    finished: bool = True
    stop_in_answer: bool = True  # the sampled stop is what y begins with, or is one token
    rationale_logprob: float = 0.0
    answer_logprob: float = 0.0

    @property
    def ids(self) -> list[int]:
        return self.example.prompt + self.rationale + self.answer


def cut_rollout(example: Example, ids: list[int], stop_ids, stop_seqs, decode) -> Rollout:
    """The rollout of the sampled ids: the rationale cut where it ends, the answer that follows it, the stop's tokens.

    One pass over x⊕z⊕y scores the stop too where y begins with it, and any one token from z's last logits. Of another
    stop all but the first token is left out of log π(z|x); `stop_in_answer` says how often that happens.
    """
    n, m, finished = truncate(ids, stop_ids, stop_seqs, decode)
    answer = answer_ids(example, ids[:n], decode)
    stop_in_answer = m - n <= 1 or answer[:m - n] == ids[n:m]
    return Rollout(example, ids[:n], ids[:m] if stop_in_answer else ids[:n + 1], answer, finished, stop_in_answer)


def sample_rollouts(model, tokenizer, examples: list[Example], config: Config, keys: list[str]) -> list[Rollout]:
    """rloo_k rollouts per example, sampled by the plain model; y is scored on the sampler's cache."""
    decode, stop_ids = decoder(tokenizer), stop_token_ids(tokenizer, model, config.stop_token)
    rollouts: list[Rollout] = [None] * (len(examples) * config.rloo_k)

    def continuation(row: int, ids: list[int]) -> tuple[int, list[int]]:
        rollouts[row] = cut_rollout(examples[row // config.rloo_k], ids, stop_ids, config.stop_seqs, decode)
        return len(rollouts[row].rationale), rollouts[row].answer

    noise = uniform_rows([f"{key}/{j}" for key in keys for j in range(config.rloo_k)], config.response_length)
    sampled = generate(model, [e.prompt for e in examples], config.response_length, num_samples=config.rloo_k,
                       temperature=config.temperature, uniforms=noise, stop_ids=stop_ids, stop_seqs=config.stop_seqs,
                       decode=decode, continuations=continuation, batch_size=config.rollout_batch_size,
                       room=max(len(ids) for e in examples for ids in e.answers))
    for rollout, (_, logprobs, answer_logprobs) in zip(rollouts, sampled):
        rollout.rationale_logprob = sum(logprobs[:len(rollout.actions)])
        rollout.answer_logprob = sum(answer_logprobs)
    return rollouts


def gold_rollouts(tokenizer, examples: list[Example]) -> list[Rollout]:
    """SFT's sequences: z the gold rationale, empty where the dataset has none."""
    decode = decoder(tokenizer)
    return [Rollout(e, e.rationale, e.rationale, answer_ids(e, e.rationale, decode)) for e in examples]


def score(scorer: nn.Module, rollouts: list[Rollout], temperature: float, device, answers: bool = True,
          slopes: torch.Tensor | None = None) -> tuple[torch.Tensor, int]:
    """((B, 2): log π(z|x) at `temperature` and log π(y|x⊕z) at 1; positions pushed through the model, with padding).

    One forward pass: causality gives z, its stop and y from the same x⊕z⊕y. answers=False leaves y out. With `slopes`
    (B, 2), d loss / d of the result, the weights' gradients of the loss are added up too.
    """
    sequences = [r.ids if answers else (r.ids[:len(r.example.prompt) + len(r.actions)]) for r in rollouts]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], batch_first=True).to(device)  # (B, T)
    cells, columns, targets = [], [], []  # of each scored token; cell 2i + j is where result (i, j) adds up
    for i, rollout in enumerate(rollouts):
        start = len(rollout.example.prompt)
        for kind, (begin, tokens) in enumerate([(start, rollout.actions),
                                                (start + len(rollout.rationale), rollout.answer if answers else [])]):
            cells += [2 * i + kind] * len(tokens)
            columns += range(begin, begin + len(tokens))
            targets += tokens
    cells, columns, targets = (torch.tensor(x, device=device) for x in (cells, columns, targets))  # (N,)
    heat = None if temperature == 1 else torch.tensor([temperature, 1.0], dtype=torch.float64, device=device)[cells % 2]
    if slopes is None:
        logprobs = scorer(ids, cells // 2, columns, targets, heat)  # (N,)
    else:
        logprobs, rest = scorer(ids, cells // 2, columns, targets, heat, slopes.to(device).flatten()[cells])
        rest.backward()
    sums = logprobs.new_zeros(2 * len(rollouts)).index_add(0, cells, logprobs)
    return sums.view(-1, 2), ids.numel()


# ---------------------------------------------------------------------------------------------------------------------
# One update
# ---------------------------------------------------------------------------------------------------------------------
def micro_batches(lengths: list[int], size: int) -> list[list[int]]:
    """Indices of sequences in groups of like length, the longest first, none with more padded positions than `size` of
    the longest. As few groups as hold padding below 8%, at most twice the fewest; as many on every rank, because FSDP's
    passes are collective."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    n, longest, fewest = len(order), max(lengths), math.ceil(len(lengths) / size)
    reach = [min(n, begin + size * longest // lengths[i]) for begin, i in enumerate(order)] + [n]  # the ends of groups
    tables = [{0: (0, 0)}]  # by number of groups, best cuts of order[:end]: {end: (positions, begin of the last group)}

    def positions(count: int) -> int:  # of the best cut into `count` groups
        while len(tables) <= count:
            best: dict[int, tuple[int, int]] = {}
            for begin, (before, _) in tables[-1].items():
                for end in range(begin + 1, reach[begin] + 1):
                    new = before + (end - begin) * lengths[order[begin]], begin
                    best[end] = min(best.get(end, new), new)
            tables.append(best)
        return tables[count][n][0]

    most = min(2 * fewest, n)
    count = next((count for count in range(fewest, most) if positions(count) <= 1.08 * sum(lengths)), most)
    count = max(gather([count]))
    positions(count)  # another rank may ask for more groups than were tried here
    groups, end = [], n
    for table in tables[count:0:-1]:
        groups.append(order[table[end][1]:end])
        end = table[end][1]
    return groups[::-1]


def update(policy, reference, sampler, optimizer, tokenizer, examples: list[Example], keys: list[str], config: Config,
           device) -> tuple[list[Rollout], dict[str, torch.Tensor], dict[str, float]]:
    """One step on this rank's examples: sample → score → advantage → loss → update.

    Returns the rollouts, K of a prompt in a row, their figures (each (B*K,) float64) and sums for reduce_metrics.
    """
    latro, clock, positions = config.objective == "latro", [time.perf_counter()], 0
    temperature, weight = (config.temperature, config.sft_penalty) if latro else (1.0, 1.0)

    # sample: the plain model's rationales; SFT takes the gold ones
    if latro:
        rollouts = sample_rollouts(sampler, tokenizer, examples, config, keys)
    else:
        rollouts = gold_rollouts(tokenizer, examples)
    batches = micro_batches([len(r.ids) for r in rollouts], config.per_device_train_batch_size)
    figures = {name: torch.tensor([getattr(r, name) for r in rollouts], dtype=torch.float64)
               for name in ("rationale_logprob", "answer_logprob", "finished", "stop_in_answer")}
    lengths = torch.tensor([len(r.answer) for r in rollouts], dtype=torch.float64)
    clock.append(time.perf_counter())

    # score: the sampler gave log π(z|x) and log π(y|x⊕z); one pass of the frozen start gives log π_0(z|x)
    ref_logprobs = figures["rationale_logprob"].clone()
    for batch in batches if reference is not None else ():
        with torch.no_grad():
            sums, count = score(reference, [rollouts[i] for i in batch], temperature, device, answers=False)
        ref_logprobs[batch] = sums[:, 0].double().cpu()
        positions += count
    clock.append(time.perf_counter())

    # advantage: SFT is the same loss with advantage 1 on the gold rationale
    kl, advantages = figures["rationale_logprob"] - ref_logprobs, torch.ones(len(rollouts), dtype=torch.float64)
    if latro:
        phi = answer_reward(figures["answer_logprob"], lengths, config.reward)
        gamma = config.penalty_reward_value if config.non_stop_penalty else 1.0
        rewards = rollout_rewards(phi, kl, figures["finished"].bool(), config.kl_coef, gamma)
        advantages = rloo_advantages(rewards.view(-1, config.rloo_k)).flatten()

    # loss: how it changes with each log-probability is known beforehand, so that one pass over x⊕z⊕y goes back at once
    def losses(logprobs: torch.Tensor) -> torch.Tensor:  # (B*K, 2), of z and y → (2,), the terms of Eq. 4
        phi = answer_reward(logprobs[:, 1], lengths, config.reward if latro else "logprob")
        return torch.stack(latro_loss(logprobs[:, 0], phi, advantages, weight, len(rollouts)))

    logprobs = torch.stack([figures["rationale_logprob"], figures["answer_logprob"]], 1).requires_grad_()
    slopes, = torch.autograd.grad(losses(logprobs).sum(), logprobs)
    logprobs = torch.zeros_like(slopes, device=device)
    for batch in batches:  # FSDP averages over the ranks, which all have as many rollouts
        sums, count = score(policy, [rollouts[i] for i in batch], temperature, device, slopes=slopes[batch])
        logprobs[batch] = sums.double()
        positions += count
    logprobs = logprobs.cpu()
    if not latro:
        figures["rationale_logprob"], figures["answer_logprob"] = logprobs.T
    loss = losses(logprobs)

    # update: skipped on all ranks alike where a reward, loss or gradient of any rank is not finite
    norm = full(nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm or float("inf")))
    finite = ((loss.isfinite().all() & advantages.isfinite().all()).to(device) & norm.isfinite()).double()
    dist.all_reduce(finite, dist.ReduceOp.MIN)
    if finite:
        optimizer.step()
        refresh(sampler, policy)
    optimizer.zero_grad()
    numbers = (*loss.tolist(), norm.item(), 1 - finite.item())  # read here: a GPU's work is done when they are
    clock.append(time.perf_counter())

    kl = kl if reference is not None else torch.full_like(kl, math.nan)  # not 0: not measured
    figures |= {"ref_rationale_logprob": figures["rationale_logprob"] - kl, "kl": kl, "advantage": advantages,
                "reward": rewards if latro else figures["answer_logprob"],
                "rationale_length": torch.tensor([len(r.rationale) for r in rollouts], dtype=torch.float64)}
    tokens = sum(len(r.ids) for r in rollouts)
    sums = {name: figures[name].sum().item() for name in LOGGED} | {"rollouts": len(rollouts), "tokens": tokens,
            "positions": positions, "needed": tokens * (1 + (reference is not None))}
    per_step = dict(zip(("policy_loss", "sft_loss", "grad_norm", "skipped", "generate_s", "score_s", "train_s"),
                        (*numbers, *(b - a for a, b in zip(clock, clock[1:])))))
    sums |= {name: value * len(rollouts) for name, value in per_step.items()}
    return rollouts, figures, sums


LOGGED = ("reward", "answer_logprob", "kl", "finished", "stop_in_answer", "rationale_length")


def reduce_metrics(sums: dict[str, float], device) -> dict[str, float]:
    """Sums over this rank's rollouts → means over all ranks' rollouts."""
    total = torch.tensor(list(sums.values()), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    total = dict(zip(sums, total.tolist()))
    positions, needed, tokens, n = (total.pop(name) for name in ("positions", "needed", "tokens", "rollouts"))
    means = {name: value / n for name, value in total.items()}
    seconds = means["generate_s"] + means["score_s"] + means["train_s"]
    return means | {"step_s": seconds, "tokens_per_s": tokens / seconds, "work_ratio": positions / needed}


# ---------------------------------------------------------------------------------------------------------------------
# Sharding and files
# ---------------------------------------------------------------------------------------------------------------------
def make_mesh(config: Config, device):
    """All ranks in one row, or, with shard_size, copies of the shards over rows of shard_size ranks (HSDP)."""
    size, ranks = config.shard_size or world_size(), world_size()
    if size == ranks:
        return init_device_mesh(device.type, (ranks,))
    return init_device_mesh(device.type, (ranks // size, size), mesh_dim_names=("replicate", "shard"))


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.get_decoder().children() if isinstance(module, nn.ModuleList))


def shard(model: nn.Module, held: torch.dtype, dtype: torch.dtype, mesh) -> Scorer:
    """FSDP2: one group per decoder layer, the rest with the root; weights held in `held`, cast as they are cut up, so
    that no rank ever has all of them in it; arithmetic in `dtype`, sums of gradients in float32. One process has
    nothing to shard."""
    scorer = Scorer(model)
    if world_size() == 1:
        return cast(scorer, held)
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(
        dtype, torch.promote_types(dtype, torch.float32), cast_forward_inputs=False)}
    for layer in decoder_layers(model):
        fully_shard(cast(layer, held), **options)
    return fully_shard(cast(scorer, held), **options)


def make_policy(model: nn.Module, sampler: nn.Module, mesh, gradient_checkpointing: bool = False) -> Scorer:
    """What learns: `model`'s weights, in float32; arithmetic in the sampler's dtype. One process shards nothing: it
    computes with the sampler's own weights and adds each whole gradient to the float32 one, as FSDP does."""
    alone = world_size() == 1
    # alone: other modules around the same parameters, so that the sampler's know nothing of gradient checkpointing
    modules = copy.deepcopy(sampler, {id(p): p for p in sampler.parameters()}) if alone else model
    if gradient_checkpointing:
        for layer in decoder_layers(modules):  # transformers' own switch needs training mode: dropout, in OPT's layers
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    policy = shard(model, torch.promote_types(sampler.dtype, torch.float32), sampler.dtype, mesh)
    if not alone:
        return policy

    def collect(master: nn.Parameter, plain: nn.Parameter) -> None:
        if master.grad is None:
            master.grad = plain.grad.to(master.dtype)
        else:
            for total, part in zip(master.grad.split(1024), plain.grad.split(1024)):
                total += part  # what is cast on the way fits a CPU's cache
        plain.grad = None

    for master, plain in zip(model.parameters(), sampler.parameters(), strict=True):
        if plain.requires_grad:
            plain.register_post_accumulate_grad_hook(functools.partial(collect, master))
    policy.forward = Scorer(modules).forward  # a method: their parameters do not become the policy's
    return policy


def full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded: then every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with its parameters in `dtype`, in place; buffers (rotary tables) keep theirs."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def scoring_attention(model: nn.Module, asked: str, compute: torch.dtype, device) -> str:
    """The attention of the passes that score; "auto" is flash-attn where it is installed and the model has it. Sampling
    keeps the model's own: flash-attn would cut the padding out of its batch at every layer and step, on the host."""
    flash = (asked == "auto" and device.type == "cuda" and compute.itemsize == 2 and model._supports_flash_attn
             and transformers.utils.is_flash_attn_2_available())
    return "flash_attention_2" if flash else model.config._attn_implementation


def set_out(model: nn.Module, config: Config, device) -> tuple[Scorer, Scorer | None, nn.Module]:
    """(policy, reference, sampler) of a starting model, whole and in its own dtype: what learns, the frozen start where
    the objective asks for it, and the plain weights, `model` itself, that are sampled from."""
    compute, mesh = resolve_dtype(config.dtype, device), make_mesh(config, device)
    attention = model.config._attn_implementation
    model.set_attn_implementation(scoring_attention(model, config.attn_implementation, compute, device))
    learner, reference = copy.deepcopy(model), None
    sampler = cast(model, compute)
    policy = make_policy(learner, sampler, mesh, config.gradient_checkpointing)
    if config.needs_reference:
        reference = shard(copy.deepcopy(sampler), compute, compute, mesh).requires_grad_(False)
    sampler.set_attn_implementation(attention)  # the copies keep theirs
    refresh(sampler, policy)
    return policy, reference, sampler


@torch.no_grad()
def check_head(model: nn.Module, prompt: list[int]) -> None:
    """UserError where Scorer's logits are not the model's: an architecture that scales them in a way not known here."""
    ids = torch.tensor([prompt], device=model.device)
    try:
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state
    except (AttributeError, TypeError):  # Llama 4
        raise UserError(f"model {model.config.model_type}: its get_decoder() gives no hidden states to score") from None
    if not torch.allclose(Scorer(model).head(hidden), model(input_ids=ids).logits, rtol=0.05, atol=0.05):
        raise UserError(f"model {model.config.model_type}: its logits are not the head's; teach it to Scorer.head")


@torch.no_grad()
def refresh(sampler: nn.Module, policy: Scorer) -> None:
    """Bring the sampler's weights up to date with the policy's, in place, one parameter at a time. With one process and
    one dtype they become the policy's own, and there is nothing to copy."""
    for plain, master in zip(sampler.parameters(), policy.model.parameters(), strict=True):
        if world_size() > 1:
            plain.copy_(full(master.to(plain.dtype)))  # cast first: less to gather
        elif plain.dtype == master.dtype:
            plain.data = master.data
        else:
            plain.copy_(master)


def export(folder: str, policy: Scorer, sampler: nn.Module, tokenizer, dtype: torch.dtype) -> None:
    """Write the trained weights in the base model's dtype as a Hugging Face folder; whole, or not at all."""
    buffers = dict(sampler.named_buffers())
    weights = {name: tensor.cpu() for name, tensor in sampler.state_dict().items() if name in buffers}
    for name, parameter in policy.model.named_parameters():
        weight = full(parameter.detach())  # collective: every rank takes part
        if rank() == 0:
            weights[name] = weight.to("cpu", dtype, copy=True)

    def write():
        partial = folder + ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            sampler.save_pretrained(partial, state_dict=weights)
            sampler.config.dtype = dtype  # save_pretrained wrote the sampler's own
            sampler.config.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            shutil.rmtree(folder + ".old", ignore_errors=True)
            if os.path.exists(folder):
                os.rename(folder, folder + ".old")
            os.rename(partial, folder)
        except Exception as error:  # OSError, or the safetensors library's own: most likely a full disk
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"{folder}: cannot be written ({error})") from None
        shutil.rmtree(folder + ".old", ignore_errors=True)

    on_rank_0(write)


def sha256(path: str) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            total.update(block)
    return total.hexdigest()


def last_line(error: BaseException) -> str:
    return str(error).strip().rpartition("\n")[2]


def save_checkpoint(folder: str, policy: Scorer, optimizer, state: dict, keep: int) -> None:
    """All that continuing needs, as folder/step-N, by torch.distributed.checkpoint; whole, or not at all."""
    final, partial = os.path.join(folder, f"step-{state['step']}"), os.path.join(folder, "partial")
    on_rank_0(lambda: shutil.rmtree(partial, ignore_errors=True))
    weights, moments = get_state_dict(policy, optimizer)
    try:
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=partial)
    except CheckpointException as error:  # on all ranks alike
        on_rank_0(lambda: shutil.rmtree(partial, ignore_errors=True))
        raise UserError(f"{final}: cannot be written; is the disk full? ({last_line(error)})") from None
    mine = [name for name in os.listdir(partial) if name.startswith(f"__{rank()}_") or rank() == 0 and name[0] == "."]
    sums = dict(gather([(name, sha256(os.path.join(partial, name))) for name in mine]))

    def publish():
        with open(os.path.join(partial, "state.json"), "w", encoding="utf-8") as file:
            json.dump(state | {"sha256": sums}, file)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        for old in checkpoints(folder)[keep:]:
            shutil.rmtree(old)

    on_rank_0(publish)


def checkpoints(folder: str) -> list[str]:
    """The step-N folders of a run's checkpoints/, the newest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    names = [name for name in names if re.fullmatch("step-[1-9][0-9]*", name)]
    return [os.path.join(folder, name) for name in sorted(names, key=lambda name: -int(name[5:]))]


def read_checkpoint(path: str) -> dict | None:
    """The state that a checkpoint holds beside the tensors, or None where a file is missing or not what was written."""
    try:
        with open(os.path.join(path, "state.json"), encoding="utf-8") as file:
            state = json.load(file)
        mine = list(state["sha256"].items())[rank()::world_size()]
        good = all(sha256(os.path.join(path, name)) == expected for name, expected in mine)
    except (OSError, ValueError, KeyError):
        good = False
    return state if all(gather([good])) else None


def load_checkpoint(path: str, policy: Scorer, optimizer) -> None:
    weights, moments = get_state_dict(policy, optimizer)
    try:
        dcp.load({"model": weights}, checkpoint_id=path)
        some = dcp.DefaultLoadPlanner(allow_partial_load=True)  # a vision tower gets no gradient, has no moments
        dcp.load({"optimizer": moments}, checkpoint_id=path, planner=some)
    except (Exception, CheckpointException) as error:  # the latter is none of the former: another model's tensors
        raise UserError(f"checkpoint_path {path}: does not fit the model ({last_line(error)})") from None
    set_state_dict(policy, optimizer, model_state_dict=weights, optim_state_dict=moments)


def find_checkpoint(config: Config, directory: str) -> tuple[str | None, dict]:
    """(path, state) of the checkpoint to continue from; (None, the state of an untrained model) to start afresh."""
    latest = config.checkpoint_path == "latest"
    for path in checkpoints(os.path.join(directory, "checkpoints")) if latest else [config.checkpoint_path]:
        if path and (state := read_checkpoint(path)) is not None:
            return path, state
        if path and not latest:
            raise UserError(f"checkpoint_path {path}: no whole checkpoint; give a checkpoints/step-N folder or latest")
        if path and rank() == 0:
            print(f"warning: {path} is damaged and skipped", file=sys.stderr, flush=True)
    return None, {"step": 0, "consumed": 0, "best": 0.0, "skipped_in_a_row": 0}


def trim(path: str, step: int) -> bool:
    """Drop the rows of a JSONL file that came after the checkpoint of `step`: it is written before that evaluation.
    Returns whether that one was among them."""
    if not os.path.exists(path):
        return False
    kept, evaluated = 0, False  # bytes
    with open(path, "r+b") as file:
        for line in file:
            row = json.loads(line) if line.endswith(b"\n") else {"step": math.inf}  # a line cut short is the last
            evaluated = "split" in row and row["step"] == step
            if evaluated or row["step"] > step:
                break
            kept += len(line)
        file.truncate(kept)
    return evaluated


def rewind(directory: str, step: int) -> bool:
    """Take a run's files back to the checkpoint of `step`: what came later goes, its end too, or `latest` would go on
    from there. Returns whether that step had been evaluated."""
    for path in checkpoints(os.path.join(directory, "checkpoints")):
        if int(path.rpartition("-")[2]) > step:
            shutil.rmtree(path)
    shutil.rmtree(os.path.join(directory, "final"), ignore_errors=True)
    for path in (os.path.join(directory, f"evaluation-{name}.json") for name in ("base", "best")):
        if os.path.exists(path):
            os.remove(path)
    trim(os.path.join(directory, "samples.jsonl"), step)
    return trim(os.path.join(directory, "metrics.jsonl"), step)


def write_config(path: str, config: Config) -> None:
    """Every key as used; as comments, what ran it. The file can be given back to --config, with another run_name."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"# torch {torch.__version__}, transformers {transformers.__version__}, "
                   f"Python {platform.python_version()}, {world_size()} ranks, commit {commit or 'unknown'}\n")
        yaml.safe_dump(dataclasses.asdict(config), file, sort_keys=False, allow_unicode=True)


def append(path: str, rows: list[dict]) -> None:
    """Append rows to a JSONL file; a number that is not finite is null, as JSON has it."""
    if rank() == 0:
        with open(path, "a", encoding="utf-8") as file:
            for row in rows:
                row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def sample_rows(step: int, rollouts: list[Rollout], figures: dict[str, torch.Tensor], decode) -> list[dict]:
    names = ("answer_logprob", "rationale_logprob", "ref_rationale_logprob", "reward", "advantage")
    return [{"step": step, "query": decode(r.example.prompt), "rationale": decode(r.rationale),
             "response": decode(r.answer), "ids": r.ids, "z_start": len(r.example.prompt),
             "y_start": len(r.example.prompt) + len(r.rationale), "actions": r.actions}
            | {name: figures[name][i].item() for name in names} | {"finished": r.finished}
            for i, r in enumerate(rollouts)]


def draw_curves(directory: str) -> None:
    """curves.png from metrics.jsonl: reward, accuracy, rationale length and KL against the step."""
    try:
        from matplotlib.figure import Figure  # without pyplot, which would look for a screen and keep every figure
    except ImportError:
        return print("curves.png needs the package matplotlib: pip install matplotlib")
    rows = read_jsonl(os.path.join(directory, "metrics.jsonl"))
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    panels = [("reward", "reward per rollout"), ("accuracy", "greedy accuracy, validation"),
              ("rationale_length", "rationale length, tokens"), ("kl", "KL to the starting point, nats")]
    for axis, (name, title) in zip(axes.flat, panels):
        for evaluated, style, label in ((False, "C0-", "rollouts"), (True, "C1o-", "greedy, validation")):
            points = [(r["step"], r[name]) for r in rows if ("split" in r) is evaluated and r.get(name) is not None]
            if points:
                axis.plot(*zip(*points), style, markersize=4, linewidth=1, label=label)
        if not axis.lines:  # the KL without a reference
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0, 1].set_ylim(-0.02, 1.02)
    axes[1, 0].legend(fontsize=8)
    figure.supxlabel("step", fontsize=10)
    figure.suptitle(os.path.basename(directory), fontsize=10)
    figure.savefig(os.path.join(directory, "curves.png"), dpi=130)


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}/epoch/{epoch}").shuffle(order)
    return order


def prompt_indices(seed: int, consumed: int, n: int, count: int) -> list[int]:
    """The next n of `count` prompts after `consumed` ones: epoch after epoch, each prompt once per epoch."""
    return [epoch_order(seed, i // count, count)[i % count] for i in range(consumed, consumed + n)]


def load_examples(config: Config, model, tokenizer) -> tuple[dict[str, list[Example]], str]:
    """The tokenised rows of every split that the run will see, and the grader: what is wrong with data is wrong here.

    "closing" are the rows of the closing table, which nothing is chosen on; a single file has only validation rows.
    """
    splits = {"train": "train", "validation": "validation", "closing": closing_split(config.dataset_path)}
    limits = {"train": 16, "validation": 4, "closing": 4} if config.sanity_check else {}
    rows = {k: load_rows(config.dataset_name, v, config.dataset_path) for k, v in splits.items()}
    grader = choose_grader(config.grader, config.dataset_name, [row for part in rows.values() for row in part])
    rows = {k: part[:limits.get(k)][:config.limit if k != "train" else None] for k, part in rows.items()}
    context = context_left(model, config.response_length)
    examples = {k: make_examples(tokenizer, part, context) for k, part in rows.items()}
    if config.objective == "sft" and (whole := context_left(model, 0)) is not None:
        longest = max(len(e.prompt) + len(e.rationale) + max(map(len, e.answers)) for e in examples["train"])
        if longest > whole:
            raise UserError(f"a prompt, its rationale and its answer take {longest} tokens, and the model's context "
                            f"has {whole}; shorten or drop the longest rationales")
    return examples, grader


def train(config: Config, directory: str, model, tokenizer, examples: dict[str, list[Example]], grader: str,
          device) -> None:
    """Train `model` (whole, on this rank's device, in its own dtype) and fill the run directory."""
    dtype = model.dtype
    policy, reference, sampler = set_out(model, config, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True)

    path, state = find_checkpoint(config, directory)
    if path is not None:
        load_checkpoint(path, policy, optimizer)
        refresh(sampler, policy)
        if not on_rank_0(lambda: os.path.exists(os.path.join(directory, "best"))):
            state["best"] = 0.0  # it was that of another run
    on_rank_0(lambda: write_config(os.path.join(directory, "config.yaml"), config))
    count, per_step = len(examples["train"]), config.prompts * world_size()
    total_steps = config.total_steps(count, world_size(), state["step"], state["consumed"])
    evaluate_at = {round(i * total_steps / config.num_evaluations) for i in range(config.num_evaluations + 1)}
    metrics_path, samples_path = (os.path.join(directory, name) for name in ("metrics.jsonl", "samples.jsonl"))
    if on_rank_0(lambda: rewind(directory, state["step"])):
        evaluate_at.add(state["step"])  # again, though another number of ranks moves the others: best/ may be its model
    log = start_wandb(config, directory)
    bar = tqdm(total=total_steps, initial=state["step"], desc=config.objective, unit="step", disable=rank() > 0)

    def evaluate_now() -> None:
        result = evaluate(sampler, tokenizer, examples["validation"], grader, response_length=config.response_length,
                          stop_token=config.stop_token, stop_seqs=config.stop_seqs, seed=config.seed,
                          batch_size=config.per_device_eval_batch_size, title=f"validation, step {state['step']}")
        row = {"step": state["step"], "split": "validation"} | {name: result[name] for name in (
            "n", "accuracy", "answer_logprob", "rationale_length", "finished")}
        append(metrics_path, [row])
        log({"step": row["step"]} | {f"validation/{k}": v for k, v in row.items() if k not in ("step", "split")})
        if rank() == 0:
            tqdm.write(f"step {row['step']:>4}: validation accuracy {row['accuracy']:6.1%}, "
                       f"log π(y|x⊕z) {row['answer_logprob']:.3f}, rationale length {row['rationale_length']:.1f}")
            draw_curves(directory)
        if row["step"] > 0 and row["accuracy"] >= state["best"]:  # of equals the later, which trained longer
            state["best"] = row["accuracy"]
            export(os.path.join(directory, "best"), policy, sampler, tokenizer, dtype)

    signals: list[int] = []  # received
    stoppable = config.model_name_or_path != "embedded"  # the making of the base is short, and begins anew
    handlers = {number: signal.signal(number, lambda number, frame: signals.append(number))
                for number in (signal.SIGTERM, signal.SIGINT) if stoppable}
    while True:
        if state["step"] in evaluate_at:
            evaluate_now()
        if state["step"] >= total_steps:
            export(os.path.join(directory, "final"), policy, sampler, tokenizer, dtype)
            told_to_stop = any(gather(signals))  # during the last evaluation
            break
        epochs_done = state["consumed"] / count / config.num_train_epochs
        learning_rate = config.learning_rate * (1 - (state["step"] / total_steps if config.max_steps else epochs_done))
        optimizer.param_groups[0]["lr"] = learning_rate
        first = state["consumed"] + rank() * config.prompts
        chosen = [examples["train"][i] for i in prompt_indices(config.seed, first, config.prompts, count)]
        keys = [f"{config.seed}/train/{first + i}" for i in range(config.prompts)]
        rollouts, figures, sums = update(policy, reference, sampler, optimizer, tokenizer, chosen, keys, config, device)
        state |= {"step": state["step"] + 1, "consumed": state["consumed"] + per_step}
        row = {"step": state["step"], "epoch": state["consumed"] / count} | reduce_metrics(sums, device)
        row["lr"] = learning_rate
        append(metrics_path, [row])
        whole = state["step"] in (1, total_steps)  # else a prompt's rollouts
        logged = sample_rows(state["step"], rollouts[:None if whole else config.rloo_k], figures, decoder(tokenizer))
        append(samples_path, gather(logged) if whole else logged)
        log(row)
        state["skipped_in_a_row"] = state["skipped_in_a_row"] + 1 if row["skipped"] else 0
        if state["skipped_in_a_row"] == 10:
            raise FloatingPointError(f"step {row['step']}: ten updates in a row had a reward, loss or gradient that is "
                                     f"not finite; lower learning_rate; the best model so far is in {directory}/best")
        kl = f"kl {row['kl']:.2f}, " if reference is not None else ""
        bar.set_postfix_str(f"reward {row['reward']:.3f}, {kl}length {row['rationale_length']:.1f}", refresh=False)
        bar.update()
        told_to_stop = any(gather(signals))  # on any rank
        if told_to_stop or config.save_steps and state["step"] % config.save_steps == 0:
            save_checkpoint(os.path.join(directory, "checkpoints"), policy, optimizer, state, config.save_total_limit)
        if told_to_stop:
            break
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if told_to_stop:
        if rank() == 0:
            print(f"stopped after step {state['step']}; to continue, add to the same command\n"
                  f"--run_name {shlex.quote(config.run_name)} --checkpoint_path latest", flush=True)
        raise SystemExit(128 + signal.SIGTERM)


def start_wandb(config: Config, directory: str):
    """A function that logs a row of metrics: to Weights & Biases where WANDB_PROJECT is set, else to nowhere."""
    if rank() > 0 or not os.environ.get("WANDB_PROJECT") or config.model_name_or_path == "embedded":
        return lambda row: None
    import wandb
    run = wandb.init(name=os.path.basename(directory), dir=directory, config=dataclasses.asdict(config))
    return lambda row: run.log(row, step=row["step"])


def make_directory(config: Config) -> str:
    """Make the run directory. One that holds a run is refused; without run_name a free name is found."""
    name = config.run_name or f"{config.dataset_name}-{config.objective}-{time.strftime('%Y%m%d-%H%M%S')}"
    if os.path.basename(name) != name:
        raise UserError(f"run_name {name}: is a path; use output_dir for where, run_name for the name")
    directory, number = os.path.join(config.output_dir, name), 1
    while config.run_name is None and os.path.exists(directory):
        directory, number = os.path.join(config.output_dir, f"{name}-{number}"), number + 1
    path, own = config.checkpoint_path or "", os.path.join(os.path.abspath(directory), "")
    continued = path == "latest" or os.path.abspath(path).startswith(own)
    if os.path.exists(os.path.join(directory, "config.yaml")) and not continued:
        raise UserError(f"{directory}: holds a run already; give another run_name, delete it, or continue it with "
                        "--checkpoint_path latest")
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir {config.output_dir}: cannot be written ({error.strerror})") from None
    return directory


def lock(directory: str):
    """Keep other jobs out of a run directory, such as workers that outlived their torchrun; returns the file whose end
    unlocks it."""
    file = open(os.path.join(directory, "metrics.jsonl"), "a", encoding="utf-8")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{directory}: another process writes to it; stop it, or give another run_name") from None
    except (ImportError, OSError):  # Windows; a file system without locks
        pass
    return file


def make_embedded_base(run: str, device) -> None:
    """Train the base model of the embedded default by the project's own SFT, in the run directory `run`; whole, or not
    at all, also where several processes make it at once."""
    config = load_config(["--config", "cups_base.yaml"])
    config.per_device_train_batch_size = max(1, config.per_device_train_batch_size // world_size())

    def start():
        print(f"making the base model {run}/final (once)", flush=True)
        where = os.path.dirname(run) or "."
        os.makedirs(where, exist_ok=True)
        partial = os.path.join(tempfile.mkdtemp(prefix=".making-", dir=where), os.path.basename(run))
        os.mkdir(partial)  # under its own name, which its curves bear
        return partial

    def finish():
        if not os.path.isdir(os.path.join(run, "final")):  # else another process was faster
            shutil.rmtree(run, ignore_errors=True)
            os.rename(partial, run)

    partial = on_rank_0(start)
    torch.manual_seed(config.seed)
    model, tokenizer = embedded_model()
    try:
        train(config, partial, model.to(device), tokenizer, *load_examples(config, model, tokenizer), device)
        on_rank_0(finish)
    finally:  # also on Ctrl-C
        shutil.rmtree(os.path.dirname(partial), ignore_errors=True)


def plan(config: Config, model: nn.Module, ranks: int, context: int = 256) -> dict[str, int]:
    """Bytes on a rank, by what holds them, for a model on the meta device; x⊕y are taken to be `context` tokens long.

    Exact for what is held all the time and the cache; what comes and goes in a pass with gradient is an estimate.
    """
    on_gpu = config.gpu_memory is not None or torch.cuda.is_available()
    width = resolve_dtype(config.dtype, torch.device("cuda" if on_gpu else "cpu")).itemsize
    parameters, shards, c = list(model.parameters()), config.shard_size or ranks, model.config.get_text_config()
    whole = sum(p.numel() for p in parameters)
    part = sum(-(-p.shape[0] // shards) * (p.numel() // p.shape[0]) for p in parameters)  # FSDP2 cuts dimension 0
    latro, length = config.objective == "latro", context + config.response_length
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    kv_heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    rows = max(config.per_device_eval_batch_size, min(config.sequences, config.rollout_batch_size) if latro else 0)
    slots = length + 32 + 2 * (16 if on_gpu else 1)  # as generate takes them
    tokens = config.per_device_train_batch_size * length
    layer = tokens * width * (10 * c.hidden_size + 4 * getattr(c, "intermediate_size", 4 * c.hidden_size))
    kept = tokens * width * c.hidden_size * c.num_hidden_layers + layer
    root = sum(m.weight.numel() for m in {model.get_input_embeddings(), model.get_output_embeddings()})
    frozen = width * root * config.needs_reference  # the reference's root is never sharded again
    gathered = (width + 4) * (root + 2 * (whole - root) // c.num_hidden_layers) + frozen if ranks > 1 else 0
    return {"weights, float32": 4 * part, "gradients": 4 * part, "optimizer, two moments": 8 * part,
            "sampling copy": 0 if ranks == 1 and width == 4 else width * whole,
            "reference": width * part * config.needs_reference,
            "KV cache": 2 * width * rows * slots * c.num_hidden_layers * kv_heads * head_dim,
            "activations and gathered layers (estimate)": (kept if config.gradient_checkpointing else
                                                           layer * c.num_hidden_layers)
            + 3 * 1024 * c.vocab_size * 4 + gathered}


def check_shards(config: Config, ranks: int) -> None:
    if ranks % (config.shard_size or 1):
        raise UserError(f"shard_size: {config.shard_size} does not divide the {ranks} ranks")


def dry_run(config: Config) -> None:
    """Print what a run would need and do, from the model's config alone; UserError where gpu_memory is too little."""
    path, ranks = config.model_name_or_path, config.dry_run
    check_shards(config, ranks)
    with torch.device("meta"):
        model = embedded_model()[0] if path.endswith("cups-base/final") else load_meta(path, config.trust_remote_code)
    needs = plan(config, model, ranks)
    print(f"{path}: {sum(p.numel() for p in model.parameters()):,} parameters, {ranks} ranks; "
          "question and answer taken to be 256 tokens\n\nGiB on a rank")
    for name, size in (needs | {"together": sum(needs.values())}).items():
        print(f"  {name:<44}{size / 2**30:10.3f}")
    prompts, sequences = config.prompts * ranks, config.sequences * ranks
    sampled = f"{sequences} rollouts, up to {sequences * config.response_length:,} sampled tokens"
    print(f"\nper step: {prompts} prompts" + (f", {sampled}" if config.objective == "latro" else ""))
    try:
        count = len(load_rows(config.dataset_name, "train", config.dataset_path))
        print(f"{count:,} training prompts: {count / prompts:.1f} steps per epoch, "
              f"{config.total_steps(count, ranks)} steps in all")
    except UserError as error:
        print(f"steps: unknown, since {error}")
    if config.gpu_memory and sum(needs.values()) > config.gpu_memory * 2**30:
        raise UserError(
            f"gpu_memory: {sum(needs.values()) / 2**30:.1f} GiB are needed and {config.gpu_memory} given, most by "
            f"{max(needs, key=needs.get)}; lower rollout_batch_size and per_device_eval_batch_size (KV cache), "
            "per_device_train_batch_size or set gradient_checkpointing (activations), kl_coef to 0 (reference), or "
            "take more ranks or a smaller model")


def load_meta(path: str, trust_remote_code: bool) -> nn.Module:
    """The model of a config on the current device, without its weights."""
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # no network, no config, no access
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"model {path}: no config ({reason}); give a Hugging Face folder or hub id") from None


def main(argv: list[str]) -> None:
    config = load_config(argv)
    if config.dry_run:
        return dry_run(config)
    device = init_distributed()
    base = os.path.normpath(config.model_name_or_path)
    if base.endswith(os.path.join("cups-base", "final")) and not on_rank_0(lambda: os.path.exists(base)):
        make_embedded_base(os.path.dirname(base), device)
    model, tokenizer = load_model(config.model_name_or_path, "auto", device, config.attn_implementation,
                                  config.trust_remote_code)
    examples, grader = load_examples(config, model, tokenizer)
    check_head(model, examples["train"][0].prompt)
    check_shards(config, world_size())
    if os.environ.get("WANDB_PROJECT") and importlib.util.find_spec("wandb") is None:
        raise UserError("WANDB_PROJECT is set, but wandb is missing: pip install wandb, or unset it")
    if config.checkpoint_path != "latest":
        find_checkpoint(config, "")  # before anything is written
    directory, held = on_rank_0(lambda: make_directory(config)), []
    on_rank_0(lambda: held.append(lock(directory)))  # until this function ends
    config.run_name = os.path.basename(directory)
    if config.checkpoint_path != "latest" or not os.path.exists(os.path.join(directory, "final")):
        train(config, directory, model, tokenizer, examples, grader, device)
    elif os.path.exists(os.path.join(directory, "evaluation-best.json")):
        if rank() == 0:
            print(f"{directory}: finished already; to train on, name one of its checkpoints with --checkpoint_path")
        return
    del model
    gc.collect()  # FSDP's modules hold each other
    limit = ["--limit", "4"] if config.sanity_check else []
    evaluate_main(["--split", closing_split(config.dataset_path), "--grader", grader, *limit], directory)
    if rank() == 0:
        print(f"the run: {directory}/ (curves.png, metrics.jsonl, samples.jsonl, best/, final/)")


if __name__ == "__main__":
    run_script(main)
