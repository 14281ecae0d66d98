from collections.abc import Callable
from pathlib import Path

import pytest

from unclip_pl.data.shards import Shard, list_shards

NAMES = [f"train-{i:02d}.tar" for i in range(8, 12)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate([*NAMES, "notes.txt"]):
        (tmp_path / name).write_bytes(bytes([number]) * (10 + number))
    return tmp_path


@pytest.fixture
def server(folder: Path, served: Callable[[Path], str]) -> str:
    return served(folder)


@pytest.fixture
def memory(folder: Path, shelved: Callable[..., str]) -> str:
    return shelved(folder)


def found(source: str) -> list[str]:
    return [shard.name for shard in list_shards(source)]


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_sources_are_folders_globs_ranges_and_files(folder: Path, prefix: str) -> None:
    at = f"{prefix}{folder}"
    assert found(at) == found(f"{at}/") == found(f"{at}/*.tar") == found(f"{at}/train-{{08..11}}.tar") == NAMES
    assert found(f"{at}/train-1?.tar") == NAMES[2:]
    assert found(f"{at}/train-09.tar") == [NAMES[1]]
    with pytest.raises(FileNotFoundError, match=r"train-12.tar does not exist"):
        found(f"{at}/train-{{08..12}}.tar")
    with pytest.raises(FileNotFoundError, match="unclip pack"):
        found(f"{at}/val*.tar")


@pytest.mark.parametrize("where", ["memory", "server"])
def test_remote_sources_are_too(where: str, folder: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    at = request.getfixturevalue(where)
    assert found(at) == found(f"{at}/*.tar") == found(f"{at}/train-{{08..11}}.tar") == NAMES
    (shard,) = list_shards(f"{at}/train-09.tar")
    assert shard.remote
    assert shard.stamp().size == 11
    assert shard.stamp().mark
    assert shard.stamp() == shard.stamp()
    with shard.fetched(tmp_path / "incoming") as copy:
        assert (copy.name, copy.read_bytes()) == ("train-09.tar", bytes([1]) * 11)
    assert not (tmp_path / "incoming").exists()
    missing = Shard(f"{at}/train-12.tar")
    with pytest.raises(FileNotFoundError, match=r"train-12.tar does not exist"), missing.fetched(tmp_path / "incoming"):
        pass
    assert not (tmp_path / "incoming").exists()
    with pytest.raises(ValueError, match=r"local shards.*train-09"):
        _ = shard.path


def test_parts_of_a_shard(folder: Path, memory: str, server: str) -> None:
    for address in (str(folder / NAMES[2]), f"{memory}/{NAMES[2]}"):
        assert Shard(address).read([(1, 3), (0, 0), (10, 2)]) == [b"\2\2\2", b"", b"\2\2"]
        with pytest.raises(ValueError, match="cut short"):
            Shard(address).read([(10, 3)])
    with pytest.raises(ValueError, match="whole files only"):  # Python's own server knows no ranges
        Shard(f"{server}/{NAMES[2]}").read([(1, 3)])


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9/a.tar cannot be read"):
        Shard("http://127.0.0.1:9/a.tar").stamp()
    with pytest.raises(ValueError, match=r"nosuch://x/a.tar cannot be read"):
        Shard("nosuch://x/a.tar").stamp()


def test_a_query_is_no_part_of_the_name() -> None:
    assert Shard("https://example.org/a/train-0.tar?key=1/2.tar").name == "train-0.tar"
    assert found("https://example.org/train-{0..2}.tar?key=1") == ["train-0.tar", "train-1.tar", "train-2.tar"]


def test_two_shards_of_one_name_are_an_error(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.tar").touch()
    with pytest.raises(ValueError, match="different names"):
        list_shards(f"{tmp_path}/*/x.tar")


def test_a_path_that_exists_is_no_pattern(tmp_path: Path) -> None:
    """Brackets and braces in names of folders and files; a pattern begins after the last folder that exists."""
    folder = tmp_path / "[2024] photos {0..1}"
    folder.mkdir()
    for name in ["train-000.tar", "train-001.tar", "all [1].tar"]:
        (folder / name).touch()
    names = ["train-000.tar", "train-001.tar"]
    assert found(str(folder)) == ["all [1].tar", *names]
    for pattern in ("train-*.tar", "train-{000..001}.tar", "train-00[01].tar"):
        assert found(str(folder / pattern)) == found(f"file://{folder / pattern}") == names
    assert found(str(folder / "all [1]*.tar")) == ["all [1].tar"]
    for name in ("train-000.tar", "all [1].tar"):
        assert found(str(folder / name)) == [name]
    (tmp_path / "part-{0..1}").mkdir()
    assert found(f"{tmp_path}/[[]2024*/train-*.tar") == names
    with pytest.raises(FileNotFoundError, match=r"train-002.tar does not exist"):
        found(str(folder / "train-{000..002}.tar"))


def test_brackets_in_remote_folders(tmp_path: Path, shelved: Callable[..., str]) -> None:
    for name in NAMES:
        (tmp_path / name).touch()
    at = f"{shelved(tmp_path, '[2024] photos')}"
    assert found(at) == found(f"{at}/train-*.tar") == found(f"{at}/train-{{08..11}}.tar") == NAMES
    assert found(f"{at}/train-09.tar") == [NAMES[1]]


@pytest.mark.parametrize("where", ["local", "remote"])
def test_hidden_files_are_no_shards(where: str, tmp_path: Path, shelved: Callable[..., str]) -> None:
    """A Mac leaves ._train-000.tar on disks that are not its own."""
    for name in ("train-000.tar", "._train-000.tar", ".train-000.tar.tmp"):
        (tmp_path / name).touch()
    at = shelved(tmp_path) if where == "remote" else str(tmp_path)
    assert found(at) == found(f"{at}/*.tar") == found(f"{at}/*") == ["train-000.tar"]


@pytest.mark.parametrize("where", ["local", "remote"])
def test_compressed_tars_are_named(
    where: str, tmp_path: Path, shelved: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    packed = ["a.tar.gz", "b.tgz", "c.tar.zst", "d.TAR.BZ2", "e.zip"]
    for name in packed:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"uncompressed tars .*a\.tar\.gz, b\.tgz.*unpack them"):
        found(shelved(tmp_path) if where == "remote" else str(tmp_path))
    for name in ("train-000.tar", "train-001.TAR", "notes.txt"):
        (tmp_path / name).touch()
    at = shelved(tmp_path) if where == "remote" else str(tmp_path)
    assert found(at) == found(f"{at}/*") == ["train-000.tar", "train-001.TAR"]
    if where == "remote":
        with pytest.raises(ValueError, match=r"uncompressed tars .*a\.tar\.gz"):
            found(f"{at}/a.tar.gz")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2  # one line for each source, however often it is listed
    assert all(name in said[0] for name in sorted(packed)[:5])
    found(at)
    assert len(caplog.records) == 2


def test_a_part_that_cannot_be_read_names_the_shard(memory: str) -> None:
    """fsspec hands errors back among the answers."""
    with pytest.raises(FileNotFoundError, match=r"train-12.tar does not exist"):
        Shard(f"{memory}/train-12.tar").read([(1, 3)])
