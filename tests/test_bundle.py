import json
import subprocess
import threading

import numpy as np
import pytest
from conftest import MODEL, edit_manifest, rehash

from serving import bundle as bundles
from serving.bundle import GOLDEN, MANIFEST, MANIFEST_SHA256, open_bundle
from serving.errors import BundleError

FILES = {"model.onnx", "model.pt", "weights.pt", "golden.npz", "labels.txt", "history.json", "README.md"}


def test_a_bundle_is_complete_and_describes_itself(bundle, checkpoint):
    assert {path.name for path in bundle.path.iterdir()} == FILES | {MANIFEST, MANIFEST_SHA256}
    manifest = bundle.manifest
    assert set(manifest.files) == FILES
    assert (manifest.model, manifest.version, manifest.dataset) == (MODEL, 1, "fashion-mnist")
    assert manifest.inputs[0].model_dump() == {"name": "image", "datatype": "UINT8", "shape": ("batch", 1, 28, 28)}
    assert [output.name for output in manifest.outputs] == ["logits", "probabilities"]
    assert manifest.parameters == 225_034
    assert manifest.training["seed"] == 0
    assert manifest.test_accuracy.value == checkpoint.test_accuracy
    assert manifest.test_accuracy.n == 150
    assert {"torch", "onnx", "numpy"} <= set(manifest.libraries)
    assert manifest.files["model.onnx"].parity.max_abs < 1e-4
    assert manifest.files["model.pt"].parity.n == 150 + 18
    bundle.verify()
    assert bundle.read("labels.txt").decode().splitlines() == list(manifest.labels)


def test_golden_images_are_real_and_extreme(bundle, sample):
    image, logits = bundle.golden()
    assert np.array_equal(image[:32], sample[1].images[:32].numpy())
    assert (image[32] == 0).all()
    assert (image[33] == 255).all()
    assert len(np.unique(image[34:])) == 256
    assert logits.shape == (50, 10)


