"""What others do with the experts of several variants: tensors in, tensors and their size out.

Every function gives the experts that each variant computes with, [variants, experts, out, in], and
the bytes it takes to keep them, with scales and masks; exact weights count as 16 bits. Nothing
outside the experts is changed.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from family import ExpertLayer, Experts, Statistics
from torch import Tensor

from moecc.coding import Coding, dequantize, quantize

GROUP = 64
DAMPING = 0.01


class Baseline(NamedTuple):
    """Experts as they are computed with, and the bytes that all of them are kept in."""

    experts: Experts
    nbytes: float


def _params(experts: Experts) -> int:
    """Of one variant."""
    return sum(value[0].numel() for value in experts.values())


def _variants(experts: Experts) -> int:
    return len(next(iter(experts.values())))


def _coding(value: Tensor, bits: int) -> Coding:
    return Coding(bits, GROUP if value.shape[-1] % GROUP == 0 else 0)


def _coded_bytes(value: Tensor, bits: int) -> int:
    return _coding(value, bits).nbytes(value[..., 0].numel(), value.shape[-1])


def _round(value: Tensor, bits: int) -> Tensor:
    coding, rows = _coding(value, bits), value.reshape(-1, value.shape[-1])
    return dequantize(*quantize(rows, coding), coding).view(value.shape)


def round_to_nearest(experts: Experts, bits: int) -> Baseline:
    """Every variant alone, rounded to nearest: groups of 64, scales of least squared error."""
    rounded = {key: _round(value, bits) for key, value in experts.items()}
    return Baseline(rounded, sum(_coded_bytes(value, bits) for value in experts.values()))


def gptq(experts: Experts, hessian: Experts, bits: int) -> Baseline:
    """Every variant alone by GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323).

    With a Hessian for every expert of the tokens it gets, 1% damping, columns in their order,
    and the scales of a group searched when its first column is reached. All layers see the
    activations of the original.
    """
    found = {key: _gptq(value, hessian[key], bits) for key, value in experts.items()}
    return Baseline(found, sum(_coded_bytes(value, bits) for value in experts.values()))


def _gptq(value: Tensor, hessian: Tensor, bits: int) -> Tensor:
    columns = value.shape[-1]
    rest = value.reshape(-1, *value.shape[2:]).clone()  # [V * E, out, in]
    h = hessian.reshape(-1, columns, columns).double()
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    # An input that was never seen, or an expert without a token: no column helps another.
    diagonal += torch.where(diagonal == 0, mean, 0) + DAMPING * mean + (mean == 0)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    factor = factor.to(rest.dtype)
    coding, top = _coding(value, bits), (2**bits - 1) / 2
    group, out = coding.group or columns, torch.empty_like(rest)
    for column in range(columns):
        if column % group == 0:
            rows = rest[:, :, column : column + group].reshape(-1, group)
            scale = quantize(rows, Coding(bits, 0))[1].float().view(rest.shape[:2])
            inverse = torch.where(scale > 0, 1 / scale, 0)
        x = rest[:, :, column]
        level = ((x * inverse).floor() + 0.5).clamp(-top, top)
        out[:, :, column] = level * scale
        error = (x - out[:, :, column]) / factor[:, column, column, None]
        later = factor[:, column, None, column + 1 :]
        rest[:, :, column + 1 :].addcmul_(error[..., None], later, value=-1)
    return out.view(value.shape)


def _by_distance(experts: Experts, layers: Sequence[ExpertLayer]) -> list[tuple[int, int]]:
    """(layer, expert), the variants' most similar ones first: summed L2 over pairs of variants."""
    found = []
    for number, layer in enumerate(layers):
        flat = torch.cat([experts[key].flatten(2) for key in (layer.up, layer.down)], -1)
        for expert in range(flat.shape[1]):
            found.append((float(torch.pdist(flat[:, expert]).sum()), number, expert))
    return [(number, expert) for _, number, expert in sorted(found)]


def _share(
    experts: Experts, layers: Sequence[ExpertLayer], ratio: float, *, alternately: bool
) -> Baseline:
    variants = _variants(experts)
    order, shared = _by_distance(experts, layers), {k: v.clone() for k, v in experts.items()}
    allowed, nbytes = ratio * 2 * _params(experts), variants * 2.0 * _params(experts)
    for place, (number, expert) in enumerate(order):
        if nbytes <= allowed * (1 + 1e-9):
            break
        for key in (layers[number].up, layers[number].down):
            value = experts[key][:, expert]
            shared[key][:, expert] = value[place % variants] if alternately else value.mean(0)
            nbytes -= (variants - 1) * 2 * value[0].numel()
    return Baseline(shared, nbytes)


