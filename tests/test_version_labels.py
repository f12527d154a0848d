"""Labels of versions: what gives them, and a real server that follows them."""

import json
import logging

import grpc
import pytest
import tritonclient.grpc
from conftest import MODEL, running
from test_prepared import INFER, message
from test_server import flip_byte, raw
from test_triton_client import tensor
from test_versions import GREY, states
from tritonclient.utils import InferenceServerException
from versions_load import publish

from protos import classifier_pb2_grpc
from protos import open_inference as pb
from serving import version_labels
from serving.__main__ import main
from serving.client import Client
from serving.config import ServerConfig
from serving.errors import BundleError, InvalidArgument, NotFound, StartupError, Unavailable
from serving.repository import Repository, State
from serving.version_labels import FILE, promote, read, remove
from serving.versions import VersionPolicy


@pytest.fixture
def three(root, source):
    """A repository with versions 1, 2 and 3, of which 2 is stable and 3 the canary."""
    for number in (2, 3):
        publish(source, root, number)
    promote(root, MODEL, 2, "stable")
    promote(root, MODEL, 3, "canary")
    return root


def answering(repository, version=""):
    return repository.get(MODEL, version).version


# --- the file


def test_labels_are_given_moved_and_removed(three):
    assert read(three / MODEL) == {"stable": 2, "canary": 3}
    assert promote(three, MODEL, 3, "stable") == {"stable": 3, "canary": 3}
    assert remove(three, MODEL, "canary") == read(three / MODEL) == {"stable": 3}
    assert json.loads((three / MODEL / FILE).read_text()) == {"stable": 3}
    assert {path.name for path in (three / MODEL).iterdir()} == {"1", "2", "3", FILE}  # no draft is left


def test_what_cannot_be_promoted_changes_nothing(three):
    flip_byte(three / MODEL / "1")
    before = (three / MODEL / FILE).read_bytes()
    for version, error in ((1, r"model\.onnx: sha256 is"), (9, "no version 9; it has 1, 2, 3")):
        with pytest.raises(BundleError, match=error):
            promote(three, MODEL, version, "stable")
    for label in ("", "Stable", "7", "a" * 33, "a/b"):
        with pytest.raises(ValueError, match=f"--label: got '{label}', want a to z"):
            promote(three, MODEL, 2, label)
    with pytest.raises(BundleError, match="no label blue; it has canary, stable"):
        remove(three, MODEL, "blue")
    with pytest.raises(BundleError, match=f"no model cats; it has {MODEL}"):
        promote(three, "cats", 1, "stable")
    assert (three / MODEL / FILE).read_bytes() == before


