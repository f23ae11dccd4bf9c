"""Intervals over seeds and images, relative averages, winners, bands, and the verdicts on the paper's claims."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asked import write_benchmarks
from normtune.comparison.claims import CLAIMS, claims
from normtune.comparison.statistics import band, load_statistics, summarize, widening
from normtune.errors import InputError
from normtune.evaluation import Settings
from normtune.evaluation.questions import ask
from normtune.tasks import TASKS, Statistics, difference, intervals

Marks = Sequence[float]
WIDE = (3 / 2) ** 0.5 * 4.303 / 1.96  # of three seeds


def share(totals: np.ndarray) -> dict[str, np.ndarray]:
    return {"score": totals[:, 0] / totals[:, 1], "right": totals[:, 0]}


def of(marks: Marks, units: Sequence[str] | None = None) -> Statistics:
    names = units or [str(n) for n in range(len(marks))]
    return Statistics.gather(names, [""] * len(marks), [[m, 1] for m in marks], 2, share)


def row(**by_bench: Sequence[Marks]) -> dict[int, dict[str, Statistics]]:
    """Marks by benchmark, of each seed in turn."""
    seeds = len(next(iter(by_bench.values())))
    return {seed: {name: of(marks[seed]) for name, marks in by_bench.items()} for seed in range(seeds)}


def flip(count: int, rate: float, seed: int) -> list[int]:
    return np.random.default_rng(seed).binomial(1, rate, count).tolist()


def test_one_seed_has_the_interval_of_its_images() -> None:
    marks = flip(80, 0.6, 0)
    rows, _ = summarize({"a": row(pope=[marks])})
    found = rows["a"]["scores"]["pope"]
    assert found["mean"] == np.mean(marks) and found["per_seed"] == {"0": np.mean(marks)}
    own = intervals(of(marks), seed=zlib.crc32(b"pope"))
    assert found["interval"] == pytest.approx(own["score"], abs=1e-12)
    assert found["figures"]["right"] == {"mean": sum(marks), "interval": pytest.approx(own["right"])}
    assert rows["a"]["average"] == {"mean": found["mean"], "interval": found["interval"]}


def test_without_spread_over_images_the_interval_is_that_of_three_seeds() -> None:
    """All images of a seed score alike. Of the 27 draws of three seeds one has the lowest alone (3.7 %), so that the
    2.5th percentile is the lowest seed; for the 97.5th likewise. Both are moved away from the mean by WIDE."""
    rows, _ = summarize({"a": row(pope=[[0.48] * 9, [0.57] * 9, [0.51] * 9])}, resamples=4000)
    expected = [0.52 - 0.04 * WIDE, 0.52 + 0.05 * WIDE]
    assert rows["a"]["scores"]["pope"]["interval"] == pytest.approx(expected)
    assert rows["a"]["scores"]["pope"]["mean"] == pytest.approx(0.52)
    rows, _ = summarize({"a": row(pope=[[0.2] * 9, [0.9] * 9, [0.5] * 9])})
    assert rows["a"]["scores"]["pope"]["interval"] == rows["a"]["average"]["interval"] == [0, 1]  # a share stays one


@pytest.mark.parametrize(
    "seeds, expected", [(1, 1.0), (2, 9.1678), (3, WIDE), (5, 1.5837), (31, 1.0591), (400, 1.00125)]
)
def test_few_seeds_tell_their_own_spread_badly(seeds: int, expected: float) -> None:
    assert widening(seeds) == pytest.approx(expected, rel=1e-3)


def test_two_equal_strategies_are_seldom_told_apart() -> None:
    """Three seeds of one normal distribution each: without the widening a quarter of the intervals leave out 0."""
    generator, apart, trials = np.random.default_rng(0), 0, 300
    for _ in range(trials):
        scores = generator.normal(0.6, 0.02, (2, 3))
        cells = {label: row(pope=[[mean] * 2 for mean in own]) for label, own in zip("ab", scores, strict=True)}
        low, high = summarize(cells, resamples=200)[0]["a"]["differences"]["b"]["pope"]["interval"]
        apart += not low <= 0 <= high
    assert apart <= 0.08 * trials


def test_what_seeds_do_to_two_rows_alike_cancels() -> None:
    marks = np.array([0.3, 0.5, 0.9])[:, None] * np.ones(6)
    rows, winners = summarize({"a": row(pope=marks.tolist()), "b": row(pope=(marks - 0.01).tolist())})
    found = rows["a"]["differences"]["b"]["pope"]
    assert found == {"mean": pytest.approx(0.01), "interval": pytest.approx([0.01, 0.01])}
    assert winners["pope"] == {"best": "a", "tied": []}
    assert rows["a"]["interval_over"] == ["seeds", "images"]
    assert summarize({"a": row(pope=marks[:1].tolist())})[0]["a"]["interval_over"] == ["images"]


def test_a_row_of_which_seeds_failed_does_not_win() -> None:
    """Its bad seed may be the one that failed. It is named where the best one is not told from it."""
    marks = [[0.9] * 6, [0.92] * 6, [0.1] * 6]
    cells = {"lucky": row(pope=marks[:2]), "a": row(pope=marks), "b": row(pope=[[0.2] * 6] * 3)}
    _, winners = summarize(cells)
    assert winners["pope"]["best"] == "a" and "lucky" in winners["pope"]["tied"]
    assert summarize({label: cells[label] for label in ("lucky", "a")})[1] == {}


def test_seeds_and_images_together() -> None:
    """Against a bootstrap written out: seeds and images drawn anew for each resample, one after another."""
    generator = np.random.default_rng(5)
    marks = generator.binomial(1, 0.5, (3, 40)) * generator.uniform(0.6, 1.0, (3, 1))
    rows, _ = summarize({"a": row(pope=marks.tolist())}, resamples=6000)
    direct = []
    for _ in range(6000):
        seeds, images = generator.integers(0, 3, 3), generator.integers(0, 40, 40)
        direct.append(marks[seeds][:, images].mean() + (WIDE - 1) * (marks[seeds].mean() - marks.mean()))
    assert rows["a"]["scores"]["pope"]["interval"] == pytest.approx(np.percentile(direct, [2.5, 97.5]), abs=0.012)


def test_differences_are_paired() -> None:
    """Two rows that fail on the same images, but for one, are told apart where their intervals overlap."""
    hard = flip(300, 0.5, 1)
    better = [mark or n < 60 for n, mark in enumerate(hard)]
    rows, winners = summarize({"a": row(pope=[hard]), "b": row(pope=[better])})
    spans = [rows[label]["scores"]["pope"]["interval"] for label in "ab"]
    assert spans[0][1] > spans[1][0]
    found = rows["a"]["differences"]["b"]["pope"]
    expected = difference(of(hard), of(better), seed=zlib.crc32(b"pope"))["score"]
    assert found["mean"] == pytest.approx(expected["difference"])
    assert found["interval"] == pytest.approx(expected["interval"])
    assert winners == {name: {"best": "b", "tied": []} for name in ("pope", "average")}
    assert rows["b"]["differences"] == {}


def test_the_same_training_twice_is_a_tie() -> None:
    marks = [flip(30, 0.7, n) for n in range(3)]
    rows, winners = summarize({"a": row(pope=marks), "a (2)": row(pope=marks), "low": row(pope=[[0] * 30] * 3)})
    assert rows["a"]["scores"] == rows["a (2)"]["scores"] and rows["a"]["average"] == rows["a (2)"]["average"]
    assert rows["a"]["differences"]["a (2)"]["average"] == {"mean": 0, "interval": [0, 0]}
    assert winners["pope"] == {"best": "a", "tied": ["a (2)"]}


def test_controls_do_not_win_and_one_row_alone_neither() -> None:
    cells = {"a": row(pope=[[0, 1] * 9]), "b": row(pope=[[0, 0, 1] * 6]), "control": row(pope=[[1] * 18])}
    _, winners = summarize(cells, controls={"control"})
    assert {own["best"] for own in winners.values()} == {"a"} and "control" not in winners["pope"]["tied"]
    assert summarize(cells, controls={"control", "b"})[1] == {}


def test_relative_average_is_the_mean_of_ratios() -> None:
    """score / lora's score task by task: (0.5 / 0.25 + 0.6 / 0.8) / 2 - 1; `text` is in no average."""
    cells = {
        "lora": row(pope=[[0.25] * 8], coco=[[0.8] * 8], text=[[1.0] * 8]),
        "layernorm": row(pope=[[0.5] * 8], coco=[[0.6] * 8], text=[[0.0] * 8]),
    }
    rows, _ = summarize(cells)
    ours = rows["layernorm"]
    assert ours["relative"] == {"lora": {"mean": pytest.approx(0.375), "interval": pytest.approx([0.375, 0.375])}}
    assert ours["average"]["mean"] == pytest.approx(0.55) and ours["scores"]["text"]["mean"] == 0
    assert rows["lora"]["relative"]["lora"] == {"mean": 0, "interval": [0, 0]}


