"""What an evaluation is made of: frozen, strict config classes. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from t2irl.config import ENTRY_NAME, RESERVED_NAMES
from t2irl.registry import Plugin
from t2irl.strict import Strict

MINIMUM = 2000
"""Fewest pictures for a Fréchet distance: below, its bias is larger than what it is to tell apart."""

DreamSimVariant = Literal[
    "ensemble", "dino_vitb16", "dinov2_vitb14", "clip_vitb32", "open_clip_vitb32", "synclr_vitb16", "dino_vitb16_patch",
    "dinov2_vitb14_patch",
]  # fmt: skip


class Deployment(Strict):
    """As the model is used: the deterministic ODE."""

    type: Literal["deployment"] = "deployment"
    steps: PositiveInt | None = None
    """Denoising steps; null: as in the runs' own evaluations."""
    guidance_scale: float | None = Field(default=None, ge=0)
    """Classifier-free guidance; null: as in the runs' own evaluations."""
    negative_prompt: str | None = None
    """Text of the unconditional branch; null: as in the runs."""


class Training(Strict):
    """As the run samples for training: its steps, guidance, dynamics and window. Where the dynamics trains on noised pictures
    (matching), that is the ODE."""

    type: Literal["training"] = "training"


class Vision(Strict):
    """Features of a vision transformer."""

    type: Literal["vision"] = "vision"
    path: Path = Path("assets/tiny-dinov2")
    """Folder of a DINOv2, DINOv3, SigLIP or CLIP, of transformers, timm or open_clip. FD-DINOv2 is usual with DINOv2 ViT-L/14, CMMD
    with CLIP ViT-L/14 at 336 pixels. Use another backbone than the rewards do."""
    size: PositiveInt | None = None
    """Side of the backbone's input in pixels; null: the folder's own."""
    token: Literal["cls", "patches"] = "cls"
    """The vector of the whole picture, or the mean of its patches."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the backbone's blocks."""


class Fidelity(Strict):
    """Features of torch-fidelity's extractors (`pip install torch-fidelity`), which downloads their weights."""

    type: Literal["fidelity"] = "fidelity"
    name: Literal["inception-v3-compat", "vgg16", "clip-vit-b-32", "dinov2-vit-l-14"] = "inception-v3-compat"
    """The extractor; inception-v3-compat makes the Fréchet distance the usual FID."""
    weights: Path | None = None
    """A file of its weights; null: downloaded by torch-fidelity."""


class Pixels(Strict):
    """The picture itself, shrunk to 16 x 16: layout and colour, without a network."""

    type: Literal["pixels"] = "pixels"


class Perceptual(Strict):
    """DreamSim's embeddings: 1 - cosine is how different people find two pictures. See the reward `dreamsim`."""

    type: Literal["dreamsim"] = "dreamsim"
    path: Path = Path("models/dreamsim")
    """Folder of its files."""
    variant: DreamSimVariant = "ensemble"
    """Which of the published models."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the transformers."""


class Lpips(Strict):
    """Pairwise LPIPS of the pictures of a prompt (`pip install lpips`), which downloads the weights of its network."""

    net: Literal["alex", "vgg", "squeeze"] = "alex"
    """Network; alex is usual."""
    size: PositiveInt = 256
    """Side at which pictures are compared: the distance depends on it."""


class Distances(Strict):
    """Which distances between sets of pictures are measured."""

    kid: bool = True
    """Kernel distance, unbiased, with the cubic kernel: from some hundred pictures on."""
    prdc: bool = True
    """Precision, recall, density and coverage, by nearest neighbours."""
    cmmd: bool = False
    """Biased RBF distance of unit vectors x 1000, made for CLIP features."""
    fd: bool = False
    """Fréchet distance: FID with Inception features, FD-DINOv2 with DINOv2's. Refused below `fd_minimum` pictures."""
    neighbours: PositiveInt = 5
    """k of the nearest neighbours."""
    subset: int = Field(default=1000, ge=2)
    """Pictures in a subset of the kernel distance, all where there are fewer."""
    subsets: PositiveInt = 100
    """Subsets whose spread is the error bar of the kernel distance."""
    fd_minimum: PositiveInt = MINIMUM
    """Fewest pictures in either set for a Fréchet distance."""


