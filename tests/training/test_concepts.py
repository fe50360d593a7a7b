"""Scores and verdicts of several concepts: confusion against explicit sums, and the worst outcome."""

from __future__ import annotations

import itertools

import pytest

from tests.training.clips import Bundled, random_image
from tests.training.test_verdict import CONFIG
from veneer.training.concepts.concept import Concept
from veneer.training.concepts.concept_verdict import concept_verdict, run_verdict
from veneer.training.concepts.evaluation import ConceptScores, Confusion, measure_concepts
from veneer.training.report.feature_models import from_clip
from veneer.training.report.metrics import MeanInterval, PairedMetric, measure
from veneer.training.report.previews import PreviewPair
from veneer.training.report.verdict import Verdict

TOY, CUP = Concept("<toy>", "toy"), Concept("<cup>", "cup")


def pairs(word: str, start: int) -> list[PreviewPair]:
    return [PreviewPair(f"a {word} {i % 2}", i, random_image(start + i), random_image(start + 50 + i)) for i in range(4)]


def test_scores_of_two_concepts_are_explicit_sums() -> None:
    features = from_clip(Bundled(), "tiny CLIP")
    photos = {TOY: [random_image(i) for i in range(3)], CUP: [random_image(20 + i) for i in range(2)]}
    made = {TOY: pairs("<toy>", 100), CUP: pairs("<cup>", 200)}
    unrelated = pairs("dog", 300)
    scores = {each.concept: each for each in measure_concepts(features, photos, made, unrelated)}
    words = {"<toy>": "toy", "<cup>": "cup"}
    for concept, other in ((TOY, CUP), (CUP, TOY)):
        found = scores[concept]
        assert found.metrics == measure(features, photos[concept], made[concept], unrelated, words)
        images = features.images([pair.adapted for pair in made[concept]])
        theirs, own = features.images(photos[other]), features.images(photos[concept])
        similarity = [sum(float(image @ photo) for photo in theirs) / len(theirs) for image in images]
        margin = [sum(float(image @ p) for p in own) / len(own) - s for image, s in zip(images, similarity, strict=True)]
        confusion = found.confusion[other.token]
        assert confusion.similarity.adapted.mean == pytest.approx(sum(similarity) / 4, abs=1e-6)
        assert confusion.margin.mean == pytest.approx(sum(margin) / 4, abs=1e-6)
        assert found.confusion.keys() == {other.token}
        assert found.photos == len(photos[concept])
        assert other.token in str(found)


def interval(low: float, high: float) -> MeanInterval:
    return MeanInterval((low + high) / 2, low, high, 6)


def scores(gain: tuple[float, float], margin: tuple[float, float]) -> ConceptScores:
    """Scores with a base similarity of 0 and photos of similarity 1 to one another."""
    from veneer.training.report.metrics import Metrics

    similarity = PairedMetric(interval(*gain), interval(-0.01, 0.01), interval(*gain))
    metrics = Metrics("features", similarity, similarity, None, interval(0.99, 1.01), None, None)
    return ConceptScores(TOY, 3, metrics, {"<cup>": Confusion(similarity, interval(*margin))})


@pytest.mark.parametrize(
    ("gain", "margin", "outcome"),
    [
        ((0.6, 0.8), (0.2, 0.4), "learned"),
        ((0.6, 0.8), (-0.1, 0.1), "learned"),
        ((0.6, 0.8), (-0.4, -0.2), "not_learned"),
        ((0.05, 0.15), (0.1, 0.2), "not_learned"),
    ],
)
def test_a_concept_that_looks_like_another_is_not_learned(
    gain: tuple[float, float], margin: tuple[float, float], outcome: str
) -> None:
    verdict = concept_verdict(scores(gain, margin), CONFIG)
    assert verdict.outcome == outcome
    assert ("<cup>" in verdict.summary) == (margin[1] < 0)
    assert any("<cup>" in reason for reason in verdict.reasons)


def test_the_verdict_of_a_run_is_the_worst_and_names_each_concept() -> None:
    verdicts = {"<toy>": Verdict("learned", "Good.", ("x",), ("a",)), "<cup>": Verdict("partly", "Half.", ("y",), ("a", "b"))}
    verdict = run_verdict(verdicts)
    assert verdict.outcome == "partly"
    assert verdict.reasons == ("<toy>: x", "<cup>: y")
    assert verdict.advice == ("a", "b")
    assert all(text in verdict.summary for text in ("<toy>: learned. Good.", "<cup>: partly learned. Half."))
    order = ["not_learned", "overfitted", "unknown", "partly", "learned"]
    for worse, better in itertools.pairwise(order):
        assert run_verdict({"a": Verdict(better, ""), "b": Verdict(worse, "")}).outcome == worse  # type: ignore[arg-type]
