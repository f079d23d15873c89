"""The micro world: scenes, prompts, edits, and a verifier that must not be fooled."""

from dataclasses import replace
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from unipic2.core.errors import InputError
from unipic2.core.micro import IMAGE_SIZE
from unipic2.trainer.micro.codec import encode, sample_scenes
from unipic2.trainer.micro.dataset import MicroDataset
from unipic2.trainer.micro.evaluate import eval_edit_tasks, eval_t2i_tasks
from unipic2.trainer.micro.tasks import (
    EDIT_KINDS,
    RELATIONS,
    T2I_KINDS,
    EditTask,
    T2ITask,
    describe,
    is_held_out,
    phrasings,
    relation_holds,
    relation_of,
    reworded,
    sample_edit,
    sample_t2i,
    shares_color,
    undone,
)
from unipic2.trainer.micro.verifier import read_scene, verify_edit, verify_t2i
from unipic2.trainer.micro.world import (
    COLORS,
    GROUNDS,
    MAX_OBJECTS,
    MAX_RADIUS,
    MIN_RADIUS,
    SHAPES,
    Scene,
    Thing,
    place,
    render,
)


def t2i_samples(kind, count, seed=0):
    rng = np.random.default_rng([seed, T2I_KINDS.index(kind)])
    return [sample_t2i(rng, kind) for _ in range(count)]


def edit_samples(kind, count, seed=0):
    rng = np.random.default_rng([seed, 100 + EDIT_KINDS.index(kind)])
    return [sample_edit(rng, kind) for _ in range(count)]


# Scenes and pictures


def test_same_seed_same_world():
    for kind in T2I_KINDS:
        assert t2i_samples(kind, 5) == t2i_samples(kind, 5) != t2i_samples(kind, 5, seed=1)
    for kind in EDIT_KINDS:
        assert edit_samples(kind, 5) == edit_samples(kind, 5) != edit_samples(kind, 5, seed=1)
    scene = sample_scenes(1, seed=0)[0]
    assert render(scene).tobytes() == render(scene).tobytes()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ground", GROUNDS)
def test_renders(shape, ground):
    thing = Thing(shape, "blue", x=20, y=30, radius=9)
    image = render(Scene(ground, (thing,)))
    assert image.size == (IMAGE_SIZE, IMAGE_SIZE) and image.mode == "RGB"
    assert image.getpixel((20, 30)) == COLORS["blue"]
    pixels = np.asarray(image)
    changed = (pixels != np.array(GROUNDS[ground])).any(-1)
    rows, columns = np.where(changed)
    assert (columns.min(), columns.max()) == pytest.approx((11, 29), abs=1)
    assert (rows.min(), rows.max()) == pytest.approx((21, 39), abs=1)
    assert 60 < changed.sum() <= 20 * 20


def test_scenes_keep_their_rules():
    for scene in sample_scenes(240, seed=4):
        assert 0 <= len(scene.things) <= MAX_OBJECTS and scene.ground in GROUNDS
        for i, thing in enumerate(scene.things):
            assert thing.shape in SHAPES and thing.color in COLORS and MIN_RADIUS <= thing.radius <= MAX_RADIUS
            assert thing.radius <= thing.x <= IMAGE_SIZE - thing.radius
            assert thing.radius <= thing.y <= IMAGE_SIZE - thing.radius
            assert all(thing.clear_of(other) for other in scene.things[:i])


def test_all_words_are_used():
    words = " ".join(task.prompt for kind in T2I_KINDS for task, _ in t2i_samples(kind, 60))
    words += " ".join(task.prompt for kind in EDIT_KINDS for task in edit_samples(kind, 60))
    for word in (*SHAPES, *COLORS, *GROUNDS, *RELATIONS, "two", "three", "four", "crosses", "a picture of"):
        assert word in words


# The verifier accepts what is right


def test_real_renders_are_strict():
    verdicts = {}
    for kind in T2I_KINDS:
        verdicts[kind] = [verify_t2i(render(scene), task) for task, scene in t2i_samples(kind, 55)]
    for kind in EDIT_KINDS:
        verdicts[kind] = [verify_edit(render(task.target), task) for task in edit_samples(kind, 55)]
    accuracy = {kind: sum(v.strict for v in list_) / len(list_) for kind, list_ in verdicts.items()}
    assert sum(len(list_) for list_ in verdicts.values()) >= 600
    assert sum(accuracy.values()) / len(accuracy) >= 0.99, accuracy
    assert min(accuracy.values()) >= 0.96, accuracy


