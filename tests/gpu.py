"""What a GPU must show: that it computes what the CPU does, and how fast, in under 8 minutes on one H100 (80 GB).

    python tests/gpu.py --out gpu.jsonl                    every item; a JSON line each, a table last
    python tests/gpu.py --only correctness decoding        some of them
    python tests/gpu.py --small                            small shapes on a CPU: that this script still runs

It needs the repository, torch >= 2.11, transformers and what they need: no network, no datasets. Models have random
weights. Each item runs in a process of its own, ended when its time is up; what it had found by then is kept. Bounds
are those of the design: a figure that misses its bound fails its item, and the command ends with code 1.
"""
import argparse
import contextlib
import copy
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from statistics import median

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if "--item" in sys.argv:  # an item's own process: the command needs nothing of this
    sys.path.insert(0, ROOT)
    import torch
    import torch.distributed as dist
    import transformers
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.functional import scaled_dot_product_attention
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import data
    import latro
    from evaluate import KEPT, Rollout, Scorer, generate, init_distributed, packed_attention, score

TOTAL = 480  # seconds, of all items
ITEMS = {}  # name: (function, seconds at most, whether --small runs it unasked), the most telling first


def item(seconds: int, small: bool = True):
    def add(function):
        ITEMS[function.__name__] = function, seconds, small
        return function
    return add


# ---------------------------------------------------------------------------
# An item's side: figures, clocks, models
# ---------------------------------------------------------------------------
def note(**figures) -> None:
    """Report figures as soon as they are known."""
    print("\n@" + json.dumps({"figures": {k: round(v, 6) if isinstance(v, float) else v for k, v in figures.items()}}),
          flush=True)


def check(name: str, value: float, most: float | None = None, least: float | None = None) -> None:
    """Report a figure that has bounds; NaN misses them."""
    ok = (most is None or value <= most) and (least is None or value >= least)
    bound = " and ".join(f"{sign} {x:g}" for sign, x in ((">=", least), ("<=", most)) if x is not None)
    print("\n@" + json.dumps({"checks": {name: [float(f"{value:.4g}"), bound, ok]}}), flush=True)


