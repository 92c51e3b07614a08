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
import fcntl
import functools
import gc
import importlib.util
import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os.path import basename, dirname, exists, getsize, samefile
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
import yaml
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import (EMBEDDED, Example, UserError, answer_ids, choose_grader, decoder, embedded_model,
                  first_line, load_rows, make_examples, read_jsonl, require)
from evaluate import main as evaluate_main
from evaluate import (LABELS, Common, Rollout, Scorer, check_rows, closing_split, cut_rollout,
                      evaluate, gather, generate, init_distributed, is_run, limits, load_model, on_rank_0,
                      parse, rank, read_yaml, resolve_dtype, run_script, say, score, settle,
                      stop_token_ids, stopper, uniform_rows, world_size)

HERE = dirname(os.path.abspath(__file__))
# the embedded base is made in whatever output_dir it is asked for
EMBEDDED_NAME = EMBEDDED.partition("/")[2]


# ---------------------------------------------------------------------------
# The objective: plain functions of tensors, made to be copied
# ---------------------------------------------------------------------------
def answer_reward(logprob: torch.Tensor, length: torch.Tensor, kind: str = "logprob") -> torch.Tensor:
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

    An unfinished rationale's φ is lowered by (γ−1)·|φ| first: by its own φ, not
    by a mean over the batch, which would tie it to its own baseline and to
    other prompts."""
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
def sample_rollouts(model, tokenizer, examples: list[Example], config, keys: list[str]) -> list[Rollout]:
    """rloo_k rollouts per example, neighbours."""
    k, length = config.rloo_k, config.response_length
    decode = decoder(tokenizer)
    stop_ids = stop_token_ids(tokenizer, model, config.stop_token)
    noise = uniform_rows([f"{key}/{j}" for key in keys for j in range(k)], length)
    sampled = generate(
        model, [e.prompt for e in examples], length, num_samples=k,
        temperature=config.temperature, uniforms=noise,
        stop=stopper(stop_ids, config.stop_seqs, decode),
        batch_size=config.rollout_batch_size)
    rollouts = []
    for row, (ids, logprobs) in enumerate(sampled):
        rollout = cut_rollout(examples[row // k], ids, stop_ids, config.stop_seqs, decode)
        rollout.sampler_logprob = sum(logprobs[:len(rollout.actions)])
        rollouts.append(rollout)
    return rollouts


def gold_rollouts(tokenizer, examples: list[Example]) -> list[Rollout]:
    """SFT's sequences: z the gold rationale, empty where there is none."""
    decode = decoder(tokenizer)
    return [Rollout(e.prompt, e.rationale, e.rationale,
                    answer_ids(e, e.rationale, decode)) for e in examples]


def weigh(rollouts: list[Rollout], logprobs, ref_logprobs, config):
    """Rewards and advantages (n,) of whole groups, from logprobs (n, 2); SFT is
    the same loss with advantage 1."""
    z, y = logprobs.T
    if config.objective == "sft":
        return y, torch.ones_like(y)
    lengths = y.new_tensor([len(r.answer) for r in rollouts])
    finished = torch.tensor([r.finished for r in rollouts], device=y.device)
    gamma = config.penalty_reward_value if config.non_stop_penalty else 1.0
    phi = answer_reward(y, lengths, config.reward)
    rewards = rollout_rewards(phi, z - ref_logprobs, finished, config.kl_coef, gamma)
    advantages = rloo_advantages(rewards.view(-1, config.rloo_k))
    return rewards, advantages.flatten()


