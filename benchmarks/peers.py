"""Decode steps of others on the same shape and prompts: transformers `generate`, and vLLM.

Every contender runs in a process of its own, one after the other; what fails is noted and the rest
goes on. Weights are random and normal, as in decode.py, so that routers spread tokens over experts
(vLLM's own dummy weights route all tokens alike). A step is the difference of two runs of other
lengths, divided by the difference of the lengths: prompts and starts cancel out.

- transformers: bf16, the best of its experts implementations and caches at each batch size;
- vllm: one bf16 model; vllm-int4: the same shape as W4A16 (GPTQ, groups of 128, Marlin kernels).

    python benchmarks/peers.py transformers vllm vllm-int4 --shape mixtral-8x7b --out peers.json
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

SHORT, LONG = 8, 40  # tokens of the two runs
LONGEST = 2048
# Experts implementations and caches of transformers (a static one has `generate` compile), those
# that take longest last.
TRANSFORMERS = (
    ("batched_mm", "static"),
    ("grouped_mm", None),
    ("batched_mm", None),
    ("grouped_mm", "static"),
)
INT4 = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "desc_act": False,
    "modules_in_block_to_quantize": ["self_attn", "experts"],
}
VLLM_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to fill its weights
}
Keep = Callable[[dict[str, Any]], None]  # what is known so far
Contender = Callable[[argparse.Namespace, Keep], None]


def step_seconds(run: Callable[[int], Any], repeats: int) -> float:
    """Seconds a token of `run(tokens)`, the median of differences of two lengths."""
    for tokens in (SHORT, LONG, LONG):  # what compiles does so anew for the second length it sees
        run(tokens)
    return median((timed(run, LONG) - timed(run, SHORT)) / (LONG - SHORT) for _ in range(repeats))


def timed(run: Callable[[int], Any], tokens: int) -> float:
    start = time.perf_counter()
    run(tokens)
    return time.perf_counter() - start


def random_model(config: dict[str, Any], device: Any) -> Any:
    """A transformers model with random weights, made on the device."""
    import torch
    from random_artifact import SPREAD

    from moecc.skeleton import load_config, model_class

    with torch.device(device):
        model = model_class("peer", config)._from_config(
            load_config("peer", config), dtype=getattr(torch, config["dtype"])
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, SPREAD)
    return model.eval()


def transformers_steps(args: argparse.Namespace, keep: Keep) -> None:
    """`generate` with every experts implementation and cache; the best of each batch size."""
    import torch
    import transformers
    from shapes import SHAPES, prompts

    config = SHAPES[args.shape]
    model = random_model(config, args.device)
    synchronize = torch.cuda.synchronize if "cuda" in args.device else lambda: None
    settings: dict[str, dict[str, float | str]] = {}
    for experts, cache in TRANSFORMERS:
        name = f"{experts}, {cache or 'default'} cache"
        settings[name] = {}
        model.set_experts_implementation(experts)
        for batch in args.batches or (1, 8):
            ids = torch.tensor(prompts(batch, config["vocab_size"]), device=args.device)

            def run(tokens: int, ids: Any = ids, cache: str | None = cache) -> None:
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=tokens,
                    min_new_tokens=tokens,
                    do_sample=False,
                    cache_implementation=cache,
                    pad_token_id=0,
                )
                synchronize()

            try:
                with torch.inference_mode():
                    settings[name][str(batch)] = 1000 * step_seconds(run, args.repeats)
            except Exception as error:
                settings[name][str(batch)] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(name, batch, settings[name][str(batch)], file=sys.stderr)
            keep(
                {
                    "what": "transformers generate, bf16, its best setting",
                    "version": transformers.__version__,
                    "step_ms": best_of(settings),
                    "settings": settings,
                }
            )


def best_of(settings: dict[str, dict[str, float | str]]) -> dict[str, float]:
    """The least of every batch size; texts say why there is no figure."""
    best: dict[str, float] = {}
    for steps in settings.values():
        for batch, value in steps.items():
            if isinstance(value, float):
                best[batch] = min(value, best.get(batch, value))
    return best


def vllm_steps(args: argparse.Namespace, keep: Keep, quantization: dict[str, Any] | None) -> None:
    """`LLM.generate` of token ids; its weights are filled in place, under its CUDA graphs."""
    os.environ |= VLLM_ENVIRONMENT
    import vllm
    from shapes import SHAPES, prompts

    config = SHAPES[args.shape]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        written = config | ({"quantization_config": quantization} if quantization else {})
        (Path(folder) / "config.json").write_text(json.dumps(written), encoding="utf-8")
        llm = vllm.LLM(
            folder,
            dtype=config["dtype"],
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=LONGEST,
            enable_prefix_caching=False,
            enable_return_routed_experts=args.routes,
            **({"enforce_eager": True} if args.device == "cpu" else {}),
        )
    filled = llm.apply_model(fill)
    ready = time.monotonic() - start
    kind = "INT4 (W4A16, Marlin)" if quantization else "bf16"
    steps: dict[str, float] = {}
    hits: dict[str, float] = {}
    for batch in args.batches or (1, 2, 8, 32, 64):
        asked = [{"prompt_token_ids": list(p)} for p in prompts(batch, config["vocab_size"])]

        def run(tokens: int, asked: Sequence[Any] = asked) -> Any:
            sampling = vllm.SamplingParams(
                max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False
            )
            return llm.generate(asked, sampling, use_tqdm=False)

        steps[str(batch)] = 1000 * step_seconds(run, args.repeats)
        if args.routes:
            hits[str(batch)] = experts_hit(run(LONG))
        print(batch, steps[str(batch)], hits.get(str(batch), ""), file=sys.stderr)
        keep(
            {
                "what": f"vLLM, one model, {kind}",
                "version": vllm.__version__,
                "ready_seconds": ready,
                "parameter_bytes": filled[0],
                "step_ms": steps,
                "experts_hit": hits,
            }
        )


def fill(model: Any) -> int:
    """Random weights in vLLM's worker: normal, or random codes with scales to match; all bytes."""
    import torch

    spread = 0.02
    # As they lie after loading: the kernels' own layouts, in which any bits are valid.
    for name, tensor in model.named_parameters():
        last = name.rpartition(".")[2]
        if not tensor.is_floating_point():
            if "qweight" in last:
                tensor.data.view(torch.uint8).random_(0, 256)
        elif "scales" in last:  # of 16 levels a unit apart, equally likely
            tensor.data.fill_(spread / 4.6)
        elif tensor.dim() > 1:
            tensor.data.normal_(0, spread)
        else:  # a norm's
            tensor.data.fill_(1.0)
    return sum(tensor.nbytes for tensor in model.parameters())


