"""Vision encoder and connector of a LLaVA model as the `mmproj` GGUF file that llama.cpp takes beside an LLM's.

For encoders built as CLIP's and SigLIP's (blocks of LayerNorm, attention and an MLP, learned positions, perhaps a class
token), known by the names of their tensors, up to the layer whose features LLaVA reads; the connector is LLaVA's two
linear layers with GELU between them. Where nothing is between them (`linear`) the same file computes it exactly:
gelu(x) - gelu(-x) = x, so that the first layer becomes [W; -W] and the second [V, -V].

An encoder with a class token is written as llama.cpp's converter writes it; builds of 2025 and 2026 append that token
behind the patches and read positions and rows as if it stood in front (ggml-org/llama.cpp#25814), so that features are
one place off until a build has the fix. llama.cpp's GELU is the tanh approximation, and images of another size than
the encoder's are resized and padded by its own code, not by the processor's.

Source: llama.cpp, tools/mtmd/clip.cpp, clip-impl.h (keys, names) and models/llava.cpp
(what it computes). Not here: the LLM (gguf_norms.py).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from normtune.errors import InputError
from normtune.exporting.gguf_files import gguf_package
from normtune.layers import unwrapped
from normtune.runlog import wrapped_disk_errors
from normtune.structure import Anatomy, anatomy

EMBEDDINGS = {  # name of a tensor below the encoder -> llama.cpp's
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}
BLOCK = {  # name of a module below a block -> llama.cpp's
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
UNREAD = ("post_layernorm.", "head.")  # behind the layer whose features are read
ACTIVATIONS = {"quick_gelu": None, "gelu": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "silu": "silu"}
"""Activation of the encoder's MLPs -> which of llama.cpp's two switches is set."""
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size", "layer_norm_eps")


def write_mmproj(model: nn.Module, processor: Any, target: str | Path, *, half: bool = True) -> list[str]:
    """Writes the file; returns the names of its tensors.

    Args:
        half: matrices of the encoder in F16 (those of the connector and everything else is F32 in any case).

    Raises:
        InputError: no LLaVA model, or an encoder or connector that llama.cpp's `mlp` projector does not compute.
        JobError: the disk is full.
    """
    gguf, model, target = gguf_package(), unwrapped(model), Path(target)
    found = anatomy(model)
    if len(found.vision) != 1:
        raise InputError("llama.cpp's mlp projector takes one vision encoder, and the model has none or several")
    config, layer = encoder_config(model), feature_layer(model)
    tensors = {**encoder_tensors(model.get_submodule(found.vision[0]), layer), **connector_tensors(model, found)}
    check_selection(model, "v.class_embd" in tensors)
    mean, std = normalization(processor.image_processor)
    writer = gguf.GGUFWriter(target, "clip")
    writer.add_type("mmproj")
    writer.add_file_type(int(half))  # LlamaFileType: 0 all F32, 1 mostly F16
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_string("clip.projector_type", "mlp")
    integers = {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "block_count": layer,
        "projection_dim": int(tensors["mm.2.weight"].shape[0]),
    }
    for key, value in integers.items():
        writer.add_uint32(f"clip.vision.{key}", int(value))
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", float(config.layer_norm_eps))
    writer.add_array("clip.vision.feature_layer", [layer])
    writer.add_array("clip.vision.image_mean", mean)
    writer.add_array("clip.vision.image_std", std)
    switch = ACTIVATIONS[config.hidden_act]
    if switch is not None:
        writer.add_bool(f"clip.use_{switch}", True)
    for name, tensor in tensors.items():
        narrow = half and tensor.dim() > 1 and name.startswith("v.") and name != "v.position_embd.weight"
        writer.add_tensor(name, array(tensor, name, narrow))
    with wrapped_disk_errors(target):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return list(tensors)


def normalization(processor: Any) -> tuple[list[float], list[float]]:
    """Mean and deviation of a channel, of values 0 to 1, to which llama.cpp scales whatever the processor does."""
    mean, std = [0.0] * 3, [1.0] * 3
    if getattr(processor, "do_normalize", True):
        mean, std = processor.image_mean, processor.image_std
    scale = 255 * processor.rescale_factor if getattr(processor, "do_rescale", True) else 255.0
    return [float(v) / scale for v in mean], [float(v) / scale for v in std]


def encoder_config(model: Any) -> Any:
    """The encoder's configuration. Raises InputError where llama.cpp's graph of an encoder needs something else."""
    config: Any = getattr(model.config, "vision_config", None)
    missing = [key for key in SIZES if not isinstance(getattr(config, key, None), int | float)]
    if missing:
        raise InputError(
            f"the vision encoder's configuration has no {missing[0]}; llama.cpp takes those built as CLIP's"
        )
    if config.hidden_size == config.intermediate_size:
        raise InputError("llama.cpp takes an MLP as wide as the encoder for one of an old file, and swaps its layers")
    if config.hidden_act not in ACTIVATIONS:
        raise InputError(f"the vision encoder's activation {config.hidden_act} is none that llama.cpp computes there")
    return config


def feature_layer(model: Any) -> int:
    """Number of encoder blocks before the features that LLaVA reads."""
    config = model.config
    layer, blocks = getattr(config, "vision_feature_layer", None), getattr(config.vision_config, "num_hidden_layers", 0)
    if not isinstance(layer, int):
        raise InputError(
            f"the features of vision layers {layer} cannot be read by llama.cpp's mlp projector; one layer is"
        )
    number = layer if layer >= 0 else blocks + 1 + layer
    if not 1 <= number <= blocks:
        raise InputError(f"vision_feature_layer {layer} of {blocks} blocks has no block before it")
    return number


def check_selection(model: Any, special: bool) -> None:
    """Raises InputError where LLaVA reads more or less than all patches; `special`: there is a class token."""
    config = model.config
    if (config.vision_feature_select_strategy == "default") != special:
        what = "keeps the class token" if special else "drops the first patch, since there is no class token"
        raise InputError(
            f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} {what}; llama.cpp's mlp "
            "projector takes all patches and nothing else"
        )


def encoder_tensors(encoder: nn.Module, layer: int) -> dict[str, torch.Tensor]:
    """llama.cpp's names -> tensors of the encoder up to the features. Raises InputError for one that has none."""
    result: dict[str, torch.Tensor] = {}
    for full, tensor in encoder.named_parameters():
        name = full.removeprefix("vision_model.")
        block = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name.startswith(UNREAD) or (block and int(block[1]) >= layer):
            continue
        if block and block[2] in BLOCK:
            result[f"v.blk.{block[1]}.{BLOCK[block[2]]}.{block[3]}"] = tensor
        elif name in EMBEDDINGS:
            result[EMBEDDINGS[name]] = tensor
        else:
            raise InputError(
                f"the vision encoder has a tensor {name} that llama.cpp's mlp projector knows nothing of;\n"
                "it takes encoders built as CLIP's, with a class token or without"
            )
    wanted = {f"v.blk.{i}.{own}.weight" for i in range(layer) for own in BLOCK.values()}
    wanted |= {"v.patch_embd.weight", "v.position_embd.weight"}
    if wanted - result.keys():
        raise InputError(
            f"the vision encoder has no {min(wanted - result.keys())}; llama.cpp takes those built as CLIP's"
        )
    return result


