"""What a training step would hold and compute, known before it runs."""

from normtune.memory.planning import Plan, Shape, largest_batch, plan_step
from normtune.memory.recipes import USABLE, Job, job_of, plan_recipe, shape_of
from normtune.memory.traffic import Traffic, plan_traffic

__all__ = [
    "USABLE",
    "Job",
    "Plan",
    "Shape",
    "Traffic",
    "job_of",
    "largest_batch",
    "plan_recipe",
    "plan_step",
    "plan_traffic",
    "shape_of",
]
