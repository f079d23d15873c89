"""The GenEval-like reward: clauses with given detections, places by GenEval's rule, and real small models."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)  # fmt: skip
from unipic2.core.errors import InputError
from unipic2.trainer.rewards.clip import Clip, ClipScore
from unipic2.trainer.rewards.geneval import COLORS, Found, GenEval, Mask2Former, read_clauses, relations
from unipic2.trainer.rewards.registry import RewardArguments

PICTURE = Image.new("RGB", (100, 100), "white")
RGB = {"red": (255, 0, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


class ColorClip:
    """Stands for CLIP where the logic around it is tested: directions by name, pictures by their middle's colour."""

    def texts(self, texts):
        return torch.stack([torch.eye(len(COLORS))[[c in t for c in COLORS].index(True)] for t in texts])

    def images(self, images):
        found = []
        for image in images:
            middle = image.getpixel((image.width // 2, image.height // 2))
            near = min(RGB, key=lambda name: sum((a - b) ** 2 for a, b in zip(RGB[name], middle, strict=True)))
            found.append(torch.eye(len(COLORS))[COLORS.index(near)])
        return torch.stack(found)


def reward(objects, include, exclude=None, tag=None, image=PICTURE, strict=False):
    judge = GenEval(lambda images: [objects] * len(images), ColorClip(), strict)
    return judge(["p"], [image], include=[include], exclude=[exclude], tag=[tag])[0]


def thing(name, x=0, y=0, score=0.95, size=20):
    return Found(name, score, (x, y, x + size, y + size))


@pytest.mark.parametrize(("n", "soft"), [(0, 0.0), (1, 1 / 3), (2, 2 / 3), (3, 1.0), (4, 2 / 3), (6, 0.0), (9, 0.0)])
def test_counts_are_exact(n, soft):
    objects = [thing("cup")] * n + [thing("dog")]
    assert reward(objects, [{"class": "cup", "count": 3}], tag="counting") == pytest.approx(soft)
    assert reward(objects, [{"class": "cup", "count": 3}], strict=True) == float(n == 3)


@pytest.mark.parametrize("count", [2.0, "2"])
def test_counts_of_other_types_are_numbers(count):
    assert read_clauses([{"class": "cup", "count": count}], "row") == [{"class": "cup", "count": 2}]


def test_counting_asks_for_more_certainty():
    objects = [thing("cup"), thing("cup", score=0.5)]
    asked = [{"class": "cup", "count": 2}]
    assert reward(objects, asked, tag="counting") == 0.5 and reward(objects, asked, tag="two_object") == 1
    assert reward([thing("cup", score=0.2)], [{"class": "cup", "count": 1}]) == 0


def test_too_many_are_too_many():
    asked, excluded = [{"class": "cup", "count": 2}], [{"class": "cup", "count": 3}]
    assert reward([thing("cup")] * 2, asked, excluded) == 1
    assert reward([thing("cup")] * 3, asked, excluded) == 0.5, "as without what is excluded"
    assert reward([thing("cup")] * 3, asked, excluded, strict=True) == 0
    assert reward([thing("cup")] * 2 + [thing("dog")], asked, [{"class": "dog", "count": 1}]) == 0.5


@pytest.mark.parametrize("asked", [1, 2, 4])
def test_a_row_of_the_benchmarks_counting_falls_with_the_distance_to_the_count(asked):
    """Its rows have one too many in `exclude`; nothing at all must not be better than one too many."""
    row = [{"class": "cup", "count": asked}], [{"class": "cup", "count": asked + 1}]
    found = [reward([thing("cup")] * n, *row, tag="counting") for n in range(2 * asked + 1)]
    assert found == pytest.approx([1 - abs(n - asked) / asked for n in range(2 * asked + 1)])


def test_the_wrong_place_gets_nothing_for_the_place():
    """A public implementation gives half of it for objects that are there; the other half must not come with them."""
    asked = [{"class": "dog", "count": 1}, {"class": "cup", "count": 1, "position": ["left of", 0]}]
    left, right = [thing("dog", 70, 40), thing("cup", 10, 40)], [thing("dog", 10, 40), thing("cup", 70, 40)]
    assert reward(left, asked) == 1 and reward(left, asked, strict=True) == 1
    assert reward(right, asked) == pytest.approx(2 / 3) and reward(right, asked, strict=True) == 0
    assert reward([thing("cup", 10, 40)], asked) == pytest.approx(1 / 3), "nothing to be left of"


@pytest.mark.parametrize(
    ("box", "found"),
    [
        ((0, 40, 20, 60), {"left of"}), ((80, 40, 100, 60), {"right of"}), ((40, 0, 60, 20), {"above"}),
        ((40, 80, 60, 100), {"below"}), ((0, 0, 20, 20), {"left of", "above"}), ((42, 40, 62, 60), set()),
    ],
)  # fmt: skip
def test_places(box, found):
    assert relations(box, (40, 40, 60, 60)) == found


def test_colours_are_those_of_the_object_alone():
    image = PICTURE.copy()
    ImageDraw.Draw(image).rectangle((40, 40, 59, 59), fill="red")
    mask = np.zeros((100, 100), dtype=bool)
    mask[40:60, 40:60] = True
    cup = Found("cup", 0.9, (40, 40, 60, 60), mask)
    assert reward([cup], [{"class": "cup", "count": 1, "color": "red"}], image=image) == 1
    assert reward([cup], [{"class": "cup", "count": 1, "color": "blue"}], image=image) == 0.5
    # Behind the mask the picture is grey, whatever it was.
    seen = []

    class Watch(ColorClip):
        def images(self, images):
            seen.extend(images)
            return super().images(images)

    wide = Found("cup", 0.9, (30, 30, 70, 70), mask)
    GenEval(lambda images: [[wide]], Watch())(["p"], [image], include=[[{"class": "cup", "count": 1, "color": "red"}]])
    assert seen[0].size == (40, 40) and seen[0].getpixel((0, 0)) == (153, 153, 153)
    assert seen[0].getpixel((20, 20)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("clause", "said"),
    [
        ({"color": "grey"}, "found colour 'grey', expected one of red, orange"),
        ({"position": ["beside", 0]}, "found position 'beside', expected one of left of, right of, above, below"),
        ({"position": ["left of", 1]}, "found a position to itself, entry 1"),
        ({"position": ["left of", 2]}, "found .*GenEval's form"),
        ({"position": "left of"}, "found .*GenEval's form"),
    ],
)
def test_what_would_never_hold_is_no_clause(clause, said):
    with pytest.raises(InputError, match=f"include of a row: {said}"):
        reward([], [{"class": "dog", "count": 1}, {"class": "cup", "count": 1, **clause}])


def test_columns_are_looked_through_before_anything_is_drawn():
    judge = GenEval(lambda images: [[]] * len(images), ColorClip())
    judge.detector.classes = {"cup", "dog"}
    good = json.dumps([{"class": "cup", "count": 1}])
    judge.check_column("include", [("row 0 of a.jsonl", good), ("row 1 of a.jsonl", "")])
    for bad, said in (("[{", "GenEval's form"), (good.replace("cup", "cap"), "'cap', .*Did you mean cup")):
        with pytest.raises(InputError, match=f"include of row 1 of a.jsonl: found .*{said}"):
            judge.check_column("include", [("row 0 of a.jsonl", good), ("row 1 of a.jsonl", bad)])


def test_rows_without_a_question_and_rows_as_text():
    judge = GenEval(lambda images: [[thing("cup")]] * len(images), ColorClip())
    include = [None, json.dumps([{"class": "cup", "count": 1}]), [{"class": "dog", "count": 1}], ""]
    assert judge(["p"] * 4, [PICTURE] * 4, include=include) == [None, 1.0, 0.0, None]
    assert judge(["p"], [PICTURE]) == [None]


@pytest.mark.parametrize(
    "include", ["{not json", [{"class": "cup"}], [{"class": "cup", "count": 0}], 7,
                [{"class": "cup", "count": 1, "position": ["above", 4]}]],
)  # fmt: skip
def test_questions_in_another_form(include):
    with pytest.raises(InputError, match="include of a row: found"):
        reward([], include)


def test_classes_that_the_detector_does_not_know():
    """They would count as never there."""

    class Detector:
        classes = {"cup"}

        def __call__(self, images):
            return [[thing("cup")]] * len(images)

    judge = GenEval(Detector(), ColorClip())
    assert judge(["p"], [PICTURE], include=[[{"class": "cup", "count": 1}]]) == [1.0]
    with pytest.raises(InputError, match="found 'cupp', expected a class that the detector knows. Did you mean cup"):
        judge(["p"], [PICTURE], include=[[{"class": "cupp", "count": 1}]])


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("motorbike", "motorcycle"), ("aeroplane", "airplane"), ("sofa", "couch"), ("pottedplant", "potted plant"),
        ("diningtable", "dining table"), ("tvmonitor", "tv"), ("mouse", "computer mouse"), ("remote", "tv remote"),
        ("keyboard", "computer keyboard"),
    ],
)  # fmt: skip
def test_classes_that_detectors_call_otherwise_than_geneval(said, name):
    """The default detector's names of nine classes are not the benchmark's; CLIP is asked by the benchmark's."""

    class Detector:
        classes = {said, "cup"}

        def __call__(self, images):
            return [[thing(said)]] * len(images)

    class Texts(ColorClip):
        def texts(self, texts):
            asked.extend(texts)
            return super().texts(texts)

    asked = []
    for word in (said, name):
        judge = GenEval(Detector(), Texts())
        assert judge(["p"], [PICTURE], include=[[{"class": word, "count": 1, "color": "white"}]]) == [1.0]
    assert f"a photo of a white {name}" in asked and f"a photo of a white {said}" not in asked


