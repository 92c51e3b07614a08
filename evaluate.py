"""What is judged: sample rationales, cut them, score text, measure accuracy.

    python evaluate.py                        the newest run: its base beside its best
    python evaluate.py --model DIR_OR_HUB_ID --dataset_name gsm8k --num_samples 8
    torchrun --nproc_per_node 8 evaluate.py --model …        the ranks share the rows

Everything that touches a model is one of two verbs, in training and here:

    generate   prompts → sampled token ids and their log-probabilities
    score      rollouts → log π(z|x) and log π(y|x⊕z), each prompt once

Training evaluates with the `evaluate` below, so the two cannot disagree.
"""
import atexit
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
import traceback
import types
import typing
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
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

from data import (DATASETS, EMBEDDED, Example, UserError, answer_ids, choose_grader, decoder,
                  embedded_model, end_of_turn_id, grade, load_rows, make_examples, prompt_text)

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()  # ours show the long work
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
    ids: list[int] = field(default_factory=list)  # sampled
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
        self.seen = 0  # slots that some row looks at
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
    waiting = rows[::-1] if max_new_tokens else []  # the next one is the last
    batch: list[Row] = []  # batch[i] has row i of the cache
    prefilled: dict[int, list] = {}  # by prompt, while samples of it wait
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
    window = max((len(s.encode()) for s in stop_seqs), default=0) + 8  # tokens

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
    stop_in_answer: bool = True  # y begins with the stop, or it is one token
    sampler_logprob: float = math.nan  # log π(z|x), as it was sampled

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
        s = s[:-1]  # the last token is predicted, not fed
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
        self.positions = 0  # pushed through the model so far

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        config = self.model.config.get_text_config()
        logits = self.model.get_output_embeddings()(hidden)
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if scale := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / scale
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma
        return cap * torch.tanh(logits / cap) if cap else logits

    def forward(self, ids, positions, segments, rows, columns, targets,
                temperature=None) -> torch.Tensor:
        """log π of targets, each after ids[row, column], (N,)."""
        extra = {}
        if self.packed:  # a 4D mask is taken as it is: none is made
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


RATES = ("accuracy", "maj_at_k", "finished")


