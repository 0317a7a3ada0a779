"""Installs a torch that fits this machine into the running interpreter's environment. Standard library only.

    python scripts/install_torch.py            install if missing; an installed torch >= 2.11 is left as it is
    python scripts/install_torch.py --print    print the installed version

On x86-64 Linux, PyPI's torch is a CUDA build of several gigabytes. Without a GPU this asks for the release with
the label `+cpu`, which no CUDA build carries, first from what pip knows (local wheels, mirrors), then from
PyTorch's CPU index. With an NVIDIA GPU it takes PyPI's build; with an AMD GPU it says how to get a ROCm build.
"""

import glob
import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys

MINIMUM = (2, 11)
RELEASE = "2.13.0"  # what a fresh environment gets
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def installed() -> str | None:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def is_recent(version: str) -> bool:
    match = re.match(r"(\d+)\.(\d+)", version)
    return bool(match) and (int(match[1]), int(match[2])) >= MINIMUM


def has_nvidia_gpu() -> bool:
    if glob.glob("/dev/nvidia[0-9]*") or glob.glob("/proc/driver/nvidia/gpus/*"):
        return True
    smi = shutil.which("nvidia-smi")  # WSL has no /dev/nvidia0
    return bool(smi) and b"GPU 0" in subprocess.run([smi, "-L"], capture_output=True).stdout


def has_amd_gpu() -> bool:
    """/dev/kfd is the compute driver; a GPU is a node of its topology with SIMD units."""
    for path in glob.glob("/sys/class/kfd/kfd/topology/nodes/*/properties"):
        with open(path) as file:
            if re.search(r"^simd_count [1-9]", file.read(), re.MULTILINE):
                return True
    return False


def pip(*arguments: str) -> bool:
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-q", *arguments]
    print("+ pip install", *arguments, flush=True)
    return subprocess.run(command).returncode == 0


def install() -> bool:
    only_cpu_on_pypi = platform.system() != "Linux" or platform.machine() != "x86_64"
    if has_nvidia_gpu() or only_cpu_on_pypi:
        return pip(f"torch=={RELEASE}")
    if has_amd_gpu():
        print(
            f"An AMD GPU is present: install the ROCm build of torch {'.'.join(map(str, MINIMUM))} or newer into "
            f"{sys.prefix} as https://pytorch.org/get-started shows, then run this again.",
            file=sys.stderr,
        )
        return False
    return pip(f"torch=={RELEASE}+cpu") or pip(f"torch=={RELEASE}+cpu", "--extra-index-url", CPU_INDEX)


def main() -> int:
    version = installed()
    if "--print" in sys.argv[1:]:
        print(version or "")
        return 0 if version else 1
    if version and is_recent(version):
        return 0
    if not install():
        print(f"torch {RELEASE} could not be installed for Python {platform.python_version()}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
