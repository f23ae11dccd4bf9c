"""The paper's claims against the result of a comparison: held, did not hold, or not testable here, with figures.

Scope: a table of claims, each with a function of the result document. The claims are about LLaMA-2 7B and 13B; what
another model and other data say of them is an observation there, not a replication. An ordering holds where the 95 %
interval of the difference is above 0, and does not where it stays below SMALL; an interval that has room for both
tells nothing. Figures of one run each have no interval: they have to be SMALL apart. docs/comparison.md has the rules.
Source: PAPER (Zhao et al., arXiv 2312.11420): [S] its abstract or a summary of it, [C] quoted by a later paper, [D]
derived by arithmetic. Nothing is read but the document.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from normtune.reporting.numbers import human_bytes, signed_percent

Verdict = Literal["held", "did not hold", "not testable here"]
Report = Mapping[str, Any]
Found = tuple[Verdict, str]
Figure = tuple[float | None, str]  # and what is said of it
SMALL = 0.02  # of the other's score: less is no advantage worth the name
MUCH_MORE = 2  # times the samples
HELD: Verdict = "held"
FAILED: Verdict = "did not hold"
OPEN: Verdict = "not testable here"


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, its figure there, how we know of it, and what a result says about it."""

    claim: str
    paper: str
    source: str
    judge: Callable[[Report], Found]


def claims(report: Report) -> list[dict[str, str]]:
    """Every claim with {"claim", "paper", "source", "verdict", "here"}, in the paper's order."""
    found = []
    for one in CLAIMS:
        verdict, here = one.judge(report)
        found.append({"claim": one.claim, "paper": one.paper, "source": one.source, "verdict": verdict, "here": here})
    return found


def beats_lora(report: Report) -> Found:
    ours, theirs = strategy(report, "layernorm"), strategy(report, "lora")
    if ours is None or theirs is None:
        return lacking("layernorm and lora")
    relative = ours["relative"].get(theirs["label"])
    if relative is None:
        return OPEN, "lora scores 0 in every task, so there is no ratio"
    low, high = relative["interval"]
    span = f"{signed_percent(low)} to {signed_percent(high)}"
    here = f"average of the tasks relative to lora {signed_percent(relative['mean'])} ({span})"
    if relative.get("tasks"):
        return OPEN, f"{here}, of {', '.join(relative['tasks'])} alone: lora scores 0 elsewhere"
    return told(low, high, SMALL), here + slight(low, high, SMALL)


def fewer_parameters(report: Report) -> Found:
    """A matter of arithmetic, on which no run has a say."""
    verdict, here = cheaper(report, "trainable_parameters", "trainable parameters")
    if verdict == OPEN:
        return verdict, here
    stages = (yaml.safe_load(report.get("recipe") or "") or {}).get("stages")
    rank = f"; LoRA of rank {stages[-1]['lora']['rank']}" if stages else ""
    return verdict, f"{here}; counted, not measured{rank}"


def less_memory(report: Report) -> Found:
    """On a GPU; elsewhere the resident memory of a process holds much that is no tensor of the training."""
    verdict, here = cheaper(report, "peak_bytes", "peak memory", SMALL)
    row = strategy(report, "layernorm")
    if row is None or (verdict, here) == lacking("layernorm and lora") or "GPU" in row["cost"]["peak_of"]:
        return verdict, here
    _, kept = cheaper(report, "saved_bytes", "tensors kept for backward")
    return OPEN, f"no GPU: {row['cost']['peak_of']} was measured. {here}; {kept}"


