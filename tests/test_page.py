"""The page of a comparison: what is written into it, and what a real browser makes of it."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

import deepthin.torch as dt
from deepthin.lab.report import points
from deepthin.lab.report.page import render, write_page
from test_results import RATIOS, made

RUN = {"task": "acoustic", "steps": 1800, "data": "AN4 & more", "network": "Sequential(<a>)"}
METHODS = "dense", "int8", "deepthin", "rank", "pruned-csr", "uniform", "deepthin-8bit"


def shown(rows=None, run=RUN, plans=None, command="deepthin compare"):
    return render(rows or made(METHODS), run, plans or {}, command)


def lines_of(page):
    """The cells of the table of results, by method and ratio, as they are written."""
    (body,) = re.findall(r'id="results".*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    rows = [re.findall(r"<t[hd].*?</t[hd]>", row) for row in re.findall("<tr>.*?</tr>", body)]
    text = [[re.sub("<.*?>", "", cell) for cell in row] for row in rows]
    return {(cells[0], cells[1]): row for cells, row in zip(text, rows, strict=True)}


def test_the_headline_pairs_error_file_and_speed_of_one_configuration():
    said = re.sub("<.*?>", "", re.search(r'class="headlines">(.*?)</div>', shown(), re.DOTALL)[1])
    assert said == (
        "Best compressed network by development frame error: deepthin-8bit at 0.0195: test frame error 25.10 ± 0.10 % "
        "(dense: 23.70 ± 0.10) in a file of 305,129 bytes, 48 times smaller than dense (14,792,868 bytes). The "
        "network in this file is 6.00 times as fast as dense: 250 against 1,500 µs for one item."
    )
    two = shown(made(("dense", "deepthin", "tensor-train")))
    assert re.findall(r"<p>(Best.*?) by development.*?<b>(.*?)</b>", two) == [
        ("Best compressed network", "tensor-train at 0.0195"), ("Best of DeepThin", "deepthin at 0.0195")
    ]  # fmt: skip


def test_the_best_thin_value_of_each_size_is_marked_and_no_other():
    lines = lines_of(shown())
    marked = {key for key, row in lines.items() if 'class="best"' in "".join(row)}
    assert marked == {("deepthin-8bit", f"{ratio:g}") for ratio in RATIOS}
    assert lines["uniform", "0.004"][-1].endswith('colspan="5">not reachable: smallest ratio 0.03126</td>')
    assert '<td data-value="7.5">7.50</td>' in lines["rank", "0.0195"]


def test_seeds_that_failed_are_told():
    rows = made(("dense", "rank"), ratios=(0.0195, 0.004), seeds=2)
    lost = replace(rows[-1], value=None, bytes=None, failed="nan < 0")
    kept = [row for row in rows if (row.ratio, row.seed) != (0.0195, 0) and row.ratio != 0.004]
    lines = lines_of(shown([*kept, replace(lost, ratio=0.0195, seed=0), replace(lost, seed=0), replace(lost, seed=1)]))
    assert '<td data-value="1">1 <small>1 failed</small></td>' in lines["rank", "0.0195"]
    assert lines["rank", "0.004"][-1].endswith(">failed: nan &lt; 0</td>")


def test_the_papers_figures_stand_beside_ours():
    """Table 1: TFKaldi's word error is like ours of task acoustic, DeepSpeech's loss like that of task ctc."""
    assert re.findall(r'class="paper">(.*?)<', shown()) == ["60.1", "57.0"]
    ctc = shown(made(METHODS, task="ctc", metrics=("loss", "wer")))
    assert re.findall(r'class="paper">(.*?)<', ctc) == ["28.1", "27.2"]
    assert 'class="paper"' not in shown(made(METHODS, task="digits", metrics=("error",)))


def test_it_says_how_it_was_made():
    run = {**RUN, "chosen": {"rank": {"lr": 0.001, "allocation": "<flat>"}}, "search": {"rates": [0.001, 0.003]}}
    page = shown(run=run, plans={("rank", 0.01): "6 < 7"}, command="deepthin compare --out <here>")
    assert "--out &lt;here&gt;" in page
    assert "<dd>rates: 0.001, 0.003</dd>" in page
    assert "<td>0.001</td><td>&lt;flat&gt;</td>" in page
    assert "AN4 &amp; more" in page
    assert "<h3>rank at 0.01</h3>\n<pre>6 &lt; 7</pre>" in page
    assert torch.__version__ in page
    assert "Training settings of each method" in shown()
    assert "uniform-bytes" in shown()


def test_names_from_rows_cannot_write_into_the_page():
    evil = "</script><script>x</script><b title='\"'>&"
    rows = [
        replace(row, task=evil, method=row.method + evil) for row in made(("dense", "deepthin"), metrics=(evil, "wer"))
    ]
    page = shown(rows, {**RUN, "chosen": {evil: {evil: evil}}, evil: evil, "data": evil}, {(evil, 0.1): evil}, evil)
    assert "<b title" not in page
    assert page.count("<script>") == 1
    assert page.count("</script>") == 2


def test_it_is_small_and_needs_nothing():
    page = shown(made())
    assert len(page.encode()) < 150_000
    assert "://" not in page
    assert not re.search(r"(src|href)=", page)


@pytest.fixture(scope="module")
def chromium():
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=quiet)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What `write_page` leaves, with real files of small models."""
    out = tmp_path_factory.mktemp("report")
    rows = made(METHODS, ratios=(0.0195, 0.0099), seeds=2)
    (out / "models").mkdir()
    (out / "run.json").write_text(json.dumps(RUN))
    for row in {row.model: row for row in rows if row.model}.values():
        torch.manual_seed(row.seed)
        model = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 300))
        name, bits = points.base(row.method)
        if name != "dense":
            rule = {"method": "pruned" if name == "pruned-csr" else name}
            rule |= {"then": {"method": "uniform", "bits": int(bits)}} if bits else {}
            dt.compress(model, {"model": {"ratio": row.ratio}, "rules": {"*": rule}}, init="scratch", seed=0)
        dt.save(model, out / row.model)
    return write_page(rows, out, "deepthin compare acoustic")


