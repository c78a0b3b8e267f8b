"""Chapter 04: positions equal the reference and a plain loop, and Joiner hands features and positions over together."""

import math

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from annotated_detr.backbone import Backbone, TinyBackbone
from annotated_detr.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from annotated_detr.positional_encoding import Joiner, PositionEmbeddingLearned, PositionEmbeddingSine


def masked(mask: torch.Tensor, dtype: torch.dtype = torch.float32) -> NestedTensor:
    """A batch with this mask; positions do not look at the features."""
    return NestedTensor(torch.zeros(mask.shape[0], 1, *mask.shape[1:], dtype=dtype), mask)


def padded(sizes: list[tuple[int, int]]) -> NestedTensor:
    return nested_tensor_from_tensor_list([torch.zeros(3, h, w) for h, w in sizes])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sine", {}),
        ("sine_normalized", {"normalize": True}),
        ("sine_scaled", {"normalize": True, "scale": 1.0, "temperature": 20}),
    ],
)
def test_sine_positions_equal_the_reference(golden, name, arguments):
    arrays = golden("positional")
    positions = PositionEmbeddingSine(16, **arguments)(masked(torch.from_numpy(arrays["mask"])))
    assert positions.dtype == torch.float32
    np.testing.assert_allclose(positions.numpy(), arrays[name], atol=1e-5, rtol=0)


def test_learned_positions_equal_the_reference(golden, recipe):
    arrays = golden("positional")
    embedding = recipe.fill(PositionEmbeddingLearned(16))
    positions = embedding(masked(torch.from_numpy(arrays["mask"])))
    np.testing.assert_allclose(positions.detach().numpy(), arrays["learned"], atol=1e-6, rtol=0)
    assert {key: tuple(value.shape) for key, value in embedding.state_dict().items()} == {
        "row_embed.weight": (50, 16),
        "col_embed.weight": (50, 16),
    }


