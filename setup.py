"""Maps the folder kernels/ to the package cramfast.kernels; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    packages=[
        "cramfast",
        "cramfast.accelerated",
        "cramfast.data",
        "cramfast.train",
        "cramfast.downstream",
        "cramfast.evaluate",
        "cramfast.kernels",
    ],
    package_dir={"cramfast": "cramfast", "cramfast.kernels": "kernels"},
)