def test_a_task_in_which_the_reference_scores_nothing_has_no_ratio() -> None:
    zero, some = [[0.0] * 8], [[0.5] * 8]
    rows, _ = summarize({"lora": row(pope=zero, coco=some), "a": row(pope=some, coco=some)})
    assert rows["a"]["relative"]["lora"]["mean"] == pytest.approx(0)
    assert rows["a"]["relative"]["lora"]["tasks"] == ["coco"]  # said, as pope is in the average
    rows, _ = summarize({"lora": row(pope=zero), "a": row(pope=some)})
    assert rows["a"]["relative"] == {}
    rare = [[1.0] + [0.0] * 7]  # 0 in a third of the resamples: no ratio there, and no nan in the interval
    rows, _ = summarize({"lora": row(pope=rare), "a": row(pope=some)})
    assert all(np.isfinite(rows["a"]["relative"]["lora"]["interval"]))


def test_a_row_that_lacks_a_benchmark_has_no_average() -> None:
    whole, half = [[1, 1]] * 2, [[1, 0]] * 2
    cells = {"a": row(pope=half, coco=whole), "b": row(pope=whole), "c": row(pope=whole, coco=half)}
    cells["d"] = {**cells["c"], 1: {"pope": of([1, 1])}}  # in one of its seeds
    rows, winners = summarize(cells)
    assert rows["b"]["average"] is None and rows["b"]["relative"] == {} and "coco" not in rows["d"]["scores"]
    assert {winners["average"]["best"], *winners["average"]["tied"]} == {"a", "c"}
    assert rows["a"]["differences"]["b"].keys() == {"pope"}


