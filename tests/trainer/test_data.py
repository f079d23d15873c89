"""Real files of every format through `datasets`: columns, sizes, broken rows, buckets, the check and its report."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from unipic2.core.errors import InputError
from unipic2.trainer.cli import main
from unipic2.trainer.data.buckets import aspect_buckets, nearest_bucket
from unipic2.trainer.data.check import check, summary
from unipic2.trainer.data.pairs import PairDataset
from unipic2.trainer.data.prompts import PromptDataset
from unipic2.trainer.data.sources import BrokenRow, find_columns, open_source, read_pair
from unipic2.trainer.data.stream import open_stream

from .conftest import write_tar


def picture(seed: int, size=(96, 64)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.NEAREST)


def png(seed: int, size=(96, 64)) -> bytes:
    stream = io.BytesIO()
    picture(seed, size).save(stream, "PNG")
    return stream.getvalue()


def save(path, seed: int, size=(96, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(seed, size))
    return path


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def jsonl(folder):
    for i in range(3):
        save(folder / f"in/{i}.png", i)
        save(folder / f"out/{i}.png", 10 + i)
    rows = [
        {"instruction": f"edit {i}", "input_images": [f"in/{i}.png"], "output_image": f"out/{i}.png"} for i in range(3)
    ]
    return write_jsonl(folder / "edits.jsonl", rows)


def parquet(folder):
    features = datasets.Features(
        src_img=datasets.Image(),
        edited_img=datasets.Image(),
        edited_prompt_list=datasets.List(datasets.Value("string")),
    )
    columns = {
        "src_img": [{"bytes": png(i), "path": None} for i in range(3)],
        "edited_img": [{"bytes": png(10 + i), "path": None} for i in range(3)],
        "edited_prompt_list": [["another wording", f"edit {i}"] for i in range(3)],
    }
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(folder / "edits.parquet"))
    return str(folder / "edits.parquet")


def webdataset(folder):
    samples = [((f"{i:04d}.png", png(10 + i)), (f"{i:04d}.txt", f"edit {i}".encode())) for i in range(3)]
    return write_tar(folder / "pictures.tar", [member for sample in samples for member in sample])


def imagefolder(folder):
    rows = [{"file_name": f"{i}.png", "text": f"edit {i}"} for i in range(3)]
    for i in range(3):
        save(folder / f"pictures/{i}.png", 10 + i)
    write_jsonl(folder / "pictures/metadata.jsonl", rows)
    return str(folder / "pictures")


@pytest.mark.parametrize(
    ("make", "is_edit"), [(jsonl, True), (parquet, True), (webdataset, False), (imagefolder, False)]
)
def test_every_format_gives_the_same_rows(make, is_edit, tmp_path):
    source = open_source(make(tmp_path))
    assert len(source.rows) == 3
    for i in range(3):
        pair = read_pair(source.rows[i], source.columns, source.root)
        assert pair.prompt == f"edit {i}"
        assert np.array_equal(np.asarray(pair.target), np.asarray(picture(10 + i)))
        assert (pair.source is not None) == is_edit
        if is_edit:
            assert np.array_equal(np.asarray(pair.source), np.asarray(picture(i)))


def test_a_folder_is_read_by_what_it_holds(tmp_path):
    folder = tmp_path / "parquet"
    folder.mkdir()
    parquet(folder)
    assert len(open_source(str(folder)).rows) == 3
    jsonl(tmp_path / "made") if (tmp_path / "made").mkdir() is None else None
    assert open_source(str(tmp_path / "made")).columns.source == "input_images"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["src_img", "edited_img", "prompt"], ("prompt", "edited_img", "src_img")),
        (["source_image", "target_image", "instruction"], ("instruction", "target_image", "source_image")),
        (["input_images", "output_images", "caption"], ("caption", "output_images", "input_images")),
        (["source_images", "prompt", "target_image"], ("prompt", "target_image", "source_images")),
        (["image", "output_image", "prompt"], ("prompt", "output_image", "image")),
        (["image", "text"], ("text", "image", None)),
        (["jpg", "txt", "__key__"], ("txt", "jpg", None)),
        (["source_image", "edited_image", "edit_prompt"], ("edit_prompt", "edited_image", "source_image")),
        (["image", "source_image", "prompt"], ("prompt", "image", "source_image")),
        (["original_image", "edited_image", "edit_prompt"], ("edit_prompt", "edited_image", "original_image")),
        (["src_img.jpg", "edited_img.png", "txt"], ("txt", "edited_img.png", "src_img.jpg")),
        (["jpg", "json", "__key__"], ("json", "jpg", None)),
    ],
)
def test_columns_by_their_usual_names(names, expected):
    found = find_columns(names, "data")
    assert (found.prompt, found.target, found.source) == expected


def test_columns_by_hand_and_their_errors():
    names = ["before", "after", "words"]
    found = find_columns(names, "data", prompt="words", target="after", source="before")
    assert (found.prompt, found.target, found.source) == ("words", "after", "before")
    with pytest.raises(InputError, match="prompt_column of data: found 'wrods'.*Did you mean words"):
        find_columns(names, "data", prompt="wrods")
    with pytest.raises(InputError, match="columns of data: found before, after, words, expected a prompt"):
        find_columns(names, "data")
    with pytest.raises(InputError, match="a target"):
        find_columns(["prompt"], "data")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.jsonl", None, "no such file or folder"),
        ("bad.jsonl", b'{"prompt": "a"\n{oops', "rows that `datasets` can read"),
        ("bad.parquet", b"PAR1 not really", "rows that `datasets` can read"),
        ("data.csv", b"a,b\n", "found a .csv file"),
    ],
)
def test_files_that_are_no_dataset(name, content, said, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        open_source(str(tmp_path / name))


def test_rows_that_are_broken(tmp_path):
    save(tmp_path / "good.png", 1)
    (tmp_path / "cut.png").write_bytes(png(1)[:60])
    (tmp_path / "text.png").write_text("not a picture")
    cases = [
        ({"prompt": "a", "image": "gone.png"}, "no file .*gone.png"),
        ({"prompt": "a", "image": "cut.png"}, "cut.png: "),
        ({"prompt": "a", "image": "text.png"}, "text.png: cannot identify"),
        ({"prompt": "  ", "image": "good.png"}, "no text in prompt"),
        ({"prompt": "a", "image": None}, "no picture in image"),
        ({"prompt": "a", "image": "iVBORw0KGgo" * 1000}, "no file .{190,210}$"),
        ({"prompt": "a", "image": "a\0b"}, "no file"),
        ({"prompt": "a", "image": ["good.png", "good.png"]}, "2 pictures in image, one is supported"),
    ]
    for row, said in cases:
        with pytest.raises(BrokenRow, match=said):
            read_pair(row, find_columns(row, "data"), tmp_path)


def test_a_rotated_photo_is_measured_and_read_as_it_is_shown(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0, (96, 64)).save(tmp_path / "photo.jpg", exif=exif)
    source = open_source(write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "image": "photo.jpg"}]))
    assert read_pair(source.rows[0], source.columns, source.root).target.size == (64, 96)
    assert PairDataset([source], aspect_buckets(64)).buckets == [nearest_bucket(64, 96, aspect_buckets(64))]


# Buckets


@pytest.mark.parametrize("resolution", [64, 256, 512, 1024])
def test_buckets_by_area(resolution):
    buckets = aspect_buckets(resolution)
    assert (resolution, resolution) in buckets and len(set(buckets)) == len(buckets)
    for width, height in buckets:
        assert width % 32 == height % 32 == 0 and max(width, height) <= 2 * min(width, height)
        assert (height, width) in buckets
        assert abs(width * height / resolution**2 - 1) <= 0.26 if resolution >= 256 else True


def test_buckets_by_the_longer_edge():
    buckets = aspect_buckets(512, "longer_edge")
    assert all(max(size) == 512 for size in buckets) and (512, 256) in buckets and (512, 224) not in buckets
    assert nearest_bucket(1920, 1080, buckets) == (512, 288)
    assert nearest_bucket(10, 1000, buckets) == (256, 512)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("resolution", (500,)),
        ("resolution", (8192,)),
        ("bucket_mode", (512, "cubes")),
        ("max_aspect", (512, "area", 0.5)),
    ],
)
def test_buckets_that_cannot_be(field, values):
    with pytest.raises(InputError, match=field):
        aspect_buckets(*values)


# The training set


def mixed(tmp_path):
    """Return two sources: edits of two shapes, and text-to-image pictures."""
    edits, pictures = [], []
    for i in range(6):
        size = (96, 64) if i % 2 else (64, 64)
        save(tmp_path / f"s{i // 2}.png", i // 2, size)
        save(tmp_path / f"t{i}.png", 20 + i, size)
        edits.append({"prompt": f"edit {i}", "src_img": f"s{i // 2}.png", "edited_img": f"t{i}.png"})
        save(tmp_path / f"p{i}.png", 40 + i, (64, 96))
        pictures.append({"caption": f"picture {i}", "image": f"p{i}.png"})
    names = [write_jsonl(tmp_path / "e.jsonl", edits), write_jsonl(tmp_path / "p.jsonl", pictures)]
    return [open_source(name) for name in names]


def test_samples_have_the_size_of_their_bucket(tmp_path):
    dataset = PairDataset(mixed(tmp_path), aspect_buckets(64, max_aspect=3))
    assert len(dataset) == 12 and dataset.is_edit == [True] * 6 + [False] * 6
    for i in range(12):
        sample, (width, height) = dataset[i], dataset.buckets[i]
        assert sample["pixel_values"].shape == (3, height, width) and sample["pixel_values"].dtype == torch.uint8
        assert ("ref_pixel_values" in sample) == dataset.is_edit[i]
        if dataset.is_edit[i]:
            assert sample["ref_pixel_values"].shape == (3, height, width)
    ids = [dataset[i]["source_id"] for i in range(6)]
    assert len(set(ids[0::2])) == 3, "another source picture, another number"
    assert "text-to-image: 6 rows" in dataset.summary() and "edits: 6 rows" in dataset.summary()


def test_a_picture_of_its_buckets_size_stays_as_it_is(tmp_path):
    dataset = PairDataset(mixed(tmp_path)[:1], [(64, 64)])
    assert np.array_equal(dataset[0]["pixel_values"].permute(1, 2, 0).numpy(), np.asarray(picture(20, (64, 64))))


def test_a_mask_with_transparency_is_broken(tmp_path):
    """Over white, white strokes on nothing would be white all over."""
    save(tmp_path / "p.png", 0)
    Image.new("RGBA", (96, 64), (255, 255, 255, 0)).save(tmp_path / "m.png")
    row = {"prompt": "a", "src_img": "p.png", "edited_img": "p.png", "mask": "m.png"}
    source = open_source(write_jsonl(tmp_path / "d.jsonl", [row]))
    with pytest.raises(BrokenRow, match="m.png: a mask with transparency"):
        read_pair(source.rows[0], source.columns, source.root)
    report = check([source], aspect_buckets(64))
    assert report["broken"] == 0 and report["masks_with_transparency"] == 1
    assert "masks with transparency, broken where masks are read: 1" in summary(report)
    Image.new("LA", (96, 64), (255, 255)).save(tmp_path / "m.png")
    assert read_pair(source.rows[0], source.columns, source.root).mask.getextrema() == (255, 255)


def test_masks_follow_the_crop(tmp_path):
    save(tmp_path / "a.png", 0, (128, 64))
    mask = Image.new("L", (128, 64))
    mask.paste(255, (64, 0, 96, 64))  # of the centre crop (32..96) the right half
    mask.save(tmp_path / "m.png")
    row = {"prompt": "x", "src_img": "a.png", "edited_img": "a.png", "mask": "m.png"}
    dataset = PairDataset([open_source(write_jsonl(tmp_path / "d.jsonl", [row]))], [(64, 64)])
    inside = dataset[0]["loss_mask"]
    assert inside.shape == (1, 8, 8) and inside[..., 4:].min() == 1 and inside[..., :4].max() < 0.2


def test_broken_rows_are_left_out_and_counted(tmp_path, capsys):
    sources = mixed(tmp_path)
    (tmp_path / "p2.png").unlink()
    (tmp_path / "p4.png").write_bytes(png(44, (64, 96))[:200])  # the header is whole, the picture is not
    dataset = PairDataset(sources, aspect_buckets(64, max_aspect=3), max_broken=0.2)
    assert len(dataset) == 11 and list(dataset.broken) == [(1, 2)]
    index = dataset.places.index((1, 4))
    replaced = dataset[index]
    assert replaced["prompt"] == "picture 5" and len(dataset.broken) == 1
    assert list(replaced["broken"]) == [index] and "p4.png" in replaced["broken"][index]
    for _ in range(2):
        dataset.note_broken(index, replaced["broken"][index])
    assert list(dataset.broken) == [(1, 2), (1, 4)] and capsys.readouterr().err.count("left out row 4 of") == 1
    with pytest.raises(InputError, match="1 broken rows of 12, such as row 2 of .*p.jsonl: no file"):
        PairDataset(sources, aspect_buckets(64, max_aspect=3))


def test_training_stops_when_pictures_turn_out_broken(tmp_path):
    sources = mixed(tmp_path)
    for i in range(6):
        (tmp_path / f"p{i}.png").write_bytes(png(40 + i, (64, 96))[:200])
    dataset = PairDataset(sources, aspect_buckets(64, max_aspect=3), max_broken=0.2)
    dataset.note_broken(6, "cut off")
    dataset.note_broken(7, "cut off")
    with pytest.raises(InputError, match="3 broken rows of 12"):
        dataset.note_broken(8, "cut off")
    with pytest.raises(InputError, match="no whole row of 64x64"):
        dataset[len(dataset) - 1]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_folder_of_splits(tmp_path, suffix):
    """As a dataset's hub repository looks when it is downloaded."""
    for name, count in (("train-00000", 3), ("train-00001", 2), ("test-00000", 4)):
        rows = [{"prompt": f"{name} {i}", "image": "a.png"} for i in range(count)]
        if suffix == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / f"{name}.parquet"))
        else:
            write_jsonl(tmp_path / f"{name}.jsonl", rows)
    assert len(open_source(str(tmp_path)).rows) == 5
    assert len(open_source(str(tmp_path), split="test").rows) == 4
    with pytest.raises(InputError, match="dataset_split dev of .*: found files of test, train"):
        open_source(str(tmp_path), split="dev")


