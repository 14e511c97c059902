"""The report: what it says, that text stays text, and how it behaves in a real browser."""

import html
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from axe import serious_violations
from click.testing import CliRunner

from rsr.jobs.cli import main
from rsr.jobs.shards.writer import METADATA_KEY

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=alert(1)><!-- \u2028 & \""
)
CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]


TEACHERS = ("verified-6b", "verified-175b", "tuned-6b", "tuned-175b", "ground-truth")


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory, make_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return folder


def scored_rows(num_problems: int, text: str) -> dict[str, list[Any]]:
    pairs = [(t, p) for p in range(num_problems) for t in ("plain", HOSTILE)]
    messages = [
        [{"role": "user", "content": f"Problem {p}?"}, {"role": "assistant", "content": text}]
        for _, p in pairs
    ]
    return {
        "id": [f"{i}{'<b>' if i == 0 else ''}" for i in range(len(pairs))],
        "teacher": [t for t, _ in pairs],
        "problem_id": [p for _, p in pairs],
        "correct": [p % 2 == 0 for _, p in pairs],
        "messages": messages,
    }


@pytest.fixture(scope="module")
def scored(tmp_path_factory, write_scored, tokenizer_folder, make_tokenizer) -> Path:
    """24 trajectories with token columns; text, a teacher's name and an id that would be HTML."""
    columns = scored_rows(12, HOSTILE + "\nΩ = 6 × 7")
    ids = make_tokenizer()(HOSTILE + "\nΩ = 6 × 7")["input_ids"]
    tokens = {
        "rsr_token_ids": pl.Series([ids] * 24, dtype=pl.List(pl.Int32)),
        "rsr_token_ranks": pl.Series([range(1, len(ids) + 1)] * 24, dtype=pl.List(pl.Int32)),
        "rsr_token_logprobs": pl.Series(
            [[-0.05 * k for k in range(len(ids))]] * 24, dtype=pl.List(pl.Float32)
        ),
    }
    identity = {
        "settings": {"model": str(tokenizer_folder), "rank_clip": 100},
        "columns": {"messages": "messages"},
        "versions": {"rsr-engine": "0.1.0"},
    }
    return write_scored(
        tmp_path_factory.mktemp("scored") / "rows.parquet",
        [2.0 + 0.1 * i for i in range(24)],
        columns=columns | {name: series.to_arrow() for name, series in tokens.items()},
        num_tokens=[len(ids)] * 24,
        identity=identity,
    )


def text_of(page: Path) -> str:
    """What a reader of the page can read, on one line."""
    visible = page.read_text().split('<script type="application/json"')[0]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", visible)).split())


@pytest.fixture(scope="module")
def page(scored) -> Path:
    target = scored.with_name("out.html")
    selected = scored.with_name("selected.parquet")
    pl.read_parquet(scored).head(6).write_parquet(selected)
    result = run("report", scored, target, "--selection", selected, "--points", "10", "--draws", 50)
    assert result.exit_code == 0, result.output
    return target


@pytest.mark.seconds
def test_page_says_what_it_shows(page, tokenizer_folder):
    text = text_of(page)
    assert "10 of 24 trajectories, drawn at random" in text
    # Ahead in every problem, so in every draw, too.
    assert "plain suits" in text
    assert "24 ok" in text
    assert str(tokenizer_folder) in text
    assert "The selection beside the pool" in text
    assert "RSR does not see correctness. Choose correct rows first" in text


@pytest.mark.seconds
def test_data_cannot_end_a_script(page):
    source = page.read_text()
    assert "<img src=x" not in source
    (data,) = re.findall(r'<script type="application/json" id="page">(.*?)</script>', source, re.S)
    points = json.loads(data)["data"]["points"]
    assert {p["teacher"] for p in points} <= {"plain", HOSTILE}
    # The data, Vega, and ours.
    assert len(re.findall(r"<script\b", source.split("<body>", 1)[1])) == 3


def test_nothing_in_the_page_is_fetched(page):
    source = page.read_text().split("<script>")[0]
    assert not re.findall(r'\b(?:src|href)="(?!data:)', source)
    assert "default-src 'none'" in source


