"""A wheel of the project holds every file that the program reads."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_a_wheel_holds_every_data_file(monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.chdir(ROOT)
    distribution = setuptools.Distribution()
    distribution.parse_config_files()
    packed = {
        path
        for package, patterns in distribution.package_data.items()
        for pattern in patterns
        for path in Path(package).glob(pattern)
    }
    needed = {
        path
        for folder in ("grpo", "models", "data")
        for path in Path(folder).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert len(needed) > 30 and needed <= packed, sorted(map(str, needed - packed))
