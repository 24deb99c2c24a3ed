"""The operators of `ops` in plain PyTorch, to be read: what the C++ and CUDA of ext/ must compute, and what runs where
they cannot be built. Arguments, results and their meaning are those of the function of the same name in `ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1 << 24
"""Numbers of an intermediate result of `roi_align`; regions are taken in groups that stay below."""


def roi_align(
    maps: Sequence[Tensor],
    rois: Tensor,
    level: Tensor | None,
    scales: Sequence[float],
    height: int,
    width: int,
    sampling_ratio: int,
    aligned: bool,
    step: int,
) -> Tensor:
    """Two matrix products a region: bilinear sampling and the mean over a bin are separable in y and x."""
    out = maps[0].new_zeros(len(rois), -(-height // step), -(-width // step), maps[0].shape[1])
    parts, places = [], []
    for number, (map, scale) in enumerate(zip(maps, scales, strict=True)):
        here = torch.ones_like(rois[:, 0], dtype=torch.bool) if level is None or len(maps) == 1 else level == number
        image, low, high = rois[:, 0], rois[:, 1:3] * scale, rois[:, 3:] * scale
        low, high = (low - 0.5, high - 0.5) if aligned else (low, high)
        extent = high - low if aligned else (high - low).clamp(min=1)
        # Regions that are not finite, or of no image, stay zero.
        here = here & (image > -1) & (image < len(map)) & (low.isfinite() & (high - low).isfinite()).all(1)
        rows, columns = map.shape[2:]
        group = max(1, CHUNK // max(1, out.shape[1] * columns * map.shape[1]))
        for b in range(len(map)):
            cells = map[b].permute(1, 2, 0)  # (rows, columns, C): channels last
            for mine in (here & (image.long() == b)).nonzero()[:, 0].split(group):
                if len(mine) == 0:
                    continue
                down = _samples(low[mine, 1], extent[mine, 1], height, sampling_ratio, rows)[:, ::step].to(map.dtype)
                across = _samples(low[mine, 0], extent[mine, 0], width, sampling_ratio, columns)[:, ::step].to(
                    map.dtype
                )
                lines = (down.flatten(0, 1) @ cells.flatten(1)).view(len(mine), -1, columns, map.shape[1])
                parts.append(across[:, None] @ lines)
                places.append(mine)
    if parts:
        out = out.index_copy(0, torch.cat(places), torch.cat(parts))
    return out.permute(0, 3, 1, 2) + 0 * sum(map.sum() for map in maps if map.requires_grad)


def _samples(low: Tensor, extent: Tensor, bins: int, ratio: int, cells: int) -> Tensor:
    """(R, bins, cells) weights of the cells in each bin's mean of bilinear samples, along one axis."""
    bin = extent / bins
    count = torch.full_like(low, ratio) if ratio > 0 else bin.ceil().clamp(min=0)  # of no size: no sample, and so 0
    begin = low[:, None] + torch.arange(bins, device=low.device) * bin[:, None]  # (R, bins)
    apart = (bin / count.clamp(min=1))[:, None]
    # Of the samples of a region far larger than the map only those that can reach it are looked at.
    first = ((-1 - begin) / apart - 1.5).floor().clamp(min=0)
    first = torch.where((apart > 0) & (count[:, None] > 64), torch.minimum(first, count[:, None]), 0)
    most = int(count.clamp(max=max(64, 2 * cells + 8)).max()) if len(count) else 1
    number = first[..., None] + torch.arange(most, device=low.device)  # (R, bins, most)
    at = begin[..., None] + (number + 0.5) * bin[:, None, None] / count.clamp(min=1)[:, None, None]
    use = (number < count[:, None, None]) & (at >= -1) & (at <= cells)
    at = at.clamp(0, cells - 1)
    hats = (1 - (at[..., None] - torch.arange(cells, device=low.device)).abs()).clamp(min=0)
    return (hats * use[..., None]).sum(2) / count[:, None, None].clamp(min=1)