@pytest.fixture
def page(chromium, report, request):
    """The page in a browser; afterwards nothing was complained about, and nothing but the file was asked for."""
    context = chromium.new_context(
        viewport={"width": 1200, "height": 900}, color_scheme=getattr(request, "param", "light")
    )
    opened = context.new_page()
    wrong, asked = [], []
    opened.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(report.as_uri())
    opened.wait_for_selector("figure path.mark")
    yield opened
    context.close()
    assert wrong == []
    assert asked == [report.as_uri()]


def curve(page, method, figure=0):
    return page.locator("figure").nth(figure).locator(f"g.curve[data-method='{method}']")


def legend(page, method, figure=0):
    return page.locator("figure").nth(figure).locator(f".legend button[data-method='{method}']")


@pytest.mark.browser
def test_a_click_in_the_legend_hides_a_curve_and_another_shows_it(page):
    for figure in (0, 1):
        highest = page.locator("figure").nth(figure).locator("svg.plot text").all_text_contents()
        assert curve(page, "rank", figure).count() == 1
        legend(page, "rank", figure).click()
        assert curve(page, "rank", 0).count() == curve(page, "rank", 1).count() == 0
        assert legend(page, "rank", figure).get_attribute("aria-pressed") == "false"
        assert page.locator("figure").nth(figure).locator("svg.plot text").all_text_contents() != highest
        assert page.locator("svg.plot.focused").count() == 0  # the others are not dimmed
        legend(page, "rank", figure).click()
        assert curve(page, "rank", figure).count() == 1
        assert legend(page, "rank", figure).get_attribute("aria-pressed") == "true"
    page.locator("button[name=none]").first.click()
    assert page.locator("svg.plot g.curve").count() == 0
    assert "No curve is selected" in page.locator("svg.plot").first.text_content()
    page.locator("button[name=all]").first.click()
    assert page.locator("figure").first.locator("svg.plot g.curve").count() == len(METHODS) - 1  # uniform reaches none


