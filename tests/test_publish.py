"""Publishing: a final name is complete or absent, whatever fails; what was there stays."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cogvideox_factory import publish
from cogvideox_factory.errors import StorageError
from cogvideox_factory.publish import (
    existing_parent,
    is_temporary,
    publish_file,
    publish_files,
    publish_folder,
    publish_text,
    require_room,
    sweep,
)


class Stop(Exception):
    """Something that has nothing to do with storage."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(publisher, files: dict[str, str], error: Exception | None = None) -> None:
    """Write `files` (name "" is the published file itself) within `publisher`, then fail if told to."""
    with publisher as temporary:
        for name, text in files.items():
            (temporary / name).write_text(text)
        if error is not None:
            raise error


def disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_file_appears_whole(tmp_path):
    target = tmp_path / "new" / "file.txt"
    with publish_file(target) as temporary:
        assert is_temporary(temporary)
        assert temporary.suffix == ".txt"
        temporary.write_text("half")
        assert not target.exists()
    assert target.read_text() == "half"
    assert names(target.parent) == ["file.txt"]


def test_file_replaces_in_one_step(tmp_path):
    target = tmp_path / "file"
    publish_text(target, "old")
    with pytest.raises(Stop):
        write(publish_file(target), {"": "new"}, Stop())
    assert target.read_text() == "old"
    publish_text(target, "new")
    assert target.read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_long_and_odd_names(tmp_path):
    for name in ("x" * 240 + ".mp4", "é" * 120, "-", os.fsdecode(b"\xff\xfe")):
        publish_text(tmp_path / name, "here")
        assert (tmp_path / name).read_text() == "here"


def test_disk_full_is_a_storage_error(tmp_path, monkeypatch):
    target = tmp_path / "file"
    with (
        pytest.raises(StorageError, match=r"could not write .*file: No space left.*GiB free"),
        publish_file(target),
    ):
        disk_full()
    monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(StorageError, match="No space left"):
        publish_text(target, "x")
    with pytest.raises(StorageError, match="No space left"), publish_folder(tmp_path / "folder") as temporary:
        (temporary / "a").write_text("x")
    assert names(tmp_path) == []


def test_parent_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file" / "below", tmp_path / "file" / "far" / "below"):
        with pytest.raises(StorageError, match="could not write"):
            publish_text(target, "y")
        with pytest.raises(StorageError, match="could not write"), publish_folder(target):
            pass


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "gone", "/clips/a.mp4"), ConnectionResetError("x")])
@pytest.mark.parametrize("publisher", [publish_file, publish_folder])
def test_other_failures_of_the_block_stay_what_they_are(tmp_path, error, publisher):
    """A source that cannot be read is not a target that cannot be written."""
    with pytest.raises(type(error)), publisher(tmp_path / "target"):
        raise error
    unreadable = PermissionError(errno.EACCES, "no", "/clips/a.mp4")
    with pytest.raises(PermissionError), publisher(tmp_path / "target"):
        raise unreadable
    assert names(tmp_path) == []


