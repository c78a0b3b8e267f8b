"""The matcher: optimal, equal to the reference, indifferent to order, and plain-spoken about bad input."""

from itertools import permutations

import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou
from hypothesis import given, settings
from hypothesis import strategies as st

from annotated_detr.matcher import HungarianMatcher, batch_costs, check_batch, matching_cost, paired_giou


def random_batch(seed, counts=(3, 2), num_queries=5, num_classes=4):
    """Random predictions and targets; boxes lie inside their picture."""
    generator = torch.Generator().manual_seed(seed)

    def boxes(*shape):
        sizes = 0.05 + 0.4 * torch.rand(*shape, 2, generator=generator)
        centres = sizes / 2 + (1 - sizes) * torch.rand(*shape, 2, generator=generator)
        return torch.cat([centres, sizes], -1)

    outputs = {
        "pred_logits": torch.randn(len(counts), num_queries, num_classes + 1, generator=generator),
        "pred_boxes": boxes(len(counts), num_queries),
    }
    targets = [
        {"labels": torch.randint(num_classes, (n,), generator=generator), "boxes": boxes(n)} for n in counts
    ]
    return outputs, targets


def iou_and_hull(first, second):
    """Intersection over union and the area of the smallest box around both, in plain Python, for (cx, cy, w, h)."""
    a, b = [(cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2) for cx, cy, w, h in (first, second)]
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = first[2] * first[3] + second[2] * second[3] - shared
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return shared / union, union, hull


def cost_by_hand(logits, box, label, true_box, weights):
    """One entry of the cost matrix from its definition, one number at a time."""
    exponentials = [torch.e ** float(value) for value in logits]
    probability = exponentials[label] / sum(exponentials)
    distance = sum(abs(float(p) - float(t)) for p, t in zip(box, true_box))
    iou, union, hull = iou_and_hull(box.tolist(), true_box.tolist())
    giou = iou - (hull - union) / hull
    return -weights[0] * probability + weights[1] * distance - weights[2] * giou


@pytest.mark.parametrize("name, counts, num_classes", [("r18_small", [4, 3], 7), ("r50", [5, 0], 91), ("r50_dc5", [5, 0], 91)])
def test_every_layer_is_matched_as_the_reference_matches(golden, recipe, name, counts, num_classes):
    arrays, targets = golden(name), recipe.targets("target", counts, num_classes)
    matcher = HungarianMatcher(cost_class=1, cost_bbox=5, cost_giou=2)
    for layer, (logits, boxes) in enumerate(zip(arrays["pred_logits"], arrays["pred_boxes"])):
        outputs = {"pred_logits": torch.from_numpy(logits), "pred_boxes": torch.from_numpy(boxes)}
        for image, (query, target) in enumerate(matcher(outputs, targets)):
            assert query.tolist() == arrays[f"match/layer{layer}/image{image}/query"].tolist()
            assert target.tolist() == arrays[f"match/layer{layer}/image{image}/target"].tolist()


def test_cost_equals_its_definition_one_number_at_a_time():
    outputs, targets = random_batch(0, counts=(3,))
    logits, boxes, target = outputs["pred_logits"][0], outputs["pred_boxes"][0], targets[0]
    cost = matching_cost(logits, boxes, target["labels"], target["boxes"], 1, 5, 2)
    for q in range(5):
        for t in range(3):
            by_hand = cost_by_hand(logits[q], boxes[q], int(target["labels"][t]), target["boxes"][t], (1, 5, 2))
            assert float(cost[q, t]) == pytest.approx(by_hand, abs=1e-5)


def test_positional_order_of_the_weights_is_class_bbox_giou():
    outputs, targets = random_batch(1, counts=(2,))
    arguments = outputs["pred_logits"][0], outputs["pred_boxes"][0], targets[0]["labels"], targets[0]["boxes"]
    probability = outputs["pred_logits"][0].softmax(-1)[:, targets[0]["labels"]]
    torch.testing.assert_close(matching_cost(*arguments, 3, 0, 0), -3 * probability)
    distance = (outputs["pred_boxes"][0][:, None] - targets[0]["boxes"][None]).abs().sum(-1)
    torch.testing.assert_close(matching_cost(*arguments, 0, 2, 0), 2 * distance)
    assert (HungarianMatcher(1, 5, 2).cost_bbox, HungarianMatcher(1, 5, 2).cost_giou) == (5, 2)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), num_queries=st.integers(1, 6), data=st.data())
