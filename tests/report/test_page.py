"""The page stands alone, trusts nobody's text, and says the same as the JSON beside it."""

import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from expunge.core.estimate import proportion
from expunge.report import Chapter, Grid, Point, Report, accuracy_against_seconds, print_grid, write

HOSTILE = '<img src=x onerror="alert(1)">"\'</td><script>alert(2)</script>{{ 7 * 7 }}'
NAMESPACES = {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}
POINTS = [Point(name=HOSTILE, claim="none", accuracy=proportion(7, 9), seconds=0.5)]


def report(text=HOSTILE):
    told = Chapter(
        name="unlearn",
        headline=text,
        text=(text,),
        grids=(
            Grid(caption=text, headers=(text, "forget"), rows=((text, "96.4 (95.9 to 96.8)"),), words=1, notes=text),
        ),
        plots={text: accuracy_against_seconds(POINTS, text)},
        shows=text,
        does_not_show=text,
        check=text,
        data={"figure": 0.964, text: [text]},
    )
    off = Chapter(name="verify", headline="not done: nobody did it", done=False)
    return Report(title=text, verdict=text, facts={text: text}, chapters=(told, off))


class Tags(HTMLParser):
    """All tags with their attributes, and all text outside the style."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.sections = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def page(tmp_path):
    html, _ = write(report(), tmp_path)
    return html.read_text(encoding="utf-8")


def test_the_page_refers_to_nothing_outside_it(page):
    assert set(re.findall(r"https?://[^\s\"'<>]+", page)) <= NAMESPACES
    parsed = Tags(page)
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base"})
    for tag, attributes in parsed.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("href", "xlink:href", "src", "action"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "@import" not in page
    assert not re.findall(r"url\((?!#)", page)


def test_the_page_forbids_itself_scripts_and_the_network(page):
    policy = next(tag["content"] for name, tag in Tags(page).tags if tag.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "script-src" not in policy


def test_hostile_text_is_only_text(page):
    assert "<img" not in page
    assert "<script" not in page
    assert "49" not in "".join(re.findall(r"alert\(2\)[^{]{0,20}.{0,10}", page))
    assert "".join(Tags(page).text).count(HOSTILE) >= 9


def test_a_chapter_not_done_is_shown_so_and_has_no_section(page):
    assert '<li class="off">verify: not done: nobody did it</li>' in page
    assert 'id="verify"' not in page
    assert 'id="unlearn"' in page


def test_json_says_what_the_report_says(tmp_path):
    _, path = write(report(), tmp_path)
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data == report().to_json()
    assert data["sound"] is True
    assert data["chapters"]["unlearn"]["figure"] == 0.964
    assert data["chapters"]["verify"] == {"done": False, "headline": "not done: nobody did it"}


def test_not_a_number_is_no_json(tmp_path):
    told = Report(title="", verdict="", facts={}, chapters=(Chapter(name="a", headline="", data={"x": float("nan")}),))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(told, tmp_path)
    assert not (tmp_path / "report.json").exists()
    assert not (tmp_path / "report.html").exists()


def test_writing_again_gives_the_same_bytes_and_no_leftovers(tmp_path):
    first = [path.read_bytes() for path in write(report(), tmp_path)]
    assert [path.read_bytes() for path in write(report(), tmp_path)] == first
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.json"}


def test_intervals_go_below_their_figures_on_the_page(page):
    assert '<td>96.4<span class="range">95.9 to 96.8</span></td>' in page


def test_the_page_is_as_wide_as_its_tables_need_and_its_text_is_not(page):
    rules = dict(re.findall(r"(?m)^([\w., ]+) \{([^}]*)\}", page.partition("</style>")[0]))
    assert "width: fit-content" in rules["body"]
    assert "max-width: 100%" in rules["body"]  # of the window: wider tables scroll
    assert "max-width: 66rem" in next(rule for names, rule in rules.items() if "p" in names.split(", "))
    assert "max-width" not in rules["table"] + rules[".scroll"]


HEADERS = ("method", "claim", "forget", "retain", "test", "attack", "gap", "seconds", "ratio")
ROWS = (
    ("(retrain, same time)", "not unlearned", *["100.0 (98.9 to 100.0)"] * 3, "0.51 (0.49 to 0.52)", "(ref.)", "", ""),
    ("gradient-ascent", "exact, pathwise", *["97.8 (97.5 to 98.2)"] * 3, "not measured", "24.64", "12.41", "1/162"),
    ("neg-grad-plus", "none", *["97.8 (97.5 to 98.2)"] * 4, "0.2 (-0.1 to 0.5)", "12.4 (10.0 to 14.8)", "2.5"),
)


def printed(width, rows=ROWS):
    screen = Console(width=width, record=True, color_system=None)
    print_grid(Grid(caption="Caption [bold]", headers=HEADERS, rows=rows, notes="What it [red]means[/red]."), screen)
    return screen.export_text()


@pytest.mark.parametrize("width", [80, 100, 120, 160, 200])
def test_tables_fit_every_terminal_and_lose_no_figure(width):
    said = printed(width)
    assert max(map(len, said.splitlines())) <= width
    assert "…" not in said
    for figure in ("100.0", "97.8", "24.64", "12.41", "1/162", "(ref.)", "0.2"):
        assert figure in said
    whole = re.sub(r"\s", "", said)
    assert all(re.sub(r"\s", "", header) in whole for header in HEADERS)


def test_tables_fold_only_where_they_must():
    assert "97.8 (97.5 to 98.2)" in printed(200)
    assert "97.5-98.2" in printed(120)
    assert "-0.1 to 0.5" in printed(120)  # a minus sign is no dash


def test_tables_print_brackets_as_they_are():
    said = printed(160)
    assert "Caption [bold]" in said
    assert "What it [red]means[/red]." in said
