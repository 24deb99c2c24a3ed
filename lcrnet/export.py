"""A model as one file for other programs: images -> pose proposals, by torch.export (.pt2) or as ONNX.

    python -m lcrnet.export MODEL --out FILE.onnx --size 480 640 [--batch 1] [--proposals 1000]

The graph takes `images` (B, 3, H, W) float32 RGB of 0..255, resized by the rule of the model's section `image` to
H x W; what `image.multiple` asks for is padded inside. Its outputs have fixed shapes, N the number of `--proposals`:

    score (B, N)          falling, then 0: an empty place
    box (B, N, 4)         pixels of the images given
    anchor (B, N)         int64
    pose2d (B, N, J, 2)   pixels
    pose3d (B, N, J, 3)   metres
    count (B,)            int64: proposals above `head.score_floor`; above N, the weakest are missing

PPI stays outside: `proposals` turns them into what `lcrnet.ppi` takes. The file holds, as metadata, `lcrnet.json` with
joints and the settings of `image` and `ppi`.
A .pt2 needs torchvision's operators (`import torchvision`), an .onnx none of its own. FILE is run against the model.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision  # noqa: F401  registers its operators
from torch import Tensor, nn

from lcrnet import config, image, weights
from lcrnet.config import UserError
from lcrnet.model import LCRNet
from lcrnet.pose import BOX_MARGIN, PoseProposals, out_of_box
from lcrnet.rpn import levels

Run = Callable[[np.ndarray], dict[str, np.ndarray]]
OUTPUTS = ("score", "box", "anchor", "pose2d", "pose3d", "count")


class Graph(nn.Module):
    """A model in eval mode as tensors of fixed shapes, made of PyTorch's and torchvision's operators alone."""

    limit: Tensor

    def __init__(self, model: LCRNet, size: tuple[int, int], batch: int = 1, proposals: int = 1000):
        super().__init__()
        self.model = model.eval()
        self.size, self.batch, self.proposals = size, batch, proposals
        self.padded = image.padded(size, model.config.image.multiple)
        self.register_buffer("limit", torch.tensor([size] * batch), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        net, head = self.model, self.model.config.head
        pixels = (images - net.mean) / net.std
        features = net.body(F.pad(pixels, (0, self.padded[1] - self.size[1], 0, self.padded[0] - self.size[0])))
        logits, offsets, anchors, counts = net.rpn([features[s] for s in net.body.rpn_strides])
        # As in LCRNet.forward: Detectron clips to the padded image.
        detectron = net.config.rpn.convention == "detectron"
        within = torch.tensor([self.padded] * self.batch) if detectron else self.limit
        nms = functools.partial(_nms, parts=[min(net.config.rpn.pre_nms, count) for count in counts])
        box, kept = net.rpn.best(logits, offsets, anchors, counts, within, False, nms)
        valid = torch.arange(box.shape[1]) < kept[:, None]  # (B, M)
        found: list[tuple[Tensor, ...]] = []
        for _ in range(head.passes):
            classes, refined = self._regions([features[s] for s in net.body.roi_strides], box)
            found.append((self._likely(classes, valid), box, refined))
            box, valid = self._again(classes, refined, box, valid)
        return self._chosen(*(torch.cat(parts, 1) for parts in zip(*found, strict=True)))

    def _regions(self, maps: list[Tensor], box: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (B, M, K) of the anchor poses and their refinements (B, M, K, J, 5) in boxes (B, M, 4)."""
        net = self.model
        settings, strides, size = net.config.model, net.body.roi_strides, net.config.model.roi_size
        number = torch.arange(len(box), dtype=box.dtype)[:, None, None].expand(-1, box.shape[1], 1)
        roi = torch.cat([number, box], 2).flatten(0, 1)
        if settings.pool == "align":
            ratio, aligned = settings.sampling_ratio, settings.aligned
            every = [
                torch.ops.torchvision.roi_align(map, roi, 1 / stride, size, size, ratio, aligned)
                for map, stride in zip(maps, strides, strict=True)
            ]
            out: Tensor = every[0]
            if len(every) > 1:
                level = levels(roi[:, 1:], strides, net.config.rpn.convention)[:, None, None, None]
                for n, other in enumerate(every[1:], 1):
                    out = torch.where(level == n, other, out)
        elif settings.pool == "pool":
            out = torch.ops.torchvision.roi_pool(maps[0], roi, 1 / strides[0], size, size)[0]
        else:
            out = _crop(maps[0], box / strides[0], size, settings.pool == "crop_max")
        step = getattr(net.box_head, "step", 1)
        classes, refined = net.predictor(net.box_head(out[..., ::step, ::step]))
        shape = box.shape[:2]
        return classes.softmax(-1)[:, 1:].unflatten(0, shape), refined.unflatten(0, shape)

    def _likely(self, score: Tensor, valid: Tensor) -> Tensor:
        """Scores (B, M, K), 0 where there is no proposal: as PosePredictor.decode."""
        head = self.model.config.head
        here = torch.where(valid[..., None], score, -1).flatten(1)
        likely = here > head.score_floor
        if head.at_least:
            likely |= here >= here.topk(min(head.at_least, here.shape[1])).values[:, -1:]
        return torch.where(likely & (here > 0), here, 0).view_as(score)

    def _again(self, score: Tensor, refined: Tensor, box: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (B, M, 4) of the next pass, and which are meant: as LCRNet._again."""
        sure, anchor = score.max(-1)
        joints = refined.shape[3]
        mine = anchor[..., None, None, None].expand(-1, -1, 1, joints, 5)
        pose = out_of_box(self.model.predictor.anchor2d[anchor] + refined.gather(2, mine)[:, :, 0, :, :2], box)
        low, high = pose.amin(-2), pose.amax(-2)
        grow = BOX_MARGIN * (high - low).amax(-1, keepdim=True)
        limit = self.limit.to(box)[:, None, [1, 0, 1, 0]]
        new = torch.minimum(torch.cat([low - grow, high + grow], -1).clamp(min=0), limit)
        return new, valid & (sure > 0.3) & (new[..., 2:] - new[..., :2] > 1).all(-1)

    def _chosen(self, score: Tensor, box: Tensor, refined: Tensor) -> tuple[Tensor, ...]:
        """The N best of all (region, anchor pose) pairs."""
        predictor = self.model.predictor
        images, regions, kinds = score.shape
        flat = score.flatten(1)
        best, place = flat.topk(min(self.proposals, regions * kinds), dim=1)
        some = best > 0
        anchor = place % kinds
        box = box.gather(1, (place // kinds)[..., None].expand(-1, -1, 4))
        numbers = refined.reshape(images, regions * kinds, -1)
        numbers = numbers.gather(1, place[..., None].expand(-1, -1, numbers.shape[2])).unflatten(2, (-1, 5))
        pose2d = out_of_box(predictor.anchor2d[anchor] + numbers[..., :2], box)
        pose3d = predictor.anchor3d[anchor] + numbers[..., 2:]
        here = some[..., None]
        return (best, torch.where(here, box, 0), torch.where(some, anchor, 0),
                torch.where(here[..., None], pose2d, 0), torch.where(here[..., None], pose3d, 0),
                (flat > 0).sum(1))  # fmt: skip


def _crop(map: Tensor, box: Tensor, size: int, max_pool: bool) -> Tensor:
    """`ops.roi_crop` of boxes (B, M, 4) in cells, by grid_sample: (B M, C, size, size)."""
    points = 2 * size if max_pool else size
    part = torch.linspace(0, 1, points)[:, None] if points > 1 else torch.full((1, 1), 0.5)
    at = box[..., None, :2] + part * (box[..., None, 2:] - box[..., None, :2])  # (B, M, points, 2)
    at = (2 * at + 1) / torch.tensor(map.shape[:1:-1]) - 1  # whole numbers are the centres of cells
    grid = torch.stack(torch.broadcast_tensors(at[:, :, None, :, 0], at[:, :, :, None, 1]), -1)
    out = F.grid_sample(map, grid.flatten(1, 2), padding_mode="zeros", align_corners=False)
    out = out.unflatten(2, grid.shape[1:3]).transpose(1, 2).flatten(0, 1)
    return F.max_pool2d(out, 2) if max_pool else out


def _nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, most: int, group: Tensor | None, parts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """`ops.batched_nms` by torchvision's operator; parts: how many boxes each group has, one group after the other."""
    kept = []
    for b in range(len(boxes)):
        first = 0
        for count in parts:
            here = slice(first, first + count)
            # torchvision promises torch.export two boxes or more: two of no size are added, which are always kept.
            more = F.pad(boxes[b, here], (0, 0, 0, 2)), F.pad(scores[b, here], (0, 2), value=-torch.inf)
            index = torch.ops.torchvision.nms(*more, iou_threshold)
            # How many there are is not known before; a mask has a fixed shape.
            kept.append(torch.zeros(count + 2).scatter(0, index, 1.0)[:count] > 0)
            first += count
    mask = torch.cat(kept).view(len(boxes), -1) & (scores > -torch.inf)
    most = min(most, boxes.shape[1])
    return scores.masked_fill(~mask, -torch.inf).topk(most, dim=1).indices, mask.sum(1).clamp(max=most)


def export(
    model: LCRNet, file: str | Path, size: tuple[int, int], format: str = "", batch: int = 1, proposals: int = 1000
) -> None:
    """Writes the graph of a model; format pt2 or onnx, if not by the file's suffix. UserError says what hinders it."""
    file = Path(file)
    format = format or file.suffix.lstrip(".")
    if format not in ("pt2", "onnx"):
        raise UserError(f"{file}: format {format!r} is neither pt2 nor onnx")
    if not file.parent.is_dir():
        raise UserError(f"{file}: there is no folder {file.parent}")
    if min(*size, batch, proposals) < 1:
        raise UserError(f"size {size}, batch {batch}, proposals {proposals}: all must be 1 or more")
    about = {
        "joints": list(model.skeleton.joints), "size": list(size), "batch": batch,
        "image": model.config.image.model_dump(mode="json"), "ppi": model.config.ppi.model_dump(mode="json"),
        "upper_only": model.anchors.upper_only.tolist(),
    }  # fmt: skip
    graph = Graph(model, size, batch, proposals).cpu()
    with torch.no_grad(), _quiet():
        program = torch.export.export(graph, (torch.zeros(batch, 3, *size),), strict=False)
        try:
            if format == "pt2":
                torch.export.save(program, file, extra_files={"lcrnet.json": json.dumps(about)})
                return
            table: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.torchvision.roi_pool.default: _roi_pool}
            made = torch.onnx.export(
                program, dynamo=True, input_names=["images"], output_names=OUTPUTS, verbose=False,
                custom_translation_table=table,
            )  # fmt: skip
            assert made is not None
            made.model.metadata_props["lcrnet.json"] = json.dumps(about)
            made.save(file, external_data=False)
        except ImportError as error:
            raise UserError(f"ONNX needs further packages ({error}): pip install 'lcrnet[export]'") from None
        except OSError as error:
            raise UserError(f"{file}: {error.strerror or error}") from None


