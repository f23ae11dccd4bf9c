"""Intervals: against the formula for a proportion, clusters, strata, corpus metrics, and paired differences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from normtune.errors import InputError
from normtune.tasks import Item, Statistics, caption_scores, captions, difference, intervals, mme, pope, vqav2


def proportion(totals: np.ndarray) -> dict[str, np.ndarray]:
    return {"share": totals[:, 0] / totals[:, 1]}


def of(marks: list[int], units: list[str] | None = None, strata: list[str] | None = None) -> Statistics:
    names = units or [str(n) for n in range(len(marks))]
    return Statistics.gather(names, strata or [""] * len(marks), [[m, 1] for m in marks], 2, proportion)


def test_equals_the_normal_interval_of_a_proportion() -> None:
    low, high = intervals(of([1] * 280 + [0] * 120), resamples=4000)["share"]
    half = 1.96 * (0.7 * 0.3 / 400) ** 0.5
    assert (low, high) == (pytest.approx(0.7 - half, abs=0.006), pytest.approx(0.7 + half, abs=0.006))


def test_depends_on_the_seed_alone() -> None:
    one = of([n * n % 7 for n in range(50)])
    assert intervals(one, seed=3) == intervals(one, seed=3) != intervals(one, seed=4)


def test_images_are_resampled_and_not_questions() -> None:
    """Ten questions about each image, all right or all wrong: the interval is that of the images."""
    marks = [n // 10 % 2 for n in range(400)]
    apart = intervals(of(marks))["share"]
    together = intervals(of(marks, [str(n // 10) for n in range(400)]))["share"]
    assert (together[1] - together[0]) / (apart[1] - apart[0]) == pytest.approx(10**0.5, rel=0.15)


def test_strata_keep_their_size() -> None:
    """Within a stratum nothing varies, so neither does the whole; without strata it does."""
    marks, strata = [1] * 20 + [0] * 20, ["a"] * 20 + ["b"] * 20
    assert intervals(of(marks, None, strata))["share"] == [0.5, 0.5]
    assert intervals(of(marks))["share"][0] < 0.45


def test_little_and_nothing() -> None:
    assert intervals(of([1]))["share"] == [1.0, 1.0]
    assert intervals(of([])) == difference(of([]), of([])) == {}


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws in small portions give an interval of the same width."""
    from normtune.tasks import bootstrap

    whole = intervals(of([0, 1] * 100))["share"]
    monkeypatch.setattr(bootstrap, "_DRAWS_AT_ONCE", 1000)
    parts = intervals(of([0, 1] * 100))["share"]
    assert parts == pytest.approx(whole, abs=0.02)


# ---- paired differences ------------------------------------------------------------------------------------


def test_no_difference_from_oneself() -> None:
    one = of([0, 1, 1, 0, 1])
    assert difference(one, one) == {"share": {"difference": 0.0, "interval": [0.0, 0.0]}}


def test_pairing_takes_out_what_both_find_hard() -> None:
    generator = np.random.default_rng(0)
    first = (generator.random(500) < 0.6).astype(int)
    better = first | (generator.random(500) < 0.1)
    found = difference(of(list(better)), of(list(first)))["share"]
    assert found["difference"] == pytest.approx(float(better.mean() - first.mean()), abs=1e-12)
    assert 0 < found["interval"][0] < found["difference"] < found["interval"][1]
    apart = intervals(of(list(first)))["share"]
    assert found["interval"][1] - found["interval"][0] < (apart[1] - apart[0]) / 2


def test_results_are_matched_by_image_whatever_the_order() -> None:
    one, other = of([0, 1, 1], ["a", "b", "c"]), of([1, 0, 1], ["c", "a", "b"])
    assert difference(one, other)["share"] == {"difference": 0.0, "interval": [0.0, 0.0]}
    with pytest.raises(InputError, match=r"not about the same images \(1 are in one only, as 'c'\)"):
        difference(one, of([0, 1], ["a", "b"]))


