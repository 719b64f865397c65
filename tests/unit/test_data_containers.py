"""Sets in the containers that people have are the same sets; each is read where its own library wrote it."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from data_sets import numbered, read, save_folder
from PIL import Image

from privimage.config import Config
from privimage.data.decode import Source
from privimage.data.readers import holds_test_split, open_source
from privimage.data.request import Columns
from privimage.data.sources import sensitive_source
from privimage.data.transforms import Form
from privimage.errors import UserError

IMAGES, LABELS = numbered(30), np.arange(30) % 3
NAMES = ("cat", "dog", "owl")
PEOPLE = [f"p{number // 4}" for number in range(30)]


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(IMAGES[number, ..., 0]).save(file, "png")
    return file.getvalue()


def style_zip(root: Path, labels: list | None, folder: str = "00000") -> Path:
    """As StyleGAN's and EDM's dataset_tool writes it."""
    with zipfile.ZipFile(root / "set.zip", "w") as archive:
        names = [f"{folder}/img{number:08d}.png" for number in range(30)]
        for number, name in enumerate(names):
            archive.writestr(name, png(number))
        table = None if labels is None else list(map(list, zip(names, labels, strict=True)))
        archive.writestr("dataset.json", json.dumps({"labels": table}))
    return root / "set.zip"


def folder_zip(root: Path, entries: bool) -> Path:
    """A folder of class folders, packed on a Mac, with or without entries for the folders themselves."""
    with zipfile.ZipFile(root / "set.zip", "w") as archive:
        for name in (*NAMES, "yak") if entries else ():
            archive.mkdir(f"mine/{name}")
        for number, label in enumerate(LABELS):
            archive.writestr(f"mine/{NAMES[label]}/{number}.png", png(number))
            archive.writestr(f"__MACOSX/mine/{NAMES[label]}/._{number}.png", b"x")
        archive.writestr("mine/notes.txt", "x")
    return root / "set.zip"


def tars(root: Path) -> Path:
    """Two tars by the webdataset library, one of other images, and a file of another kind."""
    wds = pytest.importorskip("webdataset")
    (root / "tars").mkdir()
    for name, numbers in (("train-0", range(17)), ("train-1", range(17, 30)), ("test-0", range(5))):
        with wds.TarWriter(str(root / "tars" / f"{name}.tar")) as writer:
            for number in numbers:
                label = int(LABELS[number])
                sample = {"__key__": f"a/s{number:04d}", "png": png(number), "cls": label}
                writer.write(sample | {"json": {"kind": NAMES[label], "label": label}})
    (root / "tars" / "readme.md").write_text("x")
    return root / "tars"


def hugging_face(root: Path, way: str) -> Path:
    """As the datasets library writes it: Parquet of the hub's layout, or `save_to_disk`."""
    datasets = pytest.importorskip("datasets")
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))}
    cells = [{"bytes": png(number), "path": None} for number in range(30)]
    columns = {"image": cells, "label": LABELS.tolist(), "person": PEOPLE}
    made = datasets.Dataset.from_dict(
        columns, features=datasets.Features(features | {"person": datasets.Value("string")})
    )
    if way == "disk":
        datasets.DatasetDict({"train": made, "test": made.select(range(5))}).save_to_disk(str(root / "hf"))
        return root / "hf"
    (root / "hf" / "data").mkdir(parents=True)
    made.select(range(17)).to_parquet(
        str(root / "hf" / "data" / "train-00000-of-00002.parquet"), batch_size=5
    )
    made.select(range(17, 30)).to_parquet(str(root / "hf" / "data" / "train-00001-of-00002.parquet"))
    made.select(range(5)).to_parquet(str(root / "hf" / "data" / "test-00000-of-00001.parquet"))
    return root / "hf"


