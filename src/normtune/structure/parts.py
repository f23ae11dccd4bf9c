"""The anatomy: names of the modules of every part."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import nn

from normtune.errors import InputError
from normtune.layers import is_linear, unwrapped
from normtune.structure.blocks import block_parts, named
from normtune.structure.norms import NormFinder, own_parameters
from normtune.structure.vision import constant_modules, find_vision

PART_NAMES = (
    *("norms", "final_norm", "qk_norms", "vision_norms", "connector", "embed", "head"),
    *("attn_q", "attn_k", "attn_v", "attn_o", "attn_qv", "attn_qkv", "mlp", "llm", "lora", "bias"),
)


@dataclass(frozen=True)
class Anatomy:
    """Names of modules, as `model.get_submodule` takes them, in the order of the network."""

    llm: str
    blocks: list[str]
    norms: list[str]  # on the residual stream, inside the blocks
    final_norm: list[str]
    qk_norms: list[str]  # inside attention or another mixer: QK-norms, latent norms, gated norms
    vision: list[str]
    vision_norms: list[str]
    connector: list[str]
    embed: list[str]
    head: list[str]
    attn: list[str]
    attn_q: list[str]
    attn_k: list[str]
    attn_v: list[str]
    attn_o: list[str]
    attn_qkv: list[str]  # one projection for q, k and v
    mlp: list[str]
    linears: list[str]  # every linear layer inside the blocks
    loose: list[str] = field(default_factory=list)  # parameters of no module below: they go with the connector
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

    def constants(self, model: nn.Module) -> set[int]:
        """Identities of the tensors that are never trained or counted."""
        return {id(p) for name in self.constant for p in model.get_submodule(name).parameters()}

    def parameters(self, model: nn.Module, part: str) -> list[nn.Parameter]:
        """A part's tensors, tied ones once, loose ones with the connector, constant ones left out."""
        found = {id(p): p for name in self.modules(part) for p in model.get_submodule(name).parameters()}
        if part == "connector":
            found |= {id(p): p for p in map(model.get_parameter, self.loose)}
        constants = self.constants(model)
        return [p for key, p in found.items() if key not in constants]


def anatomy(model: nn.Module) -> Anatomy:
    """The anatomy of a decoder-only LLM or of an MLLM around one; weights may be on the meta device.

    Raises:
        InputError: no input embedding, no decoder blocks, or no norm with a learned gain in them.
    """
    model = unwrapped(model)
    tuned = vars(model).get("_normtune")  # of before LoRA's matrices, which look like projections, came in
    found = dissect(model) if tuned is None else tuned.anatomy
    if not found.norms:
        raise InputError(without_gains(model, found))
    return found


def dissect(model: nn.Module) -> Anatomy:
    """`anatomy` of a model that may have no norm with a learned gain."""
    names = {id(module): name for name, module in model.named_modules()}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InputError(
            f"{type(model).__name__} is an encoder-decoder; give a decoder-only LLM, or an MLLM around one"
        )
    embed = input_embedding(model)
    width = max(embed.parameters(), key=lambda p: p.numel()).shape[-1]
    llm, blocks = find_blocks(model, names[id(embed)])
    finder = NormFinder()
    parts = [block_parts(model.get_submodule(name), name, finder, width) for name in blocks]
    head = output_head(model, names, embed)
    vision, connector, loose = find_vision(model, llm, blocks[0].rpartition(".")[0], head, width)
    roles = {role: [n for block in parts for n in block.roles[role]] for role in ("q", "k", "v", "o", "qkv")}
    return Anatomy(
        llm=llm,
        blocks=blocks,
        norms=[n for block in parts for n in block.norms],
        final_norm=final_norm(model, llm, blocks, finder, width),
        qk_norms=[n for block in parts for n in block.inner_norms],
        vision=vision,
        vision_norms=[n for root in vision for n, m in named(model.get_submodule(root), root) if finder.is_norm(m)],
        connector=connector,
        embed=[names[id(embed)]],
        head=[] if head is None else [names[id(head)]],
        attn=[n for block in parts for n in block.attn],
        **{f"attn_{role}": found for role, found in roles.items()},
        mlp=[n for block in parts for n in block.mlp],
        linears=[n for block in blocks for n, m in named(model.get_submodule(block), block) if is_linear(m)],
        loose=loose,
        constant=constant_modules(model, connector),
    )


def without_gains(model: nn.Module, found: Anatomy) -> str:
    """What a model without gains has, and what works on it."""
    blocks = [model.get_submodule(name) for name in found.blocks]
    held = ", ".join(sorted({type(child).__name__ for block in blocks for child in block.children()}))
    works = {"connector": found.connector, "attn-qv": found.attn_q, "attn-mlp": found.mlp, "lora": found.linears}
    return (
        f"no norm with a learned gain in the {len(blocks)} blocks of {type(model).__name__} (they hold {held});\n"
        f"strategies that work on it: {', '.join([*(name for name, there in works.items() if there), 'full'])}"
    )


def input_embedding(model: nn.Module) -> nn.Module:
    getter = getattr(model, "get_input_embeddings", None)
    try:
        embed = getter() if getter is not None else None
    except NotImplementedError:
        embed = None
    if not isinstance(embed, nn.Module) or not any(p.dim() == 2 for p in embed.parameters()):
        raise InputError(f"{type(model).__name__} has no input embedding; give a decoder-only LLM of transformers")
    return embed


def output_head(model: nn.Module, names: dict[int, str], embed: nn.Module) -> nn.Module | None:
    """What the model calls its head, else a linear layer outside the blocks with the embedding's shape."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if isinstance(head, nn.Module):
        return head
    shape = max(embed.parameters(), key=lambda p: p.numel()).shape
    outside = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.shape == shape]
    return next((m for m in outside if not re.search(r"\.\d+\.", names[id(m)])), None)


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
    raise InputError(
        f"{type(model).__name__} has no list of decoder blocks beside its input embedding {embed_name};\n"
        "give a decoder-only language model of transformers, or an MLLM around one"
    )


def final_norm(model: nn.Module, llm: str, blocks: list[str], finder: NormFinder, width: int) -> list[str]:
    """The norm behind the last block: of those beside the blocks that are as wide as the residual stream, the first
    that was registered after the blocks; where none was, the only one (some models register it first)."""
    owner = model.get_submodule(llm)
    children = [name for name, _ in owner.named_children()]
    start = children.index(blocks[0].removeprefix(f"{llm}." if llm else "").partition(".")[0])
    norms = [
        name
        for name, child in owner.named_children()
        if finder.is_norm(child) and own_parameters(child)[0].shape == (width,)
    ]
    after = [name for name in norms if children.index(name) > start]
    chosen = after[:1] if after else norms if len(norms) == 1 else []
    return [f"{llm}.{name}" if llm else name for name in chosen]
