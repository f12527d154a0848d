"""`protos/open_inference`: the protocol's numbers, a pool of its own, and the same bytes as Triton's client."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.internal import api_implementation
from tritonclient.grpc import model_config_pb2, service_pb2

from protos import classifier_pb2
from protos import open_inference as pb

ROOT = Path(__file__).parents[1]

# From the specifications, not from our file: https://github.com/kserve/open-inference-protocol
# (specification/protocol/inference_grpc.md) and https://github.com/triton-inference-server/server (docs/protocol/).
FIELD_NUMBERS = """
ServerLiveResponse: live=1
ServerReadyResponse: ready=1
ModelReadyRequest: name=1 version=2
ModelReadyResponse: ready=1
ServerMetadataResponse: name=1 version=2 extensions=3
ModelMetadataRequest: name=1 version=2
ModelMetadataResponse: name=1 versions=2 platform=3 inputs=4 outputs=5 properties=6
ModelMetadataResponse.TensorMetadata: name=1 datatype=2 shape=3
InferParameter: bool_param=1 int64_param=2 string_param=3 double_param=4 uint64_param=5
InferTensorContents: bool_contents=1 int_contents=2 int64_contents=3 uint_contents=4 uint64_contents=5 fp32_contents=6 \
fp64_contents=7 bytes_contents=8
ModelInferRequest: model_name=1 model_version=2 id=3 parameters=4 inputs=5 outputs=6 raw_input_contents=7
ModelInferRequest.InferInputTensor: name=1 datatype=2 shape=3 parameters=4 contents=5
ModelInferRequest.InferRequestedOutputTensor: name=1 parameters=2
ModelInferResponse: model_name=1 model_version=2 id=3 parameters=4 outputs=5 raw_output_contents=6
ModelInferResponse.InferOutputTensor: name=1 datatype=2 shape=3 parameters=4 contents=5
ModelStreamInferResponse: error_message=1 infer_response=2
ModelStatistics: name=1 version=2 last_inference=3 inference_count=4 execution_count=5 inference_stats=6 batch_stats=7 \
memory_usage=8 response_stats=9
InferStatistics: success=1 fail=2 queue=3 compute_input=4 compute_infer=5 compute_output=6 cache_hit=7 cache_miss=8
InferBatchStatistics: batch_size=1 compute_input=2 compute_infer=3 compute_output=4
InferResponseStatistics: compute_infer=1 compute_output=2 success=3 fail=4 empty_response=5 cancel=6
StatisticDuration: count=1 ns=2
RepositoryIndexResponse.ModelIndex: name=1 version=2 state=3 reason=4
RepositoryModelLoadRequest: repository_name=1 model_name=2 parameters=3
RepositoryModelUnloadRequest: repository_name=1 model_name=2 parameters=3
ModelRepositoryParameter: bool_param=1 int64_param=2 string_param=3 bytes_param=4
ModelConfig: name=1 platform=2 version_policy=3 max_batch_size=4 input=5 output=6 instance_group=7 \
default_model_filename=8 cc_model_filenames=9 metric_tags=10 dynamic_batching=11 optimization=12 sequence_batching=13 \
parameters=14 ensemble_scheduling=15 model_warmup=16 backend=17 model_transaction_policy=19 response_cache=24 \
runtime=25 model_metrics=26
ModelInput: name=1 data_type=2 format=3 dims=4 reshape=5 is_shape_tensor=6 allow_ragged_batch=7 optional=8
ModelOutput: name=1 data_type=2 dims=3 label_filename=4 reshape=5 is_shape_tensor=6
ModelDynamicBatching: preferred_batch_size=1 max_queue_delay_microseconds=2 preserve_ordering=3 priority_levels=4 \
default_priority_level=5 default_queue_policy=6 priority_queue_policy=7
ModelQueuePolicy: timeout_action=1 default_timeout_microseconds=2 allow_timeout_override=3 max_queue_size=4
ModelInstanceGroup: name=1 count=2 gpus=3 kind=4
ModelWarmup: name=1 batch_size=2 inputs=3 count=4
SystemSharedMemoryRegisterRequest: name=1 key=2 offset=3 byte_size=4
CudaSharedMemoryRegisterRequest: name=1 raw_handle=2 device_id=3 byte_size=4
TraceSettingRequest: settings=1 model_name=2
LogSettingsRequest: settings=1
"""

UNARY_RPCS = """
ServerLive ServerReady ModelReady ServerMetadata ModelMetadata ModelInfer ModelConfig ModelStatistics
RepositoryIndex RepositoryModelLoad RepositoryModelUnload TraceSetting LogSettings
SystemSharedMemoryStatus SystemSharedMemoryRegister SystemSharedMemoryUnregister
CudaSharedMemoryStatus CudaSharedMemoryRegister CudaSharedMemoryUnregister
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)


