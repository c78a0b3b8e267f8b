"""Chapter 01: annotations become targets, pictures become tensors, and a broken data set is named before training."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from annotated_detr import data
from annotated_detr.data import CocoDetection, ConvertCocoPolysToMask, make_coco_transforms

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def annotation(bbox, **extra):
    return {"id": 7, "image_id": 3, "category_id": 5, "bbox": bbox, "area": 12.0, "iscrowd": 0} | extra


def prepare(*annotations, size=(100, 80), masks=False):
    image = Image.new("RGB", size)
    return ConvertCocoPolysToMask(return_masks=masks)(image, {"image_id": 3, "annotations": list(annotations)})[1]


def write_coco(folder: Path, pictures: dict[str, Image.Image], annotations=(), categories=({"id": 5, "name": "cup"},)) -> Path:
    for name, picture in pictures.items():
        picture.save(folder / name)
    images = [{"id": i, "file_name": name, "width": p.width, "height": p.height} for i, (name, p) in enumerate(pictures.items(), 1)]
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": list(annotations), "categories": list(categories)}))
    return path


# --- one picture's annotations ---------------------------------------------------------------------------------------


def test_target_has_the_promised_keys_shapes_and_types():
    target = prepare(annotation([10, 20, 30, 40]), annotation([0, 0, 5, 5], category_id=90))
    expected = {"boxes": torch.float32, "labels": torch.int64, "area": torch.float32, "iscrowd": torch.int64,
                "image_id": torch.int64, "orig_size": torch.int64, "size": torch.int64}
    assert {key: value.dtype for key, value in target.items()} == expected
    assert target["boxes"].tolist() == [[10, 20, 40, 60], [0, 0, 5, 5]]
    assert target["labels"].tolist() == [5, 90]
    assert target["orig_size"].tolist() == target["size"].tolist() == [80, 100]  # height, width
    assert target["image_id"].item() == 3


def test_crowds_and_boxes_without_area_are_dropped_in_step():
    target = prepare(
        annotation([10, 20, 30, 40], category_id=1, area=1),
        annotation([10, 20, 30, 40], category_id=2, area=2, iscrowd=1),
        annotation([10, 20, 0, 40], category_id=3, area=3),
        annotation([99, 20, 50, 40], category_id=4, area=4),   # clamped, one pixel wide
        annotation([100, 20, 50, 40], category_id=5, area=5),  # wholly outside
    )
    assert target["labels"].tolist() == [1, 4]
    assert target["area"].tolist() == [1, 4]
    assert target["boxes"].tolist() == [[10, 20, 40, 60], [99, 20, 100, 60]]


def test_a_picture_without_annotations_keeps_its_shapes():
    target = prepare(masks=True)
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,) and target["masks"].shape == (0, 80, 100)


def test_area_and_iscrowd_may_be_missing():
    target = prepare({"id": 1, "image_id": 3, "category_id": 2, "bbox": [1, 1, 4, 5]})
    assert target["area"].tolist() == [20] and target["iscrowd"].tolist() == [0]


@pytest.mark.parametrize("bad", [[1, 2, 3], [1, 2, 3, float("nan")], ["a", 1, 2, 3], None, [[1, 2], [3, 4]], 5])
def test_a_bad_box_is_named(bad):
    with pytest.raises(ValueError, match="image 3, annotation 7: bbox"):
        prepare(annotation([1, 2, 3, 4], id=6), annotation(bad))


def test_masks_from_polygon_rle_and_uncompressed_rle_agree():
    polygon = [[10, 10, 40, 10, 40, 30, 10, 30]]
    drawn = np.zeros((80, 100), dtype=np.uint8, order="F")
    drawn[10:30, 10:40] = 1
    rle = coco_mask.encode(drawn)
    rle_text = rle | {"counts": rle["counts"].decode()}
    runs = np.flatnonzero(np.diff(np.concatenate([[0], drawn.flatten("F"), [0]])))
    counts = np.diff(np.concatenate([[0], runs, [drawn.size]])).tolist()
    box = [10, 10, 30, 20]
    target = prepare(*(annotation(box, segmentation=s) for s in (polygon, rle_text, {"size": [80, 100], "counts": counts})), masks=True)
    assert target["masks"].dtype == torch.bool and target["masks"].shape == (3, 80, 100)
    for mask in target["masks"]:
        assert torch.equal(mask, torch.from_numpy(drawn).bool())


@pytest.mark.parametrize("segmentation", [None, [], [[1, 2, 3, 4]], {"size": [3, 3], "counts": [9]}, 5, [["a"] * 6]])
def test_a_bad_segmentation_is_named(segmentation):
    with pytest.raises(ValueError, match="image 3, annotation 7: the mask"):
        prepare(annotation([1, 2, 3, 4], segmentation=segmentation), masks=True)


# --- pictures as a viewer shows them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = {"CMYK": "tif", "YCbCr": "jpg"}.get(mode, "png")
    grey = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (32, 1))
    if mode == "I;16":
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(grey) if mode == "P" else Image.fromarray(grey).convert("RGB")
        picture = picture.convert(mode)
    picture.save(tmp_path / f"a.{suffix}")
    loaded = data.open_picture(tmp_path / f"a.{suffix}")
    assert loaded.mode == "RGB" and loaded.size == (64, 32)
    if mode != "1":
        assert np.abs(np.asarray(loaded).astype(int) - grey[..., None]).max() <= 4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_lie_over_white(tmp_path, mode):
    picture = Image.new("RGBA", (8, 8), (10, 10, 10, 0))
    picture.paste((10, 10, 10, 255), (0, 0, 4, 8))
    picture.convert(mode).save(tmp_path / "a.png")
    loaded = np.asarray(data.open_picture(tmp_path / "a.png"))
    assert (loaded[:, 4:] == 255).all() and (loaded[:, :4] < 20).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.new("RGB", (40, 20), "black")
    stored.paste("white", (0, 0, 20, 10))  # the stored top left quarter is white
    stored.save(tmp_path / "a.png", exif=exif)
    shown = np.asarray(data.open_picture(tmp_path / "a.png"))[..., 0] > 127
    assert shown.shape == ((20, 40) if orientation < 5 else (40, 20))
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}[orientation]
    assert shown[corner] and shown.mean() == 0.25


def test_missing_truncated_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.jpg"):
        data.open_picture(tmp_path / "nothing.jpg")
    noise(200, 100).save(tmp_path / "cut.jpg")
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    for name in ("cut.jpg", "text.png"):
        with pytest.raises(ValueError, match=f"{name}.*cannot be read"):
            data.open_picture(tmp_path / name)


@pytest.mark.parametrize("limit", [150, 50])  # PIL only warns up to twice its limit; we refuse at once
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, limit):
    noise(20, 10).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match="bomb.png.*decompression bomb"):
        data.open_picture(tmp_path / "bomb.png")


# --- the data set ----------------------------------------------------------------------------------------------------


def test_coco_detection_loads_pictures_with_their_annotations(tmp_path, capsys):
    file = write_coco(tmp_path, {"a.png": noise(30, 20), "b.png": noise(20, 30, "L")},
                      [{"id": 1, "image_id": 2, "category_id": 5, "bbox": [1, 2, 3, 4]}])
    dataset = CocoDetection(tmp_path, file)
    assert capsys.readouterr().out == ""
    assert len(dataset) == 2 and dataset.ids == [1, 2]
    assert dataset.class_names == {5: "cup"} and dataset.num_classes == 6
    image, target = dataset[1]
    assert image.mode == "RGB" and image.size == (20, 30)
    assert target["boxes"].tolist() == [[1, 2, 4, 6]] and target["image_id"].item() == 2
    assert dataset[0][1]["boxes"].shape == (0, 4)
    tensor, target = CocoDetection(tmp_path, file, make_coco_transforms("val", 64))[1]
    assert tensor.shape == (3, 96, 64) and target["orig_size"].tolist() == [30, 20] and target["size"].tolist() == [96, 64]


@pytest.mark.parametrize("content, sentence", [
    ("{", "not valid JSON"), ("[]", "holds a list"), ("{}", 'no list "images"'), ("[" * 100_000, "not valid JSON"),
    ('{"images": [{"id": "1", "file_name": "a"}]}', r"images\[0\] has id '1'"),
    ('{"images": [3]}', r"images\[0\] has no id"),
    ('{"images": [], "annotations": [], "categories": []}', "no categories"),
])
def test_a_wrong_annotation_file_is_a_sentence(tmp_path, content, sentence):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        CocoDetection(tmp_path, tmp_path / "a.json")


def test_missing_folder_and_file_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CocoDetection(tmp_path / "nowhere", tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match="a.json"):
        CocoDetection(tmp_path, tmp_path / "a.json")


def test_photographs(bccd):
    dataset = CocoDetection(bccd / "images", bccd / "train.json")
    assert len(dataset) == 205 and dataset.num_classes == 4
    entry = next(e for e in dataset.coco.dataset["annotations"] if e["id"] == 2288)
    _, target = dataset.load(dataset.ids.index(entry["image_id"]))
    assert entry["image_id"] == 171 and entry["bbox"][2:] == [0, 0]
    assert len(target["boxes"]) == len(dataset.coco.imgToAnns[171]) - 1


# --- transforms, against the reference -------------------------------------------------------------------------------


def golden_target(boxes) -> dict:
    boxes = torch.as_tensor(boxes)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return {"boxes": boxes, "labels": torch.arange(1, len(boxes) + 1), "area": area, "iscrowd": torch.zeros(len(boxes), dtype=torch.int64)}


def test_size_rule_equals_the_reference(golden):
    for width, height, short, cap, *expected in golden("transforms")["resize_w_h_short_cap_to_w_h"].tolist():
        assert data.resized_shape(width, height, short, cap or None) == tuple(expected)


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(8, 1000), st.integers(8, 2000))
def test_size_rule_never_exceeds_the_cap_by_more_than_rounding(width, height, size, cap):
    new = data.resized_shape(width, height, size, cap)
    assert min(new) >= 1 and min(new) <= size
    aspect = max(width, height) / min(width, height)
    assert max(new) <= cap + aspect  # rounding the short side up by at most one pixel costs the long side `aspect` pixels


def test_evaluation_transform_equals_the_reference(golden):
    arrays = golden("transforms")
    tensor, target = make_coco_transforms("val", 160, 200)(Image.fromarray(arrays["image"]), golden_target(arrays["boxes"]))
    np.testing.assert_allclose(tensor, arrays["eval_image"], atol=1e-5)
    np.testing.assert_allclose(target["boxes"], arrays["eval_boxes"], atol=1e-5)
    np.testing.assert_allclose(target["area"], arrays["eval_area"], rtol=1e-5)
    assert target["size"].tolist() == arrays["eval_size"].tolist()
    assert type(tensor) is torch.Tensor and type(target["boxes"]) is torch.Tensor


def test_crop_equals_the_reference(golden):
    arrays = golden("transforms")
    _, target = data.crop(Image.fromarray(arrays["image"]), golden_target(arrays["boxes"]), *arrays["crop_top_left_h_w"].tolist())
    assert target["boxes"].tolist() == arrays["crop_boxes"].tolist()
    assert target["area"].tolist() == arrays["crop_area"].tolist()
    assert target["labels"].tolist() == arrays["crop_labels"].tolist()


# --- transforms, by property -----------------------------------------------------------------------------------------


def test_what_a_crop_leaves_empty_goes_with_all_its_rows():
    target = golden_target([[0.0, 0, 10, 10], [30, 30, 50, 50]]) | {"masks": torch.ones(2, 80, 100, dtype=torch.bool)}
    image, cut = data.crop(Image.new("RGB", (100, 80)), target, 20, 20, 40, 40)
    assert image.size == (40, 40) and cut["size"].tolist() == [40, 40]
    assert cut["labels"].tolist() == [2] and cut["boxes"].tolist() == [[10, 10, 30, 30]]
    assert cut["masks"].shape == (1, 40, 40) and cut["area"].tolist() == [400] and len(cut["iscrowd"]) == 1


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), width=st.integers(40, 200), height=st.integers(40, 200), flip=st.booleans())
def test_boxes_and_masks_stay_on_their_objects(seed, width, height, flip):
    """A red rectangle is found again, by its colour, where the transformed box and mask say."""
    torch.manual_seed(seed)
    x0, y0, x1, y1 = width // 4, height // 4, width // 2, height // 2
    image = Image.new("RGB", (width, height), "blue")
    image.paste("red", (x0, y0, x1, y1))
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[0, y0:y1, x0:x1] = True
    target = golden_target([[float(x0), y0, x1, y1]]) | {"masks": mask}
    tensor, out = make_coco_transforms("train", 96, vertical_flip=flip)(image, target)
    assert type(out["masks"]) is torch.Tensor and out["masks"].dtype == torch.bool
    assert out["masks"].shape[1:] == tensor.shape[1:] == tuple(out["size"].tolist())
    red = (tensor * STD + MEAN)[0] > 0.5
    if not len(out["boxes"]):
        assert red.sum() <= tensor.shape[1] + tensor.shape[2]  # at most a blurred edge is left
        return
    h, w = tensor.shape[1:]
    centre_x, centre_y, box_width, box_height = (out["boxes"][0] * torch.tensor([w, h, w, h])).tolist()
    rows, columns = red.any(1).nonzero(), red.any(0).nonzero()
    if len(rows):
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        wanted = [centre_x - box_width / 2, centre_y - box_height / 2, centre_x + box_width / 2, centre_y + box_height / 2]
        assert max(abs(float(f) - g) for f, g in zip(found, wanted)) <= 1.5
        assert (out["masks"][0] != red).float().mean() < 0.06
    assert 0 <= out["boxes"].min() and out["boxes"].max() <= 1


def test_training_policy_has_the_papers_distribution():
    """Sizes, share of flips and share of crops over 1500 draws, at a fifth of the paper's sizes (720×480 picture)."""
    image, scales = Image.new("RGB", (144, 96)), {96, 102, 109, 115, 122, 128, 134, 141, 147, 154, 160}
    target = golden_target([[0.0, 0, 72, 96]]) | {"orig_size": torch.tensor([96, 144])}
    transform = make_coco_transforms("train", 160)
    torch.manual_seed(0)
    shapes, flips, crops = [], 0, 0
    for _ in range(1500):
        tensor, out = transform(image, target)
        shapes.append(tensor.shape[1:])
        boxes = out["boxes"]
        whole = len(boxes) and torch.allclose(boxes[0, 2:], torch.tensor([0.5, 1.0]), atol=1e-6)
        whole = whole and abs(tensor.shape[2] / tensor.shape[1] - 1.5) < 0.02
        crops += not whole
        flips += bool(whole and boxes[0, 0] > 0.5)
    assert {min(s) for s in shapes} == scales
    assert max(max(s) for s in shapes) <= 267
    counts = torch.tensor([sum(min(s) == side for s in shapes) for side in scales])
    assert ((counts - 1500 / 11).abs() < 5 * (1500 / 11) ** 0.5).all()
    assert abs(crops - 750) < 5 * (1500 / 4) ** 0.5
    assert abs(flips - (1500 - crops) / 2) < 5 * ((1500 - crops) / 4) ** 0.5


