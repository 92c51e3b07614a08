"""What is judged: sample rationales, cut them, score text, measure accuracy.

    python evaluate.py                        the newest run: its base beside its best
    python evaluate.py --model DIR_OR_HUB_ID --dataset_name gsm8k --num_samples 8
    torchrun --nproc_per_node 8 evaluate.py --model …        the ranks share the rows

Everything that touches a model is one of two verbs, in training and here:

    generate   prompts → sampled token ids and their log-probabilities
    score      rollouts → log π(z|x) and log π(y|x⊕z), each prompt once

Training evaluates with the `evaluate` below, so the two cannot disagree.
"""
import difflib
import functools
import inspect
import json
import math
import os
import random
import re
import sys
import warnings
import weakref
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import accumulate, chain, zip_longest
from os.path import dirname, exists, isdir, isfile
from pathlib import Path
from statistics import fmean as mean
from typing import Literal, get_args, get_type_hints
from zlib import crc32

import torch
import torch.distributed as dist
import transformers
import yaml
from torch import nn
from torch.distributed import get_rank as rank, get_world_size as world_size
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from data import (EMBEDDED, Example, UserError, answer_ids, choose_grader, decoder, embedded_model, encode,
                  end_of_turn_id, first_line, grade, load_rows, make_examples, prompt_text, require, user)

# bars for the long work are ours
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
# On a CPU, read at their first use: large tensors lie in huge pages, and oneDNN
# and PyTorch's layer over it keep 100 kernels of as many shapes, not 1,024,
# with which memory in use would grow for 100 updates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
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
    noise: list[float]
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
    """Keys and values of all rows, written in place: two tensors a layer,
    (width, heads, slots, head size)."""

    def __init__(self, like: list[torch.Tensor], width: int, slots: int):
        super().__init__(layers=[])
        self.tensors = [x.new_zeros(width, len(x), slots, x.shape[2]) for x in like]
        # (n,) each: the rows of this step, and the slots that they write; how
        # many slots the row that sees most sees
        self.at, self.seen = None, 0

    def update(self, keys, values, layer: int, *args, **kwargs):
        """Write the step's keys and values (n, heads, 1, head size)."""
        rows, places = self.at
        pair = self.tensors[2 * layer:2 * layer + 2]
        for slots, new in zip(pair, (keys, values)):
            slots[rows, :, places] = new[:, :, 0]
        return [slots[:len(keys), :, :self.seen] for slots in pair]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.seen - 1

    def row(self, i: int) -> list[torch.Tensor]:
        return [slots[i] for slots in self.tensors]

    def fill(self, i: int, other: list[torch.Tensor], length: int) -> None:
        """Give row i the first `length` slots of another row."""
        for mine, x in zip(self.row(i), other):
            mine[:, :length] = x[:, :length]


def prefill(model, prompts: list[list[int]]) -> list[list[torch.Tensor]]:
    """A row of keys and values (heads, T, head size) for each prompt.

    Padded on the right: causality keeps the padding out."""
    ids = pad_sequence([torch.tensor(p) for p in prompts], batch_first=True)
    cache = Cache(layer_class_to_replicate=DynamicLayer)
    model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    pairs = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    return [[x[i] for x in pairs] for i in range(len(prompts))]


def visible(model, last: torch.Tensor, slots: int):
    """What a step adds to its scores, (n, 1, 1, slots): 0 where row i sees a
    slot, up to last[i] and as many as its window holds, else very little. A
    dict by kind of layer where the model has several."""
    config = model.config.get_text_config()
    slot = torch.arange(slots, device=last.device)
    hidden = {"full_attention": slot > last[:, None]}
    if window := getattr(config, "sliding_window", None):
        far = slot <= last[:, None] - window
        hidden["sliding_attention"] = hidden["full_attention"] | far
    lowest = torch.finfo(model.dtype).min
    masks = {kind: torch.zeros_like(x, dtype=model.dtype).masked_fill(
                 x, lowest)[:, None, None] for kind, x in hidden.items()}
    kinds = set(getattr(config, "layer_types", None) or [list(masks)[-1]])
    return masks if len(kinds) > 1 else masks[kinds.pop()]


