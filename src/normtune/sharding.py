"""Several processes train one model: with copies of the frozen base, or with the LLM's blocks sharded over them.

Scope: `join`, their process group; `shard` (torch's FSDP2, `fully_shard`, over the frozen matrices of the blocks), and
what a step then needs: gradients of the trainable tensors summed, and as many micro-batches everywhere. A sharded block
is gathered before its forward and again before its backward, and dropped after each; what trains is whole on every
process, so that nothing is reduced but its gradients, and optimizer, checkpoints and adapters are those of one process.
Not here: which samples a process sees (training/batching.py), bytes on the wire (memory/traffic.py).

Every process must go through the blocks equally often, forward and backward, whatever its samples are: else one waits
for ever. So the input of the blocks always asks for a gradient (a batch without images and a frozen embedding has no
other reason for a backward), and `level` adds micro-batches without a supervised token.

Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from normtune.errors import InputError
from normtune.kernels import is_quantized
from normtune.layers import unwrapped
from normtune.strategy import tuning

if TYPE_CHECKING:
    from accelerate import Accelerator

BUCKET = 25_000_000
"""Bytes of gradients that are summed in one exchange; a tensor that is larger goes alone, without a copy."""


def join(cpu: bool = False) -> None:
    """Makes the process group of the processes that torchrun has started; none where there is one already, or another
    launcher.

    torchrun's agent keeps its store over restarts (torch 2.13), and in it gloo would find the addresses of processes
    that are gone; so each start has names of its own. Not over several machines: they may count starts differently.
    """
    around = {key: os.environ.get(key, "") for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")}
    processes, here, start = around.values()
    if dist.is_initialized() or not start or processes == "1":
        return
    if not cpu and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if not cpu and torch.cuda.is_available() else "gloo"
    if processes != here:
        dist.init_process_group(backend)
        return
    store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=dist.PrefixStore(f"start-{start}", store), rank=rank, world_size=size)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(unwrapped(model), FSDPModule)


def frozen_matrices(
    model: nn.Module, trained: Iterable[nn.Parameter] = ()
) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """The blocks of the LLM and of each the matrices that are frozen throughout: what `shard` shards.

    Vectors stay whole, and so do the two layers whose values an adapter's record samples (`strategy.witnesses`).

    Args:
        trained: parameters that some stage trains.
    """
    found = tuning(model).anatomy
    whole = {id(parameter) for parameter in trained}
    for name in (*found.linears[:1], *found.linears[-1:]):
        whole |= {id(parameter) for parameter in model.get_submodule(name).parameters()}
    blocks = [model.get_submodule(name) for name in found.blocks]
    return [(block, [p for p in block.parameters() if p.dim() > 1 and id(p) not in whole]) for block in blocks]


def shard(model: nn.Module, device: torch.device, trained: Iterable[nn.Parameter]) -> None:
    """Leaves 1 / processes of each frozen matrix of the LLM's blocks on each process, and moves the model to `device`.

    A block is moved when its turn comes: the device never holds the whole base. Call it once, on every process, before
    the model's first forward.

    Args:
        trained: parameters that some stage trains: they stay whole (LoRA's, which come later, are never sharded).

    Raises:
        InputError: a quantized base, which cannot be cut.
    """
    if any(is_quantized(parameter) for parameter in model.parameters()):
        raise InputError(
            "model.shard: a quantized base cannot be cut; each process holds it whole (leave shard off),\n"
            "or take dtype: bfloat16"
        )
    blocks = frozen_matrices(model, trained)
    cut = {id(parameter) for _, matrices in blocks for parameter in matrices}
    whole = {parameter for parameter in model.parameters() if id(parameter) not in cut}
    for parameter in whole:
        if not parameter.is_meta:  # an encoder without weights
            parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block, _ in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)  # holds nothing itself; lets the blocks know of one another
    model.get_submodule(tuning(model).anatomy.embed[0]).register_forward_hook(ask_for_gradient)


def ask_for_gradient(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    """On the embedding: what goes into the blocks has a gradient, so that each backward goes through all of them."""
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


def replicated(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """What runs the model's forward: DistributedDataParallel around it where there are several whole copies."""
    if accelerator.num_processes == 1 or is_sharded(model):
        return model
    ignore_frozen(model)
    # everything is where it belongs; an encoder without weights could not be moved
    return accelerator.prepare_model(model, device_placement=False)  # type: ignore[no-any-return]


def ignore_frozen(model: nn.Module) -> None:
    """Tells DistributedDataParallel of the trainable tensors alone: of the base, which every process has read from the
    same files, nothing is sent then, neither at the start nor (buffers) with each forward."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    frozen += [name for name, _ in model.named_buffers()]
    model._ddp_params_and_buffers_to_ignore = frozen  # type: ignore[assignment]


def level(model: nn.Module, batches: Sequence[dict[str, torch.Tensor]], device: torch.device) -> list[dict[str, Any]]:
    """Of a sharded model, the micro-batches and so many idle ones that each process has as many; else `batches`.

    An idle one is the shortest of its own with every label ignored: it adds nothing to loss and gradients.
    """
    given = list(batches)
    if not is_sharded(model):
        return given
    most = torch.tensor(len(given), device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    shortest = min(given, key=lambda batch: batch["input_ids"].numel())
    idle = {**shortest, "labels": torch.full_like(shortest["labels"], -100)}
    return [*given, *[idle] * (int(most) - len(given))]


def sum_gradients(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Of a sharded model, replaces the gradients by their means over processes, in a fixed order; else does nothing.

    What DistributedDataParallel does for whole copies. Here after the backward and not within: there its exchanges
    would mix with the gathering of blocks in an order that a process's own samples decide.
    """
    if not is_sharded(model):
        return
    processes = dist.get_world_size()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for group in buckets(gradients):
        flat = group[0] if len(group) == 1 else torch.cat([gradient.reshape(-1) for gradient in group])
        dist.all_reduce(flat)
        flat /= processes
        if len(group) > 1:
            for gradient, mean in zip(group, flat.split([gradient.numel() for gradient in group]), strict=True):
                gradient.copy_(mean.view_as(gradient))


def buckets(tensors: Sequence[torch.Tensor], size: int = BUCKET) -> list[list[torch.Tensor]]:
    """Neighbours of one dtype in groups of at most `size` bytes, larger tensors alone."""
    groups: list[list[torch.Tensor]] = []
    room = 0
    for tensor in tensors:
        bytes_of = tensor.numel() * tensor.element_size()
        if not groups or bytes_of > room or groups[-1][0].dtype != tensor.dtype:
            groups.append([])
            room = size
        groups[-1].append(tensor)
        room -= bytes_of
    return groups