class Bench:
    """The device and what is measured on it."""

    def __init__(self, small: bool, folder: str):
        self.small, self.folder = small, folder
        self.device = torch.device("cpu" if small else "cuda")
        torch.backends.cuda.enable_cudnn_sdp(False)  # as where a run sets up its device

    def seconds(self, work, repeats: int = 5, warm: int = 1) -> float:
        """Median seconds of work()."""
        for _ in range(warm):
            work()
        times = []
        for _ in range(repeats):
            begin = latro.now(self.device)
            work()
            times.append(latro.now(self.device) - begin)
        return median(times)

    def bandwidth(self) -> float:
        """Bytes a second of a large copy, read and written."""
        source = torch.empty(2**22 if self.small else 2**32, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        return 2 * source.numel() / self.seconds(lambda: target.copy_(source), 10, 3)

    def matmul_rate(self) -> float:
        """Operations a second of a large bf16 product."""
        n = 256 if self.small else 8192
        a, b = torch.randn(2, n, n, device=self.device, dtype=torch.bfloat16)
        return 2 * n**3 / self.seconds(lambda: a @ b, 10, 3)

    def memory(self, peak: bool = False) -> float:
        """GiB held now, or the most since the last peak was asked for."""
        if self.device.type != "cuda":
            return 0.0
        size = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return size / 2**30

    def kernels(self, work, steps: int = 1) -> list:
        """[name, milliseconds, launches] a step, of all kernels and of those that take most of work()'s time."""
        if self.device.type != "cuda":
            return []
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
            torch.cuda.synchronize()
        found = [(e.key[:60], e.self_device_time_total / 1e3, e.count) for e in profile.key_averages()
                 if e.self_device_time_total]
        found.sort(key=lambda kernel: -kernel[1])
        together = "all", sum(ms for _, ms, _ in found), sum(count for *_, count in found)
        return [[name, round(ms / steps, 3), round(count / steps, 1)] for name, ms, count in [together, *found[:10]]]


def reads_of_the_host(work) -> int:
    """How often work() waits for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # nothing stops early
LLAMA_8B = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=8, **NO_IDS)
LLAMA_1B = dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True, **NO_IDS)
SMOLLM2 = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
               num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, **NO_IDS)
TINY = dict(vocab_size=101, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, **NO_IDS)


def llama(shape: dict, device, dtype: str = "bfloat16"):
    """Random weights in a shape, made where they shall lie."""
    config = transformers.LlamaConfig(**shape, max_position_embeddings=8192)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation="packed").eval()


def tiny_models() -> dict:
    """Small models on the CPU that vary: grouped heads; a window; two rotary tables, of which the longer is used."""
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
                "long_factor": [1.0 + i for i in range(8)], "original_max_position_embeddings": 16}
    shape = {**TINY, "initializer_range": 0.2, "max_position_embeddings": 512}
    configs = {"llama": transformers.LlamaConfig(**shape),
               "phi3": transformers.Phi3Config(**shape, original_max_position_embeddings=16,
                                               rope_parameters=longrope, sliding_window=None),
               "mistral": transformers.MistralConfig(**shape, sliding_window=7)}
    torch.manual_seed(0)
    models = {}
    for name, config in configs.items():
        models[name] = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="packed").eval()
    return models


# ---------------------------------------------------------------------------
# The project's functions, as the items call them
# ---------------------------------------------------------------------------
def sample(model, prompts, length: int, seed: int = 0, temperature: float = 1.0, stop=None, **options):
    """[(ids, log-probabilities)] under fixed noise."""
    count = len(prompts) * options.get("num_samples", 1)
    noise = torch.rand(count, length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return generate(model, prompts, length, temperature=temperature, uniforms=noise,
                    stop=stop or (lambda ids: False), **options)


def captured_steps(model) -> int:
    """CUDA graphs that are kept for the model."""
    return len(KEPT[model].graphs or ())


def make_rollouts(rng, vocabulary: int, prompts: list[int], k: int, rationale: tuple[int, int], answer: int) -> list:
    """k rollouts of random tokens for each prompt, of `prompts` tokens."""
    rollouts = []
    for length in prompts:
        prompt = rng.choices(range(vocabulary), k=length)
        for _ in range(k):
            z, y = (rng.choices(range(vocabulary), k=n) for n in (rng.randint(*rationale), answer))
            rollouts.append(Rollout(prompt=prompt, rationale=z, actions=z + y[:1], answer=y))
    return rollouts


def scores_and_gradients(model, rollouts, packed: bool, temperature: float = 0.7):
    """log π of z and y (n, 2), and the gradients of a weighted sum, by one pass; on the CPU in float64."""
    scorer = Scorer(model)
    scorer.packed = packed
    model.zero_grad()
    scores = score(scorer, rollouts, temperature)
    weights = torch.linspace(-1, 1, scores.numel(), device=scores.device).view_as(scores)
    (scores * weights).sum().backward()
    gradients = [p.grad.double().cpu() for p in model.parameters()]
    return scores.detach().double().cpu(), gradients


def start_training(model, device, **settings):
    """(config, policy, reference, sampler, optimizer) as a run sets them up."""
    config = latro.Config(**{"kl_coef": 0.05, "learning_rate": 1e-6, "stop_seqs": [], **settings})
    policy, reference, sampler = latro.set_out(model, config, device)
    return config, policy, reference, sampler, torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)


def train_pass(policy, sampler, rollouts) -> None:
    learner = policy if isinstance(policy, FSDPModule) else Scorer(sampler)
    score(learner, rollouts, 0.9).sum().backward()
    latro.collect_gradients(learner, policy)


def reference_pass(reference, rollouts) -> None:
    score(reference, rollouts, 0.9, answers=False)


def held_by_plan(config, model, ranks: int) -> dict:
    return latro.plan(config, model, ranks)


def update_once(config, policy, reference, sampler, optimizer, prompts: list[list[int]], device):
    """The metrics of one whole update on prompts of random tokens; no rationale ends early."""
    _, tokenizer = data.embedded_model()
    examples = [data.Example({"queries": ""}, prompt, ([5, 6, 7, 2], [5, 6, 7, 2]), []) for prompt in prompts]
    keys = [str(i) for i in range(len(examples))]
    return latro.update(policy, reference, sampler, optimizer, tokenizer, examples, keys, config, device)[-1]


def run_latro(bench, *arguments: str, cpu: bool = False, kill_after: int | None = None) -> float:
    """Run latro.py in the item's folder, told to stop once it has logged `kill_after` steps; returns its seconds."""
    begin = time.perf_counter()
    environment = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "latro.py"), *arguments], cwd=bench.folder,
                               env=environment)
    while kill_after is not None and process.poll() is None:
        rows = [row for row in read_rows(bench, arguments) if "reward" in row]
        if len(rows) >= kill_after:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.05)
    code = process.wait()
    expected = 0 if kill_after is None else 128 + signal.SIGTERM
    if code != expected:
        raise RuntimeError(f"latro.py {' '.join(arguments)} ended with code {code}")
    return time.perf_counter() - begin


