"""How fast, against whom: `make bench`.

    python book/bench.py [--rounds 5] [--no-compile]     about 6 minutes on two quiet cores; writes annotated_detr/speed.json

Everything that is compared runs in one process, in turn, with the same weights, and what is printed is the median of the
ratios of neighbours: a machine that is busy for a moment is busy for both. The peer is `transformers`, and if DETR_REPO names
a checkout of the paper's code, that too. Memory and import times are taken in processes of their own.
"""

import argparse
import contextlib
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import annotated_detr
from annotated_detr import build_criterion, data, detr_resnet50, detr_resnet50_dc5, for_inference, inference, scenes
from annotated_detr.backbone import fold_frozen_norms
from annotated_detr.nested_tensor import nested_tensor_from_tensor_list
from annotated_detr.pretrained import save_for_transformers
from annotated_detr.training import ModelSpec

K, PEER, REFERENCE = 91, "transformers", "reference"


def paired(functions: dict[str, Callable], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each function, and how many times faster than the first it is, from runs in turn."""
    seconds = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            begun = time.perf_counter()
            function()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - begun)
    first = next(iter(seconds.values()))
    return {
        name: {
            "seconds": round(statistics.median(mine), 5),
            "times_faster": round(statistics.median(a / b for a, b in zip(first, mine)), 3),
        }
        for name, mine in seconds.items()
    }


def peer_of(model: nn.Module) -> nn.Module:
    """transformers' DETR with the same weights."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    spec = ModelSpec("detr_resnet50", K, 100, 800, {str(i): f"thing {i}" for i in range(1, K)})
    with tempfile.TemporaryDirectory() as folder:
        path = save_for_transformers(model, Path(folder) / "detr", spec)
        return transformers.DetrForObjectDetection.from_pretrained(path)


def reference() -> tuple[nn.Module, nn.Module] | None:
    """Model and criterion of the paper's code, if DETR_REPO names a checkout of it."""
    if "DETR_REPO" not in os.environ:
        return None
    sys.path.insert(0, os.environ["DETR_REPO"])
    import hubconf
    import models.backbone
    from models.detr import SetCriterion
    from models.matcher import HungarianMatcher

    models.backbone.is_main_process = lambda: False  # or it would download a backbone
    weights = {**build_criterion(K).weight_dict}
    criterion = SetCriterion(K, HungarianMatcher(1, 5, 2), weights, 0.1, ["labels", "boxes", "cardinality"])
    model = hubconf.detr_resnet50()
    for layer in model.transformer.modules():
        layer.return_intermediate = True
    model.aux_loss = True
    return model, criterion


def product_speed() -> Callable:
    """A large product of matrices; its 17.2 GFLOP over its seconds are the bound."""
    matrix = torch.randn(2048, 2048)
    return lambda: matrix @ matrix


def bound(flops: float, product_seconds: float) -> float:
    """Seconds that so many operations would take at the speed of the large product."""
    return flops / (2 * 2048**3 / product_seconds)


def flops_of(model: nn.Module, pictures: list) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(pictures)
    return counter.get_total_flops()


def prediction(model: nn.Module, peer: nn.Module, theirs: tuple | None, rounds: int, compile: bool) -> dict:
    """One picture of 800×1066: the peer in turn with one form after the other, so that few weights are in memory at once."""
    picture = [torch.randn(3, 800, 1066)]

    def folded(channels_last: bool) -> Callable:
        network = copy.deepcopy(model)
        fold_frozen_norms(network)
        order = torch.channels_last if channels_last else torch.contiguous_format
        network, batch = network.to(memory_format=order), nested_tensor_from_tensor_list(picture)
        batch.tensors = batch.tensors.contiguous(memory_format=order)
        return lambda: network(batch)

    def twin(onednn: bool = True, **options) -> Callable:
        fast = for_inference(model, **options)

        def run():
            with contextlib.nullcontext() if onednn else mock.patch.object(inference, "_by_onednn", lambda x: False):
                fast(picture)

        return run

    forms = {REFERENCE: lambda: lambda: theirs[0](picture)} if theirs else {}
    forms |= {
        "ours, plain": lambda: lambda: model(picture),
        "norms folded": lambda: folded(channels_last=False),
        "and channels last": lambda: folded(channels_last=True),
        "and nothing twice": lambda: twin(onednn=False),
        "for_inference": twin,
    }
    if compile:
        forms["for_inference, compiled"] = lambda: twin(compile=True)
    rows, peers, products = {}, [], []
    with torch.inference_mode():
        for name, make in forms.items():
            trio = {PEER: lambda: peer(pixel_values=picture[0][None]), name: make(), "product": product_speed()}
            found = paired(trio, rounds)
            rows[name] = found[name]
            peers.append(found[PEER]["seconds"])
            products.append(found["product"]["seconds"])
    rows = {PEER: {"seconds": statistics.median(peers), "times_faster": 1.0}} | rows
    flops = flops_of(model, picture)
    seconds = bound(flops, statistics.median(products))
    share = seconds / rows["for_inference"]["seconds"]
    return {"rows": rows, "gflop": round(flops / 1e9, 1), "bound_seconds": round(seconds, 3), "share_of_bound": round(share, 3)}


def targets_of(pictures: int, boxes: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "labels": torch.randint(1, K, (boxes,), generator=generator),
            "boxes": torch.rand(boxes, 4, generator=generator) * 0.4 + 0.2,
        }
        for _ in range(pictures)
    ]


