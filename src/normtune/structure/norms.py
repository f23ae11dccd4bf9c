"""What is a norm, and by which formula it computes: found by running a small copy of it, never by its name.

Source of the formulas: LayerNorm (Ba et al., arXiv 1607.06450), RMSNorm (Zhang and Sennrich, arXiv 1910.07467); the
form with 1 + g is Gemma's. Shapes: x (..., *G) with G the gain's shape: (H), or (heads, head size) in some QK-norms.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

MATCH = 1e-3  # largest relative deviation of a module from a formula that is called its own
ROWS = 64


@dataclass(frozen=True)
class Formula:
    """How a norm computes.

    Attributes:
        kind: `rms*g`, `rms*(1+g)`, `layernorm*g`, `layernorm*(1+g)`, each also with `+b`; `own` if none of these.
        eps: added to the mean square (or variance); None where unknown.
        compute: on bf16 input: `float32` (rounded once, at the end), `float32, gain rounded` (normalized in fp32,
            rounded, then multiplied by the gain), `input` (in the input's dtype), or `unknown`.
        deviation: |module - formula| / |module| for the nearest formula.
        nearest: that formula, in words.
    """

    kind: str
    eps: float | None
    compute: str
    deviation: float
    nearest: str


class NormFinder:
    """Tells norms from other leaves; the answer is kept per class, shape and description."""

    def __init__(self) -> None:
        self.known: dict[tuple[object, ...], bool] = {}

    def is_norm(self, module: nn.Module) -> bool:
        gains = own_parameters(module)
        if not 1 <= len(gains) <= 2 or any(True for _ in module.children()):
            return False
        shapes = {tuple(p.shape) for p in gains}
        if len(shapes) > 1 or not 1 <= gains[0].dim() <= 2 or isinstance(module, nn.Linear | nn.Embedding):
            return False
        if key_of(module) not in self.known:
            self.known[key_of(module)] = ignores_scale(module)
        return self.known[key_of(module)]


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


def key_of(module: nn.Module) -> tuple[object, ...]:
    return type(module), tuple(tuple(p.shape) for p in own_parameters(module)), str(module)


def ignores_scale(module: nn.Module) -> bool:
    """Whether f(32 x) = f(x) for random x, and f(x) depends on x: what a norm does and a scale or a bias does not."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        probe = copy_on_cpu(module)
        shape = (2, 3, *own_parameters(probe)[0].shape)
        x, other = torch.randn(shape) * 8, torch.randn(shape) * 8
        try:
            a, b, c = (run(probe, value) for value in (x, 32 * x, other))
        except Exception:  # a leaf that takes other input is no norm
            return False
        if not all(isinstance(y, torch.Tensor) and y.shape == x.shape for y in (a, b, c)):
            return False
        return torch.allclose(a, b, rtol=1e-3, atol=1e-3) and not torch.allclose(a, x) and not torch.allclose(a, c)


def run(probe: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """f(x); a gated norm, which takes a gate as well, gets one of ones."""
    try:
        return probe(x)  # type: ignore[no-any-return]
    except (TypeError, AttributeError):
        return probe(x, torch.ones_like(x))  # type: ignore[no-any-return]


def copy_on_cpu(module: nn.Module) -> nn.Module:
    """An fp32 copy with random parameters and the class's own forward, also of a module on the meta device."""
    probe = copy.deepcopy(module)
    vars(probe).pop("forward", None)
    if any(p.is_meta for p in probe.parameters()):
        probe = probe.to_empty(device="cpu")
        for buffer in probe.buffers():
            buffer.zero_()
    probe = probe.to("cpu").float()
    for parameter in probe.parameters():
        parameter.requires_grad_(False).normal_()
    return probe


def formulas(model: nn.Module, names: Iterable[str]) -> dict[str, Formula]:
    """Formula of each of the norms `names`; one probe per class, shape and description."""
    known: dict[tuple[object, ...], Formula] = {}
    found = {}
    for name in names:
        module = model.get_submodule(name)
        if key_of(module) not in known:
            known[key_of(module)] = formula(module)
        found[name] = known[key_of(module)]
    return found


def formula(module: nn.Module) -> Formula:
    """The formula of a norm, from the outputs of a copy with random gains for random input.

    The kind is told at inputs so large that eps does not count, eps at inputs so small that it does; where the
    formula with that eps misses the module there, its kind is `own`.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        probe = copy_on_cpu(module)
        gain, *rest = [p.double() for p in probe.parameters()]
        bias = rest[0] if rest else None
        x = torch.randn(ROWS, *gain.shape) * 8
        deviations = {}
        for kind in ("rms*g", "rms*(1+g)", "layernorm*g", "layernorm*(1+g)"):
            deviations[kind] = distance(run(probe, x), predict(kind, x, gain, bias, 0.0))
        kind = min(deviations, key=lambda k: deviations[k])
        label, deviation, eps = kind + ("+b" if bias is not None else ""), deviations[kind], None
        if deviation <= MATCH:
            eps, small = find_eps(probe, kind, gain, bias)
            deviation = max(deviation, distance(run(probe, small), predict(kind, small, gain, bias, eps)))
        nearest = f"nearest: {label}, off by {deviation:.2g}"
        if deviation > MATCH:
            return Formula("own", None, "unknown", deviation, nearest)
        return Formula(label, eps, compute_of(probe, kind, gain, bias, eps or 0.0), deviation, nearest)


def predict(kind: str, x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """The formula in fp64; mean and mean square over the last dimension."""
    y = normalize(kind, x.double(), eps) * (1 + gain if "1+g" in kind else gain)
    return y if bias is None else y + bias


def normalize(kind: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    if kind.startswith("layernorm"):
        x = x - x.mean(-1, keepdim=True)
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |a|, in fp64."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / a.norm().clamp_min(1e-300))


def find_eps(probe: nn.Module, kind: str, gain: torch.Tensor, bias: torch.Tensor | None) -> tuple[float, torch.Tensor]:
    """(eps, an input at which it counts), from y = c g / sqrt(v + eps); c: the (centred) input, v: its variance."""
    direction = torch.randn(ROWS, *gain.shape)
    scale = gain if "1+g" not in kind else 1 + gain
    for exponent in range(2, 9):
        x = direction * 10.0**-exponent
        centred = x.double() - (x.double().mean(-1, keepdim=True) if kind.startswith("layernorm") else 0.0)
        variance = centred.square().mean(-1)
        y = run(probe, x).double() - (0.0 if bias is None else bias)
        root = (centred * scale).norm(dim=-1) / y.norm(dim=-1)
        eps = float((root.square() - variance).median())
        if eps > 0.05 * float(variance.median()):
            return float(f"{eps:.3g}"), x
    return 0.0, x


def compute_of(probe: nn.Module, kind: str, gain: torch.Tensor, bias: torch.Tensor | None, eps: float) -> str:
    """In which precision a bf16 copy computes, told by how far it is from fp64 beside simulations of each way."""
    half = probe.bfloat16()
    x = torch.randn(ROWS * 4, *gain.shape).bfloat16()
    coarse = gain.bfloat16().double()
    offset = None if bias is None else bias.bfloat16().double()
    exact = predict(kind, x, coarse, offset, eps)
    try:
        error = distance(exact, run(half, x))
    except RuntimeError:
        return "unknown"
    once = exact.bfloat16()
    twice = normalize(kind, x.double(), eps).bfloat16() * (1 + coarse if "1+g" in kind else coarse).bfloat16()
    if error <= 1.1 * distance(exact, once):
        return "float32"
    if offset is None and error <= 1.1 * distance(exact, twice):
        return "float32, gain rounded"
    return "input"