def read_rows(bench, arguments, file: str = "metrics.jsonl") -> list[dict]:
    name = arguments[arguments.index("--run_name") + 1]
    path = os.path.join(bench.folder, "runs", name, file)
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]


# ---------------------------------------------------------------------------
# The items
# ---------------------------------------------------------------------------
@item(30)
def machine(bench):
    """Versions, and the two rates that others are compared with."""
    version = tuple(int(x) for x in transformers.__version__.split(".")[:2])
    if not bench.small and version < (5, 23):
        note(warning="transformers is older than 5.23: it copies keys and values to all query heads in every step")
    gpu = {} if bench.small else {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda,
                                  "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30}
    note(torch=torch.__version__, transformers=transformers.__version__, python=sys.version.split()[0],
         commit=os.environ["GPU_COMMIT"], **gpu)
    note(copy_tb_per_s=bench.bandwidth() / 1e12)
    note(matmul_tflops=bench.matmul_rate() / 1e12)


@item(75)
def correctness(bench):
    """The GPU against the CPU: what is sampled, what is scored, all gradients; captured steps against eager ones."""
    rng = random.Random(0)
    for name, model in tiny_models().items():
        prompts = [rng.choices(range(101), k=n) for n in (18, 25, 21, 30)]
        options = {"num_samples": 3, "batch_size": 5, "stop": lambda ids: ids[-1] % 23 == 0}
        ours = copy.deepcopy(model).to(bench.device)
        worst, same, both = 0.0, 0, 0
        for temperature in (0.0, 1.0):
            pairs = list(zip(sample(model, prompts, 24, temperature=temperature, capture=False, **options),
                             sample(ours, prompts, 24, temperature=temperature, **options)))
            same, both = same + sum(a[0] == b[0] for a, b in pairs), both + len(pairs)
            worst = max([worst, *(abs(x - y) for a, b in pairs if a[0] == b[0] for x, y in zip(a[1], b[1]))])
        check(f"{name} fp32: rows sampled alike", same / both, least=1)
        check(f"{name} fp32: sampled log-probabilities", worst, most=1e-4)

        # captured: called twice, then with weights changed in place
        gap = 0.0
        for change in (1.0, 1.0, 1.01):
            for parameter in ours.parameters():
                parameter.data.mul_(change)
            eager, captured = (sample(ours, prompts, 24, capture=c, **options) for c in (False, True))
            gap = max([gap, *(abs(x - y) if a[0] == b[0] else 9.0 for a, b in zip(eager, captured)
                              for x, y in zip(a[1], b[1]))])
        check(f"{name} fp32: captured against eager", gap, most=1e-4)
        if not bench.small:
            check(f"{name}: captured steps", captured_steps(ours), least=1)

        rollouts = make_rollouts(rng, 101, [18, 25, 30], 3, (1, 20), 4)
        expected, gradients = scores_and_gradients(copy.deepcopy(model).double(), rollouts, packed=False)
        for dtype, bounds in (("float32", (1e-4, 1e-4)), ("bfloat16", None)):
            errors = {}
            for packed in (True, False):
                own = copy.deepcopy(model).to(bench.device, getattr(torch, dtype))
                scores, ours_gradients = scores_and_gradients(own, rollouts, packed)
                gap = (scores - expected).abs().max().item()
                error = max((a - b).norm().item() / b.norm().item() for a, b in zip(ours_gradients, gradients))
                errors[packed] = gap, error
            for i, what in enumerate(("log-probabilities", "gradients")):
                for packed in (True, False):
                    label = f"{name} {dtype} {'packed' if packed else 'rows'}: {what}"
                    if bounds:
                        check(label, errors[packed][i], most=bounds[i])
                    elif packed:  # rounding: that of one row per rollout, three times at most
                        check(label, errors[True][i], most=3 * errors[False][i] + 1e-3)


@item(120)
def decoding(bench):
    """Milliseconds a step: eager, captured and transformers' own; the share of the copy bandwidth that weights and
    keys and values make."""
    bandwidth = bench.bandwidth()
    cases = [("8B", LLAMA_8B, 48, 448, .55), ("8B", None, 16, 448, .70), ("8B", None, 1, 448, None),
             ("SmolLM2", SMOLLM2, 64, 192, None), ("1B", LLAMA_1B, 64, 448, None)]
    steps = 48
    if bench.small:
        cases, steps = [("small", TINY, 4, 12, None)], 4
    for name, shape, rows, length, least in cases:
        if shape:
            model = None  # its memory, before more is taken
            model = llama(shape, bench.device, "float32" if bench.small else "bfloat16")
        prompt = random.Random(0).choices(range(100), k=length)

        def step_time(work) -> float:
            """Seconds a step, without the prefill: the difference of a long and a short call."""
            return (bench.seconds(lambda: work(2 + steps), 1) - bench.seconds(lambda: work(2), 2)) / steps

        def theirs(count):
            ids = torch.tensor([prompt] * rows, device=bench.device)
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
                           do_sample=True, top_k=0, pad_token_id=0)

        def ours(capture):
            return lambda count: sample(model, [prompt], count, num_samples=rows, capture=capture)

        ms = {"captured": 1e3 * step_time(ours(True)), "eager": 1e3 * step_time(ours(False))}
        model.set_attn_implementation("sdpa")
        ms["transformers"] = 1e3 * step_time(theirs)
        model.set_attn_implementation("packed")
        config = model.config
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        if not config.tie_word_embeddings:
            weights -= model.get_input_embeddings().weight.nbytes  # a row of it per token
        token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
        needed = weights + rows * (length + steps / 2) * token
        share = needed / bandwidth / ms["captured"] * 1e3
        label = f"{name} {rows} rows"
        note(**{f"{label}: ms a step": {k: round(v, 3) for k, v in ms.items()},
                f"{label}: tokens/s": round(rows / ms["captured"] * 1e3),
                f"{label}: share of the copy bandwidth": round(share, 3)})
        if least:
            check(f"{label}: share of the copy bandwidth", share, least=least)
        if name == "SmolLM2":
            check("SmolLM2: times transformers' generate", ms["transformers"] / ms["captured"], least=5)
        if rows >= 48:
            found = bench.kernels(lambda: sample(model, [prompt], steps, num_samples=rows), steps)
            note(**{f"{label}: kernels, ms a step": found})


