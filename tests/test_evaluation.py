"""Scores: equal to pycocotools called by hand, and sensible where pictures, classes, boxes or predictions are missing."""

import contextlib
import copy
import io
import json
import math
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from annotated_detr.evaluation import (
    COCO_SIZES,
    TWELVE,
    CocoScorer,
    average_precision,
    confusion_matrix,
    draw_confusion,
    draw_curves,
    evaluate,
    precision_recall_curves,
    save_evaluation,
)
from annotated_detr.nested_tensor import nested_tensor_from_tensor_list


def coco_of(dataset: dict) -> COCO:
    coco = COCO()
    coco.dataset = copy.deepcopy(dataset)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def random_truth(seed: int, pictures: int = 12, classes: tuple[int, ...] = (1, 3, 7), most: int = 6) -> dict:
    """Pictures of several sizes with boxes of several sizes, a few of them crowds; ids start at 1."""
    draw = np.random.default_rng(seed)
    dataset = {"images": [], "annotations": [], "categories": [{"id": i, "name": f"kind {i}"} for i in classes]}
    for picture in range(pictures):
        width, height = (int(side) for side in draw.integers(100, 400, 2))
        dataset["images"].append({"id": 10 + picture, "width": width, "height": height, "file_name": f"{picture}.png"})
        for _ in range(draw.integers(0, most + 1)):
            w, h = draw.uniform(8, [width, height])
            x, y = draw.uniform(0, [width - w, height - h])
            dataset["annotations"].append(
                {
                    "id": len(dataset["annotations"]) + 1,
                    "image_id": 10 + picture,
                    "category_id": int(draw.choice(classes)),
                    "bbox": [x, y, w, h],
                    "area": float(w * h * draw.uniform(0.5, 1)),
                    "iscrowd": int(draw.uniform() < 0.1),
                }
            )
    return dataset


def guesses(dataset: dict, seed: int, extra: int = 5, classes: tuple[int, ...] = (1, 3, 7), noise: float = 0.15) -> dict[int, dict]:
    """Perturbed true boxes, some in the wrong class, among random ones."""
    draw = np.random.default_rng(seed)
    predictions = {}
    for image in dataset["images"]:
        rows = []
        for annotation in dataset["annotations"]:
            if annotation["image_id"] == image["id"]:
                x, y, w, h = annotation["bbox"]
                x, y = [x, y] + draw.normal(0, noise, 2) * [w, h]
                w, h = [w, h] * np.exp(draw.normal(0, noise, 2))
                label = annotation["category_id"] if draw.uniform() < 0.8 else int(draw.choice(classes))
                rows.append((draw.uniform(), label, [x, y, x + w, y + h]))
        for _ in range(draw.integers(0, extra + 1)):
            corners = np.sort(draw.uniform(0, [[image["width"], image["height"]]] * 2, (2, 2)), axis=0)
            rows.append((draw.uniform(0, 0.7), int(draw.choice(classes)), corners.ravel().tolist()))
        predictions[image["id"]] = {
            "scores": torch.tensor([row[0] for row in rows]),
            "labels": torch.tensor([row[1] for row in rows], dtype=torch.int64),
            "boxes": torch.tensor([row[2] for row in rows]).reshape(-1, 4),
        }
    return predictions


