"""`anatomy(model)`: where the norms, projections, embeddings, connector and vision encoder of a model are.

Scope: decoder-only LLMs and MLLMs made of vision encoder + connector + LLM, found by structure and behaviour: the LLM
is the module that holds the input embedding and a list of blocks, a norm is a leaf with a learned gain whose output
does not change when its input is scaled, attention is what takes a mask or a cache. No table of architectures.
Not here: what to do with the parts (strategy).

`parts` the anatomy; `blocks` what is in a decoder block; `norms` what a norm is and its formula; `vision` what is
beside the LLM. Legend: H hidden size, B batch, S sequence.
"""

from normtune.structure.norms import Formula, formula, formulas
from normtune.structure.parts import PART_NAMES, Anatomy, anatomy, dissect, without_gains

__all__ = ["PART_NAMES", "Anatomy", "Formula", "anatomy", "dissect", "formula", "formulas", "without_gains"]
