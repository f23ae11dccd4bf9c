"""The statistics of an analysis against direct computations, and the analysis of real (tiny) runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from asked import write_benchmarks
from command import run
from models import tiny_llm
from normtune.analysis import analyze_run, gain_map, look, seeing
from normtune.analysis.gradients import figures, gradient_spread, spread_of
from normtune.analysis.samples import trained_samples, training_batches
from normtune.analysis.similarity import Similarity, effective_rank
from normtune.comparison.costs import first_batch
from normtune.data import Collator, Mixture
from normtune.errors import InputError
from normtune.evaluation import Settings, evaluate_into
from normtune.model import load
from normtune.recipe import DataSource, load_recipe
from normtune.strategy import apply
from normtune.training import train
from normtune.tuned import open_tuned
from toys import toy_data, toy_recipe

Batch = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_data(tmp_path_factory.mktemp("toys") / "data")


@pytest.fixture(scope="module")
def toys(toy_folder: Path) -> Mixture:
    return Mixture([DataSource(path=str(toy_folder / "data.json"), images=str(toy_folder / "images"))])


@pytest.fixture
def tiny(mllm_folder: Path) -> tuple[Any, Collator]:
    model, processor = load(str(mllm_folder), dtype="float32")
    return model.eval(), Collator(processor, None)


# Direct computations, as the sources write them


def direct_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over tokens of the cosine of two states (T, H) each."""
    values = [float(x @ y / (x.norm() * y.norm())) for x, y in zip(a.double(), b.double(), strict=True)]
    return sum(values) / len(values)


def direct_hsic(a: torch.Tensor, b: torch.Tensor) -> float:
    """HSIC_1 of linear kernels as Song et al. (2012), equation 5, write it."""
    n = len(a)
    first, second = (x.double() @ x.double().T for x in (a, b))
    first.fill_diagonal_(0)
    second.fill_diagonal_(0)
    one = torch.ones(n, dtype=torch.float64)
    total = torch.trace(first @ second) - 2 / (n - 2) * (one @ first @ second @ one)
    total += (one @ first @ one) * (one @ second @ one) / ((n - 1) * (n - 2))
    return float(total / (n * (n - 3)))