def training_step(model: nn.Module, peer: nn.Module, theirs: tuple | None, rounds: int) -> dict:
    pictures, targets = torch.randn(2, 3, 480, 640), targets_of(2, 10)
    ours = copy.deepcopy(model).to(memory_format=torch.channels_last).train()
    fold_frozen_norms(ours)
    plain, peer = copy.deepcopy(model).train(), copy.deepcopy(peer).train()
    peer.config.auxiliary_loss = True
    criterion = build_criterion(K)
    labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]

    def step(network: nn.Module, loss: Callable, fused: bool) -> Callable:
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 1e-6, fused=fused)

        def run():
            optimizer.zero_grad()
            loss().backward()
            nn.utils.clip_grad_norm_(network.parameters(), 0.1)
            optimizer.step()

        return run

    batch = nested_tensor_from_tensor_list([*pictures])
    functions = {PEER: step(peer, lambda: peer(pixel_values=pictures, labels=labels).loss, False)}
    if theirs:
        network, loss = theirs[0].train(), theirs[1]

        def reference_loss():
            losses = loss(network([*pictures]), targets)
            return sum(losses[name] * weight for name, weight in loss.weight_dict.items())

        functions[REFERENCE] = step(network, reference_loss, False)
    functions["ours, plain"] = step(plain, lambda: criterion.total(criterion(plain(batch), targets)), False)
    functions["ours, as the trainer does it"] = step(ours, lambda: criterion.total(criterion(ours(batch), targets)), True)
    return {"rows": paired(functions, rounds)}


def matching_and_loss(peer: nn.Module, theirs: tuple | None, rounds: int, boxes: int = 20) -> dict:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 8, 100, K + 1, generator=generator).requires_grad_()
    answers = (torch.rand(6, 8, 100, 4, generator=generator) * 0.5 + 0.2).requires_grad_()
    layers = [{"pred_logits": c, "pred_boxes": b} for c, b in zip(logits, answers)]
    outputs, targets = {**layers[-1], "aux_outputs": layers[:-1]}, targets_of(8, boxes)
    labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
    config, criterion = copy.deepcopy(peer.config), build_criterion(K)
    config.auxiliary_loss = True

    def of_the_reference():
        losses = theirs[1](outputs, targets)
        return sum(losses[name] * weight for name, weight in theirs[1].weight_dict.items())

    losses = {PEER: lambda: peer.loss_function(logits[-1], labels, "cpu", answers[-1], config, logits, answers)[0]}
    losses |= {REFERENCE: of_the_reference} if theirs else {}
    losses["ours"] = lambda: criterion.total(criterion(outputs, targets))
    torch.testing.assert_close(losses["ours"](), losses[PEER](), rtol=1e-4, atol=1e-4)
    forward = paired(losses, 4 * rounds)
    both = paired({name: lambda f=f: f().backward() for name, f in losses.items()}, 4 * rounds)
    return {"rows": forward, "with_backward": both}


def attention(rounds: int) -> dict:
    """Self-attention of 850 tokens in 8 heads, forward and backward: written out, and PyTorch's."""
    query, key, value = (torch.randn(1, 8, 850, 32).requires_grad_() for _ in range(3))
    return paired(
        {
            "products and softmax": lambda: ((query @ key.mT / 32**0.5).softmax(-1) @ value).sum().backward(),
            "scaled_dot_product_attention": lambda: nn.functional.scaled_dot_product_attention(query, key, value).sum().backward(),
        },
        4 * rounds,
    )


