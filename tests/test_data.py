"""Chapter 01: annotations become targets, pictures become tensors, and a broken data set is named before training."""

import copy
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
    for name, wrong in (("cut.jpg", "cannot be read"), ("text.png", "not a picture in any format")):
        with pytest.raises(ValueError, match=f"{name}.*{wrong}"):
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
    ('{"images": [3]}', r"images\[0\] is 3, not a dictionary"),
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
    """Sizes, share of flips and share of crops over 900 draws, at a fifth of the paper's sizes (720×480 picture)."""
    image, scales = Image.new("RGB", (144, 96)), {96, 102, 109, 115, 122, 128, 134, 141, 147, 154, 160}
    target = golden_target([[0.0, 0, 72, 96]]) | {"orig_size": torch.tensor([96, 144])}
    transform = make_coco_transforms("train", 160)
    torch.manual_seed(0)
    shapes, flips, crops = [], 0, 0
    for _ in range(900):
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
    assert ((counts - 900 / 11).abs() < 5 * (900 / 11) ** 0.5).all()
    assert abs(crops - 450) < 5 * (900 / 4) ** 0.5
    assert abs(flips - (900 - crops) / 2) < 5 * ((900 - crops) / 4) ** 0.5


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


def test_one_scale_only_flips():
    image, target = noise(90, 60), golden_target([[10.0, 10, 60, 60]])
    plain = make_coco_transforms("val", 64)(image, target)[0]
    transform = make_coco_transforms("train", 64, multi_scale=False)
    torch.manual_seed(0)
    seen = [transform(image, target)[0] for _ in range(12)]
    flipped = [not torch.allclose(tensor, plain, atol=0.1) for tensor in seen]
    assert 0 < sum(flipped) < 12
    for tensor, flip in zip(seen, flipped):
        assert torch.allclose(tensor.flip(-1) if flip else tensor, plain, atol=0.1)


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


# --- the data set check ----------------------------------------------------------------------------------------------


def healthy() -> dict:
    """A small COCO file in which nothing is wrong."""
    images = [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in (1, 2, 3)]
    boxes = [[1, 2, 10, 20], [30, 20, 34, 28], [0, 0, 64, 48], [5.5, 6, 8.25, 9], [40, 10, 20, 30], [50, 40, 10, 8]]
    annotations = [{"id": i, "image_id": 1 + i % 3, "category_id": 1 + i % 2 * 4, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
                   for i, box in enumerate(boxes, 1)]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cup"}, {"id": 5, "name": "spoon"}]}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in (1, 2, 3):
        noise(64, 48).save(folder / f"{i}.png")
    return folder


def check(folder, content, tmp_path, **options) -> data.Report:
    file = tmp_path / "annotations.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return data.check_dataset(folder, file, progress=False, **options)


def kinds(report, severity=None) -> set[str]:
    return {f.kind for f in report.findings if severity in (None, f.severity)}


def test_a_healthy_data_set_has_no_findings(pictures, tmp_path):
    report = check(pictures, healthy(), tmp_path, num_queries=2)
    assert report.ok and report.findings == [] and report.num_classes == 6
    assert report.index_line() == [(1, "cup"), (5, "spoon"), (6, "no object")]
    assert report.counts == {"pictures": 3, "annotations": 6, "crowds": 0, "boxes": 6, "boxes_in_fullest_picture": 2, "pictures_without_boxes": 0}
    assert report.classes[1] == {"name": "cup", "boxes": 3, "pictures": 3}
    assert sum(report.box_sides.values()) == 6 and report.box_sides["8–16"] == 3
    assert json.loads(report.to_json())["ok"] is True


BREAKS = {  # how to break a healthy file, and what must be found: kind, severity, image, annotation
    "missing picture": (lambda d: d["images"][1].update(file_name="gone.png"), "picture missing", "error", 2, None),
    "file name": (lambda d: d["images"][1].update(file_name=7), "entry", "error", 2, None),
    "size": (lambda d: d["images"][1].update(width=65), "size disagrees", "warning", 2, None),
    "no size": (lambda d: d["images"][1].pop("width"), "size unknown", "warning", 2, None),
    "boxes for a larger picture": (
        lambda d: (d["images"][1].update(width=128, height=96), d["annotations"][0].update(bbox=[90, 70, 20, 20])),
        "boxes for another size", "error", 2, 1),
    "no area": (lambda d: d["annotations"][0].update(bbox=[1, 2, 0, 20]), "box without area", "warning", 2, 1),
    "wholly outside": (lambda d: d["annotations"][0].update(bbox=[64, 2, 5, 20]), "box without area", "warning", 2, 1),
    "partly outside": (lambda d: d["annotations"][0].update(bbox=[60, 2, 9, 20]), "box outside", "warning", 2, 1),
    "string picture id": (lambda d: d["images"][0].update(id="1"), "id", "error", None, None),
    "string reference": (lambda d: d["annotations"][0].update(image_id="2"), "id", "error", None, 1),
    "string category": (lambda d: d["annotations"][0].update(category_id="5"), "id", "error", 2, 1),
    "dangling picture": (lambda d: d["annotations"][0].update(image_id=9), "unknown picture", "warning", 9, 1),
    "dangling category": (lambda d: d["annotations"][0].update(category_id=9), "unknown category", "error", 2, 1),
    "repeated picture id": (lambda d: d["images"][1].update(id=1), "id repeats", "error", 1, None),
    "repeated category id": (lambda d: d["categories"][1].update(id=1), "id repeats", "error", None, None),
    "repeated annotation id": (lambda d: d["annotations"][1].update(id=1), "annotation id", "warning", None, 1),
    "annotation id 0": (lambda d: d["annotations"][1].update(id=0), "annotation id", "warning", None, 0),
    "negative category": (lambda d: d["categories"][0].update(id=-1), "category out of range", "error", None, None),
    "bad box": (lambda d: d["annotations"][0].update(bbox=[1, 2, "3", 4]), "box", "error", 2, 1),
    "not finite": (lambda d: d["annotations"][0].update(bbox=[1, 2, float("nan"), 4]), "box", "error", 2, 1),
    "bad area": (lambda d: d["annotations"][0].update(area="big"), "box", "error", 2, 1),
    "bad crowd": (lambda d: d["annotations"][0].update(iscrowd="0"), "iscrowd", "warning", 2, 1),
    "bad polygon": (lambda d: d["annotations"][0].update(segmentation=[[1, 2, 3]]), "segmentation", "warning", 2, 1),
    "no annotations": (lambda d: d["annotations"].pop(1) and d["annotations"].pop(3), "no boxes", "warning", 3, None),
    "no list": (lambda d: d.pop("annotations"), "section", "error", None, None),
    "same file twice": (lambda d: d["images"][1].update(file_name="1.png"), "picture listed twice", "warning", 2, None),
    "x0y0x1y1": (lambda d: [a.update(bbox=[a["bbox"][0], a["bbox"][1], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]])
                            for a in d["annotations"]], "box format", "error", 2, 1),
    "0..1": (lambda d: [a.update(bbox=[v / s for v, s in zip(a["bbox"], (64, 48, 64, 48))]) for a in d["annotations"]],
             "box format", "error", 2, 1),
}


