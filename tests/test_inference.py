"""Prediction: the model called by hand, boxes in the picture's own pixels, and folders that survive bad pictures and kills."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import nn

from annotated_detr import inference
from annotated_detr.data import make_coco_transforms
from annotated_detr.detr import detr_tiny
from annotated_detr.inference import (
    Detections,
    Detector,
    attention_figure,
    attention_maps,
    load_detector,
    predict,
    predict_folder,
)
from annotated_detr.training import ModelSpec, save_model

NAMES = {1: "disc", 2: "ring", 3: "bar"}
QUERIES = 9


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    built = detr_tiny(num_classes=4, num_queries=QUERIES)
    # Fresh weights answer every query alike: stretch them until answers differ, and silence no-object.
    with torch.no_grad():
        for matrix in (p for p in built.transformer.parameters() if p.dim() > 1):
            matrix *= 8
        logits = built.eval()([torch.randn(3, 64, 80)])["pred_logits"][..., :4]
        built.class_embed.weight *= 2 / logits.std()
        built.class_embed.bias[-1] = -1000
        built.bbox_embed.layers[-1].weight.normal_()
    return built.eval()


@pytest.fixture(scope="module")
def detector(model):
    return Detector(model, NAMES, size=64)


class Fixed(nn.Module):
    """Answers every picture with the same relative boxes, whatever it shows."""

    def __init__(self, boxes, logits=None):
        super().__init__()
        self.boxes = nn.Parameter(torch.tensor(boxes))
        self.logits = torch.eye(5)[1 : len(boxes) + 1] * 9 if logits is None else torch.tensor(logits)

    def forward(self, samples):
        n = len(samples.tensors)
        return {"pred_logits": self.logits.expand(n, -1, -1), "pred_boxes": self.boxes.expand(n, -1, -1)}


def test_predict_is_the_model_called_by_hand(model, detector):
    picture = noise(90, 70)
    pixels, _ = make_coco_transforms("val", size=64)(picture)
    with torch.no_grad():
        outputs = model([pixels])
    probabilities = outputs["pred_logits"][0].softmax(-1)[:, :4]
    cx, cy, w, h = outputs["pred_boxes"][0].unbind(-1)
    corners = torch.stack([(cx - w / 2) * 90, (cy - h / 2) * 70, (cx + w / 2) * 90, (cy + h / 2) * 70], -1)

    found = predict(detector, picture, threshold=0.0)[0]
    assert sorted(found.queries.tolist()) == list(range(QUERIES))
    assert (found.scores.diff() <= 0).all()
    close = {"rtol": 0, "atol": 1e-5}  # of the picture's sides: what for_inference promises
    sides = torch.tensor([90, 70, 90, 70])
    torch.testing.assert_close(found.boxes / sides, corners[found.queries] / sides, **close)
    torch.testing.assert_close(found.scores, probabilities.max(-1).values[found.queries], **close)
    assert found.labels.tolist() == probabilities.argmax(-1)[found.queries].tolist()
    assert found.names == [NAMES.get(label, f"class {label}") for label in found.labels.tolist()]


def test_a_bare_model_is_enough_and_keeps_its_mode(model):
    model.train()
    found = predict(model, noise(40, 40), threshold=0.0)[0]
    assert model.training and model.backbone.training
    model.eval()
    assert len(found) == QUERIES and found.names[0].startswith("class ")


@pytest.mark.parametrize("size", [(200, 80), (80, 200), (50, 50)])
def test_boxes_are_in_the_pictures_own_pixels(size):
    detector = Detector(Fixed([[0.25, 0.5, 0.5, 1.0], [0.9, 0.1, 0.2, 0.2]]), NAMES, size=64)
    width, height = size
    boxes = predict(detector, noise(*size), threshold=0.5)[0].boxes
    expected = torch.tensor([[0, 0, 0.5, 1], [0.8, 0, 1, 0.2]]) * torch.tensor([width, height, width, height])
    torch.testing.assert_close(boxes, expected)


def test_a_batch_of_two_shapes_scales_each_by_its_own_size():
    detector = Detector(Fixed([[0.25, 0.5, 0.5, 1.0]]), NAMES, size=64)
    wide, tall = predict(detector, [noise(200, 80), noise(80, 200)], threshold=0.5, batch_size=2)
    assert wide.boxes.tolist() == [[0, 0, 100, 80]] and tall.boxes.tolist() == [[0, 0, 40, 200]]


def test_equal_pictures_do_not_depend_on_the_batch(detector):
    pictures = [noise(90, 70, seed) for seed in range(5)]
    one, three = (predict(detector, pictures, threshold=0.2, batch_size=size) for size in (1, 3))
    assert sum(map(len, one)) > 5
    for alone, together in zip(one, three, strict=True):
        assert alone.queries.tolist() == together.queries.tolist()
        torch.testing.assert_close(alone.boxes, together.boxes, atol=1e-3, rtol=1e-4)


def test_a_rotated_photograph_is_turned_upright(detector, tmp_path):
    upright = noise(90, 60)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: a viewer rotates by 90 degrees clockwise
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        assert opened.size == (60, 90)
        pictures = [upright, tmp_path / "turned.png", opened]
        reference, from_path, from_pil = predict(detector, pictures, threshold=0.0)
        assert from_path.draw(opened).size == (90, 60)
    for found in (from_path, from_pil):
        torch.testing.assert_close(found.boxes, reference.boxes)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_of_picture(detector, mode):
    assert len(predict(detector, noise(40, 40).convert(mode), threshold=0.0)[0]) == QUERIES


def test_thresholds(detector):
    picture = noise(90, 70)
    everything = predict(detector, picture, threshold=0.0)[0]
    middle = float(everything.scores[4])
    assert len(predict(detector, picture, threshold=middle)[0]) == 5, "a score equal to the threshold is kept"
    nothing = predict(detector, picture, threshold=1.0)[0]
    assert len(nothing) == 0 and nothing.boxes.shape == (0, 4) and nothing.rows(1) == []
    assert nothing.draw(picture).tobytes() == picture.tobytes()
    for threshold in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="choose one from 0"):
            predict(detector, picture, threshold=threshold)


def test_no_pictures_is_no_answer(detector):
    assert predict(detector, []) == []


def test_drawing_changes_the_picture_where_the_box_is():
    detector = Detector(Fixed([[0.5, 0.5, 0.5, 0.5]]), NAMES, size=64)
    blank = Image.new("RGB", (200, 100), "white")
    drawn = np.asarray(predict(detector, blank, threshold=0.5)[0].draw(blank)).astype(int)
    changed = np.argwhere((drawn != 255).any(-1))
    assert changed[:, 1].min() in range(48, 52) and changed[:, 1].max() in range(148, 152)
    assert changed[:, 0].max() in range(73, 77)
    assert (drawn[30:70, 60:140] == 255).all(), "inside, the object must stay visible"


def test_an_answer_that_is_not_finite_is_refused():
    broken = Detector(Fixed([[float("nan"), 0.5, 0.5, 0.5]]), NAMES, size=64)
    with pytest.raises(ValueError, match="picture 0 is not finite"):
        predict(broken, noise(40, 40))


SPEC = ModelSpec(model="tiny", num_classes=4, num_queries=QUERIES, size=64, class_names={str(k): v for k, v in NAMES.items()})


def test_load_detector_from_a_file_and_a_run_folder(model, detector, tmp_path):
    save_model(tmp_path / "alone.safetensors", model, SPEC)
    loaded = load_detector(tmp_path / "alone.safetensors")
    assert (loaded.class_names, loaded.size, loaded.model.training) == (NAMES, 64, False)
    reference = predict(detector, noise(90, 70), threshold=0.0)[0]
    torch.testing.assert_close(predict(loaded, noise(90, 70), threshold=0.0)[0].boxes, reference.boxes)

    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="best.safetensors or last.safetensors"):
        load_detector(run)
    shifted = detr_tiny(num_classes=4, num_queries=QUERIES)
    save_model(run / "checkpoints" / "last.safetensors", shifted, SPEC)
    assert torch.equal(load_detector(str(run)).model.query_embed.weight, shifted.query_embed.weight)
    save_model(run / "checkpoints" / "best.safetensors", model, SPEC)
    assert torch.equal(load_detector(run).model.query_embed.weight, model.query_embed.weight)
    with pytest.raises(FileNotFoundError, match="neither a run folder nor a weights file.*tiny-scenes"):
        load_detector(tmp_path / "nowhere")


@pytest.fixture
def photographs(tmp_path) -> Path:
    folder = tmp_path / "photographs"
    (folder / "more").mkdir(parents=True)
    noise(90, 70, 1).save(folder / "a.png")
    noise(60, 80, 2).save(folder / "b.jpg")
    noise(50, 50, 3).save(folder / "more" / "a.png")
    noise(50, 50, 4).save(folder / "c.tif")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def test_a_folder_becomes_drawn_pictures_and_coco_rows(detector, photographs, tmp_path):
    out = tmp_path / "out"
    report = predict_folder(detector, photographs, out, threshold=0.2, progress=False)
    assert (report.done, report.skipped, report.failed, report.exit_code) == (4, 0, {}, 0)
    drawn = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert drawn == {"a.png", "b.jpg", "c.tif.png", "more/a.png", "predictions.json", "predictions.jsonl"}
    with Image.open(out / "b.jpg") as image:
        assert image.size == (60, 80)

    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()][1:]
    ids = {line["file_name"]: line["image_id"] for line in lines}
    assert sorted(ids.values()) == [1, 2, 3, 4]
    coco = COCO()
    images = [line | {"id": line["image_id"]} for line in lines]
    coco.dataset = {"images": images, "annotations": [], "categories": [{"id": i} for i in range(4)]}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        results = coco.loadRes(str(out / "predictions.json"))
    expected = predict(detector, photographs / "b.jpg", threshold=0.2)[0]
    rows = results.imgToAnns[ids["b.jpg"]]
    assert len(rows) == len(expected) > 0 and {row["file_name"] for row in rows} == {"b.jpg"}
    x, y, w, h = rows[0]["bbox"]
    np.testing.assert_allclose([x, y, x + w, y + h], expected.boxes[0], rtol=1e-4, atol=1e-3)


def test_ids_of_an_annotation_file(detector, photographs, tmp_path):
    ids = {"a.png": 70, "b.jpg": 60, "more/a.png": 50}
    with pytest.raises(ValueError, match="c.tif has no id in image_ids"):
        predict_folder(detector, photographs, tmp_path / "out", image_ids=ids, progress=False)
    assert not (tmp_path / "out").exists()
    predict_folder(detector, photographs, tmp_path / "out", threshold=0.0, batch_size=3, image_ids=ids | {"c.tif": 9}, draw=False, progress=False)
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {(row["file_name"], row["image_id"]) for row in rows} == set((ids | {"c.tif": 9}).items())
    assert len(rows) == 4 * QUERIES and not (tmp_path / "out" / "a.png").exists()


def test_an_unreadable_picture_is_named_and_the_others_go_on(detector, photographs, tmp_path):
    whole = (photographs / "a.png").read_bytes()
    (photographs / "a.png").write_bytes(whole[: len(whole) // 2])
    (photographs / "empty.jpg").write_bytes(b"")
    report = predict_folder(detector, photographs, tmp_path / "out", progress=False)
    assert report.done == 3 and report.exit_code == 1
    assert set(report.failed) == {"a.png", "empty.jpg"} and "a.png" in report.failed["a.png"]

    (photographs / "a.png").write_bytes(whole)
    (photographs / "empty.jpg").unlink()
    again = predict_folder(detector, photographs, tmp_path / "out", progress=False)
    assert (again.done, again.skipped, again.exit_code) == (1, 3, 0)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", ["_draw_entry", "predict"])
def test_a_killed_run_goes_on_where_it_was(detector, photographs, tmp_path, monkeypatch, step):
    whole = tmp_path / "whole"
    predict_folder(detector, photographs, whole, threshold=0.2, progress=False)

    calls, original = [], getattr(inference, step)

    def dies_at_the_third(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise Killed
        return original(*args, **kwargs)

    out = tmp_path / "out"
    monkeypatch.setattr(inference, step, dies_at_the_third)
    with pytest.raises(Killed):
        predict_folder(detector, photographs, out, threshold=0.2, progress=False)
    assert not (out / "predictions.json").exists()
    with (out / "predictions.jsonl").open("a") as journal:
        journal.write('{"image_id": 3, "file_na')  # a kill in mid-write

    report = predict_folder(detector, photographs, out, threshold=0.2, progress=False)
    assert report.skipped == (3 if step == "_draw_entry" else 2) and report.done == 4 - report.skipped
    for path in whole.rglob("*"):
        if path.is_file():
            assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes(), path.name


def test_files_of_others_are_never_overwritten(detector, photographs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.png").write_text("mine")
    with pytest.raises(FileExistsError, match="holds other files"):
        predict_folder(detector, photographs, out, progress=False)
    with pytest.raises(FileExistsError, match="holds other files"):
        predict_folder(detector, photographs, photographs, progress=False)
    (out / "a.png").unlink()
    predict_folder(detector, photographs / "b.jpg", out, progress=False)
    (out / "a.png").write_text("mine")
    report = predict_folder(detector, photographs, out, progress=False)
    assert "is in the way" in report.failed["a.png"] and (out / "a.png").read_text() == "mine"


def test_another_detector_or_threshold_needs_another_folder(detector, photographs, tmp_path):
    predict_folder(detector, photographs, tmp_path / "out", progress=False)
    other = Detector(detr_tiny(num_classes=4, num_queries=QUERIES), NAMES, size=64)
    for changed, threshold in ((detector, 0.5), (other, 0.7), (Detector(detector.model, NAMES, size=32), 0.7)):
        with pytest.raises(FileExistsError, match="another detector, size or threshold"):
            predict_folder(changed, photographs, tmp_path / "out", threshold=threshold, progress=False)


def test_out_may_lie_inside_the_folder(detector, photographs):
    for expected in (4, 0):
        report = predict_folder(detector, photographs, photographs / "found", progress=False)
        assert report.done == expected


def test_nothing_to_look_at(detector, tmp_path):
    (tmp_path / "empty").mkdir()
    for inputs, words in ((tmp_path / "empty", "holds no picture"), ([], "no picture to look at")):
        with pytest.raises(FileNotFoundError, match=words):
            predict_folder(detector, inputs, tmp_path / "out", progress=False)
    report = predict_folder(detector, tmp_path / "missing.png", tmp_path / "out", progress=False)
    assert report.exit_code == 1 and "missing.png" in report.failed["missing.png"]
    with pytest.raises(ValueError, match="share a name"):
        predict_folder(detector, ["x/a.png", "y/a.png"], tmp_path / "out", progress=False)


def test_attention_maps_are_one_distribution_per_query(detector):
    maps = attention_maps(detector, noise(90, 60))
    assert maps.shape == (QUERIES, 8, 12)  # 64 × 96 pixels at stride 8
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(QUERIES))


@pytest.mark.parametrize("most", [1, 2, 4])
def test_attention_figure_is_one_call(detector, most):
    fig = attention_figure(detector, noise(90, 60), threshold=0.0, most=most)
    titled = [ax for ax in fig.axes if ax.get_title()]
    assert len(titled) == most
    with pytest.raises(ValueError, match="lower the threshold"):
        attention_figure(detector, noise(90, 60), threshold=1.0)


def test_detections_refuse_lengths_that_differ():
    with pytest.raises(Exception, match="scores|shape|type"):
        Detections(torch.zeros(2, 4), torch.zeros(3), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), ["a", "b"])