def draw(logprobs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Invert the CDF of each row (n, V) at a uniform number (n,)."""
    cdf = logprobs.exp().cumsum(-1, dtype=torch.float64)
    at = uniforms[:, None] * cdf[:, -1:]
    tokens = torch.searchsorted(cdf, at, right=True)[:, 0]
    return tokens.clamp(max=cdf.shape[1] - 1)


def step(model, cache: Slots, state: torch.Tensor, temperature: float):
    """Feed each row a token and sample its next: of state (n, 3), the token,
    its slot and a uniform number, to (n, 2), a token and its log-probability.

    Of tensors on the device alone: nothing in it waits for their values."""
    ids, places = state[:, :2].long().T
    cache.at = torch.arange(len(ids), device=ids.device), places
    logits = model(input_ids=ids[:, None],
                   attention_mask=visible(model, places, cache.seen),
                   position_ids=places[:, None],
                   past_key_values=cache, use_cache=True).logits[:, -1]
    precise = torch.promote_types(logits.dtype, torch.float32)
    logprobs = logits.to(precise) / (temperature or 1.0)
    logprobs = logprobs.log_softmax(-1)  # (n, V)
    tokens = draw(logprobs, state[:, 2]) if temperature else logprobs.argmax(-1)
    picked = logprobs.gather(1, tokens[:, None])[:, 0]
    return torch.stack([tokens.double(), picked.double()], 1)


@torch.inference_mode()
def generate(
    model: nn.Module, prompts: list[list[int]], max_new_tokens: int, *,
    num_samples: int = 1, temperature: float = 0.0,
    uniforms: torch.Tensor | None = None,
    stop: Callable[[list[int]], bool] = lambda ids: False,
    batch_size: int | None = None, capture: bool | None = None,
) -> list[tuple[list[int], list[float]]]:
    """Sample num_samples continuations of each prompt, with a KV cache and
    continuous batching: a row that ends leaves, a waiting row takes its place.

    model: a transformers causal LM. temperature: 0 is greedy. uniforms:
    (rows, max_new_tokens) in [0, 1), all the randomness: row i's t-th token
    inverts the CDF at uniforms[i, t], whatever else is in the batch (default:
    torch.rand's). stop(ids) → whether the row ends with its newest token; it
    ends after max_new_tokens anyhow. batch_size: rows decoded together
    (default: all). capture: take steps of a few shapes alone, on a GPU as CUDA
    graphs, which later calls use again (default: on a GPU). Row i belongs to
    prompt i // num_samples.

    Returns per row its ids, with the stop, and their log-probabilities at
    `temperature` (greedy: at 1), natural logs."""
    if uniforms is None:
        uniforms = torch.rand(len(prompts) * num_samples, max_new_tokens, dtype=torch.float64)
    rows = [Row(i, prompts[i // num_samples], noise) for i, noise in enumerate(uniforms.tolist())]
    if capture is None:
        capture = model.device.type == "cuda"
    width = min(batch_size or len(rows), len(rows))
    slots = max(map(len, prompts), default=0) + max_new_tokens
    # taken from the end
    waiting = rows[::-1] if max_new_tokens else []
    # batch[i] has row i of the cache
    batch: list[Row] = []
    # prompt → its row, while samples of it wait
    prefilled: dict[int, list] = {}
    cache = None
    while waiting or batch:
        # 1 admit: some at a time, for a prefill delays all rows
        free = width - len(batch)
        if waiting and free >= max(1, width // 8):
            new = [waiting.pop() for _ in range(min(free, len(waiting)))]
            which = {row.index // num_samples for row in new}
            if which := sorted(which - prefilled.keys()):
                found = prefill(model, [prompts[i] for i in which])
                prefilled.update(zip(which, found))
            for row in new:
                prompt, sample = divmod(row.index, num_samples)
                if cache is None:
                    size = prefilled[prompt], width, slots
                    cache = keep(model, *size) if capture else Slots(*size)
                cache.fill(len(batch), prefilled[prompt], row.cached)
                batch.append(row)
                if sample == num_samples - 1:
                    del prefilled[prompt]

        # 2 step: feed one token of each row, sample the next
        state = torch.tensor(
            [[row.next, row.cached, row.noise[len(row.ids)]] for row in batch],
            dtype=torch.float64, device=model.device)
        cache.seen = max(row.cached for row in batch) + 1
        drawn = (replay if capture else step)(model, cache, state, temperature)

        # 3 look: who has ended? The one time that the host waits
        ended = []
        for i, (token, logprob) in enumerate(drawn[:len(batch)].tolist()):
            row = batch[i]
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
    # tokens that a stop and what comes before it can take
    window = max((len(s.encode()) for s in stop_seqs), default=0) + 8

    def stop(ids: list[int]) -> bool:
        if ids[-1] in stop_ids:
            return True
        text = decode(ids[-window:]) if stop_seqs else ""
        return any(s in text for s in stop_seqs)

    return stop


# ---------------------------------------------------------------------------
# Captured steps, for GPUs: a step of an 8B model is a thousand small kernels,
# which the host launches more slowly than the GPU runs them
# ---------------------------------------------------------------------------
# model → its Slots, from call to call
KEPT = weakref.WeakKeyDictionary()


def keep(model, like: list[torch.Tensor], width: int, slots: int) -> Slots:
    """The model's Slots of earlier calls, where they are large enough and its
    weights lie where the captured steps read them; else new ones."""
    weights = [p.data_ptr() for p in model.parameters()]
    weights.append(model.config._attn_implementation)
    cache = KEPT.pop(model, None)
    held = (0, 0) if cache is None else cache.size
    size = max(width, held[0]), max(-(-slots // 256) * 256, held[1])
    if cache is None or (cache.weights, held) != (weights, size):
        # let go of its memory before more is taken
        cache = None
        cache = Slots(like, *size)
        cache.weights, cache.size, cache.pool = weights, size, None
        cache.graphs = {} if like[0].is_cuda else None
    # what is masked is still multiplied by 0: no NaN may be left there
    for slots in cache.tensors:
        slots.zero_()
    cache.rows = width
    KEPT[model] = cache
    return cache


def replay(model, cache: Slots, state: torch.Tensor, temperature: float):
    """step, of a power of two of rows and a multiple of 256 slots, on a GPU
    captured: the host launches one graph. Weights may change in place."""
    n = min(1 << (len(state) - 1).bit_length(), cache.rows)
    # free rows write slot 0 of a row that nobody has
    state = torch.cat([state, state.new_zeros(n - len(state), 3)])
    cache.seen = -(-cache.seen // 256) * 256
    shape = n, cache.seen, temperature
    if cache.graphs is not None and shape not in cache.graphs:
        capture_step(model, cache, state, temperature, shape)
    # there are none on a CPU, or where the model reads the host
    if cache.graphs is None:
        return step(model, cache, state, temperature)
    graph, static, drawn = cache.graphs[shape]
    static.copy_(state)
    graph.replay()
    return drawn


def capture_step(model, cache: Slots, state, temperature: float, shape) -> None:
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        # it warns that this mode is a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        # run first: a capture that fails would leave the allocator unusable
        step(model, cache, state, temperature)
        torch.cuda.set_sync_debug_mode("default")
        with torch.cuda.graph(graph, cache.pool, capture_error_mode="thread_local"):
            drawn = step(model, cache, state, temperature)
        cache.pool = graph.pool()
        cache.graphs[shape] = graph, state, drawn
    except RuntimeError as error:
        cache.graphs = None
        print(f"sampling without CUDA graphs, which is slower: {error}")
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
    m = 1 + bisect_left(range(length), True, key=lambda i: decode(ids[:i + 1]).startswith(end))
    begun = decode(ids[:m])
    # one token may complete several stops: the one that starts first cuts
    start = min(begun.index(s) + len(s) - len(s.lstrip() or s) for s in stop_seqs if s in begun)
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
    # whether y begins with the stop, or the stop is one token
    stop_in_answer: bool = True
    # log π(z|x), as it was sampled
    sampler_logprob: float = math.nan

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.rationale + self.answer


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def lower_right(length, seen, window, dtype, device) -> torch.Tensor:
    """Added to scores: the last `length` of `seen` tokens see what is before
    them and in their window. All layers of a pass share it; of floats, for SDPA
    would make them of bools each time."""
    hidden = torch.full((length, seen), -math.inf, dtype=dtype, device=device)
    mask = hidden.triu(seen - length + 1)
    return mask + hidden.tril(seen - length - window) if window else mask


def packed_attention(module, query, key, value, attention_mask, segments=None,
                     scaling=None, sliding_window=None, **kwargs):
    """Attention of a packed pass; without segments, ordinary SDPA.

    query (1, heads, T, head size), key and value with the key-value heads.
    segments: (length, parent) each, in order; the tokens of a segment see
    those of its parent (a prompt; its own index: none) and, causally, their
    own."""
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # Gemma 2's, gpt-oss's and T5's ways to change scores
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise ValueError("its attention scores are not those of SDPA")
    # what the kernel takes
    size = query.shape[-1]
    if query.is_cuda and query.dtype.itemsize == 2 and size % 8 == 0 and size <= 256:
        return varlen_attention(query, key, value, segments, scaling, sliding_window), None
    dtype = query.dtype
    if torch.is_grad_enabled():
        # the backward pass in bfloat16 takes 2.5 times as long on a CPU
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
            mask = lower_right(length, seen, sliding_window, query.dtype, query.device)
        parts.append(scaled_dot_product_attention(
            queries[i], k, v, mask, is_causal=mask is None, scale=scaling,
            enable_gqa=True))
    return torch.cat(parts, 2).transpose(1, 2).to(dtype), None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)


# kept for all layers of a pass; no inference tensors: a backward pass may
# need them
@functools.lru_cache(maxsize=1)
@torch.inference_mode(False)
def gathered(segments: tuple, device):
    """Where each segment's keys lie, one segment after another; where its
    queries and its keys start; the longest of both."""
    ends = [*accumulate(length for length, _ in segments)]
    spans = [range(end - n, end) for end, (n, _) in zip(ends, segments)]
    keys = [[*spans[parent], *spans[i]] if parent != i else [*spans[i]]
            for i, (_, parent) in enumerate(segments)]
    parts = [*chain(*keys)], [0, *ends], [0, *accumulate(map(len, keys))]
    tensor = torch.tensor([*chain(*parts)], dtype=torch.int32, device=device)
    longest = max(map(len, spans)), max(map(len, keys))
    return *tensor.split([*map(len, parts)]), *longest


def varlen_attention(query, key, value, segments, scaling, sliding_window):
    """All segments of a packed pass in one call of a kernel, torch's or
    flash-attn's where it is installed: (1, T, heads, head size). Causal at the
    lower right: a segment's last token sees all of its keys."""
    places, *sizes = gathered(segments, query.device)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    inputs = query, key.index_select(0, places), value.index_select(0, places)
    # keys seen before a query, and after it; -1 is all
    window = (sliding_window or 0) - 1, 0
    return varlen_kernel()(*inputs, *sizes, scaling=scaling, window=window)[None]


@functools.cache
def varlen_kernel() -> Callable:
    try:
        from flash_attn import flash_attn_varlen_func
        return lambda *inputs, scaling, window: flash_attn_varlen_func(
            *inputs, softmax_scale=scaling, causal=True, window_size=window)
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn
    # torch 2.11 groups heads unasked
    known = inspect.signature(varlen_attn).parameters
    grouped = {"enable_gqa": True} if "enable_gqa" in known else {}
    return lambda *inputs, scaling, window: varlen_attn(
        *inputs, scale=scaling, window_size=window, **grouped)


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
        # how many were pushed through the model so far
        self.positions = 0

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        config = self.model.config.get_text_config()
        logits = self.model.get_output_embeddings()(hidden)
        # Cohere's, Granite's and Gemma's ways to change them
        if scale := getattr(config, "logit_scale", None):
            logits = logits * scale
        if scale := getattr(config, "logits_scaling", None):
            logits = logits / scale
        cap = getattr(config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    def forward(self, ids, positions, segments, rows, columns, targets, temperature=None) -> torch.Tensor:
        """log π of targets, each after ids[row, column], (N,)."""
        extra = {}
        # a 4D mask is taken as it is: none is made
        if self.packed:
            extra = {"segments": tuple(segments), "position_ids": positions,
                     "attention_mask": ids.new_zeros(1, 1, 1, 1)}
        self.positions += ids.numel()
        hidden = self.model.get_decoder()(input_ids=ids, use_cache=False, **extra).last_hidden_state
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
        heat = torch.tensor([temperature, 1.0], dtype=torch.float64, device=device)[kind]
    logprobs = scorer(ids, positions, segments, row, column, token, heat)
    sums = logprobs.new_zeros(len(rollouts), 2)
    return sums.index_put((rollout, kind), logprobs, accumulate=True)


# ---------------------------------------------------------------------------
# evaluate: accuracy, and log-probabilities of the gold answers
# ---------------------------------------------------------------------------
def cut_rollout(example: Example, ids: list[int], stop_ids, stop_seqs, decode) -> Rollout:
    """Cut sampled ids where the rationale ends; the answer follows it.

    One pass over x⊕z⊕y scores the stop too where y begins with it. Of another
    stop only the first token is scored, from z's last logits."""
    n, m, finished = truncate(ids, stop_ids, stop_seqs, decode)
    answer = answer_ids(example, ids[:n], decode)
    fits = m - n <= 1 or answer[:m - n] == ids[n:m]
    actions = ids[:m] if fits else ids[:n + 1]
    return Rollout(example.prompt, ids[:n], actions, answer, finished, fits)


# the figures of an evaluation, and what the table calls them
LABELS = {"accuracy": "greedy accuracy", "maj_at_k": "maj@k", "finished": "rationales finished",
          "rationale_length": "rationale length, tokens", "answer_logprob": "log π(y|x⊕z)",
          "answer_logprob_no_rationale": "log π(y|x), no rationale",
          "perplexity": "perplexity of y per token",
          "perplexity_no_rationale": "perplexity, no rationale"}
PAY = ("right {right:.0%} of {rationales}, break-even {break_even:.0%} (log π of the answer: right "
       "{logprob_right:.1f}, wrong {logprob_wrong:.1f}, a guess {logprob_guess:.1f})")


class Interrupted(Exception):
    """A signal came during an evaluation."""


def evaluate(s, model, tokenizer, examples: list[Example], grader: str, num_samples: int,
             title: str, signals: Sequence[int] = ()) -> dict | None:
    """Greedy accuracy, self-consistency over num_samples samples, and log-probabilities of the
    gold answers, by the settings s (a Common).

    Generation ends at a stop token only, so that the answer is there to be graded; z is then cut
    by training's rule. The grader "none" grades nothing: z alone is generated. All ranks call this and
    share the examples; all get the same result, rows in the order of `examples`, or None where
    `signals`, which a handler may fill meanwhile, is no longer empty on one of them."""
    decode, scorer, length = decoder(tokenizer), Scorer(model), s.response_length
    stop_ids, graded = stop_token_ids(tokenizer, model, s.stop_token), grader != "none"
    ends = stopper(stop_ids, [] if graded else s.stop_seqs, decode)
    begin, end = (len(examples) * r // world_size() for r in (rank(), rank() + 1))
    mine = examples[begin:end]
    total = len(mine) * (1 + num_samples)
    bar = tqdm(total=total, desc=title, unit="answer", leave=False, disable=rank() > 0)

    def stop(ids):
        if signals:
            raise Interrupted
        ended = ends(ids) or len(ids) == length
        bar.update(ended)
        return ended

    def outputs(k, temperature=0.0, noise=None):
        """k graded outputs of each of this rank's examples."""
        sampled = generate(model, [e.prompt for e in mine], length, num_samples=k, stop=stop,
                           temperature=temperature, uniforms=noise,
                           batch_size=s.per_device_eval_batch_size)
        rollouts = [cut_rollout(mine[i // k], ids, stop_ids, s.stop_seqs, decode)
                    for i, (ids, _) in enumerate(sampled)]
        # z is not asked for: its logits would be the most
        scores = some_logprobs(scorer, [replace(r, actions=[]) for r in rollouts], signals)
        rows = []
        for i, (r, (_, logprob)) in enumerate(zip(rollouts, scores)):
            ids, _ = sampled[i]
            output = decode(ids[:-1] if ids[-1] in stop_ids else ids)
            row = {"output": output, "answer_length": len(r.answer)}
            if graded:
                row["prediction"], row["correct"] = grade(grader, output, mine[i // k].row)
            rows.append(row | dict(finished=r.finished, rationale_length=len(r.rationale),
                                   answer_logprob=logprob))
        return [rows[i * k:i * k + k] for i in range(len(mine))]

    keys = [f"{s.seed}/evaluate/{i}/{j}" for i in range(begin, end) for j in range(num_samples)]
    answers, rows = [answer_ids(e, [], decode) for e in examples], []
    template = len(os.path.commonprefix([y[:-1] for y in answers]))
    with suppress(Interrupted):
        sampled = outputs(num_samples, s.temperature, uniform_rows(keys, length))
        # y without a rationale: the template's words, in the place of z, and behind them a guess
        bare = [Rollout(e.prompt, y[:template], y[:template], y[template:])
                for e, y in zip(mine, answers[begin:end])]
        bare = some_logprobs(scorer, bare, signals)
        for e, [row], samples, (begun, guess) in zip(mine, outputs(1), sampled, bare):
            row["answer_logprob"] = mean(sample["answer_logprob"] for sample in samples or [row])
            row |= {"answer_logprob_no_rationale": begun + guess, "guess_logprob": guess}
            query, truth = prompt_text(tokenizer, e.row["queries"]), e.row["groundtruth"] or e.row["responses"]
            row = {"query": query, "groundtruth": truth, **row, "samples": samples}
            if graded:
                row["majority"] = majority(samples)
            rows.append(row)
    bar.close()
    rows = gather(rows)
    if len(rows) < len(examples):
        return None
    result = {"n": len(rows), "num_samples": num_samples}
    columns = {"accuracy": "correct", "maj_at_k": "majority"}
    for name in LABELS:
        values = [row[column] for row in rows if (column := columns.get(name, name)) in row]
        if not values or name == "maj_at_k" and not num_samples:
            continue
        result[name] = mean(values)
        if isinstance(values[0], bool):
            result[f"{name}_ci95"] = interval95(result[name], len(rows))
    if graded:
        result["break_even"] = break_even(rows, blind_guess(answers))
    else:
        tokens = mean(row["answer_length"] for row in rows)
        for which in ("", "_no_rationale"):
            result[f"perplexity{which}"] = math.exp(-result[f"answer_logprob{which}"] / tokens)
    return result | {"rows": rows}


def blind_guess(answers):
    """Mean log π of answers, token ids, that are guessed without a look at the question: by how often a
    token stands at its place in the other answers, where each kind counts once more."""
    places = [Counter(place) for place in zip_longest(*answers)]
    for place in places:
        # of answers that are shorter
        del place[None]
    return mean(sum(math.log(place[token] / (place.total() - 1 + len(place)))
                    for token, place in zip(answer, places)) for answer in answers)


def break_even(rows, blind):
    """Whether rationales pay: the share of the rationales that finish whose answer is right, mean log π
    of the gold answer behind right and wrong ones and of a guess, and the share from which on a
    rationale's mean is above the guess's."""
    finished = [s for row in rows for s in row["samples"] or [row] if s["finished"] and s["rationale_length"]]
    logprobs = {True: [], False: []}
    for sample in finished:
        logprobs[sample["correct"]].append(sample["answer_logprob"])
    # a model soon learns how often which answer is right
    guess = max(blind, mean(row["guess_logprob"] for row in rows))
    # what there is none of is taken to cost nothing, or as much as a guess
    right, wrong = mean(logprobs[True] or [0.0]), mean(logprobs[False] or [guess])
    share = (guess - wrong) / (right - wrong) if right > wrong else float(guess > wrong)
    return {"rationales": len(finished), "right": len(logprobs[True]) / max(1, len(finished)),
            "break_even": min(1.0, max(0.0, share)), "logprob_right": right, "logprob_wrong": wrong,
            "logprob_guess": guess}


@torch.no_grad()
def some_logprobs(scorer, rollouts, signals=(), size=16):
    """[log π(z|x), log π(y|x⊕z)] of each rollout; `size` rollouts a pass."""
    logprobs = []
    for i in range(0, len(rollouts), size):
        if signals:
            raise Interrupted
        logprobs += score(scorer, rollouts[i:i + size]).tolist()
    return logprobs


def stop_token_ids(tokenizer, model, stop_token):
    """Ids that end generation: `stop_token` (eos, pad or both), the end of the turn, and the EOS
    ids of the model's own generation_config."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    asked = {"eos": [eos], "pad": [pad], "both": [eos, pad]}[stop_token]
    return {end_of_turn_id(tokenizer), *own, *asked} - {None}


def uniform_rows(keys, length):
    """(rows, length) uniform numbers in [0, 1), float64; each row a pure function of its key."""
    rows = [[rng.random() for _ in range(length)] for rng in map(random.Random, keys)]
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), length)


def interval95(rate, n):
    """Wilson's 95% score interval of a rate measured on n rows."""
    w = 1.959964 ** 2 / n
    half = (w * rate * (1 - rate) + w * w / 4) ** 0.5
    low, high = ((rate + w / 2 + side) / (1 + w) for side in (-half, half))
    # rounding: of 4 in 4, high would be just below 1
    return [max(0.0, min(low, rate)), min(1.0, max(high, rate))]


def majority(samples):
    """Whether the most frequent prediction is right; of equally frequent ones the first counts."""
    votes = [s["prediction"] for s in samples if s["prediction"] is not None]
    winner = max(votes, key=votes.count, default=None)
    return any(s["correct"] for s in samples if s["prediction"] == winner)


# ---------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------
def resolve_dtype(name, device):
    """The compute dtype: what is asked for; "auto" is bfloat16 on a GPU or a CPU that has it
    natively, else float32."""
    # torch 2.11 has no get_capabilities
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    native = any(cpu.get(flag) for flag in ("amx_bf16", "avx512_bf16", "bf16"))
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" or native else "float32"
    return getattr(torch, name)


def load_model(path: str, dtype, device="cpu", attn_implementation="auto", trust_remote_code=False,
               date=None):
    """(model, tokenizer) of a folder or hub id, weights in `dtype` ("auto": their own); "embedded":
    the random tiny model that the embedded base is trained from. A chat template that prints
    today's date prints `date`, "YYYY-MM-DD", wherever this tokenizer is saved: a run that goes on
    another day sees the same prompts.

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
            missing = sorted(info["missing_keys"])
            require(not missing, f"the weights lack {missing[:3]}")
        if isinstance(tokenizer.chat_template, str):
            tokenizer.chat_template = dated(tokenizer.chat_template, date)
        # special tokens may lie outside the embedding, as the image token of Gemma 3's text models
        ordinary = [i for i, token in tokenizer.added_tokens_decoder.items() if not token.special]
        held = model.get_input_embeddings().num_embeddings
        [templated] = encode(tokenizer, [prompt_text(tokenizer, user("?"))])
        used = [tokenizer.vocab_size - 1, *ordinary, *tokenizer("a")["input_ids"], *templated,
                end_of_turn_id(tokenizer)]
        require(max(used) < held, f"its tokenizer has {len(tokenizer)} tokens, its embedding {held}")
        check_model(model.to(device).eval(), packed=own is None)
    except Exception as error:
        # of dozens of types: no network, no access, a broken file
        way = "`python latro.py` makes it" if path == EMBEDDED else "give a folder or hub id"
        raise UserError(f"model {path}: cannot be used ({first_line(error)}); {way}") from None
    return model, tokenizer


def dated(template, date):
    """A chat template that prints `date` where it would print today's: a macro that shadows
    strftime_now, as it is written with the tokenizer."""
    ours = "{% macro strftime_now(format) %}"
    if "strftime_now" not in template or template.startswith(ours) and not date:
        return template
    day = datetime.fromisoformat(date or datetime.now().isoformat())
    codes = ("%" + code for code in "a A b B d -d e m -m y Y j H M S I p F D T c x X".split())
    shown = "".join(f"|replace({code!r}, {day.strftime(code)!r})" for code in codes)
    template = re.sub(f"^{re.escape(ours)}.*?endmacro %}}", "", template)
    return f"{ours}{{{{ format{shown} }}}}{{% endmacro %}}{template}"


@torch.no_grad()
def check_model(model, packed):
    """Score packed passes where that, and sampling, give what the model's plain forward pass gives;
    else keep the model's own attention and score a rollout per row. UserError where that differs
    too: two prompts of unequal length, two continuations each, are compared."""
    # GPT-Neo's: longer than the prompts that are compared below
    require("local" not in getattr(model.config, "attention_layers", ()),
            "the window of its local layers follows the longest row of a batch")
    own, rng = model.config._attn_implementation, random.Random(0)
    vocabulary = range(model.get_input_embeddings().num_embeddings)
    prompts = [rng.choices(vocabulary, k=n) for n in (5, 9)]
    rollouts = [Rollout(x, z, z, x[3:]) for x in prompts for z in (x[:3], x[1:])]

    def plain(prompt, ids):
        """log π(ids|prompt) by the model's own forward pass."""
        ids = torch.tensor(prompt + ids, device=model.device)
        logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1:-1]
        return -cross_entropy(logits.double(), ids[len(prompt):], reduction="sum").item()

    expected = [plain(r.prompt, r.rationale + r.answer) for r in rollouts]
    # nats, of sums of some 50: the rounding of random tokens in bfloat16 reaches 1
    tolerance = 0.01 if model.dtype.itemsize > 2 else 1.5
    for attention in ("packed", own) if packed else (own,):
        try:
            model.set_attn_implementation(attention)
            scores = score(Scorer(model), rollouts).sum(1).tolist()
            sampled = generate(model, prompts, 4, num_samples=2, temperature=1.0,
                               uniforms=uniform_rows("abcd", 4), batch_size=3)
            found = [("score", *both) for both in zip(scores, expected)]
            found += [("generate", sum(logprobs), plain(r.prompt, ids))
                      for r, (ids, logprobs) in zip(rollouts, sampled)]
            for verb, ours, its in found:
                off = abs(ours - its)
                require(off <= tolerance, f"{verb} is off by {off:.2g} nats from a plain pass")
            return
        except Exception as error:
            # where packed fails, the model's own attention is tried
            require(attention != own, f"it cannot be sampled or scored: {first_line(error)}")
            say(f"scored a rollout per row, which is slower: {first_line(error)}")


# ---------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------
def say(text):
    if rank() == 0:
        print(text, flush=True)


def gather(items: list) -> list:
    """The items of all ranks, on every rank, in the order of the ranks."""
    parts = [items] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def on_rank_0(work: Callable):
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
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        # cuDNN's attention would plan every new shape
        torch.backends.cuda.enable_cudnn_sdp(False)
    if not dist.is_initialized():
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        # an hour: the others wait while rank 0 writes a large model
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1),
                                **{} if "RANK" in os.environ else alone)
    return device


def run_script(main):
    """Run a script's main: bad input ends in one line and exit code 2."""
    # a screen may have no π
    sys.stdout.reconfigure(errors="replace")
    code, ranks = 0, int(os.environ.get("WORLD_SIZE", 1))
    try:
        main(sys.argv[1:])
    except (UserError, OSError, FloatingPointError) as error:
        # a UserError is the same on all ranks
        if os.environ.get("LOCAL_RANK", "0") == "0" or not isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        code = 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:
        code = end.code
    # after an error NCCL might wait for other ranks
    if dist.is_initialized() and (ranks == 1 or code == 0):
        dist.destroy_process_group()
    if ranks > 1:
        # a thread of gloo's outlives the group, and would abort an orderly shutdown
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


# ---------------------------------------------------------------------------
# Settings: defaults < YAML < command line
# ---------------------------------------------------------------------------
@dataclass
class Common:
    """What training and evaluation both take. The comment above a key is its --help."""
    # one of cups, words, gsm8k, arc_challenge, arc_challenge_direct, math, jsonl, reasoning_gym:TASK
    dataset_name: str | None = None
    # a local folder or file of the same columns in place of the hub
    dataset_path: str | None = None
    # settings of a task of reasoning_gym, such as size=1000 max_terms=3
    dataset_options: list[str] = field(default_factory=list)
    # of answers: number, option, text, json, math, none; auto: the dataset's, or what fits groundtruths
    grader: str = "auto"
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
    # YYYY-MM-DD, for chat templates that print it; default: the run's, else today's
    date: str | None = None
    # of sampling and, in training, of the data's order
    seed: int = 0

    may_be_0 = {"num_samples", "temperature", "seed", "few_shot"}

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, str):
                setattr(self, name, os.path.expanduser(value))
            if type(value) in (int, float) and not (value == 0 and name in self.may_be_0):
                require(0 < value < math.inf, f"{name}: {value} is no number above 0")
        require(self.temperature or not self.num_samples,
                "temperature: 0 makes all num_samples samples the same")
        day, known = self.date or "2000-01-01", False
        with suppress(ValueError):
            known = datetime.fromisoformat(day).strftime("%Y-%m-%d") == day
        require(known, f"date: {day} is not YYYY-MM-DD")
        require("" not in self.stop_seqs, "stop_seqs: an empty string would end every rationale")


@dataclass
class Settings(Common):
    # folder, hub id or run (its base beside its best); default: the newest run under runs/
    model: str | None = None
    # train, validation, test or all; default: test, all of a single file
    split: str | None = None
    # worked examples in the prompt, 0 to 8 (gsm8k)
    few_shot: int = 0
    # JSON file of --model's result; default: evaluation-NAME….json in its run, or here
    out: str | None = None


def parse(cls, argv):
    """The words of each key of a command line, --key value or --key=value: all up to the next key.
    --help prints the module's docstring and every key of the dataclass cls."""
    if "--help" in argv:
        source = "".join(map(inspect.getsource, cls.__mro__[-2::-1]))
        keys = {name: comment for comment, name in re.findall(r"    # (.+)\n    (\w+): ", source)}
        print(inspect.getmodule(cls).__doc__)
        for name, default in vars(cls()).items():
            print(f"  --{name:<29} {keys[name]} [{default}]")
        sys.exit(0)
    given, name, known = {}, None, [*get_type_hints(cls), "config"]
    for word in argv:
        key, equals, value = word[2:].partition("=")
        # a stop sequence may begin with --
        near = difflib.get_close_matches(key, known, 1, 0.8)
        if word.startswith("--") and (near or name != "stop_seqs"):
            name = key
            given[name] = [value] if equals else []
        else:
            require(name, f"{word}: keys begin with --")
            given[name].append(word)
    for name in given.keys() - {"stop_seqs"}:
        require(given[name], f"{name}: takes a value")
    return given


def settle(cls, given):
    """Settings of the dataclass cls: its defaults < the given words of each key. UserError names an
    unknown key and the nearest known one, or the key whose value has the wrong type."""
    kinds, values = get_type_hints(cls), {}
    for name, words in given.items():
        if name not in kinds:
            near = difflib.get_close_matches(str(name), kinds, 1, 0.5) or ["--help"]
            raise UserError(f"{name}: unknown key; did you mean {near[0]}?")
        try:
            values[name] = convert(kinds[name], words)
        except ValueError:
            kind = inspect.formatannotation(kinds[name])
            raise UserError(f"{name}: {' '.join(map(str, words))!r} is no {kind}") from None
    return cls(**values)


def convert(kind, words):
    """Words, of a command line or a YAML file, as a field's type; ValueError where they are none."""
    inner = get_args(kind)
    if kind == list[str] and all(isinstance(word, str) for word in words):
        return words
    if type(None) in inner:
        if words in ([], ["none"], ["None"], ["null"], ["~"]):
            return None
        kind, inner = inner[0], ()
    [word] = words
    if word == "" or not isinstance(word, str):
        raise ValueError
    if inner:
        return inner[inner.index(word)]
    return ["false", "true"].index(word.lower()) == 1 if kind is bool else kind(word)


def read_yaml(path):
    """The keys of a YAML file and their words as they are written: "12:30", "yes" and 1.10 stay text.
    UserError where it holds anything else."""
    try:
        keys = dict(yaml.load(Path(path).read_text("utf-8"), yaml.BaseLoader) or {})
    except (OSError, yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as lines of `key: value` ({reason})") from None
    return {key: value if isinstance(value, list) else [value] if value else []
            for key, value in keys.items()}


# ---------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------
def is_run(folder):
    """Whether latro.py made a folder: a config.yaml may be anybody's."""
    config = Path(folder, "config.yaml")
    ours = exists(f"{folder}/metrics.jsonl") and isfile(config)
    return ours and b"model_name_or_path" in config.read_bytes()


def newest_run():
    """The newest run with a trained model; the embedded base, which all start from, is none."""
    runs = {best.parent for best in Path("runs").glob("*/best")} - {Path(EMBEDDED).parent}
    runs = [*filter(is_run, runs)]
    require(runs, "no trained run under runs/: `python latro.py` trains one, --model names a model")
    return max(runs, key=lambda run: os.path.getmtime(f"{run}/config.yaml"))


def main(argv):
    """Evaluate --model: one model, or the base beside the best model of a run (default: the newest),
    on the same rows, by the run's settings where the command line says nothing. Writes each one's
    JSON and prints the table."""
    device, given, config = init_distributed(), parse(Settings, argv), {}
    path = settle(Settings, given).model or newest_run()
    path = os.path.abspath(path) if path in (".", "..") else path
    run = path if is_run(path) else Path(path).parent
    if is_run(run):
        config = read_yaml(f"{run}/config.yaml")
        say(f"settings: those of {run}, but for the command line's")
    models = {Path(path).name: path}
    if path == run:
        [base] = config["model_name_or_path"]
        models = {"base": base, "best": f"{run}/best"}
    keys = get_type_hints(Common).keys() & config.keys()
    if given.get("dataset_name") not in (None, config.get("dataset_name")):
        # they are of the run's own dataset
        keys -= {"dataset_path", "dataset_options", "grader", "limit"}
    own = {key: config[key] for key in keys}
    s, default = settle(Settings, own | given), settle(Settings, own)
    split = s.split or closing_split(s.dataset_path, "validation" if path == run else "all")
    # what is asked for beside the run's own evaluation is in the name: nothing is overwritten
    asked = {k: vars(s)[k] for k in given if k not in ("model", "out") and vars(s)[k] != vars(default)[k]}
    if split != closing_split(s.dataset_path):
        asked["split"] = split
    whole = "-".join(["evaluation-{}", *(f"{key}={value}" for key, value in asked.items())])
    name = re.sub(r"[^\w=.{}-]+", "_", whole).encode()[:150].decode(errors="ignore")
    if name != whole:
        name += f"-{crc32(whole.encode()):08x}"
    out = s.out or f"{run if config else '.'}/{name}.json"
    require(path != run or not s.out, f"out {out}: is one file; needs --model, and not a run")
    require(isdir(dirname(out) or ".") and not isdir(out), f"out {out}: no file in an existing folder")
    rows = load_rows(s.dataset_name, split, s.dataset_path, s.few_shot, s.dataset_options)
    grader, why = choose_grader(s.grader, s.dataset_name, rows)
    check_rows(rows, grader, why)
    results, dtype = {}, resolve_dtype(s.dtype, device)
    for label, path in models.items():
        model, tokenizer = load_model(path, dtype, device, s.attn_implementation, s.trust_remote_code,
                                      s.date)
        examples = make_examples(tokenizer, rows[:s.limit], **limits(model, s.response_length))
        result = evaluate(s, model, tokenizer, examples, grader, s.num_samples, label)
        results[label] = {"model": path, "dataset": s.dataset_name, "split": split} | result
        # one at a time is held
        del model
    if rank() == 0:
        # before anything is printed: the pipe may be closed
        files = {label: Path(out.replace("{}", label)) for label in models}
        for label, file in files.items():
            text = json.dumps(results[label], indent=1, ensure_ascii=False)
            file.write_text(text, "utf-8")
        print_results(results)
        print("\nevery row:", *files.values())


def check_rows(rows, grader, why):
    """Say how answers are graded, and which gold responses the grader calls wrong."""
    if why:
        say(f"grader: {grader}, since {why}")
    if grader == "none":
        return say("nothing is graded: log π(y|x⊕z) chooses the model, and there is no accuracy")
    wrong = [row for row in rows if not grade(grader, row["responses"], row)[1]]
    for row in wrong[:1]:
        say(f"warning: the grader {grader} calls {len(wrong)} of {len(rows)} gold responses wrong; the "
            f"first is {row['responses']!r}, groundtruth {row['groundtruth']!r}")


def closing_split(dataset_path, file="validation"):
    """What a table is made of: a single file has no test rows."""
    return file if isfile(dataset_path or "") else "test"


def limits(model, response_length):
    """What make_examples holds rows to: the tokens that the model's context leaves for x⊕y beside a
    rationale, and how many tokens it knows."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return {"context": context and context - response_length,
            "vocabulary": model.get_input_embeddings().num_embeddings}


def print_results(results):
    """The table of evaluations of the same rows, side by side, and two answers of each."""
    first = next(iter(results.values()))
    print(f"\n{first['split']}: {first['n']} questions; rates with their 95% interval")
    print(" " * 30, *(f"{label:>24}" for label in results))
    for name in filter(first.__contains__, LABELS):
        line = f"  {LABELS[name]:<29}".replace("@k", f"@{first['num_samples']}")
        for result in results.values():
            low, high = result.get(f"{name}_ci95", (0, 0))
            cell = f"{result[name]:.1%} [{low:.1%}, {high:.1%}]" if high else f"{result[name]:.3f}"
            line += f"{cell:>25}"
        print(line)
    for label, result in results.items():
        if found := result.get("break_even"):
            pay = "pay" if found["right"] > found["break_even"] else "do not pay"
            print(f"  {label}: rationales {pay} here:", PAY.format(**found))
    for answers in zip(*(result["rows"][:2] for result in results.values())):
        print(f"\n  Q: {answers[0]['query'].strip()}\n  gold: {answers[0]['groundtruth']}")
        for label, row in zip(results, answers):
            verdict = {True: " (right)", False: " (wrong)", None: ""}[row.get("correct")]
            print(f"  {label}{verdict}: {row['output'].strip()}")


if __name__ == "__main__":
    run_script(main)
