"""Shared files are whole or absent, and one process of several writes them."""

import multiprocessing
import os
import time

import pytest

from data.files import atomic_file, built_once


def test_a_file_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "sub" / "x"
    with atomic_file(path) as file:
        file.write(b"old")

    def fail():
        with atomic_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["x"]


def test_a_folder_that_fails_is_built_again(tmp_path):
    def fail(new):
        (new / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        built_once(tmp_path / "x", fail)
    assert os.listdir(tmp_path) == ["x.lock"]
    built_once(tmp_path / "x", lambda new: (new / "whole").touch())
    assert os.listdir(tmp_path / "x") == ["whole"]
    built_once(tmp_path / "x", lambda new: pytest.fail("built twice"))


def _build(folder, log):
    def build(new):
        with open(log, "a") as file:
            file.write("built\n")
        time.sleep(0.3)
        (new / "whole").touch()

    assert (built_once(folder, build) / "whole").exists()


def test_one_of_several_processes_builds(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    arguments = (tmp_path / "x", tmp_path / "log")
    processes = [spawn.Process(target=_build, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text() == "built\n"
