"""Writes: the old content or the new one, whatever fails, and nothing of others."""

import os
import stat
from pathlib import Path

import pytest
import torch

from hfprune.utils.errors import ConfigError, HFPruneError, OutputError
from hfprune.utils.files import (
    FailedCheckError,
    OwnFolder,
    Stage,
    replaced_file,
    replaced_folder,
    tidy,
    write_tensors,
    write_text,
)
from tests.helpers import warm
from tests.helpers.writers import CONTENTS, FOREIGN, WRITERS, Fault, content

MOST = 200


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Writer -> what its folder holds after the first write, and after the second."""
    found = {}
    for name, write in WRITERS.items():
        folder = tmp_path_factory.mktemp(name)
        found[name] = []
        for number in CONTENTS:
            write(folder, number)
            found[name].append(content(name, folder))
    return found


def begun(name, folder):
    folder.mkdir()
    (folder / FOREIGN).write_text("mine")
    WRITERS[name](folder, CONTENTS[0])
    return folder


def stages(folder):
    return [path for path in folder.rglob(".*") if path.name.endswith(".hfprune")]


def allowed(name, expected):
    """What may be there after a fault: of writers that write two files one after another, the list alone, too."""
    old, new = expected[name]
    found = [old, new]
    if name == "own":  # the name is on the list before the file is there
        found.append({**old, f"own/{OwnFolder.LIST}": new[f"own/{OwnFolder.LIST}"]})
    return found


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "own"])  # it only hands out a path
def test_a_write_that_fails_at_any_step_loses_nothing(name, expected, tmp_path, monkeypatch):
    for step in range(1, MOST):
        folder, fault = begun(name, tmp_path / str(step)), Fault(step, kill=False)
        error = fails(name, folder, fault, monkeypatch)
        found = content(name, folder)
        if error is None:  # a folder that cannot be made may be there already
            assert found == expected[name][1], step
        else:
            assert fault.hit
            assert "No space left" in error
            assert "\n" not in error
            assert name == "settings" or found in expected[name], step  # fresh=True has removed what was there
        assert not stages(folder), step
        assert (folder / FOREIGN).read_text() == "mine"
        WRITERS[name](folder, CONTENTS[1])
        assert content(name, folder) == expected[name][1]
        if not fault.hit:
            assert step > 3
            return
    pytest.fail("the write never ended")


def fails(name, folder, fault, monkeypatch):
    """Returns what a writer says about a fault; None where it ended well."""
    with monkeypatch.context() as patch:
        fault.install(patch)
        try:
            WRITERS[name](folder, CONTENTS[1])
        except HFPruneError as error:
            return str(error)
    return None


@pytest.mark.parametrize("name", WRITERS)
def test_a_process_killed_at_any_step_of_a_write_loses_nothing(name, expected, tmp_path):
    for step in range(1, MOST):
        folder = begun(name, tmp_path / str(step))
        done = warm.run("tests.helpers.writers:main", name=name, folder=str(folder), step=step)
        assert done.returncode in (0, -9), done.stderr
        for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
            tidy(path)  # as the next run does
        if name != "settings":
            assert content(name, folder) in allowed(name, expected), step
        assert (folder / FOREIGN).read_text() == "mine"
        for path in stages(folder):  # killed before it was held
            os.utime(path, (0, 0))
        WRITERS[name](folder, CONTENTS[1])
        assert content(name, folder) == expected[name][1]
        assert not stages(folder), step
        if done.returncode == 0:
            assert step > 3
            return
    pytest.fail("the write never ended")


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "a.safetensors", {"w": torch.ones(1)})
        write_text(tmp_path / "a.txt", "a")
        with replaced_folder(tmp_path / "model") as stage:
            write_tensors(stage / "model.safetensors", {"w": torch.ones(1)})
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"a.safetensors": 0o640, "a.txt": 0o640, "model": 0o750, "model.safetensors": 0o640}


def test_a_stage_in_use_stays(tmp_path):
    with Stage(tmp_path / "a") as stage:
        os.utime(stage.folder, (0, 0))
        write_text(tmp_path / "b", "b")
        assert stage.folder.is_dir()
        stage.new.write_text("a")
        stage.publish()
    assert (tmp_path / "a").read_text() == "a"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_hidden_folder_of_others_is_no_stage(tmp_path):
    (tmp_path / ".a.b.hfprune").mkdir()
    (tmp_path / ".a.b.hfprune" / "mine").write_text("mine")
    os.utime(tmp_path / ".a.b.hfprune", (0, 0))
    write_text(tmp_path / "a", "a")
    assert (tmp_path / ".a.b.hfprune" / "mine").read_text() == "mine"


def test_a_folder_moved_aside_does_not_displace_a_new_one(tmp_path):
    stage = Stage(tmp_path / "model")
    (stage.folder / "old").mkdir()
    (stage.folder / "old" / "a").write_text("old")
    stage.new.mkdir()
    os.close(stage._handle)  # as of a process that was killed between the renames
    (tmp_path / "model").mkdir()
    tidy(tmp_path)
    assert (tmp_path / "model.recovered" / "a").read_text() == "old"
    assert not list((tmp_path / "model").iterdir())


def test_a_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "large disk")
    with replaced_folder(tmp_path / "model") as stage:
        (stage / "a").write_text("a")
    assert (tmp_path / "model").is_symlink()
    assert (tmp_path / "large disk" / "a").read_text() == "a"


def _checked(target):
    with replaced_folder(target) as stage:
        (stage / "a").write_text("a")
        raise FailedCheckError("other bits.")


def test_a_failed_check_keeps_what_was_made(tmp_path):
    for name in ("model.failed-check", "model.failed-check-2"):
        with pytest.raises(OutputError, match=f"other bits.*kept in '.*{name}'"):
            _checked(tmp_path / "model")
        assert (tmp_path / name / "a").read_text() == "a"
    assert not (tmp_path / "model").exists()


def _interrupted(target):
    with replaced_file(target) as new:
        new.write_text("new")
        raise KeyboardInterrupt


def test_an_interrupted_block_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt):
        _interrupted(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_own_folder_removes_its_own_files(tmp_path):
    own = OwnFolder(tmp_path / "state")
    own.check("state_dir")
    for name in ("a", "b"):
        own.file(name).write_text(name)
    own.check("state_dir")
    (own.path / "mine").write_text("mine")
    own.clear()
    assert [path.name for path in own.path.iterdir()] == ["mine"]
    with pytest.raises(ConfigError, match="state_dir='.*' holds files that hfprune did not write"):
        own.check("state_dir")
    own.clear()
    assert (own.path / "mine").exists()


def test_a_list_cannot_name_files_elsewhere(tmp_path):
    (tmp_path / "mine").write_text("mine")
    own = OwnFolder(tmp_path / "state")
    own.file("a").write_text("a")
    with (own.path / OwnFolder.LIST).open("a") as file:
        file.write("../mine\n..\n/etc/passwd\n")
    own.clear()
    assert (tmp_path / "mine").exists()
    assert not own.path.exists()


def test_caches_are_written_by_several_processes_at_once(tmp_path):
    first, second = Stage(tmp_path / "a"), Stage(tmp_path / "a")
    first.new.write_text("1")
    second.new.write_text("2")
    first.publish()
    first.close()
    second.publish()
    second.close()
    assert (tmp_path / "a").read_text() == "2"
    assert [path.name for path in Path(tmp_path).iterdir()] == ["a"]
