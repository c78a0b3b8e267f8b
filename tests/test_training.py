"""Chapter 10: a run is decided by its configuration, survives being killed, and goes on bit for bit where it stopped."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from annotated_detr import scenes, training
from annotated_detr.detr import detr_tiny
from annotated_detr.evaluation import ClassScore, Scores
from annotated_detr.nested_tensor import nested_tensor_from_tensor_list
from annotated_detr.training import (
    RECIPES,
    AugmentedPictures,
    DenseHead,
    ModelSpec,
    RunFolder,
    TrainConfig,
    TrainingOrder,
    cell_centres,
    dense_targets,
    fit,
    load_model,
    parameter_groups,
    rate_factor,
    resume,
    save_model,
    start,
)

SMALL = TrainConfig(
    scenes=24, val_scenes=8, size=64, epochs=2, batch_size=8, warmup_steps=3, ramp_steps=2, save_every=2, log_every=1, eval_every=1, device="cpu",
)


def same_weights(one, other) -> bool:
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    trainer = start(SMALL, tmp_path_factory.mktemp("finished") / "run")
    fit(trainer, progress=False)
    return trainer


# The order of the data


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 9), steps=st.integers(1, 30), seed=st.integers(0, 9), data=st.data())
def test_an_order_that_starts_later_is_the_rest_of_the_whole_order(count, batch_size, steps, seed, data):
    cut = data.draw(st.integers(0, steps))
    whole = list(TrainingOrder(count, batch_size, steps, seed))
    assert list(TrainingOrder(count, batch_size, steps, seed, start=cut)) == whole[cut:]
    per_epoch = math.ceil(count / batch_size)
    if steps >= per_epoch:
        assert sorted(index for batch in whole[:per_epoch] for _, index in batch) == list(range(count))


def test_epochs_and_seeds_have_different_orders():
    first, second = (list(TrainingOrder(50, 50, 2, 0)))
    other = list(TrainingOrder(50, 50, 1, 1))[0]
    assert [index for _, index in first] != [index for _, index in second]
    assert first != other


def test_augmentation_depends_on_seed_epoch_and_picture_and_on_nothing_else(finished):
    transforms = training.make_coco_transforms("train", size=64, color_jitter=0.5)
    pictures = AugmentedPictures(finished.pictures, transforms, seed=0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    once, _ = pictures[0, 3]
    assert torch.equal(torch.get_rng_state(), before), "loading a picture must not move the random generator"
    torch.rand(7)
    assert torch.equal(once, pictures[0, 3][0])
    assert not torch.equal(once, pictures[1, 3][0])


def test_a_picture_from_memory_is_the_picture_from_the_disk(finished, monkeypatch):
    transforms = training.make_coco_transforms("train", size=64, color_jitter=0.5, vertical_flip=True)
    monkeypatch.setattr(training, "KEPT_BYTES", 4 * sum(h * w for h, w in training.picture_sizes(finished.pictures)[:3]))
    pictures = AugmentedPictures(finished.pictures, transforms, seed=0)
    for key in [(epoch, index) for epoch in range(4) for index in range(5)]:
        image, target = pictures[key]
        again, expected = AugmentedPictures(finished.pictures, transforms, seed=0)[key]
        assert torch.equal(image, again)
        assert all(torch.equal(target[name], value) for name, value in expected.items()) and target.keys() == expected.keys()
    assert sorted(pictures.kept) == [0, 1, 2], "what does not fit is read again"


# The dense head


def test_dense_targets_equal_a_loop_over_cells():
    torch.manual_seed(0)
    mask = torch.zeros(2, 6, 8, dtype=torch.bool)
    mask[0, :, 5:] = True
    mask[1, 4:] = True
    targets = [
        {"labels": torch.tensor([1, 2, 3]), "boxes": torch.tensor([[0.5, 0.5, 0.9, 0.9], [0.3, 0.3, 0.3, 0.4], [0.7, 0.6, 0.2, 0.2]])},
        {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)},
    ]
    labels, boxes = dense_targets(cell_centres(mask), targets, num_classes=4)
    sizes = [(6, 5), (4, 8)]
    for picture, (height, width) in enumerate(sizes):
        for row in range(height):
            for column in range(width):
                x, y = (column + 0.5) / width, (row + 0.5) / height
                covering = [
                    (w * h, int(label), [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
                    for label, (cx, cy, w, h) in zip(targets[picture]["labels"], targets[picture]["boxes"].tolist())
                    if abs(x - cx) < w / 2 and abs(y - cy) < h / 2
                ]
                expected = min(covering)[1] if covering else 4
                assert labels[picture, row, column] == expected
                if covering:
                    torch.testing.assert_close(boxes[picture, row, column], torch.tensor(min(covering)[2]))


def test_padding_teaches_the_dense_head_nothing():
    torch.manual_seed(0)
    head = DenseHead(8, num_classes=3)
    features = torch.randn(1, 8, 4, 6)
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[:, :, 4:] = True
    target = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.4, 0.5, 0.5, 0.5]])}]
    loss = head.loss(*head(features), mask, target)
    changed = features.clone()
    changed[..., 5:] += 10  # two cells from the last real one: out of reach of a 3×3 convolution
    assert torch.equal(loss, head.loss(*head(changed), mask, target))


def test_a_picture_without_boxes_gives_a_finite_dense_loss():
    head = DenseHead(4, num_classes=2)
    logits, boxes = head(torch.randn(1, 4, 3, 3))
    nothing = [{"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}]
    loss = head.loss(logits, boxes, torch.zeros(1, 3, 3, dtype=torch.bool), nothing)
    loss.backward()
    assert loss.isfinite()


def test_the_dense_loss_is_zero_for_the_right_answer():
    head, mask = DenseHead(4, num_classes=2), torch.zeros(1, 2, 2, dtype=torch.bool)
    target = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.25, 1.0, 0.5]])}]
    logits = torch.full((1, 2, 2, 3), -100.0)
    logits[0, 0, :, 1] = logits[0, 1, :, 2] = 100  # the object covers the upper row
    boxes = target[0]["boxes"].expand(1, 2, 2, 4)
    assert head.loss(logits, boxes, mask, target).item() == pytest.approx(0, abs=1e-6)
    assert head.loss(logits, boxes * 0.9, mask, target) > 0.1


def test_the_lesson_sees_the_memory_that_the_decoder_sees():
    model = detr_tiny(num_classes=3)
    lesson = training.Lesson(model, num_classes=3).eval()
    batch = nested_tensor_from_tensor_list([torch.randn(3, 64, 48), torch.randn(3, 48, 64)])
    with torch.no_grad():
        (answers, dense), (none, warm) = lesson(batch), lesson(batch, warming_up=True)
        expected = model(batch)
    assert none is None and torch.equal(answers["pred_boxes"], expected["pred_boxes"])
    assert all(torch.equal(one, other) for one, other in zip(dense, warm))


# Optimiser and schedule


def test_recipes_of_the_paper():
    config = RECIPES["detr_resnet50"]
    assert (config.lr, config.lr_backbone, config.weight_decay, config.clip_norm) == (1e-4, 1e-5, 1e-4, 0.1)
    assert (config.batch_size, config.epochs, config.lr_drop, config.no_object_weight, config.num_queries) == (64, 500, 400, 0.1, 100)
    assert config.backbone_weights == "IMAGENET1K_V1" and config.multi_scale


def test_rates_ramp_drop_and_vanish():
    assert rate_factor(0, 100, 10, None) == pytest.approx(0.1)
    assert rate_factor(9, 100, 10, None) == 1
    assert rate_factor(55, 100, 10, None) == pytest.approx(0.5)
    assert rate_factor(99, 100, 10, None) < 0.001
    assert [rate_factor(step, 100, 0, 80) for step in (0, 79, 80, 99)] == [1, 1, 0.1, 0.1]


def test_every_trainable_parameter_is_in_one_group():
    model = detr_tiny(num_classes=3)
    model.query_embed.weight.requires_grad_(False)
    groups = parameter_groups(model, lr=1.0, lr_backbone=0.5)
    backbone = {id(parameter) for parameter in model.backbone.parameters()}
    assert {id(parameter) for parameter in groups[1]["params"]} == backbone
    everything = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(everything) == len(set(everything)) == sum(parameter.requires_grad for parameter in model.parameters())


def test_layers_that_never_train_may_not_stay_random(tmp_path):
    config = replace(SMALL, model="detr_resnet50")
    with pytest.raises(ValueError, match="never train and would stay random: .*--backbone-weights"):
        start(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Runs


def test_a_run_leaves_its_configuration_metrics_and_detectors(finished):
    folder = finished.folder
    assert folder.read_config() == SMALL
    lines = folder.read_metrics()
    assert [line["step"] for line in lines if line["phase"] != "validation"] == list(range(1, 10))
    assert [line["phase"] for line in lines[:4]] == ["warm-up"] * 3 + ["detr"]
    assert [line["step"] for line in folder.read_metrics("validation")] == [6, 9]
    model, spec = load_model(folder.last)
    assert same_weights(model, finished.learner.model) and not model.training
    assert spec.num_classes == 7 and spec.class_names["1"] == scenes.CLASS_NAMES[1]
    assert load_model(folder.best)[1] == spec


def test_the_warm_up_leaves_the_decoder_as_it_is(tmp_path):
    trainer = start(SMALL, tmp_path / "run")
    before = {name: tensor.clone() for name, tensor in trainer.learner.model.state_dict().items()}
    for batch in training.batches(trainer):
        training.train_step(trainer.learner, batch)
        if not trainer.learner.warming_up:
            break
    after = trainer.learner.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    taught = ("backbone.", "input_proj.", "transformer.encoder.")
    assert all(name.startswith(taught) for name in moved)
    assert all(any(name.startswith(part) for name in moved) for part in taught)


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 8])
def test_a_resumed_run_ends_bit_for_bit_like_an_unbroken_one(finished, tmp_path, stop):
    broken = start(SMALL, tmp_path / "run")
    original = training.train_step

    def stopping(learner, *batch):
        if learner.step == stop:
            raise KeyboardInterrupt
        return original(learner, *batch)

    training.train_step = stopping
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(broken, progress=False)
    finally:
        training.train_step = original
    torch.rand(stop)  # a new process would not have the old one's random state
    resumed = resume(tmp_path / "run")
    fit(resumed, progress=False)
    assert same_weights(resumed.learner.model, finished.learner.model)
    logged = [(line["step"], line.get("loss"), line.get("AP")) for line in resumed.folder.read_metrics()]
    assert logged == [(line["step"], line.get("loss"), line.get("AP")) for line in finished.folder.read_metrics()]


def test_a_run_that_is_killed_can_be_resumed(finished, tmp_path):
    run = tmp_path / "run"
    code = (
        "from annotated_detr import training as t; from pathlib import Path; import sys; "
        "t.fit(t.start(t.RunFolder(Path(sys.argv[1])).read_config(), sys.argv[2]), progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(finished.folder.path), str(run)], env=os.environ)
    deadline = time.monotonic() + 120
    while not RunFolder(run).states and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert RunFolder(run).states, "the run never wrote a checkpoint"
    resumed = resume(run)
    fit(resumed, progress=False)
    assert same_weights(resumed.learner.model, finished.learner.model)


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        start(SMALL, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_resuming_what_is_no_run_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        resume(tmp_path)
    (tmp_path / "config.json").write_text('{"learning_rate": 1}')
    with pytest.raises(ValueError, match="not the configuration of a training run"):
        resume(tmp_path)


HOLD = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_a_run_that_another_process_trains_is_left_alone(finished, tmp_path):
    shutil.copytree(finished.folder.path, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != ".lock"}
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run" / ".lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match="another process is training in .*run"):
            resume(tmp_path / "run")
        with pytest.raises(BlockingIOError, match="another process is training in .*run"):
            fit(training.Trainer(finished.config, RunFolder(tmp_path / "run")), progress=False)
        assert before == {path: path.read_bytes() for path in before}
    finally:
        other.kill()
        other.communicate()
    assert resume(tmp_path / "run").learner.step == finished.learner.step  # a kill leaves no lock behind


def test_a_folder_that_cannot_be_locked_is_a_sentence(finished, monkeypatch):
    def refuse(lock, **options):
        raise PermissionError(13, "Permission denied", str(finished.folder.path / ".lock"))

    monkeypatch.setattr(training.FileLock, "acquire", refuse)
    with pytest.raises(OSError, match="the lock cannot be written into .*Permission denied"):
        resume(finished.folder.path)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(finished, tmp_path, capsys):
    shutil.copytree(finished.folder.path, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert [state.stem for state in folder.states] == ["state-00000008", "state-00000009"]
    last = bytearray(folder.states[-1].read_bytes())
    last[len(last) // 2] ^= 1  # one bit
    folder.states[-1].write_bytes(last)
    resumed = resume(tmp_path / "run")
    assert resumed.learner.step == 8 and "state-00000009.pt is damaged" in capsys.readouterr().out
    fit(resumed, progress=False)
    assert same_weights(resumed.learner.model, finished.learner.model)
    for state in folder.states:
        state.write_bytes(state.read_bytes()[:5000])
    with pytest.raises(ValueError, match="every state in .* is damaged"):
        resume(tmp_path / "run")


def test_a_metrics_line_that_a_kill_cut_short_is_left_out(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append({"step": 1, "phase": "detr"})
    with open(folder.metrics, "a") as file:
        file.write('{"step": 2, "pha')
    assert folder.read_metrics() == [{"step": 1, "phase": "detr"}]


def test_training_lowers_the_loss(tmp_path):
    config = replace(SMALL, scenes=8, epochs=40, warmup_steps=0, lr=1e-3, lr_backbone=1e-3, eval_every=1000)
    trainer = start(config, tmp_path / "run")
    trainer.val_pictures = None
    fit(trainer, progress=False)
    losses = [line["loss"] for line in trainer.folder.read_metrics("detr")]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_a_run_that_is_too_short_is_told_so_before_it_starts(tmp_path):
    assert "too few steps to learn: 6" in training.plan(start(SMALL, tmp_path / "run"))
    assert training.warn_of_few_steps("tiny", 2_000) == "" != training.warn_of_few_steps("tiny", 1_999)
    assert "weights that have learned COCO" in training.warn_of_few_steps("detr_resnet50", 5_000)
    assert training.warn_of_few_steps("tiny", 600, finetuned=True) == "" != training.warn_of_few_steps("tiny", 400, finetuned=True)
    assert training.warn_of_few_steps("detr_resnet50", training.PAPER_STEPS) == ""


def test_half_precision_trains_nearly_like_whole(tmp_path):
    config = replace(SMALL, scenes=16, epochs=2)
    curves = []
    for precision in ("float32", "bfloat16"):
        trainer = start(replace(config, precision=precision), tmp_path / precision)
        fit(trainer, progress=False)
        curves.append([line["loss"] for line in trainer.folder.read_metrics() if "loss" in line])
        assert all(parameter.dtype == torch.float32 for parameter in trainer.learner.model.parameters())
    assert curves[0] != curves[1], "bfloat16 was not used"
    assert curves[1] == pytest.approx(curves[0], rel=0.1)


def test_one_batch_can_be_learned_by_heart():
    config = replace(SMALL, scenes=8, batch_size=2, lr=1e-3, lr_backbone=1e-3, ramp_steps=10)
    losses, scores = training.overfit_one_batch(config, steps=150, progress=False)
    assert len(losses) == 150 and losses[-1] < 0.5 * losses[0] and scores.pictures == 2 and scores.AP50 > 0.3


def test_a_run_is_drawn(finished, tmp_path):
    above, below = training.plot_run(finished.folder).axes
    assert [line.get_label() for line in above.lines] == ["warm-up", "detr"]
    assert [list(line.get_xdata()) for line in below.lines] == [[6, 9]] * 2
    with pytest.raises(ValueError, match="no metrics yet"):
        training.plot_run(RunFolder(tmp_path))


def test_the_metrics_show_how_a_run_is_doing(finished):
    for line in finished.folder.read_metrics("detr"):
        assert 0 <= line["foreground_accuracy"] <= 100 and 0 <= line["no_object_share"] <= 100 and 0 <= line["box_spread"] <= 0.5
        assert {"loss_ce", "loss_bbox_1", "loss_giou_0", "loss_dense", "class_error", "grad_norm", "lr"} <= line.keys()


def test_vital_signs_tell_a_collapsed_model_from_a_healthy_one():
    corners = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]])
    targets = [{"labels": torch.tensor([0, 1]), "boxes": corners, "image_id": torch.tensor([7])}]
    criterion = training.build_criterion(2)
    logits = torch.tensor([[[9.0, 0, 0], [0, 9.0, 0], [0, 0, 9.0], [0, 0, 9.0]]])
    boxes = torch.cat([targets[0]["boxes"], torch.tensor([[0.2, 0.8, 0.1, 0.1], [0.8, 0.2, 0.1, 0.1]])])[None]
    healthy = training.vital_signs(criterion, {"pred_logits": logits, "pred_boxes": boxes}, targets)
    alike = {"pred_logits": logits[:, 3:].expand(1, 4, 3), "pred_boxes": boxes[:, :1].expand(1, 4, 4)}
    collapsed = training.vital_signs(criterion, alike, targets)
    assert healthy["foreground_accuracy"] == 100 and healthy["no_object_share"] == 50 and healthy["box_spread"] > 0.3
    assert collapsed["no_object_share"] == 100 and collapsed["box_spread"] == 0
    two = [targets[0], {"labels": torch.tensor([0, 0]), "boxes": corners, "image_id": torch.tensor([8])}]
    answers = {"pred_logits": logits.expand(2, 4, 3), "pred_boxes": boxes.expand(2, 4, 4)}
    assert training.vital_signs(criterion, answers, two)["hardest_picture"] == 8, "its second label is wrong"


# What the trainer watches


def warnings(trainer) -> dict[str, str]:
    return {line["about"]: line["warning"] for line in trainer.folder.read_metrics("warning")}


@pytest.fixture
def hurried(tmp_path, monkeypatch):
    """A run of 48 steps of a trainer that expects results within 40, or of more that expects them within `patience`."""

    def run(change=None, patience=40, **options):
        monkeypatch.setitem(training.PATIENCE, "tiny", patience)
        epochs = 2 * patience // 5
        trainer = start(replace(SMALL, warmup_steps=0, epochs=epochs, eval_every=epochs, save_every=50, **options), tmp_path / "run")
        if change is not None:
            change(trainer.learner.model)
            trainer.learner.start_phase()
        fit(trainer, progress=False)
        return trainer

    return run


def test_a_healthy_run_is_left_in_peace(hurried, capsys):
    assert warnings(hurried(patience=100)) == {}
    assert "warning" not in capsys.readouterr().out


def test_queries_that_are_all_alike_are_noticed(hurried, capsys):
    class Alike(torch.nn.Module):
        def forward(self, weight):
            return weight.mean(0, keepdim=True).expand_as(weight)

    def change(model):
        for embedding in (model.query_embed, model.query_content):
            torch.nn.utils.parametrize.register_parametrization(embedding, "weight", Alike())

    trainer = hurried(change)
    assert "every query gives nearly the same box (box_spread 0.000" in warnings(trainer)["boxes_alike"]
    said = capsys.readouterr().out
    assert said.count("every query gives nearly the same box") == 1, "once"
    assert re.search(r"step 2[4-9]: warning: every query", said), "and early"


def test_answers_that_are_all_no_object_are_noticed(hurried):
    assert 'every query has said "no object" since step' in warnings(hurried(no_object_weight=50.0))["nothing_found"]


def test_a_loss_that_stays_where_it_is_is_noticed_once_and_also_after_resuming(hurried):
    trainer = hurried(lr=1e-9, lr_backbone=1e-9)
    assert "the loss does not leave its plateau" in warnings(trainer)["on_its_plateau"]
    again = resume(trainer.folder.path)
    assert again.warned == warnings(trainer).keys() and len(again.recent) == 48
    training.watch(again, training.on_its_plateau)
    assert len(trainer.folder.read_metrics("warning")) == len(warnings(trainer))


def test_a_category_without_boxes_is_named_before_the_first_step(tmp_path):
    images, file = scenes.coco_folder(None, "train", 24)
    content = json.loads(Path(file).read_text())
    content["categories"].append({"id": 7, "name": "comet"})
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    trainer = start(replace(SMALL, images=Path(images), annotations=tmp_path / "boxes.json"), tmp_path / "run")
    assert "no training picture has a box of comet" in training.never_shown(trainer)


def scored(**by_class: tuple[float, int]) -> Scores:
    """Scores of which only AP50 and the number of boxes count, those of each class."""
    rows = [ClassScore(i, name, boxes, *[AP50] * 5) for i, (name, (AP50, boxes)) in enumerate(by_class.items())]
    return Scores(*[sum(row.AP50 for row in rows) / len(rows)] * 12, by_class=rows)


def test_a_class_that_nobody_finds_is_named_but_given_time(finished, monkeypatch):
    """As on the real blood cells: platelets are found late."""
    scores = scored(WBC=(0.97, 90), platelets=(0.0, 80))
    monkeypatch.setattr(training, "patience", lambda trainer: 4)
    monkeypatch.setattr(finished.learner, "step", finished.config.warmup_steps + 2)
    assert training.never_found(finished, scores) is None
    monkeypatch.setattr(finished.learner, "step", finished.learner.steps)
    assert "validation boxes of platelets none is found" in training.never_found(finished, scores)
    assert training.never_found(finished, scored(WBC=(0.97, 90), platelets=(0.0, 5))) is None, "five boxes prove nothing"


def test_boxes_that_fit_without_any_score_are_noticed(finished, monkeypatch):
    lines = [{"step": step, "loss_giou": 0.3} for step in range(0, 1001, 20)]
    monkeypatch.setattr(finished, "recent", lines)
    monkeypatch.setattr(finished.learner, "step", 1000)
    assert "compare the category ids and the box format" in training.learned_something_else(finished, scored(ring=(0.0, 9)))
    assert training.learned_something_else(finished, scored(ring=(0.1, 9))) is None
    lines[-1]["loss_giou"] = 5.0
    assert training.learned_something_else(finished, scored(ring=(0.0, 9))) is None, "a young run scores nothing, either"


def test_pictures_that_are_always_the_hardest_are_listed(finished, tmp_path):
    folder, ids = RunFolder(tmp_path), finished.pictures.ids
    folder.create(finished.config)
    for step in range(60):  # 24 pictures in batches of 8: a picture is seen in every third step
        hardest = ids[5] if step % 3 == 0 else [None, ids[step % 24]][step % 2]
        folder.append({"step": step, "phase": "detr", "hardest_picture": hardest})
    name = finished.pictures.coco.imgs[ids[5]]["file_name"]
    assert training.hardest_pictures(folder, finished.pictures) == [name]
    assert training.hardest_pictures(finished.folder, finished.pictures) == []


# Files of weights


def test_a_saved_model_answers_as_before(tmp_path):
    torch.manual_seed(0)
    spec = ModelSpec("tiny", 5, 9, 64, {"1": "cup"}, {"num_decoder_layers": 2})
    model = spec.build().eval()
    save_model(tmp_path / "model.safetensors", model, spec)
    again, spec_again = load_model(tmp_path / "model.safetensors")
    picture = [torch.randn(3, 64, 48)]
    assert spec_again == spec and torch.equal(model(picture)["pred_boxes"], again(picture)["pred_boxes"])


def test_weights_that_cannot_be_used_are_named(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_model(tmp_path / "nothing.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(ValueError, match="is damaged, or no file of weights"):
        load_model(tmp_path / "cut.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="does not say of which model"):
        load_model(tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="there is no model 'yolo'"):
        ModelSpec("yolo", 5, 9, 64).build()


@pytest.mark.parametrize("module", ["dense_head.classify", "transformer.encoder.layers.1.linear1", "class_embed"])
def test_a_loss_that_is_not_finite_names_module_and_pictures_and_keeps_the_batch(tmp_path, module):
    trainer = start(replace(SMALL, warmup_steps=int("dense" in module)), tmp_path / "run")
    lesson = trainer.learner.lesson
    part = lesson if "dense" in module else lesson.model
    with torch.no_grad():
        part.get_submodule(module).bias.fill_(float("nan"))
    _, targets = next(iter(training.batches(trainer)))
    with pytest.raises(FloatingPointError, match=re.escape(module)) as caught:
        fit(trainer, progress=False)
    assert str([int(target["image_id"]) for target in targets]) in str(caught.value)
    (kept,) = torch.load(trainer.folder.path / "batch-0-0.pt", weights_only=True)
    assert kept["tensors"].shape == (8, 3, 64, 64) and len(kept["targets"]) == 8


# Parts of a batch, processes

ONE_STEP = replace(SMALL, scenes=8, epochs=1, warmup_steps=0, dense_weight=0.0, clip_norm=1e6)
TRAIN = """
import sys, torch
from pathlib import Path
from annotated_detr import training as t
with t.processes():
    trainer = t.start(t.TrainConfig(**eval(sys.argv[1])), sys.argv[2])
    for module in trainer.learner.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # a batch's statistics differ from those of its parts
            module.eval()
            module.train = lambda mode=True: None
    t.fit(trainer, progress=False)
    if trainer.rank == 0:
        gradients = {name: p.grad for name, p in trainer.learner.model.named_parameters()}
        torch.save(gradients, sys.argv[3])
