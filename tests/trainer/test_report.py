"""The report: one file, with every logged curve, and nothing that a name or a value could break."""

import base64
import re
from html.parser import HTMLParser

from PIL import Image
from unipic2.trainer.report import write_report


class Page(HTMLParser):
    """Collects tags with their attributes, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_a_report_stands_alone(tmp_path):
    (tmp_path / "previews").mkdir()
    Image.new("RGB", (5, 4), "red").save(tmp_path / "previews/step_000002.png")
    history = [
        {"step": s, "loss": 1 / s, "loss/t2i": 2 / s, "loss/sigma_0.00-0.25": s, "grad_norm": float("nan")}
        for s in (1, 2, 4)
    ]
    history.append({"step": 4, "train_runtime": 3.0})
    page = Page(write_report(tmp_path, history, {"output_dir": "<script>x</script>", "seed": 3}).read_text())
    assert [tag for tag, _ in page.tags].count("polyline") == 3, "loss, loss/t2i and the band; the norm is all nan"
    points = next(attrs["points"] for tag, attrs in page.tags if tag == "polyline")
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert len(heights) == 3 and heights == sorted(heights), "a falling loss falls in the picture"
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert base64.b64decode(sources[0].partition(",")[2]) == (tmp_path / "previews/step_000002.png").read_bytes()
    assert "script" not in [tag for tag, _ in page.tags] and "<script>x</script>" in page.text
    assert "seed" in page.text and "torch" in page.text
    assert not re.search(r"https?://", (tmp_path / "report.html").read_text())


def test_a_report_of_nothing(tmp_path):
    page = Page(write_report(tmp_path, [], {}).read_text())
    assert "Nothing was logged." in page.text and "No previews were drawn." in page.text


def test_one_step_is_a_dot(tmp_path):
    page = Page(write_report(tmp_path, [{"step": 1, "loss": 0.5}], {}).read_text())
    assert [tag for tag, _ in page.tags].count("circle") == 1
