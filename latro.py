"""LaTRO (Latent Reasoning Optimization, arXiv 2411.04282) in plain PyTorch.

    python latro.py                                               the embedded default, offline, on a laptop
    torchrun --nproc_per_node 8 latro.py --config gsm8k.yaml      the paper's run on 8 GPUs
    python latro.py --model_name_or_path M --dataset_name jsonl --dataset_path my.jsonl     your own rows
    python latro.py --config FILE.yaml --key value                defaults < YAML < command line; --help lists the keys

A model π samples K rationales z for a question x with gold answer y and is its own reward model:
r_k = log π(y|x⊕z_k) − β·[log π(z_k|x) − log π_0(z_k|x)]. With the leave-one-out advantage A_k the
gradient (the paper's Eq. 4) is the mean over rollouts of

    A_k · ∇ log π(z_k|x)  +  ∇ log π(y|x⊕z_k)

Differences from the paper: an epoch is every prompt once (the released code counts rollouts), and the
penalty of an unfinished rationale is taken from its own reward. From the released code: both terms are
trained, stopping is an action with a probability, and z is scored as the ids that were sampled, at the
temperature that it was sampled at.
"""
import copy
import dataclasses
import functools
import gc
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
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
import yaml
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import (EMBEDDED, Example, UserError, answer_ids, check_gold, choose_grader, decoder,
                  embedded_model, load_rows, make_examples, read_jsonl)
from evaluate import (Common, Rollout, Scorer, Settings, closing_split, context_left, cut_rollout,
                      evaluate, first_line, gather, generate, init_distributed, judge, load_model,
                      on_rank_0, parse, rank, read_yaml, resolve_dtype, run_script, score, settle,
                      stop_token_ids, stopper, uniform_rows, world_size)


# ---------------------------------------------------------------------------
# The objective: plain functions of tensors, made to be copied
# ---------------------------------------------------------------------------
def answer_reward(logprob: torch.Tensor, length: torch.Tensor,
                  kind: str = "logprob") -> torch.Tensor:
    """φ of log π(y|x⊕z), the natural log summed over y's `length` tokens:
    itself (Eq. 3), per token, or the probability (VeriFree, arXiv 2505.21493).
    Differentiable; all shapes (B,)."""
    if kind == "mean_logprob":
        return logprob / length
    return logprob.exp() if kind == "prob" else logprob


def rollout_rewards(phi: torch.Tensor, kl: torch.Tensor,
                    finished: torch.Tensor, kl_coef: float,
                    gamma: float) -> torch.Tensor:
    """r_k = φ_k − β·[log π(z_k|x) − log π_0(z_k|x)]; all (B,), finished bool.

    An unfinished rationale's φ is lowered by (γ−1)·|φ| first: its own φ alone,
    so that neither its baseline nor another prompt's reward moves."""
    lowered = phi - (gamma - 1) * phi.abs()
    return torch.where(finished, phi, lowered) - kl_coef * kl


def rloo_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """A_k = r_k − mean of the other K−1 rewards of the same prompt; rewards
    and result (B, K), K ≥ 2."""
    k = rewards.shape[1]
    others = rewards.sum(1, keepdim=True) - rewards
    return rewards - others / (k - 1)


