import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.data.picture import write_png
from cogvideox_factory.report import html
from cogvideox_factory.tiny.world import random_scene, render
from tests.browser import shown


def test_a_page_is_whole_and_fetches_nothing(tmp_path, parse_page):
    frames = render(random_scene(0, 0), num_frames=3, height=32, width=32, fps=8)
    video = export_to_video(frames, tmp_path / "a.mp4", fps=8)
    picture = write_png(tmp_path / "a.png", frames[0])
    page = html.document(
        "A & B",
        [
            html.heading("one"), html.paragraph("two"), html.row([html.card("3", "three")]),
            html.figure([video, picture], "four", note="right", good=True), html.table([("five", 5)], ("a", "b")),
            html.thumb(b"\xff\xd8", "eight", note="nine"), html.thumb(None, "ten"),
            html.histogram([1, 3], [0, 1, 2], "eleven"),
            html.commands(["six > seven"]), html.line_chart({"loss": [(0, 1.0), (10, 0.5)]}, x_label="steps"),
        ],
    )  # fmt: skip
    found = parse_page(page)
    assert found.sources
    assert all(source.startswith("data:") for source in found.sources)
    assert all(word in found.text for word in ("A & B", "one", "two", "three", "four", "right", "six > seven", "loss"))
    assert all(word in found.text for word in ("eight", "nine", "ten", "eleven"))


def test_text_cannot_become_markup(tmp_path):
    evil = '<script>alert("x")</script>'
    picture = write_png(tmp_path / "a.png", render(random_scene(0, 0), num_frames=1, height=16, width=16, fps=8)[0])
    parts = [
        html.heading(evil), html.paragraph(evil), html.card(evil, evil),
        html.figure([picture], evil, note=evil, good=True),
        html.thumb(None, evil, note=evil), html.histogram([1], [0, 0], evil),
        html.table([(evil, 1)], (evil, "")), html.commands([evil]), html.line_chart({evil: [(0, 1)]}, x_label=evil),
    ]  # fmt: skip
    assert "<script" not in html.document(evil, parts)


def test_a_chart_keeps_its_points_inside():
    chart = html.line_chart({"a": [(1, 3.0), (50, 0.2)], "b": [(0, 2.0)]}, width=400, height=200)
    points = [
        tuple(map(float, pair.split(",")))
        for part in chart.split('points="')[1:]
        for pair in part.split('"')[0].split()
    ]
    assert len(points) == 3
    assert all(0 <= x <= 400 and 0 <= y <= 200 for x, y in points)
    with pytest.raises(AssertionError, match="nothing to draw"):
        html.line_chart({})


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=30))
@settings(max_examples=40, deadline=None)
def test_bars_stay_inside_and_the_highest_reaches_the_top(counts):
    chart = html.histogram(counts, list(range(len(counts) + 1)), "x", width=300, height=130)
    bars = [tuple(map(float, re.findall(r'"([\d.]+)"', part)[:4])) for part in chart.split("<rect")[1:]]
    assert len(bars) == len(counts)
    assert all(x >= 0 and x + wide <= 300 and 26 <= y <= 110 and y + tall <= 110.1 for x, y, wide, tall in bars)
    tallest = [tall for *_, tall in bars]
    assert max(tallest) == pytest.approx(84 if any(counts) else 0)
    assert counts[tallest.index(max(tallest))] >= 0.99 * max(counts)  # coordinates are rounded


def test_a_complaint_of_the_browser_is_heard(tmp_path):
    (tmp_path / "bad.html").write_text("<script>undefined_function()</script>")
    assert len(shown(tmp_path / "bad.html", tmp_path / "profile")[1]) == 1
