"""The keys of Detectron's configuration: those that `detectron` translates, with their defaults, and those it reads
over, with the reason. Facts of detectron/core/config.py and of lib/core/config.py of the LCR-Net built on it.
"""

from __future__ import annotations

from typing import Any

DEFAULTS: dict[str, Any] = {
    "MODEL.TYPE": "generalized_rcnn", "MODEL.CONV_BODY": "", "MODEL.FASTER_RCNN": False, "MODEL.RPN_ONLY": False,
    "MODEL.CLS_AGNOSTIC_BBOX_REG": False, "MODEL.ANCHOR_POSES": "",
    "RESNETS.NUM_GROUPS": 1, "RESNETS.WIDTH_PER_GROUP": 64, "RESNETS.STRIDE_1X1": True, "RESNETS.RES5_DILATION": 1,
    "RESNETS.TRANS_FUNC": "bottleneck_transformation", "RESNETS.STEM_FUNC": "basic_bn_stem",
    "RESNETS.SHORTCUT_FUNC": "basic_bn_shortcut", "RESNETS.USE_GN": False, "RESNETS.FREEZE_AT": 2,
    "GROUP_NORM.DIM_PER_GP": -1, "GROUP_NORM.NUM_GROUPS": 32, "GROUP_NORM.EPSILON": 1e-5,
    "FAST_RCNN.ROI_BOX_HEAD": "", "FAST_RCNN.MLP_HEAD_DIM": 1024, "FAST_RCNN.CONV_HEAD_DIM": 256,
    "FAST_RCNN.NUM_STACKED_CONVS": 4, "FAST_RCNN.ROI_XFORM_METHOD": "RoIPoolF",
    "FAST_RCNN.ROI_XFORM_SAMPLING_RATIO": 0, "FAST_RCNN.ROI_XFORM_RESOLUTION": 14,
    "POOLING_SIZE": 7, "CROP_RESIZE_WITH_MAX_POOL": True,
    "RPN.SIZES": (64, 128, 256, 512), "RPN.ASPECT_RATIOS": (0.5, 1, 2), "RPN.OUT_DIM_AS_IN_DIM": True,
    "FPN.FPN_ON": False, "FPN.DIM": 256, "FPN.MULTILEVEL_ROIS": False, "FPN.MULTILEVEL_RPN": False,
    "FPN.ROI_CANONICAL_SCALE": 224, "FPN.ROI_CANONICAL_LEVEL": 4, "FPN.ROI_MAX_LEVEL": 5, "FPN.ROI_MIN_LEVEL": 2,
    "FPN.RPN_MAX_LEVEL": 6, "FPN.RPN_MIN_LEVEL": 2, "FPN.RPN_ASPECT_RATIOS": (0.5, 1, 2),
    "FPN.RPN_ANCHOR_START_SIZE": 32, "FPN.COARSEST_STRIDE": 32, "FPN.EXTRA_CONV_LEVELS": False, "FPN.USE_GN": False,
    "SOLVER.TYPE": "SGD", "SOLVER.BASE_LR": 0.001, "SOLVER.LR_POLICY": "step", "SOLVER.GAMMA": 0.1,
    "SOLVER.STEP_SIZE": 30000, "SOLVER.STEPS": (), "SOLVER.LRS": (), "SOLVER.MAX_ITER": 40000, "SOLVER.MOMENTUM": 0.9,
    "SOLVER.WEIGHT_DECAY": 0.0005, "SOLVER.WARM_UP_ITERS": 500,
    "TRAIN.SCALES": (600,), "TRAIN.MAX_SIZE": 1000, "TRAIN.IMS_PER_BATCH": 2, "TRAIN.BATCH_SIZE_PER_IM": 64,
    "TRAIN.FG_FRACTION": 0.25, "TRAIN.FG_THRESH": 0.5, "TRAIN.BG_THRESH_HI": 0.5, "TRAIN.BG_THRESH_LO": 0.0,
    "TRAIN.USE_FLIPPED": True, "TRAIN.RPN_POSITIVE_OVERLAP": 0.7, "TRAIN.RPN_NEGATIVE_OVERLAP": 0.3,
    "TRAIN.RPN_FG_FRACTION": 0.5, "TRAIN.RPN_BATCH_SIZE_PER_IM": 256, "TRAIN.RPN_NMS_THRESH": 0.7,
    "TRAIN.RPN_PRE_NMS_TOP_N": 12000, "TRAIN.RPN_POST_NMS_TOP_N": 2000, "TRAIN.RPN_MIN_SIZE": 0,
    "TRAIN.FREEZE_CONV_BODY": False, "TRAIN.FREEZE_AT": 2, "TRAIN.SNAPSHOT_ITERS": 20000,
    "TEST.SCALE": 600, "TEST.MAX_SIZE": 1000, "TEST.RPN_NMS_THRESH": 0.7, "TEST.RPN_PRE_NMS_TOP_N": 12000,
    "TEST.RPN_POST_NMS_TOP_N": 2000, "TEST.RPN_MIN_SIZE": 0,
    "NUM_GPUS": 1, "PIXEL_MEANS": (102.9801, 115.9465, 122.7717), "RNG_SEED": 3,
}  # fmt: skip
"""What is translated, and its value in a file that does not name it."""

