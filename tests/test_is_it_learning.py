"""Chapter 14: pictures with wrong labels have the largest loss; the recorded runs are told what ails them, and the healthy one nothing."""

import json
from importlib.resources import files

import pytest
from annotated_detr import scenes
from annotated_detr.data import CocoDetection
from annotated_detr.inference import load_detector
from annotated_detr.is_it_learning import draw_signs, rank_by_loss


def test_a_picture_with_wrong_labels_is_ranked_first():
    detector = load_detector("tiny-scenes")
    pictures = CocoDetection(*scenes.coco_folder(None, "test", 12), transforms=detector.transform)
    liar = pictures.ids[4]
    for box in pictures.coco.imgToAnns[liar]:
        box["category_id"] = box["category_id"] % 6 + 1
    ranked = rank_by_loss(detector.model.train(), pictures, progress=False)
    assert detector.model.training, "the model's mode is put back"
    assert len(ranked) == 12 and [loss for _, loss in ranked] == sorted([loss for _, loss in ranked], reverse=True)
    assert ranked[0][0] == pictures.coco.imgs[liar]["file_name"]


def test_signs_are_drawn_from_what_there_is():
    lines = [{"step": 20, "phase": "detr", "loss": 9.0, "box_spread": 0.1}, {"step": 40, "phase": "validation", "AP50": None}]
    figure = draw_signs({"one": lines})
    assert [len(ax.lines[0].get_xdata()) for ax in figure.axes] == [1, 0, 1, 0]


@pytest.fixture(scope="module")
def runs():
    return json.loads((files("annotated_detr") / "sick_runs.json").read_text())["runs"]


WATCHES = {
    "category ids off by one": "learned_something_else",
    "corner for centre": "learned_something_else",
    "every query alike": "boxes_alike",
    "mask inverted": "on_its_plateau",
    "rate too high": "on_its_plateau",
    "some labels wrong": "always_hardest",
}


@pytest.mark.parametrize("name", WATCHES)
def test_a_sick_run_was_told_what_ails_it(runs, name):
    assert WATCHES[name] in [warning["about"] for warning in runs[name]["said"]]


def test_the_healthy_run_was_left_in_peace_and_learned_most(runs):
    assert runs["healthy"]["said"] == []
    for name, run in runs.items():
        if run["scores"]["AP50"] and name != "some labels wrong":
            assert name == "healthy" or run["scores"]["AP50"][-1] < runs["healthy"]["scores"]["AP50"][-1]


def test_boxes_in_pixels_do_not_pass_the_first_batch(runs):
    assert "0..1" in runs["boxes in pixels"]["stopped"] and runs["boxes in pixels"]["curve"]["step"] == []
