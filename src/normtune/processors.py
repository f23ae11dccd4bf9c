"""The processor of an MLLM, also where its video part cannot be used.

Scope: `load_processor`. The processors of Qwen2-VL, SmolVLM and others take videos as well, and their video part needs
torchvision, which normtune never installs (it has no build for some of the torches that we run on, and breaks
`import transformers` beside them). Images and text need none of it: the same processor class is then built from its
tokenizer and image processor alone. Not here: models, prompts.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import transformers
from transformers import AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from normtune.errors import InputError
from normtune.pretrained import reading, trusted

VIDEO = "video_processor"


def load_processor(source: str, config: Any) -> Any:
    """The processor at `source` (from `locate`) of a model with `config`; without its video part where that needs
    torchvision. InputError where it cannot be loaded either way."""
    with reading("processor of model", source):
        try:
            return AutoProcessor.from_pretrained(source, **trusted(source))
        except ImportError as error:
            name = PROCESSOR_MAPPING_NAMES.get(config.model_type)
            if "torchvision" not in str(error).lower() or name is None:
                raise
        whole = getattr(transformers, name)
        if VIDEO not in whole.get_attributes():
            raise InputError(
                f"processor of model {source}: {name} needs torchvision, which normtune does not use.\n"
                "Choose a model whose images are processed without it."
            )
        processor = without_video(whole).from_pretrained(source, **trusted(source))
    processor.video_processor = SimpleNamespace(num_frames=None, fps=None)  # a template may ask for its settings
    return processor


def without_video(whole: type[Any]) -> type[Any]:
    """The processor class with None for its video part."""

    everything = whole.get_attributes()

    def attributes(cls: type[Any]) -> list[str]:
        return [name for name in everything if name != VIDEO]

    def build(cls: type[Any], args: list[Any], options: dict[str, Any], **more: Any) -> Any:
        place = everything.index(VIDEO)
        return super(found, cls).from_args_and_dict([*args[:place], None, *args[place:]], options, **more)

    own = {"get_attributes": classmethod(attributes), "from_args_and_dict": classmethod(build)}
    found: Any = type(whole.__name__, (whole,), own)
    return found  # type: ignore[no-any-return]
