"""Files that are written whole or not at all, and that say which format they have."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from unclip_pl.errors import InputError
from unclip_pl.files import (
    alone,
    is_checkpoint,
    read_checkpoint,
    read_tensors,
    replacing,
    write_checkpoint,
    write_json,
    write_tensors,
)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def break_off() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of the ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        break_off()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with replacing(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    for path in (tmp_path, Path(os.devnull)):
        with pytest.raises(InputError, match="which is none: name another file"), replacing(path):
            pass


def _count_up(path: Path, times: int) -> None:
    for _ in range(times):
        with alone(path.with_suffix(".lock")):
            number = int(path.read_text())
            time.sleep(0.0005)
            path.write_text(str(number + 1))


def test_two_writers_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "number"
    path.write_text("0")
    processes = [multiprocessing.get_context("fork").Process(target=_count_up, args=(path, 50)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert path.read_text() == "150"
    assert list(tmp_path.iterdir()) == [path]


def _die_writing(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_who_writes_after_a_kill_leaves_nothing_of_it(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_die_writing, args=(tmp_path / "file",))
    process.start()
    process.join()
    assert not (tmp_path / "file").exists()
    write_json(tmp_path / "file", {"whole": True})
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_lock_that_is_held_is_said_at_once(tmp_path: Path) -> None:
    with (
        alone(tmp_path / "lock"),
        pytest.raises(BlockingIOError, match="another process"),
        alone(tmp_path / "lock", wait=False),
    ):
        pass
    with alone(tmp_path / "lock", wait=False):
        pass


def test_a_checkpoint_as_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    checkpoint = {
        "state_dict": {"net.weight": torch.randn(3, 2), "count": torch.tensor(4)},
        "posterior_mse": torch.rand(5),
        "hyper_parameters": {"net": {"class_path": "a.B", "init_args": {"width": 8}}},
        "global_step": 7,
    }
    write_checkpoint(path, checkpoint)
    found = read_checkpoint(path)
    assert is_checkpoint(path)
    for name in ("hyper_parameters", "global_step"):
        assert found[name] == checkpoint[name]
    assert torch.equal(found["posterior_mse"], checkpoint["posterior_mse"])
    assert found["state_dict"].keys() == checkpoint["state_dict"].keys()
    for name, value in checkpoint["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value)


def test_halves_are_read_as_float32(tmp_path: Path) -> None:
    write_tensors(tmp_path / "codec.safetensors", {"mean": torch.ones(3).half()})
    found = read_tensors(tmp_path / "codec.safetensors", ["mean"], what="codec", command="unclip codec")
    assert found.tensors["mean"].dtype == torch.float32
    assert not is_checkpoint(tmp_path / "codec.safetensors")


def test_an_unknown_format_is_said_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "codec.safetensors"
    write_tensors(path, {"mean": torch.ones(3)}, {"format": "9"})
    with pytest.raises(InputError, match=r"codec\.safetensors in format '1'. Got '9': install the version"):
        read_tensors(path, ["mean"], what="codec", command="unclip codec")
    write_tensors(path, {"mean": torch.ones(3)}, {"format": "9", "checkpoint": "{}"})
    with pytest.raises(InputError, match="Got '9'"):
        read_checkpoint(path)


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    path = tmp_path / "codec.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(InputError, match="git lfs pull"):
        read_tensors(path, ["x"], what="codec", command="unclip codec")
    with pytest.raises(InputError, match="git lfs pull"):
        read_checkpoint(path)
