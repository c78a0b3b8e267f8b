"""Gradients that scale: a step cut into micro-batches, or spread over processes, is the step of the big batch.

All at equal padding and without dropout: padding changes features, and dropout draws other numbers.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from annotated_detr.loss import build_criterion, step_normalizer

SCRIPT = Path(__file__).parent / "scripts" / "two_ranks.py"


@pytest.fixture(scope="module")
def two_ranks():
    """The script that `torchrun` runs, as a module: the same model, pictures and targets."""
    spec = importlib.util.spec_from_file_location("two_ranks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_equal_gradients(found, expected, message):
    """Each gradient within a ten-thousandth of its own size."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = (found[name] - gradient).norm().item()
        assert difference <= 1e-4 * max(gradient.norm().item(), 1e-3), f"{message}: {name} is off by {difference}"
    assert all(gradient.isfinite().all() for gradient in found.values())


def one_process(two_ranks, counts):
    detector = two_ranks.model()
    losses = two_ranks.step(detector, two_ranks.pictures(), two_ranks.targets(counts))
    return two_ranks.gradients(detector), losses


@pytest.mark.parametrize("cuts", [[1, 1, 1, 1], [3, 1], [2, 2]], ids=str)
@pytest.mark.parametrize("case", ["all have boxes", "rank 1 has none"])
def test_micro_batches_of_a_whole_detector_equal_the_big_batch(two_ranks, case, cuts):
    counts = two_ranks.COUNTS[case]
    expected, losses = one_process(two_ranks, counts)
    detector, batch, made = two_ranks.model(), two_ranks.pictures(), two_ranks.targets(counts)
    normalizer = step_normalizer(made, two_ranks.N, build_criterion(two_ranks.K).empty_weight)
    start, summed = 0, dict.fromkeys(losses, 0.0)
    for size in cuts:
        piece = slice(start, start + size)
        of_piece = two_ranks.step(detector, two_ranks.part(batch, piece), made[piece], normalizer)
        summed = {name: summed[name] + of_piece[name].item() for name in of_piece}
        start += size
    assert_equal_gradients(two_ranks.gradients(detector), expected, f"{case} cut into {cuts}")
    # The queries' content starts as zeros, so the first self-attention has nothing to learn yet; all else has.
    silent = {name for name, gradient in expected.items() if not gradient.any()}
    first = "transformer.decoder.layers.0."
    assert silent <= {first + "self_attn.in_proj_weight", first + "self_attn.out_proj.weight", first + "norm1.weight"}
    for name in losses:
        if name.startswith("loss_"):
            assert summed[name] == pytest.approx(losses[name].item(), rel=1e-4, abs=1e-5), name


def test_dividing_each_micro_batch_by_its_own_boxes_is_wrong(two_ranks):
    """The mistake that the normaliser is for: without it, this file's comparisons would fail."""
    counts = two_ranks.COUNTS["all have boxes"]
    expected, _ = one_process(two_ranks, counts)
    detector, batch, made = two_ranks.model(), two_ranks.pictures(), two_ranks.targets(counts)
    for piece in (slice(0, 1), slice(1, 4)):
        two_ranks.step(detector, two_ranks.part(batch, piece), made[piece])
    careless = {name: gradient / 2 for name, gradient in two_ranks.gradients(detector).items()}
    with pytest.raises(AssertionError, match="is off by"):
        assert_equal_gradients(careless, expected, "careless")


def test_two_ranks_under_torchrun_equal_one_process(two_ranks, tmp_path):
    """Real processes, gloo, and PyTorch's own DistributedDataParallel; also when a rank, or nobody, has a box."""
    out = tmp_path / "rank0.pt"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, str(SCRIPT), str(out)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr, done.stderr[-3000:]
    found = torch.load(out, weights_only=True)
    assert found.keys() == two_ranks.COUNTS.keys()
    for case, counts in two_ranks.COUNTS.items():
        expected, _ = one_process(two_ranks, counts)
        assert_equal_gradients(found[case]["gradients"], expected, case)
