"""Chapter 02: pictures of different sizes become one batch and a mask, and come back out unchanged."""

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from annotated_detr.nested_tensor import NestedTensor, collate_fn, nested_tensor_from_tensor_list

sizes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5)


@pytest.fixture
def unchecked():
    """Annotations switched off, as in a user's process, so that our own sentences are what stops bad input."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@given(sizes)
@settings(deadline=None, max_examples=60)
def test_every_picture_comes_back_out_of_its_batch(sizes):
    pictures = [torch.randn(3, h, w) for h, w in sizes]
    batch = nested_tensor_from_tensor_list(pictures)
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    assert batch.tensors.shape == (len(sizes), 3, height, width) and batch.mask.shape == (len(sizes), height, width)
    for picture, (h, w), tensor, mask in zip(pictures, sizes, batch.tensors, batch.mask):
        assert torch.equal(tensor[:, :h, :w], picture)
        assert torch.equal(tensor[:, ~mask], picture.flatten(1)), "the mask must keep the picture's pixels, in order"
        assert (~mask).sum() == h * w
        assert not tensor[:, mask].any(), "padding is zero"


@given(sizes)
@settings(deadline=None, max_examples=30)
def test_padding_is_what_pytorchs_own_padding_makes(sizes):
    pictures = [torch.randn(3, h, w) for h, w in sizes]
    batch = nested_tensor_from_tensor_list(pictures)
    height, width = batch.mask.shape[1:]
    for i, picture in enumerate(pictures):
        right, bottom = width - picture.shape[2], height - picture.shape[1]
        assert torch.equal(batch.tensors[i], nn.functional.pad(picture, (0, right, 0, bottom)))
        ones = nn.functional.pad(torch.ones(picture.shape[1:]), (0, right, 0, bottom))
        assert torch.equal(batch.mask[i], ones == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_batch_keeps_the_pictures_dtype(dtype):
    batch = nested_tensor_from_tensor_list([torch.randn(3, 4, 5, dtype=dtype), torch.randn(3, 5, 4, dtype=dtype)])
    assert batch.tensors.dtype == dtype and batch.mask.dtype == torch.bool


def test_gradients_reach_every_picture():
    pictures = [torch.randn(3, 4, 6, requires_grad=True), torch.randn(3, 5, 2, requires_grad=True)]
    nested_tensor_from_tensor_list(pictures).tensors.sum().backward()
    assert all(torch.equal(picture.grad, torch.ones_like(picture)) for picture in pictures)


def test_moving_a_batch_moves_tensors_and_mask():
    batch = nested_tensor_from_tensor_list([torch.randn(3, 4, 5), torch.randn(3, 5, 4)])
    moved = batch.to("meta", non_blocking=True)
    assert moved.tensors.device.type == moved.mask.device.type == "meta"
    tensors, mask = batch.to(torch.device("cpu")).decompose()
    assert torch.equal(tensors, batch.tensors) and torch.equal(mask, batch.mask)


def test_repr_says_shape_dtype_device_and_padding():
    batch = nested_tensor_from_tensor_list([torch.randn(3, 4, 6), torch.randn(3, 2, 6)])
    assert repr(batch) == "NestedTensor([2, 3, 4, 6], float32, cpu, 25% padding)"
    assert "meta" in repr(batch.to("meta")), "a batch without data can be printed too"


def test_collate_fn_serves_a_dataloader_with_workers():
    pictures = [torch.full((3, 4 + i, 8 - i), float(i)) for i in range(4)]
    dataset = [(picture, {"labels": torch.arange(i)}) for i, picture in enumerate(pictures)]
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=collate_fn, num_workers=1)
    batches = list(loader)
    assert [batch.tensors.shape for batch, _ in batches] == [(2, 3, 5, 8), (2, 3, 7, 6)]
    assert [len(target["labels"]) for _, targets in batches for target in targets] == [0, 1, 2, 3]
    assert isinstance(batches[0][1], tuple)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_pinning_dataloader_pins_both_parts():
    dataset = [(torch.randn(3, 4, 5), {}), (torch.randn(3, 5, 4), {})]
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=collate_fn, pin_memory=True)
    batch, _ = next(iter(loader))
    assert batch.tensors.is_pinned() and batch.mask.is_pinned()
    moved = batch.to("cuda", non_blocking=True)
    assert moved.tensors.is_cuda and moved.mask.is_cuda


class Batcher(nn.Module):
    """The smallest model that batches a list of pictures itself and uses both halves of the pair."""

    def forward(self, pictures):
        tensors, mask = nested_tensor_from_tensor_list(pictures).decompose()
        return tensors.mean(1).masked_fill(mask, -1.0)


@pytest.mark.parametrize("other", [(3, 12, 16), (3, 9, 20)], ids=["same size", "other size"])
def test_a_model_that_batches_pictures_can_be_exported(other):
    pictures = [torch.randn(3, 12, 16), torch.randn(other)]
    exported = torch.export.export(Batcher(), (pictures,))
    fresh = [torch.randn_like(picture) for picture in pictures]
    assert torch.equal(exported.module()(fresh), Batcher()(fresh))


def test_an_exported_model_takes_other_sizes_when_they_are_declared_dynamic():
    height, width = torch.export.Dim("height", min=2, max=512), torch.export.Dim("width", min=2, max=512)
    example = [torch.randn(3, 12, 16), torch.randn(3, 12, 16)]
    exported = torch.export.export(Batcher(), (example,), dynamic_shapes=([{1: height, 2: width}] * 2,))
    fresh = [torch.randn(3, 30, 21), torch.randn(3, 30, 21)]
    assert torch.equal(exported.module()(fresh), Batcher()(fresh))


picture = torch.zeros(3, 4, 5)


@pytest.mark.parametrize(
    ("bad", "error", "sentence"),
    [
        ([], ValueError, "the list of pictures is empty"),
        (torch.zeros(2, 3, 4, 5), TypeError, "made from a list of tensors"),
        ([picture, "picture.jpg"], TypeError, "made from a list of tensors"),
        ([picture, torch.zeros(1, 3, 4, 5)], ValueError, r"picture 1 has shape \[1, 3, 4, 5\].*without a batch axis"),
        ([picture, torch.zeros(1, 4, 5)], ValueError, r"picture 1 .* 1 channels instead of 3: convert it to RGB"),
        ([picture, torch.zeros(3, 0, 5)], ValueError, "picture 1 has shape .* no pixels"),
        ([picture, torch.zeros(3, 4, 5, dtype=torch.uint8)], TypeError, "picture 1 is torch.uint8: scale and normalise"),
        ([picture, picture.double()], ValueError, "picture 1 is torch.float64 on cpu and picture 0 is torch.float32"),
        ([picture, picture.to("meta")], ValueError, "picture 1 is torch.float32 on meta"),
    ],
)
def test_bad_pictures_are_refused_with_a_sentence(unchecked, bad, error, sentence):
    with pytest.raises(error, match=sentence):
        nested_tensor_from_tensor_list(bad)


@pytest.mark.parametrize(
    ("mask", "error", "sentence"),
    [
        (torch.zeros(2, 4, 5), TypeError, r"the mask is torch.float32, but it has to be bool"),
        (torch.zeros(2, 5, 4, dtype=torch.bool), ValueError, r"\[2, 3, 4, 5\] and mask \[2, 5, 4\] do not describe the same cells"),
        (torch.zeros(2, 3, 4, 5, dtype=torch.bool), ValueError, "do not describe the same cells"),
    ],
)
def test_bad_masks_are_refused_with_a_sentence(unchecked, mask, error, sentence):
    with pytest.raises(error, match=sentence):
        NestedTensor(torch.zeros(2, 3, 4, 5), mask)
