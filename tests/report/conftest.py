"""A reader of pages that holds every tag to be closed in order."""

from html.parser import HTMLParser

import pytest

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


@pytest.fixture
def parse_page():
    def parse(page):
        checker = Checker()
        checker.feed(page)
        assert checker.open == []
        return checker

    return parse