def test_scenes_are_read_back():
    for scene in sample_scenes(60, seed=5):
        read = read_scene(render(scene))
        assert read.ground == scene.ground
        assert sorted(t.name for t in read.things) == sorted(t.name for t in scene.things)
        for thing in scene.things:
            assert any(
                t.name == thing.name and max(abs(t.x - thing.x), abs(t.y - thing.y), abs(t.radius - thing.radius)) <= 1
                for t in read.things
            )


def test_a_little_noise_is_forgiven():
    rng = np.random.default_rng(0)
    for task, scene in t2i_samples("color_attribution", 20):
        pixels = np.asarray(render(scene)).astype(float) + rng.normal(0, 6, (64, 64, 3))
        assert verify_t2i(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), task).strict


def test_an_added_thing_may_stand_anywhere_free():
    rng = np.random.default_rng(0)
    for task in edit_samples("add", 20):
        new = task.target.things[-1]
        elsewhere = place(rng, list(task.source.things), new.shape, new.color, 9)
        if elsewhere is not None:
            image = render(Scene(task.source.ground, (*task.source.things, elsewhere)))
            assert verify_edit(image, task).strict


# The verifier rejects what is wrong


def other(options, but):
    return next(o for o in options if o != but)


@pytest.mark.parametrize("kind", T2I_KINDS)
def test_t2i_needs_everything_and_nothing_else(kind):
    rng = np.random.default_rng(7)
    for task, scene in t2i_samples(kind, 12):
        missing = Scene(scene.ground, scene.things[1:])
        assert not verify_t2i(render(missing), task).strict
        extra = place(rng, list(scene.things), other(SHAPES, scene.things[0].shape), "black", MIN_RADIUS)
        if extra is not None:
            verdict = verify_t2i(render(Scene(scene.ground, (*scene.things, extra))), task)
            assert "nothing else" in [c.name for c in verdict.clauses if not c.passed]
        reshaped = scene.replace_thing(0, shape=other(SHAPES, scene.things[0].shape))
        assert not verify_t2i(render(reshaped), task).strict
        assert not verify_t2i(Image.new("RGB", (64, 64), GROUNDS["white"]), task).strict


@pytest.mark.parametrize("kind", ["colors", "color_attribution"])
def test_t2i_needs_the_right_color(kind):
    for task, scene in t2i_samples(kind, 12):
        wrong = scene.replace_thing(0, color=other(COLORS, scene.things[0].color))
        verdict = verify_t2i(render(wrong), task)
        assert not verdict.strict and 0 < verdict.soft < 1


def test_swapped_colors_are_wrong():
    task = T2ITask("color_attribution", "", (("circle", "red"), ("square", "blue")))
    circle, square = Thing("circle", "red", 18, 18, 9), Thing("square", "blue", 45, 45, 9)
    swapped = (replace(circle, color="blue"), replace(square, color="red"))
    assert verify_t2i(render(Scene("white", (circle, square))), task).strict
    assert not verify_t2i(render(Scene("white", swapped)), task).strict


def test_counting_counts_exactly():
    places = [(14, 14), (48, 14), (14, 48), (48, 48)]
    for asked in (2, 3, 4):
        task = T2ITask("counting", "", (("cross", None),) * asked)
        for drawn in (1, 2, 3, 4):
            things = tuple(Thing("cross", "green", x, y, 9) for x, y in places[:drawn])
            assert verify_t2i(render(Scene("gray", things)), task).strict == (drawn == asked)


def test_positions_must_hold():
    for task, scene in t2i_samples("position", 20):
        mirrored = tuple(replace(t, x=IMAGE_SIZE - t.x, y=IMAGE_SIZE - t.y) for t in scene.things)
        verdict = verify_t2i(render(Scene(scene.ground, mirrored)), task)
        assert [c.name for c in verdict.clauses if not c.passed] == [f"first is {task.relation} second"]