def latro_loss(rationale_logprobs: torch.Tensor, answer_rewards: torch.Tensor,
               advantages: torch.Tensor, sft_penalty: float,
               rollouts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two terms whose sum's gradient is minus Eq. 4: REINFORCE on z, and
    the gradient of the reward itself.

    All (B,), a part of the step's `rollouts`: losses of parts add up. No
    gradient flows through `advantages`."""
    policy_loss = -(advantages.detach() * rationale_logprobs).sum() / rollouts
    return policy_loss, -sft_penalty * answer_rewards.sum() / rollouts


# ---------------------------------------------------------------------------
# One update
# ---------------------------------------------------------------------------
def sample_rollouts(model, tokenizer, examples: list[Example], config,
                    keys: list[str]) -> list[Rollout]:
    """rloo_k rollouts per example, neighbours."""
    k, length = config.rloo_k, config.response_length
    decode = decoder(tokenizer)
    stop_ids = stop_token_ids(tokenizer, model, config.stop_token)
    noise = uniform_rows([f"{key}/{j}" for key in keys for j in range(k)],
                         length)
    sampled = generate(
        model, [e.prompt for e in examples], length, num_samples=k,
        temperature=config.temperature, uniforms=noise,
        stop=stopper(stop_ids, config.stop_seqs, decode),
        batch_size=config.rollout_batch_size)
    rollouts = []
    for row, (ids, logprobs) in enumerate(sampled):
        rollout = cut_rollout(examples[row // k], ids, stop_ids,
                              config.stop_seqs, decode)
        rollout.sampler_logprob = sum(logprobs[:len(rollout.actions)])
        rollouts.append(rollout)
    return rollouts


def gold_rollouts(tokenizer, examples: list[Example]) -> list[Rollout]:
    """SFT's sequences: z the gold rationale, empty where there is none."""
    decode = decoder(tokenizer)
    return [Rollout(e.prompt, e.rationale, e.rationale,
                    answer_ids(e, e.rationale, decode)) for e in examples]


def weigh(rollouts: list[Rollout], logprobs, ref_logprobs, config):
    """Rewards and advantages (n,) of whole groups, from logprobs (n, 2)."""
    z, y = logprobs.T
    if config.objective == "sft":  # the same loss with advantage 1
        return y, torch.ones_like(y)
    lengths = y.new_tensor([len(r.answer) for r in rollouts])
    finished = torch.tensor([r.finished for r in rollouts], device=y.device)
    gamma = config.penalty_reward_value if config.non_stop_penalty else 1.0
    phi = answer_reward(y, lengths, config.reward)
    rewards = rollout_rewards(phi, z - ref_logprobs, finished, config.kl_coef,
                              gamma)
    advantages = rloo_advantages(rewards.view(-1, config.rloo_k))
    return rewards, advantages.flatten()


def update(policy, reference, sampler, optimizer, tokenizer,
           examples: list[Example], keys: list[str], config, device):
    """One step on this rank's examples: sample → score → advantage → loss →
    step. Returns the rollouts, K of a prompt in a row, their figures (B*K,),
    and this step's row of metrics, means over all ranks."""
    clock = [time.perf_counter()]
    latro = config.objective == "latro"
    temperature = config.temperature if latro else 1.0
    weight, kind = config.sft_penalty, config.reward

    # sample: the plain model's rationales; SFT takes the gold ones
    if latro:
        rollouts = sample_rollouts(sampler, tokenizer, examples, config, keys)
    else:
        rollouts = gold_rollouts(tokenizer, examples)
        weight, kind = 1.0, "logprob"
    n, size = len(rollouts), config.per_device_train_batch_size
    passes = [slice(i, i + size) for i in range(0, n, size)]
    lengths = torch.tensor([len(r.answer) for r in rollouts], device=device)
    clock.append(time.perf_counter())

    # score: log π_0(z|x); where passes hold parts of groups, log π first
    whole = not latro or size % config.rloo_k == 0
    wide = {"dtype": torch.float64, "device": device}
    logprobs = torch.zeros(n, 2, **wide)  # of z and y
    ref_logprobs, rewards, advantages = torch.zeros(3, n, **wide)
    with torch.no_grad():
        for part in passes if reference else []:
            scores = score(reference, rollouts[part], temperature, False)
            ref_logprobs[part] = scores[:, 0]
        for part in passes if not whole else []:
            logprobs[part] = score(policy, rollouts[part], temperature)
    if not whole:
        rewards, advantages = weigh(rollouts, logprobs, ref_logprobs, config)
    clock.append(time.perf_counter())

    # loss: gradients of its parts add up; FSDP averages over the ranks
    losses = torch.zeros(2, **wide)
    for part in passes:
        scores = score(policy, rollouts[part], temperature)  # (size, 2)
        logprobs[part] = scores.detach()
        if whole:
            rewards[part], advantages[part] = weigh(
                rollouts[part], logprobs[part], ref_logprobs[part], config)
        phi = answer_reward(scores[:, 1], lengths[part], kind)
        terms = latro_loss(scores[:, 0], phi, advantages[part], weight, n)
        loss = sum(terms)
        if isinstance(policy, FSDPModule):  # HSDP: once per update
            policy.set_requires_all_reduce(part.stop >= n)
        loss.backward()
        losses += torch.stack(terms).detach()

    # step: skipped on all ranks where one has a figure that is not finite
    limit = config.max_grad_norm or math.inf
    norm = full(clip_grad_norm_(policy.parameters(), limit))
    finite = torch.stack([losses.sum(), rewards.sum(), norm]).isfinite().all()
    finite = finite.float()
    dist.all_reduce(finite, dist.ReduceOp.MIN)
    if finite:
        optimizer.step()
        refresh(sampler, policy)
    optimizer.zero_grad()
    numbers = [*losses.tolist(), norm.item(), 1 - finite.item()]
    clock.append(time.perf_counter())
    figures = collect(rollouts, rewards, advantages, logprobs, ref_logprobs)
    if not reference:
        figures["kl"] *= math.nan  # not 0: not measured
    return rollouts, figures, measure(rollouts, figures, numbers, clock, policy, reference, device)


LOGGED = ("reward", "answer_logprob", "kl", "sampling_gap", "finished", "stop_in_answer",
          "rationale_length")


def collect(rollouts, rewards, advantages, logprobs, ref_logprobs) -> dict[str, torch.Tensor]:
    """Figures of each rollout, (n,) float64 on the CPU."""
    z, y = logprobs.double().cpu().T
    figures = {"reward": rewards, "advantage": advantages, "answer_logprob": y,
               "rationale_logprob": z, "ref_rationale_logprob": ref_logprobs}
    figures = {name: x.double().cpu() for name, x in figures.items()}
    figures["kl"] = z - figures["ref_rationale_logprob"]
    figures["rationale_length"] = z.new_tensor([len(r.rationale) for r in rollouts])
    for name in ("finished", "stop_in_answer", "sampler_logprob"):
        figures[name] = z.new_tensor([getattr(r, name) for r in rollouts])
    figures["sampling_gap"] = (z - figures.pop("sampler_logprob")).abs()
    return figures


def measure(rollouts, figures, numbers, clock, policy, reference, device) -> dict[str, float]:
    """A step's row of metrics. Every rank has as many rollouts: means of means are exact."""
    means = {name: figures[name].mean().item() for name in LOGGED}
    means |= zip(("policy_loss", "sft_loss", "grad_norm", "skipped"), numbers)
    means |= zip(("generate_s", "score_s", "train_s"), (b - a for a, b in zip(clock, clock[1:])))
    means["tokens"] = sum(len(r.ids) for r in rollouts)
    scorers = [policy, reference] if reference else [policy]
    means["positions"] = sum(scorer.positions for scorer in scorers)
    for scorer in scorers:
        scorer.positions = 0
    total = torch.tensor([*means.values()], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    means = dict(zip(means, (total / world_size()).tolist()))
    tokens, positions = means.pop("tokens"), means.pop("positions")
    seconds = means["generate_s"] + means["score_s"] + means["train_s"]
    return means | {"step_s": seconds, "tokens_per_s": tokens * world_size() / seconds,
                    "work_ratio": positions / (tokens * len(scorers))}


# ---------------------------------------------------------------------------
# The models: what learns, the frozen start, what is sampled from
# ---------------------------------------------------------------------------
def make_mesh(config, device):
    """All ranks in one row, or, with shard_size, copies of the shards over rows of that many ranks
    (HSDP)."""
    ranks, size = world_size(), config.shard_size or world_size()
    if size == ranks:
        return init_device_mesh(device.type, (ranks,))
    return init_device_mesh(device.type, (ranks // size, size), mesh_dim_names=("copy", "shard"))


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    return next(m for m in model.get_decoder().children() if isinstance(m, nn.ModuleList))


def full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded: then every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with its parameters in `dtype`, in place; buffers (rotary tables) keep theirs."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def shard(model: nn.Module, held: torch.dtype, compute: torch.dtype, mesh) -> Scorer:
    """FSDP2: a group per decoder layer, the rest with the root; weights held in `held`, cast as
    they are cut up, so that no rank ever has all of them in it; arithmetic in `compute`, sums of
    gradients in float32. One process in one dtype shards nothing."""
    scorer = Scorer(model)
    if world_size() == 1 and held == compute:
        return cast(scorer, held)
    sums = torch.promote_types(compute, torch.float32)
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(
        compute, sums, cast_forward_inputs=False)}
    for layer in decoder_layers(model):
        fully_shard(cast(layer, held), **options)
    return fully_shard(cast(scorer, held), **options)


def set_out(model: nn.Module, config, device) -> tuple[Scorer, Scorer | None, nn.Module]:
    """(policy, reference, sampler) of a starting model, whole and in its own dtype: what learns, in
    float32; the frozen start, where the objective asks for it; the plain weights, `model` itself,
    that are sampled from. One process in one dtype learns the sampler's own weights."""
    compute, mesh = resolve_dtype(config.dtype, device), make_mesh(config, device)
    held = torch.promote_types(compute, torch.float32)
    learner, reference = model, None
    if world_size() > 1 or held != compute:
        learner = copy.deepcopy(model)
    sampler = cast(model, compute)
    if config.needs_reference:
        frozen = copy.deepcopy(sampler).requires_grad_(False)
        reference = shard(frozen, compute, compute, mesh)
    if config.gradient_checkpointing:  # transformers' own switch needs training mode: dropout
        for layer in decoder_layers(learner):
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    policy = shard(learner, held, compute, mesh)
    refresh(sampler, policy)
    return policy, reference, sampler


@torch.no_grad()
def refresh(sampler: nn.Module, policy: Scorer) -> None:
    """Bring the sampler's weights up to date, in place, where they are not the policy's own."""
    for plain, master in zip(sampler.parameters(), policy.model.parameters(), strict=True):
        if plain is not master:
            plain.copy_(full(master.to(plain.dtype)))  # cast first: less to gather


# ---------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------
@dataclass
class Config(Common):
    # folder or hub id of the starting point (this one is made)
    model_name_or_path: str = EMBEDDED
    # one of cups, gsm8k, arc_challenge, arc_challenge_direct, math, jsonl
    dataset_name: str = "cups"
    # a handful of rows of every split, to see it run
    sanity_check: bool = False
    # latro, or sft: the gold rationale and answer, no sampling
    objective: Literal["latro", "sft"] = "latro"
    # passes over the training prompts, each prompt once per pass
    num_train_epochs: float = 1.0
    # end after so many updates, whatever num_train_epochs says
    max_steps: int | None = None
    # on validation rows, after that of the untrained model; the best model is kept
    num_evaluations: int = 4
    # rollouts in a pass with gradient; a multiple of rloo_k spares a pass without
    per_device_train_batch_size: int = 8
    # passes with gradient per update; prompts per step and rank = both multiplied, by rloo_k
    gradient_accumulation_steps: int = 4
    # rollouts decoded together; as some end, others begin
    rollout_batch_size: int = 64
    # compute activations again in the backward pass, to save memory
    gradient_checkpointing: bool = False
    # K, rationales per prompt
    rloo_k: int = 4
    # of the answer: logprob (the paper), mean_logprob (per token) or prob (VeriFree)
    reward: Literal["logprob", "mean_logprob", "prob"] = "logprob"
    # β, the weight of the KL to the starting point; 0 loads no reference model
    kl_coef: float = 0.05
    # the weight of Eq. 4's second term, the gradient of the reward itself
    sft_penalty: float = 1.0
    # penalise rationales that do not end within response_length
    non_stop_penalty: bool = True
    # γ of that penalty: φ ← φ − (γ−1)·|φ|
    penalty_reward_value: float = 2.0
    # of AdamW, decaying linearly to 0
    learning_rate: float = 5e-7
    # clip the gradient to this norm; 0: off
    max_grad_norm: float = 1.0
    # print memory and steps for so many ranks, and end: nothing is loaded or written
    dry_run: int | None = None
    # GiB of a GPU; a dry run that needs more says what to change
    gpu_memory: float | None = None
    # where run directories are made
    output_dir: str = "runs"
    # name of the run directory; default: unique
    run_name: str | None = None
    # write a checkpoint after every so many updates; none: only when told to stop
    save_steps: int | None = None
    # checkpoints kept, the newest
    save_total_limit: int = 2
    # continue from this checkpoint; latest: the newest whole one of run_name
    checkpoint_path: str | None = None
    # ranks that weights are sharded over (HSDP over the rest); default: all
    shard_size: int | None = None

    may_be_0 = {"num_samples", "seed", "kl_coef", "sft_penalty", "max_grad_norm"}

    def __post_init__(self):
        super().__post_init__()
        if self.penalty_reward_value < 1:
            raise UserError(f"penalty_reward_value: {self.penalty_reward_value} is below 1: a "
                            "bonus, not a penalty")
        if self.checkpoint_path == "latest" and self.run_name is None:
            raise UserError("checkpoint_path: latest needs run_name, the run to continue")
        if self.objective == "latro" and self.rloo_k < 2:
            raise UserError("rloo_k: 1 leaves no other rollout for the leave-one-out baseline")
        if self.objective == "latro" and self.sequences % self.rloo_k:
            raise UserError(f"rloo_k: {self.rloo_k} does not divide per_device_train_batch_size * "
                            f"gradient_accumulation_steps = {self.sequences}; a step takes whole "
                            "groups of rloo_k")

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
        """Updates of a run over `count` prompts, after `step` of them with `consumed` prompts."""
        left = round(self.num_train_epochs * count) - consumed
        steps = step + math.ceil(left / (self.prompts * ranks))
        return max(step, self.max_steps or steps, 1)


def load_config(argv: list[str]) -> Config:
    """The settings of a command line; --config names a YAML file as given, or one in configs/."""
    given = parse(Config, argv, __doc__)
    path = given.pop("config", None)
    if path is None and not {"model_name_or_path", "dataset_name"} & given.keys():
        path = "tiny.yaml"
    shipped = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", path or "")
    if path and not os.path.exists(path) and os.path.exists(shipped):
        path = shipped
    return settle(Config, read_yaml(path) if path else {}, given)


# ---------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------
def export(folder: str, policy: Scorer, sampler, tokenizer, dtype: torch.dtype) -> None:
    """Write the trained weights in `dtype` as a Hugging Face folder; whole, or not at all."""
    weights = {name: tensor.cpu() for name, tensor in sampler.named_buffers()}
    weights = {name: weights[name] for name in sampler.state_dict() if name in weights}
    for name, parameter in policy.model.named_parameters():
        weight = full(parameter.detach())  # collective: every rank takes part
        if rank() == 0:
            weights[name] = weight.to("cpu", dtype, copy=True)

    def write():
        partial, old = folder + ".partial", folder + ".old"
        try:
            sampler.save_pretrained(partial, state_dict=weights)
            sampler.config.dtype = dtype  # save_pretrained wrote the sampler's own
            sampler.config.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        except Exception as error:  # OSError, or the safetensors library's own: a full disk
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"{folder}: cannot be written ({first_line(error)})") from None
        if os.path.exists(folder):
            os.rename(folder, old)
        os.rename(partial, folder)
        shutil.rmtree(old, ignore_errors=True)

    on_rank_0(write)


def save_checkpoint(folder: str, policy: Scorer, optimizer, state: dict, keep: int) -> None:
    """All that continuing needs, as folder/step-N, by torch.distributed.checkpoint; published whole
    by a rename. The sizes of its files, in state.json, tell one that was cut short later."""
    final, partial = os.path.join(folder, f"step-{state['step']}"), os.path.join(folder, "partial")
    on_rank_0(lambda: shutil.rmtree(partial, ignore_errors=True))
    weights, moments = get_state_dict(policy, optimizer)
    try:
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=partial)
    except CheckpointException as error:  # on all ranks alike
        on_rank_0(lambda: shutil.rmtree(partial, ignore_errors=True))
        reason = str(error).strip().split("\n")[-1]
        raise UserError(f"{final}: cannot be written; is the disk full? ({reason})") from None

    def publish():
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(partial)}
        with open(os.path.join(partial, "state.json"), "w", encoding="utf-8") as file:
            json.dump(state | {"sizes": sizes}, file)
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
    """The state beside the tensors of a checkpoint; None where a file is missing or cut short."""
    try:
        with open(os.path.join(path, "state.json"), encoding="utf-8") as file:
            state = json.load(file)
        sizes = {name: os.path.getsize(os.path.join(path, name)) for name in state["sizes"]}
    except (OSError, ValueError, KeyError):
        return None
    return state if sizes == state["sizes"] else None


