"""GEdit, ImgEdit and DPG: figures worked out by hand, with a judge on this machine that also misbehaves."""

import csv
import json
import math

import datasets
import pytest
from PIL import Image
from unipic2.core.errors import InputError
from unipic2.trainer.cli import main
from unipic2.trainer.evaluation import dpg, imgedit
from unipic2.trainer.evaluation.dpg import Question, graph_score
from unipic2.trainer.rewards.endpoint import Endpoint

from .judge_server import completion, good


@pytest.fixture
def run(model, server, tmp_path):
    """Return a function that runs a benchmark's command; it returns the results."""
    out = tmp_path / "out"

    def run(benchmark, *flags, judged=True):
        judge = ["--judge-base-url", server.url, "--judge-model", "qwen"] if judged else []
        command = ["eval", benchmark, "--model", model, "--out", out, "--steps", 1, *judge, *flags]
        assert main([str(word) for word in command]) == 0
        path = out / "results.json"
        return json.loads(path.read_text()) if path.is_file() else None

    run.out = out
    return run


def text_of(request) -> str:
    return request["messages"][0]["content"][-1]["text"]


def pictures_of(request) -> int:
    return len(request["messages"][0]["content"]) - 1


# GEdit: (key, group, instruction, language, in the intersection), and what is said of it: (success, kept), quality
ROWS = [
    ("a", "color_alter", "paint it red", "en", True, (9, 4), (10, 9)),
    ("b", "color_alter", "paint it blue", "en", False, (10, 10), (10, 10)),
    ("c", "ps_human", "smile", "en", True, (8, 2), (8, 8)),
    ("a", "color_alter", "涂成红色", "cn", True, (1, 1), (4, 9)),
]


@pytest.fixture
def gedit_file(tmp_path):
    columns = {
        "key": [row[0] for row in ROWS],
        "task_type": [row[1] for row in ROWS],
        "instruction": [row[2] for row in ROWS],
        "instruction_language": [row[3] for row in ROWS],
        "Intersection_exist": [row[4] for row in ROWS],
        "input_image_raw": [Image.new("RGB", (96, 64), (i * 40, 0, 0)) for i in range(len(ROWS))],
    }
    rows = datasets.Dataset.from_dict(columns).cast_column("input_image_raw", datasets.Image())
    rows.to_parquet(tmp_path / "gedit.parquet")
    return tmp_path / "gedit.parquet"


def gedit_judge(number, request):
    """Tell edits apart by the instruction, and, asked about quality, by nothing but the order of ROWS."""
    for _, _, instruction, _, _, success, _ in ROWS:
        if pictures_of(request) == 2 and instruction in text_of(request):
            return good(*success)
    return good(9, 9)


def test_gedit_figures(run, server, gedit_file):
    server.behave = gedit_judge
    results = run("gedit", "--data", gedit_file, "--longer-edge", 64)
    items = {item["id"]: item for item in results["items"]}
    assert items["en-a"]["sc"] == 4 and items["en-a"]["pq"] == 9 and items["en-a"]["overall"] == 6.0
    overall = {"a": math.sqrt(4 * 9), "b": math.sqrt(10 * 9), "c": math.sqrt(2 * 9)}
    english = results["tasks"]["en"]
    assert english["kinds"]["color_alter"]["overall"] == pytest.approx((overall["a"] + overall["b"]) / 2, abs=1e-4)
    # Groups weigh the same: two edits of one and one of the other.
    assert english["overall"] == pytest.approx(((overall["a"] + overall["b"]) / 2 + overall["c"]) / 2, abs=1e-4)
    assert english["sc"] == pytest.approx((7 + 2) / 2) and english["pq"] == 9 and english["n"] == 3
    assert results["tasks"]["cn"]["overall"] == 3.0
    common = results["intersection"]["en"]
    assert common["n"] == 2 and common["overall"] == pytest.approx((overall["a"] + overall["c"]) / 2, abs=1e-4)
    page = (run.out / "index.html").read_text()
    assert page.count("<figure") == 4 and page.count("<figure class=failed") == 3, "7 of 10 is shown as passed"
    assert "Quoted, not measured here" in page and "UniPic2-Metaquery-9B" in page