@pytest.mark.browser
def test_a_click_on_a_head_sorts_the_table(page):
    def column(name):
        at = page.locator("#results thead th").all_text_contents().index(name)
        cells = f"rows => rows.map(row => row.cells[{at}]?.dataset.value)"
        return page.locator("#results thead th").nth(at), page.locator("#results tbody tr").evaluate_all(cells)

    for name in ("test WER, %", "file bytes", "times faster"):
        head, before = column(name)
        values = sorted(float(value) for value in before if value is not None)
        missing = [None] * (len(before) - len(values))
        head.locator("button").click()
        assert [value and float(value) for value in column(name)[1]] == values + missing
        assert head.get_attribute("aria-sort") == "ascending"
        head.locator("button").click()
        assert [value and float(value) for value in column(name)[1]] == values[::-1] + missing
        assert head.get_attribute("aria-sort") == "descending"
        assert page.locator("#results thead th:not([aria-sort=none])").count() == 1
    head, _ = column("method")
    head.locator("button").click()
    methods = column("method")[1]
    assert methods == sorted(methods)
    faster = [
        float(value) for method, value in zip(methods, column("times faster")[1], strict=True) if method == "rank"
    ]
    assert faster == sorted(faster, reverse=True)  # equal ones stay as they were sorted before


@pytest.mark.browser
@pytest.mark.parametrize("figure", [0, 1])
def test_a_point_tells_its_numbers(page, figure):
    tip = page.locator("#tip")
    assert not tip.is_visible()
    page.locator("figure").nth(figure).scroll_into_view_if_needed()
    curve(page, "rank", figure).locator("path.mark").first.hover(force=True)  # the smallest: it lies left
    assert tip.is_visible()
    assert tip.locator("b").text_content() == "rank at 0.0099"
    said = dict(zip(tip.locator("dt").all_text_contents(), tip.locator("dd").all_text_contents(), strict=True))
    assert said == {
        "frame error, %": "47.46 ± 0.10",
        "WER, %": "66.44 ± 0.14",
        "seeds": "2",
        "file": "163,281 bytes, 1.11 % of dense",
        "weights": "145,530 bytes, 0.99 % of dense",
        "one item": "182 µs, 8.25 times as fast",
    }
    box = tip.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 1200
    assert page.locator("svg.plot g.curve.focus").get_attribute("data-method") == "rank"
    page.mouse.move(5, 5)
    assert not tip.is_visible()


@pytest.mark.browser
def test_the_selectors_change_what_is_drawn(page):
    first = page.locator("figure").first
    assert "dense 23.65 ± 0.05 (14,793 kB)" in first.text_content()
    first.locator("select[name=metric]").select_option("wer")
    assert "dense 33.11 ± 0.07 (14,793 kB)" in first.text_content()
    assert page.locator("figure").nth(1).locator("select[name=metric]").input_value() == "wer"
    assert "test WER, %" in page.locator("figure").nth(1).locator("svg.plot").text_content()
    first.locator("select[name=x]").select_option("weights")
    assert "bytes of the weight matrices over dense, %" in first.locator("svg.plot").text_content()


@pytest.mark.browser
@pytest.mark.parametrize("page", ["light", "dark"], indirect=True)
def test_it_fits_a_phone_in_both_colour_schemes(page):
    page.set_viewport_size({"width": 360, "height": 700})
    page.wait_for_timeout(100)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert curve(page, "deepthin").locator("path.mark").count() == 2
    ink, paper = page.evaluate("['color', 'backgroundColor'].map(key => getComputedStyle(document.body)[key])")
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert abs(brightness[0] - brightness[1]) > 500


@pytest.mark.browser
def test_hostile_names_run_nothing(chromium, tmp_path):
    evil = "</script><img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
    rows = [replace(row, task=evil, method=evil) for row in made(("deepthin",), metrics=(evil,))]
    path = tmp_path / "report.html"
    path.write_text(shown(rows, {**RUN, "data": evil}, {(evil, 0.1): evil}, evil))
    opened = chromium.new_page()
    opened.goto(path.as_uri())
    opened.locator("svg.plot path.mark").first.hover(force=True)
    assert opened.locator("#tip b").text_content().startswith("</script><img")
    assert opened.locator("img").count() == 0
    assert opened.title() == f"deepthin compare {evil}"
    opened.close()
