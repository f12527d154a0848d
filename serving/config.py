"""Every setting of the server once: name, default, bounds, help. `serving.sources` says where values come from."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from serving.backends.engine import ConvSearch, Engine, Provider, bucket_sizes
from serving.credentials import is_loopback
from serving.versions import VersionPolicy

DEFAULT_PORT = 8001
DEFAULT_TARGET = f"127.0.0.1:{DEFAULT_PORT}"
MAX_MESSAGE_BYTES = 64 << 20

BackendName = Literal["onnx", "torchscript", "pt2", "aoti"]
DeviceSpec = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$", examples=["auto", "cpu", "cuda", "cuda:0"])]


def _policy(text: str) -> str:
    VersionPolicy.parse(text)
    return text


class ServerConfig(BaseModel):
    """What `python -m serving serve` can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    repository: Path = Field(Path("exported"), description="folder with <model>/<version>/ bundles")
    models: tuple[str, ...] = Field((), description="serve this model only; repeat for several; all when not given")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(DEFAULT_PORT, ge=0, le=65535, description="port to listen on; 0 for any free one")
    workers: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = Field(
        1, description="processes that share the port, on Linux; auto: one a core, one on CUDA"
    )
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="port for Prometheus metrics over HTTP; 0 for any free one; none if not given"
    )
    metrics_host: str | None = Field(None, description="address for the metrics; that of --host if not given")
    tls_cert: Path | None = Field(None, description="PEM file: the server's certificate, then its issuers'; TLS only")
    tls_key: Path | None = Field(None, description="PEM file: the certificate's key, unencrypted")
    tls_client_ca: Path | None = Field(
        None, description="PEM file: who vouches for clients, each of which must then have a certificate (mutual TLS)"
    )
    token_file: Path | None = Field(
        None, description="file with bearer tokens, one a line; each call but health checks must have one of them"
    )
    allow_plaintext_token: bool = Field(
        False, description="take tokens without TLS on other addresses than loopback, where something else encrypts"
    )
    version_policy: Annotated[str, AfterValidator(_policy)] = Field(
        "latest",
        description="which versions of a model to serve: latest, latest:N, all, specific:N,N, or labels; "
        "those that have a label are served too",
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
    golden: Literal["strict", "warn"] = Field(
        "strict",
        description="what becomes of a version whose golden answers are not the trained model's; strict: it is not "
        "served; warn: it is, with a warning, and never as verified",
    )
    server_name: str = Field("parityserve", description="what ServerMetadata answers; some clients want 'triton'")
    backend: BackendName = Field("onnx", description="what runs the model: which of a version's files is served")
    precision: Literal["fp32", "fp16", "int8", "auto"] = Field(
        "fp32",
        description="of the file that is served; auto: int8 on the CPU, fp16 on CUDA where there is one, else fp32",
    )
    device: DeviceSpec = Field(
        "auto", description="auto, cpu, cuda or cuda:N; cuda never falls back, auto does, with one warning"
    )
    threads: int = Field(
        Engine.threads,
        ge=1,
        le=256,
        description="threads that the model may use for one run on the CPU, in each worker",
    )
    tf32: bool = Field(
        Engine.tf32,
        description="let a GPU multiply fp32 in TF32, with 10 of 23 bits of mantissa; the golden check allows for it",
    )
    provider: Provider = Field(
        Engine.provider,
        description="of ONNX Runtime on a GPU; tensorrt: what TensorRT can run, and the rest on CUDA",
    )
    tensorrt_cache: Path | None = Field(
        Engine.tensorrt_cache,
        description="folder that keeps what TensorRT built of each file; built anew at each start if not given",
    )
    cuda_memory_mb: int | None = Field(
        Engine.cuda_memory_mb,
        ge=16,
        description="MiB of a GPU's memory for the tensors of a model version, in each worker; no limit if not given",
    )
    cuda_conv_search: ConvSearch = Field(
        Engine.cuda_conv_search,
        description="how cuDNN finds the algorithm of a convolution; exhaustive: again for each new batch size",
    )
    cuda_graphs: bool = Field(
        Engine.cuda_graphs,
        description="record the runs of the batch sizes that batches are padded to as CUDA graphs, and replay them",
    )
    max_batch_size: int = Field(1024, ge=1, le=65536, description="most images in one request")
    preferred_batch_size: int = Field(
        64, ge=1, le=65536, description="images that requests are gathered to; a request of more runs by itself"
    )
    max_queue: int = Field(1024, ge=1, description="most requests that wait or run for one model")
    max_queue_bytes: int = Field(256 << 20, ge=1, description="most bytes of the inputs that wait or run for one model")
    max_queue_delay_us: int = Field(
        0, ge=0, le=10_000_000, description="microseconds that a batch may wait for more requests; 0 for none"
    )
    instances: int = Field(1, ge=1, le=64, description="threads that run a model at once, each with --threads")
    max_message_bytes: int = Field(
        MAX_MESSAGE_BYTES, ge=1 << 12, le=(1 << 31) - 1, description="bytes of the largest request or answer"
    )
    keepalive_time_s: float = Field(
        60.0, ge=1, description="seconds after which a silent connection is asked for a sign of life"
    )
    keepalive_timeout_s: float = Field(
        20.0, gt=0, description="seconds without that sign after which the connection is closed"
    )
    min_ping_interval_s: float = Field(
        10.0, ge=0, description="a client that asks for signs of life more often, with no data between, is cut off"
    )
    max_connection_age_s: float = Field(
        0.0,
        ge=0,
        description="seconds after which a connection is closed, so that clients spread anew; 0 for never",
    )
    max_connection_age_grace_s: float = Field(
        30.0, ge=0, description="seconds that calls on a connection that is too old get to finish"
    )
    max_image_pixels: int = Field(
        50_000_000,
        ge=1,
        description="most pixels, width x height, that a request's pictures may have together; checked before decoding",
    )
    log_format: Literal["text", "json"] = Field("text", description="a log line: for people, or a JSON object")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="the least that is logged")
    log_requests: Literal["none", "refused", "all"] = Field(
        "refused", description="which requests are logged; of those refused, the first of each second"
    )
    trace_endpoint: str | None = Field(
        None,
        pattern="^https?://.+",
        examples=["http://HOST:PORT", "https://HOST:PORT"],
        description="collector for OpenTelemetry traces by OTLP over gRPC, as http://localhost:4317; none if not given",
    )
    drain_delay_s: float = Field(
        0.0,
        ge=0,
        description="seconds that a server which is stopped answers on, and only reports that it is not ready, so that "
        "load balancers take it out",
    )
    drain_s: float = Field(
        10.0, ge=0, description="seconds that running requests then get to finish, once no new ones are taken"
    )

    @field_validator("metrics_host")
    @classmethod
    def _metrics_have_a_port(cls, host: str | None, info: ValidationInfo) -> str | None:
        if host is not None and info.data.get("metrics_port", 0) is None:
            raise ValueError("needs --metrics-port too")
        return host

    @property
    def address(self) -> str:
        """Where to listen, host:port."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def engine(self) -> Engine:
        """How models are run."""
        names = {field.name for field in fields(Engine)} - {"buckets"}
        return Engine(**self.model_dump(include=names), buckets=bucket_sizes(self.max_batch_size))

    @model_validator(mode="after")
    def _gpu(self) -> Self:
        """What only some devices, backends and providers can do."""

        def refuse(names: tuple[str, ...], problem: str) -> None:
            for name in names:
                if getattr(self, name) != getattr(Engine, name):
                    raise ValueError(f"--{name.replace('_', '-')} {problem}")

        of_cuda = ("cuda_memory_mb", "cuda_conv_search", "cuda_graphs")
        of_onnx = ("provider", "tensorrt_cache", *of_cuda)
        if self.device == "cpu" or self.backend == "aoti":
            where = "--device cpu" if self.device == "cpu" else "--backend aoti, which is compiled for the CPU"
            refuse(("tf32", *of_onnx), f"is for a GPU, and has no effect with {where}: leave one of them out")
        if self.backend != "onnx":
            refuse(of_onnx, f"is for --backend onnx, and has no effect with {self.backend}: leave one of them out")
        if self.provider == "tensorrt":
            refuse(of_cuda, "is for --provider cuda, and TensorRT does not heed it: leave one of them out")
            if not self.tf32 and self.precision in ("fp32", "auto"):
                raise ValueError(
                    "--provider tensorrt multiplies fp32 in TF32, which ONNX Runtime cannot forbid it: give --tf32 too"
                )
        elif self.tensorrt_cache is not None:
            raise ValueError("--tensorrt-cache needs --provider tensorrt")
        if self.cuda_graphs and self.instances > 1:
            raise ValueError(f"--cuda-graphs: one thread replays them; want --instances 1, got {self.instances}")
        return self

    @model_validator(mode="after")
    def _together(self) -> Self:
        """What depends on several settings."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key belong together: only one of them is given")
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("--tls-client-ca needs TLS: give --tls-cert and --tls-key too")
        if self.token_file and not (self.tls_cert or self.allow_plaintext_token or is_loopback(self.host)):
            raise ValueError(
                f"--token-file: anyone on the way to --host {self.host} could read the tokens; give --tls-cert and "
                "--tls-key, or --allow-plaintext-token where something else encrypts"
            )
        return self
