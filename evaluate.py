"""What is judged: load a model, generate rationales, cut them, score text under a model, measure accuracy.

    python evaluate.py                                        the newest run under runs/: its base model beside its best
    python evaluate.py --model DIR_OR_HUB_ID --dataset_name gsm8k --num_samples 8
    torchrun --nproc_per_node 8 evaluate.py --model …         the ranks share the rows

`generate`, `truncate` and `token_logprobs` take tensors and numbers alone and are made to be copied. Training evaluates
with the `evaluate` below, so the two cannot disagree.
"""
import argparse
import dataclasses
import difflib
import glob
import importlib.util
import json
import os
import random
import sys
import typing
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable

import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils import logging as transformers_logging

from data import (DATASETS, GRADERS, Example, UserError, answer_ids, decoder, default_grader, end_of_turn_id, grade,
                  load_rows, make_examples, prompt_text)

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()  # ours show the long work


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------
def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype: what is asked for; "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def load_model(path: str, dtype: torch.dtype, device: torch.device | str = "cpu", attn_implementation: str = "auto",
               trust_remote_code: bool = False):
    """(model, tokenizer) of a folder or hub id; UserError where either cannot be loaded or they do not fit together."""
    if attn_implementation == "auto":
        flash = torch.device(device).type == "cuda" and importlib.util.find_spec("flash_attn") is not None
        attn_implementation = "flash_attention_2" if flash else "sdpa"
    if not os.path.isdir(path) and (os.path.exists(path) or path.startswith((".", "/", "~", "runs/")) or path.count("/") > 1):
        raise UserError(f"model {path}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attn_implementation,
                                                     trust_remote_code=trust_remote_code, use_safetensors=True)
    except Exception as error:  # transformers raises dozens of types: no network, no config, a broken file, no access
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"model {path}: cannot be loaded ({reason}); give a Hugging Face folder or hub id") from None
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(f"model {path}: the tokenizer has {len(tokenizer)} tokens and the embedding "
                        f"{model.get_input_embeddings().num_embeddings}; they do not belong together")
    return model.to(device).eval(), tokenizer


