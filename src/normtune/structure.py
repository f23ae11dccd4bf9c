"""`anatomy(model)`: where the norms, projections, embeddings, connector and vision encoder of a model are.

Scope: decoder-only LLMs and MLLMs made of vision encoder + connector + LLM, found by structure: the LLM is the
module that holds the input embedding and a list of blocks, a norm is a leaf with a learned gain whose output does not
change when its input is scaled, attention is the block's child that takes an attention mask. No table of
architectures. Not here: what to do with the parts (strategy.py).

Legend: H hidden size, B batch, S sequence.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from normtune.errors import InputError

PART_NAMES = (
    *("norms", "final_norm", "qk_norms", "vision_norms", "connector", "embed", "head"),
    *("attn_qv", "mlp", "llm", "lora", "bias"),
)


@dataclass(frozen=True)
class Anatomy:
    """Names of modules, as `model.get_submodule` takes them, in the order of the network."""

    llm: str
    blocks: list[str]
    norms: list[str]  # on the residual stream, inside the blocks
    final_norm: list[str]
    qk_norms: list[str]  # inside attention
    vision: list[str]
    vision_norms: list[str]
    connector: list[str]
    embed: list[str]
    head: list[str]
    attn_q: list[str]
    attn_k: list[str]
    attn_v: list[str]
    attn_o: list[str]
    mlp: list[str]
    linears: list[str]  # every linear layer inside the blocks
    constant: list[str] = field(default_factory=list)  # modules that are never trained or counted

    def modules(self, part: str) -> list[str]:
        """Module names of a part; `lora` are the layers that it adapts."""
        if part == "attn_qv":
            return sorted(self.attn_q + self.attn_v)
        if part == "llm":
            return [self.llm, *self.head]
        if part in ("lora", "bias"):
            return self.linears if part == "lora" else [self.llm]
        return list(getattr(self, part))


def anatomy(model: nn.Module) -> Anatomy:
    """The anatomy of a decoder-only LLM or of an MLLM around one; weights may be on the meta device.

    Raises:
        InputError: no input embedding, no decoder blocks, or no norm with a learned gain in them.
    """
    names = {id(module): name for name, module in model.named_modules()}
    embed = input_embedding(model)
    llm, blocks = find_blocks(model, names[id(embed)])
    finder = NormFinder()
    norms, qk_norms, linears, mlp = [], [], [], []
    attention: dict[str, list[str]] = {role: [] for role in "qkvo"}
    for block_name in blocks:
        block = model.get_submodule(block_name)
        for child_name, child in block.named_children():
            name = f"{block_name}.{child_name}"
            if finder.is_norm(child):
                norms.append(name)
            elif takes_attention_mask(child):
                qk_norms += [n for n, m in named(child, name) if finder.is_norm(m)]
                for role, found in projections(child, name).items():
                    attention[role] += found
            elif any(is_matrix(m) for _, m in named(child, name)):
                mlp.append(name)
        linears += [n for n, m in named(block, block_name) if isinstance(m, nn.Linear)]
    if not norms:
        held = ", ".join(sorted({type(child).__name__ for child in model.get_submodule(blocks[0]).children()}))
        raise InputError(
            f"no norm with a learned gain in the {len(blocks)} blocks of {type(model).__name__} (they hold {held}).\n"
            "normtune tunes models whose blocks have RMSNorm or LayerNorm with a learned gain; give another model"
        )
    head = output_head(model)
    vision, connector = find_vision(model, llm, head)
    return Anatomy(
        llm=llm,
        blocks=blocks,
        norms=norms,
        final_norm=final_norms(model, llm, blocks, finder),
        qk_norms=qk_norms,
        vision=vision,
        vision_norms=[n for root in vision for n, m in named(model.get_submodule(root), root) if finder.is_norm(m)],
        connector=connector,
        embed=[names[id(embed)]],
        head=[] if head is None else [names[id(head)]],
        attn_q=attention["q"],
        attn_k=attention["k"],
        attn_v=attention["v"],
        attn_o=attention["o"],
        mlp=mlp,
        linears=linears,
        constant=constant_modules(model, connector),
    )


def input_embedding(model: nn.Module) -> nn.Module:
    getter = getattr(model, "get_input_embeddings", None)
    embed = getter() if getter is not None else None
    if not isinstance(embed, nn.Module) or not any(True for _ in embed.parameters()):
        raise InputError(f"{type(model).__name__} has no input embedding; give a language model of transformers")
    return embed


def output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return head if isinstance(head, nn.Module) else None


def find_blocks(model: nn.Module, embed_name: str) -> tuple[str, list[str]]:
    """The nearest module around the input embedding that holds a list of blocks, and the blocks."""
    name = embed_name
    while name:
        name = name.rpartition(".")[0]
        owner = model.get_submodule(name)
        lists = [
            (sum(p.numel() for p in child.parameters()), child_name, len(child))
            for child_name, child in owner.named_children()
            if isinstance(child, nn.ModuleList) and len(child) > 0
        ]
        if lists:
            _, child_name, count = max(lists)
            prefix = f"{name}.{child_name}" if name else child_name
            return name, [f"{prefix}.{i}" for i in range(count)]
    raise InputError(f"{type(model).__name__} has no list of decoder blocks beside its input embedding {embed_name}")


def named(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules below and including `module`, with full names."""
    for name, sub in module.named_modules():
        yield (f"{prefix}.{name}" if name else prefix), sub


