"""The bit-exact tests as other CPUs would run them: the instruction sets of this one, switched off from the top down.

    make test-cpus                  every emulation that this CPU can do; minutes each
    make test-cpus ARGS=--short     the oldest CPU alone, on the files that multiply matrices; what CI runs

torch, oneDNN, MKL and numpy each choose code by what the CPU has; each reads one variable that makes it choose for an
older one. Only what the CPU really has is asked for: ATEN_CPU_CAPABILITY=avx512 on an AVX2 machine ends in SIGILL.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

SHORT = ("alignment", "cache", "chain", "init_save_load", "row_split", "walk", "walking")
"""Files whose comparisons rest on matrix products, in about a minute."""


def numpy_above(version: str) -> str:
    """numpy's dispatched features of this CPU above x86-64 `version`, for NPY_DISABLE_CPU_FEATURES."""
    found = [name for name in __cpu_dispatch__ if __cpu_features__[name]]
    return " ".join(name for name in found if not (name.startswith("X86_V") and name <= f"X86_{version}"))


def emulations() -> dict[str, dict[str, str]]:
    """Name -> environment of every CPU that this one can stand in for, oldest first."""
    oldest = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
    found = {"sse4": {**oldest, "NPY_DISABLE_CPU_FEATURES": numpy_above("V2")}}
    if __cpu_features__["X86_V3"]:
        avx2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
        avx2["NPY_DISABLE_CPU_FEATURES"] = numpy_above("V3")
        found["avx2"] = {**avx2, "MKL_CBWR": "AVX2"}
        found["avx2, MKL strict"] = {**avx2, "MKL_CBWR": "AVX2,STRICT"}
        found["avx2, MKL's own choice"] = avx2
    if __cpu_features__["X86_V4"]:
        avx512 = {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
        found["avx512"] = {**avx512, "MKL_CBWR": "AVX512"}
        found["avx512, MKL's own choice"] = avx512
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="the oldest CPU, on the files that multiply matrices")
    asked = parser.parse_args()
    tests = Path(__file__).parent
    files = [str(tests / f"test_{name}.py") for name in SHORT] if asked.short else [str(tests)]
    cpus = emulations()
    failed = []
    for name, settings in list(cpus.items())[: 1 if asked.short else None]:
        print(f"{name}: {' '.join(f'{key}={value!r}' for key, value in settings.items())}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile"]
        command += ["-m", "bits and not gpu and not slow", *files]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings}
        if subprocess.run(command, check=False, env=environment).returncode:
            failed.append(name)
    print(f"failed on: {'; '.join(failed)}" if failed else "every promise of equal bits held on each of these CPUs")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