def perfect(dataset: dict) -> dict[int, dict]:
    predictions = {}
    for image in dataset["images"]:
        mine = [a for a in dataset["annotations"] if a["image_id"] == image["id"]]
        boxes = torch.tensor([a["bbox"] for a in mine], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([a["category_id"] for a in mine], dtype=torch.int64)
        predictions[image["id"]] = {"scores": torch.linspace(0.9, 1, len(mine)), "labels": labels, "boxes": boxes}
    return predictions


def by_hand(coco: COCO, predictions: dict[int, dict]) -> list[float | None]:
    """The twelve numbers as COCO's own example computes them, -1 read as None."""
    rows = [
        {"image_id": i, "category_id": int(label), "bbox": [x0, y0, x1 - x0, y1 - y0], "score": float(score)}
        for i, result in predictions.items()
        for score, label, (x0, y0, x1, y1) in zip(result["scores"], result["labels"], result["boxes"].tolist())
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [None if value == -1 else float(value) for value in evaluation.stats]


def scored(dataset: dict, predictions: dict[int, dict], **options):
    scorer = CocoScorer(coco_of(dataset), **options)
    scorer.update(predictions)
    return scorer.summarize()


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_pycocotools_called_by_hand(seed):
    dataset = random_truth(seed)
    predictions = guesses(dataset, seed)
    scores = scored(dataset, predictions)
    assert list(scores.numbers().values()) == by_hand(coco_of(dataset), predictions)
    assert 0.05 < scores.AP < 0.95, "the example must be neither hopeless nor perfect"


def test_the_table_by_class_is_each_class_scored_alone():
    dataset = random_truth(5, pictures=20)
    predictions = guesses(dataset, 5)
    everything = scored(dataset, predictions)
    for entry in everything.by_class:
        alone = scored(dataset, predictions, category_ids=[entry.id])
        for number in ("AP", "AP50", "AP_small", "AP_medium", "AP_large"):
            assert getattr(entry, number) == alone[number]
        assert entry.boxes == sum(a["category_id"] == entry.id and not a["iscrowd"] for a in dataset["annotations"])
    assert everything.AP == pytest.approx(np.mean([entry.AP for entry in everything.by_class]))


def test_perfect_results_score_one_and_silence():
    dataset = random_truth(1)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        scores = scored(dataset, perfect(dataset))
    assert out.getvalue() == ""
    assert scores.AP == pytest.approx(1) and scores.AP50 == pytest.approx(1) and scores.AR100 == 1


def test_an_annotation_with_id_zero_and_without_area_or_iscrowd_counts():
    dataset = random_truth(1)
    for number, annotation in enumerate(dataset["annotations"]):
        annotation["id"] = number
        annotation.pop("area")
        annotation.pop("iscrowd")
    assert scored(dataset, perfect(dataset)).AP == pytest.approx(1)


def test_the_ground_truth_is_left_alone():
    coco = coco_of(random_truth(2))
    before = copy.deepcopy(coco.dataset)
    scorer = CocoScorer(coco)
    scorer.update(guesses(before, 2))
    scorer.summarize()
    assert coco.dataset == before


def test_nothing_predicted_is_zero_where_there_are_boxes_and_none_where_not():
    dataset = random_truth(3)
    dataset["categories"].append({"id": 9, "name": "never seen"})
    scores = CocoScorer(coco_of(dataset)).summarize()
    assert (scores.AP, scores.AP50, scores.AR100) == (0, 0, 0)
    absent = scores.by_class[-1]
    assert (absent.name, absent.boxes, absent.AP) == ("never seen", 0, None)

    dataset["annotations"] = []
    scores = scored(dataset, guesses(dataset, 3))
    assert set(scores.numbers().values()) == {None}
    assert all(value is None for value in [json.loads(scores.to_json())[name] for name in TWELVE])


def test_no_pictures_at_all_is_none_everywhere():
    scores = CocoScorer(coco_of({"images": [], "annotations": [], "categories": []})).summarize()
    assert scores.AP is None and scores.pictures == 0
    assert str(scores)


def test_a_picture_without_a_result_counts_as_missed_unless_left_out():
    dataset = random_truth(4, pictures=10, most=3)
    predictions = perfect(dataset)
    lost = next(a["image_id"] for a in dataset["annotations"] if not a["iscrowd"])
    del predictions[lost]
    scorer = CocoScorer(coco_of(dataset))
    scorer.update(predictions)
    assert scorer.summarize().AP < 1
    some = scorer.summarize(scorer.results)
    assert some.AP == pytest.approx(1) and some.pictures == 9


def test_detections_of_classes_that_are_not_scored_change_nothing():
    dataset = random_truth(6)
    predictions = guesses(dataset, 6)
    reference = scored(dataset, predictions)
    for result in predictions.values():
        result["labels"] = torch.cat([result["labels"], torch.tensor([0, 2, 91])])
        result["scores"] = torch.cat([result["scores"], torch.ones(3)])
        result["boxes"] = torch.cat([result["boxes"], torch.tensor([[0.0, 0.0, 50.0, 50.0]] * 3)])
    assert scored(dataset, predictions).numbers() == reference.numbers()


def test_fewer_and_more_than_a_hundred_detections():
    dataset = {
        "images": [{"id": 1, "width": 1000, "height": 1000}],
        "categories": [{"id": 1, "name": "dot"}],
        "annotations": [
            {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": [i % 20 * 50, i // 20 * 50, 40, 40], "area": 1600, "iscrowd": 0} for i in range(200)
        ],
    }
    predictions = perfect(dataset)
    assert scored(dataset, predictions).AR100 == pytest.approx(0.5)
    assert scored(dataset, predictions, max_dets=300).AR100 == 1
    few = scored(dataset, predictions, max_dets=5)
    assert few.AR100 == few.AR10 == pytest.approx(0.025) and few.AR1 == pytest.approx(0.005)
    assert few.AP is not None


def test_sizes_as_shares_of_the_picture():
    images = [{"id": 1, "width": 100, "height": 100}, {"id": 2, "width": 1000, "height": 1000}]
    sides = [(1, 10, "small"), (1, 25, "medium"), (1, 50, "large"), (2, 100, "small"), (2, 250, "medium"), (2, 500, "large")]
    annotations = [
        {"id": n, "image_id": image, "category_id": 1, "bbox": [1, 1, side, side], "area": side**2, "iscrowd": 0}
        for n, (image, side, _) in enumerate(sides, 1)
    ]
    dataset = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "square"}]}
    for size in ("small", "medium", "large"):
        predictions = {i: {"scores": [], "labels": [], "boxes": []} for i in (1, 2)}
        for image, side, name in sides:
            if name == size:
                predictions[image] = {"scores": [1.0], "labels": [1], "boxes": [[1, 1, 1 + side, 1 + side]]}
        scores = scored(dataset, predictions, size_thresholds=(0.02, 0.1))
        expected = {f"AP_{other}": float(other == size) for other in ("small", "medium", "large")}
        assert {name: pytest.approx(scores[name]) for name in expected} == expected
        assert "0.02" in str(scores) and "picture's area" in scores.to_dict()["sizes"]


