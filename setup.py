"""Packaging. The tools' settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# Links to the folders at the root. Git writes them as text files where it may not make links (on Windows without
# developer mode), and the package would be built without its kernels.
for link in ("kernels", "benchmarks"):
    if not (HERE / "detr_fast" / link / "__init__.py").is_file():
        raise SystemExit(
            f"detr_fast/{link} is not the link to {link}/ that it should be, so the package would lack it. Check out "
            f"with links (git config core.symlinks true, then git checkout -- detr_fast/{link}), or copy the folder "
            f"{link} in its place."
        )

VIZ = ["matplotlib>=3.7"]
TENSORBOARD = ["tensorboard>=2.14"]
WANDB = ["wandb>=0.17"]
MLFLOW = ["mlflow-skinny>=2.10"]
EXPORT = ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.22"]
EVAL = ["faster-coco-eval>=1.6", "hotcoco>=1.3"]
VIDEO = ["av>=12"]
COMPLETION = ["shtab>=1.6"]
# transformers since its registry of patched classes; timm has the backbone of its DETR.
HF = ["transformers>=5.17", "safetensors>=0.5", "timm>=1.0", "huggingface_hub>=0.30"]
# triton 3.6's interpreter needs numpy < 2.4; newer tritons take any.
TEST = ["pytest>=8", "pytest-xdist>=3.0.2", "hypothesis>=6.100", "setuptools", "wheel"]
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
    package_data={
        "detr_fast": ["py.typed"],
        "detr_fast.evaluation": ["report.html"],
        "detr_fast.benchmarks": ["coco_sizes.json"],
    },
    # orjson, tqdm and pillow: no older versions, because of CVE-2024-27454, CVE-2024-34062 and CVE-2024-28219.
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=1.24",
        "orjson>=3.9.15",
        "pycocotools>=2.0.7",
        "scipy>=1.10",
        "tqdm>=4.66.3",
        "pillow>=10.3",
        "pyyaml>=6.0.1",
    ],
    extras_require={
        "viz": VIZ,
        "tensorboard": TENSORBOARD,
        "hf": HF,
        "eval": EVAL,
        "completion": COMPLETION,
        "video": VIDEO,
        "export": EXPORT,
        "wandb": WANDB,
        "mlflow": MLFLOW,
        "all": VIZ + TENSORBOARD + EVAL + HF + EXPORT + COMPLETION + VIDEO + WANDB + MLFLOW,
        "test": TEST + LINT + VIZ + TENSORBOARD,
    },
    entry_points={"console_scripts": ["detr-fast = detr_fast.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