def cheaper(report: Report, key: str, what: str, margin: float = 0.0) -> Found:
    """Whether `layernorm` needs less of something than `lora`, by `margin` at least."""
    rows = [strategy(report, "layernorm"), strategy(report, "lora")]
    costs = [(row or {}).get("cost") or {} for row in rows]
    if not all(cost.get(key) for cost in costs):
        return lacking("layernorm and lora")
    ours, theirs = (cost[key] for cost in costs)
    text = [human_bytes(size) if key.endswith("bytes") else f"{size:,}" for size in (ours, theirs)]
    here = f"{what} {text[0]} against {text[1]} ({signed_percent(ours / theirs - 1)})"
    if margin and not apart(ours, theirs, margin):
        return OPEN, f"{here}, within {100 * margin:.0f} %"
    return HELD if ours < theirs else FAILED, here


def fits_one_gpu(report: Report) -> Found:
    return OPEN, "a comparison measures what fits; `normtune plan` predicts peaks at 7B, and what no device holds"


def simple_on_mme(report: Report) -> Found:
    """Paired differences are there of the headline alone; of the paper's two figures there are the means."""
    rows = [row for row in (strategy(report, name) for name in ("layernorm", "layernorm-simple")) if row]
    if len(rows) < 2 or not all("mme" in row["scores"] for row in rows):
        return lacking("layernorm and layernorm-simple with mme")
    ours, theirs = (row["scores"]["mme"]["figures"] for row in rows)
    verdict, headline = ordered(report, [row["label"] for row in rows], "mme")
    names = ("perception", "cognition")
    pairs = [" / ".join(number(figures, name) for name in names) for figures in (ours, theirs)]
    here = f"perception / cognition {pairs[0]} against {pairs[1]}; MME accuracy, paired: {headline}"
    missing = [name for name in names if name not in ours or name not in theirs]
    if missing:
        return OPEN, f"{here}; {' and '.join(missing)} not asked"
    above = all(ours[name]["mean"] > theirs[name]["mean"] for name in names)
    here += "; by the means of both figures and the paired difference of the accuracy"
    return verdict if above == (verdict == HELD) else OPEN, here


def norms_and_connector(report: Report) -> Found:
    """In a table of strategies, and under each encoder of a sweep: every pair of the three that is there."""
    wanted = (("norms+connector", "connector+norms"), ("layernorm-simple", "norms"), ("connector",))
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in candidates(report) if report["experiment"] in ("strategies", "sweep vision") else ():
        groups.setdefault(row["factors"].get("encoder"), []).append(row)
    found, whole = [], True
    for rows in groups.values():
        names = {row["factors"]["strategy"]: row["label"] for row in reversed(rows)}
        labels = [next((names[name] for name in alike if name in names), None) for alike in wanted]
        whole = whole and all(labels)
        pairs = itertools.combinations([label for label in labels if label], 2)
        found += [ordered(report, pair) for pair in pairs]
    if not found:
        return lacking("norms+connector, layernorm-simple and connector")
    verdict, here = together([verdict for verdict, _ in found]), "; ".join(here for _, here in found)
    if verdict == FAILED or whole:
        return verdict, here
    return OPEN, f"{here}; needs norms+connector, layernorm-simple and connector"


def conversations_suffice(report: Report) -> Found:
    """The claim is about four times the samples: a match at equal samples says nothing of it."""
    ours, theirs = kind(report, "conversation"), kind(report, "mixed")
    found = difference(report, ours, theirs) if ours and theirs else None
    if not ours or not theirs or found is None:
        return OPEN, "needs the kinds conversation and mixed (`--kinds conversation,...,mixed`)"
    small = SMALL * theirs["average"]["mean"]
    verdict = HELD if found[1] > -small else FAILED if found[2] < 0 else OPEN
    samples = [row["factors"].get("samples") or 0 for row in (ours, theirs)]
    here = f"{samples[0]:,} samples against {samples[1]:,}: {shown(ours['label'], theirs['label'], found)}"
    if verdict == HELD and not 0 < MUCH_MORE * samples[0] <= samples[1]:
        return OPEN, f"{here}; a match needs mixed to have {MUCH_MORE} times the samples or more"
    return verdict, here