def test_splits_by_folders(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        (tmp_path / split / "more").mkdir(parents=True)
        rows = [{"prompt": f"{split} {i}", "image": "a.png"} for i in range(count)]
        write_jsonl(tmp_path / split / "more/rows.jsonl", rows)
    assert open_source(str(tmp_path)).rows["prompt"] == ["train 0", "train 1", "train 2"]
    assert open_source(str(tmp_path), split="val").rows["prompt"] == ["val 0", "val 1"]


def test_files_of_a_folder_are_never_left_out_silently(tmp_path):
    row = {"prompt": "a", "image": "a.png"}
    write_jsonl(tmp_path / "train_edits.jsonl", [row])
    write_jsonl(tmp_path / "pictures.jsonl", [row])
    with pytest.raises(InputError, match="pictures.jsonl beside files of train"):
        open_source(str(tmp_path))
    datasets.Dataset.from_list([row]).to_parquet(str(tmp_path / "rows.parquet"))
    with pytest.raises(InputError, match=".parquet and .jsonl files"):
        open_source(str(tmp_path))


def test_edits_in_a_folder_of_pictures(tmp_path):
    save(tmp_path / "t.png", 1)
    save(tmp_path / "s.png", 0)
    write_jsonl(
        tmp_path / "metadata.jsonl", [{"file_name": "t.png", "source_image_file_name": "s.png", "prompt": "red"}]
    )
    source = open_source(str(tmp_path))
    pair = read_pair(source.rows[0], source.columns, source.root)
    assert np.array_equal(np.asarray(pair.target), np.asarray(picture(1)))
    assert np.array_equal(np.asarray(pair.source), np.asarray(picture(0)))


@pytest.mark.parametrize("opened", ["whole", "streamed"])
def test_edits_in_a_webdataset(opened, tmp_path):
    members = []
    for i in range(3):
        text = json.dumps({"instruction": f"edit {i}", "score": 1}).encode()
        parts = {"source_image.png": png(i), "target_image.png": png(10 + i), "json": text}
        members += [(f"{i:04d}.{suffix}", content) for suffix, content in parts.items()]
    write_tar(tmp_path / "edits.tar", members)
    if opened == "whole":
        source = open_source(str(tmp_path / "edits.tar"))
        rows = list(source.rows)
    else:
        source = open_stream(str(tmp_path / "edits.tar"))
        rows = [source.row(raw) for raw in source.open()]
    assert len(rows) == 3
    for i, row in enumerate(rows):
        pair = read_pair(row, source.columns, source.root)
        assert pair.prompt == f"edit {i}"
        assert np.array_equal(np.asarray(pair.target), np.asarray(picture(10 + i)))
        assert np.array_equal(np.asarray(pair.source), np.asarray(picture(i)))


def test_what_a_tar_says_in_json_reaches_rewards(tmp_path):
    text = json.dumps({"prompt": "make it red", "requirement": "the car", "n": 2}).encode()
    write_tar(tmp_path / "rows.tar", [("0.source_image.png", png(0)), ("0.json", text)])
    row = PromptDataset([open_source(str(tmp_path / "rows.tar"), needs_target=False)], aspect_buckets(64)).read(0)
    assert (row["prompt"], row["requirement"], row["n"]) == ("make it red", "the car", 2)
    assert row["source_image"].size == nearest_bucket(96, 64, aspect_buckets(64))


def test_names_of_pictures_are_no_splits(tmp_path):
    folder = tmp_path / "pictures"
    rows = [{"file_name": name, "text": name} for name in ("train_station.png", "test.png", "sub/val_1.png")]
    for i, row in enumerate(rows):
        save(folder / row["file_name"], i)
    write_jsonl(folder / "metadata.jsonl", rows)
    assert sorted(open_source(str(folder)).rows["text"]) == sorted(row["text"] for row in rows)


def test_a_rotated_tiff_is_measured_as_it_is_read(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0, (96, 64)).save(tmp_path / "a.tif", exif=exif)
    source = open_source(write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "image": "a.tif"}]))
    width, height = read_pair(source.rows[0], source.columns, source.root).target.size
    buckets = aspect_buckets(64, max_aspect=4)
    assert (width, height) == (64, 96) and PairDataset([source], buckets).buckets == [nearest_bucket(64, 96, buckets)]


