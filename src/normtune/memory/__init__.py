"""What a training step would hold and compute, known before it runs."""

from normtune.memory.planning import Plan, Shape, largest_batch, plan_step

__all__ = ["Plan", "Shape", "largest_batch", "plan_step"]
