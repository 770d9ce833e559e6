"""Install with one of the extras, since fbgemm comes in two builds that share a folder:

    CPU:  pip install -e ".[cpu]" && pip install --no-deps torchrec==1.8.0
    GPU:  pip install -e ".[gpu]"

TorchRec itself asks for the CUDA build of fbgemm, so on a CPU machine it is installed without its dependencies,
which `[cpu]` lists instead.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "joint/__init__.py").read_text())
assert VERSION

BASE = [
    "torch==2.13.0",
    "numpy",
    "pyarrow",
    "pandas",
    "tensorboard",
    "pyyaml",
    "omegaconf>=2.4",
    "tqdm",
]
REPORT = ["scipy", "matplotlib"]
SERVE = ["onnxruntime==1.31.1", "faiss-cpu==1.15.1"]
DOCS = ["mkdocs-material>=9.7"]
HTTP = ["fastapi", "uvicorn"]  # of the demo
EXPORT = ["onnx==1.23.2", "onnxscript==0.7.2", *SERVE]  # an export answers its own golden requests before it is done
EXTRAS = {
    "cpu": ["fbgemm-gpu-cpu==1.8.0", "tensordict", "torchmetrics==1.0.3", "pyre-extensions"],
    "gpu": ["fbgemm-gpu==1.8.0", "torchrec==1.8.0"],
    "report": REPORT,
    "export": EXPORT,
    "serve": SERVE,
    "http": HTTP,
    "docs": DOCS,
    "dev": ["pytest", "ruff", "mypy", *REPORT, *EXPORT, *HTTP, "httpx", *DOCS],
}
# The experiments travel inside the wheel, where `joint train configs/sdcl.yaml` finds them.
CONFIGS = ["joint.configs", "joint.configs.papers", "joint.configs.ablations"]


def of_an_index(readme: str) -> str:
    """The README where its neighbours are not: without its pictures, and names in place of links to other files."""
    without_pictures = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", readme)
    return re.sub(r"\[([^]]*)\]\((?!https?:|#)[^)]*\)", r"\1", without_pictures)


setup(
    name="joint-cascade-trainer",
    version=VERSION.group(1),
    description="Joint retrieval / pre-ranking / ranking trainer with shared TorchRec tables",
    long_description=of_an_index((HERE / "README.md").read_text()),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["joint*", "towers*", "losses*"]), *CONFIGS],
    package_dir={"joint.configs": "configs"},
    package_data={"joint": ["py.typed"], "towers": ["py.typed"], "losses": ["py.typed"]}
    | {package: ["*.yaml"] for package in CONFIGS},
    entry_points={"console_scripts": ["joint=joint.__main__:main"]},
    keywords="recommender systems, retrieval, pre-ranking, ranking, knowledge distillation, PyTorch, TorchRec",
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    install_requires=BASE,
    extras_require=EXTRAS,
)
