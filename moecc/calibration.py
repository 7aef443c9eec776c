"""Calibration: what the experts of each variant do to text of its own.

Every variant's text runs through its own original model, one block of layers at a time. Each layer
of experts is watched (collected.py), and then its experts are compared on tokens of both variants
(outputs.py). A subset of the samples also goes backwards, for the curvature of the loss. The loss
is the cross-entropy with labels drawn from the model's own distribution, so that its squared
gradients are the Fisher information, which is the Hessian of the KL divergence. As in K-FAC
(Martens and Grosse, ICML 2015) it is kept as a product of an input side (the moments) and an output
side, the latter averaged to one number (the sensitivity).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moecc import recipe
from moecc.architecture import Architecture
from moecc.collected import SAMPLED_TOKENS, Statistics, Tokens, moment_writer
from moecc.errors import RecipeError, SourceError
from moecc.measured import (
    Array,
    Measured,
    MomentFiles,
    Workspace,
    choose_block,
    load,
    moment_bytes,
)
from moecc.outputs import layer_distances, load_samples
from moecc.skeleton import load_config
from moecc.streaming import Streamed
from moecc.texts import PAIR_HINT, encode_pair, load_tokenizer, read_pairs
from moecc.variants import OpenVariant

CACHE_VERSION = 1
LEARNED_TOKENS = 16384  # a variant, for the sensitivity; at least one sample
HEAD_TOKENS = 1024  # whose logits are in memory at once
SEED = 20260713

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A variant's samples, those to learn from first.

    Attributes:
        inputs: int64 [samples, length], by the names of the model's arguments.
        learn: how many samples go backwards.
        read, written: tokens of the encoder, or of the only stack, and tokens that are predicted.
    """

    inputs: dict[str, Tensor]
    learn: int
    read: Tokens
    written: Tokens

    def digest(self) -> str:
        """SHA-256 of the tokens."""
        digest = hashlib.sha256()
        for name, values in sorted(self.inputs.items()):
            digest.update(f"{name} {list(values.shape)}\0".encode())
            digest.update(values.contiguous().numpy().tobytes())
        return digest.hexdigest()


def calibrate(
    architecture: Architecture,
    variants: Sequence[OpenVariant],
    settings: recipe.Calibration,
    texts: Mapping[str, Sequence[Path]],
    *,
    device: str = "cpu",
    cache: Path | None = None,
    on_progress: Progress = lambda done, total: None,
) -> Measured:
    """Runs every variant's own text through it, or takes the result of an earlier time.

    Memory holds one block of one variant in float32 (its experts as they are stored), what lies
    outside of blocks, and the hidden states of that variant's samples.

    Args:
        texts: variant -> its files, `settings.files(recipe.folder)`.
        cache: a folder; the result is kept there under a hash of models, tokens and settings.
        on_progress: gets bytes of experts read and bytes in all; each is read three times.

    Returns:
        What was measured; close it when its moments are no longer needed.

    Raises:
        RecipeError: a text that cannot be read or is too short.
        SourceError: a tokenizer or model that cannot be used, hidden states that are not finite,
            a disk that is full.
    """
    batches = [read_batch(variant, texts[variant.name], settings) for variant in variants]
    block = choose_block(architecture, len(variants))
    key = _cache_key(architecture, variants, batches, settings, block)
    if cache is not None:
        found = load(cache / f"{key}.calibration", architecture, len(variants), block)
        if found is not None:
            return found
    hidden = sum(max(p.matrix[1] for p in a.projections) for a in architecture.layers)
    need = moment_bytes(architecture, len(variants), block)
    work = Workspace(cache, key, need + 4 * len(variants) * SAMPLED_TOKENS * hidden)
    files: MomentFiles | None = None
    try:
        files = MomentFiles(work.folder, architecture, len(variants), block, new=True)
        with _exact(device):
            run = _Run(architecture, variants, batches, work, files, block, device, on_progress)
            arrays = run.measure()
        return work.finish(arrays, files, block)
    except BaseException as error:
        if files is not None:
            files.close()
        work.discard()
        if isinstance(error, OSError):
            raise SourceError(f"cannot keep the calibration: {error.strerror or error}") from error
        raise