def test_no_permutation_is_cheaper(seed, num_queries, data):
    n = data.draw(st.integers(0, min(num_queries, 4)))
    outputs, targets = random_batch(seed, counts=(n,), num_queries=num_queries)
    (query, target), = HungarianMatcher(1, 5, 2)(outputs, targets)
    assert query.tolist() == sorted(set(query.tolist())) and sorted(target.tolist()) == list(range(n))
    cost = matching_cost(outputs["pred_logits"][0], outputs["pred_boxes"][0], targets[0]["labels"], targets[0]["boxes"], 1, 5, 2)
    cheapest = min(sum(float(cost[q, t]) for t, q in enumerate(queries)) for queries in permutations(range(num_queries), n))
    assert float(cost[query, target].sum()) == pytest.approx(cheapest, abs=1e-5)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_permuting_queries_or_targets_permutes_the_matches(seed):
    outputs, targets = random_batch(seed, counts=(4, 3), num_queries=7)
    matcher = HungarianMatcher(1, 5, 2)
    expected = [set(zip(query.tolist(), target.tolist())) for query, target in matcher(outputs, targets)]
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randperm(7, generator=generator)  # new query i is old query queries[i]
    orders = [torch.randperm(len(target["labels"]), generator=generator) for target in targets]
    shuffled = matcher(
        {name: value[:, queries] for name, value in outputs.items()},
        [{name: value[order] for name, value in target.items()} for target, order in zip(targets, orders)],
    )
    for pairs, (query, target), order in zip(expected, shuffled, orders):
        assert set(zip(queries[query].tolist(), order[target].tolist())) == pairs


