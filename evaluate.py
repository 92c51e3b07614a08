"""What is judged: load a model, generate rationales, cut them, score text under a model, measure accuracy.

    python evaluate.py                                        the newest run under runs/: its base model beside its best
    python evaluate.py --model DIR_OR_HUB_ID --dataset_name gsm8k --num_samples 8
    torchrun --nproc_per_node 8 evaluate.py --model …         the ranks share the rows

`generate`, `truncate` and `token_logprobs` take tensors and numbers alone and are made to be copied. Training evaluates
with the `evaluate` below, so the two cannot disagree.
"""
import argparse
import atexit
import ctypes
import dataclasses
import datetime
import difflib
import functools
import glob
import json
import os
import random
import sys
import traceback
import typing
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from statistics import fmean as mean

import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils import logging as transformers_logging

from data import (DATASETS, GRADERS, Example, UserError, answer_ids, choose_grader, decoder, end_of_turn_id, grade,
                  load_rows, make_examples, prompt_text)

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()  # ours show the long work
# For CPUs; all are read at first use. Tensors of 2 MiB and more lie in huge pages: about 500 times fewer page faults.
# oneDNN, and PyTorch's layer over it, each keep a kernel per shape, by default 1,024: that would grow for 100 updates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "100")
os.environ.setdefault("LRU_CACHE_CAPACITY", "100")


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------
def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype: what is asked for; "auto" is bfloat16 on a GPU or a CPU that has it natively, else float32."""
    if name != "auto":
        return getattr(torch, name)
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 has it not
    native = device.type == "cuda" or any(cpu.get(flag) for flag in ("amx_bf16", "avx512_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def load_model(path: str, dtype: torch.dtype | str, device: torch.device | str = "cpu",
               attn_implementation: str = "auto", trust_remote_code: bool = False):
    """(model, tokenizer) of a folder or hub id, its weights in `dtype`; "auto": in their own.

    UserError where either cannot be loaded or they do not fit together.
    """
    looks_local = path.startswith((".", "/", "~", "runs/")) or path.count("/") > 1
    if not os.path.isdir(path) and (looks_local or os.path.exists(path)):
        made = "; `python latro.py` makes it" if path.endswith("cups-base/final") else ""
        raise UserError(f"model {path}: no such folder{made}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True,
            attn_implementation=None if attn_implementation == "auto" else attn_implementation)  # None: SDPA, or eager
        if info["missing_keys"]:
            raise ValueError(f"the weights lack {', '.join(sorted(info['missing_keys'])[:3])}")
        generate(model, [], 0)  # ValueError where it keeps a state
    except Exception as error:  # transformers raises dozens of types: no network, no config, a broken file, no access
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"model {path}: cannot be loaded ({reason}); give a Hugging Face folder or hub id") from None
    held = model.get_input_embeddings().num_embeddings
    ordinary = [i for i, token in tokenizer.added_tokens_decoder.items() if not token.special]
    if max([tokenizer.vocab_size - 1, *ordinary]) >= held:  # Gemma 3's text models lack their image token, rightly
        raise UserError(f"model {path}: its tokenizer has {len(tokenizer)} tokens and its embedding {held}; "
                        "they do not belong together")
    if torch.device(device).type == "cpu":
        for parameter in model.parameters():  # they lie where the file is mapped, unaligned: slow to read
            parameter.data = parameter.data.clone()
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = FewRowsLinear
    return model.to(device).eval(), tokenizer


class FewRowsLinear(nn.Linear):
    """nn.Linear where the products of decoding, a few rows by a whole weight, are slow as the libraries of a CPU do
    them (`python tests/bench.py --only rows`): W·xᵀ in bfloat16, blocks of 32 outputs in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in) → (..., out)
        rows, weight = x.flatten(0, -2), self.weight
        if weight.dtype == torch.bfloat16 and 1 < len(rows) <= 16:
            y = (weight @ rows.T).T.contiguous()
        elif weight.dtype == torch.float32 and 1 < len(rows) <= 8 and len(weight) % 32 == 0:
            blocks = weight.view(-1, 32, self.in_features)  # (out / 32, 32, in)
            y = rows.expand(len(blocks), -1, -1) @ blocks.mT  # (out / 32, rows, 32)
            y = y.transpose(0, 1).flatten(1)
        else:
            return super().forward(x)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], self.out_features)


def stop_token_ids(tokenizer, model, stop_token: str) -> set[int]:
    """Ids that end generation: `stop_token` (eos, pad or both), the end of the turn, and the model's own EOS ids."""
    own, eos, pad = model.generation_config.eos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    asked = {"eos": [eos], "pad": [pad], "both": [eos, pad]}[stop_token]
    return {end_of_turn_id(tokenizer), *(own if isinstance(own, list) else [own]), *asked} - {None}