def experts_hit(outputs: Sequence[Any]) -> float:
    """Distinct experts of a layer and step, on average; the requests' tokens went side by side."""
    import numpy as np

    routed = np.stack([output.outputs[0].routed_experts for output in outputs])
    last = routed[:, -(LONG - SHORT) :]  # [requests, steps, layers, k]
    counts = [
        len(np.unique(last[:, step, layer]))
        for step in range(last.shape[1])
        for layer in range(last.shape[2])
    ]
    return float(np.mean(counts))


CONTENDERS: dict[str, Contender] = {
    "transformers": transformers_steps,
    "vllm": lambda args, keep: vllm_steps(args, keep, None),
    "vllm-int4": lambda args, keep: vllm_steps(args, keep, INT4),
}


def in_process(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a contender found in a process of its own; `error` says what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, name, "--shape", args.shape, "--child", str(result)]
        command += ["--device", args.device, "--repeats", str(args.repeats)]
        command += ["--batches", *map(str, args.batches)] if args.batches else []
        command += ["--routes"] if args.routes else []
        process = subprocess.Popen(command, start_new_session=True)
        error = {}
        try:
            if status := process.wait(args.timeout):
                error = {"error": f"it ended with {status}"}
        except subprocess.TimeoutExpired:
            error = {"error": f"not done after {args.timeout:g} s"}
        finally:
            with suppress(ProcessLookupError):  # also what it started: vLLM computes in a child
                os.killpg(process.pid, signal.SIGKILL)
        found = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    return {"what": name} | error | found


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("contenders", nargs="+", choices=CONTENDERS)
    parser.add_argument("--shape", default="mixtral-8x7b", help="a name of shapes.py")
    parser.add_argument("--device", default="cuda:0", help="cuda:0, or cpu for a dry run")
    parser.add_argument("--batches", type=int, nargs="+", help="default: those of the bars")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--routes", action="store_true", help="vLLM: count experts hit; slower")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each contender")
    parser.add_argument("--out", type=Path, help="figures as JSON, added to those that are there")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def child(name: str, args: argparse.Namespace) -> None:
    """Writes what one contender finds, as soon as it is found."""
    known: dict[str, Any] = {}

    def keep(found: dict[str, Any]) -> None:
        nonlocal known
        known = found
        args.child.write_text(json.dumps(known), encoding="utf-8")

    try:
        CONTENDERS[name](args, keep)
    except Exception as error:
        traceback.print_exc()
        keep(known | {"error": f"{type(error).__name__}: {error}"})


def main() -> None:
    """Runs contenders, or as a child one of them."""
    args = arguments()
    if args.child:
        child(args.contenders[0], args)
        return
    document: dict[str, Any] = {}
    if args.out and args.out.is_file():
        document = json.loads(args.out.read_text(encoding="utf-8"))
    of_shape = document.setdefault(args.shape, {})
    for name in args.contenders:
        found = in_process(name, args)
        if args.routes:  # its steps are not those of vLLM at its best
            of_shape.setdefault(name, {"what": name})["experts_hit"] = found.get(
                "experts_hit", found
            )
        else:
            of_shape[name] = found
        print(json.dumps({name: found}, indent=1))
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