def test_rows_of_different_seeds() -> None:
    """A row of one seed (nothing of it was trained with the others) keeps it in every resample."""
    marks = [flip(40, rate, 1) for rate in (0.4, 0.6, 0.8)]
    whole, _ = summarize({"a": row(pope=marks)})
    rows, _ = summarize(
        {"a": row(pope=marks), "one": row(pope=marks[:1]), "two": dict(list(row(pope=marks).items())[1:])}
    )
    assert rows["a"]["scores"] == whole["a"]["scores"]
    alone = intervals(of(marks[0]), seed=zlib.crc32(b"pope"))["score"]
    assert rows["one"]["scores"]["pope"]["interval"] == pytest.approx(alone)
    assert rows["two"]["scores"]["pope"]["mean"] == pytest.approx((np.mean(marks[1]) + np.mean(marks[2])) / 2)
    assert set(rows["two"]["scores"]["pope"]["per_seed"]) == {"1", "2"}


def test_the_order_of_the_images_does_not_matter_and_other_images_are_refused() -> None:
    marks, names = flip(20, 0.5, 3), [str(n) for n in range(20)]
    turned = of(marks[::-1], names[::-1])
    rows, _ = summarize({"a": row(pope=[marks]), "b": {0: {"pope": turned}}})
    assert rows["a"]["scores"] == rows["b"]["scores"]
    with pytest.raises(InputError, match="not about the same images"):
        summarize({"a": row(pope=[marks]), "b": {0: {"pope": of(marks, ["x", *names[1:]])}}})


def test_many_rows_have_no_differences_and_nothing_is_nothing() -> None:
    rows, winners = summarize({str(n): row(pope=[[n, 1]]) for n in range(25)}, resamples=10)
    assert all(not own["differences"] for own in rows.values()) and winners["pope"]["best"] == "24"
    assert summarize({}) == ({}, {})
    rows, _ = summarize({"a": {}, "b": row(pope=[[1, 0]])})
    assert rows["a"] == {
        "scores": {},
        "average": None,
        "relative": {},
        "differences": {"b": {}},
        "interval_over": ["images"],
    }