# The check


def test_the_check_counts_what_is_there(tmp_path):
    rows = [{"prompt": f"p{i}", "image": str(save(tmp_path / f"{i}.png", i, (128, 64)).name)} for i in range(4)]
    save(tmp_path / "small.png", 9, (32, 32))
    rows += [rows[1], {"prompt": "small", "image": "small.png"}, {"prompt": "x", "image": "gone.png"}]
    (tmp_path / "cut.png").write_bytes(png(5)[:200])
    rows.append({"prompt": "y", "image": "cut.png"})
    report = check([open_source(write_jsonl(tmp_path / "d.jsonl", rows))], aspect_buckets(64))
    counts = {name: report[name] for name in ("rows", "t2i", "edits", "broken", "duplicates", "upscaled")}
    assert counts == {"rows": 8, "t2i": 6, "edits": 0, "broken": 2, "duplicates": 1, "upscaled": 1}
    assert report["width"] == {"min": 32, "median": 128, "max": 128}
    assert sum(report["buckets"]["t2i"].values()) == 6
    assert [broken["row"] for broken in report["broken_rows"]] == [6, 7]
    assert report["duplicate_examples"] == [[f"{tmp_path}/d.jsonl:1", f"{tmp_path}/d.jsonl:4"]]


def test_the_check_sees_edits_of_another_shape(tmp_path):
    save(tmp_path / "wide.png", 0, (128, 64))
    save(tmp_path / "tall.png", 1, (64, 128))
    rows = [{"prompt": "a", "src_img": "wide.png", "edited_img": name} for name in ("wide.png", "tall.png")]
    report = check([open_source(write_jsonl(tmp_path / "d.jsonl", rows))], aspect_buckets(64, max_aspect=4))
    assert report["edits"] == 2 and report["edits_with_another_shape"] == 1


