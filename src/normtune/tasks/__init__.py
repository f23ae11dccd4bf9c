"""The benchmarks: official files, prompts and scoring rules, one module each, as pure functions.

`TASKS` maps a benchmark's name to how it is loaded, scored and asked. Not here: models and images; a scorer sees
strings. The scores' figures follow the official programs; where such a program would crash or silently go
wrong, a module gives the right score or an InputError and says so in its docstrings. Where the official program
leaves the length of an answer open, `max_new_tokens` is that of LLaVA or lmms-eval.
"""

from __future__ import annotations

from normtune.tasks import captions, mme, pope, text, vqav2
from normtune.tasks.items import Item, Task

TASKS: dict[str, Task] = {
    "pope": Task(pope.load, pope.score, max_new_tokens=128),
    "mme": Task(mme.load, mme.score, max_new_tokens=16),
    "vqav2": Task(vqav2.load, vqav2.score, max_new_tokens=16, truth=vqav2.truth),
    "coco": Task(captions.load_coco, captions.score, max_new_tokens=64),
    "flickr30k": Task(captions.load_flickr30k, captions.score, max_new_tokens=64),
    "text": Task(text.load, text.score, max_new_tokens=16),
}

__all__ = ["TASKS", "Item", "Task"]
