"""The command line: arguments in, one call each, exit codes out (docs/cli.md)."""

from __future__ import annotations

import json
import os
import platform
import sys
from contextlib import closing
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from moecc import __version__
from moecc.console import Console
from moecc.errors import ArtifactError, DamagedArtifactError, MoeccError, PlanError

INTERNAL_ERROR = 70
INTERRUPTED = 130

app = typer.Typer(
    name="moecc",
    help="Serve many fine-tuned variants of one Mixture-of-Experts model from one GPU.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _Mode(str, Enum):
    auto, mixed, resident, swap = "auto", "mixed", "resident", "swap"


class _Policy(str, Enum):
    fifo, grouped = "fifo", "grouped"


OUTPUT = "Output"
Json = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=OUTPUT)]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Only data and errors.", rich_help_panel=OUTPUT)
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.", rich_help_panel=OUTPUT)]
NoColor = Annotated[
    bool, typer.Option("--no-color", help="No colors; NO_COLOR too.", rich_help_panel=OUTPUT)
]
ArtifactPath = Annotated[Path, typer.Argument(help="The folder `consolidate` wrote.")]
VariantName = Annotated[str, typer.Option("--variant", help="Which variant.")]
DEVICE, LIMITS, SERVER = "Device and memory", "Limits and order", "Server"
MEASURE = "What is measured"
Gpu = Annotated[
    int | None,
    typer.Option(
        "--gpu",
        min=0,
        help="Number of the GPU; without it, 0 if there is one.",
        rich_help_panel=DEVICE,
    ),
]
Cpu = Annotated[bool, typer.Option("--cpu", help="Use the CPU.", rich_help_panel=DEVICE)]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moecc {__version__}")
        raise typer.Exit