def test_gedit_pictures_and_questions(run, server, gedit_file):
    server.behave = gedit_judge
    run("gedit", "--data", gedit_file, "--longer-edge", 64)
    assert Image.open(run.out / "images/en-a.png").size == (64, 32 * round(64 * 64 / 96 / 32))
    assert Image.open(run.out / "sources/cn-a.png").size == Image.open(run.out / "images/cn-a.png").size
    assert sorted(map(pictures_of, server.requests)) == [1] * 4 + [2] * 4
    assert {r["temperature"] for r in server.requests} == {0} and {r["model"] for r in server.requests} == {"qwen"}


def test_nothing_is_asked_twice(run, server, gedit_file):
    def behave(number, request):
        status, body = gedit_judge(number, request)
        return status, json.dumps(
            {**json.loads(body), "usage": {"prompt_tokens": 100, "completion_tokens": 7}}
        ).encode()

    server.behave = behave
    first = run("gedit", "--data", gedit_file, "--longer-edge", 64)
    assert len(server.requests) == 8
    assert first["judge"] | {"prompts": ""} == {
        "model": "qwen", "prompts": "", "requests": 8, "prompt_tokens": 800, "completion_tokens": 56, "failures": {},
    }  # fmt: skip
    again = run("gedit", "--data", gedit_file, "--only", "score", "--longer-edge", 64)
    assert len(server.requests) == 8 and again["judge"]["kept"] == 8 and "requests" not in again["judge"]
    assert again["tasks"] == first["tasks"]


def test_a_judge_that_answers_prose_is_counted_and_asked_again(run, server, gedit_file):
    def behave(number, request):
        prose = pictures_of(request) == 2 and "smile" in text_of(request)
        return completion("I would rather not.") if prose else gedit_judge(number, request)

    server.behave = behave
    found = r"found 3 of 4 \(missing: 0, broken: 0, unjudged: 1; such as en-c; no scores: 1 questions\)"
    with pytest.raises(InputError, match=found):
        run("gedit", "--data", gedit_file, "--longer-edge", 64)
    assert not (run.out / "results.json").exists()
    partial = run("gedit", "--data", gedit_file, "--only", "score", "--min-coverage", 0.7)
    assert partial["coverage"]["unjudged"] == ["en-c"] and partial["tasks"]["en"]["n"] == 2
    assert partial["judge"]["failures"] == {"no scores": 1}
    asked = len(server.requests)
    server.behave = gedit_judge
    whole = run("gedit", "--data", gedit_file, "--only", "score")
    assert len(server.requests) == asked + 1 and whole["coverage"]["unjudged"] == []


def test_a_server_that_is_down(run, gedit_file):
    flags = ["--judge-base-url", "http://127.0.0.1:9/v1", "--judge-model", "m", "--longer-edge", 64]
    with pytest.raises(InputError, match="found 0 of 4 .*connection: ConnectError"):
        run("gedit", "--data", gedit_file, *flags, judged=False)
    assert (run.out / "images/en-a.png").is_file() and not (run.out / "results.json").exists()


def test_a_judge_is_asked_for_before_anything_is_drawn(run, gedit_file):
    with pytest.raises(InputError, match="--judge-base-url: found nothing"):
        run("gedit", "--data", gedit_file, judged=False)
    assert not run.out.exists()
    assert run("gedit", "--data", gedit_file, "--only", "draw", "--longer-edge", 64, judged=False) is None
    assert len(list((run.out / "images").iterdir())) == 4