@pytest.mark.parametrize("thresholds", [(0.02, 100.0), (100.0, 50.0), (0.0, 10.0), (-1.0, 0.5)])
def test_size_thresholds_that_make_no_sense(thresholds):
    with pytest.raises(ValueError, match="Size thresholds"):
        CocoScorer(coco_of(random_truth(0)), size_thresholds=thresholds)


def test_options_that_make_no_sense():
    coco = coco_of(random_truth(0))
    with pytest.raises(ValueError, match="Category 2 is not among"):
        CocoScorer(coco, category_ids=[1, 2])
    with pytest.raises(ValueError, match="max_dets is 0"):
        CocoScorer(coco, max_dets=0)


def result(boxes=((0.0, 0.0, 5.0, 5.0),), scores=None, labels=None) -> dict:
    n = len(boxes)
    return {
        "scores": torch.full((n,), 0.5) if scores is None else torch.tensor(scores),
        "labels": torch.ones(n, dtype=torch.int64) if labels is None else torch.tensor(labels),
        "boxes": torch.tensor(boxes),
    }


@pytest.mark.parametrize(
    "image_id, prediction, words",
    [
        (99, result(), "Picture 99 is not in the ground truth"),
        (10, result([(0.0, 0.0, 1.0, 1.0), (0.0, math.nan, 1.0, 1.0)]), "Detection 1 of picture 10 is not finite"),
        (10, result([(0.0, 0.0, math.inf, 1.0)]), "Detection 0 of picture 10 is not finite"),
        (10, result(scores=[math.nan]), "Detection 0 of picture 10 is not finite"),
        (10, result([(50.0, 50.0, 20.0, 60.0)]), "Box 0 of picture 10 ends before it begins"),
        (10, result(scores=[0.1, 0.2]), "2 scores, 1 labels and 1 boxes"),
        (10, {"scores": torch.zeros(0)}, "has no labels, boxes"),
    ],
)
def test_results_that_cannot_be_scored_are_named(image_id, prediction, words):
    with pytest.raises(ValueError, match=words):
        CocoScorer(coco_of(random_truth(0))).update({image_id: prediction})


