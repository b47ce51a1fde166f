"""Packages, version and the C++/CUDA extension. Metadata and tool settings are in pyproject.toml.

The extension is optional: without a compiler, without torch in the build environment (pip's build isolation) or with a torch
older than its stable ABI, the install succeeds, says so here and again at run time, and the plain PyTorch reference is used.

Environment: WANDA_FAST_CUDA=0 skips CUDA; TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX and MAX_JOBS mean what they mean to PyTorch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).resolve().parent
ARCH_LIST = ("8.0", "9.0", "10.0")  # built when no GPU is visible and TORCH_CUDA_ARCH_LIST is not set
SETTINGS = ("sources", "define_macros", "include_dirs", "library_dirs", "libraries", "runtime_library_dirs", "extra_compile_args",
            "extra_link_args", "language")  # what differs between the extension with and without CUDA  # fmt: skip
TARGET_TORCH = (2, 10)  # first stable ABI with lists of tensors and parallel_for


def say(text: str) -> None:
    print(f"wanda_fast: {text}", file=sys.stderr, flush=True)


def version() -> str:
    match = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "wanda_fast" / "__init__.py").read_text(), re.MULTILINE)
    assert match is not None
    return match.group(1)


def packages() -> list[str]:
    found = find_namespace_packages(str(ROOT), include=["wanda_fast", "wanda_fast.*"], exclude=["*.__pycache__"])
    return [*found, "wanda_fast.kernels"]


def cuda_home() -> tuple[str | None, str]:
    """Folder of the real CUDA toolkit and why there is none. An `nvcc` on PATH may be a wrapper script, so nvcc itself is asked."""
    given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = os.path.join(given, "bin", "nvcc") if given else shutil.which("nvcc")
    if nvcc is None and os.path.exists("/usr/local/cuda/bin/nvcc"):
        nvcc = "/usr/local/cuda/bin/nvcc"
    if nvcc is None or not os.path.exists(nvcc):
        return None, f"no nvcc in CUDA_HOME={given}" if given else "no nvcc found"
    try:
        shown = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull],
                               capture_output=True, text=True, timeout=60)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{nvcc} does not run: {error}"
    here = re.search(r"^#\$ _HERE_=(.+)$", shown.stderr + shown.stdout, re.MULTILINE)
    if here is None:
        return None, f"{nvcc} --dryrun does not name its folder: {(shown.stderr or shown.stdout).strip()[:300]}"
    return os.path.dirname(os.path.realpath(here.group(1).strip())), ""


def nvcc_version(home: str) -> tuple[int, int]:
    text = subprocess.run([os.path.join(home, "bin", "nvcc"), "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", text)
    return (int(match.group(1)), int(match.group(2))) if match else (0, 0)


def cxx_runtime() -> list[str]:
    """Link argument for the C++ runtime that torch itself has loaded; empty where it is not known (no Linux).

    A compiler that has no shared libstdc++ links a static one, a second runtime beside torch's. Seen with GCC 13 and torch 2.11: an error
    thrown here then ended the process with a segmentation fault in place of an exception.
    """
    try:
        with open("/proc/self/maps") as maps:
            found = {line.split()[-1] for line in maps if re.search(r"/libstdc\+\+\.so[.\d]*$", line.rstrip())}
    except OSError:
        return []
    return sorted(found)[:1]


def extension() -> dict[str, object]:
    """`ext_modules` and `cmdclass` for setup(), empty where the extension cannot be built."""
    try:
        import torch
    except ImportError as error:
        say(f"C++ extension skipped: torch cannot be imported while building ({error}); "
            "install torch first and use --no-build-isolation")  # fmt: skip
        return {}
    installed = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if installed < TARGET_TORCH:
        say(f"C++ extension skipped: its stable ABI needs torch 2.10 or newer, this is {torch.__version__}")
        return {}

    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))
    cuda_sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    home = None
    if not cuda_sources:
        reason = "no CUDA sources"
    elif os.environ.get("WANDA_FAST_CUDA") == "0":
        reason = "WANDA_FAST_CUDA=0"
    elif torch.version.cuda is None:
        reason = f"this torch ({torch.__version__}) is built without CUDA"
    else:
        home, reason = cuda_home()
        if home is not None:
            toolkit = nvcc_version(home)
            if toolkit[0] != int(torch.version.cuda.split(".")[0]):
                reason = f"toolkit {toolkit[0]}.{toolkit[1]} in {home} differs in major version from torch's CUDA {torch.version.cuda}"
                home = None
            else:
                os.environ["CUDA_HOME"] = home
                if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
                    archs = [arch for arch in ARCH_LIST if arch != "10.0" or toolkit >= (12, 8)]
                    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(archs) + "+PTX"
    if home is None:
        say(f"CUDA part of the extension skipped: {reason}")

    from torch.utils import cpp_extension  # reads CUDA_HOME when imported

    # Every compiler that has GCC's vector types; CPU speed comes from units per instruction set, not from -march.
    define = f"-DTORCH_TARGET_VERSION=0x{TARGET_TORCH[0]:02x}{TARGET_TORCH[1]:02x}000000000000"
    cxx = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi", "-Wno-maybe-uninitialized", define]

    def cpu_extension():
        return cpp_extension.CppExtension("wanda_fast._C", sources, extra_compile_args={"cxx": cxx}, extra_link_args=cxx_runtime(),
                                          py_limited_api=True)  # fmt: skip

    def cuda_extension():
        nvcc = ["-std=c++17", "-O3", "--threads=2", define, "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden"]
        return cpp_extension.CUDAExtension("wanda_fast._C", [*sources, *cuda_sources], py_limited_api=True, extra_link_args=cxx_runtime(),
                                           extra_compile_args={"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": nvcc})  # fmt: skip

    class BuildExtension(cpp_extension.BuildExtension):
        """Steps down, in words, from CUDA to C++ to nothing; an install never fails because of the extension."""

        def run(self) -> None:
            compiler, inplace = self.compiler, self.inplace
            stages = [("CUDA and C++", cuda_extension)] if home is not None else []
            for name, make in [*stages, ("C++", cpu_extension)]:
                # The object stays: setuptools has already written its own notes on it.
                vars(self.extensions[0]).update((key, value) for key, value in vars(make()).items() if key in SETTINGS)
                self.compiler, self.inplace = compiler, inplace
                try:
                    super().run()
                except (Exception, SystemExit) as error:
                    say(f"building the {name} extension FAILED: {error}")
                else:
                    say(f"built the {name} extension")
                    return
            say("WARNING: no extension was built; wanda_fast will use its plain PyTorch reference")
            self.extensions, self.inplace = [], inplace

    first = cuda_extension() if home is not None else cpu_extension()
    return {
        "ext_modules": [first],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    version=version(),
    packages=packages(),
    # kernels/ is no package of its own: a top-level `kernels` would hide Hugging Face's.
    package_dir={"wanda_fast": "wanda_fast", "wanda_fast.kernels": "kernels"},
    package_data={"wanda_fast": ["py.typed"], **{name: ["*"] for name in packages() if name.startswith("wanda_fast.assets")}},
    **extension(),
)