def direct_cka(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Nguyen et al. (2020), equation 2: averages over minibatches of equal size."""
    cross, first, second = (
        sum(direct_hsic(x, y) for x, y in pairs) / len(batches)
        for pairs in (batches, [(a, a) for a, _ in batches], [(b, b) for _, b in batches])
    )
    return cross / math.sqrt(first * second)


def direct_rank(a: torch.Tensor) -> float:
    values = torch.linalg.eigvalsh(torch.cov(a.double().T)).clamp_min(1e-30)
    share = values / values.sum()
    return float((-(share * share.log()).sum()).exp())


def close(found: Any, wanted: Any, tolerance: float = 1e-4) -> None:
    first, second = (torch.tensor(value, dtype=torch.float64) for value in (found, wanted))
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)


def test_similarity_of_a_model_with_two_layers(tiny: tuple[Any, Collator], toys: Mixture) -> None:
    model, collator = tiny
    samples = trained_samples(toys, 7)
    found = {kind: Similarity(3) for kind in ("image", "text")}
    loss = look(model, collator, samples, found)
    states: dict[str, list[list[torch.Tensor]]] = {kind: [[] for _ in range(3)] for kind in found}
    total, count = 0.0, 0
    for sample in samples:  # one by one, without padding; the last layer before the final norm
        batch = collator([sample])
        norm, last = model.model.language_model.norm, []
        hook = norm.register_forward_pre_hook(lambda _, args, kept=last: kept.append(args[0]))
        with torch.no_grad():
            out = model(**batch, output_hidden_states=True)
        hook.remove()
        seen = (batch["labels"][:, 1:] != -100).sum()
        total, count = total + float(out.loss * seen), count + int(seen)
        is_image = batch["input_ids"][0] == model.config.image_token_id
        for layer, state in enumerate((*out.hidden_states[:2], last[0])):
            states["image"][layer].append(state[0][is_image])
            states["text"][layer].append(state[0][~is_image])
    close(loss, total / count)
    for kind, layers in states.items():
        tokens = [torch.cat(layer) for layer in layers]
        result = found[kind].result()
        assert result is not None
        assert result["tokens"] == len(tokens[0])
        assert len(tokens[0]) <= 256, "one minibatch of CKA"
        pairs = [[(a, b) for b in tokens] for a in tokens]
        close(result["cosine"], [[direct_cosine(a, b) for a, b in row] for row in pairs])
        close(result["cka"], [[direct_cka([pair]) for pair in row] for row in pairs])
        close(result["effective_rank"], [direct_rank(a) for a in tokens], 1e-3)
        above = [(0, 1), (0, 2), (1, 2)]
        for name in ("cosine", "cka"):
            close(result[f"mean_{name}"], sum(result[name][i][j] for i, j in above) / 3)


def random_states(tokens: int, seed: int = 0) -> list[torch.Tensor]:
    """Three layers of 12 with large means: the second a map of the first with noise, the third on its own."""
    generator = torch.Generator().manual_seed(seed)
    first, other = torch.randn(tokens, 12, generator=generator), torch.randn(tokens, 12, generator=generator)
    mixing = torch.randn(12, 12, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(tokens, 12, generator=generator)
    return [first * torch.arange(1, 13) + 30, first @ mixing + noise - 5, other]


@pytest.mark.parametrize("sizes", [(64, 64, 64), (200, 40, 7)])
def test_streaming_in_several_batches(sizes: tuple[int, ...]) -> None:
    whole, parts = Similarity(3), Similarity(3)
    states = random_states(sum(sizes))
    whole.add(states)
    pieces = list(zip(*(state.split(sizes) for state in states), strict=True))
    for piece in pieces:
        parts.add(list(piece))
    one, several = whole.result(), parts.result()
    assert one is not None and several is not None
    close(several["cosine"], one["cosine"])
    close(several["effective_rank"], one["effective_rank"], 1e-3)
    close(one["effective_rank"], [direct_rank(state) for state in states], 1e-3)
    if len(set(sizes)) == 1:  # CKA: the average over minibatches
        wanted = [[direct_cka([(p[i], p[j]) for p in pieces]) for j in range(3)] for i in range(3)]
        close(several["cka"], wanted)
    assert len(states[0]) > 3 and one["cka"][0][1] > 0.5 > abs(one["cka"][0][2])


def test_more_tokens_than_a_minibatch_are_mixed_and_averaged() -> None:
    states = random_states(600)
    found = Similarity(3)
    found.add(states)
    result = found.result()
    assert result is not None
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    groups = [[state[group] for state in states] for group in order.tensor_split(3)]
    close(result["cka"], [[direct_cka([(g[i], g[j]) for g in groups]) for j in range(3)] for i in range(3)])


def test_cka_of_what_is_unrelated_and_of_what_is_the_same() -> None:
    """The unbiased estimator is near zero for small minibatches of independent states, where the biased one is not; it
    does not see rotation and scale."""
    found = Similarity(3)
    generator = torch.Generator().manual_seed(1)
    turn, _ = torch.linalg.qr(torch.randn(24, 24, generator=generator))
    for _ in range(60):
        x, y = torch.randn(20, 24, generator=generator), torch.randn(20, 24, generator=generator)
        found.add([x, y, 7 * x @ turn])
    result = found.result()
    assert result is not None
    assert abs(result["cka"][0][1]) < 0.05
    close(result["cka"][0][2], 1.0)


def test_what_no_figure_can_be_given_of() -> None:
    few = Similarity(2)
    assert few.result() is None
    few.add([torch.ones(0, 4), torch.ones(0, 4)])
    assert few.result() is None
    few.add([torch.randn(3, 4), torch.randn(3, 4)])
    result = few.result()
    assert result is not None and result["mean_cka"] is None and result["mean_cosine"] is not None
    alike = Similarity(2)
    alike.add([torch.ones(9, 4), torch.randn(9, 4)])
    result = alike.result()
    assert result is not None and result["cka"][0][1] is None and result["effective_rank"][0] == 0


@pytest.mark.parametrize(
    ("spectrum", "rank"),
    [
        ([1.0, 0.0, 0.0], 1.0),
        ([2.0] * 5 + [0.0] * 3, 5.0),
        ([1.0] * 8, 8.0),
        ([0.5, 0.25, 0.125, 0.125], 2**1.75),  # entropy of 1.75 bits
        ([4.0, -1e-9], 1.0),  # below zero by rounding
        ([0.0, 0.0], 0.0),
    ],
)
def test_effective_rank_of_known_spectra(spectrum: list[float], rank: float) -> None:
    close(effective_rank(torch.tensor(spectrum)), rank, 1e-5)


def test_gradients_of_a_linear_model_in_closed_form() -> None:
    """y = x w with mean squared error: the gradient of a batch is 2 X^T (X w - y) / n."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(5, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)  # far from the minimum: the mean gradient stands out of the noise
    data = [(torch.randn(8, 5, generator=generator), torch.randn(8, 1, generator=generator)) for _ in range(6)]
    w = model.weight.detach().double().T
    exact = torch.stack([(2 * x.double().T @ (x.double() @ w - y) / 8).flatten() for x, y in data])  # (m, 5)
    mean = exact.mean(0)
    total = float((exact - mean).square().sum()) / 5
    wanted = {
        "variance": total / 5,
        "noise": total / float(mean.square().sum() - total / 6),
        "share": 1 - 6 * float(mean.square().sum()) / float(exact.square().sum()),
        "norm": float(mean.norm()),
        "values": 5,
    }

    def losses(x: torch.Tensor, y: torch.Tensor, pieces: int) -> Any:
        return ((model(a) - b).square().sum() / 8 for a, b in zip(x.chunk(pieces), y.chunk(pieces), strict=True))

    for pieces in (1, 4):
        spread = spread_of({"w": model.weight}, (losses(x, y, pieces) for x, y in data))
        found = figures([spread["w"]])
        assert found.keys() == wanted.keys()
        close(list(found.values()), list(wanted.values()))


def test_noise_of_a_known_gradient() -> None:
    """Gradients G + e and G - e in turn: |G|^2 = 9, V = m e^2 / (m - 1)."""
    p = nn.Parameter(torch.zeros(2))
    grads = [torch.tensor([3.0, e]) for e in (1.0, -1.0, 1.0, -1.0)]
    found = figures([spread_of({"p": p}, ([(p * g).sum()] for g in grads))["p"]])
    total = 4 / 3
    close([found["variance"], found["noise"], found["norm"]], [total / 2, total / (9 - total / 4), 3.0])
    lost = figures([spread_of({"p": p}, ([(p * g).sum()] for g in (grads[0] - 3, 3 - grads[0])))["p"]])
    assert lost["noise"] is None
    still = figures([spread_of({"p": p}, ([torch.zeros(())] for _ in range(3)))["p"]])
    assert still == {"variance": 0.0, "noise": None, "share": None, "norm": 0.0, "values": 2}


def test_gradients_of_a_model_against_autograd(tiny: tuple[Any, Collator], toys: Mixture) -> None:
    model, collator = tiny
    apply(model, "layernorm")
    samples = trained_samples(toys, 12)
    batches = [[collator(samples[i : i + 2]), collator(samples[i + 2 : i + 4])] for i in (0, 4, 8)]
    spreads = gradient_spread(model, batches)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert list(spreads) == names
    grads = []
    for i in (0, 4, 8):
        loss = model(**collator(samples[i : i + 4])).loss  # transformers': the mean over the whole batch
        grads.append(torch.autograd.grad(loss, [model.get_parameter(name) for name in names]))
    for place, name in enumerate(names):
        own = torch.stack([g[place] for g in grads]).double()
        scale = float(own.norm())
        torch.testing.assert_close(spreads[name].mean.double(), own.mean(0), rtol=1e-3, atol=1e-4 * scale)
        close(spreads[name].squares / scale**2, float((own - own.mean(0)).square().sum()) / scale**2)


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_model_and_random_state_are_left_as_they_were(tiny: tuple[Any, Collator], toys: Mixture) -> None:
    model, collator = tiny
    apply(model, ["norms", "lora"], rank=4, dropout=0.5)
    model.train()
    model.model.language_model.layers[0].eval()
    samples = trained_samples(toys, 4)
    look(model, collator, samples)  # what is found out once about a model and kept
    gain = model.model.language_model.layers[0].input_layernorm.weight
    gain.grad = torch.full_like(gain, 3.0)
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    hooks, state = hooks_of(model), torch.random.get_rng_state()
    first = look(model, collator, samples, {kind: Similarity(3) for kind in ("image", "text")})
    spreads = [gradient_spread(model, [[collator(samples[:2])], [collator(samples[2:])]]) for _ in range(2)]
    assert look(model, collator, samples) == first, "no dropout"
    assert all(torch.equal(spreads[0][name].mean, spreads[1][name].mean) for name in spreads[0])
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(gain.grad, torch.full_like(gain, 3.0))
    assert [p for p in model.parameters() if p.grad is not None] == [gain]
    assert hooks_of(model) == hooks


@pytest.mark.parametrize(("name", "offset"), [("llama", 0.0), ("gemma2", 1.0), ("gpt2", 0.0)])
def test_gains_that_grew_and_turned(name: str, offset: float) -> None:
    model = zoo.model(name)
    apply(model, "layernorm-simple")
    untouched = gain_map(model)
    assert all(gain["change"] == 0 and gain["angle"] == 0 for gain in untouched)
    gains = {gain["name"]: gain for gain in untouched}
    trained = [key for key, gain in gains.items() if gain["trained"]]
    assert {gains[key]["role"] for key in trained} <= {"input", "post_attention", "post_mlp"}
    grown, turned = trained[0], trained[-1]
    with torch.no_grad():
        weight = model.get_submodule(grown).weight
        weight.copy_(1.5 * (weight + offset) - offset)
        other = model.get_submodule(turned).weight
        g = other + offset
        across = torch.randn_like(g)
        across -= g * (across @ g) / (g @ g)
        other.copy_(math.cos(0.1) * g + math.sin(0.1) * across * g.norm() / across.norm() - offset)
    found = {gain["name"]: gain for gain in gain_map(model)}
    close([found[grown]["change"], found[grown]["angle"]], [0.5, 0.0], 2e-4)
    close([found[turned]["change"], found[turned]["angle"]], [2 * math.sin(0.05), math.degrees(0.1)])
    assert found[turned]["block"] == 1 and found[grown]["block"] == 0
    (final,) = [gain for gain in found.values() if gain["role"] == "final"]
    assert final["block"] is None and not final["trained"] and final["change"] == 0


# Runs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("data") / "eval")


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, llm_folder: Path, vision_folder: Path, toy_folder: Path, data: Path
) -> dict[str, Path]:
    """A run whose stage 1 two others reuse: norms alone, LoRA with norms, and connector."""
    folder = tmp_path_factory.mktemp("runs")
    strategies = {"simple": "layernorm-simple", "lora": ["lora", "norms"], "connector": "connector"}
    made: dict[str, Path] = {}
    for name, strategy in strategies.items():
        recipe = toy_recipe(llm_folder, vision_folder, toy_folder, save_every=3, keep=5)
        recipe["evaluate"] = {"benchmarks": ["pope", "vqav2", "text"], "data": str(data)}
        recipe["stages"][1] |= {"strategy": strategy, "lora": {"rank": 4, "dropout": 0.5}}
        if made:
            recipe |= {"start_from": str(made["simple"])}
        train(recipe, out=folder / name, quiet=True)
        made[name] = folder / name
    return made


