"""Weights and training state: round trips, torn files, files of others, random state."""

import errno
import io

import pytest
import torch

from checkpointing import (
    load_newest_state,
    load_state,
    load_weights,
    save_state,
    save_weights,
    state_files,
    write_atomically,
)


def test_weights_and_config_come_back(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    save_weights(tmp_path, "thing", {"size": 3}, tensors)
    config, loaded = load_weights(tmp_path, "thing")
    assert config == {"size": 3}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"torn", "is damaged"),
        ("config.json", b"{not json", "was not written by this project"),
        ("config.json", b"[]", "was not written by this project"),
        ("config.json", b'{"format": 7, "kind": "thing", "config": {}}', "of format 7; expected 'thing' of format 1"),
    ],
)
def test_damaged_or_foreign_weights_are_refused(tmp_path, name, content, message):
    save_weights(tmp_path, "thing", {}, {"a": torch.zeros(2)})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path, "thing")


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no thing at .*: config.json is missing"):
        load_weights(tmp_path, "thing")


def test_only_the_newest_states_are_kept(tmp_path):
    for step in (5, 10, 15):
        save_state(tmp_path, step, {"value": torch.tensor(step)})
    assert [path.name for path in state_files(tmp_path)] == ["state-00000010.pt", "state-00000015.pt"]
    assert load_newest_state(tmp_path)["step"] == 15


def test_a_folder_without_state_gives_none(tmp_path):
    assert load_newest_state(tmp_path) is None


def test_what_the_machine_cannot_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch):
    for step in (1, 2):
        save_state(tmp_path, step, {"value": torch.tensor(step)})
    for error in (OSError(errno.EMFILE, "Too many open files"), MemoryError(), RuntimeError("can't allocate memory")):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "load", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
            with pytest.raises(type(error)):
                load_newest_state(tmp_path)
    assert load_newest_state(tmp_path)["step"] == 2


def test_a_run_whose_states_are_all_torn_does_not_begin_anew(tmp_path):
    for step in (1, 2):
        save_state(tmp_path, step, {"value": torch.tensor(step)}).write_bytes(b"torn")
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(ValueError, match="none of the training states"):
        load_newest_state(tmp_path)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise RuntimeError('a pickle was run')",))


def test_a_state_file_is_never_unpickled(tmp_path):
    path = tmp_path / "state-00000001.pt"
    torch.save({"format": 1, "step": 1, "bomb": Bomb()}, path)
    with pytest.raises(ValueError, match="is damaged or was not written by this project"):
        load_state(path)


@pytest.mark.parametrize("what", ["bytes", "weights", "state"])
def test_a_full_disk_is_an_oserror_and_keeps_the_old_file(tmp_path, monkeypatch, what):
    write = {
        "bytes": lambda value: write_atomically(tmp_path / "file", bytes([value]) * 100_000),
        "weights": lambda value: save_weights(tmp_path, "thing", {}, {"a": torch.full((100_000,), float(value))}),
        "state": lambda value: save_state(tmp_path, 1, {"a": torch.full((100_000,), float(value))}),
    }[what]
    write(1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(self, content, room=[50_000]):  # noqa: B006 - shared between the calls on purpose
        room[0] -= len(content)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, content)

    class FullDisk(io.FileIO):
        write = full

    real = io.FileIO.write
    monkeypatch.setattr("builtins.open", lambda path, mode: FullDisk(path, mode.replace("b", "")))
    with pytest.raises(OSError, match="No space left on device") as caught:
        write(2)
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_later_state_that_was_torn_does_not_push_out_new_ones(tmp_path):
    (tmp_path / "state-00000004.pt").write_bytes(b"torn")
    for step in (2, 3):
        save_state(tmp_path, step, {}, keep_last=1)
        assert [path.name for path in state_files(tmp_path)] == [f"state-{step:08d}.pt"]
