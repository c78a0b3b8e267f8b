"""One training step of a detector on every rank of `torchrun`, each with its share of one padded batch.

torchrun --standalone --nproc-per-node 2 two_ranks.py OUT writes the averaged gradients and the losses of rank 0 to OUT.
tests/test_gradients.py runs it, and runs the same step in one process by importing this file.
"""

import os
import sys

import torch
from torch.nn.parallel import DistributedDataParallel

from annotated_detr.backbone import Backbone
from annotated_detr.detr import DETR
from annotated_detr.loss import build_criterion
from annotated_detr.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from annotated_detr.positional_encoding import Joiner, PositionEmbeddingSine
from annotated_detr.transformer import Transformer

K, N, L = 5, 7, 2
#: How many boxes each of four pictures has; with two ranks, the first two pictures are those of rank 0.
COUNTS = {"all have boxes": [3, 1, 2, 1], "rank 1 has none": [2, 1, 0, 0], "one in all": [0, 1, 0, 0], "none": [0, 0, 0, 0]}


def model():
    """A whole detector, without dropout and with frozen norms: no part of it looks at more than one picture."""
    torch.manual_seed(0)
    backbone = Joiner(Backbone("resnet18", True, False, False), PositionEmbeddingSine(16, normalize=True))
    transformer = Transformer(32, 4, 1, L, 64, dropout=0.0, return_intermediate_dec=True)
    return DETR(backbone, transformer, K, N, aux_loss=True).train()


def pictures():
    """Four pictures of different sizes in one padded batch, so that every part of it has the same padding."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(64, 96), (96, 64), (80, 80), (64, 64)]
    return nested_tensor_from_tensor_list([torch.randn(3, h, w, generator=generator) for h, w in sizes])


def targets(counts):
    """Made-up boxes and labels, as many as `counts` says for each picture."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for n in counts:
        sizes = 0.1 + 0.3 * torch.rand(n, 2, generator=generator)
        centres = sizes / 2 + (1 - sizes) * torch.rand(n, 2, generator=generator)
        made.append({"labels": torch.randint(K, (n,), generator=generator), "boxes": torch.cat([centres, sizes], 1)})
    return made


def part(batch, which):
    """Some of a batch's pictures, with the padding that they have in the batch."""
    return NestedTensor(batch.tensors[which], batch.mask[which])


def gradients(detector):
    """Every trainable parameter's gradient; a missing one is an error, since other ranks would wait for it."""
    return {name: parameter.grad.clone() for name, parameter in detector.named_parameters() if parameter.requires_grad}


def step(detector, batch, made, normalizer=None):
    """Forward, loss and backward; the losses."""
    criterion = build_criterion(K, L)
    losses = criterion(detector(batch), made, normalizer)
    criterion.total(losses).backward()
    return {name: value.detach() for name, value in losses.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    share = slice(4 * rank // ranks, 4 * (rank + 1) // ranks)
    detector = DistributedDataParallel(model())
    results = {}
    for case, counts in COUNTS.items():
        detector.zero_grad()
        losses = step(detector, part(pictures(), share), targets(counts)[share])
        results[case] = {"gradients": gradients(detector.module), "losses": losses}
    if rank == 0:
        torch.save(results, sys.argv[1])
    torch.distributed.destroy_process_group()
