"""Every option of the network and of training once: name, default, bounds, help. `trainer.sources` reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from serving.options import flag

CLASSES = 10
HEIGHT = WIDTH = 28

DatasetName = Literal["mnist", "fashion-mnist"]
TrainDevice = Annotated[
    str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", examples=["auto", "cpu", "mps", "cuda", "cuda:0"])
]

# The networks that have a name. Any option changes them.
PRESETS: dict[str, dict[str, tuple[int, ...]]] = {
    "cnn": {"channels": (32, 64), "hidden": (128,)},  # 225,034 parameters
    "convnet": {"channels": (32, 32), "hidden": (128,)},  # 113,386 parameters
    "mlp": {"channels": (), "hidden": (64, 128)},  # 59,850 parameters
}

# Enough for 99.2 % on MNIST and 92.3 % on Fashion-MNIST.
DEFAULT_EPOCHS = {"mnist": 3, "fashion-mnist": 10}
DEFAULT_RATES = {"sgd": 0.1, "rmsprop": 1e-3, "adam": 4e-3, "adamw": 4e-3}


def _told(defaults: Mapping[str, object]) -> str:
    return ", ".join(f"{value} for {name}" for name, value in defaults.items())


# Options that say something only beside certain choices of another; elsewhere they must be left at their default.
BELONGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "momentum": ("optimiser", ("sgd", "rmsprop")),
    "nesterov": ("optimiser", ("sgd",)),
    "alpha": ("optimiser", ("rmsprop",)),
    "centered": ("optimiser", ("rmsprop",)),
    "beta1": ("optimiser", ("adam", "adamw")),
    "beta2": ("optimiser", ("adam", "adamw")),
    "eps": ("optimiser", ("rmsprop", "adam", "adamw")),
    "warm_up": ("schedule", ("onecycle", "cosine")),
    "step_epochs": ("schedule", ("step",)),
    "decay": ("schedule", ("step", "plateau")),
    "patience": ("schedule", ("plateau",)),
    "flip": ("dataset", ("fashion-mnist",)),  # a mirrored digit is another sign
}

# Options of layers that a network may not have.
_OF_CONVOLUTIONS: tuple[str, ...] = ("convs", "kernel_size", "padding", "pool", "global_pool")
_BETWEEN_LAYERS = ("activation", "batch_norm", "dropout")


def _split(value: Any) -> Any:
    """`16,32` as a command line has it; `none` for no layer at all."""
    if isinstance(value, str):
        return [] if value in ("", "none") else value.split(",")
    return value


def _positive(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if any(size < 1 for size in sizes):
        raise ValueError("want sizes of at least 1, as in 16,32, or none")
    return sizes


Sizes = Annotated[tuple[int, ...], BeforeValidator(_split), AfterValidator(_positive)]


def _by(chooser: str, values: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """A default that depends on another option; any, where that is itself wrong and reported."""
    return lambda given: values.get(given.get(chooser, ""), next(iter(values.values())))


class NetworkConfig(BaseModel):
    """The form of a network: blocks of convolutions, each ended by pooling, then linear layers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    network: Literal["cnn", "convnet", "mlp"] = Field(
        "cnn", description="the form to start from, which the options down to --dropout change"
    )
    channels: Sizes = Field(
        default_factory=_by("network", {name: preset["channels"] for name, preset in PRESETS.items()}),
        description="output channels of each block of convolutions, or none (default: the network's)",
    )
    hidden: Sizes = Field(
        default_factory=_by("network", {name: preset["hidden"] for name, preset in PRESETS.items()}),
        description="outputs of each linear layer before the last, or none (default: the network's)",
    )
    convs: int = Field(1, ge=1, le=8, description="convolutions in each block")
    kernel_size: Literal[1, 3, 5, 7] = Field(3, description="side of each convolution's kernel, pixels")
    padding: Literal["none", "same"] = Field("none", description="same: convolutions keep the height and width")
    pool: int = Field(2, ge=1, le=28, description="side of the max-pooling that ends each block, pixels; 1 for none")
    global_pool: bool = Field(False, description="average each channel over its pixels, instead of flattening them")
    activation: Literal["relu", "leaky-relu", "elu", "gelu", "silu", "tanh"] = Field(
        "relu", description="after each layer but the last"
    )
    batch_norm: bool = Field(False, description="batch normalisation before each activation")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="probability that dropout sets an input of a linear layer, but not a pixel, to 0"
    )

    @property
    def name(self) -> str:
        """The network's name: `custom` when an option has changed its form."""
        return self.network if self.form == NetworkConfig(network=self.network) else "custom"

    @property
    def form(self) -> NetworkConfig:
        """The options of the network alone."""
        return NetworkConfig(**{name: getattr(self, name) for name in NetworkConfig.model_fields})

    @property
    def feature_size(self) -> int:
        """Height and width of what the last block gives, pixels."""
        size = HEIGHT
        for _ in self.channels:
            if self.padding == "none":
                size -= self.convs * (self.kernel_size - 1)
            size = max(0, size) // self.pool
        return size

    @model_validator(mode="after")
    def _leaves_pixels(self) -> Self:
        if self.feature_size < 1:
            raise ValueError(
                f"--channels: {len(self.channels)} blocks of {self.convs} {self.kernel_size} x {self.kernel_size} "
                f"convolutions with pooling by {self.pool} leave nothing of {HEIGHT} x {WIDTH} pixels; "
                "want fewer blocks, --padding same or a smaller --pool"
            )
        idle = () if self.channels else _OF_CONVOLUTIONS
        if not self.channels and not self.hidden:
            idle += _BETWEEN_LAYERS
        for name in idle:
            if getattr(self, name) != type(self).model_fields[name].default:
                layers = "--channels" if name in _OF_CONVOLUTIONS else "--channels and --hidden"
                raise ValueError(f"{flag(type(self), name)} has nothing to act on where {layers} are none")
        return self