# Real classes of small random models


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = CLIPTextConfig(
        **sizes, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, max_position_embeddings=14,
    )  # fmt: skip
    vision = CLIPVisionConfig(**sizes, image_size=32, patch_size=8)
    CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_clip_score_is_the_cosine_of_clips_own_output(clip_folder):
    score = ClipScore(Clip(str(clip_folder)))
    prompts, images = ["a red circle", "a blue square"], [Image.new("RGB", (40, 30), c) for c in ("red", "blue")]
    found = score(prompts, images, source_image=[None, None])
    clip = Clip(str(clip_folder))
    tokens = clip.tokenizer(prompts, padding=True, return_tensors="pt")
    pixels = clip.processor(images, return_tensors="pt").pixel_values
    whole = clip.model(**tokens, pixel_values=pixels)
    torch.testing.assert_close(torch.tensor(found), (whole.text_embeds * whole.image_embeds).sum(1))
    assert score(prompts, images, source_image=[PICTURE, None])[0] is None


@pytest.mark.parametrize("name", ["pick_score", "hps_v2"])
def test_scores_of_peoples_choices_are_the_cosine_by_their_own_model(clip_folder, name):
    arguments = RewardArguments(reward_funcs=[name], **{f"{name}_name_or_path": str(clip_folder)})
    (score,) = arguments.load_rewards(torch.device("cpu"))
    images = [Image.new("RGB", (40, 32), color) for color in ("red", "blue")]
    given = {"prompts": ["red", "blue"], "images": images, "source_image": [None, images[0]]}
    assert score.__name__ == name and score(**given) == ClipScore(Clip(str(clip_folder)))(**given)
    assert score(**given)[1] is None
    if name == "hps_v2":
        with pytest.raises(InputError, match="hps_v2_name_or_path: found nothing"):
            RewardArguments(reward_funcs=[name]).check_rewards()


