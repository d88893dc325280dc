from cogvideox_factory.report import sweep_page


def row(name: str, **values):
    numbers = {"state": "done", "step": 2, "loss": None, "validation_loss": None}
    return {"run": name, "train.steps": "2"} | numbers | values


def test_the_page_is_whole_and_fetches_nothing_and_has_the_best_first(parse_page):
    rows = [row("one", loss=0.5), row("<two>", loss=0.4, state="failed"), row("three", state="to do")]
    curves = {"loss": {"one": [(1, 0.6), (2, 0.5)], "<two>": [(1, 0.4)]}, "validation_loss": {}}
    page = sweep_page.page("rates", rows, curves)
    found = parse_page(page)
    assert all(source.startswith("data:") for source in found.sources)
    assert "Lowest loss: <two>" in found.text
    assert page.count("<polyline") == 2
    assert page.index("<td>&lt;two&gt;") < page.index("<td>one") < page.index("<td>three")
    assert "Validation loss" not in found.text


def test_runs_without_numbers_still_make_a_page(parse_page):
    page = sweep_page.page("rates", [row("one", state="failed")], {"loss": {}, "validation_loss": {}})
    assert "Lowest" not in parse_page(page).text