@pytest.mark.parametrize("name", sorted(FILES))
def test_one_flipped_byte_is_found(tampered, name):
    version = tampered / MODEL / "1"
    content = bytearray((version / name).read_bytes())
    content[len(content) // 2] ^= 1
    (version / name).write_bytes(content)
    with pytest.raises(BundleError) as raised:
        open_bundle(version).verify()
    text = str(raised.value)
    assert name in text
    assert bundles.sha256(bytes(content)) in text
    assert open_bundle(version).manifest.files[name].sha256 in text


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_truncated_or_missing_file_is_found(tampered, name):
    version = tampered / MODEL / "1"
    content = (version / name).read_bytes()
    (version / name).write_bytes(content[:-1])
    with pytest.raises(BundleError, match=f"{name}: sha256 is .* \\({len(content) - 1} bytes\\)"):
        open_bundle(version).verify()
    (version / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: No such file"):
        open_bundle(version).verify()


def test_a_wrong_hash_in_the_manifest_is_found(tampered):
    version = tampered / MODEL / "1"
    files = json.loads((version / MANIFEST).read_text())["files"]
    files["model.onnx"]["sha256"] = "0" * 64
    edit_manifest(version, files=files)
    with pytest.raises(BundleError, match="the manifest says 0000"):
        open_bundle(version).verify()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format_version": 3}, "format_version"),
        ({"version": 2}, "describes fashion-mnist version 2, but lies in fashion-mnist/1"),
        ({"model": "mnist"}, "describes mnist version 1, but lies in fashion-mnist/1"),
        ({"labels": []}, "labels"),
        ({"files": {"../secret": {"sha256": "0" * 64, "size_bytes": 1}}}, "is not a plain file name"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_manifest_edited_by_hand_is_refused(tampered, changes, problem):
    version = tampered / MODEL / "1"
    edit_manifest(version, **changes)
    with pytest.raises(BundleError, match=problem):
        open_bundle(version)


def test_a_manifest_edited_by_hand_without_its_hash_is_refused(tampered):
    version = tampered / MODEL / "1"
    text = (version / MANIFEST).read_text()
    assert text.count('"seed": 0') == 1
    (version / MANIFEST).write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(BundleError, match=r"manifest\.json: sha256 is .* manifest\.sha256 says .* export the"):
        open_bundle(version)
    (version / MANIFEST).write_text(text)
    open_bundle(version)
    (version / MANIFEST_SHA256).unlink()
    with pytest.raises(BundleError, match=r"manifest\.sha256: No such file"):
        open_bundle(version)


def test_sha256sum_can_check_a_manifest(bundle):
    subprocess.run(["sha256sum", "--check", "--strict", MANIFEST_SHA256], cwd=bundle.path, check=True)


def test_a_version_without_a_readable_manifest_is_refused(tampered):
    version = tampered / MODEL / "1"
    text = (version / MANIFEST).read_text()
    (version / MANIFEST).write_text(text[: len(text) // 2])
    with pytest.raises(BundleError, match=r"manifest\.json: Invalid JSON"):
        open_bundle(version)
    (version / MANIFEST).unlink()
    with pytest.raises(BundleError, match="a version without its manifest is not complete"):
        open_bundle(version)


@pytest.mark.parametrize(
    "golden",
    [
        b"not a zip",
        {"image": np.zeros((4, 1, 28, 28), np.uint8)},
        {"image": np.zeros((4, 1, 28, 28), np.float32), "logits": np.zeros((4, 10), np.float32)},
        {"image": np.zeros((0, 1, 28, 28), np.uint8), "logits": np.zeros((0, 10), np.float32)},
        {"image": np.zeros((4, 1, 28, 28), np.uint8), "logits": np.zeros((3, 10), np.float32)},
    ],
    ids=["garbage", "no logits", "wrong dtype", "empty", "other lengths"],
)
def test_a_golden_file_that_does_not_fit_is_refused(tampered, golden):
    version = tampered / MODEL / "1"
    if isinstance(golden, bytes):
        (version / GOLDEN).write_bytes(golden)
    else:
        np.savez(version / GOLDEN, **golden)
    rehash(version, GOLDEN)
    with pytest.raises(BundleError, match=r"golden\.npz"):
        open_bundle(version).golden()


def test_a_backend_without_its_file_is_named(bundle):
    with pytest.raises(BundleError, match=r"has no onnx fp16 file, only: .*onnx fp32"):
        bundle.manifest.file_for("onnx", "fp16")


def test_models_and_versions(tampered):
    assert bundles.models(tampered) == [MODEL]
    assert bundles.newest(tampered / MODEL) == tampered / MODEL / "1"
    assert bundles.newest(tampered / MODEL / "1") == tampered / MODEL / "1"
    for name in ("10", "9", "01", "latest", ".draft-1"):
        (tampered / MODEL / name).mkdir()
    assert bundles.versions(tampered / MODEL) == [1, 9, 10]
    (tampered / "empty").mkdir()
    assert bundles.models(tampered) == [MODEL]
    with pytest.raises(BundleError, match="neither a version nor a model with versions"):
        bundles.newest(tampered / "empty")
    with pytest.raises(BundleError, match="make train"):
        bundles.models(tampered / "nowhere")


def test_a_version_that_a_model_lacks_is_told_with_those_it_has(tampered):
    (tampered / MODEL / "3").mkdir()
    with pytest.raises(BundleError, match=f"{MODEL} has no version 9; it has 1, 3$"):
        bundles.newest(tampered / MODEL / "9")
    for wrong in (tampered / MODEL / "3", tampered / MODEL / "latest", tampered / "empty" / "9"):
        with pytest.raises(BundleError, match="neither a version nor a model with versions"):
            bundles.newest(wrong)


def test_versions_count_up_and_drafts_disappear(bundle, tmp_path):
    def publish():
        with bundles.draft(tmp_path, MODEL) as folder:
            (folder / "labels.txt").write_text("a\n")
            return bundles.publish(folder, bundle.manifest).manifest.version

    assert [publish(), publish()] == [1, 2]
    (tmp_path / MODEL / "7").mkdir()
    assert publish() == 8
    with pytest.raises(RuntimeError), bundles.draft(tmp_path, MODEL):
        raise RuntimeError
    assert sorted(path.name for path in (tmp_path / MODEL).iterdir()) == ["1", "2", "7", "8"]


def test_two_exports_at_once_get_different_numbers(bundle, tmp_path):
    numbers, barrier = [], threading.Barrier(4)

    def export():
        with bundles.draft(tmp_path, MODEL) as folder:
            (folder / "labels.txt").write_text("a\n")
            barrier.wait()
            numbers.append(bundles.publish(folder, bundle.manifest).manifest.version)

    threads = [threading.Thread(target=export) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == [1, 2, 3, 4]
    assert all(open_bundle(tmp_path / MODEL / str(number)).manifest.version == number for number in numbers)


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a" * 200])
def test_a_models_name_must_be_a_folders(tmp_path, name):
    with pytest.raises(ValueError, match="model name"), bundles.draft(tmp_path, name):
        pass
