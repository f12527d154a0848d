import pickle
from dataclasses import replace

import pytest
import torch

from trainer.checkpoint import CheckpointError, load, save


def test_what_is_saved_is_loaded(checkpoint, tmp_path):
    path = tmp_path / "deep" / "net.pt"
    save(checkpoint, path)
    restored = load(path)
    assert replace(restored, weights={}) == replace(checkpoint, weights={})
    assert all(torch.equal(restored.weights[name], tensor) for name, tensor in checkpoint.weights.items())
    image = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    assert torch.equal(restored.build()(image), checkpoint.build()(image))
    assert [entry.name for entry in path.parent.iterdir()] == ["net.pt"]


@pytest.mark.parametrize("name", ["mymodel", ".hidden", "net.pt", "net.v2.pt"])
def test_a_file_may_have_any_name(checkpoint, tmp_path, name):
    save(checkpoint, tmp_path / name)
    assert load(tmp_path / name).training == checkpoint.training
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_missing_file_says_how_to_make_it(tmp_path):
    with pytest.raises(CheckpointError, match="is missing: python -m trainer train"):
        load(tmp_path / "none.pt")


def test_a_truncated_file_is_refused(checkpoint, tmp_path):
    path = tmp_path / "net.pt"
    save(checkpoint, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
        load(path)


def test_torchs_advice_to_load_a_file_unsafely_is_not_passed_on(tmp_path):
    path = tmp_path / "net.pt"
    path.write_text("# no checkpoint\n")
    with pytest.raises(CheckpointError) as refused:
        load(path)
    assert str(refused.value) == f"{path} is damaged or not a checkpoint; `python -m trainer train` writes one"


def test_code_in_a_pickle_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(CheckpointError):
        load(path)
    torch.save({"format": "parityserve-checkpoint-2", "weights": Evil()}, path)
    with pytest.raises(CheckpointError):
        load(path)
    assert not (tmp_path / "ran").exists()


def test_another_programs_file_is_refused(tmp_path):
    path = tmp_path / "other.pt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="is not a parityserve-checkpoint-2 file; train again"):
        load(path)


def test_another_networks_weights_are_refused_by_name(checkpoint):
    with pytest.raises(
        CheckpointError, match=r"configuration is not one of this version: network: Input should be 'cnn',"
    ):
        replace(checkpoint, training=checkpoint.training | {"network": "resnet"}).build()
    with pytest.raises(CheckpointError, match="not the weights of network cnn"):
        replace(checkpoint, weights={"features.0.weight": torch.zeros(1)}).build()
    with pytest.raises(CheckpointError, match="not the weights of network custom"):
        replace(checkpoint, training=checkpoint.training | {"channels": [16, 64]}).build()