def alternate(experts: Experts, layers: Sequence[ExpertLayer], ratio: float) -> Baseline:
    """Imani et al., ICML 2025 (arXiv 2505.06481), Algorithm 1: the most similar experts share.

    They share one copy, taken from each variant in turns; the others stay as they are.
    """
    return _share(experts, layers, ratio, alternately=True)


def mean(experts: Experts, layers: Sequence[ExpertLayer], ratio: float) -> Baseline:
    """Shares in the order of `alternate`, but the mean of the variants (model soups)."""
    return _share(experts, layers, ratio, alternately=False)


def _everywhere(experts: Experts, merged: Experts) -> Baseline:
    spread = {key: merged[key][None].expand_as(value) for key, value in experts.items()}
    return Baseline(spread, 2.0 * _params(experts))


def _deltas(value: Tensor, base: int) -> Tensor:
    """What every other variant differs from the base by."""
    others = [i for i in range(len(value)) if i != base]
    return value[others] - value[base]


def task_arithmetic(experts: Experts, base: int, scale: float) -> Baseline:
    """Ilharco et al., ICLR 2023 (arXiv 2212.04089): the base and the scaled sum of all deltas."""
    merged = {k: v[base] + scale * _deltas(v, base).sum(0) for k, v in experts.items()}
    return _everywhere(experts, merged)


_TIES = """
import json, sys
import torch
from mergekit.merge_methods.generalized_task_arithmetic import get_mask
from mergekit.sparsify import SparsificationMethod, sparsify
from safetensors.torch import load_file, save_file

source, out, density = sys.argv[1], sys.argv[2], float(sys.argv[3])
merged = {}
for name, deltas in load_file(source).items():  # [models, experts, out, in]
    experts = []
    for expert in deltas.unbind(1):
        method = SparsificationMethod.magnitude
        kept = torch.stack([sparsify(delta, density, method) for delta in expert])
        mask = get_mask(kept, method="sum")
        count = mask.sum(0)
        count[count == 0] = 1
        experts.append((kept * mask).sum(0) / count)
    merged[name] = torch.stack(experts)
save_file(merged, out)
"""


