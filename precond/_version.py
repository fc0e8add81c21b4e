"""The version. Read by setuptools and by CMakeLists.txt; kept nowhere else."""

__version__ = "0.1.0"
