"""The story is told whole or by chapter, its figures are those of the JSON, and its own check can fail."""

import json
import re
import sys

import pytest

import expunge.demo.journey
import expunge.demo.story
from expunge import cli, datasets
from expunge.core.errors import Misuse
from expunge.demo import CHAPTERS, Settings, Story, tell
from expunge.learn.training import train
from expunge.report import write

SMALL = Settings(owners=30, askers=2, epochs=2, shards=4)


@pytest.fixture(autouse=True)
def small_digits(request, monkeypatch):
    """Optdigits in the place of MNIST, unless a test asks for MNIST itself."""
    if "mnist_itself" not in request.fixturenames:
        monkeypatch.setattr(expunge.demo.story.datasets, "mnist", datasets.optdigits)


@pytest.fixture(scope="module")
def whole():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expunge.demo.story.datasets, "mnist", datasets.optdigits)
        return tell(SMALL)


@pytest.fixture(scope="module")
def thrice():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expunge.demo.story.datasets, "mnist", datasets.optdigits)
        return tell(Settings(owners=30, askers=2, epochs=2, shards=4, seeds=3), chapters=["unlearn"])


def unlearned(report):
    return next(chapter for chapter in report.chapters if chapter.name == "unlearn")


def test_all_chapters_are_told_and_each_says_what_it_does_not_show(whole):
    assert [(chapter.name, chapter.done) for chapter in whole.chapters] == [(name, True) for name in CHAPTERS]
    assert all(chapter.does_not_show for chapter in whole.chapters)


def test_exact_rows_equal_scratch(whole):
    data = unlearned(whole).data
    assert data["sisa_equals_scratch"] is True
    assert whole.sound
    assert "equals training from scratch" in whole.verdict
    assert "the same bytes as training from scratch" in unlearned(whole).headline
    for removal in data["removals"].values():
        rows = {row["method"]: row for row in removal["shards"][0]["rows"]}
        assert rows["sisa"]["mean_gap"] == 0
        assert rows["sisa"]["claim"] == rows["retrain shards"]["claim"] == "exact, pathwise"
        single = {row["method"]: row["claim"] for row in removal["single"][0]["rows"]}
        assert single.pop("original") == "not unlearned"
        assert single.pop("retrain") == "exact, pathwise"
        assert set(single.values()) == {"none"}


def plain(estimate, spec, scale=1):
    value, low, high = (scale * estimate[name] for name in ("value", "low", "high"))
    return f"{value:{spec}} ({low:{spec}} to {high:{spec}})"


def test_every_figure_of_the_tables_is_in_the_json(whole):
    data = json.loads(json.dumps(whole.to_json()))["chapters"]["unlearn"]["removals"]
    for grid, removal in zip(unlearned(whole).grids, data.values(), strict=True):
        expected = [(table, row) for table in (*removal["single"], *removal["shards"]) for row in table["rows"]]
        for cells, (table, row) in zip(grid.rows, expected, strict=True):
            shown = dict(zip(grid.headers, cells, strict=True))
            assert (shown["method"], shown["claim"]) == (row["method"], row["claim"])
            for name in ("forget", "retain", "test"):
                assert figures(shown[name]) == pytest.approx(figures(plain(row[name], ".1f", 100)), abs=0.11)
            assert figures(shown["attack"]) == pytest.approx(figures(plain(row["attack"], ".2f")), abs=0.011)
            if row["method"] == table["reference"]:
                assert shown["gap"] == "(ref.)"
            else:
                assert float(shown["gap"]) == pytest.approx(100 * row["mean_gap"], abs=0.0051)
            assert shown["seconds"] == (f"{row['seconds']:.2f}" if row["seconds"] else "")


def figures(cell):
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", cell)]


def test_means_over_seeds_are_in_the_json_too(thrice):
    chapter = unlearned(thrice)
    for grid, removal in zip(chapter.grids, chapter.data["removals"].values(), strict=True):
        assert len(removal["single"]) == len(removal["shards"]) == 3
        assert [line["method"] for line in removal["means"]] == [row[0] for row in grid.rows]
        for cells, line in zip(grid.rows, removal["means"], strict=True):
            assert figures(cells[2])[0] == pytest.approx(100 * line["forget"]["value"], abs=0.051)
            assert line["forget"]["n"] == line["seeds"] == 3
        assert "3 seeds" in grid.notes
    assert "3 of each" in thrice.facts["trainings"]