@pytest.fixture(scope="module")
def documents(runs: dict[str, Path]) -> dict[str, dict[str, Any]]:
    return {name: analyze_run(run, samples=9, batches=3, limit=8, quiet=True) for name, run in runs.items()}


def files_of(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in folder.rglob("*")}


@pytest.mark.heavy
def test_the_document_of_a_run(runs: dict[str, Path], documents: dict[str, dict[str, Any]]) -> None:
    one = documents["simple"]
    assert json.loads(json.dumps(one, allow_nan=False)) == one
    assert (one["strategy"], one["seed"], one["layers"], one["samples"]) == ("layernorm-simple", 0, 3, 9)
    for kind in ("image", "text"):
        similar = one["similarity"][kind]
        assert [len(similar[name]) for name in ("cosine", "cka", "effective_rank")] == [3, 3, 3]
        close([row[i] for i, row in enumerate(similar["cka"])], [1.0] * 3)
    losses = one["losses"]
    close(losses["gap"], losses["held_out"] - losses["train"])
    assert [point["step"] for point in losses["checkpoints"]] == [0, 3, 6]
    last = losses["checkpoints"][-1]
    assert (last["train"], last["held_out"]) == (losses["train"], losses["held_out"])
    assert losses["checkpoints"][0]["train"] != losses["train"]
    roles = {gain["role"] for gain in one["gains"] if gain["trained"]}
    assert roles == {"input", "post_attention"}
    assert all((gain["change"] > 0) == gain["trained"] for gain in one["gains"])
    assert set(one["image"]) == {"none", "blind", "shuffled"}
    assert set(one["image"]["none"]) == set(one["questions"]) == {"pope", "vqav2"}, "text questions have no image"
    assert one["notes"] == []


