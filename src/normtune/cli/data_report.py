"""What `normtune data check` prints and shows: faults with their first offenders, lengths, samples token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from normtune.cli.output import cell, print_table
from normtune.data.checking import Checker, Shown
from normtune.data.findings import Findings, judge
from normtune.reporting import Block, Bullets, Card, Document, Heading, Note, Table, Text, Tokens

BAR = 40  # characters of the longest bar of a histogram


def print_findings(found: Sequence[Findings], most: int | float) -> None:
    """Tables for people: totals, what was found, the first of each kind, and the histogram of lengths."""
    print_table(HEADER, [totals(one) for one in found])
    for one in found:
        if one.faults or one.notes or one.unreadable:
            print_table(["found in " + one.stage, "samples", "the first of them"], list(kinds(one)))
        print_table(["tokens", "samples", ""], histogram(one), f"{one.stage}: lengths before cutting")
    for one in found:
        print(summary(one))
    print(verdict(found, most))


HEADER = ["stage", "samples", "bad", "images", "tokens", "supervised", "longest", "limit"]


def totals(one: Findings) -> list[Any]:
    return [one.stage, one.entries, one.bad, one.images, one.tokens, one.supervised, one.longest, one.max_length]


def kinds(one: Findings) -> Iterator[list[Any]]:
    """A row for each kind: bad ones first, the most frequent first; then the other samples of it, a row each."""
    for what, why in one.unreadable:
        yield ["UNREADABLE", "", f"{what}: {brief(why)}"]
    for counts, mark in ((one.faults, "bad: "), (one.notes, "")):
        for kind, number in counts.most_common():
            for place, (where, why) in enumerate(one.first[kind]):
                yield [mark + kind if place == 0 else "", number if place == 0 else "", f"{where}: {brief(why)}"]


def brief(why: str) -> str:
    return why.partition("\n")[0]


def histogram(one: Findings) -> list[list[Any]]:
    if not one.lengths:
        return []
    highest = max(one.lengths.values())
    tops = [1 << n for n in range(min(one.lengths).bit_length() - 1, max(one.lengths).bit_length())]
    return [[f"{top // 2 + 1}-{top}", one.lengths[top], "#" * -(-BAR * one.lengths[top] // highest)] for top in tops]


def verdict(found: Sequence[Findings], most: int | float) -> str:
    bad, entries = len({where for one in found for where in one.named}), sum(one.entries for one in found)
    judged = judge(found, most)
    return f"{bad:,} of {entries:,} samples are bad, {allowed(most)} allowed" + (f"; {judged}" if judged else "")


def summary(one: Findings) -> str:
    cut = one.cut
    lines = [f"{one.stage}: {one.bad:,} of {one.entries:,} samples are bad"]
    if cut["samples"]:
        lines.append(
            f"{one.stage}: {cut['samples']:,} samples are longer than {one.max_length:,} tokens and lose "
            f"{cut['tokens']:,} tokens, {cut['turns']:,} turns and {cut['images']:,} images; no image is cut in two"
        )
    return "\n".join(lines)


def allowed(most: int | float) -> str:
    return f"{most:,}" if isinstance(most, int) else f"{100 * most:g} %"


def page(name: str, found: Sequence[Findings], checker: Checker, most: int | float) -> Document:
    """The same as a page, with samples as the loss sees them."""
    judged = verdict(found, most)
    blocks: list[Block] = [Note(judged) if judge(found, most) else Text(judged)]
    blocks.append(Table(HEADER, [texts(totals(one)) for one in found]))
    for one in found:
        blocks.append(Heading(one.stage))
        blocks.append(Text(summary(one)))
        rows = [texts(row) for row in kinds(one)]
        if rows:
            blocks.append(Table(["found", "samples", "the first of them"], rows, stacked=True))
        lengths = [texts(row) for row in histogram(one)]
        blocks.append(Table(["tokens", "samples", ""], lengths, "Tokens of a sample before anything is cut."))
        if checker.examples[one.stage]:
            blocks.append(Heading(f"{one.stage}, token by token"))
            blocks.append(Text("What the loss counts is coloured and underlined; the rest is only read."))
        for shown in checker.examples[one.stage]:
            blocks.append(Card("", shown.sample.where, [about(shown), Tokens(list(pieces(checker, shown)))]))
    return Document(f"Data of {name}", blocks, "Every sample and every image that the recipe's stages name.")


def texts(row: Sequence[Any]) -> list[str]:
    return [cell(value) for value in row]


def about(shown: Shown) -> Bullets:
    encoded = shown.encoded
    lines = [f"{len(encoded.input_ids):,} tokens, {sum(encoded.supervised):,} of them supervised"]
    lines += [f"image {path}" for path in shown.sample.images[: encoded.images]]
    if encoded.cut_turns or encoded.cut_tokens:
        lines.append(f"cut: {encoded.cut_turns} turns, {encoded.cut_tokens} tokens of an answer")
    return Bullets(lines)


def pieces(checker: Checker, shown: Shown) -> Iterator[tuple[str, bool]]:
    """Each token's text and whether the loss counts it; an image's tokens as one piece."""
    tokenizer, encoded = checker.collator.chat.tokenizer, shown.encoded
    image = checker.collator.chat.image_token
    marked = zip(encoded.input_ids, encoded.supervised, strict=True)
    for token, run in groupby(marked, key=lambda pair: pair[0]):
        several = list(run)
        text = tokenizer.decode([token], skip_special_tokens=False)
        if text == image:
            yield f"{text} x {len(several)} ", False
        else:
            yield from ((text, counted) for _, counted in several)