def find_checkpoint(config, directory: str) -> tuple[str | None, dict]:
    """(path, state) of the checkpoint to continue from; (None, the state of an untrained model) to
    start afresh."""
    if config.checkpoint_path not in (None, "latest"):
        state = read_checkpoint(config.checkpoint_path)
        if state is None:
            raise UserError(f"checkpoint_path {config.checkpoint_path}: no whole checkpoint; give "
                            "a checkpoints/step-N folder or latest")
        return config.checkpoint_path, state
    folder = os.path.join(directory, "checkpoints") if config.checkpoint_path else ""
    for path in checkpoints(folder):
        if state := read_checkpoint(path):
            return path, state
        print(f"warning: {path} is damaged and skipped", file=sys.stderr, flush=True)
    return None, {"step": 0, "consumed": 0, "best": None, "skipped_in_a_row": 0}


def load_checkpoint(path: str, policy: Scorer, optimizer) -> None:
    weights, moments = get_state_dict(policy, optimizer)
    partly = dcp.DefaultLoadPlanner(allow_partial_load=True)  # what has no gradient has no moments
    try:
        dcp.load({"model": weights}, checkpoint_id=path)
        dcp.load({"optimizer": moments}, checkpoint_id=path, planner=partly)
    except (Exception, CheckpointException) as error:  # the latter is none of the former
        reason = str(error).strip().split("\n")[-1]
        raise UserError(f"checkpoint_path {path}: does not fit the model ({reason})") from None
    set_state_dict(policy, optimizer, model_state_dict=weights, optim_state_dict=moments)


