"""What is judged: sample rationales, cut them, score text, measure accuracy.

    python evaluate.py                        the newest run: its base beside its best
    python evaluate.py --model DIR_OR_HUB_ID --dataset_name gsm8k --num_samples 8
    torchrun --nproc_per_node 8 evaluate.py --model …        the ranks share the rows

Everything that touches a model is one of two verbs, in training and here:

    generate   prompts → sampled token ids and their log-probabilities
    score      rollouts → log π(z|x) and log π(y|x⊕z), each prompt once

Training evaluates with the `evaluate` below, so the two cannot disagree.
"""
import dataclasses
import datetime
import difflib
import glob
import inspect
import json
import math
import os
import random
import re
import sys
import types
import typing
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from os.path import basename, dirname, exists, isdir, isfile
from pathlib import Path
from statistics import fmean as mean
from typing import Literal

import torch
import torch.distributed as dist
import transformers
import yaml
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM,
                          AutoTokenizer)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from data import (DATASETS, EMBEDDED, Example, UserError, answer_ids, check_gold, choose_grader, decoder,
                  embedded_model, end_of_turn_id, grade, load_rows, make_examples, prompt_text, require)

transformers.utils.logging.set_verbosity_error()
# ours show the long work
transformers.utils.logging.disable_progress_bar()
# oneDNN, and PyTorch's layer over it, each keep a kernel per shape, by default
# 1,024: memory in use would grow for 100 updates. Read at their first use.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "100")
os.environ.setdefault("LRU_CACHE_CAPACITY", "100")


# ---------------------------------------------------------------------------
# generate: prompts → sampled ids and their log-probabilities
# ---------------------------------------------------------------------------
@dataclass
class Row:
    """One sample in the making. Its token t lies in slot t of its cache row."""
    index: int
    prompt: list[int]
    # sampled
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def next(self) -> int:
        """The token to feed: not in the cache yet."""
        return (self.ids or self.prompt)[-1]

    @property
    def cached(self) -> int:
        """Tokens before it: its position, and its slot."""
        return len(self.prompt) + len(self.ids) - 1


class Slots(Cache):
    """Keys and values of all rows, (width, heads, slots, head size) a layer,
    written in place."""

    def __init__(self, like: list, width: int, slots: int):
        super().__init__(layers=[])
        self.at = None  # (n,) the slot that each row writes in this step
        # slots that some row looks at
        self.seen = 0
        self.layers_kv = [
            [x.new_zeros(width, x.shape[0], slots, x.shape[2]) for x in layer]
            for layer in like]

    def update(self, keys, values, layer: int, *args, **kwargs):
        """Write the step's keys and values (n, heads, 1, head size)."""
        n = len(keys)
        rows = torch.arange(n, device=keys.device)
        for slots, new in zip(self.layers_kv[layer], (keys, values)):
            slots[rows, :, self.at] = new[:, :, 0]
        return [slots[:n, :, :self.seen] for slots in self.layers_kv[layer]]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.seen - 1

    def row(self, i: int) -> list:
        """Each layer's keys and values of a row, (heads, slots, head size)."""
        return [(keys[i], values[i]) for keys, values in self.layers_kv]

    def fill(self, i: int, layers: list, length: int) -> None:
        """Give row i the first `length` keys and values of another."""
        for mine, others in zip(self.row(i), layers):
            for slots, x in zip(mine, others):
                slots[:, :length] = x[:, :length]


def prefill(model, prompts: list[list[int]]) -> list:
    """Per prompt and layer its keys and values (heads, T, head size).

    Padded on the right: causality keeps the padding out."""
    ids = pad_sequence([torch.tensor(p) for p in prompts], batch_first=True)
    cache = Cache(layer_class_to_replicate=DynamicLayer)
    model(input_ids=ids.to(model.device), past_key_values=cache,
          use_cache=True, logits_to_keep=1)
    return [[(layer.keys[i], layer.values[i]) for layer in cache.layers]
            for i in range(len(prompts))]


def visible(model, last: torch.Tensor, slots: int):
    """What a step adds to its scores, (n, 1, 1, slots): 0 where row i sees a
    slot, up to last[i] and as many as its window holds, else very little. A
    dict by kind of layer where the model has several."""
    config = model.config.get_text_config()
    slot = torch.arange(slots, device=last.device)
    seen = {"full_attention": slot <= last[:, None]}
    if window := getattr(config, "sliding_window", None):
        near = slot > last[:, None] - window
        seen["sliding_attention"] = seen["full_attention"] & near
    masks = {kind: torch.zeros_like(m, dtype=model.dtype).masked_fill(
                 ~m, torch.finfo(model.dtype).min)[:, None, None]
             for kind, m in seen.items()}
    kinds = set(getattr(config, "layer_types", None) or [list(masks)[-1]])
    return masks if len(kinds) > 1 else masks[kinds.pop()]