# ---------------------------------------------------------------------------------------------------------------------
# Sampling, truncation, scoring: plain functions, made to be copied
# ---------------------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def generate(
    model: nn.Module,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    num_samples: int = 1,
    temperature: float = 0.0,
    uniforms: torch.Tensor | None = None,
    stop_ids: typing.Collection[int] = (),
    stop_seqs: typing.Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    continuations: Callable[[int, list[int]], tuple[int, list[int]]] | None = None,
    room: int = 0,
    batch_size: int | None = None,
    look_every: int | None = None,
    capture: Callable | None = None,
) -> list[tuple[list[int], list[float], list[float]]]:
    """Sample `num_samples` continuations of each prompt, with a KV cache and continuous batching.

    batch_size rows (default: all) are decoded together. A row ends with a token of `stop_ids`, with the token that
    completes one of `stop_seqs` in the decoded text, or after max_new_tokens; then it leaves the batch and a waiting
    row takes its place. Each prompt is prefilled once. Row i belongs to prompt i // num_samples.

    model: a transformers causal LM. temperature: 0 is greedy. uniforms: (rows, max_new_tokens) in [0, 1), all the
    randomness: row i's t-th token inverts the CDF at uniforms[i, t], whatever else is in the batch (but for rotary
    tables that grow with the longest row, as Phi-3.5's beyond 4,096 tokens). Default: torch.rand's.
    continuations(i, ids) → (n, y), called when row i has ended: before it leaves, y (at most `room` tokens) is fed
    after prompt⊕ids[:n] on its cache, which scores it without a second pass over the prompt.
    look_every: steps until the host looks at the tokens again (default 1; 16 on a GPU, which then waits for it less
    often). What was sampled past an end is dropped: the result does not depend on it.
    capture(step, arguments) → a function like step, of tensors alone, that replays what it did on these, such as
    torch.cuda.make_graphed_callables: the host then launches a step, not hundreds of kernels. Called for batch_size
    rows and the powers of two below, anew in each call of generate; the step then attends to all slots of the cache,
    masked (SDPA or eager attention; ValueError where layers have a sliding window). Default: no capture.

    Returns per row: ids with the stop, their log-probabilities at `temperature` (greedy: at 1), those of y at 1.
    """
    device, rows, config = model.device, len(prompts) * num_samples, model.config.get_text_config()
    sliding = getattr(config, "sliding_window", None)
    layers = set(getattr(config, "layer_types", None) or ["sliding_attention" if sliding else "full_attention"])
    if getattr(model, "_is_stateful", False) or layers - {"full_attention", "sliding_attention", "chunked_attention"}:
        raise ValueError("it keeps a state (Mamba, RWKV, convolutions, …), not keys and values alone")
    if capture is not None and layers != {"full_attention"}:
        raise ValueError("capture: the model's layers have a sliding window, which a captured step does not know")
    if uniforms is not None and uniforms.shape != (rows, max_new_tokens):
        raise ValueError(f"uniforms: of shape {tuple(uniforms.shape)}, not {(rows, max_new_tokens)}")
    if not rows:
        return []
    width, look_every = min(batch_size or rows, rows), look_every or (16 if model.device.type == "cuda" else 1)
    wide = torch.promote_types(model.dtype, torch.float32)  # of log-probabilities
    slack = 32  # slots that the batch may drift to the right before it is moved back
    slots = max(map(len, prompts)) + max_new_tokens + room + 2 * look_every + slack
    length = 0  # slots in use: every row of the batch ends there, so that one index serves all
    visible, places = 0, torch.empty(0)  # in a step: slots that are attended to, and (fed,) those of what is fed
    graphs: dict[int, Callable] = {}  # captured steps by their number of rows

    class Slab(DynamicLayer):
        """One layer's keys and values, (width, heads, slots, head size), written in place."""
        is_compileable = look_every > 1  # then transformers does not look, at every step, what the mask hides

        def __init__(self, *like):
            super().__init__()
            self.lazy_initialization(*like)  # zeros below: what is masked is still multiplied, by 0
            self.keys, self.values = (x.new_zeros(width, x.shape[1], slots, x.shape[3]) for x in like)

        def update(self, keys, values, *args, **kwargs):  # (n, heads, fed, head size)
            slabs = self.keys[:len(keys)], self.values[:len(keys)]
            for slab, new in zip(slabs, (keys, values)):
                slab.index_copy_(2, places, new)
            return [slab[:, :, :visible] for slab in slabs]

        def get_seq_length(self):
            return visible - len(places)

    cache, prefilled = Cache(layers=[]), {}
    batch: list[int | None] = [None] * width  # the row in each slab row; None: free
    owner = [prompts[row // num_samples] for row in range(rows)]  # the prompt of each row
    extent = [len(prompt) - 1 for prompt in owner]  # its tokens in the cache, which end at slot `length`
    ahead = [prompt[-1:] for prompt in owner]  # its tokens to feed: the last one sampled, or of prompt⊕z⊕y what is left
    waiting = list(range(rows))[::-1]  # the next row is the last
    out, logprobs, scored = ([[] for _ in range(rows)] for _ in range(3))
    ended = set()  # rows that have, and whose y is being scored
    if uniforms is None:
        uniforms = torch.rand(rows, max_new_tokens, dtype=torch.float64)
    uniforms = nn.functional.pad(uniforms.to(device), (0, look_every))  # for what is sampled past an end
    window = max((len(s.encode()) for s in stop_seqs), default=0) + 8  # tokens that a stop can take, and a margin

    def slabs():
        return (slab for layer in cache.layers for slab in (layer.keys, layer.values))

    def align(target: int) -> None:
        """Move the batch, so that its rows end at slot `target`."""
        nonlocal length
        kept = min(target, length)
        for slab in slabs() if target != length else ():
            slab[:, :, target - kept:target] = slab[:, :, length - kept:length].clone()
        length = target

    def prefill(chosen: list[int]) -> None:
        """Keys and values of prompts, padded on the left."""
        pads = [max(len(prompts[p]) for p in chosen) - len(prompts[p]) for p in chosen]
        ids = torch.tensor([[0] * pad + prompts[p] for pad, p in zip(pads, chosen)], device=device)  # (n, T)
        at = torch.arange(ids.shape[1], device=device) - torch.tensor(pads, device=device)[:, None]  # below 0: padding
        own = Cache(layer_class_to_replicate=DynamicLayer)
        model(input_ids=ids, attention_mask=at >= 0, position_ids=at.clamp(min=0), past_key_values=own, use_cache=True,
              logits_to_keep=1)
        if not cache.layers:
            cache.layers += [Slab(layer.keys, layer.values) for layer in own.layers]
        for i, (pad, p) in enumerate(zip(pads, chosen)):
            prefilled[p] = [x[i, :, pad:-1] for layer in own.layers for x in (layer.keys, layer.values)]

    def end(slot: int) -> None:
        """The row in `slot` has its last token: go on with y, or leave."""
        row = batch[slot]
        if continuations is None:
            batch[slot] = None
            return
        n, y = continuations(row, out[row])
        kept = owner[row] + out[row][:n]
        surplus = extent[row] - len(kept) + 1  # the last token is fed again, for the logits of y's first
        for slab in slabs() if surplus else ():
            slab[slot, :, surplus:length] = slab[slot, :, :length - surplus].clone()
        extent[row], ahead[row] = len(kept) - 1, kept[-1:] + y
        ended.add(row)

    def step(tokens, known, seen, at, heat, noise):
        """Feed tokens (n, fed) at slots `at` (fed,), `seen` (n,) before them; returns the next ones, sampled by noise
        (n, 1) where `known` (n, fed) is -1, and their log-probabilities at temperature `heat` (n, 1, 1)."""
        nonlocal places
        places, fed = at, tokens.shape[1]
        slot, last = torch.arange(visible, device=device), at[-1]
        mask = (slot <= last) & (slot > last - fed - seen[:, None])  # (n, visible)
        logits = model(input_ids=tokens, attention_mask=mask, position_ids=seen[:, None] + at - at[0],
                       past_key_values=cache, use_cache=True, logits_to_keep=fed).logits
        scores = (logits.to(wide) / heat).log_softmax(-1)  # (n, fed, V)
        if temperature == 0:
            drawn = scores.argmax(-1)
        else:
            cdf = scores[:, -1].exp().cumsum(-1, dtype=torch.float64)
            drawn = torch.searchsorted(cdf, noise * cdf[:, -1:], right=True).clamp(max=scores.shape[-1] - 1)
        tokens = torch.where(known < 0, drawn, known)
        return tokens, scores.gather(-1, tokens[..., None])[..., 0]

    def replay(*arguments):
        rows = len(arguments[0])
        if rows not in graphs:
            graphs[rows] = capture(step, arguments)
        return [x.clone() for x in graphs[rows](*arguments)]

    while waiting or any(row is not None for row in batch):
        # Waiting rows take the free places, an eighth of the batch at a time: a prefill delays all rows.
        free = [slot for slot in range(width) if batch[slot] is None]
        if waiting and len(free) >= max(1, width // 8):
            chosen = [(slot, waiting.pop()) for slot in free[:len(waiting)]]
            if new := sorted({row // num_samples for _, row in chosen} - set(prefilled)):
                prefill(new)
            align(max(length, *(extent[row] for _, row in chosen)))
            for slot, row in chosen:
                batch[slot] = row
                for slab, x in zip(slabs(), prefilled[row // num_samples]):
                    slab[slot, :, length - extent[row]:length] = x
                if (row + 1) % num_samples == 0:
                    del prefilled[row // num_samples]
                if max_new_tokens == 0:
                    end(slot)
        # Live rows come to the front, the last into the first hole.
        live = sum(row is not None for row in batch)
        holes = [slot for slot in range(live) if batch[slot] is None]
        movers = [slot for slot in range(live, width) if batch[slot] is not None]
        if holes:
            to, of = torch.tensor([holes, movers], device=device)
            for slab in slabs():
                slab[to, :, :length] = slab[of, :, :length]
        for hole, mover in zip(holes, movers):
            batch[hole], batch[mover] = batch[mover], None
        if not live:
            continue
        longest = max(extent[row] for row in batch[:live])
        if length - longest > slack:
            align(longest)

        # A few steps without a look: feed a token of each row, sample or score the next. Where all rows are at their y,
        # one step feeds what they all have ahead, to 256 positions in all: their logits exist at once.
        fed, steps, run, n = 1, look_every, step, live
        if ended.issuperset(batch[:live]):
            fed, steps = max(1, min(min(len(ahead[row]) for row in batch[:live]) - 1, 256 // live)), 1
        elif capture is not None:
            run, n = replay, min(width, 1 << (live - 1).bit_length())
        now = batch[:live] + [0] * (n - live)  # a captured step feeds free places too: what row 0 has, for nothing
        given = [(ahead[row] + [-1] * steps)[:steps * fed + 1] for row in now]
        given = torch.tensor(given, device=device)  # (n, steps * fed + 1), -1: to be sampled
        tokens = given[:, :fed]
        seen = torch.tensor([extent[row] for row in now], device=device)
        at = torch.arange(length, length + fed, device=device)
        # What is fed past a row's end, until the host looks, stays at its last position: a learned table ends there.
        last = [extent[row] + (len(ahead[row]) - 1 if row in ended else max_new_tokens - len(out[row])) for row in now]
        last = torch.tensor(last, device=device)  # (n,)
        heat = torch.tensor([[[1.0 if row in ended else temperature or 1.0]] for row in now], dtype=wide, device=device)
        columns = torch.tensor([range(len(out[row]), len(out[row]) + steps) for row in now], device=device)
        noise = uniforms[torch.tensor(now, device=device)[:, None], columns]  # (n, steps)
        results = []  # of each step: tokens and their log-probabilities, (n, fed)
        for i in range(steps):
            visible = slots if run is replay else length + fed
            results.append(run(tokens, given[:, i + 1:i + 1 + fed], seen, at, heat, noise[:, i:i + 1]))
            tokens, seen, at, length = results[-1][0], (seen + fed).minimum(last), at + fed, length + fed

        # Look.
        drawn, picked = (torch.cat(x, 1).tolist() for x in zip(*results))
        for slot, row in enumerate(now[:live]):
            extent[row] += steps * fed
            if row in ended:
                known = min(steps * fed, len(ahead[row]) - 1)
                scored[row] += picked[slot][:known]
                ahead[row] = ahead[row][known:]
                if len(ahead[row]) == 1:
                    batch[slot] = None
                continue
            ahead[row] = drawn[slot][-1:]
            for token, logprob in zip(drawn[slot], picked[slot]):
                out[row].append(token)
                logprobs[row].append(logprob)
                text = decode(out[row][-window:]) if stop_seqs else ""
                if token in stop_ids or any(s in text for s in stop_seqs) or len(out[row]) == max_new_tokens:
                    end(slot)
                    break
    return list(zip(out, logprobs, scored))


def truncate(ids: list[int], stop_ids: typing.Collection[int], stop_seqs: typing.Sequence[str],
             decode: Callable[[list[int]], str]) -> tuple[int, int, bool]:
    """Where the rationale z ends in what was sampled: (n, m, finished).

    z is ids[:n]; ids[n:m] is the stop, through the token that completes it; not finished: n = m = len(ids). A stop
    token is cut before. A stop sequence is matched in the decoded text, the first to be complete counts, and a token
    that contains any of its first visible character is cut: z keeps the white space in front of it. So x⊕z is always
    a prefix of the sampled ids.
    """
    length = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    text = decode(ids[:length])
    ends = [text.index(s) + len(s) for s in stop_seqs if s in text]
    if not ends:
        return length, min(length + 1, len(ids)), length < len(ids)
    m = bisect_left(range(length), True, key=lambda i: decode(ids[:i + 1]).startswith(text[:min(ends)])) + 1
    begun = decode(ids[:m])  # one token may complete several stop sequences: the one that starts first cuts
    start = min(begun.index(s) + len(s) - len(s.lstrip() or s) for s in stop_seqs if s in begun)
    n = next(n for n in range(m - 1, -1, -1) if text[:start].startswith(decode(ids[:n])))
    return n, m, True


def token_logprobs(hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], targets: torch.Tensor,
                   temperature: torch.Tensor | float | None = None, chunk: int | None = None,
                   slopes: torch.Tensor | None = None):
    """log softmax(head(hidden) / temperature)[targets], natural log, float32 at least.

    hidden (N, H), targets (N,), temperature (N,) or a number, None is 1; returns (N,), differentiable. The logits exist
    for `chunk` positions at a time (default: 1024 on a GPU, else H / 2, at least 256; each adds a gradient to the
    weight) and are computed again in the backward pass: never (N, V) whole.
    slopes (N,): d loss / d result, where it is known beforehand. Then nothing is computed twice: head's parameters get
    their gradients here, and what is returned is the result, without a graph, and d loss / d hidden (N, H).
    """
    chunk = chunk or (1024 if hidden.is_cuda else max(256, hidden.shape[1] // 2))

    def some(hidden, targets, temperature=None):
        logits = head(hidden)  # (chunk, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if temperature is not None:
            logits = logits / temperature[:, None].to(logits.dtype)
        return -nn.functional.cross_entropy(logits, targets, reduction="none")

    inputs = [hidden, targets]
    if temperature is not None:  # to divide by 1 would be a pass over the logits for nothing
        inputs.append(torch.as_tensor(temperature, dtype=torch.float64, device=hidden.device).expand(len(targets)))
    parts = zip(*(x.split(chunk) for x in inputs))
    if slopes is None:
        return torch.cat([checkpoint(some, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])
    logprobs, hidden_grads = [], []
    for (here, *rest), slope in zip(parts, slopes.split(chunk)):
        here = here.detach().requires_grad_()
        part = some(here, *rest)
        part.backward(slope.to(part.dtype))
        logprobs.append(part.detach())
        hidden_grads.append(here.grad)
    return torch.cat(logprobs), torch.cat(hidden_grads)


class Scorer(nn.Module):
    """A causal LM whose forward pass scores chosen tokens: the root module of FSDP, whose hooks need one forward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        config, logits = self.model.config.get_text_config(), self.model.get_output_embeddings()(hidden)
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if scale := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / scale
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        return cap * torch.tanh(logits / cap) if cap else logits

    def forward(self, ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, targets: torch.Tensor,
                temperature: torch.Tensor | None = None, slopes: torch.Tensor | None = None):
        """ids (B, T), right-padded; the others (N,). Returns log π(targets | ids[rows, :columns]) (N,); with `slopes`,
        as in token_logprobs, also a scalar whose backward pass brings the gradient of the rest of the model.

        A target need not be ids[rows, columns]: the token that ended z is scored where y begins. No attention mask is
        needed: the model is causal and padding only follows.
        """
        hidden = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, H)
        hidden = hidden[rows, columns - 1]  # (N, H)
        if slopes is None:
            return token_logprobs(hidden, self.head, targets, temperature)
        logprobs, hidden_grads = token_logprobs(hidden, self.head, targets, temperature, slopes=slopes)
        return logprobs, (hidden * hidden_grads).sum()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------
def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(items: list) -> list:
    """The items of all ranks, on every rank, in the order of the ranks."""
    parts: list = [items]
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def on_rank_0(work: Callable[[], object]):
    """work()'s result on every rank, run on rank 0 alone; what goes wrong there is raised on all: none waits."""
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


def uniform_rows(keys: typing.Iterable[str], length: int) -> torch.Tensor:
    """(rows, length) uniform numbers in [0, 1), float64; each row a pure function of its key."""
    rows = [[generator.random() for _ in range(length)] for generator in map(random.Random, keys)]
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), length)


def interval95(rate: float, n: int) -> list[float]:
    """Wilson's 95% score interval of a rate measured on n rows."""
    z = 1.959964
    centre, half = rate + z * z / (2 * n), z * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5
    return [max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))]


def majority(samples: list[dict]) -> bool:
    """Whether the most frequent prediction of graded samples is right; of equally frequent ones the first counts."""
    votes = Counter(s["prediction"] for s in samples if s["prediction"] is not None).most_common(1)
    return any(s["correct"] for s in samples if votes and s["prediction"] == votes[0][0])


def evaluate(model: nn.Module, tokenizer, examples: list[Example], grader: str, *, response_length: int,
             num_samples: int = 0, temperature: float = 1.0, stop_token: str = "eos",
             stop_seqs: typing.Sequence[str] = (), batch_size: int = 64, seed: int = 0, title: str = "") -> dict:
    """Greedy accuracy, self-consistency over num_samples samples, and log-probabilities of the gold answers.

    Generation ends at a stop token only, so that the answer is there to be graded; z is then cut by training's rule.
    All ranks call this and share the examples; all get the same result, rows in the order of `examples`.
    """
    decode, stop_ids = decoder(tokenizer), stop_token_ids(tokenizer, model, stop_token)
    room = max(len(ids) for example in examples for ids in example.answers)

    mine = sorted(range(rank(), len(examples), world_size()), key=lambda i: len(examples[i].prompt))
    bar = tqdm(total=len(mine) * (2 + num_samples), desc=title, unit="answer", disable=rank() > 0, leave=False)

    def outputs(samples: int, length: int) -> list[list[dict]]:
        """For each of this rank's examples `samples` graded outputs (0: one, greedy) of at most `length` tokens."""
        k, cuts = max(1, samples), {}

        def continuation(row: int, ids: list[int]) -> tuple[int, list[int]]:
            bar.update()
            cuts[row] = n, _, _ = truncate(ids, stop_ids, stop_seqs, decode)
            return n, answer_ids(examples[mine[row // k]], ids[:n], decode)

        drawn = generate(model, [examples[i].prompt for i in mine], length, num_samples=k, stop_ids=stop_ids,
                         temperature=temperature if samples else 0.0, continuations=continuation, room=room,
                         uniforms=uniform_rows([f"{seed}/evaluate/{i}/{j}" for i in mine for j in range(samples)],
                                               length) if samples else None, batch_size=batch_size)
        graded = []
        for row, (ids, _, answer_logprobs) in enumerate(drawn):
            output = decode(ids[:-1] if ids and ids[-1] in stop_ids else ids)
            prediction, correct = grade(grader, output, examples[mine[row // k]].row)
            graded.append({"output": output, "prediction": prediction, "correct": correct, "finished": cuts[row][2],
                           "rationale_length": cuts[row][0], "answer_logprob": sum(answer_logprobs)})
        return [graded[i:i + k] for i in range(0, len(graded), k)]

    greedy, bare = outputs(0, response_length), outputs(0, 0)
    sampled = outputs(num_samples, response_length) if num_samples else [[]] * len(mine)
    bar.close()
    rows = [(i, {"query": prompt_text(tokenizer, examples[i].row["queries"]),
                 "groundtruth": examples[i].row["groundtruth"], **row,
                 "answer_logprob": mean(s["answer_logprob"] for s in samples or [row]),
                 "answer_logprob_no_rationale": empty["answer_logprob"],
                 "majority": majority(samples),
                 "samples": samples}) for i, [row], [empty], samples in zip(mine, greedy, bare, sampled)]
    rows = [row for _, row in sorted(gather(rows), key=lambda pair: pair[0])]
    result = {"n": len(rows), "num_samples": num_samples, "accuracy": mean(r["correct"] for r in rows)}
    if num_samples:
        result["maj_at_k"] = mean(r["majority"] for r in rows)
    for name in ("finished", "answer_logprob", "answer_logprob_no_rationale", "rationale_length"):
        result[name] = mean(r[name] for r in rows)
    result |= {f"{name}_ci95": interval95(result[name], len(rows)) for name in RATES if name in result}
    return result | {"rows": rows}


RATES = ("accuracy", "maj_at_k", "finished")


def print_results(results: dict[str, dict]) -> None:
    """The table of evaluations of the same rows, side by side, and a few answers of each."""
    first = next(iter(results.values()))
    labels = {"accuracy": "greedy accuracy", "maj_at_k": f"maj@{first['num_samples']}",
              "answer_logprob": "log π(y|x⊕z)", "answer_logprob_no_rationale": "log π(y|x), no rationale",
              "finished": "rationales finished", "rationale_length": "rationale length, tokens"}
    print(f"\n{first['split']}: {first['n']} questions; rates with their 95% interval")
    print(" " * 31 + "".join(f"{name:>24}" for name in results))
    for name in (name for name in labels if name in first):
        cells = [f"{r[name]:.1%} [{r[f'{name}_ci95'][0]:.1%}, {r[f'{name}_ci95'][1]:.1%}]" if name in RATES
                 else f"{r[name]:.3f}" for r in results.values()]
        print(f"  {labels[name]:<29}" + "".join(f"{cell:>24}" for cell in cells))
    for i in range(min(2, first["n"])):
        print(f"\n  Q: {first['rows'][i]['query'].strip()}\n  gold: {first['rows'][i]['groundtruth']}")
        for name, result in results.items():
            row = result["rows"][i]
            print(f"  {name} ({'right' if row['correct'] else 'wrong'}): {row['output'].strip()}")
    print(flush=True)


def print_rollouts(path: str) -> None:
    """Of the last step in a samples.jsonl, the rollouts with the highest and the lowest advantage."""
    with open(path, "rb") as file:
        rows = [json.loads(line) for line in file if line.endswith(b"\n")]  # a line cut short is still being written
    last = [row for row in rows if row["step"] == rows[-1]["step"] and row["advantage"] is not None]
    if not last:  # no step yet, or a reward that is not finite
        return
    last.sort(key=lambda row: row["advantage"])
    print(f"  Step {last[0]['step']}, of {len(last)} logged rollouts:")
    for which, row in (("highest", last[-1]), ("lowest", last[0])):
        query = " ".join(row["query"].split())
        print(f"\n  {which} advantage {row['advantage']:.3f}, reward {row['reward']:.3f}, "
              f"{'finished' if row['finished'] else 'not finished'}\n  Q: {'…' * (len(query) > 100)}{query[-100:]}\n"
              f"  rationale: {row['rationale'].strip()}\n  answer: {row['response'].strip()}")
    print(flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------
def key(default, help: str, choices: tuple | None = None):
    """A settings field: its default, what it means, and what it may be."""
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**factory, metadata={"help": help, "choices": choices})


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message.removeprefix("argument --"))


def parse(cls: type, argv: list[str], doc: str, below: dict | None = None):
    """Settings of the dataclass `cls`: its defaults < `below`, from a YAML file < the command line; --help lists them.

    UserError names an unknown key and the nearest known one, or the key whose value has the wrong type.
    """
    def converter(field: dataclasses.Field) -> Callable[[str], object]:
        kind, *optional = typing.get_args(field.type) or (field.type,)

        def convert(text: str):
            if optional and text.lower() in ("none", "null"):
                return None
            if kind is bool:
                return ("false", "true").index(text.lower()) == 1
            return kind(text)

        convert.__name__ = {bool: "true or false", int: "whole number", float: "number"}.get(kind, "text")
        return convert

    parser = Parser(description=doc, allow_abbrev=False, usage="%(prog)s [--key value ...]",
                    formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=120))
    fields, defaults = {field.name: field for field in dataclasses.fields(cls)}, vars(cls())
    for name, field in fields.items():
        parser.add_argument(f"--{name}", type=converter(field), choices=field.metadata["choices"], metavar="",
                            default=defaults[name], nargs="*" if isinstance(defaults[name], list) else None,
                            help=f"{field.metadata['help']} [{defaults[name]}]".replace("%", "%%"))
    words = []
    for name, value in (below or {}).items():
        if isinstance(value, list | None) and isinstance(defaults.get(name), list):
            parser.set_defaults(**{name: [str(item) for item in value or []]})  # as words they could be taken for flags
        else:
            words.append(f"--{name}={value}")
    for word in words + argv:
        name = word[2:].split("=")[0]
        if word.startswith("--") and name not in (*fields, "help"):
            near = difflib.get_close_matches(name, fields, 1, 0.5)
            raise UserError(f"{name}: unknown key; " + (f"did you mean {near[0]}?" if near else "--help lists all"))
    return cls(**vars(parser.parse_args(words + argv)))


def check_range(settings, names: typing.Iterable[str], above: bool = True) -> None:
    """UserError where one of the named settings is not finite, or not above 0 (above=False: not from 0 up)."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not (0 < value < float("inf") or value == 0 and not above):
            raise UserError(f"{name}: {value} is not a number {'above 0' if above else 'from 0 up'}")


def read_yaml(path: str) -> dict:
    """The keys of a YAML file; UserError where it cannot be read or holds anything else."""
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not made of `key: value` lines")
    return content


M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of malloc.h


def init_distributed() -> torch.device:
    """Join torchrun's process group, or make one of a single process; returns this rank's device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    elif sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        # glibc gives freed memory back, and each pass would get it anew, zeroed page by page: keep what is not huge.
        if mallopt(M_MMAP_THRESHOLD, 64 << 20):  # glibc before 2.35 refuses
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        wait = datetime.timedelta(hours=1)  # for rank 0, which may write a large model; NCCL's own is 10 minutes
        dist.init_process_group("nccl" if cuda else "gloo", timeout=wait, **alone)
    return device


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run a script's main: bad input ends in one line and exit code 2."""
    code = 0
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # where it cannot show a π
    try:
        main(sys.argv[1:])
    except (UserError, OSError, FloatingPointError) as error:  # OSError: a file or disk that fails
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
    if dist.is_initialized() and (ranks == 1 or code == 0):  # else NCCL might wait for ranks that wait for this one
        dist.destroy_process_group()
    if ranks > 1:  # A gloo thread that outlives the group (DTensor's cache keeps it) and gives a tensor back while the
        atexit._run_exitfuncs()  # interpreter shuts down would abort the process: end without that shutdown.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


@dataclasses.dataclass
class Common:
    """What training and evaluation both take."""
    dataset_name: str | None = key(None, f"one of {', '.join(DATASETS)}")
    dataset_path: str | None = key(None, "a local folder or file of the same columns in place of the hub")
    grader: str | None = key(None, "how answers are compared; default: the dataset's", (*GRADERS, None))
    limit: int | None = key(None, "rows that are evaluated, the first ones; training takes all")
    num_samples: int = key(0, "samples per question for maj@k and log π(y|x⊕z) in the table; 0: greedy only")
    response_length: int = key(500, "L, tokens of a rationale at most")
    temperature: float = key(1.0, "that rationales are sampled and scored at")
    stop_token: str = key("eos", "besides the end of the turn: eos, pad or both", ("eos", "pad", "both"))
    stop_seqs: list[str] = key(["The answer is"], "strings that end a rationale, wherever the tokenizer splits them")
    per_device_eval_batch_size: int = key(64, "rows decoded together in evaluation")
    dtype: str = key("auto", "of the arithmetic; auto: bfloat16 where the GPU or CPU has it, else float32",
                     ("auto", "float32", "bfloat16"))
    attn_implementation: str = key("auto", "auto: the model's own, and in training's passes an installed flash-attn")
    trust_remote_code: bool = key(False, "run the model repository's own Python code")
    seed: int = key(0, "of sampling and, in training, of the data's order")

    def __post_init__(self):
        check_range(self, ("response_length", "per_device_eval_batch_size", "limit"))
        check_range(self, ("num_samples", "temperature"), above=False)
        if self.num_samples and not self.temperature:
            raise UserError("temperature: 0 makes all num_samples samples the same; use a temperature above 0")
        if "" in self.stop_seqs:
            raise UserError("stop_seqs: an empty string would end every rationale at once; leave it out")


@dataclasses.dataclass
class Settings(Common):
    """Of evaluate.py. The run that a model belongs to gives the defaults of the keys that it has too."""
    model: str | None = key(None, "folder or hub id; default: the newest run under runs/, its base beside its best")
    split: str | None = key(None, "train, validation, test or all; default: test, all of a single file")
    few_shot: int = key(0, "worked examples in the prompt, 0 to 8 (gsm8k)")
    out: str | None = key(None, "JSON file of --model's result; default: evaluation-NAME….json in its run, or here")

    def __post_init__(self):
        super().__post_init__()
        if self.out and (os.path.isdir(self.out) or not os.path.isdir(os.path.dirname(self.out) or ".")):
            raise UserError(f"out {self.out}: not a file in a folder that exists")
        if self.out and self.model is None:
            raise UserError(f"out {self.out}: needs --model")


def read_run(folder: str) -> dict:
    """The settings of the run in a folder; empty where it holds none."""
    path = os.path.join(folder, "config.yaml")
    settings = read_yaml(path) if os.path.exists(path) else {}
    return settings if "model_name_or_path" in settings else {}


def newest_run() -> str:
    """The newest run under runs/ that holds a trained model; the making of the embedded base does not count."""
    runs = [os.path.dirname(os.path.dirname(path)) for path in glob.glob("runs/*/best/config.json")]
    runs = [run for run in runs if read_run(run).get("model_name_or_path", "embedded") != "embedded"]
    if not runs:
        raise UserError("no trained run under runs/; train one with `python latro.py`, or name a model with --model")
    return max(runs, key=lambda run: os.path.getmtime(os.path.join(run, "config.yaml")))


def main(argv: list[str], run: str | None = None) -> None:
    """Evaluate --model, or the base beside the best model of `run`; write the JSON of each and print the table."""
    s, closing = parse(Settings, argv, __doc__), run is not None
    run = os.path.dirname(os.path.normpath(s.model)) if s.model else run or newest_run()
    config = read_run(run)
    other = s.dataset_name not in (None, config.get("dataset_name"))  # then the run's data is not meant
    known = vars(s).keys() - {"seed", *(["dataset_path", "grader"] if other else [])}
    s = parse(Settings, argv, __doc__, {k: v for k, v in config.items() if k in known and v is not None})
    if s.model:
        models = {os.path.basename(os.path.normpath(s.model)): s.model}
    else:
        models = {"base": config["model_name_or_path"], "best": os.path.join(run, "best")}
    if s.model and read_run(s.model):
        raise UserError(f"model {s.model}: a run, not a model; give {os.path.join(s.model, 'best')}")
    if s.dataset_name is None:
        raise UserError(f"dataset_name: which one? {', '.join(DATASETS)}")
    split = s.split or ("all" if os.path.isfile(s.dataset_path or "") else "test")
    rows = load_rows(s.dataset_name, split, s.dataset_path, s.few_shot)
    grader, device, results = choose_grader(s.grader, s.dataset_name, rows), init_distributed(), {}
    rows = rows[:s.limit]  # after the grader is chosen: a few rows may all be numbers
    for label, folder in models.items():
        model, tokenizer = load_model(folder, resolve_dtype(s.dtype, device), device, s.attn_implementation,
                                      s.trust_remote_code)
        examples = make_examples(tokenizer, rows, context_left(model, s.response_length))
        result = evaluate(model, tokenizer, examples, grader, response_length=s.response_length, title=label,
                          num_samples=s.num_samples, temperature=s.temperature, stop_token=s.stop_token,
                          stop_seqs=s.stop_seqs, batch_size=s.per_device_eval_batch_size, seed=s.seed)
        results[label] = {"model": folder, "dataset": s.dataset_name, "split": split} | result
        del model  # one at a time is held
    if rank() == 0:
        part = f"-{s.dataset_name}" * other + f"-{split}" * (split != closing_split(s.dataset_path))
        part += f"-{s.few_shot}-shot" * (s.few_shot > 0)
        part += f"-{s.limit}" * (not closing and s.limit != config.get("limit"))  # its own name: nothing is overwritten
        folder = run if config else "."
        outs = {label: s.out or os.path.join(folder, f"evaluation-{label}{part}.json") for label in results}
        for label, result in results.items():  # before anything is printed: the pipe may be closed
            with open(outs[label], "w", encoding="utf-8") as file:
                json.dump(result, file, indent=1, ensure_ascii=False)
        print_results(results)
        samples = os.path.join(run, "samples.jsonl")
        if s.model is None and config.get("objective") == "latro" and os.path.exists(samples):
            print_rollouts(samples)
        for label, out in outs.items():
            print(f"{label}: every row in {out}")


def closing_split(dataset_path: str | None) -> str:
    """What a run's closing table is made of: a single file has no test rows."""
    return "validation" if os.path.isfile(dataset_path or "") else "test"


def context_left(model: nn.Module, response_length: int) -> int | None:
    """Tokens that the model's context leaves for x⊕y beside a rationale."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return context and context - response_length


if __name__ == "__main__":
    run_script(main)
