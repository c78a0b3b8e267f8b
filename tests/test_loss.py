"""The loss: equal to the reference and to PyTorch's own, indifferent to order, and to the big batch when it is cut (several processes: test_gradients.py)."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import box_convert, generalized_box_iou

from annotated_detr.loss import (
    SetCriterion,
    box_losses,
    build_criterion,
    class_error,
    flatten_matches,
    foreground_accuracy,
    match_layers,
    no_object_share,
    step_normalizer,
    weighted_sum,
)
from annotated_detr.matcher import HungarianMatcher

K, N = 4, 6


def random_targets(seed, counts):
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for n in counts:
        sizes = 0.05 + 0.4 * torch.rand(n, 2, generator=generator)
        centres = sizes / 2 + (1 - sizes) * torch.rand(n, 2, generator=generator)
        targets.append({"labels": torch.randint(K, (n,), generator=generator), "boxes": torch.cat([centres, sizes], -1)})
    return targets


class ToyHead(nn.Module):
    """The smallest model with DETR's output: two decoder layers, no interaction between pictures."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        self.class_embed, self.bbox_embed = nn.Linear(8, K + 1), nn.Linear(8, 4)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)

    def forward(self, features):
        layers = [
            {"pred_logits": self.class_embed(f), "pred_boxes": self.bbox_embed(f).sigmoid()} for f in (features, features.flip(-1))
        ]
        return layers[-1] | {"aux_outputs": layers[:-1]}


def random_features(seed, pictures):
    return torch.randn(pictures, N, 8, generator=torch.Generator().manual_seed(seed))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# --- against the reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, counts, num_classes", [("r18_small", [4, 3], 7), ("r50", [5, 0], 91), ("r50_dc5", [5, 0], 91)])
def test_every_loss_of_every_layer_equals_the_reference(golden, recipe, name, counts, num_classes):
    arrays = golden(name)
    layers = [
        {"pred_logits": torch.from_numpy(logits), "pred_boxes": torch.from_numpy(boxes)}
        for logits, boxes in zip(arrays["pred_logits"], arrays["pred_boxes"])
    ]
    criterion = build_criterion(num_classes, num_decoder_layers=len(layers))
    losses = criterion(layers[-1] | {"aux_outputs": layers[:-1]}, recipe.targets("target", counts, num_classes))
    expected = {key.removeprefix("loss/"): value for key, value in arrays.items() if key.startswith("loss/")}
    assert set(losses) | {"total"} == set(expected)
    for key, value in (losses | {"total": criterion.total(losses)}).items():
        assert value.dtype == torch.float32 and value.item() == pytest.approx(float(expected[key]), abs=1e-4), key


# --- against PyTorch, by hand ---------------------------------------------------------------------------------------


def test_losses_by_hand():
    """Two queries, one box: every number can be worked out on paper."""
    outputs = {
        "pred_logits": torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]),
        "pred_boxes": torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]]),
    }
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.2]])}]
    losses = SetCriterion(2, HungarianMatcher(1, 5, 2), {}, 0.1, ["labels", "boxes", "cardinality"])(outputs, targets)
    wrong, even = math.log(math.e**2 + 2), math.log(3)  # query 0 should say class 1, query 1 no-object
    assert float(losses["loss_ce"]) == pytest.approx((wrong + 0.1 * even) / 1.1, abs=1e-6)
    assert float(losses["loss_bbox"]) == pytest.approx(0.2, abs=1e-6)
    assert float(losses["loss_giou"]) == pytest.approx(1 - 0.5, abs=1e-6)  # half of the union, and the hull is the union
    assert float(losses["class_error"]) == 100  # query 0 prefers class 0
    assert float(losses["cardinality_error"]) == 1  # argmax of a tie is the first class, so both queries claim an object


def test_classification_is_pytorchs_weighted_mean():
    torch.manual_seed(0)
    logits, boxes = torch.randn(2, N, K + 1), torch.rand(2, N, 4)
    targets = random_targets(0, [2, 3])
    matches = [(torch.tensor([1, 4]), torch.tensor([1, 0])), (torch.tensor([0, 2, 5]), torch.tensor([2, 0, 1]))]
    criterion = SetCriterion(K, lambda outputs, targets: matches, {}, 0.1, ["labels"])
    losses = criterion({"pred_logits": logits, "pred_boxes": boxes}, targets)
    wanted = torch.full((2, N), K)
    wanted[0, 1], wanted[0, 4] = targets[0]["labels"][1], targets[0]["labels"][0]
    wanted[1, 0], wanted[1, 2], wanted[1, 5] = targets[1]["labels"][[2, 0, 1]]
    expected = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), torch.tensor([1.0] * K + [0.1]))
    torch.testing.assert_close(losses["loss_ce"], expected)
    assert set(losses) == {"loss_ce", "class_error"}