def growth(rounds: int) -> dict:
    """Seconds of a prediction by picture size, batch, queries; of stride 16; of matching by boxes."""
    torch.manual_seed(0)
    stride_32, stride_16 = (for_inference(build().eval()) for build in (detr_resnet50, detr_resnet50_dc5))
    many = for_inference(detr_resnet50(num_queries=400).eval())
    one = {f"{side}": [torch.randn(3, side, side * 4 // 3)] for side in (320, 480, 640, 800)}
    cases = {"a product of 2048×2048": product_speed()}
    cases |= {f"size {side}": lambda p=p: stride_32(p) for side, p in one.items()}
    cases |= {f"batch {n}": lambda n=n: stride_32(one["480"] * n) for n in (2, 4)}
    cases |= {"queries 400": lambda: many(one["480"])}
    cases |= {f"stride 16, size {side}": lambda p=one[side]: stride_16(p) for side in ("320", "480")}
    with torch.inference_mode():
        rows = paired(cases, max(2, rounds // 2))
    product = rows["a product of 2048×2048"]["seconds"]
    flops = {f"size {side}": flops_of(detr_resnet50().eval(), p) for side, p in one.items()}
    flops |= {f"stride 16, size {side}": flops_of(detr_resnet50_dc5().eval(), one[side]) for side in ("320", "480")}
    return {
        name: {"seconds": row["seconds"]} | ({"bound_seconds": round(bound(flops[name], product), 3)} if name in flops else {})
        for name, row in rows.items()
    }


def in_a_process(code: str) -> float:
    return float(subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True).stdout)


# Not getrusage: that begins with what the process that forked had.
PEAK = "print([int(line.split()[1]) / 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
LOAD = "import torch; from annotated_detr import detr_resnet50, for_inference; model = detr_resnet50().eval(); x = torch.randn(3, 800, 1066)"


def memory() -> dict[str, float]:
    """MiB that a process holds at most, for one picture of 800×1066."""
    theirs = (
        "import torch, transformers as t; x = torch.randn(1, 3, 800, 1066); "
        "c = t.DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=t.ResNetConfig()); "
        "m = t.DetrForObjectDetection(c).eval()\nwith torch.inference_mode(): m(x)\n"
    )
    plain = f"{LOAD}\nwith torch.inference_mode(): model([x])\n"
    fast = f"{LOAD}\nmodel = for_inference(model)\nwith torch.inference_mode(): model([x])\n"
    return {name: round(in_a_process(code + PEAK)) for name, code in ((PEER, theirs), ("ours, plain", plain), ("for_inference", fast))}


def around(rounds: int) -> dict[str, float]:
    """What is not the model: imports in seconds; scenes, the check and the loader in pictures a second."""
    clock = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
    imports = ("import annotated_detr", "import torch", "from annotated_detr import DETR", "from annotated_detr import cli, training, inference; cli.app")
    found = {f"seconds of `{code}`": round(statistics.median(in_a_process(clock.format(code)) for _ in range(3)), 3) for code in imports}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"TQDM_DISABLE": "1"}):
        begun = time.perf_counter()
        images, annotations = scenes.coco_folder(Path(folder), "train", 300)
        found["scenes drawn a second"] = round(300 / (time.perf_counter() - begun), 1)
        begun = time.perf_counter()
        data.check_dataset(images, annotations, progress=False)
        found["scenes checked a second"] = round(300 / (time.perf_counter() - begun), 1)
        for size in (96, 800):
            pictures = data.CocoDetection(images, annotations, transforms=data.make_coco_transforms("train", size=size))
            count = 100 if size == 96 else 20
            begun = time.perf_counter()
            for index in range(count):
                pictures.load(index)
            loaded = time.perf_counter()
            for index in range(count):
                pictures[index]
            found[f"pictures read a second, {size} pixels"] = round(count / (loaded - begun), 1)
            found[f"pictures read and augmented a second, {size} pixels"] = round(count / (time.perf_counter() - loaded), 1)
    return found


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}")
    for name, row in rows.items():
        print(f"  {name:32} {row['seconds'] * 1000:10.1f} ms   {row.get('times_faster', float('nan')):6.2f} ×", flush=True)


def write(path: Path, results: dict) -> None:
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--note", default="nothing else was running")
    arguments = parser.parse_args()
    rounds, out = arguments.rounds, Path(annotated_detr.__file__).with_name("speed.json")
    memory_mib, outside = memory(), around(rounds)  # first, while this process is small
    torch.manual_seed(0)
    model = detr_resnet50(aux_loss=True).eval()
    peer, theirs = peer_of(model).eval(), reference()
    results = {
        "command": "make bench",
        "machine": f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads, torch {torch.__version__}",
        "note": arguments.note,
        "memory_mib": memory_mib,
        "around": outside,
    }
    results["matching"] = matching_and_loss(peer, theirs, rounds)
    show("Matching and loss, 8 pictures of 20 boxes, six layers", results["matching"]["rows"])
    show("The same, with the backward pass", results["matching"]["with_backward"])
    results["prediction"] = prediction(model, peer, theirs, rounds, not arguments.no_compile)
    show("One picture of 800×1066", results["prediction"]["rows"])
    print({name: value for name, value in results["prediction"].items() if name != "rows"})
    results["training"] = training_step(model, peer, theirs, max(3, rounds // 2))
    show("A training step on two pictures of 480×640", results["training"]["rows"])
    results["attention"] = attention(rounds)
    results["growth"] = growth(rounds)
    show("How a prediction grows", results["growth"])
    print(json.dumps({"memory_mib": results["memory_mib"], **results["around"]}, indent=1))
    write(out, results)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