def is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() >= 2


def takes_attention_mask(module: nn.Module) -> bool:
    return "attention_mask" in inspect.signature(module.forward).parameters


def projections(attention: nn.Module, prefix: str) -> dict[str, list[str]]:
    """Names of the q, k, v, o projections where they are four linear layers; empty lists where they are fused.

    Their roles follow from their order and shapes: the one that maps back to the hidden size is last. Only where the
    first three carry the paper's letters in another order do the letters decide.
    """
    linears = [(n, m) for n, m in named(attention, prefix) if isinstance(m, nn.Linear)]
    none: dict[str, list[str]] = {role: [] for role in "qkvo"}
    if len(linears) != 4:
        return none
    *heads, (out_name, out) = linears
    letters = [name.rpartition(".")[2][0] for name, _ in heads]
    order = letters if sorted(letters) == ["k", "q", "v"] else list("qkv")
    by_role = dict(zip(order, heads, strict=True))
    q, k, v = (by_role[role][1] for role in "qkv")
    hidden = out.out_features
    if {q.in_features, k.in_features, v.in_features} != {hidden} or q.out_features % k.out_features:
        return none
    return {"o": [out_name], **{role: [name] for role, (name, _) in by_role.items()}}


class NormFinder:
    """Tells norms from other leaves by behaviour; the answer is kept per class and shape."""

    def __init__(self) -> None:
        self.known: dict[tuple[object, ...], bool] = {}

    def is_norm(self, module: nn.Module) -> bool:
        parameters = dict(module.named_parameters(recurse=False))
        gain = parameters.get("weight")
        if gain is None or any(True for _ in module.children()) or any(p.dim() != 1 for p in parameters.values()):
            return False
        key = (type(module), tuple(gain.shape), str(module))
        if key not in self.known:
            self.known[key] = ignores_scale(module, gain.shape[0])
        return self.known[key]


def ignores_scale(module: nn.Module, width: int) -> bool:
    """Whether f(32 x) = f(x) for random x (2, 3, H): what a LayerNorm or RMSNorm does and a scale or bias does not."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            probe = copy_on_cpu(module)
            x = torch.randn(2, 3, width) * 8
            a, b = probe(x), probe(32 * x)
        except Exception:  # a leaf that takes other input is no norm
            return False
    return a.shape == x.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3) and not torch.allclose(a, x)


def copy_on_cpu(module: nn.Module) -> nn.Module:
    """An fp32 copy with random parameters, also of a module on the meta device."""
    meta = copy.deepcopy(module).to("meta") if all(p.is_meta for p in module.parameters()) else copy.deepcopy(module)
    probe = meta.to_empty(device="cpu").float()
    for parameter in probe.parameters():
        parameter.normal_()
    return probe


def final_norms(model: nn.Module, llm: str, blocks: list[str], finder: NormFinder) -> list[str]:
    """Norms beside the blocks, but for one that is named after the embedding: it acts before the blocks."""
    owner = model.get_submodule(llm)
    norms = [name for name, child in owner.named_children() if finder.is_norm(child)]
    before = [name for name in norms if "embed" in name]
    return [f"{llm}.{name}" if llm else name for name in norms if name not in before]


def find_vision(model: nn.Module, llm: str, head: nn.Module | None) -> tuple[list[str], list[str]]:
    """Modules beside the LLM: vision encoders (they hold a patch convolution), and connectors (the others)."""
    vision: list[str] = []
    connector: list[str] = []
    owner_name = ""
    for step in llm.split(".") if llm else []:
        owner = model.get_submodule(owner_name)
        for child_name, child in owner.named_children():
            name = f"{owner_name}.{child_name}" if owner_name else child_name
            has_parameters = any(True for _ in child.parameters())
            if child_name == step or child is head or not has_parameters:
                continue
            patches = any(isinstance(m, nn.Conv2d | nn.Conv3d) for m in child.modules())
            (vision if patches else connector).append(name)
        owner_name = f"{owner_name}.{step}" if owner_name else step
    return vision, connector


def constant_modules(model: nn.Module, connector: list[str]) -> list[str]:
    """Second layer of a LLaVA connector without an activation: two linear maps in a row are one: it stays as it is."""
    config = getattr(model, "config", None)
    if getattr(config, "projector_hidden_act", None) != "linear":
        return []
    return [
        names[-1]
        for root in connector
        if len(names := [n for n, m in named(model.get_submodule(root), root) if isinstance(m, nn.Linear)]) == 2
    ]
