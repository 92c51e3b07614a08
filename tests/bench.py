"""What an update costs, beside the schedules of the released code and of TRL and beside transformers' generate.

    python tests/bench.py --model DIR --gsm8k DIR              every question, on SmolLM2-135M-Instruct and GSM8K
    python tests/bench.py --only update memory --repeats 5     some; SMOLLM2 and GSM8K name the folders, as in the tests
    python tests/bench.py --only startup --json startup.json   the same figures, every round of them, for machines

Contenders take turns in one run, in the opposite order every other round. A cell is the median of the rounds [lowest to
highest]; a ratio is taken within a round: "seconds: released ÷" is the released code's seconds over this row's.

The baselines are written anew from what those programs do, not copied. Given the same rollouts they compute the loss
and the gradient of latro.update: what differs is how often, how wide and through how much vocabulary tokens are pushed.
"""
import argparse
import copy
import dataclasses
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from statistics import median
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from torch import nn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import latro  # noqa: E402
from data import answer_ids, decoder, load_rows, make_examples  # noqa: E402
from evaluate import (Rollout, Scorer, cut_rollout, generate, init_distributed, load_model, resolve_dtype,  # noqa: E402
                      run_script, score, stop_token_ids, stopper, token_logprobs, uniform_rows)

K, PROMPTS = 4, 2  # of an update, where nothing else is said
OURS = {"ours": torch.float32, "ours, bf16 arithmetic": torch.bfloat16}
NEVER = "\0never\0"  # a stop sequence that is looked for, and not found


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------
def spread(values: list[float]) -> str:
    ends = f" [{min(values):.3g}–{max(values):.3g}]" if max(values) > min(values) else ""
    return f"{median(values):.4g}{ends}"