@item(75)
def passes(bench):
    """Passes with gradient of a 1B model on one GPU, and one whole update."""
    init_distributed()
    shape, x, z, y, sizes = LLAMA_1B, 200, 400, 8, (2, 8, 16)
    if bench.small:
        shape, x, z, y, sizes = TINY, 8, 12, 3, (2, 4)
    rate = bench.matmul_rate()
    model = llama(shape, bench.device, "bfloat16")
    head = model.get_output_embeddings().weight.numel()
    layers = sum(p.numel() for p in model.parameters()) - head
    most = sizes[-1]
    config, policy, reference, sampler, optimizer = start_training(
        model, bench.device, dtype="bfloat16", rloo_k=most, per_device_train_batch_size=most,
        gradient_accumulation_steps=2, response_length=z, rollout_batch_size=2 * most, per_device_eval_batch_size=8)
    note(**{"GiB held": bench.memory()})
    for size in sizes:
        rollouts = make_rollouts(random.Random(0), shape["vocab_size"], [x], size, (z, z), y)
        tokens, scored = x + size * (z + y - 1), size * (z + 1 + y)
        pairs = x * x / 2 + size * (z + y) * (x + (z + y) / 2)  # of query and key
        c = model.config
        attention = 4 * pairs * c.num_attention_heads * c.head_dim * c.num_hidden_layers
        flops = 3 * (2 * tokens * layers + 2 * scored * head + attention)
        seconds = bench.seconds(lambda: train_pass(policy, sampler, rollouts), 5, 2)
        share = flops / seconds / rate
        note(**{f"{size} rollouts": {"tokens": tokens, "ms": round(1e3 * seconds, 2), "share": round(share, 3),
                                     "peak GiB": round(bench.memory(peak=True), 2)}})
        if size == most and not bench.small:
            check("share of the matmul rate", share, least=.45)
            note(**{"host reads a pass": reads_of_the_host(lambda: train_pass(policy, sampler, rollouts)),
                    "kernels, ms a pass": bench.kernels(lambda: train_pass(policy, sampler, rollouts))})
    optimizer.zero_grad()
    prompts = [random.Random(i).choices(range(30), k=x) for i in range(config.prompts)]
    for which in ("first", "second"):
        figures = update_once(config, policy, reference, sampler, optimizer, prompts, bench.device)
        kept = ("generate_s", "score_s", "train_s", "sampling_gap", "work_ratio", "grad_norm", "skipped")
        note(**{f"{which} update": {name: round(figures[name], 4) for name in kept} | {"GiB": bench.memory(peak=True)}})
    check("skipped", figures["skipped"], most=0)
    check("sampling_gap a token", figures["sampling_gap"] / z, most=.05)


