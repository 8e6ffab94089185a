from __future__ import annotations

import errno

import pytest

from trimtab.files import cache_dir, replace_file, replace_folder


def content(folder) -> list[str]:
    """Every file and folder below, hidden ones too."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TRIMTAB_CACHE": "{}/own", "XDG_CACHE_HOME": "{}/xdg"}, "own"),
        ({"TRIMTAB_CACHE": "", "XDG_CACHE_HOME": "{}/xdg"}, "xdg/trimtab"),
        ({"TRIMTAB_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "{}"}, ".cache/trimtab"),
    ],
)
def test_cache_dir_is_made_where_the_environment_says(variables, expected, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path)) if value else monkeypatch.delenv(name, raising=False)
    assert cache_dir() == tmp_path / expected
    assert (tmp_path / expected).is_dir()


def test_replace_file_makes_folders_and_an_ordinary_file(tmp_path):
    target = tmp_path / "a" / "b.txt"
    with replace_file(target) as partial:
        partial.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o644
    assert content(tmp_path) == ["a", "a/b.txt"]


def test_replace_file_shows_the_old_content_until_the_end(tmp_path):
    target = tmp_path / "b.txt"
    target.write_text("old")
    with replace_file(target) as partial:
        partial.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert content(tmp_path) == ["b.txt"]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_failed_replace_file_leaves_what_was_there(error, tmp_path):
    target = tmp_path / "b.txt"
    target.write_text("old")
    with pytest.raises(type(error)), replace_file(target) as partial:
        partial.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert content(tmp_path) == ["b.txt"]


def test_replace_folder_appears_whole(tmp_path):
    target = tmp_path / "a" / "set"
    with replace_folder(target) as partial:
        (partial / "one").write_text("1")
        (partial / "deep").mkdir()
        assert not target.exists()
    assert content(tmp_path) == ["a", "a/set", "a/set/deep", "a/set/one"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_failed_replace_folder_leaves_nothing(error, tmp_path):
    with pytest.raises(type(error)), replace_folder(tmp_path / "set") as partial:
        (partial / "one").write_text("half")
        raise error
    assert content(tmp_path) == []


def test_the_first_of_two_finished_folders_stands(tmp_path):
    target = tmp_path / "set"
    with replace_folder(target) as slow:
        (slow / "one").write_text("slow")
        with replace_folder(target) as quick:
            (quick / "one").write_text("quick")
    assert (target / "one").read_text() == "quick"
    assert content(tmp_path) == ["set", "set/one"]


@pytest.mark.parametrize("replace", [replace_file, replace_folder])
def test_a_full_disk_is_reported_with_the_target(replace, tmp_path):
    target = tmp_path / "weights"
    with pytest.raises(OSError) as error, replace(target):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.errno == errno.ENOSPC
    assert str(target) in str(error.value) and "No space left on device" in str(error.value)