class _Run:
    """One calibration: all variants forward and backward, then their experts against each other."""

    def __init__(
        self,
        architecture: Architecture,
        variants: Sequence[OpenVariant],
        batches: Sequence[Batch],
        work: Workspace,
        files: MomentFiles,
        block: int,
        device: str,
        on_progress: Progress,
    ) -> None:
        self._architecture, self._variants, self._batches = architecture, variants, batches
        self._work, self._files, self._block, self._device = work, files, block, device
        self._on_progress, self._done = on_progress, 0
        layers = architecture.layers
        self._total = 3 * len(variants) * sum(a.exact_bytes * a.num_experts for a in layers)

    def _read(self, nbytes: int) -> None:
        self._done += nbytes
        self._on_progress(self._done, self._total)

    def measure(self) -> dict[str, list[Array]]:
        """The arrays of a `Measured`; moments go to the files."""
        folders, streamed, seen = [], [], []
        with self._work.scratch() as scratch:
            for number, variant in enumerate(self._variants):
                folder = scratch / str(number)
                folder.mkdir()
                folders.append(folder)
                one, found = self._variant(number, variant, folder)
                streamed.append(one)
                seen.append(found)
            output: list[Array] = []
            cka: list[Array] = []
            for layer in range(len(self._architecture.layers)):
                sample = load_samples(folders, layer, torch.device(self._device))
                for kept, array in zip(
                    (output, cka), layer_distances(streamed, layer, sample, self._read), strict=True
                ):
                    kept.append(array)
        layers = range(len(self._architecture.layers))
        return {
            "frequency": [np.stack([s.frequency[i] for s in seen], axis=1) for i in layers],
            "output_norm": [np.stack([s.output_norm[i] for s in seen], axis=1) for i in layers],
            "sensitivity": [np.stack([s.sensitivity[i] for s in seen], axis=1) for i in layers],
            "output": output,
            "cka": cka,
        }

    def _variant(
        self, number: int, variant: OpenVariant, samples: Path
    ) -> tuple[Streamed, Statistics]:
        batch, device = self._batches[number], torch.device(self._device)
        statistics = Statistics(
            self._architecture,
            [_stack(batch, layer.name) for layer in self._architecture.layers],
            batch.written.count,
            moment_writer(self._files, number),
            samples,
            self._block,
            device,
            self._read,
        )
        streamed = Streamed(variant, self._architecture, self._device, statistics)
        _check_tokens(variant, batch, streamed.model)
        with streamed.opened():
            last = streamed.forward(
                batch.learn, **{name: value.to(device) for name, value in batch.inputs.items()}
            )
            _learn(streamed, last, batch)
        return streamed, statistics


def _stack(batch: Batch, layer: str) -> Tokens:
    """The tokens that come to a layer: of an encoder's those that it reads."""
    return batch.written if layer.startswith("decoder.") else batch.read