def roi_pool(map: Tensor, rois: Tensor, scale: float, height: int, width: int) -> Tensor:
    """The maximum of a list of each bin's cells."""
    rows, columns = map.shape[2:]
    top, bottom = _bins(rois[:, 2], rois[:, 4], scale, height, rows)
    left, right = _bins(rois[:, 1], rois[:, 3], scale, width, columns)
    y, x = _from_to(top, bottom), _from_to(left, right)
    least = torch.finfo(torch.float32).min

    def pool(cells: Tensor, mine: Tensor) -> Tensor:
        number = _places(y[mine], x[mine], columns).flatten(3)  # (r, h, w, some)
        with torch.no_grad():
            some = cells[number]
            most, first = torch.where(some > least, some, least).max(3)  # of equal cells the first
        cell = number.gather(3, first).flatten(0, 2)
        value = torch.where(most > least, cells.gather(0, cell).view_as(most), least)
        filled = (bottom > top)[mine][:, :, None] & (right > left)[mine][:, None]
        return torch.where(filled[..., None], value, 0)

    return _each_region(map, rois, scale, height, width, y.shape[2] * x.shape[2], pool)


def roi_crop(map: Tensor, rois: Tensor, scale: float, height: int, width: int, max_pool: bool) -> Tensor:
    """Weighted sums of the four cells round each point."""
    rows, columns = map.shape[2:]
    points = 2 if max_pool else 1
    y, down = _points(rois[:, 2], rois[:, 4], scale, points * height, rows)
    x, across = _points(rois[:, 1], rois[:, 3], scale, points * width, columns)

    def crop(cells: Tensor, mine: Tensor) -> Tensor:
        number = _places(y[mine], x[mine], columns)  # (r, h, w, 2, 2)
        weight = (down[mine][:, :, None, :, None] * across[mine][:, None, :, None, :])[..., None]
        four = cells.index_select(0, number.flatten()).view(*number.shape, -1)
        value = torch.where(weight > 0, four * weight, 0).sum((3, 4))
        return F.max_pool2d(value.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1) if max_pool else value

    return _each_region(map, rois, scale, height, width, 4 * points**2, crop)


