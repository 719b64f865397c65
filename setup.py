"""PrivImage: package, dependencies, extras and the `privimage` command."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
found = re.search(r'^__version__ = "(.+)"$', (here / "privimage/__init__.py").read_text(), re.MULTILINE)
assert found, "privimage/__init__.py must state __version__"
readme = here / "README.md"

setup(
    name="privimage",
    version=found.group(1),
    description="Differentially private image synthesis, from a laptop to a cluster",
    long_description=readme.read_text() if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["privimage", "privimage.*"]),
    package_data={"privimage": ["py.typed", "evaluation/*.j2", "releases/*.j2"]},
    entry_points={"console_scripts": ["privimage = privimage.cli:main"]},
    # The upper bound on torch decides between builds: where a CPU wheel is at hand pip takes it, elsewhere
    # the CUDA build.
    install_requires=[
        "torch>=2.6,<2.14",
        "torchvision>=0.21,<0.29",
        "numpy>=1.26,<3",
        "scipy>=1.11,<2",
        "opacus>=1.5.4,<1.7",
        "dp-accounting>=0.6,<0.7",
        "randomgen>=2.5,<3",
        "cryptography>=42",
        "omegaconf>=2.3,<3",
        "pydantic>=2.7,<3",
        "typer>=0.12,<1",
        "rich>=13,<16",
        "pillow>=10.1",
        "tensorboard>=2.16,<3",
        "torch-fidelity>=0.4.0,<0.5",
        "scikit-learn>=1.4,<2",
        "matplotlib>=3.8,<4",
        "jinja2>=3.1,<4",
        "pyyaml>=6",
        "safetensors>=0.4,<1",
    ],
    extras_require={
        "cluster": [
            "deepspeed>=0.17,<0.20",
            "mpi4py>=4.0,<5",
            "openmpi>=5.0.8,<6; platform_system == 'Linux'",
        ],
        "dicom": ["pydicom>=3,<4"],
        "heif": ["pillow-heif>=0.18,<2"],
        "hdf5": ["h5py>=3.10,<4"],
        "parquet": ["pyarrow>=15"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "mypy>=1.10",
            "pre-commit>=3.7",
            "types-PyYAML",
            # what the tests of readers and releases need
            "h5py>=3.10,<4",
            "pyarrow>=15",
            "pydicom>=3,<4",
            "pillow-heif>=0.18,<2",
            "webdataset>=0.2,<2",
            "datasets>=2.19",
        ],
    },
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
