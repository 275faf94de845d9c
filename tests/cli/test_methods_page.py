"""The page of methods says what the classes say."""

from pathlib import Path

import pytest

from expunge.cli.inputs import METHODS
from expunge.cli.lists import _about, methods

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def test_the_page_is_what_the_command_prints(capsys):
    methods(as_markdown=True)
    assert PAGE.read_text(encoding="utf-8") == capsys.readouterr().out, "write it again: expunge methods --markdown"


@pytest.mark.parametrize("word", METHODS)
def test_every_method_tells_all(word):
    about = _about(word, METHODS[word])
    assert METHODS[word]().name == word
    assert about["cost"], f"the docstring of {about['class']} has no paragraph that begins with Cost:"
    assert about["cost"].endswith(".")
    assert about["source"]
    assert about["not_guaranteed"]
    assert about["what"].endswith(".")