@pytest.mark.seconds
def test_without_token_columns_it_says_how_to_get_them(tmp_path, write_scored):
    path = write_scored(
        tmp_path / "rows.parquet", [1.0 + i for i in range(4)], columns=scored_rows(2, "six")
    )
    result = run("report", path, tmp_path / "out.html", "--json", "--draws", 10)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["report"].endswith("out.html")
    text = (tmp_path / "out.html").read_text()
    assert "score with --token-columns" in text
    assert "Problem 0?" in text


def rewrite(source: Path, target: Path, identity: dict[str, Any]) -> None:
    """The same rows, said to come from another run."""
    table = pq.read_table(source).replace_schema_metadata({METADATA_KEY: json.dumps(identity)})
    pq.write_table(table, target)


@pytest.mark.seconds
def test_tokens_are_left_out_where_the_tokenizer_is_gone(tmp_path, scored, tokenizer_folder):
    target = tmp_path / "out.html"
    moved = tmp_path / "moved.parquet"
    rewrite(scored, moved, {"settings": {"model": "org/elsewhere"}})
    assert run("report", moved, target, "--draws", 10).exit_code == 0
    reason = "No tokens: the student org/elsewhere is not a folder that is there; give --tokenizer."
    assert reason in text_of(target)
    assert "data-i=" not in target.read_text(), "ids alone tell a reader nothing"
    again = run("report", moved, target, "--draws", 10, "--tokenizer", tokenizer_folder)
    assert again.exit_code == 0, again.output
    assert "No tokens" not in text_of(target)
    assert "data-i=" in target.read_text()


@pytest.mark.seconds
def test_student_in_the_cache_of_a_hub_has_its_name(tmp_path, scored):
    moved = tmp_path / "moved.parquet"
    model = "/cache/models--org--Student-1.7B/snapshots/0123abcd"
    rewrite(scored, moved, {"settings": {"model": model}})
    assert run("report", moved, tmp_path / "out.html", "--draws", 10).exit_code == 0
    assert "suits Student-1.7B best" in text_of(tmp_path / "out.html")


def test_another_tokenizer_is_refused(tmp_path, scored, tokenizer_folder):
    other = tmp_path / "other.parquet"
    rewrite(scored, other, {"settings": {}, "model": {"tokenizer_sha256": "of another"}})
    target = tmp_path / "out.html"
    result = run("report", other, target, "--tokenizer", tokenizer_folder)
    assert result.exit_code == 2
    assert "not the tokenizer of the scored run" in result.stderr
    assert not target.exists()


@pytest.mark.seconds
def test_refusals_leave_nothing(tmp_path, scored, write_scored):
    empty = write_scored(
        tmp_path / "none.parquet", [None], columns={"teacher": ["a"], "correct": [True]}
    )
    for arguments, message in (
        ([scored, tmp_path / "out.txt"], "must end in .html"),
        ([scored, tmp_path / "o.html", "--selection", empty], "has no scored row"),
        ([scored, "/proc/none/o.html"], "cannot be written"),
        ([scored, tmp_path / "o.html", "--tokenizer", tmp_path], "no usable tokenizer"),
    ):
        result = run("report", *arguments)
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1), result.output
        assert message in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["none.parquet"]


@pytest.mark.seconds
def test_a_file_that_polars_rewrote_shows_the_text_of_its_examples(
    scored, tmp_path, tokenizer_folder
):
    """What joins a column and writes the file again drops the metadata of the run."""
    rewritten = tmp_path / "rewritten.parquet"
    pl.read_parquet(scored).write_parquet(rewritten)
    options = ["--draws", 50, "--tokenizer", tokenizer_folder]
    result = run("report", rewritten, tmp_path / "out.html", *options)
    assert result.exit_code == 0, result.output
    text = text_of(tmp_path / "out.html")
    assert "Problem 0?" in text
    assert "No text" not in text
    assert "No tokens" not in text
    assert "suits the student of rewritten.parquet best" in text
    assert "ranks clipped at not said" in text


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("is_rewritten", "reason"),
    [
        (True, "No text: another program has written the file since it was scored"),
        (False, "the columns that the run read are no longer in the file ('messages')"),
    ],
)
def test_why_there_is_no_text_is_said(scored, tmp_path, is_rewritten, reason):
    renamed = tmp_path / "renamed.parquet"
    if is_rewritten:
        pl.read_parquet(scored).rename({"messages": "talk"}).write_parquet(renamed)
    else:
        pq.write_table(pq.read_table(scored).drop_columns("messages"), renamed)
    result = run("report", renamed, tmp_path / "out.html", "--draws", 50)
    assert result.exit_code == 0, result.output
    assert reason in text_of(tmp_path / "out.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, where there is one."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    binary = shutil.which("chromium") or shutil.which("chromium-browser")
    if binary is None:
        pytest.skip("needs chromium on PATH")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, page: Path, width: int, height: int, **options: Any) -> Iterator[Any]:
    """The page, its charts drawn; fails at the end for any complaint or request."""
    tab = browser.new_page(viewport={"width": width, "height": height}, **options)
    complaints, requests = [], []
    tab.on("console", lambda m: complaints.append(m.text) if m.type != "log" else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda r: requests.append(r.url))
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-ready=true]")
    yield tab
    tab.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [page.as_uri()]


