"""Training data: files to samples, mixtures of them, and batches for the model."""

from normtune.data.batches import IGNORED, Collator, Features, Row, micro_batches
from normtune.data.index import read_samples, scan
from normtune.data.mixture import Mixture
from normtune.data.samples import Sample, Scanned
from normtune.data.skipping import Skipped
from normtune.images import open_image

__all__ = [
    "IGNORED",
    "Collator",
    "Features",
    "Mixture",
    "Row",
    "Sample",
    "Scanned",
    "Skipped",
    "micro_batches",
    "open_image",
    "read_samples",
    "scan",
]