def trim(path: str, step: int) -> bool:
    """Drop the rows of a JSONL file that came after the checkpoint of `step`: it is written before
    that evaluation. Returns whether that one was among them."""
    kept, evaluated = 0, False  # bytes
    if not os.path.exists(path):
        return False
    with open(path, "r+b") as file:
        for line in file:
            row = json.loads(line) if line.endswith(b"\n") else {"step": math.inf}  # cut short
            evaluated = "split" in row and row["step"] == step
            if evaluated or row["step"] > step:
                break
            kept += len(line)
        file.truncate(kept)
    return evaluated


def rewind(directory: str, step: int) -> bool:
    """Take a run's files back to the checkpoint of `step`; what came later goes, its end too.
    Returns whether that step had been evaluated."""
    later = [path for path in checkpoints(os.path.join(directory, "checkpoints"))
             if int(path.rpartition("-")[2]) > step]
    for path in [*later, os.path.join(directory, "final")]:
        shutil.rmtree(path, ignore_errors=True)
    trim(os.path.join(directory, "samples.jsonl"), step)
    return trim(os.path.join(directory, "metrics.jsonl"), step)


def write_config(path: str, config: Config) -> None:
    """Every key as used; as comments, what ran it. It can be given back to --config."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout if shutil.which("git") else ""
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"# torch {torch.__version__}, transformers {transformers.__version__}, Python "
                   f"{platform.python_version()}, {world_size()} ranks, commit "
                   f"{commit.strip() or 'unknown'}\n")
        yaml.safe_dump(dataclasses.asdict(config), file, sort_keys=False, allow_unicode=True)


def append(path: str, rows: list[dict]) -> None:
    """Append rows to a JSONL file; a number that is not finite is null, as JSON has it."""
    with open(path if rank() == 0 else os.devnull, "a", encoding="utf-8") as file:
        for row in rows:
            row = {k: None if isinstance(v, float) and not math.isfinite(v) else v
                   for k, v in row.items()}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def sample_rows(step: int, rollouts: list[Rollout], figures: dict, decode) -> list[dict]:
    names = ("answer_logprob", "rationale_logprob", "ref_rationale_logprob", "reward", "advantage")
    return [{"step": step, "query": decode(r.prompt), "rationale": decode(r.rationale),
             "response": decode(r.answer), "ids": r.ids, "z_start": len(r.prompt),
             "y_start": len(r.prompt) + len(r.rationale), "actions": r.actions,
             "finished": r.finished} | {name: figures[name][i].item() for name in names}
            for i, r in enumerate(rollouts)]


def draw_curves(directory: str) -> None:
    """curves.png from metrics.jsonl: reward, accuracy, rationale length and KL against the step."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen
    rows = read_jsonl(os.path.join(directory, "metrics.jsonl"))
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    panels = {"reward": "reward per rollout", "accuracy": "greedy accuracy, validation",
              "rationale_length": "rationale length, tokens",
              "kl": "KL to the starting point, nats"}
    for axis, (name, title) in zip(axes.flat, panels.items()):
        for evaluated, style, label in ((False, "C0-", "rollouts"), (True, "C1o-", "greedy, validation")):
            points = [(row["step"], row[name]) for row in rows
                      if ("split" in row) is evaluated and row.get(name) is not None]
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


