"""What a verification found: one line a check, and whether all of them held."""

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    name: as `permutation`. ok: whether it held. figure: the largest relative difference, where the check measures one;
    `inf` where nothing could be compared. tolerance: what the figure may be. where: what was checked, or where it
    failed. seconds: how long it took.
    """

    name: str
    ok: bool
    figure: float | None = None
    tolerance: float | None = None
    where: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        figure = "" if self.figure is None else f"{self.figure:.1e} (at most {self.tolerance:.0e})"
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.name:<12} {figure:<24} {self.where} [{self.seconds:.1f} s]"


@dataclass(frozen=True, slots=True)
class Report:
    """Every check of one verification, in the order they ran.

    Example:
        >>> report = Report((Check("checker", True), Check("permutation", False, 0.5, 1e-5, "blocks.0.ffn")))
        >>> report.ok, report.failed[0].where
        (False, 'blocks.0.ffn')
    """

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.ok)

    def __str__(self) -> str:
        total = f"{len(self.checks) - len(self.failed)} of {len(self.checks)} checks passed"
        return "\n".join([*map(str, self.checks), total])

    def to_json(self) -> dict:
        """Return the report as JSON values; a figure that is not finite becomes text."""
        checks = [asdict(check) for check in self.checks]
        for check in checks:
            if check["figure"] is not None and not math.isfinite(check["figure"]):
                check["figure"] = str(check["figure"])
        return {"ok": self.ok, "checks": checks}