def evaluate(model: nn.Module, tokenizer, examples: list[Example], grader: str, *,
             response_length: int, num_samples: int = 0, temperature: float = 1.0,
             stop_token: str = "eos", stop_seqs: Sequence[str] = (), batch_size: int = 64,
             seed: int = 0, title: str = "") -> dict:
    """Greedy accuracy, self-consistency over num_samples samples, and log-probabilities of the
    gold answers.

    Generation ends at a stop token only, so that the answer is there to be graded; z is then cut
    by training's rule. All ranks call this and share the examples; all get the same result, rows
    in the order of `examples`."""
    decode, scorer = decoder(tokenizer), Scorer(model)
    stop_ids = stop_token_ids(tokenizer, model, stop_token)
    mine = range(rank(), len(examples), world_size())
    some = [examples[i] for i in mine]
    bar = tqdm(total=len(some) * (1 + num_samples), desc=title, unit="answer", leave=False,
               disable=rank() > 0)

    def stop(ids: list[int]) -> bool:
        ended = ids[-1] in stop_ids or len(ids) == response_length
        bar.update(ended)
        return ended

    def outputs(k: int, heat: float = 0.0, noise=None) -> list[list[dict]]:
        """k graded outputs of each of this rank's examples."""
        sampled = generate(model, [e.prompt for e in some], response_length, num_samples=k,
                           temperature=heat, uniforms=noise, stop=stop, batch_size=batch_size)
        rollouts = [cut_rollout(some[i // k], ids, stop_ids, stop_seqs, decode)
                    for i, (ids, _) in enumerate(sampled)]
        graded = []
        for r, logprob in zip(rollouts, answer_logprobs(scorer, rollouts)):
            ids, _ = sampled[len(graded)]
            output = decode(ids[:-1] if ids[-1] in stop_ids else ids)
            prediction, correct = grade(grader, output, some[len(graded) // k].row)
            graded.append({"output": output, "prediction": prediction, "correct": correct,
                           "finished": r.finished, "rationale_length": len(r.rationale),
                           "answer_logprob": logprob})
        return [graded[i:i + k] for i in range(0, len(graded), k)]

    greedy, sampled = outputs(1), [[]] * len(some)
    if num_samples:
        keys = [f"{seed}/evaluate/{i}/{j}" for i in mine for j in range(num_samples)]
        sampled = outputs(num_samples, temperature, uniform_rows(keys, response_length))
    bar.close()
    bare = answer_logprobs(scorer, [
        Rollout(e.prompt, [], [], answer_ids(e, [], decode)) for e in some])
    rows = []
    for e, [row], samples, logprob in zip(some, greedy, sampled, bare):
        rows.append({"query": prompt_text(tokenizer, e.row["queries"]),
                     "groundtruth": e.row["groundtruth"], **row,
                     "answer_logprob": mean(s["answer_logprob"] for s in samples or [row]),
                     "answer_logprob_no_rationale": logprob,
                     "majority": majority(samples), "samples": samples})
    rows = [row for _, row in sorted(gather([*zip(mine, rows)]), key=lambda pair: pair[0])]
    result = {"n": len(rows), "num_samples": num_samples}
    names = {"accuracy": "correct", "finished": "finished", "rationale_length": "rationale_length",
             "answer_logprob": "answer_logprob",
             "answer_logprob_no_rationale": "answer_logprob_no_rationale"}
    if num_samples:
        names["maj_at_k"] = "majority"
    result |= {name: mean(row[column] for row in rows) for name, column in names.items()}
    result |= {f"{name}_ci95": interval95(result[name], len(rows))
               for name in RATES if name in result}
    return result | {"rows": rows}


@torch.no_grad()
def answer_logprobs(scorer: nn.Module, rollouts: list[Rollout], size: int = 16) -> list[float]:
    """log π(y|x⊕z) of each rollout; `size` rollouts a pass."""
    rollouts = [dataclasses.replace(r, actions=[]) for r in rollouts]  # z is not asked for
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


def uniform_rows(keys: Sequence[str], length: int) -> torch.Tensor:
    """(rows, length) uniform numbers in [0, 1), float64; each row a pure function of its key."""
    rows = [[generator.random() for _ in range(length)] for generator in map(random.Random, keys)]
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
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 has it not
    native = any(cpu.get(flag) for flag in ("amx_bf16", "avx512_bf16", "bf16"))
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" or native else "float32"
    return getattr(torch, name)


def load_model(path: str, dtype: torch.dtype | str, device: torch.device | str = "cpu",
               attn_implementation: str = "auto", trust_remote_code: bool = False):
    """(model, tokenizer) of a folder or hub id, weights in `dtype` ("auto": their own); "embedded":
    the random tiny model that the embedded base is trained from.

    UserError where either cannot be loaded, they do not fit together, or generate and score do not
    agree with the model's own forward pass."""
    looks_local = path.startswith((".", "/", "~", "runs/")) or path.count("/") > 1
    if not os.path.isdir(path) and (looks_local or os.path.exists(path)):
        made = "; `python latro.py` makes it" if path == EMBEDDED else ""
        raise UserError(f"model {path}: no such folder{made}")
    own = None if attn_implementation == "auto" else attn_implementation
    try:
        if path == "embedded":
            model, tokenizer = embedded_model()
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
            model, info = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True,
                output_loading_info=True, attn_implementation=own)
            if info["missing_keys"]:
                raise ValueError(f"the weights lack {', '.join(sorted(info['missing_keys'])[:3])}")
        model.to(device).eval()
        choose_attention(model, packed=own is None)
    except Exception as error:  # dozens of types: no network, a broken file, no access
        raise UserError(f"model {path}: cannot be used ({first_line(error)}); give the folder or "
                        "hub id of a causal language model") from None
    held = model.get_input_embeddings().num_embeddings
    # special tokens may lie outside, as Gemma 3's image token in its text models
    ordinary = [i for i, token in tokenizer.added_tokens_decoder.items() if not token.special]
    if max([tokenizer.vocab_size - 1, *ordinary]) >= held:
        raise UserError(f"model {path}: its tokenizer has {len(tokenizer)} tokens and its "
                        f"embedding {held}; they do not belong together")
    return model, tokenizer


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


@torch.no_grad()
def choose_attention(model: nn.Module, packed: bool) -> None:
    """Score packed passes where that, and sampling, give what the model's plain forward pass gives;
    else keep the model's own attention and score a rollout per row. ValueError where that differs
    too: two prompts of unequal length, two continuations each, are compared."""
    if "local" in getattr(model.config, "attention_layers", ()):  # GPT-Neo, of 256 tokens
        raise ValueError("the window of its local layers follows the longest row of a batch")
    own, rng = model.config._attn_implementation, random.Random(0)
    vocabulary = range(model.get_input_embeddings().num_embeddings)
    x, longer, *rest = (rng.choices(vocabulary, k=n) for n in (5, 9, 3, 4, 3, 4))
    rollouts = [Rollout(x, z, z, z[::-1]) for z in rest[:2]]
    rollouts += [Rollout(longer, z, z, z[::-1]) for z in rest[2:]]

    def plain(prompt: list[int], ids: list[int]) -> float:
        """log π(ids|prompt) by the model's own forward pass."""
        tokens = torch.tensor([prompt + ids], device=model.device)
        logprobs = model(input_ids=tokens).logits[0].double().log_softmax(-1)
        return logprobs[range(len(prompt) - 1, len(prompt) + len(ids) - 1), ids].sum().item()

    expected = [plain(r.prompt, r.rationale + r.answer) for r in rollouts]
    tolerance = 0.01 if model.dtype.itemsize > 2 else 1.0  # nats, of some 50
    for attention in ("packed", own) if packed else (own,):
        try:
            model.set_attn_implementation(attention)
            sampled = generate(model, [x, longer], 4, num_samples=2, temperature=1.0,
                               uniforms=uniform_rows("abcd", 4), batch_size=3)
            pairs = {"score": zip(score(Scorer(model), rollouts).sum(1).tolist(), expected),
                     "generate": [(sum(logprobs), plain(r.prompt, ids))
                                  for r, (ids, logprobs) in zip(rollouts, sampled)]}
            for verb, numbers in pairs.items():
                gap = max(abs(a - b) for a, b in numbers)
                if not gap <= tolerance:
                    raise ValueError(f"{verb} is off by {gap:.2g} nats from its forward pass")
            return
        except Exception as error:  # it has no such attention, or reads its mask otherwise
            if attention == own:
                raise ValueError(f"it cannot be sampled or scored: {first_line(error)}") from None


# ---------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------
def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(items: list) -> list:
    """The items of all ranks, on every rank, in the order of the ranks."""
    parts: list = [items] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def on_rank_0(work: Callable[[], object]):
    """work()'s result on every rank, run on rank 0 alone; what goes wrong there is raised on all:
    none waits."""
    outcome: list = [None, None]
    if rank() == 0:
        try:
            outcome[0] = work()
        except (UserError, OSError) as error:
            outcome[1] = str(error)
    if world_size() > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def init_distributed() -> torch.device:
    """Join torchrun's process group, or make one of a single process; returns this rank's device."""
    cuda, device = torch.cuda.is_available(), torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans every new shape
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {
            "store": dist.HashStore(), "rank": 0, "world_size": 1}
        wait = datetime.timedelta(hours=1)  # for rank 0, which may write a large model
        dist.init_process_group("nccl" if cuda else "gloo", timeout=wait, **alone)
    return device


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run a script's main: bad input ends in one line and exit code 2."""
    code = 0
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # where it cannot show a π
    try:
        main(sys.argv[1:])
    except (UserError, OSError, FloatingPointError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0" or not isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        code = 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:  # outside the training loop, which finishes its step
        code = 130
    except SystemExit as end:
        code = end.code
    except Exception:
        traceback.print_exc()
        code = 1
    ranks = world_size()
    if dist.is_initialized() and (ranks == 1 or code == 0):  # else NCCL might wait for other ranks
        dist.destroy_process_group()
    if ranks > 1:  # a thread of gloo's outlives the group, and would abort an orderly shutdown
        atexit._run_exitfuncs()
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
            if type(value) in (int, float) and not 0 < value < math.inf:
                if value != 0 or name not in self.may_be_0:
                    raise UserError(f"{name}: {value} is not a number above 0")
        if self.num_samples and not self.temperature:
            raise UserError("temperature: 0 makes all num_samples samples the same; use more")
        if "" in self.stop_seqs:
            raise UserError("stop_seqs: an empty string would end every rationale at once")


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

    def __post_init__(self):
        super().__post_init__()
        out = self.out or "out.json"
        if self.out and self.model is None:
            raise UserError(f"out {out}: needs --model")
        if os.path.isdir(out) or not os.path.isdir(os.path.dirname(out) or "."):
            raise UserError(f"out {out}: not a file in a folder that exists")


def describe(cls: type) -> dict[str, str]:
    """What each key means: the comment above it."""
    source = "".join(inspect.getsource(part) for part in cls.__mro__[-2::-1])
    return {name: comment for comment, name in re.findall(r"    # (.+)\n    (\w+): ", source)}


def convert(kind, value):
    """A value of YAML, or a word of a command line, as a field's type; ValueError or KeyError
    where it is none."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # … | None
        return None if str(value).lower() in ("none", "null") else convert(inner[0], value)
    if origin is list:
        words = value if isinstance(value, list) else [value]
        return [str(word) for word in words if word is not None]
    if origin is Literal:
        return dict(zip(inner, inner))[value]
    return {"true": True, "false": False}[str(value).lower()] if kind is bool else kind(str(value))


def settle(cls: type, *layers: dict):
    """Settings of the dataclass cls: its defaults < the layers. UserError names an unknown key and
    the nearest known one, or the key whose value has the wrong type."""
    kinds, values = {f.name: f.type for f in dataclasses.fields(cls)}, {}
    for name, value in (pair for layer in layers for pair in layer.items()):
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else "--help lists all"
            raise UserError(f"{name}: unknown key; {hint}")
        try:
            values[name] = convert(kinds[name], value)
        except (ValueError, KeyError):
            kind = str(getattr(kinds[name], "__name__", kinds[name])).removeprefix("typing.")
            raise UserError(f"{name}: {value!r} is not of the kind {kind}") from None
    return cls(**values)


def parse(cls: type, argv: list[str], doc: str) -> dict:
    """The keys of a command line, --key value or --key=value; a list takes all words up to the next
    key. --help prints `doc` and every key."""
    if {"--help", "-h"} & {*argv}:
        defaults, keys = vars(cls()), describe(cls)
        print(doc, *(f"  --{k:<29} {keys[k]} [{defaults[k]}]" for k in keys), sep="\n")
        raise SystemExit(0)
    given: dict = {}
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            given[name] = [value] if equals else []
        elif not given:
            raise UserError(f"{word}: keys begin with --")
        else:
            given[name].append(word)
    for name in given.keys() - {"stop_seqs"}:
        if len(given[name]) != 1:
            raise UserError(f"{name}: takes one value, not {' '.join(given[name]) or 'none'}")
        [given[name]] = given[name]
    return given


def read_yaml(path: str) -> dict:
    """The keys of a YAML file; UserError where it holds anything else."""
    try:
        with open(path, encoding="utf-8") as file:
            return dict(yaml.safe_load(file) or {})
    except (OSError, yaml.YAMLError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as lines of `key: value` ({reason})") from None


# ---------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------
def is_run(folder: str) -> bool:
    """Whether latro.py made a folder: a config.yaml alone may be anybody's."""
    return {"config.yaml", "metrics.jsonl"} <= {*(os.listdir(folder) if os.path.isdir(folder) else ())}


def newest_run() -> str:
    """The newest run that holds a trained model; the embedded base, which all start from, is none."""
    runs = [os.path.dirname(path) for path in glob.glob("runs/*/best")]
    runs = [run for run in runs if is_run(run) and run != os.path.dirname(EMBEDDED)]
    if not runs:
        raise UserError("no trained run under runs/; train one with `python latro.py`, or name a "
                        "model with --model")
    return max(runs, key=lambda run: os.path.getmtime(f"{run}/config.yaml"))


def main(argv: list[str]) -> None:
    """Evaluate --model, or the base beside the best model of the newest run, whose settings count
    where the command line says nothing."""
    given = parse(Settings, argv, __doc__)
    model, config, inherited = given.get("model"), {}, {}
    run = os.path.dirname(os.path.normpath(model)) if model else newest_run()
    if is_run(model or ""):
        raise UserError(f"model {model}: a run, not a model; give {os.path.join(model, 'best')}")
    if is_run(run):
        config = read_yaml(os.path.join(run, "config.yaml"))
        names = {f.name for f in dataclasses.fields(Common)} - {"seed"}
        if given.get("dataset_name") not in (None, config["dataset_name"]):
            names -= {"dataset_path", "grader", "limit"}  # they are of the run's own dataset
        inherited = {k: v for k, v in config.items() if k in names}
    judge(settle(Settings, inherited, given), run, config)


def judge(s: Settings, run: str, config: dict) -> None:
    """Evaluate s.model, or the base beside the best model of a run with that config; write the JSON
    of each and print the table."""
    if s.dataset_name is None:
        raise UserError(f"dataset_name: which one? {', '.join(DATASETS)}")
    device, closing = init_distributed(), closing_split(s.dataset_path)
    if config and rank() == 0:
        print(f"settings: those of {run}, but for the command line's")
    split = s.split or ("all" if closing == "validation" else "test")
    rows = load_rows(s.dataset_name, split, s.dataset_path, s.few_shot)
    grader = choose_grader(s.grader, s.dataset_name, rows)
    models, results = {os.path.basename(os.path.normpath(s.model or "")): s.model}, {}
    if s.model is None:
        models = {"base": config["model_name_or_path"], "best": os.path.join(run, "best")}
    for label, path in models.items():
        dtype = resolve_dtype(s.dtype, device)
        model, tokenizer = load_model(path, dtype, device, s.attn_implementation, s.trust_remote_code)
        room = context_left(model, s.response_length)
        results[label] = {"model": path, "dataset": s.dataset_name, "split": split} | evaluate(
            model, tokenizer, make_examples(tokenizer, rows[:s.limit], room), grader,
            response_length=s.response_length, num_samples=s.num_samples, seed=s.seed, title=label,
            temperature=s.temperature, stop_token=s.stop_token, stop_seqs=s.stop_seqs,
            batch_size=s.per_device_eval_batch_size)
        del model  # one at a time is held
    if rank() > 0:
        return
    part = f"-{s.dataset_name}" if s.dataset_name != config.get("dataset_name", s.dataset_name) else ""
    part += f"-{split}" if split != closing else ""
    part += f"-{s.few_shot}-shot" if s.few_shot else ""
    part += f"-{s.limit}" if s.limit != config.get("limit") else ""  # else a name of its own
    outs = {label: s.out or os.path.join(run if config else ".", f"evaluation-{label}{part}.json")
            for label in results}
    for label, out in outs.items():  # before anything is printed: the pipe may be closed
        with open(out, "w", encoding="utf-8") as file:
            json.dump(results[label], file, indent=1, ensure_ascii=False)
    print_results(results)
    print("\n".join(f"{label}: every row in {out}" for label, out in outs.items()))


def closing_split(dataset_path: str | None) -> str:
    """What a run's closing table is made of: a single file has no test rows."""
    return "validation" if os.path.isfile(dataset_path or "") else "test"


def context_left(model: nn.Module, response_length: int) -> int | None:
    """Tokens that the model's context leaves for x⊕y beside a rationale."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return context and context - response_length


def print_results(results: dict[str, dict]) -> None:
    """The table of evaluations of the same rows, side by side, and a few answers of each."""
    first = next(iter(results.values()))
    labels = {"accuracy": "greedy accuracy", "maj_at_k": f"maj@{first['num_samples']}",
              "answer_logprob": "log π(y|x⊕z)", "answer_logprob_no_rationale": "log π(y|x), no rationale",
              "finished": "rationales finished", "rationale_length": "rationale length, tokens"}

    def cell(result: dict, name: str) -> str:
        low, high = result.get(f"{name}_ci95", (0, 0))
        return f"{result[name]:.1%} [{low:.1%}, {high:.1%}]" if name in RATES else f"{result[name]:.3f}"

    print(f"\n{first['split']}: {first['n']} questions; rates with their 95% interval")
    print(" " * 31 + "".join(f"{name:>24}" for name in results))
    for name in (name for name in labels if name in first):
        cells = "".join(f"{cell(result, name):>24}" for result in results.values())
        print(f"  {labels[name]:<29}{cells}")
    for i, row in enumerate(first["rows"][:2]):
        print(f"\n  Q: {row['query'].strip()}\n  gold: {row['groundtruth']}")
        for name, result in results.items():
            row = result["rows"][i]
            verdict = "right" if row["correct"] else "wrong"
            print(f"  {name} ({verdict}): {row['output'].strip()}")
    print(flush=True)


if __name__ == "__main__":
    run_script(main)
