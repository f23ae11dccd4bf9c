"""What the vision encoder makes of an image: once per batch, and once and for all on disk.

`images(model, batch)` is put around a forward; `prepare_features(recipe, mixtures)` is how a training with
`cache_features: true` begins, `fill_store(...)` an evaluation from stored features. Not here: batches (data/), models
without an encoder's weights (model.py, tuned.py).
"""

from normtune.features.filling import Prepared, can_store, fill_store, prepare_features
from normtune.features.once import images
from normtune.features.store import Store
from normtune.runlog import cache_folder

__all__ = ["Prepared", "Store", "cache_folder", "can_store", "fill_store", "images", "prepare_features"]
