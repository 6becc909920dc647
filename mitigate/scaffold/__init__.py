"""Writes a new package with one method, from the templates beside this file."""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from mitigate import __version__
from mitigate.errors import ConfigError

#: Template -> file of the package, in the order in which the files are listed.
FILES = {
    "pyproject.toml.j2": "pyproject.toml",
    "README.md.j2": "README.md",
    "gitignore.j2": ".gitignore",
    "method.py.j2": "src/{package}/{name}.py",
    "package.py.j2": "src/{package}/__init__.py",
    "py.typed.j2": "src/{package}/py.typed",
    "conf.py.j2": "src/{package}/conf/__init__.py",
    "stack.yaml.j2": "src/{package}/conf/stack/{package}.yaml",
    "stack_pair.yaml.j2": "src/{package}/conf/stack/{package}_{partner}.yaml",
    "test_method.py.j2": "tests/test_{name}.py",
}

#: Longer names would push lines of the templates over their limit.
_LONGEST = 30
#: Class names that the method file imports.
_IMPORTED = frozenset(
    """
    Access Any AttentionScores ClassVar Fidelity Method MethodState ModelFacts Paper Point Role Rows Self Sequence
    Subscription Tags Tensor
    """.split()  # noqa: SIM905 - a list of words
)
#: Where a name is expected, YAML and command lines read these as values.
_VALUES = frozenset({"false", "inf", "nan", "no", "null", "off", "on", "true", "yes"})
#: The package has a folder of this name beside the method file.
_FOLDERS = frozenset({"conf"})


@dataclass(frozen=True)
class NewPackage:
    """Names of a package that shall be written.

    Parameters
    ----------
    name
        Name of the method, as users write it.
    partner
        An installed method for the preset that shows a stack of two.

    Raises
    ------
    ConfigError
        If the name cannot be a Python module and an option at once.
    """

    name: str
    partner: str

    def __post_init__(self) -> None:
        def refuse(reason: str) -> ConfigError:
            return ConfigError(f"{self.name!r} cannot name a method: {reason}")

        if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", self.name):
            raise refuse("write lower-case letters, digits and single underscores, such as my_method")
        if keyword.iskeyword(self.name):
            raise refuse("it is a word of the Python language; add to it, such as " + self.name + "_method")
        if self.name in _VALUES:
            raise refuse(f"configurations read it as a value; add to it, such as {self.name}_method")
        if self.class_name in _IMPORTED or self.name in _FOLDERS:
            raise refuse(f"the package needs that name itself; add to it, such as {self.name}_method")
        if len(self.name) > _LONGEST:
            raise refuse(f"it has {len(self.name)} characters, and at most {_LONGEST} fit")

    @property
    def package(self) -> str:
        """Importable package."""
        return f"mitigate_{self.name}"

    @property
    def distribution(self) -> str:
        """What pip installs, and the default folder."""
        return self.package.replace("_", "-")

    @property
    def class_name(self) -> str:
        """Class of the method."""
        return "".join(part.capitalize() for part in self.name.split("_"))

    def render(self) -> dict[str, str]:
        """Return path within the package -> content."""
        environment = Environment(
            loader=PackageLoader("mitigate.scaffold", "."),
            undefined=StrictUndefined,
            keep_trailing_newline=True,
            autoescape=False,  # Python, TOML and YAML, not HTML
        )
        names = {
            "name": self.name,
            "partner": self.partner,
            "package": self.package,
            "distribution": self.distribution,
            "class_name": self.class_name,
            "requirement": _compatible(__version__),
        }
        return {path.format(**names): environment.get_template(source).render(names) for source, path in FILES.items()}

    def write(self, folder: Path, *, force: bool = False) -> list[Path]:
        """Write the package.

        Parameters
        ----------
        folder
            Where; made if it does not exist.
        force
            Write into a folder that holds files already, over those of the same names; other files stay.

        Returns
        -------
        list
            The files written.

        Raises
        ------
        ConfigError
            If the folder holds files and ``force`` is off, or the files cannot be written.
        """
        files = {folder / path: text for path, text in self.render().items()}
        try:
            if not force and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ConfigError(
                    f"{folder} exists already; name another folder with --package, or write over its files of the same "
                    f"names with --force"
                )
            for path, text in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {folder}: {error}") from error
        return list(files)


def _compatible(version: str) -> str:
    """Return the requirement on this project that a package written today states: this minor version."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return f">={major}.{minor},<{major}.{minor + 1}"