def test_box_losses_equal_the_pairwise_functions_even_for_tiny_boxes():
    boxes = torch.rand(7, 4) * torch.tensor([1, 1, 0.01, 0.01]) + 1e-3
    truth = boxes + torch.tensor([5e-4, 0, 0, 1e-3])
    distance, giou = box_losses(boxes, truth, torch.tensor(7.0))
    pairwise = generalized_box_iou(*(box_convert(b, "cxcywh", "xyxy") for b in (boxes, truth)))
    torch.testing.assert_close(distance, (boxes - truth).abs().sum(1).mean())
    torch.testing.assert_close(giou, (1 - pairwise.diag()).mean())


def test_giou_pulls_boxes_together_that_do_not_touch():
    boxes = torch.tensor([[0.2, 0.5, 0.1, 0.1]], requires_grad=True)
    box_losses(boxes, torch.tensor([[0.8, 0.5, 0.1, 0.1]]), torch.tensor(1.0))[1].backward()
    assert boxes.grad[0, 0] < 0  # descending moves the centre to the right, where the true box is


def test_flatten_matches():
    matches = [(torch.tensor([1, 4]), torch.tensor([1, 0])), (torch.tensor([], dtype=torch.int64),) * 2, (torch.tensor([3]), torch.tensor([0]))]
    picture, query, target = flatten_matches(matches)
    assert picture.tolist() == [0, 0, 2] and query.tolist() == [1, 4, 3] and target.tolist() == [1, 0, 2]


def test_what_is_logged_means_what_it_says():
    logits = torch.tensor([[1.0, 0.0, 5.0], [0.0, 1.0, 5.0], [9.0, 1.0, 5.0], [1.0, 9.0, 5.0]])
    labels = torch.tensor([0, 0, 0, 1])
    assert float(class_error(logits, labels)) == 50  # two say no-object
    assert float(foreground_accuracy(logits, labels)) == 75  # without no-object one of those would be right
    assert float(no_object_share(logits[None])) == 50
    assert float(class_error(logits[:0], labels[:0])) == 0 and float(foreground_accuracy(logits[:0], labels[:0])) == 100


# --- properties -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_the_order_of_targets_and_of_queries_does_not_matter(seed):
    model, criterion = ToyHead(), build_criterion(K, 2)
    features, targets = random_features(seed, 2), random_targets(seed, [4, 2])
    losses = criterion(model(features), targets)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(target["labels"]), generator=generator) for target in targets]
    shuffled = [{name: value[order] for name, value in target.items()} for target, order in zip(targets, orders)]
    again = criterion(model(features[:, torch.randperm(N, generator=generator)]), shuffled)
    for name, value in losses.items():
        torch.testing.assert_close(value, again[name], atol=1e-5, rtol=1e-5)


def test_every_layer_gets_its_own_matches_in_one_go_or_by_a_matcher_of_ones_own():
    calls, matcher = [], HungarianMatcher(1, 5, 2)

    def counting(outputs, targets):
        calls.append(len(targets))
        return matcher(outputs, targets)

    outputs, targets = ToyHead()(random_features(4, 3)), random_targets(4, [2, 0, 3])
    layers = [outputs, *outputs["aux_outputs"]]
    expected = [flatten_matches(matcher(layer, targets)) for layer in layers]
    for found in (match_layers(matcher, layers, targets), match_layers(counting, layers, targets)):
        for ours, theirs in zip(found, zip(*expected), strict=True):
            assert torch.equal(ours, torch.stack(theirs))
    assert calls == [3, 3]
    assert not torch.equal(found.query[0], found.query[1]), "these two layers agree, so nothing is tested"


def test_a_matcher_has_to_find_as_many_pairs_in_every_layer():
    nothing, one = [(torch.zeros(0).long(),) * 2], [(torch.zeros(1).long(),) * 2]
    answers = iter([nothing, one])
    outputs = ToyHead()(random_features(0, 1))
    with pytest.raises(ValueError, match=r"found \[0, 1\] pairs in the decoder layers"):
        match_layers(lambda *_: next(answers), [outputs, *outputs["aux_outputs"]], random_targets(0, [1]))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), counts=st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_all_layers_at_once_equal_each_layer_alone(seed, counts):
    outputs, targets = ToyHead()(random_features(seed, len(counts))), random_targets(seed, counts)
    criterion = build_criterion(K, 2)
    together = criterion(outputs, targets)
    for suffix, layer in zip(("", "_0"), (outputs, *outputs["aux_outputs"])):
        alone = criterion({name: layer[name] for name in ("pred_logits", "pred_boxes")}, targets)
        for name in ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error"):
            torch.testing.assert_close(together[name + suffix], alone[name])