@pytest.mark.parametrize("name", BREAKS)
def test_every_break_is_found_named_and_mended(pictures, tmp_path, name):
    breaks, kind, severity, image, annotation = BREAKS[name]
    content = healthy()
    breaks(content)
    report = check(pictures, content, tmp_path)
    finding = next(f for f in report.findings if f.kind == kind)
    assert (finding.severity, finding.image, finding.annotation) == (severity, image, annotation)
    assert finding.cure and finding.sentence in str(report)
    assert report.ok == (not kinds(report, "error"))
    before = (tmp_path / "annotations.json").read_bytes()
    mended = data.repair(pictures, tmp_path / "annotations.json", tmp_path / "out", progress=False)
    after = data.check_dataset(pictures, mended.path, progress=False)
    if kind == "boxes for another size":
        assert kinds(after) == kinds(report)  # not ours to guess
    else:
        assert after.ok and not kinds(after) - {"no boxes", "picture listed twice", "segmentation"}
    assert mended.changes or kind in ("segmentation", "no boxes", "picture listed twice", "boxes for another size")
    assert (tmp_path / "annotations.json").read_bytes() == before


def test_limits_that_you_give_are_checked(pictures, tmp_path):
    report = check(pictures, healthy(), tmp_path, num_classes=5, num_queries=1)
    assert kinds(report) == {"category out of range", "too many boxes"} and not report.ok
    assert [f.image for f in report.findings if f.kind == "too many boxes"] == [1, 2, 3]


@pytest.mark.parametrize("content", ["", "{", "null", "[1]", '"a"', "{}", "[" * 100_000, '{"images": null}', "\ud83d", "NaN", '{"images": [[]]}'])
def test_files_that_are_not_coco_end_in_a_report(pictures, tmp_path, content):
    report = check(pictures, content.encode("utf-8", "surrogatepass").decode("utf-8", "replace"), tmp_path)
    assert not report.ok and str(report) and json.loads(report.to_json())["ok"] is False