_DATA = "data are named on the command line (--data, --images, --val)"
_WEIGHTS = "train.init names the weights to start from"
_BOXES = "LCR-Net has poses where Detectron has boxes"
_PROPOSALS = "proposals come from the RPN that is trained with the rest"
_MACHINE = "says where and how that program ran, not what it computed"
_EVALUATE = "evaluate.py measures poses"
_PPI = "detections are merged and chosen by section ppi and head.score_floor"

IGNORED = {
    "MODEL.NUM_CLASSES": "the classes are the anchor poses, and background",
    "MODEL.BBOX_REG_WEIGHTS": _BOXES,
    "MODEL.MASK_ON": "there are no masks", "MODEL.KEYPOINTS_ON": "joints come from the pose head",
    "MODEL.SHARE_RES5": "there is one head", "MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS": _WEIGHTS,
    "MODEL.UNSUPERVISED_POSE": "nothing reads it", "MODEL.EXECUTION_TYPE": _MACHINE,
    "MODEL.DILATION": "deprecated there", "RESNETS.IMAGENET_PRETRAINED_WEIGHTS": _WEIGHTS,
    "FPN.ZERO_INIT_LATERAL": "pyramids start with Xavier's weights", "FPN.RPN_COLLECT_SCALE": "set by the program",
    "RPN.RPN_ON": "there always is one", "RPN.STRIDE": "follows from the body",
    "RPN.OUT_DIM": "as wide as its input", "RPN.CLS_ACTIVATION": "two logits of a softmax are one of a sigmoid",
    "SOLVER.WEIGHT_DECAY_GN": "norms have no weight decay", "SOLVER.BIAS_DOUBLE_LR": "biases learn as fast as weights",
    "SOLVER.BIAS_WEIGHT_DECAY": "biases have no weight decay", "SOLVER.WARM_UP_FACTOR": "the warm-up starts near 0",
    "SOLVER.WARM_UP_METHOD": "the warm-up is linear", "SOLVER.SCALE_MOMENTUM": "momentum is not scaled at a decay",
    "SOLVER.SCALE_MOMENTUM_THRESHOLD": "momentum is not scaled at a decay", "SOLVER.LOG_LR_CHANGE_THRESHOLD": _MACHINE,
    "TRAIN.WEIGHTS": _WEIGHTS, "TRAIN.DATASETS": _DATA, "TRAIN.PROPOSAL_FILES": _PROPOSALS,
    "TRAIN.BBOX_THRESH": _BOXES, "TRAIN.BBOX_NORMALIZE_TARGETS": _BOXES, "TRAIN.BBOX_INSIDE_WEIGHTS": _BOXES,
    "TRAIN.BBOX_NORMALIZE_TARGETS_PRECOMPUTED": _BOXES, "TRAIN.BBOX_NORMALIZE_MEANS": _BOXES,
    "TRAIN.BBOX_NORMALIZE_STDS": _BOXES, "TRAIN.ASPECT_GROUPING": "batches are padded to one shape",
    "TRAIN.ASPECT_CROPPING": "the predecessor cropped images and left the poses where they were",
    "TRAIN.ASPECT_HI": "of TRAIN.ASPECT_CROPPING", "TRAIN.ASPECT_LO": "of TRAIN.ASPECT_CROPPING",
    "TRAIN.RPN_STRADDLE_THRESH": "anchor boxes that cross the border of the image take part",
    "TRAIN.CROWD_FILTER_THRESH": "regions that lie to half in a crowd are left out",
    "TRAIN.GT_MIN_AREA": "coco.py says which people take part", "TRAIN.GENERATE_PROPOSALS_ON_GPU": _MACHINE,
    "TRAIN.AUTO_RESUME": "the same command resumes", "TRAIN.COPY_WEIGHTS": _MACHINE,
    "TRAIN.DROPOUT": "deprecated there",
    "TEST.WEIGHTS": _WEIGHTS, "TEST.DATASETS": _DATA, "TEST.PROPOSAL_FILES": _PROPOSALS,
    "TEST.PROPOSAL_LIMIT": _PROPOSALS, "TEST.PRECOMPUTED_PROPOSALS": _PROPOSALS, "TEST.NMS": _PPI,
    "TEST.BBOX_REG": _BOXES, "TEST.DETECTIONS_PER_IM": _PPI, "TEST.SCORE_THRESH": _PPI,
    "TEST.GENERATE_PROPOSALS_ON_GPU": _MACHINE, "TEST.COMPETITION_MODE": _EVALUATE,
    "TEST.FORCE_JSON_DATASET_EVAL": _EVALUATE, "TEST.CLASS_SPECIFIC_AR": _EVALUATE,
    "TEST.NUM_TEST_IMAGES": "deprecated there", "TEST.BBOX_AUG.*": "images are seen once, as they are",
    "TEST.MASK_AUG.*": "there are no masks", "TEST.KPS_AUG.*": "joints come from the pose head",
    "TEST.SOFT_NMS.*": _PPI, "TEST.BBOX_VOTE.*": _PPI, "RETINANET.*": "that detector is another one",
    "MRCNN.*": "there are no masks", "KRCNN.*": "joints come from the pose head",
    "RFCN.*": "that detector is another one", "VIDEO.*": "that detector is another one",
    "DATA_LOADER.*": "data.loaders says how many processes decode images", "CLUSTER.*": _MACHINE,
    **dict.fromkeys(
        ["USE_NCCL", "ROOT_DIR", "DATA_DIR", "OUTPUT_DIR", "MATLAB", "MEMONGER", "MEMONGER_SHARE_ACTIVATIONS", "VIS",
         "VIS_TH", "EXPECTED_RESULTS", "EXPECTED_RESULTS_RTOL", "EXPECTED_RESULTS_ATOL", "EXPECTED_RESULTS_SIGMA_TOL",
         "EXPECTED_RESULTS_EMAIL", "DOWNLOAD_CACHE", "CUDA", "DEBUG", "PYTORCH_VERSION_LESS_THAN_040", "FINAL_MSG",
         "ROOT_GPU_ID", "USE_GPU_NMS"], _MACHINE),
    "DEDUP_BOXES": _PROPOSALS, "BBOX_XFORM_CLIP": "log(1000 / 16) here as well", "EPS": "of its own arithmetic",
    "POOLING_MODE": "nothing reads it",
}  # fmt: skip
"""Keys, or `SECTION.*`, that are read over, with the reason."""