def test_what_it_says_is_json() -> None:
    cells = {label: row(pope=[flip(9, 0.5, n)] * 2) for n, label in enumerate(("lora", "full", "layernorm"))}
    found = summarize(cells)
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(summarize(cells)))


def test_results_on_disk(tmp_path: Path) -> None:
    """The real benchmarks, each answered from its own journal, have a headline, and answers decide it."""
    data = write_benchmarks(tmp_path / "eval")
    asked = ask(Settings(tuple(TASKS)), data)
    cells: dict[str, dict[int, dict[str, Statistics]]] = {}
    for label, word in (("right", "Yes"), ("wrong", "blue")):
        lines = [{"format": 1, "settings": {}}]
        lines += [
            {"benchmark": own.name, "answers": [{"id": i.id, "answer": word} for i in own.items]} for own in asked
        ]
        (tmp_path / label).mkdir()
        (tmp_path / label / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / f"{label}.json").write_text(json.dumps({"predictions": label}))
        cells[label] = {0: load_statistics(tmp_path / f"{label}.json", asked)}
    rows, winners = summarize(cells, resamples=50)
    assert rows["right"]["scores"]["mme"]["mean"] == 0.5 and rows["wrong"]["scores"]["mme"]["mean"] == 0
    assert winners["vqav2"]["best"] == "wrong"  # half of the answers are blue
    for own in rows.values():
        assert own["scores"].keys() == TASKS.keys() and own["average"] is not None
        expected = np.mean([score["mean"] for name, score in own["scores"].items() if name != "text"])
        assert own["average"]["mean"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        # a triangle of slope 0.1 a decade around 1e-2: 0.02 below the peak of 1 is 0.2 decades away
        ([0.8, 0.9, 1.0, 0.9, 0.8], (10**-2.2, 10**-1.8)),
        ([0.8, 0.99, 1.0, 0.9, 0.8], (10 ** (-3 - 0.01 / 0.19), 10**-1.8)),
        ([1.0, 0.9, 0.5, 0.5, 0.5], (1e-4, 10**-3.8)),  # ends with the sweep
        ([0.5, 0.5, 0.5, 0.9, 1.0], (10**-0.2, 1.0)),
        ([1.0, 1.0, 1.0, 1.0, 0.99], (1e-4, 1.0)),
        ([0.99, 0.1, 1.0, 0.1, 0.99], (10 ** (-2 - 0.02 / 0.9), 10 ** (-2 + 0.02 / 0.9))),  # around the best alone
        ([0.0, 0.0, 0.0, 0.0, 0.0], (1e-4, 1e-4)),
    ],
)
def test_the_band_of_rates(scores: list[float], expected: tuple[float, float]) -> None:
    rates = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    low, high, decades = band(rates, scores)
    assert (low, high) == pytest.approx(expected, rel=1e-9)
    assert decades == pytest.approx(np.log10(high / low), abs=1e-12)
    if len(set(scores)) > 2:  # among equals the first one is the best
        assert band(rates[::-1], scores[::-1]) == pytest.approx((low, high, decades))


# The claims


def document(cells: Mapping[str, float], experiment: str = "strategies", factor: str = "strategy") -> dict[str, Any]:
    """A result in which each row has its share of right answers to 200 questions of POPE and MME, the same for all, and
    MME's figures accordingly; mixed data are 80 samples, others 20."""
    order = np.random.default_rng(0).permutation(200)
    marks = {label: (order < 200 * rate).astype(float).tolist() for label, rate in cells.items()}
    summary, winners = summarize({label: row(pope=[own], mme=[own]) for label, own in marks.items()}, resamples=200)
    rows = [
        {"label": label, "factors": {factor: label}, "control": False, "baseline": "none", "cost": None, **own}
        for label, own in summary.items()
    ]
    for own in rows:
        own["factors"] |= {"samples": 80 if own["label"] == "mixed" else 20}
        mean = own["scores"]["mme"]["mean"]
        own["scores"]["mme"]["figures"] = {"perception": {"mean": 2000 * mean}, "cognition": {"mean": 800 * mean}}
    return {"experiment": experiment, "rows": rows, "winners": winners, "request": {"equal": "samples"}, "analysis": {}}


