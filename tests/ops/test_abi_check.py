"""What `make test` runs beside a second torch must hold beside this one too, so that it fails here first."""

from tests import abi_check


def test_every_op_beside_its_reference(capsys):
    abi_check.main()
    assert "19 passed, 0 failed" in capsys.readouterr().out
