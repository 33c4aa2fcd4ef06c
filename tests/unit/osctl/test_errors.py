"""Exit codes: a contract with scripts, so each number is here as well."""

from __future__ import annotations

from osctl.errors import ApiError, ExitCode, OsctlError, UsageError


def test_exit_codes_never_change() -> None:
    assert {code.name: code.value for code in ExitCode} == {
        "OK": 0,
        "ERROR": 1,
        "USAGE": 2,
        "NOT_FOUND": 3,
        "CONFLICT": 4,
        "TIMED_OUT": 5,
        "RUN_FAILED": 6,
        "CANCELLED": 7,
        "NOT_ALLOWED": 8,
        "NO_CAPACITY": 9,
        "NO_PROGRESS": 10,
    }


def test_an_error_has_the_code_of_its_class_unless_it_says_otherwise() -> None:
    assert OsctlError("x").exit_code == ExitCode.ERROR
    assert UsageError("x").exit_code == ExitCode.USAGE
    assert ApiError("x", status=404, exit_code=ExitCode.NOT_FOUND).exit_code == ExitCode.NOT_FOUND