def with_nested(descriptors: list[Descriptor]) -> list[Descriptor]:
    return [found for one in descriptors for found in (one, *with_nested(list(one.nested_types)))]


def wire_type(field: FieldDescriptor) -> tuple[object, ...]:
    """What must be equal for two fields of one number to be the same on the wire and in JSON."""
    named = field.message_type or field.enum_type
    oneof = field.containing_oneof.name if field.containing_oneof else None
    return field.name, field.type, field.is_repeated, named.full_name if named else None, oneof


@pytest.mark.parametrize("line", FIELD_NUMBERS.strip().splitlines(), ids=lambda line: line.partition(":")[0])
def test_field_numbers_are_the_protocols(line: str) -> None:
    name, _, fields = line.partition(":")
    expected = {field: int(number) for field, number in (text.split("=") for text in fields.split())}
    descriptor = pb.POOL.FindMessageTypeByName(f"inference.{name}")
    assert {field.name: field.number for field in descriptor.fields} == expected


def test_enum_numbers_are_the_protocols() -> None:
    names = "INVALID BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 FP32 FP64 STRING BF16"
    assert dict(pb.DataType.items()) == {f"TYPE_{name}": number for number, name in enumerate(names.split())}
    assert (pb.ModelInput.FORMAT_NCHW, pb.ModelInstanceGroup.KIND_CPU, pb.TYPE_BF16) == (2, 2, 14)


def test_every_field_is_tritons_but_for_the_protocols_properties() -> None:
    file = pb.POOL.FindFileByName("protos/open_inference.proto")
    differences = []
    for ours in with_nested(list(file.message_types_by_name.values())):
        if ours.full_name == "inference.ModelMetadataResponse.PropertiesEntry":
            continue
        theirs = descriptor_pool.Default().FindMessageTypeByName(ours.full_name)
        for field in ours.fields:
            same = theirs.fields_by_number.get(field.number)
            if same is None or wire_type(same) != wire_type(field):
                differences.append(field.full_name)
    assert differences == ["inference.ModelMetadataResponse.properties"]


def test_every_rpc_has_its_path_messages_and_streaming() -> None:
    streaming = {rpc.name: (rpc.request_streaming, rpc.response_streaming) for rpc in pb.RPCS.values()}
    assert streaming == {**dict.fromkeys(UNARY_RPCS.split(), (False, False)), "ModelStreamInfer": (True, True)}
    for name, rpc in pb.RPCS.items():
        theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name[name]
        assert rpc.path == f"/inference.GRPCInferenceService/{name}"
        assert rpc.request.DESCRIPTOR.full_name == theirs.input_type.full_name
        assert rpc.response.DESCRIPTOR.full_name == theirs.output_type.full_name
    assert pb.RPCS["ModelStreamInfer"].request is pb.ModelInferRequest
    assert pb.RPCS["ModelStreamInfer"].response is pb.ModelStreamInferResponse