def test_a_picture_that_comes_again_replaces_its_result():
    dataset = random_truth(7)
    scorer = CocoScorer(coco_of(dataset))
    scorer.update(guesses(dataset, 7))
    scorer.update(perfect(dataset))
    assert scorer.summarize().AP == pytest.approx(1)


def test_scores_as_json_and_text(tmp_path):
    scores = scored(random_truth(8), guesses(random_truth(8), 8))
    scores.to_json(tmp_path / "scores.json")
    read = json.loads((tmp_path / "scores.json").read_text())
    assert read["AP"] == scores.AP and read["by_class"][0]["name"] == "kind 1" and read["size_thresholds"] == list(COCO_SIZES)
    text = str(scores)
    assert f"{scores.AP50:.3f}" in text and "kind 7" in text and "12 pictures" in text
    assert "small up to 1024 and medium up to 9216 square pixels" in text, "sizes mean nothing without their rule"
    row = next(line for line in text.splitlines() if line.startswith("kind 7")).split()
    assert row[-1] == f"{scores.by_class[2].AP_large:.3f}"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.booleans(), max_size=30), st.integers(0, 10))
def test_average_precision_is_pycocotools_for_one_class(correct, missed):
    """Boxes far apart, one per correct detection: pycocotools sees exactly this list of hits."""
    n = sum(correct) + missed
    if n == 0:
        with pytest.raises(ValueError, match="without a true box"):
            average_precision(np.array(correct, dtype=bool), 0)
        return
    spots = [[20.0 * i, 0.0, 10.0, 10.0] for i in range(n)]
    dataset = {
        "images": [{"id": 1, "width": 2000, "height": 10}],
        "categories": [{"id": 1, "name": "x"}],
        "annotations": [{"id": i + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 100, "iscrowd": 0} for i, box in enumerate(spots)],
    }
    nth = np.cumsum(correct) - 1
    boxes = [[20.0 * k, 0.0, 20.0 * k + 10, 10.0] if hit else [5000.0, 0.0, 5010.0, 10.0] for hit, k in zip(correct, nth)]
    prediction = {
        "scores": torch.linspace(1, 0.1, len(correct)),
        "labels": torch.ones(len(correct), dtype=torch.int64),
        "boxes": torch.tensor(boxes).reshape(-1, 4),
    }
    assert average_precision(np.array(correct, dtype=bool), n) == pytest.approx(scored(dataset, {1: prediction}).AP50, abs=1e-9)


def test_precision_recall_curves_have_ap_as_their_mean():
    dataset = random_truth(9, pictures=20)
    dataset["categories"].append({"id": 9, "name": "never seen"})
    scorer = CocoScorer(coco_of(dataset))
    scorer.update(guesses(dataset, 9))
    curves = precision_recall_curves(scorer, iou_threshold=0.5)
    assert set(curves) == {1, 3, 7}
    for entry in scorer.summarize().by_class[:3]:
        recall, precision = curves[entry.id]
        assert recall.shape == precision.shape == (101,)
        assert precision.mean() == pytest.approx(entry.AP50)
        assert (np.diff(precision) <= 0).all()
    with pytest.raises(ValueError, match="0.42 is not one of COCO"):
        precision_recall_curves(scorer, iou_threshold=0.42)