@item(80)
def rank_of_eight(bench):
    """Llama-3.1-8B as rank 0 of 8, whose others are pretended (nothing is sent): memory beside the dry run's, and the
    seconds of passes without their communication."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    shape, x, z, y, k = (TINY, 8, 12, 3, 4) if bench.small else (LLAMA_8B, 150, 500, 8, 16)
    model = llama(shape, bench.device, "bfloat16")
    note(**{"loaded: GiB": bench.memory()})
    config, policy, reference, sampler, optimizer = start_training(
        model, bench.device, dtype="bfloat16", rloo_k=k, per_device_train_batch_size=k, gradient_accumulation_steps=3,
        response_length=z, rollout_batch_size=3 * k, per_device_eval_batch_size=k, gradient_checkpointing=True)
    with torch.device("meta"):
        plan = held_by_plan(config, llama(shape, "meta", "float32"), 8)
    exact = {name: size / 2**30 for name, size in plan.items() if "estimate" not in name}
    start = sum(size for name, size in exact.items() if name in ("weights, float32", "sampling copy", "reference"))
    peak, held = bench.memory(peak=True), bench.memory()
    note(**{"set out: peak GiB": peak, "set out: GiB": held,
            "dry run, GiB": {name: round(size, 3) for name, size in exact.items()}})
    if not bench.small:
        check("set out: peak GiB, of the sampling copy's", peak / exact["sampling copy"], most=2.5)
        check("set out: GiB, of the dry run's", held / start, least=.95, most=1.05)
    for parameter in sampler.parameters():  # what was gathered from the others is nothing
        parameter.data.normal_(0, 0.02)
    prompts = [random.Random(i).choices(range(100), k=x) for i in range(3)]
    seconds = bench.seconds(lambda: sample(sampler, prompts, z, num_samples=k), 1, 0)
    note(**{"generate 48 rows, first time: s": seconds, "generate: GiB": bench.memory(),
            "generate: peak GiB": bench.memory(peak=True)})
    for size, count in ((2, 24), (k, 3)):
        rollouts = make_rollouts(random.Random(0), shape["vocab_size"], [x], size, (z, z), y)
        seconds = bench.seconds(lambda: train_pass(policy, sampler, rollouts), 2, 1)
        note(**{f"passes of {size}: s, of {count} together": [round(seconds, 4), round(count * seconds, 3)],
                f"passes of {size}: peak GiB": bench.memory(peak=True)})
    optimizer.step()
    optimizer.zero_grad()
    held, end = bench.memory(), sum(size for name, size in exact.items() if name != "gradients")
    note(**{"after the first update: GiB": held, "optimizer: peak GiB": bench.memory(peak=True)})
    if not bench.small:
        check("after the first update: GiB, of the dry run's", held / end, least=.95, most=1.05)
    with torch.no_grad():  # its root stays gathered
        seconds = bench.seconds(lambda: reference_pass(reference, rollouts), 2, 1)
    note(**{f"reference's passes of {k}: s": seconds, "reference's passes: GiB": bench.memory()})


TINY_RUN = ["--config", "tiny.yaml", "--num_samples", "0", "--limit", "40"]


def tiny_run(bench) -> list[str]:
    """The arguments of a run on cups: tiny.yaml's, from its base; in small, from random weights in a folder."""
    if not bench.small:
        return TINY_RUN
    folder = os.path.join(bench.folder, "random")
    if not os.path.isdir(folder):
        model, tokenizer = data.embedded_model()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return [*TINY_RUN, "--model_name_or_path", folder, "--sanity_check", "true", "--per_device_train_batch_size", "8",
            "--gradient_accumulation_steps", "1"]