# ---- the benchmarks ----------------------------------------------------------------------------------------


def test_pope_shares_images_between_splits() -> None:
    asked = [
        Item(f"{split}/{n}", Path(f"{n // 2}.jpg"), "?", ("yes", "no")[n % 2], split)
        for split in pope.SPLITS
        for n in range(40)
    ]
    found = pope.measure(asked, ["yes", "no", "no", "no"] * 30)
    assert len(found.statistics.units) == 20  # each with six questions
    spans = found.with_intervals()["intervals"]
    assert set(spans) >= {"mean_f1", "score", "random.f1", "popular.accuracy", "adversarial.yes_ratio"}
    assert spans["mean_f1"] == pytest.approx(spans["random.f1"])  # the same answers in each split: no averaging out
    assert spans["mean_f1"][0] < found.scores["mean_f1"] < spans["mean_f1"][1]


def test_mme_resamples_pairs_within_subtasks() -> None:
    asked = [
        Item(f"{name}/{n}.jpg/{k}", None, "?", ("yes", "no")[k], name)
        for name, count in (("existence", 30), ("code_reasoning", 5))
        for n in range(count)
        for k in (0, 1)
    ]
    found = mme.measure(asked, ["yes", "no"] * 10 + ["yes", "yes"] * 20 + ["yes", "no"] * 5)
    assert len(found.statistics.units) == 35
    spans = found.with_intervals()["intervals"]
    assert spans["cognition"] == spans["code_reasoning"] == [200.0, 200.0]  # all right, and always five images
    assert found.scores["perception"] == pytest.approx(100 * (40 / 60 + 10 / 30))
    # acc and acc+ move together: right pairs are a proportion p, the score is 50 + 150 p
    half = 150 * 1.96 * (1 / 3 * 2 / 3 / 30) ** 0.5
    assert spans["existence"][1] - spans["existence"][0] == pytest.approx(2 * half, rel=0.15)


def test_a_resample_of_captions_is_the_score_of_that_corpus() -> None:
    """BLEU of drawn images from their sums equals pycocoevalcap's on the drawn captions."""
    if caption_scores.library() is None:
        pytest.skip("needs pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu

    answers = ["a cat on a mat", "two dogs run", "a red bus", "the man eats a big pizza now"]
    others = [["the cat sat on the mat", "a cat"], ["dogs run fast"], ["a red bus on a road"], ["a man eats pizza"]]
    rows = caption_scores.statistics(answers, others)
    drawn = [0, 0, 3, 2]
    found = caption_scores.figures(rows[drawn].sum(axis=0, keepdims=True))
    truth, given = {n: others[i] for n, i in enumerate(drawn)}, {n: [answers[i]] for n, i in enumerate(drawn)}
    expected = Bleu(4).compute_score(truth, given, verbose=0)[0]
    assert [float(found[f"Bleu_{n}"][0]) for n in (1, 2, 3, 4)] == pytest.approx(expected, abs=1e-12)


def test_captions_have_intervals() -> None:
    items = [Item(str(n), None, "", [f"a {'red' if n % 3 else 'blue'} thing {n % 5}"]) for n in range(30)]
    found = captions.measure(items, ["a red thing 2"] * 30, java=False).with_intervals()
    for name, (low, high) in found["intervals"].items():
        assert low <= found[name] <= high, name


def test_vqav2_against_another_result() -> None:
    human = [{"answer": "red", "answer_id": n} for n in range(10)]
    items = [
        Item(str(n), Path(f"{n // 3}.jpg"), "?", {"answers": human, "answer_type": "other", "question_type": "what"})
        for n in range(60)
    ]
    good, bad = (vqav2.measure(items, own).statistics for own in (["red"] * 60, ["red", "blue"] * 30))
    found = difference(good, bad)
    assert found["overall"]["difference"] == 50.0 and found["overall"]["interval"][0] > 30