def test_form_of_the_answer():
    outputs, targets = random_batch(2, counts=(5, 0, 2))
    for name in outputs:
        outputs[name].requires_grad_()
    matches = HungarianMatcher()(outputs, targets)
    assert [len(query) for query, _ in matches] == [5, 0, 2]
    for query, target in matches:
        assert query.dtype == target.dtype == torch.int64
        assert query.device.type == target.device.type == "cpu"
        assert query.tolist() == sorted(query.tolist())


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_predictions_are_matched_in_float32(autocast):
    outputs, targets = random_batch(3)
    half = {name: value.bfloat16() for name, value in outputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        cost = matching_cost(half["pred_logits"][0], half["pred_boxes"][0], targets[0]["labels"], targets[0]["boxes"], 1, 5, 2)
        matches = HungarianMatcher(1, 5, 2)(half, targets)
    assert cost.dtype == torch.float32
    rounded = {name: value.float() for name, value in half.items()}
    for (query, target), (expected_query, expected_target) in zip(matches, HungarianMatcher(1, 5, 2)(rounded, targets)):
        assert query.equal(expected_query) and target.equal(expected_target)


def test_all_weights_zero_is_refused():
    with pytest.raises(ValueError, match="All weights of the matching cost are zero"):
        HungarianMatcher(0, 0, 0)


def damaged(change):
    """A good batch of two pictures, ids 70 and 71, to which `change` does something bad."""
    outputs, targets = random_batch(4)
    for position, target in enumerate(targets):
        target["image_id"] = torch.tensor([70 + position])
    change(outputs, targets)
    return outputs, targets


def put(targets, name, index, value):
    targets[1][name][index] = torch.as_tensor(value, dtype=targets[1][name].dtype)


HOSTILE = {
    "nan logits": (lambda o, t: o["pred_logits"][1, 2].fill_(float("nan")), r"predictions for picture 1 .*image_id 71.*not finite"),
    "infinite box": (lambda o, t: o["pred_boxes"][1, 0].fill_(float("inf")), r"predictions for picture 1 .*not finite"),
    "label too large": (lambda o, t: put(t, "labels", 1, 4), r"Box 1 of picture 1 .*image_id 71.* label 4, .*num_classes"),
    "negative label": (lambda o, t: put(t, "labels", 0, -1), r"Box 0 of picture 1 .* label -1, "),
    "pixels": (lambda o, t: put(t, "boxes", 1, [120, 80, 60, 40]), r"Box 1 of picture 1 .*\[120, 80, 60, 40\].*pixels: divide"),
    "no area": (lambda o, t: put(t, "boxes", 0, [0.5, 0.5, 0.0, 0.2]), r"Box 0 of picture 1 .*without area: drop"),
    "negative size": (lambda o, t: put(t, "boxes", 0, [0.5, 0.5, 0.1, -0.2]), r"Box 0 of picture 1 .*without area"),
    "centre outside": (lambda o, t: put(t, "boxes", 0, [-0.2, 0.5, 0.1, 0.2]), r"Box 0 of picture 1 .*centre outside"),
    "nan box": (lambda o, t: put(t, "boxes", 0, [float("nan"), 0.5, 0.1, 0.2]), r"Box 0 of picture 1 .*not finite: repair"),
    "too few targets": (lambda o, t: t.pop(), r"answered for 2 pictures and there are 1 targets"),
    "too many labels": (lambda o, t: t[1].update(labels=torch.tensor([0, 1, 2])), r"picture 1 .*labels of shape \[3\] and boxes of shape \[2, 4\]"),
    "flat empty boxes": (lambda o, t: t[1].update(labels=torch.zeros(0, dtype=torch.int64), boxes=torch.zeros(0)), r"picture 1 .*\[0, 4\]"),
    "no labels": (lambda o, t: t[1].pop("labels"), r"picture 1 .* has no labels"),
}


@pytest.mark.parametrize("change, sentence", HOSTILE.values(), ids=HOSTILE)
def test_bad_input_is_named_in_one_sentence(change, sentence):
    outputs, targets = damaged(change)
    with pytest.raises(ValueError, match=sentence) as caught:
        HungarianMatcher(1, 5, 2)(outputs, targets)
    assert "\n" not in str(caught.value)


def test_a_bad_picture_is_named_even_if_it_has_no_box():
    outputs, targets = random_batch(5, counts=(2, 0))
    outputs["pred_logits"][1, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="picture 1 of the batch are not finite"):
        check_batch(outputs, targets)


def test_an_empty_batch_is_refused():
    outputs = {"pred_logits": torch.zeros(0, 5, 4), "pred_boxes": torch.zeros(0, 5, 4)}
    with pytest.raises(ValueError, match="answered for 0 pictures"):
        check_batch(outputs, [])


@pytest.mark.parametrize("name, dtype", [("labels", torch.int32), ("labels", torch.float32), ("boxes", torch.int64)])
def test_wrong_types_are_refused(name, dtype):
    outputs, targets = damaged(lambda o, t: t[0].update({name: t[0][name].to(dtype)}))
    with pytest.raises(TypeError, match=r"picture 0 of the batch \(image_id 70\) .*labels.long\(\)"):
        check_batch(outputs, targets)


def test_101_boxes_for_100_queries_are_refused_and_100_are_not():
    outputs, targets = random_batch(6, counts=(101,), num_queries=100)
    with pytest.raises(ValueError, match="101 boxes and the model has 100 queries.*num_queries=101"):
        HungarianMatcher()(outputs, targets)
    outputs, targets = random_batch(6, counts=(100,), num_queries=100)
    (query, target), = HungarianMatcher()(outputs, targets)
    assert query.tolist() == list(range(100)) == sorted(target.tolist())


def test_a_box_that_rounding_carried_over_the_edge_is_accepted():
    outputs, targets = random_batch(7)
    targets[0]["boxes"][0] = torch.tensor([0.5, 0.5, 1.00001, 1.0])
    check_batch(outputs, targets)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), counts=st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_costs_of_the_batch_are_those_of_its_pictures(seed, counts):
    first, targets = random_batch(seed, counts=tuple(counts))
    second, _ = random_batch(seed + 1, counts=tuple(counts))
    layers = [torch.stack([first[name], second[name]]) for name in ("pred_logits", "pred_boxes")]
    costs = batch_costs(*layers, targets, 1, 5, 2).split(counts)
    for at, target in enumerate(targets):
        for layer in range(2):
            answer = (values[layer, at] for values in layers)
            expected = matching_cost(*answer, target["labels"], target["boxes"], 1, 5, 2)
            torch.testing.assert_close(costs[at][:, layer].T, expected, atol=1e-5, rtol=1e-5)


def test_paired_giou_is_the_diagonal_of_torchvisions_and_its_gradient_too():
    torch.manual_seed(0)
    boxes, others = (box_convert(torch.rand(50, 4) * 0.5 + 0.1, "cxcywh", "xyxy") for _ in range(2))
    gradients = []
    for giou in (paired_giou, lambda a, b: generalized_box_iou(a, b).diagonal()):
        leaf = boxes.clone().requires_grad_()
        values = giou(leaf, others)
        values.sum().backward()
        gradients.append((values.detach(), leaf.grad))
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