def hdf5(root: Path, **changes: np.ndarray | None) -> Path:
    h5py = pytest.importorskip("h5py")
    arrays = {
        "images": IMAGES.transpose(0, 3, 1, 2),
        "labels": LABELS,
        "classes": list(NAMES),
        "person": PEOPLE,
    }
    with h5py.File(root / "set.h5", "w") as file:
        for name, values in (arrays | changes).items():
            if values is not None:
                file[name] = values
    return root / "set.h5"


def table(root: Path, suffix: str, columns: tuple[str, str, str] = ("path", "label", "person")) -> Path:
    """A list beside a folder of all images; a file of the folder is not in it."""
    save_folder(root / "photos", IMAGES, np.zeros(30, int))
    Image.new("L", (8, 8)).save(root / "photos" / "class0" / "other.png")
    rows = [
        dict(
            zip(
                columns,
                (f"photos/class0/{number:04d}.png", NAMES[LABELS[number]], PEOPLE[number]),
                strict=True,
            )
        )
        for number in range(30)
    ]
    path = root / f"list{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        separator = ";" if suffix == ".semicolon.csv" else ","
        lines = [separator.join(columns), *(separator.join(row.values()) for row in rows)]
        path.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


SETS: dict[str, tuple[str, Callable[[Path], Path], tuple[str, ...], Columns]] = {
    "zip of StyleGAN": ("zip", lambda root: style_zip(root, LABELS.tolist()), ("0", "1", "2"), Columns()),
    "zip of folders": ("zip", lambda root: folder_zip(root, False), NAMES, Columns()),
    "tars": ("webdataset", tars, ("0", "1", "2"), Columns()),
    "tars, a field": ("webdataset", tars, NAMES, Columns(label="kind")),
    "parquet": ("parquet", lambda root: hugging_face(root, "hub"), NAMES, Columns(group="person")),
    "datasets on disk": ("parquet", lambda root: hugging_face(root, "disk"), NAMES, Columns(group="person")),
    "hdf5": ("hdf5", hdf5, NAMES, Columns(group="person")),
    "csv": ("csv", lambda root: table(root, ".csv"), NAMES, Columns(group="person")),
    "csv of Excel": ("csv", lambda root: table(root, ".semicolon.csv"), NAMES, Columns(group="person")),
    "json lines": (
        "jsonl",
        lambda root: table(root, ".jsonl", ("file", "kind", "who")),
        NAMES,
        Columns("file", "kind", "who"),
    ),
}


def whose(source: Source) -> list[tuple[bytes, int, str | None]]:
    """Image, label and group of each, whatever the order."""
    groups = source.groups or [None] * len(source)
    return sorted(
        (source.image(index, Form(8, 1))[0].tobytes(), int(source.labels[index]), groups[index])
        for index in range(len(source))
    )


@pytest.mark.parametrize("name", SETS)
def test_a_container_holds_the_set(tmp_path: Path, name: str) -> None:
    kind, build, classes, columns = SETS[name]
    path = build(tmp_path)
    source = open_source(kind, path, "train", columns=columns)
    groups = PEOPLE if columns.group else [None] * 30
    pictures = [image.transpose(2, 0, 1).tobytes() for image in IMAGES]
    assert source.classes == classes
    assert whose(source) == sorted(zip(pictures, LABELS.tolist(), groups, strict=True))
    alone = open_source(kind, path, "train", labelled=False)
    assert alone.classes == ("all",) and len(alone) == 30
    # What a worker process reads is the same.
    workers = 1 if name in ("zip of StyleGAN", "parquet", "hdf5") else 0
    assert (read(source, workers=workers).images == read(source).images).all()


@pytest.mark.parametrize("name", ["tars", "parquet", "datasets on disk"])
def test_held_out_images_are_in_files_named_so(tmp_path: Path, name: str) -> None:
    kind, build, _, _ = SETS[name]
    path = build(tmp_path)
    assert holds_test_split(kind, path) and len(open_source(kind, path, "test")) == 5