def draw(logprobs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Invert the CDF of each row (n, V) at a uniform number (n,)."""
    cdf = logprobs.exp().cumsum(-1, dtype=torch.float64)
    at = uniforms[:, None] * cdf[:, -1:]
    tokens = torch.searchsorted(cdf, at, right=True)[:, 0]
    return tokens.clamp(max=cdf.shape[1] - 1)


@torch.inference_mode()
def generate(
    model: nn.Module,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    num_samples: int = 1,
    temperature: float = 0.0,
    uniforms: torch.Tensor | None = None,
    stop: Callable[[list[int]], bool] = lambda ids: False,
    batch_size: int | None = None,
) -> list[tuple[list[int], list[float]]]:
    """Sample num_samples continuations of each prompt, with a KV cache and
    continuous batching: a row that ends leaves, a waiting row takes its place.

    model: a transformers causal LM. temperature: 0 is greedy. uniforms:
    (rows, max_new_tokens) in [0, 1), all the randomness: row i's t-th token
    inverts the CDF at uniforms[i, t], whatever else is in the batch (default:
    torch.rand's). stop(ids) → whether the row ends with its newest token; it
    ends after max_new_tokens anyhow. batch_size: rows decoded together
    (default: all). Row i belongs to prompt i // num_samples.

    Returns per row its ids, with the stop, and their log-probabilities at
    `temperature` (greedy: at 1), natural logs."""
    rows = [Row(i, prompts[i // num_samples])
            for i in range(len(prompts) * num_samples)]
    if uniforms is None:
        uniforms = torch.rand(len(rows), max_new_tokens, dtype=torch.float64)
    uniforms = uniforms.to(model.device)
    precise = torch.promote_types(model.dtype, torch.float32)
    width = min(batch_size or len(rows), len(rows))
    slots = max(map(len, prompts), default=0) + max_new_tokens
    # the next one is the last
    waiting = rows[::-1] if max_new_tokens else []
    # batch[i] has row i of the cache
    batch: list[Row] = []
    # by prompt, while samples of it wait
    prefilled: dict[int, list] = {}
    cache = None
    while waiting or batch:
        # 1 admit: some at a time, for a prefill delays all rows
        free = width - len(batch)
        if waiting and free >= max(1, width // 8):
            new = [waiting.pop() for _ in range(min(free, len(waiting)))]
            which = {row.index // num_samples for row in new}
            which = sorted(which - prefilled.keys())
            if which:
                layers = prefill(model, [prompts[i] for i in which])
                prefilled.update(zip(which, layers))
            for row in new:
                prompt, sample = divmod(row.index, num_samples)
                if cache is None:
                    cache = Slots(prefilled[prompt], width, slots)
                cache.fill(len(batch), prefilled[prompt], row.cached)
                batch.append(row)
                if sample == num_samples - 1:
                    del prefilled[prompt]

        # 2 step: feed one token of each row, sample the next
        state = [[row.next, row.cached, row.index, len(row.ids)]
                 for row in batch]
        state = torch.tensor(state, device=model.device)
        ids, cache.at, index, count = state.T  # (n,) each
        cache.seen = max(row.cached for row in batch) + 1
        logits = model(input_ids=ids[:, None],
                       attention_mask=visible(model, cache.at, cache.seen),
                       position_ids=cache.at[:, None],
                       past_key_values=cache, use_cache=True).logits[:, -1]
        logprobs = logits.to(precise) / (temperature or 1.0)
        logprobs = logprobs.log_softmax(-1)  # (n, V)
        if temperature:
            tokens = draw(logprobs, uniforms[index, count])
        else:
            tokens = logprobs.argmax(-1)
        picked = logprobs.gather(1, tokens[:, None])[:, 0]

        # 3 look: who has ended? The one time that the host waits
        ended = []
        drawn = torch.stack([tokens.double(), picked.double()], 1).tolist()
        for i, (row, (token, logprob)) in enumerate(zip(batch, drawn)):
            row.ids.append(int(token))
            row.logprobs.append(logprob)
            if stop(row.ids) or len(row.ids) == max_new_tokens:
                ended.append(i)

        # 4 leave: the last row takes the free place
        for i in reversed(ended):
            last = batch.pop()
            if i < len(batch):
                cache.fill(i, cache.row(len(batch)), last.cached)
                batch[i] = last
    return [(row.ids, row.logprobs) for row in rows]


def stopper(stop_ids: Collection[int], stop_seqs: Sequence[str],
            decode: Callable[[list[int]], str]) -> Callable[[list[int]], bool]:
    """stop(ids) for generate: whether the newest token is one of stop_ids or
    completes one of stop_seqs in the decoded text."""
    # tokens
    window = max((len(s.encode()) for s in stop_seqs), default=0) + 8

    def stop(ids: list[int]) -> bool:
        if ids[-1] in stop_ids:
            return True
        text = decode(ids[-window:]) if stop_seqs else ""
        return any(s in text for s in stop_seqs)

    return stop


# ---------------------------------------------------------------------------
# truncate: where the rationale ends
# ---------------------------------------------------------------------------
def truncate(ids: list[int], stop_ids: Collection[int],
             stop_seqs: Sequence[str], decode: Callable[[list[int]], str],
             ) -> tuple[int, int, bool]:
    """Where the rationale z ends in what was sampled: (n, m, finished).

    z is ids[:n]; ids[n:m] is the stop, through the token that completes it;
    not finished: n = m = len(ids). A stop token is cut before. A stop sequence
    is matched in the decoded text, the first to be complete counts, and a
    token that contains any of its first visible character is cut: z keeps the
    white space in front of it. So x⊕z is a prefix of the sampled ids."""
    length = len(ids)
    for i, token in enumerate(ids):
        if token in stop_ids:
            length = i
            break
    text = decode(ids[:length])
    ends = [text.index(s) + len(s) for s in stop_seqs if s in text]
    if not ends:
        return length, min(length + 1, len(ids)), length < len(ids)
    end = text[:min(ends)]
    m = 1 + bisect_left(range(length), True,
                        key=lambda i: decode(ids[:i + 1]).startswith(end))
    begun = decode(ids[:m])
    # one token may complete several stops: the one that starts first cuts
    start = min(begun.index(s) + len(s) - len(s.lstrip() or s)
                for s in stop_seqs if s in begun)
    n = m - 1
    while not text[:start].startswith(decode(ids[:n])):
        n -= 1
    return n, m, True


# ---------------------------------------------------------------------------
# score: rollouts → log π(z|x) and log π(y|x⊕z)
# ---------------------------------------------------------------------------
@dataclass
class Rollout:
    """One sequence x⊕z⊕y. `actions` are the sampled tokens of log π(z|x): z
    and the stop that ended it."""
    prompt: list[int]
    rationale: list[int]
    actions: list[int]
    answer: list[int]
    finished: bool = True
    # y begins with the stop, or it is one token
    stop_in_answer: bool = True
    # log π(z|x), as it was sampled
    sampler_logprob: float = math.nan

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.rationale + self.answer


def packed_attention(module, query, key, value, attention_mask, segments=None,
                     scaling=None, sliding_window=None, **kwargs):
    """Attention of a packed pass; without segments, ordinary SDPA.

    query (1, heads, T, head size), key and value with the key-value heads.
    segments: (length, parent) each, in order; the tokens of a segment see
    those of its parent (a prompt; its own index: none) and, causally, their
    own."""
    if segments is None:
        return sdpa_attention_forward(module, query, key, value,
                                      attention_mask, scaling=scaling, **kwargs)
    if kwargs.get("softcap") is not None:
        raise ValueError("soft-capped scores")
    dtype = query.dtype
    if query.device.type == "cpu" and torch.is_grad_enabled():
        # its backward pass in bfloat16 takes 2.5 times as long
        wide = torch.promote_types(dtype, torch.float32)
        query, key, value = (x.to(wide) for x in (query, key, value))
    lengths = [length for length, _ in segments]
    queries, keys, values = (x.split(lengths, 2) for x in (query, key, value))
    parts = []
    for i, (length, parent) in enumerate(segments):
        k, v, mask = keys[i], values[i], None
        if parent != i:
            k = torch.cat([keys[parent], k], 2)
            v = torch.cat([values[parent], v], 2)
        seen = k.shape[2]
        if parent != i or sliding_window and sliding_window < seen:
            mask = torch.ones(length, seen, dtype=torch.bool, device=k.device)
            mask = mask.tril(seen - length)
            if sliding_window:
                mask = mask.triu(seen - length - sliding_window + 1)
        parts.append(scaled_dot_product_attention(
            queries[i], k, v, mask, is_causal=mask is None, scale=scaling,
            enable_gqa=True))
    return torch.cat(parts, 2).transpose(1, 2).to(dtype), None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)


def pack(rollouts: list[Rollout], answers: bool, packed: bool):
    """Lay out a pass over x, then s = z⊕y of each of its rollouts.

    packed: one row of tokens, no padding, a prompt once for its neighbours;
    else a row per rollout. Returns the rows' ids and positions, the segments,
    and (rollout, z or y, row, column, token) of all that is scored: the hidden
    state at (row, column) predicts the token."""
    ids, positions, segments, scored = [], [], [], []
    prompt = None
    for i, r in enumerate(rollouts):
        x = r.prompt
        s = r.rationale + r.answer if answers else r.actions
        # the last token is predicted, not fed
        s = s[:-1]
        if not (packed and ids):
            ids.append([])
            positions.append([])
        row, tokens = len(ids) - 1, ids[-1]
        if not packed or x != prompt:
            tokens += x
            positions[-1] += range(len(x))
            prompt, last, parent = x, len(tokens) - 1, len(segments)
            segments.append((len(x), parent))
        columns = [last, *range(len(tokens), len(tokens) + len(s))]
        scored += [(i, 0, row, *at) for at in zip(columns, r.actions)]
        if answers:
            columns = columns[len(r.rationale):]
            scored += [(i, 1, row, *at) for at in zip(columns, r.answer)]
        if s:
            tokens += s
            positions[-1] += range(len(x), len(x) + len(s))
            segments.append((len(s), parent))
    return ids, positions, segments, scored


def token_logprobs(hidden: torch.Tensor, head: Callable, targets: torch.Tensor,
                   temperature: torch.Tensor | None = None,
                   chunk: int = 512) -> torch.Tensor:
    """log softmax(head(hidden) / temperature)[targets], natural log, float32
    at least; hidden (N, H), targets and temperature (N,), None is 1.

    The logits exist for `chunk` positions at a time, and are computed again
    in the backward pass: never (N, V) whole."""
    def some(hidden, targets, temperature=None):
        logits = head(hidden)  # (chunk, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if temperature is not None:
            logits = logits / temperature[:, None].to(logits.dtype)
        return -cross_entropy(logits, targets, reduction="none")

    inputs = [x for x in (hidden, targets, temperature) if x is not None]
    parts = zip(*(x.split(chunk) for x in inputs))
    return torch.cat([checkpoint(some, *part, use_reentrant=False,
                                 preserve_rng_state=False) for part in parts])


class Scorer(nn.Module):
    """A causal LM whose forward pass scores chosen tokens: the root module of
    FSDP, whose hooks need one forward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.packed = model.config._attn_implementation == "packed"
        # pushed through the model so far
        self.positions = 0

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        config = self.model.config.get_text_config()
        logits = self.model.get_output_embeddings()(hidden)
        # Cohere
        if scale := getattr(config, "logit_scale", None):
            logits = logits * scale
        # Granite
        if scale := getattr(config, "logits_scaling", None):
            logits = logits / scale
        # Gemma
        cap = getattr(config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    def forward(self, ids, positions, segments, rows, columns, targets,
                temperature=None) -> torch.Tensor:
        """log π of targets, each after ids[row, column], (N,)."""
        extra = {}
        # a 4D mask is taken as it is: none is made
        if self.packed:
            extra = {"segments": segments, "position_ids": positions,
                     "attention_mask": ids.new_zeros(1, 1, 1, 1)}
        self.positions += ids.numel()
        hidden = self.model.get_decoder()(
            input_ids=ids, use_cache=False, **extra).last_hidden_state
        hidden = hidden[rows, columns]  # (N, H)
        return token_logprobs(hidden, self.head, targets, temperature)


def score(scorer: nn.Module, rollouts: list[Rollout],
          temperature: float = 1.0, answers: bool = True) -> torch.Tensor:
    """(n, 2): log π(z|x) at `temperature` and log π(y|x⊕z) at 1, sums over
    tokens, of one pass; answers=False leaves y out. Differentiable."""
    device = next(scorer.parameters()).device
    *rows, segments, scored = pack(rollouts, answers, scorer.packed)
    ids, positions = (
        pad_sequence([torch.tensor(row) for row in x], True).to(device)
        for x in rows)  # (B, T)
    scored = torch.tensor(scored, device=device).view(-1, 5)
    rollout, kind, row, column, token = scored.T  # (N,) each
    heat = None
    if temperature != 1:
        heat = torch.tensor([temperature, 1.0], dtype=torch.float64,
                            device=device)[kind]
    logprobs = scorer(ids, positions, segments, row, column, token, heat)
    sums = logprobs.new_zeros(len(rollouts), 2)
    return sums.index_put((rollout, kind), logprobs, accumulate=True)


# ---------------------------------------------------------------------------
# evaluate: accuracy, and log-probabilities of the gold answers
# ---------------------------------------------------------------------------
def cut_rollout(example: Example, ids: list[int], stop_ids, stop_seqs,
                decode) -> Rollout:
    """Cut sampled ids where the rationale ends; the answer follows it.

    One pass over x⊕z⊕y scores the stop too where y begins with it. Of another
    stop only the first token is scored, from z's last logits."""
    n, m, finished = truncate(ids, stop_ids, stop_seqs, decode)
    answer = answer_ids(example, ids[:n], decode)
    fits = m - n <= 1 or answer[:m - n] == ids[n:m]
    actions = ids[:m] if fits else ids[:n + 1]
    return Rollout(example.prompt, ids[:n], actions, answer, finished, fits)


LABELS = {"accuracy": "greedy accuracy", "maj_at_k": "maj@k",
          "answer_logprob": "log π(y|x⊕z)", "answer_logprob_no_rationale": "log π(y|x), no rationale",
          "finished": "rationales finished", "rationale_length": "rationale length, tokens"}
RATES = {"accuracy", "maj_at_k", "finished"}


def evaluate(s, model, tokenizer, examples: list[Example], grader: str, num_samples: int,
             title: str) -> dict:
    """Greedy accuracy, self-consistency over num_samples samples, and log-probabilities of the
    gold answers, by the settings s (a Common).

    Generation ends at a stop token only, so that the answer is there to be graded; z is then cut
    by training's rule. All ranks call this and share the examples; all get the same result, rows
    in the order of `examples`."""
    decode, scorer = decoder(tokenizer), Scorer(model)
    stop_ids = stop_token_ids(tokenizer, model, s.stop_token)
    begin, end = (len(examples) * r // world_size() for r in (rank(), rank() + 1))
    mine = examples[begin:end]
    bar = tqdm(total=len(mine) * (1 + num_samples), desc=title, unit="answer", leave=False,
               disable=rank() > 0)

    def stop(ids):
        ended = ids[-1] in stop_ids or len(ids) == s.response_length
        bar.update(ended)
        return ended

    def outputs(k: int, temperature=0.0, noise=None) -> list[list[dict]]:
        """k graded outputs of each of this rank's examples."""
        sampled = generate(
            model, [e.prompt for e in mine], s.response_length, num_samples=k, stop=stop,
            temperature=temperature, uniforms=noise, batch_size=s.per_device_eval_batch_size)
        asked = [e for e in mine for _ in range(k)]
        rollouts = [cut_rollout(e, ids, stop_ids, s.stop_seqs, decode)
                    for e, (ids, _) in zip(asked, sampled)]
        graded = []
        for e, (ids, _), r, logprob in zip(
                asked, sampled, rollouts, answer_logprobs(scorer, rollouts)):
            output = decode(ids[:-1] if ids[-1] in stop_ids else ids)
            prediction, correct = grade(grader, output, e.row)
            graded.append({"output": output, "prediction": prediction, "correct": correct,
                           "finished": r.finished, "rationale_length": len(r.rationale),
                           "answer_logprob": logprob})
        return [graded[i:i + k] for i in range(0, len(graded), k)]

    greedy, sampled = outputs(1), [[]] * len(mine)
    if num_samples:
        keys = [f"{s.seed}/evaluate/{i}/{j}" for i in range(begin, end) for j in range(num_samples)]
        sampled = outputs(num_samples, s.temperature, uniform_rows(keys, s.response_length))
    bar.close()
    bare = [Rollout(e.prompt, [], [], answer_ids(e, [], decode)) for e in mine]
    rows = []
    for e, [row], samples, logprob in zip(mine, greedy, sampled, answer_logprobs(scorer, bare)):
        rows.append({"query": prompt_text(tokenizer, e.row["queries"]),
                     "groundtruth": e.row["groundtruth"], **row,
                     "answer_logprob": mean(x["answer_logprob"] for x in samples or [row]),
                     "answer_logprob_no_rationale": logprob,
                     "majority": majority(samples), "samples": samples})
    rows = gather(rows)
    columns = {"accuracy": "correct", "maj_at_k": "majority"}
    result = {"n": len(rows), "num_samples": num_samples}
    for name in LABELS if num_samples else LABELS.keys() - {"maj_at_k"}:
        result[name] = mean(row[columns.get(name, name)] for row in rows)
        if name in RATES:
            result[f"{name}_ci95"] = interval95(result[name], len(rows))
    return result | {"rows": rows}


@torch.no_grad()
def answer_logprobs(scorer: nn.Module, rollouts: list[Rollout], size: int = 16) -> list[float]:
    """log π(y|x⊕z) of each rollout; `size` rollouts a pass."""
    # z is not asked for
    rollouts = [dataclasses.replace(r, actions=[]) for r in rollouts]
    parts = [rollouts[i:i + size] for i in range(0, len(rollouts), size)]
    return [logprob for part in parts for logprob in score(scorer, part)[:, 1].tolist()]


def stop_token_ids(tokenizer, model, stop_token: str) -> set[int]:
    """Ids that end generation: `stop_token` (eos, pad or both), the end of the turn, and the EOS
    ids of the model's own generation_config."""
    own = model.generation_config.eos_token_id
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    asked = {"eos": [eos], "pad": [pad], "both": [eos, pad]}[stop_token]
    own = own if isinstance(own, list) else [own]
    return {end_of_turn_id(tokenizer), *own, *asked} - {None}


def uniform_rows(keys, length: int) -> torch.Tensor:
    """(rows, length) uniform numbers in [0, 1), float64; each row a pure function of its key."""
    rows = [[rng.random() for _ in range(length)] for rng in map(random.Random, keys)]
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), length)


def interval95(rate: float, n: int) -> list[float]:
    """Wilson's 95% score interval of a rate measured on n rows."""
    z = 1.959964
    centre, scale = rate + z * z / (2 * n), 1 + z * z / n
    half = z * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5
    return [max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)]


def majority(samples: list[dict]) -> bool:
    """Whether the most frequent prediction is right; of equally frequent ones the first counts."""
    votes = Counter(s["prediction"] for s in samples if s["prediction"] is not None)
    winners = [prediction for prediction, _ in votes.most_common(1)]
    return any(s["correct"] for s in samples if s["prediction"] in winners)


# ---------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------
def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype: what is asked for; "auto" is bfloat16 on a GPU or a CPU that has it
    natively, else float32."""
    # torch 2.11 has it not
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    native = any(cpu.get(flag) for flag in ("amx_bf16", "avx512_bf16", "bf16"))
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" or native else "float32"
    return getattr(torch, name)


def load_model(path: str, dtype, device="cpu", attn_implementation="auto", trust_remote_code=False):
    """(model, tokenizer) of a folder or hub id, weights in `dtype` ("auto": their own); "embedded":
    the random tiny model that the embedded base is trained from.

    UserError where either cannot be loaded, they do not fit together, or generate and score do not
    agree with the model's own forward pass."""
    trust = {"trust_remote_code": trust_remote_code}
    own = None if attn_implementation == "auto" else attn_implementation
    try:
        if path == "embedded":
            model, tokenizer = embedded_model()
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, **trust)
            model, info = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, use_safetensors=True, output_loading_info=True,
                attn_implementation=own, **trust)
            missing = ", ".join(sorted(info["missing_keys"])[:3])
            require(not missing, f"the weights lack {missing}")
        # special tokens may lie outside the embedding, as the image token of Gemma 3's text models
        held = model.get_input_embeddings().num_embeddings
        ordinary = [i for i, token in tokenizer.added_tokens_decoder.items() if not token.special]
        require(max([tokenizer.vocab_size - 1, *ordinary]) < held,
                f"its tokenizer has {len(tokenizer)} tokens and its embedding {held}")
        choose_attention(model.to(device).eval(), packed=own is None)
    # dozens of types: no network, a broken file, no access
    except Exception as error:
        way = "`python latro.py` makes it" if path == EMBEDDED else "give a folder or hub id"
        raise UserError(f"model {path}: cannot be used ({first_line(error)}); {way}") from None
    return model, tokenizer