# ---------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------
@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}/epoch/{epoch}").shuffle(order)
    return order


def prompt_indices(seed: int, consumed: int, n: int, count: int) -> list[int]:
    """The next n of `count` prompts after `consumed` ones: each prompt once per epoch."""
    return [epoch_order(seed, i // count, count)[i % count] for i in range(consumed, consumed + n)]


def load_examples(config: Config, model, tokenizer) -> tuple[dict[str, list[Example]], str]:
    """The tokenised training and validation rows, and the grader; what is wrong with any row that
    the run will see is wrong here."""
    splits = {"train": "train", "validation": "validation", "closing": closing_split(config.dataset_path)}
    limits = {"train": None, "validation": config.limit, "closing": config.limit}
    if config.sanity_check:
        limits = {"train": 16, "validation": 4, "closing": 4}
    rows = {k: load_rows(config.dataset_name, v, config.dataset_path) for k, v in splits.items()}
    grader = choose_grader(config.grader, config.dataset_name, sum(rows.values(), []))
    context = context_left(model, config.response_length)
    examples = {k: make_examples(tokenizer, v[:limits[k]], context) for k, v in rows.items()}
    if config.objective == "sft" and (room := context_left(model, 0)):
        longest = max(len(e.prompt) + len(e.rationale) + max(map(len, e.answers))
                      for e in examples["train"])
        if longest > room:
            raise UserError(f"a prompt, its rationale and its answer take {longest} tokens, and the "
                            f"model's context has {room}; shorten or drop the longest rationales")
    wrong, first = check_gold(rows["validation"] + rows["closing"], grader)
    if wrong and rank() == 0:
        print(f"warning: the grader {grader} calls {wrong} of the gold responses wrong, such as "
              f"{first['responses']!r} for {first['groundtruth']!r}", file=sys.stderr)
    return examples, grader


def train(config: Config, directory: str, model, tokenizer, examples: dict[str, list[Example]],
          grader: str, device) -> None:
    """Train `model` (whole, on this rank's device, in its own dtype) and fill the run directory."""
    dtype = model.dtype
    policy, reference, sampler = set_out(model, config, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=0.0,
                                  fused=True)
    path, state = on_rank_0(lambda: find_checkpoint(config, directory))
    if path is not None:
        load_checkpoint(path, policy, optimizer)
        refresh(sampler, policy)
    if not on_rank_0(lambda: os.path.exists(os.path.join(directory, "best"))):
        state["best"] = None  # it was another run's
    on_rank_0(lambda: write_config(os.path.join(directory, "config.yaml"), config))
    count, ranks = len(examples["train"]), world_size()
    total = config.total_steps(count, ranks, state["step"], state["consumed"])
    evaluate_at = {round(i * total / config.num_evaluations)
                   for i in range(config.num_evaluations + 1)}
    metrics_path, samples_path = (os.path.join(directory, f"{name}.jsonl")
                                  for name in ("metrics", "samples"))
    if on_rank_0(lambda: rewind(directory, state["step"])):
        evaluate_at.add(state["step"])  # again, though other ranks move the others
    log = start_wandb(config, directory)
    bar = tqdm(total=total, initial=state["step"], desc=config.objective, unit="step",
               disable=rank() > 0)

    def evaluate_now() -> None:
        result = evaluate(sampler, tokenizer, examples["validation"], grader,
                          response_length=config.response_length, stop_token=config.stop_token,
                          stop_seqs=config.stop_seqs, batch_size=config.per_device_eval_batch_size,
                          seed=config.seed, title=f"validation, step {state['step']}")
        names = ("n", "accuracy", "answer_logprob", "rationale_length", "finished")
        figures = {name: result[name] for name in names}
        append(metrics_path, [{"step": state["step"], "split": "validation"} | figures])
        log({"step": state["step"]} | {f"validation/{k}": v for k, v in figures.items()})
        if rank() == 0:
            tqdm.write(f"step {state['step']:>4}: validation accuracy {result['accuracy']:6.1%}, "
                       f"log π(y|x⊕z) {result['answer_logprob']:.3f}, rationale length "
                       f"{result['rationale_length']:.1f}")
            draw_curves(directory)
        if state["step"] > 0 and result["accuracy"] >= (state["best"] or 0):  # of equals the later
            state["best"] = result["accuracy"]
            export(os.path.join(directory, "best"), policy, sampler, tokenizer, dtype)

    signals: list[int] = []  # received
    handlers = {number: signal.signal(number, lambda number, frame: signals.append(number))
                for number in (signal.SIGTERM, signal.SIGINT)}
    told_to_stop = False
    while True:
        if state["step"] in evaluate_at and not told_to_stop:
            evaluate_now()
            told_to_stop = any(gather(signals))
        if told_to_stop or state["step"] >= total:
            break
        done = state["step"] / total
        if config.max_steps is None:
            done = state["consumed"] / count / config.num_train_epochs
        optimizer.param_groups[0]["lr"] = learning_rate = config.learning_rate * (1 - done)
        first = state["consumed"] + rank() * config.prompts
        chosen = prompt_indices(config.seed, first, config.prompts, count)
        keys = [f"{config.seed}/train/{first + i}" for i in range(config.prompts)]
        rollouts, figures, row = update(policy, reference, sampler, optimizer, tokenizer,
                                        [examples["train"][i] for i in chosen], keys, config, device)
        state["step"] += 1
        state["consumed"] += config.prompts * ranks
        row = {"step": state["step"], "epoch": state["consumed"] / count, **row, "lr": learning_rate}
        append(metrics_path, [row])
        whole = state["step"] in (1, total)  # else a prompt's rollouts
        logged = rollouts if whole else rollouts[:config.rloo_k]
        logged = sample_rows(state["step"], logged, figures, decoder(tokenizer))
        append(samples_path, gather(logged) if whole else logged)
        log(row)
        state["skipped_in_a_row"] = state["skipped_in_a_row"] + 1 if row["skipped"] else 0
        if state["skipped_in_a_row"] == 10:
            raise FloatingPointError(f"step {row['step']}: ten updates in a row had a reward, loss or "
                                     "gradient that is not finite; lower learning_rate; the best "
                                     f"model so far is in {directory}/best")
        kl = f"kl {row['kl']:.2f}, " if reference else ""
        bar.set_postfix_str(f"reward {row['reward']:.3f}, {kl}length {row['rationale_length']:.1f}",
                            refresh=False)
        bar.update()
        told_to_stop = any(gather(signals))  # on any rank
        if told_to_stop or config.save_steps and state["step"] % config.save_steps == 0:
            save_checkpoint(os.path.join(directory, "checkpoints"), policy, optimizer, state,
                            config.save_total_limit)
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if told_to_stop:
        if rank() == 0:
            print(f"stopped after step {state['step']}; to continue, add to the same command\n"
                  f"--run_name {shlex.quote(config.run_name)} --checkpoint_path latest", flush=True)
        raise SystemExit(128 + signal.SIGTERM)
    export(os.path.join(directory, "final"), policy, sampler, tokenizer, dtype)


def start_wandb(config: Config, directory: str):
    """A function that logs a row of metrics: to Weights & Biases where WANDB_PROJECT is set, else to
    nowhere."""
    if rank() > 0 or not os.environ.get("WANDB_PROJECT"):
        return lambda row: None
    import wandb
    run = wandb.init(name=os.path.basename(directory), dir=directory, config=dataclasses.asdict(config))
    return lambda row: run.log(row, step=row["step"])


def make_directory(config: Config) -> str:
    """Make the run directory. One that holds a run is refused; without run_name a free name is
    found."""
    name = config.run_name or f"{config.dataset_name}-{config.objective}-{time.strftime('%Y%m%d-%H%M%S')}"
    if os.path.basename(name) != name:
        raise UserError(f"run_name {name}: is a path; use output_dir for where, run_name for the name")
    directory, number = os.path.join(config.output_dir, name), 1
    while config.run_name is None and os.path.exists(directory):
        directory, number = os.path.join(config.output_dir, f"{name}-{number}"), number + 1
    path, own = config.checkpoint_path or "", os.path.join(os.path.abspath(directory), "")
    continued = path == "latest" or os.path.abspath(path).startswith(own)
    if os.path.exists(os.path.join(directory, "config.yaml")) and not continued:
        raise UserError(f"{directory}: holds a run already; give another run_name, delete it, or "
                        "continue it with --checkpoint_path latest")
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir {config.output_dir}: cannot be written ({error.strerror})") from None
    return directory


def lock(directory: str):
    """Keep other jobs out of a run directory, such as workers that outlived their torchrun; returns
    the file whose end unlocks it."""
    file = open(os.path.join(directory, "metrics.jsonl"), "a", encoding="utf-8")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{directory}: another process writes to it; stop it, or give another "
                        "run_name") from None
    except (ImportError, OSError):  # Windows; a file system without locks
        pass
    return file


def run(config: Config, device) -> None:
    """Train as `config` says, then show the base beside the best model."""
    if os.environ.get("WANDB_PROJECT") and importlib.util.find_spec("wandb") is None:
        raise UserError("WANDB_PROJECT is set, but wandb is missing: pip install wandb, or unset it")
    check_shards(config, world_size())
    torch.manual_seed(config.seed)  # of the embedded base's first weights
    model, tokenizer = load_model(config.model_name_or_path, "auto", device,
                                  config.attn_implementation, config.trust_remote_code)
    examples, grader = load_examples(config, model, tokenizer)
    if config.checkpoint_path != "latest":
        on_rank_0(lambda: find_checkpoint(config, ""))  # before anything is written
    directory, held = on_rank_0(lambda: make_directory(config)), []
    on_rank_0(lambda: held.append(lock(directory)))  # until this function ends
    config.run_name = os.path.basename(directory)
    closing = os.path.join(directory, "evaluation-best.json")
    if config.checkpoint_path != "latest" or not os.path.exists(os.path.join(directory, "final")):
        train(config, directory, model, tokenizer, examples, grader, device)
    elif os.path.exists(closing):
        if rank() == 0:
            print(f"{directory}: finished already; to train on, name one of its checkpoints with "
                  "--checkpoint_path")
        return
    if config.model_name_or_path == "embedded":
        return
    del model
    gc.collect()  # FSDP's modules hold each other
    names = {f.name for f in dataclasses.fields(Common)}
    settings = {k: v for k, v in vars(config).items() if k in names}
    settings |= {"split": closing_split(config.dataset_path), "grader": grader}
    if config.sanity_check:
        settings["limit"] = 4
    judge(Settings(**settings), directory, vars(config) | {"limit": settings["limit"]})
    if rank() == 0:
        print(f"the run: {directory}/ (curves.png, metrics.jsonl, samples.jsonl, best/, final/)")


def main(argv: list[str]) -> None:
    config = load_config(argv)
    if config.dry_run:
        return dry_run(config)
    device, final = init_distributed(), os.path.normpath(config.model_name_or_path)
    if final.endswith("cups-base/final") and not on_rank_0(lambda: os.path.exists(final)):
        if rank() == 0:
            print(f"making the base model {final} (once)", flush=True)
        folder, name = os.path.split(os.path.dirname(final))
        base = load_config(["--config", "cups_base.yaml", "--output_dir", folder, "--run_name", name])
        base.per_device_train_batch_size //= world_size()
        run(base, device)
    run(config, device)


# ---------------------------------------------------------------------------
# Before you pay
# ---------------------------------------------------------------------------
def plan(config: Config, model: nn.Module, ranks: int, context: int = 256) -> dict[str, int]:
    """Bytes on a rank, by what holds them, for a model on the meta device; x⊕y are taken to be
    `context` tokens long.

    Exact for what is held all the time and the cache; what comes and goes in a pass with gradient
    is an estimate."""
    on_gpu = config.gpu_memory is not None or torch.cuda.is_available()
    width = resolve_dtype(config.dtype, torch.device("cuda" if on_gpu else "cpu")).itemsize
    c, shards, k = model.config.get_text_config(), config.shard_size or ranks, config.rloo_k
    whole = sum(p.numel() for p in model.parameters())
    part = sum(-(-p.shape[0] // shards) * (p.numel() // p.shape[0])  # FSDP2 cuts dimension 0
               for p in model.parameters())
    length = context + config.response_length
    rows = config.per_device_eval_batch_size
    if config.objective == "latro":
        rows = max(rows, min(config.sequences, config.rollout_batch_size))
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    size = config.per_device_train_batch_size
    tokens = size * length - (size - -(-size // k)) * context  # each prompt once
    wide = getattr(c, "intermediate_size", None) or 4 * c.hidden_size
    layer = tokens * width * (10 * c.hidden_size + 4 * wide)
    kept = layer * c.num_hidden_layers
    if config.gradient_checkpointing:
        kept = layer + tokens * width * c.hidden_size * c.num_hidden_layers
    root = {model.get_input_embeddings(), model.get_output_embeddings()}
    root = sum(module.weight.numel() for module in root)
    gathered = 0
    if ranks > 1:  # the reference's root is never sharded again
        layers = 2 * (whole - root) // c.num_hidden_layers
        gathered = (width + 4) * (root + layers) + width * root * config.needs_reference
    alone = ranks == 1 and width == 4  # then the policy is sampled from
    return {"weights, float32": 4 * part, "gradients": 4 * part, "optimizer, two moments": 8 * part,
            "sampling copy": 0 if alone else width * whole,
            "reference": width * part * config.needs_reference,
            "KV cache": 2 * width * rows * length * c.num_hidden_layers * heads * head_dim,
            "activations and gathered layers (estimate)":
                kept + 3 * 512 * c.vocab_size * 4 + gathered}


def check_shards(config: Config, ranks: int) -> None:
    if ranks % (config.shard_size or 1):
        raise UserError(f"shard_size: {config.shard_size} does not divide the {ranks} ranks")


def dry_run(config: Config) -> None:
    """Print what a run would need and do, from the model's config alone; UserError where gpu_memory
    is too little."""
    path, ranks = config.model_name_or_path, config.dry_run
    check_shards(config, ranks)
    try:
        with torch.device("meta"):
            if path.endswith("cups-base/final"):
                model, _ = embedded_model()
            else:
                shape = transformers.AutoConfig.from_pretrained(
                    path, trust_remote_code=config.trust_remote_code)
                model = transformers.AutoModelForCausalLM.from_config(
                    shape, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # no network, no config, no access
        raise UserError(f"model {path}: no config ({first_line(error)}); give a Hugging Face folder "
                        "or hub id") from None
    needs = plan(config, model, ranks)
    together = sum(needs.values()) / 2**30
    print(f"{path}: {sum(p.numel() for p in model.parameters()):,} parameters, {ranks} ranks; "
          "question and answer taken to be 256 tokens\n\nGiB on a rank")
    for name, size in needs.items():
        print(f"  {name:<44}{size / 2**30:10.3f}")
    print(f"  {'together':<44}{together:10.3f}")
    prompts, sequences = config.prompts * ranks, config.sequences * ranks
    print(f"\nper step: {prompts} prompts", end="\n" if config.objective == "sft" else "")
    if config.objective == "latro":
        print(f", {sequences} rollouts, up to {sequences * config.response_length:,} sampled tokens")
    try:
        count = len(load_rows(config.dataset_name, "train", config.dataset_path))
        print(f"{count:,} training prompts: {count / prompts:.1f} steps per epoch, "
              f"{config.total_steps(count, ranks)} steps in all")
    except UserError as error:
        print(f"steps: unknown, since {error}")
    if config.gpu_memory and together > config.gpu_memory:
        raise UserError(
            f"gpu_memory: {together:.1f} GiB are needed and {config.gpu_memory} given, most by "
            f"{max(needs, key=needs.get)}; lower rollout_batch_size and per_device_eval_batch_size "
            "(KV cache), per_device_train_batch_size or set gradient_checkpointing (activations), "
            "kl_coef to 0 (reference), or take more ranks or a smaller model")


if __name__ == "__main__":
    run_script(main)
