"""ROUGE-L and exact match: facts of the two scores, and every golden case of the published code."""

import pytest
from conftest import golden_cases

from promptkd_jax.evaluation.text_metrics import (
    exact_match,
    rouge_l,
    text_scores,
    without_tokens,
)

on_golden_cases = pytest.mark.parametrize("folder, golden", golden_cases("rouge_unit"))


def lists(case):
    predictions = [pair["prediction"] for pair in case["pairs"]]
    return predictions, [pair["references"] for pair in case["pairs"]]


@on_golden_cases
def test_golden_pairs(folder, golden):
    for pair in golden["pairs"]:
        prediction, references = pair["prediction"], pair["references"]
        assert rouge_l(prediction, references) == pytest.approx(pair["rougeL_f"], abs=1e-12), pair
        assert exact_match(prediction, references) == pair["exact_match"], pair
        each = [rouge_l(prediction, [reference]) for reference in references]
        assert each == pytest.approx(pair["rougeL_f_each"], abs=1e-12), pair
        each = [exact_match(prediction, [reference]) for reference in references]
        assert each == pair["exact_match_each"], pair
        assert pair["compute_metrics"].items() <= text_scores([prediction], [references]).items(), (
            pair
        )


def test_rouge_l_follows_order_and_counts_both_lengths():
    # Longest common subsequence 2 of 4 predicted and 3 reference tokens: F1 = 2 * 2 / (4 + 3).
    assert rouge_l("red green blue black", ["green red black"]) == pytest.approx(4 / 7)
    assert rouge_l("one two three", ["three two one"]) == pytest.approx(1 / 3)


def test_rouge_l_is_symmetric_and_takes_the_best_reference():
    assert rouge_l("a b c d", ["b d"]) == rouge_l("b d", ["a b c d"]) == pytest.approx(2 / 3)
    assert rouge_l("b d", ["nothing", "b d", "a b c d"]) == 1.0


def test_exact_match_ignores_case_punctuation_and_spacing_only():
    assert exact_match("  Hello,\u00a0WORLD!\n", ["hello world"])
    assert not exact_match("hello worlds", ["hello world"])
    assert not exact_match("“hello”", ["hello"]), "curly quotes are not ASCII punctuation"


def test_text_scores_is_the_mean_in_percent():
    scores = text_scores(["yes", "no", "b d"], [["yes"], ["yes"], ["a b c d"]])
    assert scores["rougeL"] == 55.5556 and scores["exact_match"] == 33.3333


OTHER_SCRIPTS = {
    "Thai": "สวัสดีชาวโลก",
    "Chinese": "今天天气很好",
    "Japanese": "カタカナとひらがな",
    "Hindi": "नमस्ते दुनिया",
    "Russian": "привет мир",
    "Arabic": "مرحبا بالعالم",
    "English": "hello the world",
}


@pytest.mark.parametrize("text", OTHER_SCRIPTS.values(), ids=OTHER_SCRIPTS)
def test_text_of_any_script_matches_itself(text):
    """By the Unicode tokenizer, and by chrF; a text cut in half matches less."""
    half = text[: len(text) // 2]
    assert rouge_l(text, [text], "unicode") == 1.0
    assert text_scores([text], [[text]], "unicode") == pytest.approx(
        {"rougeL": 100, "chrF": 100, "exact_match": 100}
    )
    assert 0 < text_scores([half], [[text]])["chrF"] < 100
    uncounted = [] if text.isascii() else [0]
    assert without_tokens([[text]], "published") == uncounted
    assert without_tokens([[text]], "unicode") == []


def test_words_of_the_unicode_tokenizer():
    """Whole words with their accents, whatever their case and form; characters where a script has
    no spaces, with the marks above and below them."""
    assert rouge_l("está", ["est"], "unicode") == 0 < rouge_l("está", ["est"])
    assert rouge_l("ESTA\u0301 Straße", ["está STRASSE"], "unicode") == 1  # decomposed
    assert rouge_l("很好", ["好很"], "unicode") == 0.5
    assert rouge_l("GPT4好", ["gpt4"], "unicode") == pytest.approx(2 / 3)
    assert rouge_l("วั", ["ว"], "unicode") == 0
    assert rouge_l("running", ["run"], "unicode") == 0  # no stems
    assert without_tokens([["☺!"], ["?", "a"]], "unicode") == [0]


def test_chrf_takes_each_requests_best_reference():
    """However many references a request has."""
    assert text_scores(["abc", "xyz"], [["none", "abc"], ["xyz"]])["chrF"] == 100
    low, high = (text_scores(["abc"], [refs])["chrF"] for refs in (["zzz"], ["zzz", "abd"]))
    assert 0 == low < high < 100


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="2 predictions for 1 lists of references"):
        text_scores(["yes", "no"], [["yes"]])


@pytest.mark.parametrize("score", [rouge_l, exact_match])
def test_references_must_be_a_non_empty_sequence_of_strings(score):
    with pytest.raises(TypeError, match="not the string 'yes'"):
        score("yes", "yes")
    with pytest.raises(ValueError, match="no reference"):
        score("yes", [])


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="no pair"):
        text_scores([], [])