@pytest.mark.parametrize(("white", "dark"), [(255, 0), (1, 1)])
def test_the_check_sees_masks_of_zeros_and_ones(tmp_path, white, dark):
    for name, value in (("a", 90), ("m", white)):
        Image.new("L", (64, 64), value).save(tmp_path / f"{name}.png")
    row = {"prompt": "x", "src_img": "a.png", "edited_img": "a.png", "mask": "m.png"}
    report = check([open_source(write_jsonl(tmp_path / "d.jsonl", [row]))], aspect_buckets(64))
    assert report["masks_without_white"] == dark
    assert ("masks without white" in summary(report)) == bool(dark)


def test_the_command(tmp_path, capsys):
    data = jsonl(tmp_path)
    assert main(["data", "check", data, "--resolution", "64", "--out", str(tmp_path / "report")]) == 0
    said = capsys.readouterr().out
    assert "rows: 3 (text-to-image 0, edits 3)" in said and "96 to 96, median 96 pixels" in said
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["sources"][0]["columns"] == {
        "prompt": "instruction", "target": "output_image", "source": "input_images", "mask": None
    }  # fmt: skip
    with Image.open(tmp_path / "report/sheet.png") as sheet:
        assert sheet.width > 4 * 2 * 160
    (tmp_path / "out/1.png").unlink()
    assert main(["data", "check", data, "--resolution", "64"]) == 1
    said = capsys.readouterr().out
    assert "broken: 1" in said and "row 1: no file" in said


def test_the_check_reads_rows_without_a_picture_to_learn(tmp_path, capsys):
    """As grpo and pdtr take them: a source where there is an edit, nothing else."""
    save(tmp_path / "a.png", 0, (64, 64))
    rows = [{"prompt": "make it red", "source_image": "a.png"}, {"prompt": "make it blue", "source_image": "gone.png"}]
    rows.append({"prompt": "a cup", "source_image": None})
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(InputError, match="expected a target: .*--target_column"):
        main(["data", "check", data])
    flags = ["--no-target", "--source_column", "source_image", "--resolution", "64", "--out", str(tmp_path / "out")]
    assert main(["data", "check", data, *flags]) == 1
    said = capsys.readouterr().out
    assert "rows: 3 (text-to-image 1, edits 1)" in said and "row 1: no file" in said
    assert "width: 64 to 64" in said and "would be enlarged: 0" in said
    assert (tmp_path / "out/sheet.png").is_file()
    with pytest.raises(InputError, match="`unipic2 data check --no-target` lists them all"):
        PromptDataset([open_source(data, needs_target=False)], aspect_buckets(64))
