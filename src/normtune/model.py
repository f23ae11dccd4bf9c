"""From an LLM and a vision encoder to a stock LLaVA model, and to and from folders.

Scope: `assemble` joins the parts without changing a weight, `load` reads an existing MLLM, `save` writes a folder
that transformers loads without this package. Non-scope: what is trained (`strategy`).
Source: LLaVA-1.5 (Liu et al., 2023) as transformers' `LlavaForConditionalGeneration` and `LlavaProcessor`.

The parts are loaded once and moved into a model built on the meta device, so that a 7B model is never in memory twice.
"""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from normtune import templates
from normtune.encoders import empty_encoder, load_encoder, put_encoder, read_without
from normtune.errors import InputError
from normtune.kernels import keep_differentiable
from normtune.pretrained import check_complete, checked, locate, read_config, reading, torch_dtype, trusted, weights_in
from normtune.probes import Features, check_text, probe_encoder, probe_llm
from normtune.processors import load_processor
from normtune.runlog import atomic_folder
from normtune.structure import dissect
from normtune.templates import IMAGE_TOKEN

log = logging.getLogger(__name__)

CONNECTORS = {"mlp": "gelu", "linear": "linear"}  # connector -> activation between its two linear layers


def assemble(
    llm: str | os.PathLike[str],
    vision: str | os.PathLike[str],
    connector: str = "mlp",
    dtype: str = "float32",
    seed: int = 0,
    *,
    known: Features | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Join a causal LLM and a vision encoder (folders or hub ids) by a new connector; on the CPU, in eval mode.

    All weights of both parts keep their values, cast to `dtype` (float32, bfloat16; nf4 or int8: the linear layers in
    the LLM's blocks are quantized by bitsandbytes, all else is bfloat16). The connector (`mlp`: two layers with GELU;
    `linear`: one layer, the second a frozen identity) is drawn from `seed`; no global random state is read or changed.
    `model.notes` lists the choices made where the LLM left one open (chat template, pad token, resized or untied
    embedding); they are logged as warnings, too. With `known` (what `probe_encoder` found of this encoder before) the
    encoder's weights are not read: it stays on the meta device, for training from stored features.

    Raises InputError: unknown connector or dtype, a part that cannot be read or does not fit stock LLaVA.
    """
    if connector not in CONNECTORS:
        raise InputError(f"connector {connector!r} is not known.\nChoose one of: {', '.join(CONNECTORS)}.")
    precision = torch_dtype(dtype)
    notes: list[str] = []
    with torch.random.fork_rng(devices=[]):
        language, tokenizer = _load_llm(llm, dtype)
        encoder, image_processor = load_encoder(vision, precision, weights=known is None)
        features = known or probe_encoder(encoder, image_processor, os.fspath(vision))
        expected = probe_llm(language, features.length, os.fspath(llm))
        image_id = _prepare_tokenizer(tokenizer, os.fspath(llm), notes)
        _grow(language, max(tokenizer.get_vocab().values()) + 1, notes)
        model = _join(language, encoder, features, connector, image_id, notes)
        check_text(model, *expected, os.fspath(llm))
    _draw_connector(model, precision, seed)
    model.generation_config = _generation_config(language.generation_config, tokenizer)
    model.notes = tuple(notes)
    for note in notes:
        log.warning(note)
    return model.eval(), _processor(tokenizer, image_processor, features)


def assembled_processor(llm: str | os.PathLike[str], vision: str | os.PathLike[str]) -> LlavaProcessor:
    """The processor that `assemble` gives, without reading the LLM's weights. Raises InputError as it does."""
    tokenizer = _load_tokenizer(locate(llm, "LLM", weights=False), os.fspath(llm))
    encoder, image_processor = load_encoder(vision, torch.float32)
    with torch.random.fork_rng(devices=[]):
        features = probe_encoder(encoder, image_processor, os.fspath(vision))
    _prepare_tokenizer(tokenizer, os.fspath(llm), [])
    return _processor(tokenizer, image_processor, features)


def _processor(tokenizer: Any, image_processor: Any, features: Features) -> LlavaProcessor:
    if getattr(image_processor, "crop_size", None) is None:
        # LlavaProcessor reads the image size from here when it is asked for token counts; SigLIP's has none.
        image_processor.crop_size = {"height": features.height, "width": features.width}
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=features.patch_size,
        num_additional_image_tokens=features.special,
        vision_feature_select_strategy=features.strategy,
        chat_template=tokenizer.chat_template,
        image_token=IMAGE_TOKEN,
    )