def details_worst(report: Report) -> Found:
    worst = kind(report, "detail")
    others = [row for row in candidates(report) if "kind" in row["factors"] and row["factors"]["kind"] != "detail"]
    if report["experiment"] != "kinds" or worst is None or not others:
        return OPEN, "needs the kind detail and others (`--kinds conversation,detail,reasoning`)"
    found = [ordered(report, [row["label"], worst["label"]]) for row in others]
    verdict, here = together([verdict for verdict, _ in found]), "; ".join(here for _, here in found)
    missing = [name for name in ("conversation", "reasoning") if kind(report, name) is None]
    if verdict == HELD and missing:
        return OPEN, f"{here}; needs the kind {' and '.join(missing)} as well"
    return verdict, here


def lower_similarity(report: Report) -> Found:
    documents = analyzed(report)
    if documents is None:
        return lacking("an analysis of layernorm and of full")
    pairs = {
        f"mean cosine of {tokens} tokens": [
            ((one.get("similarity") or {}).get(tokens, {}).get("mean_cosine"), "") for one in documents
        ]
        for tokens in ("image", "text")
    }
    return lower(pairs)


def lower_variance(report: Report) -> Found:
    """Of the gradients of the same gains, which both analyses hold, at the last checkpoint: at the first one all rows
    are the same model."""
    documents = analyzed(report)
    if documents is None:
        return lacking("an analysis of layernorm and of full")
    pair: list[Figure] = []
    for one in documents:
        points = (one.get("gradients") or {}).get("checkpoints") or [{}]
        gains = points[-1].get("parts", {}).get("norms", {})
        noise = gains.get("share")
        said = "" if noise is None else f" ({100 * noise:.0f} % noise)"
        pair.append((gains.get("variance"), said))
    return lower({"variance of the gradients of the gains at the last checkpoint": pair})


def lower(pairs: Mapping[str, Sequence[Figure]]) -> Found:
    """Whether the first of every pair of figures, each with a remark, is below the second; one run each, so without an
    interval."""
    texts, signs = [], []
    for what, ((ours, noted), (theirs, remarked)) in pairs.items():
        if ours is not None and theirs is not None:
            texts.append(f"{what} {ours:.3g}{noted} against {theirs:.3g}{remarked}")
            signs.append(apart(ours, theirs))
    if not texts:
        return OPEN, "the analyses do not hold the figures"
    here = f"{'; '.join(texts)} (full); one run each"
    if 0 in signs:
        return OPEN, f"{here}, within {100 * SMALL:.0f} %"
    if len(set(signs)) > 1:
        return OPEN, f"{here}, and they do not agree"
    return HELD if signs[0] < 0 else FAILED, f"{here}, no interval"


def apart(ours: float, theirs: float, margin: float = SMALL) -> int:
    """-1 or 1: ours is lower or higher by `margin` of theirs at least; 0: neither."""
    gap = ours - theirs
    return 0 if gap == 0 or abs(gap) < margin * abs(theirs) else 1 if gap > 0 else -1


def strategy(report: Report, name: str) -> Mapping[str, Any] | None:
    """The first row of a strategy in a table of strategies."""
    if report["experiment"] != "strategies":
        return None
    return next((row for row in scored(report) if row["factors"].get("strategy") == name), None)


def kind(report: Report, name: str) -> Mapping[str, Any] | None:
    """The first row of a kind in a table of kinds."""
    if report["experiment"] != "kinds":
        return None
    return next((row for row in scored(report) if row["factors"].get("kind") == name), None)


def scored(report: Report) -> list[Mapping[str, Any]]:
    """Rows that were asked with their images, and have all scores."""
    return [row for row in report["rows"] if row["baseline"] == "none" and row["average"]]


def candidates(report: Report) -> list[Mapping[str, Any]]:
    """The rows that train; `connector` may be a control."""
    return [row for row in scored(report) if row["factors"].get("strategy") != "none"]