def test_a_real_detector(tmp_path, clip_folder):
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=6,
        id2label={0: "cup", 1: "dog"},
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.bias.copy_(torch.tensor([4.0, 0.0, -4.0]))  # sure of cups
        model.class_predictor.weight.zero_()
    model.save_pretrained(tmp_path / "detector")
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "detector")
    detector = Mask2Former(str(tmp_path / "detector"), batch_size=2)
    images = [Image.effect_noise((80, 48), 90).convert("RGB") for _ in range(3)]
    seen = detector.processor(images, return_tensors="pt").pixel_values
    assert seen.shape[-2:] == (800, 1344), (
        "as large as GenEval's, in whole patches, not what the model's own file says"
    )
    found = detector(images)
    other = Image.effect_noise((48, 96), 90).convert("RGB")
    mixed = detector([images[0], other, images[1]])
    assert all(item.mask.shape == (96, 48) for item in mixed[1])
    assert [len(objects) for objects in mixed] == [len(found[0]), len(detector([other])[0]), len(found[1])]
    assert len(found) == 3 and any(found), "some masks of a random model are not empty"
    for item in (item for objects in found for item in objects):
        left, top, right, bottom = item.box
        assert item.name == "cup" and 0.3 <= item.score <= 1 and item.mask.shape == (48, 80)
        assert 0 <= left < right <= 80 and 0 <= top < bottom <= 48
        assert item.mask[int(top) : int(bottom), int(left) : int(right)].sum() == item.mask.sum()
    judge = GenEval.from_pretrained(str(tmp_path / "detector"), str(clip_folder))
    rewards = judge(["p"] * 3, images, include=[[{"class": "cup", "count": 1, "color": "red"}]] * 3)
    assert all(0 <= value <= 1 for value in rewards)


def test_models_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="detector .*nothing: found"):
        Mask2Former(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="CLIP .*nothing: found"):
        Clip(str(tmp_path / "nothing"))