@pytest.fixture(
    params=[
        pytest.param((1280, 900), id="desktop", marks=pytest.mark.slow),
        pytest.param((390, 844), id="phone", marks=pytest.mark.slow),
    ]
)
def tab(request, browser, page) -> Iterator[Any]:
    with opened(browser, page, *request.param) as tab:
        yield tab


def test_browser_draws_charts_within_the_page(tab):
    assert tab.locator(".chart svg").count() == 4
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for chart in tab.locator(".chart svg").all():
        assert chart.bounding_box()["width"] > 200
    points = tab.locator("[data-chart=surprisal] .mark-symbol.role-mark path")
    assert points.count() == 10
    assert tab.title().startswith("RSR report: ")
    assert tab.locator(".key > span").all_inner_texts() == ["● plain", f"■ {HOSTILE}"]
    assert tab.locator("[data-chart=surprisal] .mark-group.role-legend").count() == 0


def test_hovering_a_point_shows_its_numbers(tab):
    tab.locator("[data-chart=surprisal] .mark-symbol.role-mark path").last.hover(force=True)
    tooltip = tab.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    assert "RSR" in tooltip.inner_text()
    assert "tokens" in tooltip.inner_text()


def test_hovering_a_token_shows_its_numbers(tab):
    view = tab.locator(".example .tokens").first
    assert "</script><script>" in view.inner_text()
    tokens = view.locator("span")
    assert "Ω" in view.inner_text(), "a character of two tokens is whole"
    tokens.nth(4).hover()
    told = tab.locator("#tip").inner_text()
    # Rank 5, surprisal 0.2 nats, probability e^−0.2.
    assert '"r"' in told
    assert "rank 5" in told
    assert "surprisal 0.200 nats (81.9 %)" in told
    box = tab.locator("#tip").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= tab.viewport_size["width"]


def test_keyboard_goes_through_tokens(tab):
    tab.locator(".example .tokens").first.focus()
    tab.keyboard.press("ArrowRight")
    assert "rank 1\n" in tab.locator("#tip").inner_text() + "\n"
    tab.keyboard.press("ArrowRight")
    assert "rank 2\n" in tab.locator("#tip").inner_text() + "\n"
    tab.keyboard.press("Escape")
    assert tab.locator("#tip").is_hidden()


def test_printing_opens_what_is_folded(tab):
    assert tab.locator("details:not([open])").count() > 0
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.locator("details:not([open])").count() == 0


PAPER_WIDTH = 703
"""CSS pixels of A4 between margins of a centimetre and a bit."""


def test_no_column_is_cut_off_on_paper(tab):
    tab.set_viewport_size({"width": PAPER_WIDTH, "height": 1000})
    tab.emulate_media(media="print")
    assert tab.locator(".scroll table").count() >= 2
    for table in tab.locator(".scroll table").all():
        box = table.bounding_box()
        assert box["x"] + box["width"] <= PAPER_WIDTH


def test_headline_does_not_break_inside_of_the_student(tab, tokenizer_folder):
    student = tab.locator("h1 .name").last
    assert student.inner_text() == tokenizer_folder.name
    assert student.evaluate("e => e.getClientRects().length") == 1
    line_height = student.evaluate("e => parseFloat(getComputedStyle(e).lineHeight)")
    assert student.bounding_box()["height"] < 1.5 * line_height