class Bench:
    """The options of the command line, the device, and the tables so far, for --json."""

    def __init__(self, options, device):
        self.options, self.device, self.tables = options, device, []

    def measure(self, title: str, contenders: dict, ratios: tuple[tuple[str, str], ...] = ()) -> dict[str, list[dict]]:
        """Let the contenders, functions of the round that return figures, take turns; print a row of each.

        "seconds" is added where it is not among the figures. ratios: pairs of a figure and the contender that the
        others are compared with.
        """
        print(f"\n{title}", flush=True)
        runs = {name: [] for name in contenders}
        for number in range(self.options.repeats):
            for name in list(contenders)[::-1 if number % 2 else 1]:
                begin = latro.now(self.device)
                figures = contenders[name](number) or {}
                runs[name].append({"seconds": latro.now(self.device) - begin} | figures)
                print(f"  round {number + 1}, {name}: {runs[name][-1]['seconds']:.2f} s", flush=True)
        compared = {name: {f"{figure}: {other} ÷": [a[figure] / b[figure] for a, b in zip(runs[other], rounds)]
                           for figure, other in ratios} for name, rounds in runs.items()}
        cells = [["", *next(iter(runs.values()))[0], *next(iter(compared.values()))]]
        for name, rounds in runs.items():
            cells.append([name, *(spread([r[figure] for r in rounds]) for figure in rounds[0]),
                          *map(spread, compared[name].values())])
        widths = [max(map(len, column)) for column in zip(*cells)]
        for name, *row in cells:
            print(f"  {name:<{widths[0]}}" + "".join(f"{cell:>{w + 2}}" for cell, w in zip(row, widths[1:])))
        self.tables.append({"title": title, "rounds": runs, "ratios": compared})
        return runs

    def fresh(self, case: list[str], number: int, ranks: int = 1, **environment) -> dict[str, float]:
        """The figures of one of CASES, measured by this script in processes of its own."""
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        files = ["--model", self.options.model] + (["--gsm8k", self.options.gsm8k] if self.options.gsm8k else [])
        command = [sys.executable, *launch, os.path.abspath(__file__), *files, "--case", *case]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{case}: {done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    def examples(self, tokenizer, count: int):
        return make_examples(tokenizer, load_rows("gsm8k", "train", self.options.gsm8k)[:count])


def with_peak(work, device) -> dict[str, float]:
    """work()'s seconds and figures; the GiB that the process or the GPU held at most, and how many more than before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**30
    else:
        with open("/proc/self/statm") as file:  # the peak so far may be that of loading: what is resident now counts
            before = int(file.read().split()[1]) * resource.getpagesize() / 2**30
    begin = latro.now(device)
    figures = work()
    seconds = latro.now(device) - begin
    on_cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else on_cpu
    return {"seconds": seconds, "peak_gib": peak, "above_gib": peak - before} | figures


# ---------------------------------------------------------------------------------------------------------------------
# One update: ours and the baselines
# ---------------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Side:
    policy: nn.Module
    reference: nn.Module
    sampler: nn.Module
    tokenizer: object
    device: torch.device

    def __post_init__(self):
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=5e-7, weight_decay=0.0, fused=True)


def our_side(path: str, dtype: torch.dtype, device) -> Side:
    """As latro.train has it: float32 weights, arithmetic in `dtype`."""
    model, tokenizer = load_model(path, "auto", device)
    config = latro.Config(dtype=str(dtype).removeprefix("torch."))
    return Side(*latro.set_out(model, config, device), tokenizer, device)


def their_side(path: str, device) -> Side:
    """A model as transformers alone has it."""
    model, tokenizer = load_model(path, torch.float32, device, "sdpa")
    return Side(model, copy.deepcopy(model).requires_grad_(False), model, tokenizer, device)


def make_config(length: int, prompts: int = PROMPTS, k: int = K, **settings) -> latro.Config:
    """All rollouts decoded together, those of a prompt in a pass with gradient."""
    return latro.Config(**{"response_length": length, "rloo_k": k, "per_device_train_batch_size": k,
                           "gradient_accumulation_steps": prompts, "rollout_batch_size": prompts * k} | settings)


def our_update(side: Side, examples, config, number: int) -> dict[str, float]:
    keys = [f"{number}/{i}" for i in range(len(examples))]
    rollouts, _, row = latro.update(side.policy, side.reference, side.sampler, side.optimizer, side.tokenizer,
                                    examples, keys, config, side.device)
    tokens = sum(len(r.ids) for r in rollouts)
    return {name: row[name] for name in ("generate_s", "score_s", "train_s")} | {
        "tokens": tokens, "positions": round(row["work_ratio"] * 2 * tokens), "work_ratio": row["work_ratio"]}


def their_update(learn, side: Side, examples, config, number: int) -> dict[str, float]:
    torch.manual_seed(number)
    begin = latro.now(side.device)
    rollouts, width = sample(side, examples, config, keep_scores=learn is released)
    generate_s, tokens = latro.now(side.device) - begin, sum(len(r.ids) for r in rollouts)
    phases, positions, _ = learn(side, rollouts, width, config)
    return {"generate_s": generate_s} | phases | {
        "tokens": tokens, "positions": positions, "work_ratio": positions / (2 * tokens)}


def left_pad(sequences: list[list[int]], width: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.zeros(2, len(sequences), width, dtype=torch.long)  # each (B, width)
    for i, sequence in enumerate(sequences):
        ids[i, width - len(sequence):], mask[i, width - len(sequence):] = torch.tensor(sequence), 1
    return ids.to(device), mask.to(device)


@torch.no_grad()
def sample(side: Side, examples, config, keep_scores: bool) -> tuple[list[Rollout], int]:
    """The rollouts of both baselines, K of an example in a row, and the width of what was generated with its prompts.

    Every prompt is repeated K times; rows go on until all have ended with a stop token; text stops are cut afterwards.
    """
    decode, stop_ids = decoder(side.tokenizer), stop_token_ids(side.tokenizer, side.sampler, config.stop_token)
    repeated = [example for example in examples for _ in range(config.rloo_k)]
    width = max(len(example.prompt) for example in examples)
    ids, mask = left_pad([example.prompt for example in repeated], width, side.device)
    out = side.sampler.generate(input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, eos_token_id=[*stop_ids],
                                pad_token_id=min(stop_ids), max_new_tokens=config.response_length,
                                return_dict_in_generate=True, output_scores=keep_scores)
    if keep_scores:
        torch.stack(out.scores, 1)  # (B*K, L, V), as the released code does before it drops them
    rollouts = [cut_rollout(example, row, stop_ids, config.stop_seqs, decode)
                for example, row in zip(repeated, out.sequences[:, width:].tolist())]
    return rollouts, out.sequences.shape[1]


def padded_logprobs(model, rollouts, width: int, parts: str, keep: int = 0) -> torch.Tensor:
    """(len(parts), B): Σ log π of "z" and of "y", from one pass over rows padded on the left to `width`; temperature 1.

    keep = 0: the log-probabilities of the whole vocabulary at every position, as in the released code; else the logits
    of the last `keep` positions and their normaliser, as in TRL.
    """
    sequences = [r.ids if "y" in parts else r.prompt + r.actions for r in rollouts]
    ids, mask = left_pad(sequences, width, model.device)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False,
                   logits_to_keep=keep).logits  # (B, C, V), C is keep or width
    targets, counted = torch.zeros(2, *logits.shape[:2], len(parts), dtype=torch.long)  # each (B, C, len(parts))
    for i, (r, sequence) in enumerate(zip(rollouts, sequences)):
        first = logits.shape[1] - len(sequence) + len(r.prompt) - 1  # what z's first token is predicted from
        for j, part in enumerate(parts):
            begin, tokens = (first, r.actions) if part == "z" else (first + len(r.rationale), r.answer)
            targets[i, begin:begin + len(tokens), j] = torch.tensor(tokens)
            counted[i, begin:begin + len(tokens), j] = 1
    targets, counted = targets.to(logits.device), counted.to(logits.device)
    if keep:
        logprobs = logits.gather(2, targets) - logits.logsumexp(-1, keepdim=True)
    else:
        logits = logits.log_softmax(-1)  # the logits themselves are gone
        logprobs = logits.gather(2, targets)
    return (logprobs * counted).sum(1).T


def released(side: Side, rollouts, width: int, config) -> tuple[dict[str, float], int, list[float]]:
    """The released code's schedule: three scoring passes, then two with gradient whose graphs live at once."""
    longer, size = width + max(len(r.answer) for r in rollouts), config.rollout_batch_size

    def z(batch, model=side.policy):
        return padded_logprobs(model, batch, width, "z")[0]

    def y(batch):
        return padded_logprobs(side.policy, batch, longer, "y")[0]

    phases, losses = learn(side, rollouts, config, size, lambda batch: (z(batch), z(batch, side.reference), y(batch)),
                           lambda batch: (z(batch), y(batch)))
    return phases, len(rollouts) * (3 * width + 2 * longer), losses


def trl(side: Side, rollouts, width: int, config) -> tuple[dict[str, float], int, list[float]]:
    """TRL's: policy and reference passes, a reward function's pass, one pass with gradient, here through y as well."""
    prompt, size = max(len(r.prompt) for r in rollouts), config.per_device_train_batch_size
    longer = prompt + max(len(r.rationale) + len(r.answer) for r in rollouts)

    def z(batch, model):
        return padded_logprobs(model, batch, width, "z", width - prompt + 1)[0]

    def x_z_y(batch, parts):
        return padded_logprobs(side.policy, batch, longer, parts, longer - prompt + 1)

    phases, losses = learn(side, rollouts, config, size, lambda batch: (
        z(batch, side.policy), z(batch, side.reference), x_z_y(batch, "y")[0]), lambda batch: x_z_y(batch, "zy"))
    return phases, len(rollouts) * 2 * (width + longer), losses


def learn(side: Side, rollouts, config, score_size: int, score, passes) -> tuple[dict[str, float], list[float]]:
    """score(batch) → log π(z|x), log π_0(z|x), log π(y|x⊕z), without gradient; passes(batch) → the first and the last,
    with. The seconds of both, and the two losses."""
    def batches(size):
        return [rollouts[i:i + size] for i in range(0, len(rollouts), size)]

    clocks = [latro.now(side.device)]
    with torch.no_grad():
        z, ref, y = torch.cat([torch.stack(score(batch)) for batch in batches(score_size)], 1)  # each (B*K,)
    clocks.append(latro.now(side.device))
    finished = torch.tensor([r.finished for r in rollouts], device=side.device)
    rewards = latro.rollout_rewards(y, z - ref, finished, config.kl_coef, config.penalty_reward_value)
    advantages = latro.rloo_advantages(rewards.view(-1, config.rloo_k)).flatten()
    size, losses = config.per_device_train_batch_size, torch.zeros(2, device=side.device)
    for batch, some in zip(batches(size), advantages.split(size)):
        terms = latro.latro_loss(*passes(batch), some, config.sft_penalty, len(rollouts))
        sum(terms).backward()
        losses += torch.stack(terms).detach()
    nn.utils.clip_grad_norm_(side.policy.parameters(), config.max_grad_norm or float("inf"))
    side.optimizer.step()
    side.optimizer.zero_grad()
    clocks.append(latro.now(side.device))
    return {"score_s": clocks[1] - clocks[0], "train_s": clocks[2] - clocks[1]}, losses.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# The questions
# ---------------------------------------------------------------------------------------------------------------------
def update(bench: Bench) -> None:
    """A whole update: the same prompts for all, each sampler's own rollouts."""
    path, device, repeats = bench.options.model, bench.device, bench.options.repeats
    theirs = their_side(path, device)  # the two baselines take turns on it
    examples = bench.examples(theirs.tokenizer, PROMPTS * repeats)
    steps = {"released": partial(their_update, released, theirs), "TRL": partial(their_update, trl, theirs)}
    steps |= {name: partial(our_update, our_side(path, dtype, device)) for name, dtype in OURS.items()}

    def turn(step, prompts, k, length, number):
        return step(examples[number * prompts:(number + 1) * prompts], make_config(length, prompts, k), number)

    for step in steps.values():  # the optimizer's moments are made, and kernels chosen, before the clock runs
        turn(step, PROMPTS, K, 8, 0)
    for case in (PROMPTS, K, 128), (PROMPTS, K, 500), (1, 16, 128):  # the paper's K is 16
        bench.measure("update, float32 where not said, {} prompts × K = {}, L = {}".format(*case),
                      {name: partial(turn, step, *case) for name, step in steps.items()},
                      (("seconds", "released"), ("seconds", "TRL")))


def prefix(bench: Bench) -> None:
    """Scoring and training alone, on the same rollouts: each prompt once, or one row per rollout."""
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load_model(bench.options.model, dtype, bench.device)
        rowwise = copy.deepcopy(model)
        rowwise.set_attn_implementation("sdpa")  # the model's own attention: its Scorer does not pack
        scorers = {"a row per rollout": Scorer(rowwise), "each prompt once": Scorer(model)}
        [example] = bench.examples(tokenizer, 1)
        for k in (4, 16, 32):
            rollouts = made_up_rollouts(example, tokenizer, k)
            turns = {name: partial(score_and_train, scorer, rollouts) for name, scorer in scorers.items()}
            for turn in turns.values():  # kernels are chosen
                turn(0)
            bench.measure(f"prefix, {str(dtype)[6:]}, one prompt × K = {k}, L = 128", turns,
                          (("seconds", "a row per rollout"), ("positions", "a row per rollout")))


def made_up_rollouts(example, tokenizer, k: int, limit: int = 128) -> list[Rollout]:
    """Of random words; from half of the limit to the limit long, evenly spread."""
    rng, rollouts = random.Random(0), []
    for i in range(k):
        z = rng.choices(range(tokenizer.vocab_size), k=limit - (limit // 2) * i // (k - 1))
        rollouts.append(Rollout(example.prompt, z, z, answer_ids(example, z, decoder(tokenizer))))
    return rollouts


def score_and_train(scorer: Scorer, rollouts, number: int) -> dict[str, float]:
    """What an update asks of the reference, and of the policy: one pass each."""
    device, scorer.positions = next(scorer.parameters()).device, 0
    clocks = [latro.now(device)]
    with torch.no_grad():
        score(scorer, rollouts, answers=False)
    clocks.append(latro.now(device))
    total = score(scorer, rollouts).sum()
    total.backward()
    clocks.append(latro.now(device))
    scorer.zero_grad()
    return {"score_s": clocks[1] - clocks[0], "train_s": clocks[2] - clocks[1], "positions": scorer.positions,
            "logprob": total.item()}


def memory(bench: Bench) -> None:
    """Peak memory of a process that loads, makes an update of L = 8, and one in question: moments are there by then."""
    for length in ("128", "500"):
        bench.measure(f"memory, float32 where not said, {PROMPTS} prompts × K = {K}, L = {length}",
                      {name: partial(bench.fresh, ["memory", name, length]) for name in ("released", *OURS)},
                      (("peak_gib", "released"), ("above_gib", "released")))


def memory_case(bench: Bench, name: str, length: str) -> dict[str, float]:
    path, device = bench.options.model, bench.device
    side = our_side(path, OURS[name], device) if name in OURS else their_side(path, device)
    step = partial(our_update, side) if name in OURS else partial(their_update, released, side)
    examples = bench.examples(side.tokenizer, PROMPTS)
    return with_peak(lambda: [step(examples, make_config(n), i) for i, n in enumerate((8, int(length)))][-1], device)


def generation(bench: Bench) -> None:
    """Sampling alone, as many tokens by both: every row ends where it is told to."""
    cases = {"8 rows, none stops, L = 128": ([128] * 8, 128, 8),
             "32 rows of GSM8K's lengths, 8 at a time, L = 500": (gsm8k_lengths(), 500, 8)}
    if bench.device.type == "cuda":
        cases["64 rows, none stops, L = 128"] = [128] * 64, 128, 64

    def turn(work, prompts, lengths, limit, width, number):
        work(prompts[:len(lengths) // K], lengths, limit, width)
        return {"tokens": sum(lengths)}

    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load_model(bench.options.model, dtype, bench.device)
        model.generation_config.eos_token_id = None
        prompts = [example.prompt for example in bench.examples(tokenizer, 16)]
        theirs = copy.deepcopy(model)
        theirs.set_attn_implementation("sdpa")
        contenders = {"transformers": partial(their_generate, theirs), "ours": partial(our_generate, model, tokenizer)}
        for work in contenders.values():  # kernels are chosen
            turn(work, prompts, [4] * 8, 4, 8, 0)
        for title, case in cases.items():
            bench.measure(f"generation, {str(dtype)[6:]}, {title}", {name: partial(turn, work, prompts, *case)
                          for name, work in contenders.items()}, (("seconds", "transformers"),))


def gsm8k_lengths(limit: int = 500) -> list[int]:
    """Of 32 rollouts, as SmolLM2's on GSM8K at L = 500: 17 (53%) stop, evenly spread so that the mean of all is 358."""
    rng, total = random.Random(0), 32 * 358 - 15 * limit  # tokens of those that stop
    lengths = [max(1, round((i + rng.random()) / 17 * 2 * total / 17)) for i in range(17)] + [limit] * 15
    rng.shuffle(lengths)
    return lengths


class EndAt(transformers.StoppingCriteria):
    def __init__(self, ends: torch.Tensor):
        self.ends = ends  # (rows,), counted with the prompt

    def __call__(self, input_ids, scores, **unused):
        return input_ids.shape[1] >= self.ends


def their_generate(model, prompts, lengths: list[int], limit: int, width: int) -> None:
    """transformers' generate in batches of `width` rows; a batch ends when all its rows have."""
    rows = [prompt for prompt in prompts for _ in range(K)]
    for i in range(0, len(rows), width):
        batch, ends = rows[i:i + width], torch.tensor(lengths[i:i + width], device=model.device)
        start = max(map(len, batch))
        ids, mask = left_pad(batch, start, model.device)
        out = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=limit,
                             pad_token_id=0, stopping_criteria=[EndAt(ends + start)])
        assert out.shape[1] - start == ends.max()


def our_generate(model, tokenizer, prompts, lengths: list[int], limit: int, width: int) -> None:
    """generate() on all rows, `width` at a time. Uniform number 0 picks token 0, here the only stop; the others lie
    above a half, where token 0 hardly is. Text is searched for a stop sequence at every token, as in training."""
    uniforms = 0.5 + uniform_rows([*map(str, range(len(lengths)))], limit) / 2  # (rows, limit)
    uniforms[range(len(lengths)), torch.tensor(lengths) - 1] = 0.0
    out = generate(model, prompts, limit, num_samples=K, temperature=1.0, uniforms=uniforms, batch_size=width,
                   stop=stopper({0}, [NEVER], decoder(tokenizer)))
    assert [len(ids) for ids, _ in out] == lengths


def vocabulary(bench: Bench) -> None:
    """The projection to V = 128,000, forward and backward, 8 sequences × 1,024, float32, in fresh processes."""
    for size in ("576", "2048"):
        runs = bench.measure(f"vocabulary, hidden size {size}", {name: partial(bench.fresh, ["vocabulary", name, size])
                             for name in ("whole", "ours")}, (("seconds", "whole"), ("above_gib", "whole")))
        for figure in ("loss", "hidden_grad", "weight_grad"):
            values = [r[figure] for rounds in runs.values() for r in rounds]
            assert max(values) - min(values) <= 1e-4 * max(map(abs, values)), (figure, values)


def vocabulary_case(bench: Bench, name: str, size: str, rows: int = 8 * 1024, words: int = 128_000) -> dict[str, float]:
    generator = torch.Generator(bench.device).manual_seed(0)
    hidden, weight = (nn.init.normal_(torch.empty(n, int(size), device=bench.device), std=std, generator=generator)
                      .requires_grad_() for n, std in ((rows, 1.0), (words, 0.02)))
    targets = torch.randint(words, (rows,), device=bench.device, generator=generator)
    direction = torch.randn(int(size), device=bench.device, generator=generator)  # tells gradients of one norm apart

    def work():
        if name == "ours":
            loss = -token_logprobs(hidden, lambda some: some @ weight.T, targets).mean()
        else:
            loss = -(hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None]).mean()
        loss.backward()
        return {"loss": loss.item()}

    return with_peak(work, bench.device) | {"hidden_grad": (hidden.grad @ direction).norm().item(),
                                            "weight_grad": (weight.grad @ direction).norm().item()}


def growth(bench: Bench) -> None:
    """What a sampled token and a trained position cost as K and L grow and nothing else does: one prompt, no stops."""
    side = our_side(bench.options.model, torch.float32, bench.device)
    examples = bench.examples(side.tokenizer, 1)

    def turn(k, length, number):
        with mock.patch.object(latro, "stop_token_ids", lambda *unused: set()):
            config = make_config(length, 1, k, rollout_batch_size=4, stop_seqs=[NEVER])
            figures = our_update(side, examples, config, number)
        assert figures["tokens"] >= k * (len(examples[0].prompt) + length)
        return {"sampled_ms": figures["generate_s"] / (k * length) * 1000,
                "trained_ms": (figures["score_s"] + figures["train_s"]) / figures["positions"] * 1000}

    turn(4, 512, 0)  # warm-up: the memory of the largest is there
    for cases in [(k, 128) for k in (4, 8, 16, 32)], [(4, length) for length in (64, 128, 256, 512)]:
        runs = bench.measure("growth, float32, milliseconds per sampled token and per position pushed",
                             {f"K = {k}, L = {length}": partial(turn, k, length) for k, length in cases})
        for figure in ("sampled_ms", "trained_ms"):
            medians = [median(r[figure] for r in rounds) for rounds in runs.values()]
            bench.tables[-1][f"{figure}, largest over smallest"] = max(medians) / min(medians)
            print(f"  {figure}: largest over smallest {max(medians) / min(medians):.2f}")
    if bench.device.type == "cpu" or torch.cuda.device_count() > 1:
        bench.measure("growth, ranks of one thread, each one prompt × K = 4, L = 64", {
            f"{n} ranks": partial(bench.fresh, ["ranks"], ranks=n, OMP_NUM_THREADS="1") for n in (1, 2)},
            (("token_ms", "1 ranks"),))


def ranks_case(bench: Bench) -> dict[str, float]:
    side = our_side(bench.options.model, torch.float32, bench.device)
    example, name = bench.examples(side.tokenizer, dist.get_world_size())[dist.get_rank()], str(dist.get_rank())
    for length in (8, 64):  # the first one warms up
        *_, row = latro.update(side.policy, side.reference, side.sampler, side.optimizer, side.tokenizer, [example],
                               [name], make_config(length, 1), bench.device)
    return {"seconds": row["step_s"], "tokens_per_s": row["tokens_per_s"], "token_ms": 1000 / row["tokens_per_s"]}


def startup(bench: Bench) -> None:
    """From the start of the process to the first step's row in metrics.jsonl, and to the end of what takes less."""
    scripts = {name: os.path.join(ROOT, name) for name in ("latro.py", "evaluate.py")}
    with tempfile.TemporaryDirectory() as folder, open(os.path.join(folder, "log"), "w") as log:
        def start(*words):
            return subprocess.Popen([sys.executable, *words], cwd=folder, stdout=log, stderr=log)

        def finished(*words):
            if start(*words[:-1]).wait():  # the last is the round
                raise RuntimeError(f"{words} failed: {open(log.name).read()[-2000:]}")

        def first_step(number):
            process = start(scripts["latro.py"], "--run_name", str(number))
            path = f"{folder}/runs/{number}/metrics.jsonl"
            while not (os.path.exists(path) and '"reward"' in open(path).read()):
                if process.poll() is not None:
                    raise RuntimeError(f"latro.py ended before its first step: {open(log.name).read()[-2000:]}")
                time.sleep(0.02)
            process.kill()
            process.wait()

        print("\nmaking the base model first", flush=True)
        finished(scripts["latro.py"], "--config", "tiny.yaml", "--max_steps", "1", "--sanity_check", "true", None)
        bench.measure("startup", {"first step of tiny.yaml": first_step} | {
            f"{name} --help": partial(finished, path, "--help") for name, path in scripts.items()} | {
            "import torch": partial(finished, "-c", "import torch")})


QUESTIONS = {"update": update, "prefix": prefix, "memory": memory, "generation": generation,
             "vocabulary": vocabulary, "growth": growth, "startup": startup}
CASES = {"memory": memory_case, "vocabulary": vocabulary_case, "ranks": ranks_case}  # in processes of their own


def machine(device) -> dict:
    able = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 has it not
    return {"cpu": able.get("cpu_name"), "cores": os.cpu_count(), "torch threads": torch.get_num_threads(),
            "native bf16": [name for name in ("avx512_bf16", "amx_bf16", "bf16") if able.get(name)],
            "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None, "torch": torch.__version__,
            "transformers": transformers.__version__, "python": platform.python_version(),
            "dtype auto": str(resolve_dtype("auto", device))}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("SMOLLM2", "HuggingFaceTB/SmolLM2-135M-Instruct"))
    parser.add_argument("--gsm8k", default=os.environ.get("GSM8K"), help="folder; default: the hub's")
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS), help="questions")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--json", help="write the figures of every round to this file")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    case = vars(options).pop("case")
    bench = Bench(options, init_distributed())
    if case:
        figures = CASES[case[0]](bench, *case[1:])
        return print(json.dumps(figures)) if dist.get_rank() == 0 else None
    result = {"machine": machine(bench.device), "settings": vars(options), "tables": bench.tables}
    for name, value in (result["machine"] | result["settings"]).items():
        print(f"{name}: {value}")
    for name in options.only:
        print(f"\n{QUESTIONS[name].__doc__}", flush=True)
        QUESTIONS[name](bench)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1, ensure_ascii=False)


if __name__ == "__main__":
    run_script(main)