def analyzed(report: Report) -> list[Mapping[str, Any]] | None:
    """The analyses of `layernorm` and `full`."""
    rows = [strategy(report, name) for name in ("layernorm", "full")]
    found = [(report.get("analysis") or {}).get(row["label"]) for row in rows if row]
    return [one for one in found if one] if len(found) == 2 and all(found) else None


def lacking(what: str) -> Found:
    return OPEN, f"needs {what} in a table of strategies"


def difference(report: Report, ours: Mapping[str, Any], theirs: Mapping[str, Any], name: str = "average") -> Any:
    """(mean, low, high) of ours - theirs, paired; None where the document does not hold it."""
    for one, other, sign in ((ours, theirs, 1), (theirs, ours, -1)):
        found = (one.get("differences") or {}).get(other["label"], {}).get(name)
        if found is not None:
            low, high = sorted(sign * end for end in found["interval"])
            return sign * found["mean"], low, high
    return None


def ordered(report: Report, labels: Sequence[str], name: str = "average") -> Found:
    """Whether each row is better than the next one."""
    rows = {row["label"]: row for row in scored(report)}
    verdicts, texts = [], []
    for one, other in itertools.pairwise(labels):
        found = difference(report, rows[one], rows[other], name)
        if found is None:
            return OPEN, "the document holds no paired differences of these rows"
        score = rows[other]["average"] if name == "average" else rows[other]["scores"][name]
        small = SMALL * score["mean"]
        verdicts.append(told(found[1], found[2], small))
        texts.append(shown(one, other, found) + slight(found[1], found[2], small))
    return together(verdicts), "; ".join(texts)


def told(low: float, high: float, small: float) -> Verdict:
    """Of an interval of an advantage; see the module."""
    return HELD if low > 0 else FAILED if high < small else OPEN


def slight(low: float, high: float, small: float) -> str:
    """Said of an advantage that is certain and small."""
    return f" (held, but below {100 * SMALL:.0f} %)" if low > 0 and high < small else ""


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """Of several that all have to hold."""
    return FAILED if FAILED in verdicts else OPEN if OPEN in verdicts else HELD


def shown(one: str, other: str, found: tuple[float, float, float]) -> str:
    return f"{one} against {other} {100 * found[0]:+.1f} points ({100 * found[1]:+.1f} to {100 * found[2]:+.1f})"


def number(figures: Mapping[str, Any], name: str) -> str:
    return f"{figures[name]['mean']:.1f}" if name in figures else "-"


CLAIMS = (
    Claim("LayerNorm tuning beats LoRA (13B, average of five tasks)", "+20 %", "[S]", beats_lora),
    Claim("LayerNorm tuning trains fewer parameters than LoRA (13B)", "-41.9 %", "[S, D]", fewer_parameters),
    Claim("LayerNorm tuning needs less GPU memory than LoRA (13B)", "-17.6 %", "[S]", less_memory),
    Claim(
        "LayerNorm tuning of 7B fits one GPU; full and attention-MLP tuning run out of memory in the same setting",
        "24.2 GB",
        "[C]",
        fits_one_gpu,
    ),
    Claim(
        "LayerNorm is above LayerNorm-simple on MME, perception / cognition (LLaMA-2-chat-13B)",
        "929.3 / 254.3 against 824.3 / 221.1",
        "[C]",
        simple_on_mme,
    ),
    Claim(
        "Norms + connector are better than norms alone, and these than the connector alone",
        "ordering",
        "[C]",
        norms_and_connector,
    ),
    Claim("20K conversations match or beat 80K of everything", "ordering", "[C]", conversations_suffice),
    Claim("Detailed descriptions alone are the worst kind of data", "ordering", "[C]", details_worst),
    Claim(
        "Layers are less alike (mean cosine) after LayerNorm tuning than after full finetuning",
        "ordering",
        "[C]",
        lower_similarity,
    ),
    Claim("Gradients vary less under LayerNorm tuning", "ordering", "[S]", lower_variance),
)
