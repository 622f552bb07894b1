"""Near-duplicates: found where there are some, all of them, and nowhere else."""

import random

import pytest

from promptkd_jax.evaluation.duplicates import Duplicate, near_duplicates, shingles

LONG = (
    "Write a short story of at most two hundred words about a lighthouse keeper who finds a letter "
    "in a bottle"
)


def similarities(train, held_out):
    return {one.held_out: (one.train, one.similarity) for one in near_duplicates(train, held_out)}


def test_a_duplicate_is_found_whatever_its_case_and_punctuation():
    train = ["Name the colours.", LONG, "What is the capital of France?"]
    assert similarities(train, ["what is  the CAPITAL of France", "Name the colours."]) == {
        0: (2, 1.0),
        1: (0, 1.0),
    }
    assert similarities(["ﬁne Ｃａｆé"], ["FINE café!"]) == {0: (0, 1.0)}, "compatibility forms"


def test_a_near_duplicate_is_found_with_its_similarity():
    changed = LONG.replace("keeper", "painter")
    ((place, (number, similarity)),) = similarities([LONG], ["Unrelated.", changed]).items()
    words = len(LONG.split())
    # 3 of the shingles of each are not in the other.
    assert (place, number) == (1, 0) and similarity == (words - 5) / (words + 1)


@pytest.mark.parametrize(
    "other",
    [
        "What is the capital of Germany?",  # of the same form, and another question
        "Explain how a lighthouse works to a child of seven.",
        "of the capital is what",
        "",
    ],
)
def test_an_unrelated_pair_is_not_found(other):
    assert near_duplicates(["What is the capital of France?", LONG], [other]) == []


def test_texts_without_spaces_have_words_too():
    train = ["请用三句话解释为什么天空是蓝色的，并举一个例子。"]
    assert similarities(train, ["请用三句话解释为什么天空是蓝色的，并举两个例子。"])[0][0] == 0
    assert not near_duplicates(train, ["写一首关于春天的短诗。"])
    assert similarities(["…", "?!"], ["?!"]) == {0: (1, 1.0)}, "nor any letter"


def test_equal_held_out_prompts_are_all_told_with_the_first_of_equal_training_prompts():
    train = ["a b c d", LONG, LONG]
    expected = [Duplicate(0, 1, 1.0, train[1]), Duplicate(2, 1, 1.0, train[1])]
    assert near_duplicates(train, [LONG, "x", LONG]) == expected


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 1.0])
def test_no_pair_is_missed(threshold):
    """Against all pairs, of texts of few words, so that many are alike."""
    draw = random.Random(0)

    def text():
        return " ".join(draw.choices("abcd", [6, 3, 2, 1], k=draw.randint(1, 12)))

    train, held_out = ([text() for _ in range(number)] for number in (150, 60))
    expected = []
    for place, other in enumerate(map(shingles, held_out)):
        scores = [len(one & other) / len(one | other) for one in map(shingles, train)]
        if max(scores) >= threshold:
            best = scores.index(max(scores))
            expected.append(Duplicate(place, best, max(scores), train[best]))
    assert near_duplicates(train, held_out, threshold) == expected and expected