def update(policy, reference, sampler, optimizer, tokenizer,
           examples: list[Example], keys: list[str], config, device):
    """One step on this rank's examples: sample → score → advantage → loss →
    step. Returns the rollouts, K of a prompt in a row, their figures (B*K,),
    and this step's row of metrics, means over all ranks."""
    clock = [now(device)]
    latro = config.objective == "latro"
    temperature = config.temperature if latro else 1.0

    # sample: the plain model's rationales; SFT takes the gold ones
    if latro:
        rollouts = sample_rollouts(sampler, tokenizer, examples, config, keys)
    else:
        rollouts = gold_rollouts(tokenizer, examples)
    # one process passes through the sampler's weights, in its dtype
    learner = policy if isinstance(policy, FSDPModule) else Scorer(sampler)
    n, size = len(rollouts), config.per_device_train_batch_size
    passes = [slice(i, i + size) for i in range(0, n, size)]
    lengths = torch.tensor([len(r.answer) for r in rollouts], device=device)
    clock.append(now(device))

    # score: log π_0(z|x); where passes hold parts of groups, log π first
    whole = size % config.rloo_k == 0
    wide = {"dtype": torch.float64, "device": device}
    logprobs = torch.zeros(n, 2, **wide)
    ref_logprobs, rewards, advantages = torch.zeros(3, n, **wide)
    with torch.no_grad():
        if reference:
            for part in passes:
                scores = score(reference, rollouts[part], temperature, False)
                ref_logprobs[part] = scores[:, 0]
        if not whole:
            for part in passes:
                logprobs[part] = score(learner, rollouts[part], temperature)
            rewards, advantages = weigh(rollouts, logprobs, ref_logprobs, config)
    clock.append(now(device))

    # loss: gradients of its parts add up; FSDP averages over the ranks
    losses = torch.zeros(2, **wide)
    for part in passes:
        scores = score(learner, rollouts[part], temperature)  # (size, 2)
        logprobs[part] = scores.detach()
        if whole:
            rewards[part], advantages[part] = weigh(
                rollouts[part], logprobs[part], ref_logprobs[part], config)
        phi = answer_reward(scores[:, 1], lengths[part], config.reward)
        terms = latro_loss(scores[:, 0], phi, advantages[part], config.sft_penalty, n)
        loss = sum(terms)
        # of HSDP's copies, after the last pass alone
        if isinstance(policy, FSDPModule):
            policy.set_requires_all_reduce(part.stop >= n)
        loss.backward()
        collect_gradients(learner, policy)
        losses += torch.stack(terms).detach()

    # step: skipped on all ranks where one has a figure that is not finite
    limit = config.max_grad_norm or math.inf
    norm = full(clip_grad_norm_(policy.parameters(), limit))
    finite = torch.stack([losses.sum(), rewards.sum(), norm]).isfinite().all().float()
    dist.all_reduce(finite, dist.ReduceOp.MIN)
    if finite:
        optimizer.step()
        refresh(sampler, policy)
    optimizer.zero_grad()
    numbers = torch.stack([*losses, norm, 1 - finite]).tolist()
    clock.append(now(device))
    # what is not measured is null in the logs
    if not reference:
        ref_logprobs *= math.nan
    figures = describe_rollouts(rollouts, logprobs, ref_logprobs)
    figures |= {"reward": rewards, "advantage": advantages}
    scorers = [learner, reference] if reference else [learner]
    row = reduce_metrics(figures, numbers, clock, rollouts, scorers, device)
    return rollouts, figures, row


def now(device) -> float:
    """Seconds, when the device has done what it was told: the host is ahead of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def describe_rollouts(rollouts, logprobs, ref_logprobs) -> dict[str, torch.Tensor]:
    """Figures of each rollout, (n,)."""
    z, y = logprobs.T
    sampled, finished, fits, length = z.new_tensor([
        (r.sampler_logprob, r.finished, r.stop_in_answer, len(r.rationale))
        for r in rollouts]).T
    return {"answer_logprob": y, "rationale_logprob": z,
            "ref_rationale_logprob": ref_logprobs, "kl": z - ref_logprobs,
            "sampling_gap": (z - sampled).abs(), "finished": finished,
            "stop_in_answer": fits, "rationale_length": length}


def reduce_metrics(figures, numbers, clock, rollouts, scorers, device) -> dict[str, float]:
    """A step's row of metrics, means over the ranks: all have as many
    rollouts, so means of means are exact."""
    logged = ("reward", "answer_logprob", "kl", "sampling_gap", "finished",
              "stop_in_answer", "rationale_length")
    columns = torch.stack([figures[name] for name in logged])
    row = dict(zip(logged, columns.mean(1).tolist()))
    row |= zip(("policy_loss", "sft_loss", "grad_norm", "skipped"), numbers)
    times = [end - begin for begin, end in zip(clock, clock[1:])]
    row |= zip(("generate_s", "score_s", "train_s"), times)
    row["step_s"] = sum(times)
    row["tokens"] = sum(len(r.ids) for r in rollouts)
    row["positions"] = sum(scorer.positions for scorer in scorers)
    for scorer in scorers:
        scorer.positions = 0
    means = torch.tensor([*row.values()], dtype=torch.float64, device=device)
    dist.all_reduce(means)
    row = dict(zip(row, (means / world_size()).tolist()))
    tokens = row.pop("tokens")
    row["tokens_per_s"] = tokens * world_size() / row["step_s"]
    row["work_ratio"] = row.pop("positions") / (tokens * len(scorers))
    return row


# ---------------------------------------------------------------------------
# The models: what learns, the frozen start, what is sampled from
# ---------------------------------------------------------------------------
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
    gradients in float32 at least. Without a mesh nothing is sharded."""
    scorer = Scorer(model)
    if mesh is None:
        return cast(scorer, held)
    sums = torch.promote_types(compute, torch.float32)
    policy = MixedPrecisionPolicy(compute, sums, cast_forward_inputs=False)
    for part in [*decoder_layers(model), scorer]:
        fully_shard(cast(part, held), mesh=mesh, mp_policy=policy)
    return scorer


