"""Builds based_ops._C with CMake. Metadata is in pyproject.toml.

Environment: BASED_CUDA = AUTO (default: CUDA kernels when nvcc is found), ON or OFF;
BASED_CUDA_ARCHITECTURES; CMAKE_ARGS, further arguments to CMake.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r"project\(based VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text())[1]


def check_tools() -> None:
    """Stops with one sentence that says what to type."""
    if importlib.util.find_spec("torch") is None:
        sys.exit(
            "based-kernels: no torch in the Python that runs this build: "
            "pip install 'torch>=2.11', then pip install --no-build-isolation ."
        )
    if shutil.which("cmake") is None:
        sys.exit("based-kernels: no CMake found: pip install cmake ninja")
    compilers = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    if not any(name and shutil.which(name.split()[0]) for name in compilers):
        sys.exit("based-kernels: no C++ compiler found: apt install g++ (or set CXX)")


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        check_tools()
        build = Path(self.build_temp).resolve()
        arguments = [
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DBASED_BUILD_MODULE=ON",
            "-DBASED_BUILD_TESTS=OFF",
            f"-DBASED_CUDA={os.environ.get('BASED_CUDA', 'AUTO')}",
        ]
        if "BASED_CUDA_ARCHITECTURES" in os.environ:
            architectures = os.environ["BASED_CUDA_ARCHITECTURES"]
            arguments.append(f"-DBASED_CUDA_ARCHITECTURES={architectures}")
        if shutil.which("ninja"):
            arguments += ["-G", "Ninja"]
        if shutil.which("ccache"):
            arguments += [
                f"-DCMAKE_{language}_COMPILER_LAUNCHER=ccache" for language in ("CXX", "CUDA")
            ]
        arguments += os.environ.get("CMAKE_ARGS", "").split()
        jobs = str(os.cpu_count() or 1)
        prefix = Path(self.get_ext_fullpath(ext.name)).resolve().parents[1]
        subprocess.run(["cmake", "-S", ROOT, "-B", build, *arguments], check=True)
        subprocess.run(["cmake", "--build", build, "--target", "_C", "-j", jobs], check=True)
        subprocess.run(
            ["cmake", "--install", build, "--component", "module", "--prefix", prefix], check=True
        )


setup(
    version=VERSION,
    ext_modules=[Extension("based_ops._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
