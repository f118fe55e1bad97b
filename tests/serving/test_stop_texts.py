"""Stop texts, whatever the pieces in which a text arrives."""

from hypothesis import example, given
from hypothesis import strategies as st

from flashlm_numba.serving.steps import StopTexts

FEW = st.text("ab", max_size=12)


def reference(text, stops):
    """The text before the stop text that is complete first, and whether there is one."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(FEW, st.lists(st.text("ab", min_size=1, max_size=4), max_size=4), st.lists(st.integers(1, 4)))
@example("abc", ["abc", "b"], [3])
@example("aab", ["ab"], [1, 1, 1])
def test_the_division_of_the_text_makes_no_difference(text, stops, sizes):
    found, passed, rest = StopTexts(tuple(stops)), "", text
    for size in [*sizes, len(text)]:
        if found.found:
            break
        passed += found.feed(rest[:size])
        rest = rest[size:]
        wanted, _ = reference(text[: len(text) - len(rest)], stops)
        assert wanted.startswith(passed)  # nothing is passed on that a stop text could take back
    if not found.found:
        passed += found.end()
    assert (passed, found.found) == reference(text, stops)


def test_nothing_is_held_back_without_need():
    assert StopTexts(()).feed("the") == "the"
    assert StopTexts(("END",)).feed("the") == "the"
    assert StopTexts(("END",)).feed("theE") == "the"