def load(path: str | os.PathLike[str], dtype: str = "float32", *, known: Features | None = None) -> tuple[Any, Any]:
    """An existing MLLM (folder or hub id, any image-text-to-text model of transformers) and its processor.

    Weights in `dtype` (as in `assemble`), on the CPU, in eval mode. The identity layer of a `linear` connector is
    frozen again. With `known` the vision encoder stays on the meta device, as in `assemble`.

    Raises InputError: no such folder, broken or incomplete files, not an MLLM.
    """
    torch_dtype(dtype)
    source = locate(path, "model")
    config = read_config(source, "model")
    own = getattr(config, "auto_map", None) or {}  # only read where its code may run
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and "AutoModelForImageTextToText" not in own:
        raise InputError(
            f"model {path} ({config.model_type}) takes no images.\nTo give a text LLM eyes, name it as `llm` and a "
            "vision encoder as `vision`; `path` is for a model that has both."
        )
    processor = load_processor(source, config)
    if not all(hasattr(processor, part) for part in ("tokenizer", "image_processor")):
        raise InputError(
            f"model {path} has no processor (processor_config.json, tokenizer files).\nCopy or download them as well."
        )
    with reading("model", source):
        options = weights_in(dtype, config, AutoModelForImageTextToText)
        if known is None:
            model, info = AutoModelForImageTextToText.from_pretrained(source, **options, **checked(source))
        else:
            model, info = read_without(source, config, "vision_config", **options)
            (encoder,) = dissect(model).vision
            put_encoder(model, encoder, empty_encoder(config.vision_config, torch_dtype(dtype)))
    check_complete(info, "model", source)
    keep_differentiable(model)
    projector = getattr(model.base_model, "multi_modal_projector", None)
    if getattr(model.config, "projector_hidden_act", None) == CONNECTORS["linear"] and projector is not None:
        _freeze_identity(projector.linear_2)
    if isinstance(processor, LlavaProcessor) and processor.patch_size is None:
        # Early LLaVA folders have no processor_config.json, and today's processor cannot count tokens without it.
        features = known or probe_encoder(model.base_model.vision_tower, processor.image_processor, source)
        processor.patch_size, processor.num_additional_image_tokens = features.patch_size, features.special
        processor.vision_feature_select_strategy = model.config.vision_feature_select_strategy
    return model.eval(), processor


def save(model: Any, processor: Any, folder: str | os.PathLike[str]) -> None:
    """Write model and processor into `folder`, complete or not at all, as transformers loads them.

    Raises InputError if the folder exists and is not empty or the model is quantized, JobError if it cannot be written
    (disk full); what was written up to then is removed.
    """
    if getattr(model, "is_quantized", False):
        raise InputError(
            "a quantized model is not saved: its folder would hold rounded weights.\nSave its adapter "
            "(normtune.save_adapter), or merge that onto the model in bfloat16."
        )
    with atomic_folder(Path(folder).expanduser()) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        # Also on its own, under the older name: engines on transformers 4 look for it there.
        processor.image_processor.save_pretrained(temporary)