def connector_tensors(model: nn.Module, found: Anatomy) -> dict[str, torch.Tensor]:
    """`mm.0` and `mm.2`, the two linear layers around llama.cpp's GELU."""
    layers = [m for name in found.connector for m in model.get_submodule(name).modules() if isinstance(m, nn.Linear)]
    known = {id(p) for layer in layers for p in layer.parameters()}
    others = [p for name in found.connector for p in model.get_submodule(name).parameters() if id(p) not in known]
    act = getattr(model.config, "projector_hidden_act", None)
    if len(layers) != 2 or others or found.loose or act not in ("linear", "gelu", "gelu_pytorch_tanh", "gelu_new"):
        raise InputError(
            f"the connector ({len(layers)} linear layers, activation {act}) is none that llama.cpp's mlp projector "
            "computes;\nit takes two linear layers with GELU or nothing between them (connector: mlp or linear)"
        )
    (w0, b0), (w2, b2) = ((layer.weight.detach().float(), bias_of(layer)) for layer in layers)
    if act == "linear":
        w0, b0, w2 = torch.cat([w0, -w0]), torch.cat([b0, -b0]), torch.cat([w2, -w2], 1)
    return {"mm.0.weight": w0, "mm.0.bias": b0, "mm.2.weight": w2, "mm.2.bias": b2}


def bias_of(layer: nn.Linear) -> torch.Tensor:
    """The bias, or zeros: llama.cpp adds one in any case; (O), fp32."""
    if layer.bias is None:
        return torch.zeros(layer.out_features)
    return layer.bias.detach().float()


def array(tensor: torch.Tensor, name: str, narrow: bool) -> np.ndarray:
    """As numpy, fp16 or fp32. Raises InputError where fp16 would overflow."""
    tensor = tensor.detach().cpu().float()
    if narrow:
        rounded = tensor.half()
        if not bool(torch.isfinite(rounded).all()):
            raise InputError(f"{name} does not fit into float16; export with --dtype float32")
        tensor = rounded
    return tensor.contiguous().numpy()