def test_rows_that_are_not_gedits(run, tmp_path):
    datasets.Dataset.from_dict({"instruction": ["x"], "input_image_raw": ["a.png"]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(InputError, match="columns of .*expected key, task_type, instruction_language, Intersection"):
        run("gedit", "--data", tmp_path / "x.parquet")


def test_a_judge_that_refuses_is_an_error_at_once(run, server, gedit_file):
    server.behave = lambda number, request: (404, b'{"message": "The model `qwen` does not exist."}')
    with pytest.raises(InputError, match="found status 404: .*does not exist.*the model's name there"):
        run("gedit", "--data", gedit_file, "--longer-edge", 64)


def test_a_judge_that_is_busy_is_waited_for(run, server, gedit_file, monkeypatch):
    """Training goes on without such a judge; figures would be worth nothing."""
    init = Endpoint.__init__
    quick = {"backoff": 0.01, "cooldown": 0.1, "max_failures": 2}
    monkeypatch.setattr(Endpoint, "__init__", lambda self, *a, **k: init(self, *a, **{**k, **quick}))
    server.behave = lambda number, request: (429, b"") if number < 6 else gedit_judge(number, request)
    results = run("gedit", "--data", gedit_file, "--longer-edge", 64)
    assert results["coverage"]["unjudged"] == [] and results["judge"]["failures"] == {}


# ImgEdit


@pytest.fixture
def imgedit_files(tmp_path):
    rows = {
        "7": {"id": "animal/x.jpg", "prompt": "add a hat", "edit_type": "add"},
        "8": {"id": "animal/x.jpg", "prompt": "add a scarf", "edit_type": "add"},
        "9": {"id": "animal/x.jpg", "prompt": "make it a painting", "edit_type": "style"},
        "10": {"id": "animal/x.jpg", "prompt": "make it darker", "edit_type": "alter"},
    }
    (tmp_path / "pictures/animal").mkdir(parents=True)
    Image.new("RGB", (64, 96), "green").save(tmp_path / "pictures/animal/x.jpg")
    (tmp_path / "basic_edit.json").write_text(json.dumps(rows))
    return "--prompts", tmp_path / "basic_edit.json", "--images", tmp_path / "pictures"


def imgedit_judge(number, request):
    scores = {
        "add a hat": (5, 3, 4),
        "add a scarf": (2, 1, 1),
        "make it a painting": (3, 3, 3),
        "make it darker": (3, 3, 3),
    }
    return next(good(*found) for words, found in scores.items() if words in text_of(request))


def test_imgedit_figures(run, server, imgedit_files):
    server.behave = imgedit_judge
    results = run("imgedit", *imgedit_files, "--longer-edge", 64)
    (edit,) = results["tasks"].values()
    assert edit["kinds"]["add"]["score"] == pytest.approx((4 + 4 / 3) / 2, abs=1e-4)
    assert edit["kinds"]["style"]["score"] == edit["kinds"]["adjust"]["score"] == 3
    assert results["overall"] == pytest.approx((edit["kinds"]["add"]["score"] + 3 + 3) / 3, abs=1e-4)
    assert edit["compliance"] == pytest.approx((3.5 + 3 + 3) / 3, abs=1e-4)
    assert edit["naturalness"] == pytest.approx((2 + 3 + 3) / 3, abs=1e-4)
    assert all(pictures_of(request) == 2 for request in server.requests)


def test_the_benchmarks_own_prompts_and_form_of_answers(run, server, imgedit_files, tmp_path):
    questions = {name: f"Rate this {name} edit {{1-5}}: <edit_prompt>" for name in imgedit.TYPES}
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge/imgedit.json").write_text(json.dumps(questions))
    server.behave = lambda number, request: completion(
        "Brief reasoning: fine\nPrompt Compliance: 5\nVisual Naturalness: 4\nPhysical & Detail Integrity: 3"
    )
    results = run("imgedit", *imgedit_files, "--longer-edge", 64, "--judge-prompts", tmp_path / "judge")
    assert results["overall"] == 4.0
    assert sorted(map(text_of, server.requests))[0] == "Rate this add edit {1-5}: add a hat"
    del questions["action"]
    (tmp_path / "judge/imgedit.json").write_text(json.dumps(questions))
    with pytest.raises(InputError, match="imgedit.json, action: found None"):
        run("imgedit", *imgedit_files, "--judge-prompts", tmp_path / "judge")
    with pytest.raises(InputError, match="--judge-prompts .*found none of the files"):
        run("imgedit", *imgedit_files, "--judge-prompts", tmp_path)


def test_shipped_questions_ask_for_three_scores_of_each_type():
    questions = imgedit.read_prompts(None)
    assert set(questions) == set(imgedit.TYPES)
    assert all("<edit_prompt>" in q and "\n1. " in q and "\n3. " in q and '{"scores"' in q for q in questions.values())


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"id": "animal/x.jpg", "prompt": "p"}, "7: found .*expected id, prompt and edit_type"),
        ({"id": "animal/x.jpg", "prompt": "p", "edit_type": "crop"}, "edit_type: found crop"),
        ({"id": "animal/y.jpg", "prompt": "p", "edit_type": "add"}, "y.jpg: found no such file.*--images"),
    ],
)
def test_rows_that_are_not_imgedits(run, imgedit_files, tmp_path, row, found):
    (tmp_path / "basic_edit.json").write_text(json.dumps({"7": row}))
    with pytest.raises(InputError, match=found):
        run("imgedit", *imgedit_files)