def ties_deltas(experts: Experts, base: int, density: float, python: str) -> Experts:
    """TIES-Merging's delta (Yadav et al., NeurIPS 2023, arXiv 2306.01708), [E, out, in].

    Trimmed and elected by mergekit's own code, in the environment of another interpreter.
    """
    from safetensors.torch import load_file, save_file

    device = next(iter(experts.values())).device
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in.safetensors", Path(folder) / "out.safetensors"
        deltas = {k: _deltas(v, base).cpu().contiguous() for k, v in experts.items()}
        save_file(deltas, source)
        command = [python, "-c", _TIES, str(source), str(out), str(density)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return {key: value.to(device) for key, value in load_file(out).items()}


def ties(experts: Experts, base: int, deltas: Experts, scale: float) -> Baseline:
    """The base and TIES' scaled delta, for every variant."""
    return _everywhere(experts, {k: v[base] + scale * deltas[k] for k, v in experts.items()})


def emr(experts: Experts, base: int) -> Baseline:
    """EMR-Merging (Huang et al., NeurIPS 2024, arXiv 2405.17461): elect, mask, rescale.

    One elected delta; of every variant a mask of the weights where its sign agrees, and a scale,
    here for each matrix rather than for each model. Kept: base, elected delta, masks, scales.
    """
    found, nbytes = {}, 2 * 2.0 * _params(experts)
    for key, value in experts.items():
        deltas = _deltas(value, base)
        sign = deltas.sum(0).sign()
        elected = sign * (deltas.abs() * (deltas.sign() == sign)).amax(0)
        masked = elected * (deltas * elected > 0)
        scale = deltas.abs().sum((-1, -2)) / masked.abs().sum((-1, -2)).clamp_min(1e-12)
        found[key] = value.clone()
        others = [i for i in range(len(value)) if i != base]
        found[key][others] = value[base] + scale[..., None, None] * masked
        nbytes += deltas.numel() / 8 + 2 * scale.numel()
    return Baseline(found, nbytes)


def bitdelta(experts: Experts, base: int, base_bits: int = 16) -> Baseline:
    """BitDelta (Liu et al., NeurIPS 2024, arXiv 2402.10193): the base and the signs of deltas.

    With the mean magnitude of each row as scale (BitDelta has one for a matrix, and then distills
    it, which is not done here). A base of fewer bits is rounded before the deltas are taken.
    """
    found, nbytes = {}, 0.0
    for key, value in experts.items():
        kept = value[base] if base_bits == 16 else _round(value[base], base_bits)
        others = [i for i in range(len(value)) if i != base]
        deltas = value[others] - kept
        scale = deltas.abs().mean(-1, keepdim=True).bfloat16().float()
        found[key] = torch.empty_like(value)
        found[key][base] = kept
        found[key][others] = kept + scale * torch.where(deltas >= 0, 1.0, -1.0)
        exact = 2 * kept.numel()
        nbytes += exact if base_bits == 16 else _coded_bytes(kept, base_bits)
        nbytes += deltas.numel() / 8 + 2 * scale.numel()
    return Baseline(found, nbytes)


def hc_smoe(
    experts: Experts, layers: Sequence[ExpertLayer], statistics: Statistics, ratio: float
) -> Baseline:
    """HC-SMoE (Chen et al., ICML 2025, arXiv 2410.08589) over the experts of all variants.

    In each layer: average linkage of the experts' mean outputs over the calibration tokens of all
    variants, then the mean of a cluster's weights by how often each expert is routed to.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    found, nbytes = {}, 0.0
    for layer in layers:
        up, down = (experts[key].flatten(0, 1) for key in (layer.up, layer.down))
        x = statistics.hidden[layer.name]
        means = [(layer.middle(x @ u.T) @ d.T).mean(0) for u, d in zip(up, down, strict=True)]
        wanted = min(len(up), max(1, int(ratio * experts[layer.up].shape[1] + 1e-9)))
        tree = linkage(torch.stack(means).double().cpu().numpy(), "average")
        labels = torch.tensor(fcluster(tree, wanted, "maxclust") - 1, device=up.device).long()
        weight = statistics.routed[layer.name].flatten() + 1e-6
        count = int(labels.max()) + 1
        mass = weight.new_zeros(count).index_add_(0, labels, weight)
        for key, value in ((layer.up, up), (layer.down, down)):
            sums = value.new_zeros(count, *value.shape[1:])
            sums.index_add_(0, labels, value * weight[:, None, None])
            found[key] = (sums / mass[:, None, None])[labels].view(experts[key].shape)
            nbytes += 2 * sums.numel()
    return Baseline(found, nbytes)


_LLM_COMPRESSOR = """
import json, sys
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

source, text, out, bits, group = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
model.config.output_router_logits = False
tokens = load_file(text)["tokens"]
data = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
scheme = QuantizationScheme(
    targets=["re:.*experts.*proj$"],
    weights=QuantizationArgs(
        num_bits=bits, symmetric=False, strategy="group", group_size=group, observer="mse"
    ),
)
oneshot(
    model=model,
    dataset=Dataset.from_dict(data),
    recipe=GPTQModifier(config_groups={"experts": scheme}, dampening_frac=0.01),
    num_calibration_samples=len(tokens),
    max_seq_length=tokens.shape[1],
)
state = model.state_dict()
names = [name for name in state if ".experts." in name and name.endswith("_proj.weight")]
save_file({name: state[name].float().contiguous() for name in names}, out)
"""


def llm_compressor(
    experts: Experts, members: Sequence[Path], samples: Sequence[Tensor], bits: int, python: str
) -> Baseline:
    """Every variant alone by llm-compressor's GPTQ, layer after layer, in its own environment.

    Asymmetric codes in groups of 64, so each group has a zero point beside its scale.
    """
    from safetensors.torch import load_file, save_file

    found = {key: value.clone() for key, value in experts.items()}
    with tempfile.TemporaryDirectory() as folder:
        text, out = Path(folder) / "text.safetensors", Path(folder) / "out.safetensors"
        for index, (member, tokens) in enumerate(zip(members, samples, strict=True)):
            save_file({"tokens": tokens.cpu().contiguous()}, text)
            parts = [member, text, out, bits, GROUP]
            command = [python, "-c", _LLM_COMPRESSOR, *map(str, parts)]
            subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
            state = load_file(out)
            for key, value in found.items():
                value[index] = _unpacked(state, key, value.shape[1]).to(value.device)
    groups = sum(value.numel() // GROUP for value in experts.values())
    return Baseline(
        found, sum(value.numel() for value in experts.values()) * bits / 8 + groups * (2 + bits / 8)
    )


def _unpacked(state: Experts, key: str, count: int) -> Tensor:
    """A projection [E, out, in] of a checkpoint that has a module for each expert."""
    prefix, _, name = key.rpartition(".")
    parts = ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
    experts = [
        torch.cat([state[f"{prefix}.{expert}.{part}.weight"] for part in parts])
        for expert in range(count)
    ]
    return torch.stack(experts)


def available(python: str, module: str) -> bool:
    """Whether an interpreter has a module."""
    code = f"import importlib.util as u, sys; sys.exit(u.find_spec({json.dumps(module)}) is None)"
    try:
        return subprocess.run([python, "-c", code], capture_output=True).returncode == 0
    except OSError:
        return False