def test_paper_sizes_at_800():
    """The numbers of the policy themselves."""
    train = make_coco_transforms("train").augment.transforms
    either = train[2].transforms
    assert either[0].sizes == list(range(480, 801, 32)) and either[0].max_size == 1333
    first, window, last = either[1].transforms
    assert first.sizes == [400, 500, 600] and first.max_size is None
    assert (window.smallest, window.largest) == (384, 600) and last is either[0]
    assert make_coco_transforms("val").augment.transforms[1].sizes == [800]
    assert make_coco_transforms("val", 128).augment.transforms[1].max_size == 213


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), width=st.integers(1, 90), height=st.integers(1, 90), smallest=st.integers(1, 60), more=st.integers(0, 60))
def test_crop_window_stays_inside(seed, width, height, smallest, more):
    torch.manual_seed(seed)
    image, _ = data.RandomSizeCrop(smallest, smallest + more)(Image.new("RGB", (width, height), "white"), None)
    for side, full in zip(image.size, (width, height)):
        assert min(smallest, full) <= side <= min(smallest + more, full)
    assert np.asarray(image).min() == 255  # no pixel from outside the picture


def test_torch_manual_seed_fixes_everything():
    transform, image = make_coco_transforms("train", 64, color_jitter=0.4, vertical_flip=True), noise(90, 70)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append([transform(image, golden_target([[10.0, 10, 60, 60]])) for _ in range(5)])
    for (a, s), (b, t) in zip(*runs):
        assert torch.equal(a, b) and all(torch.equal(s[key], t[key]) for key in s)