def set_out(model: nn.Module, config, device) -> tuple[Scorer, Scorer | None, nn.Module]:
    """(policy, reference, sampler) of a starting model, whole and in its own dtype: what learns, in
    float32; the frozen start, where the objective asks for it; the plain weights, `model` itself,
    that are sampled from. One process in one dtype learns the sampler's own weights; in two, what
    passes through the sampler's weights is collected in the policy's."""
    ranks, size = world_size(), config.shard_size or world_size()
    # all ranks in one row, or copies of the shards over rows of shard_size ranks (HSDP)
    shape = (ranks,) if size == ranks else (ranks // size, size)
    names = ("copy", "shard")[-len(shape):]
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names) if ranks > 1 else None
    compute = resolve_dtype(config.dtype, device)
    held = torch.promote_types(compute, torch.float32)
    shared = ranks == 1 and held == compute
    learner, reference = model if shared else copy.deepcopy(model), None
    # cut up before the next copy is made: two whole ones at a time
    policy = shard(learner, held, compute, mesh)
    sampler = cast(model, compute)
    if config.kl_coef:
        frozen = copy.deepcopy(sampler).requires_grad_(False)
        reference = shard(frozen, compute, compute, mesh)
    # not transformers' own switch, which works in training mode only, with dropout
    passed = learner if ranks > 1 else sampler
    for layer in decoder_layers(passed) if config.gradient_checkpointing else []:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False,
                                          preserve_rng_state=False)
    refresh(sampler, policy)
    return policy, reference, sampler


def collect_gradients(learner: Scorer, policy: Scorer) -> None:
    """Add up a pass's gradients in the policy's dtype, where the learner's weights are not its own."""
    for passed, master in zip(learner.parameters(), policy.parameters(), strict=True):
        if passed is not master and passed.grad is not None:
            if master.grad is None:
                master.grad = passed.grad.to(master.dtype)
            else:
                master.grad += passed.grad
            passed.grad = None


@torch.no_grad()
def refresh(sampler: nn.Module, policy: Scorer) -> None:
    """Bring the sampler's weights up to date, in place, where they are not the policy's own."""
    for plain, master in zip(sampler.parameters(), policy.model.parameters(), strict=True):
        if plain is not master:
            # cast before it is gathered: half the bytes
            plain.copy_(full(master.to(plain.dtype)))