class Statistics(Strict):
    """Intervals and tests, all over prompts."""

    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Level of the intervals."""
    resamples: int = Field(default=9999, ge=99)
    """Bootstrap resamples, and sign changes of a paired test."""


Extractor = Annotated[Vision | Fidelity | Pixels | Perceptual, Field(discriminator="type")]
Sampler = Annotated[Deployment | Training, Field(discriminator="type")]


class Evaluated(Strict):
    """One evaluation: checkpoints x a suite. Which checkpoints is said on the command line."""

    out: Path = Path("runs/eval")
    """Folder of pictures, scores and the report."""
    seed: NonNegativeInt = 0
    """Seed of the noise. The picture of (seed, prompt, image) starts from the same noise for every checkpoint."""
    suite: Plugin("evaluation.suites")  # type: ignore[valid-type]
    """Which prompts, and how many pictures of each."""
    limit: PositiveInt | None = None
    """Only the first so many prompts of the suite."""
    samplers: dict[str, Sampler] = Field(default={"deployment": Deployment()}, min_length=1)
    """How pictures are drawn, by a name of your choice; every checkpoint is drawn with each. type: deployment unless given."""
    weights: Literal["average", "trained", "both"] = "average"
    """Weights of a checkpoint: their running average (those trained, in a run without one), those trained, or both."""
    model: Plugin("models") | None = None  # type: ignore[valid-type]
    """The base model, for LoRA files that no run made and for models that have moved; null: that of the runs."""
    batch_size: PositiveInt = 32
    """Pictures in one denoiser call. Another batch size gives the same noise and the same picture up to rounding."""
    rewards: dict[str, Plugin("rewards")] = {}  # type: ignore[valid-type]
    """Measures of single pictures and their prompts (or, for those rewards that are, of whole sets)."""
    proxy: str | None = None
    """Name of the reward that the runs were trained on, if it is among `rewards`; the report looks for its hacks."""
    features: dict[str, Extractor] = {}
    """Feature extractors by a name of your choice: diversity, drift from the base model and quality are measured with each. type:
    vision unless given."""
    distances: Distances = Distances()
    """Distances between sets of pictures."""
    lpips: Lpips | None = None
    """Pairwise LPIPS of the pictures of a prompt; null for none."""
    reference_images: Path | None = None
    """Folder of real pictures: quality is the distance to them. null for none."""
    statistics: Statistics = Statistics()
    """Intervals and tests."""

    @field_validator("samplers", "features", mode="before")
    @classmethod
    def _usual_type(cls, entries: Any, info: ValidationInfo) -> Any:
        """An entry without a type is of the usual one, so that `--samplers.deployment.steps 28` is enough."""
        usual = {"samplers": "deployment", "features": "vision"}[str(info.field_name)]
        if not isinstance(entries, dict):
            return entries
        return {name: {"type": usual, **e} if isinstance(e, dict) else e for name, e in entries.items()}

    @model_validator(mode="after")
    def _names_are_keys(self) -> Evaluated:
        for kind in ("samplers", "rewards", "features"):
            for name in getattr(self, kind):
                if not ENTRY_NAME.fullmatch(name) or name in RESERVED_NAMES:
                    found = {"kind": kind, "name": repr(name)}
                    raise PydanticCustomError(
                        "entry_name", "{kind}: the name {name} should be of letters, digits, _ and -", found
                    )
        if self.proxy is not None and self.proxy not in self.rewards:
            known = {"proxy": repr(self.proxy), "known": ", ".join(self.rewards) or "none"}
            raise PydanticCustomError("proxy", "proxy {proxy} is not among rewards, which are: {known}", known)
        if self.reference_images is not None and not self.features:
            raise PydanticCustomError("reference_images", "reference_images needs an entry of features to compare with")
        return self