def erase(image, thing, side, ground):
    left, top, right, bottom = thing.x - 13, thing.y - 13, thing.x + 13, thing.y + 13
    box = {
        "left": (left, top, thing.x, bottom),
        "right": (thing.x, top, right, bottom),
        "top": (left, top, right, thing.y),
        "bottom": (left, thing.y, right, bottom),
    }[side]
    ImageDraw.Draw(image).rectangle(box, fill=GROUNDS[ground])
    return image


HALVES = [(shape, side) for shape in SHAPES for side in ("left", "right", "top", "bottom")]
HALVES.remove(("triangle", "bottom"))  # the upper half of a triangle is a triangle


@pytest.mark.parametrize(("shape", "side"), HALVES)
def test_half_drawn_shapes_do_not_count(shape, side):
    for radius in range(MIN_RADIUS, MAX_RADIUS + 1):
        thing = Thing(shape, "purple", 32, 32, radius)
        image = erase(render(Scene("beige", (thing,))), thing, side, "beige")
        assert not verify_t2i(image, T2ITask("colors", "", ((shape, "purple"),))).strict, radius


@pytest.mark.parametrize("shape", SHAPES)
def test_two_colored_shapes_do_not_count(shape):
    thing = Thing(shape, "red", 32, 32, 10)
    left, right = render(Scene("white", (thing,))), render(Scene("white", (replace(thing, color="blue"),)))
    left.paste(right.crop((32, 0, 64, 64)), (32, 0))
    assert not verify_t2i(left, T2ITask("colors", "", ((shape, "red"),))).strict
    assert not verify_t2i(left, T2ITask("colors", "", ((shape, "blue"),))).strict


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_the_unchanged_source_never_passes(kind):
    for task in edit_samples(kind, 40):
        verdict = verify_edit(render(task.source), task)
        assert not verdict.strict, task
        assert verdict.soft < 1


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_edits_must_leave_the_rest_alone(kind):
    rng = np.random.default_rng(8)
    checked = 0
    for task in edit_samples(kind, 25):
        target = task.target
        ground = Scene(other([g for g in GROUNDS if g != task.source.ground], target.ground), target.things)
        assert not verify_edit(render(ground), task).strict
        extra = place(rng, list(target.things), "circle", "black", MIN_RADIUS)
        if extra is not None:
            assert not verify_edit(render(Scene(target.ground, (*target.things, extra))), task).strict
        edited = task.index if kind not in ("remove", "add", "background") else None
        untouched = [i for i in range(len(task.source.things) - (kind == "remove")) if i != edited]
        for i in untouched:
            checked += 1
            thing = target.things[i]
            gone = Scene(target.ground, target.things[:i] + target.things[i + 1 :])
            assert not verify_edit(render(gone), task).strict
            recolored = target.replace_thing(i, color=other(COLORS, thing.color))
            assert not verify_edit(render(recolored), task).strict
            moved = target.replace_thing(i, x=thing.x + (7 if thing.x < 32 else -7))
            assert not verify_edit(render(moved), task).strict
            shrunk = target.replace_thing(i, radius=thing.radius - 4)
            assert not verify_edit(render(shrunk), task).strict
    assert checked >= 10


@pytest.mark.parametrize("kind", ["recolor", "reshape", "move"])
def test_the_wrong_edit_does_not_pass(kind):
    for task in edit_samples(kind, 20):
        thing, before = task.target.things[task.index], task.source.things[task.index]
        wrong = {
            "recolor": {"color": next(c for c in COLORS if c not in (thing.color, before.color))},
            "reshape": {"shape": next(s for s in SHAPES if s not in (thing.shape, before.shape))},
            "move": {"x": IMAGE_SIZE - thing.x, "y": IMAGE_SIZE - thing.y},
        }[kind]
        if kind == "move" and abs(2 * thing.x - IMAGE_SIZE) + abs(2 * thing.y - IMAGE_SIZE) < 12:
            continue
        assert not verify_edit(render(task.target.replace_thing(task.index, **wrong)), task).strict