@pytest.mark.parametrize("text", ["", "[1]", '{"stable": "2"}', '{"stable": 0}', '{"Stable": 2}', '{"stable": 2'])
def test_a_damaged_file_is_told(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(BundleError, match=rf"{FILE}: .*; want {{\"label\": version, ...}}, which .* promote writes"):
        read(tmp_path)


def test_the_command_promotes(three, capsys):
    where = ["--repository", str(three)]
    for words, printed in (
        (["promote", MODEL, "3", "--label", "stable"], "canary 3\nstable 3\n"),
        (["promote", MODEL, "--label", "canary", "--remove"], "stable 3\n"),
        (["labels", MODEL], "stable 3\n"),
    ):
        assert main([*words, *where]) == 0
        assert capsys.readouterr().out == printed
    assert main(["promote", MODEL, "9", "--label", "stable", *where]) == 1
    assert "no version 9; it has 1, 2, 3" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--label", "stable"], ["3", "--label", "stable", "--remove"]])
def test_the_command_wants_a_version_or_to_remove(words, capsys):
    assert main(["promote", MODEL, *words]) == 2
    assert "give a VERSION to promote, or --remove and no VERSION" in capsys.readouterr().err


# --- which versions are served


@pytest.mark.parametrize(
    ("text", "selected"), [("latest", {1, 9}), ("labels", {1}), ("specific:3", {1, 3}), ("all", {1, 2, 3, 9})]
)
def test_what_has_a_label_is_selected(text, selected):
    assert VersionPolicy.parse(text).select([9, 1, 3, 2], [1, 7]) == selected


def test_labels_are_honoured_wherever_a_version_is_named(three, sample):
    images = sample[1].images.numpy()
    with (
        running(three, version_policy="labels") as server,
        Client(server.address) as client,
        tritonclient.grpc.InferenceServerClient(server.address) as triton,
        grpc.insecure_channel(server.address) as channel,
    ):
        assert states(server.server.repository) == {(MODEL, "2"): State.READY, (MODEL, "3"): State.READY}
        want = {"": "2", "stable": "2", "canary": "3", "3": "3"}
        infer = channel.unary_unary(INFER, response_deserializer=pb.ModelInferResponse.FromString)
        for named, number in want.items():
            assert client.predict(GREY, version=named).version == number
            (answer,) = classifier_pb2_grpc.ClassifierStub(channel).PredictStream(iter([raw(GREY, version=named)]))
            assert answer.response.version == number
            for _ in range(2):  # decoded in full, and prepared
                assert infer(message(images[:1], version=named)).model_version == number
            assert triton.is_model_ready(MODEL, named)
            assert list(triton.get_model_metadata(MODEL, named).versions) == ["2", "3"]
            assert list(triton.get_model_config(MODEL, named).config.version_policy.specific.versions) == [2, 3]
            assert {each.version for each in triton.get_inference_statistics(MODEL, named).model_stats} == (
                {"2", "3"} if named == "" else {number}
            )
        assert [(model.version, model.version_labels) for model in client.list_models()] == [
            ("2", ("stable",)),
            ("3", ("canary",)),
        ]
        told = "version should be an integral value > 0 or a label of the model: canary, stable"
        with pytest.raises(InvalidArgument, match=told):
            client.predict(GREY, version="blue")
        with pytest.raises(InferenceServerException, match=told):
            triton.infer(MODEL, [tensor("image", GREY, "UINT8")], model_version="blue")


def test_a_label_whose_version_is_not_served_is_told_and_stable_has_no_stand_in(three, caplog):
    flip_byte(three / MODEL / "2")
    (three / MODEL / FILE).write_text('{"stable": 2, "canary": 9}')
    with (
        running(three) as server,
        grpc.insecure_channel(server.address) as channel,
        Client(server.address) as client,
    ):
        assert client.predict(GREY, version="3").version == "3"
        for named in ("", "stable"):
            with pytest.raises(grpc.RpcError) as raised:
                classifier_pb2_grpc.ClassifierStub(channel).Predict(raw(GREY, version=named))
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "version 2, which the label stable means, is not at ready state; " in raised.value.details()
            assert "sha256" in raised.value.details()
        with pytest.raises(NotFound, match="version 9, which the label canary means, is not found"):
            client.predict(GREY, version="canary")
    assert f"model {MODEL}: version 9, which the label canary shall mean, is not served" in caplog.text


def test_without_labels_the_policy_says_what_to_do(root):
    with (
        pytest.raises(StartupError, match=r"labels selects none of its versions 1; .* promote"),
        running(root, version_policy="labels"),
    ):
        pass


# --- changes while the server runs


def test_promoting_and_rolling_back_follow_at_the_next_look(following, three):
    repository = following(version_policy="labels")
    assert (answering(repository), answering(repository, "canary")) == ("2", "3")
    promote(three, MODEL, 3, "stable")
    assert repository.poll()
    assert set(states(repository)) == {(MODEL, "3")}
    assert answering(repository) == answering(repository, "stable") == "3"
    promote(three, MODEL, 1, "stable")
    assert repository.poll()
    assert (answering(repository), answering(repository, "canary")) == ("1", "3")
    remove(three, MODEL, "stable")
    assert repository.poll()
    assert answering(repository) == "3"
    with pytest.raises(InvalidArgument, match=r"a label of the model: canary$"):
        repository.get(MODEL, "stable")
    assert not repository.poll()


def test_a_label_moves_only_to_a_version_that_is_ready(following, three, source, caplog):
    repository = following(version_policy="labels")
    publish(source, three, 4, flip_byte)
    (three / MODEL / FILE).write_text('{"stable": 4, "canary": 3, "blue": 4}')
    repository.poll()
    assert answering(repository, "stable") == answering(repository) == "2"
    assert not caplog.records  # it may still be loaded
    repository.poll()
    repository.poll()
    assert answering(repository, "stable") == answering(repository) == "2"
    with pytest.raises(Unavailable, match=r"version 4, which the label blue means, is not at ready state; .*sha256"):
        repository.get(MODEL, "blue")
    said = [record.getMessage() for record in caplog.records if "the label" in record.getMessage()]
    assert said == [
        f"model {MODEL}: version 4, which the label blue shall mean, is not served",
        f"model {MODEL}: version 4, which the label stable shall mean, is not served; it goes on meaning 2",
    ]
    flip_byte(three / MODEL / "4")  # back
    repository.poll()
    repository.poll()
    assert {answering(repository, named) for named in ("", "stable", "blue")} == {"4"}
    assert set(states(repository)) == {(MODEL, "3"), (MODEL, "4")}


def test_a_damaged_file_leaves_the_labels_as_they_were(following, three, caplog):
    repository = following(version_policy="labels")
    (three / MODEL / FILE).write_text('{"stable": ')
    for _ in range(3):
        assert not repository.poll()
    assert (answering(repository), answering(repository, "canary")) == ("2", "3")
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert errors[0].endswith("the labels from before stay in force")
    with pytest.raises(StartupError, match=f"{FILE}: .*EOF"), running(three):
        pass
    late = following()
    assert not late.ready()
    promoted = three / MODEL / FILE
    promoted.unlink()
    promote(three, MODEL, 1, "stable")
    assert late.poll()
    assert late.ready()
    assert (answering(late), answering(late, "3")) == ("1", "3")


def test_an_explicit_load_takes_the_labels_along(three):
    with (
        running(three, model_control="explicit", models=(MODEL,)) as server,
        Client(server.address) as client,
        tritonclient.grpc.InferenceServerClient(server.address) as control,
    ):
        promote(three, MODEL, 1, "stable")
        assert client.predict(GREY).version == "2"
        control.load_model(MODEL)
        assert [client.predict(GREY, version=named).version for named in ("", "canary")] == ["1", "3"]
        (three / MODEL / FILE).write_text("{")
        with pytest.raises(InferenceServerException, match=f"failed to load '{MODEL}', .*{FILE}.*stay in force"):
            control.load_model(MODEL)
        assert client.predict(GREY).version == "1"


def test_a_process_that_takes_over_has_the_labels_of_the_others(three):
    config = ServerConfig(repository=three, device="cpu")
    first, second = Repository(config), Repository(config)
    first.scan()
    first.load_all()
    promote(three, MODEL, 3, "stable")
    second.adopt(first.statuses(), first.labels())
    second.load_all()
    assert answering(first) == answering(second) == "2"
    for repository in (first, second):
        repository.close()


def test_the_file_is_replaced_in_one_piece(three, monkeypatch):
    monkeypatch.setattr(version_labels.os, "fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        promote(three, MODEL, 1, "stable")
    assert read(three / MODEL) == {"stable": 2, "canary": 3}
    assert not list((three / MODEL).glob(".draft-*"))
