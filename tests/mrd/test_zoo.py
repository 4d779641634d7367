"""Every architecture of transformers, small, against plain code; and docs/models.md, which says what comes of it."""

import pytest
import transformers
import zoo_page
from zoo_measure import CRASHED, WRONG, measure, model_of
from zoo_shrink import NAMES, NOT_BUILT

AGAIN = "run `make models`, read what has changed in docs/models.md, and commit it"
PINNED = transformers.__version__ == zoo_page.version()


def test_the_page_lists_every_architecture():
    """A newer transformers may have some that nobody looked at; an older one lacks some."""
    listed = zoo_page.listed()
    assert set(NAMES) <= set(listed), AGAIN
    if PINNED:
        assert set(listed) == set(NAMES), AGAIN
        assert {name for name, cells in listed.items() if not cells} == set(NOT_BUILT), AGAIN


def test_the_page_has_no_wrong_number():
    cells = {cell for of_row in zoo_page.listed().values() for cell in of_row}
    assert not {WRONG, CRASHED} & cells


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", [name for name in NAMES if name not in NOT_BUILT])
def test_numbers_are_right_or_refused_as_the_page_says(model_type):
    row = measure(model_type)
    assert not {WRONG, CRASHED} & set(row.cells), row
    if PINNED:
        assert row.cells == zoo_page.listed()[model_type], AGAIN


@pytest.mark.slow
@pytest.mark.skipif(not PINNED, reason="another version of transformers may build them")
@pytest.mark.parametrize("model_type", NOT_BUILT)
def test_what_is_not_built_cannot_be(model_type):
    with pytest.raises(Exception):  # noqa: B017, PT011 each fails in a way of its own
        model_of(model_type)
