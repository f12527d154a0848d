"""What the checks found, for people and as JSON."""

from __future__ import annotations

import enum
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from serving.conformance.rules import Group


class Verdict(enum.StrEnum):
    """How a check ended; the value is what the report says."""

    PASS = "pass"
    VIOLATION = "VIOLATION"
    NOT_OFFERED = "not offered"
    SKIPPED = "skipped"


_STYLES = {Verdict.PASS: "green", Verdict.VIOLATION: "bold red", Verdict.NOT_OFFERED: "dim", Verdict.SKIPPED: "yellow"}
_TITLES = {
    Group.REQUIRED: "required by the Open Inference Protocol",
    Group.EXTENSION: "Triton's extensions",
    Group.GRPC: "gRPC's own services and limits",
    Group.ROBUSTNESS: "in no document, and clients rely on it",
}


@dataclass(frozen=True)
class Result:
    """How one check ended."""

    id: str
    group: Group
    rule: str
    verdict: Verdict
    wanted: str  # of a violation
    got: str  # of a violation
    reason: str  # of a check that was not run to its end
    duration_s: float


@dataclass(frozen=True)
class Report:
    """How every check ended, and what was checked."""

    target: str
    server: str
    extensions: list[str]
    model: str
    version: str
    results: list[Result]

    @property
    def violations(self) -> list[Result]:
        return [result for result in self.results if result.verdict is Verdict.VIOLATION]

    def summary(self) -> str:
        """One line."""
        counts = Counter(result.verdict for result in self.results)
        groups = Counter(result.group for result in self.violations)
        where = ", ".join(f"{group} {groups[group]}" for group in Group if groups[group])
        return (
            f"{len(self.results)} checks: {counts[Verdict.PASS]} passed, {counts[Verdict.VIOLATION]} violations"
            f"{f' ({where})' if where else ''}, {counts[Verdict.NOT_OFFERED]} not offered, "
            f"{counts[Verdict.SKIPPED]} skipped"
        )

    def print(self, console: Console) -> None:
        """The report for people: one line a check, and what was wanted and got where a rule is broken."""
        server = self.server or "a server without a name"
        said = f"{self.target}: {server}, model {self.model} version {self.version or '(none)'}"
        console.print(Text(said, style="bold"), soft_wrap=True)
        console.print(Text(f"extensions: {', '.join(self.extensions) or 'none'}"), soft_wrap=True)
        width = max(len(result.id) for result in self.results)
        for group in Group:
            console.print(Text(f"\n{_TITLES[group]}", style="bold"))
            for result in self.results:
                if result.group is group:
                    _print_result(console, result, width)
        console.print(Text(f"\n{self.summary()}", style="bold"), soft_wrap=True)

    def write_json(self, path: Path) -> None:
        """The same for programs; the file appears complete or not at all.

        Raises:
            OSError: it cannot be written.
        """
        document = {**asdict(self), "summary": self.summary()}
        draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        draft.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(path)


def _print_result(console: Console, result: Result, width: int) -> None:
    line = Text("  ").append(f"{result.verdict:<11}", _STYLES[result.verdict])
    line.append(f"  {result.id:<{width}}  ").append(result.rule, "dim")
    console.print(line, soft_wrap=True)
    notes = {"wanted": result.wanted, "got": result.got, "why": result.reason}
    for name, text in notes.items():
        if text:
            console.print(Text(f"{'':13}{name:<6}  {text}"), soft_wrap=True)
