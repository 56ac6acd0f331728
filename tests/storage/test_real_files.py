"""What stands where a file was meant is named before a parser is asked."""

import os

import pytest

from dmd_jax.errors import UserError
from dmd_jax.storage.real_files import check_real_file

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12\n".encode()


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "is empty"),
        (POINTER, "is a Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html>", "is an HTML page"),
        (b"\xef\xbb\xbf\r\n<HTML lang=en>", "is an HTML page"),
    ],
)
def test_what_stands_for_a_file_is_named(tmp_path, content, said):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match=f"a: {said}.*; expected weights"):
        check_real_file(tmp_path / "a", "weights")


@pytest.mark.parametrize("content", [b"version 1", b"<htm", b"\0", b"{}"])
def test_other_content_is_left_to_its_reader(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    check_real_file(tmp_path / "a", "weights")


def test_an_empty_list_may_be_empty(tmp_path):
    (tmp_path / "a").touch()
    check_real_file(tmp_path / "a", "prompts", may_be_empty=True)


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("../blobs/0123")
    (tmp_path / "circle").symlink_to("circle")
    for name, said in (
        ("pipe", "a pipe, socket or device"),
        ("link", r"link to '\.\./blobs/0123', which is not there"),
        ("circle", "link"),
        ("missing", "no such file"),
        (".", "folder"),
    ):
        with pytest.raises(UserError, match=said):
            check_real_file(tmp_path / name, "weights")