def _load_llm(reference: str | os.PathLike[str], dtype: str) -> tuple[Any, Any]:
    """The causal LM, its weights in `dtype`, and its tokenizer."""
    source = locate(reference, "LLM")
    config = read_config(source, "LLM")
    if config.get_text_config() is not config or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"LLM {reference} ({config.model_type}) is no causal language model for text alone.\n"
            "Give a text LLM; a model that takes images already goes under `path` in the recipe."
        )
    tokenizer = _load_tokenizer(source, os.fspath(reference))
    with reading("LLM", source):
        options = weights_in(dtype, config, AutoModelForCausalLM)
        language, info = AutoModelForCausalLM.from_pretrained(source, **options, **checked(source))
    check_complete(info, "LLM", source)
    keep_differentiable(language)
    return language.eval(), tokenizer


def _load_tokenizer(source: str, reference: str) -> Any:
    with reading("tokenizer of LLM", source):
        tokenizer = AutoTokenizer.from_pretrained(source, **trusted(source))
    # Some tokenizer classes come up empty, without an error, where their files are missing.
    if not tokenizer("Hello, world").input_ids or not tokenizer.is_fast:
        raise InputError(
            f"LLM {reference} has no usable tokenizer (tokenizer.json).\nCopy or download its tokenizer files as well."
        )
    return tokenizer


def _prepare_tokenizer(tokenizer: Any, name: str, notes: list[str]) -> int:
    """Give the tokenizer an image token, a pad token and a template that takes image parts; the image token's id."""
    # An existing entry keeps its id; this marks it as special, so that no text is ever tokenized into half of it.
    tokenizer.add_tokens(AddedToken(IMAGE_TOKEN, special=True, normalized=False), special_tokens=True)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if tokenizer.pad_token is None:
        # The unknown token first: trainers that mask padding by its id would mask the end of a turn otherwise.
        spare = tokenizer.unk_token
        tokenizer.pad_token = spare if spare not in (None, tokenizer.eos_token) else tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise InputError(
                f"LLM {name}: its tokenizer has no pad, unknown or end-of-text token.\nSet eos_token in its "
                "tokenizer_config.json."
            )
        notes.append(f"the tokenizer has no pad token: padding with {tokenizer.pad_token!r}")
    template = templates.own_template(tokenizer)
    if template is None:
        template = templates.default_template(tokenizer)
        notes.append("the LLM has no chat template: using Vicuna's (USER: ... ASSISTANT: ...)")
    tokenizer.chat_template = templates.with_parts(template)
    templates.check(tokenizer, tokenizer.chat_template, name)
    return image_id


def _grow(language: Any, rows: int, notes: list[str]) -> None:
    """Add rows to embedding and head where the tokenizer has more ids; the new ones are the mean of the old."""
    embed, head = language.get_input_embeddings(), language.get_output_embeddings()
    old = embed.weight.shape[0]
    if rows <= old:
        return
    grown: dict[int, nn.Parameter] = {}  # by the old weight: a tied pair stays one tensor
    with torch.no_grad():
        for module in (embed, head):
            weight = module.weight
            if id(weight) not in grown:
                mean = weight.mean(0, keepdim=True, dtype=torch.float32).to(weight.dtype)
                grown[id(weight)] = nn.Parameter(torch.cat([weight, mean.expand(rows - old, -1)]))
    # Only now: an id is an identity as long as its object lives.
    embed.weight, head.weight = grown[id(embed.weight)], grown[id(head.weight)]
    embed.num_embeddings = head.out_features = rows
    language.config.vocab_size = rows
    notes.append(f"the embedding grew from {old} to {rows} rows; the new ones are the mean of the others")


