"""What Metal is told before it starts, on Macs only; MLX itself isn't there yet."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mlx_mtp.system.metal import DEFAULTS, set_defaults


def test_defaults_are_a_mac_s_and_never_over_a_users_own_values():
    linux: dict[str, str] = {}
    set_defaults(linux, "linux")
    assert linux == {}
    mac = {"MLX_MAX_OPS_PER_BUFFER": "7"}
    set_defaults(mac, "darwin")
    assert mac == DEFAULTS | {"MLX_MAX_OPS_PER_BUFFER": "7"}


@pytest.mark.parametrize("name", DEFAULTS)
def test_they_are_set_before_mlx_is_there(name: str):
    """MLX reads them when its first array is made; a program that imports this package first has them in time."""
    code = (
        "import sys; sys.platform = 'darwin'; import mlx_mtp, os; "
        f"print('mlx.core' in sys.modules, os.environ[{name!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", DEFAULTS[name]]