def test_colour_jitter_changes_colours_and_nothing_else():
    torch.manual_seed(0)
    image, target = noise(64, 64), golden_target([[10.0, 10, 60, 60]])
    transform = data.DetectionTransforms(*make_coco_transforms("train", 64, color_jitter=0.4).augment.transforms[3:])
    tensor, out = transform(image, target)
    plain, same = data.DetectionTransforms()(image, target)
    assert not torch.allclose(tensor, plain) and torch.equal(out["boxes"], same["boxes"])


def test_transforms_leave_the_callers_target_alone():
    target = golden_target([[10.0, 10, 60, 60]])
    before = {key: value.clone() for key, value in target.items()}
    make_coco_transforms("train", 64)(noise(90, 70), target)
    assert target.keys() == before.keys() and all(torch.equal(target[key], before[key]) for key in target)


def test_transforms_without_target_and_without_objects():
    tensor, nothing = make_coco_transforms("val", 64)(noise(90, 70))
    assert tensor.shape == (3, 64, 82) and nothing is None
    for _ in range(8):
        _, target = make_coco_transforms("train", 64)(noise(90, 70), golden_target(torch.zeros(0, 4)))
        assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)


def test_wrong_use_of_the_transforms_is_a_sentence():
    with pytest.raises(ValueError, match='"train" or "val"'):
        make_coco_transforms("test")
    with pytest.raises(TypeError, match="RGB picture"):
        make_coco_transforms("val")(Image.new("L", (8, 8)), None)
