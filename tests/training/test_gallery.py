"""The run gallery: what is on the page, and that the page is sound whatever the run holds."""

import base64
import io
import json
import re
import shlex
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import noise
from PIL import Image

from fastnce import cli, viz
from fastnce.errors import UserError
from fastnce.systems.translation_system import translated
from fastnce.training import Run, build_config, train
from fastnce.training.config import from_dict
from fastnce.training.gallery import same_images, training_command, write_gallery
from fastnce.training.log import read_metrics
from fastnce.viz.gallery import GalleryRun, embed, gallery_page
from fastnce.viz.line_chart import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Series,
    line_chart,
    thinned,
)
from fastnce.viz.plots import sample_grid

VOID = {"meta", "img", "input", "br", "link", "hr"}


class Page(HTMLParser):
    """Tags with their attributes, text, and the data of the charts; checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.cells, self.data, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        inside = self.open[-1] if self.open else ""
        if inside == "script" and self.tags[-1][1].get("type") == "application/json":
            self.data.append(json.loads(text))
        if inside in ("td", "th"):
            self.cells[-1] += text.replace("\xa0", " ")
        if inside != "script":
            self.text += text

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def made_up(name="run", **changes) -> GalleryRun:
    values = {
        "command": "fastnce train cut",
        "options": {"system": "cut", "lr": 0.1, "steps": 4},
        "defaults": {"lr": 0.2, "steps": 4},
    }
    return GalleryRun(name=name, **(values | changes))


@pytest.fixture
def run(whole):
    return whole("cut", log_every=2)


def test_a_run_is_on_the_page(run):
    rows = [{"name": "translated", "fid": 1.23456, "note": "a sentence"}]
    (run / "metrics.json").write_text(json.dumps({"count": 7, "rows": rows}))
    path = write_gallery([run])
    assert path == run / "gallery.html"
    page = Page(path.read_text())

    lines = read_metrics(run / "metrics.jsonl")
    charts = {"G_GAN": ["G_GAN", "D_real", "D_fake"], "NCE": ["NCE", "NCE_Y"], "G": ["G"]}
    assert len(page.data) == len(charts)
    for chart, names in zip(page.data, charts.values(), strict=True):
        for series, name in zip(chart, names, strict=True):
            assert series["steps"] == [2, 4, 6, 8]
            assert series["values"] == pytest.approx([line[name] for line in lines], rel=1e-5)

    images = page.all("img")
    assert [image["alt"] for image in images] == [f"Samples of run after step {s}" for s in (4, 8)]
    shown = Image.open(io.BytesIO(base64.b64decode(images[1]["src"].split(",")[1])))
    with Image.open(run / "samples" / "step_000008.png") as grid:
        assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(grid.convert("RGB")))

    assert page.cells[2:4] == ["translated", "1.235"]
    assert "translated: a sentence" in page.text and "note" not in page.cells
    for option, own, default in (("base_channels", "2 *", "64"), ("temperature", "0.07", "0.07")):
        assert page.cells[page.cells.index(option) + 1 :][:2] == [own, default]
    assert training_command(Run(run).config) in page.text


def test_runs_side_by_side():
    lines = [{"step": 1, "G": 1.0, "own": 5.0}, {"step": 2, "G": 2.0, "own": 5.0}]
    other = [{"step": 1, "G": 3.0}]
    runs = [
        made_up("a", losses=lines),
        made_up("b", losses=other, options={"system": "cut", "lr": 0.2, "steps": 4, "new": 1}),
    ]
    page = Page(gallery_page(runs))
    assert [[s["values"] for s in chart] for chart in page.data] == [[[1, 2], [3]], [[5, 5]]]
    assert page.cells[:4] == ["option", "a", "b", "default"]
    assert page.cells[4:12] == ["lr", "0.1 *", "0.2", "0.2", "new", "–", "1", "–"]


def test_several_runs_on_pairs_show_the_same_images(tiny, pairs, tmp_path):
    data = shutil.copytree(pairs, tmp_path / "pairs")
    kinds = {"l1": {"lambda_gan": 0.0}, "gan": {"lambda_l1": 0.0}}
    configs = [tiny("pix2pix", data=data, out=tmp_path / n, **own) for n, own in kinds.items()]
    runs = [train(config) for config in configs]
    rows = same_images({run.name: Run(run) for run in runs})
    assert list(rows) == ["input", "truth", "l1", "gan"]
    generator = Run(runs[1]).network
    expected = translated(generator, rows["input"])
    assert all(map(torch.equal, rows["gan"], expected))
    assert not torch.equal(rows["gan"][0], rows["l1"][0])
    page = Page(write_gallery(runs, tmp_path / "page.html").read_text())
    (first, *_) = page.all("img")
    shown = Image.open(io.BytesIO(base64.b64decode(first["src"].split(",")[1])))
    assert np.array_equal(np.asarray(shown), np.asarray(sample_grid(rows)))
    # One run has its own samples only, and so have runs whose data are gone.
    assert same_images({"one": Run(runs[0])}) == {}
    shutil.rmtree(data)
    assert same_images({run.name: Run(run) for run in runs}) == {}


def test_hostile_names_stay_text(tmp_path):
    bad = '</script><script>alert(1)</script><img src=x onerror="alert(2)">&"\''
    run = made_up(
        bad,
        command=bad,
        options={"system": bad, bad: bad},
        losses=[{"step": 1, bad: 1.0}, {"step": 2, bad: 2.0}],
        samples=[(1, noise(tmp_path / "a.png"))],
        evaluation={bad: bad, "rows": [{"name": bad, bad: bad}]},
    )
    for runs in ([run], [run, made_up(bad + "2", losses=run.losses)]):
        page = Page(gallery_page(runs))
        counts = Counter(tag for tag, _ in page.tags)
        assert counts["img"] == 1
        assert counts["script"] == 1 + len(page.data) == 2
        assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
        assert bad in page.text


def test_the_page_loads_nothing(run):
    text = write_gallery([run]).read_text()
    page = Page(text)
    assert not page.all("link")
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert not any("src" in attributes for attributes in page.all("script"))
    assert not re.search(r"url\(|@import|fetch\(|https?://(?!www\.w3\.org/2000/svg)", text)
    assert "default-src 'none'" in page.all("meta")[1]["content"]


def test_every_chart_and_control_has_a_name():
    lines = [{"step": 1, "G": 1.0}, {"step": 2, "G": 2.0}]
    page = Page(gallery_page([made_up(losses=lines, measurements=lines)]))
    charts = [s for s in page.all("svg") if s.get("role") == "img"]
    assert len(charts) == 4  # linear and logarithmic
    assert all(chart["aria-label"].startswith("G over the steps") for chart in charts)
    assert page.all("html")[0]["lang"] == "en"
    assert "width=device-width" in str(page.all("meta"))


def test_values_that_are_not_numbers_leave_gaps():
    nan = float("nan")
    lines = [{"step": s, "fid": v} for s, v in ((1, 1.0), (2, None), (3, nan), (4, 2.0))]
    page = Page(gallery_page([made_up(measurements=[*lines, {"step": 5, "fid": 3.0}])]))
    assert page.data[0][0]["values"] == [1, None, None, 2, 3]
    path = next(p for p in page.all("path") if p.get("class", "").startswith("series-0"))
    assert path["d"].count("M") == 2


def test_long_runs_stay_small(tmp_path):
    lines = [{"step": s, "G": float(s % 7)} for s in range(1, 10_001)]
    samples = [(s, noise(tmp_path / f"{s}.png", (900, 300), seed=s)) for s in range(1, 31)]
    text = gallery_page([made_up(losses=lines, samples=samples)])
    page = Page(text)
    (series,) = page.data[0]
    assert len(series["steps"]) == 400 and series["steps"][-1] == 10_000
    assert series["values"][0] == pytest.approx(np.mean([s % 7 for s in range(1, 26)]))
    images = page.all("img")
    assert len(images) == 24
    for image, step in ((images[0], 1), (images[-1], 30)):
        assert image["alt"] == f"Samples of run after step {step}"
    assert "6 of the sample grids in between are left out" in text
    assert len(text) < 8.5e6


def test_a_large_picture_is_reduced(tmp_path):
    path = noise(tmp_path / "a.png", (400, 300))
    whole, small = embed(path, 10**6), embed(path, 20_000)
    assert whole.uri.startswith("data:image/png") and (whole.width, whole.height) == (400, 300)
    assert small.uri.startswith("data:image/jpeg") and len(small.uri) < 20_100
    assert small.width < 400 and small.width * 3 == pytest.approx(small.height * 4, abs=4)


def test_a_chart_puts_values_where_they_belong():
    """The first step at the left, the last at the right; equal factors are equal distances with a logarithmic scale."""
    series = Series("s", (0, 5, 10), (1.0, 10.0, 100.0))
    text = line_chart([series], title="t", log=True)
    path = re.search(r'class="series-0[^"]*" d="M([^"]*)"', text)[1]
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split()) for point in path.split("L"))
    assert (x0, x1, x2) == (56, 253, 450)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y0 > y1
    assert thinned(series, 2) == Series("s", (5, 10), (5.5, 100.0))


@pytest.mark.parametrize(
    ("variant", "preset", "changes"),
    [
        ("cut", "digits", {"steps": 7, "flip": True, "data": "a folder/it's"}),
        ("fastcut", None, {"nce_layers": [0, 4], "init_gain": None}),
        ("reacgan", "digits", {"seed": 3}),
        ("moco", "digits", {"queue_size": 256}),
    ],
)
def test_the_command_trains_the_same(variant, preset, changes, capsys):
    """The command is parsed by the command line itself."""
    config = build_config(variant, preset=preset, overrides={"data": "d", "out": "o"} | changes)
    program, *words = shlex.split(training_command(config))
    assert program == "fastnce"
    assert cli.main([*words, "--dry-run"]) == 0
    assert from_dict(json.loads(capsys.readouterr().out)) == config
    assert words[1] == variant and len(words) < 20


def test_mistakes_are_named(run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    with pytest.raises(UserError, match="it has no config.json"):
        write_gallery([tmp_path])
    assert cli.main(["visualize", "gallery", "--run", str(tmp_path)]) == 2
    with pytest.raises(UserError, match="run is missing"):
        write_gallery([])
    with pytest.raises(UserError, match="a folder is named twice"):
        write_gallery([run, run / ".." / run.name])
    (run / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"metrics.json: is damaged"):
        write_gallery([run])


def test_the_script_and_the_charts_agree():
    """gallery.js knows the charts' size, and uses only elements that the page has."""
    script = Path(viz.__file__).with_name("gallery.js").read_text()
    assert f"WIDTH = {WIDTH}, LEFT = {LEFT}, RIGHT = {RIGHT};" in script
    assert f"M${{x}} {TOP}V{HEIGHT - BOTTOM}" in script
    assert all(script.count(a) == script.count(b) for a, b in ("()", "[]", "{}"))