def test_folder_appears_whole(tmp_path):
    target = tmp_path / "deep" / "folder"
    with publish_folder(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("x")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "x"
    assert names(target.parent) == ["folder"]


def test_folder_is_never_overwritten(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(StorageError, match="exists already"), publish_folder(target):
        pass
    with pytest.raises(Stop):
        write(publish_folder(tmp_path / "other"), {"a": "x"}, Stop())
    assert names(tmp_path) == ["folder"]


def test_folder_made_by_somebody_else_meanwhile(tmp_path):
    target = tmp_path / "folder"
    publisher = publish_folder(target)
    publisher.__enter__().joinpath("a").write_text("mine")
    target.mkdir()
    (target / "a").write_text("theirs")
    with pytest.raises(StorageError, match="could not write"):
        publisher.__exit__(None, None, None)
    assert (target / "a").read_text() == "theirs"
    assert names(tmp_path) == ["folder"]


def is_old(path: Path) -> bool:
    return path.name.startswith("old")


def filled(folder: Path) -> Path:
    folder.mkdir()
    for name in ("old-1", "old-2", "keep", "config"):
        (folder / name).write_text("before")
    return folder


def test_files_replace_what_they_should(tmp_path):
    folder = filled(tmp_path / "folder")
    with publish_files(folder, replaces=is_old) as temporary:
        for name in ("config", "old-2", "new"):
            (temporary / name).write_text("after")
        assert (folder / "config").read_text() == "before"
    assert names(folder) == ["config", "keep", "new", "old-2"]
    assert {name: (folder / name).read_text() for name in names(folder)} == {
        "config": "after", "keep": "before", "new": "after", "old-2": "after",
    }  # fmt: skip


def test_files_into_a_folder_not_there_yet(tmp_path):
    with publish_files(tmp_path / "a" / "b", replaces=is_old) as temporary:
        (temporary / "x").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert names(tmp_path / "a" / "b") == ["x"]


def test_files_failing_in_the_block(tmp_path):
    folder = filled(tmp_path / "folder")
    for error, seen in ((Stop(), Stop), (OSError(errno.ENOSPC, "full"), StorageError)):
        with pytest.raises(seen):
            write(publish_files(folder, replaces=is_old), {"config": "after"}, error)
    assert names(folder) == ["config", "keep", "old-1", "old-2"]
    assert (folder / "config").read_text() == "before"


@pytest.mark.parametrize("fails_at", range(1, 6))
def test_files_failing_in_the_move(tmp_path, monkeypatch, fails_at):
    """Whichever rename fails, the folder is as it was."""
    folder, calls, replace = filled(tmp_path / "folder"), [], os.replace

    def flaky(source, destination):
        calls.append(source)
        if len(calls) == fails_at:
            disk_full()
        replace(source, destination)

    monkeypatch.setattr(os, "replace", flaky)
    with pytest.raises(StorageError):
        write(publish_files(folder, replaces=is_old), {"config": "after", "new": "after"})
    assert names(folder) == ["config", "keep", "old-1", "old-2"]
    assert {(folder / name).read_text() for name in names(folder)} == {"before"}


def test_killed_writer_leaves_only_a_temporary(tmp_path):
    """SIGKILL in the middle: the target is absent, and sweep removes the rest once the owner is gone."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom cogvideox_factory.publish import *\n"
        "root = Path(sys.argv[1])\n"
        "with publish_folder(root / 'folder') as f, publish_file(root / 'file') as t:\n"
        "    (f / 'a').write_text('x'); t.write_text('x'); print('ready', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert sweep(tmp_path) == 0  # the owner lives
        process.kill()
    left = list(tmp_path.iterdir())
    assert len(left) == 2
    assert all(is_temporary(path) for path in left)
    assert sweep(tmp_path) == 2
    assert names(tmp_path) == []


def test_sweep_leaves_others_alone(tmp_path):
    host = publish._host()
    keep = [
        f".tmp-{host}-{os.getpid()}-00-mine", ".tmp-elsewhere-1-00-theirs", f".tmp-{host}-notapid-x",
        ".tmp-odd", "plain",
    ]  # fmt: skip
    for name in keep:
        (tmp_path / name).write_text("x")
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (tmp_path / f".tmp-{host}-{int(dead.stdout)}-00-theirs").mkdir()
    assert sweep(tmp_path) == 1
    assert names(tmp_path) == sorted(keep)


def test_existing_parent(tmp_path):
    assert existing_parent(tmp_path / "a" / "b") == tmp_path
    assert existing_parent(tmp_path) == tmp_path
    assert existing_parent(Path("not-there")) == Path.cwd()


def test_require_room(tmp_path):
    require_room(tmp_path / "new", 1000, what="a cache")
    with pytest.raises(StorageError, match=r"a cache needs about 1048576\.00 GiB in .*GiB are free"):
        require_room(tmp_path, 2**50, what="a cache")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be written"):
        require_room(tmp_path / "file", 1, what="a cache")


def test_concurrent_writers_of_one_file(tmp_path):
    """The last one wins, and a reader never sees a mixture."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom cogvideox_factory.publish import publish_text\n"
        "for _ in range(50): publish_text(Path(sys.argv[1]), sys.argv[2] * 5000)\n"
    )
    target = tmp_path / "file"
    publish_text(target, "a" * 5000)
    writers = [subprocess.Popen([sys.executable, "-c", code, str(target), letter]) for letter in "ab"]
    end = time.monotonic() + 20
    while any(writer.poll() is None for writer in writers) and time.monotonic() < end:
        assert target.read_text() in ("a" * 5000, "b" * 5000)
    assert [writer.wait() for writer in writers] == [0, 0]
    assert names(tmp_path) == ["file"]