def test_a_missing_file_and_folder_end_in_a_report(tmp_path):
    assert kinds(data.check_dataset(tmp_path, tmp_path / "none.json", progress=False)) == {"json"}
    (tmp_path / "a.json").write_text(json.dumps(healthy()))
    assert kinds(data.check_dataset(tmp_path / "none", tmp_path / "a.json", progress=False), "error") == {"picture missing"}


def test_unreadable_and_rotated_pictures_are_named(tmp_path):
    for i in (1, 2, 3):
        noise(64, 48).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:900])
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(64, 48).save(tmp_path / "2.png", exif=exif)
    report = check(tmp_path, healthy(), tmp_path)
    unreadable = next(f for f in report.findings if f.kind == "picture unreadable")
    assert unreadable.image == 1 and unreadable.file == "1.png" and str(tmp_path) not in str(report)
    turned = next(f for f in report.findings if f.kind == "size disagrees")
    assert turned.image == 2 and "EXIF" in turned.sentence


def test_repair_converts_the_format_of_a_whole_file(pictures, tmp_path):
    wanted = [a["bbox"] for a in healthy()["annotations"]]
    scale = np.array([64, 48, 64, 48])
    ways = {
        "xyxy": lambda x, y, w, h: [x, y, x + w, y + h],
        "relative xywh": lambda x, y, w, h: [x, y, w, h] / scale,
        "relative xyxy": lambda x, y, w, h: [x, y, x + w, y + h] / scale,
        "relative cxcywh": lambda x, y, w, h: [x + w / 2, y + h / 2, w, h] / scale,
        "cxcywh": lambda x, y, w, h: [x + w / 2, y + h / 2, w, h],
    }
    for way, convert in ways.items():
        content = healthy()
        for entry in content["annotations"]:
            entry["bbox"] = list(map(float, convert(*entry["bbox"])))
        report = check(pictures, content, tmp_path)
        assert kinds(report) == {"box format"}, way
        mended = json.loads(data.repair(pictures, tmp_path / "annotations.json", tmp_path / way, progress=False).path.read_text())
        np.testing.assert_allclose([a["bbox"] for a in mended["annotations"]], wanted, atol=1e-9, err_msg=way)


def test_an_empty_box_does_not_hide_the_format():
    corners = torch.tensor([[10.0, 10, 40, 40], [30, 20, 60, 45], [50, 30, 50, 40], [20, 5, 64, 48]])
    assert data.guess_box_format(corners, torch.tensor([[64.0, 48]] * 4)) == "xyxy"


def test_repair_follows_ids_of_every_type(pictures, tmp_path):
    content = healthy()
    content["images"][0]["id"], content["images"][1]["id"], content["images"][2]["id"] = "1", "a-uuid", 3.0
    content["categories"][0]["id"], content["categories"][1]["id"] = "0005", 5
    for entry in content["annotations"]:
        entry["image_id"] = {1: "1", 2: "a-uuid", 3: 3}[entry["image_id"]]
        entry["category_id"] = {1: "0005", 5: "spoon"}[entry["category_id"]]
    check(pictures, content, tmp_path)
    mended = json.loads(data.repair(pictures, tmp_path / "annotations.json", tmp_path / "out", progress=False).path.read_text())
    files = {e["id"]: e["file_name"] for e in mended["images"]}
    names = {e["id"]: e["name"] for e in mended["categories"]}
    truth = healthy()
    true_names = {e["id"]: e["name"] for e in truth["categories"]}
    assert [(files[a["image_id"]], names[a["category_id"]]) for a in mended["annotations"]] == \
        [(f"{a['image_id']}.png", true_names[a["category_id"]]) for a in truth["annotations"]]


def test_repair_refuses_what_it_must(pictures, tmp_path):
    check(pictures, healthy(), tmp_path)
    with pytest.raises(FileExistsError, match="never overwrites"):
        data.repair(pictures, tmp_path / "annotations.json", tmp_path)
    (tmp_path / "annotations.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        data.repair(pictures, tmp_path / "annotations.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_photographs_are_checked(bccd, tmp_path):
    for split, image, annotation in (("train", 171, 2288), ("val", 69, 887)):
        report = data.check_dataset(bccd / "images", bccd / f"{split}.json", num_queries=60, progress=False)
        assert report.ok
        (finding,) = [f for f in report.findings if f.kind == "box without area"]
        assert (finding.image, finding.annotation) == (image, annotation)
        mended = data.repair(bccd / "images", bccd / f"{split}.json", tmp_path / split, progress=False)
        assert len(mended.changes) == 1 and data.check_dataset(bccd / "images", mended.path, progress=False).findings == []


# --- fuzzing ---------------------------------------------------------------------------------------------------------

TELLING = st.sampled_from([0, 1, 2, 3, 5, -1, 1.0, 0.5, 1e9, 1e300, 2**63, 10**400, True, False, None, "", "1", "1.png", "../1.png", "a" * 5000, "\x00",
                           "\ud800", float("nan"), float("inf"), -0.0, [], {}, [[]], "id", [1, 2, 3, 4], {"counts": [1], "size": [48, 64]}])
JSON = st.recursive(TELLING | st.integers() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
    st.sampled_from(["id", "bbox", "image_id", "category_id", "file_name", "name", "images", "annotations"]) | st.text(max_size=3), inner, max_size=4), max_leaves=8)