def broken(trained, _retain, _touched, **_options):
    """SISA that keeps what it should train again."""
    return trained


def test_the_check_of_exactness_can_fail(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("expunge.unlearn.sisa.retrain_shards", broken)
    report = tell(SMALL, chapters=["unlearn"])
    assert unlearned(report).data["sisa_equals_scratch"] is False
    assert not report.sound
    assert "DOES NOT EQUAL" in report.verdict
    assert "OTHER BYTES than training from scratch" in unlearned(report).headline
    code, said = run(monkeypatch, capsys, "demo", "unlearn", "--seeds", "1", "--epochs", "1", "--workspace", tmp_path)
    assert code == 1
    assert "DOES NOT EQUAL" in said.out


def test_broken_for_one_owner_only_is_found_too(monkeypatch):
    """The headline is of one owner: the tables of other removals do not vouch for it."""
    honest = expunge.unlearn.sisa.retrain_shards

    def broken_for_few(trained, retain, touched, **options):
        return trained if len(touched) == 1 else honest(trained, retain, touched, **options)

    monkeypatch.setattr("expunge.unlearn.sisa.retrain_shards", broken_for_few)
    report = tell(Settings(owners=30, askers=4, epochs=1, shards=4), chapters=["unlearn"])
    assert not report.sound


@pytest.mark.parametrize("name", ["train", "requests"])
def test_a_chapter_alone(name):
    heard = []
    report = tell(SMALL, chapters=[name], progress=lambda *said: heard.append(said))
    assert [chapter.name for chapter in report.chapters] == [name]
    assert report.verdict == "Some chapters only: see each for what it shows."
    assert all(0 <= done <= total for _, done, total in heard)


def test_the_attack_of_the_screening_chapter_is_a_valid_erasure_and_never_refused(whole):
    chapter = next(one for one in whole.chapters if one.name == "screen")
    said = chapter.data["decisions"]
    assert {one["action"] for one in said.values()} <= {"carry out", "exact"}
    attack = said["an attack"]
    assert attack["hold"] == (attack["action"] == "exact") == (attack["p"] <= 0.05) == chapter.data["attack_held"]
    assert len(attack["ids"]) == len(said["as many rows at random"]["ids"]) == 300
    after = chapter.data["margins_after"]
    assert after["an attack"] < after["as many rows at random"]
    assert ("the attack is held" in chapter.headline) == chapter.data["attack_held"]


def test_an_unknown_chapter_is_refused():
    with pytest.raises(Misuse, match='no chapter "epilogue"; there are train, requests, screen, unlearn'):
        tell(SMALL, chapters=["train", "epilogue"])


def test_the_command_that_the_train_chapter_gives_makes_the_same_model(whole, monkeypatch, capsys, tmp_path):
    check = next(chapter for chapter in whole.chapters if chapter.name == "train").check
    monkeypatch.chdir(tmp_path)
    words = check.replace("mnist", "optdigits").split()[1:]
    code, said = run(monkeypatch, capsys, *words, "--json")
    assert code == 0
    assert json.loads(said.out)["digest"] == Story(SMALL).sharded.digest()


def test_who_asks_follows_from_the_seed():
    first, again, other = Story(SMALL), Story(SMALL), Story(Settings(owners=30, askers=2, seed=1))
    assert first.askers == again.askers != other.askers
    assert [request.ids for request in first.requests.values()] == [r.ids for r in again.requests.values()]
    assert train(first.recipe, first.data.test).digest() != train(other.recipe, first.data.test).digest()


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["expunge", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, capsys.readouterr()


def test_the_command_line_tells_the_story(monkeypatch, capsys, tmp_path):
    code, said = run(monkeypatch, capsys, "demo", "--epochs", "1", "--workspace", tmp_path)
    assert (code, said.err) == (0, "")
    for chapter in CHAPTERS:
        assert re.search(rf"^ \d  {chapter} ", said.out, re.MULTILINE)
    assert "What this does not show:" in said.out
    assert f"{tmp_path}/report.html" in said.out
    assert {path.name for path in tmp_path.iterdir()} == {"certificates", "report.html", "report.json", "workspace"}


def test_the_command_line_tells_it_as_json(monkeypatch, capsys, tmp_path):
    code, said = run(monkeypatch, capsys, "demo", "train", "--epochs", "1", "--workspace", tmp_path, "--json")
    assert (code, said.err) == (0, "")
    told = json.loads(said.out)
    assert set(told) == {"title", "verdict", "sound", "facts", "chapters", "report"}
    assert told.pop("report") == str(tmp_path / "report.html")
    assert json.loads((tmp_path / "report.json").read_text()) == told


def test_the_page_agrees_with_the_json(whole, tmp_path):
    html, path = write(whole, tmp_path)
    page, data = html.read_text(), json.loads(path.read_text())
    for removal in data["chapters"]["unlearn"]["removals"].values():
        for table in (*removal["single"], *removal["shards"]):
            for row in table["rows"]:
                assert f'<td class="word">{row["method"]}</td>' in page
                assert f"<td>{100 * row['retain']['value']:.1f}<span" in page


@pytest.fixture
def mnist_itself():
    """Marks a test that reads the real thing."""


@pytest.mark.usefixtures("mnist_itself")
def test_pictures_of_removed_rows_go_outside_only(monkeypatch, capsys, tmp_path):
    workspace, outside = tmp_path / "w", tmp_path / "p"
    code, said = run(
        monkeypatch,
        capsys,
        "demo",
        "requests",
        "--workspace",
        workspace,
        "--show-removed",
        workspace / ".." / "w" / "p",
    )
    assert code == 2
    assert "lies inside the workspace" in said.err
    assert not list(tmp_path.iterdir())
    code, said = run(monkeypatch, capsys, "demo", "requests", "--workspace", workspace, "--show-removed", outside)
    assert code == 0
    assert said.err == f"warning: pictures of removed rows are in {outside}; delete them yourself\n"
    assert {path.name for path in outside.iterdir()} == {"5-owners.png", "class-3.png"}
    assert {path.name for path in workspace.iterdir()} == {"report.html", "report.json"}


@pytest.mark.soak
@pytest.mark.usefixtures("mnist_itself")
def test_the_story_of_mnist():
    report = tell(Settings(epochs=1, shards=5))
    assert report.sound
    assert report.facts["data"].startswith("60,000 + 10,000 handwritten digits")
    data = report.to_json()["chapters"]
    assert data["train"]["one_model"]["value"] > 0.94
    assert data["train"]["sharded"]["value"] > 0.88
    forgotten = data["unlearn"]["removals"]["class 3"]
    assert forgotten["single"][0]["rows"][1]["forget"]["value"] == 0
    assert forgotten["shards"][0]["rows"][-1]["forget"]["value"] == 0
    assert 0 < data["unlearn"]["one_owner"]["share_of_row_gradients"] < 1


def honoured(tmp_path, *chapters):
    settings = Settings(owners=30, askers=2, epochs=1, shards=4, folder=tmp_path)
    return tell(settings, chapters=chapters)


def test_the_owners_requests_go_through_the_ledger_and_their_certificates_are_checked_by_a_copied_checker(tmp_path):
    report = honoured(tmp_path, "certificate", "sweep")
    told = {chapter.name: chapter for chapter in report.chapters}
    data = told["certificate"].data
    assert report.sound
    assert (data["offline_ok"], data["forged_refused"], data["faults"]) == ([True, True], True, [])
    assert data["claim"] == "exact"
    assert data["removed"] > 0
    assert told["sweep"].data["sound"]
    bundles = [tmp_path / "certificates" / f"{request}.json" for request in data["requests"]]
    assert all(path.is_file() for path in bundles)
    again = honoured(tmp_path, "certificate")
    assert again.sound
    assert not any(path.exists() for path in bundles)


def test_a_folder_that_is_no_workspace_is_left_alone(tmp_path):
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace" / "thesis.txt").write_text("years of work")
    with pytest.raises(Misuse, match="is no workspace"):
        honoured(tmp_path, "certificate")
    assert (tmp_path / "workspace" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("code", [0, 1])
def test_a_checker_that_always_says_the_same_does_not_pass_for_one(tmp_path, monkeypatch, code):
    monkeypatch.setattr(expunge.demo.journey, "_offline", lambda *_: ("ok   signature: fine", code))
    report = honoured(tmp_path, "certificate")
    assert not report.sound
    assert "NOT OK" in report.chapters[0].headline


def test_a_leftover_in_the_folder_is_told(tmp_path, monkeypatch):
    honest = expunge.demo.journey.swept

    def planted(story):
        (story.folder / "note.txt").write_text(f"called {story.askers[0]} back")
        return honest(story)

    monkeypatch.setattr(expunge.demo.journey, "swept", planted)
    report = honoured(tmp_path, "sweep")
    assert not report.sound
    assert "leftovers" in report.chapters[0].headline