def test_every_layer_is_matched_anew():
    targets = random_targets(1, [1])
    near, far = targets[0]["boxes"][0], torch.tensor([0.9, 0.9, 0.1, 0.1])
    logits = torch.zeros(1, 2, K + 1)
    last, first = torch.stack([near, far])[None], torch.stack([far, near])[None]
    outputs = {"pred_logits": logits, "pred_boxes": last, "aux_outputs": [{"pred_logits": logits, "pred_boxes": first}]}
    losses = build_criterion(K, 2)(outputs, targets)
    assert float(losses["loss_bbox"]) == float(losses["loss_bbox_0"]) == 0


def test_names_and_what_is_trained_on():
    criterion = build_criterion(K, 2)
    losses = criterion(ToyHead()(random_features(0, 2)), random_targets(0, [2, 0]))
    of_a_layer = {"loss_ce", "loss_bbox", "loss_giou", "cardinality_error"}
    assert set(losses) == of_a_layer | {f"{name}_0" for name in of_a_layer} | {"class_error"}
    trained = {name for name, value in losses.items() if value.requires_grad}
    assert trained == set(criterion.weight_dict) == {name for name in losses if name.startswith("loss_")}
    by_hand = sum({"ce": 1, "bbox": 5, "giou": 2}[name.split("_")[1]] * value for name, value in losses.items() if name in trained)
    torch.testing.assert_close(criterion.total(losses), by_hand)
    assert criterion.empty_weight.tolist() == pytest.approx([1] * K + [0.1]) and "empty_weight" in dict(criterion.named_buffers())


def test_without_any_box_gradients_of_the_box_head_are_zero_and_not_missing():
    model, criterion = ToyHead(), build_criterion(K, 2)
    losses = criterion(model(random_features(0, 2)), random_targets(0, [0, 0]))
    assert all(losses[name].item() == 0 for name in ("loss_bbox", "loss_giou", "class_error"))
    grads = gradients(model, criterion.total(losses))
    assert all(grad.isfinite().all() for grad in grads.values())
    assert not grads["bbox_embed.weight"].any() and not grads["bbox_embed.bias"].any()
    assert grads["class_embed.bias"][-1] < 0 < grads["class_embed.bias"][:-1].min()  # descent raises no-object, lowers the rest


def test_half_precision_outputs_give_float32_losses():
    outputs, targets = ToyHead()(random_features(0, 2)), random_targets(0, [2, 1])
    outputs.pop("aux_outputs")
    half = {name: value.bfloat16() for name, value in outputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = build_criterion(K)(half, targets)
    expected = build_criterion(K)({name: value.float() for name, value in half.items()}, targets)
    for name, value in losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name])


def test_no_weight_at_all_is_zero_and_not_nan():
    losses = build_criterion(K, 2, eos_coef=0)(ToyHead()(random_features(0, 1)), random_targets(0, [0]))
    assert losses["loss_ce"].item() == 0


# --- steps that are cut into pieces ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[1, 1, 1, 1], [2, 2], [3, 1]])
def test_micro_batches_equal_the_big_batch(cuts):
    model, criterion = ToyHead(), build_criterion(K, 2)
    features, targets = random_features(3, 4), random_targets(3, [4, 0, 1, 2])
    expected = gradients(model, criterion.total(criterion(model(features), targets)))
    normalizer = step_normalizer(targets, N, criterion.empty_weight)
    model.zero_grad()
    start, total = 0, 0.0
    for size in cuts:
        piece = slice(start, start + size)
        loss = criterion.total(criterion(model(features[piece]), targets[piece], normalizer=normalizer))
        loss.backward()
        start, total = start + size, total + loss.item()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-5)
    assert total == pytest.approx(criterion.total(criterion(model(features), targets)).item(), abs=1e-4)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["masks", "lables"])
def test_an_unknown_loss_is_named(name):
    with pytest.raises(ValueError, match=f"no loss called '{name}'.*labels.*boxes.*cardinality"):
        SetCriterion(K, HungarianMatcher(), {}, 0.1, ["labels", name])


def test_a_model_with_another_number_of_classes_is_refused():
    with pytest.raises(ValueError, match=f"scores {K} classes and the loss expects {K + 1}"):
        build_criterion(K + 1, 2)(ToyHead()(random_features(0, 1)), random_targets(0, [1]))


def test_bad_targets_are_refused_whatever_the_matcher():
    targets = random_targets(0, [1])
    targets[0]["labels"][0] = K
    criterion = SetCriterion(K, lambda outputs, targets: pytest.fail("matched bad targets"), {}, 0.1, ["labels"])
    with pytest.raises(ValueError, match=f"Box 0 of picture 0 of the batch has label {K}"):
        criterion(ToyHead()(random_features(0, 1)), targets)


def test_a_total_of_nothing_is_refused():
    with pytest.raises(ValueError, match="None of the losses .* has a weight"):
        weighted_sum({"loss_ce": torch.tensor(1.0)}, {"loss_CE": 1})