@pytest.mark.parametrize(("old", "new"), list(permutations(GROUNDS, 2)))
def test_a_ground_that_changed_in_part_is_wrong(old, new):
    """Two grounds in one picture are neither the old one nor the new one."""
    thing = Thing("square", "blue", 44, 32, 9)
    source, target = Scene(old, (thing,)), Scene(new, (thing,))
    edit = EditTask("background", f"make the background {new}", source, target)
    keep = EditTask(
        "remove", "remove the red circle", Scene(old, (thing, Thing("circle", "red", 14, 32, 8))), source, 1
    )
    changed, unchanged = render(target), render(source)
    changed.paste(unchanged.crop((0, 0, 28, 64)), (0, 0))
    unchanged.paste(render(target).crop((0, 0, 28, 64)), (0, 0))
    assert not verify_edit(changed, edit).strict, f"44 % of the ground is still {old}"
    assert not verify_edit(unchanged, keep).strict, f"44 % of the ground became {new}"


@pytest.mark.parametrize(("old", "new"), list(combinations(GROUNDS, 2)))
def test_two_grounds_in_a_drawn_picture_are_wrong(old, new):
    thing = Thing("circle", "red", 40, 32, 9)
    task, image = T2ITask("colors", "", (("circle", "red"),)), render(Scene(old, (thing,)))
    assert verify_t2i(image, task).strict
    image.paste(render(Scene(new, (thing,))).crop((0, 0, 28, 64)), (0, 0))
    assert not verify_t2i(image, task).strict


def test_many_specks_are_something_else():
    """One speck is codec noise; as many as cover a shape are not."""
    task, scene = T2ITask("colors", "", (("circle", "red"),)), Scene("white", (Thing("circle", "red", 32, 32, 9),))
    image = render(scene)
    draw = ImageDraw.Draw(image)
    draw.rectangle((4, 4, 5, 5), fill=COLORS["black"])
    assert verify_t2i(image, task).strict
    for x in range(4, 60, 6):
        for y in (4, 12, 50, 58):
            draw.rectangle((x, y, x + 2, y + 3), fill=COLORS["black"])
    assert not verify_t2i(image, task).strict


def test_noise_is_never_right():
    rng = np.random.default_rng(9)
    images = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(3)]
    images.append(Image.fromarray(np.repeat(np.repeat(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), 8, 0), 8, 1)))
    for image in images:
        assert not any(verify_t2i(image, task).strict for kind in T2I_KINDS for task, _ in t2i_samples(kind, 3))
        assert not any(verify_edit(image, task).strict for kind in EDIT_KINDS for task in edit_samples(kind, 5))


def test_other_sizes_are_refused():
    task, _ = t2i_samples("colors", 1)[0]
    with pytest.raises(InputError, match="found 65x64, expected 64x64"):
        verify_t2i(Image.new("RGB", (65, 64)), task)


# Words


def test_relations_by_hand():
    def at(x, y):
        return Thing("circle", "red", x, y, 8)

    assert relation_of(at(10, 30), at(40, 32)) == "left of"
    assert relation_of(at(40, 30), at(10, 32)) == "right of"
    assert relation_of(at(30, 10), at(32, 40)) == "above"
    assert relation_of(at(30, 40), at(32, 10)) == "below"
    assert relation_of(at(30, 30), at(37, 30)) is None  # 7 pixels are too near
    assert relation_of(at(10, 10), at(30, 31)) is None  # a tie
    assert relation_holds(at(10, 60), at(40, 5), "left of")  # judged on its own axis
    assert relation_holds(at(10, 60), at(40, 5), "below")
    assert not relation_holds(at(10, 60), at(40, 5), "right of")
    assert relation_holds(at(10, 0), at(15, 0), "left of") and not relation_holds(at(10, 0), at(14, 0), "left of")


def test_a_prompt_is_answered_by_its_scene_and_only_its_kind():
    rng = np.random.default_rng(0)
    one = Scene("white", (Thing("circle", "red", 32, 32, 9),))
    assert describe(rng, one, "colors").looks == (("circle", "red"),)
    assert describe(rng, one, "single_object").looks == (("circle", None),)
    assert all(describe(rng, one, kind) is None for kind in T2I_KINDS if kind not in ("colors", "single_object"))
    twins = Scene("white", (Thing("circle", "red", 14, 14, 9), Thing("circle", "blue", 48, 48, 9)))
    assert describe(rng, twins, "two_objects") is None and describe(rng, twins, "position") is None
    assert describe(rng, twins, "counting").prompt.endswith("two circles")
    assert all(describe(rng, Scene("white", ()), kind) is None for kind in T2I_KINDS)