class TrainConfig(NetworkConfig):
    """How the network is trained. The defaults were chosen on the validation set."""

    dataset: DatasetName = Field("mnist", description="what to train on")
    train_images: int = Field(0, ge=0, description="train on that many images only, for trials; 0 for all")
    validation_images: int = Field(
        5000, ge=0, description="images of the training set kept for validation; 0 for none, then all are trained on"
    )
    normalise: Literal["standard", "unit"] = Field(
        "standard", description="standard: pixels of mean 0 and deviation 1 over the training set; unit: from 0 to 1"
    )
    epochs: int = Field(
        default_factory=_by("dataset", DEFAULT_EPOCHS),
        ge=1,
        le=100_000,
        description=f"passes over the training set (default: {_told(DEFAULT_EPOCHS)})",
    )
    epoch_images: int = Field(
        0, ge=0, description="images of one pass, the next of which goes on with the others; 0 for all"
    )
    batch_size: int = Field(
        128, ge=1, le=60_000, description="images in one step: 1 for stochastic, 60000 for the full set"
    )
    shuffle: bool = Field(True, description="another order of the images in every epoch")

    hardest: float = Field(
        1.0,
        gt=0,
        le=1,
        description="from the second epoch on, learn from this share of the images alone: in each step, of 1/share "
        "times as many, those with the largest losses",
    )

    optimiser: Literal["sgd", "rmsprop", "adam", "adamw"] = Field("adamw", description="what makes steps of gradients")
    learning_rate: float = Field(
        default_factory=_by("optimiser", DEFAULT_RATES),
        gt=0,
        le=100,
        description=f"the schedule's largest (default: {_told(DEFAULT_RATES)})",
    )
    momentum: float = Field(
        default_factory=_by("optimiser", {"": 0.0, "sgd": 0.9}),
        ge=0,
        lt=1,
        description="of sgd and rmsprop (default: 0.9 for sgd, else 0)",
    )
    nesterov: bool = Field(False, description="sgd: take the gradient where the momentum leads")
    alpha: float = Field(0.99, ge=0, lt=1, description="rmsprop: smoothing of the squared gradients")
    centered: bool = Field(False, description="rmsprop: divide by the gradients' deviation")
    beta1: float = Field(0.9, ge=0, lt=1, description="adam, adamw: smoothing of the gradients")
    beta2: float = Field(0.999, ge=0, lt=1, description="adam, adamw: smoothing of the squared gradients")
    eps: float = Field(1e-8, gt=0, le=1, description="rmsprop, adam, adamw: keeps the divisor from 0")
    weight_decay: float = Field(
        default_factory=_by("optimiser", {"": 0.0, "adamw": 0.01}),
        ge=0,
        le=1,
        description="adamw: decoupled from the gradient, the others: added to it (default: 0.01 for adamw, else 0)",
    )
    l1: float = Field(0.0, ge=0, le=1, description="adds this times the sum of |weight| to the loss; biases are spared")
    l2: float = Field(0.0, ge=0, le=1, description="adds this times the sum of weight²; with --l1, Elastic Net")
    clip_norm: float = Field(0.0, ge=0, description="largest norm of all gradients together; 0 for no limit")

    schedule: Literal["constant", "step", "plateau", "cosine", "onecycle"] = Field(
        "onecycle", description="how the learning rate changes"
    )
    warm_up: float = Field(
        default_factory=_by("schedule", {"": 0.0, "onecycle": 0.25}),
        ge=0,
        lt=1,
        description="onecycle, cosine: fraction of the steps in which the rate rises (default: 0.25 for onecycle)",
    )
    step_epochs: int = Field(1, ge=1, description="step: epochs from one reduction of the rate to the next")
    decay: float = Field(0.1, gt=0, lt=1, description="step, plateau: factor of each reduction")
    patience: int = Field(
        2, ge=0, description="plateau: epochs without a smaller validation loss that pass before a reduction"
    )

    init: Literal[
        "default",
        "xavier-uniform",
        "xavier-normal",
        "kaiming-uniform",
        "kaiming-normal",
        "lecun-uniform",
        "lecun-normal",
    ] = Field("default", description="initial weights; biases start at 0, but for torch's default")
    stem: Literal["trained", "frozen", "whitened"] = Field(
        "trained",
        description="first convolution; frozen: left as it was drawn, for a third less work on a CPU; "
        "whitened: made to decorrelate the pixels of the training images, and left so",
    )
    label_smoothing: float = Field(
        default_factory=_by("dataset", {"": 0.0, "fashion-mnist": 0.05}),
        ge=0,
        lt=1,
        description="share of each label that is spread over all classes (default: 0.05 for fashion-mnist, else 0)",
    )
    shift: int = Field(0, ge=0, le=14, description="augmentation: move each image by up to so many pixels each way")
    flip: bool = Field(
        default_factory=_by("dataset", {"": False, "fashion-mnist": True}),
        description="augmentation: mirror half of the images; fashion-mnist only (default: true for fashion-mnist)",
    )
    erase: float = Field(0.0, ge=0, le=1, description="augmentation: probability that a rectangle is filled with noise")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the exponential moving average of weights; 0 for none")
    early_stopping: int = Field(
        0, ge=0, description="end after so many epochs without a better validation accuracy; 0 for never"
    )
    keep: Literal["last", "best"] = Field(
        default_factory=lambda given: "best" if given.get("early_stopping") else "last",
        description="which epoch's weights are the result, best by validation accuracy "
        "(default: best with --early-stopping, else last)",
    )

    seed: int = Field(0, ge=0, lt=2**63, description="of the split, the initial weights and all that is drawn later")
    device: TrainDevice = Field("auto", description="auto, cpu, mps, cuda or cuda:N; only auto falls back")
    stream: bool = Field(False, description="keep the images in main memory and move them to the device by batches")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="of activations in training; weights and validation are fp32; fp16 is for GPUs, and slow on a CPU",
    )
    channels_last: bool = Field(True, description="lay activations out by pixels, not by channels: faster on a CPU")
    compile: bool = Field(False, description="have torch compile the network: slow to start, then faster")
    deterministic: bool = Field(True, description="the same bits every time; without, a GPU may be faster")

    @model_validator(mode="after")
    def _together(self) -> Self:
        """What depends on several options."""
        for name, (chooser, choices) in BELONGS.items():
            field = type(self).model_fields[name]
            chosen = getattr(self, chooser)
            neutral = field.get_default(call_default_factory=True, validated_data={chooser: chosen})
            if chosen not in choices and getattr(self, name) != neutral:
                raise ValueError(
                    f"{flag(type(self), name)} is for {flag(type(self), chooser)} {' or '.join(choices)}, "
                    f"which is {chosen} here"
                )
        if self.stem != "trained" and not self.channels:
            raise ValueError("--stem has nothing to act on where --channels are none")
        if self.hardest < 1 and self.batch_norm:
            raise ValueError("--hardest would give --batch-norm the statistics of the hardest images alone")
        if self.nesterov and not self.momentum:
            raise ValueError("--nesterov needs a --momentum above 0")
        if not self.validation_images:
            for name, wanted in (("schedule", "plateau"), ("keep", "best")):
                if getattr(self, name) == wanted:
                    raise ValueError(f"--{name} {wanted} looks at validation images, and --validation-images is 0")
            if self.early_stopping:
                raise ValueError("--early-stopping looks at validation images, and --validation-images is 0")
        return self