def stop_token_ids(tokenizer, model, stop_token: str) -> set[int]:
    """Ids that end generation: `stop_token` (eos, pad or both), the end of the turn, and the model's own EOS ids."""
    ids = {end_of_turn_id(tokenizer)}
    own = model.generation_config.eos_token_id
    ids.update(own if isinstance(own, list) else [own])
    ids.update([tokenizer.eos_token_id] if stop_token in ("eos", "both") else [])
    ids.update([tokenizer.pad_token_id] if stop_token in ("pad", "both") else [])
    return ids - {None}


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
) -> list[tuple[list[int], list[float], list[float]]]:
    """Sample `num_samples` continuations of each prompt, with a KV cache.

    Each prompt is prefilled once and its cache expanded to num_samples rows; prompts may differ in length (left padding).
    A row ends with a token of `stop_ids`, with the token that completes one of `stop_seqs` in the decoded text, or after
    max_new_tokens; it then leaves the batch. Row i of the result belongs to prompt i // num_samples.

    model: a transformers causal LM. temperature 0 is greedy. uniforms: (rows, max_new_tokens) in [0, 1), the randomness:
    row i's t-th token inverts the distribution's CDF at uniforms[i, t], so that a sample depends neither on its batch nor
    on the other rows. continuations(i, ids) → (n, y): once all rows have ended, y (at most `room` tokens) is scored after
    prompt⊕ids[:n] on the live cache, which costs len(y) positions and no second pass over the prompt.

    Returns per row (ids with the stop, log-probabilities of ids at `temperature` (greedy: at 1), those of y at 1).
    """
    device, rows = model.device, len(prompts) * num_samples
    width = max(map(len, prompts))
    slab_length, length = width + max_new_tokens + room, 0

    class Slab(DynamicLayer):
        """One layer's keys and values, preallocated; live rows first. Rows that ended stay behind them, intact."""

        def update(self, keys, values, *args, **kwargs):  # (n, heads, new tokens, head size)
            if not self.is_initialized:  # the prefill: one row per prompt comes in, num_samples rows are kept
                self.lazy_initialization(keys, values)
                self.keys, self.values = (x.new_zeros(rows, x.shape[1], slab_length, x.shape[3]) for x in (keys, values))
                for slab, x in ((self.keys, keys), (self.values, values)):
                    slab[:, :, :width] = x.repeat_interleave(num_samples, 0)
                return keys, values
            n, end = keys.shape[0], length + keys.shape[2]
            self.keys[:n, :, length:end], self.values[:n, :, length:end] = keys, values
            return self.keys[:n, :, :end], self.values[:n, :, :end]

        def get_seq_length(self):
            return length

    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), slab_length, dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt):] = torch.tensor(prompt)
        mask[i, width - len(prompt):] = True
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask[:, :width].cumsum(-1) - 1).clamp(min=0)
    cache = Cache(layer_class_to_replicate=Slab)
    logits = model(input_ids=ids, attention_mask=mask[:, :width], position_ids=positions, past_key_values=cache,
                   use_cache=True, logits_to_keep=1).logits[:, -1].repeat_interleave(num_samples, 0)  # (rows, V)
    length = width
    mask = mask.repeat_interleave(num_samples, 0)
    prompt_lengths = torch.tensor([len(p) for p in prompts], device=device).repeat_interleave(num_samples)
    uniforms = None if uniforms is None else uniforms.to(device)

    out, logprobs = [[] for _ in range(rows)], [[] for _ in range(rows)]
    order = torch.arange(rows, device=device)  # slab row → row of the result; the first `live` are still going
    live = rows
    window = max((len(s.encode()) for s in stop_seqs), default=0) + 8  # tokens that a stop sequence can take, and a margin
    for step in range(max_new_tokens):
        now = order[:live]
        scores = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # (live, V)
        if temperature == 0:
            tokens = scores.argmax(-1)
        else:
            cdf = scores.double().exp_().cumsum(-1)
            tokens = torch.searchsorted(cdf, uniforms[now, step, None].double() * cdf[:, -1:], right=True)[:, 0]
            tokens = tokens.clamp(max=scores.shape[-1] - 1)
        picked = scores.gather(-1, tokens[:, None])[:, 0].tolist()
        going, ended = [], []
        for slot, (row, token, logprob) in enumerate(zip(order[:live].tolist(), tokens.tolist(), picked)):
            out[row].append(token)
            logprobs[row].append(logprob)
            text = decode(out[row][-window:]) if stop_seqs else ""
            (ended if token in stop_ids or any(s in text for s in stop_seqs) else going).append(slot)
        if not going or step == max_new_tokens - 1:
            break
        if ended:  # close the gaps: swap rows that ended near the front with live ones from the back
            holes = [s for s in ended if s < len(going)]
            movers = [s for s in going if s >= len(going)]
            a, b = (torch.tensor(x, dtype=torch.long, device=device) for x in (holes + movers, movers + holes))
            order[a], tokens[a] = order[b], tokens[b]
            for layer in cache.layers if holes else ():
                for slab in (layer.keys, layer.values):
                    slab[a, :, :length] = slab[b, :, :length]
            live = len(going)
            now = order[:live]
        mask[now, length] = True
        logits = model(input_ids=tokens[:live, None], attention_mask=mask[now, :length + 1],
                       position_ids=(prompt_lengths[now] + step)[:, None], past_key_values=cache, use_cache=True,
                       logits_to_keep=1).logits[:, -1]
        length += 1
    if continuations is None:
        return [(out[i], logprobs[i], []) for i in range(rows)]

    # Score y on the cache. The last token of prompt⊕ids[:n] is fed again, in front of y, for the logits of y's first token.
    chosen = [continuations(row, out[row]) for row in range(rows)]
    extra = max(len(y) for _, y in chosen)
    fed = torch.zeros(rows, extra, dtype=torch.long)
    mask[:, width:] = False
    for row, (n, y) in enumerate(chosen):
        context = prompts[row // num_samples] + out[row][:n]
        fed[row, :len(y)] = torch.tensor([context[-1], *y[:-1]])
        mask[row, width:width + n] = True
        mask[row, width + n - 1] = False  # that last token: its new copy counts
        mask[row, length:length + len(y)] = True
    starts = prompt_lengths + torch.tensor([n for n, _ in chosen], device=device) - 1
    positions = starts[:, None] + torch.arange(extra, device=device)
    logits = model(input_ids=fed.to(device)[order], attention_mask=mask[order, :length + extra],
                   position_ids=positions[order], past_key_values=cache, use_cache=True).logits  # (rows, extra, V)
    scored = [[] for _ in range(rows)]
    for slot, row in enumerate(order.tolist()):
        y = torch.tensor(chosen[row][1], device=device)
        scored[row] = logits[slot, :len(y)].float().log_softmax(-1).gather(-1, y[:, None])[:, 0].tolist()
    return [(out[i], logprobs[i], scored[i]) for i in range(rows)]


def truncate(ids: list[int], stop_ids: typing.Collection[int], stop_seqs: typing.Sequence[str],
             decode: Callable[[list[int]], str]) -> tuple[int, int, bool]:
    """Where the rationale z ends in what was sampled: (n, m, finished).

    z is ids[:n]; ids[n:m] is the stop, through the token that completes it; not finished: n = m = len(ids). A stop token
    is cut before. A stop sequence is matched in the decoded text, the first to be complete counts, and every token that
    contains any of its first visible character is cut: z keeps the white space in front of it. So x⊕z is always a prefix
    of the sampled ids.
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
                   temperature: torch.Tensor | float = 1.0, chunk: int = 1024) -> torch.Tensor:
    """log softmax(head(hidden) / temperature)[targets], natural log, float32 at least.

    hidden (N, H), targets (N,), temperature a number or (N,); returns (N,), differentiable. The logits exist for `chunk`
    positions at a time and are computed again in the backward pass, never (N, V) whole.
    """
    def some(hidden, targets, temperature):
        logits = head(hidden)  # (chunk, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature[:, None]
        return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)

    temperature = torch.as_tensor(temperature, device=hidden.device).expand(len(targets))
    parts = zip(hidden.split(chunk), targets.split(chunk), temperature.split(chunk))
    return torch.cat([checkpoint(some, *part, use_reentrant=False) for part in parts])


class Scorer(nn.Module):
    """A causal LM whose forward pass scores chosen tokens; the root module of FSDP, so that its hooks see one forward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.model.get_output_embeddings()(hidden)
        cap = getattr(self.model.config, "final_logit_softcapping", None)  # Gemma 2
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(self, ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, targets: torch.Tensor,
                temperature: torch.Tensor):
        """ids (B, T), right-padded; the others (N,). Returns log π(targets | ids[rows, :columns]) (N,).

        A target need not be ids[rows, columns]: the token that ended z is scored where y begins. No attention mask is
        needed: the model is causal and padding only follows.
        """
        hidden = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, H)
        return token_logprobs(hidden[rows, columns - 1], self.head, targets, temperature)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------
