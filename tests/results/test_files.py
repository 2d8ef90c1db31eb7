"""Writing a file as a whole or not at all."""

import pytest

from attnbench import AttnbenchError
from attnbench.results.files import atomically


def test_the_file_appears_whole_with_its_folder(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    with atomically(path) as draft:
        draft.write_text("whole")
        assert draft.suffix == ".txt"  # writers choose a format by it
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_reader_of_the_old_file_never_sees_a_mixture(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old content")
    with path.open() as reader:
        with atomically(path) as draft:
            draft.write_text("new")
        assert reader.read() == "old content"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_an_error_leaves_everything_as_it_was(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail_half_way():
        with atomically(path) as draft:
            draft.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(AttnbenchError, match="cannot be written: File exists; nothing was changed"),
        atomically(tmp_path / "file" / "below.txt") as draft,
    ):
        draft.write_text("never")