@pytest.mark.parametrize(("name", "d", "cell"), [("r18_small", 64, 32), ("r50", 256, 32), ("r50_dc5", 256, 16)])
def test_positions_of_a_padded_batch_equal_the_reference(golden, name, d, cell):
    arrays = golden(name)
    features = NestedTensor(torch.zeros(2, 1, *arrays["mid/feature_mask"].shape[1:]), torch.from_numpy(arrays["mid/feature_mask"]))
    positions = PositionEmbeddingSine(d // 2, normalize=True)(features)
    np.testing.assert_allclose(positions.numpy(), arrays["mid/pos"], atol=1e-5, rtol=0)
    assert arrays["mid/pos"].shape[-2:] == (160 // cell, 256 // cell)


def test_joiner_on_the_reference_batch(golden, recipe):
    model = nn.ModuleDict({"backbone": Joiner(Backbone("resnet18", True, False, False), PositionEmbeddingSine(32, normalize=True))})
    recipe.fill(model).eval()
    batch = nested_tensor_from_tensor_list(recipe.images("image", [(160, 224), (128, 256)]))
    with torch.no_grad():
        features, positions = model["backbone"](batch)
    assert len(features) == len(positions) == 1
    np.testing.assert_allclose(features[0].tensors.numpy(), golden("r18_small")["mid/feature"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(positions[0].numpy(), golden("r18_small")["mid/pos"], atol=1e-5, rtol=0)


def sine_by_loop(h: int, w: int, f: int, temperature: float, normalize: bool) -> np.ndarray:
    """Positions of one picture of h × w cells without padding, one number at a time, in float64."""
    out = np.zeros((2 * f, h, w))
    for row in range(h):
        for column in range(w):
            y, x = row + 1.0, column + 1.0
            if normalize:
                y, x = 2 * math.pi * y / h, 2 * math.pi * x / w
            for i in range(f // 2):
                wavelength = temperature ** (2 * i / f)
                out[2 * i, row, column] = math.sin(y / wavelength)
                out[2 * i + 1, row, column] = math.cos(y / wavelength)
                out[f + 2 * i, row, column] = math.sin(x / wavelength)
                out[f + 2 * i + 1, row, column] = math.cos(x / wavelength)
    return out


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    half=st.sampled_from([2, 4, 10]),
    temperature=st.sampled_from([20.0, 10000.0]),
    normalize=st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_a_pictures_positions_are_a_loops_and_do_not_depend_on_its_padding(sizes, half, temperature, normalize):
    positions = PositionEmbeddingSine(half, temperature, normalize)(padded(sizes))
    for position, (h, w) in zip(positions, sizes):
        expected = sine_by_loop(h, w, half, temperature, normalize)
        np.testing.assert_allclose(position[:, :h, :w].numpy(), expected, atol=1e-5, rtol=0)


def test_normalised_positions_end_at_the_scale_whatever_the_size():
    for h, w in [(3, 7), (20, 4)]:
        positions = PositionEmbeddingSine(2, normalize=True, scale=1.5)(padded([(h, w), (25, 25)]))
        torch.testing.assert_close(positions[0, 0, h - 1, 0], torch.tensor(1.5).sin(), atol=1e-6, rtol=0)
        torch.testing.assert_close(positions[0, 2, 0, w - 1], torch.tensor(1.5).sin(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_picture_that_is_all_padding_has_finite_positions(normalize):
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    mask[1] = True
    positions = PositionEmbeddingSine(8, normalize=normalize)(masked(mask))
    assert positions.isfinite().all()
    assert torch.equal(positions[1, ::2], torch.zeros(8, 4, 5)) and torch.equal(positions[1, 1::2], torch.ones(8, 4, 5))


def test_every_cell_has_a_different_position():
    for embedding in (PositionEmbeddingSine(16, 20, normalize=True), PositionEmbeddingSine(16), PositionEmbeddingLearned(16)):
        cells = embedding(padded([(12, 17)]))[0].flatten(1).T
        distances = torch.cdist(cells, cells, compute_mode="donot_use_mm_for_euclid_dist") + 10 * torch.eye(len(cells))
        assert distances.min() > 1e-3


def test_learned_positions_put_x_first_and_learn():
    embedding = PositionEmbeddingLearned(4)
    positions = embedding(padded([(5, 6), (3, 2)]))
    assert torch.equal(positions[1, :4, 3, 5], embedding.col_embed.weight[5])
    assert torch.equal(positions[1, 4:, 3, 5], embedding.row_embed.weight[3])
    positions[:, :, 2].sum().backward()
    assert embedding.row_embed.weight.grad.any(dim=1).nonzero().flatten().tolist() == [2]
    assert 0 <= embedding.row_embed.weight.min() and embedding.row_embed.weight.max() <= 1


def test_positions_are_float32_under_autocast_and_bfloat16_in_a_bfloat16_model():
    joiner = Joiner(TinyBackbone((8, 16)), PositionEmbeddingSine(8, normalize=True)).eval()
    batch = nested_tensor_from_tensor_list([torch.randn(3, 40, 64), torch.randn(3, 64, 24)])
    _, (expected,) = joiner(batch)
    with torch.autocast("cpu", torch.bfloat16):
        (feature,), (positions,) = joiner(batch)
    assert feature.tensors.dtype == torch.bfloat16
    assert positions.dtype == torch.float32 and torch.equal(positions, expected)
    (feature,), (positions,) = joiner.bfloat16()(NestedTensor(batch.tensors.bfloat16(), batch.mask))
    assert feature.tensors.dtype == positions.dtype == torch.bfloat16
    assert torch.equal(positions, expected.bfloat16()), "counted in float32, and rounded once"


def test_joiner_keeps_the_checkpoints_names_and_the_order_of_layers():
    joiner = Joiner(Backbone("resnet18", True, True, False), PositionEmbeddingLearned(8))
    assert {key.split(".")[0] for key in joiner.state_dict()} == {"0", "1"}
    assert joiner.num_channels == 512
    features, positions = joiner(nested_tensor_from_tensor_list([torch.randn(3, 64, 96)]))
    assert [tuple(feature.tensors.shape[1:]) for feature in features] == [(64, 16, 24), (128, 8, 12), (256, 4, 6), (512, 2, 3)]
    assert [tuple(position.shape[1:]) for position in positions] == [(16, 16, 24), (16, 8, 12), (16, 4, 6), (16, 2, 3)]


def test_bad_requests_are_refused_with_a_sentence():
    with pytest.raises(ValueError, match="num_pos_feats is 7: it has to be even"):
        PositionEmbeddingSine(7)
    with pytest.raises(ValueError, match="pass normalize=True"):
        PositionEmbeddingSine(8, scale=1.0)
    with pytest.raises(ValueError, match="51×8 cells and the learned positions end at 50: make picture 1 of the batch smaller"):
        PositionEmbeddingLearned(8)(padded([(5, 8), (51, 3)]))
    with pytest.raises(ValueError, match="50×60 cells .* picture 0 of the batch"):
        PositionEmbeddingLearned(8)(padded([(5, 60), (50, 50)]))
    PositionEmbeddingLearned(8)(padded([(50, 3), (3, 50)]))


def test_enforced_annotations_catch_swapped_height_and_width():
    """What keeps this book's shapes honest: a mask with H and W exchanged does not get through."""
    with pytest.raises(jaxtyping.TypeCheckError):
        NestedTensor(torch.zeros(1, 3, 4, 5), torch.zeros(1, 5, 4, dtype=torch.bool))