def test_files_that_are_not_read_are_counted(tmp_path: Path) -> None:
    told = {
        "zip": (folder_zip(tmp_path, False), "set.zip: 1 file skipped: 1 .txt"),
        "webdataset": (tars(tmp_path), "tars: 1 file skipped: 1 .md"),
        "csv": (table(tmp_path, ".csv"), "1 images beside the listed ones are not in the list"),
    }
    for kind, (path, line) in told.items():
        assert len(notes := open_source(kind, path, "train").notes) == 1 and line in notes[0]


def sensitive(config: Config, **settings: object) -> Source:
    changed = config.data.sensitive.model_copy(update=settings)
    return sensitive_source(
        config.model_copy(update={"data": config.data.model_copy(update={"sensitive": changed})}), "train"
    )


def test_classes_of_a_sensitive_container_are_stated_or_named_by_it(
    tmp_path: Path, tiny_config: Config
) -> None:
    """Never counted from the labels, nor from the folders that images happen to lie in."""
    listed = table(tmp_path, ".csv")
    for classes in (None, 3):
        with pytest.raises(UserError, match=r"data\.sensitive\.classes: "):
            sensitive(tiny_config, kind="csv", path=listed, classes=classes)
    found = sensitive(tiny_config, kind="csv", path=listed, classes=("yak", *NAMES))
    assert found.classes == ("yak", *NAMES) and set(found.labels) == {1, 2, 3}
    with pytest.raises(UserError, match="'cat' is none of its classes, which are dog, owl"):
        sensitive(tiny_config, kind="csv", path=listed, classes=("dog", "owl"))
    numbers = style_zip(tmp_path, LABELS.tolist())
    with pytest.raises(UserError, match=r"data\.sensitive\.classes: needed"):
        sensitive(tiny_config, kind="zip", path=numbers)
    assert sensitive(tiny_config, kind="zip", path=numbers, classes=4).classes == ("0", "1", "2", "3")
    packed = folder_zip(tmp_path, False)
    with pytest.raises(UserError, match=r"data\.sensitive\.classes: needed as a list of names"):
        sensitive(tiny_config, kind="zip", path=packed)
    assert sensitive(tiny_config, kind="zip", path=packed, classes=(*NAMES, "yak")).classes == (*NAMES, "yak")
    assert sensitive(tiny_config, kind="zip", path=folder_zip(tmp_path, True)).classes == (*NAMES, "yak")


def test_stated_names_decide_the_order_of_the_classes_of_a_folder(
    tmp_path: Path, tiny_config: Config
) -> None:
    path = save_folder(tmp_path / "set", IMAGES, LABELS)
    stated = ("other", "class2", "class1", "class0")
    found = sensitive(tiny_config, kind="folder", path=path, classes=stated)
    assert found.classes == stated and (found.labels[:10] == 3).all()
    with pytest.raises(
        UserError, match=r"data\.sensitive\.classes: .*'class1' is no class of those that were"
    ):
        sensitive(tiny_config, kind="folder", path=path, classes=("class0", "class2"))


