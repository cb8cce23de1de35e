"""An import contract: what a package shows is in its `__init__.py`, and nobody else imports past it."""

from __future__ import annotations

from typing import Any

from importlinter import Contract, ContractCheck, fields, output


class FaceContract(Contract):
    """No module imports a module of another package, but for those that are named in `light`."""

    light = fields.ListField(subfield=fields.StringField(), required=False, default=())

    def check(self, graph: Any, verbose: bool) -> ContractCheck:
        """Every import of a module two or more folders below the root from outside of its package."""
        allowed = set(self.light or ())
        past = [
            (importer, imported)
            for importer in sorted(graph.modules)
            for imported in sorted(graph.find_modules_directly_imported_by(importer))
            if imported.count(".") > 1
            and imported.startswith("edgeprune.")
            and imported not in allowed
            and _package(importer) != _package(imported)
        ]
        return ContractCheck(kept=not past, metadata={"past": past})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """One line for each import past a face."""
        for importer, imported in check.metadata["past"]:
            output.print_error(f"{importer} imports {imported}: import it from {_package(imported)}")


def _package(module: str) -> str:
    return ".".join(module.split(".")[:2])
