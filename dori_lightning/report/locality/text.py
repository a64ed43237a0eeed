"""What a locality run says, question by question: sentences made of its numbers, and captions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from dori_lightning.report.locality.layer_text import (
    activation_answer,
    method_answer,
    weight_answer,
    weight_sentence,
)
from dori_lightning.report.locality.words import (
    START_WORDS,
    Answer,
    estimate_words,
    no_answer,
    rate_words,
)
from dori_lightning.report.summary import budget_words, number_words, percent_words

if TYPE_CHECKING:
    from dori_lightning.locality.embeddings import EmbeddingFindings, Spread
    from dori_lightning.locality.estimates import Rate
    from dori_lightning.locality.large import AtLarge
    from dori_lightning.report.locality.record import LocalityReport

__all__ = ["answers", "verdict"]


def answers(report: LocalityReport) -> tuple[Answer, ...]:
    """Answer the questions that were asked, in the order of the page."""
    found: list[Answer] = []
    if report.at_large is not None:
        found.append(_budget(report, report.at_large))
    if report.embeddings is not None:
        found += [_spread(report, report.embeddings), _map(report.embeddings)]
    if report.activations is not None:
        found.append(activation_answer(report.activations))
    if report.weights is not None:
        found += [weight_answer(report.weights), method_answer(report.weights)]
    if report.at_large is not None:
        found += [_lines(report, report.at_large), _transfer(report, report.at_large)]
    return tuple(found)


def _budget(report: LocalityReport, found: AtLarge) -> Answer:
    steps = report.budget.steps

    def at(held: Literal["memorized", "control"], start: str) -> str:
        rate = next(
            (p.rate for p in found.budget if (p.held, p.start, p.steps) == (held, start, steps)),
            None,
        )
        return rate_words(rate) if rate else "not attacked"

    others = [
        f"from {START_WORDS[start]} {at('memorized', start)}"
        for start in dict.fromkeys(point.start for point in found.budget)
        if start != report.start
    ]
    text = (
        f"After {budget_words(report.budget)}, {at('memorized', report.start)} attacks from "
        f"{START_WORDS[report.start]} draw their image"
        f"{'; ' + ', '.join(others) if others else ''}. Control images, which the checkpoint does "
        f"not hold: {at('control', report.start)}."
    )
    return Answer(
        "budget",
        "How often does an arbitrary embedding become a trigger?",
        text,
        f"Share of attacks from {START_WORDS[report.start]} whose pictures show their image, "
        f"against the attack's steps, on the model that is attacked ({report.mitigation}). Bands "
        f"are 95 % Wilson intervals over attacks. Controls must stay at 0, or the attack paints.",
    )


def _spread(report: LocalityReport, found: EmbeddingFindings) -> Answer:
    ends, begun = _spread_of(found, "triggers", report), _spread_of(found, "starts", report)
    if ends is None or begun is None:
        return no_answer("spread", "Do triggers of one image lie together?")
    move = next(m for m in found.moves if (m.held, m.start) == ("memorized", report.start))
    control = next(
        (m for m in found.moves if (m.held, m.start) == ("control", report.start)), None
    )
    nearest = {
        n.what: n for n in found.nearest if n.start == report.start and n.measure == "cosine"
    }
    text = (
        f"Triggers found from {START_WORDS[report.start]} are "
        f"{estimate_words(ends.distance, 1)} apart, their starts "
        f"{estimate_words(begun.distance, 1)}"
        f"{_expected(found) if report.start == 'random' else ''}. "
        f"{_same(ends, begun)}The attack moves an embedding by "
        f"{estimate_words(move.displacement, 1)}"
        f"{f', {percent_words(move.share)} of the distance of two starts' if move.share else ''}"
        f"{_own_start(move.own_start)}. Do these moves have a common direction? Their mean cosine "
        f"is {estimate_words(move.cosine)} within an image and "
        f"{estimate_words(move.cosine_between)} between images"
        f"{f'; on control images {estimate_words(control.cosine)}' if control else ''}."
    )
    if "triggers" in nearest:
        own = nearest["triggers"]
        text += (
            f" By cosine, the image's own prompt is the nearest of all prompts for "
            f"{rate_words(own.own)}, by chance {percent_words(own.chance)}"
        )
        if "starts" in nearest:
            text += f", before the attack {rate_words(nearest['starts'].own)}"
        text += "."
    return Answer(
        "spread",
        "Do triggers of one image lie together?",
        text,
        "Left: mean distance of two embeddings; middle: mean cosine; right: mean cosine of two "
        "moves (end minus start). Bars are 95 % bootstrap intervals over images and embeddings. "
        "The starts are the control: what triggers share with them is no finding.",
    )


def _spread_of(
    found: EmbeddingFindings, group: Literal["triggers", "starts"], report: LocalityReport
) -> Spread | None:
    return next((s for s in found.spreads if (s.group, s.start) == (group, report.start)), None)


def _same(ends: Spread, begun: Spread) -> str:
    """What it means that ends are as far apart as starts, where they are."""
    if begun.distance.value == 0 or abs(ends.distance.value / begun.distance.value - 1) > 0.1:
        return ""
    return "So these distances tell where the searches began, not where the image is. "


def _expected(found: EmbeddingFindings) -> str:
    return f" (independent normal embeddings: {found.random_distance:.1f})"


def _own_start(rate: Rate | None) -> str:
    return f", and {rate_words(rate)} ends are still nearest to their own start" if rate else ""


def _map(found: EmbeddingFindings) -> Answer:
    starts = sum(place.what == "start" for place in found.places)
    return Answer(
        "map",
        "What does that look like?",
        f"{number_words(starts, 'trigger')} with the starts they were found from, among "
        f"{sum('prompt' in place.what for place in found.places)} prompts.",
        "All embeddings in two dimensions: principal components (left), t-SNE (right). Small open "
        "marks are starts, filled ones of the same colour the triggers found from there; the star "
        "is the image's own prompt. Distances between clusters mean little in t-SNE.",
    )


def _lines(report: LocalityReport, found: AtLarge) -> Answer:
    question = "Does the middle between two triggers trigger?"
    middle = {
        point.toward: point for point in sorted(found.lines, key=lambda p: -abs(p.place - 0.5))
    }
    if "same_image" not in middle:
        return no_answer("lines", question)
    own = middle["same_image"]
    text = (
        f"{percent_words(own.place)} of the way from one trigger of an image to another, "
        f"{rate_words(own.rate)} embeddings draw it"
    )
    for toward, words in (
        ("other_image", "towards a trigger of another image"),
        ("random", "towards a random embedding"),
    ):
        if toward in middle:
            text += f"; {words} {rate_words(middle[toward].rate)}"
    return Answer(
        "lines",
        question,
        text + ".",
        f"Share of embeddings on straight lines that draw the image of the line's beginning, on "
        f"the model that was attacked ({report.mitigation}). Lines towards another image's "
        f"trigger and towards a random embedding are the controls: they tell how much of a "
        f"trigger may be lost before it stops working. Bands are 95 % Wilson intervals.",
    )


def _transfer(report: LocalityReport, found: AtLarge) -> Answer:
    question = "Do triggers work on other models?"
    if not found.transfers:
        return no_answer("transfer", question)
    sentences = []
    for model in dict.fromkeys(t.model for t in found.transfers):
        rows = {(t.held, t.start): t.rate for t in found.transfers if t.model == model}
        searched = model == report.mitigation
        name = "the checkpoint as it is" if model == "none" else model
        if ("memorized", report.start) not in rows:
            return no_answer("transfer", question)
        sentences.append(
            f"{name}{' (searched)' if searched else ''}: triggers "
            f"{rate_words(rows['memorized', report.start])}, prompts "
            f"{rate_words(rows['memorized', 'prompt_itself'])}"
        )
    return Answer(
        "transfer",
        question,
        f"Triggers found on {report.mitigation} from {START_WORDS[report.start]}. "
        + "; ".join(sentences)
        + ".",
        "Share of working triggers that draw their image on each model, by where their search "
        "began, beside the unattacked prompt. Open marks: attacks on control images. Bars are "
        "95 % Wilson intervals over triggers.",
    )


def verdict(report: LocalityReport) -> str:
    """What a reader should take away: a line for each of the questions asked."""
    sentences = []
    if report.at_large is not None:
        sentences.append(_budget(report, report.at_large).text)
    if report.embeddings is not None:
        ends = _spread_of(report.embeddings, "triggers", report)
        begun = _spread_of(report.embeddings, "starts", report)
        if ends is not None and begun is not None:
            sentences.append(
                f"Triggers of one image are {estimate_words(ends.distance, 1)} apart, their "
                f"starts {estimate_words(begun.distance, 1)}."
            )
    if report.weights is not None:
        sentences.append(weight_sentence(report.weights))
    return "\n".join(sentence for sentence in sentences if sentence)