def _roi_pool(map: Any, rois: Any, scale: float, height: int, width: int) -> tuple[Any, Any]:
    """RoIPool in ONNX; onnxscript's own takes the arguments of another function. Nobody reads the second output."""
    from onnxscript.onnx_opset import opset18

    pooled = opset18.MaxRoiPool(map, rois, pooled_shape=(height, width), spatial_scale=scale)
    return pooled, pooled


def opened(file: str | Path) -> Run:
    """An exported file as a function of images (B, 3, H, W): what other programs do with it, here for checking."""
    file = Path(file)
    if file.suffix == ".pt2":
        with _quiet():
            run = torch.export.load(file).module()
        return lambda images: dict(
            zip(OUTPUTS, (t.detach().numpy() for t in run(torch.from_numpy(images))), strict=True)
        )
    try:
        import onnxruntime
    except ImportError:
        raise UserError("running ONNX needs a further package: pip install 'lcrnet[export]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda images: dict(zip(OUTPUTS, session.run(list(OUTPUTS), {"images": images}), strict=True))


def proposals(outputs: Mapping[str, np.ndarray]) -> list[PoseProposals]:
    """The pose proposals of each image, for `lcrnet.ppi`, of what an exported graph gives."""
    return [
        PoseProposals(*(outputs[name][b][score > 0] for name in ("box", "score", "anchor", "pose2d", "pose3d")))
        for b, score in enumerate(outputs["score"])
    ]


def difference(model: LCRNet, run: Run, images: np.ndarray) -> float:
    """The largest difference between a model and its exported file (`opened`) on images (B, 3, H, W), whole numbers of
    0..255: of scores, of coordinates as parts of the longer side, of metres. Infinite where one has proposals that the
    other lacks.
    """
    height, width = images.shape[2:]
    outputs = run(images.astype(np.float32))
    multiple = model.config.image.multiple
    pixels, sizes = image.stack([np.ascontiguousarray(one.transpose(1, 2, 0)) for one in images], multiple)
    with torch.inference_mode():
        goals = [found.numpy() for found in model.eval()(pixels, sizes)]
    goals = [PoseProposals(*(v[goal.score > 0] for v in goal.__dict__.values())) for goal in goals]
    worst = 0.0
    for found, goal, count in zip(proposals(outputs), goals, outputs["count"], strict=True):
        if count != len(goal) or len(found) != min(count, outputs["score"].shape[1]):
            return float("inf")
        side = max(height, width)
        rows = [
            np.concatenate([p.score[:, None], p.box / side, p.pose2d.reshape(len(p), -1) / side,
                            p.pose3d.reshape(len(p), -1), 1e3 * p.anchor[:, None]], 1)
            for p in (found, goal)
        ]  # fmt: skip
        for row in rows[0]:  # in the order of scores, of which equal ones may change places
            worst = max(worst, float(np.abs(rows[1] - row).max(1).min()))
    return worst


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on their own insides."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lcrnet.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="model folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="FILE.onnx or FILE.pt2")
    parser.add_argument("--size", type=int, nargs=2, required=True, metavar=("H", "W"), help="of the images it takes")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="images a call")
    parser.add_argument("--proposals", type=int, default=1000, metavar="N", help="room for pose proposals an image")
    args = parser.parse_args(argv)
    model = weights.load(args.model)
    export(model, args.out, tuple(args.size), batch=args.batch, proposals=args.proposals)
    noise = np.random.default_rng(0).integers(0, 256, (args.batch, 3, *args.size), dtype=np.uint8)
    apart = difference(model, opened(args.out), noise)
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB; on noise it differs from the model by {apart:.1e}")
    if not apart < 1e-4:
        print("error: that is more than 1e-4: do not use it")
        return 1
    return 0


if __name__ == "__main__":
    config.run(main)
