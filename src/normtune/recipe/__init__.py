"""The recipe: what to train, on what, how; read from YAML, checked, and written back resolved.

Scope: the schema (pydantic), `extends`, dotted overrides `stages.1.learning_rate=1e-4`, and messages that name
the field, the file and the closest known key. Not here: whether a path exists (the rooms that open it say so)
and anything that needs torch.
"""

from normtune.recipe.loading import load_recipe, override_texts, recipe_hash, to_yaml
from normtune.recipe.schema import (
    BENCHMARKS,
    PARTS,
    STRATEGIES,
    Comparison,
    DataSource,
    Evaluation,
    Lora,
    ModelRecipe,
    Recipe,
    Stage,
    parse_interval,
)

__all__ = [
    "BENCHMARKS",
    "PARTS",
    "STRATEGIES",
    "Comparison",
    "DataSource",
    "Evaluation",
    "Lora",
    "ModelRecipe",
    "Recipe",
    "Stage",
    "load_recipe",
    "override_texts",
    "parse_interval",
    "recipe_hash",
    "to_yaml",
]
