"""Every setting of the server once: name, default, bounds, help. Flags come before `PARITYSERVE_*` variables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from serving.versions import VersionPolicy

DEFAULT_PORT = 8001
MAX_MESSAGE_BYTES = 64 << 20

BackendName = Literal["onnx", "torchscript"]
DeviceSpec = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]


def _policy(text: str) -> str:
    VersionPolicy.parse(text)
    return text


class ServerConfig(BaseSettings):
    """What `python -m serving serve` can be told."""

    model_config = SettingsConfigDict(env_prefix="PARITYSERVE_", frozen=True, extra="forbid")

    repository: Path = Field(Path("exported"), description="folder with <model>/<version>/ bundles")
    models: tuple[str, ...] = Field((), description="serve this model only; repeat for several; all when not given")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(DEFAULT_PORT, ge=0, le=65535, description="port to listen on; 0 for any free one")
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="port for Prometheus metrics over HTTP; 0 for any free one; none if not given"
    )
    metrics_host: str | None = Field(None, description="address for the metrics; that of --host if not given")
    version_policy: Annotated[str, AfterValidator(_policy)] = Field(
        "latest", description="which versions of a model to serve: latest, latest:N, all, or specific:N,N"
    )
    model_control: Literal["none", "explicit", "poll"] = Field(
        "none",
        description="none: what is there at the start; explicit: clients load and unload models; "
        "poll: what is there at any time",
    )
    poll_s: float = Field(5.0, gt=0, description="seconds between two looks at the repository, with poll")
    allow_unverified: bool = Field(
        False, description="serve plain <model>/<version>/model.onnx too, which no golden answers vouch for"
    )
    server_name: str = Field("parityserve", description="what ServerMetadata answers; some clients want 'triton'")
    backend: BackendName = Field("onnx", description="what runs the model")
    device: DeviceSpec = Field(
        "auto", description="auto, cpu, cuda or cuda:N; cuda never falls back, auto does, with one warning"
    )
    threads: int = Field(1, ge=1, le=256, description="threads that the model may use for one run on the CPU")
    max_batch_size: int = Field(1024, ge=1, le=65536, description="most images in one request")
    max_queue: int = Field(1024, ge=1, description="most requests that wait or run for one model")
    max_queue_bytes: int = Field(256 << 20, ge=1, description="most bytes of the inputs that wait or run for one model")
    max_queue_delay_us: int = Field(
        0, ge=0, le=10_000_000, description="microseconds that a batch may wait for more requests; 0 for none"
    )
    instances: int = Field(1, ge=1, le=64, description="threads that run a model at once, each with --threads")
    max_message_bytes: int = Field(
        MAX_MESSAGE_BYTES, ge=1 << 12, le=(1 << 31) - 1, description="largest request accepted"
    )
    max_image_pixels: int = Field(
        50_000_000,
        ge=1,
        description="most pixels, width x height, that a request's pictures may have together; checked before decoding",
    )
    drain_s: float = Field(
        10.0, ge=0, description="seconds that running requests get to finish when the server is stopped"
    )

    @field_validator("metrics_host")
    @classmethod
    def _metrics_have_a_port(cls, host: str | None, info: ValidationInfo) -> str | None:
        if host is not None and info.data.get("metrics_port", 0) is None:
            raise ValueError("needs --metrics-port too")
        return host
