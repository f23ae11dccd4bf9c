"""Training data: files to samples, mixtures of them, and batches for the model."""

from normtune.data.batches import IGNORED, Collator, Features, Row, micro_batches
from normtune.data.samples import Mixture, Sample, read_samples
from normtune.images import open_image

__all__ = [
    "IGNORED",
    "Collator",
    "Features",
    "Mixture",
    "Row",
    "Sample",
    "micro_batches",
    "open_image",
    "read_samples",
]
