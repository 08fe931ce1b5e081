"""What a browser sends is checked piece by piece, and finds its way to the stored places."""

import pytest

from labeling_ui.forms import FLAGS, MAX_COMMENT, Form, Mark, Refused, dense


def test_a_form_goes_to_the_stored_places_and_back():
    form = Form.read(
        {"ranks": [2, 1, 3], "marks": [{"score": 1}, {"flags": ["unsafe"]}, {"score": 7}]}, 3
    )
    # shown place 0 is stored place 2, 1 is 0, 2 is 1
    stored = form.stored([2, 0, 1])
    assert stored.ranks == (1, 3, 2)
    assert stored.marks == (Mark(None, ("unsafe",)), Mark(7), Mark(1))
    assert stored.shown([2, 0, 1]) == form


def test_what_is_missing_is_empty_and_an_old_draft_is_a_list_of_ranks():
    assert Form.read({}, 0) == Form.empty(0)
    assert Form.read([None, 1], 2).ranks == (None, 1)
    assert Form.read(Form.empty(3).to_json(), 3) == Form.empty(3)
    assert not Form.empty(2).complete


@pytest.mark.parametrize(
    "value",
    [
        None,
        "123",
        7,
        {"ranks": [1]},
        {"ranks": [1, 2, 3]},
        {"ranks": [0, 1]},
        {"ranks": [1, 3]},
        {"ranks": [1, True]},
        {"ranks": [1, 1.0]},
        {"ranks": [1, "2"]},
        {"ranks": {"0": 1, "1": 2}},
        {"ranks": [1, 2], "marks": [{}]},
        {"ranks": [1, 2], "marks": [{}, 3]},
        {"ranks": [1, 2], "marks": [{"score": 8}, {}]},
        {"ranks": [1, 2], "marks": [{"score": True}, {}]},
        {"ranks": [1, 2], "marks": [{"flags": ["nice"]}, {}]},
        {"ranks": [1, 2], "marks": [{"flags": "unsafe"}, {}]},
        {"ranks": [1, 2], "confidence": 4},
        {"ranks": [1, 2], "confidence": True},
        {"ranks": [1, 2], "comment": 5},
        {"ranks": [1, 2], "comment": "x" * (MAX_COMMENT + 1)},
        {"ranks": [1, 2], "ideal": ["a"]},
    ],
)
def test_anything_else_is_refused(value):
    with pytest.raises(Refused):
        Form.read(value, 2)


def test_flags_are_kept_once_and_in_one_order_and_texts_can_be_stored():
    flags = [*reversed(FLAGS), "unsafe"]
    form = Form.read({"ranks": [1], "marks": [{"flags": flags}], "comment": "a\0b\ud800"}, 1)
    assert form.marks[0].flags == tuple(FLAGS)
    assert form.comment == "ab?"


def test_gaps_are_closed():
    assert dense([4, 2, 4, 7]) == [2, 1, 2, 3]