"""


def train_elsewhere(folder: Path, name: str, config: TrainConfig, processes: int = 1):
    script, told = folder / "train.py", {k: v for k, v in vars(config).items() if v is not None}
    script.write_text(TRAIN)
    command = [sys.executable, str(script), repr(told), str(folder / name), str(folder / f"{name}.pt")]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300)
    return torch.load(folder / f"{name}.pt"), RunFolder(folder / name).read_metrics("validation")[-1]


@pytest.mark.parametrize("processes, accumulate", [(1, 4), (2, 1), (2, 2)])
def test_parts_and_processes_have_the_gradients_of_the_whole(tmp_path, processes, accumulate):
    whole, scores = train_elsewhere(tmp_path, "whole", ONE_STEP)
    shared, its_scores = train_elsewhere(tmp_path, "shared", replace(ONE_STEP, accumulate=accumulate), processes)
    assert whole.keys() == shared.keys()
    for name, expected in whole.items():
        torch.testing.assert_close(shared[name], expected, atol=1e-5 * max(1, expected.abs().max().item()), rtol=1e-4)
    assert its_scores["AR100"] == pytest.approx(scores["AR100"], abs=0.02)  # each scored its share of the pictures


def test_two_processes_go_through_warm_up_and_training_in_step(tmp_path):
    gradients, _ = train_elsewhere(tmp_path, "run", replace(SMALL, scenes=9, epochs=2), processes=2)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    folder = RunFolder(tmp_path / "run")
    assert [line["step"] for line in folder.read_metrics("detr")] == [4, 5, 6, 7]  # written once, by the first process


def test_shares_of_a_batch_are_the_batch():
    whole = list(TrainingOrder(10, 4, 6, seed=1))
    for shares in (2, 3, 4):
        parts = [list(TrainingOrder(10, 4, 6, seed=1, shares=shares, mine=[share])) for share in range(shares)]
        for step, batch in enumerate(whole):
            got = [pair for part in parts for pair in part[step]]
            assert set(got) == set(batch) and all(part[step] for part in parts)
            assert len(got) == len(batch) or len(batch) < shares


def test_pictures_that_would_stop_training_stop_it_before_the_first_step(tmp_path):
    folder, file = scenes.coco_folder(tmp_path / "scenes", "train", 4)
    content = json.loads(file.read_text())
    content["annotations"][0]["category_id"] = "one"
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="would fail"):
        start(replace(SMALL, images=folder, annotations=bad), tmp_path / "run")
    with pytest.raises(ValueError, match="--annotations"):
        start(replace(SMALL, images=folder), tmp_path / "run")

# Scale: like shapes together, the largest batch first


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 60), batch_size=st.integers(1, 9), seed=st.integers(0, 9))
def test_grouping_by_shape_keeps_every_picture_and_every_step(count, batch_size, seed):
    steps = math.ceil(count / batch_size)
    aspects = [0.5 + (7 * index % 5) / 2 for index in range(count)]
    order = list(TrainingOrder(count, batch_size, 2 * steps, seed, aspects=aspects))
    for epoch in (order[:steps], order[steps:]):
        assert sorted(index for batch in epoch for _, index in batch) == list(range(count))
        assert [len(batch) for batch in epoch[:-1]] == [batch_size] * (steps - 1)
    assert list(TrainingOrder(count, batch_size, 2 * steps, seed, start=1, aspects=aspects)) == order[1:]


def test_grouping_by_shape_saves_padding():
    aspects = [1.0 + index % 7 for index in range(700)]

    def spread(**options):
        order = TrainingOrder(700, 10, 70, 0, **options)
        return sum(max(aspects[i] for _, i in batch) - min(aspects[i] for _, i in batch) for batch in order)

    assert spread(aspects=aspects) < 0.3 * spread()
    batches = list(TrainingOrder(700, 10, 70, 0, aspects=aspects))
    firsts = [aspects[batch[0][1]] for batch in batches]
    assert firsts != sorted(firsts), "the batches are in the order of their shapes"


@pytest.mark.parametrize("multi_scale", [False, True])
def test_no_training_batch_is_larger_than_the_largest(tmp_path, multi_scale):
    images = tmp_path / "images"
    images.mkdir()
    records, boxes = [], []
    for id, size in enumerate([(100, 300), (320, 100), (90, 80)], start=1):
        Image.new("RGB", size[::-1]).save(images / f"{id}.png")
        records.append({"id": id, "file_name": f"{id}.png", "height": size[0], "width": size[1]})
        boxes.append({"id": id, "image_id": id, "category_id": 1, "bbox": [2, 2, 60, 60], "area": 3600, "iscrowd": 0})
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps({"images": records, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}))
    config = replace(SMALL, images=images, annotations=file, batch_size=3, epochs=25, multi_scale=multi_scale)
    trainer = start(config, tmp_path / "run")
    height, width = training.largest_shape(trainer)
    seen = [samples.tensors.shape[-2:] for samples, _ in training.batches(trainer)]
    rounding = 2 if multi_scale else 0  # the paper's resizing may exceed its own cap
    assert all(h <= height + rounding and w <= width + rounding for h, w in seen)
    if not multi_scale:
        assert (height, width) == tuple(max(sides) for sides in zip(*seen))


def test_trying_the_largest_batch_changes_nothing(tmp_path, monkeypatch):
    trainer = start(SMALL, tmp_path / "run")
    learner = trainer.learner
    before = {name: value.clone() for name, value in learner.lesson.state_dict().items()}
    chance = torch.get_rng_state()
    assert "8 pictures of 64 × 64" in training.try_largest_batch(trainer)
    assert torch.equal(torch.get_rng_state(), chance) and learner.step == 0
    assert all(torch.equal(value, before[name]) for name, value in learner.lesson.state_dict().items())
    assert all(parameter.grad is None for parameter in learner.lesson.parameters())

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(training, "batch_losses", full)
    with pytest.raises(MemoryError, match=r"8 pictures of 64 × 64.*--accumulate \(same gradients\)"):
        training.try_largest_batch(trainer)
    assert learner.task is learner.lesson and learner.step == 0


def test_a_batch_that_the_rate_is_not_meant_for_is_named():
    paper = RECIPES["detr_resnet50"]
    assert training.warn_of_batch(paper) == training.warn_of_batch(replace(paper, batch_size=16)) == ""
    assert "--lr 5.0e-05 --lr-backbone 5.0e-06" in training.warn_of_batch(replace(paper, batch_size=4))
    assert "--lr 2.0e-04" in training.warn_of_batch(replace(paper, batch_size=256))
    assert training.warn_of_batch(replace(paper, batch_size=4, lr=5e-5)) == training.warn_of_batch(SMALL) == ""


# Sight


def test_answers_are_drawn_at_every_scoring(finished):
    drawn = sorted(path.name for path in (finished.folder.path / "pictures").iterdir())
    scored = [line["step"] for line in finished.folder.read_metrics("validation")]
    assert drawn == [f"step-{step:08d}.png" for step in scored]
    axes = training.draw_answers(finished, 3).axes
    assert len(axes) == 3 and all(ax.images for ax in axes)
    assert len(training.draw_answers(finished, 1).axes) == 1


def test_tensorboard_shows_what_the_metrics_say(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = start(replace(SMALL, tensorboard=True), tmp_path / "run")
    fit(trainer, progress=False)
    trainer.board.close()
    board = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    shown = [(event.step, event.value) for event in board.Scalars("detr/loss")]
    logged = [(line["step"], line["loss"]) for line in trainer.folder.read_metrics("detr")]
    assert [step for step, _ in shown] == [step for step, _ in logged]
    assert [value for _, value in shown] == pytest.approx([value for _, value in logged])


# Fine-tuning, and disks that refuse


def test_a_run_that_starts_from_weights_can_be_resumed_from_its_first_moment(tmp_path):
    config = training.FinetuneConfig(**{**vars(SMALL), "warmup_steps": 0, "weights": "elsewhere"})
    torch.manual_seed(5)
    model = training.spec_for(config, training.open_datasets(config)[0]).build()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    start(config, tmp_path / "run", model)
    resumed = resume(tmp_path / "run")
    assert resumed.config == config and resumed.learner.step == 0
    assert all(torch.equal(value, weights[name]) for name, value in resumed.learner.model.state_dict().items())
    for state in resumed.folder.states:
        state.unlink()
    with pytest.raises(ValueError, match="stopped before its weights were written"):
        resume(tmp_path / "run")


FULL = """
import resource, signal, sys
from annotated_detr import training as t
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
trainer = t.resume(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    t.fit(trainer, progress=False)
except OSError as error:
    print(error)
"""


def test_a_full_disk_is_a_sentence_and_the_last_checkpoint_is_kept(finished, tmp_path):
    broken = start(SMALL, tmp_path / "run")
    for part in training.batches(broken):
        training.train_step(broken.learner, part)
        if broken.learner.step == 4:
            broken.save()
            break
    said = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "run")], env=os.environ, capture_output=True, text=True)
    assert re.search(r"(the checkpoint of step \d+|the best weights so far) cannot be written into .*File too large.*goes on from step 4", said.stdout), said
    assert not list(tmp_path.rglob("*.part"))
    resumed = resume(tmp_path / "run")
    assert resumed.learner.step == 4
    fit(resumed, progress=False)
    assert same_weights(resumed.learner.model, finished.learner.model)


def test_a_place_that_is_not_a_folder_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="the configuration cannot be written into .*Not a directory"):
        start(SMALL, tmp_path / "file" / "run")


KILLED = "from annotated_detr import training as t; import sys; t.fit(t.resume(sys.argv[1]), progress=False)"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_twenty_times_ends_bit_for_bit_like_an_unbroken_one(tmp_path):
    config = replace(SMALL, scenes=96, epochs=12, save_every=3, num_workers=1)
    unbroken = start(config, tmp_path / "unbroken")
    fit(unbroken, progress=False)
    run = tmp_path / "run"
    start(config, run)
    chance, kills, command = random.Random(0), 0, [sys.executable, "-c", KILLED, str(run)]
    while kills < 20:
        known = RunFolder(run).states
        process = subprocess.Popen(command, env=os.environ, start_new_session=True)
        while RunFolder(run).states == known and process.poll() is None:
            time.sleep(0.01)  # let every life get somewhere, then kill it wherever it is
        time.sleep(chance.random() * 0.5)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        assert RunFolder(run).read_metrics()[-1]["step"] < unbroken.learner.steps, f"done after {kills} kills: make the run longer"
    resumed = resume(run)
    fit(resumed, progress=False)
    assert same_weights(resumed.learner.model, unbroken.learner.model)
    logged, expected = ([(line["step"], line.get("loss"), line.get("AP")) for line in trainer.folder.read_metrics()] for trainer in (resumed, unbroken))
    assert logged == expected
