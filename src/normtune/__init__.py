"""normtune: a text LLM learns to see by tuning the gains of its norms (arXiv 2312.11420)."""

__version__ = "0.1.0"