def first_line(error) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


@torch.no_grad()
def choose_attention(model, packed: bool) -> None:
    """Score packed passes where that, and sampling, give what the model's plain forward pass gives;
    else keep the model's own attention and score a rollout per row. ValueError where that differs
    too: two prompts of unequal length, two continuations each, are compared."""
    # GPT-Neo, of 256 tokens
    if "local" in getattr(model.config, "attention_layers", ()):
        raise ValueError("the window of its local layers follows the longest row of a batch")
    own, rng = model.config._attn_implementation, random.Random(0)
    vocabulary = range(model.get_input_embeddings().num_embeddings)
    x, longer, *rest = (rng.choices(vocabulary, k=n) for n in (5, 9, 3, 4, 4, 3))
    rollouts = [Rollout(prompt, z, z, z[1:]) for prompt, z in zip((x, x, longer, longer), rest)]

    def plain(prompt, ids) -> float:
        """log π(ids|prompt) by the model's own forward pass."""
        logits = model(input_ids=torch.tensor([prompt + ids], device=model.device)).logits[0]
        logprobs = logits[len(prompt) - 1:-1].double().log_softmax(-1)
        return logprobs[range(len(ids)), ids].sum().item()

    expected = [plain(r.prompt, r.rationale + r.answer) for r in rollouts]
    # nats, of some 50
    tolerance = 0.01 if model.dtype.itemsize > 2 else 1.0
    for attention in ("packed", own) if packed else (own,):
        try:
            model.set_attn_implementation(attention)
            sampled = generate(model, [x, longer], 4, num_samples=2, temperature=1.0,
                               uniforms=uniform_rows("abcd", 4), batch_size=3)
            scores = score(Scorer(model), rollouts).sum(1).tolist()
            gaps = {"score": [a - b for a, b in zip(scores, expected)],
                    "generate": [sum(logprobs) - plain(r.prompt, ids)
                                 for r, (ids, logprobs) in zip(rollouts, sampled)]}
            for verb, off in gaps.items():
                off = max(map(abs, off))
                require(off <= tolerance, f"{verb} is {off:.2g} nats off its forward pass")
            return
        # it has no such attention, or reads its mask otherwise
        except Exception as error:
            if attention == own:
                raise ValueError(f"cannot be sampled and scored: {first_line(error)}") from None


