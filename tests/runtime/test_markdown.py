"""Tables that are Markdown and can be read as they are."""

from pusht_act.runtime.markdown import format_table


def test_numbers_are_right_words_left_and_the_last_words_not_padded() -> None:
    rows = [["1", "running", "1,000", "a"], ["10", "done", "", "seed=1 lr=2"]]
    assert format_table(["job", "state", "step", "overrides"], rows, text=("state", "overrides")) == [
        "| job | state   |  step | overrides |",
        "| --: | ------- | ----: | --- |",
        "|   1 | running | 1,000 | a   |",
        "|  10 | done    |       | seed=1 lr=2 |",
    ]


def test_a_bar_in_a_cell_divides_no_column() -> None:
    assert format_table(["n"], [["a|b"]]) == ["|    n |", "| ---: |", "| a\\|b |"]
