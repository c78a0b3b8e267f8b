"""Hostile input, from the front door: each error names the picture and says what to do, with and without annotation checks."""

import jaxtyping
import pytest
import torch

from annotated_detr.backbone import TinyBackbone
from annotated_detr.detr import DETR, PostProcess, detr_tiny
from annotated_detr.loss import build_criterion
from annotated_detr.nested_tensor import NestedTensor, collate_fn, nested_tensor_from_tensor_list
from annotated_detr.positional_encoding import Joiner, PositionEmbeddingLearned
from annotated_detr.transformer import Transformer

K, N = 4, 5


@pytest.fixture(params=["checked", "unchecked"])
def annotations(request):
    """The annotations enforced, as in every test, and switched off, as in a user's process."""
    jaxtyping.config.update("jaxtyping_disable", request.param == "unchecked")
    yield request.param
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def model() -> DETR:
    torch.manual_seed(0)
    return detr_tiny(K, N).eval()


def batch() -> NestedTensor:
    generator = torch.Generator().manual_seed(0)
    return nested_tensor_from_tensor_list([torch.randn(3, h, w, generator=generator) for h, w in ((32, 48), (48, 32))])


def targets() -> list[dict]:
    """Two pictures, ids 70 and 71, with one box and two."""
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.4, 0.2, 0.1], [0.6, 0.7, 0.3, 0.3]])
    return [
        {"labels": torch.tensor([1]), "boxes": boxes[:1], "image_id": torch.tensor([70])},
        {"labels": torch.tensor([0, 3]), "boxes": boxes[1:].clone(), "image_id": torch.tensor([71])},
    ]


def loss_of(model, made) -> torch.Tensor:
    criterion = build_criterion(K, 3)
    return criterion.total(criterion(model(batch()), made))


def assert_sentence(caught) -> None:
    """One sentence, from this package and not from deep inside another."""
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert "annotated_detr" in str(caught.traceback[-1].path)


def test_good_input_is_accepted(annotations, model):
    assert loss_of(model, targets()).isfinite()


