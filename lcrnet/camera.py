"""A pinhole camera, and the place in its scene of a person whose 2D and root-centred 3D pose are known.

Frame: the camera's, metres, x right, y down, z away from the camera, the origin at its centre. Pixels: x right, y down.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Camera:
    """A camera without lens distortion: focal lengths `f` (x, y) and principal point `c` (x, y), pixels."""

    f: tuple[float, float]
    c: tuple[float, float]

    @classmethod
    def guess(cls, height: float, width: float) -> Camera:
        """A camera for an image of unknown origin: centred, and 53 degrees wide along the longer side.

        That is a focal length of the longer side in pixels, 36 mm on 35 mm film: between a phone (26 mm) and a lens for
        portraits. A wrong guess scales the distances of all people by the same factor.
        """
        side = float(max(height, width))
        return cls((side, side), (width / 2, height / 2))

    def project(self, points3d: np.ndarray) -> np.ndarray:
        """(..., 3) points in the camera's frame -> (..., 2) pixels; nonsense for points behind the camera (z <= 0)."""
        points3d = np.asarray(points3d, np.float64)
        return points3d[..., :2] / points3d[..., 2:] * np.array(self.f) + np.array(self.c)


def place(pose2d: np.ndarray, pose3d: np.ndarray, camera: Camera, weights: np.ndarray | None = None) -> np.ndarray:
    """(..., 3) metres: where the origin of root-centred 3D poses (..., J, 3) is, given their 2D poses (..., J, 2).

    weights   (..., J), say 1 for visible joints and 0 for unknown ones; two joints at least

    The translation t that solves, by linear least squares, x_j (P_j + t)_z = (P_j + t)_x and the same in y, x_j and y_j
    being the joint's pixels in units of the focal length. NaN where fewer than two joints have a weight.
    """
    ray = (np.asarray(pose2d, np.float64) - np.array(camera.c)) / np.array(camera.f)
    pose3d = np.asarray(pose3d, np.float64)
    weight = np.ones(ray.shape[:-1]) if weights is None else np.sqrt(np.asarray(weights, np.float64))
    zero, one = np.zeros_like(weight), np.ones_like(weight)
    # one row per joint and axis: (1, 0, -x) t = x P_z - P_x; a weight of 0 leaves a row of zeros
    matrix = np.stack([np.stack([one, zero, -ray[..., 0]], -1), np.stack([zero, one, -ray[..., 1]], -1)], -2)
    goal = ray * pose3d[..., 2:] - pose3d[..., :2]
    usable = weight > 0
    matrix = np.where(usable[..., None, None], matrix * weight[..., None, None], 0)
    goal = np.where(usable[..., None], goal * weight[..., None], 0)
    lead, rows = ray.shape[:-2], 2 * ray.shape[-2]
    solved = np.linalg.pinv(matrix.reshape(*lead, rows, 3)) @ goal.reshape(*lead, rows, 1)
    return np.where((usable.sum(-1) >= 2)[..., None], solved[..., 0], np.nan)