@pytest.mark.parametrize(
    ("circle", "cross"), [((14, 30), (48, 38)), ((30, 14), (38, 48)), ((14, 50), (48, 20)), ((50, 14), (20, 48))]
)
def test_two_things_are_named_in_reading_order_but_a_relation_from_either_end(circle, cross):
    things = Thing("circle", "red", *circle, 9), Thing("cross", "blue", *cross, 9)
    for seed in range(8):
        rng, scene = np.random.default_rng(seed), Scene("white", things if seed % 2 else things[::-1])
        assert describe(rng, scene, "two_objects").prompt.endswith("a circle and a cross")
        assert describe(rng, scene, "two_objects").looks == (("circle", None), ("cross", None))
        assert describe(rng, scene, "color_attribution").prompt.endswith("a red circle and a blue cross")
        assert describe(rng, scene, "color_attribution").looks == (("circle", "red"), ("cross", "blue"))
    said = {words_of(describe(rng, scene, "position")) for _ in range(40)}
    relation = relation_of(*things)
    back = {"left of": "right of", "above": "below"}[relation]
    assert said == {f"a circle {relation} a cross", f"a cross {back} a circle"}


def test_held_out_words_are_about_an_eighth():
    pairs = [f"a {c} {s} and a {d} {t}" for c in COLORS for s in SHAPES for d in COLORS for t in SHAPES]
    assert 0.10 < sum(map(is_held_out, pairs)) / len(pairs) < 0.15


def words_of(task):
    return task.prompt.removeprefix("a picture of ")


def test_an_edit_shares_a_color_where_the_shape_alone_says_which_thing_is_meant():
    def thing(name, x, y):
        color, shape = name.split()
        return Thing(shape, color, x, y, 9)

    circle, square, cross = thing("red circle", 14, 14), thing("red square", 48, 14), thing("blue cross", 14, 48)
    source = Scene("white", (circle, square, cross))
    moved = Scene("white", (replace(circle, y=40), square, cross))
    added = Scene("white", (*source.things, thing("blue circle", 48, 48)))
    shares = {index: shares_color(EditTask("move", "", source, moved, index, "bottom")) for index in range(3)}
    assert shares == {0: True, 1: True, 2: False}
    assert shares_color(EditTask("add", "", source, added))
    assert not shares_color(
        EditTask("add", "", source, Scene("white", (*source.things, thing("green circle", 48, 48))))
    )
    assert not shares_color(EditTask("background", "", source, Scene("gray", source.things)))


def test_evaluation_asks_only_held_out_words():
    t2i, edits = eval_t2i_tasks(36, 1), eval_edit_tasks(36, 1)
    assert {task.kind for task in t2i} == set(T2I_KINDS) and {task.kind for task in edits} == set(EDIT_KINDS)
    assert all(is_held_out(words_of(task)) for task in t2i if task.kind == "color_attribution")
    assert all(is_held_out(task.prompt) for task in edits if task.kind in ("recolor", "reshape", "add"))
    assert t2i == eval_t2i_tasks(36, 1) != eval_t2i_tasks(36, 2)


@pytest.fixture(scope="module")
def dataset(vae):
    return MicroDataset(vae, num_scenes=90, num_edits=60, seed=0)


def test_held_out_words_never_reach_training(dataset):
    torch.manual_seed(0)
    count = len(dataset.items)
    prompts = [dataset[i]["prompt"] for i in range(count) for _ in range(12)]
    attributions = {p.removeprefix("a picture of ") for p in prompts if sum(c in p for c in COLORS) == 2}
    attributions |= {
        p.removeprefix("a picture of ") for p in prompts if " and a " in p and any(c in p for c in COLORS)
    }
    assert len(attributions) > 40
    assert not any(map(is_held_out, attributions))
    split = [t for t in dataset.edits if t.kind in ("recolor", "reshape", "add")]
    assert len(split) == 36 and not any(is_held_out(t.prompt) for t in split)
    # The pool does hold pictures that held-out words describe, so the guard above is at work.
    rng = np.random.default_rng(0)
    scenes = [item.scene for item in dataset.items if "color_attribution" in item.kinds]
    described = [words_of(describe(rng, scene, "color_attribution")) for scene in scenes for _ in range(12)]
    assert any(map(is_held_out, described))


