"""What several of these tests begin from."""

import pytest


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A directory with text and a teacher; no test changes it."""
    from teacher_data import write_teacher, write_text

    folder = tmp_path_factory.mktemp("taught")
    write_teacher(folder / "teacher", write_text(folder / "text"))
    return folder