@app.callback()
def moecc(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve many fine-tuned variants of one Mixture-of-Experts model from one GPU."""


@app.command(
    epilog="Examples:  moecc consolidate recipes/quickstart.yaml --out artifact\n\n"
    "moecc consolidate recipe.yaml --out artifact --dry-run --plan-out plan.json",
)
def consolidate(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The artifact's folder, made new.")
    ] = Path("artifact"),
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Plan and write nothing; from the Hub, read headers and no weights.",
            rich_help_panel="Planning",
        ),
    ] = False,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", help="Replay a saved plan.", rich_help_panel="Planning"),
    ] = None,
    plan_out: Annotated[
        Path | None,
        typer.Option("--plan-out", help="Save the plan as JSON.", rich_help_panel="Planning"),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            "--sweep",
            help="Plan for several budgets, 0.5x,0.8x,..., and write nothing.",
            rich_help_panel="Planning",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw the sweep as a PNG.", rich_help_panel="Planning"),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="Where to compute: cpu, cuda or cuda:N.")
    ] = "cpu",
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """Compile the variants of a recipe into one artifact."""
    console = _console(as_json, quiet, verbose, no_color)
    from moecc.recipe import load_recipe

    loaded = load_recipe(recipe)
    saved = _read_plan(plan) if plan else None
    _check_device(device)
    if sweep is not None:
        _sweep(console, loaded, sweep, plot, device)
        return
    from moecc.consolidate import open_recipe, plan_studied, run, study
    from moecc.parallel import keep_freed_memory
    from moecc.report import header_json, header_tables, plan_json, plan_tables

    keep_freed_memory()
    with console.progress() as report:
        if dry_run:
            opened = open_recipe(loaded, weights=False, on_progress=report)
            planned = None
            if opened.has_weights:
                studied = study(opened, device=device, on_progress=report)
                planned = plan_studied(studied, saved=saved)
        else:
            planned = run(
                loaded, out, saved_plan=saved, force=force, device=device, on_progress=report
            )
            opened = planned.opened
    _note_sources(console, opened)
    if planned is None:
        console.show(*header_tables(opened))
        console.note("no plan: the weights are not on this machine; run without --dry-run")
        if plan_out:
            raise PlanError("a plan needs the weights, which are not on this machine")
    else:
        console.show(*header_tables(opened), *plan_tables(planned))
        if plan_out:
            _write_plan(plan_out, planned.plan.to_json())
    document = header_json(opened) if planned is None else plan_json(planned)
    console.data({**document, "out": None if dry_run else str(out)})
    if not dry_run:
        console.note(f"wrote {out}; look at it with: moecc inspect {out}")


@app.command(
    epilog="Examples:  moecc inspect artifact\n\nmoecc inspect artifact --verify\n\n"
    "moecc inspect artifact --layer 0 --metric cosine",
)
def inspect(
    artifact: ArtifactPath,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every file; exit 3 if one is damaged.")
    ] = False,
    layer: Annotated[
        int | None, typer.Option("--layer", help="Show the similarity of a layer's experts.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="l2, cosine, delta-cosine, cka or output.")
    ] = None,
    all_pairs: Annotated[
        bool, typer.Option("--all-pairs", help="With --layer: every expert against every other.")
    ] = False,
    device: Annotated[
        str, typer.Option("--device", help="Where to compute: cpu, cuda or cuda:N.")
    ] = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """Show what an artifact holds, and check it."""
    console = _console(as_json, quiet, verbose, no_color)
    from moecc.artifact import Artifact
    from moecc.report import artifact_json, artifact_tables

    if all_pairs and layer is None:
        raise typer.BadParameter("goes with --layer", param_hint="--all-pairs")
    with Artifact(artifact) as opened:
        if verify:
            _verify(console, opened)
        if layer is not None:
            _check_device(device)
            _show_similarity(console, opened, layer, metric, all_pairs, device)
            return
        document = artifact_json(opened.manifest)
        console.data({**document, "verified": True} if verify else document)
        console.show(*artifact_tables(opened.manifest))
        if verify:
            console.show(f"all {len(opened.files)} files are as the manifest says")


@app.command(epilog="Example:  moecc export artifact --variant chat --out chat-checkpoint")
def export(
    artifact: ArtifactPath,
    variant: VariantName,
    out: Annotated[Path, typer.Option("--out", "-o", help="The checkpoint's folder, made new.")],
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """Write a variant back as a checkpoint that `from_pretrained` loads."""
    console = _console(as_json, quiet, verbose, no_color)
    from moecc.artifact import Artifact
    from moecc.export import export as write

    with Artifact(artifact) as opened, console.progress() as report:
        opened.check_variant(variant)
        write(
            opened,
            variant,
            out,
            force=force,
            on_progress=lambda done, total: report("export", done, total),
        )
    console.data({"variant": variant, "out": str(out)})
    console.note(f"wrote {out}")


@app.command(epilog='Example:  moecc generate artifact --variant chat --prompt "Hello"')
def generate(
    artifact: ArtifactPath,
    variant: VariantName,
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue.")],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="How many tokens at most.")
    ] = 64,
    gpu: Gpu = None,
    cpu: Cpu = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """Continue a prompt with one variant, greedily."""
    console = _console(as_json, quiet, verbose, no_color)
    from moecc.artifact import Artifact
    from moecc.runtime.api import load

    with Artifact(artifact) as opened:  # before anything is loaded
        opened.check_variant(variant)
    with load(artifact, gpu=_gpu(gpu, cpu), note=console.note) as served:
        text = served.generate(variant, prompt, max_tokens=max_new_tokens, temperature=0.0)[0].text
    if as_json:
        console.data({"variant": variant, "prompt": prompt, "text": text})
    else:
        console.text(text)


@app.command(
    "eval",
    epilog="Examples:  moecc eval artifact --text chat=chat.txt --text math=math.txt\n\n"
    "moecc eval artifact --text chat=chat.txt --reference --sources recipes --save",
)
def evaluate(
    artifact: ArtifactPath,
    text: Annotated[
        list[str],
        typer.Option(
            "--text",
            metavar="VARIANT=FILE",
            help="A variant's text: UTF-8, or JSONL of `input` and `target` for an "
            "encoder-decoder. May be given again, also for the same variant.",
        ),
    ],
    window: Annotated[
        int, typer.Option("--window", min=2, help="Tokens of a window.", rich_help_panel=MEASURE)
    ] = 256,
    windows: Annotated[
        int | None,
        typer.Option(
            "--windows",
            min=1,
            help="Most windows, or pairs, of a variant; by default all.",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    reference: Annotated[
        bool,
        typer.Option(
            "--reference",
            help="Compare with the models the variants were made from.",
            rich_help_panel=MEASURE,
        ),
    ] = False,
    sources: Annotated[
        Path,
        typer.Option(
            "--sources",
            help="The recipe's folder, where relative sources start.",
            rich_help_panel=MEASURE,
        ),
    ] = Path("."),
    rouge: Annotated[
        bool,
        typer.Option(
            "--rouge",
            help="Generate as well, and score with ROUGE-1; for encoder-decoders.",
            rich_help_panel=MEASURE,
        ),
    ] = False,
    device: Annotated[
        str, typer.Option("--device", help="Where to compute: cpu, cuda or cuda:N.")
    ] = "cpu",
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto, bfloat16, float16 or float32.")
    ] = "float32",
    save: Annotated[
        bool, typer.Option("--save", help="Write the figures into the artifact and its card.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """Measure variants on texts: perplexity, and what they lost against their sources."""
    console = _console(as_json, quiet, verbose, no_color)
    from moecc.evaluation import parse_texts
    from moecc.evaluation import save as write

    try:
        texts = parse_texts(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--text") from None
    _check_device(device)
    from moecc.artifact import Artifact
    from moecc.report import quality_tables
    from moecc.runtime.scoring import Settings
    from moecc.runtime.scoring import evaluate as measure

    settings = Settings(texts, window, windows, reference, sources, rouge, device, dtype)
    with Artifact(artifact) as opened, console.progress() as report:
        found = measure(opened, settings, report)
    console.data(found)
    console.show(*quality_tables(found))
    if save:
        write(artifact, found)
        console.note(f"saved in {artifact}; look at it with: moecc inspect {artifact}")


@app.command(
    epilog="Examples:  moecc serve artifact --gpu 0\n\n"
    "moecc serve artifact --cpu --port 9000 --max-num-seqs 8",
)
def serve(
    artifact: ArtifactPath,
    gpu: Gpu = None,
    cpu: Cpu = False,
    mode: Annotated[
        _Mode,
        typer.Option(
            "--mode",
            help="Where weights outside the experts are: mixed batches of all variants, all "
            "resident, or swapped in from the host.",
            rich_help_panel=DEVICE,
        ),
    ] = _Mode.auto,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="auto, bfloat16, float16 or float32.",
            rich_help_panel=DEVICE,
        ),
    ] = "auto",
    kv_cache: Annotated[
        str | None,
        typer.Option(
            "--kv-cache",
            metavar="SIZE",
            help="Memory for keys and values, as 8GiB; by default what is free.",
            rich_help_panel=DEVICE,
        ),
    ] = None,
    gpu_memory_utilization: Annotated[
        float,
        typer.Option(
            "--gpu-memory-utilization",
            min=0.05,
            max=1.0,
            help="The part of the GPU's memory to use.",
            rich_help_panel=DEVICE,
        ),
    ] = 0.9,
    policy: Annotated[
        _Policy,
        typer.Option(
            "--policy",
            help="How variants take turns where a batch is of one variant.",
            rich_help_panel=LIMITS,
        ),
    ] = _Policy.grouped,
    max_num_seqs: Annotated[
        int,
        typer.Option(
            "--max-num-seqs", min=1, help="Most requests at once.", rich_help_panel=LIMITS
        ),
    ] = 64,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            "--max-model-len",
            min=1,
            help="Most tokens of prompt and answer; by default the model's.",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    max_waiting: Annotated[
        int,
        typer.Option(
            "--max-waiting", min=1, help="Most requests that wait.", rich_help_panel=LIMITS
        ),
    ] = 1024,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at.", rich_help_panel=SERVER)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port.", rich_help_panel=SERVER)
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="MOECC_API_KEY",
            help="Key that clients must send.",
            rich_help_panel=SERVER,
        ),
    ] = None,
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            "--shutdown-timeout",
            min=0,
            help="Seconds that running requests get to finish.",
            rich_help_panel=SERVER,
        ),
    ] = 30.0,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every file of the artifact first.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    no_color: NoColor = False,
) -> None:
    """Serve all variants of an artifact over an OpenAI-compatible API."""
    console = _console(False, quiet, verbose, no_color)
    from moecc.runtime.options import Options

    options = Options(
        gpu=_gpu(gpu, cpu),
        mode=mode.value,
        dtype=dtype,
        policy=policy.value,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        max_waiting=max_waiting,
        kv_cache_bytes=_size("--kv-cache", kv_cache),
        gpu_memory_utilization=gpu_memory_utilization,
        verify=verify,
    )
    _serve(console, artifact, options, host, port, api_key, shutdown_timeout)


def _serve(
    console: Console,
    artifact: Path,
    options: Any,
    host: str,
    port: int,
    api_key: str | None,
    shutdown_timeout: float,
) -> None:
    from moecc.runtime.opening import open_engine
    from moecc.server.serve import serve as run

    def load() -> Any:
        with console.progress() as report:
            engine = open_engine(artifact, options, on_progress=report, note=console.note)
        stats = engine.stats()
        where = "the CPU" if options.gpu is None else f"GPU {options.gpu}"
        sizes = ", ".join(
            f"{kind.replace('_', '-')} {format_size(n)}" for kind, n in stats.memory.items()
        )
        console.note(f"{', '.join(engine.variants)} on {where}, {stats.mode} mode: {sizes}")
        return engine

    from moecc.recipe import format_size

    run(
        load,
        host=host,
        port=port,
        api_key=api_key,
        shutdown_timeout=shutdown_timeout,
        on_ready=lambda url: console.note(f"ready at {url} (API: {url}/v1)"),
        warn=lambda text: console.note(f"warning: {text}"),
    )


def _gpu(gpu: int | None, cpu: bool) -> int | None:
    """The GPU to use, None for the CPU."""
    import torch

    if cpu and gpu is not None:
        raise typer.BadParameter("give `--gpu` or `--cpu`, not both")
    if gpu is None and not cpu and torch.cuda.is_available():
        return 0
    return gpu


def _size(option: str, text: str | None) -> int | None:
    from moecc.recipe import parse_size

    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(f"{option}: {error}") from None


def _console(as_json: bool, quiet: bool, verbose: bool, no_color: bool) -> Console:
    console = Console(as_json=as_json, quiet=quiet, verbose=verbose, color=not no_color)
    _state["console"] = console
    if console.verbose:
        console.detail(_environment())
    return console


_state: dict[str, Console] = {}


def _environment() -> str:
    packages = ("torch", "transformers", "safetensors", "huggingface-hub")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    return f"moecc {__version__}, Python {platform.python_version()}, {versions}"


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise MoeccError(
            f"`--device {device}` cannot be used: {str(error).splitlines()[0]}",
            "use `cpu`, or `cuda:N` of a GPU that torch sees",
        ) from None


def _read_plan(path: Path) -> Any:
    try:
        plan = json.loads(path.read_bytes())
    except OSError as error:
        raise PlanError(f"cannot read the plan `{path}`: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise PlanError(f"`{path}` is not a plan: {error}") from None
    if not isinstance(plan, dict):  # null would mean "no plan"
        raise PlanError(f"`{path}` is not a plan: it is not a JSON object")
    return plan


def _write_plan(path: Path, plan: dict[str, Any]) -> None:
    from moecc.files import to_json, write_file

    try:
        write_file(path, to_json(plan))
    except OSError as error:
        raise PlanError(f"cannot write the plan `{path}`: {error.strerror}") from None


def _note_sources(console: Console, opened: Any) -> None:
    for variant in opened.variants:
        source = variant.checkpoint.source
        console.detail(f"{variant.name}: {source.folder or source.commit}, {source.fingerprint}")
        if count := len(variant.layout.dropped):
            console.note(
                f"note: {count} tensors of `{variant.name}` that transformers does not load "
                f"were left out, the first is `{variant.layout.dropped[0]}`"
            )


def _verify(console: Console, artifact: Any) -> None:
    total = sum(int(file["size"]) for file in artifact.files.values())
    done = 0
    with console.progress() as report:

        def count(name: str, size: int) -> None:
            nonlocal done
            done += size
            report("verify", done, total)

        problems = artifact.verify(count)
    if problems:
        raise DamagedArtifactError(
            f"{len(problems)} of {len(artifact.files)} files are damaged:\n  "
            + "\n  ".join(problems),
            "copy the artifact again, or consolidate again",
        )


def _sweep(console: Console, recipe: Any, budgets: str, plot: Path | None, device: str) -> None:
    from moecc import sweep as curve
    from moecc.consolidate import open_recipe, study
    from moecc.report import sweep_table

    wanted = curve.parse_budgets(budgets)
    with console.progress() as report:
        opened = open_recipe(recipe, on_progress=report)
        with closing(opened), closing(study(opened, device=device, on_progress=report)) as studied:
            points = curve.sweep(studied, wanted)
    console.show(sweep_table(points))
    console.data({"sweep": [point.to_json() for point in points]})
    if plot is not None:
        curve.plot(points, plot)
        console.note(f"drew {plot}")


def _show_similarity(
    console: Console,
    artifact: Any,
    layer: int,
    metric: str | None,
    all_pairs: bool,
    device: str,
) -> None:
    from moecc.inspection import all_pairs_distances, layer_distances
    from moecc.report import heat_map, matrix_map

    if not 0 <= layer < len(artifact.layers):
        raise ArtifactError(
            f"there is no layer {layer}", f"the artifact has layers 0 to {len(artifact.layers) - 1}"
        )
    metric = metric or artifact.manifest["recipe"]["similarity"]["metric"]
    name = artifact.layers[layer].layer.name
    document: dict[str, Any] = {"layer": name, "metric": metric, "variants": artifact.variants}
    if all_pairs:
        matrix = all_pairs_distances(artifact, layer, metric, device)
        console.data({**document, "distances": matrix.tolist()})
        console.show(*matrix_map(name, artifact.variants, metric, matrix))
        return
    distances = layer_distances(artifact, layer, metric)
    console.data({**document, "distances": distances})
    console.show(*heat_map(name, artifact.variants, metric, distances))


def main() -> NoReturn:
    """Runs the command line and exits with the code of docs/cli.md."""
    try:
        app()
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # Ctrl-C, which typer turns into a silent exit
            _state.get("console", Console()).error("interrupted", None, INTERRUPTED)
        raise
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("MOECC_DEBUG"):
            raise
        sys.exit(_explain(error, _state.get("console", Console())))
    sys.exit(0)


def _explain(error: BaseException, console: Console) -> int:
    """Prints an error for people; returns its exit code."""
    if isinstance(error, MoeccError):
        console.error(error.message, error.hint, error.exit_code)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        console.error("interrupted", None, INTERRUPTED)
        return INTERRUPTED
    what = f"internal error: {type(error).__name__}: {error}"
    hint = "this is a bug in moecc; set MOECC_DEBUG=1 to see where"
    console.error(what, hint, INTERNAL_ERROR)
    return INTERNAL_ERROR
