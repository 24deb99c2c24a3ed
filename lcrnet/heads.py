"""Classification and regression of regions: sampling, targets, losses, decoding.

R regions, K anchor poses (class 0 is background, class k + 1 anchor pose k), J joints. 2D poses are in units of the
region's box, 3D poses in metres.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from lcrnet.anchors import AnchorPoses
from lcrnet.config import Head
from lcrnet.pose import People, PoseProposals, into_box, out_of_box
from lcrnet.rpn import coverage, per_worker

JITTER = 0.15  # moved copies of a true box: each side by a normal deviate of this part of the box's size


@dataclass
class Regions:
    """Sampled regions of a batch and what the network should say of each.

    roi (R, 5) rows of (image, x1, y1, x2, y2); label (R,) class; trust (R,) of its person;
    pose2d (R, J, 2), pose3d (R, J, 3) of its person; seen2d, seen3d (R, J): joints that take part in the loss.
    """

    roi: Tensor
    label: Tensor
    trust: Tensor
    pose2d: Tensor
    pose3d: Tensor
    seen2d: Tensor
    seen3d: Tensor


class PosePredictor(nn.Module):
    """Class and refinement of every anchor pose, from the vector of a region."""

    anchor2d: Tensor
    anchor3d: Tensor
    group: Tensor

    def __init__(self, width: int, anchors: AnchorPoses, shared: bool):
        super().__init__()
        self.register_buffer("anchor2d", torch.tensor(anchors.pose2d), persistent=False)
        self.register_buffer("anchor3d", torch.tensor(anchors.pose3d), persistent=False)
        self.register_buffer("group", torch.tensor(anchors.group), persistent=False)
        self.joints = anchors.pose2d.shape[1]
        self.classes = nn.Linear(width, len(anchors.pose2d) + 1)
        self.refine = nn.Linear(width, len(anchors.pose2d) * self.joints * 5)
        self.shared = nn.Linear(width, self.joints * 5) if shared else None
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.zeros_(self.classes.bias)
        for layer in (self.refine, self.shared):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.001)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(R, D) -> class logits (R, K + 1), refinements (R, K, J, 5): 2D in units of the box, 3D in metres."""
        refined = self.refine(x).view(len(x), len(self.anchor2d), self.joints, 5)
        if self.shared is not None:
            refined = refined + self.shared(x).view(len(x), 1, self.joints, 5)
        return self.classes(x).float(), refined.float()

    @torch.no_grad()
    def sample(self, proposals: list[Tensor], people: list[People], config: Head) -> Regions:
        """At most `samples` regions an image, among proposals (r, 4), true boxes and moved copies of them.

        Regions on people whose pose nobody labelled, or mostly inside a crowd region, are left out.
        """
        parts: list[tuple[Tensor, ...]] = []
        for b, (boxes, who) in enumerate(zip(proposals, people, strict=True)):
            real = who[~who.crowd]
            true = real.box
            moved = true.repeat(config.jitter, 1)
            size = (moved[:, 2:] - moved[:, :2]).repeat(1, 2)
            moved = moved + torch.randn_like(moved) * JITTER * size
            ok = (moved[:, 2:] > moved[:, :2] + 1).all(1)
            boxes = torch.cat([boxes, true, moved[ok]])
            if len(true):
                best, person = box_iou(boxes, true).max(1)
            else:
                best, person = boxes.new_zeros(len(boxes)), boxes.new_zeros(len(boxes), dtype=torch.int64)
            positive = best >= config.positive_iou
            negative = ~positive & (coverage(boxes, who.box[who.crowd]) <= 0.5)
            chosen = _choose(positive, round(config.samples * config.positive_share))
            others = _choose(negative, config.samples - len(chosen))
            index = torch.cat([chosen, others])
            roi = torch.cat([boxes.new_full((len(index), 1), b), boxes[index]], 1)
            is_person = torch.arange(len(index), device=boxes.device) < len(chosen)
            if len(true) == 0:
                joints, zero = self.joints, boxes.new_zeros
                n = len(index)
                parts.append((roi, is_person, zero(n) + 1, zero(n, joints, 2), zero(n, joints, 3),
                              zero(n, joints), zero(n, joints)))  # fmt: skip
                continue
            mine = real[person[index]]
            seen = (mine.seen > 0) & is_person[:, None]
            parts.append((roi, is_person, torch.where(is_person, mine.trust, 1), mine.pose2d, mine.pose3d,
                          seen.float(), (seen & mine.has3d[:, None]).float()))  # fmt: skip
        roi, is_person, trust, pose2d, pose3d, seen2d, seen3d = map(torch.cat, zip(*parts, strict=True))
        label = torch.where(is_person, 1 + self.nearest(roi[:, 1:], pose2d, pose3d, seen2d, seen3d), 0)
        return Regions(roi, label, trust, pose2d, pose3d, seen2d, seen3d)

    def nearest(self, box: Tensor, pose2d: Tensor, pose3d: Tensor, seen2d: Tensor, seen3d: Tensor) -> Tensor:
        """(R,) the anchor pose of each region's person, in two stages, over the joints seen.

        First the 3D pose: least mean joint distance in metres. Then, among the anchor poses with that 3D pose (full and
        upper body), least mean joint distance in 2D, in units of the region's box. Without 3D, 2D alone decides.
        """
        apart3d = _mean_distance(pose3d, self.anchor3d, seen3d)
        apart2d = _mean_distance(into_box(pose2d, box), self.anchor2d, seen2d)
        same3d = self.group[None] == self.group[apart3d.argmin(1)][:, None]
        same3d |= (seen3d.sum(1) == 0)[:, None]
        return torch.where(same3d, apart2d, torch.inf).argmin(1)

    def loss(self, logits: Tensor, refined: Tensor, regions: Regions, config: Head) -> dict[str, Tensor]:
        """Losses `class`, `pose2d` and `pose3d`, means over regions of all workers, weighted by their trust.

        Pose losses are smooth L1 on the refinement of the true class, summed over all coordinates of a person as in the
        paper: the mean over the joints seen, times J.
        """
        cross = F.cross_entropy(logits, regions.label, reduction="none")
        person = (regions.label > 0).nonzero()[:, 0]
        joints = [seen[person].sum() for seen in (regions.seen2d, regions.seen3d)]
        count = per_worker(torch.stack([joints[0].new_tensor(len(cross)), *joints]))
        losses = {"class": config.class_weight * (cross * regions.trust).sum() / count[0]}
        share = self._shares(regions, person, config.soft)
        # (n, J, D) goals against (n, K, J, D) poses of the anchor poses that have a share in the person.
        who, anchor = share.nonzero(as_tuple=True)
        found, share = refined[person[who], anchor], share[who, anchor, None]
        goal2d = into_box(regions.pose2d[person], regions.roi[person, 1:])[who] - self.anchor2d[anchor]
        goal3d = regions.pose3d[person][who] - self.anchor3d[anchor]
        trust = regions.trust[person, None]
        for name, part, goal, seen, beta, weight, n in (
            ("pose2d", found[..., :2], goal2d, regions.seen2d, config.beta2d, config.weight2d, count[1]),
            ("pose3d", found[..., 2:], goal3d, regions.seen3d, config.beta3d, config.weight3d, count[2]),
        ):
            each = F.smooth_l1_loss(part, goal, beta=beta, reduction="none").sum(-1)
            use = seen[person]
            losses[name] = weight * self.joints * (each * share * (use * trust)[who]).sum() / n
        return losses

    @torch.no_grad()
    def _shares(self, regions: Regions, person: Tensor, soft: float) -> Tensor:
        """(n, K) weights, each row of sum 1, of the anchor poses that regress the persons' poses.

        The true class alone, or with `soft` all near it in 3D: exp(-(distance - least distance) / soft), under a
        hundredth dropped. Then a pose on the border of two classes is the same whichever of them is chosen.
        """
        alone = F.one_hot(regions.label[person] - 1, len(self.anchor2d)).float()
        if not soft:
            return alone
        apart = _mean_distance(regions.pose3d[person], self.anchor3d, regions.seen3d[person])
        share = torch.exp((apart.min(1, keepdim=True).values - apart) / soft)
        share = torch.where(share < 0.01, 0, share)
        share = share / share.sum(1, keepdim=True)
        has3d = regions.seen3d[person].sum(1, keepdim=True) > 0
        return torch.where(has3d, share, alone)

    def decode(
        self, logits: Tensor, refined: Tensor, roi: Tensor, images: int, floor: float, at_least: int = 0
    ) -> list[PoseProposals]:
        """The pose proposals of each image: (region, anchor pose) pairs with a probability above `floor`, and of those
        below it the best, until there are `at_least` so many.
        """
        score = logits.softmax(-1)[:, 1:]
        likely = score > floor
        if at_least and len(score):
            for b in range(images):
                here = torch.where(roi[:, :1] == b, score, -1)
                likely |= (here >= here.flatten().topk(min(at_least, here.numel())).values[-1:]) & (here >= 0)
        region, anchor = likely.nonzero(as_tuple=True)
        image, box = roi[region, 0], roi[region, 1:]
        delta = refined[region, anchor]
        pose2d = out_of_box(self.anchor2d[anchor] + delta[..., :2], box)
        pose3d = self.anchor3d[anchor] + delta[..., 2:]
        score = score[region, anchor]
        out = []
        for b in range(images):
            mine = image == b
            out.append(PoseProposals(box[mine], score[mine], anchor[mine], pose2d[mine], pose3d[mine]))
        return out


def _mean_distance(pose: Tensor, anchors: Tensor, seen: Tensor) -> Tensor:
    """(R, K) mean distance over the joints seen (R, J) between poses (R, J, D) and anchors (K, J, D)."""
    apart = (pose[:, None] - anchors[None]).norm(dim=-1)
    return (apart * seen[:, None]).sum(-1) / seen.sum(-1).clamp(min=1)[:, None]


def _choose(among: Tensor, count: int) -> Tensor:
    """Indices of at most `count` true entries of a mask (N,), drawn without replacement."""
    index = among.nonzero()[:, 0]
    return index[torch.randperm(len(index), device=index.device)[:count]]