# ---------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------
@dataclass
class Config(Common):
    # folder or hub id of the starting point (this one is made)
    model_name_or_path: str = EMBEDDED
    # one of cups, words, gsm8k, arc_challenge, arc_challenge_direct, math, jsonl, reasoning_gym:TASK
    dataset_name: str = "cups"
    # a handful of rows of every split, to see it run
    sanity_check: bool = False
    # latro, or sft: the gold rationale and answer, no sampling
    objective: Literal["latro", "sft"] = "latro"
    # passes over the training prompts, each prompt once per pass
    num_train_epochs: float = 1.0
    # end after so many updates, whatever num_train_epochs says
    max_steps: int | None = None
    # on validation rows, after that of the untrained model; 0: at the end; the best model is kept
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

    may_be_0 = {"num_evaluations", "num_samples", "seed", "kl_coef", "sft_penalty", "max_grad_norm"}

    def __post_init__(self):
        super().__post_init__()
        self.limit = 4 if self.sanity_check else self.limit
        # the same code path: no groups, no reference, the log-likelihood
        if self.objective == "sft":
            self.rloo_k, self.kl_coef = 1, 0.0
            self.reward, self.sft_penalty = "logprob", 1.0
        k, sequences, name = self.rloo_k, self.sequences, self.run_name
        require(self.penalty_reward_value >= 1, "penalty_reward_value: below 1 it is a bonus")
        is_name = name not in (".", "..") and "/" not in (name or "")
        require(is_name, f"run_name {name}: is a path; output_dir says where")
        require(name or self.checkpoint_path != "latest", "checkpoint_path: latest needs run_name")
        require(k > 1 or self.objective == "sft",
                "rloo_k: 1 leaves no other rollout for the leave-one-out baseline")
        require(sequences % k == 0, f"rloo_k: {k} does not divide per_device_train_batch_size * "
                                    f"gradient_accumulation_steps = {sequences}")

    @property
    def sequences(self) -> int:
        """Per step and rank."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def prompts(self) -> int:
        """Per step and rank."""
        return self.sequences // self.rloo_k

    def total_steps(self, count: int, per_step: int, step=0, consumed=0) -> int:
        """Updates of a run over `count` prompts, after `step` of them with `consumed` prompts."""
        left = round(self.num_train_epochs * count) - consumed
        return max(step, self.max_steps or step + math.ceil(left / per_step), 1)


def load_config(argv: list[str]) -> Config:
    """The settings of a command line; --config names a YAML file as given, or one in configs/.
    Without it tiny.yaml is read, unless a model or dataset is named."""
    given = parse(Config, argv)
    own = {"model_name_or_path", "dataset_name"} & given.keys()
    path = " ".join(given.pop("config", [] if own else ["tiny.yaml"]))
    path = os.path.expanduser(path)
    if path and not exists(path):
        path = f"{HERE}/configs/{path}"
    return settle(Config, (read_yaml(path) if path else {}) | given)


# ---------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------
LOGS = ("metrics.jsonl", "samples.jsonl")


@contextmanager
def published(folder):
    """A folder to write into, on all ranks, that takes the name `folder` once it is whole."""
    partial = f"{folder}.partial"
    on_rank_0(lambda: shutil.rmtree(partial, ignore_errors=True))
    try:
        yield partial
    except (Exception, dcp.CheckpointException) as error:
        # a full disk: OSError, the safetensors library's own, or DCP's, which is no Exception
        on_rank_0(lambda: shutil.rmtree(partial, ignore_errors=True))
        raise UserError(f"{folder}: cannot be written; disk full? ({last_line(error)})") from None

    def rename():
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)

    on_rank_0(rename)


def last_line(error):
    return str(error).strip().rpartition("\n")[2]


def export(folder, sampler, tokenizer):
    """Write what is sampled from, in its dtype, as a Hugging Face folder."""
    with published(folder) as partial:
        on_rank_0(lambda: [part.save_pretrained(partial) for part in (sampler, tokenizer)])


def save_checkpoint(directory, policy, optimizer, state, keep):
    """All that continuing needs, as checkpoints/step-N of the run directory, by DCP. state.json has
    the sizes of its files, which tell one that is cut short later, and of the run's logs."""
    def finish():
        sizes = {name: getsize(f"{partial}/{name}") for name in os.listdir(partial)}
        logs = {name: getsize(f"{directory}/{name}") for name in LOGS}
        text = json.dumps(vars(state) | {"sizes": sizes, "logs": logs})
        Path(f"{partial}/state.json").write_text(text, "utf-8")

    weights, moments = get_state_dict(policy, optimizer)
    with published(f"{directory}/checkpoints/step-{state.step}") as partial:
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=partial)
        on_rank_0(finish)
    on_rank_0(lambda: [shutil.rmtree(path) for path in checkpoints(directory)[keep:]])


