"""The sections of the configuration and their fields: what every setting is called, means and may be.

`config` reads, checks and writes them; import them from there.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Floats = tuple[Positive, ...]
Elevation = Annotated[float, Field(ge=-90, le=90)]


class Model(Section):
    """The network."""

    backbone: Literal[
        "tiny", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext101_32x8d", "resnext101_64x4d",
        "resnext152_32x8d", "vgg16",
    ] = Field("resnet50", description="the network that features come from; tiny is for CPUs")  # fmt: skip
    body: Literal["c4", "c5", "fpn", "fpn_p2"] = Field(
        "c4", description="its stages 1-4, 1-5, or all with a feature pyramid, or with the finest map of one"
    )
    head: Literal["res5", "2mlp", "conv"] = Field(
        "res5", description="box head: stage 5 (of body c4), two layers, or convolutions and a layer"
    )
    head_width: Count = Field(1024, description="width of the layers of heads 2mlp and conv")
    head_convs: Count = Field(4, description="convolutions of head conv")
    norm: Literal["frozen_bn", "gn"] = Field("frozen_bn", description="frozen_bn needs pretrained weights, gn does not")
    freeze: int = Field(2, ge=0, le=5, description="stages kept fixed, from the image on (0 trains everything)")
    stride_in_1x1: bool = Field(
        False, description="where a stage's stride is: its first 1x1 convolution (Caffe, Detectron) or its 3x3"
    )
    res5_stride: int = Field(0, ge=0, le=2, description="stride of head res5; 0: 2 from 14 bins on, else 1")
    dilate_c5: bool = Field(False, description="stage 5 dilated in place of its stride (body c5)")
    pool: Literal["align", "pool", "crop", "crop_max"] = Field(
        "align", description="how a region is pooled: RoIAlign, RoIPool, RoICrop, RoICrop with max pooling"
    )
    aligned: bool = Field(True, description="RoIAlign takes off half a cell; false is Detectron's first convention")
    roi_size: Count = Field(7, description="bins a side of the pooled features of a region")
    sampling_ratio: int = Field(2, ge=0, description="RoIAlign samples a side of a bin; 0 adapts to the region")
    shared_regressor: bool = Field(False, description="add one regressor for all anchor poses to those of each")

    @model_validator(mode="after")
    def _possible(self) -> Model:
        if self.backbone == "tiny":
            return self
        if self.backbone == "vgg16" and (self.body != "c4" or self.head == "res5" or self.norm == "gn"):
            raise ValueError("backbone vgg16 goes with body: c4, head: 2mlp or conv, norm: frozen_bn")
        if self.head == "res5" and self.body != "c4":
            raise ValueError(f"head res5 is stage 5 again, so body {self.body} needs head: 2mlp or conv")
        if self.stride_in_1x1 and self.backbone in ("resnet18", "resnet34"):
            raise ValueError(f"{self.backbone} has no 1x1 convolution that stride_in_1x1 could mean")
        if self.dilate_c5 and (self.body != "c5" or self.backbone in ("resnet18", "resnet34")):
            raise ValueError("dilate_c5 is for body: c5 of a ResNet-50 or larger")
        if self.pool != "align" and self.body == "fpn":
            raise ValueError("a pyramid (body: fpn) is pooled with pool: align")
        return self

    @property
    def rpn_levels(self) -> int:
        """Maps that proposals come from."""
        return 5 if self.body == "fpn" and self.backbone != "tiny" else 1


class Rpn(Section):
    """The region proposal network."""

    sizes: Floats = Field(
        (32, 64, 128, 256, 512), description="sides of the anchor boxes, resized pixels; one a level of a pyramid"
    )
    ratios: Floats = Field((0.5, 1, 2), description="height / width of the anchor boxes")
    convention: Literal["exact", "detectron", "torchvision"] = Field(
        "exact", description="whose rounding of anchor boxes and borders of boxes: what the weights had"
    )
    nms_iou: Share = Field(0.7, description="overlap above which the weaker proposal is dropped")
    pre_nms: Count = Field(6000, description="proposals before NMS when detecting")
    post_nms: Count = Field(1000, description="proposals after NMS when detecting")
    train_pre_nms: Count = Field(12000, description="proposals before NMS in training")
    train_post_nms: Count = Field(2000, description="proposals after NMS in training")
    samples: Count = Field(256, description="anchor boxes an image in the loss")
    positive_share: Share = Field(0.5, description="at most this share of them on people")
    positive_iou: Share = Field(0.7, description="overlap that makes an anchor box a person")
    negative_iou: Share = Field(0.3, description="overlap under which it is background")
    min_size: NonNegative = Field(1, description="smallest side of a proposal, pixels of the resized image")


class Head(Section):
    """Sampling of regions, their losses, and what is kept of their predictions."""

    samples: Count = Field(128, description="regions an image in the loss")
    positive_share: Share = Field(0.25, description="at most this share of them on people")
    positive_iou: Share = Field(0.5, description="overlap that makes a region a person")
    jitter: int = Field(0, ge=0, description="moved copies of each true box among the regions")
    beta2d: Positive = Field(0.1, description="where smooth L1 turns linear, units of the box")
    beta3d: Positive = Field(0.1, description="the same, metres")
    soft: NonNegative = Field(
        0, description="metres: anchor poses farther than the nearest regress the pose too, exp(-distance / soft)"
    )
    class_weight: NonNegative = Field(1, description="weight of the class loss")
    weight2d: NonNegative = Field(1, description="weight of the 2D loss")
    weight3d: NonNegative = Field(1, description="weight of the 3D loss")
    score_floor: Share = Field(0.005, description="(region, anchor pose) pairs below it are not decoded ...")
    at_least: int = Field(0, ge=0, description="... but so many an image are, the best: 500 in LCR-Net's first code")
    passes: int = Field(1, ge=1, le=3, description="2: the boxes of the poses found go through the head once more")


PPI_RELEASED: dict[str, dict[str, Any]] = {
    "DEMO_ECCV18": {"th_pose3D": 0.3, "th_iou": 0.1, "iou_func": "shoulderhead", "min_mode_score": 0.1,
                    "th_persondetect": 0.2},
    "InTheWild-ResNet50": {"th_pose3D": 0.04, "th_iou": 0.14, "iou_func": "bbox_torsohead", "min_mode_score": 0.05,
                           "th_persondetect": 0.5},
}  # fmt: skip
"""`ppi_params` of the released models of these names."""

PpiFault = Literal["lr_mixed", "roi_boxes", "legs_full", "legs_off_by_one", "score_sum", "anchor_by_position"]


class Ppi(Section):
    """Pose proposals integration: proposals -> people. Named as in the released parameter sets."""

    released: Literal["", "DEMO_ECCV18", "InTheWild-ResNet50"] = Field(
        "", description="the five settings after postprocess as this released model has them, but for those given"
    )
    variant: Literal["corrected", "lcrnet", "improved"] = Field(
        "corrected", description="lcrnet (2.0) and improved (2020) do as that public code does, with its faults"
    )
    faults: tuple[PpiFault, ...] = Field((), description="further faults of the public code, see lcrnet/ppi.py")
    postprocess: Literal["ppi", "nms"] = Field(
        "ppi", description="nms: of overlapping poses the best, none merged; needs th_iou and th_persondetect only"
    )
    th_pose3D: Positive = Field(0.3, description="mean joint distance within one mode, metres")
    th_iou: Share = Field(0.1, description="2D overlap that puts proposals into one group (a distance for others)")
    iou_func: Literal[
        "bbox", "bbox_torsohead", "torso", "torsoLR", "torsohead", "torsoheadLR", "head", "shoulderhead",
        "shoulderheadLR", "mje",
    ] = Field("bbox_torsohead", description="what overlap is measured on")  # fmt: skip
    min_mode_score: NonNegative = Field(0.1, description="a further mode needs a centre of at least this score")
    th_persondetect: NonNegative = Field(0.5, description="a group with a summed score above it is a person")

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, values: Any) -> Any:
        """The settings of the released set that are not given."""
        return PPI_RELEASED.get(str(values.get("released")), {}) | values if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _possible(self) -> Ppi:
        if self.variant == "lcrnet" and self.iou_func == "mje":
            raise ValueError("iou_func mje came with the improved code: set variant: improved or corrected")
        return self

    @property
    def wrong(self) -> frozenset[str]:
        """The faults in force: those of the variant and those asked for."""
        own = {"lcrnet": {"lr_mixed", "score_sum"},
               "improved": {"roi_boxes", "legs_off_by_one", "score_sum", "anchor_by_position"}}  # fmt: skip
        return frozenset(own.get(self.variant, set()) | set(self.faults))


class Image(Section):
    """Resizing and normalisation, the same for training and detecting."""

    short_side: Count = Field(800, description="images are resized to this short side ...")
    max_side: Count = Field(1333, description="... unless the long side would pass this")
    resize: Literal["area", "detectron", "torchvision"] = Field(
        "area", description="area averages when shrinking; the others are what weights from there were trained with"
    )
    multiple: Count = Field(16, description="images are padded to whole multiples of this, for batches of one shape")
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="RGB mean, of values in 0..1")
    std: tuple[Positive, Positive, Positive] = Field((0.229, 0.224, 0.225), description="RGB standard deviation")


def _count_or_auto(value: Any) -> Any:
    # One message for both: pydantic itself has one for each member of a union.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value == "auto" or (number and value >= 1 and value % 1 == 0):
        return value
    raise ValueError("must be auto or a whole number from 1 on")


class Anchors(Section):
    """Anchor poses, the classes of the network."""

    file: str | None = Field(None, description="anchor poses to use; without it they are clustered from the data")
    k: Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)] = Field(
        10, description="3D poses to cluster; auto: as many as the coverage curve says (gain)"
    )
    upper: bool = Field(True, description="add a variant of each for boxes round the upper body")
    headings: int = Field(
        0, ge=0, le=64, description="n: the heading is removed, and each of the k poses put into n; 0: as they are"
    )
    gain: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="k auto: the smallest after which no doubling lowers the 95th percentile by this share"
    )
    views: Count = Field(8, description="headings at which a camera sees each pose of a motion-capture file")
    twin: NonNegative = Field(
        0.05, description="metres under which two anchor poses are near-twins, which is warned of"
    )


class Data(Section):
    """Training images and labels."""

    flip: Share = Field(0.5, description="share of samples that are mirrored, left and right joints swapped")
    scale: tuple[Positive, Positive] = Field((0.8, 1.25), description="random factor on the size of the image")
    grow: Share = Field(0, description="images start at this part of their size, which they have from half the run on")
    colour: Share = Field(0, description="random brightness, contrast and colour, at most this part")
    crop: Decay = Field(0, description="random window of the image, its sides shorter by at most this part")
    rotate: float = Field(0, ge=0, le=180, description="random turn of image, boxes and poses, at most these degrees")
    occlude: Share = Field(0, description="share of people over part of whom a patch of texture is laid")
    group_aspect: bool = Field(False, description="images of like shape share a batch, which so has little padding")
    decode: Literal["exact", "reduced"] = Field(
        "exact", description="reduced: large JPEGs are decoded at 1/2, 1/4 or 1/8 where that is enough; much faster"
    )
    loaders: int = Field(2, ge=0, description="processes a worker that decode images; 0 = in the worker itself")
    min_joints: Count = Field(4, description="people with fewer labelled joints are ignored regions")


class Train(Section):
    """The optimisation."""

    steps: Count = Field(90000, description="optimiser steps, for `batch` images each")
    batch: Count = Field(16, description="images of one step, over all workers")
    accumulate: Count = Field(
        1, description="parts that a worker's images of a step go through the network in; less memory, the same step"
    )
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="the rule of a step")
    lr: Positive = Field(0.02, description="learning rate for `batch` images")
    lr_reference: int = Field(
        0, ge=0, description="the batch that lr, steps and warmup are for: lr grows with it, they shrink; 0: `batch`"
    )  # fmt: skip
    bias_lr: Positive = Field(1, description="learning rate of the biases (not of norms), times lr; Detectron: 2")
    momentum: Decay = Field(0.9, description="SGD momentum, or Adam's beta1")
    momentum_correction: bool = Field(
        False, description="SGD's momentum is scaled where the learning rate jumps, as in Detectron.pytorch"
    )
    beta2: Decay = Field(0.999, description="Adam's beta2")
    weight_decay: NonNegative = Field(0.0001, description="not applied to biases and norms")
    warmup: int = Field(500, ge=0, description="steps of warm-up")
    warmup_kind: Literal["linear", "constant"] = Field("linear", description="a line from warmup_factor up, or a step")
    warmup_factor: Share = Field(0, description="part of lr it starts at; 0: 1 / (warmup + 1); Detectron: 0.333")
    schedule: Literal["steps", "cosine"] = Field("steps", description="how the learning rate falls after the warm-up")
    decay_at: tuple[Share, ...] = Field((0.67, 0.89), description="parts of the run after which gamma applies")
    gamma: Annotated[float, Field(gt=0, le=1)] = Field(0.1, description="the factor of each decay of `steps`")
    clip: NonNegative = Field(0, description="largest norm of the gradient; 0 = no limit")
    ema: Decay = Field(0, description="decay of the averaged weights that are kept; 0 = none")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="bf16 and fp16 run the network under autocast, fp16 with a scaled loss"
    )
    compile: bool = Field(
        False, description="torch.compile of the backbone: minutes at the start, and nothing won on a CPU"
    )
    seed: int = Field(0, description="same seed and workers, same result")
    workers: Count = Field(1, description="processes that train together")
    gpu: bool = Field(False, description="each on a GPU of its own")
    threads: int = Field(0, ge=0, description="CPU threads of each; 0 = the cores it was given")
    init: str | None = Field(None, description="model folder, or file of other people's weights, to start from")
    save_every: Count = Field(1000, description="steps between checkpoints")
    validation: Literal["inline", "beside", "none"] = Field(
        "inline", description="whether checkpoints are evaluated on --val: by worker 0, by a task beside, or not"
    )
    log_every: Count = Field(20, description="steps between lines and TensorBoard scalars")
    picture_every: int = Field(1000, ge=0, description="steps between TensorBoard pictures of people found; 0 = none")
    keep: Count = Field(2, description="checkpoints kept")
    max_failures: int = Field(3, ge=0, description="restarts after a lost worker")


class Store(Section):
    """Checkpoints of a training, and what it outlives."""

    checkpoints: str = Field(
        "",
        description="where they go: a folder that all nodes share, or s3://BUCKET/RUN, gs://...; RUN itself without it",
    )
    upload: Literal["beside", "wait"] = Field(
        "beside",
        description="whether the training goes on while a checkpoint is copied there, or waits until it is safe",
    )
    keep_best: str = Field(
        "", description="figure of the validation: the train.keep best checkpoints are kept, and the last; RUN/best"
    )
    best_mode: Literal["max", "min"] = Field("max", description="whether the best has the largest or the smallest")
    min_workers: int = Field(
        0, ge=0, description="train.workers may fall to so many when nodes are lost, and rise again; 0: always all"
    )


class Annotate(Section):
    """Labelling of image folders."""

    batch: Count = Field(16, description="images a call of the model")
    workers: Count = Field(1, description="models that run side by side")
    gpu: bool = Field(False, description="each on a GPU of its own")
    block: Count = Field(256, description="images of one Parquet file, which is what a kill can cost")
    max_pixels: Count = Field(100_000_000, description="larger images are recorded as unreadable")
    calibrated: bool = Field(True, description="scores are probabilities where the model has a calibration")


class Coco(Section):
    """Which labels become a COCO data set, and how it is split."""

    min_score: Share = Field(0.5, description="people below this score become ignored regions (iscrowd)")
    min_joint_score: Share = Field(0, description="joints below this score are marked hidden")
    val_share: Share = Field(0.2, description="share of the groups that goes to val.json")
    images: Literal["link", "copy"] = Field("link", description="how COCO/images is filled")


class Evaluate(Section):
    """Matching of people to truth, and the thresholds of the figures."""

    match: Literal["oks", "distance"] = Field("oks", description="what pairs people: OKS, or the distance of 2D joints")
    oks: Share = Field(0.5, description="OKS from which on a person is found")
    distance: Positive = Field(
        0.25, description="with `match` distance: mean distance below which a person is found, longer sides of the pose"
    )
    min_score: Share = Field(0.5, description="people below this score do not count as detected (OKS-AP takes all)")
    pck2d: Positive = Field(0.2, description="PCK threshold, units of the torso's length")
    pckh: Positive = Field(0.5, description="PCKh threshold, sizes of the head")
    pck3d_mm: Positive = Field(150, description="3DPCK threshold, millimetres")
    predecessor: bool = Field(False, description="also the figures of the seed's test_net.py, faults included")


class Tune(Section):
    """The sweep: a search space over dotted fields."""

    space: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="field: {loguniform: [a, b]} | {uniform: [a, b]} | {choice: [...]}"
    )
    trials: Count = Field(4, description="trials of the sweep")
    metric: str = Field("oks_ap", description="a figure of metrics.json")
    mode: Literal["max", "min"] = Field("max", description="whether the best trial has the largest or the smallest")
    concurrent: int = Field(0, ge=0, description="trials at a time; 0 = as many as the cluster holds")
    scheduler: Literal["asha", "pbt", "none"] = Field(
        "asha", description="asha stops weak trials early, pbt lets them go on from strong ones, changed a little"
    )
    grace: int = Field(0, ge=0, description="asha: steps before a trial is judged; 0 = to its first checkpoint")
    reduction: int = Field(3, ge=2, description="asha: one trial of so many goes on, at each of its milestones")
    perturb_every: int = Field(
        0, ge=0, description="pbt: steps of a round, whole multiples of train.save_every; 0 = a checkpoint's"
    )


class Lift(Section):
    """3D poses for people with 2D labels, from motion capture."""

    headings: Count = Field(16, description="directions, evenly round, that every motion-capture pose is seen from ...")
    elevations: tuple[Elevation, ...] = Field(
        (-20, 0, 20), min_length=1, description="... by cameras so many degrees above the horizon"
    )
    neighbours: Count = Field(256, description="poses that a person's is the weighted mean of; 1: the nearest")
    softness: Positive = Field(
        0.08, description="how fast their weight falls: exp(-cost / softness), cost in shares of the 2D pose's variance"
    )
    roll: NonNegative = Field(
        0.02, description="cost of in-plane rotation, roll (1 - cos angle); 0 for gymnasts, 0.2 where people stand"
    )
    tilt: NonNegative = Field(0.1, description="cost of the camera's elevation, tilt (1 - cos elevation)")
    min_joints: int = Field(8, ge=3, description="people with fewer labelled joints get no 3D pose")
    max_error: Positive = Field(
        0.5, description="nor those whose nearest pose is off by more: RMS of the 2D residual over that of the 2D pose"
    )
    doubt: Positive = Field(
        0.2, description="metres of expected error (misfit and disagreement of neighbours) at which trust is a half"
    )


class Draw(Section):
    """The embedded data set: drawn people (synthetic.py)."""

    train: Count = Field(10000, description="drawings to train on")
    val: Count = Field(100, description="drawings to evaluate on")
    unlabelled: Count = Field(200, description="drawings to annotate")
    size: Count = Field(128, description="side of a drawing, pixels")
    heading: float = Field(180, gt=0, le=180, description="people face within so many degrees of the camera")
    finetune_steps: Count = Field(50, description="steps on the COCO set made of the labels")