@pytest.mark.parametrize("layer", ["last layer", "earlier layer"])
@pytest.mark.parametrize("name", ["pred_logits", "pred_boxes"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_predictions(annotations, model, layer, name, value):
    outputs = model(batch())
    sick = {key: outputs[key].detach().clone() for key in ("pred_logits", "pred_boxes")}
    sick["aux_outputs"] = [{key: value.detach().clone() for key, value in one.items()} for one in outputs["aux_outputs"]]
    (sick if layer == "last layer" else sick["aux_outputs"][0])[name][1, 2] = value
    with pytest.raises(ValueError, match=r"predictions for picture 1 of the batch \(image_id 71\) are not finite: look for") as caught:
        build_criterion(K, 3)(sick, targets())
    assert_sentence(caught)
    if layer == "last layer":
        with pytest.raises(ValueError, match="answers for picture 1 of the batch are not finite: look for NaN") as caught:
            PostProcess()(sick, torch.tensor([[32, 48], [48, 32]]))
        assert_sentence(caught)


@pytest.mark.parametrize("annotations", ["unchecked"], indirect=True)
@pytest.mark.parametrize(
    "mask, error, sentence",
    [
        (lambda good: good.float(), TypeError, "the mask is torch.float32, but it has to be bool, True on padding: mask.bool()"),
        (lambda good: good.long(), TypeError, "the mask is torch.int64, but it has to be bool"),
        (lambda good: good.mT, ValueError, r"\[2, 3, 48, 48\] and mask \[2, 48, 47\] do not describe the same cells: they have to be"),
        (lambda good: good[:1], ValueError, r"mask \[1, 47, 48\] do not describe the same cells"),
        (lambda good: good[:, None], ValueError, "do not describe the same cells"),
    ],
    ids=["float", "integer", "height and width swapped", "one picture's", "with a channel axis"],
)
def test_a_mask_of_the_wrong_dtype_or_shape(annotations, mask, error, sentence):
    """(With the checks on, they are what stops it: test_shapes.py.)"""
    good = batch()
    tensors, right = (good.tensors, good.mask) if "int64" in sentence or "float32" in sentence else (good.tensors, good.mask[:, :47])
    with pytest.raises(error, match=sentence) as caught:
        NestedTensor(tensors, mask(right))
    assert_sentence(caught)


def test_an_empty_batch(annotations, model):
    nothing = NestedTensor.__new__(NestedTensor)
    nothing.tensors, nothing.mask = torch.zeros(0, 3, 32, 32), torch.zeros(0, 32, 32, dtype=torch.bool)
    for attempt in (
        lambda: model([]),
        lambda: collate_fn([]),
        lambda: NestedTensor(nothing.tensors, nothing.mask),
        lambda: build_criterion(K, 1)({"pred_logits": torch.zeros(0, N, K + 1), "pred_boxes": torch.zeros(0, N, 4)}, []),
    ):
        with pytest.raises(ValueError, match="empty: .* at least one picture|answered for 0 pictures .*: give") as caught:
            attempt()
        assert_sentence(caught)


def test_a_picture_that_is_all_padding(annotations, model):
    sick = batch()
    sick.mask[1] = True
    with pytest.raises(ValueError, match="picture 1 of the batch is all padding .*: take it out of the batch, or correct its mask") as caught:
        model(sick)
    assert_sentence(caught)


@pytest.mark.parametrize("label", [K, K + 1, -1])
def test_a_label_outside_the_classes(annotations, model, label):
    made = targets()
    made[1]["labels"][1] = label
    sentence = rf"Box 1 of picture 1 of the batch \(image_id 71\) has label {label}, .* {K} classes knows 0 to {K - 1}: build it with num_classes"
    with pytest.raises(ValueError, match=sentence) as caught:
        loss_of(model, made)
    assert_sentence(caught)


def test_boxes_in_pixels(annotations, model):
    made = targets()
    made[1]["boxes"] *= torch.tensor([640.0, 480.0, 640.0, 480.0])
    sentence = r"Box 0 of picture 1 of the batch \(image_id 71\) is \[192, 192, 128, 48\], which looks like pixels: divide by the picture's width"
    with pytest.raises(ValueError, match=sentence) as caught:
        loss_of(model, made)
    assert_sentence(caught)


def test_101_boxes_for_100_queries(annotations):
    torch.manual_seed(0)
    model = detr_tiny(K, num_queries=100).eval()
    made = targets()
    made[1] |= {"labels": torch.ones(101, dtype=torch.int64), "boxes": torch.full((101, 4), 0.5)}
    sentence = r"picture 1 of the batch \(image_id 71\) has 101 boxes and the model has 100 queries, .*: build the model with num_queries=101 or more"
    with pytest.raises(ValueError, match=sentence) as caught:
        loss_of(model, made)
    assert_sentence(caught)
    made[1] |= {"labels": made[1]["labels"][:100], "boxes": made[1]["boxes"][:100]}
    assert loss_of(model, made).isfinite()


def test_more_than_50_cells_with_learned_positions(annotations):
    joiner = Joiner(TinyBackbone((8,)), PositionEmbeddingLearned(8))
    model = DETR(joiner, Transformer(16, 2, 1, 1, 16), K, N).eval()
    pictures = [torch.zeros(3, 40, 60), torch.zeros(3, 102, 20)]
    with pytest.raises(ValueError, match="51×30 cells and the learned positions end at 50: make picture 1 of the batch smaller") as caught:
        model(pictures)
    assert_sentence(caught)
    model([torch.zeros(3, 40, 60), torch.zeros(3, 100, 20)])


def test_pictures_that_are_not_floats(annotations, model):
    if annotations == "unchecked":
        with pytest.raises(TypeError, match="picture 1 is torch.uint8: scale and normalise it to floats first") as caught:
            model([torch.zeros(3, 32, 32), torch.zeros(3, 32, 32, dtype=torch.uint8)])
        assert_sentence(caught)
        with pytest.raises(TypeError, match="the tensors of the batch are torch.uint8: scale and normalise") as caught:
            NestedTensor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, 32, 32, dtype=torch.bool))
        assert_sentence(caught)


def test_predictions_of_the_wrong_shape(annotations, model):
    outputs = model(batch())
    outputs["pred_boxes"] = outputs["pred_boxes"][:, :-1]
    with pytest.raises(ValueError, match=r"logits \[2, 5, 5\] and boxes \[2, 4, 4\]: they must be") as caught:
        build_criterion(K, 3)(outputs, targets())
    assert_sentence(caught)
