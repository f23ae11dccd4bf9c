"""The paper's claims against the result of a comparison: held, did not hold, or not testable here, with figures.

Scope: a table of claims, each with a function of the result document. The claims are about LLaMA-2 7B and 13B; what
another model and other data say of them is an observation there, not a replication. An ordering holds where the 95 %
interval of the difference is above 0, and does not where it stays below SMALL; an interval that has room for both
tells nothing.
Source: PAPER (Zhao et al., arXiv 2312.11420): [S] its abstract or a summary of it, [C] quoted by a later paper, [D]
derived by arithmetic. Nothing is read but the document.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from normtune.reporting.numbers import human_bytes, signed_percent

Verdict = Literal["held", "did not hold", "not testable here"]
Report = Mapping[str, Any]
Found = tuple[Verdict, str]
SMALL = 0.02  # of the other's score: less is no advantage worth the name
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
    return told(low, high, SMALL), here


def fewer_parameters(report: Report) -> Found:
    return cheaper(report, "trainable_parameters", "trainable parameters")


def less_memory(report: Report) -> Found:
    """On a GPU; elsewhere the resident memory of a process holds much that is no tensor of the training."""
    verdict, here = cheaper(report, "peak_bytes", "peak memory")
    row = strategy(report, "layernorm")
    if row is None or verdict == OPEN or "GPU" in row["cost"]["peak_of"]:
        return verdict, here
    _, kept = cheaper(report, "saved_bytes", "tensors kept for backward")
    return OPEN, f"no GPU: {row['cost']['peak_of']} was measured. {here}; {kept}"


def cheaper(report: Report, key: str, what: str) -> Found:
    """Whether `layernorm` needs less of something than `lora`."""
    rows = [strategy(report, "layernorm"), strategy(report, "lora")]
    costs = [(row or {}).get("cost") or {} for row in rows]
    if not all(cost.get(key) for cost in costs):
        return lacking("layernorm and lora")
    ours, theirs = (cost[key] for cost in costs)
    text = [human_bytes(size) if key.endswith("bytes") else f"{size:,}" for size in (ours, theirs)]
    return (
        HELD if ours < theirs else FAILED,
        f"{what} {text[0]} against {text[1]} ({signed_percent(ours / theirs - 1)})",
    )


def fits_one_gpu(report: Report) -> Found:
    return OPEN, "a comparison measures what fits; `normtune plan` predicts peaks at 7B, and what no device holds"


def simple_on_mme(report: Report) -> Found:
    rows = strategy(report, "layernorm"), strategy(report, "layernorm-simple")
    if rows[0] is None or rows[1] is None or not all(row and "mme" in row["scores"] for row in rows):
        return lacking("layernorm and layernorm-simple with mme")
    figures = [
        [number(row["scores"]["mme"]["figures"], name) for name in ("perception", "cognition")] for row in rows if row
    ]
    text = "perception / cognition {} / {} against {} / {}".format(*figures[0], *figures[1])
    verdict, here = ordered(report, [row["label"] for row in rows if row], "mme")
    return verdict, f"{text}; MME score: {here}"


def norms_and_connector(report: Report) -> Found:
    """In a table of strategies, and under each encoder of a sweep."""
    wanted = (("norms+connector", "connector+norms"), ("layernorm-simple", "norms"), ("connector",))
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in candidates(report) if report["experiment"] in ("strategies", "sweep vision") else ():
        groups.setdefault(row["factors"].get("encoder"), []).append(row)
    found = []
    for rows in groups.values():
        names = {row["factors"]["strategy"]: row["label"] for row in reversed(rows)}
        labels = [next((names[name] for name in alike if name in names), None) for alike in wanted]
        if all(labels):
            found.append(ordered(report, [label for label in labels if label]))
    if not found:
        return lacking("norms+connector, layernorm-simple and connector")
    return together([verdict for verdict, _ in found]), "; ".join(here for _, here in found)


def conversations_suffice(report: Report) -> Found:
    ours, theirs = kind(report, "conversation"), kind(report, "mixed")
    found = difference(report, ours, theirs) if ours and theirs else None
    if not ours or not theirs or found is None:
        return OPEN, "needs the kinds conversation and mixed (`--kinds conversation,...,mixed`)"
    small = SMALL * theirs["average"]["mean"]
    verdict = HELD if found[1] > -small else FAILED if found[2] < 0 else OPEN
    equal = report["request"].get("equal", "samples")
    return verdict, f"at equal {equal}: {shown(ours['label'], theirs['label'], found)}"


def details_worst(report: Report) -> Found:
    worst = kind(report, "detail")
    others = [row for row in candidates(report) if "kind" in row["factors"] and row["factors"]["kind"] != "detail"]
    if report["experiment"] != "kinds" or worst is None or not others:
        return OPEN, "needs the kind detail and others (`--kinds conversation,detail,reasoning`)"
    found = [ordered(report, [row["label"], worst["label"]]) for row in others]
    return together([verdict for verdict, _ in found]), "; ".join(here for _, here in found)


def lower_similarity(report: Report) -> Found:
    documents = analyzed(report)
    if documents is None:
        return lacking("an analysis of layernorm and of full")
    pairs = {
        tokens: [(one.get("similarity") or {}).get(tokens, {}).get("mean_cosine") for one in documents]
        for tokens in ("image", "text")
    }
    return lower(pairs, "mean cosine of {} tokens")


def lower_variance(report: Report) -> Found:
    """Of the gradients of the same gains, which both analyses hold, as a mean over the checkpoints."""
    documents = analyzed(report)
    if documents is None:
        return lacking("an analysis of layernorm and of full")
    means = []
    for one in documents:
        points = (one.get("gradients") or {}).get("checkpoints") or []
        values = [point["parts"]["norms"]["variance"] for point in points if "norms" in point["parts"]]
        means.append(sum(values) / len(values) if values else None)
    return lower({"gains": means}, "variance of the gradients of the {}")


def lower(pairs: Mapping[str, Sequence[float | None]], what: str) -> Found:
    """Whether the first figure of every pair is below the second; one run each, so without an interval."""
    there = {name: pair for name, pair in pairs.items() if None not in pair}
    if not there:
        return OPEN, "the analyses do not hold the figures"
    text = [f"{what.format(name)} {ours:.3g} against {theirs:.3g}" for name, (ours, theirs) in there.items()]
    held = all(ours < theirs for ours, theirs in there.values())  # type: ignore[operator]
    return HELD if held else FAILED, f"{'; '.join(text)} (full); one run each, no interval"


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
        verdicts.append(told(found[1], found[2], SMALL * score["mean"]))
        texts.append(shown(one, other, found))
    return together(verdicts), "; ".join(texts)


def told(low: float, high: float, small: float) -> Verdict:
    """Of an interval of an advantage; see the module."""
    return HELD if low > 0 else FAILED if high < small else OPEN


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