def _join(
    language: Any, encoder: Any, features: Features, connector: str, image_id: int, notes: list[str]
) -> LlavaForConditionalGeneration:
    """A LLaVA model around the loaded parts; its connector is still without values, on the meta device."""
    embed, head = language.get_input_embeddings(), language.get_output_embeddings()
    tied = head.weight is embed.weight
    if tied and getattr(language.base_model, "embed_tokens", None) is not embed:
        # transformers ties LLaVA's head to `embed_tokens` by that name and cannot load a model that has none.
        tied, head.weight = False, nn.Parameter(embed.weight.detach().clone())
        notes.append("stock LLaVA cannot tie this LLM's head to its embedding: the head is now a copy")
    language.config.tie_word_embeddings = tied
    config = LlavaConfig(
        vision_config=encoder.config,
        text_config=language.config,
        image_token_index=image_id,
        image_seq_length=features.length,
        projector_hidden_act=CONNECTORS[connector],
        vision_feature_select_strategy=features.strategy,
        vision_feature_layer=features.layer,
        tie_word_embeddings=tied,
        dtype=language.dtype,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    for ours, theirs in ((model.model.language_model, language.base_model), (model.model.vision_tower, encoder)):
        if type(ours) is not type(theirs):
            raise InputError(
                f"{theirs.name_or_path}: transformers builds a {type(ours).__name__} inside LLaVA, and this is a "
                f"{type(theirs).__name__}.\nChoose another model."
            )
    model.model.language_model, model.model.vision_tower = language.base_model, encoder
    model.lm_head = head
    model.tie_weights()
    _mark_quantized(model, language)
    for part in (config.text_config, config.vision_config):
        if Path(part.name_or_path).is_dir():
            part.name_or_path = ""  # a hub id says where a part is from; a path on this machine is nobody's business
    # What from_pretrained would have left: with it, the weights are saved under the names that published LLaVA
    # checkpoints have (vision_tower.vision_model...), which other engines expect.
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    return model


def _mark_quantized(model: Any, language: Any) -> None:
    """What transformers and PEFT ask a quantized model for, from the LLM to the model around it."""
    if not getattr(language, "is_quantized", False):
        return
    for name in ("is_quantized", "hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if name in vars(language):
            setattr(model, name, getattr(language, name))
    model.config.quantization_config = model.config.text_config.quantization_config
    del model.config.text_config.quantization_config


def _draw_connector(model: LlavaForConditionalGeneration, dtype: torch.dtype, seed: int) -> None:
    """Fill the connector from `seed` with PyTorch's own distribution for linear layers, U(+-1/sqrt(fan in))."""
    generator = torch.Generator().manual_seed(seed)
    projector = model.model.multi_modal_projector.to_empty(device="cpu").to(dtype)
    with torch.no_grad():
        for layer in (projector.linear_1, projector.linear_2):
            bound = layer.in_features**-0.5
            for parameter in (layer.weight, layer.bias):
                values = torch.rand(parameter.shape, generator=generator) * 2 * bound - bound
                parameter.copy_(values)
        if model.config.projector_hidden_act == CONNECTORS["linear"]:
            nn.init.eye_(projector.linear_2.weight)
            nn.init.zeros_(projector.linear_2.bias)
            _freeze_identity(projector.linear_2)


def _freeze_identity(layer: nn.Linear) -> None:
    """Freeze `layer` if it is the identity: the second layer of a `linear` connector is never trained."""
    eye = torch.eye(layer.out_features, layer.in_features, dtype=layer.weight.dtype)
    if torch.equal(layer.weight, eye) and (layer.bias is None or not layer.bias.any()):
        layer.requires_grad_(False)


def _generation_config(given: GenerationConfig, tokenizer: Any) -> GenerationConfig:
    """The LLM's own, with pad token and every token that ends an answer, in a form that can be saved."""
    config = copy.deepcopy(given)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [*ends, tokenizer.eos_token_id, templates.end_of_turn(tokenizer, tokenizer.chat_template)]
    unique = list(dict.fromkeys(i for i in ends if i is not None))
    config.eos_token_id = unique[0] if len(unique) == 1 else unique or None
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if not config.do_sample:
        # Published configurations name a temperature and decode greedily all the same; transformers ignores it when
        # it generates and refuses to save it once anything has been changed.
        for field in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(config, field, getattr(GenerationConfig(), field))
    return config
