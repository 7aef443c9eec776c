"""A family of variants: its models, its texts, and what changed experts do to its answers.

Experts are tensors [variants, experts, out, in], one for each projection of a layer, by its name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WINDOW = 256
BATCH = 32
SAMPLES = 128  # windows or pairs of calibration, as the recipes of `ours` say
LONGEST = 512  # tokens of a pair's input or target
POOLED = 512  # tokens of each variant that stand for its hidden states
UNSCORED = -100

Experts = dict[str, Tensor]
Models = Mapping[str, Path]


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of a layer: the names of its two projections, and what lies between them."""

    name: str
    up: str
    down: str
    gated: bool
    act: Callable[[Tensor], Tensor]

    def middle(self, raised: Tensor) -> Tensor:
        """What the second projection reads, of what the first one gives."""
        if not self.gated:
            return self.act(raised)
        gate, up = raised.chunk(2, dim=-1)
        return self.act(gate) * up


@dataclass(frozen=True)
class Batch:
    """What a model reads, and for each position of its logits the token to predict."""

    inputs: dict[str, Tensor]
    labels: Tensor

    def to(self, device: str) -> Batch:
        moved = {name: value.to(device) for name, value in self.inputs.items()}
        return Batch(moved, self.labels.to(device))


@dataclass(frozen=True)
class Figures:
    """How a variant compares with its own original, over its predicted tokens, in nats."""

    tokens: int
    loss: float
    reference_loss: float
    kl: float

    @property
    def ratio(self) -> float:
        """Of the perplexities."""
        return math.exp(self.loss - self.reference_loss)

    def to_json(self) -> dict[str, Any]:
        loss_ratio = self.loss / self.reference_loss
        return {**vars(self), "ratio": self.ratio, "loss_ratio": loss_ratio}


@dataclass
class Statistics:
    """What the experts of the originals see of the calibration text.

    Attributes:
        hessian: projection -> [V, E, in, in], sums of x x^T over an expert's tokens.
        routed: layer -> [V, E], how many tokens an expert got.
        hidden: layer -> [tokens, hidden], some of all variants, as they reach the experts.
    """

    hessian: dict[str, Tensor] = field(default_factory=dict)
    routed: dict[str, Tensor] = field(default_factory=dict)
    hidden: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Texts:
    """The files of a variant; `test` is not seen by anything that is measured."""

    calibration: tuple[Path, ...]
    test: tuple[Path, ...]


