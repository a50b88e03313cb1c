"""What pyproject.toml cannot say: the wheel has the folder ``conf`` as the package ``recipes.conf``."""

from pathlib import Path

from setuptools import find_packages, setup

GROUPS = ["", *sorted(str(path.relative_to("conf")) for path in Path("conf").rglob("*") if path.is_dir())]
CONF = {".".join(["recipes.conf", *Path(group).parts]): str(Path("conf") / group) for group in GROUPS}

setup(
    packages=[*find_packages(include=["fisher_reg*", "recipes*"]), *CONF],
    package_dir=CONF,
    package_data={"fisher_reg": ["py.typed"], **dict.fromkeys(CONF, ["*.yaml"])},
)
