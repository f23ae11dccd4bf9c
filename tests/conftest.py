"""Settings that hold for every test: offline, one thread, and the tiny models as session-wide fixtures."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny matrices: more threads only wait for one another
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent / "offline"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (sys.path[0], os.environ.get("PYTHONPATH"))))  # of children

import pytest
from network_guard import REFUSED


@pytest.fixture(autouse=True)
def no_network() -> Iterator[None]:
    """Fails a test that tried to reach beyond this machine, even where the refusal was caught."""
    before = len(REFUSED)
    yield
    assert REFUSED[before:] == [], "a test tried to reach the network"


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with the ChatML template, untied, with a pad token. Do not write into it."""
    from models import tiny_llm

    return tiny_llm(tmp_path_factory.mktemp("llm") / "llama")


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP: 32 x 32 pixels, CLS and 16 patch tokens. Do not write into it."""
    from models import tiny_vision

    return tiny_vision(tmp_path_factory.mktemp("vision") / "clip")


@pytest.fixture(scope="session")
def mllm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama and the tiny CLIP assembled with an MLP connector, saved. Do not write into it."""
    from models import tiny_mllm

    return tiny_mllm(tmp_path_factory.mktemp("mllm") / "llava")