def spots(value, depth=4) -> list[tuple]:
    """Every (container, key) inside a JSON value."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    return [(value, key) for key, _ in items] + [spot for _, inner in items if depth for spot in spots(inner, depth - 1)]


@st.composite
def broken_files(draw) -> bytes:
    """A healthy file with a few values replaced, removed or copied elsewhere, and now and then its text cut or scribbled on."""
    content = healthy()
    for _ in range(draw(st.integers(0, 5))):
        places = spots(content)
        if not places:
            break
        container, key = places[draw(st.integers(0, len(places) - 1))]
        action = draw(st.sampled_from(["replace", "replace", "remove", "copy", "scale"]))
        if action == "replace":
            container[key] = copy.deepcopy(draw(JSON))  # hypothesis hands out one and the same [] again and again
        elif action == "remove":
            del container[key]
        elif action == "copy":
            other, other_key = places[draw(st.integers(0, len(places) - 1))]
            container[key] = json.loads(json.dumps(other.get(other_key) if isinstance(other, dict) else other[other_key]))
        elif type(container[key]) in (int, float):
            container[key] = container[key] * draw(st.sampled_from([0, -1, 0.01, 10, 1e6]))
    text = json.dumps(content).encode()
    if draw(st.integers(0, 9)) == 0:
        text = text[: draw(st.integers(0, len(text)))]
    if draw(st.integers(0, 9)) == 0:
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(st.binary(max_size=4)) + text[place + draw(st.integers(0, 4)):]
    return text


def ends_in_a_report(folder: Path, work: Path, content: bytes) -> None:
    """Whatever the file: a printable report; if it says ok, the data loads; if it can be mended, the copy is ok."""
    file, out = work / "a.json", work / "out"
    file.write_bytes(content)
    report = data.check_dataset(folder, file, num_queries=10, progress=False)
    str(report).encode("utf-8")
    assert json.loads(report.to_json())["ok"] == report.ok
    if report.ok:
        dataset = CocoDetection(folder, file, make_coco_transforms("val", 16))
        assert report.num_classes == dataset.num_classes
        for _, target in dataset:
            assert target["boxes"].isfinite().all() and (target["boxes"][:, 2:] > 0).all()
            assert ((0 <= target["labels"]) & (target["labels"] < report.num_classes)).all()
    try:
        mended = data.repair(folder, file, out, progress=False)
    except ValueError:
        assert not out.exists()
    else:
        after = kinds(data.check_dataset(folder, mended.path, progress=False), "error")
        assert after <= {"boxes for another size", "box format", "no pictures", "no categories"}, after
        str(mended).encode("utf-8")
        for left in sorted(out.iterdir()):
            left.unlink()
        out.rmdir()
    assert file.read_bytes() == content


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.timeout(600)
@settings(deadline=None, max_examples=300)
@given(content=broken_files())
def test_every_broken_file_ends_in_a_report(pictures, work, content):
    ends_in_a_report(pictures, work, content)


@pytest.mark.slow
@settings(deadline=None, max_examples=6000)
@given(content=broken_files())
def test_thousands_of_broken_files_end_in_reports(pictures, work, content):
    ends_in_a_report(pictures, work, content)


@settings(deadline=None, max_examples=150)
@given(suffix=st.sampled_from(["png", "jpg", "gif", "tif", "webp", "bmp"]), cut=st.integers(0, 3000), place=st.integers(0, 3000), scribble=st.binary(max_size=8))
def test_damaged_pictures_load_or_are_named(tmp_path_factory, suffix, cut, place, scribble):
    file = tmp_path_factory.getbasetemp() / f"fuzz.{suffix}"
    noise(24, 16).save(file)
    content = file.read_bytes()
    content = content[:place] + scribble + content[place + len(scribble):]
    file.write_bytes(content[: max(1, len(content) - cut)])
    try:
        assert data.open_picture(file).mode == "RGB"
    except ValueError as error:
        assert f"fuzz.{suffix}" in str(error)