def checkpoints(directory) -> list[str]:
    """The checkpoints/step-N folders of a run, the newest first."""
    folder = Path(directory, "checkpoints")
    steps = [int(path.name[5:]) for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return [f"{folder}/step-{step}" for step in sorted(steps, reverse=True)]


def read_state(path):
    """The state of a checkpoint; None where one of its files is missing, or was cut short."""
    with suppress(OSError, ValueError, KeyError):
        state = json.loads(Path(f"{path}/state.json").read_text("utf-8"))
        sizes = state.pop("sizes")
        if all(getsize(f"{path}/{name}") == sizes[name] for name in sizes):
            return state


def find_checkpoint(directory, chosen):
    """(path, state) of the checkpoint that a run continues from: the chosen one, or the latest;
    (None, the state of an untrained model) where it starts afresh."""
    path, logs = None, dict.fromkeys(LOGS, 0)
    state = dict(step=0, consumed=0, evaluated=-1, best=-math.inf, skipped=0, date=time.strftime("%Y-%m-%d"), logs=logs)
    candidates = [chosen] if chosen else []
    for candidate in checkpoints(directory) if chosen == "latest" else candidates:
        if found := read_state(candidate):
            path, state = candidate, state | found
            break
        require(chosen == "latest", f"checkpoint_path {candidate}: no whole checkpoint; give a "
                                    "checkpoints/step-N folder or latest")
        say(f"warning: {candidate} is damaged and skipped")
    # a checkpoint of another run knows nothing of this one's best/
    if not exists(f"{directory}/best"):
        state["best"] = -math.inf
    return path, SimpleNamespace(**state)


def load_checkpoint(path, policy, optimizer):
    weights, moments = get_state_dict(policy, optimizer)
    # a parameter without gradient has no moments to load
    partly = dcp.DefaultLoadPlanner(allow_partial_load=True)
    try:
        dcp.load({"model": weights}, checkpoint_id=path)
        dcp.load({"optimizer": moments}, checkpoint_id=path, planner=partly)
    except (Exception, dcp.CheckpointException) as error:
        raise UserError(f"checkpoint_path {path}: does not fit the model ({last_line(error)})") from None
    set_state_dict(policy, optimizer, model_state_dict=weights, optim_state_dict=moments)


def begin(directory, config, state):
    """Write config.yaml: every key as used, as a comment what ran it; it can be given back to
    --config. Take the other files back to a checkpoint's state: what came later goes, the end too."""
    git = f"git -C {shlex.quote(HERE)} describe --always --dirty"
    failed, commit = subprocess.getstatusoutput(git)
    ran = (f"# torch {torch.__version__}, transformers {transformers.__version__}, {world_size()} ranks, "
           f"commit {'unknown' if failed else commit}\n")
    keys = yaml.safe_dump(vars(config), sort_keys=False, allow_unicode=True)
    Path(f"{directory}/config.yaml").write_text(ran + keys, "utf-8")
    later = [p for p in checkpoints(directory) if int(p.rpartition("-")[2]) > state.step]
    for path in [*later, f"{directory}/final"]:
        shutil.rmtree(path, ignore_errors=True)
    for path in [*Path(directory).glob("evaluation-best*.json"), Path(f"{directory}/evaluation-base.json")]:
        path.unlink(missing_ok=True)
    for name, size in state.logs.items():
        with open(f"{directory}/{name}", "ab") as file:
            file.truncate(min(size, file.tell()))


def append(path, rows):
    """Append rows to a JSONL file; a number that is not finite is null, as JSON has it."""
    with open(path if rank() == 0 else os.devnull, "a", encoding="utf-8") as file:
        for row in rows:
            row = json.loads(json.dumps(row), parse_constant=lambda number: None)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def sample_rows(step, rollouts, figures, decode):
    return [{"step": step, "query": decode(r.prompt), "rationale": decode(r.rationale),
             "response": decode(r.answer), "ids": r.ids, "z_start": len(r.prompt),
             "y_start": len(r.prompt + r.rationale), "actions": r.actions,
             **{name: figures[name][i].item() for name in figures}}
            for i, r in enumerate(rollouts)]


def draw_curves(directory):
    """curves.png from metrics.jsonl: reward, accuracy or perplexity, KL and rationale length against
    the step."""
    # not pyplot, which would look for a screen
    from matplotlib.figure import Figure
    rows = read_jsonl(f"{directory}/metrics.jsonl")
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    judged = "accuracy" if any("accuracy" in row for row in rows) else "perplexity"
    names = "reward", judged, "kl", "rationale_length"
    for name, axis in zip(names, figure.subplots(2, 2, sharex=True).flat):
        for style, label in (("-", "rollouts"), ("o-", "greedy, validation")):
            some = [row for row in rows if name in row and ("split" in row) == (style == "o-")]
            axis.plot([row["step"] for row in some], [row[name] for row in some], style, label=label)
        axis.set_title(name)
        axis.grid(alpha=0.3)
    axis.legend()
    figure.supxlabel("step")
    figure.suptitle(basename(directory))
    figure.savefig(f"{directory}/curves.png", dpi=130)


# ---------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------
def prompt_indices(seed: int, consumed: int, n: int, count: int) -> list[int]:
    """The next n of `count` prompts after `consumed` ones: each prompt once per epoch."""
    @functools.cache
    def order(epoch):
        return random.Random(f"{seed}/epoch/{epoch}").sample(range(count), count)

    return [order(i // count)[i % count] for i in range(consumed, consumed + n)]


def load_splits(config):
    """The rows of every split that the run will see, and the grader: what is wrong with data is said
    before a model is loaded or made."""
    name, path = config.dataset_name, config.dataset_path
    splits = "train", "validation", closing_split(path)
    train, validation, closing = (load_rows(name, split, path, 0, config.dataset_options) for split in splits)
    grader, why = choose_grader(config.grader, name, train + validation + closing)
    check_rows(train + validation + closing, grader, why)
    some = 16 if config.sanity_check else None
    return (train[:some], validation[:config.limit], closing[:config.limit]), grader


def tokenise_splits(config, splits, model, tokenizer):
    """Examples of training and validation; those of the table are tokenised to see whether they fit."""
    train, validation, closing = splits
    length = config.response_length
    # SFT pushes gold rationales through the model, and samples in evaluations only
    gold = config.objective == "sft"
    prompts = make_examples(tokenizer, train, gold=gold, **limits(model, 0 if gold else length))
    validation, _ = (make_examples(tokenizer, rows, **limits(model, length)) for rows in (validation, closing))
    return prompts, validation


def train(config, directory, model, tokenizer, prompts, validation, device, path, state):
    """Train `model` (whole, on this rank's device, in its own dtype) and fill the run directory,
    from the checkpoint at `path`, if there is one, and its state on."""
    count = len(prompts)
    policy, reference, sampler = set_out(model, config, device)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)
    if path:
        load_checkpoint(path, policy, optimizer)
        refresh(sampler, policy)
    log, finish = start_wandb(config, directory)
    on_rank_0(lambda: begin(directory, config, state))
    per_step = config.prompts * world_size()
    total = config.total_steps(count, per_step, state.step, state.consumed)
    # all prompts of the run, from its first step on
    planned = state.consumed + (total - state.step) * per_step
    bar = tqdm(total=total, initial=state.step, desc=config.objective, unit="step", disable=rank() > 0)
    signals, stopped = [], False

    def on_signal(number, frame):
        # torchrun passes a Ctrl-C on: the one that comes later was pressed again
        passed_on = 3 if world_size() > 1 else 0
        if number == signal.SIGINT and signals and time.time() - signals[0] > passed_on:
            os._exit(128 + number)
        signals.append(time.time())

    handlers = {n: signal.signal(n, on_signal) for n in (signal.SIGTERM, signal.SIGINT)}
    while not stopped:
        # evaluate: how often is due after so many prompts, at the last evaluation and now
        last, due = (n * config.num_evaluations // planned for n in (state.evaluated, state.consumed))
        ended = state.step >= total
        if last < due or ended and state.evaluated < state.consumed:
            result = evaluate(config, sampler, tokenizer, validation, config.grader, 0,
                              f"validation, step {state.step}", signals)
            if result is None:
                break
            names = [name for name in ("n", *LABELS) if name in result]
            row = {"step": state.step, "split": "validation"} | {name: result[name] for name in names}
            append(f"{directory}/metrics.jsonl", [row])
            log({"step": state.step} | {f"validation/{name}": row[name] for name in names})
            if rank() == 0:
                draw_curves(directory)
                judged = "accuracy" if "accuracy" in row else "perplexity"
                shown = f"{row[judged]:6.1%}" if judged == "accuracy" else f"{row[judged]:.3f}"
                tqdm.write(f"step {state.step:>4}: validation {judged} {shown}, log π(y|x⊕z) "
                           f"{row['answer_logprob']:.3f}, rationale length {row['rationale_length']:.1f}")
            state.evaluated = state.consumed
            # of equally good models the later one is kept
            quality = result.get("accuracy", result["answer_logprob"])
            if state.step > 0 and quality >= state.best:
                state.best = quality
                export(f"{directory}/best", sampler, tokenizer)
            # one that came when a rank had done its share
            if any(gather(signals)):
                break
        if ended:
            export(f"{directory}/final", sampler, tokenizer)
            break

        # update: this rank's share of the next prompts
        done = state.step / total if config.max_steps else state.consumed / planned
        rate = config.learning_rate * (1 - done)
        optimizer.param_groups[0]["lr"] = rate
        first = state.consumed + rank() * config.prompts
        chosen = prompt_indices(config.seed, first, config.prompts, count)
        keys = [f"{config.seed}/train/{first + i}" for i in range(config.prompts)]
        rollouts, figures, row = update(policy, reference, sampler, optimizer, tokenizer,
                                        [prompts[i] for i in chosen], keys, config, device)
        state.step += 1
        state.consumed += per_step

        # log: all rollouts of the first and the last step, else those of a prompt
        row = {"step": state.step, "epoch": state.consumed / count, "lr": rate} | row
        append(f"{directory}/metrics.jsonl", [row])
        log(row)
        whole = state.step in (1, total)
        some = rollouts if whole else rollouts[:config.rloo_k]
        samples = sample_rows(state.step, some, figures, decoder(tokenizer))
        append(f"{directory}/samples.jsonl", gather(samples) if whole else samples)
        bar.set_postfix(reward=row["reward"], length=row["rationale_length"])
        bar.update()
        state.skipped = state.skipped + 1 if row["skipped"] else 0
        if state.skipped == 10:
            raise FloatingPointError(
                f"step {state.step}: ten updates in a row were not finite; lower learning_rate")
        # a signal may have reached one rank only: ask all
        stopped = any(gather(signals))
        if config.save_steps and state.step % config.save_steps == 0:
            save_checkpoint(directory, policy, optimizer, state, config.save_total_limit)
    bar.close()
    # asked again: it may have come during an evaluation
    stopped = any(gather(signals))
    if stopped and state.step > 0:
        save_checkpoint(directory, policy, optimizer, state, config.save_total_limit)
    finish()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if stopped:
        more = f", add to it\n--run_name {shlex.quote(config.run_name)} --checkpoint_path latest"
        say(f"stopped after step {state.step}; to continue, give the same command again"
            + more * (config.model_name_or_path != "embedded"))
        sys.exit(128 + signal.SIGTERM)


def start_wandb(config, directory):
    """(log(row), finish()) of metrics: to Weights & Biases where WANDB_PROJECT is set, else to nowhere.
    A run that goes on does so there too: its id is kept."""
    made = config.model_name_or_path == "embedded"
    if rank() > 0 or made or not os.environ.get("WANDB_PROJECT"):
        return lambda row: None, lambda: None
    import wandb
    kept = Path(f"{directory}/wandb_id")
    known = kept.read_text() if kept.exists() else None
    try:
        run = wandb.init(id=known, resume="allow", name=config.run_name, dir=directory, config=vars(config))
    except Exception as error:
        raise UserError(f"WANDB_PROJECT: {first_line(error)}; log in to Weights & Biases, or unset it")
    kept.write_text(run.id)
    return lambda row: run.log(row, step=row["step"]), run.finish


def lock(directory, chosen, wait):
    """Make the run directory; returns a file that locks it while it is open. Refused: a directory that
    holds a run, unless it goes on from its own checkpoint; one that another job writes to."""
    held = is_run(directory)
    # a run that did not begin left an empty file, and what wandb writes
    files = [path.name for path in Path(directory).glob("*") if path.is_dir() or getsize(path)]
    files = [name for name in files if not name.startswith("wandb")]
    require(held or not files, f"{directory}: holds {sorted(files)[:3]}, but no run; give another run_name")
    require(not held or chosen == "latest" or chosen and samefile(f"{chosen}/../..", directory),
            f"{directory}: holds a run already; give another run_name, delete it, or continue it with "
            "--checkpoint_path latest")
    os.makedirs(directory, exist_ok=True)
    file = open(f"{directory}/metrics.jsonl", "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise UserError(f"{directory}: another process writes to it; stop it, or give another run_name")
    except OSError:
        # a file system without locks
        pass
    return file


def run(config, device, splits):
    """Train as `config` says, then show the base beside the best model."""
    # the embedded base starts from random weights
    torch.manual_seed(config.seed)
    base, chosen = config.model_name_or_path, config.checkpoint_path
    name = config.dataset_name.replace(":", "-")
    unique = time.strftime(f"{name}-{config.objective}-%Y%m%d-%H%M%S-{os.getpid()}")
    config.run_name = on_rank_0(lambda: config.run_name or unique)
    directory = f"{config.output_dir}/{config.run_name}"
    path, state = on_rank_0(lambda: find_checkpoint(directory, chosen))
    # a run that goes on another day keeps its prompts
    config.date = config.date or state.date
    model, tokenizer = load_model(base, "auto", device, config.attn_implementation,
                                  config.trust_remote_code, config.date)
    examples = tokenise_splits(config, splits, model, tokenizer)
    # nothing was written so far; the lock holds until this function ends
    held = []
    on_rank_0(lambda: held.append(lock(directory, chosen, base == "embedded")))
    # another job may have gone on while this one loaded
    path, state = on_rank_0(lambda: find_checkpoint(directory, chosen))
    state.date = config.date
    ends = f"{directory}/final", f"{directory}/evaluation-best.json"
    trained, closed = on_rank_0(lambda: [chosen == "latest" and exists(end) for end in ends])
    if not trained:
        train(config, directory, model, tokenizer, *examples, device, path, state)
    elif closed:
        say(f"{directory}: finished already; --checkpoint_path goes on from one of its checkpoints")
    if trained and closed or base == "embedded":
        return
    del model
    # FSDP's modules refer to each other: del alone frees nothing
    gc.collect()
    evaluate_main(["--model", directory])
    say(f"the run: {directory}/")


def main(argv: list[str]) -> None:
    config, device = load_config(argv), init_distributed()
    size, ranks = config.shard_size or 1, config.dry_run or world_size()
    require(ranks % size == 0, f"shard_size: {size} does not divide the {ranks} ranks")
    if config.dry_run:
        return dry_run(config)
    require(not os.environ.get("WANDB_PROJECT") or importlib.util.find_spec("wandb"),
            "WANDB_PROJECT is set, but wandb is missing: pip install wandb, or unset it")
    splits, config.grader = load_splits(config)
    path = config.model_name_or_path = os.path.normpath(config.model_name_or_path)
    if path.endswith(EMBEDDED_NAME) and not on_rank_0(lambda: exists(path)):
        say(f"making the base model {path} (once)")
        base = load_config(["--config", "cups_base.yaml"])
        folder, base.run_name = os.path.split(dirname(path))
        base.output_dir = folder or "."
        base.per_device_train_batch_size = max(1, base.per_device_train_batch_size // world_size())
        base_splits, base.grader = load_splits(base)
        run(base, device, base_splits)
    run(config, device, splits)


# ---------------------------------------------------------------------------
# Before you pay
# ---------------------------------------------------------------------------
def plan(config, model, ranks, context=256) -> dict[str, float]:
    """Bytes on a rank of GPUs, by what holds them, for a model that may be on the meta device; x⊕y
    are taken to be `context` tokens long. All but the last is exact."""
    width = resolve_dtype(config.dtype, torch.device("cuda")).itemsize
    layers, shards = decoder_layers(model), config.shard_size or ranks
    whole = sum(p.numel() for p in model.parameters())
    # of each parameter's first dimension, which FSDP2 cuts
    part = sum(-(-len(p) // shards) * p[0].numel() for p in model.parameters())
    # keys and values of a token
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    cache = model(ids, use_cache=True).past_key_values
    slot = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    rows = max(min(config.sequences, config.rollout_batch_size), config.per_device_eval_batch_size)
    length = config.response_length
    # a pass has each prompt once; of a token a layer keeps about 24 times its input
    tokens = config.per_device_train_batch_size * (length + context / config.rloo_k)
    kept = 24 + len(layers) if config.gradient_checkpointing else 24 * len(layers)
    kept *= tokens * width * model.get_input_embeddings().weight.shape[1]
    # gathered at a time, of both models and of gradients: two layers, and what lies outside of layers
    inside = sum(p.numel() for p in layers.parameters())
    gathered = (2 * width + 4) * (whole - inside + 2 * inside / len(layers))
    # one rank gathers nothing, but has the gradients of a pass in a dtype of its own
    if ranks == 1:
        gathered = width * whole * (width < 4)
    return {"weights, float32": 4 * part, "gradients": 4 * part, "optimizer, two moments": 8 * part,
            "sampling copy": 0 if ranks == 1 and width == 4 else width * whole,
            "reference": width * part * (config.kl_coef > 0),
            "KV cache": width * slot * rows * (context + length),
            "activations and gathered layers (estimate)": kept + gathered}


def dry_run(config):
    """Print what a run would need and do, from the model's config alone; UserError where gpu_memory
    is too little."""
    path, ranks = config.model_name_or_path, config.dry_run
    trust = {"trust_remote_code": config.trust_remote_code}
    try:
        with torch.device("meta"):
            if path.endswith(EMBEDDED_NAME):
                model, _ = embedded_model()
            else:
                shape = transformers.AutoConfig.from_pretrained(path, **trust)
                model = transformers.AutoModelForCausalLM.from_config(shape, **trust)
    except Exception as error:
        raise UserError(f"model {path}: no config ({first_line(error)}); give a folder or hub id") from None
    needs = plan(config, model, ranks)
    most, together = max(needs, key=needs.get), sum(needs.values())
    print(f"{path}: {sum(p.numel() for p in model.parameters()):,} parameters, {ranks} ranks; "
          "question and answer taken to be 256 tokens\n\nGiB on a rank")
    for name, size in [*needs.items(), ("together", together)]:
        print(f"  {name:<44}{size / 2**30:10.3f}")
    require(together <= (config.gpu_memory or math.inf) * 2**30,
            f"gpu_memory: more than {config.gpu_memory} GiB are needed, most by {most}; lower "
            "rollout_batch_size and per_device_eval_batch_size (KV cache), per_device_train_batch_size "
            "or set gradient_checkpointing (activations), kl_coef 0 (reference), or take more ranks")
    prompts = config.prompts * ranks
    print(f"\nper step: {prompts} prompts, {config.sequences * ranks} sequences")
    count = len(load_rows(config.dataset_name, "train", config.dataset_path, 0, config.dataset_options))
    print(f"{count:,} training prompts: {config.total_steps(count, prompts)} steps in all")


if __name__ == "__main__":
    run_script(main)