def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def uniform_rows(keys: typing.Iterable[str], length: int) -> torch.Tensor:
    """(rows, length) uniform numbers in [0, 1), float64; each row a pure function of its key."""
    rows = []
    for key in keys:
        generator = random.Random(key)
        rows.append([generator.random() for _ in range(length)])
    return torch.tensor(rows, dtype=torch.float64).view(-1, length)


def interval95(rate: float, n: int) -> list[float]:
    """Wilson's 95% score interval of a rate measured on n rows."""
    z = 1.959964
    centre, half = rate + z * z / (2 * n), z * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5
    return [max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))]


def evaluate(model: nn.Module, tokenizer, examples: list[Example], grader: str, *, response_length: int,
             num_samples: int = 0, temperature: float = 1.0, stop_token: str = "eos", stop_seqs: typing.Sequence[str] = (),
             batch_size: int = 64, seed: int = 0, title: str = "evaluate") -> dict:
    """Greedy accuracy, self-consistency over num_samples samples, and log-probabilities of the gold answers.

    Generation ends at a stop token only, so that the answer is there to be graded; z is then cut by training's rule.
    All ranks call this and share the examples; all get the same result, rows in the order of `examples`.
    """
    decode, stop_ids = decoder(tokenizer), stop_token_ids(tokenizer, model, stop_token)
    room = max(len(ids) for example in examples for ids in example.answers)
    mine = sorted(range(rank(), len(examples), world_size()), key=lambda i: len(examples[i].prompt))
    rows: dict[int, dict] = {}

    def answers_of(chunk: list[int], samples: int, length: int) -> list[list[dict]]:
        """`samples` graded outputs (0: one, greedy) for each of the chunk's examples."""
        k, cuts = max(1, samples), {}

        def continuation(row: int, ids: list[int]) -> tuple[int, list[int]]:
            cuts[row] = truncate(ids, stop_ids, stop_seqs, decode)
            return cuts[row][0], answer_ids(examples[chunk[row // k]], ids[:cuts[row][0]], decode)

        keys = [f"{seed}/evaluate/{i}/{j}" for i in chunk for j in range(samples)]
        sampled = generate(model, [examples[i].prompt for i in chunk], length, num_samples=k,
                           temperature=temperature if samples else 0.0, uniforms=uniform_rows(keys, length) if samples else None,
                           stop_ids=stop_ids, continuations=continuation, room=room)
        graded = []
        for row, (ids, _, answer_logprobs) in enumerate(sampled):
            output = decode(ids[:-1] if ids and ids[-1] in stop_ids else ids)
            prediction, correct = grade(grader, output, examples[chunk[row // k]].row)
            graded.append({"output": output, "prediction": prediction, "correct": correct, "rationale_length": cuts[row][0],
                           "finished": cuts[row][2], "answer_logprob": sum(answer_logprobs)})
        return [graded[i:i + k] for i in range(0, len(graded), k)]

    bar = tqdm(total=len(mine), desc=title, unit="question", disable=rank() > 0, leave=False)
    width = max(1, batch_size // max(1, num_samples))
    for begin in range(0, len(mine), batch_size):
        chunk = mine[begin:begin + batch_size]
        samples = []
        for i in range(0, len(chunk) if num_samples else 0, width):
            samples += answers_of(chunk[i:i + width], num_samples, response_length)
        for j, (i, [greedy], [bare]) in enumerate(zip(chunk, answers_of(chunk, 0, response_length), answers_of(chunk, 0, 0))):
            drawn = samples[j] if num_samples else []
            votes = Counter(s["prediction"] for s in drawn if s["prediction"] is not None).most_common(1)
            rows[i] = {"query": prompt_text(tokenizer, examples[i].row["queries"]), "groundtruth": examples[i].row["groundtruth"],
                       **greedy, "answer_logprob": mean(s["answer_logprob"] for s in drawn or [greedy]),
                       "answer_logprob_no_rationale": bare["answer_logprob"], "samples": drawn,
                       "majority": any(s["correct"] for s in drawn if votes and s["prediction"] == votes[0][0])}
        bar.update(len(chunk))
    bar.close()
    if world_size() > 1:
        parts: list = [None] * world_size()
        dist.all_gather_object(parts, rows)
        rows = {i: row for part in parts for i, row in part.items()}

    ordered, n = [rows[i] for i in range(len(examples))], len(examples)
    result = {"n": n, "num_samples": num_samples, "accuracy": mean(r["correct"] for r in ordered)}
    result["accuracy_ci95"] = interval95(result["accuracy"], n)
    if num_samples:
        result["maj_at_k"] = mean(r.pop("majority") for r in ordered)
        result["maj_at_k_ci95"] = interval95(result["maj_at_k"], n)
    for name in ("answer_logprob", "answer_logprob_no_rationale", "finished", "rationale_length"):
        result[name] = mean(r[name] for r in ordered)
    result["finished_ci95"] = interval95(result["finished"], n)
    return result | {"rows": ordered}


def mean(values: typing.Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def print_results(results: dict[str, dict], shown: int = 2) -> None:
    """The table of one or more evaluations of the same rows, side by side, and a few answers of each."""
    def rate(result: dict, name: str) -> str:
        low, high = result[f"{name}_ci95"]
        return f"{result[name]:6.1%} [{low:.1%}, {high:.1%}]"

    first = next(iter(results.values()))
    k = first["num_samples"]
    lines = [("greedy accuracy", lambda r: rate(r, "accuracy")), (f"maj@{k}", lambda r: rate(r, "maj_at_k")),
             ("log π(y|x⊕z)", lambda r: f"{r['answer_logprob']:.3f}"),
             ("log π(y|x), no rationale", lambda r: f"{r['answer_logprob_no_rationale']:.3f}"),
             ("rationales finished", lambda r: rate(r, "finished")),
             ("rationale length, tokens", lambda r: f"{r['rationale_length']:.1f}")]
    print(f"\n{first['n']} questions, [95% interval]".ljust(32) + "".join(f"{name:>24}" for name in results))
    for label, value in lines:
        if k or not label.startswith("maj"):
            print(f"  {label:<29}" + "".join(f"{value(result):>24}" for result in results.values()))
    for i in range(min(shown, first["n"])):
        print(f"\n  Q: {first['rows'][i]['query'].strip()}\n  gold: {first['rows'][i]['groundtruth']}")
        for name, result in results.items():
            row = result["rows"][i]
            print(f"  {name} ({'right' if row['correct'] else 'wrong'}): {row['output'].strip()}")
    print(flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------
def key(default, help: str, choices: tuple | None = None):
    """A settings field: its default, what it means, and what it may be."""
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**factory, metadata={"help": help, "choices": choices})


def parse(cls: type, argv: list[str], doc: str, find_config: Callable[[str], str] | None = None):
    """Settings of the dataclass `cls`: defaults < the YAML file of --config < the command line; --help lists every key.

    UserError names an unknown key and the nearest known one, or the key whose value has the wrong type.
    """
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(message.removeprefix("argument --"))

    def converter(field):
        optional, kind = type(None) in typing.get_args(field.type), (typing.get_args(field.type) or (field.type,))[0]

        def convert(text: str):
            if optional and text.lower() in ("none", "null"):
                return None
            if kind is bool:
                return {"true": True, "false": False}[text.lower()]
            return kind(text)

        convert.__name__ = {bool: "true or false", int: "whole number", float: "number"}.get(kind, "text")
        return convert

    parser = Parser(description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, field in fields.items():
        default = getattr(cls(), name)
        parser.add_argument(f"--{name}", type=converter(field), choices=field.metadata["choices"], metavar="",
                            default=default, nargs="*" if isinstance(default, list) else None,
                            help=f"{field.metadata['help']} [{default}]".replace("%", "%%"))
    words = []
    if find_config is not None:
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config")
        parser.add_argument("--config", metavar="", help="a YAML file of these keys, as given or in configs/")
        path = first.parse_known_args(argv)[0].config
        for name, value in read_yaml(find_config(path)).items() if path else ():
            if not isinstance(value, list) and value != "":
                value = [str(value)]
            words += [f"--{name}", *map(str, value)]
    for word in words + argv:
        name = word[2:].split("=")[0]
        if word.startswith("--") and name not in (*fields, "config", "help"):
            near = difflib.get_close_matches(name, fields, 1, 0.5)
            raise UserError(f"{name}: unknown key; " + (f"did you mean {near[0]}?" if near else "--help lists all"))
    settings = vars(parser.parse_args(words + argv))
    settings.pop("config", None)
    return cls(**settings)


def read_yaml(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not made of `key: value` lines")
    return content


def init_distributed() -> torch.device:
    """Join torchrun's process group, or make one of a single process; returns this rank's device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        alone = {} if "WORLD_SIZE" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("nccl" if cuda else "gloo", **alone)
    return device


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run a script's main: bad input ends in one line and exit code 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@dataclasses.dataclass
class Settings:
    model: str | None = key(None, "folder or hub id; without it the newest run under runs/, its base beside its best")
    dataset_name: str | None = key(None, f"one of {', '.join(DATASETS)}; default: the run's")
    dataset_path: str | None = key(None, "a local folder or file in place of the hub; default: the run's")
    grader: str | None = key(None, "how answers are compared; default: the run's, or the dataset's", GRADERS)
    split: str | None = key(None, "train, validation, test or all; default: test, all of a single JSONL file")
    limit: int | None = key(None, "evaluate the first so many rows only")
    few_shot: int = key(0, "worked examples in the prompt, 0 to 8 (gsm8k)")
    num_samples: int | None = key(None, "samples per question for maj@k; 0: greedy only; default: the run's, or 0")
    response_length: int | None = key(None, "tokens generated at most; default: the run's, or 500")
    temperature: float | None = key(None, "of the samples; default: the run's, or 1")
    stop_token: str | None = key(None, "eos, pad or both; default: the run's, or eos", ("eos", "pad", "both"))
    stop_seqs: list[str] | None = key(None, "strings that end a rationale; default: the run's, or 'The answer is'")
    per_device_eval_batch_size: int | None = key(None, "rows decoded together on a rank; default: the run's, or 64")
    dtype: str | None = key(None, "auto (bfloat16 on a GPU, float32 on a CPU), float32 or bfloat16", ("auto", "float32", "bfloat16"))
    attn_implementation: str | None = key(None, "default: flash-attn where installed on a GPU, else sdpa")
    trust_remote_code: bool = key(False, "run the model repository's own Python code")
    seed: int = key(0, "of the samples")
    out: str | None = key(None, "JSON file of the result; default: evaluation-NAME.json in the run, or evaluation.json")


DEFAULTS = {"num_samples": 0, "response_length": 500, "temperature": 1.0, "stop_token": "eos", "stop_seqs": ["The answer is"],
            "per_device_eval_batch_size": 64, "dtype": "auto", "attn_implementation": "auto"}


def newest_run() -> str:
    """The newest run directory under runs/ that holds a trained model."""
    runs = [os.path.dirname(os.path.dirname(path)) for path in glob.glob("runs/*/best/config.json")]
    if not runs:
        raise UserError("no trained run under runs/; train one with `python latro.py`, or name a model with --model")
    return max(runs, key=lambda run: os.path.getmtime(os.path.join(run, "config.yaml")))


def judge(settings: Settings, run: str | None = None) -> None:
    """Evaluate settings.model, or the base beside the best model of `run`; write the JSON and print the table."""
    if settings.model is None:
        run = run or newest_run()
    elif os.path.exists(os.path.join(parent := os.path.dirname(os.path.normpath(settings.model)), "config.yaml")):
        run = parent
    config = read_yaml(os.path.join(run, "config.yaml")) if run else {}
    name = settings.dataset_name or config.get("dataset_name")
    if name is None:
        raise UserError(f"dataset_name: which one? {', '.join(DATASETS)}")
    asked = {k: v for k, v in dataclasses.asdict(settings).items() if v is not None}
    ran = config if name == config.get("dataset_name") else {k: v for k, v in config.items() if k not in ("dataset_path", "grader")}
    options = DEFAULTS | {k: v for k, v in ran.items() if v is not None} | asked
    path, length = options.get("dataset_path"), options["response_length"]
    split = settings.split or ("all" if name == "jsonl" and path and os.path.isfile(path) else "test")
    rows = load_rows(name, split, path, few_shot=settings.few_shot)[:4 if options.get("sanity_check") else settings.limit]
    grader = options.get("grader") or default_grader(name, rows)
    models = {"base": config["model_name_or_path"], "best": os.path.join(run, "best")} if settings.model is None else {
        os.path.basename(os.path.normpath(settings.model)): settings.model}
    device, results = init_distributed(), {}
    for label, folder in models.items():
        model, tokenizer = load_model(folder, resolve_dtype(options["dtype"], device), device, options["attn_implementation"],
                                      settings.trust_remote_code)
        results[label] = {"model": folder, "dataset": name, "split": split} | evaluate(
            model, tokenizer, make_examples(tokenizer, rows, context_left(model, length)), grader, response_length=length,
            num_samples=options["num_samples"], temperature=options["temperature"], stop_token=options["stop_token"],
            stop_seqs=options["stop_seqs"], batch_size=options["per_device_eval_batch_size"], seed=settings.seed, title=label)
        out = settings.out or (os.path.join(run, f"evaluation-{label}.json") if run else "evaluation.json")
        if rank() == 0:
            with open(out, "w", encoding="utf-8") as file:
                json.dump(results[label], file, indent=1, ensure_ascii=False)
    if rank() == 0:
        print_results(results)
        print(f"every row: {out.replace(label, '{' + ','.join(models) + '}') if len(models) > 1 else out}")


def context_left(model: nn.Module, response_length: int) -> int | None:
    """Tokens that the model's context leaves for x⊕y beside a rationale."""
    context = getattr(model.config, "max_position_embeddings", None)
    return context and context - response_length


if __name__ == "__main__":
    run_script(lambda argv: judge(parse(Settings, argv, __doc__)))
