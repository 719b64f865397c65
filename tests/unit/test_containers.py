"""The container definitions: what they copy and call exists, and their shell is sound."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from ranks import REPOSITORY

FOLDER = REPOSITORY / "containers"


def packages(text: str) -> set[str]:
    """The Debian packages that a definition installs."""
    found = re.search(r"--no-install-recommends([^&]*?)(?:&&|rm )", text.replace("\\\n", " "))
    assert found
    return set(found[1].split())


def test_both_install_the_same_packages() -> None:
    texts = [(FOLDER / name).read_text() for name in ("Dockerfile", "privimage.def")]
    assert packages(texts[0]) == packages(texts[1]) and "libturbojpeg0-dev" in packages(texts[0])


def test_the_shell_of_the_apptainer_definition_is_sound(tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck")
    text = (FOLDER / "privimage.def").read_text()
    for section in ("post", "environment", "runscript", "test"):
        part = re.search(rf"^%{section}\n((?:    .*\n|\n)*)", text, re.MULTILINE)
        assert part
        script = tmp_path / f"{section}.sh"
        script.write_text("#!/bin/sh\n" + part[1])
        done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_the_documents_show_the_commands_of_the_definitions() -> None:
    shown = (REPOSITORY / "docs" / "cluster.md").read_text()
    for name in ("Dockerfile", "privimage.def"):
        command = re.search(
            r": ((?:docker|apptainer) build .*?)(?: \(|$)", (FOLDER / name).read_text(), re.MULTILINE
        )
        assert command and command[1] in shown


@pytest.mark.parametrize("tool", ["docker"])
def test_the_image_builds_and_answers(tool: str) -> None:
    """Where there is a daemon and its base image is at hand or can be fetched."""
    if (
        shutil.which(tool) is None
        or subprocess.run([tool, "info"], capture_output=True, check=False).returncode
    ):
        pytest.skip(f"needs a running {tool} daemon")
    base = "debian:bookworm-slim"
    if subprocess.run([tool, "pull", base], capture_output=True).returncode:
        pytest.skip(f"needs the base image {base}")
    build = [tool, "build", "-q", "-f", str(FOLDER / "Dockerfile"), "-t", "privimage-test", str(REPOSITORY)]
    subprocess.run(build, check=True, capture_output=True)
    done = subprocess.run(
        [tool, "run", "--rm", "privimage-test", "methods"], capture_output=True, text=True, check=True
    )
    assert "PrivImage+D" in done.stdout