def _each_region(
    map: Tensor,
    rois: Tensor,
    scale: float,
    height: int,
    width: int,
    some: int,
    pool: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """`pool` takes the cells (HW, C) of an image and region numbers -> (r, h, w, C), looking at `some` cells for each
    output. Regions that are not finite, or of no image, give zeros."""
    kind = torch.promote_types(map.dtype, torch.float32)
    out = map.new_zeros(len(rois), height, width, map.shape[1], dtype=kind)
    image = rois[:, 0]
    here = (image > -1) & (image < len(map)) & (rois[:, 1:] * scale).isfinite().all(1)
    group = max(1, CHUNK // max(1, out[:1].numel() * some))
    for b in range(len(map) if map.numel() else 0):
        cells = map[b].flatten(1).T.to(kind)
        for mine in (here & (image.long() == b)).nonzero()[:, 0].split(group):
            if len(mine):
                out = out.index_copy(0, mine, pool(cells, mine))
    return out.to(map.dtype).permute(0, 3, 1, 2) + map.flatten()[:0].sum()


def _bins(low: Tensor, high: Tensor, scale: float, bins: int, cells: int) -> tuple[Tensor, Tensor]:
    """The first cell of each bin along an axis, and the one after its last, (R, bins) both."""
    first, last = (_rounded(x * scale).nan_to_num(0).clamp(-(2.0**40), 2.0**40).long()[:, None] for x in (low, high))
    ends = torch.arange(bins + 1, device=low.device) * ((last - first + 1).clamp(min=1).to(low.dtype) / bins)
    return (ends[:, :-1].floor().long() + first).clamp(0, cells), (ends[:, 1:].ceil().long() + first).clamp(0, cells)


def _rounded(x: Tensor) -> Tensor:
    """As C's round does: halves away from zero."""
    return x.trunc() + ((x - x.trunc()).abs() >= 0.5) * x.sign()


def _from_to(first: Tensor, end: Tensor) -> Tensor:
    """(R, bins, some) cells of each bin; one that has less has its last again, which is no greater than itself."""
    most = int((end - first).max().clamp(min=1)) if len(first) else 1
    cells = first[..., None] + torch.arange(most, device=first.device)
    return cells.minimum(end[..., None] - 1).clamp(min=0)


def _points(low: Tensor, high: Tensor, scale: float, points: int, cells: int) -> tuple[Tensor, Tensor]:
    """(R, points, 2): the cells that each point along an axis lies between, and their weights, 0 outside the map."""
    steps = torch.arange(points, device=low.device, dtype=low.dtype)
    share = steps / (points - 1) if points > 1 else low.new_full((1,), 0.5)
    at = (low * scale)[:, None] + ((high - low) * scale)[:, None] * share
    at = at.nan_to_num(-9, -9, -9).clamp(-9, cells + 9)
    cell = at.floor()[..., None] + torch.arange(2, device=low.device)
    weight = (1 - (at[..., None] - cell).abs()) * ((cell >= 0) & (cell < cells))
    return cell.long().clamp(0, max(cells - 1, 0)), weight


def _places(y: Tensor, x: Tensor, columns: int) -> Tensor:
    """Rows (r, h, p) and columns (r, w, q) -> numbers of cells (r, h, w, p, q)."""
    return y[:, :, None, :, None] * columns + x[:, None, :, None, :]


def nms(
    boxes: Tensor, scores: Tensor, group: Tensor | None, iou_threshold: float, max_keep: int
) -> tuple[Tensor, Tensor]:
    """The best box is kept, what it overlaps is dropped, and again; image by image."""
    wide = torch.float64 in (boxes.dtype, scores.dtype)
    boxes, scores = (t.to(torch.float64 if wide else torch.float32) for t in (boxes, scores))
    keep = torch.full((len(boxes), max_keep), -1, device=boxes.device)
    for b in range(len(boxes)):
        left = scores[b].argsort(descending=True, stable=True)
        left = left[scores[b, left] != -torch.inf]
        for place in range(max_keep):
            if len(left) == 0:
                break
            best, left = left[0], left[1:]
            keep[b, place] = best
            drop = _iou(boxes[b, left], boxes[b, best]).double() > iou_threshold  # the threshold is not rounded
            if group is not None:
                drop &= group[b, left] == group[b, best]
            left = left[~drop]
    return keep, (keep >= 0).sum(1)


def group_poses(
    score: Tensor,
    pose2d: Tensor,
    pose3d: Tensor,
    legs: Tensor,
    lower: Tensor,
    boxes: Tensor | None,
    joints: Tensor | None,
    size: Tensor | None,
    points: Tensor | None,
    swapped: Tensor | None,
    centres: Tensor | None,
    limit: Tensor | None,
    th_iou: float,
    th_pose3d: float,
    min_mode_score: float,
    th_persondetect: float,
    max_people: int,
) -> tuple[Tensor, ...]:
    """A loop over images, in it one over groups, in it one over modes; overlap and distances in float64."""
    (images, proposals), J = score.shape, len(lower)
    mass, support = score.new_zeros(images, max_people), score.new_zeros(images, max_people, dtype=torch.int64)
    mean2d, mean3d, spread = (mass.new_zeros(*mass.shape, J, *d) for d in [(2,), (3,), ()])
    best, count, person = support - 1, support.new_zeros(images), support.new_full((images, proposals), -1)
    given = [t for t in (score, pose2d, pose3d, legs, boxes, points, swapped, centres, limit) if t is not None]
    finite = torch.stack([t[..., None].isfinite().flatten(2).all(2) for t in given]).all(0)
    usable, dropped = finite & (score > 0), (~finite & ~(score.isfinite() & (score <= 0))).sum(1)
    if joints is not None and size is not None:
        some, most = pose2d[:, :, joints], (size.flip(1) - 1)[:, None].to(pose2d.dtype)
        low, high = (torch.minimum(edge.clamp(min=0), most).double() for edge in (some.amin(2), some.amax(2)))
        boxes = torch.cat([low, high + 1], -1)
    for b in range(images):
        rows = usable[b].nonzero()[:, 0]
        rows = rows[score[b, rows].argsort(descending=True, stable=True)]
        weight, pose = score[b, rows].double(), pose3d[b, rows].double()

        def overlap(these: Tensor, b: int = b, rows: Tensor = rows) -> Tensor:
            """Which of these ranks overlap the first of them."""
            others, centre = rows[these], rows[these[0]]
            if boxes is not None:
                return _iou(boxes[b, others], boxes[b, centre]) > th_iou
            assert points is not None and limit is not None
            pairs = [(points, points), (swapped, points if centres is None else centres)]
            apart = [_apart(p[b, others].double(), c[b, centre].double()) for p, c in pairs if p is not None]
            return torch.stack(apart).amin(0) < limit[b, centre]

        people = []
        left = torch.arange(len(rows), device=rows.device)
        while len(left):
            member = overlap(left)
            member[0] = True
            heaviest, members = _heaviest_mode(left[member], weight, pose, th_pose3d, min_mode_score)
            if heaviest > th_persondetect:
                people.append((heaviest, members))
            left = left[~member]
        people.sort(key=lambda one: -one[0])  # of equals the first stays first
        count[b] = len(people)
        for p, (heaviest, members) in enumerate(people[:max_people]):
            who = rows[members]
            mass[b, p], support[b, p], best[b, p], person[b, who] = heaviest, len(who), who[0], p
            trust = weight[members, None] * torch.where(lower, legs[b, who, None].double(), 1.0)  # (n, J)
            trust = trust / trust.sum(0)
            mean = (trust[..., None] * pose[members]).sum(0)
            mean2d[b, p] = (trust[..., None] * pose2d[b, who].double()).sum(0).float()
            mean3d[b, p], spread[b, p] = mean.float(), (trust * (pose[members] - mean).norm(dim=-1)).sum(0).float()
    return mass, mean2d, mean3d, spread, support, best, person, count, dropped


def _heaviest_mode(
    group: Tensor, weight: Tensor, pose: Tensor, th_pose3d: float, min_mode_score: float
) -> tuple[float, Tensor]:
    """Mass and ranks of the mode of the largest mass; group (n,) are ranks of weight (N,) and pose (N, J, 3)."""
    weight, pose = weight[group], pose[group]
    free = torch.ones_like(group, dtype=torch.bool)
    best, most = group[:1], -1.0
    centre = 0
    while centre == 0 or (bool(free[centre]) and float(weight[centre]) >= min_mode_score):
        member = _apart(pose, pose[centre]) < th_pose3d
        member[centre] = True
        mass = float(weight[member].sum())
        if mass > most:
            best, most = group[member], mass
        free &= ~member
        centre = int(free.byte().argmax())
        if centre == 0:
            break
    return most, best


def _apart(points: Tensor, centre: Tensor) -> Tensor:
    """(n,) mean distance of the points (n, J, D) from those of a centre (J, D)."""
    return (points - centre).square().sum(-1).sqrt().mean(-1)


def _iou(boxes: Tensor, centre: Tensor) -> Tensor:
    """(n,) intersection over union of boxes (n, 4) with one (4,); NaN where none has an area."""
    area, own = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1), (centre[2:] - centre[:2]).clamp(min=0).prod()
    sides = torch.minimum(boxes[:, 2:], centre[2:]) - torch.maximum(boxes[:, :2], centre[:2])
    both = sides.clamp(min=0).prod(1)
    return both / (area + own - both)
