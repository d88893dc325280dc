from html.parser import HTMLParser

import pytest

from cogvideox_factory.data.export import export_to_video, write_png
from cogvideox_factory.report import html
from cogvideox_factory.tiny.world import random_scene, render

VOID = {"meta", "link", "img", "line", "br"}


class Checker(HTMLParser):
    """Holds every tag to be closed in order, and collects what the page fetches."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parse(page):
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


def test_a_page_is_whole_and_fetches_nothing(tmp_path):
    frames = render(random_scene(0, 0), num_frames=3, height=32, width=32, fps=8)
    video = export_to_video(frames, tmp_path / "a.mp4", fps=8)
    picture = write_png(tmp_path / "a.png", frames[0])
    page = html.document(
        "A & B",
        [
            html.heading("one"), html.paragraph("two"), html.row([html.card("3", "three")]),
            html.figure([video, picture], "four", note="right", good=True), html.table([("five", 5)], ("a", "b")),
            html.commands(["six > seven"]), html.line_chart({"loss": [(0, 1.0), (10, 0.5)]}, x_label="steps"),
        ],
    )  # fmt: skip
    found = parse(page)
    assert found.sources
    assert all(source.startswith("data:") for source in found.sources)
    assert all(word in found.text for word in ("A & B", "one", "two", "three", "four", "right", "six > seven", "loss"))


def test_text_cannot_become_markup(tmp_path):
    evil = '<script>alert("x")</script>'
    picture = write_png(tmp_path / "a.png", render(random_scene(0, 0), num_frames=1, height=16, width=16, fps=8)[0])
    parts = [
        html.heading(evil), html.paragraph(evil), html.card(evil, evil),
        html.figure([picture], evil, note=evil, good=True),
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
