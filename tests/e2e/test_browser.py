"""The real frontend in a headless Chromium: our templates are found, open, draw, and each node's help is ours.

Screenshots of every step stay in the test's temporary folder, whose path is printed.
"""

import json
import shutil
import time
import urllib.request

import pytest
from unipic2.cli.comfyui import Server, resolve_install

pytestmark = pytest.mark.comfyui

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
READY = "window.app && window.app.extensionManager && window.app.extensionManager.command"
TEMPLATE = "micro_text_to_image"


@pytest.fixture(scope="module")
def server():
    with Server(resolve_install(), cpu=True) as running:
        yield running


@pytest.fixture
def page(server):
    if BROWSER is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1500, "height": 950})
        page.set_default_timeout(60_000)
        page.goto(server.url)
        page.wait_for_function(READY, timeout=120_000)
        yield page
        browser.close()


def fetch(server, path: str) -> bytes:
    with urllib.request.urlopen(server.url + path) as answer:
        return answer.read()


def templates(server) -> list[str]:
    """Return the names of the pack's templates."""
    (names,) = [found for pack, found in json.loads(fetch(server, "/workflow_templates")).items() if "unipic2" in pack]
    return names


def graph(page) -> list[dict]:
    """Return what the canvas shows: each node's class, and whether the frontend marks it as faulty."""
    return page.evaluate("window.app.graph._nodes.map(n => ({type: n.type, red: !!n.has_errors}))")


def wait_for(what, seconds: float = 120.0):
    """Return the first true result of a function that is asked again and again."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.5)
    return found


def test_a_template_is_found_opened_and_drawn_and_help_is_ours(server, page, tmp_path):
    print(f"screenshots: {tmp_path}")
    # The frontend opens its own dialogs at its first start; this command works from any state.
    page.evaluate("window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("unipic2", exact=True).click()
    card = dialog.get_by_text(TEMPLATE, exact=True).first
    card.wait_for()
    page.screenshot(path=tmp_path / "1-templates.png")
    card.click()
    wait_for(lambda: any(node["type"] == "SaveImage" for node in graph(page)))
    nodes = graph(page)
    assert {"UniPic2MicroLoader", "UniPic2TextEncode", "KSampler"} <= {node["type"] for node in nodes}
    assert not [node for node in nodes if node["red"]]
    page.screenshot(path=tmp_path / "2-opened.png")

    page.get_by_test_id("queue-button").click()
    history = wait_for(lambda: json.loads(fetch(server, "/history")))
    (entry,) = history.values()
    assert entry["status"]["status_str"] == "success"
    (image,) = next(iter(entry["outputs"].values()))["images"]
    assert fetch(server, f"/view?filename={image['filename']}&type=output").startswith(b"\x89PNG")
    assert not [node for node in graph(page) if node["red"]]
    page.wait_for_function("window.app.graph._nodes.find(n => n.type == 'SaveImage').imgs?.length == 1")
    page.screenshot(path=tmp_path / "3-drawn.png")

    select = "window.app.canvas.selectNode(window.app.graph._nodes.find(n => n.type == 'UniPic2TextEncode'))"
    page.evaluate(select)
    page.get_by_test_id("info-button").click()
    page.get_by_text("T5-XXL exactly 256 with its padding").wait_for()
    page.screenshot(path=tmp_path / "4-help.png")


def test_every_template_opens_whole(server, page):
    """In the real frontend: all nodes of the file, and none marked but those whose files are not on this machine."""
    choose_files = {"LoadImage", "UNETLoader", "VAELoader", "CLIPLoader", "TripleCLIPLoader", "LoraLoaderModelOnly"}
    choose_files |= {"UniPic2ConnectorLoader", "UniPic2Understand"}
    names = templates(server)
    for name in names:
        path = f"/api/workflow_templates/unipic2/{name}.json"
        page.evaluate("path => fetch(path).then(r => r.json()).then(found => window.app.loadGraphData(found))", path)
        wanted = sorted(node["type"] for node in json.loads(fetch(server, path))["nodes"])
        assert sorted(node["type"] for node in graph(page)) == wanted, name
        marked = {node["type"] for node in graph(page) if node["red"]}
        assert marked <= ({"LoadImage"} if name.startswith("micro") else choose_files), name


def test_micro_templates_have_thumbnails(server):
    """Those of the published checkpoint have none: it was not run."""
    names = templates(server)
    micro = [name for name in names if name.startswith("micro")]
    assert len(micro) == 11 and len(names) == 22
    for name in micro:
        assert fetch(server, f"/api/workflow_templates/unipic2/{name}.jpg").startswith(b"\xff\xd8"), name


def test_the_server_hands_out_help_pages_and_translations(server):
    assert fetch(server, "/extensions/unipic2/docs/UniPic2PasteBack.md").startswith(b"# UniPic2 Paste Back")
    texts = json.loads(fetch(server, "/i18n"))
    for language in ("en", "zh", "ja"):
        assert "UniPic2PasteBack" in texts[language]["nodeDefs"]
