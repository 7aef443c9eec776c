"""From an artifact's folder and options to a running engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moecc.artifact import Artifact
from moecc.errors import DamagedArtifactError, RuntimeUnfitError
from moecc.manifest import variant_file, variant_folder
from moecc.runtime import attention, devices, loading
from moecc.runtime.attention import KVCache
from moecc.runtime.decoder import MOVING_ROPES, Decoder, recognized, turns_by_length
from moecc.runtime.engine import Engine, Variant
from moecc.runtime.experts import KernelExperts, LayerExperts
from moecc.runtime.fused import FusedRunner
from moecc.runtime.loading import Progress, Skeletons
from moecc.runtime.modeled import Modeled
from moecc.runtime.options import Options
from moecc.runtime.paged import PagedRunner, Part
from moecc.runtime.residency import SWAP_ROWS, Mixed, Residency, Resident, Swap
from moecc.runtime.scheduler import Scheduler
from moecc.runtime.static import StaticRunner, pads

BLOCK_TOKENS = 16
# How long another variant waits for its turn, in seconds, by what a turn costs.
PATIENCE = {"resident": 0.05, "swap": 0.5, "mixed": 0.0}
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_DEFAULT_LENGTH = 4096
_PROBE_TOKENS = 4
# Our layers are held against transformers' on so many at least, before rounding adds up, and may
# differ by what rounding explains.
_PROBE_LAYERS = 2
_AGREEMENT = 0.05
_UNBOUNDED = 1 << 40
_TOKENIZER_FILES = ("tokenizer", "vocab", "spiece", "sentencepiece")

Note = Callable[[str], None]


def open_engine(
    path: Path,
    options: Options,
    *,
    on_progress: Progress = lambda stage, done, total: None,
    note: Note = lambda text: None,
) -> Engine:
    """Loads an artifact and starts its engine; `note` gets what a user should know.

    Raises ArtifactError or DamagedArtifactError for a folder that cannot be served, and
    RuntimeUnfitError for one that cannot be served as asked.
    """
    artifact = Artifact(path)
    try:
        artifact.check_sizes()
        if options.verify:
            _verify(artifact, on_progress)
        return start_engine(artifact, options, on_progress=on_progress, note=note)
    finally:
        artifact.close()


def start_engine(
    artifact: Artifact, options: Options, *, on_progress: Progress, note: Note
) -> Engine:
    """The engine of an open artifact, which is not needed after; raises as `open_engine` does."""
    device = devices.resolve(options.gpu)
    opening = _Opening(artifact, options, device, on_progress, note)
    try:
        with devices.current(device):
            return opening.engine()
    except BaseException as error:
        devices.release(device, opening.pinned)
        if isinstance(error, torch.OutOfMemoryError):
            raise RuntimeUnfitError(
                f"out of memory: {str(error).splitlines()[0]}",
                "use `--mode swap`, a smaller `--kv-cache`, or free memory",
            ) from None
        raise


def _verify(artifact: Artifact, on_progress: Progress) -> None:
    total, done = sum(int(f["size"]) for f in artifact.files.values()), 0

    def on_file(name: str, size: int) -> None:
        nonlocal done
        done += size
        on_progress("verify", done, total)

    problems = artifact.verify(on_file)
    if problems:
        raise DamagedArtifactError(f"`{artifact.path}`: {problems[0]}", "copy the artifact again")


@dataclass(eq=False)
class _Opening:
    """One artifact on its way to an engine."""

    artifact: Artifact
    options: Options
    device: torch.device
    on_progress: Progress
    note: Note
    pinned: torch.Tensor | None = field(default=None, init=False)

    def engine(self) -> Engine:
        skeletons = loading.skeletons(self.artifact, self.options.dtype)
        refusal = attention.refusal(skeletons.models[0])
        unmixable = refusal or skeletons.difference()
        mode = self._mode(skeletons, unmixable)
        if unmixable and (self.options.mode == "mixed" or (mode != "swap" and refusal is None)):
            self.note(f"{unmixable}: batches are of one variant")
        layers = loading.load_experts(skeletons, self.device, self.on_progress)
        kernels = loading.use_kernels(skeletons, layers, self.device)
        rows = self._rows(skeletons, layers, mode)
        residency = self._residency(skeletons, rows, mode)
        if refusal is None:
            residency, probed, refusal = self._probed(skeletons, rows, residency)
        variants = self._variants(skeletons)
        runner: PagedRunner | FusedRunner | StaticRunner
        if refusal is None:
            cache, variants = self._cache(probed, variants)
            decoder = None
            if kernels is not None and not unmixable:
                decoder = self._decoder(skeletons, kernels, residency)
            runner = self._runner(decoder, residency, cache, variants)
            kv = cache.nbytes
            scheduler = self._scheduler(residency.mode, BLOCK_TOKENS, cache.blocks)
        else:
            self.note(f"{refusal}: served in static batches")
            skeletons.use_own_attention()
            runner = StaticRunner(residency, self.device, pads(skeletons.models[0]))
            kv = 0  # the model keeps its own, for a batch at a time
            # A block stands for a request; admission wants one to spare for each that runs.
            scheduler = self._scheduler(residency.mode, _UNBOUNDED, 2 * self.options.max_num_seqs)
        experts = sum(layer.nbytes for layer in kernels or layers)
        memory = {"experts": experts, "non_expert": residency.nbytes, "kv": kv}
        pinned = self.pinned
        return Engine(
            variants,
            base=self.artifact.base,
            artifact_hash=str(self.artifact.manifest["manifest_sha256"]),
            runner=runner,
            residency=residency,
            scheduler=scheduler,
            policy=self.options.policy,
            memory=memory,
            scope=lambda: devices.current(self.device),
            on_quiet=lambda: devices.trim(self.device),
            close=lambda: devices.release(self.device, pinned),
            encodes=bool(skeletons.models[0].config.is_encoder_decoder),
        )

    def _scheduler(self, mode: str, block_tokens: int, blocks: int) -> Scheduler:
        options, static = self.options, block_tokens == _UNBOUNDED
        return Scheduler(
            options.policy,
            mode == "mixed",
            options.max_num_seqs,
            _UNBOUNDED if static else max(options.max_batch_tokens, options.max_num_seqs),
            block_tokens,
            blocks,
            options.max_waiting,
            PATIENCE[mode],
        )

    def _mode(self, skeletons: Skeletons, unmixable: str | None) -> str:
        """Where the rows go, by what was asked, what the family can and what memory there is."""
        asked = self.options.mode
        row, variants = skeletons.layout.nbytes, len(self.artifact.variants)
        free = self._free_bytes() - (self.options.kv_cache_bytes or 0)
        needs = {
            "mixed": skeletons.expert_bytes + variants * row,
            "resident": skeletons.expert_bytes + variants * row,
            "swap": skeletons.expert_bytes + SWAP_ROWS * row,
        }
        if self.device.type == "cpu":
            needs["swap"] += variants * row  # the same memory
        order = [asked]
        if asked == "auto" or (asked == "mixed" and unmixable):
            order = ["resident", "swap"] if unmixable else ["mixed", "resident", "swap"]
        for mode in order:
            if needs[mode] <= free:
                return mode
        least = min(needs[mode] for mode in order)
        swap = "use `--mode swap`, " if needs["swap"] <= free else ""
        raise RuntimeUnfitError(
            f"not enough memory on `{self.device}`: the artifact needs {_gib(least)} "
            f"(experts {_gib(skeletons.expert_bytes)}), {_gib(free)} are free",
            f"{swap}consolidate with a smaller `budget`, or free memory",
        )

    def _rows(
        self, skeletons: Skeletons, layers: tuple[LayerExperts, ...], mode: str
    ) -> torch.Tensor:
        count, nbytes = len(self.artifact.variants), skeletons.layout.nbytes
        if mode == "swap":
            host = devices.free_bytes(torch.device("cpu"))
            if count * nbytes > host:
                raise RuntimeUnfitError(
                    f"not enough host memory for `swap`: {count} variants need "
                    f"{_gib(count * nbytes)}, {_gib(host)} are free",
                    "free host memory, or use `--mode resident`",
                )
            rows = self.pinned = devices.pinned(count, nbytes, self.device)
        else:
            rows = torch.empty(count, nbytes, dtype=torch.uint8, device=self.device)
        loading.load_rows(skeletons, layers, rows, self.on_progress)
        return rows

    def _residency(self, skeletons: Skeletons, rows: torch.Tensor, mode: str) -> Residency:
        if mode == "swap":
            return Swap(skeletons, rows, self.device)
        return Mixed(skeletons, rows) if mode == "mixed" else Resident(skeletons, rows)

    def _probed(
        self, skeletons: Skeletons, rows: torch.Tensor, residency: Residency
    ) -> tuple[Residency, KVCache, str | None]:
        """Runs a few tokens: a family that cannot mix, or page, says so here and not later."""
        variants = range(len(self.artifact.variants)) if residency.mode == "mixed" else [0]
        cache = KVCache(len(variants), BLOCK_TOKENS)
        runner = PagedRunner(residency, cache, self.device)
        tokens = list(range(_PROBE_TOKENS))
        try:
            for start, stop in ((0, _PROBE_TOKENS - 1), (_PROBE_TOKENS - 1, _PROBE_TOKENS)):
                runner.run([Part(v, tokens[start:stop], start, [v], True) for v in variants])
            return residency, cache, None
        except torch.OutOfMemoryError as error:
            raise RuntimeUnfitError(
                f"not enough memory on `{self.device}` to run a few tokens: {error}".splitlines()[
                    0
                ],
                "free memory, or use `--mode swap`",
            ) from None
        except Exception as error:  # of transformers' modeling code, which meets our functions here
            reason = _one_line(error)
            if residency.mode == "mixed":
                self.note(f"{reason}: batches are of one variant")
                return self._probed(skeletons, rows, Resident(skeletons, rows))
            return residency, cache, reason

    def _decoder(
        self, skeletons: Skeletons, layers: tuple[KernelExperts, ...], residency: Residency
    ) -> Decoder | Modeled | None:
        """A forward that graphs can hold, if it gives what transformers' gives.

        Of our own layers, or of transformers' where the family is none that we know.
        """
        mixed, variants = residency.mode == "mixed", len(self.artifact.variants)
        make: Callable[[], Decoder | Modeled]
        if all(recognized(model) for model in skeletons.models):
            what = "our layers"
            make = partial(Decoder, skeletons, layers, residency.rows, variants if mixed else 1)
        elif mixed and not any(turns_by_length(model) for model in skeletons.models):
            what = "graphs of its layers"
            make = partial(Modeled, residency.activate(0), variants)
        else:
            return None
        try:
            with skeletons.first_layers(_probe_layers(skeletons.models[0])):
                error = self._disagreement(make(), residency)
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:  # of a kernel, on a GPU that is like none we know
            self.note(f"{what} do not run here, and are not used: {_one_line(failure)}")
            return None
        if not error <= _AGREEMENT:
            self.note(f"{what} differ from transformers' by {error:.2g}, and are not used")
            return None
        return make()

    def _disagreement(self, decoder: Decoder | Modeled, residency: Residency) -> float:
        """Relative difference of the logits of a few tokens, of the variant with the largest.

        Of a variant's the median: now and then another expert is chosen.
        """
        variants = range(len(self.artifact.variants)) if residency.mode == "mixed" else [0]
        caches = [KVCache(len(variants), BLOCK_TOKENS) for _ in range(2)]
        caches[1].windows = caches[0].windows
        theirs = PagedRunner(residency, caches[0], self.device)
        ours = FusedRunner(
            decoder,
            residency,
            caches[1],
            self.device,
            max_seqs=len(variants),
            max_rows=len(variants) * _PROBE_TOKENS,
            max_blocks=1,
        )
        errors = []
        for length in range(1, _PROBE_TOKENS + 1):
            parts = [Part(v, list(range(length)), 0, [v], True) for v in variants]
            expected, found = theirs.run(parts).double(), ours.run(parts).double()
            errors.append((found - expected).norm(dim=-1) / expected.norm(dim=-1))
        return float(torch.stack(errors).median(dim=0).values.max())  # NaN if there is one

    def _runner(
        self,
        decoder: Decoder | Modeled | None,
        residency: Residency,
        cache: KVCache,
        variants: list[Variant],
    ) -> PagedRunner | FusedRunner:
        if decoder is None:
            return PagedRunner(residency, cache, self.device)
        longest = max(v.max_model_len for v in variants)
        runner = FusedRunner(
            decoder,
            residency,
            cache,
            self.device,
            max_seqs=self.options.max_num_seqs,
            max_rows=max(self.options.max_batch_tokens, self.options.max_num_seqs),
            max_blocks=-(-longest // BLOCK_TOKENS) + 1,
        )
        if self.device.type == "cuda":
            try:
                runner.capture(lambda done, of: self.on_progress("CUDA graphs", done, of))
            except Exception as error:  # of memory, or of whatever a driver does not do
                runner.forget_graphs()
                self.note(f"no CUDA graphs, which is slower: {_one_line(error)}")
                if isinstance(decoder, Modeled):
                    return PagedRunner(residency, cache, self.device)
        return runner

    def _cache(self, probed: KVCache, variants: list[Variant]) -> tuple[KVCache, list[Variant]]:
        """The cache as large as allowed, and the lengths that fit in it."""
        options = self.options
        longest = max(v.max_model_len for v in variants)
        useful = options.max_num_seqs * -(-longest // BLOCK_TOKENS)
        allowed = self._cache_bytes() // max(1, probed.block_bytes)
        blocks = min(useful, allowed)
        if blocks < 1 or (options.max_model_len and blocks * BLOCK_TOKENS < longest):
            raise RuntimeUnfitError(
                f"not enough memory for keys and values: a request of {longest} tokens needs "
                f"{_gib(-(-longest // BLOCK_TOKENS) * probed.block_bytes)}, "
                f"{_gib(self._cache_bytes())} are to be had",
                "lower `--max-model-len`, or use `--mode swap`",
            )
        if blocks * BLOCK_TOKENS < longest:
            longest = blocks * BLOCK_TOKENS
            self.note(f"memory for keys and values limits requests to {longest} tokens")
        shorter = [
            Variant(v.name, v.tokenizer, v.ends, v.vocab, min(v.max_model_len, longest))
            for v in variants
        ]
        size, free = blocks * probed.block_bytes, devices.free_bytes(self.device)
        if size > free:
            raise RuntimeUnfitError(
                f"not enough memory for keys and values: {_gib(size)}, {_gib(free)} are free",
                "lower `--kv-cache` or `--max-num-seqs`",
            )
        return probed.resized(blocks), shorter

    def _cache_bytes(self) -> int:
        """What keys and values may take."""
        if self.options.kv_cache_bytes is not None:
            return self.options.kv_cache_bytes
        free = self._free_bytes()
        return free // 4 if self.device.type == "cpu" else free

    def _free_bytes(self) -> int:
        """What may still be taken of the device."""
        reserved = devices.headroom(self.device, self.options.gpu_memory_utilization)
        return max(0, devices.free_bytes(self.device) - reserved)

    def _variants(self, skeletons: Skeletons) -> list[Variant]:
        tokenizers: dict[tuple[Any, ...], Any] = {}
        found = []
        for name, model in zip(self.artifact.variants, skeletons.models, strict=True):
            config = model.config.get_text_config()
            found.append(
                Variant(
                    name,
                    _tokenizer(self.artifact, name, tokenizers),
                    _ends(self.artifact, name, config),
                    int(config.vocab_size),
                    self._max_model_len(name, config),
                )
            )
        return found

    def _max_model_len(self, name: str, config: Any) -> int:
        asked, longest = self.options.max_model_len, _longest(config)
        if asked is None:
            return longest or _DEFAULT_LENGTH
        if longest is not None and asked > longest:
            raise RuntimeUnfitError(
                f"`--max-model-len {asked}` is more than the {longest} tokens of variant `{name}`",
                f"give at most {longest}",
            )
        return asked


def _probe_layers(model: Any) -> int:
    """The first so many layers have one of every kind: the first may be dense."""
    kinds = [[type(module) for module in layer.modules()] for layer in model.base_model.layers]
    return max(_PROBE_LAYERS, 1 + max(map(kinds.index, kinds)))


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _longest(config: Any) -> int | None:
    """The most tokens a model knows positions for, if it says so."""
    found = [n for key in _LENGTH_KEYS if (n := getattr(config, key, None))]
    rope = getattr(config, "rope_parameters", None) or {}
    for form in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if form.get("rope_type") in MOVING_ROPES:
            own = form.get("original_max_position_embeddings")
            own = own or getattr(config, "original_max_position_embeddings", None)
            found = [own] if own else found
    return int(found[0]) if found else None


def _tokenizer(artifact: Artifact, variant: str, known: dict[tuple[Any, ...], Any]) -> Any:
    """A variant's tokenizer, shared by all whose files are the same; None if it has none."""
    from transformers import AutoTokenizer

    prefix = variant_folder(variant) + "/"
    files = tuple(
        (name.removeprefix(prefix), entry["sha256"])
        for name, entry in sorted(artifact.files.items())
        if name.startswith(prefix) and not name.endswith((".safetensors", "tensors.json"))
    )
    if files not in known:
        try:
            known[files] = AutoTokenizer.from_pretrained(
                artifact.path / variant_folder(variant), trust_remote_code=False
            )
            known[files]("x")  # sets itself up on first use, which threads must not share
        except Exception as error:  # the tokenizers library raises plain ones
            if any(name.startswith(_TOKENIZER_FILES) for name, _ in files):
                what = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise RuntimeUnfitError(
                    f"the tokenizer of variant `{variant}` does not load: {what}",
                    "`moecc inspect --verify` tells whether its files are damaged",
                ) from None
            known[files] = None
    return known[files]


def _ends(artifact: Artifact, variant: str, config: Any) -> frozenset[int]:
    """The tokens that end an answer: the generation config's, else the config's."""
    ends: Any = None
    path = artifact.path / variant_file(variant, "generation_config.json")
    if path.is_file():
        try:
            ends = json.loads(path.read_bytes()).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise DamagedArtifactError(f"`{path}` is damaged: {error}") from None
    if ends is None:
        ends = config.eos_token_id
    found = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(isinstance(end, int) for end in found):
        raise DamagedArtifactError(f"`{path}` is damaged: `eos_token_id` is {ends!r}")
    return frozenset(found)


def _gib(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.2f} GiB"