def verdict(report: Mapping[str, Any], words: str) -> tuple[str, str]:
    (found,) = [one for one in claims(report) if words in one["claim"]]
    return found["verdict"], found["here"]


def test_every_claim_has_a_source_that_may_be_quoted() -> None:
    assert len(CLAIMS) == 10
    for one in claims(document({"a": 0.5, "b": 0.6})):
        assert (
            one["source"] in ("[S]", "[C]", "[D]", "[S, D]") and one["verdict"] == "not testable here" and one["here"]
        )


@pytest.mark.parametrize(
    ("rates", "words", "expected", "said"),
    [
        ({"layernorm": 0.8, "lora": 0.5}, "beats LoRA", "held", "relative to lora +60.0 %"),
        ({"lora": 0.8, "layernorm": 0.4}, "beats LoRA", "did not hold", "-50.0 %"),
        ({"lora": 0.5, "layernorm": 0.5}, "beats LoRA", "did not hold", "+0.0 % (+0.0 % to +0.0 %)"),
        ({"lora": 0.5, "layernorm": 0.505}, "beats LoRA", "not testable here", "+1.0 %"),
        ({"layernorm-simple": 0.9, "layernorm": 0.99}, "on MME", "held", "1980.0 / 792.0 against 1800.0 / 720.0"),
        ({"lora": 0.0, "layernorm": 0.5}, "beats LoRA", "not testable here", "no ratio"),
        ({"lora": 0.5, "full": 0.5}, "beats LoRA", "not testable here", "needs layernorm and lora"),
        ({"layernorm-simple": 0.4, "layernorm": 0.6}, "on MME", "held", "+20.0 points"),
        ({"layernorm-simple": 0.6, "layernorm": 0.4}, "on MME", "did not hold", "-20.0 points"),
        ({"norms+connector": 0.9, "connector": 0.3, "norms": 0.6}, "connector alone", "held", "+30.0 points"),
        ({"norms+connector": 0.9, "connector": 0.6, "norms": 0.3}, "connector alone", "did not hold", "-30.0"),
        ({"layernorm-simple": 0.9, "connector": 0.6}, "connector alone", "not testable here", "+30.0 points"),
        ({"layernorm-simple": 0.9, "connector": 0.6}, "connector alone", "not testable here", "needs norms+connector"),
        ({"layernorm-simple": 0.3, "connector": 0.6}, "connector alone", "did not hold", "-30.0"),
        ({"norms+connector": 0.3, "connector": 0.6}, "connector alone", "did not hold", "-30.0"),
        ({"connector": 0.6, "full": 0.9}, "connector alone", "not testable here", "needs norms+connector"),
    ],
)  # fmt: skip
def test_claims_about_strategies(rates: dict[str, float], words: str, expected: str, said: str) -> None:
    for order in (rates, dict(reversed(rates.items()))):  # whichever row holds the difference
        found, here = verdict(document(order), words)
        assert found == expected and said in here


@pytest.mark.parametrize(
    ("rates", "words", "expected"),
    [
        ({"conversation": 0.6, "mixed": 0.6}, "20K conversations", "held"),  # match
        ({"conversation": 0.8, "mixed": 0.6}, "20K conversations", "held"),
        ({"conversation": 0.4, "mixed": 0.6}, "20K conversations", "did not hold"),
        ({"conversation": 0.6, "detail": 0.5}, "20K conversations", "not testable here"),
        ({"conversation": 0.6, "detail": 0.3}, "worst kind", "not testable here"),
        ({"conversation": 0.6, "detail": 0.3, "mixed": 0.7}, "worst kind", "not testable here"),
        ({"conversation": 0.3, "detail": 0.6}, "worst kind", "did not hold"),
        ({"conversation": 0.6, "detail": 0.3, "reasoning": 0.5}, "worst kind", "held"),
        ({"conversation": 0.6, "detail": 0.5, "reasoning": 0.3}, "worst kind", "did not hold"),
        ({"conversation": 0.6, "reasoning": 0.3}, "worst kind", "not testable here"),
    ],
)
def test_claims_about_kinds(rates: dict[str, float], words: str, expected: str) -> None:
    report = document(rates, "kinds", "kind")
    assert verdict(report, words)[0] == expected
    assert verdict({**report, "experiment": "sweep data"}, words)[0] == "not testable here"