@pytest.mark.heavy
def test_gradients_of_all_runs_compare(documents: dict[str, dict[str, Any]]) -> None:
    found = {name: one["gradients"] for name, one in documents.items()}
    assert len({one["stream"] for one in found.values()}) == 1, "the same batches"
    trained = {name: set(one["trained"]) for name, one in found.items()}
    assert trained == {"simple": {"norms"}, "lora": {"norms", "lora"}, "connector": {"connector"}}
    for one in found.values():
        assert [point["step"] for point in one["checkpoints"]] == [0, 3, 6]
        assert all(point["parts"]["norms"]["variance"] > 0 for point in one["checkpoints"])
        assert all(len(point["norms"]) == 4 for point in one["checkpoints"])
    starts = [one["checkpoints"][0]["norms"] for one in found.values()]
    for name, gain in starts[0].items():  # one start: LoRA's update is zero there, and dropout is off
        for other in starts[1:]:
            close([other[name][key] for key in ("variance", "norm")], [gain[key] for key in ("variance", "norm")])
    lora = [point["parts"]["lora"] for point in found["lora"]["checkpoints"]]
    assert lora[0]["values"] == lora[-1]["values"] > 0
    ends = [one["checkpoints"][-1]["parts"]["norms"]["norm"] for one in found.values()]
    assert len(set(ends)) == 3