class Family:
    """The originals in float32, their experts and texts; measures other experts in their place."""

    def __init__(
        self,
        members: Models,
        texts: Mapping[str, Texts],
        base: str,
        *,
        windows: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.members, self.texts, self.base, self.device = dict(members), texts, base, device
        self.windows = windows
        self.variants = tuple(members)
        self.models = {name: load_original(folder).to(device) for name, folder in members.items()}
        self.encodes = bool(self.models[base].config.is_encoder_decoder)
        self.layers = expert_layers(self.models[base])
        read = [read_experts(self.models[name]) for name in self.variants]
        self.experts: Experts = {key: torch.stack([r[key] for r in read]) for key in read[0]}
        self.test = {v: self._batches(v, texts[v].test, windows) for v in self.variants}
        self.valid = {v: self._samples(v) for v in self.variants}
        self._references: dict[tuple[str, str], list[tuple[Tensor, float]]] = {}

    def _batches(self, variant: str, files: Sequence[Path], limit: int | None) -> list[Batch]:
        folder = self.members[variant]
        if self.encodes:
            pairs = pair_samples(folder, files, self.models[variant].config)[:limit]
            return [self._pad(pairs[i : i + BATCH]) for i in range(0, len(pairs), BATCH)]
        return [window_batch(part) for part in windows_of(folder, files)[:limit].split(BATCH)]

    def _samples(self, variant: str) -> list[Batch]:
        """Calibration text: so many windows, evenly spaced; pairs one by one, without padding."""
        folder, files = self.members[variant], self.texts[variant].calibration
        if self.encodes:
            pairs = pair_samples(folder, files, self.models[variant].config)
            return [self._pad([pairs[i]]) for i in _spaced(len(pairs))]
        windows = windows_of(folder, files)
        return [window_batch(part) for part in windows[_spaced(len(windows))].split(BATCH)]

    def _pad(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Batch:
        return pair_batch(pairs, self.models[self.base].config)

    @property
    def one(self) -> int:
        """Bytes of one variant's experts in 16 bits."""
        return sum(2 * value[0].numel() for value in self.experts.values())

    def figures(self, variant: str, model: Any, *, select: bool = False) -> Figures:
        """A model in the place of a variant, on its test text (`select`: some calibration text)."""
        tokens, loss, reference_loss, kl = 0, 0.0, 0.0, 0.0
        batches = self._chosen(variant, select)
        for batch, (wanted, nll) in zip(batches, self._reference(variant, select), strict=True):
            count, found, apart = compare(model, batch.to(self.device), wanted.to(self.device))
            tokens, loss, kl = tokens + count, loss + found, kl + apart
            reference_loss += nll
        return Figures(tokens, loss / tokens, reference_loss / tokens, kl / tokens)

    def evaluate(self, experts: Experts, *, select: bool = False) -> dict[str, Figures]:
        """Per variant its figures with these experts."""
        # References come from the originals, so before anything else is in their place.
        for name in self.variants:
            self._reference(name, select)
        with self.installed(experts) as models:
            return {name: self.figures(name, models[name], select=select) for name in models}

    @contextmanager
    def installed(self, experts: Experts) -> Iterator[dict[str, Any]]:
        """The models with other experts in them, until the context ends."""
        try:
            for index, name in enumerate(self.variants):
                write_experts(self.models[name], {k: v[index] for k, v in experts.items()})
            yield self.models
        finally:
            for index, name in enumerate(self.variants):
                write_experts(self.models[name], {k: v[index] for k, v in self.experts.items()})

    def _chosen(self, variant: str, select: bool) -> list[Batch]:
        if not select:
            return self.test[variant]
        if self.encodes:
            return self.valid[variant][::4]
        windows = torch.cat([batch.inputs["input_ids"] for batch in self.valid[variant]])
        return [window_batch(windows[::4])]

    def _reference(self, variant: str, select: bool) -> list[tuple[Tensor, float]]:
        """Per batch the original's log-probabilities, in half precision, and its summed loss.

        Likely tokens are near zero there, where float16 is finest.
        """
        key = (variant, "valid" if select else "test")
        if key not in self._references:
            kept = []
            for batch in self._chosen(variant, select):
                labels, logits = scored(self.models[variant], batch.to(self.device))
                found = logits.log_softmax(-1)
                loss = -found.gather(-1, labels[:, None]).double().sum()
                kept.append((found.half(), float(loss)))
            self._references[key] = kept
        return self._references[key]

    def statistics(self) -> Statistics:
        """What every expert of every original sees of its variant's calibration text."""
        found = Statistics()
        layers = {layer.name: layer for layer in self.layers}
        for key, value in self.experts.items():
            found.hessian[key] = value.new_zeros(*value.shape[:2], value.shape[3], value.shape[3])
        for layer in self.layers:
            found.routed[layer.name] = self.experts[layer.up].new_zeros(
                self.experts[layer.up].shape[:2]
            )
        pooled: dict[str, list[Tensor]] = {name: [] for name in layers}
        for index, name in enumerate(self.variants):
            seen = dict.fromkeys(layers, 0)

            def watch(
                layer: ExpertLayer,
                expert: int | None,
                x: Tensor,
                index: int = index,
                seen: dict[str, int] = seen,
            ) -> None:
                if expert is None:
                    part = x[: max(0, POOLED - seen[layer.name])]
                    seen[layer.name] += len(part)
                    pooled[layer.name].append(part)
                    return
                middle = layer.middle(x @ self.experts[layer.up][index, expert].T)
                found.hessian[layer.up][index, expert] += x.T @ x
                found.hessian[layer.down][index, expert] += middle.T @ middle
                found.routed[layer.name][index, expert] += len(x)

            with watching(self.models[name], self.layers, watch), torch.inference_mode():
                for batch in self.valid[name]:
                    self.models[name](**batch.to(self.device).inputs, use_cache=False)
        found.hidden = {name: torch.cat(parts) for name, parts in pooled.items()}
        return found


def _spaced(count: int, samples: int = SAMPLES) -> list[int]:
    """So many of `count` places, evenly spaced."""
    if count <= samples:
        return list(range(count))
    return [i * (count - 1) // (samples - 1) for i in range(samples)]


def load_original(folder: Path) -> Any:
    """The checkpoint under transformers, in float32, with nothing random in it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.from_pretrained(folder)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return quiet(model)


def quiet(model: Any) -> Any:
    """The model without router logits in its outputs, which take time and memory."""
    model.config.output_router_logits = False
    return model


def expert_layers(model: Any) -> list[ExpertLayer]:
    """Every layer with experts; SystemExit for a family this benchmark does not know."""
    from transformers.activations import ACT2FN

    config, found = model.config, []
    for name, module in model.named_modules():
        if hasattr(module, "gate_up_proj") and hasattr(module, "down_proj"):
            names = (f"{name}.gate_up_proj", f"{name}.down_proj")
            found.append(ExpertLayer(name, *names, True, ACT2FN[config.hidden_act]))
        elif isinstance(module, nn.ModuleDict) and "expert_0" in module:
            act = ACT2FN[config.dense_act_fn]
            found.append(ExpertLayer(name, f"{name}.wi", f"{name}.wo", False, act))
    if not found:
        raise SystemExit(f"no experts that this benchmark knows in {type(model).__name__}")
    return found


def _weights(model: Any, layer: ExpertLayer, key: str) -> Tensor | list[Tensor]:
    """The parameter of a projection: of all experts, or of each."""
    module, name = model.get_submodule(layer.name), key.rpartition(".")[2]
    if isinstance(module, nn.ModuleDict):
        return [getattr(module[f"expert_{e}"], name).weight for e in range(len(module))]
    weight: Tensor = getattr(module, name)
    return weight


def read_experts(model: Any) -> Experts:
    """Projection -> [E, out, in], copied."""
    found = {}
    for layer in expert_layers(model):
        for key in (layer.up, layer.down):
            value = _weights(model, layer, key)
            whole = torch.stack(value) if isinstance(value, list) else value.clone()
            found[key] = whole.detach()
    return found


@torch.no_grad()
def write_experts(model: Any, experts: Experts) -> None:
    """Puts projections [E, out, in] into a model."""
    for layer in expert_layers(model):
        for key in (layer.up, layer.down):
            place, value = _weights(model, layer, key), experts[key]
            for to, new in zip(place, value, strict=True):
                to.copy_(new)


Watch = Callable[[ExpertLayer, "int | None", Tensor], None]


def watching(model: Any, layers: Sequence[ExpertLayer], watch: Watch) -> ExitStack:
    """Calls `watch` with every layer's tokens (expert None), then with those of each expert."""
    stack = ExitStack()

    def packed(layer: ExpertLayer) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            hidden, chosen = args[0], args[1]
            watch(layer, None, hidden)
            for expert in range(module.num_experts):
                tokens = (chosen == expert).any(-1)
                if tokens.any():
                    watch(layer, expert, hidden[tokens])

        return hook

    def each(layer: ExpertLayer, expert: int | None) -> Callable[..., None]:
        return lambda module, args: watch(layer, expert, args[0])

    for layer in layers:
        module = model.get_submodule(layer.name)
        if not isinstance(module, nn.ModuleDict):
            stack.callback(module.register_forward_pre_hook(packed(layer)).remove)
            continue
        stack.callback(module.register_forward_pre_hook(each(layer, None)).remove)
        for e in range(len(module)):
            hook = module[f"expert_{e}"].register_forward_pre_hook(each(layer, e))
            stack.callback(hook.remove)
    return stack


@torch.inference_mode()
def scored(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The tokens to predict, [n], and a model's logits for them, [n, vocab]."""
    logits = model(**batch.inputs, use_cache=False).logits
    places = batch.labels != UNSCORED
    return batch.labels[places], logits[places].float()


@torch.inference_mode()
def compare(model: Any, batch: Batch, wanted: Tensor) -> tuple[int, float, float]:
    """Tokens, summed loss and summed KL(original || model), given the original's log-probs."""
    labels, logits = scored(model, batch)
    loss = kl = 0.0
    for some, part, reference in zip(
        labels.split(2048), logits.split(2048), wanted.split(2048), strict=True
    ):
        found, reference = part.log_softmax(-1), reference.float()
        loss -= float(found.gather(-1, some[:, None]).double().sum())
        # Rounding leaves probabilities that do not add up to one: what they miss is added, so
        # that the error of the rounding is of second order.
        weight = reference.exp()
        kl += float((weight * (reference - found - 1)).sum(-1).double().add(1).sum())
    return len(labels), loss, kl


def windows_of(folder: Path, files: Sequence[Path]) -> Tensor:
    """All non-overlapping windows of the files, in a checkpoint's own tokens."""
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    tokens = torch.tensor(tokenizer_of(folder)(text, add_special_tokens=False)["input_ids"])
    return tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)


def tokenizer_of(folder: Path) -> Any:
    """A checkpoint's tokenizer, without its warning that a whole text is long."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 10**12
    return tokenizer


def window_batch(tokens: Tensor) -> Batch:
    """Windows in which every token but the first is predicted."""
    labels = torch.full_like(tokens, UNSCORED)
    labels[:, :-1] = tokens[:, 1:]
    return Batch({"input_ids": tokens}, labels)


def pair_samples(folder: Path, files: Sequence[Path], config: Any) -> list[tuple[Tensor, Tensor]]:
    """Tokens of each pair's input and target, the target with the token that ends it."""
    tokenizer, found = tokenizer_of(folder), []
    for line in pair_lines(files):
        read = tokenizer(line["input"])["input_ids"][:LONGEST]
        target = tokenizer(text_target=line["target"])["input_ids"][: LONGEST - 1]
        if target[-1:] != [config.eos_token_id]:
            target = [*target, config.eos_token_id]
        found.append((torch.tensor(read), torch.tensor(target)))
    return found


def pair_lines(files: Sequence[Path]) -> list[dict[str, str]]:
    """The pairs of JSONL files."""
    texts = [file.read_text(encoding="utf-8") for file in files]
    return [json.loads(line) for text in texts for line in text.split("\n") if line.strip()]


def pair_batch(pairs: Sequence[tuple[Tensor, Tensor]], config: Any) -> Batch:
    """Pairs of different lengths, padded at the end."""
    pad, start = config.pad_token_id, config.decoder_start_token_id
    read = nn.utils.rnn.pad_sequence([a for a, _ in pairs], True, pad)
    lengths = torch.tensor([len(a) for a, _ in pairs])
    labels = nn.utils.rnn.pad_sequence([b for _, b in pairs], True, UNSCORED)
    shifted = labels.new_full(labels.shape, start)
    shifted[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == UNSCORED, pad)
    mask = (torch.arange(read.shape[1]) < lengths[:, None]).long()
    inputs = {"input_ids": read, "attention_mask": mask, "decoder_input_ids": shifted}
    return Batch(inputs, labels)


def decoder_texts(folder: Path, variants: Sequence[str]) -> dict[str, Texts]:
    """`NAME.valid.txt` to calibrate with, `NAME.test.txt` to measure on."""
    return {v: Texts((folder / f"{v}.valid.txt",), (folder / f"{v}.test.txt",)) for v in variants}


def pair_texts(folder: Path, variants: Sequence[str], work: Path) -> dict[str, Texts]:
    """The pairs of `switch.NAME.jsonl`: the first, third, ... calibrate, the others are measured.

    A variant without a file, which the base is, has the pairs of dolly, the most general ones.
    """
    found = {}
    for variant in variants:
        source = folder / f"switch.{variant}.jsonl"
        if not source.exists():
            source = folder / "switch.dolly.jsonl"
        lines = [line for line in source.read_text(encoding="utf-8").split("\n") if line.strip()]
        files = [work / f"{variant}.{part}.jsonl" for part in ("calibration", "test")]
        for start, file in enumerate(files):
            file.write_text("".join(f"{line}\n" for line in lines[start::2]), encoding="utf-8")
        found[variant] = Texts((files[0],), (files[1],))
    return found


def greedy(model: Any, prompts: Tensor, new: int, **inputs: Tensor) -> Iterator[Tensor]:
    """The tokens a model adds to each of the prompts (all of one length), most likely ones."""
    with torch.inference_mode():
        made = model.generate(
            prompts,
            do_sample=False,
            min_new_tokens=None if model.config.is_encoder_decoder else new,
            max_new_tokens=new,
            pad_token_id=model.config.pad_token_id,
            **inputs,
        )
    yield from made if model.config.is_encoder_decoder else made[:, prompts.shape[1] :]
