"""Scores of generated text against reference answers: ROUGE-L and exact match.

The numbers are those of the published evaluation: ROUGE-L F1 with Porter stemming, the best of
several references, mean over requests times 100.
"""

import functools
import string
from collections.abc import Sequence
from typing import Any

# The scores of `text_scores` with their headings in the table of an evaluation.
COLUMNS = {"rougeL": "ROUGE-L", "exact_match": "exact match"}
_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 of a prediction, the highest over its references, in [0, 1].

    Tokens are the runs of [a-z0-9] of the lower-cased text, Porter-stemmed; text without any such
    token scores 0, even against itself. Source: Lin 2004, as in the rouge_score library.

    Raises:
      TypeError: if `references` is one string instead of a sequence of strings.
      ValueError: if there is no reference.
    """
    _check_references(references)
    scorer = _scorer()
    return max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in references)


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether a prediction equals one of its references after normalisation.

    Both sides are lower-cased, lose their ASCII punctuation and get every run of Unicode whitespace
    replaced by one space. Raises as `rouge_l` does.
    """
    _check_references(references)
    return any(_normalise(prediction) == _normalise(reference) for reference in references)


def text_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Mean ROUGE-L and exact match over requests, both in 0..100, rounded to 4 digits.

    Args:
      predictions: one response per request.
      references: the acceptable answers of each request.

    Returns:
      {"rougeL": ..., "exact_match": ...}

    Raises:
      ValueError: if the lists differ in length or are empty.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} lists of references: "
            "give one list of references per prediction"
        )
    pairs = list(zip(predictions, references))
    if not pairs:
        raise ValueError("no pair of prediction and references to score")
    return {
        "rougeL": _percent([rouge_l(*pair) for pair in pairs]),
        "exact_match": _percent([exact_match(*pair) for pair in pairs]),
    }


def response_statistics(
    responses: Sequence[Sequence[int]], eos_ids: Sequence[int]
) -> dict[str, float]:
    """What responses are like, whatever they say.

    Args:
      responses: token ids, an EOS included where the response ended with one.

    Returns:
      `response_length`: mean tokens; `eos_rate`: the share that ended by an EOS rather than by the
      limit; `repetition`: the mean share of a response's 4-grams that it has written before.
    """
    ended = [bool(len(response)) and int(response[-1]) in eos_ids for response in responses]
    return {
        "response_length": sum(map(len, responses)) / len(responses),
        "eos_rate": sum(ended) / len(responses),
        "repetition": sum(map(_repetition, responses)) / len(responses),
    }


def _repetition(tokens: Sequence[int], n: int = 4) -> float:
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@functools.cache
def _scorer() -> Any:
    from rouge_score import rouge_scorer  # takes seconds: it imports NLTK, which imports SciPy

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def _check_references(references: Sequence[str]) -> None:
    if isinstance(references, str):
        raise TypeError(f"references must be a sequence of strings, not the string {references!r}")
    if not references:
        raise ValueError("no reference to score against: give at least one string")


def _normalise(text: str) -> str:
    return " ".join(text.lower().translate(_DELETE_PUNCTUATION).split())


def _percent(scores: Sequence[float]) -> float:
    return round(100.0 * sum(scores) / len(scores), 4)