@pytest.mark.slow
def test_lora_keeps_its_values_for_the_end(runs: dict[str, Path]) -> None:
    """The gradient of matrices A is zero where B is: it is not at the end, and equals autograd's there."""
    tuned = open_tuned(runs["lora"])
    recipe = load_recipe(runs["lora"] / "recipe.yaml")
    mixture, collator = Mixture(recipe.stages[1].data), Collator(tuned.processor, recipe.stages[1].max_length)
    apply(tuned.model, ["lora", "norms"], seed=0, **recipe.stages[1].lora.model_dump())
    spreads = gradient_spread(tuned.model, training_batches(mixture, collator, recipe.stages[1], 3))
    document = analyze_run(runs["lora"], samples=1, batches=3, limit=2, quiet=True)
    own = figures([spread for name, spread in spreads.items() if "lora_" in name])
    assert document["gradients"]["checkpoints"][-1]["parts"]["lora"] == own
    assert figures([spread for name, spread in spreads.items() if "lora_A" in name])["norm"] > 0


@pytest.mark.slow
def test_stored_results_are_taken_and_nothing_is_written(
    runs: dict[str, Path], documents: dict[str, dict[str, Any]], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs["simple"]
    tuned = open_tuned(folder)
    for baseline in ("none", "blind", "shuffled"):
        settings = Settings(("pope", "vqav2"), 8, baseline=baseline)
        evaluate_into(folder / "evaluations" / f"{baseline}.json", tuned.model, tuned.processor, settings, data)
    before = files_of(folder)
    asked: list[Any] = []
    monkeypatch.setattr(seeing, "evaluate_model", lambda *a, **b: asked.append(a) or {a[2][0]: {"score": -1.0}})
    again = analyze_run(folder, samples=9, batches=3, limit=8, quiet=True)
    assert not asked
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in documents["simple"].items() if k != "seconds"
    }
    assert files_of(folder) == before
    some = analyze_run(folder, samples=1, batches=2, limit=12, quiet=True)
    assert len(asked) == 3 and some["image"]["blind"]["pope"] == -1.0, "other questions than those that are stored"
    assert some["image"]["none"]["vqav2"] == again["image"]["none"]["vqav2"], "all 8 questions were stored"
    other = analyze_run(runs["connector"], samples=1, batches=2, limit=8, quiet=True)  # another model
    assert other["image"]["none"]["pope"] == -1.0


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("kind", "dtype", "strategy"), [("gpt2", "float32", "full"), ("gemma2", "bfloat16", "layernorm-simple")]
)
def test_other_models_and_a_single_stage(
    tmp_path: Path, vision_folder: Path, toy_folder: Path, kind: str, dtype: str, strategy: str
) -> None:
    llm = tiny_llm(tmp_path / "llm", kind, **({"final_logit_softcapping": None} if kind == "gemma2" else {}))
    recipe = toy_recipe(llm, vision_folder, toy_folder)
    recipe["model"]["dtype"] = dtype
    recipe["stages"] = [{**recipe["stages"][1], "strategy": strategy, "max_steps": 4}]
    train(recipe, out=tmp_path / "run", quiet=True)
    held = {"data": str(toy_folder / "data.json"), "images": str(toy_folder / "images")}
    found = analyze_run(tmp_path / "run", **held, samples=5, batches=2, quiet=True)
    assert found["image"] is None and found["held_out"] == "data.json"
    assert [point["step"] for point in found["gradients"]["checkpoints"]] == [0, 4]
    assert len([gain for gain in found["gains"] if gain["trained"]]) == (5 if strategy == "full" else 8)
    adapter = analyze_run(tmp_path / "run" / "adapter", **held, samples=5, quiet=True)
    assert adapter["similarity"] == found["similarity"] and adapter["gains"] == found["gains"]
    assert (adapter["gradients"], adapter["losses"]["train"], adapter["model"]) == (None, None, found["model"])