def test_the_pool_has_as_many_hard_edits_as_asked(vae):
    """Those in which another thing has the colour of the one that is edited."""
    pool = MicroDataset(vae, num_scenes=1, num_edits=40, seed=0, same_color_edits=1.0)
    assert {task.kind for task in pool.edits} == {*EDIT_KINDS}
    assert all(shares_color(task) != (task.kind == "background") for task in pool.edits)
    with pytest.raises(InputError, match="same_color_edits: found 1.5"):
        MicroDataset(vae, num_scenes=1, num_edits=1, seed=0, same_color_edits=1.5)


def test_every_training_picture_has_a_prompt(dataset):
    """Two things answer a prompt beside the colour attributions, of which some are held out."""
    torch.manual_seed(0)
    assert all(set(item.kinds) != {"color_attribution"} for item in dataset.items)
    assert all(dataset[i]["prompt"] for i in range(len(dataset)))


def change_of(vae, task) -> float:
    """How far an edit moves the latents, at most."""
    target, source = encode(vae, [render(task.target), render(task.source)])
    return (target - source).abs().max().item()


def test_samples_of_the_training_pool(dataset, vae):
    assert len(dataset) == len(dataset.is_edit) == len(dataset.items) + 60
    assert dataset.is_edit == [False] * len(dataset.items) + [True] * 60
    torch.manual_seed(0)
    number = max(range(9, 60, 10), key=lambda i: change_of(vae, dataset.edits[i]))
    task = dataset.edits[number]
    drawn = [dataset[len(dataset.items) + number] for _ in range(24)]
    sample, edit = dataset[0], next(s for s in drawn if s["prompt"] in phrasings(task))
    assert set(sample) == {"prompt", "latents", "source_id"} and set(edit) == {*sample, "ref_latents"}
    assert sample["latents"].shape == (16, 8, 8) and sample["latents"].dtype == torch.float32
    expected = encode(vae, [render(task.target), render(task.source), render(dataset.items[0].scene)])
    got = torch.stack([edit["latents"], edit["ref_latents"], sample["latents"]])
    assert (got - expected).abs().max() < 0.15, "bfloat16 encoding"
    assert (got[0] - got[1]).abs().max() > 0.5
    assert task.kind == "background"
    for other in drawn:
        back = other["prompt"] not in phrasings(task)
        assert back == (task.source.ground in other["prompt"])
        assert torch.equal(other["ref_latents"], edit["latents" if back else "ref_latents"])
        assert torch.equal(other["latents"], edit["ref_latents" if back else "latents"])
    assert len({other["prompt"] for other in drawn}) == 4, "both directions in both wordings"


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_edits_in_other_words_and_backwards_are_right(kind):
    """What the pool says an edit's result is, the verifier finds in it; words stay on their side of the split."""
    rng = np.random.default_rng(3)
    said, directions = set(), set()
    for task in edit_samples(kind, 40):
        again, back = reworded(rng, task), undone(rng, task)
        assert (again.source, again.target, again.kind) == (task.source, task.target, kind)
        directions.add(None if back is None else back.kind)
        for edit in (again, back) if back is not None else (again,):
            said.add(edit.prompt.split(" ")[0])
            assert verify_edit(render(edit.target), edit).strict, edit.prompt
            assert not verify_edit(render(edit.source), edit).strict, edit.prompt
            if edit.kind in ("recolor", "reshape", "add"):
                assert not is_held_out(edit.prompt)
    backwards = {"remove": {"add", None}, "add": {"remove"}, "move": {None}}.get(kind, {kind})
    assert directions - {None} == backwards - {None}
    assert len(said) >= (1 if kind == "move" else 2)


def test_prompts_follow_torchs_generator(dataset):
    def draw(seed):
        torch.manual_seed(seed)
        return [dataset[i]["prompt"] for i in range(40)]

    assert draw(1) == draw(1) != draw(2)


def test_tasks_are_plain_data():
    task = edit_samples("recolor", 1)[0]
    assert isinstance(task, EditTask) and hash(task) == hash(edit_samples("recolor", 1)[0])
