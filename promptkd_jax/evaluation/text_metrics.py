"""Scores of generated text against reference answers: ROUGE-L, chrF and exact match.

ROUGE-L and exact match are those of the published evaluation: ROUGE-L F1 with Porter stemming, the
best of several references, mean over requests times 100. For text of other scripts ROUGE-L has a
second tokenizer; chrF, on characters, needs none.
"""

import functools
import itertools
import string
import unicodedata
from collections.abc import Sequence
from typing import Any

import regex

ROUGE_TOKENIZERS = {
    "published": "runs of a-z and 0-9, stemmed: for English, as in the published evaluation",
    "unicode": "words of letters and digits of any script, characters where it writes no spaces",
}
_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)


def rouge_l(prediction: str, references: Sequence[str], tokenizer: str = "published") -> float:
    """ROUGE-L F1 of a prediction, the highest over its references, in [0, 1].

    Text without any token scores 0, even against itself: see `without_tokens`. Source: Lin 2004, as
    in the rouge_score library.

    Args:
      tokenizer: key of `ROUGE_TOKENIZERS`. The published tokens are the runs of [a-z0-9] of the
        lower-cased text, Porter-stemmed. Those of "unicode" are the words, runs of letters, marks
        and digits, of the text in Unicode's NFKC form and case-folded; where a script writes no
        spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese), each character with its marks.

    Raises:
      TypeError: if `references` is one string instead of a sequence of strings.
      ValueError: if there is no reference.
    """
    _check_references(references)
    scorer = _scorer(tokenizer)
    return max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in references)


def without_tokens(references: Sequence[Sequence[str]], tokenizer: str) -> list[int]:
    """The indices of the requests none of whose references has a token: their ROUGE-L is 0."""
    split = _tokenizer(tokenizer).tokenize
    return [i for i, each in enumerate(references) if not any(map(split, each))]


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether a prediction equals one of its references after normalisation.

    Both sides are lower-cased, lose their ASCII punctuation and get every run of Unicode whitespace
    replaced by one space. Raises as `rouge_l` does.
    """
    _check_references(references)
    return any(_normalise(prediction) == _normalise(reference) for reference in references)


def text_scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    rouge_tokenizer: str = "published",
) -> dict[str, float]:
    """Scores of all requests in 0..100, rounded to 4 digits.

    Args:
      predictions: one response per request.
      references: the acceptable answers of each request.
      rouge_tokenizer: key of `ROUGE_TOKENIZERS`.

    Returns:
      {"rougeL": …, "exact_match": …}, means over the requests, and {"chrF": …}, that of the corpus:
      the F2 score of character 6-grams down to single ones (Popović 2015, as in sacrebleu).

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
        "rougeL": _percent([rouge_l(*pair, rouge_tokenizer) for pair in pairs]),
        "chrF": _chrf(predictions, references),
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
def _scorer(tokenizer: str) -> Any:
    from rouge_score import rouge_scorer  # takes seconds: it imports NLTK, which imports SciPy

    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=_tokenizer(tokenizer))


@functools.cache
def _tokenizer(name: str) -> Any:
    from rouge_score import tokenizers

    return {"published": tokenizers.DefaultTokenizer(use_stemmer=True), "unicode": _Unicode()}[name]


class _Unicode:
    """Splits text of any script, see `rouge_l`; has the interface of rouge_score's tokenizers."""

    _SPACELESS = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
    _TOKEN = regex.compile(rf"{_SPACELESS}\p{{M}}*|(?:(?!{_SPACELESS})[\p{{L}}\p{{M}}\p{{N}}])+")

    def tokenize(self, text: str) -> list[str]:
        return self._TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


def _chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    from sacrebleu.metrics import CHRF

    for each in references:
        _check_references(each)
    # Its lists are of the first references of all requests, of the second, …, None where there is
    # none.
    by_number = [list(column) for column in itertools.zip_longest(*references)]
    return round(CHRF().corpus_score(list(predictions), by_number).score, 4)


def _check_references(references: Sequence[str]) -> None:
    if isinstance(references, str):
        raise TypeError(f"references must be a sequence of strings, not the string {references!r}")
    if not references:
        raise ValueError("no reference to score against: give at least one string")


def _normalise(text: str) -> str:
    return " ".join(text.lower().translate(_DELETE_PUNCTUATION).split())


def _percent(scores: Sequence[float]) -> float:
    return round(100.0 * sum(scores) / len(scores), 4)
