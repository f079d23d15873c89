"""Questions about the micro world and the small Qwen2.5-VL that learns to answer them."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from unipic2.trainer.micro import vlm as module
from unipic2.trainer.micro.questions import KINDS, PICTURE_KINDS, Question, ask, describe_scene, listed
from unipic2.trainer.micro.tasks import SIDES, is_held_out
from unipic2.trainer.micro.vlm import QuestionDataset, question_accuracy, train_vlm
from unipic2.trainer.micro.world import COLORS, GROUNDS, SHAPES, Scene, Thing


def quarter(x: int, y: int) -> str:
    return f"{'top' if y < 32 else 'bottom'} {'left' if x < 32 else 'right'}"


def right(question: Question) -> str | None:
    """Answer a question about a picture from its words and the scene, another way than it was made."""
    words, things = question.text.rstrip("?.").split(), question.scene.things
    if question.text == "what color is the background?":
        return question.scene.ground
    if question.kind == "what":
        return next(t.shape for t in things if t.color == words[-1])
    if question.kind == "color":
        return next(t.color for t in things if t.shape == words[-1])
    if question.kind == "exists":
        return "yes" if " ".join(words[-2:]) in {t.name for t in things} else "no"
    if question.kind == "how_many":
        asked = [word.removesuffix("es") if word == "crosses" else word.removesuffix("s") for word in words[2:-2]]
        kinds = [word for word in asked if word != "shape"]
        count = sum(all(word in (t.shape, t.color) for word in kinds) for t in things)
        return ["none", "one", "two", "three", "four"][count]
    if question.kind == "where":
        thing = next(t for t in things if t.name == " ".join(words[-2:]))
        return quarter(thing.x, thing.y)
    if question.kind == "at":
        there = [t.name for t in things if quarter(t.x, t.y) == " ".join(words[-2:])]
        return ", ".join(f"a {name}" for name in sorted(there)) or "nothing"
    if question.kind == "beside":
        other = next(t for t in things if t.name == " ".join(words[-2:]))
        thing = next(t for t in things if t is not other)
        dx, dy = thing.x - other.x, thing.y - other.y
        holds = {"left": dx < 0, "right": dx > 0, "above": dy < 0, "below": dy > 0}[words[2]]
        return f"a {thing.name}" if holds else None
    return None


@pytest.mark.parametrize("kind", PICTURE_KINDS)
def test_answers_follow_from_the_picture(kind):
    rng = np.random.default_rng(1)
    questions = [ask(rng, kind) for _ in range(200)]
    assert all(q.kind == kind and q.scene is not None for q in questions)
    if kind != "describe":
        assert [q.answer for q in questions] == [right(q) for q in questions]
    most = Counter(q.answer for q in questions).most_common(1)[0][1]
    assert most < 150, "one answer would do for most"


def test_descriptions_have_one_order():
    circle, square = Thing("circle", "red", 20, 20, 9), Thing("square", "blue", 44, 44, 9)
    assert describe_scene(Scene("white", (circle, square))) == "a blue square, a red circle on white"
    assert describe_scene(Scene("white", (square, circle))) == "a blue square, a red circle on white"
    assert listed([]) == "nothing"


def test_prompts_and_instructions_keep_to_their_side_of_the_split():
    rng = np.random.default_rng(2)
    for held_out in (False, True):
        edits = [ask(rng, "edit", held_out) for _ in range(100)]
        split = [q for q in edits if q.text.split()[0] in ("add", "draw", "turn", "replace")]
        assert split
        assert all(is_held_out(q.text.removesuffix(". what is there then?")) == held_out for q in split)
    assert all(ask(rng, "prompt").scene is None for _ in range(20))


def test_prompts_say_what_is_at_which_side():
    rng = np.random.default_rng(3)
    questions = [ask(rng, "order") for _ in range(200)]
    assert {q.text.split()[-1] for q in questions} == {"left?", "right?", "top?", "bottom?"}
    first_asked = set()
    for question in questions:
        prompt, asked = question.text.removeprefix("a picture of ").split(". what is at the ")
        first, relation, second = re.fullmatch(r"(a \w+) (left of|right of|above|below) (a \w+)", prompt).groups()
        sides = {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}
        assert question.scene is None
        assert question.answer == (first if sides[relation] == asked.rstrip("?") else second)
        first_asked.add(question.answer == first)
    assert first_asked == {True, False}, "both things are asked for"


def test_instructions_say_where_a_thing_goes():
    """The side is in the words, the other half of the answer in the picture."""
    rng = np.random.default_rng(4)
    questions = [ask(rng, "moved") for _ in range(200)]
    assert {q.answer for q in questions} == {"top left", "top right", "bottom left", "bottom right"}
    for question in questions:
        pattern = r"move the (\w+ \w+) to the (\w+)\. where is the (\w+ \w+) then\?"
        name, side, asked = re.fullmatch(pattern, question.text).groups()
        thing = next(t for t in question.scene.things if t.name == name)
        x = {"left": 0, "right": 63}.get(side, thing.x)
        y = {"top": 0, "bottom": 63}.get(side, thing.y)
        assert asked == name and question.answer == quarter(x, y)


def test_each_word_is_one_token(vlm_tokenizer):
    for word in (*SHAPES, *COLORS, *GROUNDS, *SIDES, "above", "below", "background"):
        assert len(vlm_tokenizer(f"a {word}").input_ids) == 2, word
    assert {len(build.input_ids) for build in map(vlm_tokenizer, ("<|im_start|>", "<|image_pad|>"))} == {1}
    text = "make <it> 3 times ü"
    assert vlm_tokenizer.decode(vlm_tokenizer(text).input_ids) == text


def test_only_answers_count_in_the_loss(vlm_tokenizer, make_vlm):
    vlm = make_vlm()
    questions = [QuestionDataset(len(KINDS), 0)[i] for i in range(len(KINDS))]
    batch = module._Collator(vlm, vlm_tokenizer)(questions)
    for row, question in zip(batch["labels"], questions, strict=True):
        assert vlm_tokenizer.decode(row[row != -100]) == f"{question.answer}<|im_end|>"
    pictures = sum(q.scene is not None for q in questions)
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4]] * pictures
    assert int((batch["input_ids"] == vlm.config.image_token_id).sum()) == 4 * pictures
    assert vlm(**batch).loss.isfinite()


def test_the_same_seed_asks_the_same_and_questions_do_not_repeat():
    a, b = QuestionDataset(90, 3), QuestionDataset(90, 3)
    assert [a[i] for i in range(90)] == [b[i] for i in range(90)]
    assert len({(q.text, q.scene) for q in (a[i] for i in range(90))}) > 85
    assert a[0] != QuestionDataset(90, 4)[0]


def test_it_learns_and_is_frozen(vlm_tokenizer, make_vlm, tmp_path):
    """Enough to see the loss fall; the real one takes minutes."""
    vlm = make_vlm()
    batch = module._Collator(vlm, vlm_tokenizer)([QuestionDataset(64, 9)[i] for i in range(64)])
    with torch.no_grad():
        before = vlm(**batch).loss
    train_vlm(vlm, vlm_tokenizer, tmp_path, steps=25, seed=0, batch_size=16)
    after = vlm(**batch).loss
    assert after < 0.7 * before
    assert not any(p.requires_grad for p in vlm.parameters())


def test_accuracy_counts_what_is_right_word_for_word(vlm_tokenizer, make_vlm, monkeypatch):
    vlm = make_vlm()
    scores, _ = question_accuracy(vlm, vlm_tokenizer, 2 * len(KINDS), seed=0)
    assert scores["accuracy"] == 0 and scores["n"] == 2 * len(KINDS) and set(scores["kinds"]) == set(KINDS)

    def cheat(vlm, tokenizer, collator, questions, length):
        return [q.answer if q.kind == "color" else f"{q.answer}s" for q in questions]

    monkeypatch.setattr(module, "_answer", cheat)
    scores, given = question_accuracy(vlm, vlm_tokenizer, 2 * len(KINDS), seed=0)
    assert scores["kinds"]["color"] == 1 and scores["accuracy"] == round(1 / len(KINDS), 4)
    assert len({(q.text, q.scene) for q, _ in given}) == 2 * len(KINDS)


def test_batched_answers_are_those_of_each_alone(vlm_tokenizer, make_vlm, randomise):
    """Padding on the left of questions of different lengths changes nothing."""
    vlm = randomise(make_vlm())
    collator = module._Collator(vlm, vlm_tokenizer)
    rng = np.random.default_rng(5)
    questions = [ask(rng, kind) for kind in KINDS]
    together = module._answer(vlm, vlm_tokenizer, collator, questions, 5)
    assert together == [module._answer(vlm, vlm_tokenizer, collator, [q], 5)[0] for q in questions]
    assert len(set(together)) > 1
