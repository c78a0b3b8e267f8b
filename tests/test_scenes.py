"""Scenes: the standard's specification, its determinism, exact ground truth, and folders that survive a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from annotated_detr import scenes
from annotated_detr.scenes import TURN, UNIT, Scene, Thing, annotate, coco_folder, draw, make_scene


# pycocotools decodes masks through an interface that NumPy 2 is about to retire.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def census():
    """The annotations of 600 scenes, 200 of each split."""
    return [annotate(make_scene(split, i), 128, 128)[1] for split in ("train", "val", "test") for i in range(200)]


def scene_of(*things: Thing) -> Scene:
    return Scene("running", 0, background=0, texture=0, texture_angle=0, things=things)


def thing(kind: int = 1, x: float = 0.5, y: float = 0.5, size: float = 0.4, **look: int) -> Thing:
    return Thing(kind, round(x * UNIT), round(y * UNIT), round(size * UNIT), **look)


def tree(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the specification


def test_pictures_hold_0_to_10_objects_and_a_twentieth_is_empty(census):
    counts = np.array([sum(not a["iscrowd"] for a in found) for found in census])
    assert counts.max() == 10 and counts.mean() >= 4
    assert 0.02 <= (counts == 0).mean() <= 0.08  # of 600; the standard error of 5 % is 0.9 %
    assert all(not found for found, n in zip(census, counts, strict=True) if n == 0)


def test_a_fifth_of_the_objects_is_hidden_by_20_to_60_percent_and_none_by_more_than_75(census):
    objects = [a for found in census for a in found if not a["iscrowd"]]
    hidden = np.array([1 - a["area"] / a["full_area"] for a in objects])
    assert ((hidden >= 0.2) & (hidden <= 0.6)).mean() >= 0.2
    assert 0 <= hidden.min() and 0.6 < hidden.max() <= 0.75


def test_six_kinds_three_sizes_and_a_few_crowds(census):
    objects = [a for found in census for a in found if not a["iscrowd"]]
    kinds = np.bincount([a["category_id"] for a in objects], minlength=7)
    assert kinds[0] == 0 and len(kinds) == 7 and kinds[1:].min() > 0.6 * kinds.max()
    share = np.array([a["area"] for a in objects]) / 128**2
    small, large = (share <= scenes.SMALL_AREA).mean(), (share > scenes.MEDIUM_AREA).mean()
    assert small > 0.2 and large > 0.08 and 1 - small - large > 0.3
    assert 0.01 <= sum(a["iscrowd"] for found in census for a in found) / len(census) <= 0.08


def test_whole_objects_have_sides_of_8_to_60_percent_and_lie_in_the_picture():
    angles, stretches = set(), set()
    for index in range(150):
        scene = make_scene("val", index)
        for one in (one for one in scene.things if not one.group):
            (_, annotations) = annotate(replace(scene, things=(one,)), 256, 256)
            left, top, width, height = annotations[0]["bbox"]
            assert 0.08 * 256 - 1 <= min(width, height) and max(width, height) <= 0.60 * 256 + 1
            assert left >= 0 and top >= 0 and left + width <= 256 and top + height <= 256
            angles.add(one.angle * 8 // TURN)
            stretches.add(one.stretch)
    assert angles == set(range(8)) and len(stretches) > 4


# --- the same everywhere


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_annotations_are_the_frozen_ones(split):
    assert scenes.annotation_digest(split, 250) == scenes.DIGESTS[split, 250]


def test_another_standard_is_noticed(monkeypatch):
    monkeypatch.setitem(scenes.DIGESTS, ("val", 2), "0" * 64)
    with pytest.raises(RuntimeError, match="not those of annotated-detr-scenes-1"):
        scenes.annotation_digest("val", 2)
    assert scenes.annotation_digest("val", 2, size=64) != scenes.annotation_digest("val", 2, start=1)


def test_pixels_are_the_frozen_ones_within_one_level():
    samples = [draw(make_scene("test", i), 128, 128)[0][24::40, 24::40].reshape(-1, 3) for i in (0, 3, 4)]
    assert np.abs(np.stack(samples).astype(int) - PIXELS).max() <= 1


def test_no_table_entry_depends_on_the_last_bit_of_a_sine():
    values = [16384 * f(t) for t in scenes._ANGLES for f in (np.cos, np.sin)]
    for kind in scenes.CLASS_NAMES:
        for stretch in range(11, 17):
            for rim in range(3):
                values += [4096 * v for p in scenes._sketch(kind, stretch, rim) for xy in p for v in xy]
    to_tie = np.abs(np.array(values) % 1 - 0.5)
    assert to_tie.min() > 1e-9  # a sine's last bit is worth about 1e-12 here


def test_splits_share_no_seed():
    first = {split: [scenes._Chance(split, i).below(1 << 32) for i in range(500)] for split in scenes.SPLITS}
    everything = [number for numbers in first.values() for number in numbers]
    assert len(set(everything)) == len(everything) == 2000
    drawn = {split: {make_scene(split, i).things for i in range(60)} - {()} for split in scenes.SPLITS}
    assert not drawn["train"] & drawn["val"] and not drawn["train"] & drawn["test"] and not drawn["val"] & drawn["test"]
    texture = scenes._Chance("train", 0, purpose=1)
    assert texture.below(1 << 32) != first["train"][0]


def test_drawing_numbers_one_by_one_or_at_once_is_the_same_and_in_bounds():
    chance = scenes._Chance("train", 1)
    numbers = [chance.below(7) for _ in range(2000)]
    assert set(numbers) == set(range(7)) and np.bincount(numbers).min() > 200
    again = scenes._Chance("train", 1)
    assert [again.below(7) for _ in range(2000)] == numbers
    assert {again.between(-1, 1) for _ in range(100)} == {-1, 0, 1}


# --- exact ground truth


@settings(deadline=None, max_examples=40)
@given(
    kind=st.integers(1, 6),
    x=st.integers(-UNIT // 5, UNIT * 6 // 5),
    y=st.integers(-UNIT // 5, UNIT * 6 // 5),
    size=st.integers(UNIT // 10, UNIT),
    angle=st.integers(0, TURN - 1),
    stretch=st.integers(11, 16),
)
def test_coverage_is_that_of_a_fine_raster(kind, x, y, size, angle, stretch):
    height, width, fine = 20, 30, 24
    polygons = scenes._place(Thing(kind, x, y, size, angle, stretch), height, width)
    ys, xs = ((np.arange(n * fine) + 0.5) * 256 / fine for n in (height, width))
    points = np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2)
    inside = np.logical_xor.reduce([Outline(polygon).contains_points(points) for polygon in polygons])
    expected = inside.reshape(height, fine, width, fine).mean((1, 3))
    patch = scenes._cover(polygons, height, width)
    found = np.zeros((height, width))
    found[patch.window] = patch.cover / 2048
    assert found.min() >= 0 and found.max() <= 1
    assert np.abs(found - expected).max() < 0.1 and abs(found.mean() - expected.mean()) < 2e-3


@pytest.mark.parametrize("size", [(128, 128), (96, 200)])
def test_masks_boxes_areas_and_run_lengths_agree(size):
    for index in range(25):
        scene = make_scene("val", index)
        image, masks, annotations = draw(scene, *size)
        assert image.shape == (*size, 3) and len(masks) == len(annotations)
        assert masks.sum(0).max(initial=0) <= 1  # no pixel has two owners
        for mask, a in zip(masks, annotations, strict=True):
            assert np.array_equal(coco_mask.decode(a["segmentation"]), mask)
            assert coco_mask.toBbox(a["segmentation"]).tolist() == a["bbox"]
            assert coco_mask.area(a["segmentation"]) == a["area"] <= a["full_area"]
            assert 4 * a["area"] >= a["full_area"]
            assert a["image_id"] == index + 1 and a["id"] // 100 == a["image_id"]
        assert annotate(scene, *size)[1] == annotations


def test_what_is_painted_is_what_the_mask_says():
    scene = scene_of(thing(2, 0.4, 0.4, 0.5, color=5), thing(1, 0.6, 0.6, 0.3, color=1))
    image, masks, _ = draw(scene, 200, 200)
    for mask, one in zip(masks, scene.things, strict=True):
        nearest = np.abs(image[:, :, None].astype(float) - scenes._FILLS).sum(-1).argmin(-1)
        assert (nearest[mask] == one.color).mean() > 0.95
    bare, none, annotations = draw(replace(scene, things=()), 200, 200)
    assert none.shape == (0, 200, 200) and annotations == [] and bare.std() > 1  # the ground has a texture
    assert np.abs(image[140:, :60].astype(int) - bare[140:, :60]).max() == 0


def test_what_is_less_than_a_quarter_visible_is_not_drawn():
    whole = thing(1, size=0.5)
    lid = thing(1, size=0.49, color=3)
    image, masks, annotations = draw(scene_of(whole, lid), 128, 128)
    assert len(annotations) == 1 and annotations[0]["area"] == annotations[0]["full_area"]
    assert np.array_equal(image, draw(scene_of(lid), 128, 128)[0])
    half = thing(1, x=0.7, size=0.5, color=3)
    assert len(annotate(scene_of(whole, half), 128, 128)[1]) == 2


def test_what_is_not_drawn_hides_nothing():
    """The middle disc is all but hidden by the last; without it the first is half visible."""
    behind, middle, front = thing(1, 0.40, size=0.3), thing(1, 0.47, size=0.32), thing(1, 0.56, size=0.40)
    alone = annotate(scene_of(behind, front), 256, 256)[1]
    found = annotate(scene_of(behind, middle, front), 256, 256)[1]
    shares = [a["area"] / a["full_area"] for a in alone]
    assert 0.25 < shares[0] < 0.6
    assert [a["bbox"] for a in found] == [a["bbox"] for a in alone]


def test_a_thing_outside_the_picture_is_left_out_and_one_at_the_edge_is_cut():
    found = annotate(scene_of(thing(x=3.0), thing(x=1.0, size=0.5)), 100, 100)[1]
    assert len(found) == 1 and found[0]["bbox"][0] + found[0]["bbox"][2] == 100
    draw(scene_of(thing(x=3.0), thing(x=1.0, size=0.5), thing(x=0.0, y=1.0)), 100, 100)


def test_a_crowd_is_one_annotation():
    members = [thing(4, 0.2 + 0.1 * i, size=0.08, group=1) for i in range(5)]
    masks, (crowd, single) = annotate(scene_of(*members, thing(1, 0.5, 0.8, 0.2)), 128, 128)
    assert crowd["iscrowd"] == 1 and crowd["category_id"] == 4 and single["iscrowd"] == 0
    assert crowd["area"] == sum(int(annotate(scene_of(one), 128, 128)[0].sum()) for one in members)
    assert len(masks) == 2


def test_one_scene_has_the_same_boxes_at_any_size():
    differences = []
    for index in range(40):
        scene = make_scene("train", index)
        small, large = annotate(scene, 128, 128)[1], annotate(scene, 384, 384)[1]
        assert [a["category_id"] for a in small] == [a["category_id"] for a in large]
        assert [a["iscrowd"] for a in small] == [a["iscrowd"] for a in large]
        for a, b in zip(small, large, strict=True):
            edges = [np.array([x, y, x + w, y + h]) for x, y, w, h in (a["bbox"], b["bbox"])]
            differences.append(np.abs(edges[0] - edges[1] / 3).max())
            assert differences[-1] <= 1 or a["area"] < a["full_area"]
    # a half-hidden thing may show a tip between two others at one size, and not at another
    assert np.quantile(differences, 0.95) <= 1


def test_a_thing_keeps_its_share_of_the_area_at_any_aspect():
    areas = [annotate(scene_of(thing(4, size=0.5)), h, w)[1][0]["area"] / (h * w) for h, w in ((300, 300), (400, 225), (225, 400))]
    assert max(areas) - min(areas) < 2e-3


# --- the running batch


def test_the_running_batch_is_what_the_book_says():
    images, targets = scenes.running_batch()
    assert [tuple(image.shape) for image in images] == [(3, 765, 512), (3, 608, 911)]
    for image, target, (picture, record) in zip(images, targets, scenes.running_batch_pil(), strict=True):
        assert image.dtype == torch.float32 and image.is_contiguous()
        pixels = image * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        pixels += torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        assert np.abs(pixels.permute(1, 2, 0).numpy() * 255 - np.asarray(picture)).max() < 1e-3
        assert (picture.mode, picture.size) == ("RGB", (image.shape[2], image.shape[1]))
        good = [a for a in record["annotations"] if not a["iscrowd"] and a["bbox"][2] > 0]
        assert 5 <= len(good) <= 8 and target["labels"].tolist() == [a["category_id"] for a in good]
        assert target["image_id"].tolist() == [record["image_id"]]
        assert target["size"].tolist() == target["orig_size"].tolist() == list(image.shape[1:])
        assert target["area"].tolist() == [a["area"] for a in good] and not target["iscrowd"].any()
        dtypes = {key: value.dtype for key, value in target.items()}
        assert dtypes.pop("boxes") == dtypes.pop("area") == torch.float32 and set(dtypes.values()) == {torch.int64}
        x, y, w, h = (target["boxes"] * torch.tensor(picture.size * 2)).unbind(-1)
        edges = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
        raw = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in good)])
        torch.testing.assert_close(edges, torch.minimum(raw, torch.tensor(picture.size * 2)), atol=1e-3, rtol=0)


def test_the_running_pictures_have_blemishes_and_variety():
    (first, one), (second, two) = scenes.running_batch_pil()
    assert one["annotations"][-1]["bbox"][2] == 0 and one["annotations"][-1]["area"] == 0
    assert [a["iscrowd"] for a in two["annotations"]] == [1, 0, 0, 0, 0, 0, 0]
    over = [a["bbox"][0] + a["bbox"][2] > second.size[0] for a in two["annotations"]]
    assert over == [False] * 6 + [True]
    labels = [a["category_id"] for record in (one, two) for a in record["annotations"]]
    assert set(labels) == set(scenes.CLASS_NAMES)
    hidden = [1 - a["area"] / a["full_area"] for record in (one, two) for a in record["annotations"] if a["full_area"]]
    assert sum(share > 0.1 for share in hidden) >= 4
    ids = [a["id"] for record in (one, two) for a in record["annotations"]]
    assert len(set(ids)) == len(ids) and np.asarray(first).std() > 20


# --- folders


def test_a_folder_is_a_coco_dataset(tmp_path):
    pictures, ann_file = coco_folder(tmp_path / "new" / "set", "val", 12, workers=1)
    coco = COCO(ann_file)
    assert sorted(coco.imgs) == list(range(1, 13)) and {c["id"]: c["name"] for c in coco.cats.values()} == scenes.CLASS_NAMES
    assert coco.dataset["info"]["standard"] == scenes.STANDARD
    assert coco.dataset["info"]["annotation_digest"] == scenes.annotation_digest("val", 12)
    for number, about in coco.imgs.items():
        image, masks, annotations = draw(make_scene("val", number - 1), 128, 128)
        assert np.array_equal(np.asarray(Image.open(pictures / about["file_name"])), image)
        found = coco.loadAnns(coco.getAnnIds(number))
        assert [a["bbox"] for a in found] == [a["bbox"] for a in annotations]
        assert all(np.array_equal(coco.annToMask(a), mask) for a, mask in zip(found, masks, strict=True))


def test_panoptic_segments_cover_every_pixel_once(tmp_path):
    _, ann_file = coco_folder(tmp_path, "val", 12, panoptic=True, workers=1)
    panoptic = json.loads(ann_file.with_name("val-12-panoptic.json").read_text())
    thing_ids = {category["id"] for category in panoptic["categories"] if category["isthing"]}
    assert thing_ids == set(scenes.CLASS_NAMES) and len(panoptic["annotations"]) == 12
    for entry in panoptic["annotations"]:
        red, green, blue = np.asarray(Image.open(tmp_path / "panoptic" / "val" / entry["file_name"])).astype(int).transpose(2, 0, 1)
        ids = red + 256 * green + 256**2 * blue
        assert sum(segment["area"] for segment in entry["segments_info"]) == ids.size
        assert {segment["id"] for segment in entry["segments_info"]} == set(np.unique(ids))
        for segment in entry["segments_info"]:
            rows, columns = np.nonzero(ids == segment["id"])
            assert len(rows) == segment["area"]
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert segment["bbox"] == box
        things = [s for s in entry["segments_info"] if s["category_id"] in thing_ids]
        _, masks, annotations = draw(make_scene("val", entry["image_id"] - 1), 128, 128)
        assert [s["bbox"] for s in things] == [a["bbox"] for a in annotations]


def test_any_number_of_workers_makes_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "_CHUNK", 10)
    for workers in (1, 3):
        coco_folder(tmp_path / str(workers), "test", 35, size=48, panoptic=True, workers=workers, start=7)
    one, three = tree(tmp_path / "1"), tree(tmp_path / "3")
    assert one == three and len(one) == 35 * 2 + 3 and "test-35-from-7.json" in one


def test_a_complete_folder_is_used_at_once_and_a_missing_picture_is_drawn_again(tmp_path):
    pictures, ann_file = coco_folder(tmp_path, "train", 8, size=32, workers=1)
    before = tree(tmp_path)
    times = [path.stat().st_mtime_ns for path in (ann_file, *pictures.iterdir())]
    coco_folder(tmp_path, "train", 8, size=32, workers=1)
    assert times == [path.stat().st_mtime_ns for path in (ann_file, *pictures.iterdir())]
    (pictures / "000003.png").unlink()
    coco_folder(tmp_path, "train", 8, size=32, workers=1)
    assert tree(tmp_path) == before
    coco_folder(tmp_path, "train", 10, size=32, workers=1)
    after = tree(tmp_path)
    assert before.items() <= after.items() and len(after) == len(before) + 3


def test_a_killed_call_is_taken_up_by_the_next(tmp_path):
    code = (
        "import sys; from annotated_detr import scenes; scenes._CHUNK = 20; "
        f"scenes.coco_folder({str(tmp_path / 'killed')!r}, 'train', 400, size=32, workers=2)"
    )
    pictures = tmp_path / "killed" / "images" / "train"
    with open(tmp_path / "log", "w") as log:
        killed = subprocess.Popen([sys.executable, "-c", code], stderr=log, start_new_session=True)
        deadline = time.monotonic() + 60
        while not pictures.is_dir() or len(list(pictures.iterdir())) < 60:
            assert time.monotonic() < deadline and killed.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
    assert not (tmp_path / "killed" / "train-400.json").exists()
    n = -1
    while n != (n := len(list(pictures.iterdir()))):  # the workers notice that nobody listens, and stop
        time.sleep(0.5)
    assert 60 <= n < 400
    for path in pictures.iterdir():
        Image.open(path).verify()  # none is torn
    kept = next((tmp_path / "killed").glob(".train-400.unfinished/0*.json"))  # a whole chunk is not drawn again
    finished = pictures / f"{int(kept.stem) + 1:06d}.png"
    drawn = finished.stat().st_mtime_ns
    subprocess.run([sys.executable, "-c", code.replace("workers=2", "workers=1")], check=True, stderr=subprocess.DEVNULL)
    assert finished.stat().st_mtime_ns == drawn
    coco_folder(tmp_path / "clean", "train", 400, size=32, workers=1)
    assert tree(tmp_path / "killed") == tree(tmp_path / "clean")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_leaves_no_annotation_file_and_says_so(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(scenes, "_CHUNK", 2)
    root = tmp_path / "set"
    coco_folder(root, "val", 2, size=32, workers=1)
    (root / "images" / "val" / "000004.png").mkdir()  # a picture that cannot be put in place
    with pytest.raises((OSError, RuntimeError), match="worker|irectory"):
        coco_folder(root, "val", 6, size=32, workers=workers)
    assert not (root / "val-6.json").exists()
    (root / "images" / "val" / "000004.png").rmdir()
    coco_folder(root, "val", 6, size=32, workers=workers)
    assert not list(root.glob(".*"))


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs" / "cat.png").write_bytes(b"cat")
    with pytest.raises(ValueError, match="holds files that are not scenes"):
        coco_folder(tmp_path / "photographs", "train", 4)
    assert tree(tmp_path / "photographs") == {"cat.png": b"cat"}
    with pytest.raises(ValueError, match="is a file"):
        coco_folder(tmp_path / "photographs" / "cat.png", "train", 4)
    coco_folder(tmp_path / "scenes", "train", 2, size=32, workers=1)
    before = tree(tmp_path / "scenes")
    with pytest.raises(ValueError, match="name another folder"):
        coco_folder(tmp_path / "scenes", "train", 2, size=64, workers=1)
    assert tree(tmp_path / "scenes") == before
    (tmp_path / "scenes" / "scenes.json").write_text("{")
    with pytest.raises(ValueError, match="name another folder"):
        coco_folder(tmp_path / "scenes", "train", 2, size=32, workers=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"split": "training"}, "there is no split 'training': choose one of train, val, test"),
        ({"start": -1}, "indices start at 0"),
        ({"count": 0}, "0 pictures"),
        ({"size": 8}, "8 × 8"),
        ({"workers": 0}, "0 workers"),
    ],
)
def test_arguments_that_make_no_sense_are_named(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        coco_folder(**({"root": tmp_path / "new", "split": "train", "count": 1} | arguments))
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="no area"):
        make_scene("train", 0, aspect=(0, 5))


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("ANNOTATED_DETR_CACHE", str(tmp_path / "cache"))
    assert scenes.cache_dir() == tmp_path / "cache"
    pictures, _ = coco_folder(None, "val", 2, size=32, workers=1)
    assert pictures == tmp_path / "cache" / "annotated-detr-scenes-1-32" / "images" / "val"
    monkeypatch.delenv("ANNOTATED_DETR_CACHE")
    assert scenes.cache_dir().parts[-2:] == (".cache", "annotated_detr")


PIXELS = np.array([
    [211, 220, 199, 219, 227, 208, 197, 210, 183, 202, 214, 189, 194, 207, 179, 209, 218, 196, 211, 220, 199, 199, 211, 185, 201, 213, 187],
    [126, 87, 153, 11, 61, 52, 39, 45, 55, 38, 43, 53, 96, 167, 208, 31, 36, 45, 95, 166, 208, 33, 39, 50, 34, 39, 48],
    [165, 202, 221, 193, 83, 98, 215, 226, 231, 114, 177, 214, 171, 54, 70, 204, 217, 223, 89, 160, 201, 156, 174, 185, 170, 53, 69],
]).reshape(3, 9, 3)
