"""The benchmarks: official files, prompts and scoring rules, one module each, as pure functions.

`TASKS` maps a benchmark's name to how it is loaded, scored and asked. Not here: models and images; a scorer sees
strings. The scores' figures follow the official programs; where such a program would crash or silently go
wrong, a module gives the right score or an InputError and says so in its docstrings. Where the official program
leaves the length of an answer open, `max_new_tokens` is that of LLaVA or lmms-eval.
"""

from __future__ import annotations

from normtune.tasks import captions, mme, pope, pope_predictions, text, vqav2
from normtune.tasks.bootstrap import Statistics, difference, intervals
from normtune.tasks.items import RULES, Item, Joined, Measured, Rules, Task

TASKS: dict[str, Task] = {
    "pope": Task(pope.load, pope.measure, max_new_tokens=128, join=pope_predictions.join),
    "mme": Task(mme.load, mme.measure, max_new_tokens=16, join=mme.join),
    "vqav2": Task(vqav2.load, vqav2.measure, max_new_tokens=16, truth=vqav2.truth, join=vqav2.join),
    "coco": Task(captions.load_coco, captions.measure, max_new_tokens=64, join=captions.join),
    "flickr30k": Task(captions.load_flickr30k, captions.measure, max_new_tokens=64, join=captions.join),
    "text": Task(text.load, text.measure, max_new_tokens=16),
}

__all__ = [
    "RULES",
    "TASKS",
    "Item",
    "Joined",
    "Measured",
    "Rules",
    "Statistics",
    "Task",
    "difference",
    "intervals",
]