def test_the_module_has_every_name_that_its_types_promise() -> None:
    stub = (ROOT / "protos/open_inference_pb2.pyi").read_text().splitlines()
    names = [line.split()[1].partition("(")[0] for line in stub if line.startswith("class ")]
    names += [line.partition(":")[0] for line in stub if line.startswith("TYPE_")]
    assert {"ModelInferRequest", "DataType", "TYPE_BF16"} <= set(names)
    assert [name for name in names if not hasattr(pb, name)] == []


def test_messages_are_of_the_c_implementation() -> None:
    assert api_implementation.Type() == "upb"
    assert type(pb.ModelInferRequest) is type(classifier_pb2.PredictRequest)


@pytest.mark.parametrize(
    "imports",
    [
        "import tritonclient.grpc, tritonclient.grpc.aio; from protos import open_inference",
        "from protos import open_inference; import tritonclient.grpc, tritonclient.grpc.aio",
    ],
    ids=["tritonclient first", "tritonclient last"],
)
def test_tritonclient_imports_beside_it_in_either_order(imports: str) -> None:
    done = run_python(
        f"{imports}\n"
        "theirs = tritonclient.grpc.service_pb2.ModelInferRequest(model_name='digits')\n"
        "ours = open_inference.ModelInferRequest.FromString(theirs.SerializeToString())\n"
        "print(ours.model_name, type(ours) is not type(theirs))"
    )
    assert (done.stdout, done.stderr) == ("digits True\n", "")


def test_in_the_default_pool_tritonclient_would_clash() -> None:
    done = run_python(
        "from pathlib import Path\n"
        "from google.protobuf import descriptor_pb2, descriptor_pool\n"
        "data = Path('protos/open_inference.binpb').read_bytes()\n"
        "descriptor_pool.Default().Add(descriptor_pb2.FileDescriptorSet.FromString(data).file[0])\n"
        "import tritonclient.grpc"
    )
    assert done.returncode == 1
    assert "duplicate symbol 'inference." in done.stderr


def test_the_default_pool_stays_free_of_our_messages() -> None:
    done = run_python(
        "from google.protobuf import descriptor_pool\n"
        "import protos.open_inference\n"
        "descriptor_pool.Default().FindMessageTypeByName('inference.ModelInferRequest')"
    )
    assert 'KeyError: "Couldn\'t find message inference.ModelInferRequest"' in done.stderr


def infer_request(module: Any) -> Any:
    """A ModelInferRequest of `module` with every kind of parameter and contents."""
    request = module.ModelInferRequest(model_name="digits", model_version="3", id="\N{SNOWMAN}")
    request.parameters["flag"].bool_param = True
    request.parameters["timeout"].int64_param = -(2**63)
    request.parameters["note"].string_param = "text"
    request.parameters["ratio"].double_param = 0.1
    request.parameters["priority"].uint64_param = 2**64 - 1
    typed = request.inputs.add(name="typed", datatype="INT8", shape=[1, -1])
    typed.parameters["shared_memory_byte_size"].int64_param = 4
    typed.contents.bool_contents.append(True)
    typed.contents.int_contents.append(-(2**31))
    typed.contents.int64_contents.append(-(2**63))
    typed.contents.uint_contents.append(2**32 - 1)
    typed.contents.uint64_contents.append(2**64 - 1)
    typed.contents.fp32_contents.append(0.5)
    typed.contents.fp64_contents.append(0.1)
    typed.contents.bytes_contents.append(b"\x00\xff")
    request.outputs.add(name="probabilities").parameters["classification"].int64_param = 3
    request.raw_input_contents.append(b"\x00\x01")
    return request


