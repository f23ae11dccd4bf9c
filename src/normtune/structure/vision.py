"""What is beside the LLM: vision encoders, connectors, and layers that never train."""

from __future__ import annotations

from torch import nn

from normtune.layers import features, is_linear
from normtune.structure.blocks import mixes_positions, named


def find_vision(
    model: nn.Module, llm: str, blocks: str, head: nn.Module | None, width: int
) -> tuple[list[str], list[str], list[str]]:
    """(vision encoders, connectors, loose parameters such as the line break of tiled images).

    They are the modules beside the way from the root to the LLM: encoders and, all others, connectors. Where there
    is no such connector, the last stage of an encoder that maps to the LLM's width is one.

    Args:
        llm, blocks: names of the module that holds the LLM, and of its list of blocks.
        width: hidden size H of the LLM.
    """
    beside: dict[str, nn.Module] = {}
    loose: list[str] = []
    owner_name = ""
    for step in [*llm.split("."), ""] if llm else [""]:
        owner = model.get_submodule(owner_name)
        if not step:  # inside the LLM's own module: an encoder may be there, anything else belongs to the LLM
            inside = {f"{owner_name}.{key}" if owner_name else key: child for key, child in owner.named_children()}
            inside.pop(blocks)
            beside |= {name: child for name, child in inside.items() if name in find_encoders(model, inside, sure=True)}
            break
        loose += [f"{owner_name}.{key}" if owner_name else key for key, _ in owner.named_parameters(recurse=False)]
        for child_name, child in owner.named_children():
            name = f"{owner_name}.{child_name}" if owner_name else child_name
            if child_name == step or child is head or not any(True for _ in child.parameters()):
                continue
            beside[name] = child
        owner_name = f"{owner_name}.{step}" if owner_name else step
    encoders = find_encoders(model, beside)
    connector = [name for name in beside if name not in encoders]
    if not encoders and head is not None:  # what stands beside the head of a text LLM belongs to the head
        names = {id(module): name for name, module in model.named_modules()}
        level = names[id(head)].rpartition(".")[0]
        connector = [name for name in connector if name.rpartition(".")[0] != level]
    if connector:
        return encoders, connector, loose
    vision = []
    for root in encoders:
        children = [(f"{root}.{key}", child) for key, child in model.get_submodule(root).named_children()]
        inner = [name for name, child in children if maps_to(child, width)]
        connector += inner
        weighted = [name for name, child in children if name not in inner and any(True for _ in child.parameters())]
        vision += weighted if inner else [root]
    return vision, connector, loose


def find_encoders(model: nn.Module, beside: dict[str, nn.Module], sure: bool = False) -> list[str]:
    """Those with layers and a vision or audio config, or a convolution; else the largest one with layers.

    Args:
        sure: leave out the last rule.
    """
    config = getattr(model, "config", None)
    own = {type(getattr(config, key, None)) for key in ("vision_config", "audio_config")} - {type(None)}
    layered = {
        name: module
        for name, module in beside.items()
        if any(isinstance(m, nn.ModuleList | nn.Sequential) for m in module.modules())
    }
    found = [
        name
        for name, module in layered.items()
        if type(getattr(module, "config", None)) in own
        or any(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules())
    ]
    if found or not layered or sure:
        return found
    return [max(layered, key=lambda name: sum(p.numel() for p in layered[name].parameters()))]


def maps_to(module: nn.Module, width: int) -> bool:
    """Whether a module without attention or convolution ends in a linear layer to `width`."""
    inside = list(module.modules())
    linears = [m for m in inside if is_linear(m)]
    others = any(mixes_positions(m) or isinstance(m, nn.modules.conv._ConvNd) for m in inside)
    return bool(linears) and not others and features(linears[-1])[1] == width


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
