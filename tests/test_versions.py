"""Several versions, and the changes from one to the next: under load nothing fails, and what is bad never serves."""

import logging
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import tritonclient.grpc
from conftest import MODEL, edit_manifest, holding, running
from grpc_health.v1 import health_pb2, health_pb2_grpc
from test_server import change_one_weight, flip_byte
from test_triton_client import plain, sum_of_two, tensor
from tritonclient.utils import InferenceServerException
from versions_load import PATIENCE_S, Clients, publish

from serving.backends.engine import MAX_BUCKET
from serving.bundle import ONNX
from serving.client import Client
from serving.config import ServerConfig
from serving.errors import NotFound, StartupError, Unavailable
from serving.loading import warm
from serving.metrics import render
from serving.repository import State
from serving.tensors import TensorSpec
from serving.versions import VersionPolicy

POLL_S = 0.02
GREY = np.zeros((1, 1, 28, 28), np.uint8)


def until(condition):
    """Wait for what another thread brings about."""
    deadline = time.monotonic() + PATIENCE_S
    while not (result := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return result


def states(repository):
    return {(status.name, status.version): status.state for status in repository.statuses()}


def truncate_manifest(version):
    text = (version / "manifest.json").read_text()
    (version / "manifest.json").write_text(text[: len(text) // 2])


# --- policies


@pytest.mark.parametrize(
    ("text", "selected"),
    [
        ("latest", {9}),
        ("latest:2", {3, 9}),
        ("latest:9", {1, 2, 3, 9}),
        ("all", {1, 2, 3, 9}),
        ("specific:3", {3}),
        ("specific:4,2,9,2", {2, 9}),
    ],
)
def test_a_policy_selects(text, selected):
    assert VersionPolicy.parse(text).select([9, 1, 3, 2]) == selected
    assert VersionPolicy.parse(text).select([]) == set()
    assert ServerConfig(version_policy=text).version_policy == text


@pytest.mark.parametrize("text", ["", "newest", "latest:0", "latest:", "specific:", "specific:1,", "all:1", "labels:1"])
def test_what_is_no_policy_is_refused(text):
    with pytest.raises(ValueError, match=r"want latest, latest:N, all, labels or specific:N,N"):
        ServerConfig(version_policy=text)


def test_several_versions_are_served_and_told_of(root, source):
    for number in (2, 3, 10):
        publish(source, root, number)
    with (
        running(root, version_policy="specific:1,3,10,11") as server,
        tritonclient.grpc.InferenceServerClient(server.address) as triton,
        Client(server.address) as client,
    ):
        assert client.predict(GREY).version == "10"
        for version in ("1", "3", "10", "03"):
            assert client.predict(GREY, version=version).version == version.lstrip("0")
        with pytest.raises(NotFound, match=f"'{MODEL}' version 2 is not found; .*: {MODEL} version 1, 3, 10$"):
            client.predict(GREY, version="2")
        assert list(triton.get_model_metadata(MODEL).versions) == ["1", "3", "10"]
        policy = triton.get_model_config(MODEL).config.version_policy
        assert list(policy.specific.versions) == [1, 3, 10, 11]
        assert [triton.is_model_ready(MODEL, str(number)) for number in (1, 2, 3, 10)] == [True, False, True, True]
        index = triton.get_model_repository_index().models
        listed = [(MODEL, version, "READY") for version in ("1", "3", "10")]
        assert [(entry.name, entry.version, entry.state) for entry in index] == listed
        assert [(model.name, model.version, model.state) for model in client.list_models()] == listed
        counted = {entry.version: entry.inference_count for entry in triton.get_inference_statistics(MODEL).model_stats}
        assert counted == {"1": 1, "3": 2, "10": 2}
        (one,) = triton.get_inference_statistics(MODEL, "3").model_stats
        assert (one.version, one.inference_count) == ("3", 2)


@pytest.mark.parametrize(
    ("text", "field", "count"), [("latest", "latest", 1), ("latest:2", "latest", 2), ("all", "all", None)]
)
def test_the_configuration_tells_the_policy(root, text, field, count):
    with (
        running(root, version_policy=text) as server,
        tritonclient.grpc.InferenceServerClient(server.address) as client,
    ):
        policy = client.get_model_config(MODEL).config.version_policy
    assert policy.WhichOneof("policy_choice") == field
    if count:
        assert policy.latest.num_versions == count


def test_a_policy_that_selects_nothing_says_so(root):
    wanted = "--version-policy specific:7,8 selects none of its versions 1"
    with pytest.raises(StartupError, match=wanted), running(root, version_policy="specific:7,8"):
        pass
    with (
        running(root, version_policy="specific:7,8", model_control="explicit") as server,
        tritonclient.grpc.InferenceServerClient(server.address) as client,
        pytest.raises(InferenceServerException, match=f"failed to load '{MODEL}', {wanted}"),
    ):
        client.load_model(MODEL)


def test_of_several_versions_one_that_fails_leaves_the_others_served(root, source):
    publish(source, root, 2, flip_byte)
    with running(root, version_policy="all") as server, Client(server.address) as client:
        assert states(server.server.repository) == {(MODEL, "1"): State.READY, (MODEL, "2"): State.UNAVAILABLE}
        assert client.predict(GREY).version == "1"
        with pytest.raises(Unavailable, match=r"version 2 is not at ready state; .*sha256"):
            client.predict(GREY, version="2")
        assert not server.server.repository.ready()


# --- swaps under load


def test_twenty_explicit_reloads_lose_no_request_and_mix_no_versions(root, source, bundle):
    with (
        running(root, model_control="explicit", models=(MODEL,)) as server,
        tritonclient.grpc.InferenceServerClient(server.address) as control,
        Clients(server.address, bundle) as clients,
    ):
        for number in range(2, 22):
            publish(source, root, number)
            control.load_model(MODEL)
            clients.wait_for(number)
            assert states(server.server.repository) == {(MODEL, str(number)): State.READY}
    assert not clients.failures
    assert set(clients.answered) >= {str(number) for number in range(2, 22)}


def test_twenty_versions_that_appear_and_go_lose_no_request_and_mix_no_versions(root, source, bundle):
    with (
        running(root, model_control="poll", poll_s=POLL_S) as server,
        Clients(server.address, bundle) as clients,
    ):
        for number in range(2, 22):
            publish(source, root, number)
            clients.wait_for(number)
            shutil.rmtree(root / MODEL / str(number - 1))
        until(lambda: states(server.server.repository) == {(MODEL, "21"): State.READY})
    assert not clients.failures


def test_the_clients_notice_an_answer_of_another_version_than_it_says(root, source, bundle):
    publish(source, root, 2).rename(root / MODEL / "3")
    edit_manifest(root / MODEL / "3", version=3)
    with running(root) as server, Clients(server.address, bundle) as clients:
        until(lambda: clients.failures)
    assert clients.failures[0].startswith("version 3 answered")


@pytest.mark.parametrize("control", ["explicit", "poll"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_byte, "model.onnx: sha256 is"),
        (change_one_weight, "are not the trained model's"),
        (truncate_manifest, "manifest.json: "),
    ],
)
def test_a_bad_version_under_load_never_serves_and_is_told_of(root, source, bundle, caplog, control, damage, reason):
    with (
        running(root, model_control=control, models=(MODEL,), poll_s=POLL_S) as server,
        tritonclient.grpc.InferenceServerClient(server.address) as client,
        Clients(server.address, bundle) as clients,
    ):
        clients.wait_for(1)
        publish(source, root, 2, damage)
        if control == "explicit":
            with pytest.raises(InferenceServerException, match=f"failed to load '{MODEL}', .*{reason}"):
                client.load_model(MODEL)
        bad = (MODEL, "2", "UNAVAILABLE")
        index = until(
            lambda: [
                entry
                for entry in client.get_model_repository_index().models
                if (entry.name, entry.version, entry.state) == bad
            ]
        )
        assert reason in index[0].reason
        clients.wait_for(1, answers=50)
        assert [entry.state for entry in client.get_model_repository_index().models] == ["READY", "UNAVAILABLE"]
        assert client.is_server_ready()
        (failed,) = (status for status in server.server.repository.statuses() if status.version == "2")
        assert (failed.state, failed.served) == (State.UNAVAILABLE, None)
        assert reason in failed.reason
        metrics = render(server.server.snapshot())[0].decode()
        assert re.search(rf'^parityserve_model_load_failed{{model="{MODEL}",reason=".*",version="2"}} 1', metrics, re.M)
        assert f'parityserve_model_ready{{model="{MODEL}",version="1"}} 1' in metrics
        # Once: what did not change is not tried again.
        logged = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert [record.args[:2] for record in logged] == [(MODEL, "2")]
        assert reason in logged[0].getMessage()
    assert not clients.failures
    assert set(clients.answered) == {"1"}


def test_a_bad_version_that_is_mended_is_served(root, source, bundle):
    with running(root, model_control="poll", poll_s=POLL_S) as server, Clients(server.address, bundle) as clients:
        version = publish(source, root, 2, lambda version: flip_byte(version))
        until(lambda: states(server.server.repository).get((MODEL, "2")) is State.UNAVAILABLE)
        flip_byte(version)  # back
        clients.wait_for(2)
        publish(source, root, 3, flip_byte)
        shutil.rmtree(version)  # the newest that is good is 1, again
        clients.wait_for(1)
    assert not clients.failures


@pytest.fixture
def held(root, monkeypatch):
    """A server whose model runs only while it is let go, and that backend."""
    with holding(root, monkeypatch, model_control="explicit", models=(MODEL,), max_queue=4) as both:
        yield both


def test_an_unloaded_model_answers_what_waits_and_nothing_new(held):
    server, backend = held
    with (
        Client(server.address) as client,
        tritonclient.grpc.InferenceServerClient(server.address) as control,
        ThreadPoolExecutor(9) as pool,
    ):
        asked = [pool.submit(client.predict, GREY) for _ in range(8)]
        until(lambda: sum(answer.done() for answer in asked) == 4)  # refused, because the others fill the queue
        waiting = [answer for answer in asked if not answer.done()]
        repository = server.server.repository
        unloading = pool.submit(control.unload_model, MODEL)
        until(lambda: states(repository) == {(MODEL, "1"): State.UNLOADING})
        assert [entry.state for entry in control.get_model_repository_index().models] == ["UNLOADING"]
        assert [model.state for model in client.list_models()] == ["UNLOADING"]
        assert not control.is_model_ready(MODEL)
        with pytest.raises(InferenceServerException, match="version 1 is not at ready state; it is being unloaded"):
            control.infer(MODEL, [tensor("image", GREY, "UINT8")])
        assert not unloading.done()
        backend.released.set()
        assert [len(answer.result().predictions) for answer in waiting] == [1] * 4
        unloading.result()
        (entry,) = control.get_model_repository_index().models
        assert (entry.state, entry.reason) == ("UNAVAILABLE", "unloaded")


# --- following the folder


def test_a_new_version_is_loaded_at_the_second_look(following, root, source):
    repository = following()
    assert not repository.poll()
    publish(source, root, 2)
    assert not repository.poll()
    assert repository.poll()
    assert states(repository) == {(MODEL, "2"): State.READY}
    assert not repository.poll()


def test_half_a_copy_is_left_alone(following, root, source, caplog):
    repository = following()
    copy = root / MODEL / "2"
    whole = publish(source, root, 3).rename(root / MODEL / ".whole")
    edit_manifest(whole, version=2)
    copy.mkdir()
    names = sorted(path.name for path in whole.iterdir() if path.name != "manifest.json")
    for name in (*names, "manifest.json"):
        content = (whole / name).read_bytes()
        for part in (content[: len(content) // 2], content):
            (copy / name).write_bytes(part)
            assert not repository.poll()  # it has changed since the last look
    assert repository.poll()
    assert states(repository) == {(MODEL, "2"): State.READY}
    assert not [record for record in caplog.records if record.levelno == logging.ERROR]


def test_a_version_without_a_manifest_is_left_alone_and_said_once(following, root, caplog):
    (root / MODEL / "2").mkdir()
    repository = following()
    for _ in range(5):
        assert not repository.poll()
    assert states(repository) == {(MODEL, "1"): State.READY}
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        f"model {MODEL} version 2 is not loaded: it has no manifest.json"
    ]


def test_a_plain_model_is_loaded_once_its_size_is_stable(following, root):
    repository = following(allow_unverified=True)
    plain(root / "whole" / "1", [sum_of_two()])
    content = (root / "whole" / "1" / ONNX).read_bytes()
    shutil.rmtree(root / "whole")
    (root / "sum" / "1").mkdir(parents=True)
    for size in (100, 200, len(content)):
        (root / "sum" / "1" / ONNX).write_bytes(content[:size])
        assert not repository.poll()
    assert repository.poll()
    assert repository.get("sum").golden is None


def test_models_and_versions_come_and_go(following, root, source):
    repository = following(version_policy="latest:2")
    publish(source, root, 2)
    publish(source, root, 3)
    repository.poll()
    repository.poll()
    assert set(states(repository)) == {(MODEL, "2"), (MODEL, "3")}
    shutil.rmtree(root / MODEL / "3")
    assert repository.poll()
    assert set(states(repository)) == {(MODEL, "1"), (MODEL, "2")}  # 1 is among the newest two again
    shutil.copytree(root / MODEL / "1", root / "other" / "1")
    edit_manifest(root / "other" / "1", model="other")
    repository.poll()
    assert repository.poll()
    assert repository.get("other").version == "1"
    shutil.rmtree(root / MODEL)
    assert repository.poll()
    assert set(states(repository)) == {("other", "1")}
    with pytest.raises(NotFound, match=f"unknown model: '{MODEL}' is not found; this server has: other"):
        repository.get(MODEL)
    assert repository.ready()
    assert repository.only_model() == "other"


def test_the_last_version_that_answers_is_kept_while_its_successor_fails(following, root, source):
    repository = following()
    publish(source, root, 2, flip_byte)
    shutil.rmtree(root / MODEL / "1")
    repository.poll()
    repository.poll()
    assert states(repository) == {(MODEL, "1"): State.READY, (MODEL, "2"): State.UNAVAILABLE}
    assert repository.ready()
    publish(source, root, 3)
    repository.poll()
    repository.poll()
    assert states(repository) == {(MODEL, "2"): State.UNAVAILABLE, (MODEL, "3"): State.READY}
    shutil.rmtree(root / MODEL)
    assert repository.poll()
    assert not repository.statuses()


def test_at_the_start_too_the_newest_version_that_passes_is_served(following, root, source):
    publish(source, root, 2, flip_byte)
    repository = following()
    assert states(repository) == {(MODEL, "1"): State.READY, (MODEL, "2"): State.UNAVAILABLE}
    assert repository.ready()


def test_a_bad_model_that_comes_later_changes_nothing_for_the_others(following, root, source):
    repository = following()
    shutil.copytree(root / MODEL / "1", root / "bad" / "1")  # its manifest says another name
    repository.poll()
    assert repository.poll()
    assert states(repository)["bad", "1"] is State.UNAVAILABLE
    assert repository.ready()
    assert repository.only_model() == MODEL


def test_changed_files_of_a_served_version_are_checked_again(following, root):
    repository = following()
    version = root / MODEL / "1"
    before = repository.get(MODEL)
    flip_byte(version)
    repository.poll()
    assert repository.poll()
    (status,) = repository.statuses()
    assert (status.state, status.served) == (State.READY, before)
    assert "model.onnx: sha256 is" in status.reason
    flip_byte(version)  # back
    repository.poll()
    assert repository.poll()
    (status,) = repository.statuses()
    assert (status.state, status.reason) == (State.READY, "")
    assert status.served is not before


def test_a_folder_that_cannot_be_read_changes_nothing(following, root, caplog):
    repository = following()
    moved = root.rename(root.with_name("moved"))
    for _ in range(3):
        assert not repository.poll()
    assert list(states(repository).values()) == [State.READY]
    assert [record.levelno for record in caplog.records].count(logging.WARNING) == 1
    assert repository.index() == repository.statuses()
    moved.rename(root)
    assert not repository.poll()
    assert repository.get(MODEL).version == "1"


def test_a_server_may_start_with_an_empty_folder_and_fill_up(root, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with (
        running(empty, model_control="poll", poll_s=POLL_S) as server,
        tritonclient.grpc.InferenceServerClient(server.address) as client,
        grpc.insecure_channel(server.address) as channel,
    ):
        assert client.is_server_ready()
        shutil.copytree(root / MODEL, tmp_path / "copy")
        check = health_pb2_grpc.HealthStub(channel).Check
        request = health_pb2.HealthCheckRequest(service=MODEL)

        def health():
            try:
                return check(request).status
            except grpc.RpcError as error:  # not told of the model yet
                return error.code()

        assert health() is grpc.StatusCode.NOT_FOUND
        (tmp_path / "copy").rename(empty / MODEL)
        until(lambda: client.is_model_ready(MODEL))
        until(lambda: health() == health_pb2.HealthCheckResponse.SERVING)
        shutil.rmtree(empty / MODEL)
        until(lambda: health() == health_pb2.HealthCheckResponse.NOT_SERVING)
        assert not client.is_model_ready(MODEL)
        with pytest.raises(InferenceServerException, match="load / unload is not allowed if polling is enabled"):
            client.load_model(MODEL)


# --- links


@pytest.mark.parametrize("what", ["model", "version", "file"])
def test_a_link_that_leads_out_of_the_repository_is_refused(root, source, tmp_path, what):
    version = root / MODEL / "1"
    outside = tmp_path / "outside" / MODEL / "1"
    shutil.copytree(version, outside)
    link, target = {
        "model": (version.parent, outside.parent),
        "version": (version, outside),
        "file": (version / ONNX, outside / ONNX),
    }[what]
    shutil.rmtree(link) if link.is_dir() else link.unlink()
    link.symlink_to(target)
    refusal = r"leads to .*outside.*, outside the repository .*; put a copy inside"
    with pytest.raises(StartupError, match=refusal), running(root):
        pass


def test_links_inside_the_repository_are_followed(root, source):
    stored = publish(source, root, 2).rename(root / ".store-of-two")
    (root / MODEL / "2").symlink_to(os.path.relpath(stored, root / MODEL))
    (root / "alias").symlink_to(MODEL)
    with running(root) as server, Client(server.address) as client:
        for name in (MODEL, "alias"):
            answer = client.predict(GREY, model=name)
            assert (answer.model, answer.version) == (name, "2")


# --- warming


class Recorder:
    """A backend that notes which batch sizes it runs."""

    name, provider = "onnx", "CUDAExecutionProvider"

    def __init__(self, device="cuda:0", shape=("batch", 1, 28, 28), datatype="UINT8", refuses=()):
        self.device = device
        self.inputs = (TensorSpec(name="image", datatype=datatype, shape=shape),)
        self.outputs = (TensorSpec(name="logits", datatype="FP32", shape=("batch", 10)),)
        self.sizes = []
        self._refuses = refuses

    def run(self, inputs):
        image = inputs["image"]
        assert image.dtype == self.inputs[0].dtype
        assert self.inputs[0].accepts(image.shape)
        if len(image) in self._refuses:
            raise RuntimeError("too many rows")
        self.sizes.append(len(image))
        return {"logits": np.zeros((len(image), 10), np.float32)}


@pytest.mark.parametrize(
    ("max_batch_size", "buckets"),
    [(1, (1,)), (5, (1, 2, 4, 5)), (64, (1, 2, 4, 8, 16, 32, 64)), (1024, (1, 2, 4, 8, 16, 32, 64))],
)
def test_on_a_gpu_the_sizes_that_batches_are_padded_to_are_warmed(max_batch_size, buckets):
    backend = Recorder()
    assert warm(backend, max_batch_size) == buckets
    assert buckets[-1] <= MAX_BUCKET
    assert sorted(set(backend.sizes)) == list(buckets)


@pytest.mark.parametrize(
    ("backend", "max_batch_size"),
    [
        (Recorder(device="cpu"), 64),
        (Recorder(), 0),
        (Recorder(shape=("batch", "any")), 64),
        (Recorder(datatype="BYTES"), 64),
    ],
)
def test_nothing_is_padded_where_that_is_no_use_or_cannot_be(backend, max_batch_size):
    assert warm(backend, max_batch_size) == ()
    assert not backend.sizes


def test_a_model_that_cannot_run_rows_of_zeros_is_not_padded(caplog):
    assert warm(Recorder(refuses=(8,)), 64) == ()
    assert "cannot run 8 rows of zeros: too many rows" in caplog.text


def test_on_the_cpu_nothing_is_padded(following):
    assert following().get(MODEL).buckets == ()
