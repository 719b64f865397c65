"""Whom images belong to, by their paths in a folder, a zip or a tar."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath

import numpy as np

from privimage.data.arrays import with_groups
from privimage.data.decode import Source
from privimage.errors import UserError

KEY = "data.sensitive.group"


def grouped_by_path(source: Source, below: Sequence[PurePath], group: str, root: Path) -> Source:
    """The images of a set at `root` with their groups, from their paths `below` it (N,).

    `group` is the number of a level of sub-folders, 1 for those in `root`, or a regular expression that is
    searched in the path, whose first group is the name, or all that it matches. Raises UserError that names
    an image which belongs to no group.
    """
    if group.isdecimal():
        level = int(group)
        for path in below:
            if len(path.parts) <= level:
                raise UserError(f"{KEY}: {path.as_posix()} in {root} is in no folder of level {level}")
        return with_groups(source, [path.parts[level - 1] for path in below], str(root))
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise UserError(f"{KEY}: {group!r} is no regular expression ({error})") from None
    names = []
    for path in below:
        if (found := pattern.search(path.as_posix())) is None:
            raise UserError(f"{KEY}: {group!r} does not match {path.as_posix()} in {root}")
        names.append(found[1 if pattern.groups else 0] or "")
    return with_groups(source, names, str(root))


def labelled_below_groups(source: Source, root: Path) -> Source:
    """Labels of images that lie in GROUP/CLASS/ below `root`, by the names of the classes.

    Raises UserError that names a folder which is missing (see `classes_of_groups`).
    """
    groups = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    of_groups = {
        str(group): {
            entry.name for entry in group.iterdir() if entry.is_dir() and not entry.name.startswith(".")
        }
        for group in groups
    }
    classes = classes_of_groups(of_groups)
    numbers = {name: number for number, name in enumerate(classes)}
    labels = []
    for name in source.names:
        parts = Path(name).relative_to(root).parts
        if len(parts) < 3:
            raise UserError(f"{KEY}: {name} is not in GROUP/CLASS/ below {root}")
        labels.append(numbers[parts[1]])
    return replace(source, labels=np.array(labels, np.int64), classes=classes)


def classes_of_groups(of_groups: dict[str, set[str]]) -> tuple[str, ...]:
    """The classes, from the names of the class folders of each group, by the place of the group.

    Each group must have a sub-folder for each class, if an empty one: the only group with a class must not
    decide whether the class exists. Raises UserError that names a folder which is missing.
    """
    classes = tuple(sorted(set().union(*of_groups.values())))
    for group, names in of_groups.items():
        if missing := sorted(set(classes) - names):
            raise UserError(
                f"{group}: no sub-folder {missing[0]!r}, which other groups have; make an empty one, since "
                "what classes there are is public and must not depend on who is in the set"
            )
    return classes
