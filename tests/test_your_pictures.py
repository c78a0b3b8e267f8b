"""Chapter 13: settings from the data, and what a detector got wrong."""

import json

import pytest
import torch
from annotated_detr.data import CocoDetection
from annotated_detr.evaluation import CocoScorer
from annotated_detr.your_pictures import choose_settings, draw_mistakes, worst_mistakes
from PIL import Image


def folder_of(tmp_path, boxes: list[list[tuple]], size: tuple[int, int] = (640, 480)) -> CocoDetection:
    """Pictures with (category, x, y, w, h) boxes."""
    annotations = []
    for picture, entries in enumerate(boxes, 1):
        Image.new("RGB", size, "white").save(tmp_path / f"{picture}.png")
        for category, *bbox in entries:
            annotations.append(
                {"id": len(annotations) + 1, "image_id": picture, "category_id": category, "bbox": bbox, "area": bbox[2] * bbox[3], "iscrowd": 0}
            )
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": size[0], "height": size[1]} for i in range(1, len(boxes) + 1)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cell"}, {"id": 2, "name": "platelet"}],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    return CocoDetection(tmp_path, tmp_path / "boxes.json")


def test_settings_follow_the_data(tmp_path):
    many = [(1, 10 * i, 10 * i, 60, 60) for i in range(30)]
    small = [(2, 100 + i, 100, 40, 40) for i in range(10)]
    config = choose_settings(folder_of(tmp_path, [many, small, []]), steps=100, batch_size=2)
    assert config.num_queries == 40, "a quarter more than 30, in eights"
    assert config.size == 128, "a side of 40 of 480 pixels is 10 pixels at 120"
    assert config.epochs * 2 == 100 and config.warmup_steps == 0
    with pytest.raises(ValueError, match="no picture has a box"):
        choose_settings(folder_of(tmp_path, [[], []]))


def test_every_kind_of_mistake_is_found_and_right_answers_are_not(tmp_path):
    pictures = folder_of(tmp_path, [[(1, 0, 0, 100, 100), (2, 200, 200, 40, 40), (1, 400, 300, 80, 80), (2, 500, 20, 30, 30)]])
    scorer = CocoScorer(pictures.coco)
    answers = [
        (0.9, 1, [0, 0, 100, 100]),  # right
        (0.8, 1, [0, 0, 100, 98]),  # a second box for it
        (0.7, 1, [200, 200, 240, 240]),  # right place, wrong name
        (0.6, 1, [440, 300, 520, 380]),  # half beside it
        (0.55, 2, [300, 10, 330, 40]),  # nothing is there
        (0.1, 2, [500, 20, 530, 50]),  # right, but not said aloud: missed
    ]
    scores, labels, boxes = zip(*answers)
    scorer.update({1: {"scores": torch.tensor(scores), "labels": torch.tensor(labels), "boxes": torch.tensor(boxes)}})
    mistakes = worst_mistakes(scorer, threshold=0.5)
    said = [(mistake.kind, round(mistake.score, 2), mistake.truth) for mistake in mistakes]
    assert said == [
        ("confused", 0.7, 2),
        ("invented", 0.8, 1),
        ("invented", 0.55, None),
        ("misplaced", 0.6, 1),
        ("missed", 0.02, 1),
        ("missed", 0.0, 2),
    ]
    assert len(worst_mistakes(scorer, threshold=0.05)) == 5, "the small one is found now"
    figure = draw_mistakes(mistakes, pictures)
    assert [ax.get_title() for ax in figure.axes][:2] == ["confused:\ncell, not platelet", "invented:\ncell"]
    assert worst_mistakes(CocoScorer(pictures.coco)) == []


def test_a_detector_that_says_nothing_has_missed_everything(tmp_path):
    pictures = folder_of(tmp_path, [[(1, 0, 0, 100, 100)], []])
    scorer = CocoScorer(pictures.coco)
    nothing = {"scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    scorer.update({1: nothing, 2: nothing})
    assert [mistake.kind for mistake in worst_mistakes(scorer)] == ["missed"]