@pytest.mark.heavy
def test_what_is_refused(runs: dict[str, Path], mllm_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a run nor an adapter folder"):
        analyze_run(mllm_folder)
    with pytest.raises(InputError, match="at least 1 sample and 2 batches"):
        analyze_run(runs["simple"], batches=1)
    with pytest.raises(InputError, match="no `evaluate` section"):
        analyze_run(runs["simple"] / "adapter")
    assert run("analyze", str(tmp_path / "none")) == 2
    assert run("analyze", str(runs["simple"]), "--images", "x") == 2


@pytest.mark.heavy
def test_the_command_and_its_report(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], vision_folder: Path, toy_folder: Path
) -> None:
    recipe = toy_recipe(tiny_llm(tmp_path / "other", "qwen2"), vision_folder, toy_folder)
    train(recipe, out=tmp_path / "elsewhere" / "simple", quiet=True)
    folders = [str(runs["simple"]), str(tmp_path / "elsewhere" / "simple")]
    out = tmp_path / "report"
    held = ("--data", str(toy_folder / "data.json"), "--images", str(toy_folder / "images"))
    options = ("--samples", "4", "--batches", "2", "--limit", "2")
    assert run("analyze", *folders, "--out", str(out), *held, *options) == 0
    said = capsys.readouterr().out
    assert "layernorm-simple" in said and str(out / "report.html") in said
    result = json.loads((out / "analysis.json").read_text())
    labels = list(result["runs"])
    assert [label.rpartition("/")[2] for label in labels] == ["simple", "simple"] and len(set(labels)) == 2
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert page.count("<svg") > 10
    for shown in (page, text):
        assert "2 different models" in shown and all(label in shown for label in labels)
    assert run("analyze", folders[0], "--json", *options) == 0
    assert json.loads(capsys.readouterr().out)["runs"]["simple"]["strategy"] == "layernorm-simple"
    assert (runs["simple"] / "analysis" / "report.html").is_file()


@pytest.mark.parametrize("cached", [False, True])
def test_what_a_training_left_out_is_left_out(
    llm_folder: Path, vision_folder: Path, tmp_path: Path, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`bad_samples: skip` holds for who reads the data of a run again, from images and from stored features."""
    monkeypatch.setenv("NORMTUNE_CACHE", str(tmp_path / "cache"))
    data, held = toy_data(tmp_path / "data", 12), toy_data(tmp_path / "held", 6)
    (data / "images" / "1.png").write_bytes(b"torn")
    items = json.loads((data / "data.json").read_text())
    items[2]["conversations"][1]["value"] = ""
    (data / "data.json").write_text(json.dumps(items))
    given = toy_recipe(llm_folder, vision_folder, data, bad_samples="skip", max_bad=2)
    given["stages"] = [{**given["stages"][0], "cache_features": cached, "batch_size": 12, "max_steps": 2}]
    recipe = load_recipe(given, [])
    done = train(recipe, out=tmp_path / "run", quiet=True)
    batch = first_batch(recipe, recipe.stages[0], done.model, done.processor)
    assert batch["labels"].ne(-100).any()
    document = analyze_run(
        tmp_path / "run",
        data=str(held / "data.json"),
        images=str(held / "images"),
        samples=6,
        batches=2,
        quiet=True,
    )
    assert math.isfinite(document["losses"]["gap"])
