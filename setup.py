"""The package's metadata: this is its one home (the version's is scx_enroll/__init__.py)."""

import os
import re

from setuptools import setup

HERE = os.path.dirname(os.path.abspath(__file__))


def read(name):
    """Give the text of a file beside this one; a checkout in the making may lack the README."""
    try:
        with open(os.path.join(HERE, name), encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return ""


setup(
    name="scx-enroll",
    version=re.search(r'^__version__ = "([^"]+)"', read(os.path.join("scx_enroll", "__init__.py")), re.MULTILINE).group(1),
    description="Gets the SCOM UNIX/Linux agent's TLS certificate signed by Microsoft AD CS, and keeps it so",
    long_description=read("README.md"),
    long_description_content_type="text/markdown",
    author="the scx-enroll authors",
    license="MIT",
    classifiers=[
        "Environment :: No Input/Output (Daemon)",
        "Intended Audience :: System Administrators",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: System :: Systems Administration",
    ],
    packages=["scx_enroll"],
    python_requires=">=3.9",
    install_requires=[
        "certsrv==2.1.1",  # exactly: ca overrides methods that certsrv does not promise to keep
        "cryptography>=3.3",  # Debian 11
        "requests>=2.25",  # Debian 11
    ],
    entry_points={"console_scripts": ["scx-enroll = scx_enroll.__main__:main"]},
    zip_safe=False,
)