def differences(a: list[dict], b: list[dict]) -> float:
    """The largest relative difference of the figures of rows of metrics; times apart."""
    pairs = [(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x
             if not name.endswith("_s") and isinstance(x[name], float) and name != "lr"]
    return max(abs(x - y) / max(1.0, abs(y)) for x, y in pairs if x == x or y == y)


@item(140, small=False)
def tiny(bench):
    """latro.py end to end, the base included, and its first rows against the CPU's from the same base."""
    arguments, base = tiny_run(bench), os.path.join(bench.folder, "runs/cups-base/final")
    with ThreadPoolExecutor() as pool:
        run = pool.submit(run_latro, bench, *arguments, "--run_name", "gpu")
        while not run.done() and not os.path.isdir(base):
            time.sleep(0.5)
        if not run.done():
            note(cpu_seconds=run_latro(bench, *arguments, "--max_steps", "2", "--num_evaluations", "1",
                                       "--run_name", "cpu", cpu=True))
        note(seconds=run.result())
    ours, theirs = (read_rows(bench, ["--run_name", name]) for name in ("gpu", "cpu"))
    last = [row for row in ours if "accuracy" in row][-1]
    note(steps=last["step"])
    check("accuracy", last["accuracy"], least=.9)
    rows = [[row for row in some if "reward" in row][:1] for some in (ours, theirs)]
    check("first update: figures against the CPU's", differences(*rows), most=1e-3)


@item(70, small=False)
def resume(bench):
    """A run that is told to stop and is continued gives the rows of one that was not."""
    arguments = [*tiny_run(bench), "--max_steps", "3" if bench.small else "12", "--num_evaluations", "1"]
    with ThreadPoolExecutor() as pool:
        straight = pool.submit(run_latro, bench, *arguments, "--run_name", "straight")
        run_latro(bench, *arguments, "--run_name", "stopped", kill_after=1 if bench.small else 2)
        run_latro(bench, *arguments, "--run_name", "stopped", "--checkpoint_path", "latest")
        straight.result()
    rows = [[row for row in read_rows(bench, ["--run_name", name]) if "reward" in row]
            for name in ("straight", "stopped")]
    note(steps=[row["step"] for row in rows[1]])
    check("figures of the continued run against the straight one's", differences(*rows), most=1e-3)


@item(40)
def fsdp(bench):
    """FSDP2 on one rank: float32 weights, bf16 arithmetic; gradients beside those of plain models."""
    init_distributed()
    rollouts = make_rollouts(random.Random(0), 101, [18, 25], 4, (1, 20), 4)
    model = tiny_models()["llama"]
    weights = torch.linspace(-1, 1, 16).view(8, 2)
    _, expected = scores_and_gradients(copy.deepcopy(model).double(), rollouts, packed=True, temperature=0.9)
    _, rounded = scores_and_gradients(copy.deepcopy(model).to(bench.device, torch.bfloat16), rollouts, packed=True,
                                      temperature=0.9)
    config, policy, reference, sampler, optimizer = start_training(
        model.to(bench.device), bench.device, dtype="bfloat16", rloo_k=4, per_device_train_batch_size=8,
        gradient_accumulation_steps=1, response_length=16)
    mesh = init_device_mesh(bench.device.type, (1,))
    policy = latro.shard(policy.model, torch.float32, torch.bfloat16, mesh)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    (score(policy, rollouts, 0.9) * weights.to(bench.device)).sum().backward()
    ours = [p.grad.full_tensor().double().cpu() for p in policy.parameters()]

    def error(gradients) -> float:
        return max((a - b).norm().item() / b.norm().item() for a, b in zip(gradients, expected, strict=True))

    check("gradients, of the plain bf16 model's error", error(ours) / error(rounded), most=2)
    optimizer.zero_grad()
    prompts = [random.Random(i).choices(range(30), k=12) for i in range(config.prompts)]
    for _ in range(2):
        figures = update_once(config, policy, reference, sampler, optimizer, prompts, bench.device)
    check("skipped", figures["skipped"], most=0)
    gap = max((a - b.full_tensor().to(a.dtype)).abs().max().item()
              for a, b in zip(sampler.parameters(), policy.parameters()))
    check("the sampler's weights against the policy's", gap, most=0)


@item(40)
def attention(bench):
    """Attention alone: shapes that grow by one, cuDNN on and off; a packed pass by the kernel and by segments."""
    rows, heads, group, size, slots = (2, 2, 2, 16, 20) if bench.small else (48, 8, 4, 128, 500)
    like = {"device": bench.device, "dtype": torch.bfloat16}
    sdpa = scaled_dot_product_attention
    q = torch.randn(rows, heads, group, size, **like)
    k, v = torch.randn(2, rows, heads, slots + 64, size, **like)
    for cudnn in (False, True):
        if not bench.small:
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
        kind = "cuDNN" if cudnn else "without cuDNN"
        times = []
        for seen in range(slots, slots + (4 if bench.small else 24)):
            mask = torch.zeros(rows, 1, 1, seen, **like)
            begin = latro.now(bench.device)
            sdpa(q, k[:, :, :seen], v[:, :, :seen], mask)
            times.append(latro.now(bench.device) - begin)
        again = bench.seconds(lambda: sdpa(q, k[:, :, :seen], v[:, :, :seen], mask))
        note(**{f"a step, {kind}: ms, new shape": 1e3 * median(times[1:]),
                f"a step, {kind}: ms, known shape": 1e3 * again})
        times = []
        for length in range(slots, slots + (2 if bench.small else 12)):
            x = torch.randn(1, heads * group, length, size, **like, requires_grad=True)
            begin = latro.now(bench.device)
            sdpa(x, x, x, is_causal=True).sum().backward()
            times.append(latro.now(bench.device) - begin)
        note(**{f"a pass, {kind}: ms, new shape": 1e3 * median(times[1:])})
    if bench.small:
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    segments = ((300, 0),) + ((400, 0),) * 16
    for kind, dtype in (("kernel, bf16", torch.bfloat16), ("by segments, fp32", torch.float32)):
        x = [torch.randn(1, h, 300 + 16 * 400, size, device=bench.device, dtype=dtype, requires_grad=True)
             for h in (heads * group, heads, heads)]
        note(**{f"packed, forward and backward, {kind}: ms": 1e3 * bench.seconds(
            lambda: packed_attention(None, *x, None, segments=segments)[0].sum().backward())})


# ---------------------------------------------------------------------------
# The command: a process per item
# ---------------------------------------------------------------------------
def run_item(name: str, small: bool, folder: str) -> None:
    """An item's process: ready, it waits for its turn."""
    if not sys.stdin.readline():  # the command has ended
        return
    bench = Bench(small, folder)
    torch.manual_seed(0)
    ITEMS[name][0](bench)


def start_item(name: str, small: bool, folder: str):
    """(its process, the file that it prints to)."""
    log = open(os.path.join(folder, f"{name}.log"), "w+", encoding="utf-8")
    command = [sys.executable, os.path.abspath(__file__), "--item", name, "--folder", folder]
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | os.environ  # as fsdp_launch.sh sets it
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if small else {}
    process = subprocess.Popen(command + ["--small"] * small, stdin=subprocess.PIPE, stdout=log,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True, env=environment)
    return process, log


def finish_item(name: str, process, log, limit: float) -> dict:
    """Let an item run, for `limit` seconds at most; what it reported."""
    begin = time.monotonic()
    with contextlib.suppress(BrokenPipeError):  # it has ended already
        process.stdin.write("go\n")
        process.stdin.flush()
    try:
        code = process.wait(limit)
        status = "ok" if code == 0 else f"failed with code {code}"
    except subprocess.TimeoutExpired:
        status = f"cut after {limit:.0f} s"
    with contextlib.suppress(ProcessLookupError):  # what it started goes too
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    log.seek(0)
    result = {"item": name, "status": status, "seconds": round(time.monotonic() - begin, 1)}
    result |= {"checks": {}, "figures": {}}
    lines = log.read().splitlines()
    for line in lines:
        if line.startswith("@"):
            with contextlib.suppress(ValueError):  # it was cut while it wrote
                for kind, reported in json.loads(line[1:]).items():
                    result[kind] |= reported
    if status == "ok" and not all(ok for _, _, ok in result["checks"].values()):
        result["status"] = "missed a bound"
    if status != "ok":
        result["log"] = [line for line in lines if line and not line.startswith("@")][-25:]
    return result


def table(results: list[dict]) -> str:
    out = io.StringIO()
    for result in results:
        print(f"{result['item']:<16}{result['status']:<22}{result['seconds']:>7.1f} s", file=out)
        for name, (value, bound, ok) in result["checks"].items():
            if not ok or "fp32" not in name and "float32" not in name:
                print(f"    {'ok    ' if ok else 'MISSED'} {name}: {value:g} ({bound})", file=out)
        for name, value in result["figures"].items():
            if "kernels" not in name:
                print(f"    {name}: {value}", file=out)
        for line in result.get("log", [])[-6:]:
            print(f"    | {line[:150]}", file=out)
    return out.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ITEMS, metavar="ITEM", help=", ".join(ITEMS))
    parser.add_argument("--small", action="store_true", help="small shapes, on a CPU")
    parser.add_argument("--out", help="file for a JSON line per item")
    parser.add_argument("--seconds", type=float, default=TOTAL, help=f"of all items together [{TOTAL}]")
    parser.add_argument("--commit", help="what is measured, where there is no git [that of the working tree]")
    parser.add_argument("--item", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.item:
        run_item(options.item, options.small, options.folder)
        return 0
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    os.environ["GPU_COMMIT"] = options.commit or commit.strip() or "unknown"
    begin, results, folder = time.monotonic(), [], tempfile.mkdtemp()
    names = options.only or [name for name, (_, _, small) in ITEMS.items() if small or not options.small]
    waiting = {names[0]: start_item(names[0], options.small, folder)}
    for name, following in zip(names, [*names[1:], None]):
        if following:  # it is loaded meanwhile
            waiting[following] = start_item(following, options.small, folder)
        limit = min(ITEMS[name][1] * (5 if options.small else 1), options.seconds - (time.monotonic() - begin))
        results.append(finish_item(name, *waiting.pop(name), max(1, limit)))
        line = json.dumps(results[-1], ensure_ascii=False)
        print(line, flush=True)
        if options.out:
            with open(options.out, "a", encoding="utf-8") as file:
                print(line, file=file)
    shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{table(results)}together {time.monotonic() - begin:.0f} s")
    return int(any(result["status"] != "ok" for result in results))


if __name__ == "__main__":
    sys.exit(main())
