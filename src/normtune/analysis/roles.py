"""`norm_roles(model)`: what each norm of a model is for, from the order in which norms, attention and MLPs are called.

Scope: the norms of `anatomy`, sorted into six roles. Names say little: Llama's `post_attention_layernorm` stands before
the MLP, Gemma 2's of that name behind attention. Not here: finding norms (structure/), training some of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from normtune.analysis.states import quiet_model
from normtune.errors import InputError
from normtune.layers import unwrapped
from normtune.structure import Anatomy, anatomy
from normtune.structure.blocks import mixes_positions

ROLES = ("input", "post_attention", "post_mlp", "final", "qk", "vision")
NORM, MIXER, MLP = "norm", "mixer", "mlp"
Events = list[tuple[str, str]]  # (what was called: NORM, MIXER or MLP, its name)


class _Done(Exception):
    """The last block has returned: the rest of the forward is of no interest."""


def norm_roles(model: nn.Module) -> dict[str, str]:
    """The role of every norm with a learned gain, by module name, in the order of the network.

    `input`: called before a block's attention (or other mixer; in a parallel block also before its MLP);
    `post_attention`: called next after attention: on its output, or before the MLP, or both in turn; `post_mlp`: after
    the MLP; `final`: behind the last block; `qk`: inside attention or another mixer; `vision`: in a vision encoder.

    Runs one forward over four tokens without an image; blocks that only an image reaches take the roles of norms of
    the same name within other blocks. Weights may be on the meta device. The model is left as it was.

    Raises:
        InputError: no norm with a learned gain, a model that does not run on text alone, or a norm that is not called.
    """
    model = unwrapped(model)
    found = anatomy(model)
    calls = record(model, found)
    known: dict[str, str] = {}
    for block, events in calls.items():
        known |= {name: role for name, role in roles_of(events).items() if name.startswith(block + ".")}
    within = {relative(name, found): role for name, role in known.items()}
    roles: dict[str, str] = {}
    for name in found.norms:
        role = known.get(name) or within.get(relative(name, found))
        if role is None:
            raise InputError(
                f"the norm {name} is not called when {type(model).__name__} reads text, so its role is unknown;\n"
                "choose norms by a regex part instead"
            )
        roles[name] = role
    others = {"qk": found.qk_norms, "final": found.final_norm, "vision": found.vision_norms}
    return roles | {name: role for role, names in others.items() for name in names}


def roles_of(events: Events) -> dict[str, str]:
    """Roles of the norms that one block calls, from the order of its calls."""
    roles: dict[str, str] = {}
    for place, (what, name) in enumerate(events):
        if what != NORM:
            continue
        before = next((kind for kind, _ in reversed(events[:place]) if kind != NORM), None)
        more = any(kind == MIXER for kind, _ in events[place:])
        role = {None: "input", MIXER: "post_attention", MLP: "input" if more else "post_mlp"}[before]
        roles.setdefault(name, role)
    return roles


def relative(name: str, found: Anatomy) -> str:
    """The name within its block."""
    block = next(block for block in found.blocks if name.startswith(block + "."))
    return name.removeprefix(block + ".")


def record(model: nn.Module, found: Anatomy) -> dict[str, Events]:
    """Block -> what it calls, in order, during a forward of the LLM over four tokens."""
    calls: dict[str, Events] = {}
    current: list[str] = []

    def enter(block: str) -> Any:
        def hook(*_: Any) -> None:
            current[:] = [block]
            calls.setdefault(block, [])

        return hook

    def note(what: str, name: str, block: str) -> Any:
        def hook(*_: Any) -> None:
            if current == [block]:  # a module that several blocks share is called by one of them at a time
                calls[block].append((what, name))

        return hook

    def leave(*_: Any) -> None:
        raise _Done

    with ExitStack() as hooks, runnable(model, found) as twin:
        for block in found.blocks:
            owner = twin.get_submodule(block)
            hooks.callback(owner.register_forward_pre_hook(enter(block)).remove)
            for what, name in parts_of(owner, block, found):
                hooks.callback(twin.get_submodule(name).register_forward_pre_hook(note(what, name, block)).remove)
        hooks.callback(twin.get_submodule(found.blocks[-1]).register_forward_hook(leave).remove)
        ids = torch.zeros((1, 4), dtype=torch.long, device=next(twin.get_submodule(found.embed[0]).parameters()).device)
        try:
            twin.get_submodule(found.llm)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except _Done:
            pass
        except Exception as error:  # whatever a model raises means the same
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(f"the LLM of {type(model).__name__} does not run on four tokens ({text})") from error
    return calls


@contextmanager
def runnable(model: nn.Module, found: Anatomy) -> Iterator[nn.Module]:
    """The model in eval mode, without gradients; of one on the meta device a copy on fake tensors."""
    if next(model.get_submodule(found.embed[0]).parameters()).is_meta:
        twin = copy.deepcopy(model).eval()
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            for module in twin.modules():
                held: Any = (module._parameters, module._buffers)
                for tensors in held:
                    for name, tensor in tensors.items():
                        if tensor is not None:
                            dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype  # experts take it
                            fake = torch.empty(tensor.shape, dtype=dtype)
                            tensors[name] = nn.Parameter(fake, False) if isinstance(tensor, nn.Parameter) else fake
            yield twin
        return
    with quiet_model(model), torch.no_grad():
        yield model


def parts_of(owner: nn.Module, prefix: str, found: Anatomy) -> Iterator[tuple[str, str]]:
    """What is called in a block: its norms, mixers (attention included) and MLPs, by name."""
    for child_name, child in owner.named_children():
        name = f"{prefix}.{child_name}"
        if name in found.norms:
            yield NORM, name
        elif name in found.attn:
            yield MIXER, name
        elif name in found.mlp:
            yield MLP, name
        elif any(norm.startswith(name + ".") for norm in found.norms) or isinstance(child, nn.ModuleList):
            yield from parts_of(child, name, found)  # a wrapper, or a list of norms or layers
        elif mixes_positions(child):
            yield MIXER, name