def without_label(root: Path) -> Path:
    with tarfile.open(root / "set.tar", "w") as archive:
        for name, content in (("0.png", png(0)), ("0.cls", b"1"), ("1.png", png(1))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return root / "set.tar"


def lines(root: Path, text: str) -> Path:
    (root / "list.csv").write_text(text)
    return root / "list.csv"


def damaged(root: Path) -> Path:
    path = style_zip(root, LABELS.tolist())
    path.write_bytes(path.read_bytes()[:-40])
    return path


BAD: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "zip, damaged": ("zip", damaged, "set.zip: not a zip file, or damaged"),
    "zip without labels": (
        "zip",
        lambda root: style_zip(root, None, "."),
        "neither a dataset.json nor a folder",
    ),
    "zip, half labels": ("zip", lambda root: style_zip(root, [None] + [0] * 29), "image 0 has no label"),
    "zip, labels of two kinds": ("zip", lambda root: style_zip(root, [[0, 1]] + [0] * 29), "not of one kind"),
    "tar, a sample without label": (
        "webdataset",
        without_label,
        "sample 1 has no label: no .cls, .txt or field",
    ),
    "tar, not one": ("webdataset", lambda root: lines(root, "x"), "not readable as a tar"),
    "csv, no column": (
        "csv",
        lambda root: lines(root, "a,b\n1,2\n"),
        "none of its columns may be meant .found: a, b.; im",
    ),
    "csv, empty": ("csv", lambda root: lines(root, "path,label\n"), "lists no image"),
    "csv, twice": ("csv", lambda root: lines(root, "path,label\na.png,0\na.png,1\n"), "a.png twice"),
    "csv, no label": ("csv", lambda root: lines(root, "path,label\na.png,\n"), "row 1 has no label"),
    "csv, a comma too many": (
        "csv",
        lambda root: lines(root, "path,label\na,b.png,0\n"),
        "line 2 has more cells",
    ),
    "csv, a file that is not there": (
        "csv",
        lambda root: lines(root, "path,label\na.png,0\n"),
        "no such file",
    ),
    "jsonl, not JSON": (
        "jsonl",
        lambda root: lines(root, '{"path": "a.png"\n'),
        "line 1 is not a JSON object",
    ),
    "hdf5, not one": ("hdf5", lambda root: lines(root, "x"), "not an HDF5 file, or damaged"),
    "hdf5, no images": (
        "hdf5",
        lambda root: hdf5(root, images=None),
        "no dataset 'images' .found: classes, labels",
    ),
    "hdf5, fewer labels": (
        "hdf5",
        lambda root: hdf5(root, labels=LABELS[:9]),
        "30 images need as many labels",
    ),
    "parquet, not one": ("parquet", lambda root: lines(root, "x"), "expected a .parquet or .arrow file"),
    "a folder as zip": ("zip", lambda root: root, "a folder, and kind zip is one file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_container_is_told_in_one_line(tmp_path: Path, name: str) -> None:
    kind, build, told = BAD[name]
    if kind in ("hdf5", "parquet"):
        pytest.importorskip({"hdf5": "h5py", "parquet": "pyarrow"}[kind])
    path = build(tmp_path)
    with pytest.raises(UserError, match=told) as caught:
        read(open_source(kind, path, "train"))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "module", "extra"), [("parquet", "pyarrow", "parquet"), ("hdf5", "h5py", "hdf5")]
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, module: str, extra: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(UserError, match=rf"needs {module}, .*pip install 'privimage\[{extra}\]'"):
        open_source(kind, lines(tmp_path, "x"), "train")


def dicom(path: Path, values: np.ndarray, **changes: object) -> None:
    """A file with everything that must not leave it."""
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    image = pydicom.Dataset()
    image.file_meta, image.PatientName, image.PatientID = meta, "Doe^Jane", "SECRET-77"
    image.Rows, image.Columns, image.SamplesPerPixel, image.BitsAllocated = *values.shape, 1, 16
    image.BitsStored, image.HighBit, image.PixelRepresentation = 12, 11, 0
    image.PhotometricInterpretation, image.RescaleSlope, image.RescaleIntercept = "MONOCHROME2", 2, -1000
    image.WindowCenter, image.WindowWidth = 1, 1  # of the file, which are not used
    for name, value in changes.items():
        setattr(image, name, value)
    image.PixelData = values.astype(np.uint16).tobytes()
    image.save_as(path, enforce_file_format=True)


STORED = np.arange(64).reshape(8, 8) * 60  # 0 to 3,780 of 4,095


def test_medical_images_are_rescaled_and_leave_their_names_behind(tmp_path: Path) -> None:
    place = tmp_path / "set" / "class0"
    place.mkdir(parents=True)
    dicom(place / "a.dcm", STORED)
    dicom(place / "1.2.840.113619", STORED, PhotometricInterpretation="MONOCHROME1")
    (place / "notes.77").write_text("x")
    source = open_source("folder", tmp_path / "set", "train")
    assert len(source) == 2 and "1 file skipped: 1 .77" in source.notes[0]
    with pytest.raises(UserError, match=r"its pixels are .*data\.window: \[low, high\]"):
        source.image(0, Form(8, 1))
    units = STORED * 2.0 - 1000
    for window, low, high in (((-500, 2500), -500, 2500), ("full", -1000, 4095 * 2 - 1000)):
        other, grey = (source.image(index, Form(8, 1, window=window))[0][0] for index in (0, 1))
        share = np.clip((units - low) / (high - low), 0, 1)
        assert (grey == np.rint(share * 255)).all() and (other == np.rint((1 - share) * 255)).all()
    # Nothing that is kept of the set has a word of them.
    from data_sets import scratch

    read(source, form=Form(8, 1, window="full"))
    kept = b"".join(file.read_bytes() for file in Path(scratch()).rglob("*") if file.is_file())
    assert b"PatientID" not in kept and b"SECRET" not in kept and b"Jane" not in kept


def test_medical_images_of_8_bits_and_damaged_ones(tmp_path: Path) -> None:
    place = tmp_path / "set" / "class0"
    place.mkdir(parents=True)
    plain = {"BitsStored": 8, "HighBit": 7, "RescaleSlope": 1, "RescaleIntercept": 0}
    dicom(place / "a.dcm", STORED // 16, **plain)
    source = open_source("folder", tmp_path / "set", "train")
    assert (source.image(0, Form(8, 1))[0][0] == STORED // 16).all()
    (place / "a.dcm").write_bytes((place / "a.dcm").read_bytes()[:-60])
    with pytest.raises(UserError, match=r"a\.dcm: not readable as an image") as caught:
        source.image(0, Form(8, 1))
    assert "SECRET" not in str(caught.value) and "\n" not in str(caught.value)


def zip_of_people(root: Path, form: str, last: bool = True) -> Path:
    """Images by `form`, and entries for the folders of all classes and people, but the `last` one's."""
    folders = [form.rpartition("/")[0].format(kind=kind, who=f"p{who}") for who in range(8) for kind in NAMES]
    with zipfile.ZipFile(root / "set.zip", "w") as archive:
        above = {str(folder) for name in folders for folder in PurePosixPath(name).parents}
        for name in sorted({*(folders if last else folders[:-1]), *above} - {"."}):
            archive.mkdir(name)
        for number, label in enumerate(LABELS):
            archive.writestr(form.format(kind=NAMES[label], who=PEOPLE[number], n=number), png(number))
    return root / "set.zip"


def tars_of_people(root: Path, fields: list[dict]) -> Path:
    """Three samples with a .json each, whose names say whom they belong to."""
    with tarfile.open(root / "set.tar", "w") as archive:
        for number, more in enumerate(fields):
            sample = {"png": png(number), "json": json.dumps({"label": 0, **more}).encode()}
            for suffix, content in sample.items():
                info = tarfile.TarInfo(f"./ward{number // 2}/pat-{number % 2}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return root / "set.tar"


PATHS = {
    "classes of people": ("mine/{kind}/{who}/{n}.png", "3"),
    "people of classes": ("{who}/{kind}/{n}.png", "1"),
    "people of classes, packed": ("mine/{who}/{kind}/{n}.png", "2"),
    "a regular expression": ("{kind}/{who}-{n}.png", r"(p\d+)-"),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_zip_says_whose_images_they_are_by_paths(tmp_path: Path, tiny_config: Config, name: str) -> None:
    form, group = PATHS[name]
    more = {"kind": "zip", "path": zip_of_people(tmp_path, form), "group": group}
    source = sensitive(tiny_config, **more)
    pictures = [image.transpose(2, 0, 1).tobytes() for image in IMAGES]
    assert source.classes == NAMES and whose(source) == sorted(
        zip(pictures, LABELS.tolist(), PEOPLE, strict=True)
    )


def test_a_zip_of_stylegan_has_groups_too(tmp_path: Path) -> None:
    path = style_zip(tmp_path, LABELS.tolist())
    source = open_source("zip", path, "train", columns=Columns(group=r"img\d+(\d)\d\."))
    assert list(source.groups) == [str(number // 10) for number in range(30)]


@pytest.mark.parametrize(
    ("group", "groups"),
    [
        ("who", ["x", "7", "x"]),
        ("1", ["ward0", "ward0", "ward1"]),
        (r"pat-(\d)$", ["0", "1", "0"]),
    ],
)
def test_samples_of_a_tar_say_whose_they_are(tmp_path: Path, group: str, groups: list[str]) -> None:
    path = tars_of_people(tmp_path, [{"who": "x"}, {"who": 7}, {"who": "x"}])
    assert list(open_source("webdataset", path, "train", columns=Columns(group=group)).groups) == groups


def faces(root: Path, table: str | None) -> Path:
    """As torchvision keeps CelebA."""
    folder = root / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (178, 218)).save(folder / f"{number:06d}.jpg")
    if table is not None:
        (root / "celeba" / "identity_CelebA.txt").write_text(table)
    return root


def test_faces_of_celeba_belong_to_identities(tmp_path: Path) -> None:
    path = faces(tmp_path, "000000.jpg 2880\n000001.jpg 17\n000002.jpg 2880\n")
    source = open_source("celeba", path, "train", labelled=False, columns=Columns(group="identity"))
    assert list(source.groups) == ["2880", "17", "2880"]


NOBODYS: dict[str, tuple[str, Callable[[Path], Path], str, str]] = {
    "zip, level": ("zip", lambda root: zip_of_people(root, "{kind}/{n}.png"), "2", "in no folder of level 2"),
    "zip, no match": (
        "zip",
        lambda root: zip_of_people(root, "{kind}/{n}.png"),
        "(who)",
        "does not match cat/0",
    ),
    "zip, no expression": ("zip", lambda root: zip_of_people(root, "{kind}/{n}.png"), "(", "no regular expr"),
    "tar, no field": (
        "webdataset",
        lambda root: tars_of_people(root, [{"who": 1}, {}]),
        "who",
        r"sample \./ward0/pat-1 has no field 'who' in its \.json",
    ),
    "tar, nobody": (
        "webdataset",
        lambda root: tars_of_people(root, [{"who": 1}, {"who": None}]),
        "who",
        r"pat-1\.png belongs to no group",
    ),
    "tar, level": ("webdataset", lambda root: tars_of_people(root, [{}]), "2", "in no folder of level 2"),
    "celeba, a column": ("celeba", lambda root: faces(root, ""), "person", "by 'identity', not 'person'"),
    "celeba, no list": ("celeba", lambda root: faces(root, None), "identity", r"no identity_CelebA\.txt"),
    "celeba, a face more": ("celeba", lambda root: faces(root, "000000.jpg 1\n"), "identity", "000001.jpg"),
}


@pytest.mark.parametrize("name", NOBODYS)
def test_an_image_that_belongs_to_nobody_is_named(tmp_path: Path, name: str) -> None:
    kind, build, group, told = NOBODYS[name]
    with pytest.raises(UserError, match=told) as caught:
        open_source(kind, build(tmp_path), "train", columns=Columns(group=group))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("data.sensitive.group: ")


def test_a_person_in_a_zip_does_not_decide_which_classes_there_are(
    tmp_path: Path, tiny_config: Config
) -> None:
    path = zip_of_people(tmp_path, "{who}/{kind}/{n}.png", last=False)
    with pytest.raises(UserError, match=r"set\.zip: p7: no sub-folder '.*', which other groups have"):
        sensitive(tiny_config, kind="zip", path=path, group="1")
    assert sensitive(tiny_config, kind="zip", path=path, group="1", classes=NAMES).classes == NAMES
