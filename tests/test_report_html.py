"""The HTML report: complete, self-contained, and inert whatever users call their clients."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs
from report_worlds import make_run

from idiolect.core.errors import UsageError
from idiolect.report.html import write_report
from idiolect.report.page import Section, page
from idiolect.report.tables import comparison_cells

EVIL = "<script>alert('x')</script>\"'&</script><!-- %{x} {y}"
LAYERS = ("conv1.weight", "bn1.weight", "fc.weight")


class Page(HTMLParser):
    """Collects tags, headings, table cells and scripts of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.scripts, self.headings, self.cells, self.text = [], [], [], [], ""
        self.open = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if not self.open:
            return
        if self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open[-1] in ("td", "th"):
            self.cells[-1] += data
        elif self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def full(tmp_path, clients=100, name="c"):
    runs = [
        make_run(label, seed, final=final, clients=clients, rounds=30, prefix=name, generalized=label == "FedFSA",
                 participation=0.2, sensitivity=LAYERS if label == "FedFSA" else ())
        for label, final in (("Local", 0.7), (f"FedBN {name}", 0.8), ("FedFSA", 0.9))
        for seed in (0, 1, 2)
    ]  # fmt: skip
    holdings = {f"{name}{i}": {str(k): (i * k) % 7 for k in range(100)} for i in range(clients)}
    groups = {client: f"{name}site{i % 3}" for i, client in enumerate(holdings)}
    path = tmp_path / "sub" / "report.html"
    describe = {"FedFSA": [{"part": "share", "sends": name}, {"part": "sensitive_sam", "keeps": "sensitivity"}]}
    write_report(path, f"Digits {name}", runs, holdings, groups, {"command": f"run {name}"}, describe)
    return path, runs


def test_the_full_report(tmp_path):
    path, runs = full(tmp_path)
    assert path.stat().st_size < 8e6
    page = Page(path)
    assert page.headings == [
        "Digits c",
        "Results",
        "Round by round",
        "From client to client",
        "Who gains by taking part",
        "What it costs to send",
        "Who holds what",
        "Group by group",
        "FedFSA: sensitivity over rounds",
        "FedFSA: sensitivity by client",
        "FedFSA: layers chosen",
        "FedFSA: how it works",
        "Facts",
    ]
    rows = comparison_cells(runs)
    expected = [*rows[0], *(cell for row in rows for cell in row.values())]
    assert page.cells[: len(expected)] == expected  # the headline table is the comparison
    assert "best on test (optimistic)" in page.cells
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert links == [f"#{attrs['id']}" for tag, attrs in page.tags if tag == "section"]
    drawn = [script.split('"')[1] for script in page.scripts if script.startswith("draw(")]
    assert drawn == [attrs["id"] for tag, attrs in page.tags if attrs.get("class") == "plot"]
    assert len(drawn) == 8


def test_the_page_is_self_contained(tmp_path):
    path, _ = full(tmp_path, clients=3)
    page = Page(path)
    assert path.read_text(encoding="utf-8").count(get_plotlyjs()) == 1
    assert not [attrs for _, attrs in page.tags if "src" in attrs]
    assert not [attrs for tag, attrs in page.tags if tag == "link"]
    [policy] = [attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv")]
    assert policy.startswith("default-src 'none'; script-src 'unsafe-inline'; ")
    own = [script for script in page.scripts if script != get_plotlyjs()]
    assert "showSendToCloud: false" in "".join(own)  # Plotly's default offers to upload what is shown


@pytest.mark.parametrize("name", [EVIL, "<script>x"])  # long names are shortened on axes
def test_names_are_data_not_markup(tmp_path, name):
    plain, _ = full(tmp_path / "plain", clients=4)
    evil, _ = full(tmp_path / "evil", clients=4, name=name)
    safe, attacked = Page(plain), Page(evil)
    assert [tag for tag, _ in attacked.tags] == [tag for tag, _ in safe.tags]
    assert attacked.headings[0] == f"Digits {name}"
    assert f"run {name}" in attacked.cells
    for shown in (safe, attacked):
        figures = [json.loads(script.partition(", ")[2][:-1]) for script in shown.scripts if script[:5] == "draw("]
        assert len(figures) == 8
        # Plotly reads a little HTML in what it shows, so that names are escaped inside of its data as well.
        assert "<script" not in json.dumps(figures)
    assert "&lt;script&gt;" in json.dumps(figures)


def test_a_figure_cannot_end_its_script():
    whole = page("t", "s", [Section("n", "a", go.Figure(layout={"title": "</script><b>", "height": 99}))])
    assert "</script><b>" not in whole.replace(get_plotlyjs(), "")


@pytest.mark.parametrize("world", [{"clients": 1, "rounds": 1}, {"metric": "mae", "higher_is_better": False}])
def test_small_reports(tmp_path, world):
    run = make_run("FedBN", generalized=False, val=False, **world)
    write_report(tmp_path / "report.html", "One", [run], {}, None, {}, {})
    headings = Page(tmp_path / "report.html").headings
    one_client = world.get("clients") == 1
    middle = [] if one_client else ["From client to client"]
    assert headings == ["One", "Results", "Round by round", *middle, "What it costs to send"]


def test_it_is_not_written_when_runs_cannot_be_compared(tmp_path):
    with pytest.raises(UsageError, match="two runs are called"):
        write_report(tmp_path / "report.html", "One", [make_run(), make_run()], {}, None, {}, {})
    assert not (tmp_path / "report.html").exists()
