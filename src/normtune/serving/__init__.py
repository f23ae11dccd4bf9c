"""One base with many adapters for requests that come at any time: the engine, and what is put in front of it.

`engine` the queue and the thread that owns the model; `prompts` what a request becomes, `vision` features of images
kept between requests; `slots` rows that decode together while others come and go; `joining` and `waiting` how jobs use
them, or do without where a model cannot do that; `sampling` and `text` a row's tokens and what is shown of them;
`opening` a base without its adapter. Not here: adapters in a batch (bank/). HTTP and the browser page are modules of
this room that nothing here imports, because their packages are extras.
"""

from normtune.serving.engine import Engine, Stats
from normtune.serving.jobs import Closed, Job, Piece, QueueFull
from normtune.serving.opening import open_alone, open_base
from normtune.serving.prompts import Prompt
from normtune.serving.sampling import Sampling

__all__ = ["Closed", "Engine", "Job", "Piece", "Prompt", "QueueFull", "Sampling", "Stats", "open_alone", "open_base"]