# DPG

GRAPH = [
    Question(1, "Is there a dog?", (), "entity"),
    Question(2, "Is it red?", (1,), "attribute"),
    Question(3, "Is its red bright?", (2,), "attribute"),
    Question(4, "Is there a cat?", (), "entity"),
]


@pytest.mark.parametrize(
    ("answers", "share", "wrong"),
    [
        ((True, True, True, True), 1.0, []),
        ((True, True, True, False), 0.75, [4]),
        ((False, True, True, True), 0.25, [1, 2, 3]),  # what depends on a no does not count, nor what depends on that
        ((True, False, True, True), 0.5, [2, 3]),
        ((False, False, False, False), 0.0, [1, 2, 3, 4]),
    ],
)
def test_questions_count_only_with_what_they_depend_on(answers, share, wrong):
    found, missed = graph_score(GRAPH, dict(enumerate(answers, start=1)))
    assert found == share and [question.number for question in missed] == wrong


def write_dpg(path, rows, columns=dpg._COLUMNS):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *rows])
    return path


DPG_ROWS = [
    ("12", "A dog, red, by a cat.", "1", "0", "entity - whole (dog)", "Is there a dog?"),
    ("12", "A dog, red, by a cat.", "2", "1", "attribute - color (dog, red)", "Is the dog red?"),
    ("12", "A dog, red, by a cat.", "3", "1,2", "relation - spatial (dog, cat, by)", "Is it by a cat?"),
    ("13", "A tree.", "1", "0", "entity - whole (tree)", "Is there a tree?"),
]


def test_dpg_figures(run, server, tmp_path):
    server.behave = lambda number, request: completion(
        "No." if "red" in text_of(request) else "Yes, there is." if "tree" in text_of(request) else " yes"
    )
    prompts = write_dpg(tmp_path / "dpg.csv", DPG_ROWS)
    results = run("dpg", "--prompts", prompts, "--samples", 2, "--width", 64, "--height", 64)
    assert [item["id"] for item in results["items"]] == ["12-0", "12-1", "13-0", "13-1"]
    assert [item["score"] for item in results["items"]] == pytest.approx([100 / 3, 100 / 3, 100, 100], abs=1e-3)
    assert results["overall"] == pytest.approx(200 / 3, abs=1e-3)
    assert results["items"][0]["notes"] == ["Is the dog red?", "Is it by a cat?"]
    assert results["items"][0]["answers"] == {"1": True, "2": False, "3": True}
    # Categories are of the bare answers, as published.
    assert results["categories"] == {
        "attribute": 0.0, "attribute - color": 0.0, "entity": 100.0, "entity - whole": 100.0,
        "relation": 100.0, "relation - spatial": 100.0,
    }  # fmt: skip
    assert len(server.requests) == 2 * (3 + 1)


def test_neither_yes_nor_no(run, server, tmp_path):
    server.behave = lambda number, request: completion("Perhaps")
    prompts = write_dpg(tmp_path / "dpg.csv", DPG_ROWS[3:])
    with pytest.raises(InputError, match="unjudged: 1; such as 13-0; neither yes nor no: 1 questions"):
        run("dpg", "--prompts", prompts, "--samples", 1, "--width", 64, "--height", 64)


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([], "found no rows"),
        ([("1", "t", "x", "0", "e (a)", "?")], "line 2: found proposition_id 'x'"),
        ([("1", "t", "1", "one", "e (a)", "?")], "line 2: found .*dependency 'one'"),
        ([("1", "t", "1", "4", "e (a)", "?")], r"1: dependency: found \[4\]"),
    ],
)
def test_rows_that_are_not_dpgs(tmp_path, rows, found):
    with pytest.raises(InputError, match=found):
        dpg.read_prompts(write_dpg(tmp_path / "dpg.csv", rows))


def test_files_that_are_not_dpgs(tmp_path):
    with pytest.raises(InputError, match="--prompts .*none.csv: found No such file"):
        dpg.read_prompts(tmp_path / "none.csv")
    with pytest.raises(InputError, match="columns of .*expected proposition_id, dependency, tuple, question"):
        dpg.read_prompts(write_dpg(tmp_path / "x.csv", [], columns=("item_id", "text")))