@pytest.mark.parametrize(
    "rate, samples, expected",
    [(0.8, 20, "not testable here"), (0.8, 39, "not testable here"), (0.8, 40, "held"), (0.4, 20, "did not hold")],
)
def test_a_match_needs_fewer_samples(rate: float, samples: int, expected: str) -> None:
    """20 samples of conversations: at equal samples they cannot show that they stand for more."""
    report = document({"conversation": rate, "mixed": 0.6}, "kinds", "kind")
    report["rows"][1]["factors"]["samples"] = samples
    found, here = verdict(report, "20K conversations")
    assert found == expected and f"20 samples against {samples}: conversation against mixed" in here
    assert ("a match needs mixed" in here) == (expected == "not testable here")


def test_the_claim_about_mme_is_about_both_its_figures() -> None:
    report = document({"layernorm": 0.8, "layernorm-simple": 0.6})
    ours, _ = (own["scores"]["mme"]["figures"] for own in report["rows"])
    found, here = verdict(report, "on MME")
    assert found == "held" and "by the means of both figures" in here
    ours["cognition"]["mean"] = 100.0
    assert verdict(report, "on MME")[0] == "not testable here"
    del ours["cognition"]
    found, here = verdict(report, "on MME")
    assert (
        found == "not testable here" and "1600.0 / - against 1200.0 / 480.0" in here and "cognition not asked" in here
    )


def test_a_task_without_a_ratio_leaves_the_average_open() -> None:
    report = document({"layernorm": 0.8, "lora": 0.5})
    report["rows"][0]["relative"]["lora"]["tasks"] = ["pope"]
    found, here = verdict(report, "beats LoRA")
    assert found == "not testable here" and "+60.0 %" in here and "of pope alone" in here


def test_a_certain_advantage_may_be_small() -> None:
    """One row better in every image by 1 %: it holds, and is said to be small."""
    cells = {name: row(pope=[[rate] * 9]) for name, rate in (("layernorm", 0.505), ("lora", 0.5), ("connector", 0.5))}
    summary, _ = summarize(cells)
    rows = [
        {"label": name, "factors": {"strategy": name.replace("layernorm", "norms")}, "baseline": "none", **own}
        for name, own in summary.items()
    ]
    report = {"experiment": "strategies", "rows": rows, "analysis": {}, "request": {}}
    assert "(held, but below 2 %)" in verdict(report, "connector alone")[1]
    rows[0]["factors"]["strategy"] = "layernorm"
    found, here = verdict(report, "beats LoRA")
    assert found == "held" and here.endswith("(held, but below 2 %)")


def test_a_claim_has_to_hold_under_every_encoder() -> None:
    report = document(
        {f"{name}, {vision}": rate for vision, rates in (("a", (0.9, 0.6, 0.3)), ("b", (0.9, 0.3, 0.6)))
         for name, rate in zip(("norms+connector", "layernorm-simple", "connector"), rates, strict=True)},
        "sweep vision",
    )  # fmt: skip
    for own in report["rows"]:
        name, _, encoder = own["label"].partition(", ")
        own["factors"] = {"strategy": name, "encoder": encoder}
    found, here = verdict(report, "connector alone")
    assert found == "did not hold" and "layernorm-simple, b against connector, b -30.0" in here
    report["rows"] = [own for own in report["rows"] if own["factors"]["encoder"] == "a"]
    assert verdict(report, "connector alone")[0] == "held"