def test_confusion_matrix_by_hand():
    dataset = {
        "images": [{"id": 1, "width": 100, "height": 100}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0},
            {"id": 2, "image_id": 1, "category_id": 2, "bbox": [20, 0, 10, 10], "area": 100, "iscrowd": 0},
            {"id": 3, "image_id": 1, "category_id": 2, "bbox": [40, 0, 10, 10], "area": 100, "iscrowd": 0},
            {"id": 4, "image_id": 1, "category_id": 2, "bbox": [0, 50, 100, 50], "area": 5000, "iscrowd": 1},
        ],
    }
    prediction = {
        # a found, a again (a duplicate), b taken for a, one on nothing, one in the crowd, one too unsure, one of an unknown class
        "scores": torch.tensor([0.9, 0.8, 0.9, 0.7, 0.9, 0.4, 0.9]),
        "labels": torch.tensor([1, 1, 1, 2, 2, 2, 5]),
        "boxes": torch.tensor(
            [[0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10], [70, 0, 80, 10], [10, 60, 20, 70], [40, 0, 50, 10], [40, 0, 50, 10]], dtype=torch.float32
        ),
    }
    scorer = CocoScorer(coco_of(dataset))
    scorer.update({1: prediction})
    assert confusion_matrix(scorer).tolist() == [[1, 0, 0], [1, 0, 1], [1, 1, 0]]
    assert confusion_matrix(CocoScorer(coco_of(dataset))).tolist() == [[0, 0, 1], [0, 0, 2], [0, 0, 0]]