def test_keyboard_reaches_exactly_the_tables_that_scroll(tab):
    tables = tab.locator(".scroll").all()
    for table in tables:
        scrolls = table.evaluate("e => e.scrollWidth > e.clientWidth")
        assert (table.get_attribute("tabindex") == "0") == scrolls
    if tab.viewport_size["width"] == 390:
        table = tab.locator(".scroll[tabindex]").first
        table.focus()
        tab.keyboard.press("ArrowRight")
        tab.wait_for_function("document.activeElement.scrollLeft > 0")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_axe_finds_no_serious_fault(browser, page, width, height, scheme):
    with opened(browser, page, width, height, color_scheme=scheme) as tab:
        assert serious_violations(tab) == []


def write_crowded_page(
    folder: Path, write_scored: Any, number: int, *options: Any, teachers: Any = TEACHERS
) -> Path:
    """The page of so many rows of these teachers, a few of them far from all others."""
    rng = random.Random(0)
    columns = {
        "teacher": [teachers[i % len(teachers)] for i in range(number)],
        "problem_id": [i // len(teachers) for i in range(number)],
        "messages": [[{"role": "assistant", "content": "six"}]] * number,
    }
    path = write_scored(
        folder / "rows.parquet",
        [9.0 if i % 400 == 7 else 2 + rng.gammavariate(4, 0.25) for i in range(number)],
        columns=columns,
        num_tokens=[round(rng.lognormvariate(4.75, 0.45)) + 1 for _ in range(number)],
    )
    result = run("report", path, folder / "out.html", "--draws", 10, *options)
    assert result.exit_code == 0, result.output
    return folder / "out.html"


@pytest.fixture(scope="module", params=[90, 3_000, 100_000])
def crowd(request, tmp_path_factory, write_scored) -> tuple[int, Path]:
    folder = tmp_path_factory.mktemp("crowd")
    return request.param, write_crowded_page(folder, write_scored, request.param)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_marks_of_any_number_of_rows_are_whole_and_name_their_teacher(browser, crowd, width):
    number, page = crowd
    with opened(browser, page, width, 900) as tab:
        charts = tab.locator("[data-chart^=surprisal], [data-chart^=tokens]")
        assert charts.count() == (2 if number == 90 else 10)
        assert tab.locator(".key").count() == (1 if number == 90 else 0)
        for chart in charts.all():
            frame = chart.locator("svg").bounding_box()
            # Of all marks together.
            box = chart.locator(".mark-symbol.role-mark").bounding_box()
            assert frame["x"] <= box["x"]
            assert box["x"] + box["width"] <= frame["x"] + frame["width"]
            assert frame["y"] <= box["y"]
            assert box["y"] + box["height"] <= frame["y"] + frame["height"]
            # The last is above all others.
            mark = chart.locator(".mark-symbol.role-mark path").last
            assert mark.bounding_box()["width"] >= 3
            tab.mouse.move(1, 1)
            mark.hover(force=True)
            tab.locator("#vg-tooltip-element.visible").wait_for()
            told = tab.locator("#vg-tooltip-element").inner_text()
            owner = chart.locator("xpath=..").locator("figcaption")
            expected = owner.inner_text().split()[-1] if owner.count() else told.split()[1]
            assert expected in TEACHERS
            assert expected in told


@pytest.mark.slow
def test_very_many_marks_are_drawn_as_a_picture(browser, tmp_path, write_scored):
    page = write_crowded_page(tmp_path, write_scored, 6_000, "--points", 6_000)
    with opened(browser, page, 1280, 900) as tab:
        assert tab.locator(".chart svg").count() == 0
        assert tab.locator(".panels canvas").count() == 10
        assert "All 6,000 trajectories." in tab.locator("main").inner_text()


def points_by_teacher(page: Path) -> dict[str, dict[str, int]]:
    """Of each data set of points, how many a teacher has."""
    (data,) = re.findall(
        r'<script type="application/json" id="page">(.*?)</script>', page.read_text(), re.S
    )
    sets = {name: rows for name, rows in json.loads(data)["data"].items() if "points" in name}
    return {name: dict(Counter(row["teacher"] for row in rows)) for name, rows in sets.items()}


@pytest.mark.seconds
def test_panels_hold_every_point_once_whatever_teachers_are_called(tmp_path, write_scored):
    many = (HOSTILE, *"abcdefgh")
    page = write_crowded_page(tmp_path, write_scored, 1_800, teachers=many)
    panels = list(points_by_teacher(page).values())
    assert [len(panel) for panel in panels] == [1] * 6 + [3], "the last are other teachers"
    assert sorted(name for panel in panels for name in panel) == sorted(many)
    assert {num for panel in panels for num in panel.values()} == {200}