@pytest.mark.parametrize("device", ["GPU memory", "resident memory"])
def test_claims_about_costs(device: str) -> None:
    report = document({"layernorm": 0.5, "lora": 0.5})
    costs = [
        {"trainable_parameters": n, "peak_bytes": n * 10**9, "saved_bytes": n * 10**6, "peak_of": device}
        for n in (3, 4)
    ]
    for own, cost in zip(report["rows"], costs, strict=True):
        own["cost"] = cost
    counted = "trainable parameters 3 against 4 (-25.0 %); counted, not measured"
    assert verdict(report, "fewer parameters") == ("held", counted)
    report["recipe"] = "stages: [{lora: {rank: 8}}, {lora: {rank: 64}}]"
    assert verdict(report, "fewer parameters") == ("held", f"{counted}; LoRA of rank 64")
    found, here = verdict(report, "less GPU memory")
    assert found == ("held" if device == "GPU memory" else "not testable here") and "-25.0 %" in here
    assert ("kept for backward" in here) == (device != "GPU memory")
    for own, cost in zip(report["rows"], reversed(costs), strict=True):
        own["cost"] = cost
    assert verdict(report, "fewer parameters")[0] == "did not hold"
    for size, expected in ((99, "not testable here"), (98, "held"), (101, "not testable here"), (102, "did not hold")):
        report["rows"][0]["cost"] = {**costs[0], "peak_of": "GPU memory", "peak_bytes": size}
        report["rows"][1]["cost"] = {**costs[0], "peak_bytes": 100}
        found, here = verdict(report, "less GPU memory")
        assert found == expected and ("within 2 %" in here) == (size in (99, 101))
    report["rows"][1]["cost"] = None
    assert verdict(report, "less GPU memory")[1].startswith("needs layernorm and lora")


def analysis(image: float, text: float, variances: Sequence[float]) -> dict[str, Any]:
    points = [
        {"step": n, "parts": {"norms": {"variance": own, "share": 0.87}, "head": {"variance": 9.0}}}
        for n, own in enumerate(variances)
    ]
    similarity = {"image": {"mean_cosine": image}, "text": {"mean_cosine": text}}
    return {"similarity": similarity, "gradients": {"checkpoints": points}}


@pytest.mark.parametrize("ours, theirs", itertools.permutations((0.2, 0.4)))
def test_claims_about_the_analysis(ours: float, theirs: float) -> None:
    report = document({"layernorm": 0.5, "full": 0.5})
    expected = "held" if ours < theirs else "did not hold"
    report["analysis"] = {
        "layernorm": analysis(ours, ours, [9.0, 9.0, ours]),
        "full": analysis(theirs, theirs, [9.0, 1.0, theirs]),
    }
    found, here = verdict(report, "less alike")
    assert found == expected and f"{ours} against {theirs}" in here and "no interval" in here
    found, here = verdict(report, "Gradients vary less")  # at the last checkpoint
    assert found == expected and f"last checkpoint {ours} (87 % noise) against {theirs} (87 % noise)" in here
    report["analysis"]["full"] |= {"gradients": None}
    report["analysis"]["layernorm"]["similarity"] = {"text": {"mean_cosine": ours}}
    assert verdict(report, "less alike")[0] == expected  # of text tokens alone
    assert verdict(report, "Gradients vary less")[0] == "not testable here"
    del report["analysis"]["full"]
    assert verdict(report, "less alike")[0] == "not testable here"


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ((0.99, 0.5), (1.0, 0.6), "0.99 against 1"),  # one kind of token within 2 %
        ((0.99, 0.5), (1.0, 0.6), "within 2 %"),
        ((1.01, 0.7), (1.0, 0.6), "within 2 %"),
        ((0.57, 0.565), (0.568, 0.579), "within 2 %"),
        ((0.5, 0.7), (0.6, 0.6), "do not agree"),
        ((0.0, -0.5), (0.0, -0.4), "within 2 %"),
    ],
)
def test_one_run_each_says_nothing_of_small_gaps(
    ours: tuple[float, float], theirs: tuple[float, float], said: str
) -> None:
    report = document({"layernorm": 0.5, "full": 0.5})
    report["analysis"] = {"layernorm": analysis(*ours, [1.0, 1.01]), "full": analysis(*theirs, [2.0, 1.0])}
    found, here = verdict(report, "less alike")
    assert found == "not testable here" and said in here and "one run each" in here
    found, here = verdict(report, "Gradients vary less")
    assert found == "not testable here" and "1.01 (87 % noise) against 1 (87 % noise)" in here


def test_a_row_that_failed_is_no_row() -> None:
    report = document({"layernorm": 0.8, "lora": 0.5})
    report["rows"][1] |= {"average": None, "scores": {}, "relative": {}}
    assert verdict(report, "beats LoRA")[0] == "not testable here"
