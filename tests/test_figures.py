"""The page of figures is what the results of the benchmarks say, all of them."""

import json

from benchmarks import figures


def test_the_page_is_what_the_results_say():
    assert figures.PAGE.read_text() == figures.page()


def test_the_page_of_scaling_is_what_its_result_says():
    result = json.loads((figures.RESULTS / "scaling.json").read_text())
    assert figures.SCALING.read_text() == figures.scaling(result)
    result["rows"][0]["step_ms"] = 98765.4
    assert "| 98,765 |" in figures.scaling(result)


def test_the_table_of_what_fits_is_what_the_result_says():
    result = json.loads((figures.RESULTS / "scaling.json").read_text())
    page = figures.FITS.read_text()
    assert figures.with_fits(page, result) == page
    result["fits"][0]["total_gib"] = 110.4
    assert "110.4: **141 GB**" in figures.with_fits(page, result)


def test_every_result_is_on_the_page(tmp_path, monkeypatch):
    """Without any one of the files there is no page."""
    for absent in figures.RESULTS.glob("*.json"):
        if absent.stem == "scaling":
            continue
        folder = tmp_path / absent.stem
        folder.mkdir()
        for path in figures.RESULTS.glob("*.json"):
            if path != absent:
                (folder / path.name).write_bytes(path.read_bytes())
        monkeypatch.setattr(figures, "RESULTS", folder)
        try:
            figures.page()
        except KeyError as error:
            assert error.args == (absent.stem,)
        else:
            raise AssertionError(f"{absent.name} is not on the page")
        monkeypatch.undo()


def test_a_new_result_changes_the_page(tmp_path, monkeypatch):
    for path in figures.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    decode = json.loads((tmp_path / "decode.json").read_text())
    decode["tokens_per_second"][0]["ratio"] = 9.87
    (tmp_path / "decode.json").write_text(json.dumps(decode))
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    assert "9.87" in figures.page()
