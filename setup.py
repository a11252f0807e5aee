"""Package layout and the C++ kernels. Imports no torch and probes no GPU.

csrc/*.cpp is compiled once for each instruction set and linked into one library without Python
symbols, `fedsim_kernels/_csrc`, which `native.py` loads with ctypes. Where it cannot be compiled,
the installation goes on without it and the PyTorch reference runs instead; every run says so.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

COMMON = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
          "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]  # fmt: skip
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
# Inline functions of the standard library are merged at link time and the first one is kept, so
# the least demanding instruction set is linked first.
ISAS = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}


class BuildKernels(build_ext):
    """Compile every source for every instruction set; link without an OpenMP library.

    The OpenMP symbols are left to the runtime that torch has loaded (see `native.py`).
    """

    def build_extension(self, ext: Extension) -> None:
        objects: list[tuple[str, str, list[str]]] = []
        temp = Path(self.build_temp)
        temp.mkdir(parents=True, exist_ok=True)
        for source in ext.sources:
            flags = ISAS if Path(source).stem != "isa" else {"any": []}
            for isa, extra in flags.items():
                out = str(temp / f"{Path(source).stem}_{isa}.o")
                objects.append((source, out, [*COMMON, *extra, f"-DFEDSIM_ISA={isa}"]))
        compiler = self.compiler.compiler_cxx[0] if self.compiler.compiler_cxx else "c++"
        with ThreadPoolExecutor() as pool:
            list(pool.map(
                lambda job: self.spawn([compiler, *job[2], "-c", job[0], "-o", job[1]]), objects
            ))  # fmt: skip
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.spawn([compiler, "-shared", "-o", str(target), *(out for _, out, _ in objects)])


setup(
    # `kernels` is installed under another name: the import name `kernels` belongs to a package
    # that transformers imports.
    packages=[
        "fedsim",
        "fedsim.data",
        "fedsim.data.embedded",
        "fedsim.domains",
        "fedsim.evaluate",
        "fedsim.flowertune",
        "fedsim.report",
        "fedsim.strategies",
        "fedsim_kernels",
        "fedsim_kernels.cuda",
    ],
    package_dir={"fedsim_kernels": "kernels"},
    package_data={"fedsim": ["presets/*.toml", "report/*.html.j2", "py.typed"]},
    ext_modules=[
        Extension(
            "fedsim_kernels._csrc",
            sorted(str(p) for p in Path("csrc").glob("*.cpp")),
            depends=sorted(str(p) for p in Path("csrc").glob("*.h")),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