def model_config(module: Any) -> Any:
    """A ModelConfig of `module` as a server of image models gives it."""
    config = module.ModelConfig(name="digits", platform="onnxruntime_onnx", backend="onnxruntime", max_batch_size=64)
    config.version_policy.latest.num_versions = 1
    config.input.add(name="image", data_type=2, format=2, dims=[1, 28, 28])
    config.output.add(name="probabilities", data_type=11, dims=[10], label_filename="labels.txt")
    config.instance_group.add(name="cpu", count=1, kind=2)
    config.dynamic_batching.preferred_batch_size.extend([8, 64])
    config.dynamic_batching.max_queue_delay_microseconds = 500
    config.dynamic_batching.priority_queue_policy[2].max_queue_size = 7
    config.parameters["threads"].string_value = "2"
    config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt").parameters["a"] = "b"
    config.optimization.cuda.output_copy_stream = True
    config.model_warmup.add(name="zeros", batch_size=1, count=2).inputs["image"].zero_data = True
    config.model_transaction_policy.decoupled = True
    config.response_cache.enable = True
    config.model_metrics.metric_control.add().histogram_options.buckets.extend([0.1, 1.0])
    config.cc_model_filenames["9.0"] = "model_sm90.onnx"
    config.metric_tags["team"] = "digits"
    return config


def model_statistics(module: Any) -> Any:
    """A ModelStatisticsResponse of `module` with every kind of duration set."""
    response = module.ModelStatisticsResponse()
    model = response.model_stats.add(name="digits", version="3", last_inference=1, inference_count=2, execution_count=3)
    names = "success fail queue compute_input compute_infer compute_output cache_hit cache_miss"
    for number, name in enumerate(names.split()):
        getattr(model.inference_stats, name).MergeFrom(module.StatisticDuration(count=number, ns=2**63 + number))
    model.batch_stats.add(batch_size=8).compute_infer.ns = 9
    model.memory_usage.add(type="GPU", id=1, byte_size=2**40)
    model.response_stats["0"].empty_response.count = 4
    return response


@pytest.mark.parametrize(
    ("fill", "theirs"),
    [(infer_request, service_pb2), (model_config, model_config_pb2), (model_statistics, service_pb2)],
    ids=["ModelInferRequest", "ModelConfig", "ModelStatisticsResponse"],
)
def test_a_message_has_the_same_bytes_as_in_tritonclient(fill: Callable[[Any], Any], theirs: Any) -> None:
    our_message, their_message = fill(pb), fill(theirs)
    our_bytes = our_message.SerializeToString(deterministic=True)
    assert our_bytes == their_message.SerializeToString(deterministic=True)
    assert type(their_message).FromString(our_bytes) == their_message
    assert type(our_message).FromString(their_message.SerializeToString()) == our_message


def test_fields_of_tritons_that_we_leave_out_survive() -> None:
    theirs = model_config_pb2.ModelConfig(name="digits")
    theirs.model_operations.op_library_filename.append("ops.so")
    ours = pb.ModelConfig.FromString(theirs.SerializeToString())
    assert model_config_pb2.ModelConfig.FromString(ours.SerializeToString()) == theirs


def test_only_one_kind_of_scheduling_is_set() -> None:
    config = pb.ModelConfig()
    config.dynamic_batching.SetInParent()
    config.ensemble_scheduling.SetInParent()
    assert config.WhichOneof("scheduling_choice") == "ensemble_scheduling"
    assert not config.HasField("dynamic_batching")


def test_what_make_protos_writes_is_checked_in(tmp_path: Path) -> None:
    (tmp_path / "protos").mkdir()
    for source in (ROOT / "protos").glob("*.proto"):
        shutil.copy(source, tmp_path / "protos")
    # The recipe itself, without the environment that it would make first.
    make = ["make", "--directory", tmp_path, "--makefile", ROOT / "Makefile", "--old-file", "setup"]
    subprocess.run([*make, "protos", f"PYTHON={sys.executable}"], check=True, capture_output=True)
    generated = {path.name: path.read_bytes() for path in (tmp_path / "protos").iterdir()}
    assert {"classifier_pb2.py", "open_inference.binpb", "open_inference_pb2.pyi"} <= set(generated)
    assert [name for name, data in generated.items() if (ROOT / "protos" / name).read_bytes() != data] == []
