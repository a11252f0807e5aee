"""Package layout. Metadata are in pyproject.toml; no torch is imported and no GPU is probed."""

from setuptools import setup

setup(
    # `kernels` is installed under another name: the import name `kernels` belongs to a package
    # that transformers imports.
    packages=[
        "fedsim",
        "fedsim.data",
        "fedsim.data.embedded",
        "fedsim.domains",
        "fedsim.evaluate",
        "fedsim.report",
        "fedsim.strategies",
        "fedsim_kernels",
    ],
    package_dir={"fedsim_kernels": "kernels"},
    package_data={"fedsim": ["presets/*.toml", "report/*.html.j2", "py.typed"]},
)