def _learn(streamed: Streamed, last: Tensor, batch: Batch) -> None:
    """The backward pass, from the last block's output float32 [learn, length, H]."""
    places = batch.written.places(range(batch.learn)).to(last.device)
    states = last.detach().flatten(0, 1)[places]
    drawn = uniforms(len(states)).to(last.device)
    step = min(HEAD_TOKENS, last.shape[1])
    parts = []
    for start in range(0, len(states), step):
        leaf = states[start : start + step].clone().requires_grad_()
        logits = streamed.logits(leaf)
        if not torch.isfinite(logits).all():
            raise SourceError(
                f"variant `{streamed.variant.name}` gives NaN or infinite logits "
                "on its calibration text",
                "the checkpoint is broken; look at how it was trained or converted",
            )
        labels = sample_labels(logits.detach(), drawn[start : start + step])
        F.cross_entropy(logits, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        parts.append(leaf.grad)
    gradient = torch.zeros_like(last).flatten(0, 1)
    gradient[places] = torch.cat(parts)
    torch.autograd.backward(last, gradient.view_as(last))


def uniforms(count: int) -> Tensor:
    """The random numbers, float64 [count] in [0, 1), that labels are drawn with."""
    return torch.rand(count, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)


def sample_labels(logits: Tensor, drawn: Tensor) -> Tensor:
    """Labels int64 [n] drawn from logits [n, vocabulary] by inverting the distributions."""
    cumulated = logits.double().softmax(-1).cumsum(-1)
    found = torch.searchsorted(cumulated, (drawn * cumulated[:, -1])[:, None], right=True)
    return found.squeeze(-1).clamp(max=logits.shape[-1] - 1)


def read_batch(variant: OpenVariant, files: Sequence[Path], settings: recipe.Calibration) -> Batch:
    """The samples of a variant's files, tokenized with its own tokenizer.

    Raises RecipeError for texts, SourceError for a tokenizer.
    """
    texts = [_read_text(variant.name, file) for file in files]
    tokenizer = _tokenizer(variant)
    config = load_config(variant.name, variant.checkpoint.config)
    if config.is_encoder_decoder:
        lines = [p for file, text in zip(files, texts, strict=True) for p in _pairs(file, text)]
        return _pair_batch(variant.name, tokenizer, lines, config, settings)
    return _window_batch(variant.name, tokenizer, "".join(texts), settings)


def _window_batch(name: str, tokenizer: Any, text: str, settings: recipe.Calibration) -> Batch:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    length, count = settings.length, len(ids) // settings.length
    if not count:
        raise RecipeError(
            f"the calibration text of variant `{name}` has {len(ids)} tokens, "
            f"a sample has {length}",
            "give it more text, or lower `calibration.length`",
        )
    windows = torch.tensor(ids[: count * length]).view(count, length)
    chosen, learn = _choose(count, settings.samples, length)
    tokens = Tokens(len(chosen), length, None)
    return Batch({"input_ids": windows[chosen]}, learn, tokens, tokens)


def _pair_batch(
    name: str,
    tokenizer: Any,
    lines: Sequence[tuple[str, str]],
    config: Any,
    settings: recipe.Calibration,
) -> Batch:
    """Pairs, padded to the longest; a decoder reads its target shifted by one."""
    if not lines:
        raise RecipeError(f"the calibration text of variant `{name}` has no pairs", PAIR_HINT)
    chosen, _ = _choose(len(lines), settings.samples, settings.length)
    sources, targets = [], []
    for source, target in (lines[i] for i in chosen):
        read, written = encode_pair(tokenizer, source, target)
        sources.append(read[: settings.length])
        targets.append(written[: settings.length])
    longest = max(len(row) for row in (*sources, *targets))
    learn = max(1, min(len(chosen), LEARNED_TOKENS // longest))
    start = config.decoder_start_token_id
    shifted = [[start if start is not None else config.pad_token_id, *t[:-1]] for t in targets]
    all_read, read_mask = _padded(sources)
    all_written, written_mask = _padded(shifted)
    inputs = {
        "input_ids": all_read,
        "attention_mask": read_mask.long(),
        "decoder_input_ids": all_written,
        "decoder_attention_mask": written_mask.long(),
    }
    return Batch(
        inputs,
        learn,
        Tokens(len(all_read), all_read.shape[1], read_mask),
        Tokens(len(all_written), all_written.shape[1], written_mask),
    )


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows padded on the right to int64 [rows, longest], and bool: what is no padding."""
    values = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    keep = torch.zeros_like(values, dtype=torch.bool)
    for i, row in enumerate(rows):
        values[i, : len(row)] = torch.tensor(row)
        keep[i, : len(row)] = True
    return values, keep


def _choose(count: int, samples: int, length: int) -> tuple[list[int], int]:
    """Evenly spread places of samples, those to learn from first, and how many these are."""
    size = min(count, samples)
    learn = max(1, min(size, LEARNED_TOKENS // length))
    first = [i * size // learn for i in range(learn)]
    order = [*first, *sorted(set(range(size)) - set(first))]
    return [i * count // size for i in order], learn


def _read_text(name: str, file: Path) -> str:
    where = f"the calibration text `{file}` of variant `{name}`"
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        hint = "files under `calibration.text` are relative to the recipe"
        raise RecipeError(f"cannot read {where}: {(error.strerror or '').lower()}", hint) from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{where} is not UTF-8 at byte {error.start}", "save it as UTF-8"
        ) from None


def _pairs(file: Path, text: str) -> list[tuple[str, str]]:
    try:
        return list(read_pairs(text))
    except ValueError as error:
        raise RecipeError(f"{error} in `{file}`", PAIR_HINT) from None


def _tokenizer(variant: OpenVariant) -> Any:
    try:
        return load_tokenizer(variant.checkpoint.source.file("."))
    except ValueError as error:
        raise SourceError(
            f"the tokenizer of variant `{variant.name}` does not load: {error}",
            "a source needs its tokenizer to be calibrated; without one leave `calibration` out",
        ) from None


def _check_tokens(variant: OpenVariant, batch: Batch, model: Any) -> None:
    """An embedding of its own for each token: an index out of range would only crash."""
    size = model.get_input_embeddings().weight.shape[0]
    largest = max(int(batch.inputs[k].max()) for k in batch.inputs if k.endswith("input_ids"))
    if largest >= size:
        raise SourceError(
            f"the tokenizer of variant `{variant.name}` gives token {largest}, "
            f"its model has {size} embeddings",
            "the tokenizer belongs to another model",
        )


def _cache_key(
    architecture: Architecture,
    variants: Sequence[OpenVariant],
    batches: Sequence[Batch],
    settings: recipe.Calibration,
    block: int,
) -> str:
    layers = [(a.name, a.num_experts, [p.name for p in a.projections]) for a in architecture.layers]
    prints = [v.fingerprint for v in variants]
    digests = [batch.digest() for batch in batches]
    sizes = [settings.samples, settings.length, block]
    text = json.dumps([CACHE_VERSION, architecture.class_name, layers, prints, digests, sizes])
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _exact(device: str) -> Iterator[None]:
    """Float32 without TF32, and deterministic kernels where there is a choice."""
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        if torch.device(device).type == "cuda":
            memory.fill_uninitialized_memory = False
            torch.use_deterministic_algorithms(True, warn_only=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions
        memory.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
