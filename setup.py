"""Packaging. The tools' settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

VIZ = ["matplotlib>=3.7"]
TENSORBOARD = ["tensorboard>=2.14"]
EXPORT = ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.22"]
EVAL = ["faster-coco-eval>=1.6"]
# transformers since its registry of patched classes; timm has the backbone of its DETR.
HF = ["transformers>=5.17", "safetensors>=0.5", "timm>=1.0"]
# triton 3.6's interpreter needs numpy < 2.4; newer tritons take any.
TEST = ["pytest>=8", "pytest-xdist>=3", "hypothesis>=6.100", "setuptools", "wheel"]
# Another minor version of ruff formats differently.
LINT = ["ruff>=0.17,<0.18", "mypy>=1.15"]

setup(
    name="detr_fast",
    version="0.1.0",
    description="DETR with its padding, position embedding and attention as Triton kernels behind torch ops",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # `detr_fast/kernels` and `detr_fast/benchmarks` are links to `kernels/` and `benchmarks/`: found here, and never
    # installed under those top-level names.
    packages=find_packages(include=["detr_fast", "detr_fast.*"]),
    package_data={"detr_fast": ["py.typed"], "detr_fast.benchmarks": ["coco_sizes.json"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy",
        "orjson>=3.9",
        "pycocotools>=2.0.7",
        "scipy>=1.10",
        "tqdm>=4.60",
        "pillow",
    ],
    extras_require={
        "viz": VIZ,
        "tensorboard": TENSORBOARD,
        "hf": HF,
        "eval": EVAL,
        "export": EXPORT,
        "all": VIZ + TENSORBOARD + EVAL + HF + EXPORT,
        "test": TEST + LINT + VIZ + TENSORBOARD,
    },
    entry_points={"console_scripts": ["detr-fast = detr_fast.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