def test_an_evaluation_is_saved_with_its_pictures(tmp_path):
    dataset = random_truth(14)
    scorer = CocoScorer(coco_of(dataset))
    scorer.update(guesses(dataset, 14))
    scores = save_evaluation(scorer, tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert json.loads((folder / "scores.json").read_text()) == json.loads(scores.to_json())
    for name in ("precision_recall.png", "confusion.png"):
        with Image.open(folder / name) as picture:
            assert picture.width > 500 and len(picture.getcolors(10**6)) > 10
    with pytest.raises(FileExistsError, match="name a new folder"):
        save_evaluation(scorer, folder)


def test_pictures_of_many_classes_show_those_that_need_looking_at(tmp_path):
    classes = tuple(range(1, 31))
    dataset = random_truth(15, pictures=40, classes=classes)
    predictions = perfect(dataset)
    for result in predictions.values():
        result["labels"][result["labels"] == 17] = 23
    scorer = CocoScorer(coco_of(dataset))
    scorer.update(predictions)
    confusion, curves = draw_confusion(scorer), draw_curves(scorer)
    rows = [label.get_text() for label in confusion.axes[0].get_yticklabels()]
    assert len(rows) == 11 and {"kind 17", "kind 23"} <= set(rows) and rows[-1] == "nothing"
    names = [text.get_text() for text in curves.axes[0].get_legend().get_texts()]
    assert len(names) == 5 and names[0].startswith("mean of") and names[1] == "kind 17"


def test_nothing_to_draw_is_no_error(tmp_path):
    dataset = random_truth(16)
    dataset["annotations"] = []
    scores = save_evaluation(CocoScorer(coco_of(dataset)), tmp_path / "empty")
    assert scores.AP is None and sorted(path.name for path in (tmp_path / "empty").iterdir()) == ["confusion.png", "scores.json"]


class Oracle(nn.Module):
    """Answers every picture with the boxes stored for it; the first pixel of the picture is its number."""

    def __init__(self, targets: list[dict], num_queries: int, num_classes: int):
        super().__init__()
        self.inner = nn.Dropout()
        self.targets, self.shape = targets, (num_queries, num_classes + 1)

    def forward(self, samples):
        assert not self.training and not self.inner.training and torch.is_inference_mode_enabled()
        numbers = samples.tensors[:, 0, 0, 0].long().tolist()
        logits, boxes = torch.zeros(len(numbers), *self.shape), torch.full((len(numbers), self.shape[0], 4), 0.5)
        logits[..., -1] = 5
        for row, number in enumerate(numbers):
            target = self.targets[number]
            n = len(target["labels"])
            logits[row, torch.arange(n), target["labels"]] = 9.0
            boxes[row, :n] = target["boxes"]
        return {"pred_logits": logits, "pred_boxes": boxes}


def oracle_and_loader(dataset: dict, batch_size: int = 4):
    targets, pictures = [], []
    for number, image in enumerate(dataset["images"]):
        mine = [a for a in dataset["annotations"] if a["image_id"] == image["id"]]
        boxes = torch.tensor([a["bbox"] for a in mine]).reshape(-1, 4)
        boxes[:, :2] += boxes[:, 2:] / 2
        boxes /= torch.tensor([image["width"], image["height"]] * 2)
        targets.append(
            {
                "labels": torch.tensor([a["category_id"] for a in mine], dtype=torch.int64),
                "boxes": boxes,
                "image_id": torch.tensor(image["id"]),
                "orig_size": torch.tensor([image["height"], image["width"]]),
                "size": torch.tensor([32, 16 + number]),
            }
        )
        pictures.append(torch.full((3, 32, 16 + number), float(number)))
    batches = [
        (nested_tensor_from_tensor_list(pictures[at : at + batch_size]), tuple(targets[at : at + batch_size])) for at in range(0, len(targets), batch_size)
    ]
    return Oracle(targets, num_queries=10, num_classes=8), batches


def test_evaluate_runs_every_picture_at_its_original_size_and_restores_the_modes():
    dataset = random_truth(10)
    for annotation in dataset["annotations"]:
        annotation["iscrowd"] = 0
    model, batches = oracle_and_loader(dataset)
    model.train()
    model.inner.eval()
    scores = evaluate(model, batches, coco_of(dataset), progress=False)
    assert scores.AP == pytest.approx(1, abs=1e-3) and scores.AP50 == pytest.approx(1)
    assert (scores.pictures, scores.batch_size) == (12, 4) and "batches of 4" in str(scores)
    assert model.training and not model.inner.training


def test_evaluate_scores_only_what_the_loader_yields():
    dataset = random_truth(11)
    for annotation in dataset["annotations"]:
        annotation["iscrowd"] = 0
    model, batches = oracle_and_loader(dataset)
    scores = evaluate(model, batches[:1], coco_of(dataset), progress=False)
    assert scores.pictures == 4 and scores.AP50 == pytest.approx(1)


def test_evaluate_restores_the_modes_when_it_fails():
    dataset = random_truth(12)
    model, batches = oracle_and_loader(dataset)
    model.train()
    with pytest.raises(ValueError, match="Picture 10 is not in the ground truth"):
        evaluate(model, batches, coco_of(random_truth(0, pictures=0)), progress=False)
    assert model.training


def _share(rank: int, port: int, dataset: dict, predictions: dict, path: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    scorer = CocoScorer(coco_of(dataset))
    ids = list(predictions)
    # Split as a distributed sampler does, one picture seen by both.
    scorer.update({i: predictions[i] for i in ids[rank::2] + ids[:1]})
    scorer.merge().summarize().to_json(f"{path}/{rank}.json")
    # And a model on a share of the batches: 5 and 2 pictures here, 5 there.
    model, batches = oracle_and_loader(dataset, batch_size=5)
    evaluate(model, batches[rank::2], coco_of(dataset), progress=False).to_json(f"{path}/model-{rank}.json")
    torch.distributed.destroy_process_group()


def test_two_processes_gather_to_the_same_answer(tmp_path):
    dataset = random_truth(13)
    predictions = guesses(dataset, 13)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_share, (port, dataset, predictions, str(tmp_path)), nprocs=2)
    alone = scored(dataset, predictions).to_json()
    assert [(tmp_path / f"{rank}.json").read_text().strip() for rank in (0, 1)] == [alone, alone]
    model, batches = oracle_and_loader(dataset, batch_size=5)
    alone = evaluate(model, batches, coco_of(dataset), progress=False).to_json()
    assert json.loads(alone)["batch_size"] == 5
    assert [(tmp_path / f"model-{rank}.json").read_text().strip() for rank in (0, 1)] == [alone, alone]