# ---------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------
def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)


def gather(items: list) -> list:
    """The items of all ranks, on every rank, in the order of the ranks."""
    parts = [items] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def on_rank_0(work: Callable[[], object]):
    """work()'s result on every rank, run on rank 0 alone; what goes wrong there is raised on all:
    none waits."""
    result = error = None
    if rank() == 0:
        try:
            result = work()
        except Exception as caught:
            error = caught
    result, error = gather([(result, error)])[0]
    if error:
        raise error
    return result


def init_distributed() -> torch.device:
    """Join torchrun's process group, or make one of a single process; returns this rank's device."""
    cuda, device = torch.cuda.is_available(), torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        # it plans every new shape
        torch.backends.cuda.enable_cudnn_sdp(False)
    if not dist.is_initialized():
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        # rank 0 writes large models
        dist.init_process_group("nccl" if cuda else "gloo", **alone if "RANK" not in os.environ else {},
                                timeout=datetime.timedelta(hours=1))
    return device


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run a script's main: bad input ends in one line and exit code 2."""
    # where it cannot show a π
    sys.stdout.reconfigure(errors="replace")
    code = 0
    try:
        main(sys.argv[1:])
    except (UserError, OSError, FloatingPointError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0" or not isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        code = 1 if isinstance(error, FloatingPointError) else 2
    except SystemExit as end:
        code = end.code
    ranks = world_size()
    # else NCCL might wait for other ranks
    if dist.is_initialized() and (ranks == 1 or code == 0):
        dist.destroy_process_group()
    # a thread of gloo's outlives the group, and would abort an orderly shutdown
    if ranks > 1:
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


# ---------------------------------------------------------------------------
# Settings: defaults < YAML < command line
# ---------------------------------------------------------------------------
@dataclass
class Common:
    """What training and evaluation both take. The comment above a key is its --help."""
    # one of cups, gsm8k, arc_challenge, arc_challenge_direct, math, jsonl
    dataset_name: str | None = None
    # a local folder or file of the same columns in place of the hub
    dataset_path: str | None = None
    # how answers are compared; default: the dataset's
    grader: str | None = None
    # rows that are evaluated, the first ones; training takes all
    limit: int | None = None
    # samples per question for maj@k and log π(y|x⊕z) in the table; 0: greedy only
    num_samples: int = 0
    # L, tokens of a rationale at most
    response_length: int = 500
    # that rationales are sampled and scored at
    temperature: float = 1.0
    # besides the end of the turn: eos, pad or both
    stop_token: Literal["eos", "pad", "both"] = "eos"
    # strings that end a rationale, wherever the tokenizer splits them
    stop_seqs: list[str] = field(default_factory=lambda: ["The answer is"])
    # rows decoded together in evaluation
    per_device_eval_batch_size: int = 64
    # of the arithmetic; auto: bfloat16 where the GPU or CPU has it, else float32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # auto: packed passes, each prompt once, where the model allows it
    attn_implementation: str = "auto"
    # run the model repository's own Python code
    trust_remote_code: bool = False
    # of sampling and, in training, of the data's order
    seed: int = 0

    may_be_0 = {"num_samples", "temperature", "seed", "few_shot"}

    def __post_init__(self):
        for name, value in vars(self).items():
            if type(value) in (int, float) and not (value == 0 and name in self.may_be_0):
                require(0 < value < math.inf, f"{name}: {value} is no number above 0")
        require(self.temperature or not self.num_samples,
                "temperature: 0 makes all num_samples samples the same")
        require("" not in self.stop_seqs, "stop_seqs: an empty string would end every rationale")


@dataclass
class Settings(Common):
    # folder or hub id; default: the newest run under runs/, its base beside its best
    model: str | None = None
    # train, validation, test or all; default: test, all of a single file
    split: str | None = None
    # worked examples in the prompt, 0 to 8 (gsm8k)
    few_shot: int = 0
    # JSON file of --model's result; default: evaluation-NAME….json in its run, or here
    out: str | None = None


def describe(cls: type) -> dict[str, str]:
    """What each key means: the comment above it."""
    source = "".join(inspect.getsource(part) for part in cls.__mro__[-2::-1])
    return {name: comment for comment, name in re.findall(r"    # (.+)\n    (\w+): ", source)}


def convert(kind, value):
    """A value of YAML, or a word of a command line, as a field's type; ValueError where it is none."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    # … | None
    if origin is types.UnionType:
        return None if value in (None, "none", "null") else convert(inner[0], value)
    if origin is list:
        return [str(word) for word in (value if isinstance(value, list) else [value] if value else [])]
    if origin is Literal:
        return inner[inner.index(value)]
    return ("false", "true").index(str(value).lower()) == 1 if kind is bool else kind(str(value))


def settle(cls: type, *layers: dict):
    """Settings of the dataclass cls: its defaults < the layers. UserError names an unknown key and
    the nearest known one, or the key whose value has the wrong type."""
    kinds, values = {f.name: f.type for f in dataclasses.fields(cls)}, {}
    for name, value in (pair for layer in layers for pair in layer.items()):
        near = difflib.get_close_matches(name, kinds, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else "--help lists all"
        require(name in kinds, f"{name}: unknown key; {hint}")
        try:
            values[name] = convert(kinds[name], value)
        except ValueError:
            kind = str(getattr(kinds[name], "__name__", kinds[name])).removeprefix("typing.")
            raise UserError(f"{name}: {value!r} is not of the kind {kind}") from None
    return cls(**values)


def parse(cls: type, argv: list[str], doc: str) -> dict:
    """The keys of a command line, --key value or --key=value; a list takes all words up to the next
    key. --help prints `doc` and every key."""
    if "--help" in argv:
        defaults, keys = vars(cls()), describe(cls)
        print(doc, *(f"  --{k:<29} {keys[k]} [{defaults[k]}]" for k in keys), sep="\n")
        sys.exit()
    given = {}
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            given[name] = [value] if equals else []
        else:
            require(given, f"{word}: keys begin with --")
            given[name].append(word)
    for name in given.keys() - {"stop_seqs"}:
        require(len(given[name]) == 1, f"{name}: takes one value, not {len(given[name])}")
        [given[name]] = given[name]
    return given


def read_yaml(path: str) -> dict:
    """The keys of a YAML file; UserError where it holds anything else."""
    try:
        return dict(yaml.safe_load(Path(path).read_text("utf-8")) or {})
    except (OSError, yaml.YAMLError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as lines of `key: value` ({reason})") from None


# ---------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------
def is_run(folder) -> bool:
    """Whether latro.py made a folder: a config.yaml alone may be anybody's."""
    return exists(f"{folder}/config.yaml") and exists(f"{folder}/metrics.jsonl")


def newest_run() -> str:
    """The newest run that holds a trained model; the embedded base, which all start from, is none."""
    runs = [run for run in map(dirname, glob.glob("runs/*/best")) if is_run(run)]
    runs = [run for run in runs if run != dirname(EMBEDDED)]
    require(runs, "no trained run under runs/: `python latro.py` trains one, --model names a model")
    return max(runs, key=lambda run: os.path.getmtime(f"{run}/config.yaml"))


def main(argv: list[str]) -> None:
    """Evaluate --model, or the base beside the best model of the newest run. The settings of the
    run count where the command line says nothing."""
    given, config = parse(Settings, argv, __doc__), {}
    model = given.get("model")
    require(not is_run(model), f"model {model}: a run, not a model; give {model}/best")
    run = dirname(os.path.normpath(model)) if model else newest_run()
    if is_run(run):
        config = read_yaml(f"{run}/config.yaml")
    base = config.pop("model_name_or_path", None)
    keys = {f.name for f in dataclasses.fields(Common)} - {"seed"}
    if given.get("dataset_name", config.get("dataset_name")) != config.get("dataset_name"):
        # they are of the run's own dataset
        keys -= {"dataset_path", "grader", "limit"}
    s = settle(Settings, {k: v for k, v in config.items() if k in keys}, given)
    require(s.dataset_name, f"dataset_name: which one? {', '.join(DATASETS)}")
    # what is asked for beside the run's own evaluation is in the name: nothing is overwritten
    part = [str(given[k]) for k in ("dataset_name", "split", "few_shot", "limit") if k in given]
    out = s.out or f"{run if config else '.'}/{'-'.join(['evaluation', '{}', *part])}.json"
    require(model or not s.out, f"out {out}: needs --model")
    require(isdir(dirname(out) or ".") and not isdir(out), f"out {out}: no file in a folder that exists")
    split = s.split or ("all" if isfile(s.dataset_path or "") else "test")
    rows = load_rows(s.dataset_name, split, s.dataset_path, s.few_shot)
    grader = choose_grader(s.grader, s.dataset_name, rows)
    init_distributed()
    if config:
        say(f"settings: those of {run}, but for the command line's")
    check_rows(rows, grader)
    models = {"base": base, "best": f"{run}/best"}
    if model:
        models = {basename(os.path.normpath(model)): model}
    judge(s, models, rows, grader, split, out)


def check_rows(rows: list[dict], grader: str) -> None:
    """Say which gold responses their grader calls wrong."""
    wrong, row = check_gold(rows, grader)
    if wrong:
        say(f"warning: the grader {grader} calls {wrong} of {len(rows)} gold responses wrong; the first "
            f"is {row['responses']!r}, groundtruth {row['groundtruth']!r}")


def judge(s, models: dict[str, str], rows: list[dict], grader: str, split: str, out: str) -> None:
    """Evaluate models, {label: path}, on the same rows by the settings s (a Common); write each
    one's JSON to out.format(label), print the table."""
    device, results = init_distributed(), {}
    dtype = resolve_dtype(s.dtype, device)
    for label, path in models.items():
        model, tokenizer = load_model(path, dtype, device, s.attn_implementation, s.trust_remote_code)
        examples = make_examples(tokenizer, rows[:s.limit], context_left(model, s.response_length))
        results[label] = {"model": path, "dataset": s.dataset_name, "split": split} | evaluate(
            s, model, tokenizer, examples, grader, s.num_samples, label)
        # one at a time is held
        del model
    if rank() == 0:
        # before anything is printed: the pipe may be closed
        for label, result in results.items():
            text = json.dumps(result, indent=1, ensure_ascii=False)
            Path(out.format(label)).write_text(text, "utf-8")
        print_results(results)
        for label in results:
            print(f"{label}: every row in {out.format(label)}")


def closing_split(dataset_path) -> str:
    """What a run's closing table is made of: a single file has no test rows."""
    return "validation" if isfile(dataset_path or "") else "test"


def context_left(model, response_length: int) -> int | None:
    """Tokens that the model's context leaves for x⊕y beside a rationale."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return context and context - response_length


def print_results(results: dict[str, dict]) -> None:
    """The table of evaluations of the same rows, side by side, and a few answers of each."""
    first = next(iter(results.values()))
    labels = LABELS | {"maj_at_k": f"maj@{first['num_samples']}"}
    print(f"\n{first['split']}: {first['n']} questions; rates with their 95% interval")
    print(f"  {'':<29}" + "".join(f"{name:>24}" for name in results))
    for name in filter(first.__contains__, labels):
        line = f"  {labels[name]:<29}"
        for result in results.values():
            low, high = result.get(f"{name}_ci95", (0, 0))
            cell = f"{result[name]:.1%} [{low:.1%}, {high:.1%}]" if high else f"{result[name]:.3f}"
            line += f"{cell:>24}"
        print(line)
    for i, row in enumerate(first["rows"][:2]):
        print(f"\n  Q: {row['query'].strip()}\n  gold: {row['groundtruth']}")
        for name, result in results.items():
            row = result["rows"][i]
            print(f"  {name} ({'right' if row['correct'] else 'wrong'}): {row['output'].strip()}")
    print(flush=True)


if __name__ == "__main__":
    run_script(main)
